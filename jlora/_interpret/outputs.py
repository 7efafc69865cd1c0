"""Weights with steps on their output: the operation as it is without, then the steps; and inputs that steps read."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax
from jax import lax

from jlora._algebra._term import NoArray
from jlora._algebra._weight import Weight, is_weight
from jlora._algebra._words import Labels
from jlora._forward import _step
from jlora._forward._ops import Refusal, Spent
from jlora._interpret import contractions
from jlora._interpret.jaxpr import Eqn, Evaluated, Outputs, Rule, aval

if TYPE_CHECKING:
    from jlora._interpret import Interpreter

Groups: TypeAlias = Sequence[Labels | None]
Input: TypeAlias = tuple[
    jax.Array, Sequence[int], Sequence[int]
]  # an activation, its contracted axes, those of a stack
Read: TypeAlias = tuple[Groups, Input | None]
Reading: TypeAlias = Callable[[Eqn, Weight, bool, Sequence[jax.Array]], Read | None]
"""What an operation does with a weight, its first operand or not, and with its other operands."""


def _of_dot(eqn: Eqn, w: Weight, first: bool, others: Sequence[jax.Array]) -> Read:
    (lc, rc), (lb, rb) = eqn.params["dimension_numbers"]
    (wc, wb), (xc, xb) = ((lc, lb), (rc, rb)) if first else ((rc, rb), (lc, lb))
    (x,) = others
    free = [g for n, g in enumerate(w.axes) if n not in (*wc, *wb)]
    own = [None] * (len(x.shape) - len(xc) - len(xb))
    stack = [n for _, n in sorted(zip((w.axes[n] for n in wb), xb, strict=True))]  # as the weight has them
    return [*(w.axes[n] for n in wb), *((*free, *own) if first else (*own, *free))], (x, xc, stack)


def _of_convolution(eqn: Eqn, w: Weight, first: bool, others: Sequence[jax.Array]) -> Read:
    numbers = eqn.params["dimension_numbers"]
    groups: list[Labels | None] = [None] * len(numbers.out_spec)
    groups[numbers.out_spec[1]] = w.axes[numbers.rhs_spec[0]]
    return groups, (others[0], (numbers.lhs_spec[1],), ())


def _of_gather(eqn: Eqn, w: Weight, first: bool, others: Sequence[jax.Array]) -> Read | None:
    numbers = eqn.params["dimension_numbers"]
    taken = [n for n in numbers.start_index_map if w.axes[n] and w.axes[n][0][0] == "s"]
    if taken and others[0].ndim == 1:
        return None  # a layer of a stack: still a weight, and its steps go along
    if taken:
        raise NoArray(f"{w.named}: a step on its output, and the model takes several layers of a stack at once")
    rest = iter(g for n, g in enumerate(w.axes) if n not in numbers.collapsed_slice_dims)
    count = len(aval(eqn.outvars[0]).shape)
    ids = lax.squeeze(others[0], [others[0].ndim - 1]) if others[0].shape[-1] == 1 else None
    met = None if ids is None else (ids, (), ())
    return [next(rest) if n in numbers.offset_dims else None for n in range(count)], met


def _of_ragged(eqn: Eqn, w: Weight, first: bool, others: Sequence[jax.Array]) -> Read:
    d = eqn.params["ragged_dot_dimension_numbers"]
    (_, contracted), _ = d.dot_dimension_numbers
    (out,) = (n for n in range(len(w.axes)) if n not in (*contracted, *d.rhs_group_dimensions))
    return [None, w.axes[out]], (others[0], (1,), ())


def _of_sum(eqn: Eqn, w: Weight, first: bool, others: Sequence[jax.Array]) -> Read:
    return w.axes, None


def _summed(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
    raise Refusal(f"{eqn.primitive.name} has no rule")


def _is_derivative(eqn: Eqn) -> bool:
    """Whether `grad`, `jvp` and their kin made an operation: JAX writes that into its name."""
    name = str(eqn.source_info.name_stack)
    return "jvp(" in name or "transpose(" in name


def _then(rule: Rule, reading: Reading) -> Rule:
    """A rule, and the steps of its weight on what it makes."""

    def stepping(me: Interpreter, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
        marked = [v for v in values if is_weight(v) and (v.steps or v.is_read)]
        if not marked:
            return rule(me, eqn, values, want)
        w = marked[0]
        if any(_is_derivative(e) for e in (*me.around, eqn)):
            raise NoArray(
                f"{w.named}: a derivative that is taken inside the lifted function does not see the step on this "
                "weight's output. Take it outside, of jlora.lift(fn), or leave the weight to no such method "
                "(exclude=...)"
            )
        at = next(n for n, v in enumerate(values) if v is w)
        others = [me.dense(v, eqn, "an operation on two weights") for n, v in enumerate(values) if n != at]
        if (read := reading(eqn, w, at == 0, others)) is None:
            return rule(me, eqn, values, want)
        groups, met = read
        bare = w.replace(steps=(), reads=(), is_read=False)
        plain = bare.plain and not bare.terms and not bare.gain and not bare.rows and bare.lazy is None
        operands = [*others[:at], bare.w0() if plain else bare, *others[at:]]
        (made,) = me.equation(eqn, operands, want)
        if w.is_read and met is not None:
            _keep(me.inputs, w, *met)
            me.record(w, eqn.primitive.name, Spent("its input is read by a step", 0.0, 0.0))
        if not w.steps or made is None:
            return [made]
        y = me.dense(made, eqn, "a step on it")
        parameters = sum(math.prod(a.shape) for o in w.steps for a in o.arrays)
        rows = math.prod(y.shape) / math.prod(w.size[a] for g in groups for a in g or ())
        me.record(w, eqn.primitive.name, Spent("a step on the output", 2.0 * parameters * rows, 0.0))
        return [_step.applied(w, y, groups, me.inputs)]

    return stepping


def _keep(inputs: dict[int, _step.Met], w: Weight, x: jax.Array, features: Sequence[int], stack: Sequence[int]) -> None:
    """What a weight met, for the steps that read it: a second input before any of them would take the first's place."""
    flat, before = _step.features_last(x, features, stack), inputs.get(w.origin)
    inputs[w.origin] = _step.Met(flat, x=x) if before is None else before.after(flat, x)


_SUMS = {"add": _summed, "add_any": _summed}
READ = {
    "dot_general": _of_dot,
    "conv_general_dilated": _of_convolution,
    "gather": _of_gather,
    "ragged_dot": _of_ragged,
    "ragged_dot_general": _of_ragged,
    "add": _of_sum,
    "add_any": _of_sum,
}
RULES = {name: _then(rule, READ[name]) for name, rule in {**contractions.RULES, **_SUMS}.items()}
