"""Figures: what is written on one stands inside and on nothing else; axes have labels; files are the same twice."""

import sys

import jax.numpy as jnp
import numpy as np
import pytest

pytest.importorskip("matplotlib", reason="figures are an extra")

import matplotlib  # noqa: E402
from matplotlib.text import Text  # noqa: E402

from jlora import analysis, plot, rank  # noqa: E402
from jlora.plot import _style, layers  # noqa: E402

pytestmark = pytest.mark.slow  # nothing else stands on this room


def rng(seed=0):
    return np.random.default_rng(seed)


def grid():
    one, other = (analysis.svd(rng(n).standard_normal((64, r))) for n, r in ((1, 8), (2, 64)))
    return analysis.similarity(one, other)


def amplified(count):
    weight = rng(3).standard_normal((40, 30))
    update = lambda n: analysis.svd(np.outer(rng(n).standard_normal(40), rng(n + 50).standard_normal(30)))
    names = [f"layer_{n}/query" for n in range(count)]
    return {name: analysis.amplification(update(n), weight, 1) for n, name in enumerate(names)}


LONG = "encoder/layers_and_blocks/transformer_block/self_attention/query_projection/kernel"
LAYERS = [f"bert/encoder/layer/{n}/attention/self/{kind}/kernel" for n in range(6) for kind in ("query", "value")]
LOSSES = 0.3 + 0.4 * np.exp(-np.arange(40) / 12) + 0.03 * rng(1).standard_normal((6, 3, 40))
POINTS = {
    "LoRA r=1, query and value": (9_216, [0.790, 0.802, 0.806]),
    "LoRA r=8, query and value": (73_728, [0.812, 0.818, 0.824]),
    "LoRA r=64": (589_824, [0.815, 0.821, 0.823]),
    "BitFit": (30_000, [0.78, 0.786, 0.79]),
    "top 2 layers": (3_500_000, 0.816),
    "full fine-tuning": (22_600_000, [0.83, 0.835, 0.838]),
}

BUDGET = rank.Budget(96, 24, total_steps=60, init_warmup=6, final_warmup=20, interval=5)
HISTORY = {t: {path: BUDGET.at(t) * (n + 1) // 78 for n, path in enumerate(LAYERS)} for t in range(0, 61, 5)}

DRAWN = {
    "similarity": lambda ax=None: plot.similarity(grid(), title="r = 8 against r = 64, query of layer 3", ax=ax),
    "spectra": lambda ax=None: plot.spectra(
        {f"layer {n}": np.geomspace(3, 0.01 * (n + 1), 64) for n in range(4)}, title="ΔW of the queries", ax=ax
    ),
    "amplification": lambda ax=None: plot.amplification(amplified(3), title="r = 4", ax=ax),
    "allocation": lambda ax=None: plot.allocation(
        {path: n % 9 for n, path in enumerate(LAYERS)}, title="budget 48", ax=ax
    ),
    "pareto": lambda ax=None: plot.pareto(POINTS, title="movie sentences", ax=ax),
    "sweep": lambda ax=None: plot.sweep(
        {"q and v": ([1, 2, 4, 8, 64], 0.8 + 0.01 * rng(2).standard_normal((3, 5)))},
        levels={"everything": 0.83, "head alone": 0.77},
        title="the rank of q and v",
        ax=ax,
    ),
    "scores": lambda ax=None: plot.scores(
        {f"place {n}, r = {n + 1}": 0.8 + 0.01 * rng(n).standard_normal(3) for n in range(6)},
        levels={"everything": 0.83, "head alone": 0.77},
        title="one budget",
        ax=ax,
    ),
    "curves": lambda ax=None: plot.curves(
        {f"r = {2**n}": (10 * np.arange(40), LOSSES[n]) for n in range(3)}, title="three seeds", ax=ax
    ),
}
MANY = {
    "spectra": lambda: plot.spectra({f"layer_{n}/query/kernel": [2.0, 1.0, 0.5] for n in range(9)}),
    "amplification": lambda: plot.amplification(amplified(12)),
    "allocation": lambda: plot.allocation({f"{n}/{path}": n for path in LAYERS for n in range(6)}),
    "stacked": lambda: plot.allocation({f"blocks/{name}/kernel": np.arange(24) % 17 for name in ("q", "up_proj")}),
    "no layers": lambda: plot.allocation({"embed": 3, "head/kernel": 2}),
    "ranks": lambda: plot.ranks(HISTORY, budget=BUDGET.at, title="budget 24"),
    "ranks without budget": lambda: plot.ranks(dict(list(HISTORY.items())[:1])),
    "one": lambda: plot.similarity(np.ones((1, 1))),
    "sweep": lambda: plot.sweep({"a random subspace": (2 ** np.arange(0, 24, 2), np.linspace(0.5, 0.8, 12))}),
    "scores": lambda: plot.scores({f"weight {n}": 0.5 + n / 100 for n in range(40)}, levels={"most": 0.9}),
    "panels": lambda: panels(),
    "long words": lambda: plot.similarity(grid(), title=LONG, rows=LONG, columns=LONG),
    "long label of a bar": lambda: plot.amplification({f"{LONG}{n}": x for n, x in amplified(3).items()}),
    "long label of a point": lambda: plot.pareto({LONG: (10, 0.4), f"{LONG}/bias": (20, 0.5)}, title=LONG),
    "long label of a row": lambda: plot.scores({LONG: [0.8, 0.9]}),
    "long label of a level": lambda: plot.sweep({LONG: ([1, 2], [0.3, 0.4])}, levels={f"{LONG}/bias": 0.4}),
    "points": lambda: plot.pareto({f"run {n}": (10**6 + n, n / 30) for n in range(30)}),
    "sizes close together": lambda: plot.sweep({"a": ([100, 101, 102, 1000], [0.1, 0.2, 0.3, 0.4])}),
}


def panels():
    figure, axes = plot.panels(2, 4)
    for (name, draw), ax in zip(DRAWN.items(), axes.flat, strict=True):
        assert draw(ax) is figure, name
    return figure


def boxes(figure):
    """Every text that is to be seen, and where it stands, in pixels."""
    figure.canvas.draw()
    seen = [t for t in figure.findobj(Text) if t.get_visible() and t.get_text().strip()]
    # tick labels outside of the limits are kept, but not drawn
    drawn = [t for t in seen if not any(t in ticks(axis) and not shown(t, axis) for axis in axes(figure))]
    return [(t.get_text(), t.get_window_extent()) for t in drawn]


def axes(figure):
    return [axis for ax in figure.axes for axis in (ax.xaxis, ax.yaxis)]


def ticks(axis):
    return [label for tick in (*axis.majorTicks, *axis.minorTicks) for label in (tick.label1, tick.label2)]


def shown(text, axis):
    low, high = sorted(axis.get_view_interval())
    place = text.get_position()[0 if axis.axis_name == "x" else 1]
    return low - 1e-9 * abs(low) <= place <= high + 1e-9 * abs(high)


def check_texts(figure):
    """Every text is inside the figure, and on no other."""
    found = boxes(figure)
    width, height = figure.bbox.size
    assert len(found) > 3
    for text, box in found:
        inside = box.x0 >= -0.5 and box.y0 >= -0.5 and box.x1 <= width + 0.5 and box.y1 <= height + 0.5
        assert inside, f"{text!r} stands at {box.extents}, and the figure ends at {width, height}"
    for n, (text, one) in enumerate(found):
        for other, two in found[:n]:
            apart = one.x1 <= two.x0 + 1 or two.x1 <= one.x0 + 1 or one.y1 <= two.y0 + 1 or two.y1 <= one.y0 + 1
            assert apart, f"{text!r} overlaps {other!r}"


@pytest.mark.parametrize("draw", [*DRAWN.values(), *MANY.values()], ids=[*DRAWN, *(f"many {name}" for name in MANY)])
def test_every_text_stands_inside_and_on_no_other(draw):
    """Every text of every figure can be read, with long labels and many points too: none is cut off or covered."""
    check_texts(draw())


@pytest.mark.parametrize("name", [pytest.param(n, marks=() if n == "pareto" else pytest.mark.slow) for n in DRAWN])
def test_axes_are_labelled_and_files_are_reproducible(name, tmp_path):
    """A figure has a title and labelled axes, and drawn twice it gives the same PNG and SVG, byte for byte."""
    figure = DRAWN[name]()
    ax = figure.axes[0]
    assert ax.get_xlabel() and (ax.get_ylabel() or name == "scores") and ax.get_title()
    first, second = (plot.save(DRAWN[name](), tmp_path / f"{name}.v{n}") for n in (1, 2))
    assert [p.name for p in first] == [f"{name}.v1.png", f"{name}.v1.svg"]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes() and one.stat().st_size > 5000


def test_no_global_is_touched(monkeypatch):
    """Drawing changes no setting of matplotlib's and never imports pyplot, so a user's own figures are as they were."""
    settings = lambda: {
        k: matplotlib.rcParams[k] for k in matplotlib.rcParams if k != "backend"
    }  # reading that sets it
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    before = settings()
    DRAWN["curves"]()
    assert settings() == before and "matplotlib.pyplot" not in sys.modules


def test_series_are_told_apart_without_colour():
    """Lightness and marker differ between any two of the first seven; the palette is Okabe and Ito's."""
    styles = [_style.series_style(n) for n in range(14)]
    assert len({(s["color"], s["marker"]) for s in styles}) == 14
    assert len({s["marker"] for s in styles[:7]}) == len({s["color"] for s in styles[:7]}) == 7


def test_weights_are_named_by_where_they_differ():
    """A label is a path without the ends that all paths share, never empty and never that of two weights."""
    assert _style.distinct(["a/0/q/w", "a/1/q/w", "a/1/k/w"]) == ["0/q", "1/q", "1/k"]
    assert _style.distinct(["a/q/w"]) == ["w"] and _style.distinct(["w", "b/w"]) == ["w", "b/w"]
    assert _style.distinct(["a/b", "a/b/b"]) == ["b", "b/b"] and _style.distinct([]) == []


def test_ranks_stand_where_layer_and_module_meet():
    """Numbers of a path and indices of a stack are columns, the rest is the row; no weight leaves a blank."""
    modules, columns, grid = layers._grid({"m/layer_10/q/w": 3, "m/layer_9/q/w": 2, "m/layer_9/k/w": 5})
    assert (modules, columns) == (["q", "k"], ["9", "10"])
    np.testing.assert_array_equal(grid, [[2, 3], [5, np.nan]])
    modules, columns, grid = layers._grid({"stage_1/q": np.array([4, 0]), "head": 7})
    assert (modules, columns) == (["stage/q", "head"], ["–", "1.0", "1.1"])
    np.testing.assert_array_equal(grid, [[np.nan, 4, 0], [7, np.nan, np.nan]])


def test_a_history_shows_the_sum_beside_the_budget():
    """A history's line is the sum of ranks, drawn beside the budget of every step, and its cells are the last ranks."""
    left, right, _ = plot.ranks(HISTORY, budget=BUDGET.at).axes
    alive, budget = right.lines
    assert dict(zip(alive.get_xdata(), alive.get_ydata(), strict=True)) == {
        t: sum(now.values()) for t, now in HISTORY.items()
    }
    assert [BUDGET.at(t) for t in range(61)] == list(budget.get_ydata())
    assert [cell.get_text() for cell in left.texts][::-1] == [
        str(r) for r in reversed([HISTORY[60][path] for kind in (0, 1) for path in LAYERS[kind::2]])
    ]


def test_the_front_leaves_out_what_something_smaller_beats():
    """The front has the points that nothing of at most their size beats, by their means, and none that diverged."""
    figure = plot.pareto({"a": (10, 0.5), "b": (20, 0.4), "c": (30, [0.5, 0.7]), "d": (10, 0.3)})
    (line,) = [x for x in figure.axes[0].lines if x.get_label() == "front"]
    assert list(zip(line.get_xdata(), line.get_ydata(), strict=True)) == [(10, 50.0), (30, pytest.approx(60.0))]
    figure = plot.pareto({"diverged": (10, np.nan), "b": (20, 0.4)})
    (line,) = [x for x in figure.axes[0].lines if x.get_label() == "front"]
    assert list(line.get_xdata()) == [20]


def test_a_value_that_is_missing_leaves_a_gap():
    """NaN, and zero on a logarithmic axis, is a gap in a line and moves no other point."""
    (line,) = plot.spectra({"q": [3.0, np.nan, 1.0, 0.0]}).axes[0].lines
    np.testing.assert_array_equal(line.get_ydata(), [3, np.nan, 1, np.nan])


LABELLED = plot.amplification, plot.curves, plot.pareto, plot.scores, plot.spectra, plot.sweep


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: plot.similarity(np.ones((2, 3, 3))), "index its layer"),
        (lambda: plot.spectra({"q": np.ones((2, 3))}), "'q' has shape"),
        (lambda: plot.curves({"q": ([0, 1], [1.0])}), "'q' has"),
        (lambda: plot.allocation({}), r"nothing to draw.*jlora.rank.ranks"),
        (lambda: plot.ranks({}), "nothing to draw.*history"),
        *((lambda draw=draw: draw({}), f"plot.{draw.__name__}: nothing to draw") for draw in LABELLED),
        (lambda: plot.similarity(np.ones((0, 3))), "nothing to draw"),
        (lambda: plot.pareto({"zero-shot": (0, 0.5)}), "'zero-shot' has a size of 0"),
        (lambda: plot.sweep({"q": ([0, 1], [0.1, 0.2])}), "'q' has a size of 0"),
        (lambda: plot.spectra({"q": [1.0, -1.0]}), "below zero"),
        (lambda: plot.scores({"q": []}), "'q' has no scores"),
        (lambda: plot.amplification({"q": analysis.Amplification(*[jnp.ones(3)] * 6)}), "index it"),
    ],
)
def test_what_cannot_be_drawn_is_refused_in_words(call, words):
    """Data that has no figure is refused with the series and what is wrong with it, and no empty figure is made."""
    with pytest.raises(ValueError, match=words):
        call()


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    """Where matplotlib is missing, the error is the line that installs it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'jlora\[plot\]'"):
        plot.panels()
