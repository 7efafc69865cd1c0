"""Tied-LoRA: h = W0 x + v * (B (u * (A x))), with A and B tied across layers.

Renduchintala et al, `Tied-Lora: Enhancing parameter efficiency of LoRA with weight tying
<https://arxiv.org/abs/2311.09578>`_, 2023.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Annotated

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Word, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Init, PyTree
from jlora.methods._fields import Holds, Rank, letters_of
from jlora.methods.base import Dropping, check_sides, uniform, zeros
from jlora.methods.vera import shared


def _is_pattern(text: str) -> bool:
    try:
        return not re.compile(text).match("")  # one that finds nothing, everywhere, tells nothing apart
    except re.error:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedLoRA(Dropping):
    """dW = a diag(u) b diag(v): a, b one copy for all layers where tied; u (r,), v (out,) one a layer.

    Weights whose paths differ in numbers alone (`layer_0/query/kernel`, `layer_1/query/kernel`) share a tied factor,
    as do the layers of a scanned stack; its gradient sums over them. One trained factor starts at zero, so that the
    start is always the base: b, or the first of v, a, u that is trained where b is frozen. Otherwise a starts as in
    LoRA, b as a does, u and v at one. All of the paper's forms can be said: with nothing tied and a, b trained it is
    LoRA; with both tied and u, v trained VeRA.

    Attributes:
      rank: r.
      tied: which of "a" and "b" are tied.
      trained: which of "a", "b", "u", "v" are trained, at least one; the rest stay as they start.
      group: the name under which weights share what is tied; by default their path, without its numbers.
      fused: what tells apart, in their paths, projections that the paper has in one, a regular expression such as
        `"query|key|value"`. They see one input: those of a layer share a and u (of all layers where a is tied), and
        each has its b and v, which side by side are the paper's. None where they are fused, or have nothing in common.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {f"layer_{n}": {"query": {"kernel": jnp.ones((6, 4))}} for n in range(3)}
      >>> jlora.count(jlora.adapt(params, jlora.TiedLoRA(rank=2)))
      (38, 110)
      >>> params = {name: {"kernel": jnp.ones((6, 4))} for name in ("query", "value")}
      >>> jlora.count(jlora.adapt(params, jlora.TiedLoRA(rank=2, fused="query|value")))[0]  # a, u once; b, v twice
      38

    References:
      Renduchintala et al, `Tied-Lora <https://arxiv.org/abs/2311.09578>`_, 2023.
    """

    rank: Rank = 8
    tied: Annotated[tuple[str, ...], letters_of("ab")] = ("a", "b")
    trained: Annotated[tuple[str, ...], letters_of("abuv")] = ("a", "b", "u", "v")
    group: str | None = None
    fused: Annotated[str, Holds(_is_pattern, "write a regular expression, such as 'query|key|value'")] | None = None
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.trained:
            raise ValueError("TiedLoRA(trained=()) trains nothing: the update would stay zero for ever")

    @classmethod
    def tl5(cls, rank: int = 8, **fields: PyTree) -> "TiedLoRA":
        """The paper's TL5: a and b tied and trained, no vectors. `**fields` are those of the class."""
        return cls(rank=rank, trained=("a", "b"), **fields)

    @classmethod
    def tl6(cls, rank: int = 8, **fields: PyTree) -> "TiedLoRA":
        """The paper's TL6, which is the default: a and b tied, all four trained."""
        return cls(rank=rank, **fields)

    def _group(self, leaf: Leaf) -> str:
        return "tied/" + (self.group or re.sub(r"\d+", "#", leaf.path))

    def elsewhere(self, leaf: Leaf, path: Callable[[str], str]) -> "TiedLoRA":
        return dataclasses.replace(self, group=self._group(leaf).removeprefix("tied/"))

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_sides(leaf)
        together = lambda group: re.sub(self.fused, "*", group) if self.fused else group
        layer = f"tied/{together(leaf.path)}" if together(leaf.path) != leaf.path else None  # whose projections are one

        def matrix(name: str, sizes: tuple[int, ...], init: Init, group: str, own: str | None) -> Word:
            if name in self.tied:
                return shared(name, group, (self.rank,), sizes, init, trained=name in self.trained)
            return Array(name, init, (self.rank, *sizes), name in self.trained, own)

        first = next(name for name in "bvau" if name in self.trained)  # exactly one factor starts at zero
        begins = lambda name, init: zeros if name == first else init
        group = self._group(leaf)
        a_init, b_init = uniform(1 / math.sqrt(leaf.size("ik"))), uniform(1 / math.sqrt(self.rank))
        a = matrix("a", leaf.sizes("ik"), begins("a", a_init), together(group), layer)
        b = matrix("b", leaf.sizes("o"), begins("b", b_init), group, None)
        u, v = (
            Array(name, begins(name, constant(1.0)), trained=name in self.trained, group=own)
            for name, own in (("u", layer), ("v", None))
        )
        return Recipe((self.dropped(Delta("r I, r, r O, O -> I O", (a, u, b, v), (("r", self.rank),), 1.0, ("r",))),))
