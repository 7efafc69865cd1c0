"""From the tensors of peft's file to the factors of an `Adapted`, whatever kind of file it is.

Everything that does not fit is noted with its module, its path and both shapes, and reported at once.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora._trees import _axes, _tree
from jlora._trees._leaf import Leaf
from jlora.adapted import Adapted
from jlora.io import _peft_layout as layout
from jlora.io._peft_config import PREFIX, parents
from jlora.io._peft_names import Book
from jlora.methods.base import Method
from jlora.methods.dora import DoRA
from jlora.methods.full import Full

#: Of the names of tensors: a model's are a tenth of it.
LONGEST = 1000

Index = tuple[int, ...]
Rotate: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""Keys `(positions, heads, size)` at positions `(positions,)`, as a model turns them; linear in the keys."""
Values = Mapping[str, np.ndarray | np.float32]
Modules = dict[str, dict[str, np.ndarray]]


@dataclasses.dataclass
class Part:
    """One weight of params as the file has it, a slice a module.

    Attributes:
      method: what makes such factors, without its target.
    """

    leaf: Leaf
    method: Method
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
    """Takes the modules of a file, one by one, for the leaves of a tree.

    Attributes:
      prefix: what stands in front of a module's name in the keys of tensors.
      dtype: of low-rank factors and of prompts.
      rotate: what a model does to its keys, where the caller says it.
    """

    prefix = PREFIX

    def __init__(
        self,
        tree: _tree.Named,
        book: Book,
        axes: dict[str, str] | None = None,
        dtype: DTypeLike = "float32",
        rotate: Rotate | None = None,
    ) -> None:
        self.rotate = rotate
        self.tree, self.book, self.roles, self.dtype = tree, book, _axes.Roles(tree, axes), jnp.dtype(dtype).name
        if not jnp.issubdtype(self.dtype, jnp.floating):
            raise ValueError(f"dtype={dtype!r}: factors are real floating point numbers")
        self.index = {path: n for n, path in enumerate(tree.paths)}
        self.leaves = dict(zip(tree.paths, tree.leaves, strict=True))
        self.parts: dict[str, Part] = {}
        self.givers: dict[tuple[str, Index], str] = {}
        self.bad: list[str] = []

    def modules(self, tensors: Mapping[str, np.ndarray], kinds: Collection[str], what: str) -> Modules:
        """The tensors by module: `{module: {what peft calls it: tensor}}`.

        Args:
          kinds: what peft calls tensors of such a file; of two that end alike the longer one is first.
          what: whose they are.
        """
        found: Modules = {}
        for key, tensor in sorted(tensors.items()):
            name = key.removeprefix(self.prefix)
            kind = next((x for x in kinds if name.endswith("." + x)), None)
            if len(key) > LONGEST:
                self.bad.append(f"{key[:60]!r}... has {len(key):,} letters, which is no name of a tensor")
            elif name == key or kind is None:
                self.bad.append(f"{key!r} of shape {tensor.shape} is no tensor of {what}")
            else:
                found.setdefault(name.removesuffix("." + kind), {})[kind] = tensor
        return found

    def check_saved(self, saved: Collection[str], found: Collection[str]) -> None:
        """Notes what `modules_to_save` names and params has, where a file has no tensors of it."""
        here, there = ({p for m in of for p in parents(self.prefix, m)} for of in (self.book.modules, found))
        for name in saved:
            if any(p.endswith(name) for p in here) and not any(p.endswith(name) for p in there):
                self.bad.append(f"missing the tensors of {name!r}, which modules_to_save names and params has")

    def finish(self) -> dict[str, Part]:
        """The weights, all slices of each there; in `bad` what is missing otherwise."""
        for path, part in self.parts.items():
            want = set(np.ndindex(part.stack()))
            missing = sorted(want - set(part.slices))
            if missing:
                some = ", ".join(map(str, missing[:5]))
                self.bad.append(f"{path!r} is stacked {part.stack()}, and the file has no module for {some}")
            elif not part.leaf.stack and len({float(x.get("s", 1)) for x in part.slices.values()}) > 1:
                self.bad.append(f"{path!r}: its layers have unlike scales; axes= must call its first axis 's'")
        return self.parts

    # --- one module ---

    def stack(self, path: str) -> tuple[int, ...]:
        """The sizes of a leaf's stack axes."""
        return self._leaf(path).stack

    def _leaf(self, path: str) -> Leaf:
        shape, dtype = _tree.shape_dtype(self.leaves[path])
        return Leaf(path, shape, np.dtype(dtype), self.roles.likely(self.index[path]))

    def leaf(self, path: str, index: Index) -> tuple[Leaf, Leaf]:
        """A leaf, and the same without stack axes; ValueError where the index is not one into them."""
        leaf = self._leaf(path)
        shape = leaf.shape
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

    def put(self, module: str, leaf: Leaf, method: Method, index: Index, values: Values) -> None:
        """Factors of a slice; ValueError where it has some, or other slices another method."""
        other = self.givers.setdefault((leaf.path, index), module)
        part = self.parts.setdefault(leaf.path, Part(leaf, method))
        at = f"{leaf.path!r}{list(index) if index else ''}"
        if index in part.slices:
            raise ValueError(f"{at} would be adapted twice, by {other!r} and {module!r}")
        if part.method != method or any(len(i) != len(index) for i in part.slices):
            was, now = (f"{m.describe()}{_rank(m)}" for m in (part.method, method))
            raise ValueError(f"{at} would be {now}, and other slices {was}: one weight has one method and one rank")
        part.slices[index] = values

    def base(self, leaf: Leaf, index: Index) -> np.ndarray:
        """One layer of the base, in float32 or wider."""
        base = np.moveaxis(np.asarray(self.leaves[leaf.path]), leaf.axes("s"), range(len(leaf.stack)))[index]
        return base.astype(np.promote_types(np.float32, base.dtype) if base.dtype.kind == "f" else np.float32)

    def whole(
        self, module: str, kind: str, tensor: np.ndarray, at: tuple[str, Index], trained: bool, fan_in_fan_out: bool
    ) -> None:
        """A tensor that stands for a whole leaf: trained, or else the base's own."""
        path, index = (self.book.bias(at[0]), at[1]) if kind.endswith("bias") else at
        leaf, one = self.leaf(path, index)
        shape = layout.weight_shape(one)
        if fan_in_fan_out and len(shape) == 2 and not layout.is_embedding(one):
            if shape[0] == shape[1]:
                raise ValueError(f"{module + '.' + kind!r} is square, and under fan_in_fan_out it may be transposed")
            tensor = tensor.T if tensor.shape == shape[::-1] else tensor  # transformers' Conv1D is (in, out)
        if not self.fits(module, kind, tensor, leaf, shape):
            if not trained and tensor.shape[1:] == shape[1:]:
                self.bad.append(
                    f"{module!r} was resized, and peft stored all of it: give params of the resized model, or save it "
                    "without, model.save_pretrained(folder, save_embedding_layers=False)"
                )
            return
        if isinstance(self.leaves[path], jax.ShapeDtypeStruct):
            raise ValueError(f"{path!r} is abstract, and {kind} of {module!r} is stored as a value, not a change")
        base = self.base(leaf, index)
        value = layout.weight_from_torch(one, tensor).astype(base.dtype)
        if trained:
            self.put(module, leaf, Full(target=()), index, {"delta": layout.change(value, base)})
        elif not np.array_equal(value, base):
            raise ValueError(
                f"{self.prefix + module + '.' + kind!r} is trained by nothing that the configuration says "
                f"(modules_to_save, bias), and is not what {path!r} is in params: put its value into params first"
            )

    def fits(self, module: str, kind: str, tensor: np.ndarray, leaf: Leaf, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has the shape that a leaf asks for; else it is noted."""
        if tensor.shape != shape:
            self.bad.append(
                f"{self.prefix + module + '.' + kind!r} has shape {tensor.shape}, "
                f"not {shape}, for {leaf.path!r} of shape {leaf.shape} ({leaf.roles})"
            )
        return tensor.shape == shape


def _rank(method: Method) -> str:
    rank = getattr(getattr(method, "inner", method), "rank", None)
    return "" if rank is None else f" of rank {rank}"


# --- putting them in ----------------------------------------------------------------------------------------------


def spec(parts: Mapping[str, Part]) -> list[Method]:
    """The rules for `jlora.adapt`: one a method, with exact paths."""
    groups: dict[Method, set[str]] = {}
    for path, part in parts.items():
        groups.setdefault(part.method, set()).add(path)
    return [_aimed(method, paths) for method, paths in sorted(groups.items(), key=lambda x: repr(x[0]))]


def _aimed(method: Method, paths: Collection[str]) -> Method:
    target = lambda path, leaf: path in paths  # noqa: E731
    if isinstance(method, DoRA):  # its target is that of what is inside
        return DoRA(dataclasses.replace(method.inner, target=target), dtype=method.dtype)
    return dataclasses.replace(method, target=target)


def fill(adapted: Adapted, parts: Mapping[str, Part]) -> Adapted:
    """The same adapter with the arrays of the file."""
    sides, paths = [], {site.leaf.path for site in adapted.frozen.plan.sites}
    for side in (adapted.trainable, adapted.frozen.factors):
        new = {path: dict(named) for path, named in side.items()}
        for path, part in parts.items():
            # what acts on a layer's output stands at its bias, if it has one
            held = new.get(path if path in paths else "/".join([*path.split("/")[:-1], "bias"]), {})
            held.update({x: jnp.asarray(v, held[x].dtype) for x, v in part.arrays().items() if x in held})
        sides.append(new)
    return Adapted(sides[0], dataclasses.replace(adapted.frozen, factors=sides[1]))
