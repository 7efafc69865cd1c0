"""Which stored factors a rank letter joins, read off the equations of a plan.

In `r I, r, r O -> I O` the letter r joins the factor of the input side and that of the output side; an operand that
carries r alone is a gate between them. No name is looked at.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp

from jlora._algebra import _recipe
from jlora._algebra._recipe import Bound
from jlora._algebra._words import Array, Difference, Function, Gate, Labels, Word
from jlora._plan._sites import Plan, Site
from jlora._types import Place

Get: TypeAlias = Callable[[str, str], jax.Array]  # the array of a group and a name


@dataclasses.dataclass(frozen=True)
class Member:
    """One factor of a pair, stored as its stack axes, then the rank, then the axes of its side.

    Attributes:
      place: its group and name.
      array: the word of the equation; for a view (a shared matrix, a range of columns), what it is a view of.
      stack: how many stack axes it carries.
      width: the size of its side.
      start: for a factor whose difference from its start counts (`Difference`), the place of the start.
      fn: what is made of the two.
    """

    place: Place
    array: Array
    stack: int
    width: int
    start: Place | None = None
    fn: Callable[..., jax.Array] | None = None

    def rest(self, get: Get) -> jax.Array:
        """Its values where every rank is switched off: zeros, or the start."""
        return jnp.zeros_like(get(*self.place)) if self.start is None else get(*self.start)

    def operand(self, get: Get) -> jax.Array:
        """Its values as the equation sees them: stack axes, then the ranks of the product, then the side."""
        if self.start is None:
            return get(*self.place)
        assert self.fn is not None
        f = self.fn
        for _ in range(self.stack):
            f = jax.vmap(f)
        return f(get(*self.place), get(*self.start))


@dataclasses.dataclass(frozen=True)
class Pair:
    """Two factors joined by a rank letter, `r I` and `r O`.

    Attributes:
      input: the factor of the input side.
      output: the factor of the output side.
      gates: the factors that carry the letter alone.
      others: how many further operands the equation has.
      path: the weight's.
      rank: the size of the letter.
      layers: how many layers the weight stacks.
      scale: the place of the delta's s.
      scale_stack: how many stack axes s carries.
    """

    input: Member
    output: Member
    gates: tuple[Member, ...]
    others: int
    path: str
    rank: int
    layers: int
    scale: Place
    scale_stack: int

    @property
    def members(self) -> tuple[Member, Member]:
        """Input side first."""
        return self.input, self.output

    @property
    def begun(self) -> tuple[Member, ...]:
        """Those whose difference from their start counts."""
        return tuple(m for m in self.members if m.start is not None)

    @property
    def trained(self) -> int:
        """How many of the two are trained."""
        return sum(m.array.trained for m in self.members)

    @property
    def diagonal(self) -> bool:
        """Whether the delta is s p diag(lam) q, all trained: AdaLoRA's form, and SoRA's."""
        return self.trained == 2 and len(self.gates) == 1 and self.gates[0].array.trained and self.others == 0

    @property
    def own(self) -> tuple[Member, ...]:
        """The trained factors that no other weight reads, gates first."""
        return tuple(m for m in (*self.gates, self.output, self.input) if m.array.trained and m.array.group is None)

    @property
    def marks(self) -> tuple[Member, ...]:
        """The factors whose zeros switch a rank off: a gate, or all that are its own where there is none."""
        gates = tuple(gate for gate in self.gates if gate in self.own)
        return gates[:1] or self.own


def pairs(plan: Plan) -> tuple[Pair, ...]:
    """Every pair of a plan, one for each weight and delta it stands in; a shared factor stands in several."""
    found = (
        _pair(site, _recipe.bind(delta, site.leaf), letter)
        for site in plan.sites
        for delta in site.recipe.deltas
        for letter in delta.ranks
    )
    return tuple(pair for pair in found if pair is not None)


def wasted(plan: Plan) -> str:
    """In words, the weights whose own trained factors have a rank above the narrower side; nothing where none has."""
    own = [p for p in pairs(plan) if all(m.array.trained and m.array.group is None for m in p.members)]
    least = lambda pair: min(m.width for m in pair.members)
    wide = [p for p in own if p.rank > least(p)]
    if not wide:
        return ""
    some = [f"{p.path!r}: rank {p.rank} is above min(in, out) = {least(p)}" for p in wide[:5]]
    more = [f"and {len(wide) - 5} more"] if len(wide) > 5 else []
    return "no update has a rank above min(in, out), so these train parameters for nothing; write a smaller rank:" + (
        "".join("\n  " + line for line in (*some, *more))
    )


def _pair(site: Site, bound: Bound, letter: str) -> Pair | None:
    alone = [_member(site, word, labels, letter, bound) for word, labels in bound.words if labels == (letter,)]
    gates = tuple(gate for gate in alone if gate is not None)
    sided = [(word, labels) for word, labels in bound.words if letter in labels and labels != (letter,)]
    members = {_side(bound, labels, letter): _member(site, word, labels, letter, bound) for word, labels in sided}
    one, two = members.get("i"), members.get("o")
    if len(sided) != 2 or one is None or two is None:
        return None
    apart = [labels for word, labels in bound.words if isinstance(word, Gate) and not labels]  # a number for all ranks
    others = len(bound.words) - 2 - len(gates) - len(apart)
    stack, path = site.leaf.stack, site.leaf.path
    rank = min([bound.sizes[letter], *(m.array.shape[0] for m in (one, two) if m.start and m.array.shape)])
    return Pair(one, two, gates, others, path, rank, math.prod(stack), (path, bound.delta.s), len(stack))


def _side(bound: Bound, labels: Labels, letter: str) -> str:
    """`i` or `o` where all labels but the rank stand for that side, windows among the inputs; else nothing."""
    roles = {atoms[0][0].replace("k", "i") for atoms, made in bound.blocks if set(made) & set(labels)}
    held = {x for _, made in bound.blocks for x in made}
    return "".join(roles) if len(roles) == 1 and set(labels) - {letter} <= held else ""


def _member(site: Site, word: Word, labels: Labels, letter: str, bound: Bound) -> Member | None:
    start = fn = None
    if isinstance(word, Array):
        array, first = word, labels[0] == letter
        width = math.prod(bound.sizes[x] for x in labels if x != letter)
    elif isinstance(word, Function) and len(word.arrays) == 1 and not word.base:
        array = word.arrays[0]
        first = (array.shape or (0,))[0] == bound.sizes[letter]
        width = math.prod(array.shape[1:]) if array.shape else 0
    elif isinstance(word, Difference):
        array, began = word.arrays  # type: ignore[misc]
        first = True
        width = math.prod(array.shape[1:]) if array.shape else 0
        start, fn = (began.group or site.leaf.path, began.name), word.fn
    else:
        return None
    place = (array.group or site.leaf.path, array.name)
    return Member(place, array, len(site.leaf.stack) if array.stacked else 0, width, start, fn) if first else None
