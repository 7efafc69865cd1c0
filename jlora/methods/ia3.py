"""IA3: W = W0 diag(l) and b = l b0, learned rescaling of activations.

Liu et al, `Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning
<https://arxiv.org/abs/2205.05638>`_, 2022.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Literal

import jax

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._dtypes import alike
from jlora._trees._axes import is_trainable_dtype
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target, shape_dtype
from jlora._types import PyTree
from jlora.methods.base import Method


def keys_and_values(path: str, leaf: PyTree) -> bool:
    """Key and value projections: two of the three places of the paper (the third is the input of the FFN's last)."""
    shape, dtype = shape_dtype(leaf)
    named = re.search(r"(^|[/_.])(key|value|k|v|k_proj|v_proj)/(kernel|w|weight)$", path) is not None
    return named and len(shape) >= 2 and is_trainable_dtype(dtype)


def weakened(s: jax.Array, gain: jax.Array) -> jax.Array:
    """1 + s (gain - 1): the gain at s = 1, none at s = 0."""
    s, gain = alike(s, gain)
    return 1 + s * (gain - 1)


def gain(side: str, array: Array) -> Delta:
    """A trained vector on one side, under the scale `s` of the weight."""
    s = Array("s", constant(1.0), (), trained=False, scale=True)
    return Delta(f"{side} -> {side}", (Function(weakened, (s, array)),))


@dataclasses.dataclass(frozen=True, kw_only=True)
class IA3(Method):
    """W = W0 l: a trained factor for every output (or input) of a weight, one at the start.

    On the output side the bias of the layer is rescaled too, by the same l and whether or not `target` names it, as
    the activation is in the paper: l (x W0 + b0). `exclude="bias$"` leaves it as it is.

    Attributes:
      side: `"out"` for keys and values, `"in"` for the last weight of the feed-forward network.
      of: on a bias, the path of the weight whose l this is; `adapt` writes it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"key": {"kernel": jnp.ones((6, 4))}, "down": {"kernel": jnp.ones((4, 6))}}
      >>> jlora.count(jlora.adapt(params, [jlora.IA3(), jlora.IA3(side="in", target="down/")]))
      (8, 56)

    References:
      Liu et al, `(IA)^3 <https://arxiv.org/abs/2205.05638>`_, 2022.
    """

    side: Literal["out", "in"] = "out"
    of: str = ""
    target: Target = keys_and_values

    def beside(self, leaf: Leaf) -> "IA3 | None":
        return dataclasses.replace(self, of=leaf.path) if self.side == "out" else None

    def elsewhere(self, leaf: Leaf, path: Callable[[str], str]) -> "IA3":
        return dataclasses.replace(self, of=self.of and path(self.of))

    def recipe(self, leaf: Leaf) -> Recipe | None:
        roles, letter = ("o", "O") if self.side == "out" else ("ik", "I")
        if not leaf.axes(roles):
            raise ValueError(f"there is no {self.side}put axis to rescale")
        return Recipe(gain=gain(letter, Array("l", constant(1.0), leaf.sizes(roles), group=self.of or None)))
