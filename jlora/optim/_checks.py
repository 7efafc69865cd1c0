"""What optimizers are given: numbers that are numbers, transformations that are optax's, and states that have run."""

import inspect
from collections.abc import Callable
from typing import Protocol, cast, runtime_checkable

import jax
import numpy as np
import optax
from jax.core import Tracer

from jlora._types import PyTree


@runtime_checkable
class Deciding(Protocol):
    """The state of an optimizer that decides over ranks, `jlora.rank`'s or one of the user's."""

    def never_ran(self) -> str:
        """What did not happen, in words; empty as soon as there was an update."""
        ...


def check_ran(caller: str, opt_state: PyTree) -> None:
    """Raises ValueError where an optimizer's state says that what decides over ranks has made no update."""
    is_deciding = lambda x: isinstance(x, Deciding)
    for state in jax.tree.leaves(opt_state, is_leaf=is_deciding):
        if is_deciding(state) and (why := state.never_ran()):
            raise ValueError(f"{caller}: {why}; apply tx.update to every step, or {caller} without the state")


def number(caller: str, name: str, value: object, wanted: str, fits: Callable[[float], bool]) -> None:
    """Raises unless `value` is one real number that `fits`; a traced one has no value yet, and passes."""
    if isinstance(value, Tracer) and value.shape == ():
        return
    real = isinstance(value, (int, float, np.number)) and not isinstance(value, bool)
    array = isinstance(value, (jax.Array, np.ndarray)) and value.shape == () and value.dtype.kind in "iuf"
    if not (real or array) or not fits(float(cast(float, value))):
        raise ValueError(f"{caller}({name}={value!r}): {wanted}")


def whole_number(caller: str, name: str, value: object, low: int, high: float, wanted: str) -> None:
    """Raises unless `value` is a whole number from `low` to `high`, or traced."""
    number(caller, name, value, wanted, lambda x: x.is_integer() and low <= x <= high)


def rate(caller: str, name: str, value: object, wanted: str) -> None:
    """Raises unless `value` is a number of at least 0, a traced one, or a schedule."""
    if not callable(value):
        number(caller, name, value, wanted, lambda x: 0 <= x < float("inf"))


def transformation_of(caller: str, tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx`, which takes extra arguments; also an `optax.MultiSteps`, which is no transformation and hands them on.

    Raises:
      TypeError: no optax transformation.
    """
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        raise TypeError(f"{caller} takes an optax transformation, such as optax.adamw(1e-3), not {type(tx).__name__}")
    hands_on = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(tx.update).parameters.values())
    if hands_on:  # `with_extra_args_support` looks at the type alone: it would drop the extra arguments of a MultiSteps
        return optax.GradientTransformationExtraArgs(tx.init, tx.update)
    return optax.with_extra_args_support(tx)
