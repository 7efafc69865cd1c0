"""The study on a tiny model, without downloads: stopped, gone on with, every claim judged, every text in its figure."""

import itertools
import json
import re
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from test_example_finetune import TINY, WORDS, tsv  # noqa: F401

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.insert(0, str(EXAMPLES))

import bert  # noqa: E402
import finetune  # noqa: E402
import study  # noqa: E402

pytestmark = pytest.mark.slow  # whole programs


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of two layers, wide enough for the largest rank."""
    safetensors = pytest.importorskip("safetensors.numpy", reason="the checkpoints here are safetensors")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TINY | {"hidden_size": 64, "intermediate_size": 256}))
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    rng, tensors = np.random.default_rng(0), {}
    shapes = bert.shapes(bert.Config.read(folder))
    for path, leaf in finetune.jax.tree_util.tree_leaves_with_path(shapes):
        *modules, kind = (key.key for key in path)
        if modules == ["classifier"]:
            continue
        name = ".".join(modules)
        for pattern, new in bert.RENAMES:
            name = re.sub(pattern, new, name)
        x = 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) + (kind == "scale")
        tensors[f"{name}.{'bias' if kind == 'bias' else 'weight'}"] = np.ascontiguousarray(
            x.T if kind == "kernel" else x
        )
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


def test_the_study_stops_goes_on_and_judges_every_claim(folder, tsv, tmp_path, monkeypatch):  # noqa: F811
    """A study out of time keeps its runs when it goes on; all places have one budget, and every claim is judged."""
    out = tmp_path / "out"
    args = ["--model", str(folder), "--data", str(tsv), "--out", str(out), "--tokens", "8"]  # one width, one program
    args += ["--seeds", "2", "--steps", "2", "--batch", "4"]
    ticks = map(float, itertools.count())  # a second between two looks at the clock, however busy the machine
    with monkeypatch.context() as patched, pytest.raises(SystemExit) as stopped:
        patched.setattr(study, "time", SimpleNamespace(monotonic=ticks.__next__, perf_counter=time.perf_counter))
        study.main([*args, "--minutes", "0.05"])
    assert stopped.value.code == 3
    first = json.loads((out / "results.json").read_text())["runs"]
    assert sum(map(len, first.values())) == 3
    with pytest.raises(SystemExit, match="pass --resume"):
        study.main(args)
    with pytest.raises(SystemExit, match="steps was 2"):
        study.main([*args, "--steps", "3", "--resume"])
    for more, words in (
        (["--seeds", "0"], "seeds is 0"),
        (["--held", "-5"], "held is -5"),
        (["--minutes", "nan"], "minutes is nan"),
        (["--tokens", "1"], "0 texts have at most 1 tokens"),
        (["--out", str(tsv)], "File exists"),  # and not after the first training
    ):
        with pytest.raises(SystemExit, match=words):
            study.main([*args[:4], "--out", str(tmp_path / "new"), *more])

    drawn = {}
    monkeypatch.setattr(study.jlora.plot, "save", lambda figure, path: drawn.update({path.name: figure}))
    study.main([*args, "--resume"])
    runs = json.loads((out / "results.json").read_text())["runs"]
    assert all(runs[name][seed] == run for name, seeds in first.items() for seed, run in seeds.items())
    assert {len(seeds) for name, seeds in runs.items() if not name.startswith("d=")} == {2}
    budget = {runs[name]["0"]["trainable"] for name in study.placements(2)}
    assert budget == {2 * 65 + 40 * 64 * 2}, "ten places, one budget"
    claims = json.loads((out / "claims.json").read_text())
    assert len(claims) == len(study.CLAIMS) and "not measured" not in {claim["verdict"] for claim in claims}
    assert "| pretrained | 1 |" in (out / "report.md").read_text()

    from test_plot import check_texts

    assert len(drawn) == 7
    for figure in drawn.values():
        check_texts(figure)


def test_claims_are_the_differences_that_they_name():
    """Accuracies of which each claim is known."""
    table = {"qv, r=8": [0.8, 0.9], "everything": [0.7, 0.95], "a": [0.5, 0.5], "b": [0.6, 0.4]}
    seen = SimpleNamespace(accuracy=lambda name: np.array(table[name]))
    np.testing.assert_allclose(study.gap("qv, r=8", "everything")(seen), [0.1, -0.05])
    np.testing.assert_allclose(study.gap("everything", "a", "b")(seen), [0.1, 0.45])
    np.testing.assert_allclose(study.least_gap(("a", "b"), "everything", "qv, r=8")(seen), [0.1, 0.4])
    verdict = study.Verdict(study.CLAIMS[0], [0.1, -0.05])
    assert verdict.word == "holds" and verdict.passing == "1 of 2"
    assert study.Verdict(study.CLAIMS[0], [-0.2, 0.1]).word == "does not hold"
    assert study.Verdict(study.CLAIMS[0], []).word == "not measured"
