"""DyLoRA: one adapter that works at every rank up to r, trained on its first b ranks with b drawn anew each step.

Valipour et al, `DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free Low-Rank Adaptation
<https://arxiv.org/abs/2210.07558>`_, 2022.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jlora import _read
from jlora._plan._pairs import Member, Pair
from jlora._types import PyTree
from jlora.adapted import Adapted
from jlora.optim._checks import transformation_of, whole_number
from jlora.optim._halves import Halves, Places, check_masked
from jlora.rank.prune import ranked

Mode: TypeAlias = Literal["normal", "frozen"]


def at_rank(adapted: Adapted, b: jax.Array | int, mode: Mode = "normal") -> Adapted:
    """The adapter at rank b: dW = (alpha / b) a[:b] b[:b], for training, evaluation and merging alike.

    `b` may be traced and no shape changes, so one compiled program serves all ranks; `compact` drops the zeros. The
    scale becomes s r / b: alpha / b where s is alpha / r. A weight of a smaller rank than b stays whole. Of a pair
    (PiSSA) the ranks from b on are as they began, dW = (alpha / b) (a[:b] b[:b] - a0[:b] b0[:b]).

    Args:
      adapted: any adapter with ranks of its own weights.
      b: from 1 to the largest rank.
      mode: what gradients see: `"normal"`, all of the first b ranks; `"frozen"`, rank b alone, the ones before it
        are constants.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: an adapter without ranks; a b that is known and out of range; an unknown mode.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=4, alpha=8))
      >>> small = jlora.rank.at_rank(adapted, 1)
      >>> float(small.frozen.factors["query/kernel"]["s"]), small.trainable["query/kernel"]["a"][:, 0] != 0
      (8.0, Array([ True, False, False, False], dtype=bool))

    References:
      Valipour et al, `DyLoRA <https://arxiv.org/abs/2210.07558>`_, 2022.
    """
    _check_mode("at_rank", mode)
    pairs = ranked("at_rank", adapted)
    most = max(pair.rank for pair in pairs)
    whole_number("at_rank", "b", b, 1, most, f"this adapter has ranks from 1 to {most}")
    trainable = {group: dict(named) for group, named in adapted.trainable.items()}
    factors = {group: dict(named) for group, named in adapted.frozen.factors.items()}
    scales: dict[tuple[str, str], int] = {}
    get = _read.factors_of(adapted)
    for pair in pairs:
        keep, moves = _rows(pair, b, mode)
        scales[pair.scale] = pair.rank
        for m in pair.own:
            x = trainable[m.place[0]][m.place[1]]
            still = lax.stop_gradient(x)
            x = jnp.where(_along(moves, m, x.ndim), x, still)
            trainable[m.place[0]][m.place[1]] = jnp.where(_along(keep, m, x.ndim), x, m.rest(get).astype(x.dtype))
    for (group, name), rank in scales.items():
        s = factors[group][name]
        factors[group][name] = s * (rank / jnp.clip(b, 1, rank)).astype(
            s.dtype
        )  # where a traced b is 0: the base, not NaN
    return Adapted(trainable, dataclasses.replace(adapted.frozen, factors=factors))


def sample_rank(
    key: jax.Array, low: int, high: int, law: Literal["uniform", "geometric"] = "uniform", p: float = 0.5
) -> jax.Array:
    """A rank b in low..high, both included: uniform, or P(b) proportional to (1 - p)^b.

    Args:
      key: a PRNG key, another at each step.
      low: r_min, at least 1.
      high: r_max.
      law: the distribution.
      p: of the geometric one, in (0, 1): the larger, the more often small ranks are drawn.

    Example:
      >>> import jax, jlora
      >>> keys = jax.random.split(jax.random.key(0), 100)
      >>> sorted(set(jax.vmap(lambda key: jlora.rank.sample_rank(key, 2, 4))(keys).tolist()))
      [2, 3, 4]
    """
    if not 1 <= low <= high:
        raise ValueError(f"sample_rank(low={low}, high={high}): ranks are drawn from 1 <= low <= high")
    if law not in ("uniform", "geometric") or not 0 < p < 1:
        raise ValueError(f"sample_rank(law={law!r}, p={p}): write 'uniform' or 'geometric', and p in (0, 1)")
    if law == "uniform":
        return jax.random.randint(key, (), low, high + 1)
    weights = jnp.log1p(-p) * jnp.arange(high - low + 1)
    return low + jax.random.categorical(key, weights).astype(jnp.int32)


class DyLoRAState(NamedTuple):
    """What `dylora` carries: the wrapped optimizer's state."""

    inner: PyTree


def dylora(
    inner: optax.GradientTransformation, adapted: Adapted, mode: Mode = "normal"
) -> optax.GradientTransformationExtraArgs:
    """An optimizer that moves only what a step at rank b trains: ranks 1..b (`"frozen"`: rank b alone).

    The gradients of the others are zero, but momentum and weight decay would move them all the same. The moments of a
    rank that rests see a gradient of zero. b comes in with each step: `tx.update(grads, state, params, b=b)`; the
    `apply_gradients` of a Flax TrainState hands no such argument on. Under `optax.MultiSteps`, around it or inside, all
    microbatches of an update have the same b: the last one says what moves.

    Raises:
      TypeError: `inner` is no optax transformation, or `adapted` no `Adapted`.
      ValueError: an adapter without ranks; an update without b, or with a known one out of range; another adapter's.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=4))
      >>> tx = jlora.rank.dylora(optax.adamw(1e-2, weight_decay=0.1), adapted)
      >>> grads = jax.tree.map(jnp.ones_like, adapted.trainable)
      >>> updates, _ = tx.update(grads, tx.init(adapted.trainable), adapted.trainable, b=2)
      >>> updates["query/kernel"]["b"][:, 0] != 0
      Array([ True,  True, False, False], dtype=bool)

    References:
      Valipour et al, `DyLoRA <https://arxiv.org/abs/2210.07558>`_, 2022.
    """
    _check_mode("dylora", mode)
    pairs = tuple(ranked("dylora", adapted))
    halves = Halves(adapted.frozen.plan)
    inner = transformation_of("dylora", inner)
    most = max(pair.rank for pair in pairs)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, *, b: PyTree = None, **extra: PyTree) -> PyTree:
        if b is None:
            raise ValueError("dylora needs the rank of the step: write tx.update(grads, state, params, b=b)")
        whole_number("dylora", "b", b, 1, most, f"this adapter has ranks from 1 to {most}")
        updates, inner_state = inner.update(updates, state.inner, params, **extra)
        return halves.write(updates, _masked(pairs, b, mode, halves.read(updates, "dylora"))), DyLoRAState(inner_state)

    def init(params: PyTree) -> DyLoRAState:
        state = inner.init(params)
        check_masked("dylora", state)
        return DyLoRAState(state)

    return optax.GradientTransformationExtraArgs(init, update)


class Search(NamedTuple):
    """`rank`, the smallest within the tolerance; `curve`, `{rank: value}` of all, the largest first."""

    rank: int
    curve: dict[int, float]


def search(adapted: Adapted, evaluate: Callable[[Adapted], float | jax.Array], tolerance: float = 0.0) -> Search:
    """Walks down the ranks without training: what each is worth, and the smallest that is good enough.

    Args:
      adapted: an adapter trained at every rank.
      evaluate: the adapter at a rank to a number, larger is better. Jitted, it is compiled once.
      tolerance: how far below the value at the largest rank is good enough. The walk goes on past a rank that is not,
        to the end of the curve, but `rank` is the last before the first such one.

    Raises:
      TypeError: `adapted` is no `Adapted`; what `evaluate` returns is no number.
      ValueError: an adapter without ranks; a value of nan.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.zeros((6, 4))}}, jlora.LoRA(rank=3, alpha=1))
      >>> adapted.trainable["query/kernel"] |= {"a": jnp.eye(3, 6), "b": jnp.array([[9.0] * 4, [1.0] * 4, [0.0] * 4])}
      >>> jlora.rank.search(adapted, lambda small: jnp.max(jlora.merge(small)["query"]["kernel"]))
      Search(rank=1, curve={3: 3.0, 2: 4.5, 1: 9.0})
    """
    most = max(pair.rank for pair in ranked("search", adapted))
    curve = {}
    for b in range(most, 0, -1):
        value = evaluate(at_rank(adapted, jnp.asarray(b, jnp.int32)))
        if jnp.ndim(value) if hasattr(value, "shape") else not isinstance(value, (int, float)):
            raise TypeError(f"search: evaluate(adapted) returned {value!r:.100} at rank {b}; it returns one number")
        curve[b] = float(value)
        if math.isnan(curve[b]):
            raise ValueError(f"search: evaluate(adapted) is nan at rank {b}, which no rank can be compared with")
    rank = most
    while rank > 1 and curve[rank - 1] >= curve[most] - tolerance:
        rank -= 1
    return Search(rank, curve)


# --- inside -------------------------------------------------------------------------------------------------------


def _check_mode(caller: str, mode: object) -> None:
    if mode not in ("normal", "frozen"):
        raise ValueError(f"{caller}(mode={mode!r}): write 'normal' or 'frozen'")


def _rows(pair: Pair, b: jax.Array | int, mode: Mode) -> tuple[jax.Array, jax.Array]:
    """(r,) which ranks there are, and which of them a step trains."""
    n = lax.iota(jnp.int32, pair.rank)
    keep = n < b
    return keep, keep if mode == "normal" else n == jnp.minimum(b, pair.rank) - 1


def _along(rows: jax.Array, member: Member, ndim: int) -> jax.Array:
    """(r,) against (stack..., r, side...)."""
    return rows.reshape(*(1,) * member.stack, -1, *(1,) * (ndim - member.stack - 1))


def _masked(pairs: tuple[Pair, ...], b: jax.Array | int, mode: Mode, updates: Places) -> Places:
    made = {}
    for pair in pairs:
        _, moves = _rows(pair, b, mode)
        for m in pair.own:
            if m.place in updates:
                u = made.get(m.place, updates[m.place])
                made[m.place] = jnp.where(_along(moves, m, u.ndim), u, jnp.zeros_like(u))
    return made
