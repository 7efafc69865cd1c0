"""Which weight has which rank."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from jlora import _table
from jlora.plot._style import COLOURS, HEIGHT, STYLE, axis_of, distinct, figure_of, imported

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


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
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        on: Any = axis_of(ax, height=max(HEIGHT / 2, 0.7 + 0.19 * len(allocated)))
        places = np.arange(len(allocated))
        drawn = on.barh(places, list(allocated.values()), 0.75, color=COLOURS[0])
        on.bar_label(drawn, padding=2, fontsize=7)
        on.set_yticks(places, [_table.shorten(path, 40) for path in distinct(list(allocated))], fontsize=7)
        on.set_ylim(len(allocated) - 0.4, -0.6)
        on.set_xlim(0, 1.08 * max([1, *allocated.values()]))
        on.set(title=title, xlabel="rank r", ylabel="weight")
        on.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(8, integer=True, min_n_ticks=1))
        on.grid(False, axis="y")
    return figure_of(on)
