"""PSOFT: W = W0 + a (R' - I) b, a = U_r and b = S_r V_r of W0 = U S V: a rotation of W0's principal subspace alone.

Wu, Hu, Min and Wang, `Efficient Orthogonal Fine-Tuning with Principal Subspace Adaptation
<https://arxiv.org/abs/2505.11235>`_, 2025.
"""

import dataclasses
from typing import Annotated

import jax
import jax.numpy as jnp

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import W0, Keys, Place
from jlora.methods._fields import Holds
from jlora.methods.base import Dropping, check_low_rank, filled, of_the_weight, zeros
from jlora.methods.oft import Cayley
from jlora.methods.starts import singular


@dataclasses.dataclass(frozen=True)
class Turn:
    """(diag(beta) R diag(alpha))^T - I: exact zeros where Q is zero and both vectors are one."""

    rank: int

    def __call__(self, q: jax.Array, *vectors: jax.Array) -> jax.Array:
        r = Cayley(self.rank)(jnp.ones((), jnp.float32), q[None])[0].T
        for alpha, beta in (vectors,) if vectors else ():
            r = alpha.astype(r.dtype)[:, None] * r * beta.astype(r.dtype)[None, :]
        return r - jnp.eye(self.rank, dtype=r.dtype)


_RANK = "a rank is an integer of at least 0, and not 1: a rotation turns at least two directions"


@dataclasses.dataclass(frozen=True, kw_only=True)
class PSOFT(Dropping):
    """W = W0 + a (R' - I) b: what W0 does in its r leading directions is turned, and all else of it is kept.

    R' = (diag(beta) R diag(alpha))^T, with R = (I + Q) (I - Q)^-1 for skew Q. q (r (r - 1) / 2,) holds what stands
    above the diagonal of Q, row by row, zero at the start, where beta and alpha are one. a (r, in) and b (r, out) are
    frozen. It costs what LoRA does. There is no scale, peft's `psoft_alpha`: it cancels.

    Attributes:
      rank: r, at most min(in, out).
      vectors: whether there are alpha and beta; without them angles and lengths in the subspace stay.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.eye(6, 4)}}, jlora.PSOFT(rank=3))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'q': (3,), 'alpha': (3,), 'beta': (3,)}

    References:
      Wu, Hu, Min and Wang, `PSOFT <https://arxiv.org/abs/2505.11235>`_, 2025.
    """

    rank: Annotated[int, Holds(lambda n: 0 <= n < 2**31 and n != 1, _RANK)] = 32
    vectors: bool = True
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_low_rank(leaf, self.rank)
        n = self.rank
        a, b = Array("a", of_the_weight, trained=False), Array("b", of_the_weight, trained=False)
        names = ("alpha", "beta") if self.vectors else ()
        vectors = tuple(Array(name, constant(1.0), (n,)) for name in names)
        turn = Function(Turn(n), (Array("q", zeros, (n * (n - 1) // 2,)), *vectors))
        return Recipe((self.dropped(Delta("r I, r t, t O -> I O", (a, turn, b), (("r", n), ("t", n)))),))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        u, s, v = (x[..., : self.rank, :] for x in singular(weight, leaf))
        return filled(super().initial(leaf, recipe, keys, weight), {"a": u, "b": s * v}, self.dtype)
