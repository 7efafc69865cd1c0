"""How one weight is computed: the recipe of a method, and its equations read on the shape of a leaf.

Everything here is static: hashable, comparable, no array in sight.
"""

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, TypeAlias

from jlora._algebra._words import Array, Base, Delta, Function, Labels, Step, Word, check_tuple, scale_of, spoken
from jlora._trees._leaf import Leaf
from jlora._types import Shape

if TYPE_CHECKING:
    from jlora._algebra._rows import Rows


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one weight is computed: rows put into `L (gain * (W0 + sum of deltas)) R`.

    Attributes:
      deltas: what is added to W0.
      gain: what multiplies that, element by element, on the axes that it names.
      left: a matrix of input rows, `-> (rows) (columns)`; its columns meet the input side.
      right: a matrix of output columns; its rows meet the output side.
      rows: rows of a table that are changed or new.
      steps: what is done to the output of the operation, one after another.
    """

    deltas: tuple[Delta, ...] = ()
    gain: Delta | None = None
    left: Delta | None = None
    right: Delta | None = None
    rows: "tuple[Rows, ...]" = ()
    steps: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        check_tuple("a Recipe has deltas", self.deltas, Delta)
        check_tuple("a Recipe has steps", self.steps, Step)
        if not isinstance(self.rows, tuple):
            raise TypeError(f"a Recipe has rows, a tuple of Rows each, not {self.rows!r:.80}")
        for name in ("gain", "left", "right"):
            network = getattr(self, name)
            if network is not None and not isinstance(network, Delta):
                raise TypeError(f"a Recipe has as its {name} a Delta, not {network!r:.80}")
            if network is not None and (network.scale != 1 or any(network.rates)):
                raise ValueError(
                    f"{network.equation!r} is a {name}, which multiplies: it has no scale and no dropout of its own"
                )

    @property
    def additive(self) -> bool:
        """Whether it adds to W0 something that W0 has no part in, all of it in its deltas."""
        words = [w for d in self.deltas for w in d.operands]
        reads = any(isinstance(w, Base) or isinstance(w, Function) and w.base for w in words)
        plain = self.gain is self.left is self.right is None and not self.rows and not self.steps
        return plain and not reads

    @property
    def gates(self) -> tuple[tuple[str, Shape], ...]:
        """The gates of its deltas and steps, each with the sizes of its own letters."""
        none: Shape = ()
        of_deltas = (gate for d in self.deltas for gate in d.gates)
        return (*of_deltas, *((step.gate, none) for step in self.steps if step.gate))

    @property
    def networks(self) -> tuple[tuple[Delta, str], ...]:
        """Every network, and the sides that its groups in parentheses stand for."""
        others = ((self.gain, "IO"), (self.left, "II"), (self.right, "OO"), *((r.network, "O") for r in self.rows))
        return (*((d, "IO") for d in self.deltas), *((d, sides) for d, sides in others if d is not None))

    def scaled(self, leaf: Leaf) -> tuple[Delta, ...]:
        """The networks that have a scale: the deltas, and the changes of rows that the table has."""
        return (*self.deltas, *(r.network for r in self.rows if not r.new(leaf)))

    def bound(self, leaf: Leaf) -> tuple["Bound", ...]:
        """Every network on one leaf, in the order of `networks`."""
        return tuple(bind(delta, leaf, sides) for delta, sides in self.networks)

    def splits(self, leaf: Leaf) -> bool:
        """Whether it matters which axes are input and which are output: an operand has some of them and not others."""
        own = {atom for n, atom in enumerate(atoms(leaf)) if leaf.roles[n] != "s"}
        if len(own) < 2:
            return False
        bound = self.bound(leaf)
        held = [set(labels) & own for b in bound for labels in b.labels]
        flat = any(side != made for b in bound for side, made in b.blocks)
        return bool(self.steps) or flat or any(part and part != own for part in held)

    def arrays(self, leaf: Leaf) -> dict[tuple[str, str], tuple[Array, tuple[int, ...]]]:
        """Every stored array as `{(group, name): (array, full shape)}`, the scale of each delta among them."""
        found: dict[tuple[str, str], tuple[Array, tuple[int, ...]]] = {}
        scales: dict[str, float] = {}
        scaled = self.scaled(leaf)

        def add(array: Array, shape: tuple[int, ...]) -> None:
            full = (leaf.stack if array.stacked else ()) + shape
            place = (array.group or leaf.path, array.name)
            if place in found and found[place][1] != full:
                raise ValueError(f"{place[0]!r} would hold {array.name!r} in two shapes, {found[place][1]} and {full}")
            if place in found and _kind(found[place][0]) != _kind(array):
                why = "; 's' is the scale of a delta" if array.name == "s" else ""
                raise ValueError(f"{place[0]!r} would hold {array.name!r} as two unlike arrays{why}; name them apart")
            found[place] = (array, full)

        for bound in self.bound(leaf):
            for array, shape in bound.stored():
                add(array, shape)
            delta = bound.delta
            if any(delta is d for d in self.deltas):
                _check_covers(bound, leaf)
            if delta in scaled:
                if scales.setdefault(delta.s, delta.scale) != delta.scale:
                    raise ValueError(
                        f"two deltas share the factor {delta.s!r} with unlike scales; name them apart (s=)"
                    )
                add(scale_of(delta), ())
        for array in (array for step in self.steps for array in step.arrays):
            assert array.shape is not None, "checked where a method is applied"
            add(array, array.shape)
        return found


def _kind(array: Array) -> tuple[object, ...]:
    """All that two words of one array agree in, but for their start and a shape that only one of them says."""
    return array.trained, array.stacked, array.scale, array.derived, array.dtype


def _check_covers(bound: "Bound", leaf: Leaf) -> None:
    held = {x for labels in bound.labels for x in labels} | set(atoms(leaf)[n] for n in leaf.axes("s"))
    covered = {a for side, _ in bound.blocks for a in side}
    if covered != set(atoms(leaf)) or not all(set(made) <= held for _, made in bound.blocks):
        sides = (("I", "i"), ("O", "o"), ("K", "k"))
        mine = lambda role: set(atoms(leaf)[n] for n in leaf.axes(role))
        lost = [side for side, role in sides if mine(role) - (covered & held) and not (mine(role) <= covered - held)]
        lost += [f"{side} among the operands" for side, role in sides if mine(role) and mine(role) <= covered - held]
        raise ValueError(
            f"the equation {bound.delta.equation!r} does not make every axis of a weight with axes {leaf.roles!r}"
            + (f": there is no {' and no '.join(lost)}" if lost else "")
        )


Blocks: TypeAlias = tuple[tuple[Labels, Labels], ...]


@dataclasses.dataclass(frozen=True)
class Bound:
    """A network on one leaf: its words, each with the labels of its axes (without stack), and what they make.

    Attributes:
      delta: the network.
      words: each word and its labels.
      blocks: a block says that some adjacent axes of the weight (atoms) are, flattened, the flattened product of some
        labels. Most are trivial: an axis is its own label.
      sizes: the size of each label.
    """

    delta: Delta
    words: tuple[tuple[Word, Labels], ...]
    blocks: Blocks
    sizes: Mapping[str, int]

    @property
    def labels(self) -> tuple[Labels, ...]:
        """Of each operand."""
        return tuple(labels for _, labels in self.words)

    @property
    def made(self) -> Labels:
        """Of the result, block by block."""
        return tuple(x for _, made in self.blocks for x in made)

    @property
    def order(self) -> Labels:
        """The atoms that these make, in their order."""
        return tuple(a for side, _ in self.blocks for a in side)

    def shape(self, labels: Labels) -> tuple[int, ...]:
        """The sizes of some labels."""
        return tuple(self.sizes[x] for x in labels)

    def stored(self) -> Iterator[tuple[Array, tuple[int, ...]]]:
        """Every stored array, word by word, with its shape without stack axes."""
        for word, labels in self.words:
            for array in word.arrays:
                yield array, self.shape(labels) if array.shape is None else array.shape


def atoms(leaf: Leaf) -> Labels:
    """One label an axis of the kernel: `i0`, `o1`, ..."""
    return tuple(f"{role}{n}" for n, role in enumerate(leaf.roles))


def bind(delta: Delta, leaf: Leaf, flat: str = "IO") -> Bound:
    """Reads an equation for the shape of one leaf; `flat` says the sides of its groups in parentheses."""
    names = atoms(leaf)
    window = "K" in spoken(delta.equation)
    sides = {
        "I": tuple(names[n] for n in leaf.axes("i" if window else "ik")),
        "O": tuple(names[n] for n in leaf.axes("o")),
        "K": tuple(names[n] for n in leaf.axes("k")),
    }
    sizes = dict(zip(names, leaf.shape, strict=True)) | dict(delta.sizes)
    left, right = delta.equation.split("->")
    expand = lambda letter: sides.get(letter, (letter,))
    operands = tuple(tuple(x for letter in operand.split() for x in expand(letter)) for operand in left.split(","))
    blocks: list[tuple[Labels, Labels]] = [((names[n],), (names[n],)) for n in leaf.axes("s")]
    todo = [s for s in flat if s not in right.split()]
    for token in re.findall(r"\([^)]*\)|\S+", right):
        if token.startswith("("):
            side, labels = sides[todo.pop(0)], tuple(token[1:-1].split())
            wide, made = (math.prod(sizes[x] for x in names) for names in (side, labels))
            if wide != made:
                raise ValueError(
                    f"{token} of {delta.equation!r} does not fit it: that makes {made}, and the side is {wide}"
                )
            blocks.append((side, labels))
        else:
            blocks += [((a,), (a,)) for a in sides[token]]
    return Bound(delta, tuple(zip(delta.operands, operands, strict=True)), tuple(blocks), sizes)
