"""From an `Adapted` to the tensors of peft's file and the configuration that gives them their meaning."""

from collections.abc import Callable, Collection, Iterator
from typing import ParamSpec, TypeVar

import jax
import numpy as np

from jlora._plan._sites import Site
from jlora._trees import _axes, _tree
from jlora._trees._leaf import Leaf
from jlora._types import PyTree
from jlora.adapted import Adapted
from jlora.io import _peft_config as config
from jlora.io import _peft_layout as layout
from jlora.io import _peft_tokens
from jlora.io._peft_config import PREFIX
from jlora.io._peft_names import Book
from jlora.io._record import several
from jlora.methods.bitfit import BitFit
from jlora.methods.dora import DoRA
from jlora.methods.full import Full
from jlora.methods.ln_tuning import LNTuning
from jlora.methods.lora import LoRA
from jlora.methods.lora_fa import LoRAFA

P = ParamSpec("P")
T = TypeVar("T")

#: What peft has a name for. LoRA-FA is LoRA to it: which factors are trained is no part of its files.
_LOW_RANK = (LoRA, LoRAFA)
WHOLES = (Full, BitFit, LNTuning)


class Writer:
    """Collects the tensors of an adapter, and what the configuration has to say of them."""

    def __init__(self, adapted: Adapted, book: Book) -> None:
        self.book, self.plan = book, adapted.frozen.plan
        self.tree = _tree.flatten(adapted.frozen.base)
        self.leaves, self.roles = self.tree.leaves, _axes.Roles(self.tree)
        self.sides = (adapted.frozen.factors, adapted.trainable)
        self.sites = {site.leaf.path: site for site in self.plan.sites}
        self.tensors: dict[str, np.ndarray] = {}
        self.scales: dict[str, tuple[int, np.float32]] = {}  # of the modules with low-rank factors
        self.prefix = PREFIX
        self.bad: list[str] = []

    def write(self) -> tuple[dict[str, np.ndarray], config.Config | _peft_tokens.Config]:
        """The tensors and the configuration.

        Raises:
          ValueError: what peft has no name for; all of it at once.
        """
        low = [site for site in self.plan.sites if self.attempt(self._is_low_rank, site)]
        for site in low:
            self.attempt(self._low_rank, site)
        wholes = [s for s in self.plan.sites if type(s.method) in WHOLES]
        biases = [site for site in wholes if self.is_bias(site)]
        named = [self.attempt(self.save_module, site, index) for site, index in slots(self, wholes, biases)]
        saved = {name for name in named if name is not None}
        bias = self.attempt(self._biases, biases) if not self.bad else {}
        known = self.book.known() | set(self.scales)
        self.check_saved(saved, known)
        tokens = [site for site in self.plan.sites if _peft_tokens.are_all(site.recipe)]
        alone = bool(tokens) and not low and not wholes
        kind, _ = (_peft_tokens.Config if alone else config.Config).rows
        ids = dict(found for site in tokens for found in self.attempt(self._tokens, site, kind, known) or ())
        if alone and len(set(ids.values())) > 1:
            self.bad.append(f"{' and '.join(map(repr, ids))} train unlike tokens; a file of tokens alone has one list")
        doras = {isinstance(site.method, DoRA) for site in low}
        if len(doras) > 1:
            self.bad.append("some weights are LoRA's and some DoRA's; use_dora of a file is for all of them")
        if not low and not alone and not self.bad:
            self.bad.append("it has no LoRA or DoRA" + ", and rows of tokens stand alone or beside one" * bool(tokens))
        if self.bad:
            raise self.refused()
        if alone:
            return self.tensors, _peft_tokens.Config(next(iter(ids.values())), config.named(ids, known))
        rate = max(getattr(s.method, "inner", s.method).dropout for s in low)
        modules = tuple(sorted(name for name in saved if name))
        rest = {"use_dora": doras == {True}, "lora_dropout": rate, "modules_to_save": modules, **(bias or {})}
        return self.tensors, config.describe(self.scales, known, trainable_token_indices=ids or None, **rest)

    def check_saved(self, saved: Collection[str], known: Collection[str]) -> None:
        """Notes the modules that peft would save beside those that are saved whole."""
        for name, others in config.taken_too(saved, known, self.scales).items():
            if others:
                self.bad.append(
                    f"{name!r} is saved whole, and peft saves every module whose name ends in these letters, and what "
                    f"is in it, so also {', '.join(map(repr, others[:3]))}; if the torch model has longer names, "
                    "names= gives them"
                )

    def refused(self) -> ValueError:
        """All that is wrong."""
        return ValueError("peft has no name for this adapter:" + several(list(dict.fromkeys(self.bad))))

    def attempt(self, fn: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
        try:
            return fn(*args, **kwargs)
        except ValueError as error:
            self.bad.append(str(error))

    def _is_low_rank(self, site: Site) -> bool:
        method = site.method
        if type(method) in WHOLES or _peft_tokens.are_all(site.recipe):
            return False
        inner = method.inner if type(method) is DoRA else method
        if not isinstance(inner, LoRA) or type(inner) not in _LOW_RANK:
            raise ValueError(
                f"{site.leaf.path!r}: {method.describe()} is neither LoRA, DoRA of LoRA, Full, BitFit nor tokens"
            )
        if inner.slices is not None:
            raise ValueError(f"{site.leaf.path!r}: peft has one pair of factors a module, and this has slices")
        return True

    def factors(self, path: str) -> dict[str, np.ndarray]:
        found = {name: np.asarray(a) for side in self.sides for name, a in side.get(path, {}).items()}
        for name, array in found.items():
            if array.dtype not in layout.DTYPES.values():
                raise ValueError(f"{path!r}: {name} is of dtype {array.dtype}, not float32, float16 or bfloat16")
            if name != "s" and not np.all(np.isfinite(array.astype(np.float32))):
                raise ValueError(f"{path!r}: {name} holds NaN or infinity: an adapter that diverged is of no use there")
        if "s" in found and not np.all(np.isfinite(found["s"].astype(np.float32))):
            raise ValueError(f"{path!r}: its scale s is {found['s']}, which no alpha gives")
        return found

    def add(self, module: str, kind: str, tensor: np.ndarray, path: str) -> None:
        key = f"{self.prefix}{module}.{kind}"
        if key in self.tensors:
            raise ValueError(f"{path!r} and another weight would both be {key!r}; tell them apart with names=")
        self.tensors[key] = tensor

    # --- low-rank factors ---

    def _low_rank(self, site: Site) -> None:
        leaf, factors = site.leaf, self.factors(site.leaf.path)
        if "t" in factors and not np.all(factors["t"] == 1):
            raise ValueError(f"{leaf.path!r}: DoRA's gain is weakened (jlora.scale), and peft has no number for that")
        for index in np.ndindex(leaf.stack):
            module, one = self.book.name(leaf.path, index), layout.one_layer(leaf, index)
            for name, kind in layout.factor_names(one).items():
                if name in factors:
                    self.add(module, kind, layout.to_torch(one, name, factors[name][index]), leaf.path)
            self.scales[module] = (factors["a"].shape[len(leaf.stack)], np.float32(factors["s"][index]))

    # --- rows of tokens ---

    def _tokens(self, site: Site, kind: str, known: set[str]) -> list[tuple[str, tuple[int, ...]]]:
        """Adds the rows of one table; the ids of each of its modules."""
        leaf, factors, found = site.leaf, self.factors(site.leaf.path), []
        for index in np.ndindex(leaf.stack):
            module, one = self.book.name(leaf.path, index), layout.one_layer(leaf, index)
            _peft_tokens.check_table(module, leaf, self.leaves[site.index])
            if others := sorted(name for name in known if name != module and name.endswith(module)):
                raise ValueError(
                    f"{module!r} has rows of tokens, and peft takes every module whose name ends in these letters, so "
                    f"also {', '.join(map(repr, others[:3]))}; if the torch model has longer names, names= gives them"
                )
            base = np.moveaxis(np.asarray(self.leaves[site.index]), leaf.axes("s"), range(len(leaf.stack)))[index]
            of_one = {name: array[index] for name, array in factors.items()}
            table = layout.table(one, base.astype(np.float32))
            ids, values = _peft_tokens.to_torch(site.recipe, one, of_one, table)
            self.add(module, kind, values, leaf.path)
            found.append((module, ids))
        return found

    # --- whole leaves ---

    def is_bias(self, site: Site) -> bool:
        """Whether it is trained as a bias, and not as a part of a module that is saved whole."""
        if site.leaf.name != "bias":
            return False
        beside = self.sites.get(self.attempt(self.book.weight, site.leaf.path) or "")
        return beside is None or type(beside.method) not in WHOLES

    def depth(self, site: Site) -> tuple[str, int]:
        """The weight that names a leaf's module, and the number of stack axes there."""
        leaf = site.leaf
        weight = self.book.weight(leaf.path) if leaf.name == "bias" else leaf.path
        said = self.book.depth(weight)
        if said is None and weight in self.sites:
            said = len(self.sites[weight].leaf.stack)
        elif said is None:
            said = self.roles.likely(list(self.book.paths).index(weight)).count("s")
        if leaf.name == "scale" and len(leaf.shape) > max(said, len(leaf.stack)) + 1:
            raise ValueError(f"{leaf.path!r} of shape {leaf.shape} is of several layers: name them with names=")
        return weight, said

    def _value(self, site: Site, index: tuple[int, ...]) -> tuple[Leaf, np.ndarray, np.ndarray]:
        """One layer of a leaf, the change of it, and its value: base + s * delta, in torch's layout."""
        leaf, factors = site.leaf, self.factors(site.leaf.path)
        one, delta = layout.one_layer(leaf, index), np.asarray(factors["delta"][index], np.float32)
        if isinstance(self.leaves[site.index], jax.ShapeDtypeStruct):
            raise ValueError(f"{leaf.path!r} is abstract, and peft stores its value, not the change")
        base = np.moveaxis(np.asarray(self.leaves[site.index]), leaf.axes("s"), range(len(leaf.stack)))[index]
        s = factors["s"][index if leaf.stack else ()].astype(np.float32)
        value = base.astype(np.promote_types(base.dtype, np.float32) if base.dtype.kind == "f" else np.float32)
        to_torch = lambda x: layout.weight_to_torch(one, x).astype(np.float32)  # noqa: E731
        return one, to_torch(delta), to_torch(value + s * delta)

    def save_module(self, site: Site, index: tuple[int, ...]) -> str:
        module = self.book.name(self.depth(site)[0], index)
        kind = "bias" if site.leaf.name == "bias" else "weight"
        self.add(module, kind, self._value(site, index)[2], site.leaf.path)
        bias = "/".join([*site.leaf.path.split("/")[:-1], "bias"])
        if kind == "weight" and bias in self.book.paths and bias not in self.sites:  # peft reads a whole module or none
            value = self.leaves[list(self.book.paths).index(bias)]
            if isinstance(value, jax.ShapeDtypeStruct):
                raise ValueError(f"{bias!r} is abstract, and peft stores all of a module that is saved whole")
            self.add(module, "bias", np.asarray(value)[index].astype(np.float32).ravel(), bias)
        return module

    def _biases(self, sites: list[Site]) -> dict[str, PyTree]:
        """Adds the biases; what the configuration says of them.

        `lora_bias` keeps the change itself; it is written where every factor has one under its own scale, as `load`
        makes of a file with `lora_bias`. The others are written as values.
        """
        found = [(site, index, self.book.name(self.depth(site)[0], index)) for site, index in slots(self, sites, [])]
        scale = lambda site, index: self.factors(site.leaf.path)["s"][index if site.leaf.stack else ()]  # noqa: E731
        changes = {m for site, _, m in found if type(site.method) is BitFit and m in self.scales}
        same = all(m in changes and self.scales[m][1] == scale(site, i) for site, i, m in found)
        as_changes = same and bool(found) and changes == set(self.scales)
        for site, index, module in found:
            _, change, value = self._value(site, index)
            whole = "base_layer.bias" if module in self.scales else "bias"
            kind, tensor = ("lora_B.bias", change) if as_changes else (whole, value)
            self.attempt(self.add, module, kind, tensor, site.leaf.path)
        if not found or as_changes:
            return {"lora_bias": as_changes}
        return {"bias": "lora_only" if all(m in self.scales for *_, m in found) else "all"}


def slots(writer: Writer, sites: list[Site], without: list[Site]) -> Iterator[tuple[Site, tuple[int, ...]]]:
    """Every slice of whole leaves."""
    for site in sites:
        if site not in without:
            found = writer.attempt(writer.depth, site)
            if found is not None:
                yield from ((site, index) for index in np.ndindex(site.leaf.stack or site.leaf.shape[: found[1]]))
