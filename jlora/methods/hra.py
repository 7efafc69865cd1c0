"""HRA: W = (H_1 H_2 ... H_r)^T W0, a chain of Householder reflections H_k = I - 2 u_k u_k^T / |u_k|^2 of the inputs.

Yuan, Liu and Xu, `Bridging The Gap between Low-rank and Orthogonal Adaptation via Householder Reflection Adaptation
<https://arxiv.org/abs/2405.17484>`_, 2024.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jlora import targets
from jlora._algebra._mesh import automatic, explicit_mesh
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function
from jlora._dtypes import alike, widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Key, Shape
from jlora.methods._fields import Holds
from jlora.methods.base import Method, check_sides, uniform


@dataclasses.dataclass(frozen=True)
class InPairs:
    """U(-bound, bound), each two neighbours along an axis equal: a reflection done twice is the identity."""

    bound: float
    axis: int

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
        half = (*shape[: self.axis], shape[self.axis] // 2, *shape[self.axis + 1 :])
        return jnp.repeat(uniform(self.bound)(key, half, dtype), 2, self.axis)

    def could_begin(self, x: np.ndarray) -> bool:
        """Whether it could have made these numbers."""
        first, second = (np.take(x, range(n, x.shape[self.axis], 2), self.axis) for n in (0, 1))
        return np.array_equal(first, second)


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(*alike(a, b), precision=lax.Precision.HIGHEST)


def length(x: jax.Array) -> jax.Array:
    """|x| of each row, 1 where a row is zero and names no direction: it then reflects nothing."""
    square = jnp.sum(x * x, 1, keepdims=True)
    return jnp.sqrt(jnp.where(square > 0, square, 1))


def sides(u: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """L, R (r, in) and T (r, r) with H_1 H_2 ... H_r = I + L^T T R: the chain in compact form.

    Reflections go in pairs. For unit vectors a and b = a + d, the product of their two is
    I + 2 a d^T - 2 d b^T - 2 |d|^2 a b^T. So L holds a and d of each pair, R d and b, and where a pair is equal, as at
    the start, d is zero and not one bit of a weight changes: 1 - 1 by way of I - 2 a a^T would be rounded.
    """
    pairs = widened(u).reshape(len(u) // 2, 2, -1)
    first, second = pairs[:, 0], pairs[:, 1]
    n, m, step = length(first), length(second), second - first
    longer = jnp.sum(step * (first + second), 1, keepdims=True)  # m^2 - n^2, zero where the two are equal
    a = first / n
    d = step / m - a * (longer / (m * (n + m)))
    left, right = (jnp.stack(pair, 1).reshape(len(u), -1) for pair in ((a, d), (d, a + d)))
    # of one pair, T is [[2, -2 |d|^2], [0, -2]]
    t = jnp.diag(jnp.tile(jnp.asarray([2, -2], a.dtype), len(a)))
    square = jnp.stack([jnp.sum(d * d, 1), jnp.zeros(len(d), d.dtype)], 1).reshape(-1)[:-1]
    t = t - 2 * jnp.diag(square, 1)
    # two chains after each other: [[T1, T1 (R1 L2^T) T2], [0, T2]]; so for pairs, for fours, and on
    meets, pair = times(right, left.T), np.arange(len(u)) // 2
    for n in (2**k for k in range(math.ceil(math.log2(len(a))))):
        group, half = pair // (2 * n), pair // n
        beside = (group[:, None] == group) & (half[:, None] < half)
        t = t + times(times(t, jnp.where(beside, meets, 0)), t)
    return left, right, t


@dataclasses.dataclass(frozen=True)
class Columns:
    """R, in the axes of the inputs."""

    def __call__(self, u: jax.Array) -> jax.Array:
        return automatic(lambda u: sides(u)[1].reshape(u.shape), (u,))


@dataclasses.dataclass(frozen=True)
class RowsOfW0:
    """T^T L W0, in the axes of the outputs: r inputs of W0 in place of all of them."""

    leaf: Leaf  # of one layer of a stack, without its path: equal layers are one program

    def __call__(self, u: jax.Array, w0: jax.Array) -> jax.Array:
        cut = tuple(jax.typeof(w0).sharding.spec) if explicit_mesh((w0,)) is not None else (None,) * w0.ndim
        spec = PartitionSpec(None, *(cut[n] for n in self.leaf.axes("o")))
        return automatic(jax.checkpoint(self._made), (u, w0), spec)  # of W0 no copy in float32 is kept

    def _made(self, u: jax.Array, w0: jax.Array) -> jax.Array:
        left, _, t = sides(u)
        return times(t.T, times(left, self.leaf.matrix(w0))).reshape(len(u), *self.leaf.sizes("o"))


_RANK = "a rank is an even integer of at least 0: reflections begin in equal pairs, whose product is the identity"


@dataclasses.dataclass(frozen=True, kw_only=True)
class HRA(Method):
    """W = (H_1 ... H_r)^T W0: inputs are reflected r times, so that angles between neurons stay as they were.

    The chain is never a matrix: it is I + L^T T R with L and R (r, in), so that W = W0 + R^T (T^T L W0), as cheap as
    LoRA but for r inputs' worth of W0 a call. u (r, in) starts in equal pairs, u_1 = u_2, where the chain is the
    identity: bit for bit here, as pairs are multiplied by way of their difference.

    The paper's penalty on the angles between u, its lambda, is a term of your loss; its limit of exactly orthogonal u
    (peft's `apply_GS`) reverses r directions whatever u is, so that it cannot start as the base, and is left out.

    Attributes:
      rank: r, an even number of reflections.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.HRA(rank=2))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'u': (2, 6)}

    References:
      Yuan, Liu and Xu, `HRA <https://arxiv.org/abs/2405.17484>`_, 2024.
    """

    rank: Annotated[int, Holds(lambda n: 0 <= n < 2**31 and n % 2 == 0, _RANK)] = 8
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_sides(leaf)
        start = InPairs(1 / math.sqrt(self.rank / 2), len(leaf.stack))
        u = Array("u", start, (self.rank, *leaf.sizes("ik")))
        words = Function(Columns(), (u,)), Function(RowsOfW0(dataclasses.replace(leaf.layer, path="")), (u,), base=True)
        return Recipe((Delta("r I, r O -> I O", words, (("r", self.rank),)),))
