"""Rows of an adapted embedding: `gather` along one axis. As in `_ops`, nothing here knows what a jaxpr is."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._contract import elements
from jlora._dropout import thinned
from jlora._ops import Note, Refusal, Use, product
from jlora._weight import Weight


def _made_of_rows(w: Weight, axis: int, indices: jax.Array, params: Mapping[str, Any]) -> jax.Array:
    """The rows of a W0 yet to be computed, computed from those of its arrays."""
    d = params["dimension_numbers"]
    (atom,) = w.axes[axis]
    flat = indices.reshape(-1, 1)

    def rows(a: jax.Array, n: int) -> jax.Array:
        others = tuple(m for m in range(a.ndim) if m != n)
        numbers = lax.GatherDimensionNumbers(others, (n,), (n,))
        sizes = tuple(1 if m == n else s for m, s in enumerate(a.shape))
        fill = jnp.nan if jnp.issubdtype(a.dtype, jnp.floating) else 0
        return lax.gather(a, flat, numbers, sizes, mode=params["mode"], fill_value=fill)

    alone = w.replace(terms=(), gain=())
    made = alone.along(atom, None, rows, drop=False).resized(atom, flat.shape[0]).w0()
    made = jnp.moveaxis(made, axis, 0).reshape(*indices.shape[:-1], *(s for n, s in enumerate(w.shape) if n != axis))
    place = [n for n in range(made.ndim) if n not in d.offset_dims]
    order = [*place, *d.offset_dims]
    return lax.transpose(made, [order.index(n) for n in range(made.ndim)])


def lookup(
    w: Weight,
    indices: jax.Array,
    params: Mapping[str, Any],
    bind: Callable[[jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> "jax.Array | Weight":
    """`gather` of whole rows along one axis."""
    d = params["dimension_numbers"]
    if len(d.start_index_map) != 1 or d.collapsed_slice_dims != d.start_index_map or d.operand_batching_dims:
        raise Refusal("a gather of more than rows")
    w = w.multiplied()
    (axis,) = d.start_index_map
    shape = w.shape
    if tuple(params["slice_sizes"]) != tuple(1 if n == axis else s for n, s in enumerate(shape)):
        raise Refusal("a gather of parts of rows")
    if len(w.axes[axis]) != 1:
        raise Refusal("a gather along joined axes")
    (atom,) = w.axes[axis]
    count = indices.ndim - 1

    def rows(a: jax.Array, n: int) -> jax.Array:
        """Axis `n` replaced by the batch axes of the indices, which come first."""
        numbers = lax.GatherDimensionNumbers(tuple(range(count, count + a.ndim - 1)), (n,), (n,))
        sizes = tuple(1 if m == n else s for m, s in enumerate(a.shape))
        keep = {k: params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
        # a row that is not there is filled in W0 alone; its delta is zero, and so is its gradient
        return lax.gather(a, indices, numbers, sizes, fill_value=0, **keep)

    if w.lazy is not None and not w.lazy.can(atom, drop=count == 0):
        w = w.solid()
    base: Any = None
    if w.lazy is None:
        base = bind(w.w0())
    elif count:
        base = _made_of_rows(w, axis, indices, params)
    if count == 0:
        return w.along(atom, base, rows, drop=True).replace(axes=tuple(g for n, g in enumerate(w.axes) if n != axis))
    if not all(t.simple(atom) for t in w.terms):
        raise Refusal("a lookup in a weight whose rows are not labelled")
    batch = tuple(f"row{n}" for n in range(count))
    others = [g for n, g in enumerate(w.axes) if n != axis]
    y = base if w.plain else jnp.zeros_like(base)
    flops = 0.0
    lost = w.key is not None and any(t.dropout.rate for t in w.terms)
    for t in w.terms:
        _, t = thinned(w, t, None)
        values, names = w.operands(t)
        runs = t.through(others)
        if runs is None:
            raise Refusal("a lookup across a flattened side")
        picked, labels = [], []
        for a, ls in zip(values, names, strict=True):
            if atom in ls:
                n = ls.index(atom)
                a, ls = rows(a, n), (*batch, *ls[:n], *ls[n + 1 :])
            picked.append(a.astype(base.dtype))
            labels.append(ls)
        lead = next(n for n, ls in enumerate(labels) if batch[0] in ls)
        x, x_labels = picked.pop(lead), labels.pop(lead)
        made = tuple(m for _, ms in runs for m in ms)
        with jax.named_scope("delta"):
            dy = product(x, x_labels, picked, labels, (*batch, *made), forward_mode)
        dy = dy.reshape(*dy.shape[:count], *(s for n, s in enumerate(shape) if n != axis))
        place = [n for n in range(base.ndim) if n not in d.offset_dims]
        order = [0] * base.ndim
        for n, m in enumerate((*place, *d.offset_dims)):
            order[m] = n
        y = y + lax.transpose(dy, order)
        flops += 2.0 * elements(dy.shape) * (x.shape[-1] if x.ndim > count else 1)
    # as in loralib, a lookup has no dropout of its input, which is no activation
    note(Use("rows of the factors, no dropout" if lost else "rows of the factors", flops, 0.0))
    return y
