"""RandLoRA: dW = s sum_n B_n diag(lam_n) A diag(gam_n), full-rank from fixed random bases.

Albert et al, `RandLoRA: Full-rank Parameter-efficient Fine-tuning of Large Models
<https://arxiv.org/abs/2502.00987>`_, 2025.
"""

import dataclasses
import functools
import math

import jax

from jlora import targets
from jlora._axes import Leaf
from jlora._network import Array, Delta, Function, Recipe, constant
from jlora._tree import Target
from jlora.methods.base import Method, check_low_rank, check_rank, zeros
from jlora.methods.vera import draw


@dataclasses.dataclass(frozen=True)
class Bases:
    """A (rows, n) matrix as `lead` axes and the axes of a side."""

    lead: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, a: jax.Array) -> jax.Array:
        return a.reshape(*self.lead, *self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoRA(Method):
    """dW of full rank, as a sum of n = ceil(min(in, out) / r) products of rank r between random, frozen bases.

    A (r, narrow side) is one for all products, B (n, r, wide side) one for each; both are drawn from a seed with unit
    variance and shared by all weights of a width, and no part of a saved adapter. lam (r, n) starts at zero, gam
    (n, narrow side) at 1 / max(in, out).

    Attributes:
      rank: r, at most min(in, out). A smaller one makes more products: parameters fall as it grows.
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

    rank: int = 32
    alpha: float | None = None
    seed: int = 0
    target: Target = targets.attention

    def __post_init__(self) -> None:
        check_rank(self)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_low_rank(leaf, self.rank)
        r, sides = self.rank, {"I": "ik", "O": "o"}
        narrow, wide = sorted(sides, key=lambda side: leaf.size(sides[side]))
        low, high = leaf.size(sides[narrow]), leaf.size(sides[wide])
        n = -(-low // r)

        def base(name: str, which: int, side: str, lead: tuple[int, ...]) -> Function:
            sizes = leaf.sizes(sides[side])
            shape = (math.prod(lead), math.prod(sizes))
            group = f"randlora/{self.seed}/{shape[0]}/{shape[1]}"
            init = functools.partial(draw, self.seed, which, math.sqrt(3.0))  # U(-sqrt 3, sqrt 3) has unit variance
            array = Array(name, init, shape, trained=False, group=group, stacked=False, derived=True)
            return Function(Bases(lead, sizes), (array,))

        words = (
            base("A", 0, narrow, (r,)),
            Array("lam", zeros),
            Array("gam", constant(1 / high)),
            base("B", 1, wide, (n, r)),
        )
        equation = f"r {narrow}, r n, n {narrow}, n r {wide} -> I O"
        s = 1.0 if self.alpha is None else self.alpha / r
        return Recipe((Delta(equation, words, (("r", r), ("n", n)), s),))

    def canonical(self) -> "RandLoRA":
        return dataclasses.replace(self, alpha=None)
