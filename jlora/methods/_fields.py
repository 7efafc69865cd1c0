"""The fields of a method, as its type hints say them: checked, and brought to one spelling, when it is made.

Equal plans are one object, and a plan is saved by its fields: `True` for 1, `jnp.bfloat16` for "bfloat16" or a NumPy
number would be another spelling of an equal method, and a file that cannot be read again.
"""

import dataclasses
import functools
import math
import numbers
import operator
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, TypeAlias, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike


@dataclasses.dataclass(frozen=True)
class Holds:
    """What must hold of a field beside its type: `Annotated[int, Holds(test, "a rank is ...")]`."""

    test: Callable[..., bool]
    words: str


@dataclasses.dataclass(frozen=True)
class Reads:
    """What makes a field of what was given, in place of its type's own reading; it raises ValueError in words."""

    read: Callable[[object], object]


def _dtype(value: object) -> str:
    words = f"no dtype of floating point numbers: write 'float32' or 'bfloat16', not {value!r:.60}"
    if value is None or isinstance(value, (jax.Array, np.ndarray)):
        raise ValueError(words)
    try:
        dtype = jnp.dtype(cast(DTypeLike, value))
    except TypeError:
        raise ValueError(words) from None
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(words)
    if dtype.itemsize > 4 and not jax.config.read("jax_enable_x64"):
        raise ValueError(f"{dtype.name} needs jax.config.update('jax_enable_x64', True); write 'float32'")
    return dtype.name


def _strength(value: float) -> bool:
    with np.errstate(over="ignore", under="ignore"):
        held = np.float32(value)
    return bool(np.isfinite(held)) and held != 0


def at_least(least: int, words: str) -> Holds:
    return Holds(lambda n: n >= least, words)


def nonzero(what: str) -> Holds:
    """A number that does not kill the adapter: at zero, all gradients are zero, and stay it."""
    words = f"{what} is a finite number in float32's range, and not 0 (the adapter would never change anything)"
    return Holds(_strength, words + "; jlora.scale(adapted, 0) switches an adapter off")


def letters_of(every: str) -> Reads:
    """Some of these letters, in their order, each once: a string of them, or a tuple, list or set."""

    def read(value: object) -> tuple[str, ...]:
        given = list(value) if isinstance(value, (str, tuple, list, set, frozenset)) else [None]
        if not all(isinstance(x, str) and x in set(every) for x in given):
            raise ValueError(f"write some of {', '.join(map(repr, every))}, as a tuple")
        return tuple(x for x in every if x in given)

    return Reads(read)


Rank: TypeAlias = Annotated[int, Holds(lambda n: 0 <= n < 2**31, "a rank is an integer of at least 0, in 31 bits")]
Rate: TypeAlias = Annotated[float, Holds(lambda p: 0 <= p < 1, "a rate is a number that lies in [0, 1)")]
Alpha: TypeAlias = Annotated[float, nonzero("alpha")] | None
Seed: TypeAlias = Annotated[int, Holds(lambda n: -(2**63) <= n < 2**63, "a seed is an integer of at most 64 bits")]
Dtype: TypeAlias = Annotated[str, Reads(_dtype)]


@functools.cache
def hints(cls: type) -> Mapping[str, object]:
    """The type of each field; one that takes anything where its string cannot be looked up where the class stands."""
    found = {}
    for owner in reversed(cls.__mro__):
        names = vars(sys.modules.get(owner.__module__, types.ModuleType("")))
        for name, hint in vars(owner).get("__annotations__", {}).items():
            if isinstance(hint, str):
                try:
                    hint = eval(hint, dict(names))  # the class's own source
                except Exception:
                    hint = Any
            found[name] = hint
    return {f.name: found.get(f.name, f.type) for f in dataclasses.fields(cls)}


def settle(method: object, but: Sequence[str]) -> None:
    """Checks the fields of a frozen dataclass, and spells each as its type says; all bad ones are named at once."""
    name, bad = type(method).__name__, []
    for field, hint in hints(type(method)).items():
        if field in but:
            continue
        value = getattr(method, field)
        try:
            object.__setattr__(method, field, as_hinted(value, hint))
        except ValueError as error:
            shown = repr(value) if len(repr(value)) < 100 else f"{type(value).__name__} {repr(value)[:80]}..."
            array = isinstance(value, (jax.Array, np.ndarray)) and value.ndim == 0
            bad.append(f"{name}({field}={shown}): {error}" + array * ", and no array; float(x) or int(x) makes one")
    if bad:
        raise ValueError("\n".join(bad))


def as_hinted(value: object, hint: object) -> object:
    """A value as a type hint says it; ValueError in words where it is something else. Unknown hints take anything."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _annotated(value, args[0], args[1:])
    if origin in (typing.Union, types.UnionType):
        words = []
        for option in args:
            try:
                return as_hinted(value, option)
            except ValueError as error:
                words.append(str(error))
        raise ValueError(" or ".join(words))
    if origin is typing.Literal:
        value = value.item() if isinstance(value, np.generic) else value
        for choice in args:
            if type(choice) is type(value) and choice == value:
                return choice
        raise ValueError("write one of " + ", ".join(map(repr, args)))
    if origin is tuple:
        return _tuple(value, args)
    reader = _READERS.get(hint)
    if reader is not None:
        return reader(value)
    return value.item() if isinstance(value, np.generic) else value


def _annotated(value: object, hint: object, extras: Sequence[object]) -> object:
    for extra in extras:
        if isinstance(extra, Reads):
            return extra.read(value)
    words = [extra.words for extra in extras if isinstance(extra, Holds)]
    try:
        value = as_hinted(value, hint)
    except ValueError as error:
        raise ValueError(words[0] if words else str(error)) from None
    for extra in extras:
        if isinstance(extra, Holds) and not extra.test(value):
            raise ValueError(extra.words)
    return value


def _tuple(value: object, args: Sequence[object]) -> tuple[object, ...]:
    endless = args[-1] is Ellipsis
    example = "several" if endless else str(len(args))
    try:
        words = as_hinted(None, args[0])
    except ValueError as error:
        words = error
    wanted = f"a tuple of {example}, each of which: {words}"
    value = value.tolist() if isinstance(value, np.ndarray) else value
    if not isinstance(value, (tuple, list)) or not endless and len(value) != len(args):
        raise ValueError(wanted)
    each = [args[0]] * len(value) if endless else args
    try:
        return tuple(as_hinted(v, h) for v, h in zip(value, each, strict=True))
    except ValueError:
        raise ValueError(wanted) from None


def _bool(value: object) -> bool:
    if isinstance(value, (bool, np.bool_)):
        return bool(value)
    raise ValueError("write True or False")


def _int(value: object) -> int:
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise ValueError("an integer")
    return operator.index(value)


def _float(value: object) -> float:
    number = isinstance(value, (numbers.Real, np.floating, np.integer)) and not isinstance(value, (bool, np.bool_))
    if not number and not isinstance(value, np.generic) or isinstance(value, (np.bool_, np.complexfloating, np.str_)):
        raise ValueError("a number")
    try:
        value = float(cast(float, value))
    except (OverflowError, ValueError, TypeError):
        raise ValueError("a number") from None
    if not math.isfinite(value):
        raise ValueError("a finite number")
    return value + 0.0  # -0.0 is 0.0: equal numbers are spelled alike


def _none(value: object) -> None:
    if value is not None:
        raise ValueError("None")


def _str(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("a string")
    return str(value)


_READERS: dict[object, Callable[[object], object]] = {
    bool: _bool,
    int: _int,
    float: _float,
    str: _str,
    types.NoneType: _none,
}
