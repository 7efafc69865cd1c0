"""Reading an adapter: its factors, its weights as expressions, its base with other values in their places."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jlora._algebra._express import express
from jlora._algebra._recipe import Recipe
from jlora._algebra._weight import Weight
from jlora._gates import check_everywhere
from jlora._plan import _sites
from jlora._plan._sites import Site
from jlora._trees import _compound, _tree
from jlora._trees._compound import Compound, is_compound
from jlora._trees._leaf import Leaf
from jlora._types import PyTree
from jlora.adapted import Adapted, Frozen
from jlora.methods.base import Method


def factors_of(adapted: Adapted) -> Callable[[str, str], jax.Array]:
    """`(group, factor) -> array`, trainable or frozen."""

    def get(group: str, name: str) -> jax.Array:
        for side in (adapted.trainable, adapted.frozen.factors):
            if name in side.get(group, {}):
                return side[group][name]
        raise KeyError(f"no factor {name!r} in group {group!r}")

    return get


def held(named: Sequence[tuple[str, PyTree]]) -> list[jax.Array | Compound]:
    """Leaves, given with their paths, as expressions take them: arrays, and `Compound` as they are.

    Raises:
      TypeError: packed weights that a `tree_map` cast, all at once.
    """
    _compound.sound(named)
    return [leaf if is_compound(leaf) else jnp.asarray(leaf) for _, leaf in named]


def completed(found: Adapted | Compound, name: str = "") -> Adapted:
    """An adapter or a `Compound` leaf, with a site for every `Compound` leaf and every one whose input a step reads.

    What no method took has an empty recipe.
    """
    if is_compound(found):
        found = Adapted({}, Frozen(found, {}, None, _sites.intern((), (), ())))
    tree = _tree.flatten(found.frozen.base)
    taken = {s.index for s in found.frozen.plan.sites}
    read = {of for _, of in _sites.inputs_read(found.frozen.plan.sites, tree.paths) if of is not None}
    more = []
    for n, (path, leaf) in enumerate(zip(tree.paths, tree.leaves, strict=True)):
        if n not in taken and (is_compound(leaf) or path in read):
            shape, dtype = _tree.shape_dtype(leaf)
            # a weight that is only read needs no letters of its own: what it meets tells its input
            where = Leaf(path or name, shape, jnp.dtype(dtype), leaf.roles if is_compound(leaf) else "i" * len(shape))
            more.append(Site(where, n, Method(), Recipe()))
    if not more:
        return found
    old = found.frozen.plan
    plan = _sites.intern((*old.sites, *more), old.methods, old.notes)
    return Adapted(found.trainable, dataclasses.replace(found.frozen, plan=plan))


def inputs_read(adapted: Adapted) -> dict[int, list[int | None]]:
    """`{site: for each of its steps the site whose input it reads, or None}`, of sites with a step that reads one."""
    sites = adapted.frozen.plan.sites
    place = {site.leaf.path: n for n, site in enumerate(sites)}
    found: dict[int, list[int | None]] = {}
    for n, of in _sites.inputs_read(sites, list(place)):
        found.setdefault(n, []).append(None if of is None else place[of])
    return {n: others for n, others in found.items() if any(o is not None for o in others)}


def expressions(adapted: Adapted, leaves: list[PyTree]) -> list[Weight]:
    """The expression of every adapted weight over the base's leaves, to be made dense.

    Raises:
      ValueError: gates without a value, or with positions.
    """
    check_everywhere(adapted)
    get = factors_of(adapted)
    sites = adapted.frozen.plan.sites
    bases = held([(s.leaf.path, leaves[s.index]) for s in sites])
    gates = adapted.frozen.gates
    shown = lambda s: s.leaf.path if s.recipe.steps else None  # equal layers look alike, so only for a message
    return [express(s.leaf, s.recipe, w0, get, gates=gates, path=shown(s)) for s, w0 in zip(sites, bases, strict=True)]


def check_mergeable(caller: str, adapted: Adapted) -> None:
    """Raises ValueError where a weight with its adapter is more than a weight: all of them at once."""
    if stepping := [s.leaf.path for s in adapted.frozen.plan.sites if s.recipe.steps]:
        raise ValueError(
            f"{caller}: {stepping[:4]}{' and others' if len(stepping) > 4 else ''} have steps on their outputs, which "
            "no merged weight can hold; keep the adapter beside its base, and call jlora.lift(fn)"
        )


def replaced(adapted: Adapted, values: Sequence[PyTree]) -> PyTree:
    """The base tree with one value for each site."""
    leaves = _tree.leaves(adapted.frozen.base)
    for site, value in zip(adapted.frozen.plan.sites, values, strict=True):
        leaves[site.index] = value
    return _tree.rebuilt(adapted.frozen.base, leaves)
