"""FourierFT: dW = s Re F^-1(S), the inverse Fourier transform of a matrix S of which n random entries are trained.

Gao et al, `Parameter-Efficient Fine-Tuning with Discrete Fourier Transform <https://arxiv.org/abs/2405.03003>`_, 2024.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods import _entries
from jlora.methods._fields import Holds, Seed, nonzero
from jlora.methods.base import Method, zeros

TOO_LONG = 2**20  # a side from here on has angles that 32 bits do not hold


@dataclasses.dataclass(frozen=True)
class Waves:
    """Of the n entries the waves along one side of the weight, cosines, then sines, (2 n, sizes...), over the side.

    With S real, Re F^-1(S) is a sum over entries (u, v) of c / (in out) times cos a cos b - sin a sin b, where
    a = 2 pi u i / in and b = 2 pi v o / out. The minus is on the input side. An angle is counted in whole steps of the
    circle, so that it is as exact for large u i as for small.
    """

    sizes: tuple[int, ...]
    d_out: int  # an entry is numbered u d_out + v
    into: bool

    def __call__(self, entries: jax.Array) -> jax.Array:
        return automatic(self._made, (entries,))

    def _made(self, entries: jax.Array) -> jax.Array:
        number, d = _entries.from_digits(entries).astype(jnp.uint32), math.prod(self.sizes)
        u = (number // self.d_out if self.into else number % self.d_out)[:, None]
        i = jnp.arange(d, dtype=jnp.uint32)[None, :]
        # u i mod d, of i = 256 h + l: no product here reaches 2^32
        steps = ((u * (i // 256) % d) * 256 + u * (i % 256)) % d
        angle = steps.astype(jnp.float32) * (2 * math.pi / d)
        sine = -jnp.sin(angle) if self.into else jnp.sin(angle)
        return (jnp.concatenate([jnp.cos(angle), sine]) / d).reshape(-1, *self.sizes)


def twice(c: jax.Array) -> jax.Array:
    """c for the cosines, and again for the sines."""
    return jnp.concatenate([c, c])


@dataclasses.dataclass(frozen=True, kw_only=True)
class FourierFT(Method):
    """dW = s Re F^-1(S) of any rank, from n numbers c: what S (in, out) holds at n entries, and it is zero elsewhere.

    The entries are drawn from a seed, once for all weights of a shape, and are no part of a saved adapter: they are
    drawn again, and saved where others, such as peft's, were put in their place. Each entry is a wave along the input
    times one along the output, twice: dW is a product of rank 2 n of cosines and sines that are made at each use, and
    costs what a LoRA of that rank does, or 2 n in out where dW is made. There is no fast Fourier transform. c starts at
    zero, so that the start is the base; the authors' code draws it from N(0, 1).

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
        _entries.check_entries(leaf, self.n, f"n is {self.n}")
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        if max(d_in, d_out) >= TOO_LONG:
            raise ValueError(f"sides of (in, out) = {(d_in, d_out)} are no longer than {TOO_LONG - 1}; exclude it")
        group = f"fourierft/{self.seed}/{self.n}/{d_in} {d_out}"
        init, shape = _entries.seeded(self.seed, d_in * d_out), (self.n, _entries.DIGITS)
        entries = Array("entries", init, shape, trained=False, group=group, stacked=False, derived=True)
        waves = lambda roles: Function(Waves(leaf.sizes(roles), d_out, roles == "ik"), (entries,))
        words = waves("ik"), Function(twice, (Array("c", zeros, (self.n,)),)), waves("o")
        return Recipe((Delta("r I, r, r O -> I O", words, (("r", 2 * self.n),), self.scale),))

    def canonical(self) -> "FourierFT":
        return dataclasses.replace(self, scale=1.0)
