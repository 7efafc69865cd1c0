"""Which ranks stay: the b best of all weights together."""

import functools
from collections.abc import Mapping
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer

from jlora import _read
from jlora._dtypes import widened
from jlora._plan import _pairs
from jlora._plan._pairs import Get, Member, Pair
from jlora._plan._sites import Plan
from jlora._types import PyTree
from jlora.adapted import Adapted, check_adapted
from jlora.optim._checks import whole_number
from jlora.optim._halves import Places

Ties: TypeAlias = Literal["exact", "reference"]


def prune(adapted: Adapted, scores: PyTree, b: jax.Array | int, *, ties: Ties = "exact") -> Adapted:
    """Keeps the b ranks with the largest scores, over all weights and layers together, and zeroes the others.

    No shape changes, and `b` may be traced: the program is compiled once. `compact` then makes the adapter small.
    A rank is pruned by zeroing its gate (AdaLoRA's lam, SoRA's g) or, where there is none, its row of the trained
    factors; in a pair (PiSSA), which subtracts its start, by putting that row back to where it began.

    Args:
      adapted: any adapter with ranks of its own weights; others stay as they are.
      scores: `{group: {factor: (stack..., r)}}` in the form of `magnitude(adapted)`, one number a rank; NaN is the
        smallest.
      b: how many ranks are kept in all, counted over layers of a stack.
      ties: `"exact"` keeps b whatever the scores, equal ones in the order of the plan; `"reference"` prunes all that
        are at most the k-th smallest, as AdaLoRA's authors do: with equal scores fewer than b may stay.

    Returns:
      The adapter, its frozen half the same object.

    Raises:
      TypeError: `adapted` is no `Adapted`; scores of another form.
      ValueError: an adapter without ranks; scores of other names or shapes, or too many NaN; a b that is no number of
        ranks; an unknown `ties`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SoRA(rank=3))
      >>> scores = {"query/kernel": {"g": jnp.array([1.0, 3.0, 2.0])}}
      >>> jlora.rank.prune(adapted, scores, 2).trainable["query/kernel"]["g"] == 0
      Array([ True, False, False], dtype=bool)
    """
    pruned = ranked("prune", adapted)
    check_ties("prune", ties)
    if not isinstance(scores, Mapping) or not all(isinstance(named, Mapping) for named in scores.values()):
        raise TypeError(f"prune takes scores in the form of jlora.rank.magnitude(adapted), not {type(scores).__name__}")
    whole_number("prune", "b", b, 0, float("inf"), "how many ranks are kept in all, a whole number of at least 0")
    get = lambda place: adapted.trainable[place[0]][place[1]]
    wanted = {m.place: get(m.place).shape[: m.stack + 1] for m in (pair.marks[0] for pair in pruned)}
    given = {(group, name): x for group, named in scores.items() for name, x in named.items()}
    bad = [f"missing {place}" for place in wanted if place not in given]
    bad += [f"extra {place}" for place in given if place not in wanted]
    bad += [
        f"{place} has shape {jnp.shape(given[place])}, not {shape}"
        for place, shape in wanted.items()
        if place in given and jnp.shape(given[place]) != shape
    ]
    if not bad and not any(isinstance(x, Tracer) for x in (b, *given.values())):
        numbers = sum(int(np.sum(~np.isnan(x))) for x in given.values())
        total = sum(np.size(x) for x in given.values())
        if numbers < min(int(b), total):
            raise ValueError(f"prune: {total - numbers} of {total} scores are NaN, so b={b} ranks cannot be told")
    if bad:
        raise ValueError("prune: scores have the form of jlora.rank.magnitude(adapted), but\n  " + "\n  ".join(bad[:8]))
    rests = {m.place: m.rest(_read.factors_of(adapted)) for pair in pruned for m in pair.marks if m.start is not None}
    return Adapted(_prune(adapted.trainable, given, b, rests, adapted.frozen.plan, ties), adapted.frozen)


def magnitude(adapted: Adapted) -> dict[str, dict[str, jax.Array]]:
    """The size of each rank's own part of the update, s ||a_i|| |g_i| ||b_i||: the Frobenius norm of that part.

    Where the equation has more operands (LoHa's second product), of the product of these alone.

    Returns:
      `{group: {factor: (stack..., r)}}`, the scores that `prune` takes; the factor is the one that pruning zeroes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> jlora.rank.magnitude(adapted)
      {'query/kernel': {'b': Array([0., 0.], dtype=float32)}}
    """
    get = _read.factors_of(adapted)
    found: dict[str, dict[str, jax.Array]] = {}
    for pair in ranked("magnitude", adapted):
        norms = [_norms(get(*m.place), m) for m in pair.gates]
        norms += [_change(pair, get)] if pair.begun else [_norms(get(*m.place), m) for m in pair.members]
        s = jnp.abs(get(*pair.scale))[..., None]
        group, name = pair.marks[0].place
        found.setdefault(group, {})[name] = functools.reduce(_times, norms, s)
    return found


# --- for the other files of this room -----------------------------------------------------------------------------


def plan_of(caller: str, adapted: Adapted) -> Plan:
    """The plan of what must be an `Adapted`."""
    return check_adapted(caller, adapted).frozen.plan


def ranked(caller: str, adapted: Adapted) -> list[Pair]:
    """The pairs whose ranks can be switched off by a factor of their own weight."""
    plan = plan_of(caller, adapted)
    found = [pair for pair in _pairs.pairs(plan) if pair.own]
    if not found:
        methods = ", ".join(dict.fromkeys(m.describe() for m in plan.methods))
        raise ValueError(f"{caller} finds no ranks under {methods}: adapt with jlora.LoRA, AdaLoRA or SoRA")
    return found


def check_ties(caller: str, ties: object) -> None:
    """Raises unless `ties` is known."""
    if ties not in ("exact", "reference"):
        raise ValueError(f"{caller}(ties={ties!r}): write 'exact' or 'reference'")


def top(scores: Places, b: jax.Array | int, ties: Ties) -> Places:
    """Which of all scores are among the b largest, as booleans of the same shapes."""
    flat = jnp.concatenate([jnp.ravel(x).astype(jnp.float32) for x in scores.values()])
    flat = jnp.where(jnp.isnan(flat), -jnp.inf, flat)
    n = flat.size
    b = jnp.clip(jnp.asarray(b, jnp.int32), 0, n)
    if ties == "exact":
        order = jnp.argsort(flat, descending=True, stable=True)
        keep = jnp.zeros(n, bool).at[order].set(lax.iota(jnp.int32, n) < b)
    else:
        least = jnp.sort(flat)[jnp.maximum(n - b, 1) - 1]  # the k-th smallest, k = n - b counted from one
        keep = (b == n) | (flat > least)
    ends = [0]
    for x in scores.values():
        ends.append(ends[-1] + x.size)
    return {
        place: keep[i:j].reshape(x.shape) for (place, x), i, j in zip(scores.items(), ends[:-1], ends[1:], strict=True)
    }


def as_rows(keep: jax.Array, member: Member, ndim: int) -> jax.Array:
    """(stack..., r) booleans against a factor of `ndim` axes, (stack..., r, side...)."""
    return keep.reshape(*keep.shape, *(1,) * (ndim - member.stack - 1))


# --- inside -------------------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(4, 5))
def _prune(trainable: PyTree, scores: Places, b: jax.Array | int, rests: Places, plan: Plan, ties: Ties) -> PyTree:
    pruned = [pair for pair in _pairs.pairs(plan) if pair.own]
    kept = top({pair.marks[0].place: scores[pair.marks[0].place] for pair in pruned}, b, ties)
    new = {group: dict(named) for group, named in trainable.items()}
    for pair in pruned:
        keep = kept[pair.marks[0].place]
        for member in pair.marks:
            group, name = member.place
            x = new[group][name]
            if keep.ndim == member.stack + 1:  # not a factor that all layers share: another layer may keep the rank
                rest = rests.get(member.place, jnp.zeros_like(x))
                new[group][name] = jnp.where(as_rows(keep, member, x.ndim), x, rest.astype(x.dtype))
    return new


def _norms(x: jax.Array, member: Member) -> jax.Array:
    """(stack..., r): the norm over the axes of the side."""
    x = widened(x)
    return jnp.sqrt(jnp.sum(x * x, tuple(range(member.stack + 1, x.ndim))))


def _change(pair: Pair, get: Get) -> jax.Array:
    """(stack..., r): ||a_i b_i - a0_i b0_i||, computed as ||d b_i + a0_i e|| with d = a_i - a0_i and e = b_i - b0_i.

    A difference of the two products would be lost in rounding while a and b are near their start.
    """
    flat = lambda m, x: widened(x).reshape(*x.shape[: m.stack + 1], -1)
    a, b = (flat(m, get(*m.place)) for m in pair.members)
    a0, b0 = (flat(m, get(*m.start)) if m.start else flat(m, get(*m.place)) for m in pair.members)
    dot = lambda x, y: jnp.sum(x * y, -1)
    d, e = a - a0, b - b0
    square = dot(d, d) * dot(b, b) + dot(a0, a0) * dot(e, e) + 2 * dot(d, a0) * dot(b, e)
    return jnp.sqrt(jnp.maximum(square, 0))


def _times(x: jax.Array, y: jax.Array) -> jax.Array:
    """A product; a factor that a stack shares meets each of its layers."""
    n = max(x.ndim, y.ndim)
    return x.reshape(*(1,) * (n - x.ndim), *x.shape) * y.reshape(*(1,) * (n - y.ndim), *y.shape)
