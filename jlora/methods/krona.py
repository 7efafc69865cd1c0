"""KronA: dW = s A x B, a Kronecker product.

Edalati et al, `KronA: Parameter Efficient Tuning with Kronecker Adapter <https://arxiv.org/abs/2212.10650>`_, 2022.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Key, Shape
from jlora.methods._fields import at_least, nonzero
from jlora.methods.base import Method, uniform, zeros

Size = Annotated[int, at_least(1, "a size is an integer of at least 1")]


def factorize(size: int, factor: int = -1) -> tuple[int, int]:
    """`size` as a product (m, n) with m <= n, as near to square as divisors allow, m at most `factor` where given.

    LyCORIS's rule, its quirks included: a `factor` that divides `size` is taken as it stands, and the walk over
    divisors stops at the first that makes the sum of both larger than 1 + size.

    Example:
      >>> from jlora.methods.krona import factorize
      >>> [factorize(n) for n in (127, 250, 360, 768, 1024)]
      [(1, 127), (10, 25), (18, 20), (24, 32), (32, 32)]
      >>> [factorize(n, 8) for n in (768, 250, 1024)], factorize(360, 16)
      ([(8, 96), (5, 50), (8, 128)], (15, 24))
    """
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else max(factor, 1)  # none at all: (1, size), as there
    m = max(d for d in range(1, math.isqrt(size) + 1) if size % d == 0 and d <= limit)
    return m, size // m


@dataclasses.dataclass(frozen=True)
class ScaledEye:
    """x I with I (n, n)."""

    n: int

    def __call__(self, x: jax.Array) -> jax.Array:
        return x * jnp.eye(self.n, dtype=x.dtype)


def eye(key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """The identity, one for every layer of a stack."""
    return jnp.broadcast_to(jnp.eye(shape[-1], dtype=dtype), shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KronA(Method):
    """dW = s a x b with a (i, o), b (j, p), i j = in and o p = out: full rank is within reach for few parameters.

    The first factor indexes the slow half of each side. The product is never built: the activation, reshaped to
    (i, j), is contracted with one factor after the other. a starts as kaiming, b at zero.

    Attributes:
      factors: the size (i, o) of a; None takes divisors of in and out as near to square as there are.
      scale: s.
      residual: whether s_res I is added, s_res trained from zero (KronA_res); square weights alone have it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.KronA())
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'a': (2, 2), 'b': (3, 2)}

    References:
      Edalati et al, `KronA <https://arxiv.org/abs/2212.10650>`_, 2022.
    """

    factors: tuple[Size, Size] | None = None
    scale: Annotated[float, nonzero("the scale")] = 1.0
    residual: bool = False
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        if not leaf.axes("ik") or not leaf.axes("o"):
            raise ValueError("a Kronecker product needs input and output axes")
        i, o = self.factors or (factorize(d_in)[0], factorize(d_out)[0])
        if d_in % i or d_out % o:
            raise ValueError(f"factors {(i, o)} do not divide (in, out) = {(d_in, d_out)}")
        a, b = Array("a", uniform(1 / math.sqrt(i))), Array("b", zeros)
        sizes = (("i", i), ("o", o), ("j", d_in // i), ("p", d_out // o))
        kron = Delta("i o, j p -> (i j) (o p)", (a, b), sizes, self.scale)
        if not self.residual:
            return Recipe((kron,))
        if d_in != d_out:
            raise ValueError(f"s_res I needs a square weight, not (in, out) = {(d_in, d_out)}; write residual=False")
        # the identity is a Kronecker product of two small ones, and costs what these cost
        m, n = factorize(d_in)
        small = Array("eye", eye, (m, m), trained=False, derived=True)
        scaled = Function(ScaledEye(n), (Array("s_res", zeros, ()),))
        letters = (("m", m), ("n", m), ("q", n), ("r", n))
        return Recipe((kron, Delta("m n, q r -> (m q) (n r)", (small, scaled), letters, s="s_one")))

    def canonical(self) -> "KronA":
        return dataclasses.replace(self, scale=1.0)
