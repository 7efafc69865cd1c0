"""Contractions of labelled arrays: planned from static shapes, run as large dots.

The product of several operands is contracted pair by pair in the order that `opt_einsum` finds cheapest.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import TypeAlias, TypedDict

import jax
import jax.numpy as jnp
import opt_einsum
from jax import lax
from jax.sharding import AbstractMesh, NamedSharding
from jax.typing import DTypeLike

from jlora._algebra._mesh import explicit_mesh, reshaped, settled, sharding_of, specs_of
from jlora._algebra._words import Labels
from jlora._dtypes import promoted
from jlora._types import Dimensions, MeshAxes, Precision, Shape

Path: TypeAlias = tuple[tuple[int, ...], ...]  # which operands meet at each step, as `opt_einsum` numbers them

UNKNOWN = 1024  # rows that a plan counts on where `jax.export` leaves a size open


def countable(shape: Sequence[object]) -> tuple[int, ...]:
    """A shape to count with: symbolic sizes (`jax.export`) cannot be compared, and stand for `UNKNOWN` rows."""
    return tuple(n if isinstance(n, int) else UNKNOWN for n in shape)


def elements(shape: Sequence[object]) -> int:
    """How many elements an array has, as far as that is known."""
    return math.prod(countable(shape))


def plan(labels: tuple[Labels, ...], shapes: tuple[tuple[int, ...], ...], out: Labels) -> tuple[Path, float]:
    """The cheapest pairwise order and its FLOPs (a multiply-add counts two).

    Shapes may be symbolic in parts.
    """
    return _plan(labels, tuple(map(countable, shapes)), out)


@functools.lru_cache(maxsize=4096)  # some kilobytes each
def _plan(labels: tuple[Labels, ...], shapes: tuple[tuple[int, ...], ...], out: Labels) -> tuple[Path, float]:
    """`plan`, remembered.

    Where three or more operands have labels, scales multiply the smallest array that a step makes, never an operand. A
    factor that is cut over devices is so gathered once; a scaled copy of it would be gathered beside it.
    """
    scales = [n for n, ls in enumerate(labels) if not ls]
    wide = [n for n, ls in enumerate(labels) if ls]
    if scales and len(wide) > 2:
        path, flops = _plan(tuple(labels[n] for n in wide), tuple(shapes[n] for n in wide), out)
        return _with_scales(labels, shapes, out, scales, wide, path, flops)
    symbol = {x: opt_einsum.get_symbol(n) for n, x in enumerate(dict.fromkeys(x for ls in labels for x in ls))}
    word = lambda ls: "".join(symbol[x] for x in ls)
    equation = ",".join(map(word, labels)) + "->" + word(out)
    search = "optimal" if len(labels) <= 7 else "auto"
    path, info = opt_einsum.contract_path(equation, *shapes, shapes=True, optimize=search)
    return tuple(path), float(info.opt_cost)


def _with_scales(
    labels: tuple[Labels, ...],
    shapes: tuple[Shape, ...],
    out: Labels,
    scales: list[int],
    wide: list[int],
    path: Path,
    flops: float,
) -> tuple[Path, float]:
    """The path of the operands `wide`, and after its smallest result a step for each scale."""
    length = {x: n for ls, shape in zip(labels, shapes, strict=True) for x, n in zip(ls, shape, strict=True)}
    live, made = [(n, labels[n]) for n in wide], []
    for step, pair in enumerate(path):
        chosen = [live.pop(n) for n in sorted(pair, reverse=True)]
        keep = set(out).union(*(ls for _, ls in live))
        live.append((len(labels) + step, tuple({x for _, ls in chosen for x in ls} & keep)))
        made.append((math.prod(length[x] for x in live[-1][1]), step, tuple(n for n, _ in chosen)))
    size, narrowest, _ = min(made)
    later = lambda n: n + len(scales) * (n >= len(labels) + narrowest)  # what the scales make comes in between
    steps = [tuple(map(later, chosen)) for _, _, chosen in made]
    first = len(labels) + narrowest
    between = [(first + n, scale) for n, scale in enumerate(scales)]
    steps[narrowest + 1 : narrowest + 1] = between
    return tuple(opt_einsum.paths.ssa_to_linear(steps)), flops + len(scales) * size


class How(TypedDict):
    """How a dot sums: what `lax.dot_general` takes by these names."""

    precision: Precision
    preferred_element_type: DTypeLike | None


def _spread(a: jax.Array, labels: Labels, out: Labels) -> jax.Array:
    """`a` with its labels in the order of `out`, and axes of size one for those it lacks."""
    order = [labels.index(x) for x in out if x in labels]
    a = lax.transpose(a, order) if order != list(range(len(order))) else a
    missing = [n for n, x in enumerate(out) if x not in labels]
    return lax.expand_dims(a, missing) if missing else a


def _tall(la: Labels, a: tuple[int, ...], lb: Labels, b: tuple[int, ...], contracted: Labels) -> int:
    """How many leading axes two tall operands share, of which nothing stays, where the result is a small matrix."""
    narrow = lambda ls, shape: math.prod(n for x, n in zip(ls, shape, strict=True) if x not in contracted) <= 64
    if len(contracted) < 2 or not narrow(la, a) or not narrow(lb, b):
        return 0
    shared = 0
    while shared < len(contracted) - 1 and la[shared] == lb[shared] and la[shared] in contracted:
        shared += 1
    kept = math.prod(n for ls, s in ((la, a), (lb, b)) for x, n in zip(ls, s, strict=True) if x not in contracted)
    small = kept <= 2 * max(math.prod(a[shared:]), math.prod(b[shared:]))  # what a row makes, beside what it reads
    return shared if math.prod(a[:shared]) > 64 and small else 0


def _by_rows(lead: int, dimensions: Dimensions, how: How, a: jax.Array, b: jax.Array) -> jax.Array:
    """A dot of two tall operands as one small dot a row, and their sum: XLA's CPU dot has a slow path for long sums."""
    (ca, cb), _ = dimensions
    rows = tuple(range(lead))
    rest = lambda axes: tuple(n for n in axes if n >= lead)
    dtype = how["preferred_element_type"] or promoted(a.dtype, b.dtype)
    how = {**how, "preferred_element_type": promoted(dtype, jnp.float32)}  # as one dot would sum
    return jnp.sum(lax.dot_general(a, b, ((rest(ca), rest(cb)), (rows, rows)), **how), rows).astype(dtype)


def contract(
    arrays: Sequence[jax.Array],
    labels: Sequence[Labels],
    out: Labels,
    *,
    precision: Precision = None,
    preferred_element_type: DTypeLike | None = None,
    out_sharding: NamedSharding | None = None,
) -> jax.Array:
    """Sums the product of labelled arrays over every label that `out` lacks; the result's axes are `out`.

    No array is reshaped: free axes stay apart, so that activations sharded over batch and sequence stay where they
    are. Under an explicit mesh every label keeps the mesh axes of the operand that brings it.
    """
    live, out = list(zip(arrays, map(tuple, labels), strict=True)), tuple(out)
    mesh = explicit_mesh(arrays)
    steps = _Steps(out, mesh, specs_of(arrays, labels) if mesh is not None else {}, precision, out_sharding)
    path, _ = plan(tuple(ls for _, ls in live), tuple(tuple(a.shape) for a, _ in live), out)
    for step, pair in enumerate(path):
        final = step == len(path) - 1
        chosen = [live.pop(n) for n in sorted(pair, reverse=True)]
        keep = set(out).union(*(ls for _, ls in live))
        # from the last sum on, also where a scale comes after it: devices then add what is not rounded yet
        element = preferred_element_type if keep == set(out) else None
        if len(chosen) == 1:
            live.append(steps.summed(chosen[0], keep, element))
            continue
        (a, la), (b, lb) = chosen
        if (elements(a.shape), len(la)) < (elements(b.shape), len(lb)):  # activations first
            (a, la), (b, lb) = (b, lb), (a, la)
        meet = steps.dotted if any(x in lb and x not in keep for x in la) else steps.multiplied
        live.append(meet((a, la), (b, lb), keep, element, final))
    ((y, ls),) = live
    y = _spread(y, ls, tuple(out))
    return settled(y, out_sharding) if mesh is not None and out_sharding is not None else y


Labelled: TypeAlias = tuple[jax.Array, Labels]


@dataclasses.dataclass(frozen=True)
class _Steps:
    """The steps of one contraction: each takes labelled arrays, and the labels that must be kept, and gives one."""

    out: Labels
    mesh: AbstractMesh | None
    specs: dict[str, MeshAxes]
    precision: Precision
    out_sharding: NamedSharding | None

    def summed(self, one: Labelled, keep: set[str], element: DTypeLike | None) -> Labelled:
        """One array, over the labels that nobody needs."""
        a, la = one
        gone = tuple(n for n, x in enumerate(la) if x not in keep)
        return jnp.sum(a, gone, dtype=element) if gone else a, tuple(x for x in la if x in keep)

    def multiplied(
        self, one: Labelled, other: Labelled, keep: set[str], element: DTypeLike | None, final: bool
    ) -> Labelled:
        """Two arrays that share no label to sum over."""
        (a, la), (b, lb) = one, other
        result = la + tuple(x for x in lb if x not in la)
        if final and set(result) == set(self.out):
            result = self.out
        if self.mesh is not None:  # each operand gives up a mesh axis that the product has elsewhere
            own = dict(zip(result, sharding_of(self.mesh, self.specs, result).spec, strict=True))
            a, b = settled(a, sharding_of(self.mesh, own, la)), settled(b, sharding_of(self.mesh, own, lb))
        dtype = promoted(a.dtype, b.dtype)  # a scale behind a sum that is not rounded yet
        return _spread(a.astype(dtype), la, result) * _spread(b.astype(dtype), lb, result), result

    def dotted(
        self, one: Labelled, other: Labelled, keep: set[str], element: DTypeLike | None, final: bool
    ) -> Labelled:
        """Two arrays in a dot, in the order that leaves least to transpose."""
        (a, la), (b, lb) = one, other
        contracted = tuple(x for x in la if x in lb and x not in keep)
        free_a, free_b = ([x for x in p if x not in q] for p, q in ((la, lb), (lb, la)))
        ours = bool(free_a and free_b) and set(free_a + free_b) <= set(self.out)
        if ours and self.out.index(free_b[0]) < self.out.index(free_a[0]):
            (a, la), (b, lb) = (b, lb), (a, la)  # the result needs no transposition, nor does the wide operand
        batch = tuple(x for x in la if x in lb and x in keep)
        result = batch + tuple(x for x in la if x not in lb) + tuple(x for x in lb if x not in la)
        index = lambda ls, xs: [ls.index(x) for x in xs]
        sharding = None
        if self.mesh is not None:
            given = final and self.out_sharding is not None and result == self.out
            sharding = self.out_sharding if given else sharding_of(self.mesh, self.specs, result)
        dimensions = (
            (index(la, contracted), index(lb, contracted)),
            (index(la, batch), index(lb, batch)),
        )
        how: How = {"precision": self.precision, "preferred_element_type": element}
        shape = lambda x: countable(x.shape)
        lead = 0 if batch or self.mesh is not None else _tall(la, shape(a), lb, shape(b), contracted)
        if not lead:
            return lax.dot_general(a, b, dimensions, out_sharding=sharding, **how), result
        by_rows = functools.partial(_by_rows, lead, dimensions, how)
        whole = functools.partial(lax.dot_general, dimension_numbers=dimensions, **how)
        return lax.platform_dependent(a, b, cpu=by_rows, default=whole), result


@dataclasses.dataclass(frozen=True)
class Regrouped:
    """An array with its axes split, transposed, and joined or split again; `labels` are those of the result."""

    labels: Labels
    split: tuple[int, ...]
    order: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, a: jax.Array) -> jax.Array:
        return reshaped(lax.transpose(reshaped(a, self.split), self.order), self.shape)

    def back(self, a: jax.Array, shape: tuple[int, ...]) -> jax.Array:
        """The inverse of `of`."""
        a = reshaped(a, [self.split[n] for n in self.order])
        return reshaped(lax.transpose(a, [self.order.index(n) for n in range(len(self.order))]), shape)
