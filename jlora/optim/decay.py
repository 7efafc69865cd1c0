"""Which factors weight decay may pull towards zero."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._algebra._words import Array, Delta, Function
from jlora._plan._sites import Site
from jlora.adapted import Adapted, check_any, is_adapted
from jlora.optim._halves import Halves, Places


def decay_mask(adapted: Any) -> Callable[[Any], Any]:
    """For `optax.adamw(..., mask=decay_mask(adapted))`: True where zero is the factor of no change.

    Decay towards zero is a pull towards the pretrained weight where a zero in the factor makes its update zero: a and b
    of LoRA, lam of AdaLoRA, OFT's angles, SSF's beta, a whole leaf under `Full`. Elsewhere it pulls away from the
    pretrained weight: DoRA's m, IA3's l, SSF's gamma (W would shrink to zero), and a and b of a pair (PiSSA, OLoRA,
    LoRA-GA), whose zero is -a0 b0. That is read off the equations: a factor may be decayed if each network of an update
    that it stands in vanishes with it, and each gain or rotation that stands on it alone is then the identity.

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
    allowed: Places = {}
    known: dict[Any, dict[tuple[str, str], bool]] = {}
    for site in plan.sites:
        content = (site.recipe, site.leaf.shape, site.leaf.roles)
        if content not in known:
            known[content] = {(a.group or "", a.name): _allowed(site, a, adapted) for a in _trained(site)}
        for (group, name), may in known[content].items():
            place = (group or site.leaf.path, name)
            allowed[place] = allowed.get(place, True) and may

    def visit(x: Any) -> Any:
        if not halves.holds(x):
            return True
        half = x.trainable if is_adapted(x) else x
        own = jax.tree_util.tree_map_with_path(lambda p, _: allowed.get((_name(p[0]), _name(p[-1])), True), half)
        return Adapted(own, jax.tree.map(lambda _: False, x.frozen)) if is_adapted(x) else own

    return lambda tree: jax.tree.map(visit, tree, is_leaf=halves.holds)


def _name(step: Any) -> str:
    return jax.tree_util.keystr((step,), simple=True)


def _trained(site: Site) -> list[Array]:
    return [array for array, _ in site.recipe.arrays(site.leaf).values() if array.trained]


def _words(delta: Delta, x: Array) -> list[Any]:
    """The operands of a network in which a factor stands."""
    same = lambda a: (a.group, a.name) == (x.group, x.name)
    return [word for word in delta.operands if any(map(same, word.arrays))]


def _allowed(site: Site, x: Array, adapted: Adapted) -> bool:
    """Whether zero in this factor alone leaves the weight as it was."""
    updates = [words for delta in site.recipe.deltas if (words := _words(delta, x))]
    if updates:  # a gain that reads it as well (DoRA's norm) reads what is then no update
        return all(any(_vanishes(site, word, x, adapted) for word in words) for words in updates)
    for delta, _ in site.recipe.networks:
        for word in _words(delta, x):
            if isinstance(word, Array):
                return False
            value = _at_zero(site, word, x, adapted)
            one = np.ones(()) if delta is site.recipe.gain else np.eye(value.shape[-1])
            if not np.allclose(value, one, atol=1e-6):
                return False
    return True


def _vanishes(site: Site, word: Any, x: Array, adapted: Adapted) -> bool:
    return isinstance(word, Array) or not np.any(_at_zero(site, word, x, adapted))


def _at_zero(site: Site, word: Function, x: Array, adapted: Adapted) -> Any:
    """A function of factors where this one is zero: frozen ones as they are, other trained ones at one."""
    stack = len(site.leaf.stack)

    def value(array: Array) -> jax.Array:
        if (array.group, array.name) == (x.group, x.name):
            return jnp.zeros(array.shape or (), jnp.float32)
        if array.trained:
            return jnp.ones(array.shape or (), jnp.float32)
        held = adapted.frozen.factors[array.group or site.leaf.path][array.name]
        if isinstance(held, (Tracer, jax.ShapeDtypeStruct)):
            return jnp.ones(array.shape or (), held.dtype)
        return held[(0,) * stack] if array.stacked else held

    arrays = [value(array) for array in word.arrays]
    kept = tuple(n for n, role in zip(site.leaf.shape, site.leaf.roles, strict=True) if role != "s")
    return word.fn(*arrays, *((jnp.ones(kept, jnp.float32),) if word.base else ()))
