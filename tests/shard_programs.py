"""What compiled programs send between devices, as XLA optimises them: run in a process of its own by `test_shard`.

Prints one JSON object, `{program: {"sent": [[kind, count of elements, bytes, times], ...], ...}}`.
"""

import importlib.metadata
import json
import math
import os

os.environ["JAX_PLATFORMS"] = "cpu"
# What LLVM makes of a program has no part in what it sends and holds.
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0 "
    "--xla_llvm_disable_expensive_passes=true --xla_cpu_parallel_codegen_split_count=1"
)
if importlib.metadata.version("jaxlib") < "0.11":  # gone in later ones
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jlora  # noqa: E402
from benchmarks import hlo  # noqa: E402

WIDE, INNER, LAYERS, RANK, ROWS = 48, 80, 3, 2, 8


def sent(compiled):
    """`[kind, elements, bytes of one, times]` of every array that is sent."""
    return [[s.kind, s.elements, s.bytes // s.times, s.times] for s in hlo.sent(compiled.as_text())]


def weights(*stack):
    draw = lambda seed, *shape: np.random.default_rng(seed).standard_normal((*stack, *shape)).astype(np.float32) / 8
    return {"up": {"kernel": draw(1, WIDE, INNER)}, "down": {"kernel": draw(2, INNER, WIDE)}}


def block(p, x):
    return x + jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]


def unrolled(p, x):
    for n in range(LAYERS):
        x = block(p[f"layer_{n}"], x)
    return x


def scanned(p, x):
    return lax.scan(lambda x, layer: (block(layer, x), None), x, p["layers"])[0]


MODELS = {
    "unrolled": (unrolled, {f"layer_{n}": weights() for n in range(LAYERS)}),
    "scanned": (scanned, {"layers": weights(LAYERS)}),
}
PLACES = {
    # name: (mesh shape, names, base specs, batch, sequence); on one device, 256 tokens would be worth a merged weight
    "data": ((8,), ("data",), P(), P("data"), 2),
    "tensor": ((4, 2), ("data", "tensor"), "tensor", P("data"), 2),
    "fsdp": ((8,), ("fsdp",), "fsdp", P("fsdp"), 2),
    "sequence": ((4, 2), ("data", "sequence"), P(), P("data", "sequence"), 2),
    "data, long": ((8,), ("data",), P(), P("data"), 32),
    "tensor, long": ((4, 2), ("data", "tensor"), "tensor", P("data"), 32),
    "sequence, long": ((4, 2), ("data", "sequence"), P(), P("data", "sequence"), 32),
    "fsdp, long": ((8,), ("fsdp",), "fsdp", P("fsdp"), 32),
    "groups": ((2, 4), ("data", "fsdp"), "fsdp", P(("data", "fsdp")), 2),
    "groups, long": ((2, 4), ("data", "fsdp"), "fsdp", P(("data", "fsdp")), 32),
}


METHODS = {
    "DoRA": jlora.DoRA(jlora.LoRA(rank=RANK, target="kernel")),
    "AdaLoRA": jlora.AdaLoRA(rank=RANK, target="kernel"),
    "VeRA": jlora.VeRA(rank=8, target="kernel"),
    "LoKr": jlora.LoKr(rank=1, target="kernel"),
    "LoHa": jlora.LoHa(rank=RANK, target="kernel"),
    "Full": jlora.Full(target="kernel"),
}


LORA = jlora.LoRA(rank=RANK, target="kernel")


def program(model, place, spec=LORA):
    """What the step sends; beside it, where a law asks for them, gradients with those of x, and the plain model's."""
    f, params = MODELS[model]
    shape, names, base_specs, batch, length = PLACES[place]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    adapted = jlora.shard.init(params, spec, mesh, base_specs)
    tx = optax.adamw(1e-3)
    lifted = jlora.lift(f)
    loss = lambda ad, x: jnp.mean(lifted(ad, x) ** 2)
    step = jlora.shard.train_step(loss, tx, mesh, adapted, batch=batch)
    state = jax.eval_shape(tx.init, adapted.trainable)
    x = jax.ShapeDtypeStruct((ROWS, length, WIDE), jnp.float32, sharding=NamedSharding(mesh, batch))
    step = step.lower(adapted.trainable, state, adapted.frozen, x).compile()

    base = adapted.frozen.base
    ours = jax.jit(jax.grad(lambda t, x, frozen: loss(jlora.join(t, frozen), x), argnums=(0, 1)))
    theirs = jax.jit(jax.grad(lambda x, p: jnp.mean(f(p, x) ** 2)))
    memory = step.memory_analysis()
    tokens = ROWS * length
    batch_bytes = 4 * math.prod(x.sharding.shard_shape(x.shape))
    options = {"batch": batch, "tx": tx, "tokens": tokens, "activations": jnp.float32}
    guess = jlora.shard.estimate(params, spec, mesh, base_specs, **options)
    others = {}
    if spec is LORA or place == "groups":
        others["with x"] = sent(ours.lower(adapted.trainable, x, adapted.frozen).compile())
    if place.startswith("fsdp"):
        others["plain"] = sent(theirs.lower(x, base).compile())
    return others | {
        "sent": sent(step),
        "trainable": jlora.count(adapted)[0],
        "arguments": memory.argument_size_in_bytes - batch_bytes,
        "temporary": memory.temp_size_in_bytes,
        "held": guess.total - guess.gradients,
        "guess": [[t.kind, t.what, list(t.over), t.bytes] for t in guess.traffic],
    }


if __name__ == "__main__":
    found = {f"{m} {p}": program(m, p) for m in MODELS for p in PLACES}
    others = [(name, place) for name in METHODS for place in ("data", "fsdp, long")] + [("LoHa", "groups")]
    found |= {f"{name} {place}": program("scanned", place, METHODS[name]) for name, place in others}
    print(json.dumps(found))
