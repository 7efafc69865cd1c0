"""Which weight has which rank, and how they came to it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np
from jax.typing import ArrayLike

from jlora import _answers
from jlora._trees import _table
from jlora.plot._style import (
    COLOURS,
    HEIGHT,
    STYLE,
    WIDTH,
    axis_of,
    check_dict,
    distinct,
    figure_of,
    imported,
    numbers,
    panels,
    series_style,
    written,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LABELLED = 24  # columns up to which a cell has room for its number


def allocation(ranks: Mapping[str, ArrayLike], *, title: str = "", ax: Axes | None = None) -> Figure:
    """A heat map of layer x module: the rank of each weight, blank where there is no such weight.

    Layers are told by the numbers in a path, and by the index in a stack; modules by the rest of it, without the steps
    that all share.

    Args:
      ranks: `{path: rank}`, a number or one for every layer of a stack, as `rank.ranks` gives them.
      title: above it.
      ax: where to draw; a figure of its own grows with the numbers of layers and modules.

    Example:
      >>> import jlora
      >>> drawn = jlora.plot.allocation({"layer_0/query/kernel": 4, "layer_1/query/kernel": 0}).axes[0]
      >>> drawn.get_xlabel(), [cell.get_text() for cell in drawn.texts]
      ('layer', ['4', '0'])

    References:
      Zhang et al, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023, figure 3.
    """
    check_dict("allocation", ranks, "{path: rank}", "jlora.rank.ranks(adapted)")
    modules, layers, grid = _grid(ranks)
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        width, height = max(WIDTH, 2.6 + 0.26 * len(layers)), max(HEIGHT / 2, 0.9 + 0.24 * len(modules))
        on = axis_of(ax, width=width, height=height)
        most = max(1, int(np.nanmax(grid, initial=1)))
        shown = on.imshow(grid, cmap="cividis", vmin=0, vmax=most, aspect="auto", interpolation="nearest")
        on.grid(False)
        named = [_table.shorten(name, 28) for name in modules]
        every = max(1, -(-len(layers) // LABELLED))
        on.set_yticks(np.arange(len(modules)), named, fontsize=7)
        on.set_xticks(np.arange(0, len(layers), every), layers[::every])
        written(on, title=title, xlabel="layer", ylabel="module")
        if len(layers) <= LABELLED:
            for (row, column), r in np.ndenumerate(grid):
                if not np.isnan(r):
                    dark = "black" if r > most / 2 else "white"
                    on.text(
                        column,
                        row,
                        f"{r:.0f}" if r == round(r) else f"{r:.1f}",
                        ha="center",
                        va="center",
                        fontsize=7,
                        color=dark,
                    )
        bar = figure_of(on).colorbar(shown, ax=on, label="rank r")
        bar.locator = matplotlib.ticker.MaxNLocator(6, integer=True, min_n_ticks=1)
        bar.update_ticks()
    return figure_of(on)


def ranks(
    history: Mapping[int, Mapping[str, ArrayLike]],
    *,
    budget: Callable[[int], float] | None = None,
    title: str = "",
    axes: tuple[Axes, Axes] | None = None,
) -> Figure:
    """How ranks were given out: `allocation` at the last step seen, and the sum of all ranks over the steps.

    Between two masks more ranks than the budget may be alive where momentum revives them (`revive=True`); ranks of a
    gate that is zero count as none. So the sum shows what the adapter really has.

    Args:
      history: `{step: {path: ranks}}`, what `rank.ranks` gave at each step looked at.
      budget: b(t), drawn beside the sum; `rank.Budget(...).at` is one.
      title: above the heat map.
      axes: two, where to draw.

    Example:
      >>> import jlora
      >>> budget = jlora.rank.Budget(8, 3, total_steps=20, init_warmup=0, final_warmup=10, interval=5)
      >>> history = {0: {"layer_0/q": 4, "layer_1/q": 4}, 5: {"layer_0/q": 2, "layer_1/q": 1}}
      >>> [len(ax.lines) for ax in jlora.plot.ranks(history, budget=budget.at).axes[:2]]
      [0, 2]
    """
    form = "a history {step: {path: ranks}}"
    check_dict("ranks", history, form, "history[step] = jlora.rank.ranks(adapted) while training")
    for step, found in history.items():
        check_dict("ranks", found, f"{form}, and at step {step!r} {{path: ranks}}", "jlora.rank.ranks(adapted)")
        _answers.check_number("plot.ranks(history: step", step, lambda x: x == int(x), "a step is an integer")
    if budget is not None and not callable(budget):
        raise TypeError(
            f"plot.ranks(budget=) takes b(t), such as jlora.rank.Budget(...).at, not {_answers.kind(budget)}"
        )
    steps = sorted(history)
    matplotlib = imported()
    modules, layers, _ = _grid(history[steps[-1]])
    with matplotlib.rc_context(STYLE):
        if axes is None:
            width, height = max(WIDTH, 2.6 + 0.26 * len(layers)), max(HEIGHT, 0.9 + 0.24 * len(modules))
            axes = tuple(panels(1, 2, width=width, height=height)[1][0])
        left, on = axes
        allocation(history[steps[-1]], title=title or f"step {steps[-1]}", ax=left)
        total = [sum(int(np.sum(r)) for r in history[t].values()) for t in steps]
        on.plot(steps, total, label="ranks alive", markevery=max(1, len(steps) // 8), **series_style(0))
        whole = range(steps[0], steps[-1] + 1)
        levels = [] if budget is None else [budget(t) for t in whole]
        if levels:
            on.step(whole, levels, where="post", label="budget b(t)", color=COLOURS[1], linestyle="--")
            on.legend(loc="best")
        on.set(title="all weights", xlabel="training step", ylabel="sum of ranks")
        on.set_ylim(0, 1.06 * max(1, *total, *levels))
        on.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
    return figure_of(on)


def _grid(ranks: Mapping[str, ArrayLike]) -> tuple[list[str], list[str], np.ndarray]:
    """Modules, layers, and the rank of each; NaN where there is no such weight."""
    cells: dict[tuple[str, tuple[int, ...]], float] = {}
    for path, stacked in ranks.items():
        layer = tuple(int(n) for n in re.findall(r"\d+", path))
        module = re.sub(r"[_.]?\d+", "", path).replace("//", "/").strip("/")
        for index, r in np.ndenumerate(numbers("allocation", path, stacked, "ranks")):
            cells[module, (*layer, *index)] = float(r)
    if not cells:
        raise ValueError("plot.allocation: stacks of no layers")
    modules = list(dict.fromkeys(module for module, _ in cells))
    layers = sorted({layer for _, layer in cells})
    grid = np.full((len(modules), len(layers)), np.nan)
    for (module, layer), r in cells.items():
        grid[modules.index(module), layers.index(layer)] = r
    return distinct(modules), [".".join(map(str, layer)) or "–" for layer in layers], grid
