"""The numbered layers of a tree: which stack each leaf stands in, and at which number there.

A layer is a module with a number: `layers_11/`, `layer/11/`, `h/11/`, `block11/`. Much else is numbered, so that the
number alone says little: heads, experts, the two projections of a gated unit. A stack of layers is known by its
members, which hold modules and are alike: half of the names below one stand below another, too. Where stacks stand in
stacks, the outer one counts. Only where there is none (an MLP) are numbered modules layers that hold arrays alone.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeAlias

#: A step of a path with a number: nothing but digits, digits behind `_`, or behind a word that means layers.
_NUMBERED = re.compile(r"(|.*_|.*(?:layer|block|stage|stack|h)s?)(\d+)", re.IGNORECASE)
#: A step that is called as a stack and bears no number.
_STACK = re.compile(r"(.*_)?(layers|blocks|scan.*)|Scan.*|.*(Layers|Blocks)")

Numbers: TypeAlias = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a leaf stands: the path of its stack up to the number, its layer's number(s), its path below the layer."""

    stack: str
    number: Numbers
    below: str


def told(paths: Sequence[str], pattern: str) -> list[Place | None]:
    """The places that a pattern tells, whose groups are the numbers.

    Raises:
      ValueError: no regular expression, none with a group, groups that are no numbers, nowhere found.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"layers={pattern!r} is no regular expression: {error}") from None
    if not compiled.groups:
        raise ValueError(rf"layers={pattern!r} has no group for the number: write (\d+) where it stands")
    found = [compiled.search(path) for path in paths]
    places: list[Place | None] = []
    for path, it in zip(paths, found, strict=True):
        groups = [x for x in it.groups() if x is not None] if it else []
        if not all(x.isdigit() for x in groups):
            raise ValueError(rf"layers={pattern!r} takes {groups} of {path!r} as numbers; write a group as (\d+)")
        places.append(Place(path[: it.start(1)], tuple(map(int, groups)), path[it.end() :]) if it and groups else None)
    if not any(places):
        raise ValueError(f"layers={pattern!r} is found in no path; a path here is {paths[0]!r}")
    return places


def found(paths: Sequence[str], matrices: Sequence[bool]) -> list[Place | None]:
    """The places of all leaves, by their paths alone; `matrices` are the leaves of two axes and more.

    Raises:
      ValueError: no stack, a stack that is one leaf, or two beside each other: which is which is asked, not guessed.
    """
    numbered = [_numbered(path) for path in paths]
    deep = _outermost([[p for p in places if p.below.count("/") > 1] for places in numbered])
    if not any(deep):
        flat = _outermost(numbered)
        inside = [bool(place) for place, wide in zip(flat, matrices, strict=True) if wide]
        deep = flat if 2 * sum(inside) > len(inside) else deep
    stacks = {place.stack: path for place, path in zip(deep, paths, strict=True) if place}
    whole = next((above for path in stacks.values() or paths if (above := _unnumbered(path, deep, paths))), None)
    if whole:
        raise ValueError(
            f"the layers of {whole!r} are scanned: each leaf there holds all of them, and a target takes whole leaves. "
            "Take these, and leave the updates of the lower layers out (the factors of a stack have it in front), "
            "optax.chain(tx, optax.stateless(lambda u, _: jax.tree.map(lambda u: u.at[:-k].set(0), u))); "
            "or say what else is numbered by layers="
        )
    if not stacks:
        like = next((path for path in paths if re.search(r"\d", path)), paths[0] if paths else "")
        raise ValueError(
            f"no path here has the number of a layer, as layers_11/, layer/11/ or h/11/; one is {like!r}; where the "
            r"numbers are written otherwise, layers= says how, a pattern with (\d+) for them"
        )
    homes: dict[str, set[str]] = {}
    for stack in stacks:
        homes.setdefault(stack.rpartition("/")[0], set()).add(stack)
    if beside := [sorted(names) for names in homes.values() if len(names) > 1]:
        ends = [re.escape(name.rpartition("/")[2]) for name in beside[0]]
        one, all_ = rf"layers=r'{ends[0]}(\d+)/'", rf"layers=r'(?:{'|'.join(ends)})(\d+)/'"
        raise ValueError(
            f"{' and '.join(repr(name + '#') for name in beside[0][:4])} stand beside each other, and nothing tells "
            f"which are the layers, or which are on top; write {one} for one of them, or {all_} for each on its own"
        )
    return deep


def _numbered(path: str) -> list[Place]:
    """Every numbered module above a leaf, the outermost first. Haiku's slashes inside a name count as slashes."""
    steps = path.replace("%2F", "/").split("/")
    places = []
    for n, step in enumerate(steps[:-1]):
        if match := _NUMBERED.fullmatch(step):
            stack = "/".join([*steps[:n], match[1]])
            places.append(Place(stack, (int(match[2]),), "/" + "/".join(steps[n + 1 :])))
    return places


def _outermost(numbered: Sequence[list[Place]]) -> list[Place | None]:
    """For each leaf its outermost place in a stack of layers, or None."""
    names: dict[str, dict[Numbers, set[str]]] = {}
    for places in numbered:
        for place in places:
            below = re.sub(r"\d+", "#", place.below)
            names.setdefault(place.stack, {}).setdefault(place.number, set()).add(below)
    many = {stack for stack, members in names.items() if _alike(list(members.values()))}
    if not many:  # a model of one layer: its number stands alone, or behind a word for layers
        lone = lambda stack: re.search(r"(^|/|(layer|block)s?_?)$", stack, re.IGNORECASE)
        many = {stack for stack, members in names.items() if len(members) == 1 and lone(stack)}
    return [next((place for place in places if place.stack in many), None) for places in numbered]


def _alike(members: list[set[str]]) -> bool:
    """Whether two of them share half of their names."""
    firsts = members[:64]
    return any(2 * len(a & b) >= len(a | b) for n, a in enumerate(firsts) for b in firsts[:n])


def _unnumbered(path: str, places: Sequence[Place | None], paths: Sequence[str]) -> str:
    """A stack without numbers above the layers, or above a leaf in none; the empty text where there is none."""
    place = places[paths.index(path)]
    steps = path.replace("%2F", "/").split("/")
    above = place.stack.split("/") if place else steps
    for n, step in enumerate(above[:-1]):
        if _STACK.fullmatch(step) and not (n + 1 < len(steps) and steps[n + 1].isdigit()):
            return "/".join(steps[: n + 1])
    return ""
