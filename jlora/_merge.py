"""From an adapter back to plain parameters, and what that costs in the weight's own precision."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.typing import DTypeLike

from jlora import _answers, _read
from jlora._algebra._rows import shorter, taller
from jlora._algebra._weight import Weight
from jlora._trees import _compound, _table, _tree
from jlora._trees._compound import is_compound
from jlora._types import PyTree
from jlora.adapted import Adapted, check_adapted, check_any, is_adapted


def merge(adapted: Adapted) -> PyTree:
    """Plain parameters again: the same structure, shapes and dtypes as the base.

    Deltas are added in float32, then cast. Pure and jittable; looks at no value. A quantised weight becomes the array
    that it stands for, adapted or not: deltas were trained beside that, not beside what was quantised. A table with new
    rows (`NewTokens`) is the one that gets taller: V + n rows, for a model that is built with so many.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> merged = jlora.merge(jlora.adapt(params, jlora.LoRA(rank=2)))
      >>> bool((merged["query"]["kernel"] == params["query"]["kernel"]).all())
      True
    """
    leaves = _tree.leaves(check_adapted("merge", adapted).frozen.base)
    _read.check_mergeable("merge", adapted)
    whole = lambda w: taller(w.dense(), w.rows, w.axes, w.size)
    merged = _read.replaced(adapted, [whole(w) for w in _read.expressions(adapted, leaves)])
    return jax.tree.map(_compound.dense, merged, is_leaf=is_compound)


@dataclasses.dataclass(frozen=True)
class MergeRow:
    """One weight's merge.

    Attributes:
      path: where it stands.
      survives: the share of the delta that is left after the cast, 1 where nothing is lost; 0 where the merged
        weight overflows its dtype, NaN where the factors themselves are not finite.
      relative_error: the norm of what the cast changed over the norm of the delta.
    """

    path: str
    survives: float
    relative_error: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """`rows`, one a weight; prints as a table. `worst` is the smallest share that survives."""

    rows: tuple[MergeRow, ...]

    @property
    def worst(self) -> float:
        return min((r.survives for r in self.rows), key=lambda s: (s == s, s), default=1.0)  # NaN is the worst

    def __str__(self) -> str:
        rows = [(r.path, f"{100 * r.survives:.1f} %", f"{r.relative_error:.2e}") for r in self.rows]
        return _table.render(("path", "survives", "relative error"), rows, right=(1, 2))


def outside(caller: str, tree: PyTree) -> None:
    """TypeError where values are read and there are none, since the call is traced."""
    if any(isinstance(x, Tracer) for x in jax.tree.leaves(tree)):
        raise TypeError(
            f"{caller} reads values, so it is called outside of jit, grad and vmap; jlora.merge works inside"
        )


@jax.jit
def _survival(w: Weight) -> tuple[jax.Array, jax.Array]:
    delta, w0 = w.delta(), w.w0()
    # a barrier, or XLA drops the cast and its inverse together and finds that nothing is lost
    merged = lax.optimization_barrier(w.dense())
    kept = merged.astype(delta.dtype) - w0.astype(delta.dtype)
    there = jnp.isfinite(w0)  # an infinity in the base itself is none of the merge's
    delta, kept = jnp.where(there, delta, 0), jnp.where(there, kept, 0)
    largest = jnp.max(jnp.abs(delta), initial=0)
    unit = jnp.where(largest > 0, largest, 1)
    delta, kept = delta / unit, kept / unit  # squares neither overflow nor vanish
    square = jnp.sum(delta * delta)
    empty = square == 0
    square = jnp.where(empty, 1.0, square)
    share = jnp.where(empty, 1.0, jnp.sum(kept * delta) / square)
    error = jnp.sqrt(jnp.sum((kept - delta) ** 2) / square)
    # float16 overflows to infinity, float8 to NaN: nothing is left of such a weight, and no share of it is large
    over = jnp.isfinite(largest) & ~jnp.all(jnp.isfinite(kept))
    return jnp.where(over, 0.0, share), jnp.where(over, jnp.inf, error)


def merge_report(adapted: Adapted) -> MergeReport:
    """For each weight, the share of its delta that survives the cast to the weight's dtype.

    In bfloat16 a delta a thousand times smaller than its weight loses half of itself. `survives` is
    <kept, delta> / <delta, delta>, where `kept` is what the merged weight differs by from the base. A weight that
    overflows to infinity or NaN keeps nothing, and `export` refuses it. For use outside of `jit`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> jlora.merge_report(adapted).worst
      1.0
    """
    outside("merge_report", check_adapted("merge_report", adapted))
    _read.check_mergeable("merge_report", adapted)
    rows = []
    for site, w in zip(
        adapted.frozen.plan.sites,
        _read.expressions(adapted, _tree.leaves(adapted.frozen.base)),
        strict=True,
    ):
        share, error = _survival(w)
        rows.append(MergeRow(site.leaf.path, float(share), float(error)))
    return MergeReport(tuple(rows))


class Unmerged(NamedTuple):
    """`params`, and for each weight the relative `drift`: how far merging again lands from the merged weight."""

    params: PyTree
    drift: dict[str, float]


def unmerge(merged: PyTree, adapted: Adapted) -> Unmerged:
    """Subtracts an adapter from merged parameters, for when the base is no longer at hand.

    Where it is, use it: `adapted.frozen.base` is exact, this is not. Subtraction happens in float32, then casts.

    Args:
      merged: a tree like the base.
      adapted: the adapter; its own base is not read.

    Raises:
      ValueError: a tree of another structure, or a method whose delta depends on W0.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> params, drift = jlora.unmerge(jlora.merge(adapted), adapted)
      >>> drift
      {'query/kernel': 0.0}
    """
    check_adapted("unmerge", adapted)
    if is_adapted(merged):
        raise TypeError("unmerge(merged, adapted) takes merged parameters first, not an Adapted: jlora.merge(adapted)")
    outside("unmerge", (merged, adapted))
    _read.check_mergeable("unmerge", adapted)
    apart = [dataclasses.replace(s.recipe, rows=()) for s in adapted.frozen.plan.sites]
    bad = [s.leaf.path for s, recipe in zip(adapted.frozen.plan.sites, apart, strict=True) if not recipe.additive]
    if bad:
        raise ValueError(f"the update of {bad[:5]} depends on W0 itself and cannot be subtracted; keep the base")
    leaves, treedef = jax.tree.flatten(merged)
    if treedef != _tree.flatten(adapted.frozen.base).treedef:
        raise ValueError("merged is not a tree like the adapter's base: its structure differs")
    for site in adapted.frozen.plan.sites:
        leaves[site.index] = shorter(leaves[site.index], site.recipe.rows, site.leaf)
    held = Adapted(adapted.trainable, dataclasses.replace(adapted.frozen, base=merged))
    drift = {}
    for site, w in zip(held.frozen.plan.sites, _read.expressions(held, leaves), strict=True):
        if w.shape != site.leaf.shape or w.w0().shape != site.leaf.shape:
            raise ValueError(f"{site.leaf.path!r} has shape {w.w0().shape}, the adapter's is {site.leaf.shape}")
        delta, w0 = w.delta(), w.w0()
        base = (w0.astype(delta.dtype) - delta).astype(w0.dtype)
        again = w.replace(base=base).dense().astype(delta.dtype)
        target = w0.astype(delta.dtype)
        drift[site.leaf.path] = float(jnp.linalg.norm(again - target) / jnp.maximum(jnp.linalg.norm(target), 1e-30))
        leaves[site.index] = base
    return Unmerged(jax.tree.unflatten(treedef, leaves), drift)


def _is_real(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, np.integer) or jnp.issubdtype(dtype, np.floating)


def scale(adapted: Adapted, x: float | np.ndarray | jax.Array) -> Adapted:
    """The adapter weakened, strengthened or switched off: every delta times `x` (0 is the base, 1 the adapter).

    `x` is a scalar and may be traced: the scales are data, so nothing recompiles. What stands in place of something,
    and adds nothing to it, has no scale and stays: new rows of a table, and the rows at virtual positions of prompts
    and prefixes; a call without virtual ids is a call without them.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2, alpha=4))
      >>> float(jlora.scale(adapted, 0.5).frozen.factors["query/kernel"]["s"])
      1.0
    """
    check_any("scale", adapted)
    number = isinstance(x, (int, float)) or hasattr(x, "dtype") and _is_real(x.dtype)
    if not number or isinstance(x, bool):
        raise TypeError(f"scale(adapted, x) takes a scalar x, such as 0.5, not {_answers.kind(x)}")
    if jnp.ndim(x) != 0:
        raise ValueError(
            f"scale takes a scalar, not an array of shape {jnp.shape(x)}; vmap over adapters (jlora.stack) instead"
        )
    if not isinstance(x, Tracer) and not abs(x) <= float(jnp.finfo(jnp.float32).max):
        raise ValueError(f"scale(adapted, x) takes a finite x in float32's range, not {x!r:.40}")
    scales = {
        place
        for site in adapted.frozen.plan.sites
        for place, (array, _) in site.recipe.arrays(site.leaf).items()
        if array.scale
    }
    factors = {
        group: {name: (a * jnp.asarray(x, a.dtype) if (group, name) in scales else a) for name, a in named.items()}
        for group, named in adapted.frozen.factors.items()
    }
    return Adapted(adapted.trainable, dataclasses.replace(adapted.frozen, factors=factors))
