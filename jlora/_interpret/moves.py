"""Operations that move labels: the model's own on W0, a relabelling of the factors.

Every rule takes (interpreter, equation, values, which outputs are wanted) and returns the outputs.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora._algebra._reshape import with_shape
from jlora._algebra._unmade import Lazy
from jlora._algebra._weight import Weight, is_weight
from jlora._algebra._words import Labels
from jlora._forward import _table
from jlora._forward._ops import Refusal, Spent
from jlora._interpret.jaxpr import Eqn, Evaluated, Outputs, Rule, aval, expression
from jlora._types import Cut, MeshAxes

if TYPE_CHECKING:
    from jlora._interpret import Interpreter


def _moved(me: Interpreter, eqn: Eqn, values: Sequence[Evaluated]) -> Sequence[jax.Array | Lazy]:
    """The operation on W0. One yet to be computed follows by the labels of its weight: only its dtype is its own."""
    if not any(is_weight(v) and v.lazy is not None for v in values):
        return me.bind(eqn, [v.w0() if is_weight(v) else v for v in values])
    (w,) = (v for v in values if is_weight(v))
    assert w.lazy is not None
    return [w.lazy.cast(aval(out).dtype) for out in eqn.outvars]


def _cast(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w, dtype = expression(*values), aval(eqn.outvars[0]).dtype
    if not jnp.issubdtype(dtype, jnp.floating):
        raise Refusal(f"a cast to {dtype}")
    if eqn.primitive.name == "reduce_precision":
        w = w.solid()
    (base,) = _moved(me, eqn, [w])
    return [w.replace(base=base)]


def _on_base(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    still = [is_weight(v) and v.lazy is not None for v in values]  # W0 is not made yet: there is no array to act on
    known = [v.w0() if is_weight(v) else v for v, s in zip(values, still, strict=True) if not s]
    rest = iter(me.bind(eqn, known) if known else ())
    outs = [v if s else next(rest) for v, s in zip(values, still, strict=True)]
    here = lambda v, o: v.replace(base=o) if is_weight(v) else o
    return [o if s else here(v, o) for v, o, s in zip(values, outs, still, strict=True)]


def _reshard(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    at = eqn.params["dst_sharding"]
    if AxisType.Explicit not in at.mesh.axis_types:  # `auto_axes` begins: JAX wants the factors on its mesh, too
        (base,) = _moved(me, eqn, [w])
        w = w.each(lambda a: jax.sharding.reshard(a, NamedSharding(at.mesh, PartitionSpec(*[None] * a.ndim))))
        return [w if w.lazy is not None else w.replace(base=base)]
    entry: dict[str, MeshAxes] = dict.fromkeys(w.atoms)
    entry |= {group[0]: e for group, e in zip(w.axes, at.spec, strict=False) if group}
    if w.lazy is not None:
        return [w.moved(w.lazy.placed(at.mesh, entry), at.mesh, entry)]
    return [w.moved(me.bind(eqn, [w.w0()])[0], at.mesh, entry)]


def _stop(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    return [expression(*values).each(lax.stop_gradient)]


def _vary(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    (base,) = _moved(me, eqn, [w])
    return [w.replace(base=base)]  # factors are made to vary later, where they meet an activation


def _transpose(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    (base,) = _moved(me, eqn, [w])
    return [w.transposed(base, eqn.params["permutation"])]


def _reshape(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(values[0])
    if len(values) > 1:
        raise Refusal("a reshape with dynamic sizes")
    (base,) = _moved(me, eqn, [w])
    if eqn.primitive.name == "reshape" and (order := eqn.params["dimensions"]) is not None:
        w = w.transposed(w.base, order)  # `vmap` of a convolution writes a transposed reshape
    moved = with_shape(w, base, aval(eqn.outvars[0]).shape)
    if moved is None:
        raise Refusal("a reshape across axes that labels cannot follow")
    return [moved]


def _broadcast(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(values[0])
    dims = eqn.params["broadcast_dimensions"]
    shape = aval(eqn.outvars[0]).shape
    grown = any(shape[d] != s for d, s in zip(dims, w.shape, strict=True))
    if grown or any(s != 1 for n, s in enumerate(shape) if n not in dims):
        if w.steps:
            return [_spread(w, dims, shape, me.bind(eqn, [w.replace(steps=()).dense()])[0])]
        raise Refusal("a broadcast")
    (base,) = _moved(me, eqn, values)
    axes: list[Labels] = [()] * len(shape)
    for n, d in enumerate(dims):
        axes[d] = w.axes[n]
    return [w.replace(base=base, axes=tuple(axes))]


def _spread(w: Weight, dims: Sequence[int], shape: Sequence[int], base: jax.Array) -> Weight:
    """A weight that is an array already, but for its steps, on its way to a sum with something larger."""
    axes: list[Labels] = [()] * len(shape)
    sizes = dict(w.sizes)
    for n, d in enumerate(dims):
        if w.shape[n] == shape[d]:
            axes[d] = w.axes[n]
    for d, size in enumerate(shape):
        if not axes[d] and size != 1:
            axes[d], sizes[f"+{d}"] = (f"+{d}",), size
    return w.replace(base=base, terms=(), gain=(), key=None, plain=True, axes=tuple(axes), sizes=tuple(sizes.items()))


def _scalar(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    left = is_weight(values[0])
    w, c = expression(values[not left]), values[left]
    if is_weight(c) and not c.shape:
        c = me.dense(c, eqn, "a scalar")
    if is_weight(c) or jnp.ndim(c) or (eqn.primitive.name == "div" and not left):
        raise Refusal("a product with an array")
    by = 1 / c if eqn.primitive.name == "div" else jnp.asarray(c)
    (base,) = (w.lazy.scaled(by),) if w.lazy is not None else me.bind(eqn, [w.w0(), c] if left else [c, w.w0()])
    return [w.scaled(base, by)]


def _neg(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    c = jnp.asarray(-1, w.dtype)
    (base,) = (w.lazy.scaled(c),) if w.lazy is not None else me.bind(eqn, [w.w0()])
    return [w.scaled(base, c)]


def _cuttable(me: Interpreter, eqn: Eqn, w: Weight, axes: Sequence[int], drop: bool = False) -> Weight:
    """The same weight, its W0 computed if it cannot be cut along these axes before."""
    if w.lazy is None or all(w.lazy.can(a, drop) for n in axes for a in w.axes[n] if w.size[a] > 1 or not drop):
        return w
    me.record(w, eqn.primitive.name, Spent("W0 made before the cut", 0.0, 0.0))
    return w.solid()


def _cut(w: Weight, base: jax.Array | Lazy, shape: Sequence[int], cuts: Sequence[Cut | None]) -> list[Weight]:
    """A slice of single-label axes."""
    for axis, cut in enumerate(cuts):
        if cut is None:
            continue
        if not w.axes[axis]:
            continue
        if len(w.axes[axis]) != 1:
            raise Refusal("a slice of joined axes")
        (atom,) = w.axes[axis]
        w = w.along(atom, w.base, cut, drop=False).resized(atom, shape[axis])
    return [w if w.lazy is not None else w.replace(base=base)]


def _reverse(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = _cuttable(me, eqn, expression(*values), eqn.params["dimensions"])
    (base,) = _moved(me, eqn, [w])
    flip = lambda a, m: lax.rev(a, (m,))
    return _cut(w, base, w.shape, [flip if n in eqn.params["dimensions"] else None for n in range(len(w.shape))])


def _slice(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    before, after = w.shape, aval(eqn.outvars[0]).shape
    start, stop = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * len(after)
    if _table.is_one_row(w, after) and after != before:
        (row,) = (n for n, (a, b) in enumerate(zip(before, after, strict=True)) if a != b)
        return [_one_row(me, eqn, w, jnp.int32(start[row]), ())]
    cuts: list[Cut | None] = [
        None if after[n] == before[n] else functools.partial(_static_cut, a=a, b=b, step=s)
        for n, (a, b, s) in enumerate(zip(start, stop, steps, strict=True))
    ]
    w = _cuttable(me, eqn, w, [n for n, cut in enumerate(cuts) if cut])
    return _cut(w, _moved(me, eqn, [w])[0], after, cuts)


def _dynamic_cut(array: jax.Array, n: int, *, start: jax.Array, size: int) -> jax.Array:
    starts = [start if k == n else jnp.zeros_like(start) for k in range(array.ndim)]
    sizes = [size if k == n else s for k, s in enumerate(array.shape)]
    # A negative start is out of bounds here, and clamped: jnp's functions have added the size already. Indexing would
    # add it once more.
    return lax.dynamic_slice(array, starts, sizes, allow_negative_indices=False)


def _static_cut(array: jax.Array, n: int, *, a: int, b: int, step: int) -> jax.Array:
    return lax.slice_in_dim(array, a, b, step, axis=n)


def _split(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    axis, sizes = eqn.params["axis"], eqn.params["sizes"]
    w = _cuttable(me, eqn, w, [axis])
    outs: list[Evaluated] = []
    start = 0
    for base, out, size in zip(_moved(me, eqn, [w]), eqn.outvars, sizes, strict=True):
        cut = functools.partial(_static_cut, a=start, b=start + size, step=1)
        outs += _cut(w, base, aval(out).shape, [cut if n == axis else None for n in range(len(w.shape))])
        start += size
    return outs


def _unstack(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w = expression(*values)
    axis = eqn.params["axis"]
    if len(w.axes[axis]) != 1:
        raise Refusal("unstacking joined axes")
    (atom,) = w.axes[axis]
    w = _cuttable(me, eqn, w, [axis], drop=True)
    axes = tuple(g for n, g in enumerate(w.axes) if n != axis)
    return [
        w.along(atom, base, functools.partial(_pick, k=k), drop=True).replace(axes=axes)
        for k, base in enumerate(_moved(me, eqn, [w]))
    ]


def _pick(array: jax.Array, n: int, *, k: int) -> jax.Array:
    return lax.index_in_dim(array, k, n, keepdims=False)


def _one_row(me: Interpreter, eqn: Eqn, w: Weight, at: jax.Array, starts: Sequence[jax.Array]) -> jax.Array:
    """A slice of one row of a table that rows are put into."""
    bind = lambda base: me.bind(eqn, [base, *starts])[0]
    note = functools.partial(me.record, w, eqn.primitive.name)
    return _table.one_row(me.used(w), at, bind, me.forward_mode, note)


def _dynamic_slice(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w, starts = values[0], [v for v in values[1:] if not is_weight(v)]
    if not is_weight(w) or not len(values) - 1 == len(starts) == len(w.shape):
        raise Refusal("a dynamic slice in another form")
    sizes = eqn.params["slice_sizes"]
    if _table.is_one_row(w, sizes) and sizes != w.shape:
        (row,) = (n for n, (a, b) in enumerate(zip(w.shape, sizes, strict=True)) if a != b)
        return [_one_row(me, eqn, w, starts[row], starts)]
    cuts: list[Cut | None] = [
        None if size == w.shape[n] else functools.partial(_dynamic_cut, start=i, size=size)
        for n, (i, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    w = _cuttable(me, eqn, w, [n for n, cut in enumerate(cuts) if cut])
    return _cut(w, _moved(me, eqn, [w, *starts])[0], sizes, cuts)


RULES: Mapping[str, Rule] = {
    "convert_element_type": _cast,
    "reduce_precision": _cast,
    "copy": _on_base,
    "copy_p": _on_base,
    "name": _on_base,
    "sharding_constraint": _on_base,
    "reshard": _reshard,
    "optimization_barrier": _on_base,
    "device_put": _on_base,
    "stop_gradient": _stop,
    "pvary": _vary,
    "pcast": _vary,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _reshape,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "mul": _scalar,
    "div": _scalar,
    "neg": _neg,
    "rev": _reverse,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "split": _split,
    "unstack": _unstack,
}
