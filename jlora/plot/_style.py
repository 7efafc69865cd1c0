"""What all figures share: colours, one style, axes and legends, files."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypedDict

import jax.numpy as jnp
import numpy as np

from jlora import _answers
from jlora._trees import _table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class Line(TypedDict):
    """How a series is drawn."""

    color: str
    marker: str


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
NAME, LINES = 28, 16  # letters of a label, and labels in a column, that a legend has room for


def panels(
    rows: int = 1, columns: int = 1, *, width: float = WIDTH, height: float = HEIGHT
) -> tuple[Figure, np.ndarray]:
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
    for name, n in (("rows", rows), ("columns", columns)):
        _answers.check_integer(f"plot.panels({name}", n, 1, "how many axes there are, an integer of at least 1")
    matplotlib = imported()
    with matplotlib.rc_context(STYLE):
        figure = matplotlib.figure.Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=150)
        matplotlib.backends.backend_agg.FigureCanvasAgg(figure)  # whoever measures texts needs a renderer
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
    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"plot.save(figure, path) takes a figure first, as plots return it, not {_answers.kind(figure)}"
        )
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"plot.save(figure, path) takes a path second, not {_answers.kind(path)}")
    matplotlib = imported()
    stem = Path(path)
    png, svg = (stem.with_name(f"{stem.name}.{kind}") for kind in ("png", "svg"))
    with matplotlib.rc_context(STYLE):
        figure.savefig(png, dpi=200, metadata={"Software": None})
        figure.savefig(svg, metadata={"Date": None})
    return png, svg


# --- for the other files of this room -----------------------------------------------------------------------------


def imported() -> ModuleType:
    """matplotlib, or an error that names the extra."""
    try:  # these rooms are used as attributes of matplotlib, which has them once they are imported
        import matplotlib
        import matplotlib.backends.backend_agg  # pyright: ignore[reportUnusedImport]
        import matplotlib.figure  # pyright: ignore[reportUnusedImport]
        import matplotlib.ticker  # pyright: ignore[reportUnusedImport]
    except ImportError:
        raise ImportError("figures need matplotlib: pip install 'jlora[plot]'") from None
    return matplotlib


def axis_of(ax: Axes | None, width: float = WIDTH, height: float = HEIGHT) -> Axes:
    """The axis that was given, or the one of a new figure."""
    if ax is not None and not hasattr(ax, "get_figure"):
        raise TypeError(
            f"ax= takes an axis of matplotlib, such as jlora.plot.panels()[1][0, 0], not {_answers.kind(ax)}"
        )
    return panels(width=width, height=height)[1][0, 0] if ax is None else ax


def figure_of(ax: Axes) -> Figure:
    """The figure that an axis stands in."""
    figure = ax.get_figure(root=True)
    assert figure is not None  # it was drawn on
    return figure


def series_style(n: int) -> Line:
    """Colour and marker of the n-th series; after seven of them, other pairs of the two."""
    return {"color": COLOURS[n % 7], "marker": MARKERS[(n + n // 7) % 7]}


def check_dict(name: str, found: object, form: str, hint: str = "") -> None:
    """Raises unless `found` is a dictionary of what is to be drawn, in this form; `hint` says what makes one."""
    if not isinstance(found, Mapping):
        raise TypeError(f"plot.{name} takes {form}, not {_answers.kind(found)}{hint and '; write ' + hint}")
    if not len(found):
        raise ValueError(f"plot.{name}: nothing to draw; give it at least one label, {form}{hint and ', ' + hint}")


def numbers(name: str, label: str, x: object, what: str) -> np.ndarray:
    """An array of numbers, in float64; ValueError in words for anything else."""
    try:
        if isinstance(x, (str, bytes)) or hasattr(x, "_fields"):  # NumPy reads texts as numbers, and tuples by place
            raise TypeError
        array = np.asarray(x)
        if array.dtype.kind not in "biuf" and not jnp.issubdtype(array.dtype, jnp.floating):
            raise TypeError
        return array.astype(np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"plot.{name}: {label!r} is {_answers.kind(x)}; {what} are numbers") from None


def check_pairs(name: str, found: Mapping[str, object], form: str) -> None:
    """Raises unless `found` is a dictionary of pairs."""
    check_dict(name, found, form)
    for label, pair in found.items():
        if not isinstance(pair, (tuple, list)) or len(pair) != 2 or hasattr(pair, "_fields"):
            raise ValueError(f"plot.{name}: {label!r} is {_answers.kind(pair)}; plot.{name} takes {form}")


def levelled(name: str, levels: object) -> dict[str, float]:
    """The levels of a figure, `{label: score}`, or none."""
    if levels is None:
        return {}
    if not isinstance(levels, Mapping):
        raise TypeError(f"plot.{name}(levels=) takes {{label: score}}, not {_answers.kind(levels)}")
    for label, level in levels.items():
        _answers.check_number(f"plot.{name}(levels: {label!r}", level, lambda x: True, "a level is a number")
    return dict(levels)


def positive(name: str, label: str, sizes: object) -> None:
    """Raises unless all sizes have a place on a logarithmic axis."""
    bad = [x for x in np.atleast_1d(numbers(name, label, sizes, "sizes")).tolist() if not x > 0]
    if bad:
        raise ValueError(f"plot.{name}: {label!r} has a size of {bad[0]}, for which a logarithmic axis has no place")


def written(ax: Axes, *, title: str, xlabel: str, ylabel: str = "") -> None:
    """Title and labels, in as many lines as they need to stay inside."""
    room = ax.get_position()
    wide, high = room.width * figure_of(ax).get_figwidth(), room.height * figure_of(ax).get_figheight()
    lines = lambda text, inches: "\n".join(textwrap.wrap(text, max(8, int(inches / 0.08))))
    ax.set(title=lines(title, wide), xlabel=lines(xlabel, wide), ylabel=lines(ylabel, high))


def legend_of(ax: Axes, count: int, own: bool) -> None:
    """None for one series, inside for a few, beside the axis for many."""
    if count > 4:
        legend_beside(ax, own)
    elif count > 1:
        handles, labels = ax.get_legend_handles_labels()
        ax.legend(handles, [_table.shorten(label, NAME) for label in labels], loc="best")


def legend_beside(ax: Axes, own: bool) -> None:
    """A legend to the right of the axis, where it hides nothing, for which a figure of one's own grows."""
    handles, labels = ax.get_legend_handles_labels()
    columns = -(-len(labels) // LINES)
    if own:
        figure = figure_of(ax)
        figure.set_figwidth(figure.get_figwidth() + 1.4 * (columns - 1))
    labels = [_table.shorten(label, NAME) for label in labels]
    ax.legend(handles, labels, loc="upper left", bbox_to_anchor=(1.01, 1.0), borderaxespad=0, ncols=columns)


def distinct(paths: Sequence[str]) -> list[str]:
    """Paths without the first and last steps that all of them share."""
    steps = [path.split("/") for path in paths]
    least = min(map(len, steps), default=1) - 1  # a path keeps one step at least
    same = lambda n: len({row[n] for row in steps}) == 1
    head = next((n for n in range(least) if not same(n)), least)
    tail = next((n for n in range(least - head) if not same(-1 - n)), least - head)
    return ["/".join(row[head : len(row) - tail]) for row in steps]
