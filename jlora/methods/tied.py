"""Tied-LoRA: h = W0 x + v * (B (u * (A x))), with A and B tied across layers.

Renduchintala et al, `Tied-Lora: Enhancing parameter efficiency of LoRA with weight tying
<https://arxiv.org/abs/2311.09578>`_, 2023.
"""

import dataclasses
import math
import re
from typing import Annotated, Any

from jlora import targets
from jlora._axes import Leaf
from jlora._network import Array, Delta, Recipe, Word, constant
from jlora._tree import Target
from jlora.methods._fields import Rank, names
from jlora.methods.base import Dropping, Init, check_low_rank, uniform, zeros
from jlora.methods.vera import shared


@dataclasses.dataclass(frozen=True, kw_only=True)
class TiedLoRA(Dropping):
    """dW = a diag(u) b diag(v): a, b one copy for all layers where tied; u (r,), v (out,) one a layer.

    Weights whose paths differ in numbers alone (`layer_0/query/kernel`, `layer_1/query/kernel`) share a tied factor,
    as do the layers of a scanned stack; its gradient sums over them. a starts as in LoRA, b at zero, u and v at one;
    where b is frozen it starts as a does, and v at zero, so that the start is always the base. With nothing tied and
    a, b trained it is LoRA; with both tied and u, v trained VeRA.

    Attributes:
      rank: r, at most min(in, out).
      tied: which of "a" and "b" are tied.
      trained: which of "a", "b", "u", "v" are trained; the rest stay as they start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {f"layer_{n}": {"query": {"kernel": jnp.ones((6, 4))}} for n in range(3)}
      >>> jlora.count(jlora.adapt(params, jlora.TiedLoRA(rank=2)))
      (38, 110)

    References:
      Renduchintala et al, `Tied-Lora <https://arxiv.org/abs/2311.09578>`_, 2023.
    """

    rank: Rank = 8
    tied: Annotated[tuple[str, ...], names("ab")] = ("a", "b")
    trained: Annotated[tuple[str, ...], names("abuv")] = ("a", "b", "u", "v")
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if not {"b", "v"} & set(self.trained):
            raise ValueError("TiedLoRA trains neither b nor v: the update would stay zero for ever")

    @classmethod
    def tl5(cls, rank: int = 8, **fields: Any) -> "TiedLoRA":
        """The paper's TL5: a and b tied and trained, no vectors. `**fields` are those of the class."""
        return cls(rank=rank, trained=("a", "b"), **fields)

    @classmethod
    def tl6(cls, rank: int = 8, **fields: Any) -> "TiedLoRA":
        """The paper's TL6, which is the default: a and b tied, all four trained."""
        return cls(rank=rank, **fields)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_low_rank(leaf, self.rank)
        group = "tied/" + re.sub(r"\d+", "#", leaf.path)

        def matrix(name: str, sizes: tuple[int, ...], init: Init) -> Word:
            if name in self.tied:
                return shared(name, group, (self.rank,), sizes, init, trained=name in self.trained)
            return Array(name, init, (self.rank, *sizes), name in self.trained)

        # exactly one factor starts at zero: b, or v where b is frozen
        a = matrix("a", leaf.sizes("ik"), uniform(1 / math.sqrt(leaf.size("ik"))))
        frozen_b = uniform(1 / math.sqrt(self.rank))
        b = matrix("b", leaf.sizes("o"), zeros if "b" in self.trained else frozen_b)
        u = Array("u", constant(1.0), trained="u" in self.trained)
        v = Array("v", constant(1.0) if "b" in self.trained else zeros, trained="v" in self.trained)
        return Recipe((self.dropped(Delta("r I, r, r O, O -> I O", (a, u, b, v), (("r", self.rank),), 1.0, ("r",))),))
