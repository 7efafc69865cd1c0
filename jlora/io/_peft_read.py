"""From the tensors of peft's file to the factors of an `Adapted`.

Everything that does not fit is noted with its module, its path and both shapes, and reported at once.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora._trees import _axes, _tree
from jlora._trees._leaf import Leaf
from jlora.adapted import Adapted
from jlora.io import _peft_layout as layout
from jlora.io._peft_config import PREFIX, Config
from jlora.io._peft_names import Book
from jlora.methods.base import Method
from jlora.methods.bitfit import BitFit
from jlora.methods.dora import DoRA
from jlora.methods.full import Full
from jlora.methods.lora import LoRA

_LOW_RANK = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
_BIAS_OF_B = "lora_B.bias"
_WHOLE = ("base_layer.weight", "base_layer.bias", "weight", "bias")

#: Of the names of tensors: a model's are a tenth of it.
LONGEST = 1000

Index = tuple[int, ...]
Values = Mapping[str, np.ndarray | np.float32]


def modules(tensors: Mapping[str, np.ndarray], bad: list[str]) -> dict[str, dict[str, np.ndarray]]:
    """The tensors by module: `{module: {what peft calls it: tensor}}`."""
    found: dict[str, dict[str, np.ndarray]] = {}
    for key, tensor in sorted(tensors.items()):
        name = key.removeprefix(PREFIX)
        kind = next((x for x in (*_LOW_RANK, _BIAS_OF_B, *_WHOLE) if name.endswith("." + x)), None)
        if len(key) > LONGEST:
            bad.append(f"{key[:60]!r}... has {len(key):,} letters, which is no name of a tensor")
        elif name == key or kind is None:
            bad.append(f"{key!r} of shape {tensor.shape} is no tensor of a LoRA or DoRA adapter")
        else:
            found.setdefault(name.removesuffix("." + kind), {})[kind] = tensor
    return found


@dataclasses.dataclass
class Part:
    """One weight of params as the file has it, a slice a module.

    Attributes:
      kind: the name of the method, and its rank (0 where it has none).
    """

    leaf: Leaf
    kind: tuple[str, int]
    slices: dict[Index, Values] = dataclasses.field(default_factory=dict)

    def stack(self) -> tuple[int, ...]:
        """The sizes of the axes that the indices go over."""
        return self.leaf.stack or self.leaf.shape[: len(next(iter(self.slices)))]

    def arrays(self) -> dict[str, np.ndarray]:
        """The factors of all slices, stack axes first."""
        stack, every = self.stack(), list(np.ndindex(self.stack()))
        one = self.slices[every[0]]
        whole = {x: np.stack([self.slices[i][x] for i in every]).reshape(stack + np.shape(one[x])) for x in one}
        if "s" in whole and not self.leaf.stack:
            whole["s"] = whole["s"].ravel()[0]  # the bias of stacked layers is a leaf without stack axes: one scale
        return whole


class Collector:
    """Takes the modules of a file, one by one, for the leaves of a tree."""

    def __init__(self, config: Config, tree: _tree.Named, book: Book, axes: dict[str, str] | None) -> None:
        self.config, self.book, self.roles = config, book, _axes.Roles(tree, axes)
        self.index = {path: n for n, path in enumerate(tree.paths)}
        self.leaves = dict(zip(tree.paths, tree.leaves, strict=True))
        self.parts: dict[str, Part] = {}
        self.givers: dict[tuple[str, Index], str] = {}
        self.bad: list[str] = []

    def take(self, module: str, named: Mapping[str, np.ndarray]) -> None:
        """Reads all tensors of one module."""
        try:
            path, index = self.book.slot(module)
            if any(kind in named for kind in (*_LOW_RANK, _BIAS_OF_B)):
                self._low_rank(module, named, path, index)
            for kind in (kind for kind in _WHOLE if kind in named):
                place = self.book.bias(path) if kind.endswith("bias") else path
                self._whole(module, kind, named[kind], place, index)
        except ValueError as error:
            self.bad.append(str(error))

    def finish(self) -> dict[str, Part]:
        """The weights, all slices of each there; ValueError in `bad` otherwise."""
        for path, part in self.parts.items():
            want = set(np.ndindex(part.stack()))
            missing = sorted(want - set(part.slices))
            if missing:
                some = ", ".join(map(str, missing[:5]))
                self.bad.append(f"{path!r} is stacked {part.stack()}, and the file has no module for {some}")
            elif not part.leaf.stack and len({float(x.get("s", 1)) for x in part.slices.values()}) > 1:
                self.bad.append(f"{path!r}: its layers have unlike scales; axes= must call its first axis 's'")
        if not any(part.kind[1] for part in self.parts.values()) and not self.bad:
            self.bad.append("it holds no factors of a LoRA or DoRA adapter")
        return self.parts

    # --- one module ---

    def _leaf(self, path: str, index: Index) -> tuple[Leaf, Leaf]:
        """A leaf, and the same without stack axes; ValueError where the index is not one into them."""
        shape, dtype = _tree.shape_dtype(self.leaves[path])
        leaf = Leaf(path, shape, np.dtype(dtype), self.roles.likely(self.index[path]))
        vector = not leaf.axes("ik") and not leaf.stack
        stack = leaf.shape[: len(index)] if vector else leaf.stack
        if len(stack) != len(index):
            raise ValueError(
                f"{path!r} of shape {shape} is stacked {stack}, and names= gives it the index {index}: "
                "write one number of the module's name for each stack axis, or say with axes= which axes are what"
            )
        if any(i >= n for i, n in zip(index, stack, strict=True)):
            raise ValueError(f"{path!r} of shape {shape} has no slice {index}")
        return leaf, layout.one_layer(leaf, index)

    def _put(self, module: str, leaf: Leaf, kind: tuple[str, int], index: Index, values: Values) -> None:
        other = self.givers.setdefault((leaf.path, index), module)
        part = self.parts.setdefault(leaf.path, Part(leaf, kind))
        at = f"{leaf.path!r}{list(index) if index else ''}"
        if index in part.slices:
            raise ValueError(f"{at} would be adapted twice, by {other!r} and {module!r}")
        if part.kind != kind or any(len(i) != len(index) for i in part.slices):
            was, now = (" of rank ".join(map(str, k if k[1] else k[:1])) for k in (part.kind, kind))
            raise ValueError(f"{at} would be {now}, and other slices {was}: one weight has one method and one rank")
        part.slices[index] = values

    def _low_rank(self, module: str, named: Mapping[str, np.ndarray], path: str, index: Index) -> None:
        leaf, one = self._leaf(path, index)
        names = layout.factor_names(one)
        if not self.config.use_dora:
            del names["m"]
        with_bias = self.config.lora_bias and not layout.is_embedding(one)
        want = {*names.values(), *([_BIAS_OF_B] if with_bias else [])}
        have = {kind for kind in named if kind not in _WHOLE}
        self.bad += [f"missing {PREFIX + module + '.' + kind!r}, for {path!r}" for kind in sorted(want - have)]
        for kind in sorted(have - want):
            shape = named[kind].shape
            self.bad.append(f"extra {PREFIX + module + '.' + kind!r} of shape {shape}, for {path!r} of {leaf.shape}")
        if not self.config.targets(module):
            self.bad.append(f"{module!r} has factors, and target_modules does not name it: peft would not load them")
        if want != have:
            return
        rank = next(iter(named[names["a"]].shape), 0)
        if rank != (said := self.config.rank(module)):
            nor = f"which neither r={self.config.r} nor rank_pattern says"
            self.bad.append(f"{module!r} has rank {rank}, {nor}: it is to have {said}")
        shapes = layout.factor_shapes(one, rank)
        wrong = [x for x in names if not self._fits(module, names[x], named[names[x]], leaf, shapes[x])]
        if wrong:
            return
        s = self.config.scale(module, rank) if rank else np.float32(0)
        values = {x: layout.from_torch(one, x, named[kind]) for x, kind in names.items()} | {"s": s}
        self._put(module, leaf, ("DoRA" if self.config.use_dora else "LoRA", rank), index, values)
        if with_bias:  # b0 + s * (bias of B)
            leaf, one = self._leaf(self.book.bias(path), index)
            if self._fits(module, _BIAS_OF_B, named[_BIAS_OF_B], leaf, layout.weight_shape(one)):
                delta = layout.weight_from_torch(one, named[_BIAS_OF_B])
                self._put(module, leaf, ("BitFit", 0), index, {"delta": delta, "s": s})

    def _whole(self, module: str, kind: str, tensor: np.ndarray, path: str, index: Index) -> None:
        """A tensor that stands for a whole leaf: trained where the configuration says so, else the base's own."""
        leaf, one = self._leaf(path, index)
        shape = layout.weight_shape(one)
        if self.config.fan_in_fan_out and len(shape) == 2 and not layout.is_embedding(one):
            if shape[0] == shape[1]:
                raise ValueError(f"{module + '.' + kind!r} is square, and under fan_in_fan_out it may be transposed")
            tensor = tensor.T if tensor.shape == shape[::-1] else tensor  # transformers' Conv1D is (in, out)
        if not self._fits(module, kind, tensor, leaf, shape):
            return
        base = self.leaves[path]
        if isinstance(base, jax.ShapeDtypeStruct):
            raise ValueError(f"{path!r} is abstract, and {kind} of {module!r} is stored as a value, not a change")
        base = np.moveaxis(np.asarray(base), leaf.axes("s"), range(len(leaf.stack)))[index]
        base = base.astype(np.promote_types(np.float32, base.dtype) if base.dtype.kind == "f" else np.float32)
        value = layout.weight_from_torch(one, tensor).astype(base.dtype)
        if self.config.saves(module) or kind.endswith("bias") and self.config.bias != "none":
            self._put(module, leaf, ("Full", 0), index, {"delta": layout.change(value, base)})
        elif not np.array_equal(value, base):
            raise ValueError(
                f"{PREFIX + module + '.' + kind!r} is trained by nothing that the configuration says (modules_to_save, "
                f"bias), and is not what {path!r} is in params: put its value into params first"
            )

    def _fits(self, module: str, kind: str, tensor: np.ndarray, leaf: Leaf, shape: tuple[int, ...]) -> bool:
        if tensor.shape != shape:
            self.bad.append(
                f"{PREFIX + module + '.' + kind!r} has shape {tensor.shape}, "
                f"not {shape}, for {leaf.path!r} of shape {leaf.shape} ({leaf.roles})"
            )
        return tensor.shape == shape


# --- putting them in ----------------------------------------------------------------------------------------------


def spec(parts: Mapping[str, Part], dropout: float, dtype: DTypeLike) -> list[Method]:
    """The rules for `jlora.adapt`: one a kind and rank, with exact paths."""
    name = jnp.dtype(dtype).name
    if not jnp.issubdtype(name, jnp.floating):
        raise ValueError(f"dtype={dtype!r}: factors are real floating point numbers")
    groups: dict[tuple[str, int], set[str]] = {}
    for path, part in parts.items():
        groups.setdefault(part.kind, set()).add(path)
    make = {
        "LoRA": lambda rank, target: LoRA(rank=rank, dropout=dropout, dtype=name, target=target),
        "DoRA": lambda rank, target: DoRA(LoRA(rank=rank, dropout=dropout, dtype=name, target=target), dtype=name),
        "Full": lambda _, target: Full(target=target),
        "BitFit": lambda _, target: BitFit(target=target),
    }
    target = lambda paths: lambda path, leaf: path in paths  # noqa: E731
    return [make[kind](rank, target(paths)) for (kind, rank), paths in sorted(groups.items())]


def fill(adapted: Adapted, parts: Mapping[str, Part]) -> Adapted:
    """The same adapter with the arrays of the file."""
    sides = []
    for side in (adapted.trainable, adapted.frozen.factors):
        new = {path: dict(named) for path, named in side.items()}
        for path, part in parts.items():
            held = new.get(path, {})
            held.update({x: jnp.asarray(v, held[x].dtype) for x, v in part.arrays().items() if x in held})
        sides.append(new)
    return Adapted(sides[0], dataclasses.replace(adapted.frozen, factors=sides[1]))
