"""How an adapted weight meets an activation in a dot.

    y = x . (gain * (W0 + sum of products))

The axes of the dot are labelled once (`Axes`): `w0` is the weight's first axis and what meets it, `x1` the
activation's second where it is its own. In these labels each product of the weight says which of its operands the
activation meets, and in what order is `_contract`'s to plan. `_rule` has the arithmetic and its gradients.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Unpack

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._algebra._contract import How, contract, elements
from jlora._algebra._mesh import explicit_mesh, on_several_devices, reshaped, settled
from jlora._algebra._term import Operand, Term
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._dtypes import promoted
from jlora._forward._dropout import thinned
from jlora._forward._gates import met
from jlora._forward._ops import Note, Refusal, Spent, check_real, label_sizes, product, same_varying
from jlora._forward._rule import Dot, Product, Written, flops, rule
from jlora._types import DType

Groups = Sequence[Labels | None]  # of each axis, the atoms of the weight that it stands for; None for x's own


@dataclasses.dataclass(frozen=True)
class Axes:
    """The axes of one dot in labels: of the activation, the weight and the result.

    Attributes:
      x, w, y: one label an axis.
      x_groups, y_groups: what the axes of the activation and of the result stand for.
      x_shape, y_shape: their sizes.
      flops: of the dense dot.
    """

    x: Labels
    w: Labels
    y: Labels
    x_groups: tuple[Labels | None, ...]
    y_groups: tuple[Labels | None, ...]
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]
    flops: float

    @property
    def free(self) -> Labels:
        """The activation's own axes, in their order."""
        return tuple(label for label, group in zip(self.x, self.x_groups, strict=True) if group is None)

    @property
    def x_axes(self) -> list[tuple[str, Labels | None]]:
        """Each axis of the activation, as `Term.spelled` reads it."""
        return list(zip(self.x, self.x_groups, strict=True))

    @property
    def y_axes(self) -> list[tuple[str, Labels | None]]:
        """Each axis of the result, in the same way."""
        return list(zip(self.y, self.y_groups, strict=True))


@dataclasses.dataclass
class Parts:
    """The products of a weight as they meet one activation, collected term by term.

    Attributes:
      xs: the activation, and those that a dropout made of it.
      products: what the rule of `_rule` contracts, with `operands`, one after another.
      passed: results of products through which W0 itself passed.
    """

    xs: list[jax.Array]
    products: list[Product] = dataclasses.field(default_factory=list)
    operands: list[jax.Array] = dataclasses.field(default_factory=list)
    passed: list[jax.Array] = dataclasses.field(default_factory=list)


def dot(w: Weight, x: jax.Array, written: Written, *, forward_mode: bool, note: Note) -> jax.Array:
    """`dot_general` of an activation with an adapted weight on either side.

    A gain on axes that are contracted multiplies the activation, one on the others the result.
    """
    check_real(x)
    axes = _labelled(w, x, written)
    w = met(w, x, axes.x, axes.free)
    on = lambda o, groups: set(o.labels) <= {a for g in groups for a in g or ()}
    if not all(on(o, axes.x_groups) or on(o, axes.y_groups) for o in w.gain):
        w = w.multiplied()
    before = [o for o in w.gain if on(o, axes.x_groups)]
    after = [o for o in w.gain if not on(o, axes.x_groups)]
    x = _gained(w, before, axes.x_groups, x)
    if w.plain and not w.terms:
        note(Spent("rescaled activations" if w.gain else "W0 made anew", 0.0, axes.flops))
        *held, x = same_varying([*w.held, x])
        y = w.given(lambda _: lambda w0, x: written(x, w0), x, held=held, forward_mode=forward_mode)
    else:
        y = _adapted(w, x, axes, written, forward_mode, note)
    return _gained(w, after, axes.y_groups, y)


def _labelled(w: Weight, x: jax.Array, written: Written) -> Axes:
    """The axes of a dot in labels."""
    (lc, rc), (lb, rb) = written.dimension_numbers
    (wc, xc), (wb, xb) = ((lc, rc), (lb, rb)) if written.left else ((rc, lc), (rb, lb))
    if any(len(w.axes[n]) > 1 for n in wb):
        raise Refusal("a batch axis joins several axes of the weight")
    pairs = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
    x_labels = tuple(f"w{pairs[n]}" if n in pairs else f"x{n}" for n in range(x.ndim))
    w_labels = tuple(f"w{n}" for n in range(len(w.axes)))
    x_free = [label for n, label in enumerate(x_labels) if n not in pairs]
    w_free = [label for n, label in enumerate(w_labels) if n not in (*wc, *wb)]
    y_labels = (*(w_labels[n] for n in wb), *(w_free + x_free if written.left else x_free + w_free))
    group = dict(zip(w_labels, w.axes, strict=True))
    size = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(w_labels, w.shape, strict=True))
    y_shape = tuple(size[n] for n in y_labels)
    return Axes(
        x=x_labels,
        w=w_labels,
        y=y_labels,
        x_groups=tuple(map(group.get, x_labels)),
        y_groups=tuple(map(group.get, y_labels)),
        x_shape=x.shape,
        y_shape=y_shape,
        flops=2.0 * elements(y_shape) * math.prod(size[w_labels[n]] for n in wc),
    )


def _adapted(w: Weight, x: jax.Array, axes: Axes, written: Written, forward_mode: bool, note: Note) -> jax.Array:
    """The dot with W0 and all products, without a gain."""
    compute = promoted(x.dtype, w.dtype)
    parts = _parts(w, x, axes, written, compute, forward_mode)
    if not parts.products:
        note(Spent("W0 between factors", axes.flops, axes.flops))
        return functools.reduce(jnp.add, parts.passed).astype(written.preferred_element_type or compute)
    made = Dot(axes.x, axes.w if w.plain else None, axes.y, tuple(parts.products), written, compute, merged=False)
    factored, dense = flops(made, parts.xs, _shape_of_w0(w), parts.operands)
    merged = dense < factored and _may_merge(w, x, parts, written)
    note(Spent("merged" if merged else "factored", dense if merged else factored, axes.flops))
    y = _run(dataclasses.replace(made, merged=merged), w, parts, forward_mode)
    return functools.reduce(lambda y, part: y + part.astype(y.dtype), parts.passed, y)


def _parts(w: Weight, x: jax.Array, axes: Axes, written: Written, compute: DType, forward_mode: bool) -> Parts:
    """Every term of the weight as a product that meets the activation."""
    parts = Parts([x])
    for term in w.terms:
        x_term, term = thinned(w, term, x)
        branch = 0
        if x_term is not x:
            branch = len(parts.xs)
            parts.xs.append(x_term)
        made, values = _meeting(w, term, axes, branch)
        if made.base < 0:
            made, values = _combined(made, values, label_sizes(w, values, made.operands), set(axes.free))
        elif not w.plain and _sides(made) is not None and explicit_mesh([x, *w.held, *_arrays(values)]) is None:
            parts.passed.append(_passed(w, made, x_term, values, written, compute, forward_mode))
            continue
        parts.products.append(made)
        parts.operands += [v for n, v in enumerate(values) if n != made.base]
    return parts


def _meeting(w: Weight, term: Term, axes: Axes, branch: int) -> tuple[Product, Sequence[jax.Array]]:
    """One term as a product of labelled operands and their values; dense where the dot cuts through a flat side."""
    values, names = w.operands(term, _shape_of_w0(w))
    made = _product(w, term, values, names, axes, branch)
    if made is None:
        term = w.flattened(term)
        values, names = w.operands(term, _shape_of_w0(w))
        made = _product(w, term, values, names, axes, branch)
    assert made is not None
    return made, values


def _product(
    w: Weight, term: Term, values: Sequence[jax.Array], names: Sequence[Labels], axes: Axes, branch: int
) -> Product | None:
    """How one term meets the activation; None where an axis of the dot cuts one of its blocks."""
    sizes = label_sizes(w, values, names)
    x, y = term.spelled(axes.x_axes, axes.x_shape, sizes), term.spelled(axes.y_axes, axes.y_shape, sizes)
    if x is None or y is None:
        return None
    blocks = [b for b in term.blocks if b[0]]
    order = [a for atoms, _ in blocks for a in atoms]
    first = tuple(w.size[a] for a in order)
    if sorted(order) != sorted(w.atoms):
        return None
    base = next((n for n, o in enumerate(term.operands) if o.is_base), -1)
    return Product(
        x=x[0],
        x_shape=x[1],
        out=y[0],
        out_shape=axes.y_shape,
        operands=tuple(names),
        dense=tuple(m for _, made in blocks for m in made),
        dense_shape=(first, tuple(order.index(a) for a in w.atoms), w.shape),
        branch=branch,
        base=base,
        view=w.view(term.operands[base]) if base >= 0 else None,
    )


def _may_merge(w: Weight, x: jax.Array, parts: Parts, written: Written) -> bool:
    """Whether dW may be added to W0 before the dot, should that be cheaper.

    Not where the sum would round away what the product does not (below float32), where a dropout tells the two apart,
    and not on a mesh: W0 may be cut there, so is the sum then, and what is made anew in the backward pass is gathered
    anew. Nor where a gate has positions, each of which has a dW of its own.
    """
    full32 = x.dtype == w.dtype == jnp.float32 and written.preferred_element_type in (None, jnp.float32)
    arrays = [x, *w.held, *parts.operands]
    alone = explicit_mesh(arrays) is None and not on_several_devices(arrays)
    return w.plain and w.lazy is None and full32 and len(parts.xs) == 1 and alone and not w.positional


def _run(made: Dot, w: Weight, parts: Parts, forward_mode: bool) -> jax.Array:
    """The dot under its custom rule, over W0 where the dot or a product reads it."""
    reads_base = w.plain or any(p.base >= 0 for p in parts.products)
    held = w.held if reads_base else ()
    arrays = same_varying([*held, *parts.xs, *parts.operands])
    held, arrays = arrays[: len(held)], arrays[len(held) :]
    xs, operands = tuple(arrays[: len(parts.xs)]), tuple(arrays[len(parts.xs) :])
    if not reads_base:
        return rule(made, forward_mode)(xs, None, operands)
    by = lambda mode: lambda w0, xs, operands: rule(made, mode)(xs, w0, operands)
    return w.given(by, xs, operands, held=held, forward_mode=forward_mode)


def _shape_of_w0(w: Weight) -> jax.ShapeDtypeStruct:
    """What stands for W0 in the planning, where only its shape matters."""
    return jax.ShapeDtypeStruct(w.shape, w.dtype)


def _arrays(values: Sequence[jax.Array]) -> list[jax.Array]:
    """Without what only stands for W0."""
    return [v for v in values if not isinstance(v, jax.ShapeDtypeStruct)]


# --- products that W0 stands in, and products of many operands ---------------------------------------------------


def _combined(
    product: Product, values: Sequence[jax.Array], size: Mapping[str, int], free: set[str]
) -> tuple[Product, Sequence[jax.Array]]:
    """A product of many operands as one of two, where each stands on one side: `r I, r, r O` is `(r I)(r O)`.

    What is left is a low-rank update, whose gradients share their intermediate results; autodiff knows the rest. An
    operand with positions, labels that are `free`, stays apart: a factor joined with it would be one a position.
    """
    inputs, outputs = set(product.x), set(product.out)
    facing = lambda ls: (bool(set(ls) & (inputs - outputs)), bool(set(ls) & (outputs - inputs)))
    faces = {n: facing(ls) for n, ls in enumerate(product.operands) if not set(ls) & free}
    apart = [n for n in range(len(product.operands)) if n not in faces]
    before, after, between = ([n for n, f in faces.items() if f == side] for side in ((1, 0), (0, 1), (0, 0)))
    labelled = sum(bool(product.operands[n]) for n in faces)
    if labelled < 3 or not before or not after or len(before) + len(after) + len(between) < len(faces):
        return product, values
    total = lambda side: sum(values[n].size for n in side)
    min(before, after, key=total).extend(between)  # gates cost least where there is least

    def joined(side: list[int], other: list[int]) -> Labels:
        known = {x for n in (*other, *apart) for x in product.operands[n]} | inputs | outputs
        held = dict.fromkeys(x for n in side for x in product.operands[n] if x in known)
        return tuple(sorted(held, key=lambda x: (x in inputs) + (x in outputs)))  # ranks first

    names = joined(before, after), joined(after, before)
    if sum(math.prod(size[x] for x in ls) for ls in names) > 2 * math.prod(product.dense_shape[-1]):
        return product, values
    with jax.named_scope("delta"):
        made = [
            contract(
                [values[n] for n in side], [product.operands[n] for n in side], ls, precision=lax.Precision.HIGHEST
            )
            for side, ls in zip((before, after), names, strict=True)
        ]
    names, made = (*names, *(product.operands[n] for n in apart)), [*made, *(values[n] for n in apart)]
    return dataclasses.replace(product, operands=names), made


def _sides(p: Product) -> tuple[list[int], list[int], list[str]] | None:
    """The operands before W0 and behind it, and its labels that face the former; None where one joins both (HiRA)."""
    inputs, outputs = set(p.x), set(p.out)
    names = dict(enumerate(p.operands))
    own = names.pop(p.base)
    before = [n for n, ls in names.items() if not set(ls) & (outputs - inputs)]
    after = [n for n in names if n not in before]
    letters = lambda which: {label for n in which for label in names[n]}
    if letters(after) & (inputs - outputs) or letters(before) & letters(after) - (inputs & outputs):
        return None
    return before, after, [label for label in own if label not in outputs | letters(after)]


def _passed(
    w: Weight,
    made: Product,
    x: jax.Array,
    values: Sequence[jax.Array],
    written: Written,
    compute: DType,
    forward_mode: bool,
) -> jax.Array:
    """A product with W0 between its operands, as three in turn (`_through`)."""
    count = len(w.held)
    x, *arrays = same_varying([x.astype(compute), *w.held, *_arrays(values)])
    how: How = {"precision": written.precision, "preferred_element_type": written.preferred_element_type}
    through = lambda mode: functools.partial(_through, made, forward_mode=mode, **how)
    return w.given(through, x, tuple(arrays[count:]), held=arrays[:count], forward_mode=forward_mode)


def _through(
    p: Product, base: jax.Array, x: jax.Array, values: Sequence[jax.Array], *, forward_mode: bool, **how: Unpack[How]
) -> jax.Array:
    """A product that contains W0 with the rest on either side of it, as three in turn: `x L`, then W0, then `R`.

    So W0 meets the activation once forward and once backward: the factors' gradients share what comes back through it.
    """
    outputs, names = set(p.out), dict(enumerate(p.operands))
    own = names.pop(p.base)
    before, after, facing = _sides(p) or ([], [], [])
    values = [*values[: p.base], base, *values[p.base :]]
    met = (*(label for label in p.x if label in outputs), *facing)
    left = [label for label in own if label not in (*met, *facing)]
    made = (*(label for label in met if label in outputs), *left)
    w0 = p.view.of(base).astype(x.dtype) if p.view is not None else base
    x = reshaped(x, p.x_shape)
    meet = lambda x, labels, which, out: (
        product(x, labels, [values[n].astype(x.dtype) for n in which], [names[n] for n in which], out, forward_mode)
        if which
        else contract([x], [labels], out)
    )
    with jax.named_scope("delta"):
        x = meet(x, p.x, before, met)
    y = contract([x, w0], [met, own], made, **how)
    with jax.named_scope("delta"):
        return reshaped(meet(y, made, after, p.out), p.out_shape)


# --- gains --------------------------------------------------------------------------------------------------------


def _along(w: Weight, o: Operand, groups: Sequence[Labels | None], like: jax.Array) -> jax.Array:
    """A gain in the axes of an activation, `groups` saying which atoms of the weight each is (None for its own)."""
    parts = [g or () for g in groups]
    atoms = tuple(a for g in parts for a in g)
    value = lax.transpose(o.value(), [o.labels.index(a) for a in atoms if a in o.labels])
    value = reshaped(value, [w.size[a] if a in o.labels else 1 for a in atoms])
    held = [bool(set(g) & set(o.labels)) for g in parts]
    full = [w.size[a] if h else 1 for g, h in zip(parts, held, strict=True) for a in g]
    joined = [math.prod(w.size[a] for a in g) if h else 1 for g, h in zip(parts, held, strict=True)]
    return reshaped(jnp.broadcast_to(value, full), joined).astype(like.dtype)


def _gained(w: Weight, gain: Sequence[Operand], groups: Sequence[Labels | None], x: jax.Array) -> jax.Array:
    """An activation times gains on axes that it shares with the weight."""
    for o in gain:
        with jax.named_scope("delta"):
            g = _along(w, o, groups, x)
            if (mesh := explicit_mesh([x])) is not None:  # it lives where the activation does, whatever its factors do
                spec = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)
                there = PartitionSpec(*(s if n > 1 else None for n, s in zip(g.shape, spec, strict=False)))
                g = settled(g, NamedSharding(mesh, there))
            x = jnp.multiply(*same_varying([x, g]))
    return x
