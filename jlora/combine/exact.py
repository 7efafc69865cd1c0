"""W0 + sum_k w_k dW_k as one adapter, exactly."""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jlora import _read
from jlora._plan._sites import Site
from jlora.adapted import Adapted
from jlora.combine._parts import Part, Values, adapter, dtype_of, full, lora, parts, values_of


def weighted(adapters: Sequence[Adapted], weights: Sequence[float] | None = None) -> Adapted:
    """One adapter whose every update is the weighted sum of theirs: dW = sum_k w_k dW_k, to rounding.

    Low-rank products stand below each other, a = [a_1; a_2], b = [w_1 s_1 b_1; w_2 s_2 b_2], so that the rank is the
    sum of the ranks and no cross terms arise; it is a plain LoRA. (peft's `linear` adds a's and b's, which is another
    matrix; its `cat` is this sum.) What is trained whole (`Full`, `BitFit`) is added. A weight that one adapter alone
    takes keeps its method and factors: with weight 1, bit for bit; with another, where the method adds to W0, its
    scale is multiplied. A weight of -1 unlearns, of 0 leaves the adapter out.

    Args:
      adapters: of one base.
      weights: one for each; all 1 by default.

    Returns:
      An adapter of the same base.

    Raises:
      TypeError: no list of adapters.
      ValueError: a sum that no method says exactly, such as of two rotations, or of a DoRA with anything: all such
        weights at once (`combine.truncated` approximates); unlike bases; factors without values.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> one = jlora.adapt(params, jlora.LoRA(rank=2, init="gaussian"))
      >>> two = jlora.adapt(params, jlora.LoRA(rank=1), key=jax.random.key(1))
      >>> jlora.table(jlora.combine.weighted([one, two], [1, -0.5])).splitlines()[2]
      'query/kernel        1  6 -> 4     LoRA       3         30'
    """
    found = parts("weighted", adapters, weights)
    shared = _shared(found)
    made: list[tuple[Site, Values]] = []
    bad = []
    for path, ours in found.items():
        new = _alone(adapters, ours[0], shared) if len(ours) == 1 else None
        new = new or _products(ours) or _wholes(ours)
        if new is None:
            methods = " and ".join(f"{p.by:g} x {p.site.method.describe()}" for p in ours)
            bad.append(f"{path!r}: {methods}")
        else:
            made.append(new)
    if bad:
        more = f"\n  and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError(
            "combine.weighted: no method says these sums exactly; combine.truncated(adapters, weights, rank=...) gives "
            "the best LoRA of a rank and what it leaves out:\n  " + "\n  ".join(bad[:8]) + more
        )
    return adapter(adapters[0].frozen, made)


def _shared(found: dict[str, list[Part]]) -> set[str]:
    """Groups of factors that weights of several adapters use: they hold unlike values under one name."""
    users: dict[str, set[int]] = {}
    for part in (part for ours in found.values() for part in ours):
        for group, _ in part.site.recipe.arrays(part.site.leaf):
            users.setdefault(group, set()).add(part.adapter)
    return {group for group, adapters in users.items() if len(adapters) > 1}


def _alone(adapters: Sequence[Adapted], part: Part, shared: set[str]) -> tuple[Site, Values] | None:
    """The weight as its one adapter has it, its scale multiplied; None where that says another thing."""
    site = part.site
    held = values_of(site, _read.factors_of(adapters[part.adapter]))
    if any(group in shared for group, _ in held):
        return None
    if part.by != 1:
        arrays = {place: array for place, (array, _) in site.recipe.arrays(site.leaf).items()}
        # every summand has a scale of its own, which `jlora.scale` multiplies: so does this
        if not site.recipe.additive or not any(array.scale for array in arrays.values()):
            return None
        held |= {place: (part.by * held[place]).astype(held[place].dtype) for place in held if arrays[place].scale}
    return site, held


def _products(ours: Sequence[Part]) -> tuple[Site, Values] | None:
    """Low-rank products below each other."""
    products = [part.product for part in ours]
    if any(p is None for p in products) or any(part.weight.rows for part in ours):
        return None
    a, b = (jnp.concatenate(side, -2) for side in zip(*filter(None, products), strict=True))
    return lora(ours[0].site.leaf, ours[0].site.index, a, b, dtype_of(ours))


def _wholes(ours: Sequence[Part]) -> tuple[Site, Values] | None:
    """A delta of the whole leaf, where one of them has as many numbers already."""
    leaf = ours[0].site.leaf
    size = lambda part: max(math.prod(shape) for _, shape in part.site.recipe.arrays(part.site.leaf).values())
    if not all(part.site.recipe.additive for part in ours) or max(map(size, ours)) < math.prod(leaf.shape):
        return None
    change: jax.Array = sum(part.by * part.change for part in ours)  # type: ignore[assignment]
    return full(leaf, ours[0].site.index, change, dtype_of(ours))
