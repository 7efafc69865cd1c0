"""A frozen weight with its networks: the expression that stands where the array stood.

    W = rows put into L (gain * (W0 + sum of deltas)) R

and the steps that its output goes through.

L and R are multiplied out, so that W is W0 (once, or inside the products that contain it) plus a sum of products, and a
gain that multiplies it all: a dot leaves that to the activations on either side. W0 is moved by the very operations of
the model; each product follows by relabelling. What cannot be said in labels turns one product, never the whole
expression, into a dense one.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jlora._algebra._contract import Regrouped, contract
from jlora._algebra._mesh import automatic, explicit_mesh, placed, reshaped
from jlora._algebra._rows import Put, changed
from jlora._algebra._term import Drop, NoArray, Operand, Sides, Term
from jlora._algebra._unmade import Lazy, again
from jlora._algebra._words import Labels
from jlora._dtypes import wide
from jlora._types import AnyMesh, Cut, DType, Key, MeshAxes, PyTree, Value

if TYPE_CHECKING:
    from typing_extensions import TypeIs

_static = lambda: dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """`base` as the model's operations have moved it so far, and its networks.

    Attributes:
      base: the array, exactly what the unlifted model would hold here; or W0 yet to be computed.
      terms: the products beside it.
      key: a dropout key (its leading axes are `key_labels`), or None.
      axes: for each axis of `base`, the atoms it is made of; `()` for an axis of size one.
      sizes: the size of every atom.
      plain: whether W0 itself is one of the summands (L and R multiply it into a term).
      path: where it stands in the user's tree; kept only for `explain`, so that equal layers look alike elsewhere.
      gain: what multiplies all of it, element by element, labelled with atoms.
      origin: which weights with a key, or with an input that is read elsewhere, are one, moved.
      rows: rows of a table, put into all that.
      steps: functions of what the weight's operation makes; their labels are its output atoms.
      reads: for each of them the origin of the weight whose input it sees, -1 for none.
      is_read: whether a step elsewhere sees this weight's input.
    """

    base: "jax.Array | Lazy"
    terms: tuple[Term, ...]
    key: Key | None
    axes: tuple[Labels, ...] = _static()
    sizes: tuple[tuple[str, int], ...] = _static()
    plain: bool = _static()
    key_labels: Labels = _static()
    path: str | None = _static()
    gain: tuple[Operand, ...] = ()
    origin: int = dataclasses.field(default=-1, metadata={"static": True})
    rows: tuple[Put, ...] = ()
    steps: tuple[Operand, ...] = ()
    reads: tuple[int, ...] = dataclasses.field(default=(), metadata={"static": True})
    is_read: bool = dataclasses.field(default=False, metadata={"static": True})

    @property
    def size(self) -> Mapping[str, int]:
        return dict(self.sizes)

    @property
    def atoms(self) -> Labels:
        return tuple(a for group in self.axes for a in group)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(math.prod(self.size[a] for a in group) for group in self.axes)

    @property
    def dtype(self) -> DType:
        return self.base.dtype

    @property
    def named(self) -> str:
        """What it is called in a message."""
        return "a weight" if self.path is None else repr(self.path)

    @property
    def positional(self) -> bool:
        """Whether it differs from position to position of what it meets."""
        return any(t.gates for t in self.terms)

    def gated(self, *terms: Term) -> str:
        """In words, the gates of some terms that make it differ so; of all by default."""
        gates = dict.fromkeys((o.gate, o.arrays[0].shape) for t in terms or self.terms for o in t.gates)
        return " and ".join(f"its gate {name!r} of shape {shape} has positions" for name, shape in gates)

    # --- W0 ---------------------------------------------------------------------------------------------------

    @property
    def lazy(self) -> Lazy | None:
        """W0 where it is yet to be computed."""
        return self.base if isinstance(self.base, Lazy) else None

    @property
    def held(self) -> tuple[jax.Array, ...]:
        """The arrays that W0 is, or is computed from."""
        return (self.base,) if not isinstance(self.base, Lazy) else self.base.arrays

    def w0(self) -> jax.Array:
        """W0 as an array."""
        if not isinstance(self.base, Lazy):
            return self.base
        return self.base.recipe(self.axes, self.size)(self.base.arrays)

    def solid(self) -> "Weight":
        """The same weight with W0 an array."""
        return self.replace(base=self.w0())

    def given(
        self,
        f: Callable[[bool], Callable[..., Value]],
        *args: PyTree,
        forward_mode: bool = False,
        held: Sequence[jax.Array] | None = None,
    ) -> Value:
        """`f(forward_mode)(W0, *args)`; a W0 yet to be computed is no residual: the backward pass computes it again.

        `held` stands for the arrays of `self.held`.
        """
        held = self.held if held is None else held
        if not isinstance(self.base, Lazy):
            return f(forward_mode)(held[0], *args)
        return again(f, self.base.recipe(self.axes, self.size), forward_mode)(tuple(held), *args)

    # --- values -----------------------------------------------------------------------------------------------

    def view(self, o: Operand) -> Regrouped:
        """W0 as an operand: split into its atoms, or where it shows a side under other labels, into those."""
        shown = {a: side for side in o.sides for a in side[0]}
        order, labels, shape = [], [], []
        for a in self.atoms:
            atoms, made = shown.get(a, ((a,), ((a, self.size[a]),)))
            if a == atoms[0]:
                order += atoms
                labels += [label for label, _ in made]
                shape += [size for _, size in made]
        split = tuple(self.size[a] for a in self.atoms)
        return Regrouped(tuple(labels), split, tuple(self.atoms.index(a) for a in order), tuple(shape))

    def operands(
        self, term: Term, w0: jax.Array | jax.ShapeDtypeStruct | None = None
    ) -> tuple[list[jax.Array], list[Labels]]:
        """Values and labels; W0, where a product contains it, in its `view`, or what is given to stand for it."""
        values, labels = [], []
        for o in term.operands:
            view = self.view(o) if o.is_base else None
            if view is None:
                values.append(o.value())
            elif isinstance(w0, jax.ShapeDtypeStruct):
                values.append(jax.ShapeDtypeStruct(view.shape, w0.dtype))
            else:
                values.append(view.of(self.w0() if w0 is None else w0))
            labels.append(o.labels if view is None else view.labels)
        return values, labels

    def matrix(self, term: Term, dtype: DTypeLike, kept: Labels = ()) -> jax.Array:
        """The dense dW of one product, its axes the atoms in their present order, behind those of labels to be kept."""
        if term.gates:
            raise NoArray(f"{self.named}: {self.gated(term)}, so that there is no one matrix of it")
        values, labels = self.operands(term)
        runs = [b for b in term.blocks if b[0]]
        out = (*kept, *(x for _, made in runs for x in made))
        order = [a for atoms, _ in runs for a in atoms]
        n = len(kept)

        def made(*values: jax.Array) -> jax.Array:
            dense = contract([v.astype(dtype) for v in values], labels, out, precision=lax.Precision.HIGHEST)
            dense = dense.reshape([*dense.shape[:n], *(self.size[a] for a in order)])
            return lax.transpose(dense, [*range(n), *(n + order.index(a) for a in self.atoms)])

        if all(atoms == labels for atoms, labels in runs) or explicit_mesh(values) is None:
            return made(*values)
        # a flat side is cut where W0 is, which no factor of it knows
        at = jax.typeof(self.base).sharding.spec if self.lazy is None else jax.eval_shape(self.w0).sharding.spec
        first = {g[0]: entry for g, entry in zip(self.axes, (*at, *[None] * len(self.axes)), strict=False) if g}
        return automatic(made, values, PartitionSpec(*[None] * n, *(first.get(a) for a in self.atoms)))

    def check_said(self) -> None:
        """Raises `NoArray` where no array says what this weight does."""
        if self.steps:
            raise NoArray(f"{self.named}: a step on its output is no part of the weight, and cannot be merged into it")

    def delta(self) -> jax.Array:
        """What is added to W0, dense and in at least float32, in the shape of `base`."""
        self.check_said()
        if self.gain:
            return self.multiplied().delta()
        dtype = wide(self.dtype)
        total = jnp.zeros(self.shape, dtype)
        for term in self.terms:
            total = total + reshaped(self.matrix(term, dtype), self.shape)
        total = changed(total, self.rows, self.axes, self.size)
        return total if self.plain else total - self.w0().astype(dtype)

    def dense(self) -> jax.Array:
        """The weight as an array: summed in at least float32, then cast to the dtype of `base`; without new rows."""
        self.check_said()
        if self.gain:
            return self.multiplied().dense()
        dtype = wide(self.dtype)
        total = self.w0().astype(dtype) if self.plain else None
        with jax.named_scope("delta"):
            for term in self.terms:
                part = reshaped(self.matrix(term, dtype), self.shape)
                total = part if total is None else total + part
            assert total is not None
            total = changed(total, self.rows, self.axes, self.size)
        return total.astype(self.dtype)

    # --- moves ------------------------------------------------------------------------------------------------

    def replace(self, **changes: object) -> "Weight":
        return dataclasses.replace(self, **changes)

    def flattened(self, term: Term) -> Term:
        """A product as one dense array whose axes are the atoms: what is left when labels no longer suffice.

        A gate on positions stays beside it, and the array keeps the gate's own letters.
        """
        others = dataclasses.replace(term, operands=tuple(o for o in term.operands if not o.at))
        met = {x for o in term.gates for x in o.labels}
        letters = tuple(dict.fromkeys(x for o in others.operands for x in o.labels if x in met))
        value = self.matrix(others, wide(self.dtype), letters)
        blocks = tuple(((a,), (a,)) for a in self.atoms)
        kept = dataclasses.replace(term.dropout, letters=())  # its ranks are summed over
        return Term((Operand((value,), None, (), (*letters, *self.atoms)), *term.gates), blocks, kept)

    def simplified(self, atom: str) -> "Weight":
        """The same weight with `atom` a plain label of every product, so that it can be sliced or split."""
        terms = []
        for term in self.terms:
            if not term.simple(atom):
                term = self.flattened(term)
            operands = tuple(o.forced() if o.pending(atom) else o for o in term.operands)
            terms.append(dataclasses.replace(term, operands=operands))
        gain = tuple(o.forced() if o.pending(atom) else o for o in self.gain)
        return self.replace(terms=tuple(terms), gain=gain)

    def each(self, f: Callable[[jax.Array], jax.Array]) -> "Weight":
        """`f` on every array, labels untouched (stop_gradient)."""
        on = lambda operands: tuple(dataclasses.replace(o, arrays=tuple(map(f, o.arrays))) for o in operands)
        terms = tuple(dataclasses.replace(t, operands=on(t.operands)) for t in self.terms)
        rows = tuple(p.on(lambda o: on((o,))[0]) for p in self.rows)
        base = jax.tree.map(f, self.base)
        return self.replace(base=base, terms=terms, gain=on(self.gain), rows=rows, steps=on(self.steps))

    def along(self, atom: str, base: jax.Array | Lazy | None, f: Cut, drop: bool) -> "Weight":
        """`f(array, axis)` on every array that carries `atom`, which is gone afterwards where `drop`.

        `base` is W0 after it; one yet to be computed is cut here.
        """
        if any(o.pending(atom) for o in self.steps):
            raise NoArray(f"{self.named}: a step sees all of its output, and the model takes a part of the weight")
        me = self.simplified(atom)
        if me.lazy is not None:
            base = me.lazy.along(atom, f, drop)

        def word(o: Operand) -> Operand:
            arrays = tuple(a if n is None else f(a, n) for a, n in zip(o.arrays, o.axes(atom), strict=True))
            return o.dropped(atom, arrays) if drop else dataclasses.replace(o, arrays=arrays)

        terms = []
        for t in me.terms:
            blocks = tuple(b for b in t.blocks if b[0] != (atom,)) if drop else t.blocks
            terms.append(dataclasses.replace(t, operands=tuple(map(word, t.operands)), blocks=blocks))
        key, key_labels = me.key, me.key_labels
        if atom in key_labels:
            assert key is not None
            key = f(key, key_labels.index(atom))
            key_labels = tuple(x for x in key_labels if not (drop and x == atom))
        axes = tuple(tuple(a for a in g if not (drop and a == atom)) for g in me.axes)
        gain, rows = tuple(map(word, me.gain)), tuple(p.on(word, atom) for p in me.rows)
        steps = tuple(map(word, me.steps))
        me = me.replace(gain=gain, rows=rows, steps=steps)
        return me.replace(base=base, terms=tuple(terms), key=key, key_labels=key_labels, axes=axes)

    def moved(self, base: jax.Array | Lazy, mesh: AnyMesh, entry: Mapping[str, MeshAxes]) -> "Weight":
        """After the model moved it, its atoms to these mesh axes: the stack axes of the factors go along.

        An axis behind a rank stays: the contraction that meets it brings it, in the dtype of the activation.
        """

        def word(o: Operand) -> Operand:
            leading = tuple(itertools.takewhile(entry.__contains__, o.labels))
            carried = o.stacks if o.fn is not None else (leading,) * len(o.arrays)
            move = lambda a, labels: placed(a, labels, entry, mesh)
            return dataclasses.replace(o, arrays=tuple(map(move, o.arrays, carried)))

        on = lambda operands: tuple(map(word, operands))
        terms = tuple(dataclasses.replace(t, operands=on(t.operands)) for t in self.terms)
        rows = tuple(p.on(word) for p in self.rows)
        return self.replace(base=base, terms=terms, gain=on(self.gain), rows=rows, steps=on(self.steps))

    def resized(self, atom: str, size: int) -> "Weight":
        return self.replace(sizes=tuple((a, size if a == atom else n) for a, n in self.sizes))

    def transposed(self, base: jax.Array | Lazy, order: Sequence[int]) -> "Weight":
        return self.replace(base=base, axes=tuple(self.axes[n] for n in order))

    def scaled(self, base: jax.Array | Lazy, c: jax.Array) -> "Weight":
        """Times a scalar. W0 takes it as the model does; so do products that contain W0."""
        scalar = Operand((jnp.asarray(c),), None, (), ())
        terms = tuple(
            t if any(o.is_base for o in t.operands) else dataclasses.replace(t, operands=(*t.operands, scalar))
            for t in self.terms
        )
        return self.replace(base=base, terms=terms, rows=tuple(p.scaled(c) for p in self.rows))

    # --- products -----------------------------------------------------------------------------------------------

    def factored(self) -> "Weight":
        """The same weight with W0 inside a product, so that operands can be put beside it."""
        if not self.plain:
            return self
        w0 = Term((Operand((), None, (), ()),), tuple(((a,), (a,)) for a in self.atoms), Drop())
        return self.replace(terms=(w0, *self.terms), plain=False)

    def multiplied(self) -> "Weight":
        """The gain as an operand of every product; where a side is flat, its `O` is a Kronecker product's `(o p)`."""
        if not self.gain:
            return self
        terms = []
        for t in (me := self.factored()).terms:
            size = t.sizes()
            flat = [(atoms, tuple((x, size[x]) for x in made)) for atoms, made in t.blocks if atoms != made]
            regrouped = [functools.reduce(lambda o, side: o.shown(*side), flat, o) for o in me.gain]
            terms.append(dataclasses.replace(t, operands=(*t.operands, *regrouped)))
        return me.replace(terms=tuple(terms), gain=())

    def times(self, side: Labels, operands: Sequence[Operand], meets: Sides, makes: Labels) -> "Weight":
        """A matrix on one side: its labels `meets` are the side as it was, `makes` the side as it is now."""
        me, terms = self.multiplied().factored(), []
        for t in me.terms:
            if not all(t.simple(a) for a in side):
                t = me.flattened(t)
            shown = tuple(o.shown(side, meets) for o in t.operands)
            blocks = tuple(b for b in t.blocks if b[0][0] not in side)
            terms.append(Term((*shown, *operands), (*blocks, (side, makes)), t.dropout))
        return me.replace(terms=tuple(terms))


def is_weight(x: object) -> "TypeIs[Weight]":
    """Whether `x` is an expression and no array."""
    return isinstance(x, Weight)
