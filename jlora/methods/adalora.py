"""AdaLoRA: W = W0 + s P diag(lam) Q.

Zhang et al, `AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
<https://arxiv.org/abs/2303.10512>`_, 2023.
"""

import dataclasses

from jlora import targets
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Rank
from jlora.methods.base import LowRank, normal, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoRA(LowRank):
    """dW = s p diag(lam) q with p (in, r), lam (r,), q (r, out): a singular value decomposition to be pruned.

    lam starts at zero, p and q at N(0, 0.02^2). This is the parametrisation alone; `jlora.rank.orthogonality` is the
    penalty of the loss, and the optimizer `jlora.rank.adalora` decides while training who gets which rank.

    Attributes:
      rank: the initial r; the paper takes 1.5 times the target rank.
      alpha: s = alpha / r with the initial r, which pruning does not change; the rank by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.AdaLoRA(rank=3))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'p': (3, 6), 'lam': (3,), 'q': (3, 4)}

    References:
      Zhang et al, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023.
    """

    rank: Rank = 12
    target: Target = targets.linear

    def delta(self, leaf: Leaf) -> Delta:
        p, lam, q = Array("p", normal(0.02)), Array("lam", zeros), Array("q", normal(0.02))
        return Delta("r I, r, r O -> I O", (p, lam, q), (("r", self.rank),), self.scale, ("r",))
