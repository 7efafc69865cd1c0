"""How an adapted weight meets an activation: dots and row lookups (`_conv` has convolutions and ragged dots).

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

from jlora._contract import Dot, Product, cost, explicit_mesh, rule
from jlora._network import Labels
from jlora._term import Term
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
    return w.plain and all(
        sum(bool(o.labels) for o in t.operands) == 1 and all(t.simple(a) for a in w.atoms) for t in w.terms
    )


def _sizes(w: Weight, values: Sequence[jax.Array], labels: Sequence[Labels]) -> dict[str, int]:
    sizes = dict(w.size)
    for a, ls in zip(values, labels, strict=True):
        sizes.update(zip(ls, a.shape, strict=True))
    return sizes


def check_real(x: Any) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Refusal(f"an activation of dtype {x.dtype}")


def _varying(array: Any) -> frozenset[str]:
    """The manual mesh axes that an array varies over inside shard_map."""
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def _same_varying(arrays: Sequence[Any]) -> list[Any]:
    """Inside shard_map: every array made varying over the mesh axes that any of them varies over."""
    axes = [_varying(a) for a in arrays]
    union = frozenset().union(*axes)
    return [
        a if v == union else lax.pcast(a, tuple(sorted(union - v)), to="varying")
        for a, v in zip(arrays, axes, strict=True)
    ]


def fold(key: jax.Array, data: Any) -> jax.Array:
    """`fold_in` for a stack of keys."""
    f = jax.random.fold_in
    for _ in range(key.ndim):
        f = jax.vmap(f, in_axes=(0, None))
    return f(key, data)


def dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros_like(x))


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
        dense_shape=(first, tuple(order.index(a) for a in w.atoms), tuple(w.base.shape)),
        branch=branch,
        base=base,
        view=w.view(term.operands[base]) if base >= 0 else None,
    )


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
    key: Any,
    note: Note,
) -> jax.Array:
    """`dot_general` of an activation with an adapted weight on either side."""
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
    size = dict(zip(x_labels, x.shape, strict=True)) | dict(zip(w_labels, w.base.shape, strict=True))
    y_shape = tuple(size[n] for n in y_labels)
    if any(len(w.axes[n]) > 1 for n in wb):
        raise Refusal("a batch axis joins several axes of the weight")

    xs, products, operands = [x], [], []
    for term in w.terms:
        branch = 0
        if term.dropout and key is not None:
            branch = len(xs)
            xs.append(dropped(x, term.dropout, key))
        met = functools.partial(
            _product,
            w,
            x_axes=[(n, group.get(n)) for n in x_labels],
            y_axes=[(n, group.get(n)) for n in y_labels],
            y_shape=y_shape,
            x_shape=x.shape,
            branch=branch,
        )
        values, names = w.operands(term)
        product = met(term, values, names)
        if product is None:  # the dot cuts through a flattened side
            term = w.flattened(term)
            values, names = w.operands(term)
            product = met(term, values, names)
        assert product is not None
        products.append(product)
        operands += [v for n, v in enumerate(values) if n != product.base]
    compute = jnp.promote_types(x.dtype, w.base.dtype)
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
    factored, dense = cost(made, xs, w.base, operands)
    full32 = x.dtype == w.base.dtype == jnp.float32 and preferred_element_type in (
        None,
        jnp.float32,
    )
    can_merge = w.plain and full32 and len(xs) == 1 and explicit_mesh([x, w.base, *operands]) is None
    made = dataclasses.replace(made, merged=bool(can_merge and dense < factored))
    dense_flops = 2.0 * math.prod(y_shape) * math.prod(size[f"w{n}"] for n in wc)
    words = "merged" if made.merged else "factored"
    note(Use(words, dense if made.merged else factored, dense_flops))
    reads_base = w.plain or any(p.base >= 0 for p in products)
    arrays = _same_varying([*xs, w.base, *operands])
    xs, base, operands = arrays[: len(xs)], arrays[len(xs)], arrays[len(xs) + 1 :]
    return rule(made, forward_mode)(tuple(xs), base if reads_base else None, tuple(operands))


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


# --- rows of an embedding -----------------------------------------------------------------------------------------


def lookup(
    w: Weight,
    indices: jax.Array,
    params: Mapping[str, Any],
    bind: Callable[[jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> "jax.Array | Weight":
    """`gather` of whole rows along one axis."""
    d = params["dimension_numbers"]
    if len(d.start_index_map) != 1 or d.collapsed_slice_dims != d.start_index_map or d.operand_batching_dims:
        raise Refusal("a gather of more than rows")
    (axis,) = d.start_index_map
    shape = w.base.shape
    if tuple(params["slice_sizes"]) != tuple(1 if n == axis else s for n, s in enumerate(shape)):
        raise Refusal("a gather of parts of rows")
    if len(w.axes[axis]) != 1:
        raise Refusal("a gather along joined axes")
    (atom,) = w.axes[axis]
    count = indices.ndim - 1

    def rows(a: jax.Array, n: int) -> jax.Array:
        """Axis `n` replaced by the batch axes of the indices, which come first."""
        numbers = lax.GatherDimensionNumbers(tuple(range(count, count + a.ndim - 1)), (n,), (n,))
        sizes = tuple(1 if m == n else s for m, s in enumerate(a.shape))
        keep = {k: params[k] for k in ("indices_are_sorted", "unique_indices", "mode")}
        # a row that is not there is filled in W0 alone; its delta is zero, and so is its gradient
        return lax.gather(a, indices, numbers, sizes, fill_value=0, **keep)

    base = bind(w.base)
    if count == 0:
        return w.along(atom, base, rows, drop=True).replace(axes=tuple(g for n, g in enumerate(w.axes) if n != axis))
    if not all(t.simple(atom) for t in w.terms):
        raise Refusal("a lookup in a weight whose rows are not labelled")
    batch = tuple(f"row{n}" for n in range(count))
    others = [g for n, g in enumerate(w.axes) if n != axis]
    y = base if w.plain else jnp.zeros_like(base)
    flops = 0.0
    for t in w.terms:
        values, names = w.operands(t)
        runs = t.through(others)
        if runs is None:
            raise Refusal("a lookup across a flattened side")
        picked, labels = [], []
        for a, ls in zip(values, names, strict=True):
            if atom in ls:
                n = ls.index(atom)
                a, ls = rows(a, n), (*batch, *ls[:n], *ls[n + 1 :])
            picked.append(a.astype(base.dtype))
            labels.append(ls)
        lead = next(n for n, ls in enumerate(labels) if batch[0] in ls)
        x, x_labels = picked.pop(lead), labels.pop(lead)
        made = tuple(m for _, ms in runs for m in ms)
        with jax.named_scope("delta"):
            dy = product(x, x_labels, picked, labels, (*batch, *made), forward_mode)
        dy = dy.reshape(*dy.shape[:count], *(s for n, s in enumerate(shape) if n != axis))
        place = [n for n in range(base.ndim) if n not in d.offset_dims]
        order = [0] * base.ndim
        for n, m in enumerate((*place, *d.offset_dims)):
            order[m] = n
        y = y + lax.transpose(dy, order)
        flops += 2.0 * math.prod(dy.shape) * (x.shape[-1] if x.ndim > count else 1)
    # as in loralib, a lookup has no dropout: its input is no activation
    note(Use("rows of the factors" if w.key is None else "rows of the factors, no dropout", flops, 0.0))
    return y
