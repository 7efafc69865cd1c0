"""RandLoRA: dW = s sum_n B_n diag(lam_n) A diag(gam_n), full-rank from fixed random bases.

Albert et al, `RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models
<https://arxiv.org/abs/2502.00987>`_, 2025.
"""

import dataclasses
import functools
import math

from jlora import targets
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Rank, Seed
from jlora.methods.base import LowRank, zeros
from jlora.methods.vera import draw, shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(LowRank):
    """dW of full rank, as a sum of n = ceil(min(in, out) / r) products of rank r between random, frozen bases.

    A (r, narrow side) is one for all products, B (n, r, wide side) one for each; both are drawn from a seed with unit
    variance and shared by all weights of a width, and no part of a saved adapter. lam (r, n) starts at zero, gam
    (n, narrow side) at 1 / max(in, out).

    Attributes:
      rank: r. A smaller one makes more products: parameters fall as it grows.
      alpha: s = alpha / r; the rank by default.
      seed: of the random bases.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.RandLoRA(rank=2))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'lam': (2, 2), 'gam': (2, 4)}

    References:
      Albert et al, `RandLoRA <https://arxiv.org/abs/2502.00987>`_, 2025.
    """

    rank: Rank = 32
    seed: Seed = 0
    target: Target = targets.attention

    def delta(self, leaf: Leaf) -> Delta:
        r, roles = self.rank, {"I": "ik", "O": "o"}
        narrow, wide = sorted(roles, key=lambda side: leaf.size(roles[side]))
        n = -(-leaf.size(roles[narrow]) // r)

        def base(name: str, which: int, rows: tuple[int, ...], side: str) -> Function:
            group = f"randlora/{self.seed}/{math.prod(rows)}/{leaf.size(roles[side])}"
            init = functools.partial(draw, self.seed, which, math.sqrt(3.0))  # U(-sqrt 3, sqrt 3) has unit variance
            return shared(name, group, rows, leaf.sizes(roles[side]), init, trained=False, derived=True)

        words = (
            base("A", 0, (r,), narrow),
            Array("lam", zeros),
            Array("gam", constant(1 / leaf.size(roles[wide]))),
            base("B", 1, (n, r), wide),
        )
        equation = f"r {narrow}, r n, n {narrow}, n r {wide} -> I O"
        return Delta(equation, words, (("r", r), ("n", n)), self.scale)
