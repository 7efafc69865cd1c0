"""KronA^B: a Kronecker product beside a whole block, y = h + s (A x B) x, x the block's input and h its output.

Edalati et al, `KronA: Parameter Efficient Tuning with Kronecker Adapter <https://arxiv.org/abs/2212.10650>`_, 2022.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Step, constant
from jlora._trees._leaf import Leaf
from jlora.methods._beside import Beside, check_widths
from jlora.methods._fields import nonzero
from jlora.methods.base import uniform, zeros
from jlora.methods.krona import Size, factorize


def kronecker(h: jax.Array, x: jax.Array, s: jax.Array, a: jax.Array, b: jax.Array, *res: jax.Array) -> jax.Array:
    """h + s x (a x b) + s_one s_res x, one factor after the other: the product is never made."""
    check_widths(h, x)
    inner = x.reshape(*x.shape[:-1], a.shape[0], b.shape[0])
    y = h + s * jnp.einsum("...ij,io,jp->...op", inner, a, b).reshape(h.shape)
    if not res:
        return y
    s_one, s_res = res
    return y + s_one * s_res * x


@dataclasses.dataclass(frozen=True, kw_only=True)
class ParallelKronA(Beside):
    """KronA^B: h + s (a x b) x, a (i, o) and b (j, p), i j = o p = d; KronA^B_res, with `residual`: + s_res x.

    By default beside each feed-forward block. `KronA` is the form that stands beside one weight, and merges; this one
    goes around the block's nonlinearity, so that no weight can say it. The first factor indexes the slow half of the
    features. a starts as kaiming, b at zero, s_res at zero: the start is the base bit for bit. The paper's own
    start of s_res is not printed where we could read it.

    Attributes:
      factors: the size (i, o) of a; None takes divisors of d as near to square as there are.
      scale: s, frozen; `jlora.scale` multiplies it.
      residual: whether s_res x is added, s_res one number a block, trained (KronA^B_res).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"mlp": {"up": {"kernel": jnp.ones((6, 8))}, "down": {"kernel": jnp.ones((8, 6))}}}
      >>> adapted = jlora.adapt(params, jlora.ParallelKronA(residual=True))
      >>> {name: array.shape for name, array in adapted.trainable["mlp/down/kernel"].items()}
      {'a': (2, 2), 'b': (3, 3), 's_res': ()}

    References:
      Edalati et al, `KronA <https://arxiv.org/abs/2212.10650>`_, 2022.
    """

    factors: tuple[Size, Size] | None = None
    scale: Annotated[float, nonzero("scale")] = 1.0
    residual: bool = False

    def recipe(self, leaf: Leaf) -> Recipe | None:
        d = leaf.size("o")
        if not leaf.axes("o"):
            raise ValueError("there is no output axis for a module to add to")
        i, o = self.factors or (factorize(d)[0],) * 2
        if d % i or d % o:
            raise ValueError(f"factors {(i, o)} do not divide the block's width {d}")
        arrays = (
            Array("s", constant(self.scale), (), trained=False, scale=True),
            Array("a", uniform(1 / math.sqrt(i)), (i, o)),
            Array("b", zeros, (d // i, d // o)),
        )
        if self.residual:
            one = Array("s_one", constant(1.0), (), trained=False, scale=True)  # what `jlora.scale` multiplies
            arrays += (one, Array("s_res", zeros, ()))
        return Recipe(steps=(Step(kronecker, arrays, self.of),))

    def canonical(self) -> "ParallelKronA":
        return dataclasses.replace(self, scale=1.0)
