"""How an adapted weight meets an activation: ragged dots of experts, and convolutions."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jlora._contract import elements
from jlora._dropout import thinned
from jlora._network import Labels
from jlora._ops import Note, Refusal, Use, check_real, product
from jlora._weight import Weight

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
    bind: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> jax.Array:
    """`ragged_dot_general` of rows `x (t, in)` with one matrix a group `W (g, in, out)`."""
    check_real(x)
    d = params["ragged_dot_dimension_numbers"]
    (xc, wc), (xb, wb) = d.dot_dimension_numbers
    if x.ndim != 2 or tuple(xc) != (1,) or xb or wb or d.lhs_ragged_dimensions != (0,) or len(wc) != 1:
        raise Refusal("a ragged dot in another form than rows times (group, in, out)")
    if len(d.rhs_group_dimensions) != 1 or len(w.axes) != 3 or any(len(g) != 1 for g in w.axes):
        raise Refusal("a ragged dot over joined axes")
    if w.gain or not w.plain:
        raise Refusal("a ragged dot under a gain")
    group = w.axes[d.rhs_group_dimensions[0]][0]
    y = w.given(lambda _: bind, x, group_sizes, forward_mode=forward_mode)
    flops = 0.0
    for t in w.terms:
        h, t = thinned(w, t, x)
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
    note(Use("factored, by group", flops, 2.0 * elements(y.shape) * x.shape[1]))
    return y


# --- convolutions -------------------------------------------------------------------------------------------------


def conv(
    w: Weight,
    x: jax.Array,
    params: Mapping[str, Any],
    bind: Callable[[jax.Array, jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> jax.Array:
    """`conv_general_dilated` with an adapted kernel: one factor holds the window, the others mix channels."""
    check_real(x)
    w = w.multiplied()
    if params["batch_group_count"] != 1:
        raise Refusal("a convolution with batch groups")
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    out_axis, in_axis, *window_axes = numbers.rhs_spec
    if any(len(w.axes[n]) > 1 for n in window_axes):
        raise Refusal("a convolution over joined window axes")
    window = [w.axes[n][0] if w.axes[n] else None for n in window_axes]
    y = w.given(lambda _: bind, x, forward_mode=forward_mode) if w.plain else None
    flops = 0.0
    for t in w.terms:
        xt, t = thinned(w, t, x)
        if any(k is not None and not t.simple(k) for k in window):
            raise Refusal("a convolution whose window is not labelled")
        runs_in, runs_out = t.through([w.axes[in_axis]]), t.through([w.axes[out_axis]])
        if runs_in is None or runs_out is None:
            raise Refusal("a convolution across a flattened side")
        like = jax.ShapeDtypeStruct(w.shape, w.dtype)
        held, names = w.operands(t, like)
        values: list[Any] = [v if isinstance(v, jax.ShapeDtypeStruct) else v.astype(x.dtype) for v in held]
        if any(o.is_base for o in t.operands):
            rest = [n for n, o in enumerate(t.operands) if not o.is_base]
            vectors, labels = [values[n] for n in rest], [names[n] for n in rest]
            dy = w.given(lambda _: bind, x, forward_mode=forward_mode)
            dy = _rescaled(dy, vectors, labels, runs_out[0][1], numbers, forward_mode)
            y = dy if y is None else y + dy
            continue
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
        y = dy if y is None else y + dy.reshape(y.shape).astype(y.dtype)
        flops += cost
    assert y is not None
    dense = 2.0 * elements(y.shape) * math.prod(w.shape) / w.shape[out_axis]
    note(Use("factored convolution", flops, dense))
    return y


def _rescaled(
    y: jax.Array, values: list[jax.Array], names: list[Labels], outs: Labels, numbers: Any, forward_mode: bool
) -> jax.Array:
    """The model's own convolution times vectors on its output channels."""
    if not all(set(ls) <= set(outs) for ls in names):
        raise Refusal("a convolution with a product of W0 and more than output channels")
    feature = numbers.out_spec[1]
    size = {n: s for a, ls in zip(values, names, strict=True) for n, s in zip(ls, a.shape, strict=True)}
    if not set(outs) <= set(size):
        raise Refusal("a convolution with a gain that lacks an output axis")
    axes = [f"y{n}" for n in range(y.ndim)]
    labels = (*axes[:feature], *outs, *axes[feature + 1 :])
    split = y.reshape(*y.shape[:feature], *(size[o] for o in outs), *y.shape[feature + 1 :])
    return product(split, labels, values, names, labels, forward_mode).reshape(y.shape)


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
    values, names = _chain(values, names)
    size = {n: s for a, ls in zip(values, names, strict=True) for n, s in zip(ls, a.shape, strict=True)}
    if not {*ins, *outs, *filter(None, window)} <= set(size):
        raise Refusal("a convolution along an axis that no factor carries; its letters are wrong")
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
    if any(set(names[n]) & {*ins, *filter(None, window)} for n in rest if n not in before):
        raise Refusal("a convolution whose input side is spread over several factors")
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
    cost = 2.0 * elements(h.shape) * n_in * math.prod(size[k] for k in window if k)
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
