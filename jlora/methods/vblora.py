"""VB-LoRA: dW = a b, each row of a and b made of sub-vectors, each a mixture of k vectors of one bank.

    u = sum_{n in top k of sigma} softmax(sigma_top)_n v_n,   a = [u u ...], b = [u u ...]

Li, Han and Ji, `VB-LoRA: Extreme Parameter Efficient Fine-Tuning with Vector Banks
<https://arxiv.org/abs/2405.15179>`_, 2024.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function
from jlora._dtypes import alike, widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Holds, Rank, at_least
from jlora.methods.base import Dropping, check_sides, normal, uniform


@dataclasses.dataclass(frozen=True)
class Composed:
    """Rows (r, side) out of logits (r, sub-vectors, h) and a bank (h, b): the best k, mixed, one after the other."""

    k: int
    sizes: tuple[int, ...]

    def __call__(self, logits: jax.Array, bank: jax.Array) -> jax.Array:
        # JAX asks where what is gathered lives: whole, as any weight may take any vector
        return automatic(self._made, (logits, bank), PartitionSpec())

    def _made(self, logits: jax.Array, bank: jax.Array) -> jax.Array:
        logits, bank = alike(widened(logits), bank)
        best, which = lax.top_k(logits, self.k)
        vectors = bank.at[which].get(mode="promise_in_bounds")  # (r, sub-vectors, k, b)
        rows = jnp.sum(jax.nn.softmax(best, axis=-1)[..., None] * vectors, axis=-2).reshape(len(logits), -1)
        return rows[:, : math.prod(self.sizes)].reshape(-1, *self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class VBLoRA(Dropping):
    """dW = a b out of one bank of h vectors of length b, which all weights share: a model's update in its logits.

    A row of a or b is cut into sub-vectors of length b; each is the softmax mixture of the k bank vectors whose logits
    are largest. `bank (h, b)` starts at U(-0.02, 0.02), the logits `sigma_a (r, in / b, h)` and `sigma_b (r, out / b,
    h)` at N(0, 0.1^2). Logits that are not among the k have no gradient, until others fall below them.

    The start is near the base and not at it: no factor can be zero, or nothing would have a gradient. dW begins with
    entries of some sqrt(r) 0.02^2 / (3 k), thousands of times below a pretrained weight's with the numbers here.
    `jlora.scale(adapted, 0)` is the base.

    Weights of every shape under rules of one h and b share the bank, in all rules of a spec. The paper's widths are
    multiples of b; where b does not divide one, the end of the last sub-vector is left out.

    Attributes:
      rank: r.
      vectors: h, how many the bank holds.
      length: b, of each of them.
      k: how many are mixed, from 2 to h. With one alone, the logits would have no gradient.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {f"layer_{n}": {"query": {"kernel": jnp.ones((6, 4))}} for n in range(3)}
      >>> adapted = jlora.adapt(params, jlora.VBLoRA(rank=1, vectors=5, length=2))
      >>> jlora.count(adapted)[0] == 5 * 2 + 3 * 5 * (3 + 2)  # the bank once, and logits
      True

    References:
      Li et al, `VB-LoRA <https://arxiv.org/abs/2405.15179>`_, 2024.
    """

    rank: Rank = 4
    vectors: Annotated[int, Holds(lambda n: 2 <= n < 2**31, "a bank holds at least two vectors, in 31 bits")] = 256
    length: Annotated[int, Holds(lambda n: 1 <= n < 2**31, "a length is an integer of at least 1, in 31 bits")] = 256
    k: Annotated[
        int, at_least(2, "an integer number of vectors is mixed, at least two: one has no logits to learn")
    ] = 2
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k > self.vectors:
            raise ValueError(f"VBLoRA(k={self.k}, vectors={self.vectors}): it mixes more vectors than there are")

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_sides(leaf)
        group = f"vblora/{self.vectors}/{self.length}"
        bank = Array("bank", uniform(0.02), (self.vectors, self.length), group=group, stacked=False)

        def rows(name: str, sizes: tuple[int, ...]) -> Function:
            tiles = -(-math.prod(sizes) // self.length)
            logits = Array(name, normal(0.1), (self.rank, tiles, self.vectors))
            return Function(Composed(self.k, sizes), (logits, bank))

        words = rows("sigma_a", leaf.sizes("ik")), rows("sigma_b", leaf.sizes("o"))
        return Recipe((self.dropped(Delta("r I, r O -> I O", words, (("r", self.rank),))),))
