"""One training step of a BERT of MiniLM's size, as ratios to the cheapest step that could train anything.

    python benchmarks/step.py                      three processes, two minutes each on two cores
    python benchmarks/step.py --processes 1 --rounds 5
    python benchmarks/step.py --methods            every method on all 36 kernels, factored and dense
    python benchmarks/step.py --ranks              optimizers that change ranks, beside the same method under adamw

6 layers x 384, 12 heads, batch 32 x 64, float32, adamw, no dropout, r = 8. All variants are compiled once and timed
in turn, round by round, in one process; a figure is the median over rounds of its ratio to the floor of the same
round, and the table gives the median over processes. The floor trains the lowest adapted layer's query bias alone:
the forward pass, and the backward pass for activations.

  floor          the plain model, one bias trained
  floor, lifted  the same through `jlora.lift` with one bias adapted
  q, v           LoRA on query and value of every layer
  all            LoRA on all 36 dense kernels
  materialise    the same, merging W0 + s a b before the call
  full           every parameter trained
  full, lifted   the same through `jlora.lift`, every leaf a `jlora.Full` delta

With `--methods`: a row a method, r = 8 (VeRA 256), and one for the same under `lift(fn, dense=True)`, merge then call.
With `--ranks`: LoRA, AdaLoRA and SoRA under adamw; `adalora` with a new mask at every step, `sora`, `selora` with a
probe at every step; and what `compact` leaves of an AdaLoRA of which half of the ranks were pruned, unlike ones in
each weight, beside a LoRA of the same total. The last column is then the ratio to LoRA, or to that LoRA of rank r / 2.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora
from bert import Bert, Config, shapes

BATCH, LENGTH, RANK, TOKENS = 32, 64, 8, 20
FOUNDATION = ("floor, lifted", "q, v", "all", "materialise", "full", "full, lifted")
METHODS = {
    "LoRA": lambda target: jlora.LoRA(rank=RANK, alpha=16, target=target),
    "rsLoRA": lambda target: jlora.LoRA(rank=RANK, alpha=16, scaling="sqrt", target=target),
    "LoRAXS": lambda target: jlora.LoRAXS(rank=RANK, alpha=16, target=target),
    "MiCA": lambda target: jlora.MiCA(rank=RANK, alpha=16, target=target),
    "KaSA": lambda target: jlora.KaSA(rank=RANK, alpha=16, target=target),
    "LoRAFA": lambda target: jlora.LoRAFA(rank=RANK, alpha=16, target=target),
    "AdaLoRA": lambda target: jlora.AdaLoRA(rank=RANK, alpha=16, target=target),
    "SoRA": lambda target: jlora.SoRA(rank=RANK, alpha=16, target=target),
    "KronA": lambda target: jlora.KronA(target=target),
    "LoKr": lambda target: jlora.LoKr(rank=RANK, alpha=16, target=target),
    "DoRA": lambda target: jlora.DoRA(jlora.LoRA(rank=RANK, alpha=16, target=target)),
    "DeLoRA": lambda target: jlora.DeLoRA(rank=RANK, target=target),
    "LoHa": lambda target: jlora.LoHa(rank=RANK, alpha=16, target=target),
    "VeRA": lambda target: jlora.VeRA(rank=256, target=target),
    "VBLoRA": lambda target: jlora.VBLoRA(rank=RANK, vectors=90, target=target),
    "TiedLoRA": lambda target: jlora.TiedLoRA(rank=RANK, target=target),
    "RandLoRA": lambda target: jlora.RandLoRA(rank=RANK, target=target),
    "GraLoRA": lambda target: jlora.GraLoRA(rank=RANK, alpha=16, target=target),
    "MiSS": lambda target: jlora.MiSS(rank=RANK, target=target),
    "HiRA": lambda target: jlora.HiRA(rank=RANK, alpha=16, target=target),
    "IA3": lambda target: jlora.IA3(target=target),
    "SSF": lambda target: jlora.SSF(target=target),
    "GLoRA": lambda target: jlora.GLoRA(rank=RANK, target=target),
    "RoAd": lambda target: jlora.RoAd(target=target),
    "OFT": lambda target: jlora.OFT(block=32, target=target),
    "PSOFT": lambda target: jlora.PSOFT(rank=64, target=target),
    "BOFT": lambda target: jlora.BOFT(block=8, factors=4, target=target),
    "FourierFT": lambda target: jlora.FourierFT(n=1000, target=target),
    "SHiRA": lambda target: jlora.SHiRA(rank=RANK, target=target),
    "C3A": lambda target: jlora.C3A(block=64, target=target),
    "HRA": lambda target: jlora.HRA(rank=RANK, target=target),
    "Houlsby": lambda target: jlora.Houlsby(bottleneck=64, target=OUTPUTS),
    "Pfeiffer": lambda target: jlora.Pfeiffer(bottleneck=64),
    "Parallel": lambda target: jlora.Parallel(bottleneck=64, target=BLOCKS, input="intermediate/kernel"),
    "KronA^B": lambda target: jlora.ParallelKronA(),
    "KronA^B_res": lambda target: jlora.ParallelKronA(residual=True),
    "PrefixTuning": lambda target: jlora.PrefixTuning(count=TOKENS),
    "PromptTuning": lambda target: jlora.PromptTuning(count=TOKENS),
}
PROMPTS = ("PrefixTuning", "PromptTuning")  # inputs are longer by the virtual tokens
# Masks, thresholds and probes fall into the timed rounds.
SCHEDULE = {"target_rank": 5, "total_steps": 10**4, "interval": 1}
RANKS = {
    "adalora": ("AdaLoRA", lambda tx, adapted: jlora.rank.adalora(tx, adapted, **SCHEDULE)),
    "sora": ("SoRA", lambda tx, adapted: jlora.rank.sora(tx, adapted, learning_rate=1e-4, sparsity=1e-2)),
    "selora": ("LoRA", lambda tx, adapted: jlora.rank.selora(tx, adapted, interval=1)),
}
HALF = "LoRA, r / 2"
PEER = {HALF: HALF, "compact": HALF}
KERNELS = r"encoder/layer_\d+/.*(query|key|value|output|intermediate)/kernel$"
OUTPUTS = r"encoder/layer_\d+/.*output/kernel$"  # of attention and of the feed-forward block
BLOCKS = r"encoder/layer_\d+/output/kernel$"
FLOOR = r"layer_0/attention/query/bias$"


def random_params(config):
    """A BERT with random weights, the head's among them: speed does not depend on what it knows."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape), s.dtype), shapes(config))


def variants(config):
    """`{name: make}`; `make()` compiles a step of (trainable, optimizer state), both donated, and gives both."""
    model, params = Bert(config), random_params(config)
    rng = np.random.default_rng(1)
    ids = jnp.asarray(rng.integers(config.vocab_size, size=(BATCH, LENGTH)), jnp.int32)
    mask, labels = jnp.ones((BATCH, LENGTH), bool), jnp.asarray(rng.integers(2, size=BATCH))
    adamw = optax.adamw(1e-4)

    def make(join, frozen, trainable, apply, tx=adamw, given=(ids, mask)):
        def loss(trainable, frozen):
            logits = apply({"params": join(trainable, frozen)}, *given)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

        def step(trainable, state, frozen):
            value, grads = jax.value_and_grad(loss)(trainable, frozen)
            updates, state = tx.update(grads, state, trainable)
            return optax.apply_updates(trainable, updates), state, value

        trainable = jax.tree.map(jnp.array, trainable)
        state = tx.init(trainable)
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(trainable, state, frozen).compile()
        return compiled, (trainable, state), frozen

    def plain(name):
        return make(lambda t, f: put(f, name, t), params, get(params, name), model.apply)

    def adapted(spec, wrap=None, **how):
        return begun(jlora.adapt(params, spec), wrap, **how)

    def begun(whole, wrap=None, **how):
        tx = wrap(adamw, whole) if wrap else adamw
        return make(jlora.join, whole.frozen, whole.trainable, jlora.lift(model.apply, **how), tx)

    def prompted(method):
        whole = jlora.adapt(params, method, fn=lambda p, *args: model.apply({"params": p}, *args), args=(ids, mask))
        longer = jlora.prompts.prepend(jlora.prompts.virtual_ids(whole), ids, mask=mask)
        apply = jlora.lift(model.apply)
        return make(jlora.join, whole.frozen, whole.trainable, apply, given=(longer.ids, longer.mask))

    bias = ("encoder", "layer_0", "attention", "query", "bias")
    every = jlora.LoRA(rank=RANK, alpha=16, target=KERNELS)
    made = {
        "floor": lambda: plain(bias),
        "floor, lifted": lambda: adapted(jlora.Full(target=FLOOR)),
        "q, v": lambda: adapted(jlora.LoRA(rank=RANK, alpha=16, target=r"(query|value)/kernel$")),
        "all": lambda: adapted(every),
        "materialise": lambda: adapted(every, dense=True),
        "full": lambda: make(lambda t, f: t, None, params, model.apply),
        "full, lifted": lambda: adapted(jlora.Full(target=".")),
    }
    for name, method in METHODS.items():
        if name in PROMPTS:
            made[name] = lambda method=method: prompted(method(KERNELS))
            continue
        made[name] = lambda method=method: adapted(method(KERNELS))
        if not method(KERNELS).on_outputs:  # no weight can say what these do
            made[f"{name}, dense"] = lambda method=method: adapted(method(KERNELS), dense=True)
    made[HALF] = lambda: adapted(jlora.LoRA(rank=RANK // 2, alpha=16, target=KERNELS))
    made["compact"] = lambda: begun(compacted(params))
    for name, (method, wrap) in RANKS.items():
        made[name] = lambda method=method, wrap=wrap: adapted(METHODS[method](KERNELS), wrap)
    return made


def compacted(params):
    """What is left of an AdaLoRA, as a plain LoRA, when half of its ranks are gone at random."""
    whole = jlora.adapt(params, METHODS["AdaLoRA"](KERNELS))
    rng = np.random.default_rng(2)
    noise = lambda x: jnp.asarray(rng.standard_normal(x.shape), x.dtype)
    trained = jlora.join(jax.tree.map(lambda x: x + 0.02 * noise(x), whole.trainable), whole.frozen)
    scores = jax.tree.map(noise, jlora.rank.magnitude(trained))
    half = jlora.rank.prune(trained, scores, sum(x.size for x in jax.tree.leaves(scores)) // 2)
    return jlora.rank.compact(half, plain=True)


def get(tree, path):
    """The leaf of a nested dictionary."""
    for step in path:
        tree = tree[step]
    return tree


def put(tree, path, leaf):
    """A nested dictionary with one leaf changed."""
    head, *rest = path
    return {**tree, head: put(tree[head], rest, leaf) if rest else leaf}


def measure(rounds, only):
    """`{name: [seconds of each round]}`, and compiled temporary megabytes and optimizer leaves of each."""
    made = {n: make() for n, make in variants(Config(num_hidden_layers=6)).items() if n in only or n == "floor"}
    seconds = {name: [] for name in made}
    facts = {}
    states = {}
    for name, (step, state, _) in made.items():
        memory = step.memory_analysis().temp_size_in_bytes / 1e6
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        facts[name] = {"temp": memory, "trainable": size(state[0]), "state": size(state[1])}
        states[name] = state
    for k in range(rounds + 2):  # two rounds to warm up
        for name, (step, _, frozen) in made.items():
            start = time.perf_counter()
            trainable, state, value = step(*states[name], frozen)
            jax.block_until_ready((trainable, state, value))
            states[name] = (trainable, state)
            if k >= 2:
                seconds[name].append(time.perf_counter() - start)
    return seconds, facts


def interval(ratios):
    """Median, and the 5th and 95th percentile of the rounds."""
    return statistics.median(ratios), *np.quantile(ratios, [0.05, 0.95]).tolist()


def main():
    """Runs the processes and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="names of rows")
    parser.add_argument("--methods", action="store_true", help="the rows of the methods")
    parser.add_argument("--ranks", action="store_true", help="the rows of optimizers that change ranks")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        print(json.dumps(measure(options.rounds, options.only)))
        return
    rows = ["full", *(f"{name}{how}" for name in METHODS for how in ("", ", dense"))]
    ranked = [*dict.fromkeys(method for method, _ in RANKS.values()), *RANKS, HALF, "compact"]
    only = options.only or (rows if options.methods else ranked if options.ranks else FOUNDATION)
    peer = {name: PEER.get(name, "LoRA") for name in ranked} if options.ranks else {}
    command = [sys.executable, __file__, "--worker", "--rounds", str(options.rounds), "--only", *only]
    runs = []
    for n in range(options.processes):
        print(f"process {n + 1} of {options.processes} ...", file=sys.stderr, flush=True)
        runs.append(json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout))
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {options.rounds} rounds, {options.processes} processes\n")
    last = "x LoRA" if options.ranks else "x full"
    header = f"{'':15s}  {'x floor':>8s}  {'processes':>19s}  {'90 % of rounds':>14s}  {last:>6s}"
    print(f"{header}  {'temp MB':>8s}  {'trainable':>10s}  {'state':>10s}")
    for name in runs[0][0]:
        each = [interval([a / b for a, b in zip(s[name], s["floor"], strict=True)]) for s, _ in runs]
        other = peer.get(name, "full")
        full = [
            statistics.median([a / b for a, b in zip(s[name], s[other], strict=True)]) if other in s else 0
            for s, _ in runs
        ]
        spread = " ".join(f"{m:.3f}" for m, _, _ in each)
        middle = statistics.median(m for m, _, _ in each)
        low, high = min(e[1] for e in each), max(e[2] for e in each)
        fact = runs[0][1][name]
        print(
            f"{name:15s}  {middle:8.3f}  {spread:>19s}  {low:6.3f}-{high:6.3f}  {statistics.median(full):6.3f}"
            f"  {fact['temp']:8.1f}  {fact['trainable']:10,d}  {fact['state']:10,d}"
        )
    floor = statistics.median(statistics.median(s["floor"]) for s, _ in runs)
    print(f"\nthe floor took {1000 * floor:.0f} ms")


if __name__ == "__main__":
    main()
