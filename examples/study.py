"""Why low rank is enough: section 7 of the LoRA paper in miniature, on a pretrained transformer.

    python examples/study.py --quick
    python examples/study.py
    python examples/study.py --resume

fetches a 6-layer MiniLM (84 MB) and movie reviews, trains some twenty adapters to tell praise from
blame with three seeds each, looks inside them with `jlora.analysis`, and holds what it finds against
what the papers say: a row a claim, with a statistic and the threshold that it has to pass. It took
83 minutes on one CPU core (--quick: under five on two; fewer seeds, steps and rows, which show
how it works and decide nothing). Each training is written down as it ends; a run that was stopped
goes on with --resume. What was found: docs/why_low_rank.md.

    Hu et al, LoRA, 2021, arXiv 2106.09685, section 7. Zhang et al, AdaLoRA, 2023, arXiv 2303.10512.
    Li et al, Measuring the Intrinsic Dimension, 2018, arXiv 1804.08838.
    Aghajanyan et al, Intrinsic Dimensionality, 2020, arXiv 2012.13255.
"""

import dataclasses
import functools
import json
import math
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bert
import finetune
import jlora
from finetune import console
from jlora import analysis


@dataclasses.dataclass(frozen=True)
class Study:
    """Low-rank updates of a pretrained transformer, looked at from the inside."""

    model: Path | None = None
    """A BERT checkpoint folder; a MiniLM is fetched by default."""
    data: Path | None = None
    """A file of lines `text<TAB>label`; movie reviews are fetched by default."""
    seeds: int = 3
    """How often everything is repeated. A seed decides the split, the order and the initial values."""
    steps: int = 60
    """Optimizer steps of each training."""
    batch: int = 32
    """Examples a step."""
    tokens: int = 24
    """Longer texts are left out, so that all batches have one width."""
    held: int = 900
    """Texts held out in each split."""
    out: Path = Path("outputs/study")
    """Where results, adapters, tables and figures go."""
    resume: bool = False
    """Go on with what `out` holds."""
    quick: bool = False
    """One seed, few steps, some of the rows."""
    minutes: float = math.inf
    """Stop when so many have passed, to go on later with --resume."""
    cache: Path | None = None
    """Where downloads are kept: `jlora` in the user's cache folder by default."""


# What is trained: rules of jlora.adapt, and the peak learning rate of the body

HEAD = jlora.Full(target=r"^classifier/")
KINDS = {"q": "query", "k": "key", "v": "value", "o": "attention/output"}
ATTENTION = r"attention/(query|key|value|output)/kernel$"
RANKS, DIMENSIONS = (1, 2, 4, 8, 16, 32, 64), (256, 1024, 4096, 16384)
PATIENCE = 3  # times as many steps in a random subspace, and of random weights: both learn slowly
ALPHA = 16  # whatever the rank, as in the paper: the scale alpha / r falls as r grows
RATE, FULL_RATE, LAYER_RATE, RANDOM_RATE, SUBSPACE_RATE = 5e-3, 2e-4, 1e-3, 3e-4, 0.5


@dataclasses.dataclass(frozen=True)
class Row:
    """What is trained beside or with the head, how fast, and on which weights."""

    rules: tuple
    rate: float = RATE
    pretrained: bool = True
    patience: int = 1


def lora(rank: int, target: str) -> Row:
    return Row((HEAD, jlora.LoRA(rank=rank, alpha=ALPHA, target=target)))


def kernels(kinds: str) -> str:
    return rf"({'|'.join(KINDS[kind] for kind in kinds)})/kernel$"


def placements(layers: int) -> dict[str, Row]:
    """One budget, 40 numbers a layer and unit of width, spent in ten ways. FFN: two kernels, width x 4 width."""
    half = lambda ns: rf"layer_({'|'.join(map(str, ns))})/{ATTENTION}"
    return {
        **{f"{kind}, r=20": lora(20, kernels(kind)) for kind in "qkvo"},
        **{f"{kinds}, r=10": lora(10, kernels(kinds)) for kinds in ("qk", "qv")},
        "qkvo, r=5": lora(5, kernels("qkvo")),
        "FFN, r=4": lora(4, r"layer_\d+/(intermediate|output)/kernel$"),
        "early qkvo, r=10": lora(10, half(range(layers // 2))),
        "late qkvo, r=10": lora(10, half(range(layers // 2, layers))),
    }


def rivals(layers: int) -> dict[str, Row]:
    top = lambda n: (HEAD, *(jlora.Full(target=f"layer_{layer}/") for layer in range(layers - n, layers)))
    return {
        "head alone": Row((HEAD,)),
        "top layer": Row(top(1), LAYER_RATE),
        "top 2 layers": Row(top(2), LAYER_RATE),
        "everything": Row((jlora.Full(target=jlora.targets.everything),), FULL_RATE),
    }


SUBSPACE = jlora.IntrinsicDimension(1, said=False, target=rf"{kernels('qv')}|^classifier/")
RANDOM = Row((jlora.Full(target=jlora.targets.everything),), RANDOM_RATE, pretrained=False, patience=PATIENCE)


# Training


class Bench:
    """The model, the data and what has been found so far; a training that is done is not done again."""

    def __init__(self, study: Study) -> None:
        self.study = study
        finetune.at_least(study, 1, "seeds", "steps", "batch", "tokens", "held")
        finetune.at_least(study, 0, "minutes")
        self.until = time.monotonic() + 60 * study.minutes
        given = finetune.Run(model=study.model, data=study.data, length=2 * study.tokens, cache=study.cache)
        _, _, self.config, _, self.params, self.data = finetune.prepare(given)
        self.model = bert.Bert(self.config)
        self.forward = finetune.forward(self.model)
        self.file = study.out / "results.json"
        no_matter = ("out", "resume", "minutes", "cache")  # they change no number
        settings = {k: v for k, v in dataclasses.asdict(study).items() if k not in no_matter}
        settings = json.loads(json.dumps(settings, default=lambda path: str(path.absolute())))
        self.found: dict[str, Any] = {"settings": settings, "runs": {}}
        if self.file.is_file():
            before = json.loads(self.file.read_text())
            if not study.resume:
                done = sum(map(len, before["runs"].values()))
                raise ValueError(f"{study.out} holds {done} trainings: pass --resume to go on, or another --out")
            changed = [
                f"{k} was {before['settings'].get(k)}" for k in settings if before["settings"].get(k) != settings[k]
            ]
            if changed:
                raise ValueError(f"--resume goes on as {study.out} began, where {', '.join(changed)}")
            self.found = before

        short = int((self.data.tokens <= study.tokens).sum())
        if short < 5:  # a fifth is held out
            raise ValueError(
                f"{short} texts have at most {study.tokens} tokens, and 5 are the least: pass more --tokens"
            )
        study.out.mkdir(parents=True, exist_ok=True)  # what is trained will have a place

    @property
    def seeds(self) -> range:
        return range(self.study.seeds)

    @functools.cache
    def split(self, seed: int) -> finetune.Data:
        """The short texts, those held out first."""
        rows = np.flatnonzero(self.data.tokens <= self.study.tokens)
        order = np.random.default_rng([7, seed]).permutation(rows)
        held = min(self.study.held, len(order) // 5)
        return dataclasses.replace(self.data, train=order[held:], test=order[:held])

    @functools.cache
    def weights(self, pretrained: bool, seed: int) -> Any:
        if pretrained:
            return self.params
        ids = jnp.ones((1, 8), jnp.int32)
        return jax.jit(self.model.init)(jax.random.key(seed), ids, ids)["params"]

    @functools.cache
    def update(self, rate: float, steps: int) -> tuple[Any, Callable]:
        """Optimizer and step of a schedule; rows of one shape share a program."""
        tx = finetune.optimizer(finetune.Run(steps=steps, lr=rate), "lora")
        return tx, finetune.updater(self.model, jlora.join, tx)

    def train(self, name: str, adapted: jlora.Adapted, rate: float, seed: int, patience: int = 1) -> float:
        """The held-out accuracy of a row, of which the results, and of LoRA the adapter, are kept."""
        done = self.found["runs"].setdefault(name, {})
        if str(seed) not in done:
            if time.monotonic() > self.until:
                raise TimeoutError(f"stopped after {self.study.minutes:g} minutes; go on with --resume")
            started = time.perf_counter()
            tuned, losses = self.steps(f"{name}, seed {seed}", adapted, rate, seed, patience * self.study.steps)
            data = self.split(seed)
            logits = finetune.evaluate(self.forward, jlora.merge(tuned), data)
            labels = data.labels[data.test]
            log_p = np.asarray(jax.nn.log_softmax(logits), np.float64)[np.arange(len(labels)), labels]
            if any(isinstance(site.method, jlora.LoRA) for site in tuned.frozen.plan.sites):
                finetune.save(self.adapter(name, seed), tuned)
            done[str(seed)] = {
                "accuracy": float((logits.argmax(-1) == labels).mean()),
                "loss": float(-log_p.mean()),
                "majority": float(np.bincount(labels).max() / len(labels)),
                "trainable": jlora.count(tuned)[0],
                "losses": [round(x, 4) for x in losses],
                "seconds": round(time.perf_counter() - started, 1),
            }
            finetune.write(self.file, json.dumps(self.found))
        return done[str(seed)]["accuracy"]

    def steps(
        self, title: str, adapted: jlora.Adapted, rate: float, seed: int, total: int
    ) -> tuple[jlora.Adapted, list[float]]:
        (tx, update), data = self.update(rate, total), self.split(seed)
        trainable, frozen = jlora.split(adapted)
        state = {"trainable": trainable, "opt_state": tx.init(trainable)}
        state |= {"step": jnp.int32(0), "key": jax.random.key(seed)}
        losses: list[float] = []
        columns = [TextColumn("{task.description:28}"), BarColumn(), MofNCompleteColumn()]
        columns += [TextColumn("loss {task.fields[loss]:.3f}"), TimeElapsedColumn()]
        with Progress(*columns, console=console) as progress:
            task = progress.add_task(title, total=total, loss=math.nan)
            for t in range(total):
                state, loss = update(state, frozen, data.step(seed, t, self.study.batch))
                losses.append(float(loss))  # waits for the step
                progress.update(task, advance=1, loss=losses[-1])
        return jlora.join(state["trainable"], frozen), losses

    def row(self, name: str, row: Row) -> None:
        for seed in self.seeds:
            base = self.weights(row.pretrained, seed)
            # a key of its own: with one key, the a of rank 8 begins as the first 8 rows of that of rank 64
            key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(name.encode()))
            self.train(name, jlora.adapt(base, row.rules, key=key), row.rate, seed, row.patience)

    def dimension(self, pretrained: bool, seed: int, dimensions: tuple[int, ...]) -> analysis.Found:
        """d90 of the task: dimensions for 90 % of what training everything gains over always saying the same.

        Everything of the pretrained model, also for random weights, of which all dimensions are tried: `Seen.own` has
        the one that reaches 90 % of what random weights gain themselves.
        """
        whole = self.found["runs"]["everything"][str(seed)]
        gain = lambda accuracy: accuracy - whole["majority"]
        return analysis.intrinsic_dimension(
            lambda adapted: gain(self.subspace(adapted, pretrained, seed)),
            self.weights(pretrained, seed),
            dimensions,
            baseline=gain(whole["accuracy"]),
            ratio=math.inf,
            method=SUBSPACE,
        )

    def subspace(self, adapted: jlora.Adapted, pretrained: bool, seed: int) -> float:
        """The held-out accuracy in so many dimensions."""
        d = jlora.count(adapted)[0]
        title = f"d={d}" + ("" if pretrained else ", random")
        rate = SUBSPACE_RATE / math.sqrt(d)  # theta moves as far whatever d
        return self.train(title, adapted, rate, seed, PATIENCE)

    def curve(self, pretrained: bool, seed: int, dimensions: tuple[int, ...]) -> None:
        """All dimensions, also those beyond the first one that is enough."""
        for d in dimensions:
            adapted = jlora.adapt(self.weights(pretrained, seed), dataclasses.replace(SUBSPACE, d=d))
            self.subspace(adapted, pretrained, seed)

    def adapter(self, name: str, seed: int) -> Path:
        return self.study.out / "adapters" / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"


# What the trained adapters look like inside


class Seen:
    """Statistics over seeds of a bench whose trainings are done."""

    def __init__(self, bench: Bench, dimensions: tuple[int, ...]) -> None:
        self.bench, self.dimensions = bench, dimensions
        self.names = bench.found["runs"]

    def every(self, measure: Callable[[int], float]) -> list[float]:
        return [float(measure(seed)) for seed in self.bench.seeds]

    def accuracy(self, name: str) -> np.ndarray:
        return np.array([run["accuracy"] for run in self.names[name].values()])

    @functools.cache
    def adapted(self, rank: int, seed: int) -> jlora.Adapted:
        return jlora.load(self.bench.adapter(f"qv, r={rank}", seed), self.bench.params)

    @functools.cache
    def factor(self, kind: str, rank: int, seed: int) -> analysis.SVD:
        """Of the factor a of every layer, `(layers, r, in)`."""
        found = analysis.factors(self.adapted(rank, seed))
        return analysis.svd(jnp.stack([found[path].a for path in self.paths(kind)]))

    @functools.cache
    def phi(self, kind: str, one: tuple[int, int], other: tuple[int, int]) -> np.ndarray:
        """phi(i, j) of the factors a of two (rank, seed), the mean over the layers."""
        grid = analysis.similarity(self.factor(kind, *one), self.factor(kind, *other), side="right")
        return np.asarray(grid.mean(0), np.float64)

    def ranks(self, kind: str) -> list[np.ndarray]:
        """phi of r = 8 and r = 64, which saw the same texts and began with unlike factors."""
        return [self.phi(kind, (8, s), (64, s)) for s in self.bench.seeds]

    def pairs(self) -> list[tuple[int, int]]:
        """Every two seeds; of one seed, no pair."""
        seeds = self.bench.seeds
        return [(a, b) for a in seeds for b in seeds if a < b]

    @functools.cache
    def amplified(self, kind: str, rank: int, seed: int) -> analysis.Amplification:
        """Of every layer, `(layers,)` each."""
        adapted = self.adapted(rank, seed)
        updates, weights = analysis.updates(adapted), analysis.weights(adapted)
        paths = self.paths(kind)
        update = jax.tree.map(lambda *layers: jnp.stack(layers), *(updates[path] for path in paths))
        return analysis.amplification(update, jnp.stack([weights[path] for path in paths]))

    def paths(self, kind: str) -> list[str]:
        layers = range(self.bench.config.num_hidden_layers)
        return [f"encoder/layer_{n}/attention/{KINDS[kind]}/kernel" for n in layers]

    @functools.cache
    def dimension(self, pretrained: bool, seed: int) -> analysis.Found:
        """From what was trained already."""
        return self.bench.dimension(pretrained, seed, self.dimensions)

    def d90(self, pretrained: bool, seed: int) -> float:
        """Where no dimension tried was enough, the next one: a bound from below."""
        d = self.dimension(pretrained, seed).d
        return self.dimensions[-1] * self.dimensions[-1] / self.dimensions[-2] if d is None else d

    def scores(self, pretrained: bool, seed: int) -> dict[int, float]:
        """The accuracy over that of always saying the same, by d."""
        runs = {d: self.names[f"d={d}" + ("" if pretrained else ", random")][str(seed)] for d in self.dimensions}
        return {d: run["accuracy"] - run["majority"] for d, run in runs.items()}

    def own(self, pretrained: bool, seed: int, majority: float) -> tuple[float, int | None]:
        """90 % of what training everything of these very weights gains over `majority`; the least d that reaches it."""
        whole = self.names["everything" if pretrained else "everything, random"][str(seed)]
        level = 0.9 * (whole["accuracy"] - majority)
        scores, shift = self.scores(pretrained, seed), whole["majority"] - majority
        return level, next((d for d, score in scores.items() if score + shift >= level), None)


# What the papers say, fixed before the recorded run


@dataclasses.dataclass(frozen=True)
class Claim:
    """It holds where what is measured, in the mean over seeds, lies above `least`."""

    says: str
    source: str  # and what stands there
    statistic: str
    least: float
    measure: Callable[[Seen], list[float]]


def gap(*names: str) -> Callable[[Seen], list[float]]:
    """Accuracy of the first less that of the best of the others, seed by seed."""
    return lambda seen: list(seen.accuracy(names[0]) - np.max([seen.accuracy(name) for name in names[1:]], 0))


def least_gap(worse: tuple[str, ...], *names: str) -> Callable[[Seen], list[float]]:
    """The worst of some less the best of others."""
    worst = lambda seen: np.min([seen.accuracy(name) for name in names], 0)
    return lambda seen: list(worst(seen) - np.max([seen.accuracy(name) for name in worse], 0))


def layers_median(field: Callable[[analysis.Amplification], Any]) -> Callable[[Seen, int, int], float]:
    return lambda seen, rank, seed: float(np.median(field(seen.amplified("q", rank, seed))))


def top_direction(seen: Seen) -> list[float]:
    return [min(q[0, 0], v[0, 0]) for q, v in zip(seen.ranks("q"), seen.ranks("v"), strict=True)]


def top_against_others(seen: Seen) -> list[float]:
    fall = lambda grid: grid[0, 0] - grid[7, 7]
    return [min(fall(q), fall(v)) for q, v in zip(seen.ranks("q"), seen.ranks("v"), strict=True)]


def two_seeds(seen: Seen) -> list[float]:
    chance = 8 / seen.bench.config.hidden_size
    return [min(seen.phi(kind, (64, s), (64, t))[7, 7] for kind in "qv") / chance for s, t in seen.pairs()]


def query_against_value(seen: Seen) -> list[float]:
    grid = lambda kind, s, t: seen.phi(kind, (64, s), (64, t))[7, 7]
    return [grid("q", s, t) - grid("v", s, t) for s, t in seen.pairs()]


FACTOR = layers_median(lambda x: x.factor)
ONTO_RANDOM = layers_median(lambda x: x.onto_update / x.onto_random)
ONTO_WEIGHT = layers_median(lambda x: x.onto_weight / x.onto_update)

CLAIMS = (
    Claim(
        "LoRA does as well as training everything",
        "LoRA, tables 2 and 4: +0.8 (RoBERTa-base, mean of GLUE); -0.4 (WikiSQL) and +2.2 (MNLI) of GPT-3",
        "accuracy of qv r=8 less that of everything",
        -0.01,
        gap("qv, r=8", "everything"),
    ),
    Claim(
        "Rank one is nearly as good as any",
        "LoRA, table 6: r=1 is 0.4 (WikiSQL) and 0.3 (MNLI) below the best rank",
        "accuracy of qv r=1 less that of the best rank",
        -0.01,
        gap("qv, r=1", *(f"qv, r={rank}" for rank in RANKS)),
    ),
    Claim(
        "A rank of 64 adds nothing to one of 8",
        "LoRA, table 6: r=64 is 0.3 and 0.2 below r=8",
        "accuracy of qv r=8 less that of r=64",
        -0.01,
        gap("qv, r=8", "qv, r=64"),
    ),
    Claim(
        "Query and value together beat query or key alone, at one budget",
        "LoRA, table 5: 73.7 against 70.4 and 70.0 (WikiSQL), 91.3 against 91.0 and 90.8 (MNLI)",
        "accuracy of qv r=10 less the better of q and k at r=20",
        0.0,
        gap("qv, r=10", "q, r=20", "k, r=20"),
    ),
    Claim(
        "Value or output alone beat query or key alone",
        "LoRA, table 5: 73.0 and 73.2 against 70.4 and 70.0 (WikiSQL); 91.0 and 91.3 against 91.0 and 90.8 (MNLI)",
        "accuracy, the worse of v and o less the better of q and k, all r=20",
        0.0,
        least_gap(("q, r=20", "k, r=20"), "v, r=20", "o, r=20"),
    ),
    Claim(
        "Query and value beat query and key",
        "LoRA, table 5: 73.7 against 71.4 (WikiSQL), 91.3 both (MNLI)",
        "accuracy of qv r=10 less that of qk r=10",
        0.0,
        gap("qv, r=10", "qk, r=10"),
    ),
    Claim(
        "Many weights at a small rank beat one at a large rank",
        "LoRA, table 5: all four r=2 73.7 against 73.2 (WikiSQL), 91.7 against 91.3 (MNLI)",
        "accuracy of qkvo r=5 less that of the best single one at r=20",
        0.0,
        gap("qkvo, r=5", "q, r=20", "k, r=20", "v, r=20", "o, r=20"),
    ),
    Claim(
        "Feed-forward weights deserve the budget more than attention",
        "AdaLoRA, figure 1a and the posts: adapting FFN does best",
        "accuracy of FFN r=4 less that of qkvo r=5",
        0.0,
        gap("FFN, r=4", "qkvo, r=5"),
    ),
    Claim(
        "Late layers deserve the budget more than early ones",
        "AdaLoRA, figure 1b and the posts: top layers do best",
        "accuracy of late less that of early layers, qkvo r=10",
        0.0,
        gap("late qkvo, r=10", "early qkvo, r=10"),
    ),
    Claim(
        "LoRA beats training the top layers alone",
        "the posts: it blows layer freezing out of the water; LoRA, table 3: 70.4 BLEU against 68.1 (top 2 of GPT-2)",
        "accuracy of qv r=8 less the better of the top layer and the top 2",
        0.0,
        gap("qv, r=8", "top layer", "top 2 layers"),
    ),
    Claim(
        "The first direction of rank 8 is one of rank 64",
        "LoRA, figure 3: phi above 0.5 at one dimension, of W_q and W_v",
        "phi(1, 1) of the factors a, mean over layers, the smaller of q and v",
        0.5,
        top_direction,
    ),
    Claim(
        "The directions after the first are shared less",
        "LoRA, figure 3",
        "phi(1, 1) less phi(8, 8), the smaller of q and v",
        0.0,
        top_against_others,
    ),
    Claim(
        "Two seeds find common directions",
        "LoRA, figure 4: two random matrices share none",
        "phi(8, 8) at r=64 of two seeds over that of chance, 8 / width; the smaller of q and v",
        2.0,
        two_seeds,
    ),
    Claim(
        "Two seeds share more in W_q than in W_v",
        "LoRA, figure 4: W_q seems to have the higher intrinsic rank",
        "phi(8, 8) of q less that of v, r=64",
        0.0,
        query_against_value,
    ),
    Claim(
        "An update amplifies what it touches",
        "LoRA, table 7: by 21.5 at r=4 (W_q of layer 48 of GPT-3)",
        "‖dW‖ / ‖U^T W V‖ of W_q at r=4, median over layers",
        2.0,
        lambda seen: seen.every(lambda s: FACTOR(seen, 4, s)),
    ),
    Claim(
        "A small rank amplifies more than a large one",
        "LoRA, table 7: 21.5 at r=4, 1.9 at r=64",
        "the factor at r=4 over that at r=64",
        2.0,
        lambda seen: seen.every(lambda s: FACTOR(seen, 4, s) / FACTOR(seen, 64, s)),
    ),
    Claim(
        "An update lies along directions that W has",
        "LoRA, table 7: 0.32 of W_q on its directions, 0.02 on random ones (16 times)",
        "‖U^T W V‖ of the update's U, V over that of random ones, r=4, median over layers",
        2.0,
        lambda seen: seen.every(lambda s: ONTO_RANDOM(seen, 4, s)),
    ),
    Claim(
        "But not those that W has most of",
        "LoRA, table 7: 21.67 on the first directions of W_q, 0.32 on those of the update (68 times)",
        "‖U^T W V‖ of the first U, V of W over that of the update's, r=4, median over layers",
        5.0,
        lambda seen: seen.every(lambda s: ONTO_WEIGHT(seen, 4, s)),
    ),
    Claim(
        "A task has few dimensions",
        "Aghajanyan et al, table 1: d90 of MRPC is 1,608 of BERT-base's 110 M (1 in 68,000)",
        "parameters of the model over d90",
        10_000.0,
        lambda seen: seen.every(lambda s: seen.names["everything"][str(s)]["trainable"] / seen.d90(True, s)),
    ),
    Claim(
        "Pretraining makes them few",
        "Aghajanyan et al, section 4.1: d90 falls as pretraining goes on",
        "d90 with random weights over d90 with pretrained ones, at one level; none of those tried counts as the next",
        1.0,
        lambda seen: seen.every(lambda s: seen.d90(False, s) / seen.d90(True, s)),
    ),
)


@dataclasses.dataclass(frozen=True)
class Verdict:
    claim: Claim
    values: list[float]

    @property
    def mean(self) -> float:
        return float(np.mean(self.values)) if self.values else math.nan

    @property
    def word(self) -> str:
        if not self.values or math.isnan(self.mean):
            return "not measured"
        return "holds" if self.mean > self.claim.least else "does not hold"

    @property
    def passing(self) -> str:
        return f"{sum(x > self.claim.least for x in self.values)} of {len(self.values)}"


# What is shown


def judge(seen: Seen) -> list[Verdict]:
    return [Verdict(claim, claim.measure(seen)) for claim in CLAIMS]


def number(x: float) -> str:
    return "-" if math.isnan(x) else f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}" if abs(x) >= 1 else f"{x:.3f}"


def report(bench: Bench, seen: Seen, verdicts: list[Verdict]) -> None:
    """The tables: on the console, as `claims.json` and as Markdown."""
    table = Table(caption=f"{bench.study.seeds} seeds, {bench.study.steps} steps of {bench.study.batch} texts")
    for name in ("claim", "above", "found", "seeds", ""):
        table.add_column(name, justify="left" if name in ("claim", "") else "right")
    lines = ["| claim | statistic | above | found (of each seed) | |", "|---|---|---|---|---|"]
    for verdict in verdicts:
        claim, found, least = verdict.claim, number(verdict.mean), number(verdict.claim.least)
        table.add_row(claim.says, least, found, verdict.passing, verdict.word)
        each = ", ".join(map(number, verdict.values))
        cells = f"{claim.says} ({claim.source})", claim.statistic, least, f"{found} ({each})", verdict.word
        lines.append(f"| {' | '.join(cells)} |")
    console.print(table)
    lines += ["", "| trained | parameters | accuracy, % (least to most) | loss, nats |", "|---|---|---|---|"]
    for name, runs in bench.found["runs"].items():
        score, loss = ([100 * run["accuracy"] for run in runs.values()], [run["loss"] for run in runs.values()])
        spread = f"{np.mean(score):.1f} ({min(score):.1f} to {max(score):.1f})"
        trainable = next(iter(runs.values()))["trainable"]
        lines.append(f"| {name} | {trainable:,} | {spread} | {np.mean(loss):.3f} |")
    lines += [
        "",
        "| r | seed | norm of dW | of W | W on dW | on its own first r | on random | factor |",
        "|" + "---|" * 8,
    ]
    for rank in (4, 64):
        for seed in bench.seeds:
            x = jax.tree.map(lambda layers: float(np.median(layers)), seen.amplified("q", rank, seed))
            cells = (x.update, x.weight, x.onto_update, x.onto_weight, x.onto_random, x.factor)
            lines.append(f"| {rank} | {seed} | {' | '.join(map(number, cells))} |")
    lines += [
        "",
        "| weights | seed | level | accuracy less majority, by d | d90 | at their own level | of the accuracy itself |",
        "|" + "---|" * 7,
    ]
    for pretrained in (True, False):
        for seed in bench.seeds:
            found = seen.dimension(pretrained, seed)
            scores = ", ".join(f"{d:,}: {score:.3f}" for d, score in seen.scores(pretrained, seed).items())
            whole = seen.names["everything"][str(seed)]
            level, own = seen.own(pretrained, seed, whole["majority"])
            _, plain = seen.own(pretrained, seed, 0.0)
            some = lambda d: "none" if d is None else f"{d:,}"
            kind = "pretrained" if pretrained else "random"
            cells = f"{found.threshold:.3f} | {scores} | {some(found.d)} | {some(own)} ({level:.3f}) | {some(plain)}"
            lines.append(f"| {kind} | {seed} | {cells} |")
    finetune.write(bench.study.out / "report.md", "\n".join(lines))
    data = [{"claim": v.claim.says, "least": v.claim.least, "values": v.values, "verdict": v.word} for v in verdicts]
    finetune.write(bench.study.out / "claims.json", json.dumps(data, indent=1))


def figures(bench: Bench, seen: Seen) -> dict[str, Any]:
    """Every figure, by name."""
    layers, every, plot = bench.config.num_hidden_layers, bench.found["runs"], jlora.plot
    whole = float(seen.accuracy("everything").mean())
    drawn = {}

    drawn["placements"] = plot.scores(
        {name: seen.accuracy(name) for name in placements(layers)},
        levels={"everything": whole, "head alone": float(seen.accuracy("head alone").mean())},
        title="one budget, ten places",
    )

    names = [f"qv, r={rank}" for rank in RANKS]
    drawn["ranks"] = plot.sweep(
        {"q and v": (RANKS, np.stack([seen.accuracy(name) for name in names], 1))},
        levels={"everything": whole},
        title="the rank of q and v",
    )

    names += [*rivals(layers), "FFN, r=4"]
    drawn["pareto"] = plot.pareto(
        {name: (next(iter(every[name].values()))["trainable"], seen.accuracy(name)) for name in names},
        title="accuracy against size",
    )

    if seen.pairs():
        figure, axes = plot.panels(1, 3)
        titled = dict(rows="directions of one seed, i", columns="directions of another, j")
        for kind, ax in zip("qv", axes[0], strict=False):
            grid = np.mean([seen.phi(kind, (64, s), (64, t)) for s, t in seen.pairs()], 0)
            plot.similarity(grid, title=f"a of W_{kind}, r = 64, two seeds", **titled, ax=ax)
        chance = analysis.random_similarity(bench.config.hidden_size, 64, 64)
        plot.similarity(chance, title="chance", **titled, ax=axes[0, 2])
        drawn["phi_seeds"] = figure

    figure, axes = plot.panels(1, 2)
    titled = dict(rows="directions of r = 8, i", columns="directions of r = 64, j")
    for kind, ax in zip("qv", axes[0], strict=True):
        plot.similarity(np.mean(seen.ranks(kind), 0), title=f"a of W_{kind}", **titled, ax=ax)
    drawn["phi_ranks"] = figure

    figure, axes = plot.panels(1, 2, width=5.2)
    shown = sorted({0, layers // 2, layers - 1})
    for rank, ax in zip((4, 64), axes[0], strict=True):
        of = seen.amplified("q", rank, 0)
        found = {f"layer {n}": jax.tree.map(lambda x, n=n: x[n], of) for n in shown}
        plot.amplification(found, title=f"W_q, r = {rank}", legend=rank == 64, ax=ax)
    drawn["amplification"] = figure

    series = {}
    for pretrained, kind in ((True, "pretrained"), (False, "random")):
        scores = [list(seen.scores(pretrained, seed).values()) for seed in bench.seeds]
        series[kind] = (seen.dimensions, np.array(scores))
    levels = {"90 % of everything": float(np.mean([seen.dimension(True, seed).threshold for seed in bench.seeds]))}
    drawn["dimension"] = plot.sweep(
        series, size="dimensions d", score="accuracy over majority (points)", levels=levels, title="a random subspace"
    )
    return drawn


def main(args: list[str] | None = None) -> None:
    """Trains what is not yet trained, judges every claim, draws."""
    study = tyro.cli(Study, args=args)
    if study.quick:
        less = {"steps": 12, "batch": 16, "held": 200}
        study = dataclasses.replace(study, seeds=1, **{k: min(getattr(study, k), n) for k, n in less.items()})
    dimensions = DIMENSIONS
    try:
        bench = Bench(study)
        layers = bench.config.num_hidden_layers
        rows = {f"qv, r={rank}": lora(rank, kernels("qv")) for rank in RANKS}
        rows |= rivals(layers) | placements(layers)
        for n, (name, row) in enumerate(rows.items(), 1):
            console.print(f"{n} of {len(rows)}: {name}")
            bench.row(name, row)
        for pretrained in (True, False):
            for seed in bench.seeds:
                console.print(f"d90 of {'pretrained' if pretrained else 'random'} weights, seed {seed}")
                bench.dimension(pretrained, seed, dimensions)
                bench.curve(pretrained, seed, dimensions)
        bench.row("everything, random", RANDOM)
    except TimeoutError as error:
        console.print(f"study: {error}")
        raise SystemExit(3) from error
    except (ValueError, OSError) as error:
        raise SystemExit(f"study: {error}") from error
    seen = Seen(bench, dimensions)
    report(bench, seen, judge(seen))
    folder = study.out / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    for name, figure in figures(bench, seen).items():
        jlora.plot.save(figure, folder / name)
    console.print(f"results {study.out}: results.json, claims.json, report.md, adapters, figures")


if __name__ == "__main__":
    main()
