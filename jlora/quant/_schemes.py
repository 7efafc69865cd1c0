"""Schemes: which levels a block of weights is rounded to, and how many bits say which."""

import dataclasses
import functools
import statistics
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _answers

POINTS = 2**16  # the grid from -1 to 1 on which bitsandbytes looks up codes of the dynamic map
TINY = np.finfo(np.float32).tiny  # a block of zeros is divided by this, and stays zeros

# bitsandbytes' table: the construction of `normal_levels`, rounded there in another precision (by at most 2e-7)
_NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip


def normal_levels(bits: int) -> np.ndarray:
    """The 2^k levels of a normal float, from -1 to 1, with an exact zero: float64, in order.

    With d = 1 - (1 / (2 (2^k - 1)) + 1 / 2^(k+1)) / 2 and Q the quantile function of N(0, 1): the positive levels are
    Q at 2^(k-1) points from d evenly down to, but without, 1/2; the negative ones -Q at 2^(k-1) - 1 such points; and
    zero. All are divided by the largest.

    The paper's formula, q_i = (Q(i / (2^k + 1)) + Q((i + 1) / (2^k + 1))) / 2, is not this: at i = 0 it is minus
    infinity, and none of its levels is zero. The paper's code, and this, do what its text says in words: two sets of
    quantiles, one for each sign, that share the zero.
    """
    quantile = statistics.NormalDist().inv_cdf
    d = 1 - (1 / (2 * (2**bits - 1)) + 1 / 2 ** (bits + 1)) / 2
    side = lambda n: [quantile(p) for p in np.linspace(d, 0.5, n + 1)[:-1]]
    half = 2 ** (bits - 1)
    levels = np.sort([*side(half), 0.0, *(-q for q in side(half - 1))])
    return levels / levels[-1]


@functools.lru_cache
def dynamic_levels() -> np.ndarray:
    """The 256 levels of the signed dynamic map, float32, in order: seven decades of either sign, each decade with twice
    as many levels as the one below, then 0 and 1.

    Dettmers et al, `8-bit Optimizers via Block-wise Quantization <https://arxiv.org/abs/2110.02861>`_, 2021. Single
    steps are rounded as torch rounds them, from either end of a decade, so that the table is bitsandbytes' bit for bit.
    """
    f = np.float32
    levels = [f(0), f(1)]
    for decade in range(7):
        n = 2**decade + 1
        step = np.float64((f(1) - f(0.1)) / f(n - 1))  # float64, so that product and sum below are rounded once
        i = np.arange(n)
        ends = np.where(i < n // 2, f(0.1) + step * i, f(1) - step * (n - 1 - i)).astype(f)
        middles = (ends[:-1] + ends[1:]) / f(2) * f(10.0 ** (decade - 6))
        levels += [*middles, *-middles]
    return np.sort(np.array(levels, f))


@functools.lru_cache
def dynamic_codes() -> np.ndarray:
    """For each of 2^16 points from -1 to 1, the nearest level of the dynamic map: bitsandbytes rounds to those points
    first, which moves some codes of the finest levels by one."""
    f = np.float32
    points = f(-1) + f(2) * np.arange(POINTS, dtype=f) / f(POINTS - 1)
    return np.searchsorted(thresholds(dynamic_levels()), points, side="left").astype(np.uint8)


def thresholds(levels: np.ndarray) -> np.ndarray:
    """The midpoints of neighbouring levels; a value at one belongs to the lower level."""
    return (levels[:-1] + levels[1:]) / np.float32(2)


def nearest_level(x: jax.Array, levels: np.ndarray) -> jax.Array:
    """The number of the nearest level, uint8."""
    middle = thresholds(levels)
    if len(levels) <= 16:
        return sum(((x > m).astype(jnp.uint8) for m in middle), jnp.zeros(x.shape, jnp.uint8))
    return jnp.searchsorted(jnp.asarray(middle), x, side="left").astype(jnp.uint8)


def levels_of(q: jax.Array, levels: np.ndarray) -> jax.Array:
    """`levels[q]`.

    On a CPU the levels are gathered from a table, which stays in its cache. Elsewhere a gather of single elements is
    slow, and up to 16 levels are a tree of selects, one a bit; on a CPU each select would be an array in memory.
    """

    def gathered(q: jax.Array) -> jax.Array:
        return jnp.asarray(levels).at[q.astype(jnp.int32)].get(mode="promise_in_bounds")

    def selected(q: jax.Array) -> jax.Array:
        q = q.astype(jnp.int32)

        def below(levels: np.ndarray) -> jax.Array:
            if len(levels) == 1:
                return jnp.asarray(levels[0])
            half = len(levels) // 2
            return jnp.where(q & half != 0, below(levels[half:]), below(levels[:half]))

        return below(levels)

    if len(levels) > 16:
        return gathered(q)
    return jax.lax.platform_dependent(q, cpu=gathered, default=selected)


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How weights are rounded, in blocks along their input side that share a scale, the largest magnitude in a block.

    Attributes:
      bits: k, the bits of a code.
      block: how many inputs of one output share a scale; None for all of them.
      double: whether the scales are quantised too, to 8 bits.
    """

    bits: int
    block: int | None = 64
    double: bool = False

    allowed: ClassVar[tuple[int, ...]] = ()

    def __post_init__(self) -> None:
        name = type(self).__name__
        if type(self.bits) is not int or self.bits not in self.allowed:
            raise ValueError(f"{name}(bits={self.bits!r}): {name} has codes of {self.allowed} bits")
        if self.block is not None:
            words = "a block is a number of inputs, or None for all of them"
            _answers.check_integer(f"{name}(block", self.block, 1, words)
        if not isinstance(self.double, bool):
            raise ValueError(f"{name}(double={self.double!r}): write True to quantise the scales too, or False")

    @property
    def planes(self) -> tuple[int, ...]:
        """The bits of a code as powers of two, the highest first: 3 is (2, 1). Each part has an array of bytes."""
        return tuple(n for n in (8, 4, 2, 1) if self.bits & n)

    @property
    def code(self) -> str:
        """The dtype of the bytes that hold codes."""
        return "uint8"

    @property
    def levels(self) -> np.ndarray:
        """The 2^k levels between -1 and 1, float32, in order."""
        raise NotImplementedError

    def encode(self, x: jax.Array) -> jax.Array:
        """Codes, uint8, of values between -1 and 1."""
        return nearest_level(x, self.levels)

    def decode(self, q: jax.Array) -> jax.Array:
        """The levels of codes, float32."""
        return levels_of(q, self.levels)

    def __str__(self) -> str:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class NF(Scheme):
    """Normal float: levels at the quantiles of the normal distribution, as weights are. QLoRA has `NF(4, double=True)`.

    `bits` is 2, 3, 4 or 8. NF4 is bitsandbytes' table bit for bit; the others follow from the same construction, which
    is in `levels`: two sets of quantiles, one for each sign, that share the zero. (The paper's closed formula would
    give an infinity and no zero.)

    Example:
      >>> import jlora
      >>> [round(float(x), 3) for x in jlora.quant.NF(2).levels]
      [-1.0, 0.0, 0.436, 1.0]

    References:
      Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023, section 3 and appendix E.
    """

    bits: int = 4
    allowed: ClassVar[tuple[int, ...]] = (2, 3, 4, 8)

    @property
    def levels(self) -> np.ndarray:
        return np.array(_NF4 if self.bits == 4 else normal_levels(self.bits), np.float32)

    def __str__(self) -> str:
        block = "" if self.block == 64 else f"/{self.block or 'channel'}"
        return f"nf{self.bits}{block}{'+double' * self.double}"


@dataclasses.dataclass(frozen=True)
class Int(Scheme):
    """Whole numbers, symmetric: round(x / s) with s the largest magnitude over 2^(k-1) - 1. `Int(8)` has one scale an
    output channel, `Int(4, block=64)` one a block.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> leaf = jlora.quantize({"kernel": jnp.eye(4)}, jlora.quant.Int(8), target="kernel")["kernel"]
      >>> leaf.arrays["codes"][0]
      Array([127,   0,   0,   0], dtype=int8)
    """

    bits: int = 8
    block: int | None = None
    allowed: ClassVar[tuple[int, ...]] = (4, 8)

    @property
    def code(self) -> str:
        return "int8" if self.bits == 8 else "uint8"

    @property
    def top(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    @property
    def levels(self) -> np.ndarray:
        return (np.arange(-self.top - 1, self.top + 1) / self.top).astype(np.float32)

    def encode(self, x: jax.Array) -> jax.Array:
        q = jnp.round(x * self.top).astype(jnp.int32)
        return (q + self.top + 1).astype(jnp.uint8) if self.bits < 8 else q.astype(jnp.int8)

    def decode(self, q: jax.Array) -> jax.Array:
        q = q.astype(jnp.float32) - (self.top + 1 if self.bits < 8 else 0)
        return q * np.float32(1 / self.top)

    def __str__(self) -> str:
        block = "" if self.block == (64 if self.bits == 4 else None) else f"/{self.block or 'channel'}"
        return f"int{self.bits}{block}{'+double' * self.double}"


_PLAIN = {
    "nf2": NF(2), "nf3": NF(3), "nf4": NF(4), "nf8": NF(8), "int8": Int(8), "int4": Int(4, 64),
}  # fmt: skip
#: Those with scales that are quantised again. `int8` has one scale a channel, which is little already.
_DOUBLE = {f"{name}+double": dataclasses.replace(x, double=True) for name, x in _PLAIN.items() if name != "int8"}
SCHEMES = _PLAIN | _DOUBLE


def scheme_of(scheme: "Scheme | str") -> Scheme:
    """A scheme, or its name."""
    if isinstance(scheme, Scheme):
        return scheme
    if not isinstance(scheme, str):
        hint = f"; write {scheme.__name__}()" if isinstance(scheme, type) and issubclass(scheme, Scheme) else ""
        raise TypeError(f"a scheme is a name such as 'nf4', or jlora.quant.NF(4), not {_answers.kind(scheme)}{hint}")
    if scheme not in SCHEMES:
        raise ValueError(f"no scheme is called {scheme!r}; there are {', '.join(SCHEMES)}, and jlora.quant.NF and Int")
    return SCHEMES[scheme]
