"""An expression after a reshape: axes that are joined stand together, an axis that is split is two."""

import dataclasses

import jax
from jax import lax

from jlora._algebra._mesh import reshaped as moved
from jlora._algebra._term import Operand, Term
from jlora._algebra._unmade import Lazy
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels


def with_shape(w: Weight, base: jax.Array | Lazy, shape: tuple[int, ...]) -> Weight | None:
    """A weight whose W0 is `base`, of this shape; None where labels cannot say it."""
    if 0 in shape:
        return None
    w = _without_units(w)
    todo = [(a, w.size[a]) for a in w.atoms]
    axes: list[Labels] = []
    for n in shape:
        group: Labels = ()
        while n > 1:
            if not todo:
                return None
            atom, size = todo.pop(0)
            if n % size == 0:
                group, n = group + (atom,), n // size
            elif size % n == 0:
                inner = _inner(w, atom)
                w = _split(w, atom, n, inner)
                todo.insert(0, (inner, size // n))
                group, n = group + (atom,), 1
            else:
                return None
        axes.append(group)
    if todo:  # atoms of size one that could not be indexed away
        if not axes:
            return None
        axes[-1] += tuple(a for a, _ in todo)
    return w.replace(base=w.base if w.lazy is not None else base, axes=tuple(axes))


def _without_units(w: Weight) -> Weight:
    """Atoms of size one indexed away; their axes, if any, stay as empty groups."""
    for atom in w.atoms:
        kept = any(o.pending(atom) for o in w.steps)
        if w.size[atom] == 1 and not kept and all(t.simple(atom) for t in w.terms):
            w = w.along(atom, w.base, lambda a, n: lax.index_in_dim(a, 0, n, keepdims=False), True)
    return w


def _inner(w: Weight, atom: str) -> str:
    """A label for what `atom` leaves behind: sorted by their marks, the parts of an axis stand in its order.

    `i0` gives `i0'`; split again it gives `i0&'`, which stands between the two (`&` comes before `'`).
    """
    marks = [x[len(atom) :] for x in w.size if x.startswith((f"{atom}&", f"{atom}'"))]
    before = max((len(m) - len(m.lstrip("&")) + 1 for m in marks), default=0)
    return f"{atom}{'&' * before}'"


def _split(w: Weight, atom: str, outer: int, inner: str) -> Weight:
    """`atom` becomes `(atom, inner)` with `atom` of size `outer`."""
    size = w.size[atom] // outer
    after = lambda atoms: tuple(x for a in atoms for x in ((a, inner) if a == atom else (a,)))

    def word(o: Operand) -> Operand:
        if atom not in o.labels:
            return o
        o = o.forced()
        n, a = o.labels.index(atom), o.arrays[0]
        array = moved(a, (*a.shape[:n], outer, size, *a.shape[n + 1 :]))
        return Operand((array,), None, (), (*o.labels[:n], atom, inner, *o.labels[n + 1 :]))

    def product(t: Term) -> Term:
        blocks: list[tuple[Labels, Labels]] = []
        operands = t.operands
        for atoms, made in t.blocks:
            if atoms == made == (atom,):
                blocks += [((atom,), (atom,)), ((inner,), (inner,))]
                operands = tuple(map(word, operands))
            else:
                blocks.append((after(atoms), made))
        shown = lambda o: tuple((after(atoms), made) for atoms, made in o.sides)
        operands = tuple(dataclasses.replace(o, sides=shown(o)) for o in operands)
        return dataclasses.replace(t, operands=operands, blocks=tuple(blocks))

    def step(o: Operand) -> Operand:
        cut = lambda a, n: a if n is None else moved(a, (*a.shape[:n], outer, size, *a.shape[n + 1 :]))
        arrays = tuple(map(cut, o.arrays, o.axes(atom)))
        return dataclasses.replace(o, arrays=arrays, stacks=tuple(map(after, o.stacks)), labels=after(o.labels))

    key, labels = w.key, w.key_labels
    if atom in labels:  # a layer has a dropout key of its own
        assert key is not None
        n = labels.index(atom)
        key, labels = key.reshape(*key.shape[:n], outer, size, *key.shape[n + 1 :]), after(labels)
    return w.replace(
        base=w.base if w.lazy is None else w.lazy.split(atom, outer, inner),
        terms=tuple(map(product, w.terms)),
        sizes=tuple((a, outer if a == atom else n) for a, n in w.sizes) + ((inner, size),),
        axes=tuple(map(after, w.axes)),
        gain=tuple(map(word, w.gain)),
        rows=tuple(p.on(word, atom) for p in w.rows),
        steps=tuple(map(step, w.steps)),
        key=key,
        key_labels=labels,
    )
