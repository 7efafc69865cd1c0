"""The custom rule of an adapted dot, with gradients written by hand.

Gradients come from the same equation: the gradient of one operand is the contraction of all the others and the
cotangent onto its labels, planned anew. So the gradient of a narrow factor is one dot over all free axes, with the
narrow operand first. Autodiff would transpose `x @ a` instead, and on CPU that dot copies all of x.

W' below is W0 + dW, where that is made.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding
from jax.typing import DTypeLike

from jlora._algebra._contract import Regrouped, contract, plan
from jlora._algebra._mesh import explicit_mesh, reshaped, settled
from jlora._algebra._words import Labels
from jlora._types import Dimensions, DType, Precision, Shaped, Value

Arrays: TypeAlias = tuple[jax.Array, ...]
Residuals: TypeAlias = tuple[Arrays, jax.Array | None, Arrays]
"""What the backward pass needs: the activations, W0, the operands of all products."""

Owed: TypeAlias = tuple[list[jax.Array | None], jax.Array | None, list[jax.Array]]
"""Gradients: of the activations (None where the product has no part in it), of W0, of the operands."""


@dataclasses.dataclass(frozen=True)
class Product:
    """One network as it meets an activation: `y[out] += sum x[x] * prod operands[labels]`.

    Attributes:
      x: labels of the activation; `x_shape` is the shape it is given for that (contracted axes may be split).
      out: labels of the result, with shape `out_shape`.
      operands: labels of each operand.
      dense: labels of the network contracted to a matrix, and how that becomes the weight's own axes: the order of
        its labels, then (shape, permutation, shape).
      branch: which of the activations it takes (dropout gives a branch its own).
      base: the place among its operands of W0 itself, -1 for none, and how W0 becomes that operand.
    """

    x: Labels
    x_shape: tuple[int, ...]
    out: Labels
    out_shape: tuple[int, ...]
    operands: tuple[Labels, ...]
    dense: Labels
    dense_shape: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    branch: int = 0
    base: int = -1
    view: Regrouped | None = None


@dataclasses.dataclass(frozen=True)
class Written:
    """A dot as the model wrote it: the parameters of its `dot_general`, and on which side the weight stands."""

    left: bool = False  # the weight is the dot's left operand
    dimension_numbers: Dimensions = (((), ()), ((), ()))
    precision: Precision = None
    preferred_element_type: DTypeLike | None = None
    out_sharding: NamedSharding | None = None

    def __call__(self, x: jax.Array, w: jax.Array) -> jax.Array:
        return lax.dot_general(
            *((w, x) if self.left else (x, w)),
            self.dimension_numbers,
            precision=self.precision,
            preferred_element_type=self.preferred_element_type,
            out_sharding=self.out_sharding,
        )


@dataclasses.dataclass(frozen=True)
class Dot:
    """`y = x . (W0 + sum of products)`, W0 left out where `w` is None.

    `x`, `w` and `y` are the axis labels of the dot as the model wrote it; `merged` says that the products are
    contracted to a matrix and added to W0 inside the rule.
    """

    x: Labels
    w: Labels | None
    y: Labels
    products: tuple[Product, ...]
    written: Written
    compute: DType  # the dtype that factors are cast to: the activation's
    merged: bool


def matrix(product: Product, operands: Sequence[jax.Array], dtype: DTypeLike, precision: Precision = None) -> jax.Array:
    """The dense dW of one network, in the weight's own axes."""
    operands = [a.astype(dtype) for a in operands]
    flat = contract(operands, product.operands, product.dense, precision=precision)
    first, order, last = product.dense_shape
    flat = reshaped(flat, first)
    flat = lax.transpose(flat, order) if order != tuple(range(len(order))) else flat
    return reshaped(flat, last)


def _with_base(product: Product, base: jax.Array | None, operands: Sequence[jax.Array]) -> list[jax.Array]:
    """All operands of a product: where W0 is one of them, it stands in its place."""
    full = list(operands)
    if product.view is not None:
        assert base is not None
        full.insert(product.base, product.view.of(base))
    return full


def _chunks(dot: Dot, operands: Sequence[Value]) -> list[list[Value]]:
    """The flat list of operands, cut by product."""
    rest, cut = list(operands), []
    for p in dot.products:
        n = len(p.operands) - (p.base >= 0)
        cut.append(rest[:n])
        rest = rest[n:]
    return cut


def _merge(dot: Dot, base: jax.Array, operands: Sequence[jax.Array]) -> jax.Array:
    """W0 + dW."""
    for p, ops in zip(dot.products, _chunks(dot, operands), strict=True):
        base = base + matrix(p, _with_base(p, base, ops), base.dtype, dot.written.precision)
    return base


def _delta(dot: Dot, xs: Sequence[jax.Array], base: jax.Array | None, operands: Sequence[jax.Array]) -> jax.Array:
    """x . dW, factored."""
    y = None
    for p, ops in zip(dot.products, _chunks(dot, operands), strict=True):
        x = reshaped(xs[p.branch].astype(dot.compute), p.x_shape)
        full = [a.astype(dot.compute) for a in _with_base(p, base, ops)]
        whole = _shape([x, *full], [p.x, *p.operands], p.out) == p.out_shape
        dy = contract(
            [x, *full],
            [p.x, *p.operands],
            p.out,
            precision=dot.written.precision,
            preferred_element_type=dot.written.preferred_element_type,
            out_sharding=dot.written.out_sharding if whole else None,
        )
        dy = reshaped(dy, p.out_shape)
        y = dy if y is None else y + dy
    assert y is not None
    return y


def _like(array: jax.Array) -> NamedSharding | None:
    """Where the gradient of an array must live under an explicit mesh."""
    return jax.typeof(array).sharding if explicit_mesh([array]) is not None else None


def _gradients(
    dot: Dot, xs: Sequence[jax.Array], base: jax.Array | None, operands: Sequence[jax.Array], dy: jax.Array
) -> Owed:
    """The gradients that come from the products. Of a merged dot that of the activation is left out: it is dy W'^T."""
    run = functools.partial(contract, precision=dot.written.precision)
    dxs: list[jax.Array | None] = [None] * len(xs)
    dbase = None
    grads: list[jax.Array] = []
    for p, ops in zip(dot.products, _chunks(dot, operands), strict=True):
        x = reshaped(xs[p.branch].astype(dot.compute), p.x_shape)
        full = [a.astype(dy.dtype) for a in _with_base(p, base, ops)]
        shape = _shape([x, *full], [p.x, *p.operands], p.out)
        g = reshaped(dy, shape)
        if not dot.merged:
            like = _like(x) if p.x_shape == xs[p.branch].shape else None
            dxs[p.branch] = _sum(
                dxs[p.branch], run([g, *full], [p.out, *p.operands], p.x, out_sharding=like), xs[p.branch]
            )
        place = 0
        for n, ls in enumerate(p.operands):
            rest = [m for m in range(len(full)) if m != n]
            target = base if n == p.base else ops[place]
            assert target is not None
            part = run(
                [x, g, *(full[m] for m in rest)],
                [p.x, p.out, *(p.operands[m] for m in rest)],
                ls,
                preferred_element_type=target.dtype,
                out_sharding=_like(target) if n != p.base else None,
            )
            if n == p.base:
                assert p.view is not None
                dbase = _sum(dbase, p.view.back(part, target.shape), target)
            else:
                grads.append(part.astype(target.dtype))
                place += 1
    return dxs, dbase, grads


def _parts(dot: Dot, x: jax.Array) -> int:
    """In how many runs of rows `_in_parts` takes an activation: 1 where a product needs none, or cannot be cut so."""
    flat = any(len(p.x) > len(dot.x) for p in dot.products)  # one axis of the activation is several labels
    reads_base = any(p.base >= 0 for p in dot.products)
    symbolic = not all(isinstance(n, int) for n in x.shape)  # a size that `jax.export` leaves open cannot be divided
    # A merged dot is on one device. Elsewhere a run of rows might have to be brought together first.
    if symbolic or not (dot.merged and flat and not reads_base and x.ndim > 1 and dot.x[0] == dot.y[0]):
        return 1
    rows = math.prod(n for label, n in zip(dot.x, x.shape, strict=True) if label in dot.y)
    return max(n for n in range(1, max(rows // 512, 1) + 1) if x.shape[0] % n == 0)


def _in_parts(dot: Dot, parts: int, xs: Arrays, base: jax.Array | None, operands: Arrays, dy: jax.Array) -> Owed:
    """`_gradients` of a merged dot as a sum over runs of rows.

    Between two factors of a Kronecker product stands an array as wide as the activation; in parts only some rows of it
    are there at once. On CPU a BERT's step under KronA takes a sixth less temporary memory, and no more time.
    """
    cut = lambda a: a.reshape(parts, a.shape[0] // parts, *a.shape[1:])
    less = lambda shape: (shape[0] // parts, *shape[1:])
    products = tuple(dataclasses.replace(p, x_shape=less(p.x_shape), out_shape=less(p.out_shape)) for p in dot.products)
    part = dataclasses.replace(dot, products=products)

    def add(total: list[jax.Array], rows: tuple[jax.Array, jax.Array]) -> tuple[list[jax.Array], None]:
        x, g = rows
        return [t + d for t, d in zip(total, _gradients(part, (x,), base, operands, g)[2], strict=True)], None

    total, _ = lax.scan(add, [jnp.zeros_like(a) for a in operands], (cut(xs[0]), cut(dy)))
    return [None] * len(xs), None, total


def _by_matrix(dot: Dot, xs: Arrays, base: jax.Array | None, operands: Arrays, dy: jax.Array) -> Owed:
    """`_gradients` of a merged dot by way of dW's own: one dot of activation and cotangent serves all operands."""
    run = functools.partial(contract, precision=dot.written.precision)
    assert dot.w is not None and base is not None
    g = run([xs[0], dy], [dot.x, dot.y], dot.w).astype(base.dtype)
    reads_base = any(p.base >= 0 for p in dot.products)

    def change(base: jax.Array | None, operands: Sequence[jax.Array]) -> jax.Array:
        cut = zip(dot.products, _chunks(dot, operands), strict=True)
        return sum(matrix(p, _with_base(p, base, ops), g.dtype, dot.written.precision) for p, ops in cut)  # type: ignore[return-value]

    _, pull = jax.vjp(change, base, list(operands))
    dbase, grads = pull(g)
    return [None] * len(xs), dbase if reads_base else None, grads


def _joined(dot: Dot) -> bool:
    """Whether some operand of a merged dot has all of both sides, as W0 has in HiRA.

    Each gradient would then begin with the one large dot of activation and cotangent.
    """
    return dot.merged and any(set(p.x) ^ set(p.out) <= set(ls) for p in dot.products for ls in p.operands)


def _owed(dot: Dot, xs: Arrays, base: jax.Array | None, operands: Arrays, dy: jax.Array) -> Owed:
    """`_gradients`, by the way that is cheapest."""
    whole = functools.partial(_gradients, dot)
    if _joined(dot):
        return _by_matrix(dot, xs, base, operands, dy)
    if (parts := _parts(dot, xs[0])) == 1:
        return whole(xs, base, operands, dy)
    return lax.platform_dependent(xs, base, operands, dy, cpu=functools.partial(_in_parts, dot, parts), default=whole)


def _shape(arrays: Sequence[jax.Array], labels: Sequence[Labels], out: Labels) -> tuple[int, ...]:
    """The shape of what a contraction of labelled arrays onto `out` gives."""
    size = {n: s for a, ls in zip(arrays, labels, strict=True) for n, s in zip(ls, a.shape, strict=True)}
    return tuple(size[n] for n in out)


def _sum(total: jax.Array | None, part: jax.Array, like: jax.Array) -> jax.Array:
    """One gradient more, in the shape and dtype of the array that it is of."""
    part = reshaped(part, like.shape).astype(like.dtype)
    return part if total is None else total + part


def _value(dot: Dot, xs: Arrays, base: jax.Array | None, operands: Arrays) -> jax.Array:
    """The dot. Work on the products is jitted apart, so that equal layers share one trace and one lowered function."""
    with jax.named_scope("delta"):
        change = _MERGE(dot, base, operands) if dot.merged else _DELTA(dot, xs, base, operands)
    if dot.merged:
        return dot.written(xs[0], change)
    if dot.w is None:
        return change
    assert base is not None
    y = dot.written(xs[0], base)  # exactly as the model wrote it, so that a zero delta changes no bit
    return y + _home(change.astype(y.dtype), y)


def _home(d: jax.Array, a: jax.Array) -> jax.Array:
    """`d` moved to where `a` lives. Under explicit axes a contraction over a flat side may leave it elsewhere."""
    return settled(d, jax.typeof(a).sharding) if explicit_mesh([a]) is not None else d


def _forward(dot: Dot, xs: Arrays, base: jax.Array | None, operands: Arrays) -> tuple[jax.Array, Residuals]:
    """Keeps the activation, W0 and the factors alone.

    To make narrow products and W' again costs less than to keep them, and under a scan a W' that is kept would be a
    second copy of the model.
    """
    return _value(dot, xs, base, operands), (xs, base, operands)


def _backward(dot: Dot, residuals: Residuals, dy: jax.Array) -> tuple[Arrays, jax.Array | None, Arrays]:
    xs, base, operands = residuals
    dy = dy.astype(dot.compute)
    with jax.named_scope("delta"):
        dxs, dbase, grads = _OWED(dot, xs, base, operands, dy)
    if dot.w is not None:
        assert base is not None
        # Behind this barrier the factor gradients come first, so that x is free before dx is made. And W' is made again
        # from operands that the compiler cannot take for those of the forward pass, or it would keep the W' of then.
        dy, grads, operands = lax.optimization_barrier((dy, grads, operands))
        with jax.named_scope("delta"):
            w = _MERGE(dot, base, operands) if dot.merged else base
        run = functools.partial(contract, precision=dot.written.precision)
        dx = run([dy, w.astype(dot.compute)], [dot.y, dot.w], dot.x, out_sharding=_like(xs[0]))
        dxs[0] = _sum(dxs[0], dx, xs[0])
        # The gradient of W0. `lift` asks for none, and XLA then drops this as dead code.
        dw = run([xs[0].astype(dot.compute), dy], [dot.x, dot.y], dot.w, out_sharding=_like(base))
        dbase = _sum(dbase, dw, base)
    dxs = [jnp.zeros_like(x) if d is None else _home(d, x) for x, d in zip(xs, dxs, strict=True)]
    return type(xs)(dxs), None if dbase is None or base is None else _home(dbase, base), type(operands)(grads)


# Jitted by the static `Dot`: equal layers share one trace. `jax.clear_caches` frees what JAX remembers of them.
_MERGE, _DELTA, _OWED = (jax.jit(f, static_argnums=0) for f in (_merge, _delta, _owed))
_custom = jax.custom_vjp(_value, nondiff_argnums=(0,))
_custom.defvjp(_forward, _backward)


def rule(dot: Dot, forward_mode: bool = False) -> Callable[[Arrays, jax.Array | None, Arrays], jax.Array]:
    """`f(xs, base, operands) -> y` for one adapted dot, as a custom rule unless `forward_mode`."""
    return functools.partial(_value if forward_mode else _custom, dot)


def flops(dot: Dot, xs: Sequence[Shaped], base: Shaped | None, operands: Sequence[Shaped]) -> tuple[float, float]:
    """FLOPs of the products' forward pass, factored and contracted to matrices."""
    factored = dense = 0.0
    for p, ops in zip(dot.products, _chunks(dot, operands), strict=True):
        shapes = [tuple(a.shape) for a in ops]
        if p.view is not None:
            shapes.insert(p.base, p.view.shape)
        x_shape = p.x_shape
        factored += plan((p.x, *p.operands), (x_shape, *shapes), p.out)[1]
        dense += plan(p.operands, tuple(shapes), p.dense)[1] + math.prod(p.dense_shape[-1])
    return factored, dense
