"""What is left of a weight in an array that was made of it: which axes stand where, and where the others went."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

Piece: TypeAlias = tuple[tuple[int, ...], int]
"""A factor of an axis of an array: the axes of the weight that it is made of (none where it was broadcast); size."""

Group: TypeAlias = tuple[Piece, ...]
"""One axis of an array as a product of pieces, the slowest first."""

pairs = functools.partial(zip, strict=True)


@dataclasses.dataclass(frozen=True)
class View:
    """An array that was made of one weight.

    Attributes:
      source: the number of the weight.
      groups: for each axis of the array the pieces that it is the product of; none where it has size one.
      gone: `(axis of the weight, how)` of axes that are no longer there: `s` scanned or indexed in a loop, `z` indexed
        by a constant, `r` summed, `1` of size one and squeezed, `m` contracted with another weight.
      picked: axes along which rows were taken by given numbers: a lookup, unless the rest is contracted.
    """

    source: int
    groups: tuple[Group, ...]
    gone: frozenset[tuple[int, str]] = frozenset()
    picked: tuple[int, ...] = ()

    @property
    def held(self) -> frozenset[int]:
        """The axes of the weight that are there."""
        return frozenset(a for group in self.groups for axes, _ in group for a in axes)

    def wide(self, dims: Sequence[int] | None = None) -> int:
        """How many of these axes hold more than one element of the weight."""
        dims = range(len(self.groups)) if dims is None else dims
        return sum(any(axes and size > 1 for axes, size in self.groups[n]) for n in dims)

    def put(self, groups: Sequence[Group]) -> View:
        return dataclasses.replace(self, groups=tuple(groups))

    def without(self, dims: Sequence[int], how: str, keep: bool = False) -> View:
        """Axes of the array that go away, or stay with size one."""
        lost = {(a, how) for n in dims for axes, _ in self.groups[n] for a in axes}
        groups = [() if n in dims else g for n, g in enumerate(self.groups) if keep or n not in dims]
        left = frozenset(a for g in groups for axes, _ in g for a in axes)
        return dataclasses.replace(
            self, groups=tuple(groups), gone=self.gone | frozenset(x for x in lost if x[0] not in left)
        )

    def sized(self, dim: int, size: int) -> View:
        """An axis of another size: cut, padded or joined with another array."""
        axes = tuple(dict.fromkeys(a for axes, _ in self.groups[dim] for a in axes))
        return self.put([((axes, size),) if n == dim else g for n, g in enumerate(self.groups)])

    def reshaped(self, shape: Sequence[int]) -> View | None:
        """The same in another shape; None where an axis would be made of parts of two that do not divide."""
        todo = [(axes, size) for group in self.groups for axes, size in group if size > 1]
        squeezed = {(a, "1") for group in self.groups for axes, size in group if size == 1 for a in axes}
        groups: list[Group] = []
        for want in shape:
            made: list[Piece] = []
            while want > 1:
                if not todo:
                    return None
                axes, size = todo[0]
                part = math.gcd(want, size)
                if part == 1 or part not in (want, size):
                    return None
                # an axis is split from its slow end
                made.append((axes, part))
                want //= part
                if part == size:
                    todo.pop(0)
                else:
                    todo[0] = (axes, size // part)
            groups.append(tuple(made))
        left = frozenset(a for g in groups for axes, _ in g for a in axes)
        gone = self.gone | frozenset(x for x in squeezed if x[0] not in left)
        return dataclasses.replace(self, groups=tuple(groups), gone=gone)

    def letters(self, said: Mapping[int, str], contracted: bool) -> dict[int, str] | None:
        """One letter an axis of the weight where this array's axes have the letters `said` (others are `o`).

        None where parts of one axis are both contracted and not.
        """
        found: dict[int, set[str]] = {}
        for n, group in enumerate(self.groups):
            for axes, _ in group:
                for a in axes:
                    found.setdefault(a, set()).add(said.get(n, "o"))
        turned = {"s": "s", "z": "s", "r": "i" if contracted else "o", "1": "1" if contracted else "o"}
        for a, how in self.gone:
            if a not in found and how != "m":
                found[a] = {turned[how]}
        inner = "o" if any("i" in x for x in found.values()) else "i"
        for a, how in self.gone:
            if how == "m":
                found.setdefault(a, set()).add(inner)
        letters = {}
        for a, seen in found.items():
            if {"i", "o"} <= seen:
                return None
            rest = seen - {"s"} or {"s"}
            letter = next(iter(sorted(rest)))
            # "1" is an axis of size one that was squeezed away. In front it is read as a stack, elsewhere as an output.
            letters[a] = letter if letter != "1" else "s" if a == 0 else "o"
        return letters


def whole(source: int, shape: Sequence[int]) -> View:
    """A weight as it is."""
    return View(source, tuple((((n,), size),) for n, size in enumerate(shape)))


def grown(v: View, old: Sequence[int], shape: Sequence[int], dims: Sequence[int] | None = None) -> View:
    """An array repeated along axes of size one, and along those of `shape` that `dims` does not name."""
    dims = range(len(old)) if dims is None else dims
    wider = [n for n, d in enumerate(dims) if old[n] != shape[d]]
    v = v.without(wider, "1", keep=True)
    groups: list[Group] = [(((), size),) if size > 1 else () for size in shape]
    for n, d in enumerate(dims):
        if n not in wider:
            groups[d] = v.groups[n]
    return v.put(groups)


@dataclasses.dataclass(frozen=True)
class Known:
    """What is known of a value: the weights in it, whether data is, whether it is made of ones and zeros by `==`."""

    views: tuple[View, ...] = ()
    data: bool = False
    hot: bool = False
    product: tuple[View, ...] = ()  # weights that data was multiplied with, element by element


@dataclasses.dataclass(frozen=True)
class Use:
    """One use of a weight: `kind` is one of KINDS, `letters` one an axis, `static` the axes that constants index."""

    kind: str
    letters: str
    static: frozenset[int] = frozenset()


# In the order in which they decide: a table that is looked up is a table, whatever a tied head does with it.
KINDS = ("lookup", "dot", "between weights", "unsure", "elementwise")
