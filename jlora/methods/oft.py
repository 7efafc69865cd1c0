"""OFT: W = R W0, with R block-diagonal and orthogonal, R = (I + Q) (I - Q)^-1 for skew Q (Cayley).

Qiu et al, `Controlling Text-to-Image Diffusion by Orthogonal Finetuning <https://arxiv.org/abs/2306.07280>`_, 2023.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import PartitionSpec

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Recipe
from jlora._algebra._small_inverse import inverse
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import at_least
from jlora.methods.base import Method, zeros


@dataclasses.dataclass(frozen=True)
class Cayley:
    """(I + Q) (I - Q)^-1 in blocks of n, for Q = s (U - U^T) with U strictly upper triangular, filled from q."""

    n: int

    def __call__(self, s: jax.Array, q: jax.Array) -> jax.Array:
        return automatic(self._made, (s, q), PartitionSpec())

    def _made(self, s: jax.Array, q: jax.Array) -> jax.Array:
        above = jnp.zeros((len(q), self.n, self.n), jnp.float32)
        above = above.at[(slice(None), *np.triu_indices(self.n, 1))].set(s * q.astype(jnp.float32))
        skew, eye = above - above.mT, jnp.broadcast_to(jnp.eye(self.n, dtype=above.dtype), above.shape)
        times = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
        # (I - Q)^-1 = (I + Q) (I - Q^2)^-1, and I - Q^2 = I + Q^T Q is symmetric with eigenvalues of at least 1
        return times(times(eye + skew, eye + skew), inverse(eye - times(skew, skew)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class OFT(Method):
    """W = R W0: inputs are rotated in blocks, so that angles between neurons, the paper's energy, stay as they were.

    q (blocks, n (n - 1) / 2) holds what stands above the diagonal of each block of Q, row by row. It starts at zero,
    where R is the identity. `jlora.scale` multiplies Q: at zero it is the base.

    Attributes:
      block: n, the size of a block, at most: the largest divisor of the input width up to it is taken.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.OFT(block=3))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'q': (2, 3)}

    References:
      Qiu et al, `OFT <https://arxiv.org/abs/2306.07280>`_, 2023.
    """

    block: Annotated[int, at_least(2, "a block holds an integer number of inputs, at least two")] = 32
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if not leaf.axes("ik") or not leaf.axes("o"):
            raise ValueError("a rotation of the inputs needs input and output axes")
        d_in = leaf.size("ik")
        n = max(n for n in range(1, min(self.block, d_in) + 1) if d_in % n == 0)
        if n == 1:
            raise ValueError(f"no block from 2 to {self.block} divides the input width {d_in}; write OFT(block={d_in})")
        q = Array("q", zeros, (d_in // n, n * (n - 1) // 2))
        s = Array("s", constant(1.0), (), trained=False, scale=True)
        rotation = Function(Cayley(n), (s, q))
        return Recipe(left=Delta("b m n -> (b m) (b n)", (rotation,), (("b", d_in // n), ("m", n), ("n", n))))
