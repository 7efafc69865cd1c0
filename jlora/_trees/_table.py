"""Plain-text tables of at most 100 columns, with repeated layers folded into one row."""

import re
from collections.abc import Hashable, Sequence
from typing import TypeVar

WIDTH = 100

Rest = TypeVar("Rest", bound=Hashable)


def fold(rows: Sequence[tuple[str, Rest]]) -> list[tuple[str, int, Rest]]:
    """Folds `(path, rest)` rows that differ in numbers of the path alone: `(path with ranges, how many, rest)`."""
    groups: dict[tuple[str, Rest], list[list[int]]] = {}
    for path, rest in rows:
        key = (re.sub(r"\d+", "#", path), rest)
        groups.setdefault(key, []).append([int(n) for n in re.findall(r"\d+", path)])
    return [(_ranges(pattern, numbers), len(numbers), rest) for (pattern, rest), numbers in groups.items()]


def _ranges(pattern: str, numbers: list[list[int]]) -> str:
    pieces = pattern.split("#")
    text = pieces[0]
    for n, piece in enumerate(pieces[1:]):
        text += _spell(sorted({row[n] for row in numbers})) + piece
    return text


def _spell(values: list[int]) -> str:
    if len(values) == 1:
        return str(values[0])
    runs: list[list[int]] = []
    for v in values:
        if runs and v == runs[-1][1] + 1:
            runs[-1][1] = v
        else:
            runs.append([v, v])
    return "{" + ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in runs) + "}"


def in_bytes(count: float) -> str:
    """Bytes in words: three digits and a unit."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.3g} GB"


def shorten(text: str, width: int) -> str:
    """Cuts the middle out of what is too wide."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return text[:head] + "…" + text[len(text) - (width - 1 - head) :]


def render(header: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> str:
    """Columns two spaces apart; the widest give way until a line fits in 100 columns."""
    cells = [list(header), *[list(map(str, r)) for r in rows]]
    widths = [max(len(r[n]) for r in cells) for n in range(len(header))]
    while sum(widths) + 2 * (len(widths) - 1) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    lines = []
    for row in cells:
        parts = [shorten(c, w) for c, w in zip(row, widths, strict=True)]
        parts = [p.rjust(w) if n in right else p.ljust(w) for n, (p, w) in enumerate(zip(parts, widths, strict=True))]
        lines.append("  ".join(parts).rstrip())
    lines.insert(1, "  ".join("-" * w for w in widths))
    return "\n".join(lines)
