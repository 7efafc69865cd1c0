"""The comparison of ways to decide ranks: a whole run on a tiny model, and its claims on made-up results."""

import json
import re
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tokenizers

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

pytestmark = pytest.mark.slow  # whole programs

safetensors = pytest.importorskip("safetensors.numpy", reason="the checkpoints here are safetensors")
pytest.importorskip("matplotlib", reason="the example draws")

import adaptive_rank  # noqa: E402
import bert  # noqa: E402
from test_example_finetune import TINY, WORDS, tsv  # noqa: E402, F401


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of a tiny BERT with random weights."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY))
    rng, tensors = np.random.default_rng(0), {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(bert.shapes(bert.Config.read(folder))):
        *modules, kind = (key.key for key in path)
        name = ".".join(modules)
        for pattern, new in bert.RENAMES:
            name = re.sub(pattern, new, name)
        x = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) + (kind == "scale")
        name += ".bias" if kind == "bias" else ".weight"
        tensors[name] = np.ascontiguousarray(x.T if kind == "kernel" else x)
    safetensors.save_file(tensors, folder / "model.safetensors")
    tokenizers.BertWordPieceTokenizer({word: i for i, word in enumerate(WORDS)}).save(str(folder / "tokenizer.json"))
    return folder


def test_a_run_ends_with_table_claims_and_plots_and_goes_on_where_it_was(folder, tsv, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The ways that have a budget spend it whole; begun again, what is missing alone is run, to the same numbers."""
    out = tmp_path / "out"
    args = ["--model", str(folder), "--data", str(tsv), "--out", str(out), "--rank", "1", "--steps", "6"]
    args += ["--batch", "8", "--length", "8", "--held-out", "10"]  # one width, one program
    adaptive_rank.main([*args, "--seeds", "0", "1"])
    settings, results = json.loads((out / "results.json").read_text()).values()
    weights = 2 * 6
    names = ["LoRA r=1", "LoRA r=4", "AdaLoRA", *(f"SoRA λ={x:g}" for x in adaptive_rank.LAMBDAS), "DyLoRA", "SeLoRA"]
    assert list(results) == names
    for name, found in results.items():
        assert list(found) == ["0", "1"]
        for run in found.values():
            assert 0 <= run["trained"] <= 1 and 0 <= run["budget"] <= 1
            assert 0 < sum(run["ranks"].values()) <= weights
            assert run["bytes"] > 4 * run["parameters"] and max(map(int, run["history"])) == 6
            assert set(run.get("curve", {})) == (set("1234") if name in ("LoRA r=4", "DyLoRA") else set())
    for name in ("LoRA r=1", "LoRA r=4", "AdaLoRA", "DyLoRA"):
        assert all(sum(run["ranks"].values()) == weights for run in results[name].values())
    table = (out / "table.md").read_text()
    assert all(f"| {name} |" in table for name in [*names, *adaptive_rank.CLAIMS])
    assert "not held" in capsys.readouterr().out
    for name in ("truncation", "ranks", "accuracy"):
        assert (out / f"{name}.png").stat().st_size > 5000

    # what is missing is run, and ends as it did; nothing else runs, nor is it mixed with others
    want = results["SeLoRA"]["1"]
    left = results | {"SeLoRA": {"0": results["SeLoRA"]["0"]}}
    (out / "results.json").write_text(json.dumps({"settings": settings, "runs": left}))
    adaptive_rank.main([*args, "--seeds", "0", "1"])
    again = json.loads((out / "results.json").read_text())["runs"]["SeLoRA"]["1"]
    assert again | {"bytes": 0} == want | {"bytes": 0}  # a file's own data, dates among it, is not always as long
    monkeypatch.setattr(adaptive_rank, "once", None)
    adaptive_rank.main([*args, "--seeds", "0", "1"])
    with pytest.raises(SystemExit, match="other settings"):
        adaptive_rank.main([*args, "--batch", "4"])
    monkeypatch.setattr(adaptive_rank, "once", lambda study, name, way, seed, steps: results[name][str(seed)])
    adaptive_rank.main([*args, "--seeds", "1", "0", "--quick"])
    quick = json.loads((out / "quick" / "results.json").read_text())
    assert quick["settings"]["steps"] == 6 and all(list(found) == ["1"] for found in quick["runs"].values())


def test_claims_are_decided_by_their_thresholds():
    """Results in which each claim holds by a little, and fails by a little."""
    study = adaptive_rank.Study(rank=1, seeds=(0, 1))
    kinds = ("attention/query", "output", "intermediate")
    paths = [f"encoder/layer_{n}/{kind}/kernel" for n in range(2) for kind in kinds]
    uneven, even = dict(zip(paths, [0, 1, 0, 1, 2, 2], strict=True)), dict.fromkeys(paths, 1)

    def runs(gap, ranks, counts):
        of = lambda x: {str(n): {"trained": x + 0.02 * n, "budget": x + 0.02 * n, "ranks": ranks} for n in (0, 1)}
        found = {"LoRA r=1": of(0.7), "AdaLoRA": of(0.7 + gap), "SeLoRA": of(0.7)}
        found["DyLoRA"] = {s: run | {"curve": {"1": run["trained"] + gap}} for s, run in of(0.7).items()}
        found["LoRA r=4"] = {s: run | {"curve": {"1": 0.6}, "kept": run["trained"]} for s, run in of(0.7).items()}
        for x, n in zip(adaptive_rank.LAMBDAS, counts, strict=True):
            found[f"SoRA λ={x:g}"] = {s: run | {"trained ranks": n} for s, run in of(0.7 + min(gap, 0)).items()}
        return found

    decide = lambda *given: [check(study, runs(*given))[0] for check in adaptive_rank.CLAIMS.values()]
    assert decide(0.03, uneven, (20, 16, 9)) == [True] * 8
    assert decide(-0.03, even, (20, 16, 16)) == [False] * 8
    # two standard errors of a difference of means of x, x + 0.02: 2 * sqrt(2 * 0.0002 / 2), above 0.0282
    assert decide(0.029, uneven, (20, 16, 9))[1] and not decide(0.028, uneven, (20, 16, 9))[1]
    assert adaptive_rank.share(uneven) == pytest.approx(4 / 6) and adaptive_rank.share(even) == pytest.approx(1 / 3)
