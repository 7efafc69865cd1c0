"""Which calls of an optimizer are real updates, and the gradient that such an update is of.

A gradient that is not finite makes no update: `optax.apply_if_finite` skips it, and one NaN in a running mean would
stay there. Nor does a call under `optax.MultiSteps` that only gathers: the update is of the mean of the microbatches.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jlora._dtypes import wide
from jlora._plan._sites import Plan
from jlora._types import Half, PyTree, Value
from jlora.adapted import is_adapted
from jlora.optim._halves import Halves, Places


class Gathered(NamedTuple):
    """The mean of the gradients since the last real update, `{group: {factor: array}}`, and how many they were."""

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (checkpoints hold it by this name)
    mean: PyTree


def finite(updates: PyTree) -> jax.Array:
    """Whether every gradient is finite; those of a frozen half are not looked at."""
    halves = [x.trainable if is_adapted(x) else x for x in jax.tree.leaves(updates, is_leaf=is_adapted)]
    leaves = [x for x in jax.tree.leaves(halves) if jnp.issubdtype(jnp.result_type(x), jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in leaves])) if leaves else jnp.array(True)


def gathering(state: PyTree) -> list[optax.MultiStepsState]:
    """The states of `optax.MultiSteps` inside an optimizer's."""
    is_gathering = lambda x: isinstance(x, optax.MultiStepsState)
    return [x for x in jax.tree.leaves(state, is_leaf=is_gathering) if is_gathering(x)]


def none_gathered(state: PyTree, places: Places) -> PyTree:
    """`Gathered` of nothing where the optimizer inside gathers, () where each call is an update."""
    if not gathering(state):
        return ()
    return Gathered(jnp.zeros((), jnp.int32), nested({p: jnp.zeros_like(x, wide(x.dtype)) for p, x in places.items()}))


def started(caller: str, halves: Halves, params: PyTree, plan: Plan) -> Places:
    """The factors at the start; from the plan alone where optax asks for the structure of the state."""
    if any(hasattr(x, "shape") for x in jax.tree.leaves(params)):
        return halves.read(params, caller)
    return {place: jnp.zeros(shape, jnp.float32) for place, (shape, trained) in plan.shapes.items() if trained}


def stepped(before: PyTree, after: PyTree) -> jax.Array | bool:
    """Whether the optimizer inside has made an update of what it gathered; always, where it gathers nothing."""
    pairs = zip(gathering(before), gathering(after), strict=True)
    made = [new.gradient_step != old.gradient_step for old, new in pairs]
    return jnp.any(jnp.array(made)) if made else True


def gathered_mean(held: PyTree, given: Places, good: jax.Array, before: PyTree, after: PyTree) -> tuple[PyTree, Places]:
    """What is held, and the gradient of an update that this call makes: the mean over its microbatches."""
    if held == ():
        return held, given
    pairs = list(zip(gathering(before), gathering(after), strict=True))
    took = [(new.mini_step != old.mini_step) | (new.gradient_step != old.gradient_step) for old, new in pairs]
    took = good & jnp.any(jnp.array(took))  # `MultiSteps(should_skip_update_fn=...)` may have left this one out
    n = held.count + took
    mean = {p: x + jnp.where(took, (given[p] - x) / jnp.maximum(n, 1), 0) for p, x in flat(held.mean).items()}
    done = stepped(before, after)
    left = {p: jnp.where(done, 0, x) for p, x in mean.items()}
    return Gathered(jnp.where(done, 0, n), nested(left)), given | {p: x.astype(given[p].dtype) for p, x in mean.items()}


def where_real(real: jax.Array | bool, new: Value, old: Value) -> Value:
    """The new state after a real update, the old one else."""
    return jax.tree.map(lambda x, y: jnp.where(real, x, y), new, old)


def nested(values: Places) -> dict[str, dict[str, jax.Array]]:
    """`{(group, factor): x}` as `{group: {factor: x}}`."""
    tree: dict[str, dict[str, jax.Array]] = {}
    for (group, name), x in values.items():
        tree.setdefault(group, {})[name] = x
    return tree


def flat(tree: Half) -> Places:
    """The inverse of `nested`."""
    return {(group, name): x for group, named in tree.items() for name, x in named.items()}
