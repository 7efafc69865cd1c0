"""HiRA: dW = W0 * (s A B), an elementwise product with the frozen weight.

Huang et al, `HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models
<https://openreview.net/forum?id=TwJrTz9cRS>`_, 2025.
"""

import dataclasses
import math

from jlora import targets
from jlora._algebra._words import Array, Base, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods.base import LowRank, uniform, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(LowRank):
    """dW = W0 * (s a b): the rank of dW is up to rank(W0) r. a starts as in LoRA, b at zero.

    The planner builds a b where that is cheaper than r dots as large as the model's own, as it nearly always is.

    Attributes:
      rank: r.
      alpha: s = alpha / r; the rank by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.HiRA(rank=2)))
      (20, 44)

    References:
      Huang et al, `HiRA <https://openreview.net/forum?id=TwJrTz9cRS>`_, 2025.
    """

    target: Target = targets.attention

    def delta(self, leaf: Leaf) -> Delta:
        a, b = Array("a", uniform(1 / math.sqrt(leaf.size("ik")))), Array("b", zeros)
        return Delta("I O, r I, r O -> I O", (Base(), a, b), (("r", self.rank),), self.scale, ("r",))
