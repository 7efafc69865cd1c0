"""W0 before it is an array: arrays that carry its stack labels, and how they make it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._algebra._mesh import explicit_mesh, placed, reshaped, settled
from jlora._algebra._term import Operand
from jlora._algebra._words import Labels
from jlora._types import AnyMesh, Cut, DType, MeshAxes, PyTree, Value

KEPT = "jlora: made of W0, and kept"  # the name (`jax.ad_checkpoint.checkpoint_name`) of what is costly and small

Cuts: TypeAlias = Callable[
    [tuple[jax.Array, ...], int, int, Cut], tuple[tuple[jax.Array, ...], Callable[..., jax.Array]]
]

_static = lambda: dataclasses.field(metadata={"static": True})


@dataclasses.dataclass(frozen=True)
class Making:
    """How a tuple of arrays becomes W0, as the model has moved it so far. Hashable: it names the program."""

    fn: Callable[..., jax.Array]
    stacks: tuple[Labels, ...]
    labels: Labels
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]
    dtypes: tuple[DType, ...]
    place: NamedSharding | None

    def __call__(self, arrays: tuple[jax.Array, ...]) -> jax.Array:
        own, scalars = arrays[: len(self.stacks)], arrays[len(self.stacks) :]
        with jax.named_scope("dequantize"):
            w = Operand(tuple(own), self.fn, self.stacks, self.labels).value()
            for dtype in self.dtypes:
                w = w.astype(dtype)
            w = reshaped(lax.transpose(reshaped(w, self.split), self.order), self.shape)
            for c in scalars:
                w = w * c.astype(w.dtype)
        return w if self.place is None else settled(w, self.place)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Lazy:
    """W0 yet to be computed. What the model does to its axes is in the labels of the `Weight`, so nothing moves.

    Attributes:
      source: the arrays, and the function that makes one layer of them.
      scalars: what the model multiplied it by.
      labels: the atoms of its axes, in the order in which `source` makes them.
      dtypes: those the model cast it to, in turn, after its own.
      place: where the model moved it last: a mesh, and the mesh axes of each atom. None where it never did.
    """

    source: Operand
    scalars: tuple[jax.Array, ...]
    labels: Labels = _static()
    dtypes: tuple[DType, ...] = _static()
    place: tuple[AnyMesh, tuple[tuple[str, MeshAxes], ...]] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )

    @property
    def dtype(self) -> DType:
        return self.dtypes[-1]

    @property
    def arrays(self) -> tuple[jax.Array, ...]:
        return (*self.source.arrays, *self.scalars)

    def recipe(self, axes: tuple[Labels, ...], size: Mapping[str, int]) -> Making:
        """How `arrays` make it, where its axes are the given atoms."""
        assert self.source.fn is not None
        at = None
        if self.place is not None:
            mesh, entry = self.place[0], dict(self.place[1])
            at = NamedSharding(mesh, PartitionSpec(*(entry.get(g[0]) if g else None for g in axes)))
        return Making(
            self.source.fn,
            self.source.stacks,
            self.source.labels,
            tuple(size[a] for a in self.labels),
            tuple(self.labels.index(a) for g in axes for a in g),
            tuple(math.prod(size[a] for a in g) for g in axes),
            self.dtypes,
            at,
        )

    def cast(self, dtype: DType) -> "Lazy":
        return self if dtype == self.dtype else dataclasses.replace(self, dtypes=(*self.dtypes, dtype))

    def scaled(self, c: jax.Array) -> "Lazy":
        return dataclasses.replace(self, scalars=(*self.scalars, c))

    def placed(self, mesh: AnyMesh, entry: Mapping[str, MeshAxes]) -> "Lazy":
        """After the model moved it, its atoms to these mesh axes. Its arrays' stack axes go there now, its own when it
        is made.
        """
        source = self.source
        move = lambda a, stack: placed(a, stack, entry, mesh)
        arrays = tuple(map(move, source.arrays, source.stacks))
        return dataclasses.replace(
            self, source=dataclasses.replace(source, arrays=arrays), place=(mesh, tuple(entry.items()))
        )

    def split(self, atom: str, outer: int, inner: str) -> "Lazy":
        """After `atom` became `(atom, inner)`, `atom` of size `outer`."""
        after = lambda labels: tuple(x for a in labels for x in ((a, inner) if a == atom else (a,)))
        source = self.source
        if self._stacked(atom):
            cut = lambda a, n: (
                a if n is None else reshaped(a, (*a.shape[:n], outer, a.shape[n] // outer, *a.shape[n + 1 :]))
            )
            arrays = tuple(map(cut, source.arrays, source.axes(atom)))
            source = Operand(arrays, source.fn, tuple(map(after, source.stacks)), after(source.labels))
        return dataclasses.replace(self, source=source, labels=after(self.labels))

    def can(self, atom: str, drop: bool = False) -> bool:
        """Whether an axis can be cut (indexed away where `drop`) before anything is computed."""
        return self._stacked(atom) or not drop and self._own(atom) is not None

    def _stacked(self, atom: str) -> bool:
        return any(atom in s for s in self.source.stacks)

    def _own(self, atom: str) -> tuple[int, Cuts] | None:
        """The number of an axis that the function makes, and how the function cuts there; None where it cannot."""
        if atom not in self.source.labels or any(a not in self.labels for a in self.source.labels):
            return None
        n = self.source.labels.index(atom) - len(self.source.stacks[0])
        cuts = getattr(self.source.fn, "along", None)
        if cuts is None or self.labels != self.source.labels or not self.source.fn.free(n):  # type: ignore[union-attr]
            return None
        return n, cuts

    def along(self, atom: str, f: Cut, drop: bool) -> "Lazy":
        """`f(array, axis)` on every array that carries `atom`; gone afterwards where `drop`."""
        source = self.source
        if self._stacked(atom):
            arrays = tuple(a if n is None else f(a, n) for a, n in zip(source.arrays, source.axes(atom), strict=True))
            source = source.dropped(atom, arrays) if drop else dataclasses.replace(source, arrays=arrays)
        elif not drop:
            found = self._own(atom)
            assert found is not None, atom
            n, cuts = found
            arrays, fn = cuts(source.arrays, n, len(source.stacks[0]), f)
            source = dataclasses.replace(source, arrays=arrays, fn=fn, stacks=(source.stacks[0],) * len(arrays))
        labels = tuple(a for a in self.labels if not (drop and a == atom))
        return dataclasses.replace(self, source=source, labels=labels)


@dataclasses.dataclass(frozen=True)
class Fed:
    """A function of arrays and W0, as one of arrays and the arrays that W0 is made of.

    The backward pass makes W0 anew, so that no dense one is kept for it; what the function calls `KEPT` is. Late,
    though it needs no activation: else XLA for CPUs makes the weights of all layers, and then what they are for.
    """

    fn: Callable[..., jax.Array]
    count: int
    make: Callable[..., jax.Array]

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        of_w0 = lambda *arrays: self.fn(*arrays[: self.count], self.make(*arrays[self.count :]))
        late = functools.partial(_late, of_w0)
        return jax.checkpoint(late, policy=jax.checkpoint_policies.save_only_these_names(KEPT))(*arrays)


def _late(f: Callable[..., Value], *args: PyTree) -> Value:
    """`f(*args)`, where on CPU no part of `f` is computed before all of `args` are.

    XLA's CPU backend drops barriers before it decides what runs when; jaxlib 0.10 then makes the weights of all
    unrolled layers before the first is used. It keeps a branch whose condition comes out of a barrier. Other backends
    need none. Where the axes of a mesh are part of types, the branch not taken would have to name them.
    """
    if explicit_mesh(jax.tree.leaves(args)) is None and not jax.sharding.get_abstract_mesh().manual_axes:
        f = jax.jit(f)  # traced once for both
        zeros = lambda *args: jax.tree.map(lambda o: jnp.zeros(o.shape, o.dtype), jax.eval_shape(f, *args))
        branch = lambda *args: lax.cond(lax.optimization_barrier(True), f, zeros, *args)
        return lax.platform_dependent(*args, cpu=branch, default=f)
    return f(*args)


def again(
    f: Callable[[bool], Callable[..., Value]], recipe: Callable[[PyTree], PyTree], forward_mode: bool
) -> Callable[..., Value]:
    """`g(arrays, *args) = f(forward_mode)(W0, *args)`, where the backward pass makes W0 anew from its arrays.

    So the residuals are the arrays and the arguments; a dense W0 is never among them, whatever a policy of
    `jax.checkpoint` may save. The barrier ties the second making to the cotangent: without it the compiler finds that
    it has made that array before, and keeps it. Another ties the first one to the arguments: without it a compiler may
    make the weights of all layers before it needs them. `f(True)` has no custom rule of its own, so that `jvp` of a
    gradient passes through the forward pass; `f(False)` gives the gradient.
    """

    def g(arrays: PyTree, *args: PyTree) -> Value:
        arrays, args = lax.optimization_barrier((arrays, args))
        run = lambda arrays, *args: f(True)(recipe(arrays), *args)
        return run(arrays, *args) if forward_mode else _late(run, arrays, *args)

    if forward_mode:
        return g
    custom = jax.custom_vjp(g)

    def backward(residuals: tuple[PyTree, tuple[PyTree, ...]], dy: PyTree) -> tuple[PyTree, ...]:
        arrays, args = residuals
        dy, arrays = lax.optimization_barrier((dy, arrays))
        pulled = lambda arrays, dy, *args: jax.vjp(functools.partial(f(False), recipe(arrays)), *args)[1](dy)
        return None, *_late(pulled, arrays, dy, *args)

    custom.defvjp(lambda arrays, *args: (g(arrays, *args), (arrays, args)), backward)
    return custom
