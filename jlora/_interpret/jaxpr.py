"""Reading jaxprs: the one place that knows how their parameters differ between JAX releases."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, cast

import jax
from jax.extend import core

from jlora._algebra._weight import Weight, is_weight
from jlora._forward._ops import Refusal
from jlora._types import PyTree, Shaped

if TYPE_CHECKING:
    from jlora._interpret import Interpreter

Eqn: TypeAlias = core.JaxprEqn

Params: TypeAlias = Mapping[str, PyTree]
"""What a primitive was bound with: of each name another type, and JAX says none of them."""

Evaluated: TypeAlias = jax.Array | Weight
"""What a variable holds: an array, or the expression that stands for one."""

Outputs: TypeAlias = Sequence[Evaluated | None]
"""Of an equation or a jaxpr; one that nobody asked for may be None."""

Rule: TypeAlias = "Callable[[Interpreter, Eqn, list[Evaluated], list[bool]], Outputs]"
"""What is done with an equation that has an expression among its operands, and which of its outputs are wanted."""


def aval(v: core.Var | core.Literal) -> Shaped:
    """The shape and the dtype of a variable that is an array."""
    return cast(Shaped, v.aval)  # by JAX an `AbstractValue`, which a token is too


def expression(value: Evaluated) -> Weight:
    """An operand that can be nothing else, as a rule is asked only where there is one."""
    assert is_weight(value)
    return value


def chosen(outs: Outputs, compute: Sequence[bool]) -> list[Evaluated]:
    """Those that were asked for, and are there therefore."""
    return [o for o, c in zip(outs, compute, strict=True) if c and o is not None]


def bind_params(eqn: Eqn) -> tuple[Sequence[Callable[..., PyTree]], Params]:
    """`get_bind_params` gave a pair, and gives a dict for some primitives."""
    got = eqn.primitive.get_bind_params(eqn.params)
    return got if isinstance(got, tuple) else ((), got)


def scan_counts(params: Params) -> tuple[int, int]:
    """(constants, carries): two numbers until 0.10, two trees since."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    raise Refusal("a scan in a form this version of jlora does not know")


def open_jaxpr(jaxpr: core.Jaxpr | core.ClosedJaxpr) -> tuple[core.Jaxpr, Sequence[jax.Array]]:
    """(jaxpr, constants) of a closed or an open jaxpr."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


def called(eqn: Eqn) -> tuple[core.Jaxpr, Sequence[jax.Array]]:
    """(jaxpr, constants) of an equation that calls one."""
    return open_jaxpr(eqn.params["jaxpr"] if "jaxpr" in eqn.params else eqn.params["call_jaxpr"])


_SKIP = tuple(os.path.join(*p) for p in (("site-packages", ""), ("jlora", "")))


def source(eqn: Eqn) -> str:
    """`file:line` of the user's code that made an equation."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        name = frame.file_name
        if not any(s in name for s in _SKIP) and not name.startswith("<"):
            return f"{os.path.basename(name)}:{frame.line_num}"
    return ""


CALLS = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("remat2", "checkpoint", "remat")


def unchanged(eqn: Eqn) -> list[int | None] | None:
    """For each output of an equation with a sub-jaxpr, the input that it is, unchanged, if any."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS + CHECKPOINTS:
        return forwards(called(eqn)[0])
    if name == "scan":
        consts, carry = scan_counts(params)
        body = forwards(open_jaxpr(params["jaxpr"])[0])
        return [
            k if k is not None and (k == consts + n if n < carry else k >= consts + carry) else None
            for n, k in enumerate(body)
        ]
    if name == "while":
        skip = params["cond_nconsts"]
        consts = params["body_nconsts"]
        body = forwards(open_jaxpr(params["body_jaxpr"])[0])
        return [skip + k if k == consts + n else None for n, k in enumerate(body)]
    if name == "cond":
        branches = [forwards(open_jaxpr(b)[0]) for b in params["branches"]]
        return [ks[0] + 1 if ks[0] is not None and len(set(ks)) == 1 else None for ks in zip(*branches, strict=True)]
    return None


def forwards(jaxpr: core.Jaxpr) -> list[int | None]:
    """For each output of a jaxpr, the number of the input that it is, unchanged, or None."""
    origin = {v: n for n, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, k in zip(eqn.outvars, unchanged(eqn) or (), strict=False):
            v = None if k is None else eqn.invars[k]
            if isinstance(v, core.Var) and v in origin:
                origin[out] = origin[v]
    return [None if isinstance(v, core.Literal) else origin.get(v) for v in jaxpr.outvars]


def arguments(fn: Callable[..., Sequence[PyTree]], *args: PyTree) -> list[int | None]:
    """For each array that `fn` returns, the number of the argument that it is, unchanged, or None; of shapes."""
    return forwards(jax.make_jaxpr(fn)(*args).jaxpr)


def live(jaxpr: core.Jaxpr, want: Sequence[bool]) -> tuple[list[bool], set[core.Var]]:
    """Which equations the wanted outputs (and effects) need, and which variables are read."""
    needed = {v for v, w in zip(jaxpr.outvars, want, strict=True) if w and not isinstance(v, core.Literal)}
    keep = [False] * len(jaxpr.eqns)
    for n in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[n]
        if eqn.effects or any(v in needed for v in eqn.outvars):
            keep[n] = True
            needed.update(v for v in eqn.invars if not isinstance(v, core.Literal))
    return keep, needed
