"""SHiRA: W = W0 + P(v), a sparse update: v at fixed entries of the weight, and not one bit of any other changed.

Bhardwaj et al, `Sparse High Rank Adapters <https://arxiv.org/abs/2406.13175>`_, 2024.
"""

import dataclasses

import jax

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods import _entries
from jlora.methods._fields import Rank
from jlora.methods.base import Method, zeros


@dataclasses.dataclass(frozen=True)
class Sparse:
    """The update in a weight's own axes."""

    sizes: tuple[int, ...]

    def __call__(self, v: jax.Array, entries: jax.Array) -> jax.Array:
        return automatic(lambda v, entries: _entries.scattered(v, entries, self.sizes), (v, entries))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SHiRA(Method):
    """dW is v at r (in + out) entries of the weight, as many numbers as LoRA has, and zero elsewhere: of any rank.

    The entries are drawn at random for each weight and layer, the paper's SHiRA-Rand. They are a frozen factor, numbers
    through (in, out) in four digits of 256 (`methods._entries`), and saved with v, which starts at zero. Others may
    stand in their place before training begins, such as those of the largest gradients. Merging leaves every other
    element as it was, so that several such adapters hardly meet. dW is made dense at each use, as large as the weight:
    a sparse matrix has no contraction here.

    Attributes:
      rank: r, which says how many entries there are.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SHiRA(rank=1))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'v': (10,)}

    References:
      Bhardwaj et al, `SHiRA <https://arxiv.org/abs/2406.13175>`_, 2024.
    """

    rank: Rank = 8
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        n = self.rank * (d_in + d_out)
        _entries.check_entries(leaf, n, f"rank {self.rank} is {n} entries")
        entries = Array("entries", _entries.Random(d_in * d_out), (n, _entries.DIGITS), trained=False)
        function = Function(Sparse(leaf.sizes("ik") + leaf.sizes("o")), (Array("v", zeros, (n,)), entries))
        return Recipe((Delta("I O -> I O", (function,)),))
