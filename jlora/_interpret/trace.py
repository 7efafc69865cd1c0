"""A call of a function of parameters, traced for what it says of their axes."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence

import flax.linen as nn
import jax
import numpy as np

from jlora._interpret import roles
from jlora._trees import _axes, _tree
from jlora._types import PyTree


def _is_input(x: PyTree) -> bool:
    return isinstance(x, (jax.Array, jax.ShapeDtypeStruct, np.ndarray))


def _unwrapped(fn: Callable[..., PyTree]) -> Callable[..., PyTree]:
    """The method of a module below `jax.jit`, `functools.partial` and whatever else says what it wraps."""
    while not isinstance(getattr(fn, "__self__", None), nn.Module):
        inner = fn.func if isinstance(fn, functools.partial) else getattr(fn, "__wrapped__", None)
        if inner is None:
            break
        fn = inner
    return fn


def axes(
    fn: Callable[..., PyTree], params: PyTree, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]
) -> dict[str, str]:
    """`{path: letters}` of every parameter that a call of `fn` says the axes of; see `uses`."""
    return {path: letters for path, (_, letters) in uses(fn, params, args, kwargs).items() if letters}


def uses(
    fn: Callable[..., PyTree], params: PyTree, args: Sequence[PyTree], kwargs: Mapping[str, PyTree]
) -> dict[str, tuple[str, str]]:
    """`{path: (use, letters)}` of every parameter that a call of `fn` uses, by its first use in the order of
    `views.KINDS`; no letters where it does not tell. Nothing is computed.

    Where `params` itself, the very object, stands somewhere in `args` or `kwargs`, the call is `fn(*args, **kwargs)`;
    else it is `fn(params, *args, **kwargs)`. The `apply` of a Linen module takes parameters alone for its variables.
    """
    tree = _tree.flatten(params)
    ours = [n for n, leaf in enumerate(tree.leaves) if _axes.is_trainable_dtype(_tree.shape_dtype(leaf)[1])]
    own = lambda x: x is params
    slots, form = jax.tree.flatten((tuple(args), dict(kwargs)), is_leaf=own)
    inside = any(map(own, slots))
    inner = _unwrapped(fn)
    model = getattr(inner, "__self__", None)
    wrap = isinstance(model, nn.Module) and inner.__name__ == "apply" and not (_has(params, "params"))
    places = [n for n, x in enumerate(slots) if not own(x) and _is_input(x)]

    def call(leaves: list[PyTree], others: list[PyTree]) -> PyTree:
        every = list(tree.leaves)
        for n, leaf in zip(ours, leaves, strict=True):
            every[n] = leaf
        now = jax.tree.unflatten(tree.treedef, every)
        filled = [now if own(x) else x for x in slots]
        for n, x in zip(places, others, strict=True):
            filled[n] = x
        a, k = jax.tree.unflatten(form, filled)
        try:
            return fn(*a, **k) if inside else fn({"params": now} if wrap else now, *a, **k)
        except Exception as error:
            made = "" if inside else '{"params": params}, ' if wrap else "params, "
            raise ValueError(_failed(fn, f"fn({made}*args, **kwargs)", bool(slots), error)) from error

    found = roles.traced(call, [tree.leaves[n] for n in ours], [slots[n] for n in places])
    paths = [tree.paths[n] for n in ours]
    read = {path: roles.decided(seen) or "" for path, seen in zip(paths, found, strict=True)}
    letters = _axes.members(tree, read)
    return {path: (roles.first(seen), letters[path]) for path, seen in zip(paths, found, strict=True)}


def given(caller: str, fn: PyTree, params: PyTree, args: PyTree, kwargs: PyTree) -> dict[str, tuple[str, str]]:
    """`uses` of what a user gave, checked."""
    if fn is None:
        raise TypeError(f"{caller}(args=..., kwargs=...) are the arguments of fn=, which is not given")
    if not callable(fn) or not isinstance(args, (tuple, list)) or not isinstance(kwargs, Mapping):
        raise TypeError(
            f"{caller}(fn=..., args=(x,)) takes a function and its other arguments in a tuple, not {fn!r:.100} and "
            f"{type(args).__name__}"
        )
    return uses(fn, params, args, kwargs)


def _failed(fn: Callable[..., PyTree], call: str, given: bool, error: Exception) -> str:
    """What to write where the model's own call fails."""
    model = fn if isinstance(fn, nn.Module) else getattr(_unwrapped(fn), "__self__", None)
    hints = [] if given else ["args=() has no input of the model: write args=(x,), an array or a ShapeDtypeStruct"]
    if isinstance(model, nn.Module):
        hints += [] if getattr(_unwrapped(fn), "__name__", "") == "apply" else ["the function is fn=model.apply"]
        hints += [
            'collections beside the parameters go with them, args=({"params": params, "batch_stats": batch_stats}, x)',
            'keys and other arguments are kwargs={"rngs": {"dropout": key}, "mutable": ["batch_stats"]}',
        ]
    hints += ["without fn=, axes={pattern: letters} says the same"]
    return (
        f"the call {call}, traced to see which axes of the weights are input and output, failed with "
        f"{type(error).__name__}: {str(error)[:300].rstrip('.')}. It has to run as it stands: " + "; ".join(hints)
    )


def _has(params: PyTree, name: str) -> bool:
    return isinstance(params, Mapping) and name in params
