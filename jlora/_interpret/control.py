"""Control flow, rebuilt with JAX's public functions around the evaluated sub-jaxprs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from jlora._algebra._weight import Weight, is_weight
from jlora._forward._dropout import fold_keys
from jlora._forward._ops import Refusal
from jlora._interpret.jaxpr import (
    CALLS,
    CHECKPOINTS,
    Eqn,
    Evaluated,
    Outputs,
    Rule,
    called,
    chosen,
    open_jaxpr,
    scan_counts,
    unchanged,
)

if TYPE_CHECKING:
    from jlora._interpret import Along, Counted, Interpreter, Moments

State: TypeAlias = "tuple[Counted, list[jax.Array]]"
"""What a loop hands on: the numbers of the next uses, and what it computes."""


def _forwarded(eqn: Eqn, values: Sequence[Evaluated], want: list[bool]) -> tuple[Outputs, list[bool]]:
    """Outputs that are inputs unchanged, as expressions; and which others must be computed."""
    inner = unchanged(eqn) or [None] * len(want)
    outs = [values[k] if k is not None else None for k in inner]
    return outs, [w and k is None for w, k in zip(want, inner, strict=True)]


def _filled(outs: Outputs, compute: list[bool], results: Sequence[Evaluated]) -> Outputs:
    """All outputs of an equation: those that were forwarded, and those that `compute` says were computed."""
    rest = iter(results)
    return [next(rest) if c else o for o, c in zip(outs, compute, strict=True)]


def _jit(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    outs, compute = _forwarded(eqn, values, want)
    if not any(compute) and not eqn.effects:
        return outs
    jaxpr, consts = called(eqn)
    if eqn.params.get("inline") is True:
        return _filled(outs, compute, chosen(me.run(jaxpr, consts, values, compute), compute))
    values, along, origins = me.entering(values)
    # One jitted function for each jaxpr. Equal blocks under `nn.jit` have the same jaxpr; they would be traced and
    # compiled one by one if each call made its own function.
    place = (id(jaxpr), tuple(compute))
    if place not in me.memo or me.watched:
        name = eqn.params.get("name", "call")

        def inner(along: Along, *args: Evaluated) -> tuple[list[Evaluated], Moments, Along]:
            return me.apart(along, lambda: chosen(me.run(jaxpr, consts, args, compute), compute))

        inner.__name__ = inner.__qualname__ = name
        me.memo[place] = (jax.jit(inner), jaxpr)  # holds the jaxpr, so that no other gets its id
    results, seen, along = me.memo[place][0](along, *values)
    me.seen(seen)
    return _filled(outs, compute, me.left(results, along, origins))


def _checkpoint(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    outs, compute = _forwarded(eqn, values, want)
    if not any(compute) and not eqn.effects:
        return outs
    jaxpr, consts = open_jaxpr(eqn.params["jaxpr"])

    def inner(along: Along, *args: Evaluated) -> tuple[list[Evaluated], Moments, Along]:
        return me.apart(along, lambda: chosen(me.run(jaxpr, consts, args, compute), compute))

    values, along, origins = me.entering(values)
    again = jax.checkpoint(inner, prevent_cse=eqn.params["prevent_cse"], policy=eqn.params["policy"])
    results, seen, along = again(along, *values)
    me.seen(seen)
    return _filled(outs, compute, me.left(results, along, origins))


def _scan(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    n_consts, n_carry = scan_counts(eqn.params)
    length = eqn.params["length"]
    jaxpr, closed = open_jaxpr(eqn.params["jaxpr"])
    outs, compute = _forwarded(eqn, values, want)
    hoisted = [k is not None for k in (unchanged(eqn) or [])[:n_carry]]
    compute = [c if n >= n_carry else not hoisted[n] for n, c in enumerate(compute)]
    if not any(compute) and not eqn.effects:
        return outs
    values, along, origins = me.entering(values, again=True)
    consts, carry, xs = (
        values[:n_consts],
        values[n_consts : n_consts + n_carry],
        values[n_consts + n_carry :],
    )
    init = me.arrays(chosen(carry, [not h for h in hoisted]), eqn, "a loop carry that changes")
    sliced = [_Sliced(x) if is_weight(x) else x for x in xs]

    def body(state: State, slices: list[list[jax.Array]]) -> tuple[State, tuple[list[jax.Array], Moments]]:
        numbers, now = state
        rest = iter(now)
        carries = [v if h else next(rest) for v, h in zip(carry, hoisted, strict=True)]
        items = [s.rebuilt(x) if isinstance(s, _Sliced) else x[0] for s, x in zip(sliced, slices, strict=True)]
        args = [*consts, *carries, *items]
        before = along._replace(numbers=numbers)
        made, seen, after = me.apart(before, lambda: chosen(me.run(jaxpr, closed, args, compute), compute))
        ys = me.arrays(made, eqn, "an output of the loop's body")
        return (after.numbers, ys[:moving]), (ys[moving:], seen)

    moving = sum(compute[:n_carry])
    slices = [s.arrays if isinstance(s, _Sliced) else [s] for s in sliced]
    (numbers, state), (ys, seen) = lax.scan(
        body,
        (along.numbers, init),
        slices,
        length,
        reverse=eqn.params["reverse"],
        unroll=eqn.params["unroll"],
    )
    if seen:  # X^T X of what a scan slices: one matrix a turn; of a constant of the scan: their sum
        atoms = {x.path: x.axes[0] for x in xs if is_weight(x)}
        total = lambda made: jax.tree.map(lambda a: a.sum(0), made)
        stack = lambda made, atom: dataclasses.replace(made, labels=atom + made.labels)
        me.seen({p: stack(made, atoms[p]) if p in atoms else total(made) for p, made in seen.items()})
    return _filled(outs, compute, me.left([*state, *ys], along._replace(numbers=numbers), origins))


class _Sliced:
    """A weight as the input of a scan: the arrays that carry its leading axis, and the rest, which are constants."""

    def __init__(self, w: Weight):
        if len(w.axes[0]) != 1:
            raise Refusal("a scan over joined axes")
        (atom,) = w.axes[0]
        w = w.simplified(atom)
        axes: list[int | None] = []
        if w.lazy is not None and not w.lazy.can(atom, drop=True):
            w = w.solid()
        here = w.along(atom, _Marked(w.base, 0), lambda a, n: _Marked(a, n), drop=False)  # type: ignore[arg-type,return-value]
        leaves, _ = jax.tree.flatten(here, is_leaf=lambda x: isinstance(x, _Marked))
        self.fixed: list[jax.Array] = []
        self.arrays: list[jax.Array] = []
        for leaf in leaves:
            axis = leaf.axis if isinstance(leaf, _Marked) else None
            axes.append(axis)
            array = leaf.array if isinstance(leaf, _Marked) else leaf
            if axis is None:
                self.fixed.append(array)
            else:
                self.arrays.append(jnp.moveaxis(array, axis, 0))
        self.axes = axes
        rest = lambda a, n: jax.ShapeDtypeStruct(a.shape[:n] + a.shape[n + 1 :], a.dtype)
        inner = w.along(atom, None if w.lazy else rest(w.base, 0), rest, drop=True)  # type: ignore[arg-type]
        self.treedef = jax.tree.structure(inner.replace(axes=w.axes[1:]))

    def rebuilt(self, slices: Sequence[jax.Array]) -> Weight:
        fixed, moving = iter(self.fixed), iter(slices)
        return jax.tree.unflatten(self.treedef, [next(fixed) if n is None else next(moving) for n in self.axes])


@dataclasses.dataclass
class _Marked:
    array: jax.Array
    axis: int


def _while(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    p = eqn.params
    n_cond, n_body = p["cond_nconsts"], p["body_nconsts"]
    values, along, origins = me.entering(values, again=True)
    cond_consts, body_consts, carry = (
        values[:n_cond],
        values[n_cond : n_cond + n_body],
        values[n_cond + n_body :],
    )
    inner = unchanged(eqn) or []
    hoisted = [k is not None for k in inner]
    moving = [not h for h in hoisted]
    outs: Outputs = [v if h else None for v, h in zip(carry, hoisted, strict=True)]
    init = me.arrays(chosen(carry, moving), eqn, "a loop carry that changes")
    cond, cond_closed = open_jaxpr(p["cond_jaxpr"])
    body, body_closed = open_jaxpr(p["body_jaxpr"])

    def carries(state: Sequence[jax.Array]) -> list[Evaluated]:
        rest = iter(state)
        return [v if h else next(rest) for v, h in zip(carry, hoisted, strict=True)]

    # Uses are not counted in the condition, as its counts could not leave it. It has dropout keys of its own instead.
    def other(v: Evaluated) -> Evaluated:
        return v.replace(key=fold_keys(v.key, 2**31 - 1)) if is_weight(v) and v.key is not None else v

    def go_on(state: State) -> jax.Array:
        numbers, now = state
        args = [*map(other, cond_consts), *map(other, carries(now))]
        before = along._replace(numbers=numbers)
        (more,), *_ = me.apart(before, lambda: chosen(me.run(cond, cond_closed, args, [True]), [True]))
        return me.dense(more, eqn, "the condition of a loop")

    def step(state: State) -> State:
        numbers, now = state
        args = [*body_consts, *carries(now)]
        before = along._replace(numbers=numbers)
        new, _, after = me.apart(before, lambda: chosen(me.run(body, body_closed, args, moving), moving))
        return after.numbers, me.arrays(new, eqn, "an output of the loop's body")

    numbers, state = lax.while_loop(go_on, step, (along.numbers, init))
    return _filled(outs, moving, me.left(state, along._replace(numbers=numbers), origins))


def _cond(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    outs, compute = _forwarded(eqn, values, want)
    if not any(compute) and not eqn.effects:
        return outs
    if is_weight(values[0]):
        raise Refusal("a branch chosen by a weight")
    (index, *operands), along, origins = me.entering(values, again=True)
    branches = []
    for branch in eqn.params["branches"]:
        jaxpr, consts = open_jaxpr(branch)

        def inner(
            numbers: Counted, *args: Evaluated, jaxpr: core.Jaxpr = jaxpr, consts: Sequence[jax.Array] = consts
        ) -> tuple[list[jax.Array], Counted]:
            before = along._replace(numbers=numbers)
            ys, _, after = me.apart(before, lambda: chosen(me.run(jaxpr, consts, args, compute), compute))
            return [jnp.asarray(y) for y in me.arrays(ys, eqn, "an output of a branch")], after.numbers

        branches.append(inner)
    results, numbers = lax.switch(index, branches, along.numbers, *operands)
    return _filled(outs, compute, me.left(results, along._replace(numbers=numbers), origins))


RULES: Mapping[str, Rule] = {
    **dict.fromkeys(CALLS, _jit),
    **dict.fromkeys(CHECKPOINTS, _checkpoint),
    "scan": _scan,
    "while": _while,
    "cond": _cond,
}
