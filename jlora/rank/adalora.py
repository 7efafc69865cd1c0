"""AdaLoRA's allocation: a budget of ranks that goes to the triplets of largest importance.

Zhang et al, `AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
<https://arxiv.org/abs/2303.10512>`_, 2023.
"""

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jlora._dtypes import wide
from jlora._plan._pairs import Member, Pair, pairs
from jlora._types import PyTree
from jlora.adapted import Adapted
from jlora.optim._checks import number, transformation_of, whole_number
from jlora.optim._halves import Halves, Places, check_masked, plan_with
from jlora.rank._steps import finite, flat, gathered_mean, nested, none_gathered, started, stepped
from jlora.rank.budget import Budget
from jlora.rank.prune import Ties, check_ties, top

WHAT = "an update p diag(lam) q, all trained; adapt with jlora.AdaLoRA(...)"


class AdaLoRAState(NamedTuple):
    """What `adalora` carries, all of it arrays `{group: {factor: ...}}` beside the count.

    Attributes:
      count: real updates made.
      sensitivity: the smoothed |w grad| of every p, lam and q, in their shapes.
      uncertainty: the smoothed distance of |w grad| from it.
      mask: of every lam, (stack..., r): which triplets are alive.
      inner: the wrapped optimizer's.
      gathered: the mean gradient of the microbatches that `optax.MultiSteps` inside has gathered; else ().
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (checkpoints hold it by this name)
    sensitivity: PyTree
    uncertainty: PyTree
    mask: PyTree
    inner: PyTree
    gathered: PyTree = ()

    def never_ran(self) -> str:
        """For `save` and `compact`, which ask the state: what did not happen; empty after an update."""
        return (
            "" if np.any(self.count) else "the schedule of adalora never ran (it counts no update): nothing is pruned"
        )


def adalora(
    inner: optax.GradientTransformation,
    adapted: Adapted,
    *,
    total_steps: int,
    target_rank: float | None = None,
    target_budget: int | None = None,
    init_warmup: int = 0,
    final_warmup: int = 0,
    interval: int = 1,
    beta1: float = 0.85,
    beta2: float = 0.85,
    importance: Literal["sensitivity", "magnitude"] = "sensitivity",
    ties: Ties = "exact",
    revive: bool = False,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under which the triplets (p_i, lam_i, q_i) of least importance are pruned, lam_i = 0.

    After each step of `inner`, with w its result and g the gradient it was given, for every entry of p, lam and q:

        I = |w g|,   I~ <- beta1 I~ + (1 - beta1) I,   U~ <- beta2 U~ + (1 - beta2) |I - I~|,   s = I~ U~
        S_i = s(lam_i) + mean s(p_i) + mean s(q_i)

    and where the `Budget` says so, the b(t) triplets of largest S stay, over all weights and layers together. Scores
    and masks are fixed from T - t_f on. s does not change with the rank: it is alpha over the rank it began with.

    It wraps the whole optimizer, since it needs the gradients, and the parameters after the step:
    `chain(clip, adalora(adamw(...), adapted, ...))`. Nothing that changes updates may stand behind it, or zeros would
    be none. `jlora.masked`, `optax.MultiSteps` and `optax.apply_if_finite` may stand around it or inside: only real
    updates count and score, by the mean gradient of their microbatches, and a gradient that is not finite leaves count,
    scores and masks as they were. The penalty `orthogonality` belongs to the loss.

    Args:
      inner: the optimizer of all parameters.
      adapted: the `Adapted` that is trained; read for its static plan alone.
      total_steps: T, real updates.
      target_rank: the mean rank of a weight (a layer of a stack) in the end, their sum rounded down; or
      target_budget: bT itself, all ranks in the end.
      init_warmup: t_i, steps before the first pruning.
      final_warmup: t_f, steps at the end with fixed masks.
      interval: steps between two masks.
      beta1: of the sensitivity.
      beta2: of the uncertainty.
      importance: `"sensitivity"`, S above, or `"magnitude"`, the paper's ablation S_i = |lam_i|.
      ties: `"exact"` or `"reference"`, as for `prune`.
      revive: False keeps what is pruned at zero until a later mask takes it back in; True lets `inner` move it until
        the next mask, as the authors' code does, so that between two masks more than b(t) are alive.

    Returns:
      A transformation whose update needs `params`; its state is an `AdaLoRAState`.

    Raises:
      TypeError: `inner` is no optax transformation, or `adapted` no `Adapted`.
      ValueError: no weight with triplets; a budget that cannot be reached; a schedule that does not fit; betas
        outside [0, 1); no `params`, or another adapter's.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.AdaLoRA(rank=3))
      >>> tx = jlora.rank.adalora(optax.adamw(1e-2), adapted, target_rank=1, total_steps=4, final_warmup=1)
      >>> trainable, state = adapted.trainable, tx.init(adapted.trainable)
      >>> for _ in range(4):
      ...     grads = jax.tree.map(jnp.ones_like, trainable)
      ...     updates, state = tx.update(grads, state, trainable)
      ...     trainable = optax.apply_updates(trainable, updates)
      >>> int(jnp.count_nonzero(trainable["query/kernel"]["lam"]))
      1

    References:
      Zhang et al, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023.
    """
    plan = plan_with("adalora", adapted, lambda pair: pair.diagonal, WHAT)
    triplets = tuple(pair for pair in pairs(plan) if pair.diagonal)
    budget = _budget(triplets, target_rank, target_budget, total_steps, init_warmup, final_warmup, interval)
    if importance not in ("sensitivity", "magnitude"):
        raise ValueError(f"adalora(importance={importance!r}): write 'sensitivity' or 'magnitude'")
    for name, beta in (("beta1", beta1), ("beta2", beta2)):
        number("adalora", name, beta, "it lies in [0, 1)", lambda x: 0 <= x < 1)
    check_ties("adalora", ties)
    halves = Halves(plan)
    inner = transformation_of("adalora", inner)
    gates = [pair.gates[0].place for pair in triplets]
    factors = list(dict.fromkeys(m.place for pair in triplets for m in _members(pair)))
    scored = factors if importance == "sensitivity" else []

    def init(params: PyTree) -> AdaLoRAState:
        start = started("adalora", halves, params, plan)
        missing = [place for place in factors if place not in start]
        if missing:
            raise ValueError(
                f"adalora sees no {missing[:3]}: it wraps the whole optimizer, and masks or optax.partition go inside"
            )
        zeros = lambda: nested({p: jnp.zeros_like(start[p], wide(start[p].dtype)) for p in scored})
        mask = nested({place: jnp.ones_like(start[place], bool) for place in gates})
        held = inner.init(params)
        check_masked("adalora", held)
        return AdaLoRAState(
            jnp.zeros((), jnp.int32), zeros(), zeros(), mask, held, none_gathered(held, {p: start[p] for p in scored})
        )

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, AdaLoRAState]:
        if params is None:
            raise ValueError("adalora needs the parameters: write tx.update(grads, state, params)")
        old, given = halves.read(params, "adalora"), halves.read(updates, "adalora")
        good = finite(updates)
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        held, given = gathered_mean(state.gathered, given, good, state.inner, inner_state)
        real = good & stepped(state.inner, inner_state)
        step = jnp.where(real, jnp.asarray(optax.safe_increment(state.count)), state.count)
        change = halves.read(updates, "adalora")
        new = {place: (old[place] + change[place]).astype(old[place].dtype) for place in factors}

        mean, distance, mask = map(flat, (state.sensitivity, state.uncertainty, state.mask))
        scoring = real & (step < budget.last)
        for place in scored:
            mean[place], distance[place] = _smoothed(
                scoring, new[place], given[place], mean[place], distance[place], beta1, beta2
            )
        scores = (
            (lambda: _scores(triplets, mean, distance)) if scored else (lambda: {p: jnp.abs(new[p]) for p in gates})
        )
        mask = lax.cond(
            real & budget.masks(step),
            lambda: nested(top(scores(), budget.traced(step), ties)),
            lambda: nested(mask),
        )
        still = (budget.masks(step) | (step >= budget.last)) if revive else True
        kept = flat(mask)
        # what is pruned is updated by -p, as p + (0 - p) is zero in any float
        ends = {p: jnp.where(kept[p] | ~jnp.asarray(still), change[p], -old[p]) for p in gates}
        state = AdaLoRAState(step, nested(mean), nested(distance), mask, inner_state, held)
        return halves.write(updates, ends), state

    return optax.GradientTransformationExtraArgs(init, update)


def _budget(triplets: tuple[Pair, ...], rank: float | None, budget: int | None, *schedule: int) -> Budget:
    if (rank is None) == (budget is None):
        raise ValueError(f"adalora(target_rank={rank}, target_budget={budget}): write one of the two")
    if rank is None:
        whole_number("adalora", "target_budget", budget, 0, float("inf"), "a number of ranks in all")
    else:
        number("adalora", "target_rank", rank, "a mean rank", lambda x: 0 <= x < float("inf"))
    initial = sum(pair.rank * pair.layers for pair in triplets)
    matrices = sum(pair.layers for pair in triplets)
    target = int(budget if rank is None else rank * matrices)  # type: ignore[operator]
    return Budget(initial, target, *schedule)


def _members(pair: Pair) -> tuple[Member, ...]:
    return (*pair.members, *pair.gates)


def _smoothed(
    scoring: jax.Array, w: jax.Array, grad: jax.Array, mean: jax.Array, distance: jax.Array, beta1: float, beta2: float
) -> tuple[jax.Array, jax.Array]:
    """I~ and U~ of one factor after a step; U~ is measured from the I~ that this step has moved."""
    size = jnp.abs(w.astype(mean.dtype) * grad.astype(mean.dtype))
    new_mean = beta1 * mean + (1 - beta1) * size
    new_distance = beta2 * distance + (1 - beta2) * jnp.abs(size - new_mean)
    scoring = scoring & jnp.isfinite(size)  # w g may overflow where w and g do not
    return jnp.where(scoring, new_mean, mean), jnp.where(scoring, new_distance, distance)


def _scores(triplets: tuple[Pair, ...], mean: Places, distance: Places) -> Places:
    """S of every triplet, (stack..., r)."""

    def one(member: Member) -> jax.Array:
        s = mean[member.place] * distance[member.place]
        return jnp.mean(
            s, tuple(range(member.stack + 1, s.ndim))
        )  # a mean over axes, not a reshape: a sharded axis stays sharded

    def total(pair: Pair) -> jax.Array:
        parts = [one(member) for member in _members(pair)]
        n = max(x.ndim for x in parts)
        # a factor that all layers of a stack share lacks the stack axes, and counts in each layer
        return functools.reduce(jnp.add, (x.reshape(*(1,) * (n - x.ndim), *x.shape) for x in parts))

    return {pair.gates[0].place: total(pair) for pair in triplets}
