"""What steps compiled for TPUs send: writes `golden/tpu_sent.json`, which `test_shard` holds the estimate against.

    python tests/tpu_programs.py        where libtpu is installed (see `make tpu`); no TPU is needed, and 15 s

The CPU backend writes a reduce-scatter as an all-reduce, and sends bfloat16 as float32; libtpu does neither. Steps of a
small scanned, rematerialised model on eight chips of a v5e: each program as `[[kind, dtype, shape, times], ...]`.
"""

import json
import os
from pathlib import Path

if __name__ == "__main__":
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
    os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled", "TF_CPP_MIN_LOG_LEVEL": "3"}

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import hlo

OPTIONS = {  # a gather is one instruction then (`benchmarks/tpu_aot.py`)
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_enable_async_collective_fusion": "false",
}
LAYERS, WIDE, INNER, VOCAB, ROWS = 4, 256, 512, 1024, 8
AXES = ("data", "fsdp")
METHODS = {"LoRA": jlora.LoRA(rank=16, target=jlora.targets.linear), "Full": jlora.Full(target=".")}
PROGRAMS = [
    (method, dtype, shape, length)
    for method in METHODS
    for dtype in ("float32", "bfloat16")
    for shape in ((1, 8), (2, 4))
    for length in (8, 128)
]
GOLDEN = Path(__file__).parent / "golden" / "tpu_sent.json"


def params(dtype):
    array = lambda *shape: jax.ShapeDtypeStruct(shape, dtype)
    layers = {"up": {"kernel": array(LAYERS, WIDE, INNER)}, "down": {"kernel": array(LAYERS, INNER, WIDE)}}
    layers |= {"norm": {"scale": array(LAYERS, WIDE)}}
    return {"embed": {"embedding": array(VOCAB, WIDE)}, "layers": layers}


def loss(params, ids, place):
    here = lambda x: lax.with_sharding_constraint(x, place)

    def layer(x, p):
        return here(x + jnp.tanh(x * p["norm"]["scale"] @ p["up"]["kernel"]) @ p["down"]["kernel"]), None

    x = here(params["embed"]["embedding"][ids])
    x, _ = lax.scan(jax.checkpoint(layer, prevent_cse=False), x, params["layers"])
    return jnp.mean(x.astype(jnp.float32) ** 2)


def sent(devices, method, dtype, shape, length):
    mesh, batch = Mesh(np.array(devices).reshape(shape), AXES), P(AXES)
    place = NamedSharding(mesh, batch)
    made = jax.eval_shape(lambda p: jlora.adapt(p, METHODS[method]), params(dtype))
    adapted = jlora.shard.abstract(mesh, made, "fsdp")
    lifted, tx = jlora.lift(loss), optax.sgd(1e-3)
    step = jlora.shard.train_step(lambda ad, ids: lifted(ad, ids, place), tx, mesh, adapted, batch=batch)
    trainable, frozen = jlora.split(adapted)
    ids = jax.ShapeDtypeStruct((ROWS, length), jnp.int32, sharding=place)
    compiled = step.lower(trainable, jax.eval_shape(tx.init, trainable), frozen, ids).compile(OPTIONS)
    return [[s.kind, s.dtype, s.shape, s.times] for s in hlo.sent(compiled.as_text())]


if __name__ == "__main__":
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x4").devices
    found = {" ".join(map(str, program)): sent(devices, *program) for program in PROGRAMS}
    lines = ",\n".join(f" {json.dumps(name)}: {json.dumps(rows)}" for name, rows in found.items())
    GOLDEN.write_text("{\n" + lines + "\n}\n")
