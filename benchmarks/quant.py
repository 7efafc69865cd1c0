"""A step of QLoRA: bytes held, temporary memory and time, beside plain weights and beside qwix on the same model.

    python benchmarks/quant.py                          two processes, two minutes each on two cores
    python benchmarks/quant.py --unrolled --layers 4    layers in a Python loop, not in a scan
    python benchmarks/quant.py --only nf4 "qwix, nf4"

Layers of SmolLM2-135M (`examples/llama.py`: width 576, 9 heads in 3 groups, inner width 1536) with random weights, a
vocabulary of 8,192, batch 8 x 64, LoRA of r = 8 on all seven kernels, adamw. All variants compute in float32; they
differ in how the kernels are held. They are compiled once and timed in turn, round by round, in one process; a figure
is the median over rounds of its ratio to the reference of the same round. qwix (`pip install 'jlora[bench]'`) gets each
layer as its documentation says, `LoraProvider` with nf4 weights in tiles of 64, and the layers stand in the same scan.

  held       the kernels, or their codes and scales, measured on live buffers
  temp       temporary memory of the compiled step
  residuals  float copies of kernels that the forward pass hands to the backward pass: what the compiled forward pass
             puts out beside its own arguments
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import hlo
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jlora
import llama

BATCH, LENGTH, RANK = 8, 64, 8
KERNELS = ("query", "key", "value", "out", "gate", "up", "down")
AXES = {"kernel": "sio"}  # the layers alone: no name above them says that they are stacked
OURS = ("float32", "bfloat16", "int8", "nf4", "nf4+double")
THEIRS = {"qwix, int8": ("int8", None), "qwix, nf4": ("nf4", 64)}


def layers_of(config):
    """The graph of a layer, and the stacked parameters of all, random: speed does not depend on what they know."""
    graph, stack = nnx.split(llama.abstract(config).layers)
    rng = np.random.default_rng(0)
    draw = lambda s: rng.standard_normal(s.shape) * s.shape[-2] ** -0.5 if len(s.shape) == 3 else np.ones(s.shape)
    return graph, jax.tree.map(lambda s: jnp.asarray(draw(s), s.dtype), stack)


def run(graph, stack, x, places, unrolled):
    """x through the layers, in a scan or one after the other."""
    layer = lambda x, params: (nnx.merge(graph, params)(x, places, None)[0], None)
    if not unrolled:
        return jax.lax.scan(layer, x, stack)[0]
    for n in range(len(jax.tree.leaves(stack)[0])):
        x, _ = layer(x, jax.tree.map(lambda a, n=n: a[n], stack))
    return x


def ours(how, graph, stack, forward):
    """(trainable, frozen, their model's hidden states) of jlora."""
    if how == "bfloat16":
        kernel = lambda path: "kernel" in jax.tree_util.keystr(path)
        cast = lambda path, x: x.astype(jnp.bfloat16) if kernel(path) else x
        stack = jax.tree_util.tree_map_with_path(cast, stack)
    elif how != "float32":
        stack = jlora.quantize(stack, how, axes=AXES)
    adapted = jlora.adapt(stack, jlora.LoRA(rank=RANK, alpha=16, target=jlora.targets.linear), axes=AXES)
    lifted = jlora.lift(lambda stack, x, places: forward(graph, stack, x, places))
    return *jlora.split(adapted), lambda t, f, x, places: lifted(jlora.join(t, f), x, places)


def theirs(how, graph, stack, forward):
    """The same of qwix: each layer goes through it once, and they are stacked again."""
    import qwix

    qtype, tile = THEIRS[how]
    names = f".*({'|'.join(KERNELS)})"
    provider = qwix.LoraProvider(module_path=names, weight_qtype=qtype, tile_size=tile, rank=RANK, alpha=16)
    x, places, made = jnp.ones((1, LENGTH, 576)), jnp.arange(LENGTH), []
    for n in range(len(jax.tree.leaves(stack)[0])):
        one = nnx.merge(graph, jax.tree.map(lambda a, n=n: a[n], stack))
        made.append(nnx.split(qwix.apply_lora_to_model(one, provider, x, places, None, rngs=nnx.Rngs(n))))
    graph, stack = made[0][0], jax.tree.map(lambda *a: jnp.stack(a), *(state for _, state in made))
    trainable, frozen = nnx.split_state(stack, nnx.LoRAParam, ...)
    return trainable, frozen, lambda t, f, x, places: forward(graph, nnx.merge_state(t, f), x, places)


def kernels(tree):
    """Bytes in live buffers of what stands for kernels."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return sum(x.on_device_size_in_bytes() for path, x in leaves if "kernel" in jax.tree_util.keystr(path))


def variant(how, config, unrolled):
    """A compiled step of (trainable, optimizer state), both donated; its state, its other argument, and its facts."""
    rng = np.random.default_rng(1)
    graph, stack = layers_of(config)
    forward = lambda graph, stack, x, places: run(graph, stack, x, places, unrolled)
    trainable, frozen, hidden = (theirs if how in THEIRS else ours)(how, graph, stack, forward)
    del stack
    embedding = jnp.asarray(rng.standard_normal((config.vocabulary, config.width)) * config.width**-0.5, jnp.float32)
    ids = jnp.asarray(rng.integers(config.vocabulary, size=(BATCH, LENGTH + 1)), jnp.int32)
    tx = optax.adamw(1e-4)

    def loss(trainable, frozen, embedding, ids):
        x = hidden(trainable, frozen, embedding[ids[:, :-1]], jnp.arange(LENGTH))
        logits = x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5) @ embedding.T
        return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

    def step(trainable, state, *rest):
        value, grads = jax.value_and_grad(loss)(trainable, *rest)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    rest = (frozen, embedding, ids)
    forward_pass = jax.jit(lambda t, *rest: jax.vjp(lambda t: loss(t, *rest), t)).lower(trainable, *rest).compile()
    sizes = {config.width, config.inner, config.groups * config.head}
    matrix = lambda dtype, shape: "f" in dtype and len(shape) >= 2 and {*shape[-2:]} <= sizes and LENGTH not in shape
    kept = [(dtype, shape) for dtype, shape in hlo.outputs(forward_pass.as_text()) if matrix(dtype, shape)]
    dense = sum(math.prod(shape) * hlo.BYTES[dtype] for dtype, shape in kept)
    trainable = jax.tree.map(jnp.array, trainable)
    state = tx.init(trainable)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trainable, state, *rest).compile()
    facts = {
        "held": kernels(frozen) / 1e6,
        "temp": compiled.memory_analysis().temp_size_in_bytes / 1e6,
        "dense": dense / 1e6,
        "trainable": sum(x.size for x in jax.tree.leaves(trainable)),
    }
    return compiled, (trainable, state), rest, facts


def measure(only, rounds, config, unrolled):
    """`{name: [seconds of each round]}` and `{name: facts}`."""
    made, seconds, facts, states = {}, {name: [] for name in only}, {}, {}
    for name in only:
        compiled, states[name], rest, facts[name] = variant(name, config, unrolled)
        made[name] = compiled, rest
    for k in range(rounds + 2):  # two rounds to warm up
        for name, (compiled, rest) in made.items():
            start = time.perf_counter()
            *states[name], value = compiled(*states[name], *rest)
            jax.block_until_ready(value)
            if k >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds, facts


def ratio(runs, name, to):
    """Median over processes of the median over rounds; None where either was not run."""
    if any(n not in runs[0][0] for n in (name, to)):
        return None
    each = [statistics.median(a / b for a, b in zip(s[name], s[to], strict=True)) for s, _ in runs]
    return statistics.median(each), each


def main():
    """Runs the processes and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--unrolled", action="store_true", help="layers in a Python loop")
    parser.add_argument("--only", nargs="*", default=[*OURS, *THEIRS], help="names of rows")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        config = llama.Config(vocabulary=8192, layers=options.layers)
        print(json.dumps(measure(options.only, options.rounds, config, options.unrolled)))
        return
    command = [sys.executable, __file__, "--worker", *sys.argv[1:]]
    runs = []
    for n in range(options.processes):
        print(f"process {n + 1} of {options.processes} ...", file=sys.stderr, flush=True)
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    form = "unrolled" if options.unrolled else "scanned"
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {options.layers} layers {form}, {options.rounds} rounds\n")
    print(f"{'':12s}  {'held MB':>8s}  {'temp MB':>8s}  {'residuals':>9s}  {'x float32':>9s}  {'x qwix':>6s}  each")
    show = lambda r: "-" if r is None else f"{r[0]:.3f}"
    for name in runs[0][0]:
        fact, peer = runs[0][1][name], ratio(runs, name, "qwix, int8" if "int8" in name else "qwix, nf4")
        each = " ".join(f"{x:.3f}" for x in peer[1]) if peer else ""
        print(
            f"{name:12s}  {fact['held']:8.1f}  {fact['temp']:8.1f}  {fact['dense']:9.1f}"
            f"  {show(ratio(runs, name, 'float32')):>9s}  {show(peer):>6s}  {each}"
        )
    first = next(iter(runs[0][0]))
    print(f"\n{first} took {1000 * statistics.median(statistics.median(s[first]) for s, _ in runs):.0f} ms")


if __name__ == "__main__":
    main()
