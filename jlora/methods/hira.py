"""HiRA: dW = W0 * (s A B), an elementwise product with the frozen weight.

Huang et al, `HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models
<https://openreview.net/forum?id=TwJrTz9cRS>`_, 2025.
"""

import dataclasses
import math

from jlora import targets
from jlora._axes import Leaf
from jlora._network import Array, Base, Delta, Recipe
from jlora._tree import Target
from jlora.methods.base import Method, check_low_rank, check_rank, uniform, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class HiRA(Method):
    """dW = W0 * (s a b): the rank of dW is up to rank(W0) r. a starts as in LoRA, b at zero.

    The planner builds a b where that is cheaper than r dots as large as the model's own, as it nearly always is.

    Attributes:
      rank: r, at most min(in, out).
      alpha: s = alpha / r; the rank by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.HiRA(rank=2)))
      (20, 44)

    References:
      Huang et al, `HiRA <https://openreview.net/forum?id=TwJrTz9cRS>`_, 2025.
    """

    rank: int = 8
    alpha: float | None = None
    target: Target = targets.attention

    def __post_init__(self) -> None:
        check_rank(self)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_low_rank(leaf, self.rank)
        a, b = Array("a", uniform(1 / math.sqrt(leaf.size("ik")))), Array("b", zeros)
        s = 1.0 if self.alpha is None else self.alpha / self.rank
        return Recipe((Delta("I O, r I, r O -> I O", (Base(), a, b), (("r", self.rank),), s, ("r",)),))

    def canonical(self) -> "HiRA":
        return dataclasses.replace(self, alpha=None)
