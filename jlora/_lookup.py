"""Rows of an adapted embedding: `gather` along one axis. As in `_ops`, nothing here knows what a jaxpr is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._contract import elements
from jlora._dropout import thinned
from jlora._ops import Note, Refusal, Use, product
from jlora._term import Term
from jlora._weight import Weight


@dataclasses.dataclass(frozen=True)
class Rows:
    """A `gather` of whole rows along one axis, as the model wrote it.

    Attributes:
      params: the parameters of `gather`.
      indices: its indices, `(batch..., 1)`.
      axis: the weight's axis that they run along.
    """

    params: Mapping[str, Any]
    indices: jax.Array
    axis: int

    @property
    def count(self) -> int:
        """How many batch axes the indices have, which come first in what is gathered."""
        return self.indices.ndim - 1

    def of(self, a: jax.Array, n: int) -> jax.Array:
        """An array whose axis `n` runs along the rows, that axis replaced by the batch axes in front.

        A row that is not there is filled in W0 alone; its delta is zero, and so is its gradient.
        """
        numbers = lax.GatherDimensionNumbers(tuple(range(self.count, self.count + a.ndim - 1)), (n,), (n,))
        sizes = tuple(1 if m == n else s for m, s in enumerate(a.shape))
        keep = {k: self.params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
        return lax.gather(a, self.indices, numbers, sizes, fill_value=0, **keep)

    def placed(self, y: jax.Array) -> jax.Array:
        """Batch axes in front, then the weight's others: in the order that the model asked for."""
        offset = self.params["dimension_numbers"].offset_dims
        order = [*(n for n in range(y.ndim) if n not in offset), *offset]
        return lax.transpose(y, [order.index(n) for n in range(y.ndim)])


def _read(w: Weight, indices: jax.Array, params: Mapping[str, Any]) -> Rows:
    """The rows that a gather takes of a weight; Refusal where it takes anything else."""
    d = params["dimension_numbers"]
    if len(d.start_index_map) != 1 or d.collapsed_slice_dims != d.start_index_map or d.operand_batching_dims:
        raise Refusal("a gather of more than rows")
    (axis,) = d.start_index_map
    if tuple(params["slice_sizes"]) != tuple(1 if n == axis else s for n, s in enumerate(w.shape)):
        raise Refusal("a gather of parts of rows")
    if len(w.axes[axis]) != 1:
        raise Refusal("a gather along joined axes")
    return Rows(params, indices, axis)


def _made_of_rows(w: Weight, rows: Rows) -> jax.Array:
    """The rows of a W0 yet to be computed, computed from those of its arrays."""
    (atom,) = w.axes[rows.axis]
    flat = rows.indices.reshape(-1, 1)

    def taken(a: jax.Array, n: int) -> jax.Array:
        others = tuple(m for m in range(a.ndim) if m != n)
        numbers = lax.GatherDimensionNumbers(others, (n,), (n,))
        sizes = tuple(1 if m == n else s for m, s in enumerate(a.shape))
        fill = jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 0
        return lax.gather(a, flat, numbers, sizes, mode=rows.params["mode"], fill_value=fill)

    alone = w.replace(terms=(), gain=())
    made = alone.along(atom, None, taken, drop=False).resized(atom, flat.shape[0]).w0()
    others = tuple(s for n, s in enumerate(w.shape) if n != rows.axis)
    return rows.placed(jnp.moveaxis(made, rows.axis, 0).reshape(*rows.indices.shape[:-1], *others))


def lookup(
    w: Weight,
    indices: jax.Array,
    params: Mapping[str, Any],
    bind: Callable[[jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> "jax.Array | Weight":
    """`gather` of whole rows along one axis."""
    w = w.multiplied()
    rows = _read(w, indices, params)
    (atom,) = w.axes[rows.axis]
    if w.lazy is not None and not w.lazy.can(atom, drop=rows.count == 0):
        w = w.solid()
    base: Any = None
    if w.lazy is None:
        base = bind(w.w0())
    elif rows.count:
        base = _made_of_rows(w, rows)
    if rows.count == 0:
        axes = tuple(g for n, g in enumerate(w.axes) if n != rows.axis)
        return w.along(atom, base, rows.of, drop=True).replace(axes=axes)
    if not all(t.simple(atom) for t in w.terms):
        raise Refusal("a lookup in a weight whose rows are not labelled")
    y = base if w.plain else jnp.zeros_like(base)
    flops = 0.0
    for t in w.terms:
        _, term = thinned(w, t, None)
        dy, cost = _rows_of_term(w, term, rows, base.dtype, forward_mode)
        y = y + dy
        flops += cost
    # as in loralib, a lookup has no dropout of its input, which is no activation
    lost = w.key is not None and any(t.dropout.rate for t in w.terms)
    note(Use("rows of the factors, no dropout" if lost else "rows of the factors", flops, 0.0))
    return y


def _rows_of_term(w: Weight, term: Term, rows: Rows, dtype: Any, forward_mode: bool) -> tuple[jax.Array, float]:
    """The rows of one product, from those of its factors, and the FLOPs: the first factor that has rows leads."""
    (atom,) = w.axes[rows.axis]
    batch = tuple(f"row{n}" for n in range(rows.count))
    runs = term.through([g for n, g in enumerate(w.axes) if n != rows.axis])
    if runs is None:
        raise Refusal("a lookup across a flattened side")
    picked, labels = [], []
    for a, ls in zip(*w.operands(term), strict=True):
        if atom in ls:
            n = ls.index(atom)
            a, ls = rows.of(a, n), (*batch, *ls[:n], *ls[n + 1 :])
        picked.append(a.astype(dtype))
        labels.append(ls)
    lead = next(n for n, ls in enumerate(labels) if batch[0] in ls)
    x, x_labels = picked.pop(lead), labels.pop(lead)
    made = tuple(m for _, ms in runs for m in ms)
    with jax.named_scope("delta"):
        dy = product(x, x_labels, picked, labels, (*batch, *made), forward_mode)
    dy = dy.reshape(*dy.shape[: rows.count], *(s for n, s in enumerate(w.shape) if n != rows.axis))
    return rows.placed(dy), 2.0 * elements(dy.shape) * (x.shape[-1] if x.ndim > rows.count else 1)
