"""Blocks of a network: which weight is the first or the last layer of attention or of a feed-forward block.

Read off the names of the weights and of what stands beside them, as `_kinds` reads off what one weight is for. The
words are in `_names.BLOCKS`. Layers that their numbers alone tell apart (`Dense_0`, `Dense_1`, in a module that is
called an MLP or beside attention) are the first and the last by these.
"""

import dataclasses
import functools
import os.path
import re
from collections.abc import Mapping, Sequence

from jlora._trees import _kinds, _names
from jlora._trees._tree import Named, shape_dtype
from jlora._types import PyTree, Traced

_ATTENTION = re.compile(_names.ATTENTION_MODULE)
_FEED_FORWARD = re.compile(_names.FEED_FORWARD_MODULE)
_CROSS = re.compile(_names.CROSS_ATTENTION)


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a layer stands.

    Attributes:
      names: what its path is made of, its own last; digits belong to the name before them, `layers/0` is `layers_0`.
      holders: for each of these, the path of what holds it.
    """

    names: tuple[str, ...]
    holders: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.names[-1]

    @property
    def above(self) -> str:
        """The names above it, joined by slashes."""
        return "/".join(self.names[:-1])

    @property
    def stem(self) -> str:
        return re.sub(r"_\d+$", "", self.name)

    @property
    def number(self) -> int:
        """That at its end; 0 where it has none, as Haiku's `linear`, `linear_1`."""
        return int(self.name[len(self.stem) + 1 :] or 0)


def _place(path: str) -> Place:
    steps = _kinds.steps(path)
    owned = re.fullmatch(_names.LEAVES, _kinds.leaf_name(path)) and len(steps) > 1
    names, holders = list[str](), list[str]()
    for n, step in enumerate(steps[:-1] if owned else steps):
        if names and step.isdigit():
            names[-1] += f"_{step}"
        else:
            names.append("_".join(_kinds.words(step)))
            holders.append("/".join(steps[:n]))
    return Place(tuple(names) or ("",), tuple(holders) or ("",))


def is_cross_attention(path: str) -> bool:
    """Whether a weight is of attention whose keys and values are those of another sequence."""
    return _CROSS.search(_place(path).above) is not None


def ends(paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None = None) -> list[str]:
    """Each leaf's end of a block: `first` or `last`, and `attention`, `cross attention` or `feed forward`; or ""."""
    kinds = _kinds.kinds(paths, leaves, traced)
    places = [_place(path) for path in paths]
    around = Around()
    for place, kind, leaf in zip(places, kinds, leaves, strict=True):
        around.see(place, kind, shape_dtype(leaf)[0])
    return [_end(place, kind, around) for place, kind in zip(places, kinds, strict=True)]


@dataclasses.dataclass(frozen=True)
class Around:
    """What stands together in a tree.

    Attributes:
      numbers: of the layers of one name in one holder.
      shapes: of the layers in a holder, by their names.
      attentive: what holds a module that is called attention.
      asking: what holds queries, so that it is attention whatever it is called.
    """

    numbers: dict[tuple[str, str], set[int]] = dataclasses.field(default_factory=dict)
    shapes: dict[str, dict[str, tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    attentive: set[str] = dataclasses.field(default_factory=set)
    asking: set[str] = dataclasses.field(default_factory=set)

    def see(self, place: Place, kind: str, shape: tuple[int, ...]) -> None:
        """One leaf more."""
        holder = place.holders[-1]
        self.attentive.update(h for h, x in zip(place.holders, place.names, strict=True) if _ATTENTION.search(x))
        if kind in _kinds.MATRICES:
            self.numbers.setdefault((holder, place.stem), set()).add(place.number)
            self.shapes.setdefault(holder, {})[place.name] = shape
        if kind in ("query", "qkv"):
            self.asking.add(holder)


def _end(place: Place, kind: str, around: Around) -> str:
    """What one leaf is in its block."""
    attention = "cross attention" if _CROSS.search(place.above) else "attention"
    if kind in ("query", "key", "value", "qkv"):  # in cross attention a fused one is of keys and values
        return f"first {attention}" if kind == "query" or kind == "qkv" and attention == "attention" else ""
    if kind not in _kinds.MATRICES:
        return ""
    holder, above = place.holders[-1], [place.above]
    if holder in around.asking:
        above.append(f"{place.above}/attention")
    if _turned(around.shapes[holder]):
        above.append(f"{place.above}/mlp")
    module, numbers = any(map(_FEED_FORWARD.search, above)), around.numbers[holder, place.stem]
    several = len(numbers) > 1 if module else len(numbers) == 2 and holder in around.attentive
    if several and re.fullmatch(_names.NUMBERED, place.stem):
        return {min(numbers): "first feed forward", max(numbers): "last feed forward"}.get(place.number, "")
    rows = ((end, row) for end, rows in _names.BLOCKS.items() for row in rows)
    found = (end for end, row in rows if any(row.fit(place.name, names) for names in above))
    return next(found, "").replace("attention", attention)


def _turned(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether an `up` and a `down`, or their like, stand together in turned shapes: unlike those of a U-Net."""
    pairs = ((shapes.get(up, ()), shapes.get(down, ())) for up, down in _names.PAIRS)
    return any(len(up) > 1 and up == (*down[:-2], *reversed(down[-2:])) for up, down in pairs)


class Blocks:
    """The blocks of one tree."""

    def __init__(self, tree: Named) -> None:
        self._tree = tree

    @functools.cached_property
    def _ends(self) -> dict[str, str]:
        return dict(zip(self._tree.paths, ends(self._tree.paths, self._tree.leaves), strict=True))

    @functools.cached_property
    def _steps(self) -> dict[str, list[str]]:
        return {path: path.split("/") for path in self._tree.paths}

    def first(self, path: str) -> str | None:
        """The first layer of the block whose last one has its weight or bias at `path`, as it is seen from there.

        Returns: its path from the nearest place above both; None where names do not tell.
        """
        layer, steps = path.rpartition("/")[0], self._steps[path]
        beside = (end for other, end in self._ends.items() if end and other.rpartition("/")[0] == layer)
        last = self._ends[path] or next(beside, "")
        if not last.startswith("last"):
            return None
        of = lambda kind: [steps for other, steps in self._steps.items() if self._ends[other] == kind]
        firsts, lasts = of(last.replace("last", "first")), of(last)
        nearest = max(firsts, key=lambda first: _shared(first, steps), default=None)
        if nearest is None or _shared(nearest, steps) < max(_shared(nearest, other) for other in lasts):
            return None  # it is that of another block
        return "/".join(nearest[_shared(nearest, steps) :])


def _shared(one: Sequence[str], other: Sequence[str]) -> int:
    """How many steps two paths have in common at their beginning."""
    return len(os.path.commonprefix([tuple(one), tuple(other)]))
