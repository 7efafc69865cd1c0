"""Entries of a weight, as data: which of its elements a sparse method trains, numbered through (in, out).

A number is held as four digits of eight bits. Frozen factors are floating point numbers, as an optimizer over a whole
adapter needs them, and a digit outlives what is done to all leaves of a tree alike: a cast to bfloat16, an average over
steps.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike

from jlora._trees._leaf import Leaf
from jlora._types import Key, Shape
from jlora.methods import _draws
from jlora.methods.base import check_sides

DIGITS = 4


def to_digits(numbers: jax.Array, dtype: DTypeLike = jnp.float32) -> jax.Array:
    """Numbers (..., n) below 2^31 as digits (..., n, 4), the lowest first; in float32 where the dtype is too narrow."""
    digits = jnp.stack([(numbers >> 8 * k) & 255 for k in range(DIGITS)], -1)
    return digits.astype(dtype if jnp.finfo(dtype).nmant >= 7 else jnp.float32)


def from_digits(digits: jax.Array) -> jax.Array:
    """The inverse of `held`: int32."""
    whole = lax.stop_gradient(digits).astype(jnp.int32)
    return functools.reduce(lambda total, k: total + (whole[..., k] << 8 * k), range(1, DIGITS), whole[..., 0])


def scattered(values: jax.Array, digits: jax.Array, sizes: tuple[int, ...]) -> jax.Array:
    """Zeros but for these values at these entries."""
    return jnp.zeros(math.prod(sizes), values.dtype).at[from_digits(digits)].add(values).reshape(sizes)


def seeded(seed: int, of: int) -> Callable[..., jax.Array]:
    """An initialiser: n distinct entries of `of`, the same from a seed wherever and whenever they are drawn."""
    return functools.partial(_seeded, seed, of)


def _seeded(seed: int, of: int, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
    return to_digits(_draws.entries(_draws.key(seed), shape[-2], of), dtype)


@dataclasses.dataclass(frozen=True)
class Random:
    """An initialiser: n distinct entries of `of`, others for each layer of a stack."""

    of: int

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
        *stack, n, _ = shape
        draw = lambda words: to_digits(_draws.entries((words[0], words[1]), n, self.of), dtype)
        for _ in stack:
            draw = jax.vmap(draw)
        return draw(jax.random.bits(key, (*stack, 2), jnp.uint32))


def check_entries(leaf: Leaf, n: int, what: str) -> None:
    """Raises unless a weight has n elements, and numbers of 31 bits for them."""
    check_sides(leaf)
    size = leaf.size("ik") * leaf.size("o")
    if n > size:
        raise ValueError(f"{what}, and a weight of (in, out) = {(leaf.size('ik'), leaf.size('o'))} has {size} elements")
    if size >= 2**31:
        raise ValueError(f"a weight of {size} elements has no entries that are numbered in 31 bits; exclude it")
