"""An `Adapted` and a quantised leaf to `jax.export`, which stores arrays and wants the static part of a type as bytes.

For an adapter it is the plan, as a manifest would say it; methods of one's own are not known where it is read.
"""

import dataclasses
import json

import jax
import numpy as np
from jax import export

from jlora._plan import _sites
from jlora._plan._sites import Plan
from jlora._trees import _tree
from jlora.adapted import Adapted, Frozen
from jlora.io import _manifest, quantised
from jlora.quant._leaf import Codec, Quantized

_WHERE = "an exported adapter"


def _plan_bytes(plan: Plan) -> bytes:
    base = [[s.leaf.path, list(s.leaf.shape), str(s.leaf.dtype), None] for s in plan.sites]
    return json.dumps(_manifest.write_methods(plan) | {"base": base, "places": [s.index for s in plan.sites]}).encode()


def _plan_of(raw: bytes) -> Plan:
    content = json.loads(bytes(raw))
    base = [(path, tuple(shape), np.dtype(dtype)) for path, shape, dtype, _ in content["base"]]
    leaves = tuple(jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in base)
    count = len(base)
    tree = _tree.Named(tuple(path for path, _, _ in base), leaves, tuple(range(count)), None, (None,) * count)
    plan = _manifest.read_plan({**content, "notes": tuple(content["notes"])}, tree, (), _WHERE)
    placed = [dataclasses.replace(s, index=n) for s, n in zip(plan.sites, content["places"], strict=True)]
    return _sites.intern(tuple(placed), plan.methods, plan.notes)


def _codec_bytes(static: tuple[Codec, str]) -> bytes:
    return json.dumps(quantised.described(*static)).encode()


def register() -> None:
    """Tells JAX; called once, when `jlora.io` is imported."""
    as_bytes = export.register_pytree_node_serialization
    as_bytes(
        Adapted, serialized_name="jlora.Adapted", serialize_auxdata=lambda _: b"", deserialize_auxdata=lambda _: None
    )
    as_bytes(Frozen, serialized_name="jlora.Frozen", serialize_auxdata=_plan_bytes, deserialize_auxdata=_plan_of)
    as_bytes(
        Quantized,
        serialized_name="jlora.Quantized",
        serialize_auxdata=_codec_bytes,
        deserialize_auxdata=lambda raw: quantised.static(json.loads(bytes(raw)), _WHERE),
    )
