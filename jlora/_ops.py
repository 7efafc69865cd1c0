"""How an adapted weight meets an activation: dots, ragged dots, convolutions, row lookups.

Each function takes the operation's own parameters and returns the result, or `Refusal` with a reason where labels
cannot say it; the weight is then made dense. None of them knows what a jaxpr is.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._contract import Dot, Product, cost, explicit_mesh, rule
from jlora._network import Labels
from jlora._weight import Term, Weight


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
    """Whether at most one axis is no stack axis: made dense, it costs nothing."""
    return sum(not a.startswith("s") for a in w.atoms) <= 1


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


def _same_varying(arrays: Sequence[Any]) -> list[Any]:
    """Inside shard_map: every array made varying over the mesh axes that any of them varies over."""
    vma = [getattr(jax.typeof(a), "vma", frozenset()) for a in arrays]
    union = frozenset().union(*vma)
    return [
        a if v == union else lax.pcast(a, tuple(sorted(union - v)), to="varying")
        for a, v in zip(arrays, vma, strict=True)
    ]


def fold(key: jax.Array, data: Any) -> jax.Array:
    """`fold_in` for a stack of keys."""
    f = jax.random.fold_in
    for _ in range(key.ndim):
        f = jax.vmap(f, in_axes=(0, None))
    return f(key, data)


def _dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
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
    x_axes: Sequence[tuple[str, Labels | None]],
    y_axes: Sequence[tuple[str, Labels | None]],
    y_shape: tuple[int, ...],
    x_shape: tuple[int, ...],
    branch: int,
) -> Product | None:
    """How one term meets the activation. Axes are `(label, atoms)`, the atoms None for the activation's free axes."""
    sizes = _sizes(w, values, names)

    def read(axes: Sequence[tuple[str, Labels | None]], shape: tuple[int, ...]) -> Any:
        labels: list[str] = []
        split: list[int] = []
        n = 0
        while n < len(axes):
            name, group = axes[n]
            if group is None:
                labels.append(name)
                split.append(shape[n])
                n += 1
                continue
            run = [g for _, g in axes[n:]]
            stop = next((m for m, g in enumerate(run) if g is None), len(run))
            for count in range(1, stop + 1):  # the shortest run of axes that is a run of whole blocks
                runs = term.through(run[:count])  # type: ignore[arg-type]
                if runs is not None and len(runs) == 1:
                    made = runs[0][1]
                    labels += made
                    split += [sizes[x] for x in made]
                    n += count
                    break
            else:
                return None
        return tuple(labels), tuple(split)

    x, y = read(x_axes, x_shape), read(y_axes, y_shape)
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
        base_shape=tuple(w.size[a] for a in w.atoms) if base >= 0 else (),
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
    if any(w.axes[n] and sum(len(g) for g in (w.axes[n],)) > 1 for n in wb):
        raise Refusal("a batch axis joins several axes of the weight")

    xs, products, operands = [x], [], []
    for term in w.terms:
        branch = 0
        if term.dropout and key is not None:
            branch = len(xs)
            xs.append(_dropout(x, term.dropout, key))
        for attempt in (term, None):
            term = w.flattened(term) if attempt is None else term
            values, names = w.operands(term)
            product = _product(
                w,
                term,
                values,
                names,
                [(n, group.get(n)) for n in x_labels],
                [(n, group.get(n)) for n in y_labels],
                y_shape,
                x.shape,
                branch,
            )
            if product is not None:
                break
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
    words = "merged in the rule" if made.merged else "factored"
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
    made = Dot(tuple(x_labels), None, tuple(out), (p,), False, x.dtype, precision, None, None, False)
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
        keep = {k: params[k] for k in ("indices_are_sorted", "unique_indices", "mode", "fill_value")}
        return lax.gather(a, indices, numbers, sizes, **keep)

    base = bind(w.base)
    if count == 0:
        return w.along(atom, base, rows, drop=True).replace(axes=tuple(g for n, g in enumerate(w.axes) if n != axis))
    if not all(t.simple(atom) for t in w.terms) or not w.plain:
        raise Refusal("a lookup in a weight whose rows are not labelled")
    batch = tuple(f"row{n}" for n in range(count))
    others = [g for n, g in enumerate(w.axes) if n != axis]
    y = base
    flops = 0.0
    for t in w.terms:
        values, names = w.operands(t)
        runs = t.through(others)
        if runs is None or any(o.is_base for o in t.operands):
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
    note(Use("rows of the factors", flops, 0.0))
    return y


# --- ragged dots (mixtures of experts) ----------------------------------------------------------------------------


def _chain(values: list[jax.Array], names: list[Labels]) -> tuple[list[jax.Array], list[Labels]]:
    """Multiplies every operand whose labels another one has into that one: scalars, diagonals, gates."""
    order = sorted(range(len(values)), key=lambda n: len(names[n]))
    live = [(values[n], names[n]) for n in order]
    done: list[tuple[jax.Array, Labels]] = []
    for n, (a, ls) in enumerate(live):
        hosts = [m for m in range(n + 1, len(live)) if set(ls) <= set(live[m][1])]
        if not hosts:
            done.append((a, ls))
            continue
        m = hosts[0]
        b, lb = live[m]
        spread = lax.transpose(a, [ls.index(x) for x in lb if x in ls]) if a.ndim > 1 else a
        spread = lax.expand_dims(spread, [k for k, x in enumerate(lb) if x not in ls])
        live[m] = (spread * b, lb)
    return [a for a, _ in done], [ls for _, ls in done]


def ragged(
    w: Weight,
    x: jax.Array,
    group_sizes: jax.Array,
    params: Mapping[str, Any],
    bind: Callable[[jax.Array], jax.Array],
    note: Note,
) -> jax.Array:
    """`ragged_dot_general` of rows `x (t, in)` with one matrix a group `W (g, in, out)`."""
    d = params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, wb) = d.dot_dimension_numbers
    if x.ndim != 2 or tuple(xc) != (1,) or xb or wb or d.lhs_ragged_dimensions != (0,) or len(wc) != 1:
        raise Refusal("a ragged dot in another form than rows times (group, in, out)")
    if len(d.rhs_group_dimensions) != 1 or len(w.axes) != 3 or any(len(g) != 1 for g in w.axes):
        raise Refusal("a ragged dot over joined axes")
    if not w.plain:
        raise Refusal("a ragged dot under a gain")
    group = w.axes[d.rhs_group_dimensions[0]][0]
    y = bind(w.base)
    flops = 0.0
    for t in w.terms:
        values, names = w.operands(t)
        runs = t.through([w.axes[wc[0]]])
        out_axis = next(n for n in range(3) if n not in (wc[0], d.rhs_group_dimensions[0]))
        ends = t.through([w.axes[out_axis]])
        if (
            runs is None
            or ends is None
            or len(runs[0][1]) != 1
            or len(ends[0][1]) != 1
            or any(o.is_base for o in t.operands)
        ):
            raise Refusal("a ragged dot across a flattened side")
        label, end = runs[0][1][0], ends[0][1][0]
        values, names = _chain([v.astype(x.dtype) for v in values], list(names))
        todo = list(zip(values, names, strict=True))
        h = x
        with jax.named_scope("delta"):
            while todo:
                found = next((n for n, (_, ls) in enumerate(todo) if label in ls), None)
                if found is None:
                    raise Refusal("a ragged dot with a network that is no chain")
                a, ls = todo.pop(found)
                rest = [n for n in ls if n not in (group, label)]
                if len(rest) != 1:
                    raise Refusal("a ragged dot with a network that is no chain")
                order = [ls.index(n) for n in (group, label, *rest) if n in ls]
                a = lax.transpose(a, order)
                flops += 2.0 * h.shape[0] * a.shape[-1] * a.shape[-2]
                h = lax.ragged_dot(h, a, group_sizes) if group in ls else h @ a
                label = rest[0]
        if label != end:
            raise Refusal("a ragged dot with a network that is no chain")
        y = y + h.astype(y.dtype)
    note(Use("factored, by group", flops, 2.0 * math.prod(y.shape) * x.shape[1]))
    return y


# --- convolutions -------------------------------------------------------------------------------------------------


def conv(
    w: Weight,
    x: jax.Array,
    params: Mapping[str, Any],
    bind: Callable[[jax.Array], jax.Array],
    forward_mode: bool,
    key: Any,
    note: Note,
) -> jax.Array:
    """`conv_general_dilated` with an adapted kernel: one factor holds the window, the others mix channels."""
    if params["batch_group_count"] != 1:
        raise Refusal("a convolution with batch groups")
    if not w.plain:
        raise Refusal("a convolution under a gain")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    if any(len(w.axes[n]) > 1 for n in window_axes):
        raise Refusal("a convolution over joined window axes")
    window = [w.axes[n][0] if w.axes[n] else None for n in window_axes]
    y = bind(w.base)
    flops = 0.0
    for t in w.terms:
        if any(k is not None and not t.simple(k) for k in window) or any(o.is_base for o in t.operands):
            raise Refusal("a convolution whose window is not labelled")
        runs_in, runs_out = t.through([w.axes[in_axis]]), t.through([w.axes[out_axis]])
        if runs_in is None or runs_out is None:
            raise Refusal("a convolution across a flattened side")
        values, names = w.operands(t)
        values = [v.astype(x.dtype) for v in values]
        xt = _dropout(x, t.dropout, key) if t.dropout and key is not None else x
        with jax.named_scope("delta"):
            dy, cost = _conv_term(
                xt,
                values,
                names,
                window,
                runs_in[0][1],
                runs_out[0][1],
                params,
                numbers,
                groups,
                forward_mode,
            )
        y = y + dy.reshape(y.shape).astype(y.dtype)
        flops += cost
    dense = 2.0 * math.prod(y.shape) * math.prod(w.base.shape) / w.base.shape[out_axis]
    note(Use("factored convolution", flops, dense))
    return y


def _conv_term(
    x: jax.Array,
    values: list[jax.Array],
    names: list[Labels],
    window: list[str | None],
    ins: Labels,
    outs: Labels,
    params: Mapping[str, Any],
    numbers: Any,
    groups: int,
    forward_mode: bool,
) -> tuple[jax.Array, float]:
    size = {n: s for a, ls in zip(values, names, strict=True) for n, s in zip(ls, a.shape, strict=True)}
    held = [n for n, ls in enumerate(names) if any(k in ls for k in window if k)]
    if not held:  # a window of size one, indexed away: any operand of the input side may play the part
        held = [n for n, ls in enumerate(names) if set(ins) <= set(ls)][:1]
    if len(held) != 1 or not {k for k in window if k} <= set(names[held[0]]):
        raise Refusal("a convolution whose window is spread over several factors")
    core, core_labels = values[held[0]], names[held[0]]
    rest = [n for n in range(len(values)) if n != held[0]]
    precision = params["precision"]
    batch, feature, *space = numbers.lhs_spec

    # 1. channels before the window, where the core does not take the input itself
    inner = ins
    before: list[int] = []
    if not set(ins) <= set(core_labels):
        before = [n for n in rest if set(names[n]) & set(ins)]
        made = {m for n in before for m in names[n]} - set(ins)
        inner = tuple(m for m in core_labels if m in made)
        if set(ins) & set(core_labels) or made - set(core_labels):
            raise Refusal("a convolution whose input side is spread over several factors")
        axes = [f"x{n}" for n in range(x.ndim)]
        split = [*axes[:feature], "group", *ins, *axes[feature + 1 :]]
        shape = (*x.shape[:feature], groups, *(size[i] for i in ins), *x.shape[feature + 1 :])
        out = (*axes[:feature], "group", *inner, *axes[feature + 1 :])
        x = product(
            x.reshape(shape), tuple(split), [values[n] for n in before], [names[n] for n in before], out,
            forward_mode, precision,
        )  # fmt: skip
        x = x.reshape(*x.shape[:feature], -1, *x.shape[feature + 1 + len(inner) :])
    # 2. the window
    middle = tuple(m for m in core_labels if m not in inner and m not in window)
    n_in, n_out = math.prod(size[i] for i in inner), math.prod(size[m] for m in middle)
    order = [core_labels.index(m) for m in (*(k for k in window if k), *inner, *middle)]
    kernel = lax.transpose(core, order).reshape(*(size[k] if k else 1 for k in window), n_in, n_out)
    if groups > 1:
        kernel = jnp.broadcast_to(kernel[..., None, :], (*kernel.shape[:-1], groups, n_out))
        kernel = kernel.reshape(*kernel.shape[:-2], groups * n_out)
    spatial = len(window)
    to_spec = [0] * (spatial + 2)
    for n, axis in enumerate(numbers.rhs_spec):
        to_spec[axis] = spatial + 1 if n == 0 else spatial if n == 1 else n - 2
    keep = (
        "window_strides", "padding", "lhs_dilation", "rhs_dilation", "dimension_numbers", "feature_group_count",
        "batch_group_count", "precision",
    )  # fmt: skip
    h = lax.conv_general_dilated(x, lax.transpose(kernel, to_spec), **{k: params[k] for k in keep})
    cost = 2.0 * math.prod(h.shape) * n_in * math.prod(size[k] for k in window if k)
    # 3. channels after it
    feature = numbers.out_spec[1]
    after = [n for n in rest if n not in before]
    if not after and groups == 1 and middle == outs:
        return h, cost
    axes = [f"y{n}" for n in range(h.ndim)]
    shape = (*h.shape[:feature], groups, *(size[m] for m in middle), *h.shape[feature + 1 :])
    labels = (*axes[:feature], "group", *middle, *axes[feature + 1 :])
    operands, operand_labels = [values[n] for n in after], [names[n] for n in after]
    if groups > 1:
        if not outs or set(middle) & set(outs) or size[outs[0]] % groups:
            raise Refusal("a grouped convolution whose groups cut a label")
        cut = outs[0]  # groups lead the output channels
        for n, (a, ls) in enumerate(zip(operands, operand_labels, strict=True)):
            if cut in ls:
                k = ls.index(cut)
                operands[n] = a.reshape(*a.shape[:k], groups, size[cut] // groups, *a.shape[k + 1 :])
                operand_labels[n] = (*ls[:k], "group", *ls[k:])
    out = (*axes[:feature], "group", *outs, *axes[feature + 1 :])
    return product(h.reshape(shape), labels, operands, operand_labels, out, forward_mode, precision), cost
