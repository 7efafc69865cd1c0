"""What a tree of parameters says of its axes: names that are certain, sizes that fit together, biases, stacks.

No values and no guesses: a leaf gets letters where the rows of `_conventions` and the leaves beside it leave one
possibility, and None where they leave none or several.
"""

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TypeAlias

from jlora._trees import _conventions
from jlora._trees._conventions import LIBRARIES, Library, Members

Shapes: TypeAlias = Mapping[str, tuple[int, ...]]
Letters: TypeAlias = dict[str, str | None]

_DEEP = 512  # more layers than that, and heads wider than that, are not met


def decide(shapes: Shapes) -> Letters:
    """`{path: letters}` of a tree, None where nothing decides.

    Stacks are found from what cannot be otherwise: a norm's scale with two axes, a bias with one more than its kernel
    makes, or a step such as `layers` above leaves that share an axis. What is below one is decided without that axis.
    """
    found = _decided(shapes)
    # `weight` stands for (out, in) in some libraries and (in, out) in others: the rest of the tree tells which
    weights = [p for p in found if _name(p) == "weight"]
    tables = [p for p in weights if re.search(r"(^|/)\w*embed(ding)?s?/weight$", p)]
    proven = {(found[p] or "").replace("s", "") for p in weights if p not in tables} & {"io", "oi"}
    for path in weights:
        letters = found[path] or "?" * len(shapes[path])
        sides = "io" if path in tables else next(iter(proven)) if len(proven) == 1 else "??"
        found[path] = letters.replace("??", sides) if letters.count("?") == 2 else letters
    return {path: None if letters is None or "?" in letters else letters for path, letters in found.items()}


def _decided(shapes: Shapes, below_a_stack: bool = False) -> Letters:
    """The same for a tree, or for what is below a stack without its axis; `?` where a stack is known, and no more."""
    found = _flat(shapes, below_a_stack)
    found |= {path: None for path in found if _alone(path, shapes, found)}
    for prefix, axis in _stacks(shapes, found):
        below = _below(shapes, prefix, axis)
        for path, inner in _decided(below, True).items():
            known, letters = found[path], inner or "?" * len(below[path])
            if "?" not in letters or known is None or "s" not in known:
                at = axis % len(shapes[path])
                found[path] = letters[:at] + "s" + letters[at:]
    return found


def _alone(path: str, shapes: Shapes, found: Letters) -> bool:
    """Whether a weight that reads as a stack is the only one of its size, and no name says so.

    (heads, in, width) with a bias (heads, width) would read as that many layers of (in, width).
    """
    letters, owner = found[path] or "", path.rpartition("/")[0]
    if letters.count("s") != 1 or len(letters) < 3 or "i" not in letters or re.search(_conventions.MAPPED, path):
        return False
    axis = letters.index("s")
    size = shapes[path][axis]
    others = [p for p, x in found.items() if x and x[axis : axis + 1] == "s" and p.rpartition("/")[0] != owner]
    return not any(shapes[p][axis] == size for p in others) and _name(path) in ("kernel", "w")


def _below(shapes: Shapes, prefix: str, axis: int) -> dict[str, tuple[int, ...]]:
    """What stands below a prefix, without one axis; -1 is the last."""
    without = lambda s: s[: axis % len(s)] + s[axis % len(s) + 1 :]
    return {p: without(s) for p, s in shapes.items() if p.startswith(prefix)}


# --- stacks ---


def _stacks(shapes: Shapes, found: Letters) -> list[tuple[str, int]]:
    """`(prefix, axis)`: every leaf below the prefix carries the same stack in that axis. None inside another."""
    places: dict[str, int] = {}
    for path, shape in shapes.items():
        steps = path.split("/")
        tops = ["/".join(steps[:n]) + "/" for n in range(len(steps) - 1)]
        tops[:1] = [""]
        said = [n for n in range(len(steps) - 1) if _is_stack(steps, n)]
        letters = found[path]
        vector = re.fullmatch("scale|gamma", steps[-1]) and len(shape) == 2
        if letters is not None and letters.count("s") == 1 and len(steps) > 2:
            tried, axes = tops[:-1], [letters.index("s")]
        elif vector and len(steps) > 2:
            tried, axes = tops, [0, 1, -1]
        elif said and letters is None:
            tried, axes = ["/".join(steps[: said[0] + 1]) + "/"], [0, 1]
        elif said and len(shape) > 2 and "s" not in (letters or "") and re.match("Scan", steps[said[0]]):
            # a scan's own name: what reads as several output axes is one of them, and the layers behind it
            tried, axes = ["/".join(steps[: said[0] + 1]) + "/"], [-1]
        else:
            continue
        if any(path.startswith(prefix) for prefix in places):
            continue
        fits = [(prefix, a) for prefix in tried for a in axes if a >= 0 and _fits(shapes, prefix, a)]
        fits = fits or [(prefix, a) for prefix in tried for a in axes if a < 0 and _fits(shapes, prefix, a)]
        wide = [(prefix, a) for prefix, a in fits if prefix == fits[0][0]]
        best = _best(shapes, wide)
        if best is not None:
            places = {p: a for p, a in places.items() if not p.startswith(best[0])} | {best[0]: best[1]}
    return list(places.items())


def _is_stack(steps: Sequence[str], n: int) -> bool:
    return re.fullmatch(_conventions.STACKS, steps[n]) is not None and not steps[n + 1].isdigit()


def _said_stacked(path: str) -> bool:
    steps = path.split("/")
    return any(_is_stack(steps, n) for n in range(len(steps) - 1))


def _fits(shapes: Shapes, prefix: str, axis: int) -> bool:
    """Whether all leaves below have one size there, and something is left of each of them."""
    below = [s for p, s in shapes.items() if p.startswith(prefix)]
    sizes = {s[axis] if len(s) > axis else 0 for s in below}  # -1, the last, is in all of them
    deep = next(iter(sizes)) if len(sizes) == 1 else 0
    if not 0 < deep <= _DEEP or min(map(len, below)) < 2 or max(map(len, below)) < 3:
        return False
    # behind the input axis it is a number of layers only where the model is no narrower
    widest = max(max(s) if len(s) > 3 else max(s[:1]) for s in below)
    return axis == 0 or deep <= widest


def _best(shapes: Shapes, fits: Sequence[tuple[str, int]]) -> tuple[str, int] | None:
    """The one reading under which most leaves are decided; None where two are alike."""
    count = {}
    for prefix, axis in fits:
        rest = _decided(_below(shapes, prefix, axis), True)
        count[prefix, axis] = sum(x is not None and "?" not in x for x in rest.values())
    top = [f for f, n in count.items() if n == max(count.values())]
    return top[0] if len(top) == 1 else None


# --- one level ---


def _flat(shapes: Shapes, below_a_stack: bool) -> Letters:
    options: dict[str, list[tuple[int, set[str]]]] = {path: [] for path in shapes}
    for n, claims in sorted(_claims(shapes, below_a_stack), key=lambda c: -c[0]):
        for path, letters in claims.items():
            options[path].append((n, letters))
    found: Letters = {}
    turned = set()
    for path, shape in shapes.items():
        left: set[str] | None = None
        for n, letters in options[path]:  # from the layout with most members down, until one reading is left
            left = letters if left is None or not left & letters else left & letters
            if len(left) == 1:
                if left == {"oi"} and n <= 2:
                    turned.add(_name(path))
                break
        found[path] = _by_name(path, shape, shapes) if left is None else left.copy().pop() if len(left) == 1 else None
    if any(letters and letters.startswith("kk") for letters in found.values()):
        for path, letters in found.items():  # beside convolutions, 1 x 1 and 2 x 2 are windows, too
            shape = shapes[path]
            if (
                letters is None
                and not options[path]
                and _name(path) == "kernel"
                and shape[:-2] in ((1, 1), (2, 2), (4, 4))
            ):
                found[path] = None if re.search(_conventions.TRANSPOSED, path) else "kkio"
    for path, shape in shapes.items():
        few = all(n <= 2 for n, _ in options[path])
        if len(shape) == 2 and _name(path) in turned and found[path] == "io" and few:
            # where some kernels of a tree are (out, in), one without proof may be so, too
            if shape[0] == shape[1] or not options[path]:
                found[path] = None
    return found


def _name(path: str) -> str:
    return path.rsplit("/", 1)[-1]


def _by_name(path: str, shape: tuple[int, ...], shapes: Shapes) -> str | None:
    owner, _, name = path.rpartition("/")
    if len(shape) < 2:
        return "o" * len(shape)
    for pattern, axes, letters in _conventions.BY_NAME:
        if re.fullmatch(f"(.*/)?({pattern})", path) and axes in (None, len(shape)):
            beside = shapes.get(f"{owner}/bias" if owner else "bias")
            if letters == "io" and beside is not None and beside != shape[1:]:
                return None
            return (letters * len(shape) if axes is None else letters) or None
    window = shape[:-2]
    if name == "kernel" and len(window) > 1 and len(set(window)) == 1 and not re.search(_conventions.TRANSPOSED, path):
        # no stack of stacks and no heads have these sizes: 3 x 3, 7 x 7 in front of two sides
        if window[0] in (3, 5, 7, 9, 11) and not _said_stacked(path):
            return "k" * len(window) + "io"
    # x @ w, under any name of a user's own
    return "io" if len(shape) == 2 and not re.fullmatch(_conventions.UNCLEAR, name) else None


def _claims(shapes: Shapes, below_a_stack: bool) -> Iterator[tuple[int, dict[str, set[str]]]]:
    """What the layouts that cover most of a module leave possible: `(members found, {path: letters})`."""
    ends: dict[str, list[str]] = {}
    for path in shapes:
        steps = path.split("/")
        for n in range(1, min(len(steps), 3) + 1):
            ends.setdefault("/".join(steps[-n:]), []).append(path)
    rows: dict[str, list[_Row]] = {}
    # one weight of several is no proof against a step that says that it is stacked
    unproven = lambda here: len(here) == 1 and not below_a_stack and any(map(_said_stacked, here.values()))
    for library in LIBRARIES:
        for members in library.layouts:
            for module, here in _modules(members, ends).items():
                if re.search(library.module, module) and not (library.whole and len(here) < len(members)):
                    rows.setdefault(module, []).append(
                        _Row(library, here, tuple(() if unproven(here) else _readings(library, here, shapes)))
                    )
    for found in (cluster for here in rows.values() for cluster in _clusters(here)):
        most = max(len(row.here) for row in found)
        fits = [row for row in found if len(row.here) == most]
        fits = [row for row in fits if not row.library.last and row.readings] or fits
        # several weights that fit in one way alone prove themselves; else sizes must be likely ones
        left = {r.letters for row in fits if row.weights > 1 for r in row.readings}
        if len(left) != 1:
            left = {r.letters for row in fits for r in row.readings if r.likely}
        claims: dict[str, set[str]] = {}
        for path, letters in (pair for reading in left for pair in reading):
            claims.setdefault(path, set()).add(letters)
        if not claims and any(row.readings for row in fits):
            claims = {path: {"", "?"} for row in fits for path in row.here.values()}
        yield most, claims


@dataclasses.dataclass(frozen=True)
class _Reading:
    letters: tuple[tuple[str, str], ...]
    likely: bool


@dataclasses.dataclass(frozen=True)
class _Row:
    library: Library
    here: dict[tuple[str, str, str], str]
    readings: tuple[_Reading, ...]

    @property
    def weights(self) -> int:
        return sum(set(roles) != {"o"} for _, _, roles in self.here)


def _clusters(rows: "Sequence[_Row]") -> "list[list[_Row]]":
    """Rows that speak of the same leaves, together."""
    clusters: list[list[_Row]] = []
    for row in rows:
        mine = set(row.here.values())
        near = [c for c in clusters if any(mine & set(r.here.values()) for r in c)]
        clusters = [c for c in clusters if c not in near] + [[row, *(r for c in near for r in c)]]
    return clusters


def _modules(members: Members, ends: Mapping[str, Sequence[str]]) -> dict[str, dict[tuple[str, str, str], str]]:
    """`{module: {member: path}}` of all modules that hold a member of a layout."""
    found: dict[str, dict[tuple[str, str, str], str]] = {}
    for member in members:
        pattern = re.compile(member[0])
        for end, paths in ends.items():
            if end.count("/") == member[0].count("/") and pattern.fullmatch(end):
                for path in paths:
                    found.setdefault(path[: -len(end)].rstrip("/"), {})[member] = path
    return found


def _readings(library: Library, here: dict[tuple[str, str, str], str], shapes: Shapes) -> Iterator[_Reading]:
    """Every way in which the sizes of a layout fit the leaves that are there, with a stack in front or behind."""
    extra = {len(shapes[path]) - len(sizes.split()) for (_, sizes, _), path in here.items()}
    if len(extra) != 1 or not extra <= {0, 1}:
        return
    places = [None] if extra == {0} else library.stacks if len(here) > 1 else ()
    for place in places:
        known: dict[str, int] = {}
        letters, fits = [], True
        for (_, sizes, roles), path in here.items():
            shape, words = list(shapes[path]), sizes.split()
            if place is not None:
                words.insert(place, "stack")
                roles = roles[:place] + "s" + roles[place:]
            fits = fits and all(_agrees(known, w, n) for w, n in zip(words, shape, strict=True))
            letters.append((path, roles))
        turns = library.last or any(re.search(_conventions.TRANSPOSED, path) for path in here.values())
        if fits and not (turns and known.get("I") == known.get("O") is not None):
            yield _Reading(tuple(sorted(letters)), _likely(known, place))


def _agrees(known: dict[str, int], word: str, size: int) -> bool:
    times, name = re.fullmatch(r"(\d*)(\w*)", word).groups()  # type: ignore[union-attr]
    by = int(times or 1)
    if not name:
        return size == by
    return size % by == 0 and known.setdefault(name, size // by) == size // by


def _likely(sizes: Mapping[str, int], place: int | None) -> bool:
    of = lambda words: [sizes[w] for w in words if w in sizes]
    model, heads, widths, deep = of("DCE"), of("NKHV"), of("HV"), sizes.get("stack", 1)
    behind = place and deep > min([*model, *of("I")], default=deep)
    return (
        max(heads, default=0) <= min(model, default=max(heads, default=0))
        and max([*widths, deep]) <= _DEEP
        and sizes.get("F", 0) >= (sizes.get("D", 0) if "F" in sizes else 0)
        and not behind
        and not (place is not None and sizes.get("O") == 1)
    )
