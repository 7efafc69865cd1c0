"""An `Adapted` and a quantised leaf to `flax.serialization`, which stores dictionaries of arrays.

Flax puts whatever it reads into the tree at hand. So beside the arrays of each of the two stands a record, as bytes, of
what the arrays mean; a state of another scheme, method, shape or set of factors is refused.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from typing import TypeAlias, TypeGuard, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax.typing import ArrayLike

from jlora._plan._sites import Plan
from jlora._types import Key, PyTree
from jlora.adapted import Adapted, Frozen
from jlora.io import quantised
from jlora.io._record import several
from jlora.methods.base import Dropping, Method
from jlora.quant._leaf import Quantized

Node = TypeVar("Node", Adapted, Frozen)

State: TypeAlias = dict[str, PyTree]
"""To Flax: nested dictionaries of arrays."""

#: Beside the arrays: what they mean. No array and no attribute is called so.
_RECORD = "jlora"
#: Fields that are not about what the numbers mean: rates may differ from run to run, and arrays have their own dtype.
_FREE = {field.name for field in dataclasses.fields(Dropping)}


def register() -> None:
    """Tells Flax; called once, when `jlora.io` is imported."""
    serialization.register_serialization_state(Adapted, *_attributes(("trainable", "frozen"), None))
    serialization.register_serialization_state(Frozen, *_attributes(("base", "factors", "key"), _of_plan))
    serialization.register_serialization_state(Quantized, _arrays_of, _with_arrays)


# --- to and from Flax's dictionaries ------------------------------------------------------------------------------


def _attributes(
    names: tuple[str, ...], record: Callable[[Node], Mapping[str, str]] | None
) -> tuple[Callable[[Node], State], Callable[[Node, State], Node]]:
    """By attribute; a dropout key as its numbers."""
    raw = lambda x: jax.random.key_data(x) if _is_key(x) else x

    def state(x: Node) -> State:
        own = {_RECORD: _written(record(x))} if record else {}
        return own | {n: serialization.to_state_dict(raw(getattr(x, n))) for n in names}

    def restored(x: Node, have: State) -> Node:
        _check(state(x), have)
        found = {n: serialization.from_state_dict(raw(getattr(x, n)), have[n], name=n) for n in names}
        return dataclasses.replace(x, **{n: _keyed(getattr(x, n), v) for n, v in found.items()})

    return state, restored


def _is_key(x: object) -> TypeGuard[Key]:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _keyed(like: PyTree, value: PyTree) -> PyTree:
    return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like)) if _is_key(like) else value


def _arrays_of(leaf: Quantized) -> State:
    how = quantised.described(leaf.codec, leaf.kernel)
    rest = ", ".join(f"{name} {value}" for name, value in (how["layout"] | how["scheme"]).items() if name != "shape")
    said = f"{leaf.describe()} of {leaf.codec.layout.shape}, {leaf.codec.dtype}, {leaf.kernel!r}, {rest}"
    return {_RECORD: _written({"": said}), **leaf.arrays}


def _with_arrays(leaf: Quantized, have: State) -> Quantized:
    _check(_arrays_of(leaf), have)
    return Quantized(tuple(have[n] for n in leaf.arrays), leaf.codec, leaf.kernel)


# --- what the arrays mean -----------------------------------------------------------------------------------------


def _written(record: Mapping[str, str]) -> np.ndarray:
    """A record as an array: whoever maps over a state finds nothing else in it."""
    return np.frombuffer(json.dumps(record).encode(), np.uint8)


def _read(array: ArrayLike) -> dict[str, str]:
    try:
        record = json.loads(np.asarray(array, np.uint8).tobytes())
        return {str(key): str(value) for key, value in record.items()}
    except (ValueError, TypeError, AttributeError, RecursionError):
        return {"": "nothing that jlora wrote"}


def _of_plan(frozen: Frozen) -> dict[str, str]:
    """`{path: its method, and which axes it takes for what}`."""
    plan: Plan = frozen.plan
    found = {s.leaf.path: f"{_said(s.method)} on {s.leaf.shape}, {s.leaf.roles!r}" for s in plan.sites}
    return found | ({"the dropout key": str(jax.random.key_impl(frozen.key))} if _is_key(frozen.key) else {})


def _said(method: Method) -> str:
    """A method with the fields that its numbers hang on."""
    fields = [f for f in dataclasses.fields(method) if f.init and f.name not in _FREE]
    values = {f.name: getattr(method, f.name) for f in fields}
    given = {f.name: values[f.name] for f in fields if type(values[f.name]) is int or values[f.name] != f.default}
    return f"{type(method).__name__}({', '.join(f'{name}={_value(value)}' for name, value in given.items())})"


def _value(value: object) -> str:
    if isinstance(value, Method):
        return _said(value)
    if isinstance(value, tuple):
        return f"({', '.join(map(_value, value))})"
    plain = value is None or isinstance(value, (bool, int, float, str))
    return repr(value) if plain else type(value).__name__  # functions and arrays do not print alike in two runs


# --- holding a state against the tree at hand ---------------------------------------------------------------------


def _check(want: State, have: State) -> None:
    """ValueError where a state is not of the form of the tree at hand; all that is not is named at once."""
    bad = list(_unlike(want, have, (), False))
    if bad:
        place = serialization.current_path()
        raise ValueError(f"this state is not of the form of what it is to be read into (at {place}):" + several(bad))


def _unlike(want: PyTree, have: PyTree, path: tuple[str, ...], typed: bool) -> Iterator[str]:
    """The differences of two states; of their dtypes too, where they are `typed`."""
    at = repr("/".join(path)) if path else "it"
    if isinstance(want, Mapping) != isinstance(have, Mapping):
        kinds = ("several arrays" if isinstance(x, Mapping) else "one array" for x in (want, have))
        yield "{} is {} here, and {} in the state".format(at, *kinds)
    elif isinstance(want, Mapping):
        names = set(want) | set(have)
        if _RECORD in want and _RECORD in have:
            yield from _other(_read(want[_RECORD]), _read(have[_RECORD]), at)
        packed = _RECORD in want and "factors" not in want
        for name in sorted(names, key=lambda name: (name != _RECORD, name)):
            below = repr("/".join((*path, name)))
            if name not in have:
                yield f"{below} is missing in the state"
            elif name not in want:
                yield f"{below} is in the state alone"
            elif name != _RECORD:
                yield from _unlike(want[name], have[name], (*path, name), typed or packed or name == "base")
    elif (want is None) != (have is None):
        yield f"{at} is {'nothing' if want is None else 'there'} here, and not so in the state"
    elif hasattr(want, "shape") and hasattr(have, "shape"):
        if tuple(want.shape) != tuple(have.shape):
            yield f"{at} has shape {tuple(want.shape)} here, {tuple(have.shape)} in the state"
        elif typed and str(want.dtype) != str(have.dtype):
            yield f"{at} has dtype {want.dtype} here, {have.dtype} in the state"


def _other(want: Mapping[str, str], have: Mapping[str, str], at: str) -> Iterator[str]:
    """The differences of two records, in their words."""
    for key in sorted({*want, *have}):
        ours, theirs = want.get(key, "absent"), have.get(key, "absent")
        if ours != theirs:
            yield f"{repr(key) if key else at} is {ours} here, {theirs} in the state"
