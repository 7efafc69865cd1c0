"""`lift`: the same function, for adapted parameters."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _answers, _gates, _merge, _read
from jlora._modules import check_stateless, watched
from jlora._plan import _fits
from jlora._trees import _tree
from jlora._trees._compound import Compound, is_compound
from jlora._types import Fill, PyTree, Value
from jlora.adapted import Adapted, is_adapted

if TYPE_CHECKING:
    from typing_extensions import TypeIs


def is_ours(x: object) -> "TypeIs[Adapted | Compound]":
    """Whether a leaf of a call's arguments stands for weights that are no arrays: an `Adapted`, or a quantised one."""
    return is_adapted(x) or is_compound(x)


def _holds(x: PyTree, wanted: Callable[[object], bool]) -> bool:
    try:
        return any(map(wanted, jax.tree.leaves(x, is_leaf=wanted)))
    except (TypeError, ValueError):  # no pytree that JAX can sort: nothing of ours inside
        return False


def _still(x: Value) -> Value:
    """Stops gradients at an array; anything else passes."""
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jnp.inexact):
        return lax.stop_gradient(x)
    return x


def _stopped(adapted: Adapted) -> Adapted:
    """An adapter whose frozen half gets no gradient, but the gates: a router may be trained through them."""
    still = jax.tree.map(_still, adapted.frozen)
    return Adapted(adapted.trainable, dataclasses.replace(still, gates=adapted.frozen.gates))


def as_adapters(found: Sequence[Adapted | Compound], paths: Sequence[str]) -> list[Adapted]:
    """What `find` found, as adapters: a quantised leaf that stands alone is one under the path that it was found at."""
    for x in found:
        if is_adapted(x):
            _fits.check_one("a lifted function", x.frozen.plan, x.trainable, x.frozen.factors)
            _gates.check_given("a lifted function", x)
    return [_read.completed(x, path or "a quantised weight") for x, path in zip(found, paths, strict=True)]


def find(
    args: Sequence[PyTree], kwargs: Mapping[str, PyTree], wanted: Callable[[object], bool] = is_ours
) -> tuple[list[PyTree], list[str], Fill]:
    """The wanted leaves in a call's arguments, where in an argument each stands, and a function that puts others in
    their places.

    An argument without any is handed over as the very object it is: an NNX module must not be rebuilt.
    """
    found: list[PyTree] = []
    paths: list[str] = []

    def slot(x: PyTree) -> Callable[[Sequence[PyTree]], PyTree]:
        if not _holds(x, wanted):
            return lambda others: x
        pairs, treedef = jax.tree_util.tree_flatten_with_path(x, is_leaf=wanted)
        leaves = [leaf for _, leaf in pairs]
        places = {}
        for n, (steps, leaf) in enumerate(pairs):
            if wanted(leaf):
                places[n] = len(found)
                found.append(leaf)
                paths.append(_tree.spelled(steps))
        fill = lambda others: [others[places[n]] if n in places else a for n, a in enumerate(leaves)]
        return lambda others: jax.tree.unflatten(treedef, fill(others))

    slots = [slot(a) for a in args]
    named = {k: slot(v) for k, v in kwargs.items()}
    return found, paths, lambda others: (tuple(s(others) for s in slots), {k: s(others) for k, s in named.items()})


def lift(fn: Callable[..., Value], *, dense: bool = False, forward_mode: bool = False) -> Callable[..., Value]:
    """The same function, for adapted parameters: wherever a parameter tree stood, an `Adapted` may stand, or a
    quantised tree.

    `fn` is any JAX function: Linen's `model.apply`, an NNX module called, a plain one. It is traced as a function of
    the adapted leaves alone, and each use of an adapted weight is computed from its factors; every other argument
    is closed over as it stands, so static and keyword arguments behave as ever. A call without either is a call
    of `fn`. Meant to be called under `jit`; an eager call works and traces again.

    Gradients stop at the frozen subtree. `fn` may call an NNX module that stands in the `Adapted` while the call leaves
    the module's state alone. A module that updates state (dropout, batch statistics, caches) is split, put together
    inside `fn` with `nnx.merge(graphdef, params, rest, copy=True)`, and its state returned.

    Args:
      fn: the function.
      dense: merge, then call: slow and obviously right, the oracle of every test.
      forward_mode: plain factored dots in place of custom rules, for bare `jvp` and `jacfwd` (which custom rules of
        reverse mode refuse; `jvp` of `grad` needs no flag).

    Raises:
      ValueError: by the lifted function: a module in an `Adapted` whose call changes its state, which would be lost.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> f = jlora.lift(lambda params, x: x @ params["query"]["kernel"])
      >>> f(adapted, jnp.ones((3, 6))).shape
      (3, 4)

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.
    """

    _answers.check_function("jlora.lift", fn)

    @functools.wraps(fn)
    def lifted(*args: PyTree, **kwargs: PyTree) -> PyTree:
        found, paths, fill = find(args, kwargs)
        if not found:
            return _plainly(fn, args, kwargs)
        found = [_stopped(a) for a in as_adapters(found, paths)]
        called, filled, touched = watched(fn, fill)
        if dense:
            args, kwargs = filled([_merge.merge(a) for a in found])
            out = called(*args, **kwargs)
        else:
            from jlora import _interpret

            try:
                out = _interpret.call(called, found, filled, forward_mode=forward_mode)
            except TypeError as error:
                if forward_mode or "forward-mode autodiff (jvp) to a custom_vjp" not in str(error):
                    raise
                raise TypeError(
                    "forward mode (jvp, jacfwd) does not go through the gradients that jlora writes by hand: write "
                    "jlora.lift(fn, forward_mode=True). (jvp of grad, a Hessian, needs no flag; a custom_vjp of the "
                    "model's own stays in the way.)"
                ) from error
        if touched():
            check_stateless(fn, found, fill)
        return out

    return lifted


def _plainly(fn: Callable[..., Value], args: Sequence[PyTree], kwargs: Mapping[str, PyTree]) -> Value:
    """A call without an adapter, which is a call of `fn`; where that fails over a trainable half, so it is said."""
    try:
        return fn(*args, **kwargs)
    except Exception as error:
        if not _holds((args, kwargs), _answers.is_half):
            raise
        raise TypeError(
            "this lifted function was called without an Adapted, and one of its arguments looks like the trainable "
            "half alone: write jlora.join(trainable, frozen) in its place. The function itself said: "
            f"{type(error).__name__}: {str(error)[:300]}"
        ) from error
