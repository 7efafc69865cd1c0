"""Trained rows of a table of tokens in peft's files: `TRAINABLE_TOKENS`, and `trainable_token_indices` of its LoRA.

peft stores the rows themselves, one for each id in the order of its list, and sets them into the table: so the base's
numbers do not matter to it, and a table may have been made taller for them before. jlora trains changes of rows that
the table has (`TrainedTokens`), and whole rows behind its end (`NewTokens`).
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, TypeAlias

import jax
import numpy as np

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array
from jlora._trees._leaf import Leaf
from jlora._types import PyTree
from jlora.io import _peft_config, _peft_fields
from jlora.io import _peft_layout as layout
from jlora.io._peft_fields import Fields
from jlora.io._peft_read import Collector, Index
from jlora.io._record import several
from jlora.methods.base import Method
from jlora.methods.new_tokens import NewTokens
from jlora.methods.sum import Sum
from jlora.methods.trained_tokens import TrainedTokens

KIND = "TRAINABLE_TOKENS"


@dataclasses.dataclass(frozen=True)
class Config:
    """What a configuration of `TRAINABLE_TOKENS` says of the numbers, under peft's own names."""

    said: ClassVar[Fields] = {"peft_type": KIND, "init_weights": True}
    rows: ClassVar[tuple[str, str]] = ("trainable_tokens_delta", "base_layer.weight")

    token_indices: tuple[int, ...]
    target_modules: tuple[str, ...] | str | None = None

    def token_ids(self, module: str) -> tuple[int, ...]:
        """The ids of the rows that are trained in one module; ValueError where it is none of those that are named."""
        named = self.target_modules
        if isinstance(named, tuple) and not set(named) & set(_peft_config.endings(module)):
            raise ValueError(f"{module!r} has rows of tokens, and target_modules does not name it")
        return self.token_indices

    def token_names(self) -> Mapping[str, tuple[int, ...]]:
        """The ids of the rows that are trained, by what the names of their modules end in."""
        named = self.target_modules if isinstance(self.target_modules, tuple) else ("",)
        return dict.fromkeys(named, self.token_indices)


def read(path: Path, content: Fields) -> Config:
    """The configuration that a file holds, whose fields are these.

    Raises:
      ValueError: fields of the wrong type, and fields that are not known; all at once.
    """
    bad = _peft_fields.unknown(content, {"token_indices", "target_modules", "init_weights"} | _peft_config.HISTORY)
    ids = _peft_fields.ids("token_indices", content.get("token_indices"), bad)
    modules = _peft_fields.target_modules("target_modules", content.get("target_modules"), bad)
    if bad:
        raise ValueError(f"{path} cannot be loaded:" + several(bad))
    return Config(ids, modules)


# --- methods ------------------------------------------------------------------------------------------------------


def method(ids: tuple[int, ...], new: int) -> Method:
    """The method that trains the rows of these ids, and so many behind the end."""
    trained = [TrainedTokens(ids=ids)] if ids else []
    both = [*trained, *([NewTokens(count=new)] if new else [])]
    return both[0] if len(both) == 1 else Sum(*both)


def are_all(recipe: Recipe) -> bool:
    """Whether trained rows are all that a recipe has, as they are stored."""
    stored = all(isinstance(rows.made, Array) and rows.made.trained for rows in recipe.rows)
    return bool(recipe.rows) and stored and recipe == Recipe(rows=recipe.rows)


# --- one table ----------------------------------------------------------------------------------------------------


def check_table(module: str, leaf: Leaf, value: PyTree) -> None:
    """ValueError where a leaf is no table of tokens with numbers."""
    if not targets.embeddings(leaf.path, value):
        raise ValueError(
            f"{module!r} has rows of tokens, and {leaf.path!r} of shape {leaf.shape} is no table that is looked up by "
            "their ids: trained rows of a head, or of what else a module may be, are not read"
        )
    if isinstance(value, jax.ShapeDtypeStruct):
        raise ValueError(f"{leaf.path!r} is abstract, and the rows of {module!r} are stored as values, not changes")


def from_torch(
    leaf: Leaf, ids: tuple[int, ...], tensor: np.ndarray, base: np.ndarray, table: np.ndarray | None
) -> tuple[Method, dict[str, np.ndarray | np.float32]]:
    """The method that trains the rows of a tensor in one table, and its factors.

    Args:
      table: the one that they were trained in, with the base's rows and perhaps more, where the file has it.

    Raises:
      ValueError: ids beyond the table that do not follow its end; another table.
    """
    size, trained = len(base), dict(zip(ids, tensor, strict=True))
    new = {}
    if table is not None:
        kept = np.setdiff1d(np.arange(size), ids)
        if len(table) < size or not np.array_equal(table[kept].astype(base.dtype), base[kept]):
            raise ValueError(
                f"the file has all of {leaf.path!r}, whose rows that are not trained are not those of params: put its "
                "values into params first"
            )
        new = dict(enumerate(table[size:], size))
    new |= {n: row for n, row in trained.items() if n >= size}
    if sorted(new) != list(range(size, size + len(new))):
        raise ValueError(
            f"{leaf.path!r} has the rows 0 to {size - 1}, and the file those of {sorted(new)[:5]}: new ones follow the "
            f"end, {size}, {size + 1}, ...; give params whose table is as that of the model that peft saw"
        )
    old = sorted(n for n in trained if n < size)
    shaped = lambda rows: np.reshape(np.stack(rows), (-1, *leaf.sizes("o")))  # noqa: E731
    values: dict[str, np.ndarray | np.float32] = {}
    if old:
        change = layout.change(np.stack([trained[n] for n in old]).astype(base.dtype), base[old])
        values = {"rows": shaped(change), "s_rows": np.float32(1)}
    if new:
        values["rows_2" if values else "rows"] = shaped([new[n] for n in sorted(new)])
    return method(tuple(old), len(new)), values


def to_torch(
    recipe: Recipe, leaf: Leaf, factors: Mapping[str, np.ndarray], base: np.ndarray
) -> tuple[tuple[int, ...], np.ndarray]:
    """The inverse: all ids in ascending order, and their rows in float32."""
    found: dict[int, np.ndarray] = {}
    for rows in recipe.rows:
        values = np.asarray(factors[rows.made.arrays[0].name], np.float32).reshape(-1, base.shape[1])
        if rows.new(leaf):
            found |= zip(rows.at, values, strict=True)
        else:
            s = np.float32(factors[rows.network.s])
            for n, row in zip(rows.at, values, strict=True):
                found[n] = (found[n] if n in found else base[n]) + s * row
    return tuple(sorted(found)), np.stack([found[n] for n in sorted(found)]).astype(np.float32)


# --- a whole file -------------------------------------------------------------------------------------------------

AnyTokens: TypeAlias = "Config | _peft_config.Config"


def collect(reader: Collector, config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Takes all tensors of a file of the kind `TRAINABLE_TOKENS`."""
    found = reader.modules(tensors, config.rows, f"an adapter of {KIND}")
    for module, named in without_tied(found, config, reader).items():
        try:
            take(reader, config, module, named, reader.book.slot(module))
        except ValueError as error:
            reader.bad.append(str(error))


def take(
    reader: Collector, config: AnyTokens, module: str, named: Mapping[str, np.ndarray], at: tuple[str, Index]
) -> None:
    """The rows of some tokens, where a module has such, of a table that may end before them.

    What the table was is there, too, where peft saw it resized.
    """
    (path, index), (rows, whole) = at, config.rows
    table = named.get(whole)
    if rows not in named:
        if table is not None:
            reader.bad.append(f"extra {reader.prefix + module + '.' + whole!r}: no row of it is trained")
        return
    leaf, one = reader.leaf(path, index)
    check_table(module, leaf, reader.leaves[path])
    ids, base = config.token_ids(module), layout.table(one, reader.base(leaf, index))
    fits = reader.fits(module, rows, named[rows], leaf, (len(ids), base.shape[1]))
    if table is not None:
        fits &= reader.fits(module, whole, table, leaf, (max(len(base), *table.shape[:1]), base.shape[1]))
    if fits:
        made, values = from_torch(one, ids, named[rows], base, table)
        reader.put(module, leaf, made, index, values)


def without_tied(
    found: Mapping[str, Mapping[str, np.ndarray]], config: AnyTokens, reader: Collector
) -> dict[str, Mapping[str, np.ndarray]]:
    """The modules without the tied heads: params has no leaf for one, and its rows are those of the table.

    What the configuration names and the file does not have is noted: but for a head that is tied, which peft does not
    always write.
    """
    rows = {module: named for module, named in found.items() if config.rows[0] in named}
    here = {module for module in rows if reader.book.has(module)}

    def is_one_of_them(module: str) -> bool:
        same = [m for m in here if _same(rows[module], rows[m])]
        return any(_ids(config, m) == (_ids(config, module) or _ids(config, m)) for m in same)

    tied = {module for module in rows if module not in here and is_one_of_them(module)}
    for name, ids in config.token_names().items():
        in_params = any(module.endswith(name) for module in reader.book.modules)
        if not any(module.endswith(name) for module in rows) and (
            in_params or ids not in [_ids(config, module) for module in here]
        ):
            what = f"of {name!r}" if name else "of any module"
            reader.bad.append(f"missing the rows {what} for the tokens {list(ids)[:5]}, which the configuration trains")
    return {module: named for module, named in found.items() if module not in tied}


def _same(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> bool:
    return a.keys() == b.keys() and all(
        x.shape == b[kind].shape and x.tobytes() == b[kind].tobytes() for kind, x in a.items()
    )


def _ids(config: AnyTokens, module: str) -> tuple[int, ...] | None:
    try:
        return config.token_ids(module)
    except ValueError:
        return None
