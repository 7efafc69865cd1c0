"""The DreamBooth example at a small size: the class prior keeps the class, and one new row changes nothing of it."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

import dreambooth  # noqa: E402

pytestmark = pytest.mark.slow  # whole programs


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """`{way: what the example measured}` of a short run, with a figure."""
    plot = tmp_path_factory.mktemp("figure") / "drawn.png"
    rows = dreambooth.main(60, 150, plot=plot)
    assert plot.stat().st_size > 10_000
    return {row.name: row for row in rows}


@pytest.mark.parametrize("way", ["all weights", "LoRA"])
def test_the_prior_keeps_the_class(rows, way):
    """Both learn the subject; with the prior loss what is asked for as the class moves by half as much at most."""
    alone, kept = rows[way], rows[f"{way}, prior"]
    for row in (alone, kept):
        assert row.subject < 0.9 * rows["base"].subject
    assert kept.drift < 0.5 * alone.drift


def test_a_new_word_leaves_the_class_alone(rows):
    """Textual inversion trains one row: the subject's loss falls, and nothing else moves."""
    row = rows["textual inversion"]
    assert row.trained == 32 and row.subject < rows["base"].subject
    assert row.drift == 0


def test_the_subject_is_told_from_the_class():
    """Of pictures of the subject all are hollow, of solid squares none."""
    rng = np.random.default_rng(0)
    assert dreambooth.hollow(dreambooth.pictures(rng, "subject", 20)) == 1
    assert dreambooth.hollow(dreambooth.pictures(rng, "square", 20)) == 0
