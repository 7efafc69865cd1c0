"""Figures of what `jlora.analysis` finds, in one style.

    figure = jlora.plot.similarity(grid)          # every function returns the figure it drew on
    jlora.plot.save(figure, "phi")                # phi.png and phi.svg

Every function takes an axis (`ax=`) to draw on, one of `panels`' or any other, and makes a figure without. Needs
matplotlib: `pip install 'jlora[plot]'`; it is imported when the first figure is drawn. pyplot is left alone: no window,
no global figure, and no setting changes outside of these functions.

Colours are those of Okabe and Ito, `Color Universal Design <https://jfly.uni-koeln.de/color/>`_, 2008, told apart by
colour-blind readers and, by markers and hatches beside them, in print without colour; heat maps are cividis (Nunez et
al, `Optimizing colormaps <https://arxiv.org/abs/1712.01662>`_, 2017).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora import _table
from jlora.analysis import Amplification

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = "osD^vPX"
HATCHES = ("", "//", "..", "xx", "\\\\")
STYLE = {
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.labelsize": 9.0,
    "legend.fontsize": 8.0,
    "legend.frameon": False,
    "xtick.labelsize": 8.0,
    "ytick.labelsize": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.4,
    "lines.markersize": 4.5,
    "hatch.linewidth": 0.5,
    "svg.hashsalt": "jlora",  # the same figure is the same file
}
WIDTH, HEIGHT = 4.6, 3.2  # inches, of one panel


def panels(rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT) -> tuple[Figure, Any]:
    """A figure of several axes in the style of this room, for `ax=`.

    Args:
      rows: of axes.
      columns: of axes.
      width: of one, in inches.
      height: of one, in inches.

    Returns:
      The figure, and an array `(rows, columns)` of axes.

    Raises:
      ImportError: matplotlib is not installed.

    Example:
      >>> import jlora
      >>> figure, axes = jlora.plot.panels(1, 2)
      >>> axes.shape
      (1, 2)
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
        return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Figure, path: str | Path) -> tuple[Path, Path]:
    """Writes a figure as PNG and as SVG, `path.png` and `path.svg`; the same figure gives the same bytes.

    Returns:
      The two paths.

    Example:
      >>> import jlora
      >>> [path.name for path in jlora.plot.save(jlora.plot.spectra({"query": [3.0, 1.0]}), "spectra")]
      ['spectra.png', 'spectra.svg']
    """
    matplotlib = _matplotlib()
    stem = Path(path)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=200, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


def similarity(
    grid: Any,
    *,
    title: str = "",
    rows: str = "directions of the first, i",
    columns: str = "directions of the second, j",
    ax: Axes | None = None,
) -> Figure:
    """phi(i, j) as a heat map from 0 to 1, i downwards: what `analysis.similarity` returns.

    Args:
      grid: `(i, j)`; of a stack, one layer.
      title: above it.
      rows: what i counts.
      columns: what j counts.
      ax: where to draw.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> grid = jlora.analysis.random_similarity(16, 8, 8)
      >>> jlora.plot.similarity(grid, title="random").axes[0].get_title()
      'random'

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, figure 3.
    """
    grid = np.asarray(grid, np.float64)
    if grid.ndim != 2:
        raise ValueError(f"plot.similarity draws one grid (i, j), not an array of shape {grid.shape}; index its layer")
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        on: Any = _axis(ax)
        extent = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
        shown = on.imshow(grid, cmap="cividis", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
        on.grid(False)
        on.set(title=title, xlabel=columns, ylabel=rows)
        for axis in (on.xaxis, on.yaxis):
            axis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        _figure(on).colorbar(shown, ax=on, label="subspace similarity φ(i, j)")
    return _figure(on)


def spectra(series: Mapping[str, Any], *, title: str = "", ax: Axes | None = None) -> Figure:
    """Singular values, from the largest down, on a logarithmic axis; zeros are left out.

    Args:
      series: `{label: s (k,)}`.
      title: above it.
      ax: where to draw.

    Example:
      >>> import jlora
      >>> jlora.plot.spectra({"query": [3.0, 1.0, 0.5]}).axes[0].get_yscale()
      'log'
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        on: Any = _axis(ax)
        for n, (label, values) in enumerate(series.items()):
            s = np.asarray(values, np.float64)
            if s.ndim != 1:
                raise ValueError(f"plot.spectra draws one spectrum (k,) a label; {label!r} has shape {s.shape}")
            k = np.flatnonzero(s > 0)
            on.plot(k + 1, s[k], label=label, markevery=max(1, len(s) // 12), **_line(n))
        on.set(title=title, xlabel="index k", ylabel="singular value σ(k)", yscale="log")
        on.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        _legend(on, len(series))
    return _figure(on)


def amplification(
    found: Mapping[str, Amplification], *, title: str = "", legend: bool = True, ax: Axes | None = None
) -> Figure:
    """Bars of what `analysis.amplification` measures, a group a label, and the factor above it.

    Args:
      found: `{label: Amplification}`, of one weight each; of a stack, one layer.
      title: above it.
      legend: whether to say which bar is which; once is enough for several panels.
      ax: where to draw.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> update = jlora.analysis.svd(jnp.diag(jnp.array([0.0, 6.0])))
      >>> found = jlora.analysis.amplification(update, jnp.diag(jnp.array([9.0, 2.0])), rank=1)
      >>> [text.get_text() for text in jlora.plot.amplification({"query": found}).axes[0].texts]
      ['×3.0']

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, table 7.
    """
    bars = {
        "W": "weight",
        "W on its first r": "onto_weight",
        "W on those of ΔW": "onto_update",
        "W on random r": "onto_random",
        "ΔW": "update",
    }
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        on: Any = _axis(ax, width=max(WIDTH, 1.2 + 0.9 * len(found)) + 1.4 * legend)
        groups = np.arange(len(found))
        for n, (label, field) in enumerate(bars.items()):
            heights = [_number(getattr(x, field), name) for name, x in found.items()]
            on.bar(groups + 0.16 * (n - 2), heights, 0.15, label=label, color=COLOURS[n], hatch=HATCHES[n], ec="white")
        for group, (name, x) in zip(groups, found.items(), strict=True):
            top = max(_number(getattr(x, field), name) for field in bars.values())
            on.annotate(
                f"×{_number(x.factor, name):.3g}" if _number(x.factor, name) >= 100 else f"×{float(x.factor):.1f}",
                (group, top),
                xytext=(0, 3),
                textcoords="offset points",
                ha="center",
                va="bottom",
                fontsize=8,
            )
        on.set(title=title, ylabel="Frobenius norm", yscale="log")
        on.margins(y=0.12)
        names = [_table.shorten(name, 24) for name in found]
        room = on.get_position().width * _figure(on).get_figwidth() - 1.4 * legend
        steep = {"rotation": 30, "ha": "right", "rotation_mode": "anchor"}
        on.set_xticks(groups, names, **(steep if 0.07 * sum(len(n) + 2 for n in names) > room else {}))
        on.set_xlabel("weight (×: amplification, ‖ΔW‖ / ‖UᵀWV‖)")
        on.grid(False, axis="x")
        if legend:
            _beside(on)
    return _figure(on)


def ranks(allocated: Mapping[str, int], *, title: str = "", ax: Axes | None = None) -> Figure:
    """A bar a weight: the rank that it was given, 0 for none. Steps that all paths share are left out.

    Args:
      allocated: `{path: rank}`, drawn from the top down.
      title: above it.
      ax: where to draw; a figure of its own grows with the number of weights.

    Example:
      >>> import jlora
      >>> jlora.plot.ranks({"layer_0/query/kernel": 4, "layer_1/query/kernel": 0}).axes[0].get_xlabel()
      'rank r'
    """
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        on: Any = _axis(ax, height=max(HEIGHT / 2, 0.7 + 0.19 * len(allocated)))
        places = np.arange(len(allocated))
        drawn = on.barh(places, list(allocated.values()), 0.75, color=COLOURS[0])
        on.bar_label(drawn, padding=2, fontsize=7)
        on.set_yticks(places, [_table.shorten(path, 40) for path in _distinct(list(allocated))], fontsize=7)
        on.set_ylim(len(allocated) - 0.4, -0.6)
        on.set_xlim(0, 1.08 * max([1, *allocated.values()]))
        on.set(title=title, xlabel="rank r", ylabel="weight")
        on.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        on.grid(False, axis="y")
    return _figure(on)


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
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        on: Any = _axis(ax, width=WIDTH + 1.4)
        times = 100 if percent else 1
        means = {}
        for n, (label, (parameters, value)) in enumerate(points.items()):
            scores = times * np.atleast_1d(np.asarray(value, np.float64))
            means[parameters, scores.mean()] = None
            spread = [[scores.mean() - scores.min()], [scores.max() - scores.mean()]]
            style = _line(n) | {"linestyle": "none"}
            on.errorbar(parameters, scores.mean(), spread if len(scores) > 1 else None, label=label, capsize=2, **style)
        front: list[tuple[float, float]] = []
        for parameters, mean in sorted(means, key=lambda point: (point[0], -point[1])):
            if not front or mean > front[-1][1]:
                front.append((parameters, mean))
        on.plot(*zip(*front, strict=True), color="#777777", linewidth=1, linestyle="--", zorder=1, label="front")
        on.set(title=title, xlabel="trained parameters", ylabel=score, xscale="log")
        on.margins(0.08)
        _beside(on)
    return _figure(on)


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
    matplotlib = _matplotlib()
    with matplotlib.rc_context(STYLE):
        on: Any = _axis(ax)
        for n, (label, (steps, values)) in enumerate(series.items()):
            values = np.atleast_2d(np.asarray(values, np.float64))
            if values.shape[1:] != np.shape(steps):
                raise ValueError(f"plot.curves: {label!r} has {np.shape(steps)} steps and values {values.shape}")
            style = _line(n)
            on.plot(steps, values.mean(0), label=label, markevery=max(1, len(steps) // 8), **style)
            if len(values) > 1:
                on.fill_between(steps, values.min(0), values.max(0), color=style["color"], alpha=0.2, linewidth=0)
        on.set(title=title, xlabel="training step", ylabel=value)
        _legend(on, len(series))
    return _figure(on)


# --- what they share ----------------------------------------------------------------------------------------------


def _matplotlib() -> Any:
    try:
        import matplotlib
        import matplotlib.figure
        import matplotlib.ticker
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'jlora[plot]'") from None
    return matplotlib


def _axis(ax: Axes | None, width: float = WIDTH, height: float = HEIGHT) -> Any:
    return panels(width=width, height=height)[1][0, 0] if ax is None else ax


def _figure(ax: Any) -> Figure:
    return ax.get_figure(root=True)


def _line(n: int) -> dict[str, Any]:
    """Colour and marker of the n-th series; after seven of them, other pairs of the two."""
    return {"color": COLOURS[n % 7], "marker": MARKERS[(n + n // 7) % 7]}


def _legend(ax: Axes, count: int) -> None:
    if count > 4:
        _beside(ax)
    elif count > 1:
        ax.legend(loc="best")


def _beside(ax: Axes) -> None:
    """A legend to the right of the axis, where it hides nothing."""
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0)


def _distinct(paths: Sequence[str]) -> list[str]:
    """Paths without the first and last steps that all of them share."""
    steps = [path.split("/") for path in paths]
    least = min(map(len, steps), default=1) - 1  # a path keeps one step at least
    same = lambda n: len({row[n] for row in steps}) == 1
    head = next((n for n in range(least) if not same(n)), least)
    tail = next((n for n in range(least - head) if not same(-1 - n)), least - head)
    return ["/".join(row[head : len(row) - tail]) for row in steps]


def _number(x: Any, name: str) -> float:
    if np.ndim(x):
        raise ValueError(f"plot.amplification draws one number a label; {name!r} is a stack of {np.shape(x)}: index it")
    return float(x)
