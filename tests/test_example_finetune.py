"""The main job: the BERT of the examples against transformers' own, and runs that are cut short."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import tokenizers

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import bert  # noqa: E402
import finetune  # noqa: E402

pytestmark = pytest.mark.slow  # whole programs

safetensors = pytest.importorskip("safetensors.numpy", reason="the checkpoints here are safetensors")

PRAISE, BLAME = "good fine grand lovely".split(), "bad poor dull awful".split()
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *PRAISE, *BLAME, *"a the film plot very is so".split()]
TINY = {
    "model_type": "bert",
    "vocab_size": len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
}


def torch_names(params: dict) -> dict[str, np.ndarray]:
    """A checkpoint as PyTorch would write it, of transformers' Flax parameters."""
    out = {}
    for path, x in jax.tree_util.tree_leaves_with_path(params):
        *parts, kind = (key.key for key in path)
        x = np.asarray(x).T if kind == "kernel" else np.asarray(x)
        name = ".".join([*parts, "bias" if kind == "bias" else "weight"])
        out[name] = np.ascontiguousarray(x)
    out["embeddings.position_ids"] = np.arange(32)[None]
    return out


@pytest.fixture(scope="module")
def hf():
    """transformers' BERT of the tiny configuration, with every parameter random."""
    transformers = pytest.importorskip("transformers", reason="the weights are compared with its BERT")
    model = transformers.FlaxBertModel(transformers.BertConfig(**TINY), seed=1)
    rng = np.random.default_rng(0)
    noise = lambda x: x + 0.1 * rng.standard_normal(x.shape).astype(np.float32)
    model.params = jax.tree.map(noise, model.params)
    return model


@pytest.fixture
def folder(hf, tmp_path):
    """A checkpoint folder: the tiny BERT, and a tokenizer of a few words."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    safetensors.save_file(torch_names(hf.params), folder / "model.safetensors")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    tokenizer = tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)})
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def tsv(tmp_path):
    """Praise and blame in few words or many."""
    rng, lines = random.Random(0), []
    for i in range(60):
        words = rng.choices(WORDS[12:], k=rng.choice([3, 12])) + [rng.choice([PRAISE, BLAME][i % 2])]
        lines.append(f"{' '.join(words)}\t{['good', 'bad'][i % 2]}")
    (tmp_path / "data.tsv").write_text("\n".join(lines) + "\n")
    return tmp_path / "data.tsv"


def last_state(out: Path) -> dict:
    """The last training checkpoint of a run, as NumPy arrays and plain values."""
    with ocp.CheckpointManager(out.absolute() / "checkpoints") as checkpoints:
        state = checkpoints.restore(checkpoints.latest_step(), args=ocp.args.StandardRestore())
    state["key"] = jax.random.key_data(state["key"])
    return jax.tree.map(np.asarray, state)


# --- the model ----------------------------------------------------------------


def test_hidden_states_equal_transformers(hf, folder):
    """Embeddings and each layer, under padding and two token types, are those of transformers; a new head is zero."""
    config = bert.Config.read(folder, num_labels=3)
    params = bert.load(folder, config)
    rng = np.random.default_rng(1)
    ids = rng.integers(0, len(WORDS), (3, 10))
    mask = np.arange(10) < np.array([[10], [7], [1]])
    types = rng.integers(0, 2, ids.shape)
    want = hf(ids, mask.astype(int), types, output_hidden_states=True).hidden_states
    parts = (bert.Embeddings, bert.Layer)
    logits, seen = bert.Bert(config).apply(
        {"params": params}, ids, mask, types, capture_intermediates=lambda m, _: isinstance(m, parts)
    )
    seen = seen["intermediates"]
    layers = [seen["encoder"][f"layer_{i}"] for i in range(2)]
    got = [each["__call__"][0] for each in (seen["embeddings"], *layers)]
    chex.assert_trees_all_close(got, list(want), atol=1e-4)
    chex.assert_trees_all_equal(logits, np.zeros((3, 3), np.float32))  # a head of zeros


def test_padding_changes_no_logit(folder):
    """Masked positions, whatever stands in them, have no part in the logits."""
    config = bert.Config.read(folder)
    params = bert.load(folder, config)
    params["classifier"]["kernel"] = np.ones_like(params["classifier"]["kernel"])
    apply = lambda ids, mask: bert.Bert(config).apply({"params": params}, ids, mask)
    ids = np.array([[2, 5, 9, 3]])
    padded = np.pad(ids, ((0, 0), (0, 4)), constant_values=7)
    want, got = apply(ids, np.ones_like(ids)), apply(padded, np.arange(8)[None] < 4)
    chex.assert_trees_all_close(got, want, atol=1e-5)


@pytest.mark.parametrize("style", ["prefix", "gamma"])
def test_loads_older_names(folder, style):
    """A checkpoint with the prefix `bert.`, or with gamma and beta, is the same model bit for bit."""
    config = bert.Config.read(folder)
    want = bert.load(folder, config)
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    if style == "prefix":
        tensors = {f"bert.{name}": x for name, x in tensors.items()}
        tensors["cls.predictions.bias"] = np.zeros(3)
    else:
        new = lambda name: name.replace("Norm.weight", "Norm.gamma").replace("Norm.bias", "Norm.beta")
        tensors = {new(name): x for name, x in tensors.items()}
    safetensors.save_file(tensors, file)
    chex.assert_trees_all_equal(bert.load(folder, config), want)


def test_a_checkpoint_that_does_not_fit_is_refused(folder):
    """All that is missing, misshapen or too much in a checkpoint is named in one refusal, and nothing is made up."""
    config = bert.Config.read(folder)
    file = folder / "model.safetensors"
    tensors = safetensors.load_file(file)
    del tensors["encoder.layer.1.output.dense.bias"]
    tensors["embeddings.word_embeddings.weight"] = np.zeros((3, 32), np.float32)
    tensors["encoder.layer.7.output.dense.bias"] = np.zeros(32, np.float32)
    safetensors.save_file(tensors, file)
    with pytest.raises(ValueError) as error:
        bert.load(folder, config)
    for words in (
        "encoder.layer.1.output.dense.bias (32,) is missing",
        "embeddings.word_embeddings.weight has the shape (3, 32), not (19, 32)",
        "encoder.layer.7.output.dense.bias (32,) has no place in the model",
    ):
        assert words in str(error.value)


# --- the command line ---------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("good film\tgood\nno label here\n", "line 2: 'no label here'"),
        ("a\tb\tc\n", "line 1"),
        ("\tgood\n", "line 1"),
        ("a film\tgood\nthe plot\tgood\n", "2 labels are needed"),
        ("", "2 labels are needed"),
        ("caf\xe9\tgood\n", "not UTF-8"),
    ],
)
def test_malformed_data_is_refused(folder, tmp_path, text, words):
    """A line that is no text, tab and label is refused by number, and so is data of one label or another encoding."""
    (tmp_path / "bad.tsv").write_bytes(text.encode("latin-1"))
    with pytest.raises(SystemExit, match=words):
        finetune.main(["--model", str(folder), "--data", str(tmp_path / "bad.tsv")])


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("config.json", "no config.json"),
        ("model.safetensors", "no model.safetensors"),
        ("tokenizer.json", "neither a tokenizer.json nor a vocab.txt"),
    ],
)
def test_an_incomplete_model_is_refused(folder, tsv, name, words):
    """The file that a model's folder lacks is named in the words the program ends with."""
    (folder / "vocab.txt").unlink()
    (folder / name).unlink()
    with pytest.raises(SystemExit, match=words):
        finetune.main(["--model", str(folder), "--data", str(tsv)])


def test_without_network_and_cache_says_so(tmp_path, monkeypatch):
    """A failed download ends in words with pip's own reason, and leaves nothing in the cache to be taken for whole."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    with pytest.raises(SystemExit, match="could not be downloaded.*has no copy of it") as error:
        finetune.main(["--cache", str(tmp_path / "cache")])
    assert "No matching distribution" in str(error.value)
    assert not list((tmp_path / "cache").iterdir())


def test_the_order_of_the_data_is_a_function_of_seed_and_step():
    """A batch is the same whenever it is asked for; an epoch has no text twice, and the next one another order."""
    n = 100
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 17, n)
    ids = np.arange(n)[:, None] * np.ones((1, 16), int)
    data = finetune.Data(ids, tokens, np.arange(n), np.arange(90), np.arange(90, n))
    steps = [data.step(3, t, 8) for t in range(22)]  # two epochs of eleven batches
    chex.assert_trees_all_equal([data.step(3, t, 8) for t in reversed(range(22))], steps[::-1])
    for part in (steps[:11], steps[11:]):
        labels = np.concatenate([labels for _, _, labels in part])
        assert len(set(labels)) == len(labels) == 88 and labels.max() < 90
    assert {ids.shape for ids, _, _ in steps} == {(8, 8), (8, 16)}
    assert all((ids[:, 0] == labels).all() for ids, _, labels in steps)
    assert all((mask.sum(-1) == tokens[labels]).all() for _, mask, labels in steps)
    assert any((a[2] != b[2]).any() for a, b in zip(steps[:11], steps[11:], strict=True))


def test_runs_compares_and_resumes_bit_for_bit(folder, tsv, tmp_path, capsys):
    """A stopped run goes on only when told to and with its own options, and ends with the bits of one never stopped."""
    out = tmp_path / "out"
    args = ["--model", str(folder), "--data", str(tsv), "--out", str(out), "--length", "32"]
    args += ["--batch", "8", "--rank", "2", "--steps", "6", "--save-every", "2", "--dropout", "0.1"]
    finetune.main(args)
    printed = capsys.readouterr().out
    assert "a fresh process labels 12 of 12" in printed
    rows = json.loads((out / "results.json").read_text())
    assert [row["method"] for row in rows] == ["probe", "lora", "full"]
    assert rows[0]["trainable"] == 2 * 33 and rows[1]["trainable"] == 2 * 33 + 2 * 2 * 2 * 2 * 32
    assert rows[2]["trainable"] == sum(x.size for x in jax.tree.leaves(bert.shapes(bert.Config.read(folder))))
    assert rows[1]["bytes"] > 4 * rows[1]["trainable"]

    want = last_state(out)
    assert want["step"] == 6 and set(want) == {"trainable", "opt_state", "step", "key"}
    with ocp.CheckpointManager(out / "checkpoints") as checkpoints:
        checkpoints.delete(6)
    with pytest.raises(SystemExit, match="stopped after step 4 of 6: pass --resume"):
        finetune.main(args)
    with pytest.raises(SystemExit, match="rank was 2"):
        finetune.main([*args, "--rank", "3", "--resume"])
    finetune.main([*args, "--resume", "--no-compare"])
    assert "after step 4 of 6" in capsys.readouterr().out
    chex.assert_trees_all_equal(last_state(out), want)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["bitfit", "full"])
def test_other_methods(folder, tsv, tmp_path, capsys, method):
    """Biases alone and all weights train and are read back too, and a vocabulary alone makes the tokenizer."""
    (folder / "tokenizer.json").unlink()  # the vocabulary alone will do
    args = ["--model", str(folder), "--data", str(tsv), "--out", str(tmp_path / "out")]
    finetune.main([*args, "--length", "32", "--steps", "2", "--no-compare", "--method", method])
    assert "a fresh process labels 12 of 12" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter").exists() == (method != "full")


# --- kills --------------------------------------------------------------------


def killed_runs(args: list[str], out: Path, kills: int, inside: int, seed: int) -> tuple[int, int]:
    """Starts a run again and again until `kills` have hit it, `inside` of them amid a save.

    Returns the kills, and those that left an unfinished save behind.
    """
    rng, checkpoints = random.Random(seed), out / "checkpoints"
    finished = lambda: {p.name for p in checkpoints.glob("*") if p.name.isdigit()}
    saving = lambda: [p for p in checkpoints.glob("*") if not p.name.isdigit()]
    done = caught = 0
    while done < kills:
        before = finished()
        process = subprocess.Popen([*args, "--resume"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        amid = caught < inside
        if amid or rng.random() < 0.8:  # the others are hit while they start
            while finished() == before and process.poll() is None:
                time.sleep(0.001)
            time.sleep(rng.uniform(0, 0.1))
        else:
            time.sleep(rng.uniform(0, 4))
        while amid and not saving() and process.poll() is None:
            time.sleep(0.0002)
        process.send_signal(signal.SIGKILL)
        output = process.communicate()[0].decode()
        assert process.returncode in (0, -signal.SIGKILL), output
        if process.returncode == 0:
            raise AssertionError(f"the run ended before it was killed {kills} times")
        done += 1
        caught += amid and bool(saving())
    return done, caught


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_like_one_never_killed(folder, tsv, tmp_path):
    """No kill, not one amid a save, costs anything but time: what a run ends with is that of one never killed."""
    args = [sys.executable, str(EXAMPLES / "finetune.py"), "--model", str(folder), "--data", str(tsv)]
    args += ["--length", "32", "--batch", "4", "--steps", "80", "--save-every", "1", "--no-compare"]
    args += ["--dropout", "0.1"]
    run = lambda out, *more: [*args, "--out", str(out), *more]
    whole = tmp_path / "whole"
    subprocess.run(run(whole), check=True, stdout=subprocess.DEVNULL)

    outs = [tmp_path / "a", tmp_path / "b"]
    with ThreadPoolExecutor() as pool:  # two runs at a time keep two cores busy
        kill = lambda seed, out: killed_runs(run(out), out, kills=2, inside=1, seed=seed)
        counts = list(pool.map(kill, range(2), outs))
    kills, caught = (sum(n) for n in zip(*counts, strict=True))
    assert kills == 4 and caught >= 1
    want = last_state(whole)
    for out in outs:
        subprocess.run(run(out, "--resume"), check=True, stdout=subprocess.DEVNULL)
        chex.assert_trees_all_equal(last_state(out), want)
        rows = [json.loads((o / "results.json").read_text())[0] for o in (out, whole)]
        assert rows[0]["accuracy"] == rows[1]["accuracy"]
