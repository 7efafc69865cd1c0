"""What came of training: scores against size, and curves."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from jlora._trees import _table
from jlora.plot._style import (
    COLOURS,
    HEIGHT,
    NAME,
    STYLE,
    WIDTH,
    axis_of,
    check_dict,
    check_pairs,
    figure_of,
    imported,
    legend_beside,
    legend_of,
    levelled,
    numbers,
    positive,
    series_style,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto(
    points: Mapping[str, tuple[float, ArrayLike]],
    *,
    title: str = "",
    score: str = "accuracy (%)",
    percent: bool = True,
    ax: Axes | None = None,
) -> Figure:
    """Scores against trained parameters, and the front of those that nothing smaller beats.

    Args:
      points: `{label: (parameters, score)}`; several scores (seeds) are drawn as mean, least and most.
      title: above it.
      score: what it is, with its unit.
      percent: whether scores are shares of one, drawn as percent.
      ax: where to draw.

    Example:
      >>> import jlora
      >>> points = {"LoRA r=1": (10_000, [0.80, 0.82]), "LoRA r=8": (80_000, 0.83), "full": (10_000_000, 0.83)}
      >>> figure = jlora.plot.pareto(points)
      >>> figure.axes[0].get_xscale(), figure.axes[0].get_ylabel()
      ('log', 'accuracy (%)')
    """
    check_pairs("pareto", points, "{label: (parameters, score)}")
    for label, (parameters, _) in points.items():
        positive("pareto", label, parameters)
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax, width=WIDTH + 1.4)
        times = 100 if percent else 1
        means = {}
        for n, (label, (parameters, value)) in enumerate(points.items()):
            scores = times * np.atleast_1d(numbers("pareto", label, value, "scores"))
            means[parameters, scores.mean()] = None
            spread = [[scores.mean() - scores.min()], [scores.max() - scores.mean()]]
            error = spread if len(scores) > 1 else None
            on.errorbar(parameters, scores.mean(), error, label=label, capsize=2, linestyle="none", **series_style(n))
        front: list[tuple[float, float]] = []
        known = [point for point in means if not math.isnan(point[1])]
        for parameters, mean in sorted(known, key=lambda point: (point[0], -point[1])):
            if not front or mean > front[-1][1]:
                front.append((parameters, mean))
        x, y = np.reshape(front, (-1, 2)).T
        on.plot(x, y, label="front", color="#777777", linewidth=1, linestyle="--", zorder=1)
        on.set_xscale("log")
        written(on, title=title, xlabel="trained parameters", ylabel=score)
        sizes = [parameters for parameters, _ in points.values()]
        if max(sizes) < 10 * min(sizes):  # within a decade, marks at its powers are none or too many
            on.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
            on.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
            on.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        on.margins(0.08)
        legend_beside(on, ax is None)
    return figure_of(on)


def curves(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    title: str = "",
    value: str = "loss (nats)",
    ax: Axes | None = None,
) -> Figure:
    """Training curves: a value at each step, the mean of several seeds in a band from the least to the most.

    Args:
      series: `{label: (steps (n,), values (n,) or (seeds, n))}`.
      title: above it.
      value: what it is, with its unit.
      ax: where to draw.

    Example:
      >>> import jlora
      >>> jlora.plot.curves({"LoRA": ([0, 10, 20], [[0.7, 0.5, 0.4], [0.7, 0.6, 0.4]])}).axes[0].get_ylabel()
      'loss (nats)'
    """
    check_pairs("curves", series, "{label: (steps, values)}")
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax)
        for n, (label, (steps, values)) in enumerate(series.items()):
            steps = numbers("curves", label, steps, "steps")
            values = np.atleast_2d(numbers("curves", label, values, "values"))
            if values.shape[1:] != np.shape(steps):
                raise ValueError(f"plot.curves: {label!r} has {np.shape(steps)} steps and values {values.shape}")
            style = series_style(n)
            on.plot(steps, values.mean(0), label=label, markevery=max(1, len(steps) // 8), **style)
            if len(values) > 1:
                on.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
        written(on, title=title, xlabel="training step", ylabel=value)
        legend_of(on, len(series), ax is None)
    return figure_of(on)


def sweep(
    series: Mapping[str, tuple[ArrayLike, ArrayLike]],
    *,
    size: str = "rank r",
    score: str = "accuracy (%)",
    percent: bool = True,
    levels: Mapping[str, float] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A score at each size of something (a rank, a dimension), on a logarithmic axis that is marked at (some of) them.

    Args:
      series: `{label: (sizes (n,), scores (n,) or (seeds, n))}`; of several seeds, the mean in a band from the least to
        the most.
      size: what grows to the right.
      score: what is measured, with its unit.
      percent: whether scores are shares of one, drawn as percent.
      levels: `{label: score}`, drawn as horizontal lines: a baseline, a threshold.
      title: above it.
      ax: where to draw.

    Example:
      >>> import jlora
      >>> drawn = jlora.plot.sweep({"LoRA": ([1, 8, 64], [0.80, 0.82, 0.82])}, levels={"full": 0.83}).axes[0]
      >>> [tick.get_text() for tick in drawn.get_xticklabels()]
      ['1', '8', '64']
    """
    check_pairs("sweep", series, "{label: (sizes, scores)}")
    levels = levelled("sweep", levels)
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax)
        times = 100 if percent else 1
        for n, (label, (sizes, values)) in enumerate(series.items()):
            values = times * np.atleast_2d(numbers("sweep", label, values, "scores"))
            if values.shape[1:] != np.shape(sizes):
                raise ValueError(f"plot.sweep: {label!r} has {np.shape(sizes)} sizes and scores {values.shape}")
            positive("sweep", label, sizes)
            style = series_style(n)
            on.plot(sizes, values.mean(0), label=label, **style)
            if len(values) > 1:
                on.fill_between(sizes, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
        for n, (label, level) in enumerate(levels.items(), len(series)):
            on.axhline(
                times * level, label=label, color=COLOURS[n % 7], linestyle=("--", ":", "-.")[n % 3], linewidth=1
            )
        on.set_xscale("log")
        written(on, title=title, xlabel=size, ylabel=score)
        marks = _apart(sorted({float(x) for sizes, _ in series.values() for x in np.asarray(sizes)}))
        on.set_xticks(marks, [f"{x:,.0f}" if x >= 1 else f"{x:g}" for x in marks])
        on.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
        # inside, a level would run through it
        legend_beside(on, ax is None) if levels else legend_of(on, len(series), ax is None)
    return figure_of(on)


def scores(
    found: Mapping[str, ArrayLike],
    *,
    score: str = "accuracy (%)",
    percent: bool = True,
    levels: Mapping[str, float] | None = None,
    title: str = "",
    ax: Axes | None = None,
) -> Figure:
    """A row a label: every score as a dot, their mean as a bar across them.

    Args:
      found: `{label: scores}`, drawn from the top down; a number, or one a seed.
      score: what they are, with their unit.
      percent: whether scores are shares of one, drawn as percent.
      levels: `{label: score}`, drawn as vertical lines: a baseline.
      title: above it.
      ax: where to draw; a figure of its own grows with the number of rows.

    Example:
      >>> import jlora
      >>> drawn = jlora.plot.scores({"query": [0.80, 0.82], "value": [0.81, 0.83]}).axes[0]
      >>> [tick.get_text() for tick in drawn.get_yticklabels()]
      ['query', 'value']
    """
    check_dict("scores", found, "{label: scores}")
    levels = levelled("scores", levels)
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax, width=WIDTH + 1.0, height=max(HEIGHT / 2, 1.0 + 0.24 * len(found)))
        times = 100 if percent else 1
        for place, (label, value) in enumerate(found.items()):
            each = times * np.atleast_1d(numbers("scores", label, value, "scores"))
            if not each.size:
                raise ValueError(f"plot.scores: {label!r} has no scores")
            on.plot(each, [place] * len(each), color=COLOURS[0], marker="o", linestyle="none", fillstyle="none")
            on.plot([each.mean()], [place], color=COLOURS[1], marker="|", markersize=11, markeredgewidth=2)
        for n, (label, level) in enumerate(levels.items()):
            on.axvline(times * level, label=label, color=COLOURS[(n + 2) % 7], linestyle=("--", ":", "-.")[n % 3])
        on.set_yticks(range(len(found)), [_table.shorten(label, NAME + 12) for label in found])
        on.set_ylim(len(found) - 0.4, -0.6)
        on.margins(x=0.08)
        written(on, title=title, xlabel=score)
        if levels:
            legend_beside(on, ax is None)
    return figure_of(on)


def _apart(marks: list[float]) -> list[float]:
    """Those of ascending marks that have room for their numbers on a logarithmic axis: at most seven."""
    least = math.log(marks[-1] / marks[0]) / 6 * (1 - 1e-9)
    kept = marks[:1]
    for mark in marks[1:]:
        if math.log(mark / kept[-1]) >= least:
            kept.append(mark)
    return kept
