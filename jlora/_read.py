"""Reading an adapter: its factors, its weights as expressions, its base with other values in their places."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

from jlora._algebra._express import express
from jlora._algebra._weight import Weight
from jlora._algebra._words import Recipe
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
    """An adapter or a `Compound` leaf, with every `Compound` leaf a site: what no method took has an empty recipe."""
    if is_compound(found):
        found = Adapted({}, Frozen(found, {}, None, _sites.intern((), (), ())))
    tree = _tree.flatten(found.frozen.base)
    taken = {s.index for s in found.frozen.plan.sites}
    more = []
    for n, (path, leaf) in enumerate(zip(tree.paths, tree.leaves, strict=True)):
        if is_compound(leaf) and n not in taken:
            where = Leaf(path or name, leaf.shape, jnp.dtype(leaf.dtype), leaf.roles)
            more.append(Site(where, n, Method(), Recipe()))
    if not more:
        return found
    old = found.frozen.plan
    plan = _sites.intern((*old.sites, *more), old.methods, old.notes)
    return Adapted(found.trainable, dataclasses.replace(found.frozen, plan=plan))


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
    return [express(s.leaf, s.recipe, w0, get, gates=gates) for s, w0 in zip(sites, bases, strict=True)]


def replaced(adapted: Adapted, values: Sequence[PyTree]) -> PyTree:
    """The base tree with one value for each site."""
    leaves = _tree.leaves(adapted.frozen.base)
    for site, value in zip(adapted.frozen.plan.sites, values, strict=True):
        leaves[site.index] = value
    return _tree.rebuilt(adapted.frozen.base, leaves)
