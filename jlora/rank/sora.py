"""SoRA's sparse gates: a proximal step on g after every step of its optimizer.

Ding et al, `Sparse Low-rank Adaptation of Pre-trained Language Models <https://arxiv.org/abs/2311.11696>`_, 2023.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from jlora._ranks import pairs
from jlora.optim._halves import Halves, chosen

Prox: TypeAlias = Literal["exact", "reference"]
Rate: TypeAlias = "float | Callable[[Any], Any]"

WHAT = "an update a diag(g) b, all trained; adapt with jlora.SoRA(...)"


@functools.partial(jax.jit, static_argnames="prox")
def soft_threshold(x: jax.Array, threshold: Any, prox: Prox = "exact") -> jax.Array:
    """T_xi(x) = sign(x) max(|x| - xi, 0), the proximal step of xi |x|.

    Args:
      x: an array.
      threshold: xi, at least 0; may be traced.
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
    xi = jnp.asarray(threshold, x.dtype)
    zero = jnp.zeros_like(x)
    small = jnp.where(x > xi, x - xi, jnp.where(x < -xi, x + xi, x))
    # 0.0 and not -0.0 for whatever is pruned
    return jnp.where(jnp.abs(x) <= xi, zero, small) if prox == "exact" else jnp.where(jnp.abs(small) < xi, zero, small)


class SoRAState(NamedTuple):
    """What `sora` carries.

    Attributes:
      count: updates made.
      inner: the wrapped optimizers', of all but the gates and of the gates.
    """

    count: jax.Array
    inner: Any


def sora(
    inner: optax.GradientTransformation,
    adapted: Any,
    *,
    learning_rate: Rate,
    sparsity: Rate,
    gates: optax.GradientTransformation | None = None,
    scale_by_lr: bool = True,
    prox: Prox = "exact",
    l1: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    """An optimizer with one of its own for the gates, each step of which ends in a soft threshold:

        g <- T_xi(g + step),   xi = eta_t lambda_t

    What is below the threshold is zero exactly, and `compact` drops it. A gate at zero comes back when its step
    exceeds the threshold. It wraps the whole optimizer: `chain(clip, sora(adamw(...), adapted, ...))`; clipping
    inside would not see the gates, and what changes updates behind it would undo the zeros.

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
      TypeError: `adapted` is no `Adapted`.
      ValueError: no weight with gates; a negative sparsity; no `params`, or another adapter's.

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
    plan = chosen("sora", adapted, lambda pair: pair.diagonal, WHAT)
    gated = [pair for pair in pairs(plan) if pair.diagonal]
    places = frozenset(pair.gates[0].place for pair in gated)
    size = sum(pair.rank * pair.layers for pair in gated)
    if isinstance(sparsity, (int, float)) and not sparsity >= 0:
        raise ValueError(f"sora(sparsity={sparsity}): lambda is at least 0, or a schedule")
    if prox not in ("exact", "reference"):
        raise ValueError(f"sora(prox={prox!r}): write 'exact' or 'reference'")
    halves = Halves(plan)
    own = gates if gates is not None else optax.adamw(learning_rate, eps=1e-6, weight_decay=0.0)
    is_gate = lambda tree: _mask(halves, tree, places, True)
    is_other = lambda tree: _mask(halves, tree, places, False)
    both = optax.chain(optax.masked(inner, is_other), optax.masked(own, is_gate))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, SoRAState]:
        if params is None:
            raise ValueError("sora needs the parameters: write tx.update(grads, state, params)")
        old = halves.read(params, "sora")
        if l1:
            given = halves.read(updates, "sora")
            updates = halves.write(updates, {p: given[p] + (l1 / size * jnp.sign(old[p])) for p in places})
        updates, inner_state = both.update(updates, state.inner, params, **extra)
        change = halves.read(updates, "sora")
        xi = _at(sparsity, state.count) * (_at(learning_rate, state.count) if scale_by_lr else 1.0)
        ends = {}
        for p in places:
            g = soft_threshold((old[p] + change[p]).astype(old[p].dtype), xi, prox)
            ends[p] = g - old[p]  # old + (0 - old) is zero exactly
        return halves.write(updates, ends), SoRAState(jnp.asarray(optax.safe_increment(state.count)), inner_state)

    init = lambda params: SoRAState(jnp.zeros((), jnp.int32), both.init(params))
    return optax.GradientTransformationExtraArgs(init, update)


def _mask(halves: Halves, tree: Any, places: frozenset[tuple[str, str]], gates: bool) -> Any:
    """True on the gates, or on all else."""
    found = halves.read(tree, "sora")
    missing = sorted(places - found.keys())
    if missing:
        raise ValueError(f"sora sees no {missing[:3]}: it wraps the whole optimizer, and masks go inside")
    return halves.write(jax.tree.map(lambda _: not gates, tree), {p: (p in places) == gates for p in found})


def _at(value: Any, count: Any) -> Any:
    return value(count) if callable(value) else value


# --- schedules of lambda ------------------------------------------------------------------------------------------


def linear(start: float, end: float, stages: int, every: int = 1) -> Callable[[Any], jax.Array]:
    """lambda_k = start + (end - start) k / (stages - 1), with k = count // every, from `start` to `end` and then on.

    Example:
      >>> import jlora
      >>> [float(jlora.rank.linear(0.0, 1.0, 3, every=10)(n)) for n in (0, 9, 10, 20, 99)]
      [0.0, 0.0, 0.5, 1.0, 1.0]
    """
    _check("linear", start, end, stages, every)
    return lambda count: start + (end - start) * _progress(count, stages, every)


def log_linear(start: float, end: float, stages: int, every: int = 1) -> Callable[[Any], jax.Array]:
    """lambda_k = log(e^start + (e^end - e^start) k / (stages - 1)): the exponentials are equally far apart.

    Example:
      >>> import jlora
      >>> [round(float(jlora.rank.log_linear(0.0, 1.0, 3)(n)), 4) for n in (0, 1, 2)]
      [0.0, 0.6201, 1.0]
    """
    _check("log_linear", start, end, stages, every)
    # log1p, or the 3e-4 of the paper would drown in float32's one
    return lambda count: start + jnp.log1p(math.expm1(end - start) * _progress(count, stages, every))


def geometric(start: float, end: float, stages: int, every: int = 1) -> Callable[[Any], jax.Array]:
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


def _progress(count: Any, stages: int, every: int) -> jax.Array:
    return jnp.minimum(jnp.asarray(count) // every, stages - 1) / (stages - 1)
