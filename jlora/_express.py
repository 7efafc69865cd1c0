"""From a recipe and its arrays to the expression of one weight."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import lax

from jlora import _network
from jlora._axes import Leaf
from jlora._network import Array, Base, Delta, Labels, Recipe
from jlora._weight import Operand, Term, Weight


def express(
    leaf: Leaf,
    recipe: Recipe,
    base: jax.Array,
    lookup: Callable[[str, str], Any],
    *,
    key: Any = None,
    path: str | None = None,
) -> Weight:
    """The expression of one adapted leaf; `lookup(group, name)` gives its arrays."""
    names = _network.atoms(leaf)
    stack = tuple(names[n] for n in leaf.axes("s"))

    def get(array: Array) -> tuple[Any, Labels]:
        return lookup(array.group or leaf.path, array.name), stack if array.stacked else ()

    def word(w: _network.Word, labels: Labels) -> Operand:
        if isinstance(w, Base):
            return Operand((), None, (), ())
        if isinstance(w, Array):
            value, front = get(w)
            return Operand((value,), None, (), front + labels)
        got = [get(a) for a in w.arrays]
        if w.base:
            order = [*leaf.axes("s"), *(n for n in range(len(names)) if leaf.roles[n] != "s")]
            got.append((lax.transpose(base, order), stack))
        stacks = tuple(front for _, front in got)
        front = stack if any(stacks) else ()
        return Operand(tuple(a for a, _ in got), w.fn, stacks, front + labels)

    def term(delta: Delta, scale: bool, rename: str = "") -> Term:
        parsed = _network.parse(delta, leaf)
        mark = lambda ls: tuple(x if x in names else rename + x for x in ls)
        operands = tuple(word(w, mark(ls)) for w, ls in zip(delta.operands, parsed.operands, strict=True))
        if scale:
            operands += (word(_network.scale_of(delta), ()),)
        return Term(operands, tuple((a, mark(m)) for a, m in parsed.blocks), delta.dropout)

    terms = tuple(term(d, True) for d in recipe.deltas)
    if recipe.gain is not None:
        gain = term(recipe.gain, False, rename="gain ").operands
        identity = tuple(((a,), (a,)) for a in names)
        terms = (Term((Operand((), None, (), ()),), identity, 0.0), *terms)
        sizes = {a: n for d in recipe.deltas for a, n in _network.parse(d, leaf).sizes.items()}
        terms = tuple(
            dataclasses.replace(t, operands=(*t.operands, *(_regrouped(o, t, sizes) for o in gain))) for t in terms
        )
    if not any(t.dropout for t in terms):
        key = None
    elif key is not None and leaf.stack:
        key = jax.random.split(key, leaf.stack)
    return Weight(
        base=base,
        terms=terms,
        key=key,
        axes=tuple((a,) for a in names),
        sizes=tuple(zip(names, leaf.shape, strict=True)),
        plain=recipe.gain is None,
        key_labels=stack if key is not None else (),
        path=path,
    )


def _regrouped(gain: Operand, term: Term, sizes: Mapping[str, int]) -> Operand:
    """A gain in the letters of a product whose side is flat: `O` becomes the `(o p)` of a Kronecker product."""
    if gain.is_base:
        return gain
    for atoms, made in term.blocks:
        if atoms == made or not set(atoms) & set(gain.labels):
            continue
        n = gain.labels.index(atoms[0])
        if gain.labels[n : n + len(atoms)] != atoms:
            raise ValueError(f"a gain on part of a side that {made} makes as a whole")
        value = gain.value()
        shape = (*value.shape[:n], *(sizes[m] for m in made), *value.shape[n + len(atoms) :])
        labels = (*gain.labels[:n], *made, *gain.labels[n + len(atoms) :])
        gain = Operand((value.reshape(shape),), None, (), labels)
    return gain
