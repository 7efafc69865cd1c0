"""Rows of an adapted embedding: `gather` along one axis. As in `_ops`, nothing here knows what a jaxpr is."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra._contract import elements
from jlora._algebra._mesh import reshaped
from jlora._algebra._term import Term
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._dtypes import promoted
from jlora._forward._dropout import thinned
from jlora._forward._gates import met
from jlora._forward._ops import Note, Refusal, Spent, product
from jlora._types import DType, Shape


class GatherParams(TypedDict):
    """The parameters of a `gather`, by JAX's own names."""

    dimension_numbers: lax.GatherDimensionNumbers
    slice_sizes: Shape
    indices_are_sorted: bool
    unique_indices: bool
    mode: lax.GatherScatterMode


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A `gather` of whole rows along one axis, as the model wrote it.

    Attributes:
      params: the parameters of `gather`.
      indices: its indices, `(batch..., 1)`.
      axis: the weight's axis that they run along.
    """

    params: GatherParams
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
        return lax.gather(
            a,
            self.indices,
            numbers,
            sizes,
            indices_are_sorted=self.params["indices_are_sorted"],
            unique_indices=self.params["unique_indices"],
            mode=self.params["mode"],
            fill_value=0,
        )

    @property
    def fills(self) -> bool:
        """Whether a row that is not there is filled, and not another one in its place."""
        return self.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP

    def digits(self, letters: Labels, sizes: Mapping[str, int]) -> dict[str, jax.Array]:
        """The index into each letter of the rows. Of a flat side, `(i j)`, it is that of i and that of j.

        The slow one is out of its range where the index is out of the side's, so that a row which is not there is zero.
        """
        if len(letters) == 1:
            return {letters[0]: self.indices}
        rest = self.indices.astype(promoted(self.indices.dtype, jnp.int32))
        if not self.fills:
            rest = jnp.clip(rest, 0, math.prod(sizes[x] for x in letters) - 1)
        found = {}
        for letter in reversed(letters[1:]):
            found[letter], rest = rest % sizes[letter], rest // sizes[letter]
        return found | {letters[0]: rest}

    def of_letters(
        self, a: jax.Array, labels: Labels, letters: Labels, digits: Mapping[str, jax.Array]
    ) -> tuple[jax.Array, Labels]:
        """`of` for an operand with some letters of the rows, and its other labels."""
        held = [x for x in letters if x in labels]
        others = tuple(x for x in labels if x not in held)
        if len(letters) == 1:
            return self.of(a, labels.index(held[0])), others
        a = lax.transpose(a, [labels.index(x) for x in (*held, *others)])
        index = digits[held[0]]
        for n, letter in enumerate(held[1:], 1):
            index = index * a.shape[n] + digits[letter]
        params: GatherParams = {**self.params, "indices_are_sorted": False, "unique_indices": False}
        part = dataclasses.replace(self, indices=index, params=params)
        return part.of(a if len(held) == 1 else a.reshape(-1, *a.shape[len(held) :]), 0), others

    def placed(self, y: jax.Array) -> jax.Array:
        """Batch axes in front, then the weight's others: in the order that the model asked for."""
        offset = self.params["dimension_numbers"].offset_dims
        order = [*(n for n in range(y.ndim) if n not in offset), *offset]
        return lax.transpose(y, [order.index(n) for n in range(y.ndim)])


def along_rows(
    shape: Shape, indices: jax.Array, params: GatherParams
) -> tuple[jax.Array, GatherParams, tuple[int, ...]]:
    """A gather of single rows that has a start for every axis, as `vmap` makes one of `table[i]`, along the rows alone.

    Its indices, its parameters, and the axis of size one (if any) that the model's has besides. Another is as it was.
    """
    d, sizes = params["dimension_numbers"], params["slice_sizes"]
    cut = [n for n, (size, whole) in enumerate(zip(sizes, shape, strict=True)) if size != whole]
    held = params["mode"] in (lax.GatherScatterMode.CLIP, lax.GatherScatterMode.PROMISE_IN_BOUNDS)  # to a start of 0
    alone = len(cut) == 1 and sizes[cut[0]] == 1 and cut[0] in d.start_index_map
    if not (held and alone) or d.collapsed_slice_dims or d.operand_batching_dims or indices.ndim < 2:
        return indices, params, ()
    (axis,) = cut
    k, place = d.start_index_map.index(axis), d.offset_dims[axis]
    offset = tuple(m - (m > place) for n, m in enumerate(d.offset_dims) if n != axis)
    numbers = lax.GatherDimensionNumbers(offset, (axis,), (axis,))
    return indices[..., k : k + 1], {**params, "dimension_numbers": numbers}, (place,)


def read(w: Weight, indices: jax.Array, params: GatherParams) -> Lookup:
    """The rows that a gather takes of a weight; Refusal where it takes anything else."""
    d = params["dimension_numbers"]
    if len(d.start_index_map) != 1 or d.collapsed_slice_dims != d.start_index_map or d.operand_batching_dims:
        raise Refusal("a gather of more than rows")
    (axis,) = d.start_index_map
    if tuple(params["slice_sizes"]) != tuple(1 if n == axis else s for n, s in enumerate(w.shape)):
        raise Refusal("a gather of parts of rows")
    if len(w.axes[axis]) != 1:
        raise Refusal("a gather along joined axes")
    return Lookup(params, indices, axis)


def _made_of_rows(w: Weight, rows: Lookup) -> jax.Array:
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


def _letters(term: Term, atom: str, width: int) -> Labels:
    """The letters of a product's rows; Refusal where an operand, looked up letter by letter, gets wider than a row."""
    letters = next((made for atoms, made in term.blocks if atoms == (atom,)), None)
    if letters is None or len(letters) > 1 and any(o.is_base for o in term.operands):
        raise Refusal("a lookup in a weight whose rows are not labelled")
    if len(letters) > 1:
        sizes = term.sizes()
        wide = lambda o: math.prod(sizes[x] for x in o.labels if x not in letters) > width
        if any(set(o.labels) & set(letters) and wide(o) for o in term.operands):
            raise Refusal("a lookup in a product that is wider than a row")
    return letters


def lookup(
    w: Weight,
    indices: jax.Array,
    params: GatherParams,
    bind: Callable[[jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> "jax.Array | Weight":
    """`gather` of whole rows along one axis."""
    w = w.multiplied()
    rows = read(w, indices, params)
    (atom,) = w.axes[rows.axis]
    if w.lazy is not None and not w.lazy.can(atom, drop=rows.count == 0):
        w = w.solid()
    base: jax.Array | None = None
    if w.lazy is None:
        base = bind(w.w0())
    elif rows.count:
        base = _made_of_rows(w, rows)
    if rows.count == 0:
        axes = tuple(g for n, g in enumerate(w.axes) if n != rows.axis)
        return w.along(atom, base, rows.of, drop=True).replace(axes=axes)
    assert base is not None
    batch = tuple(f"row{n}" for n in range(rows.count))
    if w.positional:
        w = met(w, lax.squeeze(indices, [rows.count]), batch, batch, "a lookup with indices")
    width = math.prod(s for n, s in enumerate(w.shape) if n != rows.axis)
    letters = [_letters(t, atom, width) for t in w.terms]
    y = base if w.plain else jnp.zeros_like(base)
    if rows.fills and not w.plain:  # what such a row is filled with is no number, and stays so whatever multiplies W0
        y = jnp.where(jnp.isnan(base), base, y)
    flops = 0.0
    for t, made_of in zip(w.terms, letters, strict=True):
        _, term = thinned(w, t, None)
        dy, cost = _rows_of_term(w, term, rows, made_of, base.dtype, forward_mode)
        y = y + dy
        flops += cost
    # as in loralib, a lookup has no dropout of its input, which is no activation
    lost = w.key is not None and any(t.dropout.rate for t in w.terms)
    note(Spent("rows of the factors, no dropout" if lost else "rows of the factors", flops, 0.0))
    return y


def _rows_of_term(
    w: Weight, term: Term, rows: Lookup, letters: Labels, dtype: DType, forward_mode: bool
) -> tuple[jax.Array, float]:
    """The rows of one product, from those of its factors, and the FLOPs: the first factor that has rows leads."""
    batch = tuple(f"row{n}" for n in range(rows.count))
    runs = term.through([g for n, g in enumerate(w.axes) if n != rows.axis])
    if runs is None:
        raise Refusal("a lookup across a flattened side")
    picked, labels = [], []
    operands = list(zip(*w.operands(term), strict=True))
    sizes = {x: n for a, ls in operands for x, n in zip(ls, a.shape, strict=True)}
    digits = rows.digits(letters, sizes)
    for a, ls in operands:
        if set(letters) & set(ls):
            a, ls = rows.of_letters(a, ls, letters, digits)
            ls = (*batch, *ls)
        picked.append(a.astype(dtype))
        labels.append(ls)
    lead = next(n for n, (_, ls) in enumerate(operands) if set(letters) & set(ls))
    x, x_labels = picked.pop(lead), labels.pop(lead)
    made = tuple(m for _, ms in runs for m in ms)
    with jax.named_scope("delta"):
        dy = product(x, x_labels, picked, labels, (*batch, *made), forward_mode)
    dy = reshaped(dy, (*dy.shape[: rows.count], *(s for n, s in enumerate(w.shape) if n != rows.axis)))
    return rows.placed(dy), 2.0 * elements(dy.shape) * (x.shape[-1] if x.ndim > rows.count else 1)
