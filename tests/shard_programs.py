"""What compiled programs send between devices, with XLA's optimisers on: run in a process of its own by `test_shard`.

Prints one JSON object, `{program: {"sent": [[kind, count of elements, bytes, times], ...], ...}}`.
"""

import json
import math
import os
import re

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
import optax  # noqa: E402
from jax import lax  # noqa: E402
from jax.sharding import AxisType, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import jlora  # noqa: E402

WIDE, INNER, LAYERS, RANK, ROWS = 48, 80, 3, 2, 8

KINDS = "all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter"
COLLECTIVE = re.compile(rf"= (\(?[^=]*?\)?) ({KINDS})(?:-start)?\(")
BYTES = {"f32": 4, "s32": 4, "u32": 4, "bf16": 2, "pred": 1}


def sent(compiled, layers=LAYERS):
    """`[kind, elements, bytes, times]` of every array that is sent; `layers` times inside a loop."""
    found, times = [], 1
    for line in re.sub(r"/\*.*?\*/", "", compiled.as_text()).splitlines():
        if re.match(r"(ENTRY )?%\S+ \(.*\{$", line):
            times = 1 if line.startswith("ENTRY") or "while" not in compiled.as_text() else layers
        if match := COLLECTIVE.search(line):
            for kind, shape in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                size = math.prod(int(n) for n in shape.split(",") if n)
                found.append([match[2], size, size * BYTES[kind], times])
    return sorted(found)


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
}


def program(model, place):
    f, params = MODELS[model]
    shape, names, base_specs, batch, length = PLACES[place]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(shape))
    spec = jlora.LoRA(rank=RANK, target="kernel")
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
    return {
        "sent": sent(step),
        "with x": sent(ours.lower(adapted.trainable, x, adapted.frozen).compile()),
        "plain": sent(theirs.lower(x, base).compile()),
        "trainable": jlora.count(adapted)[0],
        "arguments": memory.argument_size_in_bytes - batch_bytes,
        "temporary": memory.temp_size_in_bytes,
        "held": guess.total - guess.gradients,
        "guess": {f"{t.kind}: {t.what}": t.bytes for t in guess.traffic},
    }


if __name__ == "__main__":
    print(json.dumps({f"{m} {p}": program(m, p) for m in MODELS for p in PLACES}))
