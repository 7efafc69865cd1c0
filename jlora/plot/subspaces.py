"""Spectra, subspaces, and what an update amplifies."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

import jax
import numpy as np
from jax.typing import ArrayLike

from jlora import _answers
from jlora._trees import _table
from jlora.analysis import SVD, Amplification
from jlora.plot._style import (
    COLOURS,
    HATCHES,
    STYLE,
    WIDTH,
    axis_of,
    check_dict,
    figure_of,
    imported,
    legend_beside,
    legend_of,
    numbers,
    series_style,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def similarity(
    grid: ArrayLike,
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
    if isinstance(grid, (Mapping, SVD)):
        want = "jlora.analysis.similarity(one, other)"
        raise TypeError(f"plot.similarity draws one grid (i, j), not {_answers.kind(grid)}; write {want}")
    grid = numbers("similarity", "grid", grid, "phi(i, j)")
    if grid.ndim != 2:
        raise ValueError(f"plot.similarity draws one grid (i, j), not an array of shape {grid.shape}; index its layer")
    if not grid.size:
        raise ValueError(f"plot.similarity: nothing to draw in a grid of shape {grid.shape}")
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax)
        extent = (0.5, grid.shape[1] + 0.5, grid.shape[0] + 0.5, 0.5)
        shown = on.imshow(grid, cmap="cividis", vmin=0, vmax=1, extent=extent, aspect="auto", interpolation="nearest")
        on.grid(False)
        written(on, title=title, xlabel=columns, ylabel=rows)
        for axis in (on.xaxis, on.yaxis):
            axis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        figure_of(on).colorbar(shown, ax=on, label="subspace similarity φ(i, j)")
    return figure_of(on)


def spectra(series: Mapping[str, ArrayLike], *, title: str = "", ax: Axes | None = None) -> Figure:
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
    made_by = "{path: x.s for path, x in jlora.analysis.updates(adapted).items()}"
    check_dict("spectra", series, "{label: s (k,)}", made_by)
    for label, values in series.items():
        if isinstance(values, SVD):
            raise TypeError(
                f"plot.spectra draws singular values, and {label!r} is an SVD (u, s, v); write "
                "{path: x.s for path, x in jlora.analysis.updates(adapted).items()}"
            )
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax)
        for n, (label, values) in enumerate(series.items()):
            s = numbers("spectra", label, values, "singular values")
            if s.ndim != 1:
                raise ValueError(f"plot.spectra draws one spectrum (k,) a label; {label!r} has shape {s.shape}")
            if np.any(s < 0):
                raise ValueError(f"plot.spectra: {label!r} has singular values below zero")
            shown = np.where(s > 0, s, np.nan)  # a gap, where a line over what is left out would be drawn
            on.plot(np.arange(1, len(s) + 1), shown, label=label, markevery=max(1, len(s) // 12), **series_style(n))
        on.set_yscale("log")
        written(on, title=title, xlabel="index k", ylabel="singular value σ(k)")
        on.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        legend_of(on, len(series), ax is None)
    return figure_of(on)


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
    made_by = "{label: jlora.analysis.amplification(update, weight)}"
    check_dict("amplification", found, "{label: Amplification}", made_by)
    for label, x in found.items():
        if not isinstance(x, Amplification):
            raise TypeError(
                f"plot.amplification: {label!r} is {_answers.kind(x)}; write "
                "{label: jlora.analysis.amplification(update, weight)}"
            )
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on = axis_of(ax, width=max(WIDTH, 1.2 + 0.9 * len(found)) + 1.4 * legend)
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
        on.set_yscale("log")
        written(on, title=title, xlabel="weight (×: amplification, ‖ΔW‖ / ‖UᵀWV‖)", ylabel="Frobenius norm")
        on.margins(y=0.12)
        room = (on.get_position().width * figure_of(on).get_figwidth() - 1.4 * legend) / len(found)
        names, turned = _named(list(found), int(room / 0.075))
        on.set_xticks(groups, names, **turned)
        on.grid(False, axis="x")
        if legend:
            legend_beside(on, ax is None)
    return figure_of(on)


class Turned(TypedDict, total=False):
    """How names stand that are not upright: degrees."""

    rotation: float


def _named(names: list[str], letters: int) -> tuple[list[str], Turned]:
    """Names in lines of so many letters, cut after the steps of a path; upright where those would be too many."""
    names = [_table.shorten(name, 24) for name in names]
    if letters < 8 and max(map(len, names)) > letters:
        return names, {"rotation": 90}
    lines = lambda name: textwrap.wrap(name.replace("/", "/ "), max(letters, 1))
    return ["\n".join(line.replace("/ ", "/") for line in lines(name)) for name in names], {}


def _number(x: jax.Array | float, name: str) -> float:
    if np.ndim(x):
        raise ValueError(f"plot.amplification draws one number a label; {name!r} is a stack of {np.shape(x)}: index it")
    return float(x)
