"""LoRA-XS: dW = s a r b, with a = U_r S_r and b = V_r of W0 = U S V frozen, and the small r (r, r) trained from zero.

Bałazy et al, `LoRA-XS: Low-Rank Adaptation with Extremely Small Number of Parameters
<https://arxiv.org/abs/2405.17604>`_, 2024.
"""

import dataclasses

import jax

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import W0, Keys, Place
from jlora.methods.base import LowRank, check_low_rank, filled, of_the_weight, zeros
from jlora.methods.starts import singular


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAXS(LowRank):
    """dW = s a r b: a and b are the leading singular vectors of W0 and stay; r (r, r) alone is trained.

    The paper draws r from N(0, 1e-10); here it is zero, so that the start is the base bit for bit.

    Attributes:
      rank: r, at most min(in, out).
      alpha: s = alpha / r; the rank by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.eye(6, 4)}}, jlora.LoRAXS(rank=2)))
      (4, 28)

    References:
      Bałazy et al, `LoRA-XS <https://arxiv.org/abs/2405.17604>`_, 2024.
    """

    target: Target = targets.attention

    def delta(self, leaf: Leaf) -> Delta:
        check_low_rank(leaf, self.rank)
        a, b = Array("a", of_the_weight, trained=False), Array("b", of_the_weight, trained=False)
        sizes = (("r", self.rank), ("t", self.rank))
        return Delta("r I, r t, t O -> I O", (a, Array("r", zeros), b), sizes, self.scale)

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        u, s, v = (x[..., : self.rank, :] for x in singular(weight, leaf))
        return filled(super().initial(leaf, recipe, keys, weight), {"a": s * u, "b": v}, self.dtype)
