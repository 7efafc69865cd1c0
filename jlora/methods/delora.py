"""DeLoRA: dW = lam / r sum_n |W0| a_n / ||a_n|| b_n / ||b_n||: directions and strength are learned apart.

Bini, Girrbach and Akata, `Decoupling Angles and Strength in Low-rank Adaptation <https://arxiv.org/abs/2503.18225>`_,
2025.
"""

import dataclasses
import math
from typing import Annotated

import jax
import jax.numpy as jnp

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._dtypes import widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import W0, Keys, Place
from jlora.methods._fields import Rank, nonzero
from jlora.methods.base import Dropping, check_sides, of_the_weight, uniform, zeros
from jlora.methods.starts import values

LEAST = 1e-4  # of a length that something is divided by


def directions(a: jax.Array) -> jax.Array:
    """Each rank's row divided by its length, or by `LEAST` where it is shorter; a gradient also where it is zero."""
    a = widened(a)
    square = jnp.sum(a * a, tuple(range(1, a.ndim)), keepdims=True)
    return a / jnp.sqrt(jnp.maximum(square, LEAST**2))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeLoRA(Dropping):
    """dW = lam / r |W0| sum_n a_n b_n, each a_n and b_n of length one: no step can move W further than lam allows.

    |W0| is the norm of W0 for each input, kept from the start, so that `adapt` reads the values of the weight. lam,
    one number, is trained with the directions. a starts as kaiming, b at zero, where the start is the base, as in the
    authors' code for peft. (The paper draws b too, and subtracts the first dW from W0.) Lengths count as at least
    1e-4: the first gradient of b is large, and the first steps of Adam give the update its full strength.

    Attributes:
      rank: r.
      strength: lam at the start; the authors take 10 or more, and rates of learning ten times those of LoRA.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.DeLoRA(rank=2)))
      (21, 45)

    References:
      Bini et al, `DeLoRA <https://arxiv.org/abs/2503.18225>`_, 2025.
    """

    rank: Rank = 8
    strength: Annotated[float, nonzero("strength")] = 15.0
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        r = self.rank
        if r == 0:
            return None
        check_sides(leaf)
        unit = lambda name, init, roles: Function(directions, (Array(name, init, (r, *leaf.sizes(roles))),))
        words = (
            Array("w", of_the_weight, trained=False),
            unit("a", uniform(1 / math.sqrt(leaf.size("ik"))), "ik"),
            Array("lam", constant(self.strength), ()),
            unit("b", zeros, "o"),
        )
        return Recipe((self.dropped(Delta("I, r I, , r O -> I O", words, (("r", r),), 1 / r)),))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        if isinstance(weight, jax.ShapeDtypeStruct):
            raise ValueError(f"DeLoRA on {leaf.path!r} starts from the norms of the weight, and it has no values")
        arrays = super().initial(leaf, recipe, keys, weight)
        w = jnp.linalg.norm(values(weight, leaf), axis=-1)
        return arrays | {(leaf.path, "w"): w.reshape(*leaf.stack, *leaf.sizes("ik")).astype(self.dtype)}

    def canonical(self) -> "DeLoRA":
        return dataclasses.replace(self, strength=15.0)
