"""Training steps compiled for TPUs that are not there: memory, collectives and products of a v5e 2x4 and a 16x16.

    make tpu                                 in an environment of its own; or in any that has libtpu:
    python benchmarks/tpu_aot.py             about half an hour on two cores
    python benchmarks/tpu_aot.py --models minilm --steps lora

libtpu compiles on any x86 Linux machine; nothing runs. The MiniLM of `examples/bert.py` (float32) and a scanned,
rematerialised decoder of an 8B Llama's shape (bfloat16), each with LoRA on every linear layer, with full fine-tuning,
and `plain`: the gradient of the embedded tokens alone, which sends what the model sends without an adapter. The batch
is over all chips; the decoder is cut in 4 or 8 parts, and chips beyond those are groups that hold the same parts. In 4
parts there are groups at 8 chips as at 256, so that one can be compared with the other.

Two of XLA's TPU options are off, so that a gather can be read as one: loops that gather a weight piece by piece while
they multiply it (windowed einsum), and collectives fused with what runs beside them.
"""

import argparse
import math
import os
import sys
import time
from pathlib import Path

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_ACCELERATOR_TYPE": "v5litepod-8"}
os.environ |= {"TPU_WORKER_HOSTNAMES": "localhost", "TPU_LOG_DIR": "disabled", "TF_CPP_MIN_LOG_LEVEL": "3"}
sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console

import jlora
from bert import Bert, Config, shapes

OPTIONS = {
    "xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000",
    "xla_tpu_enable_async_collective_fusion": "false",
}
CHIPS = {8: "v5e:2x4", 256: "v5e:16x16"}
PARTS = {  # in how many a model is cut, over "fsdp"; the groups are over "data"
    ("minilm", "lora"): (1,),
    ("minilm", "full"): (1,),
    ("decoder", "lora"): (4, 8),
    ("decoder", "full"): (8,),  # in 4 the program takes 19.7 GiB of the 15.75 a chip has
    ("decoder", "plain"): (4, 8),
}
LAYERS, WIDTH, INNER, HEADS, GROUPS, SIZE, VOCAB = 32, 4096, 14336, 32, 8, 128, 128_256


def decoder_shapes():
    """The parameters of the decoder: 8.03 billion of them, in bfloat16."""
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    kernel = lambda *shape: {"kernel": array(LAYERS, *shape)}
    layers = {
        "query": kernel(WIDTH, HEADS * SIZE),
        "key": kernel(WIDTH, GROUPS * SIZE),
        "value": kernel(WIDTH, GROUPS * SIZE),
        "out": kernel(HEADS * SIZE, WIDTH),
        "gate": kernel(WIDTH, INNER),
        "up": kernel(WIDTH, INNER),
        "down": kernel(INNER, WIDTH),
        "attention_norm": {"scale": array(LAYERS, WIDTH)},
        "mlp_norm": {"scale": array(LAYERS, WIDTH)},
    }
    head = {"final_norm": {"scale": array(WIDTH)}, "lm_head": {"kernel": array(WIDTH, VOCAB)}}
    return {"embed": {"embedding": array(VOCAB, WIDTH)}, "layers": layers} | head


def norm(x, scale):
    """x over its root mean square."""
    wide = x.astype(jnp.float32)
    return (wide * lax.rsqrt(jnp.mean(wide**2, -1, keepdims=True) + 1e-5)).astype(x.dtype) * scale


def rotate(x):
    """Rotary positions, on (batch, length, heads, size)."""
    angle = jnp.arange(x.shape[1])[:, None] * 500_000.0 ** (-jnp.arange(0, SIZE, 2) / SIZE)
    cos, sin = (f(angle)[:, None].astype(x.dtype) for f in (jnp.cos, jnp.sin))
    a, b = jnp.split(x, 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1)


def block(x, p):
    """Grouped attention and a gated perceptron."""
    B, T, _ = x.shape
    h = norm(x, p["attention_norm"]["scale"])
    heads = lambda name, n: (h @ p[name]["kernel"]).reshape(B, T, n, SIZE)
    q, k, v = rotate(heads("query", HEADS)), rotate(heads("key", GROUPS)), heads("value", GROUPS)
    q = q.reshape(B, T, GROUPS, HEADS // GROUPS, SIZE)
    a = jnp.einsum("btghd,bsgd->bghts", q, k).astype(jnp.float32) / math.sqrt(SIZE)
    a = jax.nn.softmax(jnp.where(jnp.tril(jnp.ones((T, T), bool)), a, -1e30), -1).astype(x.dtype)
    x = x + jnp.einsum("bghts,bsgd->btghd", a, v).reshape(B, T, HEADS * SIZE) @ p["out"]["kernel"]
    h = norm(x, p["mlp_norm"]["scale"])
    return x + (jax.nn.silu(h @ p["gate"]["kernel"]) * (h @ p["up"]["kernel"])) @ p["down"]["kernel"]


def decoder(params, x, place):
    """Logits of embedded tokens.

    An embedding that is cut along the model's width gives activations that are cut so too, and XLA would go on with
    them: `place` says that they are cut by rows.
    """
    here = lambda x: lax.with_sharding_constraint(x, place)
    x, _ = lax.scan(
        jax.checkpoint(lambda x, p: (here(block(x, p)), None), prevent_cse=False), here(x), params["layers"]
    )
    return norm(x, params["final_norm"]["scale"]) @ params["lm_head"]["kernel"]


def decoder_loss(params, ids, place, shift=0):
    """Cross-entropy of the next token; `shift` is added to the embedded ones."""
    logits = decoder(params, params["embed"]["embedding"][ids] + shift, place)
    return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1].astype(jnp.float32), ids[:, 1:]).mean()


def minilm_loss(params, ids, place, shift=0):
    """Cross-entropy of two classes."""
    del place, shift  # nothing is cut but the batch
    logits = Bert(Config()).apply({"params": params}, ids, jnp.ones(ids.shape, bool))
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 0] % 2).mean()


KERNELS = r"encoder/layer_\d+/.*(query|key|value|output|intermediate)/kernel$"
MODELS = {
    # name: (loss, parameters, base specs, rows and tokens a chip, LoRA, optimizer of the full step)
    "minilm": (
        minilm_loss, lambda: shapes(Config()), P(), (32, 64),
        jlora.LoRA(rank=8, alpha=16, target=KERNELS), optax.adamw(1e-4),
    ),
    "decoder": (
        decoder_loss, decoder_shapes, "fsdp", (1, 896),
        jlora.LoRA(rank=16, alpha=32, target=jlora.targets.linear), optax.adafactor(1e-4),  # Adam's would not fit 2x4
    ),
}  # fmt: skip


def compiled(model, parts, step, chips):
    """A compiled step of a model in so many parts; its estimate; the bytes of a chip's share of the batch."""
    loss, params, base_specs, (rows, length), lora, full = MODELS[model]
    devices = topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[chips]).devices
    axes = ("data", "fsdp")
    mesh, batch = Mesh(np.array(devices).reshape(-1, parts), axes), P(axes)
    place = NamedSharding(mesh, batch)
    ids = jax.ShapeDtypeStruct((rows * chips, length), jnp.int32, sharding=place)
    params = params()
    if step == "plain":
        base = jlora.shard.abstract(mesh, params, base_specs)
        shift = jax.ShapeDtypeStruct((rows * chips, length, WIDTH), jnp.bfloat16, sharding=place)
        lowered = jax.jit(jax.grad(lambda s, p, ids: loss(p, ids, place, s)), out_shardings=place)
        return lowered.lower(shift, base, ids).compile(OPTIONS), None, 0
    spec, tx = (lora, optax.adamw(1e-4)) if step == "lora" else (jlora.Full(target="."), full)
    adapted = jlora.shard.abstract(mesh, jax.eval_shape(lambda p: jlora.adapt(p, spec), params), base_specs)
    lifted = jlora.lift(loss)
    run = jlora.shard.train_step(lambda ad, ids: lifted(ad, ids, place), tx, mesh, adapted, batch=batch)
    trainable, frozen = jlora.split(adapted)
    held = lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s)
    state = jax.tree.map(held, jax.eval_shape(tx.init, trainable), jlora.shard.state_shardings(tx, adapted))
    guess = jlora.shard.estimate(params, spec, mesh, base_specs, batch=batch, tx=tx)
    return run.lower(trainable, state, frozen, ids).compile(OPTIONS), guess, 4 * rows * length


def squeezed(shape):
    """A shape without order, and without axes of size one."""
    return tuple(sorted(n for n in shape if n > 1))


def facts(model, parts, step, chips, keep):
    """What the tables print of one program."""
    program, guess, batch = compiled(model, parts, step, chips)
    text, memory = program.as_text(), program.memory_analysis()
    if keep:
        (keep / f"{model}-{parts}-{step}-{chips}.hlo").write_text(text)
    found = hlo.sent(text)
    whole = [a.shape for a in jax.tree.leaves(MODELS[model][1]()) if a.ndim > 1]
    stacks = {squeezed(s) for s in whole if len(s) == 3}
    cut = {squeezed(n // parts if n == WIDTH else n for n in s) for s in stacks}
    weights = {squeezed(s[1:] if len(s) == 3 else s) for s in whole}
    # by size, not by shape: XLA joins weights that meet one activation
    smallest = min((math.prod(s[1:]) for s in whole if len(s) == 3), default=0)
    gathered = [s for s in found if s.kind == "all-gather" and s.elements >= smallest]
    reduced = [s for s in found if s.kind in ("all-reduce", "reduce-scatter") and s.elements > 1]
    made = hlo.made(text)
    large = max(made, key=lambda a: math.prod(a[1]) * hlo.BYTES.get(a[0], 0))
    return {
        "held": memory.argument_size_in_bytes - batch,
        "guess": guess and guess.total - guess.gradients,
        "temp": memory.temp_size_in_bytes,
        "largest": f"{large[0]}{list(large[1])}",
        "stacks": sum(n for (_, shape), n in made.items() if squeezed(shape) in stacks | cut),
        "matrices": sum(
            n for (_, shape), n in made.items() if len(squeezed(shape)) == 2 and squeezed(shape) in weights
        ),
        "weights gathered": sum(s.times for s in gathered),
        "weights": sum(s.bytes for s in gathered),
        "gradients": sum(s.bytes for s in reduced),
        "guessed gradients": guess and guess.sent("", "factor gradients"),
        "sent": {kind: sum(s.bytes for s in found if s.kind == kind) for kind in hlo.KINDS},
        "wide dots": sum("f32" in operands for operands in hlo.dots(text)),
        "dots": len(hlo.dots(text)),
    }


def main():
    """Compiles everything, then prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--steps", nargs="*", default=["lora", "full", "plain"])
    parser.add_argument("--keep", type=Path, help="a folder for the texts of the programs")
    options = parser.parse_args()
    try:
        topologies.get_topology_desc(platform="tpu", topology_name=CHIPS[8])
    except Exception as error:  # whatever libtpu, or its absence, raises
        reason = str(error).splitlines()[0][:200]
        print(f"skipped: no TPU compiler here ({reason}); `pip install libtpu` has one for x86 Linux")
        return
    console = Console(stderr=True)
    rows = {}
    chosen = [(m, s, parts) for (m, s), cut in PARTS.items() for parts in cut]
    for model, step, parts in (c for c in chosen if c[0] in options.models and c[1] in options.steps):
        for chips in CHIPS:
            name = f"{model}{f' in {parts}' if parts > 1 else ''}, {step}, {chips}"
            began = time.monotonic()
            with console.status(f"{name} chips"):
                row = rows[name] = facts(model, parts, step, chips, options.keep)
            held = f"{row['held']:,} bytes held, {row['temp']:,} temporary"
            console.print(f"{name} chips: {time.monotonic() - began:.0f} s; {held}")
    print(f"jax {jax.__version__}, {os.cpu_count()} cores; bytes of one chip in MB (10^6)\n")
    head = f"{'':24s} {'held':>9s} {'estimate':>9s} {'ratio':>7s} {'temp':>8s}   {'largest array that is made'}"
    print(head)
    for name, row in rows.items():
        mb = lambda n: f"{n / 1e6:9,.1f}"
        if row["guess"]:
            ratio = row["held"] / row["guess"]
            held = f"{mb(row['held'])} {mb(row['guess'])} {ratio:7.4f} {row['temp'] / 1e6:8,.0f}"
            print(f"{name:24s} {held}   {row['largest']}")
    print(f"\n{'sent in one step':24s} " + " ".join(f"{kind:>18s}" for kind in hlo.KINDS))
    for name, row in rows.items():
        print(f"{name:24s} " + " ".join(f"{n / 1e6:18,.3f}" for n in row["sent"].values()))
    titles = ("gradients", "estimate", "weights gathered", "their MB", "float32 dots", "stacks made", "matrices made")
    print(f"\n{'':24s} " + " ".join(f"{t:>16s}" for t in titles))
    for name, row in rows.items():
        cells = [
            f"{row['gradients']:,}", f"{row['guessed gradients'] or 0:,}", row["weights gathered"],
            f"{row['weights'] / 1e6:,.0f}", f"{row['wide dots']} of {row['dots']}", row["stacks"], row["matrices"],
        ]  # fmt: skip
        print(f"{name:24s} " + " ".join(f"{c:>16}" for c in cells))


if __name__ == "__main__":
    main()
