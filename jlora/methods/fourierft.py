"""FourierFT: dW = s Re F^-1(S), the inverse Fourier transform of a matrix S of which n random entries are trained.

Gao et al, `Parameter-Efficient Fine-Tuning with Discrete Fourier Transform <https://arxiv.org/abs/2405.03003>`_, 2024.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax import lax

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._words import Array, Delta, Function, Recipe
from jlora._dtypes import widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods import _entries
from jlora.methods._fields import Holds, Seed, nonzero
from jlora.methods.base import Method, zeros


def inverse(s: jax.Array) -> jax.Array:
    """Re F^-1(S), in a loop of one turn: XLA's transform for CPUs fails where what follows has its axes turned."""
    return lax.scan(lambda _, s: (None, jnp.fft.ifft2(s).real), None, s[None])[1][0]


@dataclasses.dataclass(frozen=True)
class Inverse:
    """Re F^-1(S) in a weight's own axes, of matrices (in, out)."""

    matrix: tuple[int, int]
    sizes: tuple[int, ...]

    def __call__(self, c: jax.Array, entries: jax.Array) -> jax.Array:
        return automatic(self._made, (c, entries))

    def _made(self, c: jax.Array, entries: jax.Array) -> jax.Array:
        return inverse(_entries.scattered(widened(c), entries, self.matrix)).reshape(self.sizes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    """dW = s Re F^-1(S) of any rank, from n numbers c: what S (in, out) holds at n entries, and it is zero elsewhere.

    The entries are drawn from a seed, once for all weights of a shape, and are no part of a saved adapter: they are
    drawn again, and saved where others, such as peft's, were put in their place. A fast Fourier transform makes dW
    dense at each use, some in out log(in out) operations: there is no cheaper contraction once n is above a small
    rank. c starts at zero, so that the start is the base; the authors' code draws it from N(0, 1).

    Attributes:
      n: the number of entries, at most in out.
      scale: s; the paper takes 100 to 300, as the transform divides by in out.
      seed: of the entries.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.FourierFT(n=5)))
      (5, 29)

    References:
      Gao et al, `FourierFT <https://arxiv.org/abs/2405.03003>`_, 2024.
    """

    n: Annotated[int, Holds(lambda n: 1 <= n < 2**31, "n is an integer of at least 1, in 31 bits")] = 1000
    scale: Annotated[float, nonzero("the scale")] = 150.0
    seed: Seed = 0
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        _entries.check(leaf, self.n, f"n is {self.n}")
        matrix = leaf.size("ik"), leaf.size("o")
        group = f"fourierft/{self.seed}/{self.n}/{matrix[0]} {matrix[1]}"
        init = _entries.seeded(self.seed, math.prod(matrix))
        shape = self.n, _entries.DIGITS
        entries = Array("entries", init, shape, trained=False, group=group, stacked=False, derived=True)
        made = Inverse(matrix, leaf.sizes("ik") + leaf.sizes("o"))
        function = Function(made, (Array("c", zeros, (self.n,)), entries))
        return Recipe((Delta("I O -> I O", (function,), scale=self.scale),))

    def canonical(self) -> "FourierFT":
        return dataclasses.replace(self, scale=1.0)
