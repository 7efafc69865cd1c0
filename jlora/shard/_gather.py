"""Weights that are held as codes, gathered as codes."""

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._algebra._mesh import explicit_mesh
from jlora._trees import _tree
from jlora._trees._packed import Packed, is_packed
from jlora.shard import _rules


@dataclasses.dataclass(frozen=True)
class Gather:
    """`fn` of the arrays of one layer, which are brought to `places` first, and the weight to `home`.

    The places are those of arrays with all stack axes; the first `stack` entries count where a model takes layers or
    experts together (under `vmap`).
    """

    fn: Callable[..., Any]
    places: tuple[NamedSharding, ...]
    home: NamedSharding
    stack: int

    def __call__(self, *arrays: Any) -> jax.Array:
        # frozen: `custom_vmap` has no reverse mode in JAX 0.10, which derivatives without a custom rule would ask for
        held = jax.lax.stop_gradient(arrays)
        near = (_brought(a, place, self.stack) for a, place in zip(held, self.places, strict=True))
        # the weight too, or what it meets might cut it, and gather it again
        return _brought(jax.lax.stop_gradient(self.fn(*near)), self.home, self.stack)

    def free(self, axis: int) -> bool:
        """As `fn` has it: what is cut along an axis is looked up in place, not gathered."""
        return self.fn.free(axis)  # type: ignore[attr-defined]

    def along(self, arrays: Any, axis: int, front: int, f: Callable[[Any, int], Any]) -> Any:
        return self.fn.along(arrays, axis, front, f)  # type: ignore[attr-defined]


def _brought(a: jax.Array, place: NamedSharding, skip: int) -> jax.Array:
    """`a` moved to `place`, of which the first `skip` entries are of axes that it lacks.

    `vmap` of a constraint leaves its own axis to the compiler, hence the rule.
    """

    @jax.custom_batching.custom_vmap
    def move(a: jax.Array) -> jax.Array:
        at = NamedSharding(place.mesh, PartitionSpec(*place.spec[skip:]))
        if explicit_mesh([a]) is not None:
            return jax.sharding.reshard(a, _rules.sayable(at))
        mesh = jax.typeof(a).sharding.mesh  # a region of automatic axes has a mesh of its own
        return jax.lax.with_sharding_constraint(a, at if mesh.empty else NamedSharding(mesh, at.spec))

    @move.def_vmap
    def _(size: int, batched: list[bool], a: jax.Array) -> tuple[jax.Array, bool]:
        del size, batched
        return _brought(a, place, skip - 1), True

    return move(a)


@jax.tree_util.register_pytree_with_keys_class
class Gathered(Packed):
    """A packed leaf, and where its arrays are to be when the weight of a layer is computed from them."""

    def __init__(self, leaf: Packed, places: tuple[NamedSharding, ...]):
        self.leaf = leaf
        self.places = places

    def tree_flatten_with_keys(self) -> Any:
        return ((jax.tree_util.GetAttrKey("leaf"), self.leaf),), self.places

    @classmethod
    def tree_unflatten(cls, places: Any, leaves: Any) -> "Gathered":
        (leaf,) = leaves
        return cls(leaf, places)

    def __getattr__(self, name: str) -> Any:
        """What else its leaf has: `scheme`, `nbytes`, ..."""
        if name == "leaf":  # not made yet (copy, pickle)
            raise AttributeError(name)
        return getattr(self.leaf, name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    @property
    def dtype(self) -> Any:
        return self.leaf.dtype

    @property
    def roles(self) -> str:
        return self.leaf.roles

    def parts(self) -> tuple[tuple[Any, ...], Callable[..., jax.Array]]:
        arrays, fn = self.leaf.parts()
        # a scan over the tree takes stack axes away, a vmap adds some, in front, and they know nothing of places
        own = lambda a, at: NamedSharding(at.mesh, PartitionSpec(*(*[None] * a.ndim, *at.spec)[len(at.spec) :]))
        places = tuple(map(own, arrays, self.places))
        stack = self.leaf.roles.count("s")
        whole = None in self.leaf.axes()[0]  # the codes are one run, and no axis of theirs is one of the weight's
        home = PartitionSpec(*places[0].spec[: stack if whole else None])
        return arrays, Gather(fn, places, NamedSharding(places[0].mesh, home), stack)

    def wrong(self) -> str:
        return self.leaf.wrong()

    def axes(self) -> tuple[tuple[int | None, ...], ...]:
        return self.leaf.axes()

    def spec(self) -> tuple[Any, ...]:
        """Its stack axes as they are, its others as they are where the weight is brought."""
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


def gathered(tree: Any, places: Any, batch: Any) -> Any:
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
    tree = jax.tree.map(lambda x: x.leaf if isinstance(x, Gathered) else x, tree, is_leaf=is_packed)  # told before
    specs = jax.tree.leaves(batch, is_leaf=lambda x: isinstance(x, PartitionSpec))
    rows = {name for spec in specs for entry in spec for name in _rules.names(entry)}
    fit = jax.tree.structure(tree) == jax.tree.structure(places)
    if not fit or not all(isinstance(at, NamedSharding) for at in jax.tree.leaves(places)):
        raise ValueError(
            "gathered(tree, places, batch): places has to be a NamedSharding for each array of the tree, in its "
            "structure; write places = jlora.shard.shardings(mesh, tree, base_specs)"
        )
    both = zip(_tree.leaves(tree), _tree.leaves(places), strict=True)
    return _tree.rebuilt(tree, [_one(leaf, at, rows) for leaf, at in both])


def _one(leaf: Any, places: Any, rows: set[str]) -> Any:
    if not is_packed(leaf):
        return leaf
    whole = lambda a, at: (*at.spec, *[None] * (a.ndim - len(at.spec)))
    near = lambda a, at: NamedSharding(at.mesh, _rules.without(whole(a, at), rows))
    return Gathered(leaf, tuple(map(near, jax.tree.leaves(leaf), jax.tree.leaves(places))))
