"""Prefixes in peft's files: `PREFIX_TUNING`, keys and values of virtual positions, layer by layer.

peft puts them into the cache of a model, whose keys are behind all that is done to them: so those of a rotary model are
turned already, by R(j) at position j. jlora writes them where the projections do, in front of that,

    k_j = R(j)^-1 k'_j,

and the model turns them. Where a model does anything else to its keys in between (a norm), no such k_j need exist.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import ClassVar

import jax.numpy as jnp
import numpy as np

from jlora._trees import _blocks, _kinds, _tree
from jlora._trees._leaf import Leaf
from jlora.io import _peft_fields as fields
from jlora.io import _peft_prompts as prompts
from jlora.io._peft_fields import Fields
from jlora.io._peft_names import Book, Slot
from jlora.io._peft_read import Collector, Rotate
from jlora.io._record import several
from jlora.methods.deep_prompts import DeepPrompts
from jlora.methods.prefix import PrefixTuning, VirtualTokens, exactly

KIND = "PREFIX_TUNING"


@dataclasses.dataclass(frozen=True)
class Config(prompts.Config):
    """What a configuration of a prefix says of the numbers, under peft's own names."""

    said: ClassVar[Fields] = {"peft_type": KIND, "prefix_projection": False}

    num_layers: int = 0
    num_attention_heads: int = 0


def read(path: Path, content: Fields) -> Config:
    """The configuration that a file holds, whose fields are these.

    Raises:
      ValueError: fields of the wrong type, and fields that are not known; all at once.
    """
    bad = prompts.unknown(content)
    count, width, parts, modules = prompts.common(content, bad)
    layers, heads = (fields.whole(name, content.get(name), bad) for name in ("num_layers", "num_attention_heads"))
    if parts != 1:
        bad.append(
            f"num_transformer_submodules is {parts}: into layer n of a decoder behind an encoder peft puts what "
            "the file has for layer 2n, again from 0 on where it ends; such prefixes are not read"
        )
    if width % heads:
        bad.append(f"token_dim is {width}, which num_attention_heads {heads} does not divide")
    if bad:
        raise ValueError(f"{path} cannot be loaded:" + several(bad))
    return Config(count, width, parts, modules, layers, heads)


# --- which weight is which layer's --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Layer:
    """Where one layer makes its keys and its values, and which features of a fused projection they are."""

    key: Slot
    value: Slot
    features: tuple[int, ...]


def layers(tree: _tree.Named, book: Book, stack: Callable[[str], tuple[int, ...]], count: int | None) -> list[Layer]:
    """The layers of a model in their order: as names say, or by the numbers in the paths of their projections.

    Args:
      stack: the stack axes of a leaf.
      count: how many there are to be; as many as names say by default.

    Raises:
      ValueError: what does not say which they are.
    """
    pair = lambda n: (f"layers.{n}.key", f"layers.{n}.value")  # noqa: E731
    if book.said(pair(0)[0]) or book.said(pair(0)[1]):
        many = (
            range(count)
            if count is not None
            else itertools.takewhile(lambda n: _there(book, stack, pair(n)), itertools.count())
        )
        slots = [tuple(map(book.slot, pair(n))) for n in many]
        features = _features(tree, {path for both in slots for path, _ in both})
        return [Layer(key, value, features[key[0]] if key == value else ()) for key, value in slots]
    features = _features(tree, None)
    keys, values = ([p for p in features if _kinds.letters(p) == x or features[p]] for x in "kv")
    keys, values = sorted(keys, key=_natural), sorted(values, key=_natural)
    alike = len(keys) == len(values) and all(_numbers(k) == _numbers(v) for k, v in zip(keys, values, strict=True))
    deep = {stack(path) for path in (*keys, *values)}
    if (
        not alike
        or len(keys) + len(values) < len(features)
        or len(keys) > 1
        and deep != {()}
        or max(map(len, deep)) > 1
    ):
        raise ValueError(
            f"which of {[*features][:4]} are keys and values of which layer cannot be told: {HINT} ({{n}} that a path "
            "has not is an index into its stack)"
        )
    indices = [(n,) for n in range(*deep.pop())] if deep != {()} else [()]
    return [Layer((k, i), (v, i), features[k]) for k, v in zip(keys, values, strict=True) for i in indices]


HINT = "names={'layers.{n}.key': path, 'layers.{n}.value': path} says it"


def _there(book: Book, stack: Callable[[str], tuple[int, ...]], pair: tuple[str, str]) -> bool:
    """Whether names find a layer in the tree."""
    said = [slot for module in pair for slot in book.said(module)]
    inside = lambda at, sizes: all(i < n for i, n in zip(at, sizes, strict=False))  # noqa: E731
    return bool(said) and all(path in book.paths and inside(at, stack(path)) for path, at in said)


def _features(tree: _tree.Named, paths: Collection[str] | None) -> dict[str, tuple[int, ...]]:
    """The features of each projection of keys and values, () where all are."""
    rule = PrefixTuning(count=1) if paths is None else PrefixTuning(count=1, target=exactly(paths))
    try:
        found = rule.projections(tree)
    except ValueError as error:
        raise ValueError(f"{error}; for a file of peft, where they stand apart, {HINT}") from None
    return {path: features for features, of in found.items() for path in of}


def _natural(path: str) -> list[str | int]:
    return [int(x) if n % 2 else x for n, x in enumerate(re.split(r"(\d+)", path))]


def _numbers(path: str) -> list[str]:
    return re.findall(r"\d+", path)


def check_keys(tree: _tree.Named, found: Collection[Layer]) -> None:
    """ValueError where a prefix is of an encoder-decoder, or something but a rotation stands in front of the cache."""
    if cross := [path for path in tree.paths if _blocks.is_cross_attention(path)]:
        raise ValueError(
            f"num_transformer_submodules: {cross[:2]} are of cross-attention, and into a decoder behind an encoder "
            "peft puts every second layer of a file twice; such prefixes are neither read nor written"
        )
    blocks = {path.rsplit("/", 2)[0] + "/" for layer in found for path, _ in (layer.key, layer.value)}
    norms = []
    for path, kind in zip(tree.paths, _kinds.kinds(tree.paths, tree.leaves), strict=True):
        inside = [path.removeprefix(block) for block in blocks if path.startswith(block)]
        words = {word for rest in inside for step in rest.split("/") for word in _kinds.words(step)}
        if kind == "norm" and words & {"k", "key", "keys", "qk", "v", "value"}:
            norms.append(path)
    if norms:
        raise ValueError(
            f"{norms[:2]} norm keys or values behind their projections, where jlora writes a prefix; peft has it "
            "behind the norms, and no output of the projections need give that"
        )


# --- rotations ----------------------------------------------------------------------------------------------------


def check_rotation(tree: _tree.Named, rotate: Rotate | None) -> None:
    """ValueError where nothing says whether a model turns its keys."""
    if rotate is None and "position" not in _kinds.kinds(tree.paths, tree.leaves):
        raise ValueError(
            "peft has keys as they are in a cache, which those of a rotary model enter turned by their positions, and "
            "jlora has them before; this tree has no table of positions, and does not say whether that is so: give "
            "rotate=f, f(keys (positions, heads, size), positions (positions,)), as the model turns its keys, or "
            "rotate=lambda keys, positions: keys where it does not"
        )


def turned(keys: np.ndarray, heads: int, rotate: Rotate) -> np.ndarray:
    """k' = R(j) k of keys `(positions, features)`."""
    split = keys.astype(np.float32).reshape(len(keys), heads, -1)
    made = np.asarray(rotate(jnp.asarray(split), jnp.arange(len(keys))))
    if made.shape != split.shape:
        raise ValueError(f"rotate= made keys of shape {made.shape} of keys of shape {split.shape}, not as many")
    return made.astype(np.float32).reshape(keys.shape)


def unturned(keys: np.ndarray, heads: int, rotate: Rotate) -> np.ndarray:
    """k = R(j)^-1 k', R(j) found by what it makes of the unit vectors."""
    count, size = len(keys), keys.shape[1] // heads
    units = np.broadcast_to(np.eye(size, dtype=np.float32), (count, size, size))
    r = turned(units.reshape(count, -1), size, rotate).reshape(count, size, size).astype(np.float64)
    split = keys.astype(np.float64).reshape(count, heads, size)
    try:
        found = np.linalg.solve(r.swapaxes(1, 2), split.swapaxes(1, 2)).swapaxes(1, 2)
    except np.linalg.LinAlgError:
        found = np.full_like(split, np.nan)
    found = found.astype(np.float32).reshape(keys.shape)
    again = turned(found, heads, rotate)
    if not np.allclose(again, keys.astype(np.float32), rtol=1e-3, atol=1e-4 * max(1, np.abs(keys).max())):
        raise ValueError("rotate= is no rotation: what it does to keys is not linear, or cannot be undone")
    return found


# --- read ---------------------------------------------------------------------------------------------------------


def collect(reader: Collector, config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Takes all tensors of a file."""
    rotate = reader.rotate
    count, width, heads = config.num_virtual_tokens, config.token_dim, config.num_attention_heads
    shape = (count, config.num_layers * 2 * width)
    found = prompts.rows(reader, tensors, shape, "num_virtual_tokens, num_layers, token_dim")
    prompts.others(reader, config, tensors)
    try:
        check_rotation(reader.tree, rotate)
        path = prompts.table(reader.tree, reader.book)
        where = layers(reader.tree, reader.book, reader.stack, config.num_layers)
        if len(where) != config.num_layers:
            raise ValueError(
                f"num_layers is {config.num_layers}, and params has keys and values of {len(where)} layers"
            )
        check_keys(reader.tree, where)
        leaf, _ = reader.leaf(path, ())
        reader.put(prompts.TABLE, leaf, VirtualTokens(count=count, target=()), (), {})
        if found is None:
            return
        each = found.reshape(count, config.num_layers, 2, width)
        rule = DeepPrompts(
            count=count, table=path, first=leaf.size("ik"), dtype=reader.dtype, target=(), group="prefix"
        )
        for n, layer in enumerate(where):
            keys, values = each[:, n, 0], each[:, n, 1]
            keys = keys if rotate is None else unturned(keys, heads, rotate)
            if layer.features:
                both = np.concatenate([keys, values], 1)
                _put(reader, f"layers.{n}", layer.key, dataclasses.replace(rule, features=layer.features), both)
            else:
                _put(reader, f"layers.{n}.key", layer.key, rule, keys)
                _put(reader, f"layers.{n}.value", layer.value, rule, values)
    except ValueError as error:
        reader.bad.append(str(error))


def _put(reader: Collector, module: str, slot: Slot, rule: DeepPrompts, rows: np.ndarray) -> None:
    leaf, _ = reader.leaf(*slot)
    a, b = rule.features or (0, leaf.size("o"))
    if b - a != rows.shape[1]:
        raise ValueError(
            f"the file has {rows.shape[1]} features of {module!r} (token_dim), and {leaf.path!r} of shape {leaf.shape} "
            f"makes {b - a}"
        )
    reader.put(module, leaf, rule, slot[1], {"prompts": rows})


# --- write --------------------------------------------------------------------------------------------------------


def heads_of(leaves: Collection[Leaf], heads: int | None) -> int:
    """The number of heads of keys: that of the axes of leaves, or as it was said; ValueError where neither says."""
    found = {leaf.sizes("o")[0] for leaf in leaves if len(leaf.axes("o")) == 2}
    if len(found) > 1 or heads is not None and found - {heads}:
        raise ValueError(f"num_attention_heads: keys have {sorted(found)} heads, and heads={heads}")
    if not found and heads is None:
        raise ValueError(
            "num_attention_heads, the heads of keys, is no part of the parameters where they stand on one axis: give "
            "heads= (of grouped attention the number of its groups, num_key_value_heads)"
        )
    return found.pop() if found else int(heads or 0)


def to_torch(pairs: Sequence[tuple[np.ndarray, np.ndarray]], heads: int, rotate: Rotate | None) -> np.ndarray:
    """Keys and values `(positions, features)` of all layers as one tensor."""
    made = [(keys if rotate is None else turned(keys, heads, rotate), values) for keys, values in pairs]
    return np.concatenate([x for both in made for x in both], 1)
