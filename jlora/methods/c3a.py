"""C3A: dW in circulant blocks, y_o = sum_i w_oi * x_i, a circular convolution of each two blocks of b numbers.

Chen et al, `Parameter-Efficient Fine-Tuning via Circular Convolution <https://arxiv.org/abs/2407.19342>`_, 2024.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function
from jlora._dtypes import widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import at_least
from jlora.methods.base import Method, check_sides, zeros


@dataclasses.dataclass(frozen=True)
class Waves:
    """Cosines and sines (f, 2, b) of the b // 2 + 1 frequencies that b real numbers have."""

    b: int

    def __call__(self) -> jax.Array:
        f = np.arange(self.b // 2 + 1)[:, None]
        angle = 2 * np.pi * (f * np.arange(self.b) % self.b) / self.b
        return jnp.asarray(np.stack([np.cos(angle), np.sin(angle)], 1), jnp.float32)


@dataclasses.dataclass(frozen=True)
class Spectrum:
    """The transform of each w, (outs, ins, f, 2, 2): what makes the waves of an output of those of an input.

    A wave c cos + s sin, convolved with w, is again one: turned and stretched by w's own c and s. The inverse
    transform's 1 / b is here, and its 2 of the frequencies that stand for two.
    """

    b: int

    def __call__(self, w: jax.Array) -> jax.Array:
        f = np.arange(self.b // 2 + 1)
        weight = np.asarray(np.where((f == 0) | (2 * f == self.b), 1, 2) / self.b, np.float32)
        w = widened(w)
        waves = (Waves(self.b)() * weight[:, None, None]).astype(w.dtype)
        c, s = jnp.einsum("pqk,fck->cpqf", w, waves, precision=lax.Precision.HIGHEST)
        return jnp.stack([jnp.stack([c, -s], -1), jnp.stack([s, c], -1)], -2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class C3A(Method):
    """dW in blocks of b times b, each a circulant matrix of one kernel w (b,): b times fewer parameters, any rank.

    In blocks dW_qp[i, j] = w_pq[(i - j) mod b] / in, for input i of block q and output j of block p; the 1 / in is the
    authors'. A convolution is a product for each of b // 2 + 1 frequencies, to which an activation comes by a dot with
    cosines and sines: b (in + out) + 2 in out / b multiply-adds a row, where W0 has in out. Or dW is made so, by b in
    out a call, whichever is less: for many rows that. There is no fast Fourier transform of activations. w (out / b,
    in / b, b) starts at zero.

    Attributes:
      block: b, at most: the largest divisor of both sides up to it is taken.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((12, 8))}}, jlora.C3A(block=4))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'w': (2, 3, 4)}

    References:
      Chen et al, `C3A <https://arxiv.org/abs/2407.19342>`_, 2024.
    """

    block: Annotated[int, at_least(2, "a block holds an integer number of inputs, at least two")] = 64
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        check_sides(leaf)
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        common = math.gcd(d_in, d_out)
        b = max(n for n in range(1, min(self.block, common) + 1) if common % n == 0)
        if b == 1:
            raise ValueError(f"no block from 2 to {self.block} divides both sides of (in, out) = {(d_in, d_out)}")
        w = Array("w", zeros, (d_out // b, d_in // b, b))
        waves = Function(Waves(b), ())
        sizes = (("p", d_out // b), ("q", d_in // b), ("f", b // 2 + 1), ("c", 2), ("d", 2), ("i", b), ("j", b))
        equation = "p q f c d, f c i, f d j -> (q i) (p j)"
        return Recipe((Delta(equation, (Function(Spectrum(b), (w,)), waves, waves), sizes, 1 / d_in),))
