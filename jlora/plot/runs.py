"""What came of training: scores against size, and curves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora.plot._style import STYLE, WIDTH, axis_of, beside, figure_of, imported, legend_of, line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def pareto(
    points: Mapping[str, tuple[float, Any]],
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
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on: Any = axis_of(ax, width=WIDTH + 1.4)
        times = 100 if percent else 1
        means = {}
        for n, (label, (parameters, value)) in enumerate(points.items()):
            scores = times * np.atleast_1d(np.asarray(value, np.float64))
            means[parameters, scores.mean()] = None
            spread = [[scores.mean() - scores.min()], [scores.max() - scores.mean()]]
            style = line(n) | {"linestyle": "none"}
            on.errorbar(parameters, scores.mean(), spread if len(scores) > 1 else None, label=label, capsize=2, **style)
        front: list[tuple[float, float]] = []
        for parameters, mean in sorted(means, key=lambda point: (point[0], -point[1])):
            if not front or mean > front[-1][1]:
                front.append((parameters, mean))
        on.plot(*zip(*front, strict=True), color="#777777", linewidth=1, linestyle="--", zorder=1, label="front")
        on.set(title=title, xlabel="trained parameters", ylabel=score, xscale="log")
        on.margins(0.08)
        beside(on)
    return figure_of(on)


def curves(
    series: Mapping[str, tuple[Any, Any]], *, title: str = "", value: str = "loss (nats)", ax: Axes | None = None
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
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on: Any = axis_of(ax)
        for n, (label, (steps, values)) in enumerate(series.items()):
            values = np.atleast_2d(np.asarray(values, np.float64))
            if values.shape[1:] != np.shape(steps):
                raise ValueError(f"plot.curves: {label!r} has {np.shape(steps)} steps and values {values.shape}")
            style = line(n)
            on.plot(steps, values.mean(0), label=label, markevery=max(1, len(steps) // 8), **style)
            if len(values) > 1:
                on.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
        on.set(title=title, xlabel="training step", ylabel=value)
        legend_of(on, len(series))
    return figure_of(on)
