"""SeLoRA: ranks that grow where a further one would see much of the gradient.

Mao et al, `SeLoRA: Self-Expanding Low-Rank Adaptation of Latent Diffusion Model for Medical Image Synthesis
<https://arxiv.org/abs/2408.07196>`_, 2024.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from jlora._dtypes import widened
from jlora._plan._pairs import Member, Pair, pairs
from jlora._types import Half, PyTree
from jlora.adapted import Adapted
from jlora.optim._checks import number, transformation_of, whole_number
from jlora.optim._halves import Halves, Places, check_masked, plan_with
from jlora.rank._steps import finite, gathered_mean, nested, none_gathered, started, stepped


class SeLoRAState(NamedTuple):
    """What `selora` carries.

    Attributes:
      count: real updates made.
      ranks: `{group: {factor: (stack...,)}}`, the active ranks of every layer.
      ratio: the last Fisher ratio of each, at least 1.
      inner: the wrapped optimizer's.
      gathered: the mean gradient of the microbatches that `optax.MultiSteps` inside has gathered; else ().
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (checkpoints hold it by this name)
    ranks: Half
    ratio: PyTree
    inner: PyTree
    gathered: PyTree = ()

    def never_ran(self) -> str:
        """For `save` and `compact`, which ask the state: what did not happen; empty after an update."""
        return "" if np.any(self.count) else "the test of selora never ran (it counts no update): no rank was added"


def selora(
    inner: optax.GradientTransformation,
    adapted: Adapted,
    *,
    threshold: float = 1.3,
    interval: int = 40,
    start: int = 1,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer under which every weight (a layer of a stack) begins at rank `start` and may grow to its LoRA's.

    The factors have their full rank in memory. Of rows beyond the active rank n, those of a are as `adapt` drew them
    and those of b are zero, so they add nothing; their updates are masked. The next row, a_n, is the probe: dL/da_n
    is zero and dL/db_n is what the row would learn from. Every `interval` updates,

        ratio = (sum_{i <= n} |dL/da_i|^2 + |dL/db_i|^2) / (sum_{i < n} |dL/da_i|^2 + |dL/db_i|^2)

    and the row becomes active where the ratio is at least the threshold. It is the row that was probed, both sums are
    of one gradient at one point, and so the ratio is at least 1. Moments of old rows are kept; those of a new row are
    zero, as its gradients were masked. s does not change: alpha / r with the full rank r; the authors' alpha over the
    first rank is `LoRA(rank=r, alpha=alpha * r / start)`.

    `optax.MultiSteps` and `optax.apply_if_finite` may stand around it or inside: only real updates count, and a
    gradient that is not finite leaves count, ranks and ratios as they were.

    Args:
      inner: the optimizer of all parameters.
      adapted: the `Adapted` that is trained, as `adapt` made it; read for its static plan alone.
      threshold: lambda, 1.3 in the authors' runs (1.0 to 1.3 are useful).
      interval: real updates between two probes.
      start: the first active rank.

    Returns:
      A transformation; its state is a `SeLoRAState`. `tx.update(grads, state, params, probe=other)` takes the ratio
      of a second gradient, of another or a larger batch at the same point.

    Raises:
      TypeError: `inner` is no optax transformation, or `adapted` no `Adapted`.
      ValueError: no weight with plain LoRA factors; a threshold, interval or start out of its range;
        another adapter's parameters.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=4))
      >>> tx = jlora.rank.selora(optax.adam(1e-2), adapted, interval=1)
      >>> grads = jax.tree.map(jnp.ones_like, adapted.trainable)
      >>> updates, state = tx.update(grads, tx.init(adapted.trainable), adapted.trainable)
      >>> state.ranks["query/kernel"]["b"], updates["query/kernel"]["b"][:, 0] != 0
      (Array(2, dtype=int32), Array([ True, False, False, False], dtype=bool))

    References:
      Mao et al, `SeLoRA <https://arxiv.org/abs/2408.07196>`_, 2024.
    """
    wanted = lambda pair: (
        pair.trained == 2 and not pair.gates and pair.others == 0 and len(pair.own) == 2 and not pair.begun
    )
    what = "two trained factors of its own that share a rank; adapt with jlora.LoRA"
    plan = plan_with("selora", adapted, wanted, what)
    growing = tuple(filter(wanted, pairs(plan)))
    number("selora", "threshold", threshold, "at least 1, as the ratio is", lambda x: x >= 1)
    whole_number("selora", "interval", interval, 1, math.inf, "updates between two probes, at least 1")
    most = max(pair.rank for pair in growing)
    said = f"the first active rank, from 1 to {most}, the rank that was adapted with"
    whole_number("selora", "start", start, 1, most, said)
    halves = Halves(plan)
    inner = transformation_of("selora", inner)
    layers = {pair.output.place: plan.shapes[pair.output.place][0][: pair.output.stack] for pair in growing}

    def init(params: PyTree) -> SeLoRAState:
        ranks = {pair.output.place: min(start, pair.rank) for pair in growing}
        filled = lambda dtype, value: nested({p: jnp.full(n, value(p), dtype) for p, n in layers.items()})
        ratio = filled(jnp.float32, lambda _: 1.0)
        held = inner.init(params)
        check_masked("selora", held)
        factors = started("selora", halves, params, plan)
        some = {m.place: factors[m.place] for pair in growing for m in pair.members}
        zero, first = jnp.zeros((), jnp.int32), filled(jnp.int32, ranks.get)
        return SeLoRAState(zero, first, ratio, held, none_gathered(held, some))

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, probe: PyTree = None, **extra: PyTree
    ) -> tuple[PyTree, SeLoRAState]:
        good = finite(updates)
        given = halves.read(updates, "selora")
        seen = given if probe is None else halves.read(probe, "selora")
        updates, inner_state = inner.update(
            halves.write(updates, _active(growing, state.ranks, given)), state.inner, params, **extra
        )
        updates = halves.write(updates, _active(growing, state.ranks, halves.read(updates, "selora")))
        held, seen = gathered_mean(state.gathered, seen, good, state.inner, inner_state)
        real = good & stepped(state.inner, inner_state)
        step = jnp.where(real, jnp.asarray(optax.safe_increment(state.count)), state.count)
        due = real & (step % interval == 0)
        ranks: Places = {}
        ratios: Places = {}
        for pair in growing:
            place = pair.output.place
            group, name = place
            n, old = state.ranks[group][name], state.ratio[group][name]
            ratio = fisher_ratio(pair, n, seen)
            ranks[place] = jnp.where(due & (ratio >= threshold) & (n < pair.rank), n + 1, n)
            ratios[place] = jnp.where(due & ~jnp.isnan(ratio), ratio, old)
        return updates, SeLoRAState(step, nested(ranks), nested(ratios), inner_state, held)

    return optax.GradientTransformationExtraArgs(init, update)


def fisher_ratio(pair: Pair, n: jax.Array, grads: Places) -> jax.Array:
    """(stack...,): the squared gradient of n + 1 rows over that of n; 1 where there is no gradient at all."""
    squares = sum(_squares(grads[m.place], m) for m in pair.members)
    upto = lambda last: jnp.sum(jnp.where(_below(last, pair.rank), squares, 0), -1)
    old, more = upto(n), upto(n + 1)
    some = jnp.where(old > 0, more / jnp.where(old > 0, old, 1), jnp.where(more > 0, jnp.inf, 1.0))
    return jnp.maximum(some, 1.0).astype(jnp.float32)  # one more square in the sum: less than 1 is rounding


def _below(n: jax.Array, rank: int) -> jax.Array:
    """(stack..., r): whether a row is one of the first n of its layer."""
    return lax.broadcasted_iota(jnp.int32, (*n.shape, rank), n.ndim) < n[..., None]


def _squares(x: jax.Array, member: Member) -> jax.Array:
    """(stack..., r)"""
    x = widened(x)
    return jnp.sum(x * x, tuple(range(member.stack + 1, x.ndim)))


def _active(growing: tuple[Pair, ...], ranks: Half, values: Places) -> Places:
    """The factors' values with zeros beyond the active ranks."""
    made = {}
    for pair in growing:
        n = ranks[pair.output.place[0]][pair.output.place[1]]
        rows = _below(n, pair.rank)
        for m in pair.members:
            x = values[m.place]
            keep = rows.reshape(*rows.shape, *(1,) * (x.ndim - rows.ndim))
            made[m.place] = jnp.where(keep, x, jnp.zeros_like(x))
    return made
