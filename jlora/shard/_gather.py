"""Quantised weights that are sharded, gathered as codes and not as the wider weights that the codes stand for."""

import dataclasses
import itertools
from collections.abc import Callable, Hashable

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._algebra._mesh import explicit_mesh
from jlora._trees import _tree
from jlora._trees._compound import Compound, is_compound
from jlora._types import Cut, DType, MeshAxes, PyTree
from jlora.shard import _rules


@dataclasses.dataclass(frozen=True)
class Gather:
    """Makes the weight of one layer as `fn` does, from codes and scales that are gathered first.

    Attributes:
      fn: makes the weight of one layer from its arrays.
      places: where each array is brought, as if it had all of its stack axes. Under `vmap`, where a model takes layers
        or experts together, JAX hides their axis from `fn`: `_brought` leaves out one entry for each.
      home: where the weight is brought, likewise.
      stack: the number of stack axes.
    """

    fn: Callable[..., jax.Array]
    places: tuple[NamedSharding, ...]
    home: NamedSharding
    stack: int

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        # The base is frozen, so no gradient is lost. Without this, a derivative where jlora has no rule of its own
        # would go through `custom_vmap`, which has no reverse mode in JAX 0.10.
        held = jax.lax.stop_gradient(arrays)
        near = (_brought(a, place, self.stack) for a, place in zip(held, self.places, strict=True))
        # The weight is held in place too. Else the compiler may cut it like its neighbours, and gather it dense.
        return _brought(jax.lax.stop_gradient(self.fn(*near)), self.home, self.stack)

    def free(self, axis: int) -> bool:
        """Whether an axis can be cut before the weight is made, as `fn` says: looked up rows are not gathered."""
        return self.fn.free(axis)  # type: ignore[attr-defined]

    def along(
        self, arrays: tuple[jax.Array, ...], axis: int, front: int, f: Cut
    ) -> tuple[tuple[jax.Array, ...], Callable[..., jax.Array]]:
        return self.fn.along(arrays, axis, front, f)  # type: ignore[attr-defined]


def _brought(a: jax.Array, place: NamedSharding, skip: int) -> jax.Array:
    """`a` moved to `place`, without the first `skip` entries of it, which are of axes that `a` does not show.

    `vmap` of a sharding constraint would leave the mapped axis to the compiler. The rule below gives it its entry.
    """

    @jax.custom_batching.custom_vmap
    def move(a: jax.Array) -> jax.Array:
        at = NamedSharding(place.mesh, PartitionSpec(*place.spec[skip:]))
        if explicit_mesh([a]) is not None:
            return jax.sharding.reshard(a, _rules.sayable(at))
        mesh = jax.typeof(a).sharding.mesh  # inside `jax.sharding.auto_axes` it is another object than place.mesh
        return jax.lax.with_sharding_constraint(a, at if mesh.empty else NamedSharding(mesh, at.spec))

    @move.def_vmap
    def _(size: int, batched: list[bool], a: jax.Array) -> tuple[jax.Array, bool]:
        del size, batched
        return _brought(a, place, skip - 1), True

    return move(a)


@jax.tree_util.register_pytree_with_keys_class
class PlacedLeaf(Compound):
    """A quantised leaf that knows where its arrays are to be when the weight of a layer is made from them."""

    def __init__(self, leaf: Compound, places: tuple[NamedSharding, ...]):
        self.leaf = leaf
        self.places = places

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[Hashable, Compound]], tuple[NamedSharding, ...]]:
        return ((jax.tree_util.GetAttrKey("leaf"), self.leaf),), self.places

    @classmethod
    def tree_unflatten(cls, places: tuple[NamedSharding, ...], leaves: tuple[Compound]) -> "PlacedLeaf":
        (leaf,) = leaves
        return cls(leaf, places)

    def __getattr__(self, name: str) -> PyTree:
        """What else its leaf has: `scheme`, `nbytes`, ..."""
        if name == "leaf":  # not made yet (copy, pickle)
            raise AttributeError(name)
        return getattr(self.leaf, name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> DType:
        return self.leaf.dtype

    @property
    def roles(self) -> str:
        return self.leaf.roles

    def parts(self) -> tuple[tuple[jax.Array, ...], Gather]:
        arrays, fn = self.leaf.parts()
        places = tuple(map(_fitted, arrays, self.places))
        stack = self.leaf.roles.count("s")
        # codes that are one run, as bitsandbytes lays them out, have no axis of the weight but the stack's
        whole = None in self.leaf.axes()[0]
        home = PartitionSpec(*places[0].spec[: stack if whole else None])
        return arrays, Gather(fn, places, NamedSharding(places[0].mesh, home), stack)

    def wrong(self) -> str:
        return self.leaf.wrong()

    def axes(self) -> tuple[tuple[int | None, ...], ...]:
        return self.leaf.axes()

    def spec(self) -> tuple[MeshAxes, ...]:
        """The stack axes are cut as the arrays are, all others as the weight is where it is brought."""
        _, gather = self.parts()
        known, near = list(self.leaf.spec()), _rules.sayable(gather.home).spec
        for n, entry in itertools.zip_longest(self.axes()[0], near[: len(self.axes()[0])]):
            if n is not None and self.roles[n] != "s":
                known[n] = entry
        return tuple(known)

    def describe(self) -> str:
        return self.leaf.describe()

    def __repr__(self) -> str:
        return f"Gathered({self.leaf!r})"


def _fitted(a: jax.Array, place: NamedSharding) -> NamedSharding:
    """A place for an array whose leading axes are others than when the place was told, counted from the last axis.

    A scan over the tree takes stack axes away and a `vmap` adds some, and neither changes what is static in a leaf.
    """
    entries = (*[None] * a.ndim, *place.spec)
    return NamedSharding(place.mesh, PartitionSpec(*entries[len(place.spec) :]))


def gathered(tree: PyTree, places: PyTree, batch: PyTree) -> PyTree:
    """The same tree, whose quantised weights are gathered as codes over the mesh axes that a batch is sharded over.

    A compiler does not see that a weight which it gathers (fsdp) is smaller as codes: it computes each device's share
    and gathers that, dense. Here the codes and scales of one layer are gathered when the layer is met, in the forward
    and again in the backward pass, and the weight is computed where it is used. What is cut over other axes (tensor
    parallel) stays cut. `train_step` does this; it is for steps of one's own, where it changes no number.

    Args:
      tree: an `Adapted`, its frozen half, or parameters, with arrays or inside `jit`.
      places: NamedShardings in its structure, such as `shardings` makes.
      batch: the PartitionSpec of a batch, or a tree of them.

    Returns:
      The tree. It is to be computed with, not to be kept: `save` and `jit`'s shardings know the tree that was given.

    Raises:
      ValueError: places that are not NamedShardings in the structure of the tree.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = jlora.quantize({"query": {"kernel": jnp.ones((64, 4))}}, "nf4")
      >>> places = jlora.shard.shardings(mesh, params, "fsdp")
      >>> apply = jlora.lift(lambda p, x: x @ p["query"]["kernel"])
      >>> step = lambda p, x: apply(jlora.shard.gathered(p, places, P("fsdp")), x)
      >>> jax.jit(step, in_shardings=(places, None))(params, jnp.ones((2, 64)))[0, 0]
      Array(64., dtype=float32)

    References:
      Rajbhandari et al, `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020: what is cut is gathered where it is used.
      Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023: the codes.
    """
    tree = jax.tree.map(
        lambda x: x.leaf if isinstance(x, PlacedLeaf) else x, tree, is_leaf=is_compound
    )  # of an earlier call
    specs = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, PartitionSpec))
    rows = {name for spec in specs for entry in spec for name in _rules.mesh_axes(entry)}
    fit = jax.tree.structure(tree) == jax.tree.structure(places)
    if not fit or not all(isinstance(at, NamedSharding) for at in jax.tree.leaves(places)):
        raise ValueError(
            "gathered(tree, places, batch): places has to be a NamedSharding for each array of the tree, in its "
            "structure; write places = jlora.shard.shardings(mesh, tree, base_specs)"
        )
    both = zip(_tree.leaves(tree), _tree.leaves(places), strict=True)
    return _tree.rebuilt(tree, [_one(leaf, at, rows) for leaf, at in both])


def _one(leaf: PyTree, places: PyTree, rows: set[str]) -> PyTree:
    if not is_compound(leaf):
        return leaf
    whole = lambda a, at: (*at.spec, *[None] * (a.ndim - len(at.spec)))
    near = lambda a, at: NamedSharding(at.mesh, _rules.without(whole(a, at), rows))
    return PlacedLeaf(leaf, tuple(map(near, jax.tree.leaves(leaf), jax.tree.leaves(places))))
