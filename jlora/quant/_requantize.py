"""From an adapter over a quantised base back to codes, and what of the update that leaves."""

import jax
import jax.numpy as jnp

from jlora import _merge, _read
from jlora._merge import MergeReport, MergeRow
from jlora._trees import _tree
from jlora._trees._compound import is_compound
from jlora._types import PyTree
from jlora.adapted import Adapted, check_adapted
from jlora.quant._leaf import Quantized
from jlora.quant._quantize import not_finite, quantized


@jax.jit
def _survival(w0: jax.Array, merged: jax.Array, kept: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How much of an update is left where `merged` became `kept`: its share, and the error over its norm."""
    wide = lambda x: x.astype(jnp.float32)
    delta, kept = wide(merged) - wide(w0), wide(kept) - wide(w0)
    square = jnp.sum(delta * delta)
    none = square == 0
    square = jnp.where(none, 1.0, square)
    share = jnp.where(none, 1.0, jnp.sum(kept * delta) / square)
    return share, jnp.where(none, 0.0, jnp.sqrt(jnp.sum((kept - delta) ** 2) / square))


def requantize(adapted: Adapted, *, allow_loss: bool = False) -> tuple[PyTree, MergeReport]:
    """Merges an adapter and quantises the merged weights again, each as it was.

    Rounding the merged weight to the levels of its block loses most of a small update; `merge` keeps it, in an array.
    The report has for each quantised weight that is adapted the share <kept, delta> / <delta, delta> that survives.

    Args:
      adapted: an adapter over a base with quantised weights, outside of `jit`.
      allow_loss: give the tree although less than half of some update survives.

    Returns:
      `(params, report)`: the tree, quantised where the base was, and the report.

    Raises:
      ValueError: where less than half of an update would survive, with the report; NaN or infinities.
      TypeError: no `Adapted`, or one that is being traced.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> base = jlora.quantize({"query": {"kernel": jnp.eye(64)}})
      >>> params, report = jlora.quant.requantize(jlora.adapt(base, jlora.LoRA(rank=2)))
      >>> params["query"]["kernel"], report.worst
      (Quantized((64, 64), float32, nf4), 1.0)
    """
    _merge.outside("requantize", check_adapted("requantize", adapted))
    leaves = _tree.leaves(adapted.frozen.base)
    out, rows, bad = list(leaves), [], []
    for site, w in zip(adapted.frozen.plan.sites, _read.expressions(adapted, leaves), strict=True):
        held, merged = leaves[site.index], w.dense()
        out[site.index] = merged
        if not isinstance(held, Quantized):
            continue
        bad += not_finite(site.leaf.path, merged)
        out[site.index] = again = quantized(merged, held.codec, held.roles)
        share, error = _survival(held.dequantize(), merged, again.dequantize())
        rows.append(MergeRow(site.leaf.path, float(share), float(error)))
    if bad:
        raise ValueError("cannot quantise what these weights merge to:\n  " + "\n  ".join(bad))
    report = MergeReport(tuple(rows))
    if not report.worst >= 0.5 and not allow_loss:
        raise ValueError(
            "quantising the merged weights again would lose most of the update; jlora.merge keeps it in arrays, "
            f"allow_loss=True quantises all the same:\n{report}"
        )
    return jax.tree.unflatten(jax.tree.structure(adapted.frozen.base, is_leaf=is_compound), out), report
