"""Who gets which rank? Five ways to decide it, given the same steps and in the end the same budget.

    python examples/adaptive_rank.py             three seeds; 15 to 20 minutes on two idle CPU cores
    python examples/adaptive_rank.py --quick     a few steps of one seed, to see that it runs

trains a 6-layer MiniLM to tell praise from blame in sentences of movie reviews (both fetched as by
finetune.py), with LoRA factors on all 36 kernels:

  LoRA      at rank 2, the budget; and at rank 8, to be truncated and pruned
  AdaLoRA   from rank 4 to 2 on average, by importance
  SoRA      from rank 8, gates that a soft threshold makes sparse, at three lambdas
  DyLoRA    rank 8, trained to work at every rank from 1 to 8
  SeLoRA    from rank 1 to at most 8, growing where a further rank would see much of the gradient

What ends above the budget is pruned to it by magnitude, without more training. It prints a table of
accuracies (mean and standard deviation over seeds), ranks and file sizes, says which claims of the
papers held, and saves both and the plots in --out. The claims stand in CLAIMS, below, and were fixed
before the recorded run. One that was stopped goes on after the last method and seed that were done.
docs/adaptive_rank.md has the numbers to expect, and what they mean.
"""

import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import finetune
import jlora

console = finetune.console

TARGET = r"encoder/layer_\d+/.*(query|key|value|output|intermediate)/kernel$"
HEAD = r"^classifier/"
SCALE = 2  # s of every method at its first rank


@dataclasses.dataclass(frozen=True)
class Study:
    """Compare ways to decide ranks."""

    model: Path | None = None
    """A BERT checkpoint folder; a MiniLM is fetched by default."""
    data: Path | None = None
    """A file of lines `text<TAB>label`; movie reviews are fetched by default."""
    rank: int = 2
    """The budget, as a mean rank of a weight; factors have four times as many to begin with."""
    steps: int = 50
    """Optimizer steps of every method."""
    batch: int = 32
    """Examples a step."""
    length: int = 32
    """Tokens after which a text is cut off: seven of ten sentences are whole."""
    held_out: int = 500
    """Texts that accuracy is measured on."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each decides the split, the order of the data, and the initial values."""
    quick: bool = False
    """Six steps of one seed."""
    out: Path = Path("outputs/adaptive_rank")
    """Where results, table and plots go."""
    cache: Path | None = None
    """Where downloads are kept: `jlora` in the user's cache folder by default."""

    def run(self, seed: int) -> finetune.Run:
        """The settings of one seed, for finetune.py's functions."""
        return finetune.Run(
            model=self.model,
            data=self.data,
            steps=self.steps,
            batch=self.batch,
            length=self.length,
            seed=seed,
            cache=self.cache,
        )


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to decide ranks: the adapter, the optimizer round the user's, and what else is in the loss."""

    spec: jlora.Method
    wrap: Callable[[Any, Any], Any] | None = None
    gamma: float = 0.0  # of AdaLoRA's penalty
    nested: bool = False  # a rank drawn at each step


def schedule(steps: int) -> dict[str, int]:
    """AdaLoRA's."""
    return {
        "total_steps": steps,
        "init_warmup": steps // 10,
        "final_warmup": steps // 3,
        "interval": max(steps // 30, 1),
    }


def ways(study: Study) -> dict[str, Way]:
    """All of them, by name."""
    r, R, T = study.rank, 4 * study.rank, study.steps
    rates = finetune.triangle(finetune.RATES["lora"], T)

    def adalora(tx, adapted):
        return jlora.rank.adalora(tx, adapted, target_rank=r, **schedule(T))

    def sora(sparsity):
        wrap = lambda tx, adapted: jlora.rank.sora(tx, adapted, learning_rate=rates, sparsity=sparsity)
        return Way(jlora.SoRA(rank=R, alpha=SCALE * R, target=TARGET), wrap)

    def selora(tx, adapted):
        return jlora.rank.selora(tx, adapted, threshold=THRESHOLD, interval=max(T // 10, 1))

    lora = lambda rank: jlora.LoRA(rank=rank, alpha=SCALE * rank, target=TARGET)
    return {
        f"LoRA r={r}": Way(lora(r)),
        f"LoRA r={R}": Way(lora(R)),
        "AdaLoRA": Way(jlora.AdaLoRA(rank=2 * r, alpha=SCALE * 2 * r, target=TARGET), adalora, gamma=0.1),
        **{f"SoRA λ={x:g}": sora(x) for x in LAMBDAS},
        "DyLoRA": Way(lora(R), lambda tx, adapted: jlora.rank.dylora(tx, adapted), nested=True),
        "SeLoRA": Way(lora(R), selora),
    }


LAMBDAS = (2.0, 5.0, 8.0)
THRESHOLD = 1.3


def main(args: list[str] | None = None) -> None:
    """Reads what the command line names, and runs what has not run yet."""
    study = tyro.cli(Study, args=args)
    if study.quick:
        study = dataclasses.replace(study, steps=6, seeds=study.seeds[:1], out=study.out / "quick")
    try:
        if study.rank < 1 or not study.seeds:
            raise ValueError(f"rank={study.rank}, seeds={study.seeds}: a rank is at least 1, and there is a seed")
        results = begun(study)
        steps: dict[str, Any] = {}
        for seed, (name, way) in itertools.product(study.seeds, ways(study).items()):
            if str(seed) not in results["runs"].setdefault(name, {}):
                results["runs"][name][str(seed)] = once(study, name, way, seed, steps)
                finetune.write(study.out / "results.json", json.dumps(results))
    except (ValueError, OSError) as error:
        raise SystemExit(f"adaptive_rank: {error}") from error
    report(study, results)


# Training


def once(study: Study, name: str, way: Way, seed: int, steps: dict[str, Any]) -> dict[str, Any]:
    """What came of one way and seed; `steps` keeps its compiled step for the other seeds."""
    run = study.run(seed)
    model, params, data = loaded(study, seed)
    adapted = jlora.adapt(params, [jlora.Full(target=HEAD), way.spec], key=jax.random.key(seed))
    if name not in steps:
        steps[name] = compiled(study, way, model, adapted)
    step, tx = steps[name]
    state = {"trainable": adapted.trainable, "opt_state": tx.init(adapted.trainable), "step": jnp.int32(0)}
    history = {}
    with finetune.bar() as progress:
        task = progress.add_task(f"{name}, seed {seed}", total=run.steps, note="")
        for t in range(run.steps):
            state, value = step(state, adapted.frozen, jax.random.key(seed), data.step(seed, t, run.batch))
            progress.update(task, advance=1, note=f"loss {value:.3f}")
            if t == 0 or (t + 1) % max(run.steps // 20, 1) == 0 or t + 1 == run.steps:
                history[t + 1] = ranks(jlora.join(state["trainable"], adapted.frozen))
        tuned = jlora.join(state["trainable"], adapted.frozen)
        found = measured(study, way, tuned, model, data)
        progress.update(task, note=f"accuracy {found['trained']:.3f}")
    return found | {"history": history}


def compiled(study: Study, way: Way, model, adapted) -> tuple[Callable, Any]:
    """The step of a way, and its optimizer."""
    apply = jlora.lift(model.apply)
    tx = finetune.optimizer(study.run(0), "lora", lambda tx: way.wrap(tx, adapted) if way.wrap else tx)
    tx = optax.with_extra_args_support(tx)
    most = way.spec.rank

    def loss(trainable, frozen, b, ids, mask, labels):
        adapted = jlora.join(trainable, frozen)
        if way.nested:
            adapted = jlora.rank.at_rank(adapted, b)
        logits = apply({"params": adapted}, ids, mask)
        value = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return value + way.gamma * jlora.rank.orthogonality(adapted) if way.gamma else value

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, frozen, key, batch):
        b = jlora.rank.sample_rank(jax.random.fold_in(key, state["step"]), 1, most)
        value, grads = jax.value_and_grad(loss)(state["trainable"], frozen, b, *batch)
        more = {"b": b} if way.nested else {}
        change, opt_state = tx.update(grads, state["opt_state"], state["trainable"], **more)
        trainable = optax.apply_updates(state["trainable"], change)
        return {"trainable": trainable, "opt_state": opt_state, "step": state["step"] + 1}, value

    return step, tx


# What came of it


def measured(study: Study, way: Way, tuned, model, data) -> dict[str, Any]:
    """Accuracy as trained and at the budget, what is left there, and the curve over ranks where there is one."""
    r, R = study.rank, way.spec.rank
    score = lambda adapted: accuracy(model, adapted, data)
    found: dict[str, Any] = {}
    if way.nested or way.wrap is None and R > r:
        curve = jlora.rank.search(tuned, score).curve
        found["curve"] = {b: curve[b] for b in sorted(curve)}
        if not way.nested:  # truncated with the scale it was trained with
            found["kept"] = score(jlora.scale(jlora.rank.at_rank(tuned, r), r / R))
    least = jlora.rank.at_rank(tuned, r) if way.nested else tuned
    small = jlora.rank.prune(least, jlora.rank.magnitude(least), r * len(ranks(tuned)))
    made = jlora.rank.compact(small, plain=True)
    gap = max(jax.tree.leaves(jax.tree.map(lambda x, y: abs(x - y).max(), jlora.merge(made), jlora.merge(small))))
    if gap > 1e-5:
        raise ValueError(f"the compact adapter is another function: its weights differ by {gap:.0e}")
    with tempfile.TemporaryDirectory() as temp:
        jlora.save(Path(temp, "adapter"), made)
        size = sum(file.stat().st_size for file in Path(temp).rglob("*") if file.is_file())
    found["trained"] = found["curve"][R] if "curve" in found else score(tuned)
    whole = ranks(small) == ranks(tuned)
    found["budget"] = found["curve"][r] if way.nested else found["trained"] if whole else score(small)
    found |= {"trained ranks": sum(ranks(tuned).values()), "ranks": ranks(small)}
    found |= {"parameters": jlora.count(made)[0], "bytes": size}
    return json.loads(json.dumps(found))


def ranks(adapted) -> dict[str, int]:
    """The ranks of each weight that add something."""
    return {path: int(r) for path, r in jlora.rank.ranks(adapted).items()}


@functools.cache
def loaded(study: Study, seed: int) -> tuple[Any, Any, finetune.Data]:
    """The model, its parameters, and the data of a seed."""
    *_, config, _, params, data = finetune.prepare(study.run(seed))
    return model_of(config), params, dataclasses.replace(data, test=data.test[: study.held_out])


model_of = functools.cache(finetune.bert.Bert)
forward = functools.cache(finetune.forward)


def accuracy(model, adapted, data: finetune.Data) -> float:
    """The share of held-out texts with the right label."""
    logits = finetune.evaluate(forward(model), adapted, data)
    return float((logits.argmax(-1) == data.labels[data.test]).mean())


# Claims: what the papers lead one to expect, fixed before the recorded run

SIGMAS = 2  # a difference of means counts above two standard errors


def difference(one: list[float], other: list[float]) -> tuple[float, float]:
    """The difference of two means, and its standard error."""
    error = lambda x: np.var(x, ddof=1) / len(x) if len(x) > 1 else np.inf
    return float(np.mean(one) - np.mean(other)), float(np.sqrt(error(one) + error(other)))


def above(one: list[float], other: list[float], least: float = SIGMAS) -> tuple[bool, str]:
    """Whether the first is above the second by so many standard errors (negative: not further below)."""
    gap, error = difference(one, other)
    return gap > least * error, f"{100 * np.mean(one):.1f} against {100 * np.mean(other):.1f}, {gap:+.3f} ± {error:.3f}"


def share(found: dict[str, int]) -> float:
    """The share of all ranks that the third of the weights with most of them has; a third, if all have the same."""
    sizes = sorted(found.values(), reverse=True)
    return sum(sizes[: len(sizes) // 3]) / max(sum(sizes), 1)


def nested(study: Study, runs: dict[str, Any]) -> tuple[bool, str]:
    at = lambda name: [run["curve"][str(study.rank)] for run in runs[name].values()]
    lora = f"LoRA r={4 * study.rank}"
    other = max(at(lora), [run["kept"] for run in runs[lora].values()], key=np.mean)
    return above(at("DyLoRA"), other)


def importance(study: Study, runs: dict[str, Any]) -> tuple[bool, str]:
    of = lambda name: [run["budget"] for run in runs[name].values()]
    return above(of("AdaLoRA"), of(f"LoRA r={study.rank}"))


def concentrated(name: str, runs: dict[str, Any]) -> tuple[bool, str]:
    shares = [share(run["ranks"]) for run in runs[name].values()]
    return min(shares) >= 0.5, ", ".join(f"{x:.2f}" for x in shares)


def where(study: Study, runs: dict[str, Any]) -> tuple[bool, str]:
    held, texts = True, []
    for run in runs["AdaLoRA"].values():
        mean = lambda keep, found=run["ranks"]: float(np.mean([r for path, r in found.items() if keep(path)]))
        layers = 1 + max(map(layer, run["ranks"]))
        pairs = [mean(lambda p: "attention" not in p), mean(lambda p: "attention" in p)]
        pairs += [mean(lambda p, n=layers: 2 * layer(p) >= n), mean(lambda p, n=layers: 2 * layer(p) < n)]
        held &= pairs[0] > pairs[1] and pairs[2] > pairs[3]
        texts.append("{:.1f} / {:.1f}, {:.1f} / {:.1f}".format(*pairs))
    return held, "; ".join(texts)


def layer(path: str) -> int:
    """The number of a path's layer."""
    return int(path.split("layer_")[1].split("/")[0])


def same(study: Study, runs: dict[str, Any]) -> tuple[bool, str]:
    maps = [list(run["ranks"].values()) for run in runs["AdaLoRA"].values()]
    alike = lambda x, y: float(np.corrcoef(x, y)[0, 1]) if np.std(x) and np.std(y) else 0.0
    found = [alike(x, y) for x, y in itertools.combinations(maps, 2)]
    return bool(found) and np.mean(found) > 0.5, "correlations " + ", ".join(f"{x:.2f}" for x in found)


def sparser(study: Study, runs: dict[str, Any]) -> tuple[bool, str]:
    counts = [[run["trained ranks"] for run in runs[f"SoRA λ={x:g}"].values()] for x in LAMBDAS]
    held = all(a > b for one, two in itertools.pairwise(counts) for a, b in zip(one, two, strict=True))
    return held, "; ".join(f"λ={x:g}: {', '.join(map(str, n))}" for x, n in zip(LAMBDAS, counts, strict=True))


def sparse_enough(study: Study, runs: dict[str, Any]) -> tuple[bool, str]:
    lora = [run["trained"] for run in runs[f"LoRA r={4 * study.rank}"].values()]
    all_ranks = 4 * study.rank * len(next(iter(runs["AdaLoRA"].values()))["ranks"])
    held, texts = False, []
    for x in LAMBDAS:
        found = list(runs[f"SoRA λ={x:g}"].values())
        left = np.mean([run["trained ranks"] for run in found]) / all_ranks
        if left <= 0.7:
            enough, text = above([run["trained"] for run in found], lora, -SIGMAS)
            held |= enough
            texts.append(f"λ={x:g} with {left:.0%}: {text}")
    return held, "; ".join(texts) or "no lambda left as few"


CLAIMS: dict[str, Callable[[Study, dict[str, Any]], tuple[bool, str]]] = {
    "DyLoRA at b = r/4 is above a truncated LoRA, in the better of its two scales, by 2 standard errors": nested,
    "AdaLoRA is above LoRA of the same budget, by 2 standard errors": importance,
    "AdaLoRA's ranks concentrate: a third of the weights has half of them, in every seed": lambda study, runs: (
        concentrated("AdaLoRA", runs)
    ),
    "AdaLoRA's mean ranks: feed-forward above attention, upper half above lower half, in every seed": where,
    "AdaLoRA gives the same weights its ranks in every seed: correlations of 0.5 on average": same,
    "SoRA: the larger λ, the fewer ranks, in every seed": sparser,
    "SoRA: with at most 70 % of the ranks not below the LoRA of all, by 2 standard errors": sparse_enough,
    "SeLoRA's ranks concentrate: a third of the weights has half of them, in every seed": lambda study, runs: (
        concentrated("SeLoRA", runs)
    ),
}


# Files and what is shown


def begun(study: Study) -> dict[str, Any]:
    """The results that `out` holds of this very study, or none."""
    settings = {k: v for k, v in dataclasses.asdict(study).items() if k not in ("out", "cache", "seeds")}
    settings |= {"lambdas": LAMBDAS, "threshold": THRESHOLD}
    settings = json.loads(json.dumps(settings, default=lambda path: str(path.absolute())))
    file = study.out / "results.json"
    results = json.loads(file.read_text()) if file.is_file() else {"settings": settings, "runs": {}}
    if results["settings"] != settings:
        raise ValueError(f"{file} holds a study with other settings, {results['settings']}: choose another --out")
    return results


def report(study: Study, results: dict[str, Any]) -> None:
    """Prints table and claims, and saves them with the plots."""
    runs = {
        name: {seed: run for seed, run in found.items() if int(seed) in study.seeds}
        for name, found in results["runs"].items()
    }
    curves = ("DyLoRA", f"LoRA r={4 * study.rank}")
    header = ("method", "ranks trained", "accuracy", "ranks kept", "accuracy", "parameters", "on disk")
    rows = [row(name, list(found.values())) for name, found in runs.items()]
    shown = Table(caption=f"{len(study.seeds)} seeds of {study.steps} steps: mean and standard deviation")
    for n, title in enumerate(header):
        shown.add_column(title, justify="right" if n else "left")
    for cells in rows:
        shown.add_row(*cells)
    console.print(shown)
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ("---", *["---:"] * 6), *rows)]
    lines += ["", "| b | " + " | ".join(curves) + " |", "|---:|" + "---:|" * len(curves)]
    for b in range(1, 4 * study.rank + 1):
        means = [100 * np.mean([run["curve"][str(b)] for run in runs[name].values()]) for name in curves]
        lines.append(f"| {b} | " + " | ".join(f"{x:.1f}" for x in means) + " |")
    kept = 100 * np.mean([run["kept"] for run in runs[curves[1]].values()])
    lines.append(f"\n{curves[1]} at b = {study.rank} with the scale it was trained with: {kept:.1f}.")
    lines += ["", "| claim | measured | |", "|---|---|---|"]
    for claim, check in CLAIMS.items():
        held, text = check(study, runs)
        verdict = "held" if held else "not held"
        lines.append(f"| {claim} | {text} | {verdict} |")
        console.print(f"{verdict:8}  {claim}\n          {text}")
    finetune.write(study.out / "table.md", "\n".join(lines))
    plots(study, runs)
    console.print(f"saved   {study.out}: results.json, table.md, plots")


def row(name: str, found: list[dict[str, Any]]) -> tuple[str, ...]:
    """One line of the table."""
    mean = lambda what: float(np.mean([run[what] for run in found]))
    spread = lambda what: f"{100 * mean(what):.1f} ± {100 * np.std([r[what] for r in found], ddof=len(found) > 1):.1f}"
    kept = np.mean([sum(run["ranks"].values()) for run in found])
    return (
        name,
        f"{mean('trained ranks'):.0f}",
        spread("trained"),
        f"{kept:.0f}",
        spread("budget"),
        f"{mean('parameters'):,.0f}",
        f"{mean('bytes') / 1e6:.2f} MB",
    )


def plots(study: Study, runs: dict[str, Any]) -> None:
    """Accuracy under truncation; ranks by layer and module, and over the steps; accuracy by size."""
    save = lambda figure, name: jlora.plot.save(figure, study.out / name)
    bs = list(range(1, 4 * study.rank + 1))
    values = lambda name: 100 * np.array([[run["curve"][str(b)] for b in bs] for run in runs[name].values()])
    series = {name: (bs, values(name)) for name in ("DyLoRA", f"LoRA r={4 * study.rank}")}
    figure = jlora.plot.curves(series, title="one adapter at every rank", value="accuracy (%)")
    figure.axes[0].set_xlabel("rank b")
    save(figure, "truncation")

    first = {name: next(iter(found.values())) for name, found in runs.items()}
    adaptive = ["AdaLoRA", f"SoRA λ={LAMBDAS[1]:g}", "SeLoRA"]
    figure, axes = jlora.plot.panels(len(adaptive), 2)
    weights = len(first["AdaLoRA"]["ranks"])
    budget = jlora.rank.Budget(2 * study.rank * weights, study.rank * weights, **schedule(study.steps))
    for name, pair in zip(adaptive, axes, strict=True):
        history = {int(t): found for t, found in first[name]["history"].items()}
        at = budget.at if name == "AdaLoRA" else None
        jlora.plot.ranks(history, budget=at, title=f"{name}, as trained", axes=tuple(pair))
    save(figure, "ranks")

    of = lambda found, what: [run[what] for run in found.values()]
    points = {name: (np.mean(of(found, "parameters")), of(found, "budget")) for name, found in runs.items()}
    save(jlora.plot.pareto(points, title="at the budget"), "accuracy")


if __name__ == "__main__":
    main()
