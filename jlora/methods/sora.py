"""SoRA: h = W0 x + s B (g * (A x)), with g driven to exact zeros.

Ding et al, `Sparse Low-rank Adaptation of Pre-trained Language Models <https://arxiv.org/abs/2311.11696>`_, 2023.
"""

import dataclasses
import math

from jlora import targets
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods.base import LowRank, normal, uniform, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class SoRA(LowRank):
    """dW = s a diag(g) b with a gate g (r,); ranks whose gate is zero can be dropped without a change.

    a starts as in LoRA, g at N(0, 1), b at zero. This is the parametrisation alone; the proximal step on g is that of
    the optimizer `jlora.rank.sora`.

    Attributes:
      rank: the maximal r.
      alpha: s = alpha / r with the maximal r; the rank by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SoRA(rank=3))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'a': (3, 6), 'g': (3,), 'b': (3, 4)}

    References:
      Ding et al, `SoRA <https://arxiv.org/abs/2311.11696>`_, 2023.
    """

    target: Target = targets.linear

    def delta(self, leaf: Leaf) -> Delta:
        a = Array("a", uniform(1 / math.sqrt(leaf.size("ik"))))
        g, b = Array("g", normal(1.0)), Array("b", zeros)
        return Delta("r I, r, r O -> I O", (a, g, b), (("r", self.rank),), self.scale, ("r",))
