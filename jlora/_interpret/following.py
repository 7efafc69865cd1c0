"""How operations move, join and use weights: the rules by which `roles` follows them through a jaxpr.

Every rule takes (reader, equation, what is known of its inputs) and returns what is known of its outputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from jlora._interpret.jaxpr import Eqn, aval, open_jaxpr, scan_counts, unchanged
from jlora._interpret.views import Group, Known, View, grown, pairs

if TYPE_CHECKING:
    from jlora._interpret.roles import Reader

PASSING = frozenset(
    "convert_element_type reduce_precision copy copy_p name sharding_constraint reshard device_put stop_gradient "
    "pvary pcast optimization_barrier rev neg".split()
)


def _passing(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    return ins


def _eq(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    return [Known((), any(k.data for k in ins), hot=True)]


def _transpose(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    return me.moved(ins, lambda v: v.put([v.groups[n] for n in eqn.params["permutation"]]))


def _reshape(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    order = eqn.params.get("dimensions")
    shape = aval(eqn.outvars[0]).shape
    return me.moved(ins, lambda v: (v.put([v.groups[n] for n in order]) if order else v).reshaped(shape))


def _squeeze(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    return me.moved(ins, lambda v: v.without(eqn.params["dimensions"], "1"))


def _broadcast(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    old, shape, dims = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape, eqn.params["broadcast_dimensions"]
    return me.moved(ins, lambda v: grown(v, old, shape, dims))


def _reduce(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    axes = eqn.params["axes"]
    for v in ins[0].product:  # a sum after a product may be a contraction, and does not tell which axes are which side
        if any(v.groups[n] and any(a for a, _ in v.groups[n]) for n in axes):
            me.unsure([v])
    (k,) = me.moved(ins, lambda v: v.without(axes, "r"))
    return [dataclasses.replace(k, product=(), hot=False)]


def _cut(v: View, sizes: Sequence[int], how: str, moved: Sequence[bool]) -> View:
    for n, size in enumerate(sizes):
        if moved[n]:
            v = v.without([n], how, keep=True) if size == 1 else v.sized(n, size)
    return v


def _slice(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    after, before = aval(eqn.outvars[0]).shape, aval(eqn.invars[0]).shape
    moved = [a != b for a, b in pairs(after, before)]
    return me.moved(ins, lambda v: _cut(v, after, "z", moved))


def _split(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    before, outs = aval(eqn.invars[0]).shape, []
    for out in eqn.outvars:
        after = aval(out).shape
        moved = [a != b for a, b in pairs(after, before)]
        outs += me.moved(ins, lambda v, after=after, moved=moved: _cut(v, after, "z", moved))
    return outs


def _unstack(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    return me.moved(ins, lambda v: v.without([eqn.params["axis"]], "z")) * len(eqn.outvars)


def _dynamic_slice(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    if any(k.views for k in ins[1:]):
        me.unsure([v for k in ins for v in k.views])
        return [Known((), True)]
    after, before = aval(eqn.outvars[0]).shape, aval(eqn.invars[0]).shape
    moved = [a != b for a, b in pairs(after, before)]
    return me.moved(ins, lambda v: _cut(v, after, "s", moved))


def _gather(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    k, index = ins
    if index.views or not k.views:
        me.unsure([*k.views, *index.views])
        return [Known((), True)]
    d, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    old, out = aval(eqn.invars[0]).shape, aval(eqn.outvars[0]).shape
    batching = tuple(d.operand_batching_dims)
    outer = [n for n in range(len(out)) if n not in d.offset_dims]
    lost = set(d.collapsed_slice_dims) | set(batching)
    picked = [n for n in d.start_index_map if sizes[n] < old[n] or n in lost]
    ones = [n for n in picked if outer and n not in lost and sizes[n] == 1]  # rows one by one, as `vmap` takes them
    views = []
    for v in k.views:
        for n in d.start_index_map:
            if n not in lost and n not in ones and sizes[n] < old[n]:
                v = v.without([n], "s", keep=True) if sizes[n] == 1 else v.sized(n, sizes[n])
        if not outer:
            views.append(v.without(sorted(lost), "s"))
            continue
        rest = [n for n in range(len(old)) if n not in picked and n not in batching]
        if index.data and v.wide(rest) <= 1:
            me.use(v, {n: "i" for n in picked} | {n: "s" for n in batching}, "lookup")
            continue
        v = v.without(ones, "s", keep=True)
        axes = tuple(dict.fromkeys(a for n in [*picked, *batching] for held, _ in v.groups[n] for a in held))
        inner = iter([g for n, g in enumerate(v.groups) if n not in lost])
        groups = [((axes, out[n]),) if n in outer else next(inner) for n in range(len(out))]
        views.append(dataclasses.replace(v.put(groups), picked=axes))
    return [Known(tuple(views), not views)]


def _dot(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    sides = [(ins[0], lc, lb, ins[1]), (ins[1], rc, rb, ins[0])]
    both = all(k.views for k in ins)
    # Where both sides are made of weights, the one that was looked up, broadcast or made of several weights is the
    # activation.
    busy = [sum(bool(v.picked) + any(not a for g in v.groups for a, _ in g) for v in k.views) for k in ins]
    first = 1 if busy[1] > busy[0] or (busy[0] == busy[1] and len(ins[1].views) > len(ins[0].views)) else 0
    outs: list[View] = []
    for n, (k, contracted, batch, other) in enumerate(sides):
        said = {**dict.fromkeys(batch, "s"), **dict.fromkeys(contracted, "i")}
        if both and n == first:
            if any(v.picked for v in k.views):
                for v in k.views:
                    me.use(v, {}, "elementwise")
                continue
            mine = [d for d in range(len(aval(eqn.invars[n]).shape)) if d not in (*contracted, *batch)]
            out = aval(eqn.outvars[0]).shape
            at = len(batch) + (len(out) - len(batch) - len(mine) if n else 0)
            for v in k.views:
                groups: list[Group] = [(((), size),) if size > 1 else () for size in out]
                for place, d in [*enumerate(batch), *enumerate(mine, at)]:
                    groups[place] = v.groups[d]
                outs.append(v.without(contracted, "m", keep=True).put(groups))
            continue
        for v in k.views:
            if other.hot and v.wide([d for d in range(len(v.groups)) if d not in (*contracted, *batch)]) <= 1:
                me.use(v, said, "lookup")
            elif both and not any(w.picked for w in other.views):
                me.use(v, said, "between weights")
            else:
                me.use(v, said, "dot")
    return [Known(tuple(outs), not outs)]


def _convolution(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    x, w = ins
    out_axis, in_axis, *window = eqn.params["dimension_numbers"].rhs_spec
    for v in x.views:
        me.use(v, {}, "elementwise")
    for v in w.views:
        me.use(v, {out_axis: "o", in_axis: "i", **dict.fromkeys(window, "k")}, "dot")
    return [Known((), True)]


def _ragged(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    x, w, *rest = ins
    d = eqn.params["ragged_dot_dimension_numbers"]
    me.unsure([v for k in (x, *rest) for v in k.views])
    (_, contracted), (_, batch) = d.dot_dimension_numbers
    said = dict.fromkeys((*d.rhs_group_dimensions, *batch), "s") | dict.fromkeys(contracted, "i")
    for v in w.views:
        me.use(v, said, "dot")
    return [Known((), True)]


def _join(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    """concatenate, pad: along one axis or more the size changes."""
    out = aval(eqn.outvars[0]).shape
    if any(k.data for k in ins):
        for v in (v for k in ins for v in k.views):
            me.use(v, {}, "elementwise")
        return [Known((), True)]
    views = []
    for var, k in pairs(eqn.invars, ins):
        for v in k.views:
            for n, (a, b) in enumerate(pairs(aval(var).shape, out)):
                v = v.sized(n, b) if a != b else v
            views.append(v)
    return [Known(tuple(dict.fromkeys(views)))]


def _leading(k: Known) -> tuple[Known, set[tuple[int, int]]]:
    """A scanned input as its body sees it, and which axes of which weight the loop runs over."""
    runs = {(v.source, a) for v in k.views for axes, _ in v.groups[0] for a in axes}
    return dataclasses.replace(k, views=tuple(v.without([0], "s") for v in k.views), product=()), runs


def _scan(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    n_consts, n_carry = scan_counts(eqn.params)
    jaxpr, closed = open_jaxpr(eqn.params["jaxpr"])
    still = unchanged(eqn) or [None] * len(eqn.outvars)
    consts, carry, xs = ins[:n_consts], ins[n_consts : n_consts + n_carry], ins[n_consts + n_carry :]
    held = _carried(me, carry, [still[n] is not None for n in range(n_carry)])
    items = [_leading(k) for k in xs]
    runs = set().union(*(r for _, r in items)) if items else set()
    outs = me.run(jaxpr, [Known()] * len(closed), [*consts, *held, *(k for k, _ in items)])
    length = eqn.params["length"]

    def stacked(v: View) -> View:
        back = tuple(a for a, how in v.gone if how == "s" and (v.source, a) in runs)
        gone = frozenset(x for x in v.gone if not (x[1] == "s" and x[0] in back))
        return dataclasses.replace(v, groups=(((back, length),), *v.groups), gone=gone)

    ys = [Known(tuple(map(stacked, k.views)), k.data) for k in outs[n_carry:]]
    ends = [c if still[n] is not None else Known((), True) for n, c in enumerate(carry)]
    for k, s in pairs(outs[:n_carry], still[:n_carry]):
        me.unsure([] if s is not None else k.views)
    return [*ends, *ys]


def _carried(me: Reader, carry: Sequence[Known], still: Sequence[bool]) -> list[Known]:
    """What a loop carries: weights that it leaves alone stay weights, others have met what the loop computes."""
    for k, s in pairs(carry, still):
        for v in () if s else k.views:
            me.unsure([v])
    return [k if s else Known((), True) for k, s in pairs(carry, still)]


def _while(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    carry = ins[n_cond + n_body :]
    still = [k is not None for k in (unchanged(eqn) or [None] * len(carry))]
    held = _carried(me, carry, still)
    for name, consts in (("cond_jaxpr", ins[:n_cond]), ("body_jaxpr", ins[n_cond : n_cond + n_body])):
        jaxpr, closed = open_jaxpr(p[name])
        me.run(jaxpr, [Known()] * len(closed), [*consts, *held])
    return [c if s else Known((), True) for c, s in pairs(carry, still)]


def _cond(me: Reader, eqn: Eqn, ins: list[Known]) -> list[Known]:
    index, *operands = ins
    me.unsure(index.views)
    outs: list[Known] = []
    for branch in eqn.params["branches"]:
        jaxpr, closed = open_jaxpr(branch)
        made = me.run(jaxpr, [Known()] * len(closed), operands)
        outs = [
            Known(tuple(dict.fromkeys((*a.views, *b.views))), a.data or b.data) for a, b in pairs(outs or made, made)
        ]
    return outs


RULES = {
    **dict.fromkeys(PASSING, _passing),
    **dict.fromkeys(("reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "reduce_and", "reduce_or"), _reduce),
    **dict.fromkeys(("ragged_dot_general", "ragged_dot"), _ragged),
    **dict.fromkeys(("concatenate", "pad"), _join),
    "eq": _eq,
    "transpose": _transpose,
    "reshape": _reshape,
    "squeeze": _squeeze,
    "expand_dims": _reshape,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "split": _split,
    "unstack": _unstack,
    "dynamic_slice": _dynamic_slice,
    "gather": _gather,
    "dot_general": _dot,
    "conv_general_dilated": _convolution,
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
