"""How many dimensions a task needs: the smallest random subspace in which training does nearly as well as in all."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jlora import _answers
from jlora._plan import _resolve
from jlora._plan._sites import Spec
from jlora._trees import _tree
from jlora._types import Key, PyTree
from jlora.adapted import Adapted, adapt
from jlora.methods.intrinsic import IntrinsicDimension


class Found(NamedTuple):
    """What `intrinsic_dimension` found.

    Attributes:
      d: the smallest dimension tried whose score reached `threshold`; None where none did.
      threshold: share * baseline.
      scores: `{d: score}` of every dimension tried, ascending.
    """

    d: int | None
    threshold: float
    scores: dict[int, float]


def intrinsic_dimension(
    train: Callable[[Adapted], float],
    params: PyTree,
    dimensions: Sequence[int],
    *,
    baseline: float,
    share: float = 0.9,
    ratio: float = 1.1,
    method: IntrinsicDimension | None = None,
    also: Sequence[Spec] = (),
    key: Key | None = None,
    axes: dict[str, str] | None = None,
) -> Found:
    """d90: the smallest d for which training in d dimensions reaches 90 % of the score of training all.

    Climbs `dimensions` until one is enough, then bisects between it and the one before, on a logarithmic scale. That
    supposes that more dimensions do better, which noise may break: `scores` has every one tried.

    Args:
      train: takes an `Adapted` of d trainable dimensions, trains it from the start, and returns its score, the higher
        the better and 0 for nothing learned (accuracy; the papers take it as it is, chance not subtracted).
      params: the plain parameters.
      dimensions: those to climb. d counts theta and the lam of the structure-aware form, as the paper does.
      baseline: the score of training everything.
      share: 0.9 for d90.
      ratio: bisection ends when the two ends are within it; the papers' figures are no finer. `float("inf")` for none.
      method: projection, seed, target and `said` of the subspace, its d being replaced; `IntrinsicDimension(1)` by
        default.
      also: rules for what is trained in full beside the subspace, such as a new head; not counted in d.
      key: as for `adapt`.
      axes: as for `adapt`.

    Returns:
      A `Found`.

    Raises:
      ValueError: no dimensions, too few of them for the lam alone, a ratio of at most 1, a share of more, a baseline of
        NaN; whatever `adapt` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"kernel": jnp.ones((8, 8))}
      >>> score = lambda adapted: min(jlora.count(adapted)[0] / 20, 1.0)  # in place of training
      >>> jlora.analysis.intrinsic_dimension(score, params, [4, 16, 64], baseline=1.0)
      Found(d=18, threshold=0.9, scores={4: 0.2, 16: 0.8, 17: 0.85, 18: 0.9, 19: 0.95, 23: 1.0, 32: 1.0, 64: 1.0})

    References:
      Li et al, `Measuring the Intrinsic Dimension of Objective Landscapes <https://arxiv.org/abs/1804.08838>`_, 2018.
      Aghajanyan, Zettlemoyer and Gupta, `Intrinsic Dimensionality Explains the Effectiveness of Language Model
      Fine-Tuning <https://arxiv.org/abs/2012.13255>`_, 2020.
    """
    method = IntrinsicDimension(1) if method is None else method
    _answers.check_function("intrinsic_dimension", train)
    _answers.check_params("intrinsic_dimension", params)
    if not isinstance(method, IntrinsicDimension):
        kind = _answers.kind(method)
        raise TypeError(f"intrinsic_dimension(method=...) takes a jlora.IntrinsicDimension(1, ...), not {kind}")
    if isinstance(dimensions, (int, str)) or not len(dimensions):
        raise ValueError(
            f"intrinsic_dimension was given no dimensions ({dimensions!r}); write for example [10, 100, 1000]"
        )
    for d in dimensions:
        _answers.check_integer("intrinsic_dimension(dimensions: d", d, 1, "an integer of at least 1")
    words = "above 1, or bisection has no end"
    _answers.check_number("intrinsic_dimension(ratio", ratio, lambda x: x > 1, words)
    words = "a share of the baseline, above 0 and at most 1"
    _answers.check_number("intrinsic_dimension(share", share, lambda x: 0 < x <= 1, words)
    words = "the score of training everything, a number to be reached"
    _answers.check_number("intrinsic_dimension(baseline", baseline, math.isfinite, words)
    rules = lambda d: (*also, dataclasses.replace(method, d=d))
    plan, _ = _resolve.resolve(_tree.flatten(params), rules(1), axes, True)
    sites = [s for s in plan.sites if isinstance(s.method, IntrinsicDimension)]
    scalars = sum(math.prod(s.leaf.stack) for s in sites) * method.said
    climb = sorted(set(dimensions))
    if climb[0] <= scalars:
        raise ValueError(
            f"intrinsic_dimension: d = {climb[0]} counts the {scalars} lam of as many weights, and leaves nothing to "
            f"theta; begin above {scalars}, or give method=jlora.IntrinsicDimension(1, said=False)"
        )
    threshold = share * baseline
    scores: dict[int, float] = {}

    def enough(d: int) -> bool:
        scores[d] = float(train(adapt(params, rules(d - scalars), key=key, axes=axes)))
        return scores[d] >= threshold

    low = None
    for high in climb:
        if enough(high):
            break
        low = high
    else:
        return Found(None, threshold, dict(sorted(scores.items())))
    while low is not None and high - low > 1 and high > ratio * low:
        middle = min(max(round((low * high) ** 0.5), low + 1), high - 1)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return Found(high, threshold, dict(sorted(scores.items())))
