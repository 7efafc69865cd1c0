"""Which factors weight decay may pull towards zero."""

import dataclasses
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._algebra._express import express
from jlora._algebra._recipe import Recipe, bind
from jlora._algebra._words import Array, Delta, Function, Step, Word, begins, constant
from jlora._plan._sites import Site
from jlora._types import Place, PyTree
from jlora.adapted import Adapted, check_any, is_adapted
from jlora.optim._halves import Halves


def decay_mask(adapted: Adapted) -> Callable[[PyTree], PyTree]:
    """For `optax.adamw(..., mask=decay_mask(adapted))`: True where zero is the factor of no change.

    Decay towards zero is a pull towards the pretrained weight where a zero in the factor makes its update zero: a and b
    of LoRA, lam of AdaLoRA, the angles of OFT, BOFT and RoAd, SSF's beta, a whole leaf under `Full`. Elsewhere it pulls
    away from the pretrained weight: DoRA's m, IA3's l, SSF's gamma (W would shrink to zero), and a and b of a pair
    (PiSSA, OLoRA, LoRA-GA), whose zero is -a0 b0; or to nothing at all (new rows of a table). That is read off the
    equations: a factor may be decayed if each network of an update that it stands in vanishes with it, and each gain or
    rotation that stands on it alone is then the identity.

    Args:
      adapted: the `Adapted` that is trained; values of trained factors are not read.

    Returns:
      A function of a tree, as optax takes it for a mask: of booleans in the tree's structure, for the split form and
      the whole form, inside `jlora.masked`. Leaves beside the adapter are True, frozen ones False.

    Raises:
      TypeError: `adapted` is no `Adapted`.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.DoRA(jlora.LoRA(rank=2)))
      >>> mask = jlora.optim.decay_mask(adapted)
      >>> mask(adapted.trainable)
      {'query/kernel': {'a': True, 'b': True, 'm': False}}
      >>> tx = optax.adamw(1e-3, weight_decay=0.1, mask=mask)
      >>> state = tx.init(adapted.trainable)
    """
    check_any("decay_mask", adapted)
    plan = adapted.frozen.plan
    halves = Halves(plan)
    allowed: dict[Place, bool] = {}
    known: dict[tuple[object, ...], dict[Place, bool]] = {}
    for site in plan.sites:
        content = (site.recipe, site.leaf.shape, site.leaf.roles)
        if content not in known:
            known[content] = {(a.group or "", a.name): _allowed(site, a, adapted) for a in _trained(site)}
        for (group, name), may in known[content].items():
            place = (group or site.leaf.path, name)
            allowed[place] = allowed.get(place, True) and may

    def visit(x: PyTree) -> PyTree:
        if not halves.holds(x):
            return True
        half = x.trainable if is_adapted(x) else x
        own = jax.tree_util.tree_map_with_path(lambda p, _: allowed.get((_name(p[0]), _name(p[-1])), True), half)
        return Adapted(own, jax.tree.map(lambda _: False, x.frozen)) if is_adapted(x) else own

    return lambda tree: jax.tree.map(visit, tree, is_leaf=halves.holds)


def _name(step: object) -> str:
    return jax.tree_util.keystr((step,), simple=True)


def _trained(site: Site) -> list[Array]:
    return [array for array, _ in site.recipe.arrays(site.leaf).values() if array.trained]


def _words(delta: Delta, x: Array) -> list[Array | Function]:
    """The operands of a network in which a factor stands."""
    found = [word for word in delta.operands if any(_same(a, x) for a in word.arrays)]
    return cast("list[Array | Function]", found)  # a word with arrays is no `Base`


def _same(a: Array, x: Array) -> bool:
    return (a.group, a.name) == (x.group, x.name)


def _unmoved(site: Site, step: Step, x: Array) -> bool:
    """Whether a step leaves an output as it is where this factor is zero, vectors where they begin, others at one."""
    begun = lambda a: begins(a) if len(a.shape or ()) < 2 else None
    value = lambda a: 0.0 if _same(a, x) else 1.0 if (at := begun(a)) is None else at
    y = jnp.linspace(0.1, 1.0, site.leaf.size("o"))[None]  # whose sum is not zero
    met = (y, y) if step.of else (y,)
    return np.allclose(step.fn(*met, *(jnp.full(a.shape or (), value(a)) for a in step.arrays)), y)


def _allowed(site: Site, x: Array, adapted: Adapted) -> bool:
    """Whether zero in this factor alone leaves the weight as it was."""
    updates = [words for delta in site.recipe.deltas if (words := _words(delta, x))]
    if updates:  # DoRA's gain reads a and b too, but only by way of the update, which is then zero
        return all(any(_vanishes(site, word, x, adapted) for word in words) for words in updates)
    if any(_same(a, x) for r in site.recipe.rows if r.new(site.leaf) for a in r.made.arrays):
        return False
    if any(_same(a, x) for step in site.recipe.steps for a in step.arrays):
        return all(not step.ids and _unmoved(site, step, x) for step in site.recipe.steps)
    networks = {"gain": site.recipe.gain, "left": site.recipe.left, "right": site.recipe.right}
    stands = {side: words for side, delta in networks.items() if delta is not None and (words := _words(delta, x))}
    if any(isinstance(word, Array) for words in stands.values() for word in words):
        return False
    return all(_idle(site, side, x, adapted) for side in stands)


def _idle(site: Site, side: str, x: Array, adapted: Adapted) -> bool:
    """Whether a gain or a rotation, its operands multiplied, leaves a weight as it is where this factor is zero.

    The operands are multiplied because in a chain of rotations (BOFT) each is an identity on axes of its own.
    """
    leaf, network = site.leaf.layer, getattr(site.recipe, side)
    other = {"left": "o", "right": "ik", "gain": ""}[
        side
    ]  # a rotation of rows does the same to each column: one is enough
    shape = tuple(1 if role in other else n for n, role in zip(leaf.shape, leaf.roles, strict=True))
    leaf = dataclasses.replace(leaf, shape=shape)
    bound = bind(network, leaf, {"left": "II", "right": "OO", "gain": "IO"}[side])
    held: dict[str, jax.Array] = {}  # what each operand is, through NumPy, so that no mesh comes along
    words: list[Word] = []
    for n, (word, labels) in enumerate(bound.words):
        if isinstance(word, Function):
            held[str(n)] = jnp.asarray(np.asarray(_at_zero(site, word, x, adapted)))
        elif isinstance(word, Array):
            held[str(n)] = jnp.asarray(np.asarray(_value(site, word, bound.shape(labels), x, adapted)))
        words.append(Array(str(n), constant(0.0)) if str(n) in held else word)
    recipe = Recipe(**{side: dataclasses.replace(network, operands=tuple(words))})
    w0 = jnp.asarray(np.random.default_rng(0).standard_normal(leaf.shape), jnp.float32)
    made = express(leaf, recipe, w0, lambda _, name: held[name]).dense()
    return np.allclose(made, w0, atol=1e-5)


def _vanishes(site: Site, word: Array | Function, x: Array, adapted: Adapted) -> bool:
    return isinstance(word, Array) or not np.any(_at_zero(site, word, x, adapted))


def _at_zero(site: Site, word: Function, x: Array, adapted: Adapted) -> jax.Array:
    """A function of factors where this one is zero: frozen ones as they are, other trained ones at one."""
    arrays = [_value(site, array, array.shape or (), x, adapted) for array in word.arrays]
    kept = tuple(n for n, role in zip(site.leaf.shape, site.leaf.roles, strict=True) if role != "s")
    return word.fn(*arrays, *((jnp.ones(kept, jnp.float32),) if word.base else ()))


def _value(site: Site, array: Array, shape: tuple[int, ...], x: Array, adapted: Adapted) -> jax.Array:
    """A factor of one layer: zero where it is this one, at one where it is another that is trained, else as it is."""
    if (array.group, array.name) == (x.group, x.name):
        return jnp.zeros(shape, jnp.float32)
    if array.trained:
        return jnp.ones(shape, jnp.float32)
    held = adapted.frozen.factors[array.group or site.leaf.path][array.name]
    if isinstance(held, (Tracer, jax.ShapeDtypeStruct)):
        return jnp.ones(shape, held.dtype)
    return held[(0,) * len(site.leaf.stack)] if array.stacked else held
