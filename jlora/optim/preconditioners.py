"""Gradients measured by the change of the weight and not of its factors."""

import math

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike

from jlora._algebra._small_inverse import inverse
from jlora._dtypes import promoted, widened
from jlora._plan._pairs import Member, Pair
from jlora._types import Place
from jlora.adapted import Adapted
from jlora.optim._checks import number
from jlora.optim._halves import Places, plan_with, transformation


def riemannian(adapted: Adapted, eps: float = 1e-6) -> optax.GradientTransformationExtraArgs:
    """grad a <- (b b^T + eps I)^-1 grad a,  grad b <- (a a^T + eps I)^-1 grad b.

    With a (stack..., r, in...) and b (stack..., r, out...); each layer of a stack has matrices of its own. The
    change of dW is then that of projected gradient descent, whatever factors dW is written in: (m a, m^-T b) takes
    the same step as (a, b). Stands before the optimizer: `optax.chain(riemannian(adapted), optax.adamw(1e-3))`.

    a and b are the two trained factors that a rank letter joins; gates between them (SoRA, Tied-LoRA, AdaLoRA) and s
    are no part of the formula. A factor that several weights or layers share meets the sum of their matrices,
    so that a scanned model takes the steps of an unrolled one. Gradients of all else pass through; where only one of
    the two is trained see `lora_fa`.

    Args:
      adapted: the `Adapted` that is trained; read for its static plan alone.
      eps: positive, absolute as in the authors' code. It bounds what a small factor can do: the result is at most
        s / (2 sqrt(eps)) times the gradient of dW. One relative to b b^T would leave no bound at the start, where b
        is zero (and so is the gradient of a). A rounding error relative to the matrix is added, so that factors of
        lower rank than r give finite steps.

    Returns:
      A stateless transformation whose update needs `params`. It computes in float32 or better, and returns the dtype
      of the gradient.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: an eps that is not positive; an adapter without such a pair; no `params`; a partner that is masked
        out; updates of another adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> tx = optax.chain(jlora.optim.riemannian(adapted), optax.sgd(1e-2))
      >>> state = tx.init(adapted.trainable)
      >>> grads = jax.tree.map(jnp.zeros_like, adapted.trainable)
      >>> updates, state = tx.update(grads, state, adapted.trainable)

    References:
      Zhang and Pilanci, `Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models
      <https://arxiv.org/abs/2402.02347>`_, 2024.
    """
    both = lambda pair: pair.trained == 2
    plan = plan_with("riemannian", adapted, both, "two trained factors that share a rank (for LoRA-FA write lora_fa)")
    _check_eps("riemannian", eps)

    def rule(pairs: tuple[Pair, ...], updates: Places, params: Places, frozen: Places) -> Places:
        if not params:
            raise ValueError("riemannian needs the parameters: write tx.update(grads, state, params)")
        stacks: dict[tuple[str, str], int] = {}
        metrics: Places = {}
        for pair in pairs:
            for own, other in (pair.members, pair.members[::-1]):
                if own.place in updates:
                    metric = _metric(pair, own, other, _partner(params, own, other))
                    metrics[own.place] = metrics[own.place] + metric if own.place in metrics else metric
                    stacks[own.place] = own.stack
        return {place: _solve(metric, updates[place], stacks[place], eps) for place, metric in metrics.items()}

    return transformation(plan, both, rule)


def lora_fa(adapted: Adapted, eps: float = 1e-8) -> optax.GradientTransformationExtraArgs:
    """LoRA-FA's projected gradient: grad b <- (a a^T + eps I)^-1 grad b / s^2, a frozen.

    With a (stack..., r, in...), b (stack..., r, out...) and s (stack...). A step along it changes dW = s a b by the
    gradient of dW projected on the rows of a, the nearest that b alone can reach. Stands before the optimizer.
    Where s is zero the gradient is, and stays, zero. It acts on weights whose update is s a b with one of the two
    frozen, whichever it is; gradients of all else pass through.

    a and s are data, handed in anew at each step, so that no compiled program holds them:

    - split form: `tx.update(grads, state, trainable, frozen=frozen)`, through `optax.chain` too;
    - whole form: they are in `params`, both in `jlora.masked(optax.chain(lora_fa(adapted), tx))` and in
      `optax.chain(lora_fa(adapted), jlora.masked(tx))`; the second takes an `Adapted` inside a larger tree, too.

    Wrappers that hand no extra argument on stand behind it. `optax.chain(lora_fa(adapted), optax.MultiSteps(tx, k))`
    projects each gradient before the mean is taken, which is the same. Flax's `TrainState.apply_gradients` hands none
    on either; it works in the whole form.

    Args:
      adapted: the `Adapted` that is trained; read for its static plan alone.
      eps: positive, absolute, as peft has it; a rounding error relative to a a^T is added.

    Returns:
      A stateless transformation. It computes in float32 or better, and returns the dtype of the gradient.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: an eps that is not positive; an adapter without such a weight; no frozen factors at hand; updates of
        another adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRAFA(rank=2))
      >>> tx = optax.chain(jlora.optim.lora_fa(adapted), optax.adamw(1e-3))
      >>> trainable, frozen = jlora.split(adapted)
      >>> grads = jax.tree.map(jnp.ones_like, trainable)
      >>> updates, state = tx.update(grads, tx.init(trainable), trainable, frozen=frozen)

    References:
      Zhang et al, `LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning
      <https://arxiv.org/abs/2308.03303>`_, 2023.
    """
    # with a gate or another factor between a and b, dW is not s a b, and this is not its projection
    alone = lambda pair: pair.trained == 1 and not pair.gates and pair.others == 0
    plan = plan_with("lora_fa", adapted, alone, "the update s a b with one of the two frozen; write jlora.LoRAFA(...)")
    _check_eps("lora_fa", eps)

    def rule(pairs: tuple[Pair, ...], updates: Places, params: Places, frozen: Places) -> Places:
        new = {}
        for pair in pairs:
            own, other = pair.members if pair.input.array.trained else pair.members[::-1]
            if own.place in updates:
                gram = _gram(_frozen(frozen, other.place), other.stack)
                solved = _solve(gram, updates[own.place], own.stack, eps)
                new[own.place] = _over_square(solved, _frozen(frozen, pair.scale))
        return new

    return transformation(plan, alone, rule)


def _check_eps(caller: str, eps: object) -> None:
    wanted = "eps is positive, or a factor of zeros has no inverse"
    number(caller, "eps", eps, wanted, lambda x: 0 < x < float("inf"))


def _partner(params: Places, own: Member, other: Member) -> jax.Array:
    if other.place not in params:
        raise ValueError(
            f"riemannian sees {own.place[1]!r} of {own.place[0]!r} without {other.place[1]!r}, which is masked out: "
            "let it stand before optax.masked or optax.partition"
        )
    return params[other.place]


def _frozen(frozen: Places, place: Place) -> jax.Array:
    if place not in frozen:
        raise ValueError(
            f"lora_fa needs the frozen factors, and has no {place[1]!r} of {place[0]!r}: write tx.update(grads, state, "
            "trainable, frozen=frozen), or in the whole form optax.chain(lora_fa(adapted), jlora.masked(tx)) and "
            "tx.update(grads, state, params)"
        )
    return frozen[place]


def _gram(x: jax.Array, stack: int) -> jax.Array:
    """x x^T of (stack..., r, n...), in float32 or better: (stack..., r, r)."""
    flat = widened(x.reshape(*x.shape[: stack + 1], -1))
    return jnp.einsum("...rn,...sn->...rs", flat, flat, precision=lax.Precision.HIGHEST)


def _metric(pair: Pair, own: Member, other: Member, value: jax.Array) -> jax.Array:
    """What `own` meets in one weight: its partner's matrix, summed over the layers that share `own`."""
    gram = _gram(value, other.stack)
    if own.stack:
        return gram
    return gram.sum(tuple(range(other.stack))) if other.stack else gram * pair.layers


def _solve(metric: jax.Array, g: jax.Array, stack: int, eps: ArrayLike) -> jax.Array:
    """(metric + eps I)^-1 g over the rank axis."""
    rank, dtype = metric.shape[-1], metric.dtype
    rounding = 4 * rank * jnp.finfo(dtype).eps * jnp.max(jnp.diagonal(metric, axis1=-2, axis2=-1), -1)
    ones = jnp.broadcast_to(jnp.eye(rank, dtype=dtype), metric.shape)
    damped = metric + jnp.asarray(eps + rounding).astype(dtype)[..., None, None] * ones
    flat = g.reshape(*g.shape[: stack + 1], math.prod(g.shape[stack + 1 :])).astype(dtype)
    solved = jnp.matmul(inverse(damped), flat, precision=lax.Precision.HIGHEST)
    return solved.reshape(g.shape).astype(g.dtype)


def _over_square(g: jax.Array, s: jax.Array) -> jax.Array:
    """g / s^2, and zero where s is; in two divisions, since the square of a small s is zero."""
    s = s.reshape(s.shape + (1,) * (g.ndim - s.ndim))
    inverse = jnp.where(s == 0, 0, 1 / jnp.where(s == 0, 1, s))
    return (g.astype(promoted(g.dtype, s.dtype)) * inverse * inverse).astype(g.dtype)
