"""Random matrices P (D, d) with unit columns that are drawn where they are used, never stored.

    dense       P_kj ~ N(0, 1), each column divided by its norm
    sparse      ceil(sqrt(D)) entries +-1 / sqrt(ceil(sqrt(D))) a column, one in each of as many ranges of rows
    fastfood    H G Pi H B / sqrt(D sum G^2): signs B, Hadamard H, a permutation Pi, normal G; O(D log D) time. Its
                first D rows where D is no power of two: of unit length in the mean, each up to about 1 / sqrt(D)

`f(theta, place, size)` is P theta, `(size,)`; `place` (three whole numbers, traced) says which P.

Le, Sarlos and Smola, `Fastfood - Approximating Kernel Expansions in Loglinear Time
<https://arxiv.org/abs/1408.3060>`_, 2013. Li, Hastie and Church, `Very sparse random projections
<https://doi.org/10.1145/1150402.1150436>`_, 2006.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora.methods import _draws

BLOCK = 2**18  # entries of a dense P that are at hand at once


def root(place: jax.Array) -> _draws.RawKey:
    """The key of a projection: place folded in, number by number. In a loop, as every round compiles on its own."""
    place = jnp.asarray(place)
    start = jax.tree.map(lambda word: word + 0 * place[0].astype(jnp.uint32), _draws.key(0))  # varies as place does
    return lax.fori_loop(0, 3, lambda n, key: _draws.fold_in(key, place[n]), start)


def by_columns(theta: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """A few columns at a time; the backward pass draws them again, as their products with theta would be P itself."""
    key, d = root(place), theta.shape[0]
    width = min(d, max(1, BLOCK // size))
    blocks = -(-d // width)

    def column(n: jax.Array) -> jax.Array:
        x = _draws.normal(_draws.fold_in(key, n), (size,), theta.dtype)
        return x / jnp.linalg.norm(x)

    @jax.checkpoint
    def add(total: jax.Array, block: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        numbers, part = block
        return total + jnp.dot(part, jax.vmap(column)(numbers), precision=lax.Precision.HIGHEST), None

    numbers = lax.iota(jnp.uint32, blocks * width).reshape(blocks, width)
    parts = jnp.pad(theta, (0, blocks * width - d)).reshape(blocks, width)
    # zeros that depend on what is traced: under shard_map a carry must vary as the sum does
    return lax.scan(add, jnp.zeros(size, theta.dtype) + 0 * theta[0], (numbers, parts))[0]


def strata(size: int) -> tuple[np.ndarray, np.ndarray]:
    """First row and number of rows of each range: ceil(sqrt(size)) ranges, as equal as whole numbers can be."""
    count = math.isqrt(size - 1) + 1
    edges = np.arange(count + 1) * size // count
    return edges[:-1], np.diff(edges)


def sparse(theta: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """One entry a range: none falls on another, so that columns have norm one exactly."""
    starts, widths = strata(size)
    rows_key, signs_key = keys_of(place, 2)
    shape = (theta.shape[0], len(starts))
    inside = jnp.floor(_draws.unit(rows_key, shape, np.float32) * widths.astype(np.float32)).astype(jnp.int32)
    rows = starts.astype(np.int32) + jnp.minimum(inside, widths.astype(np.int32) - 1)
    signs = _draws.signs(signs_key, shape, theta.dtype)
    return jnp.zeros(size, theta.dtype).at[rows].add(signs * theta[:, None] / math.sqrt(len(starts)))


def fastfood(theta: jax.Array, place: jax.Array, size: int) -> jax.Array:
    """theta filled up with zeros to a power of two; of the result, the first `size` entries."""
    bits = (max(size, theta.shape[0]) - 1).bit_length()
    signs, order, gauss = draws(place, bits, theta.dtype)
    x = jnp.pad(theta, (0, 2**bits - theta.shape[0])) * signs
    y = hadamard(gauss * hadamard(x)[order])[:size]
    return y / jnp.sqrt(size * jnp.sum(gauss**2))


def draws(place: jax.Array, bits: int, dtype: np.dtype) -> tuple[jax.Array, jax.Array, jax.Array]:
    """B, Pi and G of 2^bits entries."""
    signs, order, gauss = keys_of(place, 3)
    n = 2**bits
    return _draws.signs(signs, (n,), dtype), permutation(order, bits), _draws.normal(gauss, (n,), dtype)


def keys_of(place: jax.Array, count: int) -> list[_draws.RawKey]:
    """Keys for what is drawn at one place, folded in side by side: one loop for all of them."""
    first, second = _draws.fold_in(root(place), lax.iota(jnp.uint32, count))
    return list(zip(jnp.asarray(first), jnp.asarray(second), strict=True))


def permutation(key: _draws.RawKey, bits: int) -> jax.Array:
    """A random order of 0, ..., 2^bits - 1 without a sort, by which millions of entries take seconds.

    Three rounds of what is one-to-one on numbers of so many bits: times an odd number, plus another, and the upper
    half folded onto the lower.
    """
    mask = np.uint32(2**bits - 1)
    x = jnp.arange(2**bits, dtype=jnp.uint32)
    for factor, shift in _draws.bits(key, (3, 2)):
        x = (x * (factor | 1) + shift) & mask
        x = x ^ (x >> max(1, bits // 2))
    return x.astype(jnp.int32)


def hadamard(x: jax.Array) -> jax.Array:
    """H x for H of +-1, its own transpose: a Kronecker product of small ones, so dots with 32 x 32 matrices."""
    bits = x.shape[0].bit_length() - 1
    radices = [2 ** min(5, bits - n) for n in range(0, bits, 5)]
    y = x.reshape(radices)
    for radix in radices:  # the first axis is contracted and comes out last: after all of them, the order is as it was
        h = functools.reduce(np.kron, [np.array([[1, 1], [1, -1]])] * (radix.bit_length() - 1))
        y = jnp.tensordot(y, h.astype(x.dtype), (0, 0), precision=lax.Precision.HIGHEST)
    return y.reshape(x.shape)


PROJECTIONS = {"dense": by_columns, "sparse": sparse, "fastfood": fastfood}
