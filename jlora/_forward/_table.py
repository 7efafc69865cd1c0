"""Rows put into what a table gives: a lookup, or a dot with it as the head of a model. No table is made for it."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._algebra._mesh import automatic
from jlora._algebra._rows import Put
from jlora._algebra._weight import Weight, is_weight
from jlora._dtypes import promoted, wide
from jlora._forward import _rows
from jlora._forward._ops import Note, Refusal, Spent, check_real, same_varying
from jlora._forward._rows import GatherParams, Lookup
from jlora._forward._rule import Written

FEW = 256  # numbers that are compared with each id; above that they are searched


def check_whole(w: Weight, reason: str) -> None:
    """Raises ValueError where a table with new rows meets what knows the table alone: their ids would be lost."""
    if new := [put for put in w.rows if put.new]:
        first, last = new[0].at[0], new[0].at[-1]
        raise ValueError(
            f"the table {w.path!r} of {first} rows has new ones, {first} to {last}, which lookups alone can read "
            f"(jnp.take(table, ids, axis=0), table[ids], nn.Embed), and here is no lookup: {reason}"
        )


def put_into_lookup(
    w: Weight,
    indices: jax.Array,
    params: GatherParams,
    bind: Callable[[jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> jax.Array:
    """`gather` of whole rows along one axis, as `_rows.lookup`: an id that is put in reads its row.

    Where the model clips ids, so it does those that are neither in the table nor behind it.
    """
    bare = w.replace(rows=())
    rows = _rows.read(bare, indices, params)
    axis = _axis(w)
    if rows.axis != axis:
        raise Refusal("a gather along another axis than that of the rows put in")
    told = _told(w, note)
    if _is_base(w):
        note(Spent(_plan("rows of the table", w), 0.0, 0.0))
    made = _rows.lookup(bare, indices, params, bind, forward_mode, told)
    if is_weight(made):  # of a single id, which reads an expression
        made = made.dense()
        told(Spent("one row", 0.0, 0.0))
    y: jax.Array = made
    ids = lax.squeeze(indices, [indices.ndim - 1])
    size = w.shape[axis]
    for put in w.rows:
        own = ids if put.new or rows.fills else jnp.clip(ids, 0, size - 1)
        with jax.named_scope("delta"):
            y = automatic(lambda y, own, table, put=put: _put(rows, put, y, own, table), (y, own, _table(put, w)))
    return y


def _put(rows: Lookup, put: Put, y: jax.Array, ids: jax.Array, table: jax.Array) -> jax.Array:
    """What a lookup gives, with the rows of `table` put where the ids are theirs."""
    slot = _slots(put.at, ids)
    params: GatherParams = {
        **rows.params,
        "mode": lax.GatherScatterMode.FILL_OR_DROP,
        "indices_are_sorted": False,
        "unique_indices": False,
    }
    part = dataclasses.replace(rows, indices=lax.expand_dims(slot, [slot.ndim]), params=params)
    values = part.placed(part.of(table, rows.axis))
    hit = lax.expand_dims(slot < len(put.at), range(slot.ndim, values.ndim))
    hit = part.placed(jnp.broadcast_to(hit, (*slot.shape, *(s for n, s in enumerate(table.shape) if n != rows.axis))))
    sums = wide(y.dtype)
    # what is not a number (a row that is not there) is behind the select, and no sum with it
    there = values.astype(sums) if put.new else y.astype(sums) + values.astype(sums)
    return jnp.where(hit, there.astype(y.dtype), y)


def _slots(at: Sequence[int], ids: jax.Array) -> jax.Array:
    """Where in `at` each id stands; behind its end where it does not."""
    n, ids = len(at), ids if ids.dtype.itemsize > 4 else ids.astype(jnp.int32)
    if at[-1] - at[0] == n - 1:
        slot = ids - jnp.asarray(at[0], ids.dtype)
        return jnp.where((slot >= 0) & (slot < n), slot, n).astype(jnp.int32)
    every = jnp.asarray(np.asarray(at), ids.dtype)
    slot = jnp.searchsorted(every, ids, method="compare_all" if n <= FEW else "scan_unrolled").astype(jnp.int32)
    return jnp.where(jnp.take(every, slot, mode="clip") == ids, slot, n)


def one_row(
    w: Weight, at: jax.Array, bind: Callable[[jax.Array], jax.Array], forward_mode: bool, note: Note
) -> jax.Array:
    """A slice of one row, `table[i]`: the lookup of one id, which is clipped. `bind` gives the slice of a base."""
    axis, ndim = _axis(w), len(w.shape)
    others = tuple(range(ndim - 1))
    params: GatherParams = {
        "dimension_numbers": lax.GatherDimensionNumbers(others, (axis,), (axis,)),
        "slice_sizes": tuple(1 if n == axis else s for n, s in enumerate(w.shape)),
        "indices_are_sorted": False,
        "unique_indices": False,
        "mode": lax.GatherScatterMode.CLIP,
    }
    row = lambda base: lax.squeeze(bind(base), [axis])
    return lax.expand_dims(put_into_lookup(w, lax.expand_dims(at, [0]), params, row, forward_mode, note), [axis])


def is_one_row(w: Weight, sizes: Sequence[int]) -> bool:
    """Whether a slice of these sizes is one row of a table that rows are put into."""
    return bool(w.rows) and tuple(sizes) == tuple(1 if n == _axis(w) else s for n, s in enumerate(w.shape))


def put_into_dot(
    w: Weight, x: jax.Array, written: Written, plain: Callable[[Weight, Note], jax.Array], note: Note
) -> jax.Array:
    """`dot_general` of an activation with a table that rows are put into.

    Where the result has an axis of rows (a tied head), what the changes make is added to their columns, and every other
    column is the plain dot's; new rows have none. Where rows are contracted (one-hot ids), the activation's columns of
    these rows meet the changes. `plain` is the dot of the weight without its rows.
    """
    check_real(x)
    axis = _axis(w)
    (lc, rc), (lb, rb) = written.dimension_numbers
    (wc, xc), (wb, _) = ((lc, rc), (lb, rb)) if written.left else ((rc, lc), (rb, lb))
    if axis in wb:
        raise Refusal("a batch axis of the rows put in")
    if axis in wc:
        check_whole(w, "a dot that sums over the rows; jlora.merge makes the taller table")
    if _is_base(w):
        note(Spent(_plan("W0", w), 0.0, 0.0))
    y = plain(w.replace(rows=()), _told(w, note))
    compute = promoted(x.dtype, w.dtype)
    for put in (p for p in w.rows if not p.new):
        x, y, table = same_varying([x, y, _table(put, w)])
        at = np.asarray(put.at)

        def added(y: jax.Array, x: jax.Array, table: jax.Array, at: np.ndarray = at) -> jax.Array:
            if axis in wc:
                x = jnp.take(x, at, axis=xc[wc.index(axis)], mode="clip", indices_are_sorted=True, unique_indices=True)
            here = dataclasses.replace(written, out_sharding=None)
            change = here(x.astype(compute), table.astype(compute)).astype(y.dtype)
            if axis in wc:
                return y + change
            free = [n for n in range(len(w.shape)) if n not in (*wc, *wb)]
            own = len(wb) + free.index(axis) + (0 if written.left else y.ndim - len(wb) - len(free))
            where = (*(slice(None),) * own, at)
            return y.at[where].add(change, indices_are_sorted=True, unique_indices=True)

        with jax.named_scope("delta"):
            y = automatic(added, (y, x, table))
    return y


def _axis(w: Weight) -> int:
    """The axis of a table's rows, one for all that is put into it."""
    return w.rows[0].axis(w.axes)


def _table(put: Put, w: Weight) -> jax.Array:
    return put.as_table(w.axes, w.size)


def _is_base(w: Weight) -> bool:
    """Whether nothing but rows is trained of the table."""
    return w.plain and not w.terms and not w.gain


def _told(w: Weight, note: Note) -> Note:
    """`note` of what the weight does without its rows; nothing where that is the base's own operation."""
    return (lambda use: None) if _is_base(w) else lambda use: note(dataclasses.replace(use, plan=_plan(use.plan, w)))


def _plan(plan: str, w: Weight) -> str:
    """The plan of the weight without its rows, and how many are put in."""
    count = lambda new: sum(len(p.at) for p in w.rows if p.new == new)
    said = [f"{n} {word}" for n, word in ((count(False), "trained"), (count(True), "new")) if n]
    return f"{plan}, {' and '.join(said)} put in"
