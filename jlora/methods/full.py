"""Full: W = W0 + dW, the whole leaf trained as a float32 delta."""

import dataclasses

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora.methods.base import Method, zeros


@dataclasses.dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Trains whole leaves: a new head, norms, anything named by `target`.

    The leaf stays as it is and a float32 delta of its shape is trained beside it, from zero: small updates are not
    lost in a bfloat16 weight, the base is untouched, and `jlora.scale(adapted, 0)` is the base again. Weight decay
    acts on the delta (towards the base), not on the sum.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"head": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> jlora.count(jlora.adapt(params, jlora.Full(target="head")))
      (8, 16)
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "":
            raise ValueError("Full() would train every leaf; name them: Full(target=r'classifier/')")

    def recipe(self, leaf: Leaf) -> Recipe | None:
        return dense_delta(leaf)


def dense_delta(leaf: Leaf) -> Recipe:
    """`delta -> W` with the leaf's own axes."""
    sides = " ".join(s for s, roles in (("I", "ik"), ("O", "o")) if leaf.axes(roles))
    return Recipe((Delta(f"{sides} -> {sides}", (Array("delta", zeros),)),))
