"""Operations that contract an adapted weight with an activation.

The casts say which parameters an operation has: to JAX they are a dict of whatever.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, cast

import jax
from jax import lax

from jlora._algebra._weight import Weight, is_weight
from jlora._forward import _conv, _dot, _ops, _rows, _table
from jlora._forward._anew import anew, bulky
from jlora._forward._conv import ConvParams, RaggedParams
from jlora._forward._ops import Note, Refusal, Spent
from jlora._forward._rows import GatherParams
from jlora._forward._rule import Written
from jlora._interpret.jaxpr import Eqn, Evaluated, Outputs, Rule, expression

if TYPE_CHECKING:
    from jlora._interpret import Interpreter


def _dot_general(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    left = is_weight(values[0])
    w, x = expression(values[not left]), me.dense(values[left], eqn, "a product of two adapted weights")
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    contracted, batch = (lc, lb) if left else (rc, rb)
    other, other_batch = (rc, rb) if left else (lc, lb)
    me.meet(w, x, [*zip(contracted, other, strict=True)], [*zip(batch, other_batch, strict=True)])
    if _ops.is_vector(w):
        return me.bind(eqn, me.arrays([w, x] if left else [x, w], eqn, "a vector"))
    params = ("dimension_numbers", "precision", "preferred_element_type", "out_sharding")
    written = Written(left, **{name: eqn.params[name] for name in params if name in eqn.params})
    note = functools.partial(me.record, w, eqn.primitive.name)

    def plain(w: Weight, note: Note) -> jax.Array:
        if _ops.is_dense_delta(w):
            note(Spent("dense delta", float(math.prod(w.shape)), 0.0))
            bind = lambda w, x, _: me.bind(eqn, [w.dense(), x] if left else [x, w.dense()])[0]
            return _met(me, bind, w, x)
        dot = lambda w, x, mode: _dot.dot(w, x, written, forward_mode=mode, note=note)
        return _met(me, dot, me.used(w), x)

    return [_table.put_into_dot(w, x, written, plain, note) if w.rows else plain(w, note)]


def _met(me: Interpreter, use: Callable[[Weight, jax.Array, bool], jax.Array], w: Weight, x: jax.Array) -> jax.Array:
    """`use` of a weight and an activation, made anew for gradients where it makes more than it meets."""
    return (functools.partial(anew, use) if bulky(w, x) else use)(w, x, me.forward_mode)


def _gather(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    w, indices = values
    if not is_weight(w) or is_weight(indices):
        raise Refusal("an index made of weights")
    if _ops.is_vector(w):
        raise Refusal("a vector")
    note = functools.partial(me.record, w, eqn.primitive.name)
    ids, params, ones = _rows.along_rows(w.shape, indices, cast(GatherParams, eqn.params))
    bind = lambda base: lax.squeeze(me.bind(eqn, [base, indices])[0], ones)
    lookup = _table.put_into_lookup if w.rows else _rows.lookup
    y = lookup(me.used(w), ids, params, bind, me.forward_mode, note)
    return [y if is_weight(y) else lax.expand_dims(y, ones)]


def _ragged(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    x, w, sizes, *more = values
    if not is_weight(w) or is_weight(x) or is_weight(sizes) or more or eqn.params.get("group_offset") is not None:
        raise Refusal("a ragged dot in another form")
    if w.rows:
        raise Refusal("a ragged dot with rows put in")
    note = functools.partial(me.record, w, eqn.primitive.name)
    bind = lambda base, x, sizes: me.bind(eqn, [x, base, sizes])[0]
    return [_conv.ragged(me.used(w), x, sizes, cast(RaggedParams, eqn.params), bind, me.forward_mode, note)]


def _convolution(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    x, w = values
    if not is_weight(w) or is_weight(x):
        raise Refusal("a convolution with the weight as its input")
    if w.rows:
        raise Refusal("a convolution with rows put in")
    if w.plain and _ops.is_dense_delta(w):
        me.record(w, eqn.primitive.name, Spent("dense delta", float(math.prod(w.shape)), 0.0))
        return [_met(me, lambda w, x, _: me.bind(eqn, [x, w.dense()])[0], w, x)]
    note = functools.partial(me.record, w, eqn.primitive.name)
    bind = lambda base, x: me.bind(eqn, [x, base])[0]
    return [_conv.conv(me.used(w), x, cast(ConvParams, eqn.params), bind, me.forward_mode, note)]


RULES: Mapping[str, Rule] = {
    "dot_general": _dot_general,
    "gather": _gather,
    "ragged_dot_general": _ragged,
    "ragged_dot": _ragged,
    "conv_general_dilated": _convolution,
}
