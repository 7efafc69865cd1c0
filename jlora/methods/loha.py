"""LoHa: dW = s (A1 B1) * (A2 B2), the elementwise product of two low-rank matrices.

Hyeon-Woo et al, `FedPara: Low-rank Hadamard Product for Communication-Efficient Federated Learning
<https://arxiv.org/abs/2108.06098>`_, 2021; Yeh et al, `Navigating Text-To-Image Customization: From LyCORIS
Fine-Tuning to Model Evaluation <https://arxiv.org/abs/2309.14859>`_, 2023.
"""

import dataclasses

from jlora import targets
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods.base import LowRank, normal, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoHa(LowRank):
    """dW = s (a1 b1) * (a2 b2): rank up to r^2 for the parameters of two LoRAs of rank r.

    a1 and a2 start at N(0, 1), b1 at N(0, 0.1^2), b2 at zero, as LyCORIS has it.

    Attributes:
      rank: r of both products.
      alpha: s = alpha / r; the rank by default.
      tucker: on a convolution, each product is t1 (r, r, window) between its factors (LyCORIS's `use_tucker`); a and
        b then hold channels alone. t1 and t2 start at N(0, 0.1^2).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoHa(rank=2))
      >>> jlora.count(adapted)
      (40, 64)

    References:
      Hyeon-Woo et al, `FedPara <https://arxiv.org/abs/2108.06098>`_, 2021.
      Yeh et al, `LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2023.
    """

    tucker: bool = False
    target: Target = targets.attention

    def delta(self, leaf: Leaf) -> Delta:
        a1, b1 = Array("a1", normal(1.0)), Array("b1", normal(0.1))
        a2, b2 = Array("a2", normal(1.0)), Array("b2", zeros)
        sizes = (("r", self.rank), ("s", self.rank))
        if self.tucker and leaf.axes("k"):
            t1, t2 = Array("t1", normal(0.1)), Array("t2", normal(0.1))
            equation = "u r K, r I, u O, v s K, s I, v O -> K I O"
            sizes += (("u", self.rank), ("v", self.rank))
            return Delta(equation, (t1, a1, b1, t2, a2, b2), sizes, self.scale, ("r", "u", "s", "v"))
        return Delta("r I, r O, s I, s O -> I O", (a1, b1, a2, b2), sizes, self.scale, ("r", "s"))
