"""How an adapted weight meets an activation: ragged dots of experts, and convolutions."""

import collections
import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra._contract import elements, plan
from jlora._algebra._mesh import reshaped
from jlora._algebra._term import Term
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._forward._dropout import thinned
from jlora._forward._gates import met
from jlora._forward._ops import Note, Refusal, Spent, check_real, product
from jlora._types import DType, Precision, Shape


class RaggedParams(TypedDict):
    """What is read of the parameters of a `ragged_dot_general`, by JAX's own names."""

    ragged_dot_dimension_numbers: lax.RaggedDotDimensionNumbers
    precision: Precision


class ConvParams(TypedDict):
    """The parameters of a `conv_general_dilated`, by JAX's own names."""

    window_strides: Shape
    padding: Sequence[tuple[int, int]]
    lhs_dilation: Shape
    rhs_dilation: Shape
    dimension_numbers: lax.ConvDimensionNumbers
    feature_group_count: int
    batch_group_count: int
    precision: Precision


# --- ragged dots (mixtures of experts) ----------------------------------------------------------------------------


def _absorbed(
    values: list[jax.Array], names: list[Labels], kept: Collection[str]
) -> tuple[list[jax.Array], list[Labels]]:
    """Multiplies every operand whose labels another one has into that one: scalars, diagonals, gates.

    A label that one operand alone then has, of those that had it, is summed over, unless it is one of `kept`.
    """
    before = collections.Counter(x for ls in names for x in ls)
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
    counts = collections.Counter(x for _, ls in done for x in ls)
    for n, (a, ls) in enumerate(done):
        gone = tuple(k for k, x in enumerate(ls) if counts[x] == 1 < before[x] and x not in kept)
        done[n] = (jnp.sum(a, gone) if gone else a, tuple(x for k, x in enumerate(ls) if k not in gone))
    return [a for a, _ in done], [ls for _, ls in done]


def ragged(
    w: Weight,
    x: jax.Array,
    group_sizes: jax.Array,
    params: RaggedParams,
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
    if w.positional:
        raise Refusal("a ragged dot, whose rows are sorted by expert: they are no positions")
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
        values, names = _absorbed([v.astype(x.dtype) for v in values], list(names), (group, label, end))
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
    note(Spent("factored, by group", flops, 2.0 * elements(y.shape) * x.shape[1]))
    return y


# --- convolutions -------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Convolved:
    """A convolution as the model wrote it, and the axes of its kernel.

    Attributes:
      params: the parameters of `conv_general_dilated`.
      window: the label of each window axis, None where a window of size one was indexed away.
      ins: the labels that make the kernel's input channels in one term.
      outs: those of its output channels.
    """

    params: ConvParams
    window: tuple[str | None, ...]
    ins: Labels = ()
    outs: Labels = ()

    @property
    def numbers(self) -> lax.ConvDimensionNumbers:
        return self.params["dimension_numbers"]

    @property
    def groups(self) -> int:
        return self.params["feature_group_count"]

    @property
    def labels(self) -> Labels:
        """Of the window, where it has one."""
        return tuple(k for k in self.window if k)

    def __call__(self, x: jax.Array, kernel: jax.Array) -> jax.Array:
        """The same convolution with another kernel, `(window..., in, out)`."""
        spatial = len(self.window)
        to_spec = [0] * (spatial + 2)
        for n, axis in enumerate(self.numbers.rhs_spec):
            to_spec[axis] = spatial + 1 if n == 0 else spatial if n == 1 else n - 2
        p = self.params
        return lax.conv_general_dilated(
            x,
            lax.transpose(kernel, to_spec),
            p["window_strides"],
            p["padding"],
            lhs_dilation=p["lhs_dilation"],
            rhs_dilation=p["rhs_dilation"],
            dimension_numbers=p["dimension_numbers"],
            feature_group_count=p["feature_group_count"],
            batch_group_count=p["batch_group_count"],
            precision=p["precision"],
        )


@dataclasses.dataclass(frozen=True)
class Chain:
    """A term as three factors in turn: channels before the window, the core that holds it, channels behind it.

    Attributes:
      values, names: every operand and its labels.
      size: of every label.
      before, core, after: which operands are which.
      inner: the labels of the channels that enter the core.
      middle: those that leave it.
    """

    values: Sequence[jax.Array]
    names: Sequence[Labels]
    size: Mapping[str, int]
    before: Sequence[int]
    core: int
    after: Sequence[int]
    inner: Labels
    middle: Labels

    def total(self, labels: Labels) -> int:
        """The number of channels that labels make."""
        return math.prod(self.size[x] for x in labels)


def conv(
    w: Weight,
    x: jax.Array,
    params: ConvParams,
    bind: Callable[[jax.Array, jax.Array], jax.Array],
    forward_mode: bool,
    note: Note,
) -> jax.Array:
    """`conv_general_dilated` with an adapted kernel: one factor holds the window, the others mix channels."""
    check_real(x)
    w = w.multiplied()
    if params["batch_group_count"] != 1:
        raise Refusal("a convolution with batch groups")
    out_axis, in_axis, *window_axes = params["dimension_numbers"].rhs_spec
    if any(len(w.axes[n]) > 1 for n in window_axes):
        raise Refusal("a convolution over joined window axes")
    convolved = Convolved(params, tuple(w.axes[n][0] if w.axes[n] else None for n in window_axes))
    y = w.given(lambda _: bind, x, forward_mode=forward_mode) if w.plain else None
    if w.positional:  # a gate's positions are those of the result: what has one of its own has been summed by then
        made = jax.eval_shape(bind, jax.ShapeDtypeStruct(w.shape, w.dtype), x)
        labels = tuple(f"y{n}" for n in range(made.ndim))
        free = tuple(label for n, label in enumerate(labels) if n != convolved.numbers.out_spec[1])
        w = met(w, made, labels, free, "the result of a convolution")
    flops = 0.0
    for t in w.terms:
        xt, t = thinned(w, t, x)
        if any(not t.simple(k) for k in convolved.labels):
            raise Refusal("a convolution whose window is not labelled")
        runs_in, runs_out = t.through([w.axes[in_axis]]), t.through([w.axes[out_axis]])
        if runs_in is None or runs_out is None:
            raise Refusal("a convolution across a flattened side")
        here = dataclasses.replace(convolved, ins=runs_in[0][1], outs=runs_out[0][1])
        if any(o.is_base for o in t.operands):
            factors = _beside_base(w, t, x.dtype)
            dy = w.given(lambda _: bind, x, forward_mode=forward_mode)
            dy = _rescaled(dy, *factors, here, forward_mode)
            y = dy if y is None else y + dy
            continue
        with jax.named_scope("delta"):
            dy, cost = _conv_term(w, t, xt, here, forward_mode)
        y = dy if y is None else y + reshaped(dy, y.shape).astype(y.dtype)
        flops += cost
    assert y is not None
    dense = 2.0 * elements(y.shape) * math.prod(w.shape) / w.shape[out_axis]
    note(Spent("factored convolution", flops, dense))
    return y


def _beside_base(w: Weight, term: Term, dtype: DType) -> tuple[list[jax.Array], list[Labels]]:
    """The operands beside W0 of a term that it stands in, and their labels."""
    values, names = w.operands(term, jax.ShapeDtypeStruct(w.shape, w.dtype))
    rest = [n for n, o in enumerate(term.operands) if not o.is_base]
    return [values[n].astype(dtype) for n in rest], [names[n] for n in rest]


def _rescaled(
    y: jax.Array, values: list[jax.Array], names: list[Labels], convolved: Convolved, forward_mode: bool
) -> jax.Array:
    """The model's own convolution times vectors on its output channels."""
    outs = convolved.outs
    if not all(set(ls) <= set(outs) for ls in names):
        raise Refusal("a convolution with a product of W0 and more than output channels")
    size = {n: s for a, ls in zip(values, names, strict=True) for n, s in zip(ls, a.shape, strict=True)}
    if not set(outs) <= set(size):
        raise Refusal("a convolution with a gain that lacks an output axis")
    channels = convolved.numbers.out_spec[1]
    labels, split = _channels("y", y, channels, outs, size)
    return reshaped(product(split, labels, values, names, labels, forward_mode), y.shape)


def _channels(
    name: str, x: jax.Array, axis: int, labels: Labels, size: Mapping[str, int], groups: int | None = None
) -> tuple[Labels, jax.Array]:
    """An activation with its channel axis as these labels (behind the groups, where there are any), and all labels."""
    axes = [f"{name}{n}" for n in range(x.ndim)]
    front = () if groups is None else (groups,)
    split = reshaped(x, (*x.shape[:axis], *front, *(size[m] for m in labels), *x.shape[axis + 1 :]))
    return (*axes[:axis], *(("group",) if front else ()), *labels, *axes[axis + 1 :]), split


def _conv_term(
    w: Weight, term: Term, x: jax.Array, convolved: Convolved, forward_mode: bool
) -> tuple[jax.Array, float]:
    """One term's convolution in three steps, and its FLOPs."""
    values, names = w.operands(term)
    kept = (*convolved.ins, *convolved.outs, *convolved.labels)
    chain = _as_chain(*_absorbed([v.astype(x.dtype) for v in values], names, kept), convolved)
    x, before = _before(chain, x, convolved, forward_mode)
    h, window = _window(chain, x, convolved)
    y, after = _after(chain, h, convolved, forward_mode)
    return y, before + window + after


def _as_chain(values: Sequence[jax.Array], names: Sequence[Labels], convolved: Convolved) -> Chain:
    """Which operand holds the window, and which stand before it and behind it."""
    ins, window = convolved.ins, set(convolved.labels)
    size = {n: s for a, ls in zip(values, names, strict=True) for n, s in zip(ls, a.shape, strict=True)}
    if not {*ins, *convolved.outs, *window} <= set(size):
        raise Refusal("a convolution along an axis that no factor carries; its letters are wrong")
    held = [n for n, ls in enumerate(names) if window & set(ls)]
    if not held:  # a window of size one, indexed away: any operand of the input side may play the part
        held = [n for n, ls in enumerate(names) if set(ins) <= set(ls)][:1]
    if len(held) != 1 or not window <= set(names[held[0]]):
        raise Refusal("a convolution whose window is spread over several factors")
    core = names[held[0]]
    rest = [n for n in range(len(values)) if n != held[0]]
    inner, before = ins, list[int]()
    if not set(ins) <= set(core):  # the core does not take the input itself
        before = [n for n in rest if set(names[n]) & set(ins)]
        made = {m for n in before for m in names[n]} - set(ins)
        inner = tuple(m for m in core if m in made)
        if set(ins) & set(core) or made - set(core):
            raise Refusal("a convolution whose input side is spread over several factors")
    after = [n for n in rest if n not in before]
    if any(set(names[n]) & {*ins, *window} for n in after):
        raise Refusal("a convolution whose input side is spread over several factors")
    middle = tuple(m for m in core if m not in inner and m not in window)
    return Chain(values, names, size, before, held[0], after, inner, middle)


def _before(chain: Chain, x: jax.Array, convolved: Convolved, forward_mode: bool) -> tuple[jax.Array, float]:
    """Channels before the window; and the FLOPs."""
    if not chain.before:
        return x, 0.0
    axis = convolved.numbers.lhs_spec[1]
    labels, split = _channels("x", x, axis, convolved.ins, chain.size, convolved.groups)
    place = labels.index("group") + 1
    out = (*labels[:place], *chain.inner, *labels[place + len(convolved.ins) :])
    values, names = [chain.values[n] for n in chain.before], [chain.names[n] for n in chain.before]
    h, cost = _mixed(split, labels, values, names, out, convolved, forward_mode)
    channels = convolved.groups * chain.total(chain.inner)
    return reshaped(h, (*h.shape[:axis], channels, *h.shape[place + len(chain.inner) :])), cost


def _window(chain: Chain, x: jax.Array, convolved: Convolved) -> tuple[jax.Array, float]:
    """The window, each group of channels by the same core; and the FLOPs."""
    core, labels, groups = chain.values[chain.core], chain.names[chain.core], convolved.groups
    n_in, n_out = chain.total(chain.inner), chain.total(chain.middle)
    order = [labels.index(m) for m in (*convolved.labels, *chain.inner, *chain.middle)]
    window = [chain.size[k] if k else 1 for k in convolved.window]
    kernel = reshaped(lax.transpose(core, order), (*window, n_in, n_out))
    if groups > 1:
        kernel = jnp.broadcast_to(kernel[..., None, :], (*kernel.shape[:-1], groups, n_out))
        kernel = reshaped(kernel, (*kernel.shape[:-2], groups * n_out))
    h = convolved(x, kernel)
    return h, 2.0 * elements(h.shape) * n_in * math.prod(window)


def _after(chain: Chain, h: jax.Array, convolved: Convolved, forward_mode: bool) -> tuple[jax.Array, float]:
    """Channels behind the window; and the FLOPs."""
    groups, outs = convolved.groups, convolved.outs
    if not chain.after and groups == 1 and chain.middle == outs:
        return h, 0.0
    labels, split = _channels("y", h, convolved.numbers.out_spec[1], chain.middle, chain.size, groups)
    values, names = [chain.values[n] for n in chain.after], [chain.names[n] for n in chain.after]
    if groups > 1:
        if not outs or set(chain.middle) & set(outs) or chain.size[outs[0]] % groups:
            raise Refusal("a grouped convolution whose groups cut a label")
        cut = outs[0]  # groups lead the output channels
        for n, (a, ls) in enumerate(zip(values, names, strict=True)):
            if cut in ls:
                k = ls.index(cut)
                values[n] = reshaped(a, (*a.shape[:k], groups, chain.size[cut] // groups, *a.shape[k + 1 :]))
                names[n] = (*ls[:k], "group", *ls[k:])
    place = labels.index("group") + 1
    out = (*labels[:place], *outs, *labels[place + len(chain.middle) :])
    return _mixed(split, labels, values, names, out, convolved, forward_mode)


def _mixed(
    h: jax.Array,
    labels: Labels,
    values: Sequence[jax.Array],
    names: Sequence[Labels],
    out: Labels,
    convolved: Convolved,
    forward_mode: bool,
) -> tuple[jax.Array, float]:
    """Channels through some operands, position by position; and the FLOPs."""
    cost = 0.0
    if values:
        _, cost = plan((tuple(labels), *map(tuple, names)), (h.shape, *(a.shape for a in values)), tuple(out))
    return product(h, labels, values, names, out, forward_mode, convolved.params["precision"]), cost
