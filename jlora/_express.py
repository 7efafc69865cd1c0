"""From a recipe and its arrays to the expression of one weight."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _network
from jlora._axes import Leaf
from jlora._dtypes import widened
from jlora._lazy import Fed, Lazy
from jlora._network import Array, Base, Delta, Labels, Recipe
from jlora._packed import Packed
from jlora._term import Drop, Operand, Term
from jlora._weight import Weight


def express(
    leaf: Leaf,
    recipe: Recipe,
    base: Any,
    lookup: Callable[[str, str], Any],
    *,
    key: Any = None,
    origin: int = -1,
    path: str | None = None,
) -> Weight:
    """The expression of one leaf, an array or `Packed`; `lookup(group, name)` gives the arrays of its recipe."""
    names = _network.atoms(leaf)
    stack = tuple(names[n] for n in leaf.axes("s"))
    order = [*leaf.axes("s"), *(n for n in range(len(names)) if leaf.roles[n] != "s")]
    w0: Any = base
    if isinstance(base, Packed):
        parts, make = base.parts()
        labels = tuple(names[n] for n in order)
        w0 = Lazy(Operand(parts, make, (stack,) * len(parts), labels), (), labels, (base.dtype,))

    def get(array: Array) -> tuple[Any, Labels]:
        return lookup(array.group or leaf.path, array.name), stack if array.stacked else ()

    def word(w: _network.Word, labels: Labels) -> Operand:
        if isinstance(w, Base):
            return Operand((), None, (), ())
        if isinstance(w, Array):
            value, front = get(w)
            return Operand((value,), None, (), front + labels)
        if not w.arrays and not w.base:
            constant = jnp.asarray(w.fn())
            return Operand((widened(constant),), None, (), labels)
        got, fn = [get(a) for a in w.arrays], w.fn
        if w.base and isinstance(w0, Lazy):
            assert w0.source.fn is not None
            fn = Fed(fn, len(got), w0.source.fn)
            got += [(a, stack) for a in w0.source.arrays]
        elif w.base:
            got.append((lax.transpose(w0, order), stack))
        stacks = tuple(front for _, front in got)
        front = stack if any(stacks) else ()
        return Operand(tuple(a for a, _ in got), fn, stacks, front + labels)

    streams = list(dict.fromkeys(d.s for d in recipe.deltas))

    def term(delta: Delta, flat: str, rename: str = "") -> Term:
        bound = _network.bind(delta, leaf, flat)
        mark = lambda ls: tuple(x if x in names else rename + x for x in ls)
        operands = tuple(word(w, mark(ls)) for w, ls in bound.words)
        return Term(operands, tuple((a, mark(m)) for a, m in bound.blocks), Drop())

    def added(delta: Delta) -> Term:
        made = term(delta, "IO")
        drop = Drop(delta.dropout, delta.rank_dropout, delta.module_dropout, streams.index(delta.s))
        operands = (*made.operands, word(_network.scale_of(delta), ()))
        return dataclasses.replace(made, operands=operands, dropout=drop)

    made = Weight(
        base=w0,
        terms=tuple(map(added, recipe.deltas)),
        key=None,
        axes=tuple((a,) for a in names),
        sizes=tuple(zip(names, leaf.shape, strict=True)),
        plain=True,
        key_labels=(),
        path=path,
    )
    if recipe.gain is not None:
        made = made.replace(gain=term(recipe.gain, "IO", "gain ").operands)
    for delta, flat, prefix in ((recipe.left, "II", "left "), (recipe.right, "OO", "right ")):
        if delta is None:
            continue
        t, sizes = term(delta, flat, prefix), _network.bind(delta, leaf, flat).sizes
        *_, (side, rows), (_, columns) = t.blocks
        makes, meets = (rows, columns) if delta is recipe.left else (columns, rows)
        made = made.times(side, t.operands, tuple((x, sizes[x.removeprefix(prefix)]) for x in meets), makes)
    if key is None or not any(t.dropout for t in made.terms):
        return made
    key = jax.random.split(key, leaf.stack) if leaf.stack else key
    return made.replace(key=key, key_labels=stack, origin=origin)
