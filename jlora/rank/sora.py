"""SoRA's sparse gates: a proximal step on g after every step of its optimizer.

Ding et al, `Sparse Low-rank Adaptation of Pre-trained Language Models <https://arxiv.org/abs/2311.11696>`_, 2023.
"""

import functools
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.typing import ArrayLike

from jlora._plan._pairs import pairs
from jlora._types import PyTree
from jlora.adapted import Adapted
from jlora.optim._checks import number, rate, transformation_of
from jlora.optim._halves import Halves, check_masked, plan_with
from jlora.rank._steps import finite, gathered_mean, gathering, none_gathered, started, stepped, where_real

Prox: TypeAlias = Literal["exact", "reference"]
Schedule: TypeAlias = "float | Callable[[ArrayLike], ArrayLike]"

WHAT = "an update a diag(g) b, all trained; adapt with jlora.SoRA(...)"


def soft_threshold(x: jax.Array, threshold: ArrayLike, prox: Prox = "exact") -> jax.Array:
    """T_xi(x) = sign(x) max(|x| - xi, 0), the proximal step of xi |x|.

    Args:
      x: an array.
      threshold: xi, at least 0, one number or an array that fits x; may be traced.
      prox: `"exact"`; or `"reference"`, what the authors' code computes: shrink by xi, then zero what is below xi,
        so that all of |x| < 2 xi but |x| = xi becomes zero.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> x = jnp.array([-2.0, -0.5, 1.0, 1.5])
      >>> print(jlora.rank.soft_threshold(x, 1.0), jlora.rank.soft_threshold(x, 1.0, prox="reference"))
      [-1.  0.  0.  0.5] [-1.  0.  1.  0.]

    References:
      Ding et al, `SoRA <https://arxiv.org/abs/2311.11696>`_, 2023.
    """
    if jnp.shape(threshold) == ():
        number("soft_threshold", "threshold", threshold, "xi is at least 0", lambda xi: xi >= 0)
    return _soft(x, threshold, prox)


@functools.partial(jax.jit, static_argnames="prox")
def _soft(x: jax.Array, threshold: ArrayLike, prox: Prox) -> jax.Array:
    xi = jnp.asarray(threshold, x.dtype)
    zero = jnp.zeros_like(x)
    small = jnp.where(x > xi, x - xi, jnp.where(x < -xi, x + xi, x))
    # 0.0 and not -0.0 for whatever is pruned
    return jnp.where(jnp.abs(x) <= xi, zero, small) if prox == "exact" else jnp.where(jnp.abs(small) < xi, zero, small)


class SoRAState(NamedTuple):
    """What `sora` carries.

    Attributes:
      count: real updates made.
      inner: the wrapped optimizers', of all but the gates and of the gates.
      gathered: the mean gradient of the gates where `optax.MultiSteps` inside gathers for the others alone; else ().
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride] (checkpoints hold it by this name)
    inner: PyTree
    gathered: PyTree = ()

    def never_ran(self) -> str:
        """For `save` and `compact`, which ask the state: what did not happen; empty after an update."""
        return "" if np.any(self.count) else "the threshold of sora never ran (it counts no update): nothing is pruned"


def sora(
    inner: optax.GradientTransformation,
    adapted: Adapted,
    *,
    learning_rate: Schedule,
    sparsity: Schedule,
    gates: optax.GradientTransformation | None = None,
    scale_by_lr: bool = True,
    prox: Prox = "exact",
    l1: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with one of its own for the gates, each step of which ends in a soft threshold:

        g <- T_xi(g + step),   xi = eta_t lambda_t

    What is below the threshold is zero exactly, and `compact` drops it. A gate at zero comes back when its step
    exceeds the threshold. It wraps the whole optimizer: `chain(clip, sora(adamw(...), adapted, ...))`; clipping
    inside would not see the gates, and what changes updates behind it would undo the zeros. `optax.MultiSteps` and
    `optax.apply_if_finite` may stand around it or inside: the gates move with real updates, by the mean gradient of
    their microbatches, and a gradient that is not finite leaves them and their optimizer as they were.

    Args:
      inner: the optimizer of all but the gates.
      adapted: the `Adapted` that is trained; read for its static plan alone.
      learning_rate: eta of the gates, a number or a schedule of the updates made.
      sparsity: lambda, a number or a schedule such as `geometric`; a traced scalar (also that of
        `optax.inject_hyperparams`), so nothing recompiles.
      gates: the optimizer of the gates; AdamW with eps 1e-6 and without decay by default, as the authors have it.
        Its rate is its own: eta then stands in the threshold alone.
      scale_by_lr: False for xi = lambda_t, as in the authors' code.
      prox: as for `soft_threshold`.
      l1: adds l1 mean |g| over all gates to the loss: its gradient, l1 sign(g) / n. The authors' code has it besides
        the threshold. It is added behind any clipping.

    Returns:
      A transformation whose update needs `params`; its state is a `SoRAState`.

    Raises:
      TypeError: `inner` or `gates` is no optax transformation, or `adapted` no `Adapted`.
      ValueError: no weight with gates; a rate that is negative or no number; no `params`, or another adapter's.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SoRA(rank=3))
      >>> tx = jlora.rank.sora(optax.adamw(1e-2), adapted, learning_rate=1e-2, sparsity=0.5)
      >>> grads = jax.tree.map(jnp.zeros_like, adapted.trainable)
      >>> updates, state = tx.update(grads, tx.init(adapted.trainable), adapted.trainable)
      >>> {name: round(float(abs(u).max()), 4) for name, u in updates["query/kernel"].items()}
      {'a': 0.0, 'b': 0.0, 'g': 0.005}

    References:
      Ding et al, `SoRA <https://arxiv.org/abs/2311.11696>`_, 2023.
    """
    plan = plan_with("sora", adapted, lambda pair: pair.diagonal, WHAT)
    gated = [pair for pair in pairs(plan) if pair.diagonal]
    places = frozenset(pair.gates[0].place for pair in gated)
    size = sum(pair.rank * pair.layers for pair in gated)
    rate("sora", "sparsity", sparsity, "lambda is at least 0, or a schedule")
    rate("sora", "learning_rate", learning_rate, "eta is at least 0, or a schedule")
    rate("sora", "l1", l1, "a weight of at least 0")
    if prox not in ("exact", "reference"):
        raise ValueError(f"sora(prox={prox!r}): write 'exact' or 'reference'")
    halves = Halves(plan)
    default = optax.adamw(learning_rate, eps=1e-6, weight_decay=0.0)
    own = default if gates is None else transformation_of("sora(gates=...)", gates)
    is_gate = lambda tree: _mask(halves, tree, places, True)
    is_other = lambda tree: _mask(halves, tree, places, False)
    others = optax.masked(transformation_of("sora", inner), is_other)
    theirs = optax.masked(own, is_gate)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> tuple[PyTree, SoRAState]:
        if params is None:
            raise ValueError("sora needs the parameters: write tx.update(grads, state, params)")
        old = halves.read(params, "sora")
        if l1:
            given = halves.read(updates, "sora")
            updates = halves.write(updates, {p: given[p] + (l1 / size * jnp.sign(old[p])) for p in places})
        good = finite(updates)
        updates, one = others.update(updates, state.inner[0], params, **extra)
        held = state.gathered
        if held != ():  # the inner optimizer gathers and that of the gates does not: it gets the gathered gradient
            raw = halves.read(updates, "sora")
            held, mean = gathered_mean(held, {p: raw[p] for p in places}, good, state.inner[0], one)
            updates = halves.write(updates, mean)
        updates, two = theirs.update(updates, state.inner[1], params, **extra)
        decides = (state.inner[0], one) if held != () else (state.inner[1], two)
        real = good & stepped(*decides)
        two = where_real(good if held == () else real, two, state.inner[1])
        change = halves.read(updates, "sora")
        xi = _at(sparsity, state.count) * (_at(learning_rate, state.count) if scale_by_lr else 1.0)
        ends = {}
        for p in places:
            g = soft_threshold((old[p] + change[p]).astype(old[p].dtype), xi, prox)
            ends[p] = jnp.where(real, g - old[p], 0)  # for g = 0 this is -old, and old + (0 - old) is exactly zero
        count = jnp.where(real, jnp.asarray(optax.safe_increment(state.count)), state.count)
        return halves.write(updates, ends), SoRAState(count, (one, two), held)

    def init(params: PyTree) -> SoRAState:
        held = others.init(params), theirs.init(params)
        check_masked("sora", held)
        start = started("sora", halves, params, plan)
        some = {p: start[p] for p in places}
        return SoRAState(jnp.zeros((), jnp.int32), held, () if gathering(held[1]) else none_gathered(held[0], some))

    return optax.GradientTransformationExtraArgs(init, update)


def _mask(halves: Halves, tree: PyTree, places: frozenset[tuple[str, str]], gates: bool) -> PyTree:
    """True on the gates, or on all else."""
    found = halves.read(tree, "sora")
    missing = sorted(places - found.keys())
    if missing:
        raise ValueError(f"sora sees no {missing[:3]}: it wraps the whole optimizer, and masks go inside")
    return halves.write(jax.tree.map(lambda _: not gates, tree), {p: (p in places) == gates for p in found})


def _at(value: Schedule, count: ArrayLike) -> ArrayLike:
    return value(count) if callable(value) else value


# --- schedules of lambda ------------------------------------------------------------------------------------------


def linear(start: float, end: float, stages: int, every: int = 1) -> Callable[[ArrayLike], jax.Array]:
    """lambda_k = start + (end - start) k / (stages - 1), with k = count // every, from `start` to `end` and then on.

    Example:
      >>> import jlora
      >>> [float(jlora.rank.linear(0.0, 1.0, 3, every=10)(n)) for n in (0, 9, 10, 20, 99)]
      [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    _check("linear", start, end, stages, every)
    return lambda count: start + (end - start) * _progress(count, stages, every)


def log_linear(start: float, end: float, stages: int, every: int = 1) -> Callable[[ArrayLike], jax.Array]:
    """lambda_k = log(e^start + (e^end - e^start) k / (stages - 1)): the exponentials are equally far apart.

    Example:
      >>> import jlora
      >>> [round(float(jlora.rank.log_linear(0.0, 1.0, 3)(n)), 4) for n in (0, 1, 2)]
      [0.0, 0.6201, 1.0]
    """
    _check("log_linear", start, end, stages, every)
    # log1p(x), not log(1 + x): the paper's x is 3e-4, of which 1 + x would lose digits in float32
    return lambda count: start + jnp.log1p(math.expm1(end - start) * _progress(count, stages, every))


def geometric(start: float, end: float, stages: int, every: int = 1) -> Callable[[ArrayLike], jax.Array]:
    """lambda_k = start (end / start)^(k / (stages - 1)), start and end positive.

    Example:
      >>> import jlora
      >>> [round(float(jlora.rank.geometric(1e-4, 1e-2, 3)(n)), 6) for n in (0, 1, 2)]
      [0.0001, 0.001, 0.01]
    """
    _check("geometric", start, end, stages, every)
    if not (start > 0 and end > 0):
        raise ValueError(f"geometric({start}, {end}): both ends are positive; linear and log_linear begin at 0")
    return lambda count: start * jnp.exp(math.log(end / start) * _progress(count, stages, every))


def _check(name: str, start: float, end: float, stages: int, every: int) -> None:
    if start < 0 or end < 0 or stages < 2 or every < 1:
        raise ValueError(
            f"{name}({start}, {end}, stages={stages}, every={every}): lambda is at least 0, there are at least two "
            "stages, of at least one step each"
        )


def _progress(count: ArrayLike, stages: int, every: int) -> jax.Array:
    return jnp.minimum(jnp.asarray(count) // every, stages - 1) / (stages - 1)
