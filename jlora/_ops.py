"""How an adapted weight meets an activation: dots (`_conv` has convolutions and ragged dots, `_lookup` rows).

Each function takes the operation's own parameters and returns the result, or `Refusal` with a reason where labels
cannot say it; the weight is then made dense. None of them knows what a jaxpr is.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from jlora._contract import contract, elements, explicit_mesh, settled, spread, varying
from jlora._dropout import thinned
from jlora._dtypes import promoted
from jlora._network import Labels
from jlora._rule import Dot, Product, cost, rule
from jlora._term import Operand, Term
from jlora._weight import Weight


class Refusal(Exception):
    """The labels cannot say this operation; its message is the reason."""


@dataclasses.dataclass(frozen=True)
class Use:
    """What a contraction cost: its plan in words, FLOPs of the delta as planned and of the dense dot."""

    plan: str
    flops: float
    dense_flops: float


Note = Callable[[Use], None]


def is_vector(w: Weight) -> bool:
    """Whether there is nothing to contract but a single axis: made dense, it costs nothing."""
    return sum(not a.startswith("s") for a in w.atoms) <= 1 or not any(a[0] in "ik" for a in w.atoms)


def is_dense_delta(w: Weight) -> bool:
    """Whether every product is already a matrix in the weight's own axes: adding it to W0 is all there is to do."""
    return (
        w.plain
        and bool(w.terms)
        and not w.gain
        and all(sum(bool(o.labels) for o in t.operands) == 1 and all(t.simple(a) for a in w.atoms) for t in w.terms)
    )


def _sizes(w: Weight, values: Sequence[jax.Array], labels: Sequence[Labels]) -> dict[str, int]:
    sizes = dict(w.size)
    for a, ls in zip(values, labels, strict=True):
        sizes.update(zip(ls, a.shape, strict=True))
    return sizes


def check_real(x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Refusal(f"an activation of dtype {x.dtype}")


def _same_varying(arrays: Sequence[Any]) -> list[Any]:
    """Inside shard_map: every array made varying over the mesh axes that any of them varies over."""
    axes = [varying(a) for a in arrays]
    union = frozenset().union(*axes)
    return [
        a if v == union else lax.pcast(a, tuple(sorted(union - v)), to="varying")
        for a, v in zip(arrays, axes, strict=True)
    ]


# --- dots ---------------------------------------------------------------------------------------------------------


def _axis_labels(w: Weight, x_ndim: int, pairs: Mapping[int, int], free: str = "x") -> tuple[Labels, Labels]:
    """Labels of the activation's axes and the weight's, one an axis; `pairs` maps the former to the latter."""
    return (
        tuple(f"w{pairs[n]}" if n in pairs else f"{free}{n}" for n in range(x_ndim)),
        tuple(f"w{n}" for n in range(len(w.axes))),
    )


def _product(
    w: Weight,
    term: Term,
    values: Sequence[jax.Array],
    names: Sequence[Labels],
    *,
    x_axes: Sequence[tuple[str, Labels | None]],
    y_axes: Sequence[tuple[str, Labels | None]],
    y_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    branch: int,
) -> Product | None:
    """How one term meets the activation. Axes are `(label, atoms)`, the atoms None for the activation's free axes."""
    sizes = _sizes(w, values, names)
    x, y = term.spelled(x_axes, x_shape, sizes), term.spelled(y_axes, y_shape, sizes)
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
        out_shape=y_shape,
        operands=tuple(names),
        dense=tuple(m for _, made in blocks for m in made),
        dense_shape=(first, tuple(order.index(a) for a in w.atoms), w.shape),
        branch=branch,
        base=base,
        view=w.view(term.operands[base]) if base >= 0 else None,
    )


def _combined(
    product: Product, values: Sequence[jax.Array], size: Mapping[str, int]
) -> tuple[Product, Sequence[jax.Array]]:
    """A product of many operands as one of two, where each stands on one side: `r I, r, r O` is `(r I)(r O)`.

    What is left is a low-rank update, whose gradients share their intermediate results; autodiff knows the rest.
    """
    inputs, outputs = set(product.x), set(product.out)
    facing = lambda ls: (bool(set(ls) & (inputs - outputs)), bool(set(ls) & (outputs - inputs)))
    faces = [facing(ls) for ls in product.operands]
    before, after, between = ([n for n, f in enumerate(faces) if f == side] for side in ((1, 0), (0, 1), (0, 0)))
    labelled = sum(bool(ls) for ls in product.operands)
    if labelled < 3 or not before or not after or len(before) + len(after) + len(between) < len(faces):
        return product, values
    total = lambda side: sum(values[n].size for n in side)
    min(before, after, key=total).extend(between)  # gates cost least where there is least

    def joined(side: list[int], other: list[int]) -> Labels:
        met = {x for n in other for x in product.operands[n]} | inputs | outputs
        held = dict.fromkeys(x for n in side for x in product.operands[n] if x in met)
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


def _through(
    p: Product, base: jax.Array, x: jax.Array, values: Sequence[jax.Array], *, forward_mode: bool, **how: Any
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
    x = x.reshape(p.x_shape)
    meet = lambda x, labels, which, out: (
        product(x, labels, [values[n].astype(x.dtype) for n in which], [names[n] for n in which], out, forward_mode)
        if which
        else contract([x], [labels], out)
    )
    with jax.named_scope("delta"):
        x = meet(x, p.x, before, met)
    y = contract([x, w0], [met, own], made, **how)
    with jax.named_scope("delta"):
        return meet(y, made, after, p.out).reshape(p.out_shape)


def _along(w: Weight, o: Operand, groups: Sequence[Labels | None], like: jax.Array) -> jax.Array:
    """A gain in the axes of an activation, `groups` saying which atoms of the weight each is (None for its own)."""
    parts = [g or () for g in groups]
    atoms = tuple(a for g in parts for a in g)
    value = lax.transpose(o.value(), [o.labels.index(a) for a in atoms if a in o.labels])
    value = value.reshape([w.size[a] if a in o.labels else 1 for a in atoms])
    held = [bool(set(g) & set(o.labels)) for g in parts]
    full = [w.size[a] if h else 1 for g, h in zip(parts, held, strict=True) for a in g]
    joined = [math.prod(w.size[a] for a in g) if h else 1 for g, h in zip(parts, held, strict=True)]
    return jnp.broadcast_to(value, full).reshape(joined).astype(like.dtype)


def _gained(w: Weight, gain: Sequence[Operand], groups: Sequence[Labels | None], x: jax.Array) -> jax.Array:
    """An activation times gains on axes that it shares with the weight."""
    for o in gain:
        with jax.named_scope("delta"):
            g = _along(w, o, groups, x)
            if (mesh := explicit_mesh([x])) is not None:  # it lives where the activation does, whatever its factors do
                spec = (*jax.typeof(x).sharding.spec, *[None] * x.ndim)
                there = PartitionSpec(*(s if n > 1 else None for n, s in zip(g.shape, spec, strict=False)))
                g = settled(g, NamedSharding(mesh, there))
            x = jnp.multiply(*_same_varying([x, g]))
    return x


def dot(
    w: Weight,
    x: jax.Array,
    left: bool,
    dimension_numbers: Any,
    *,
    precision: Any,
    preferred_element_type: Any,
    out_sharding: Any,
    forward_mode: bool,
    note: Note,
) -> jax.Array:
    """`dot_general` of an activation with an adapted weight on either side.

    A gain on axes that are contracted multiplies the activation, one on the others the result.
    """
    check_real(x)
    (lc, rc), (lb, rb) = dimension_numbers
    (wc, xc), (wb, xb) = ((lc, rc), (lb, rb)) if left else ((rc, lc), (rb, lb))
    pairs = dict(zip((*xc, *xb), (*wc, *wb), strict=True))
    x_labels, w_labels = _axis_labels(w, x.ndim, pairs)
    x_free = [n for n in range(x.ndim) if n not in pairs]
    w_free = [n for n in range(len(w.axes)) if n not in (*wc, *wb)]
    w_part, x_part = [f"w{n}" for n in w_free], [x_labels[n] for n in x_free]
    y_labels = (*(f"w{n}" for n in wb), *(w_part + x_part if left else x_part + w_part))
    group = {f"w{n}": g for n, g in enumerate(w.axes)}
    size = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(w_labels, w.shape, strict=True))
    y_shape = tuple(size[n] for n in y_labels)
    if any(len(w.axes[n]) > 1 for n in wb):
        raise Refusal("a batch axis joins several axes of the weight")

    x_groups, y_groups = ([group.get(n) for n in labels] for labels in (x_labels, y_labels))
    on = lambda o, groups: set(o.labels) <= {a for g in groups for a in g or ()}
    if not all(on(o, x_groups) or on(o, y_groups) for o in w.gain):
        w = w.multiplied()
    after = [o for o in w.gain if not on(o, x_groups)]
    x = _gained(w, [o for o in w.gain if on(o, x_groups)], x_groups, x)
    dense_flops = 2.0 * elements(y_shape) * math.prod(size[f"w{n}"] for n in wc)
    if w.plain and not w.terms:  # a gain alone
        note(Use("rescaled activations" if w.gain else "W0 made anew", 0.0, dense_flops))

        how = {"precision": precision, "preferred_element_type": preferred_element_type, "out_sharding": out_sharding}
        plain = lambda w0, x: lax.dot_general(*((w0, x) if left else (x, w0)), dimension_numbers, **how)
        *held, x = _same_varying([*w.held, x])
        y = w.given(lambda _: plain, x, held=held, forward_mode=forward_mode)
        return _gained(w, after, y_groups, y)

    compute = promoted(x.dtype, w.dtype)
    like = jax.ShapeDtypeStruct(w.shape, w.dtype)  # W0 in the planning: only its shape matters
    xs, products, operands, passed = [x], [], [], []
    for term in w.terms:
        branch = 0
        x_term, term = thinned(w, term, x)
        if x_term is not x:
            branch = len(xs)
            xs.append(x_term)
        met = functools.partial(
            _product,
            w,
            x_axes=list(zip(x_labels, x_groups, strict=True)),
            y_axes=list(zip(y_labels, y_groups, strict=True)),
            y_shape=y_shape,
            x_shape=x.shape,
            branch=branch,
        )
        values, names = w.operands(term, like)
        product = met(term, values, names)
        if product is None:  # the dot cuts through a flattened side
            term = w.flattened(term)
            values, names = w.operands(term, like)
            product = met(term, values, names)
        assert product is not None
        if product.base < 0:
            product, values = _combined(product, values, _sizes(w, values, names))
        elif not w.plain and _sides(product) is not None and explicit_mesh([x, *w.held, *_arrays(values)]) is None:
            count = len(w.held)
            x_term, *arrays = _same_varying([xs[branch].astype(compute), *w.held, *_arrays(values)])
            how = {"precision": precision, "preferred_element_type": preferred_element_type}
            through = lambda mode, p=product, how=how: functools.partial(_through, p, forward_mode=mode, **how)
            held, rest = arrays[:count], tuple(arrays[count:])
            passed.append(w.given(through, x_term, rest, held=held, forward_mode=forward_mode))
            continue
        products.append(product)
        operands += [v for n, v in enumerate(values) if n != product.base]
    if not products:
        note(Use("W0 between factors", dense_flops, dense_flops))
        y = functools.reduce(jnp.add, passed).astype(preferred_element_type or compute)
        return _gained(w, after, y_groups, y)
    made = Dot(
        x=x_labels,
        w=w_labels if w.plain else None,
        y=y_labels,
        products=tuple(products),
        left=left,
        dimension_numbers=dimension_numbers,
        compute=compute,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
        merged=False,
    )
    factored, dense = cost(made, xs, like, operands)
    full32 = x.dtype == w.dtype == jnp.float32 and preferred_element_type in (None, jnp.float32)
    # on a mesh W0 may be cut; so is the sum then, and what is made anew in the backward pass is gathered anew
    arrays = [x, *w.held, *operands]
    alone = explicit_mesh(arrays) is None and not spread(arrays)
    can_merge = w.plain and w.lazy is None and full32 and len(xs) == 1 and alone
    made = dataclasses.replace(made, merged=bool(can_merge and dense < factored))
    words = "merged" if made.merged else "factored"
    note(Use(words, dense if made.merged else factored, dense_flops))
    reads_base = w.plain or any(p.base >= 0 for p in products)
    held = w.held if reads_base else ()
    arrays = _same_varying([*held, *xs, *operands])
    held, arrays = arrays[: len(held)], arrays[len(held) :]
    xs, operands = tuple(arrays[: len(xs)]), tuple(arrays[len(xs) :])
    if reads_base:
        by = lambda mode: lambda w0, xs, operands: rule(made, mode)(xs, w0, operands)
        y = w.given(by, xs, operands, held=held, forward_mode=forward_mode)
    else:
        y = rule(made, forward_mode)(xs, None, operands)
    y = functools.reduce(lambda y, part: y + part.astype(y.dtype), passed, y)
    return _gained(w, after, y_groups, y)


def _arrays(values: Sequence[Any]) -> list[jax.Array]:
    """Without what only stands for W0."""
    return [v for v in values if not isinstance(v, jax.ShapeDtypeStruct)]


def product(
    x: jax.Array,
    x_labels: Labels,
    operands: Sequence[jax.Array],
    labels: Sequence[Labels],
    out: Labels,
    forward_mode: bool,
    precision: Any = None,
) -> jax.Array:
    """`contract` of an activation with factors, under the custom rule."""
    sizes = {
        n: s for a, ls in ((x, x_labels), *zip(operands, labels, strict=True)) for n, s in zip(ls, a.shape, strict=True)
    }
    shape = tuple(sizes[n] for n in out)
    p = Product(tuple(x_labels), x.shape, tuple(out), shape, tuple(map(tuple, labels)), (), ((), (), ()))
    made = Dot(tuple(x_labels), None, tuple(out), (p,), False, None, x.dtype, precision, None, None, False)
    x, *operands = _same_varying([x, *operands])
    return rule(made, forward_mode)((x,), None, tuple(operands))
