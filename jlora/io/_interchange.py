"""An `Adapted` and a quantised leaf to `jax.export` and to `flax.serialization`, which ask for words of each type.

Both store arrays themselves. `jax.export` wants the static part of a type as bytes: for an adapter the plan, as a
manifest would say it; methods of one's own are not known where it is read.
"""

import dataclasses
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import serialization
from jax import export

from jlora import _plan, _tree
from jlora._plan import Plan
from jlora.adapted import Adapted, Frozen
from jlora.io import _manifest, quantised
from jlora.quant._leaf import Quantized

_WHERE = "an exported adapter"


def _plan_bytes(plan: Plan) -> bytes:
    base = [[s.leaf.path, list(s.leaf.shape), str(s.leaf.dtype), None] for s in plan.sites]
    return json.dumps(_manifest.write_methods(plan) | {"base": base, "places": [s.index for s in plan.sites]}).encode()


def _plan_of(raw: Any) -> Plan:
    content = json.loads(bytes(raw))
    base = [(path, tuple(shape), np.dtype(dtype)) for path, shape, dtype, _ in content["base"]]
    leaves = tuple(jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in base)
    count = len(base)
    tree = _tree.Named(tuple(path for path, _, _ in base), leaves, tuple(range(count)), None, (None,) * count)
    plan = _manifest.read_plan({**content, "notes": tuple(content["notes"])}, tree, (), _WHERE)
    placed = [dataclasses.replace(s, index=n) for s, n in zip(plan.sites, content["places"], strict=True)]
    return _plan.intern(tuple(placed), plan.methods, plan.notes)


def _codec_bytes(static: Any) -> bytes:
    return json.dumps(quantised.described(*static)).encode()


def register() -> None:
    """Tells JAX and Flax; called once, when `jlora.io` is imported."""
    as_bytes = export.register_pytree_node_serialization
    empty = {"serialize_auxdata": lambda _: b"", "deserialize_auxdata": lambda _: None}
    as_bytes(Adapted, serialized_name="jlora.Adapted", **empty)
    as_bytes(Frozen, serialized_name="jlora.Frozen", serialize_auxdata=_plan_bytes, deserialize_auxdata=_plan_of)
    as_bytes(
        Quantized,
        serialized_name="jlora.Quantized",
        serialize_auxdata=_codec_bytes,
        deserialize_auxdata=lambda raw: quantised.static(json.loads(bytes(raw)), _WHERE),
    )
    for cls, names in ((Adapted, ("trainable", "frozen")), (Frozen, ("base", "factors", "key"))):
        serialization.register_serialization_state(cls, *_attributes(names))
    serialization.register_serialization_state(Quantized, _arrays_of, _with_arrays)


def _attributes(names: tuple[str, ...]) -> Any:
    """To and from Flax's dictionaries, by attribute; a dropout key as its numbers."""
    to_state, from_state = serialization.to_state_dict, serialization.from_state_dict
    raw = lambda x: jax.random.key_data(x) if _is_key(x) else x

    def state(x: Any) -> dict[str, Any]:
        return {n: to_state(raw(getattr(x, n))) for n in names}

    def restored(x: Any, state: dict[str, Any]) -> Any:
        found = {n: from_state(raw(getattr(x, n)), state[n], name=n) for n in names}
        return dataclasses.replace(x, **{n: _keyed(getattr(x, n), v) for n, v in found.items()})

    return state, restored


def _is_key(x: Any) -> bool:
    return isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _keyed(like: Any, value: Any) -> Any:
    return jax.random.wrap_key_data(jnp.asarray(value), impl=jax.random.key_impl(like)) if _is_key(like) else value


def _arrays_of(leaf: Quantized) -> dict[str, Any]:
    return dict(leaf.arrays)


def _with_arrays(leaf: Quantized, state: dict[str, Any]) -> Quantized:
    if set(state) != set(leaf.arrays):
        raise ValueError(f"{leaf!r} holds {sorted(leaf.arrays)}, the state {sorted(state)}: they were quantised apart")
    return Quantized(tuple(state[n] for n in leaf.arrays), leaf.codec, leaf.kernel)
