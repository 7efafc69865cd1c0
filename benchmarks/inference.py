"""Latency of inference, as ratios to the plain model: what is merged costs nothing, what is added costs something.

    python benchmarks/inference.py                          all four settings, half an hour on two cores
    python benchmarks/inference.py --batch 1 --length 128   one setting
    python benchmarks/inference.py --plot latency           draws the table too, latency.png and latency.svg

A BERT of MiniLM's size (6 layers x 384, 12 heads), float32, random weights. All rows of a setting are compiled once and
called in turn, round by round, in one process: a figure is the median over rounds of its ratio to the plain model in
the same round. The spread is what 90 % of the rounds lie in; the plain model is called twice a round, and its second
call, as a row of its own, is the noise of the machine.

  plain, again   the model and its own parameters
  LoRA, merged   the same program on `jlora.merge`d parameters
  LoRA           lifted, r = 8: on query and value, and on all 36 dense kernels
  Houlsby ...    modules of width 64 behind or beside the blocks; KronA^B is factored, as it is in training
  prefix, prompt 20 virtual tokens, which the model's attention (and, for the prompt, all of it) has besides
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import jax
import jax.numpy as jnp
import numpy as np

import jlora
from bert import Bert, Config, shapes

CONFIG = Config(num_hidden_layers=6, max_position_embeddings=640)  # room for virtual tokens in front of 512
WIDTH, TOKENS = 64, 20
KERNELS = r"encoder/layer_\d+/.*(query|key|value|output|intermediate)/kernel$"
SETTINGS = {(1, 128): 60, (1, 512): 30, (32, 128): 12, (32, 512): 5}  # (batch, length): rounds
PLAIN, AGAIN, MERGED = "plain", "plain, again", "LoRA, merged"
ROWS = {
    "LoRA, q and v": jlora.LoRA(rank=8, alpha=16, target=r"(query|value)/kernel$"),
    "LoRA, all": jlora.LoRA(rank=8, alpha=16, target=KERNELS),
    "Houlsby": jlora.Houlsby(WIDTH),
    "Pfeiffer": jlora.Pfeiffer(WIDTH),
    "Parallel": jlora.Parallel(WIDTH),
    "KronA^B": jlora.ParallelKronA(),
    "KronA^B_res": jlora.ParallelKronA(residual=True),
    "prefix": jlora.PrefixTuning(count=TOKENS),
    "prompt": jlora.PromptTuning(count=TOKENS),
}


def trained(adapted):
    """Factors away from their start, so that nothing is a product with zeros."""
    rng = np.random.default_rng(2)
    noise = lambda x: x + jnp.asarray(0.02 * rng.standard_normal(x.shape), x.dtype)
    return jlora.join(jax.tree.map(noise, adapted.trainable), adapted.frozen)


def calls(batch, length):
    """`{name: (a compiled program, its arguments)}` of one setting."""
    model, rng = Bert(CONFIG), np.random.default_rng(0)
    params = jax.tree.map(lambda s: jnp.asarray(0.02 * rng.standard_normal(s.shape), s.dtype), shapes(CONFIG))
    ids = jnp.asarray(rng.integers(CONFIG.vocab_size, size=(batch, length)), jnp.int32)
    mask = jnp.ones((batch, length), bool)
    compiled = lambda f, *args: (jax.jit(f).lower(*args).compile(), args)
    logits = lambda params, ids, mask: model.apply({"params": params}, ids, mask)

    plain, args = compiled(logits, params, ids, mask)
    merged = jlora.merge(trained(jlora.adapt(params, ROWS["LoRA, all"])))
    made = {PLAIN: (plain, args), AGAIN: (plain, args), MERGED: (plain, (merged, ids, mask))}
    for name, method in ROWS.items():
        adapted = trained(jlora.adapt(params, method, fn=logits, args=(ids, mask)))
        given = ids, mask
        if name in ("prefix", "prompt"):
            longer = jlora.prompts.prepend(jlora.prompts.virtual_ids(adapted), ids, mask=mask)
            given = longer.ids, longer.mask
        made[name] = compiled(jlora.lift(logits), adapted, *given)
    return made


def measure(batch, length, rounds):
    """`{name: [ratio to the plain model of each round]}`, and the seconds that this one takes."""
    made = calls(batch, length)
    seconds = {name: [] for name in made}
    for k in range(rounds + 1):  # one round to warm up
        for name, (program, args) in made.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*args))
            if k:
                seconds[name].append(time.perf_counter() - start)
        print(f"\r{batch} x {length}: round {k} of {rounds} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    ratios = {n: [a / b for a, b in zip(s, seconds[PLAIN], strict=True)] for n, s in seconds.items() if n != PLAIN}
    return ratios, statistics.median(seconds[PLAIN])


def draw(found, path):
    """One panel a setting: a bar a row, whiskers over 90 % of the rounds, a line at the plain model."""
    figure, axes = jlora.plot.panels(1, len(found), width=3.1, height=3.4)
    for k, (axis, (setting, (ratios, seconds))) in enumerate(zip(axes[0], found.items(), strict=True)):
        names = list(ratios)
        middle = [statistics.median(ratios[n]) for n in names]
        low, high = (np.array([np.quantile(ratios[n], q) for n in names]) for q in (0.05, 0.95))
        colours = [jlora.plot.COLOURS[2 if n in (AGAIN, MERGED) else 0] for n in names]
        axis.barh(names, middle, color=colours, xerr=[middle - low, high - middle], error_kw={"linewidth": 0.8})
        axis.axvline(1, color="black", linewidth=0.8)
        for n, value in enumerate(middle):
            axis.text(0.03, n, f"{value:.2f}", va="center", color="white", fontsize=8)
        axis.set(title=f"batch {setting[0]}, length {setting[1]} ({1000 * seconds:.0f} ms)", xlabel="x the plain model")
        axis.invert_yaxis()
        if k:
            axis.set_yticklabels([])
    jlora.plot.save(figure, path)


def main():
    """Measures, prints one table, and draws it where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, choices=sorted({b for b, _ in SETTINGS}))
    parser.add_argument("--length", type=int, choices=sorted({n for _, n in SETTINGS}))
    parser.add_argument("--rounds", type=int, help="of each setting, in place of its own")
    parser.add_argument("--plot", type=Path, help="where the picture goes, less .png and .svg")
    parser.add_argument("--json", type=Path, help="where all ratios go")
    options = parser.parse_args()
    chosen = {(b, n): r for (b, n), r in SETTINGS.items() if options.batch in (None, b) and options.length in (None, n)}
    found = {setting: measure(*setting, options.rounds or rounds) for setting, rounds in chosen.items()}
    print(f"jax {jax.__version__}, {os.cpu_count()} cores: the median of ratios to the plain model, and 90 % of them\n")
    print(f"{'':14s}" + "".join(f"{f'{b} x {n}':>22s}" for b, n in found))
    for name in next(iter(found.values()))[0]:
        cells = [(statistics.median(r[name]), *np.quantile(r[name], [0.05, 0.95])) for r, _ in found.values()]
        print(f"{name:14s}" + "".join(f"{m:8.3f} {low:6.3f}-{high:6.3f}" for m, low, high in cells))
    print("\nthe plain model took " + ", ".join(f"{1000 * s:.0f} ms" for _, s in found.values()))
    if options.json:
        options.json.write_text(json.dumps({f"{b} x {n}": ratios for (b, n), (ratios, _) in found.items()}))
    if options.plot:
        draw(found, options.plot)


if __name__ == "__main__":
    main()
