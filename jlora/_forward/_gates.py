"""Where the positions of a gate are when its weight meets an activation: the leading free axes of that."""

import dataclasses
import itertools
import math

import jax

from jlora._algebra._mesh import explicit_mesh, reshaped, settled, sharding_of, specs_of
from jlora._algebra._term import NoArray, Operand
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._types import Shape, Shaped


def met(w: Weight, x: Shaped, labels: Labels, free: Labels, what: str = "an activation") -> Weight:
    """The same weight, the positions of its gates under those labels of an activation that are free.

    So a gate is one more operand of a product, and no pass over the activation of its own.

    Args:
      w: the weight.
      x: the activation, or its shape.
      labels: of its axes.
      free: those of them that are no axes of the weight.
      what: what `x` is called in a message.

    Raises:
      NoArray: a gate whose leading axes are not the first of the free ones.
    """
    if not w.positional:
        return w
    shape = tuple(n for n, label in zip(x.shape, labels, strict=True) if label in free)

    def word(o: Operand) -> Operand:
        if not o.at:
            return o
        (value,) = o.arrays
        count = len(o.at)
        found = _fitted(value.shape[:count], free, shape)
        if found is None:
            raise _misfit(w.named, o.gate, value, count, f"{what} of shape {tuple(x.shape)}", shape)
        at, sizes = found
        value = reshaped(value, (*sizes, *value.shape[count:]))
        own = o.labels[count:]
        if isinstance(x, jax.Array) and (mesh := explicit_mesh([x])) is not None:  # it lives where the activation does
            value = settled(value, sharding_of(mesh, specs_of([x], [labels]), at + own))
        return dataclasses.replace(o, arrays=(value,), labels=at + own, at=at)

    terms = (dataclasses.replace(t, operands=tuple(map(word, t.operands))) for t in w.terms)
    return w.replace(terms=tuple(terms))


def spread(named: str, gate: str, value: jax.Array, shape: Shape) -> jax.Array:
    """A gate without letters as an array of these positions, with axes of size one where it is the same along them."""
    free = tuple(map(str, range(len(shape))))
    found = _fitted(value.shape, free, shape)
    if found is None:
        raise _misfit(named, gate, value, value.ndim, "an output", shape)
    at, sizes = found
    return reshaped(value, tuple(sizes[at.index(n)] if n in at else 1 for n in free))


def _misfit(named: str, gate: str, value: jax.Array, count: int, what: str, shape: Shape) -> NoArray:
    return NoArray(
        f"{named}: the gate {gate!r} of shape {value.shape} does not fit {what}: it has the positions "
        f"{value.shape[:count]}, and the free axes there are {shape}. They must be the first of these, where 1 stands "
        "for any size, or those joined or split by a reshape (each then in its full size). Give another gate, or leave "
        "this weight to no gated method (exclude=...)"
    )


def _fitted(positions: Shape, free: Labels, shape: Shape) -> tuple[Labels, Shape] | None:
    """The axes that positions are, and their sizes, without those of size one; None where they are none."""
    pairs = list(zip(positions, shape, strict=False))
    if len(positions) <= len(shape) and all(n == 1 or n == size for n, size in pairs):
        kept = [k for k, n in enumerate(positions) if n != 1]
        return tuple(free[k] for k in kept), tuple(shape[k] for k in kept)
    # a reshape that joins axes, or splits them: where each row of one shape begins, one of the other does
    ends = list(itertools.accumulate(positions, lambda a, b: a * b))
    count = next((k for k in range(1, len(shape) + 1) if math.prod(shape[:k]) == ends[-1]), 0)
    others = list(itertools.accumulate(shape[:count], lambda a, b: a * b))
    if count and (all(n in others for n in ends) or all(n in ends for n in others)):
        return free[:count], shape[:count]
    return None
