"""GraLoRA: dW is cut into k x k blocks, and each has a LoRA of its own, of rank r / k.

    dW_pq = s a_pq b_pq    for p, q in 1 ... k

Jung et al, `GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning
<https://arxiv.org/abs/2505.20355>`_, 2025.
"""

import dataclasses
import math
from typing import Annotated

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Rank, at_least
from jlora.methods.base import LowRank, check_sides, uniform, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class GraLoRA(LowRank):
    """dW_pq = s a_pq b_pq in k x k blocks: rank up to k r for the parameters and the FLOPs of a LoRA of rank r.

    An outlier among the inputs then reaches the gradients of its own blocks alone. a (r / k, k, k, in / k) starts as
    kaiming, b (r / k, k, k, out / k) at zero. Blocks of a convolution hold channels, each the whole window.

    Attributes:
      rank: r, a multiple of k.
      blocks: k, which divides the input and the output width.
      hybrid: the rank of a LoRA over the whole weight that is added, under the same s (the paper's Hybrid GraLoRA).
      alpha: s = alpha / (r + hybrid), so that s is 1 by default.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.GraLoRA(rank=4))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'a': (2, 2, 2, 3), 'b': (2, 2, 2, 2)}

    References:
      Jung et al, `GraLoRA <https://arxiv.org/abs/2505.20355>`_, 2025.
    """

    blocks: Annotated[int, at_least(1, "the blocks of a side are an integer of at least 1")] = 2
    hybrid: Rank = 0
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank % self.blocks:
            raise ValueError(
                f"GraLoRA shares its rank among {self.blocks} blocks, and {self.rank} is no multiple of that; write "
                f"GraLoRA(rank={self.rank - self.rank % self.blocks or self.blocks}, blocks={self.blocks})"
            )

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / (self.rank + self.hybrid)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_sides(leaf)
        granular = self.dropped(self.delta(leaf))
        if not self.hybrid:
            return Recipe((granular,))
        a, b = Array("a_hybrid", uniform(1 / math.sqrt(leaf.size("ik")))), Array("b_hybrid", zeros)
        whole = Delta("r I, r O -> I O", (a, b), (("r", self.hybrid),), self.scale)
        return Recipe((granular, self.dropped(whole)))

    def delta(self, leaf: Leaf) -> Delta:
        k, d_in, d_out = self.blocks, leaf.size("i"), leaf.size("o")
        if d_in % k or d_out % k:
            raise ValueError(f"{k} blocks do not divide (in, out) = {(d_in, d_out)}; write blocks= that does, or 1")
        a = Array("a", uniform(1 / math.sqrt(leaf.size("ik") // k)))
        sizes = (("r", self.rank // k), ("p", k), ("q", k), ("i", d_in // k), ("o", d_out // k))
        window = " K" if leaf.axes("k") else ""
        equation = f"r p q i{window}, r p q o ->{window} (p i) (q o)"
        return Delta(equation, (a, Array("b", zeros)), sizes, self.scale)
