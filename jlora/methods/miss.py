"""MiSS: dW is one small block d (r, out) that stands below itself in / r times: its input side is cut into shards of r.

    dW[i r + j, o] = d[j, o]

Kang and Yin, `MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure
<https://arxiv.org/abs/2409.15371>`_, 2024 (first named Bone).
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from jlora import targets
from jlora._algebra._mesh import reshaped
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, Word
from jlora._dtypes import widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Rank, at_least
from jlora.methods.base import Dropping, check_sides, zeros

Count = Annotated[int, at_least(1, "a number of columns is an integer of at least 1")]


@dataclasses.dataclass(frozen=True)
class InShard:
    """(r, sizes...) with a one where an input, counted over all its axes, has the place j in its shard."""

    r: int
    sizes: tuple[int, ...]

    def __call__(self) -> jax.Array:
        at = jnp.arange(math.prod(self.sizes)) % self.r
        return (at == jnp.arange(self.r)[:, None]).astype(jnp.float32).reshape(self.r, *self.sizes)


@dataclasses.dataclass(frozen=True)
class InBlocks:
    """W0 as (in / r, r, out / r, r)."""

    leaf: Leaf  # of one layer of a stack
    r: int

    def __call__(self, w0: jax.Array) -> jax.Array:
        leaf, r = self.leaf, self.r
        w0 = lax.transpose(widened(w0), (*leaf.axes("ik"), *leaf.axes("o")))
        return reshaped(w0, (leaf.size("ik") // r, r, leaf.size("o") // r, r))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiSS(Dropping):
    """dW = d, repeated along the input: shards of r inputs share one trained block d (r, out), zero at the start.

    A layer adds its shards up and multiplies the r sums by d. Where r does not divide the input width, the last shard
    is cut off; there and on convolutions the sum is a product with a fixed matrix of ones and zeros.

    Attributes:
      rank: r, the size of a shard, at most the input width.
      mini: m, of which `out` is a multiple: d is (r, m) and repeats along the output too. None: d is as wide as it.
      bat: whether each block of W0 turns what it gets, dW = W0 d + d for blocks (r, r) of W0, d one block for each
        r outputs (the paper's Bat); r then divides both sides.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> made = [jlora.adapt(params, jlora.MiSS(rank=2, **o)) for o in ({}, {"mini": 1}, {"bat": True})]
      >>> [adapted.trainable["query/kernel"]["d"].shape for adapted in made]
      [(2, 4), (2, 1), (2, 2, 2)]

    References:
      Kang and Yin, `MiSS <https://arxiv.org/abs/2409.15371>`_, 2024.
    """

    rank: Rank = 64
    mini: Count | None = None
    bat: bool = False
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bat and self.mini is not None:
            raise ValueError(f"MiSS(mini={self.mini}, bat=True): blocks of bat are (r, r); write one of the two")

    def recipe(self, leaf: Leaf) -> Recipe | None:
        r = self.rank
        if r == 0:
            return None
        check_sides(leaf)
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        if r > d_in:
            raise ValueError(f"a shard of {r} inputs is more than the {d_in} there are; write a smaller rank")
        if self.bat:
            return self._bat(leaf)
        m = self.mini or d_out
        if d_out % m:
            raise ValueError(f"mini={m} columns do not repeat to an output width of {d_out}; write a divisor of it")
        side, places = ("(i r)", ()) if d_in % r == 0 and not leaf.axes("k") else ("I", ("r I",))
        columns = "O" if self.mini is None else "q"
        equation = f"{', '.join((*places, f'r {columns}'))} -> {side} {columns if self.mini is None else '(p q)'}"
        words: tuple[Word, ...] = (*(Function(InShard(r, leaf.sizes("ik")), ()) for _ in places), Array("d", zeros))
        sizes = (("r", r), ("i", d_in // r), ("p", d_out // m), ("q", m))
        return Recipe((self.dropped(Delta(equation, words, sizes)),))

    def _bat(self, leaf: Leaf) -> Recipe:
        r, d_in, d_out = self.rank, leaf.size("ik"), leaf.size("o")
        if d_in % r or d_out % r:
            raise ValueError(f"bat cuts (in, out) = {(d_in, d_out)} into blocks of {r}, which does not divide both")
        blocks, d = Function(InBlocks(leaf.layer, r), (), base=True), Array("d", zeros)
        sizes = (("i", d_in // r), ("p", d_out // r), *((x, r) for x in "abq"))
        turned = Delta("i a p q, p a b -> (i b) (p q)", (blocks, d), sizes)
        return Recipe((self.dropped(turned), self.dropped(Delta("p q b -> (i b) (p q)", (d,), sizes))))
