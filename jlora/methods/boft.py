"""BOFT: W = B_m ... B_2 B_1 W0 diag(g), each B_k rotations in blocks of inputs that stand further apart.

Liu et al, `Parameter-Efficient Orthogonal Finetuning via Butterfly Factorization <https://arxiv.org/abs/2311.06243>`_,
2023; the gain g is that of the authors' code.
"""

import dataclasses
from typing import Annotated

import jax
from jax.sharding import PartitionSpec

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import at_least
from jlora.methods.base import Method, check_sides, zeros
from jlora.methods.ia3 import gain
from jlora.methods.oft import Cayley


@dataclasses.dataclass(frozen=True)
class Factor:
    """The blocks of the k-th factor, (n, n) each, in axes of their own."""

    n: int
    k: int
    shape: tuple[int, ...]

    def __call__(self, s: jax.Array, q: jax.Array) -> jax.Array:
        made = lambda s, q: Cayley(self.n)(s, q[self.k]).reshape(self.shape)
        return automatic(made, (s, q), PartitionSpec())


@dataclasses.dataclass(frozen=True, kw_only=True)
class BOFT(Method):
    """W = B_m ... B_1 W0 diag(g): a rotation of all inputs from m sparse ones, as a fast Fourier transform is made.

    The inputs are halves of blocks of n, and the number of a half is written in bits. B_k turns the halves that differ
    in bit k alone, by (I + Q) (I - Q)^-1 as in OFT; after m factors 2^m halves have met. The factors are contracted one
    after the other, and never multiplied out. q (m, blocks, n (n - 1) / 2) holds what stands above the diagonals of Q,
    zero at the start; g is one there. `jlora.scale` multiplies Q and g - 1: at zero it is the base.

    Attributes:
      block: n, an even number at most: the largest is taken of which 2^(m - 1) blocks divide the input width.
      factors: m. One is OFT.
      gain: whether outputs are rescaled by g (out,). The layer's bias is not.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((16, 4))}}, jlora.BOFT(block=4))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'g': (4,), 'q': (2, 4, 6)}

    References:
      Liu et al, `BOFT <https://arxiv.org/abs/2311.06243>`_, 2023.
    """

    block: Annotated[int, at_least(2, "a block holds an integer number of inputs, at least two")] = 8
    factors: Annotated[int, at_least(1, "the number of factors is an integer of at least 1")] = 2
    gain: bool = True
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        check_sides(leaf)
        d_in, m = leaf.size("ik"), min(self.factors, 64)  # no width has so many bits
        fits = [n for n in range(2, min(self.block, d_in) + 1, 2) if d_in % (n << m - 1) == 0]
        if not fits:
            raise ValueError(
                f"no {2 ** (m - 1)} even blocks of at most {self.block} divide the input width {d_in}; "
                "write fewer factors, or OFT"
            )
        n = max(fits)
        half, groups = n // 2, d_in // (n << m - 1)
        q = Array("q", zeros, (m, d_in // n, n * (n - 1) // 2))
        s = Array("s", constant(1.0), (), trained=False, scale=True)
        # an input is (group, its bits from the highest, place in a half): bit k is c_k before B_k turns it, d_k after
        bits, words, equation = range(m), [], []
        for k in bits:
            others = [f"c{j}" for j in reversed(bits[k + 1 :])] + [f"d{j}" for j in reversed(bits[:k])]
            equation.append(" ".join(["g", *others, f"d{k}", f"h{k + 1}", f"c{k}", f"h{k}"]))
            words.append(Function(Factor(n, k, (groups, *(2,) * (m - 1), 2, half, 2, half)), (s, q)))
        side = lambda name, h: "(" + " ".join(["g", *(f"{name}{j}" for j in reversed(bits)), f"h{h}"]) + ")"
        halves = tuple((f"h{j}", half) for j in range(m + 1))
        sizes = (("g", groups), *((f"{name}{j}", 2) for name in "cd" for j in bits), *halves)
        turn = Delta(f"{', '.join(equation)} -> {side('d', m)} {side('c', 0)}", tuple(words), sizes)
        return Recipe(gain=gain("O", Array("g", constant(1.0), leaf.sizes("o"))) if self.gain else None, left=turn)
