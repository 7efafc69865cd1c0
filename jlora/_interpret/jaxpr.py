"""Reading jaxprs: the one place that knows how their parameters differ between JAX releases."""

import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.extend import core

from jlora._forward._ops import Refusal


def bind_params(eqn: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`get_bind_params` gave a pair, and gives a dict for some primitives."""
    got = eqn.primitive.get_bind_params(eqn.params)
    return got if isinstance(got, tuple) else ((), got)


def scan_counts(params: dict[str, Any]) -> tuple[int, int]:
    """(constants, carries): two numbers until 0.10, two trees since."""
    if "num_consts" in params:
        return params["num_consts"], params["num_carry"]
    if "ft_in" in params:
        consts, carry, _ = params["ft_in"].unpack()
        return len(consts), len(carry)
    raise Refusal("a scan in a form this version of jlora does not know")


def open_jaxpr(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    """(jaxpr, constants) of a closed or an open jaxpr."""
    return (jaxpr.jaxpr, jaxpr.consts) if isinstance(jaxpr, core.ClosedJaxpr) else (jaxpr, ())


_SKIP = tuple(os.path.join(*p) for p in (("site-packages", ""), ("jlora", "")))


def source(eqn: Any) -> str:
    """`file:line` of the user's code that made an equation."""
    traceback = getattr(eqn.source_info, "traceback", None)
    for frame in getattr(traceback, "frames", ()):
        name = frame.file_name
        if not any(s in name for s in _SKIP) and not name.startswith("<"):
            return f"{os.path.basename(name)}:{frame.line_num}"
    return ""


CALLS = ("jit", "pjit", "closed_call", "core_call")
CHECKPOINTS = ("remat2", "checkpoint", "remat")


def unchanged(eqn: Any) -> "list[int | None] | None":
    """For each output of an equation with a sub-jaxpr, the input that it is, unchanged, if any."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS + CHECKPOINTS:
        jaxpr = params.get("jaxpr", params.get("call_jaxpr"))
        return forwards(open_jaxpr(jaxpr)[0])
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


def forwards(jaxpr: Any) -> list[int | None]:
    """For each output of a jaxpr, the number of the input that it is, unchanged, or None."""
    origin = {v: n for n, v in enumerate(jaxpr.invars)}
    for eqn in jaxpr.eqns:
        for out, k in zip(eqn.outvars, unchanged(eqn) or (), strict=False):
            if k is not None and not isinstance(eqn.invars[k], core.Literal) and eqn.invars[k] in origin:
                origin[out] = origin[eqn.invars[k]]
    return [None if isinstance(v, core.Literal) else origin.get(v) for v in jaxpr.outvars]


def arguments(fn: Callable[..., Sequence[Any]], *args: Any) -> list[int | None]:
    """For each array that `fn` returns, the number of the argument that it is, unchanged, or None; of shapes."""
    return forwards(jax.make_jaxpr(fn)(*args).jaxpr)


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
