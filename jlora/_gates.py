"""Gates: factors of a method that the caller gives with each call, and that may differ from position to position."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jlora import _answers
from jlora._plan._sites import Plan
from jlora._types import Shape
from jlora.adapted import Adapted, check_adapted


def with_gates(adapted: Adapted, /, **gates: ArrayLike | jax.ShapeDtypeStruct) -> Adapted:
    """The same adapter with the values of its gates, such as `active` of `jlora.Gated(method, "active")`.

    Called inside the loss, with the gates of this batch, as `with_dropout` is. Values are no part of the adapter:
    `save` leaves them out. `lift` passes gradients on to them, so that a router may be trained.

    Args:
      adapted: an adapter whose methods have gates.
      **gates: one value for each name, floating point, boolean or (of a gate without letters of its own) integer:
        `(positions..., letters...)`. Positions are the leading free axes of each activation that a gated weight meets,
        (batch,) or (batch, seq); an axis of size 1 stands for any, and a model that joins these axes is followed. A
        value without positions, `active=0.5`, is the same everywhere: then merging works as well. Names that were
        given before and are not given here keep their values.

    Raises:
      TypeError: no `Adapted`, or a value that is no array or number.
      ValueError: a name that no method has, letters of another size, a stack of several adapters.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params, x = {"query": {"kernel": jnp.ones((6, 4))}}, jnp.ones((2, 3, 6))
      >>> adapted = jlora.adapt(params, jlora.Gated(jlora.LoRA(rank=2), "active"))
      >>> apply = jlora.lift(lambda params, x: x @ params["query"]["kernel"])
      >>> apply(jlora.with_gates(adapted, active=jnp.array([[0, 1, 1], [0, 0, 1]])), x).shape
      (2, 3, 4)
    """
    plan = check_adapted("with_gates", adapted).frozen.plan
    values, bad = {}, []
    for name, value in gates.items():
        try:
            values[name] = _checked(name, value, plan)
        except ValueError as error:
            bad.append(str(error))
    if bad:
        raise ValueError("with_gates: " + "; ".join(bad))
    return Adapted(adapted.trainable, dataclasses.replace(adapted.frozen, gates={**adapted.frozen.gates, **values}))


def _checked(name: str, value: ArrayLike | jax.ShapeDtypeStruct, plan: Plan) -> jax.Array | jax.ShapeDtypeStruct:
    """The value of a gate in a floating point dtype."""
    if name not in plan.gates:
        have = "its gates are " + ", ".join(map(repr, plan.gates)) if plan.gates else "no method of it has one"
        raise ValueError(f"this adapter has no gate {name!r}: {have}")
    if not isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct, bool, int, float)):
        raise TypeError(f"with_gates({name}=...) takes an array or a number, not {_answers.kind(value)}")
    shape, dtype = jnp.shape(value), jnp.result_type(value)
    letters = [sizes for sizes in plan.gates[name] if shape[len(shape) - len(sizes) :] != sizes]
    if letters:
        raise ValueError(
            f"the gate {name!r} has letters of its own of sizes {letters[0]}: its value is of shape "
            f"(positions..., {', '.join(map(str, letters[0]))}), not {shape}"
        )
    number = jnp.issubdtype(dtype, jnp.bool_) or jnp.issubdtype(dtype, jnp.integer)
    real = jnp.issubdtype(dtype, jnp.floating)
    if not (real or number) or jnp.issubdtype(dtype, jnp.integer) and any(plan.gates[name]):
        hint = "; of an index write jax.nn.one_hot(index, n)" if number else ""
        raise ValueError(f"the gate {name!r} is floating point or boolean, not {dtype}{hint}")
    dtype = dtype if real else jnp.dtype(jnp.float32)
    if isinstance(value, jax.ShapeDtypeStruct):  # for `explain`, which computes nothing
        return jax.ShapeDtypeStruct(shape, dtype)
    return jnp.asarray(value, dtype)


def check_given(caller: str, adapted: Adapted) -> None:
    """Raises ValueError, naming them, where gates have no value."""
    missing = [name for name in adapted.frozen.plan.gates if name not in adapted.frozen.gates]
    if missing:
        given = ", ".join(f"{name}=..." for name in missing)
        raise ValueError(
            f"{caller}: the gate{'s' * (len(missing) > 1)} {' and '.join(map(repr, missing))} of this adapter "
            f"{'have' if len(missing) > 1 else 'has'} no value: write jlora.with_gates(adapted, {given})"
        )


def check_everywhere(adapted: Adapted) -> None:
    """Raises ValueError where the gates have no value, or positions: there is then no one weight to make dense."""
    check_given("a weight that is made dense", adapted)
    bad: dict[str, list[str]] = {}
    for site in adapted.frozen.plan.sites:
        for name, sizes in site.recipe.gates:
            if jnp.ndim(adapted.frozen.gates[name]) > len(sizes):
                bad.setdefault(name, []).append(site.leaf.path)
    if bad:
        several = lambda paths: ", ".join(map(repr, paths[:3])) + (f" and {len(paths) - 3} more" * (len(paths) > 3))
        said = (f"{n!r} of shape {jnp.shape(adapted.frozen.gates[n])} on {several(p)}" for n, p in bad.items())
        raise ValueError(
            f"no dense weight exists where a gate has positions: {'; '.join(said)}. lift computes with it; a gate that "
            "is the same everywhere, jlora.with_gates(adapted, "
            f"{', '.join(f'{n}={_open(adapted.frozen.plan.gates[n][0])}' for n in bad)}), can be merged"
        )


def _open(sizes: Shape) -> str:
    return f"jnp.ones({sizes})" if sizes else "1.0"


def opened(plan: Plan) -> dict[str, jax.Array]:
    """A value for every gate of a plan: ones, without positions."""
    return {name: jnp.ones(sizes[0], jnp.float32) for name, sizes in plan.gates.items()}


def invoked(tokens: ArrayLike, invocation: Sequence[int]) -> jax.Array:
    """Where an activated LoRA is on: 1 from the last occurrence of the invocation on, itself included, 0 before it.

    A sequence without it is 0 throughout. Pure, and works under `jit`. In decoding with a cache the token that is new
    stands behind the invocation, and its gate is a one.

    Args:
      tokens: integers of shape (..., seq).
      invocation: the token numbers that invoke the adapter, at least one.

    Returns:
      float32, of the shape of `tokens`.

    Raises:
      ValueError: tokens that are no integers or have no axis, no invocation.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.invoked(jnp.array([[7, 8, 1, 7, 8, 2], [1, 2, 3, 4, 5, 6]]), [7, 8])
      Array([[0., 0., 0., 1., 1., 1.],
             [0., 0., 0., 0., 0., 0.]], dtype=float32)

    References:
      Greenewald et al, `Activated LoRA <https://arxiv.org/abs/2504.12397>`_, 2025.
    """
    tokens, sought = jnp.asarray(tokens), np.asarray(invocation)
    if tokens.ndim == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"invoked takes tokens as integers (..., seq), not {tokens.dtype} of shape {tokens.shape}")
    if sought.ndim != 1 or not len(sought) or not np.issubdtype(sought.dtype, np.integer):
        raise ValueError(
            f"invoked takes the numbers of the invocation's tokens, such as [7, 8], not {invocation!r:.60}"
        )
    length = tokens.shape[-1]
    starts = length - len(sought) + 1
    if starts < 1:
        return jnp.zeros(tokens.shape, jnp.float32)
    there = jnp.ones((*tokens.shape[:-1], starts), bool)
    for n, token in enumerate(sought):
        there &= tokens[..., n : n + starts] == int(token)
    last = jnp.max(jnp.where(there, jnp.arange(starts), length), -1, keepdims=True, where=there, initial=-1)
    return ((last >= 0) & (jnp.arange(length) >= last)).astype(jnp.float32)
