"""An adapter cut to its best approximation of lower rank."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import _read
from jlora._dtypes import widened
from jlora._plan import _pairs
from jlora._plan._pairs import Get, Pair
from jlora._plan._sites import Site
from jlora.adapted import Adapted
from jlora.optim._checks import number, whole_number
from jlora.rank.compact import adapter_of, concrete, of_rank, planned, simple, with_rank
from jlora.rank.prune import plan_of


class Resized(NamedTuple):
    """`adapted`, and for each weight the relative `error`, ||dW - dW_k||_F / ||dW||_F, over all layers of a stack."""

    adapted: Adapted
    error: dict[str, float]


def resize(adapted: Adapted, *, rank: int | None = None, energy: float | None = None) -> Resized:
    """Every update cut to its best approximation of rank k, the first k singular triplets (Eckart and Young).

        a^T = Q1 R1,  b^T = Q2 R2,  R1 R2^T = U S V^T,  dW = s (Q1 U) S (Q2 V)^T

    So only matrices of r columns are decomposed, never dW itself. The singular values go to the gate where there is
    one (p and q are then orthonormal), and half each to a and b where there is none. s and the method stay; but a pair
    (PiSSA), whose update is of rank 2r, becomes a plain LoRA.

    For use outside of `jit`. Weights whose update is not a low-rank product of factors of their own stay as they
    are; under a DoRA the approximation is of the inner update.

    Args:
      adapted: an adapter with values.
      rank: k of every weight, or its own where that is smaller; or
      energy: in (0, 1]: the smallest k that keeps this share of ||dW||_F^2, for each weight apart; the largest that
        a layer needs, in a stack.

    Returns:
      `Resized`.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: both or neither of rank and energy; factors without values, or with NaN; an update that is zero.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=3))
      >>> adapted.trainable["query/kernel"] |= {"a": jnp.eye(3, 6), "b": jnp.diag(jnp.array([4.0, 3, 0, 0]))[:3]}
      >>> small, error = jlora.rank.resize(adapted, rank=1)
      >>> small, round(error["query/kernel"], 3)
      (Adapted(1 weight, 10 trainable), 0.6)

    References:
      Eckart and Young, `The approximation of one matrix by another of lower rank
      <https://doi.org/10.1007/BF02288367>`_, 1936.
    """
    plan = plan_of("resize", adapted)
    check_wanted("resize", rank, energy)
    concrete("resize", adapted)
    get = _read.factors_of(adapted)
    by_path: dict[str, list[Pair]] = {}
    for pair in _pairs.pairs(plan):
        by_path.setdefault(pair.path, []).append(pair)
    sites: list[Site] = []
    values: dict[tuple[str, str], jax.Array] = {}
    error: dict[str, float] = {}
    for site in plan.sites:
        ours = by_path.get(site.leaf.path, [])
        if len(ours) != 1 or ours[0].others or len(ours[0].gates) > 1 or not simple(site, ours):
            sites.append(site)
            continue
        (pair,) = ours
        u, sizes, v = _svd(pair, get)
        if not bool(jnp.isfinite(sizes).all()):
            raise ValueError(
                f"resize: the factors of {site.leaf.path!r} hold NaN or infinities, so no rank is its best"
            )
        k = min(sizes.shape[-1], rank) if rank is not None else needed(np.asarray(sizes), energy or 1.0)
        new = of_rank(site, ours, k) if not pair.begun else _unpaired(site, k)
        if new is None:
            sites.append(site)
            continue
        sites.append(new)
        total = float(jnp.sum(sizes**2))
        if not total > 0:
            raise ValueError(f"resize: the update of {site.leaf.path!r} is zero; compact drops it, and so should you")
        error[site.leaf.path] = float(jnp.sqrt(jnp.sum(sizes[..., k:] ** 2) / total))
        values |= _factors(pair, get, u[..., :k, :], sizes[..., :k], v[..., :k, :])
    if not error:
        methods = ", ".join(dict.fromkeys(m.describe() for m in plan.methods))
        raise ValueError(f"resize finds no low-rank update under {methods}")
    value = lambda place: values[place] if place in values else get(*place)
    return Resized(adapter_of(adapted, planned(plan, sites), value), error)


def _svd(pair: Pair, get: Get) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U^T (stack..., r', in), S (stack..., r'), V^T (stack..., r', out) of a^T diag(gate) b; r' = min(in, out, r)."""
    flat = lambda m: (lambda x: widened(x.reshape(*x.shape[: m.stack + 1], -1)))(m.operand(get))
    a, b = map(flat, pair.members)
    for gate in pair.gates:
        a = a * get(*gate.place)[..., None]
    turned = lambda x: jnp.swapaxes(x, -1, -2)
    q1, r1 = jnp.linalg.qr(turned(a))
    q2, r2 = jnp.linalg.qr(turned(b))
    highest = lambda x, y: jnp.matmul(x, y, precision=lax.Precision.HIGHEST)
    u, sizes, v = jnp.linalg.svd(highest(r1, turned(r2)), full_matrices=False)
    return turned(highest(q1, u)), sizes, turned(highest(q2, turned(v)))


def _unpaired(site: Site, k: int) -> Site | None:
    """The weight under the same method at rank k, without a start that is subtracted."""
    method = with_rank(site.method.unpaired(), k)
    recipe = None if method is None else method.recipe(site.leaf)
    return None if method is None or recipe is None else dataclasses.replace(site, method=method, recipe=recipe)


def check_wanted(caller: str, rank: int | None, energy: float | None) -> None:
    """Raises unless it is said how small, by a rank or by a share of energy."""
    if (rank is None) == (energy is None):
        raise ValueError(f"{caller}(rank={rank}, energy={energy}): write one of the two")
    words = "a rank is at least 1, an energy in (0, 1]"
    if rank is not None:
        whole_number(caller, "rank", rank, 1, float("inf"), words)
    else:
        number(caller, "energy", energy, words, lambda x: 0 < x <= 1)


def needed(sizes: np.ndarray, energy: float) -> int:
    """The smallest k, from 1 on, that keeps a share of the squares of singular values (stack..., n) in every layer."""
    squares = sizes.reshape(-1, sizes.shape[-1]).astype(np.float64) ** 2
    total = squares.sum(-1, keepdims=True)
    # at energy=1: all singular values above the rounding noise of float32
    short = np.cumsum(squares, -1) < energy * total * (1 - 1e-12)
    return min(int(short.sum(-1).max()) + 1, sizes.shape[-1])


def _factors(pair: Pair, get: Get, u: jax.Array, sizes: jax.Array, v: jax.Array) -> dict[tuple[str, str], jax.Array]:
    root = jnp.ones_like(sizes) if pair.gates else jnp.sqrt(sizes)
    made = {}
    for member, side in zip(pair.members, (u, v), strict=True):
        old = get(*member.place)
        shape = (*side.shape[:-1], *old.shape[member.stack + 1 :])
        made[member.place] = (root[..., None] * side).reshape(shape).astype(old.dtype)
    for gate in pair.gates:
        made[gate.place] = sizes.astype(get(*gate.place).dtype)
    return made
