"""MiCA: dW = s a b, with b = the last r rows of V of W0 = U S V, frozen, and a (r, in) trained from zero.

Rüdiger and Raschka, `MiCA Learns More Knowledge Than LoRA and Full Fine-Tuning <https://arxiv.org/abs/2604.01694>`_,
2026.
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
class MiCA(LowRank):
    """dW = s a b: b holds the output directions in which W0 is weakest and stays; a alone is trained.

    b (r, out) is of the r least singular values among min(in, out); the paper's left singular vectors are of a weight
    (out, in). The start is the base. The paper takes half the rank and twice the learning rate of a LoRA.

    Attributes:
      rank: r, at most min(in, out).
      alpha: s = alpha / r; the rank by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.diag(jnp.array([3.0, 1.0, 2.0]))}}
      >>> adapted = jlora.adapt(params, jlora.MiCA(rank=1))
      >>> jnp.abs(adapted.frozen.factors["query/kernel"]["b"])
      Array([[0., 1., 0.]], dtype=float32)

    References:
      Rüdiger and Raschka, `MiCA <https://arxiv.org/abs/2604.01694>`_, 2026.
    """

    target: Target = targets.attention

    def delta(self, leaf: Leaf) -> Delta:
        check_low_rank(leaf, self.rank)
        b = Array("b", of_the_weight, trained=False)  # `initial` fills it
        return Delta("r I, r O -> I O", (Array("a", zeros), b), (("r", self.rank),), self.scale, ("r",))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        _, _, v = singular(weight, leaf)
        return filled(super().initial(leaf, recipe, keys, weight), {"b": v[..., -self.rank :, :]}, self.dtype)
