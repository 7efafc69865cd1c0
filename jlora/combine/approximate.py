"""One adapter that is near what several say: sums at a rank, TIES, DARE.

Every function here works on updates dW, as the papers do. peft's `ties`, `dare_linear`, ... work on a and b apart,
whose product is another matrix; its `ties_svd`, ... are what is here.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _read
from jlora._keys import checked_key
from jlora._plan._sites import Site
from jlora._types import Key
from jlora.adapted import Adapted
from jlora.analysis.decompositions import SVD, factored_svd, svd
from jlora.combine._parts import Part, Values, adapter, dtype_of, full, lora, parts
from jlora.rank.resize import Resized, check_wanted, needed

Changes: TypeAlias = Sequence[jax.Array]  # dW of each adapter, (layers, in x out)
Rule: TypeAlias = Callable[[Changes, Sequence[float]], jax.Array]


def truncated(
    adapters: Sequence[Adapted],
    weights: Sequence[float] | None = None,
    *,
    rank: int | None = None,
    energy: float | None = None,
) -> Resized:
    """The best LoRA of a rank of sum_k w_k dW_k, for any methods that merge, and what it leaves out.

    Low-rank products are decomposed by their factors; other updates (a DoRA's W - W0 is one) are made dense, one
    weight at a time. Vectors, such as biases, are added whole.

    Args:
      adapters: of one base.
      weights: one for each; all 1 by default.
      rank: of every weight, or its own where that is smaller; or
      energy: in (0, 1]: the smallest rank that keeps this share of ||dW||_F^2, for each weight apart.

    Returns:
      `jlora.rank.Resized`: the adapter, and `{path: ||dW - dW_r||_F / ||dW||_F}`.

    Raises:
      TypeError, ValueError: as `weighted` where the bases or weights do not fit; both or neither of rank and energy.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> one = jlora.adapt(params, jlora.KronA(target="query"))
      >>> one.trainable["query/kernel"] |= {"b": jnp.ones((3, 2))}
      >>> small, error = jlora.combine.truncated([one, one], [0.5, 0.5], rank=2)
      >>> small, round(error["query/kernel"], 5)
      (Adapted(1 weight, 20 trainable), 0.0)

    References:
      Eckart and Young, `The approximation of one matrix by another of lower rank
      <https://doi.org/10.1007/BF02288367>`_, 1936.
    """
    check_wanted("combine.truncated", rank, energy)
    return _combined("truncated", adapters, weights, _sum, rank, energy)


def to_lora(adapted: Adapted, *, rank: int | None = None, energy: float | None = None) -> Resized:
    """An adapter of any method that merges as a LoRA, and what it leaves out: `truncated` of one.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.DoRA(jlora.LoRA(rank=2)))
      >>> adapted.trainable["query/kernel"] |= {"m": jnp.full(4, 3.0)}
      >>> jlora.combine.to_lora(adapted, rank=1).adapted
      Adapted(1 weight, 10 trainable)
    """
    if not isinstance(adapted, Adapted):
        raise TypeError(f"combine.to_lora takes one Adapted, not {type(adapted).__name__}")
    return truncated([adapted], rank=rank, energy=energy)


def pruned(
    adapters: Sequence[Adapted],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    rank: int | None = None,
    energy: float | None = None,
) -> Resized:
    """sum_k w_k top(dW_k): of each update the share `density` of its largest entries, layer by layer.

    Args:
      adapters: of one base.
      weights: one for each; all 1 by default.
      density: in (0, 1].
      rank: or
      energy: as of `truncated`; with neither the sum is kept whole, as `Full`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> one = jlora.adapt({"query": {"kernel": jnp.zeros((2, 2))}}, jlora.Full(target="query"))
      >>> one.trainable["query/kernel"] |= {"delta": jnp.array([[4.0, 1.0], [-3.0, 2.0]])}
      >>> whole = jlora.combine.pruned([one], density=0.5).adapted
      >>> jlora.merge(whole)["query"]["kernel"].tolist()
      [[4.0, 0.0], [-3.0, 0.0]]
    """
    _check_density("pruned", density)
    return _combined("pruned", adapters, weights, lambda x, w: _sum([_top(d, density) for d in x], w), rank, energy)


def ties(
    adapters: Sequence[Adapted],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    sign: Literal["total", "frequency"] = "total",
    rank: int | None = None,
    energy: float | None = None,
) -> Resized:
    """TIES: trim each update, elect a sign for each entry, and take the mean of those that agree with it.

        t_k = top(dW_k),   g = sign(sum_k t_k),   dW = mean over {k: sign(t_k) = g} of w_k t_k

    Args:
      adapters: of one base.
      weights: one for each; all 1 by default.
      density: the share of entries that trimming keeps, in (0, 1]; the paper's 0.2.
      sign: what is summed for the election: `"total"`, the entries, or `"frequency"`, their signs.
      rank: or
      energy: as of `truncated`; with neither the result is kept whole, as `Full`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> of = lambda x: jlora.join(
      ...     {"w": {"delta": jnp.array(x)}}, jlora.adapt({"w": jnp.zeros((1, 2))}, jlora.Full(target="w")).frozen
      ... )
      >>> one, two = of([[3.0, 1.0]]), of([[-1.0, 3.0]])
      >>> jlora.merge(jlora.combine.ties([one, two], density=1.0).adapted)["w"].tolist()
      [[3.0, 2.0]]

    References:
      Yadav et al, `TIES-Merging: Resolving Interference When Merging Models <https://arxiv.org/abs/2306.01708>`_, 2023.
    """
    _check_density("ties", density)
    _check_sign("ties", sign)
    rule = lambda x, w: _elected([_top(d, density) for d in x], w, sign)
    return _combined("ties", adapters, weights, rule, rank, energy)


def dare(
    adapters: Sequence[Adapted],
    weights: Sequence[float] | None = None,
    *,
    density: float,
    key: Key,
    sign: Literal["total", "frequency"] | None = None,
    rank: int | None = None,
    energy: float | None = None,
) -> Resized:
    """DARE: entries of each update dropped at random, the others divided by `density`; then the sum, or TIES' mean.

    Args:
      adapters: of one base.
      weights: one for each; all 1 by default.
      density: the probability that an entry stays, in (0, 1].
      key: of the draws; the same key gives the same adapter.
      sign: None for the weighted sum, or how TIES elects a sign.
      rank: or
      energy: as of `truncated`; with neither the result is kept whole, as `Full`.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> one = jlora.adapt({"query": {"kernel": jnp.zeros((2, 2))}}, jlora.Full(target="query"))
      >>> one.trainable["query/kernel"] |= {"delta": jnp.ones((2, 2))}
      >>> half = jlora.combine.dare([one], density=0.5, key=jax.random.key(0)).adapted
      >>> sorted(set(jlora.merge(half)["query"]["kernel"].ravel().tolist()))
      [0.0, 2.0]

    References:
      Yu et al, `Language Models are Super Mario <https://arxiv.org/abs/2311.03099>`_, 2023.
    """
    _check_density("dare", density)
    if sign is not None:
        _check_sign("dare", sign)
    key, drawn = checked_key(key), itertools.count()

    def rule(x: Changes, w: Sequence[float]) -> jax.Array:
        draw = lambda d: jax.random.bernoulli(jax.random.fold_in(key, next(drawn)), density, d.shape)
        kept = [jnp.where(draw(d), d / density, 0) for d in x]
        return _sum(kept, w) if sign is None else _elected(kept, w, sign)

    return _combined("dare", adapters, weights, rule, rank, energy)


# Inside -----------------------------------------------------------------------------------------------------------


def _check_density(caller: str, density: float) -> None:
    if isinstance(density, (bool, str)) or not 0 < density <= 1:
        raise ValueError(f"combine.{caller}(density={density!r}): the share of entries that stay, in (0, 1]")


def _check_sign(caller: str, sign: str) -> None:
    if sign not in ("total", "frequency"):
        raise ValueError(f"combine.{caller}(sign={sign!r}): write 'total' or 'frequency'")


def _sum(changes: Changes, weights: Sequence[float]) -> jax.Array:
    return functools.reduce(jnp.add, [w * d for d, w in zip(changes, weights, strict=True)])


def _top(change: jax.Array, density: float) -> jax.Array:
    """The largest entries of each layer, as many as `density` says, rounded down; others are zero."""
    count = int(density * change.shape[-1])

    def one(d: jax.Array) -> jax.Array:
        at = jax.lax.top_k(jnp.abs(d), count)[1]
        return jnp.zeros_like(d).at[at].set(d[at])

    return jax.vmap(one)(change)


def _elected(changes: Changes, weights: Sequence[float], sign: str) -> jax.Array:
    """The mean of the weighted entries that have the elected sign; zero where none has."""
    votes = [jnp.sign(d) if sign == "frequency" else d for d in changes]
    elected = jnp.where(_sum(votes, [1.0] * len(votes)) >= 0, 1, -1)
    agree = [jnp.sign(d) == elected for d in changes]
    total = _sum([jnp.where(ok, d, 0) for d, ok in zip(changes, agree, strict=True)], weights)
    return total / jnp.maximum(sum(ok.astype(total.dtype) for ok in agree), 1)


def _combined(
    caller: str,
    adapters: Sequence[Adapted],
    weights: Sequence[float] | None,
    rule: Rule,
    rank: int | None,
    energy: float | None,
) -> Resized:
    if rank is not None or energy is not None:
        check_wanted(f"combine.{caller}", rank, energy)
    found = parts(caller, adapters, weights)
    for adapted in adapters:
        _read.check_mergeable(f"combine.{caller}", adapted)
    if steps := [path for path, ours in found.items() if any(part.weight.rows for part in ours)]:
        raise ValueError(f"combine.{caller}: {steps[:3]} have rows put into a table, which no low rank approximates")
    made: list[tuple[Site, Values]] = []
    error: dict[str, float] = {}
    for path, ours in found.items():
        leaf, index = ours[0].site.leaf, ours[0].site.index
        vector = not (leaf.axes("ik") and leaf.axes("o"))
        if vector or rank is None and energy is None:
            made.append(full(leaf, index, _change(ours, rule), dtype_of(ours)))
            error[path] = 0.0
            continue
        whole = _decomposed(ours, rule)
        if not bool(jnp.isfinite(whole.s).all()):
            raise ValueError(f"combine.{caller}: the updates of {path!r} hold NaN or infinities")
        k = min(whole.s.shape[-1], rank) if rank is not None else needed(np.asarray(whole.s), energy or 1.0)
        root = jnp.sqrt(whole.s[..., :k])[..., None]
        made.append(lora(leaf, index, root * whole.u.mT[..., :k, :], root * whole.v.mT[..., :k, :], dtype_of(ours)))
        total, rest = (float(jnp.sum(s.astype(jnp.float32) ** 2)) for s in (whole.s, whole.s[..., k:]))
        error[path] = (rest / total) ** 0.5 if total else 0.0
    return Resized(adapter(adapters[0].frozen, made), error)


def _change(ours: Sequence[Part], rule: Rule) -> jax.Array:
    """What a rule makes of the updates of one weight, `(stack..., in, out)`."""
    changes = [part.change for part in ours]
    shape = changes[0].shape
    flat = [d.reshape(-1, shape[-2] * shape[-1]) for d in changes]
    return rule(flat, [part.by for part in ours]).reshape(shape)


def _decomposed(ours: Sequence[Part], rule: Rule) -> SVD:
    """Its singular values: of a plain sum of low-rank products by their factors."""
    products = [part.product for part in ours] if rule is _sum else [None]
    if any(p is None for p in products):
        return svd(_change(ours, rule))
    a, b = (jnp.concatenate(side, -2) for side in zip(*filter(None, products), strict=True))
    return factored_svd(a, b)
