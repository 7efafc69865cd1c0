"""Random numbers that a seed gives again: the same bits under every setting of JAX, in every release, on every device.

`jax.random` draws what its settings say (the default generator, `jax_threefry_partitionable`, x64), and reads some of
them when a program is lowered, where no context of ours reaches. So the generator is written out here: threefry2x32 of
20 rounds, keyed by (0, seed), counting the elements of an array in 64 bits, the two words of each block combined by
exclusive or. These are the numbers that JAX 0.10 draws under its defaults.

Whole numbers are exact everywhere. Of floats, `uniform` has one rounding for each element, so that no compiler can fuse
two; `normal` goes through the inverse error function, whose last bit is the device's own.

Salmon et al, `Parallel Random Numbers: As Easy as 1, 2, 3 <https://doi.org/10.1145/2063384.2063405>`_, 2011.
"""

import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from jlora._types import PyTree, Shape

GENERATOR = "threefry2x32"  # what a file says of how its factors were drawn

RawKey: TypeAlias = tuple[ArrayLike, ArrayLike]  # two uint32
Words: TypeAlias = tuple[jax.Array, jax.Array]  # two uint32 an element

ROTATIONS = np.array([[13, 15, 26, 6], [17, 29, 16, 24]], np.uint32)


def key(seed: int) -> RawKey:
    """The key of a seed, of which the lower 32 bits count."""
    return np.uint32(0), np.uint32(seed & 0xFFFFFFFF)


@jax.jit
def block(key: RawKey, high: jax.Array, low: jax.Array) -> Words:
    """Threefry of counters (high, low): two words for each."""

    def rounds(n: int, state: PyTree) -> PyTree:
        x, y, (first, second, third), (now, then) = state
        for i in range(4):
            x = x + y
            y = x ^ (lax.shift_left(y, now[i]) | lax.shift_right_logical(y, np.uint32(32) - now[i]))
        return x + first, y + second + jnp.asarray(n + 1, jnp.uint32), (second, third, first), (then, now)

    first, second = jnp.asarray(key[0]), jnp.asarray(key[1])
    keys = second, first ^ second ^ np.uint32(0x1BD11BDA), first
    state = high + first, low + second, keys, tuple(jnp.asarray(ROTATIONS))
    # unrolled it is one kernel, but LLVM would take several times as long to compile it
    run = lambda unroll: lambda *state: lax.fori_loop(0, 5, rounds, state, unroll=unroll)
    return lax.platform_dependent(*state, cpu=run(False), default=run(True))[:2]


def fold_in(key: RawKey, n: ArrayLike) -> RawKey:
    """Another key for every whole number; the n-th of a split, too."""
    n = jnp.asarray(n).astype(jnp.uint32)
    return block(key, 0 * n, n)


def random_words(key: RawKey, shape: Shape) -> Words:
    """Two random words an element."""
    size = math.prod(shape)
    if size > 2**32:
        raise ValueError(f"no array of shape {shape} is drawn: it has more than 2^32 elements")
    low = lax.iota(jnp.uint32, size).reshape(shape)
    return block(key, jnp.zeros_like(low), low)


def bits(key: RawKey, shape: Shape) -> jax.Array:
    """uint32."""
    x, y = random_words(key, shape)
    return x ^ y


def unit(key: RawKey, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """Multiples of 2^-m in [0, 1), m the bits of the dtype's mantissa; float32 where the dtype is narrower."""
    m = jnp.finfo(dtype).nmant
    if m == 52:
        x, y = random_words(key, shape)
        return x.astype(dtype) * 2.0**-32 + (y >> np.uint32(12)).astype(dtype) * 2.0**-52
    width = 32 if m > 10 else 16 if m > 7 else 8
    k = (bits(key, shape) & np.uint32(2**width - 1)) >> np.uint32(width - m)
    return k.astype(jnp.float32) * 2.0**-m


def uniform(key: RawKey, shape: Shape, dtype: DTypeLike, bound: float) -> jax.Array:
    """U(-bound, bound)."""
    u = unit(key, shape, dtype)
    if u.dtype == dtype:
        return jnp.asarray(bound, dtype) * (2 * u - 1)
    # narrow dtypes round the product and the difference; behind a barrier, or a compiler leaves one of them out
    narrow = lambda x: lax.optimization_barrier(x.astype(dtype))
    b = np.asarray(bound, dtype).astype(u.dtype)
    width = np.asarray(2 * b, dtype).astype(u.dtype)
    return jnp.maximum(narrow(narrow(u * width).astype(u.dtype) - b), narrow(jnp.asarray(-b)))


def normal(key: RawKey, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """N(0, 1), in float32 or float64."""
    least = np.nextafter(np.asarray(-1.0, dtype), np.asarray(0.0, dtype))
    u = jnp.maximum(2 * unit(key, shape, dtype) + least, least)
    return jnp.multiply(np.asarray(math.sqrt(2), dtype), lax.erf_inv(u))


def signs(key: RawKey, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """+-1 with equal chances."""
    return jnp.where(bits(key, shape) >> np.uint32(31) == 0, 1, -1).astype(dtype)


def entries(key: RawKey, n: int, of: int) -> jax.Array:
    """n of the whole numbers below `of`, each at most once, in rising order: int32."""
    _, _, order = lax.sort((*random_words(key, (of,)), lax.iota(jnp.int32, of)), num_keys=2)
    return jnp.sort(order[:n])
