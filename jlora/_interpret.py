"""Evaluates a traced function with expressions in place of its adapted weights. The only file that knows jaxprs.

Identity is exact: an input variable is a weight. Operations that move labels move the expression, operations that
contract it use its factors, control flow is rebuilt with JAX's public functions, and anything else gets the dense
weight as late as possible, which is always right. What differs between JAX releases is read in one place, below.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core, source_info_util

from jlora import _merge, _ops
from jlora._ops import Refusal, Use
from jlora._weight import Weight, weight
from jlora.adapted import Adapted

# --- the seam: jaxpr parameters that differ between JAX releases ---------------------------------------------------


def _bind_params(eqn: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`get_bind_params` gave a pair, and gives a dict for some primitives."""
    got = eqn.primitive.get_bind_params(eqn.params)
    return got if isinstance(got, tuple) else ((), got)


def _scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(constants, carries): two numbers until 0.10, two trees since."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    raise Refusal("a scan in a form this version of jlora does not know")


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, constants) of a closed or an open jaxpr."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


_SKIP = tuple(os.path.join(*p) for p in (("site-packages", ""), ("jlora", "")))


def _source(eqn: Any) -> str:
    """`file:line` of the user's code that made an equation."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        name = frame.file_name
        if not any(s in name for s in _SKIP) and not name.startswith("<"):
            return f"{os.path.basename(name)}:{frame.line_num}"
    return ""


# --- which outputs are which inputs, which equations matter --------------------------------------------------------


def _inner(eqn: Any) -> "list[int | None] | None":
    """For each output of an equation with a sub-jaxpr, the input that it is, unchanged, if any."""
    name, params = eqn.primitive.name, eqn.params
    if name in ("jit", "pjit", "remat2", "checkpoint", "closed_call", "core_call"):
        jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
        return forwards(_open(jaxpr)[0])
    if name == "scan":
        consts, carry = _scan_counts(params)
        body = forwards(_open(params["jaxpr"])[0])
        return [
            k if k is not None and (k == consts + n if n < carry else k >= consts + carry) else None
            for n, k in enumerate(body)
        ]
    if name == "while":
        skip = params["cond_nconsts"]
        consts = params["body_nconsts"]
        body = forwards(_open(params["body_jaxpr"])[0])
        return [skip + k if k == consts + n else None for n, k in enumerate(body)]
    if name == "cond":
        branches = [forwards(_open(b)[0]) for b in params["branches"]]
        return [ks[0] + 1 if ks[0] is not None and len(set(ks)) == 1 else None for ks in zip(*branches, strict=True)]
    return None


def forwards(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr, the number of the input that it is, unchanged, or None."""
    origin = {v: n for n, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, k in zip(eqn.outvars, _inner(eqn) or (), strict=False):
            if k is not None and not isinstance(eqn.invars[k], core.Literal) and eqn.invars[k] in origin:
                origin[out] = origin[eqn.invars[k]]
    return [None if isinstance(v, core.Literal) else origin.get(v) for v in jaxpr.outvars]


def live(jaxpr: Any, want: Sequence[bool]) -> tuple[list[bool], set[Any]]:
    """Which equations the wanted outputs (and effects) need, and which variables are read."""
    needed = {v for v, w in zip(jaxpr.outvars, want, strict=True) if w and not isinstance(v, core.Literal)}
    keep = [False] * len(jaxpr.eqns)
    for n in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[n]
        if eqn.effects or any(v in needed for v in eqn.outvars):
            keep[n] = True
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return keep, needed


# --- the interpreter -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One use of one adapted weight: how it was contracted, or why it was made dense."""

    path: str
    use: str
    plan: str
    flops: float
    dense_flops: float
    reason: str


is_weight = lambda x: isinstance(x, Weight)


@dataclasses.dataclass
class Interpreter:
    """Walks jaxprs for one call of a lifted function.

    Attributes:
      forward_mode: plain factored dots in place of custom rules.
      rows: where `explain` collects its rows; None when nobody asked.
      roles: where `infer_axes` collects `{path: {atom: letter}}`; None when nobody asked.
    """

    forward_mode: bool = False
    rows: list[Row] | None = None
    roles: dict[str, dict[str, str]] | None = None
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict)
    uses: dict[int, tuple[Any, int]] = dataclasses.field(default_factory=dict)

    @property
    def watched(self) -> bool:
        return self.rows is not None or self.roles is not None

    # -- walking --

    def run(self, jaxpr: Any, consts: Sequence[Any], args: Sequence[Any], want: Sequence[bool]) -> list[Any]:
        """The outputs of a jaxpr, None where not wanted; each may be an expression."""
        keep, needed = live(jaxpr, want)
        env: dict[Any, Any] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
        stack = source_info_util.current_name_stack()
        for eqn, kept in zip(jaxpr.eqns, keep, strict=True):
            if not kept:
                continue
            info = eqn.source_info
            with (
                source_info_util.user_context(info.traceback, name_stack=stack + info.name_stack),
                eqn.ctx.manager,
            ):
                outs = self.equation(eqn, [read(v) for v in eqn.invars], [v in needed for v in eqn.outvars])
            env.update(zip(eqn.outvars, outs, strict=True))
        return [read(v) if w else None for v, w in zip(jaxpr.outvars, want, strict=True)]

    def equation(self, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
        if not any(map(is_weight, values)):
            return self.bind(eqn, values)
        rule = RULES.get(eqn.primitive.name)
        if rule is not None:
            try:
                return rule(self, eqn, values, want)
            except Refusal as refusal:
                return self.bind(eqn, [self.dense(v, eqn, str(refusal)) for v in values])
        reason = f"{eqn.primitive.name} has no rule"
        return self.bind(eqn, [self.dense(v, eqn, reason) for v in values])

    def bind(self, eqn: Any, values: Sequence[Any]) -> list[Any]:
        subfuns, params = _bind_params(eqn)
        out = eqn.primitive.bind(*subfuns, *values, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    def dense(self, value: Any, eqn: Any, reason: str) -> Any:
        """The array of an expression; an entry in the report unless it is a vector, which costs nothing."""
        if not is_weight(value):
            return value
        name = eqn if isinstance(eqn, str) else eqn.primitive.name
        if _ops.is_vector(value):
            self.record(value, name, Use("dense (a vector)", 0.0, 0.0))
        else:
            where = "" if isinstance(eqn, str) else _source(eqn)
            self.record(value, name, Use("dense", 0.0, 0.0), f"{reason} at {where}" if where else reason)
        return value.dense()

    def record(self, w: Weight, use: str, cost: Use, reason: str = "") -> None:
        if self.rows is not None and w.path is not None:
            self.rows.append(Row(w.path, use, cost.plan, cost.flops, cost.dense_flops, reason))

    def role(self, w: Weight, axes: Sequence[int], letter: str) -> None:
        if self.roles is not None and w.path is not None:
            known = self.roles.setdefault(w.path, {})
            for atom in (a for n in axes for a in w.axes[n]):
                known.setdefault(atom, letter)

    def key(self, w: Weight) -> Any:
        """This use's dropout key: folded with the number of the use, so that two uses draw two masks."""
        if w.key is None:
            return None
        held, count = self.uses.get(id(w.key), (w.key, 0))
        self.uses[id(w.key)] = (held, count + 1)
        return _ops.fold(w.key, count)

    def entering(self, value: Any) -> Any:
        """An expression on its way into a sub-jaxpr: that counts as one use of its key."""
        return value.replace(key=self.key(value)) if is_weight(value) and value.key is not None else value

    def arrays(self, values: Sequence[Any], eqn: Any, reason: str) -> list[Any]:
        return [self.dense(v, eqn, reason) for v in values]


Rule = Callable[[Interpreter, Any, list[Any], list[bool]], list[Any]]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Files a rule under the names of its primitives."""

    def file(f: Rule) -> Rule:
        RULES.update(dict.fromkeys(names, f))
        return f

    return file


# --- operations that move labels -----------------------------------------------------------------------------------


@rule("convert_element_type", "reduce_precision")
def _cast(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    (w,) = values
    (base,) = me.bind(eqn, [w.base])
    if not jnp.issubdtype(base.dtype, jnp.floating):
        raise Refusal(f"a cast to {base.dtype}")
    return [w.replace(base=base)]


@rule("copy", "copy_p", "name", "sharding_constraint", "reshard", "optimization_barrier", "device_put")
def _on_base(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    outs = me.bind(eqn, [v.base if is_weight(v) else v for v in values])
    return [v.replace(base=o) if is_weight(v) else o for v, o in zip(values, outs, strict=True)]


@rule("stop_gradient")
def _stop(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    return [values[0].each(lax.stop_gradient)]


@rule("pvary", "pcast")
def _vary(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    (w,) = values
    (base,) = me.bind(eqn, [w.base])
    return [w.replace(base=base)]  # factors are made to vary where they meet an activation


@rule("transpose")
def _transpose(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    (w,) = values
    (base,) = me.bind(eqn, [w.base])
    return [w.transposed(base, eqn.params["permutation"])]


@rule("reshape", "squeeze", "expand_dims")
def _reshape(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    w, *sizes = values
    if sizes or eqn.params.get("dimensions") is not None and eqn.primitive.name == "reshape":
        raise Refusal("a reshape with dynamic sizes or an order of its own")
    (base,) = me.bind(eqn, [w.base])
    moved = w.reshaped(base)
    if moved is None:
        raise Refusal("a reshape across axes that labels cannot follow")
    return [moved]


@rule("broadcast_in_dim")
def _broadcast(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    w = values[0]
    dims = eqn.params["broadcast_dimensions"]
    (base,) = me.bind(eqn, [w.base, *values[1:]])
    grown = any(base.shape[d] != s for d, s in zip(dims, w.base.shape, strict=True))
    if grown or any(s != 1 for n, s in enumerate(base.shape) if n not in dims):
        raise Refusal("a broadcast")
    axes: list[Any] = [()] * base.ndim
    for n, d in enumerate(dims):
        axes[d] = w.axes[n]
    return [w.replace(base=base, axes=tuple(axes))]


@rule("mul", "div")
def _scalar(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    left = is_weight(values[0])
    w, c = values if left else values[::-1]
    if is_weight(c) or jnp.ndim(c) or (eqn.primitive.name == "div" and not left):
        raise Refusal("a product with an array")
    (base,) = me.bind(eqn, [w.base, c] if left else [c, w.base])
    return [w.scaled(base, 1 / c if eqn.primitive.name == "div" else c)]


@rule("neg")
def _neg(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    (w,) = values
    return [w.scaled(me.bind(eqn, [w.base])[0], jnp.asarray(-1, w.base.dtype))]


def _cut(w: Weight, base: jax.Array, cuts: Sequence[Callable[[jax.Array, int], jax.Array] | None]) -> list[Any]:
    """A slice of single-label axes."""
    for axis, cut in enumerate(cuts):
        if cut is None:
            continue
        if not w.axes[axis]:
            continue
        if len(w.axes[axis]) != 1:
            raise Refusal("a slice of joined axes")
        (atom,) = w.axes[axis]
        w = w.along(atom, w.base, cut, drop=False).resized(atom, base.shape[axis])
    return [w.replace(base=base)]


@rule("rev")
def _reverse(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    (w,) = values
    (base,) = me.bind(eqn, [w.base])
    flip = lambda a, m: lax.rev(a, (m,))
    return _cut(w, base, [flip if n in eqn.params["dimensions"] else None for n in range(base.ndim)])


@rule("slice")
def _slice(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    (w,) = values
    (base,) = me.bind(eqn, [w.base])
    start, stop = eqn.params["start_indices"], eqn.params["limit_indices"]
    steps = eqn.params["strides"] or (1,) * base.ndim
    cuts: list[Any] = [
        None if base.shape[n] == w.base.shape[n] else functools.partial(_static_cut, a=a, b=b, step=s)
        for n, (a, b, s) in enumerate(zip(start, stop, steps, strict=True))
    ]
    return _cut(w, base, cuts)


def _static_cut(array: jax.Array, n: int, *, a: int, b: int, step: int) -> jax.Array:
    return lax.slice_in_dim(array, a, b, step, axis=n)


@rule("dynamic_slice")
def _dynamic_slice(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    w, *starts = values
    if not is_weight(w) or any(map(is_weight, starts)) or len(starts) != w.base.ndim:
        raise Refusal("a dynamic slice in another form")
    (base,) = me.bind(eqn, [w.base, *starts])
    sizes = eqn.params["slice_sizes"]
    cuts: list[Any] = [
        None if size == w.base.shape[n] else lambda a, m, i=i, size=size: lax.dynamic_slice_in_dim(a, i, size, m)
        for n, (i, size) in enumerate(zip(starts, sizes, strict=True))
    ]
    for n, size in enumerate(sizes):
        if size == 1 != w.base.shape[n]:
            me.role(w, [n], "s")
    return _cut(w, base, cuts)


# --- operations that contract --------------------------------------------------------------------------------------


@rule("dot_general")
def _dot(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    lhs, rhs = values
    if is_weight(lhs) and is_weight(rhs):
        rhs = me.dense(rhs, eqn, "a product of two adapted weights")
    left = is_weight(lhs)
    w, x = (lhs, rhs) if left else (rhs, lhs)
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    contracted, batch = (lc, lb) if left else (rc, rb)
    me.role(w, contracted, "i")
    me.role(w, batch, "s")
    me.role(w, range(len(w.axes)), "o")
    if _ops.is_vector(w):
        return me.bind(eqn, me.arrays([lhs, rhs], eqn, "a vector"))
    if _ops.is_dense_delta(w):
        me.record(w, eqn.primitive.name, Use("dense delta", float(w.base.size), 0.0))
        dense = w.dense()
        return me.bind(eqn, [dense, rhs] if left else [lhs, dense])
    keep = ("precision", "preferred_element_type", "out_sharding")
    y = _ops.dot(
        w,
        x,
        left,
        eqn.params["dimension_numbers"],
        forward_mode=me.forward_mode,
        key=me.key(w),
        note=functools.partial(me.record, w, eqn.primitive.name),
        **{k: eqn.params.get(k) for k in keep},
    )
    return [y]


@rule("gather")
def _gather(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    w, indices = values
    if not is_weight(w) or is_weight(indices):
        raise Refusal("an index made of weights")
    picked = eqn.params["dimension_numbers"].start_index_map
    me.role(w, picked, "s" if indices.ndim == 1 else "i")
    if indices.ndim > 1:
        me.role(w, range(len(w.axes)), "o")
    if _ops.is_vector(w):
        raise Refusal("a vector")
    note = functools.partial(me.record, w, eqn.primitive.name)
    bind = lambda base: me.bind(eqn, [base, indices])[0]
    return [_ops.lookup(w, indices, eqn.params, bind, me.forward_mode, note)]


@rule("ragged_dot_general", "ragged_dot")
def _ragged(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    x, w, sizes, *more = values
    if not is_weight(w) or is_weight(x) or more or eqn.params.get("group_offset") is not None:
        raise Refusal("a ragged dot in another form")
    d = eqn.params["ragged_dot_dimension_numbers"]
    me.role(w, d.rhs_group_dimensions, "s")
    me.role(w, d.dot_dimension_numbers[0][1], "i")
    me.role(w, range(len(w.axes)), "o")
    note = functools.partial(me.record, w, eqn.primitive.name)
    return [_ops.ragged(w, x, sizes, eqn.params, lambda base: me.bind(eqn, [x, base, sizes])[0], note)]


@rule("conv_general_dilated")
def _conv(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    x, w = values
    if not is_weight(w) or is_weight(x):
        raise Refusal("a convolution with the weight as its input")
    out_axis, in_axis, *window = eqn.params["dimension_numbers"].rhs_spec
    me.role(w, [out_axis], "o")
    me.role(w, [in_axis], "i")
    me.role(w, window, "k")
    if w.plain and _ops.is_dense_delta(w):
        me.record(w, eqn.primitive.name, Use("dense delta", float(w.base.size), 0.0))
        return me.bind(eqn, [x, w.dense()])
    note = functools.partial(me.record, w, eqn.primitive.name)
    bind = lambda base: me.bind(eqn, [x, base])[0]
    return [_ops.conv(w, x, eqn.params, bind, me.forward_mode, me.key(w), note)]


# --- control flow --------------------------------------------------------------------------------------------------


def _forwarded(eqn: Any, values: list[Any], want: list[bool]) -> tuple[list[Any], list[bool]]:
    """Outputs that are inputs unchanged, as expressions; and which others must be computed."""
    inner = _inner(eqn) or [None] * len(want)
    outs = [values[k] if k is not None else None for k in inner]
    return outs, [w and k is None for w, k in zip(want, inner, strict=True)]


def _filled(outs: list[Any], compute: list[bool], results: Sequence[Any]) -> list[Any]:
    rest = iter(results)
    return [next(rest) if c else o for o, c in zip(outs, compute, strict=True)]


def _chosen(outs: Sequence[Any], compute: Sequence[bool]) -> list[Any]:
    return [o for o, c in zip(outs, compute, strict=True) if c]


@rule("jit", "pjit", "closed_call", "core_call")
def _jit(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    outs, compute = _forwarded(eqn, values, want)
    if not any(compute) and not eqn.effects:
        return outs
    jaxpr, consts = _open(eqn.params.get("jaxpr", eqn.params.get("call_jaxpr")))
    values = [me.entering(v) for v in values]
    if eqn.params.get("inline") is True:
        return _filled(outs, compute, _chosen(me.run(jaxpr, consts, values, compute), compute))
    # one function a jaxpr: blocks under nn.jit share it, and would be traced and compiled one by one without
    place = (id(jaxpr), tuple(compute))
    if place not in me.memo or me.watched:
        name = eqn.params.get("name", "call")

        def inner(*args: Any) -> list[Any]:
            return _chosen(me.run(jaxpr, consts, args, compute), compute)

        inner.__name__ = inner.__qualname__ = name
        me.memo[place] = (jax.jit(inner), jaxpr)  # the jaxpr is held so that its id stays its own
    return _filled(outs, compute, me.memo[place][0](*values))


@rule("remat2", "checkpoint", "remat")
def _checkpoint(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    outs, compute = _forwarded(eqn, values, want)
    if not any(compute) and not eqn.effects:
        return outs
    jaxpr, consts = _open(eqn.params["jaxpr"])

    def inner(*args: Any) -> list[Any]:
        return _chosen(me.run(jaxpr, consts, args, compute), compute)

    again = jax.checkpoint(inner, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    return _filled(outs, compute, again(*[me.entering(v) for v in values]))


@rule("scan")
def _scan(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    n_consts, n_carry = _scan_counts(eqn.params)
    length = eqn.params["length"]
    jaxpr, closed = _open(eqn.params["jaxpr"])
    outs, compute = _forwarded(eqn, values, want)
    hoisted = [k is not None for k in (_inner(eqn) or [])[:n_carry]]
    compute = [c if n >= n_carry else not hoisted[n] for n, c in enumerate(compute)]
    if not any(compute) and not eqn.effects:
        return outs
    values = [me.entering(v) for v in values]
    consts, carry, xs = (
        values[:n_consts],
        values[n_consts : n_consts + n_carry],
        values[n_consts + n_carry :],
    )
    init = me.arrays(_chosen(carry, [not h for h in hoisted]), eqn, "a loop carry that changes")
    sliced = [_Sliced(me, x, eqn) if is_weight(x) else None for x in xs]
    counted = any(is_weight(v) and v.key is not None for v in (*consts, *carry))

    def body(state: list[Any], x: Any) -> Any:
        turn, slices = x
        fold = lambda v: v.replace(key=_ops.fold(v.key, turn)) if is_weight(v) and v.key is not None else v
        rest = iter(state)
        carries = [fold(v) if h else next(rest) for v, h in zip(carry, hoisted, strict=True)]
        items = [s.rebuilt(x) if s else x for s, x in zip(sliced, slices, strict=True)]
        ys = me.run(jaxpr, closed, [*map(fold, consts), *carries, *items], compute)
        ys = [me.dense(y, eqn, "an output of the loop's body") for y in ys]
        return _chosen(ys[:n_carry], compute[:n_carry]), _chosen(ys[n_carry:], compute[n_carry:])

    slices = [s.arrays if s else x for s, x in zip(sliced, xs, strict=True)]
    turns = jnp.arange(length) if counted else None
    state, ys = lax.scan(
        body,
        init,
        (turns, slices),
        length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    return _filled(outs, compute, [*state, *ys])


class _Sliced:
    """A weight as the input of a scan: the arrays that carry its leading axis, and the rest, which are constants."""

    def __init__(self, me: Interpreter, w: Weight, eqn: Any):
        if len(w.axes[0]) != 1:
            raise Refusal("a scan over joined axes")
        (atom,) = w.axes[0]
        me.role(w, [0], "s")
        w = w.simplified(atom)
        axes: list[int | None] = []
        here = w.along(atom, w.base, lambda a, n: _Marked(a, n), drop=False)  # type: ignore[arg-type,return-value]
        leaves, _ = jax.tree.flatten(here, is_leaf=lambda x: isinstance(x, _Marked))
        base = jax.tree.leaves(w)[0]
        assert base is w.base
        self.fixed, self.arrays = [], []
        for n, leaf in enumerate(leaves):
            axis = 0 if n == 0 else leaf.axis if isinstance(leaf, _Marked) else None
            axes.append(axis)
            array = leaf.array if isinstance(leaf, _Marked) else leaf
            if axis is None:
                self.fixed.append(array)
            else:
                self.arrays.append(jnp.moveaxis(array, axis, 0))
        self.axes = axes
        rest = lambda a, n: jax.ShapeDtypeStruct(a.shape[:n] + a.shape[n + 1 :], a.dtype)
        inner = w.along(atom, rest(w.base, 0), rest, drop=True)  # type: ignore[arg-type]
        self.treedef = jax.tree.structure(inner.replace(axes=w.axes[1:]))

    def rebuilt(self, slices: Sequence[Any]) -> Weight:
        fixed, moving = iter(self.fixed), iter(slices)
        return jax.tree.unflatten(self.treedef, [next(fixed) if n is None else next(moving) for n in self.axes])


@dataclasses.dataclass
class _Marked:
    array: Any
    axis: int


@rule("while")
def _while(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    values = [me.entering(v) for v in values]
    cond_consts, body_consts, carry = (
        values[:n_cond],
        values[n_cond : n_cond + n_body],
        values[n_cond + n_body :],
    )
    inner = _inner(eqn) or []
    hoisted = [k is not None for k in inner]
    moving = [not h for h in hoisted]
    outs = [v if h else None for v, h in zip(carry, hoisted, strict=True)]
    init = me.arrays(_chosen(carry, moving), eqn, "a loop carry that changes")
    cond, cond_closed = _open(p["cond_jaxpr"])
    body, body_closed = _open(p["body_jaxpr"])

    def carries(state: Sequence[Any]) -> list[Any]:
        rest = iter(state)
        return [v if h else next(rest) for v, h in zip(carry, hoisted, strict=True)]

    def go_on(state: Any) -> Any:
        (more,) = me.run(cond, cond_closed, [*cond_consts, *carries(state[1])], [True])
        return more

    def step(state: Any) -> Any:
        turn, state = state
        fold = lambda v: v.replace(key=_ops.fold(v.key, turn)) if is_weight(v) and v.key is not None else v
        args = [*map(fold, body_consts), *map(fold, carries(state))]
        new = _chosen(me.run(body, body_closed, args, moving), moving)
        return (None if turn is None else turn + 1), me.arrays(new, eqn, "an output of the loop's body")

    counted = any(is_weight(v) and v.key is not None for v in (*body_consts, *carry))
    _, state = lax.while_loop(go_on, step, (jnp.zeros((), jnp.int32) if counted else None, init))
    return _filled(outs, moving, state)


@rule("cond")
def _cond(me: Interpreter, eqn: Any, values: list[Any], want: list[bool]) -> list[Any]:
    outs, compute = _forwarded(eqn, values, want)
    if not any(compute) and not eqn.effects:
        return outs
    index, *operands = values
    if is_weight(index):
        raise Refusal("a branch chosen by a weight")
    branches = []
    for branch in eqn.params["branches"]:
        jaxpr, consts = _open(branch)

        def inner(*args: Any, jaxpr: Any = jaxpr, consts: Any = consts) -> list[Any]:
            ys = _chosen(me.run(jaxpr, consts, args, compute), compute)
            return [jnp.asarray(y) for y in me.arrays(ys, eqn, "an output of a branch")]

        branches.append(inner)
    return _filled(outs, compute, lax.switch(index, branches, *[me.entering(v) for v in operands]))


# --- a call --------------------------------------------------------------------------------------------------------


def call(
    fn: Callable[..., Any],
    found: list[Adapted],
    fill: Callable[[list[Any]], tuple[Any, Any]],
    *,
    forward_mode: bool = False,
    me: Interpreter | None = None,
) -> Any:
    """`fn` on a call's arguments, with expressions where the Adapteds' weights stand."""
    me = me or Interpreter(forward_mode)
    leaves = [jax.tree.leaves(a.frozen.base) for a in found]
    bases = [jnp.asarray(leaves[k][s.index]) for k, a in enumerate(found) for s in a.frozen.plan.sites]
    beside: list[Any] = []

    def traced(*arrays: jax.Array) -> list[Any]:
        rest = iter(arrays)
        trees = [_merge.replaced(a, [next(rest) for _ in a.frozen.plan.sites]) for a in found]
        args, kwargs = fill(trees)
        outs, treedef = jax.tree.flatten(fn(*args, **kwargs))
        inside = [isinstance(o, jax.Array) for o in outs]
        beside[:] = [treedef, inside, [None if i else o for o, i in zip(outs, inside, strict=True)]]
        return _chosen(outs, inside)

    closed = jax.make_jaxpr(traced)(*bases)
    many = len(found) > 1
    expressions: list[Weight] = []
    for k, a in enumerate(found):
        get = _merge.lookup(a)
        for n, s in enumerate(a.frozen.plan.sites):
            key = a.frozen.key
            if key is not None:
                key = jax.random.fold_in(key, n)
            path = (f"{k}:{s.leaf.path}" if many else s.leaf.path) if me.watched else None
            base = bases[len(expressions)]
            expressions.append(weight(s.leaf, s.recipe, base, get, key=key, path=path))
    outs = me.run(closed.jaxpr, closed.consts, expressions, [True] * len(closed.jaxpr.outvars))
    treedef, inside, others = beside
    results = iter(me.dense(o, "output", "returned by the function") for o in outs)
    filled = [jnp.asarray(next(results)) if i else o for i, o in zip(inside, others, strict=True)]
    return jax.tree.unflatten(treedef, filled)
