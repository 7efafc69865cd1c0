"""From a recipe and its arrays to the expression of one weight."""

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import cast

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra import _recipe, _words
from jlora._algebra._recipe import Recipe
from jlora._algebra._rows import Put, Rows
from jlora._algebra._term import Drop, Operand, Term
from jlora._algebra._unmade import Fed, Lazy
from jlora._algebra._weight import Weight
from jlora._algebra._words import Array, Base, Delta, Gate, Labels, Step, Word
from jlora._dtypes import alike, widened
from jlora._trees._compound import Compound
from jlora._trees._leaf import Leaf
from jlora._types import Key


def express(
    leaf: Leaf,
    recipe: Recipe,
    base: jax.Array | Compound,
    lookup: Callable[[str, str], jax.Array],
    *,
    gates: Mapping[str, jax.Array] = MappingProxyType({}),
    key: Key | None = None,
    origin: int = -1,
    path: str | None = None,
) -> Weight:
    """The expression of one leaf, an array or `Compound`; `lookup(group, name)` gives the arrays of its recipe, `gates`
    the values of its gates.
    """
    reader = _Reader(leaf, _w0(leaf, base), lookup, gates)
    streams = list(dict.fromkeys(d.s for d in recipe.deltas))
    made = Weight(
        base=reader.w0,
        terms=tuple(reader.added(delta, streams.index(delta.s)) for delta in recipe.deltas),
        key=None,
        axes=tuple((a,) for a in reader.atoms),
        sizes=tuple(zip(reader.atoms, leaf.shape, strict=True)),
        plain=True,
        key_labels=(),
        path=path,
    )
    if recipe.gain is not None:
        made = made.replace(gain=reader.term(recipe.gain, "IO", "gain ").operands)
    if recipe.left is not None:
        made = reader.turned(made, recipe.left, "II", "left ")
    if recipe.right is not None:
        made = reader.turned(made, recipe.right, "OO", "right ")
    made = made.replace(rows=tuple(map(reader.put, recipe.rows)))
    if recipe.steps:
        made = made.replace(steps=tuple(map(reader.step, recipe.steps)), reads=(-1,) * len(recipe.steps))
    made = made.replace(origin=origin) if recipe.steps else made
    if key is None or not any(t.dropout for t in made.terms):
        return made
    key = jax.random.split(key, leaf.stack) if leaf.stack else key
    return made.replace(key=key, key_labels=reader.stack, origin=origin)


def _w0(leaf: Leaf, base: jax.Array | Compound) -> jax.Array | Lazy:
    """W0 as an array, or, of codes, as what makes it."""
    if not isinstance(base, Compound):
        return base
    names = _recipe.atoms(leaf)
    parts, make = base.parts()
    stack = tuple(names[n] for n in leaf.axes("s"))
    labels = tuple(names[n] for n in _layer_last(leaf))
    return Lazy(Operand(parts, make, (stack,) * len(parts), labels), (), labels, (base.dtype,))


def _layer_last(leaf: Leaf) -> list[int]:
    """The axes of a weight as functions see it: stacks first, then those of a layer in their order."""
    return [*leaf.axes("s"), *leaf.axes("iok")]


@dataclasses.dataclass(frozen=True)
class _Reader:
    """Reads the equations of one leaf: words become operands, networks terms."""

    leaf: Leaf
    w0: jax.Array | Lazy
    lookup: Callable[[str, str], jax.Array]
    gates: Mapping[str, jax.Array]

    @property
    def atoms(self) -> Labels:
        return _recipe.atoms(self.leaf)

    @property
    def stack(self) -> Labels:
        """The labels of the stack axes, which every array that is stacked has in front."""
        return tuple(self.atoms[n] for n in self.leaf.axes("s"))

    def term(self, delta: Delta, flat: str, prefix: str = "") -> Term:
        """A network as a product; its own letters get `prefix`, so that they meet those of no other."""
        bound = _recipe.bind(delta, self.leaf, flat)
        mark = lambda ls: tuple(x if x in self.atoms else prefix + x for x in ls)
        operands = tuple(self._operand(word, mark(ls)) for word, ls in bound.words)
        return Term(operands, tuple((a, mark(m)) for a, m in bound.blocks), Drop())

    def added(self, delta: Delta, stream: int) -> Term:
        """A delta as a product, with its scale and what is dropped of it."""
        made = self.term(delta, "IO")
        drop = Drop(delta.dropout, delta.rank_dropout, delta.module_dropout, stream)
        operands = (*made.operands, self._operand(_words.scale_of(delta), ()))
        return dataclasses.replace(made, operands=operands, dropout=drop)

    def turned(self, w: Weight, delta: Delta, flat: str, prefix: str) -> Weight:
        """A weight times a matrix on its input side (`II`) or its output side (`OO`)."""
        t = self.term(delta, flat, prefix)
        sizes = _recipe.bind(delta, self.leaf, flat).sizes
        *_, (side, rows), (_, columns) = t.blocks
        makes, meets = (rows, columns) if flat == "II" else (columns, rows)
        return w.times(side, t.operands, tuple((x, sizes[x.removeprefix(prefix)]) for x in meets), makes)

    def put(self, rows: Rows) -> Put:
        """Rows in the table's own axes; changes times their scale."""
        ((word, labels),) = _recipe.bind(rows.network, self.leaf).words
        operand, new = self._operand(word, labels), rows.new(self.leaf)
        value, front = operand.value(), operand.labels[: -len(labels)]  # few: made at once
        if not new:
            s, _ = self._get(_words.scale_of(rows.network))
            value = jnp.broadcast_to(value, (*self.leaf.stack, *value.shape[len(front) :]))
            front = self.stack
            s, value = alike(s, value)
            value = lax.expand_dims(s, range(s.ndim, value.ndim)) * value
        (atom,) = (self.atoms[n] for n in self.leaf.axes("i"))
        return Put(Operand((value,), None, (), (*front, atom, *labels[1:])), atom, rows.at, new)

    def step(self, step: Step) -> Operand:
        """A step as a function whose labels are the output atoms that it sees; its gate comes last."""
        got = [self._get(a) for a in step.arrays]
        stacks = tuple(front for _, front in got)
        labels = (self.stack if any(stacks) else ()) + tuple(self.atoms[n] for n in self.leaf.axes("o"))
        if not step.gate:
            return Operand(tuple(a for a, _ in got), step.fn, stacks, labels)
        g = self._operand(Gate(step.gate), ())
        arrays = (*(a for a, _ in got), *g.arrays)
        return Operand(arrays, step.fn, (*stacks, ()), labels, gate=g.gate, at=g.at)

    def _operand(self, word: Word, labels: Labels) -> Operand:
        if isinstance(word, Base):
            return Operand((), None, (), ())
        if isinstance(word, Gate):
            value = self.gates[word.name]
            at = tuple(f"@{n}" for n in range(value.ndim - len(labels)))
            return Operand((value,), None, (), at + labels, gate=word.name, at=at)
        if isinstance(word, Array):
            value, front = self._get(word)
            return Operand((value,), None, (), front + labels)
        if not word.arrays and not word.base:  # a constant
            return Operand((widened(jnp.asarray(word.fn())),), None, (), labels)
        got, fn = [self._get(a) for a in word.arrays], word.fn
        if word.base and isinstance(self.w0, Lazy):
            assert self.w0.source.fn is not None
            fn = Fed(fn, len(got), self.w0.source.fn)
            got += [(a, self.stack) for a in self.w0.source.arrays]
        elif word.base:
            got.append((lax.transpose(cast(jax.Array, self.w0), _layer_last(self.leaf)), self.stack))
        stacks = tuple(front for _, front in got)
        front = self.stack if any(stacks) else ()
        return Operand(tuple(a for a, _ in got), fn, stacks, front + labels)

    def _get(self, array: Array) -> tuple[jax.Array, Labels]:
        """A stored array, and the stack labels that it has in front."""
        value = self.lookup(array.group or self.leaf.path, array.name)
        return value, self.stack if array.stacked else ()
