"""GLoRA: W = W0 + W0 * A + B and b = b0 + D * b0 + E, each of A, B, D, E of low rank, a vector, a number or none.

Chavan et al, `One-for-All: Generalized LoRA for Parameter-Efficient Fine-tuning <https://arxiv.org/abs/2306.07967>`_,
2023. Its C, which adds W0 C to the bias, is not here: the bias of a layer sees no other weight.
"""

import dataclasses
import math
from typing import Literal, TypeAlias

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Base, Delta, Function, Ones, Word
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Rank
from jlora.methods.base import Method, check_sides, uniform, zeros

Wide: TypeAlias = Literal["lora", "vector", "constant", "none"]
Narrow: TypeAlias = Literal["vector", "constant", "none"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class GLoRA(Method):
    """W = W0 + W0 * A + B and b = b0 + D * b0 + E: what multiplies a weight and its bias, and what is added to them.

    Each of the four is `"lora"`, a product of rank r (A and B alone), `"vector"`, one number for each output,
    `"constant"`, one number, or `"none"`. The paper searches which is best for each layer: several rules, one a layer,
    say what it found. The bias of a layer takes part whether or not `target` names it; `exclude="bias$"` leaves it.
    All start at zero, but au and bu, the factors on the input side, which are drawn (Xavier).

    Attributes:
      rank: r of those that are of low rank; 0 leaves a weight alone.
      a: the form of A, which multiplies W0.
      b: the form of B, which is added to it.
      d: the form of D, which multiplies b0.
      e: the form of E, which is added to it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> adapted = jlora.adapt(params, jlora.GLoRA(rank=2, a="vector", e="none"))
      >>> {path: {n: x.shape for n, x in named.items()} for path, named in adapted.trainable.items()}
      {'query/bias': {'d': ()}, 'query/kernel': {'a': (4,), 'bu': (2, 6), 'bd': (2, 4)}}

    References:
      Chavan et al, `GLoRA <https://arxiv.org/abs/2306.07967>`_, 2023.
    """

    rank: Rank = 8
    a: Wide = "lora"
    b: Wide = "lora"
    d: Narrow = "constant"
    e: Narrow = "constant"
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.a == self.b == "none":
            raise ValueError("GLoRA (a='none', b='none') leaves every kernel as it is; for biases alone write BitFit()")

    def beside(self, leaf: Leaf) -> "GLoRA | None":
        return None if self.d == self.e == "none" else self

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        if leaf.axes("ik"):
            check_sides(leaf)
            found = self._network(leaf, "a", self.a, True), self._network(leaf, "b", self.b, False)
        else:
            found = self._network(leaf, "d", self.d, True), self._network(leaf, "e", self.e, False)
        return Recipe(tuple(delta for delta in found if delta is not None)) if any(found) else None

    def _network(self, leaf: Leaf, name: str, form: str, multiplies: bool) -> Delta | None:
        """The network of one of the four: beside W0 where it multiplies it, repeated over what it does not have."""
        if form == "none":
            return None
        sides = [(letter, roles) for letter, roles in (("I", "ik"), ("O", "o")) if leaf.axes(roles)]
        weight = " ".join(letter for letter, _ in sides)
        if form == "lora":
            bound = math.sqrt(6 / (self.rank + leaf.size("ik")))
            operands = [("r I", Array(f"{name}u", uniform(bound))), ("r O", Array(f"{name}d", zeros))]
        else:
            operands = [("O" if form == "vector" else "", Array(name, zeros))]
        if multiplies:
            operands = [(weight, Base()), *operands]
        else:
            held = " ".join(letters for letters, _ in operands)
            operands += [
                (letter, Function(Ones(leaf.sizes(roles)), ())) for letter, roles in sides if letter not in held
            ]
        equation = f"{', '.join(letters for letters, _ in operands)} -> {weight}"
        words: tuple[Word, ...] = tuple(word for _, word in operands)
        return Delta(equation, words, (("r", self.rank),) if form == "lora" else ())
