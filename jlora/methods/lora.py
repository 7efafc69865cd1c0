"""LoRA: h = W0 x + (alpha / r) B A x.

Hu et al, `LoRA: Low-Rank Adaptation of Large Language Models <https://arxiv.org/abs/2106.09685>`_, 2021.
Kalajdzievski, `A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
<https://arxiv.org/abs/2312.03732>`_, 2023.
"""

import dataclasses
import math
from typing import Literal

import jax.numpy as jnp

from jlora import targets
from jlora._axes import Leaf
from jlora._network import Array, Delta, Function, Recipe
from jlora._tree import Target
from jlora.methods.base import Init, Method, check_low_rank, check_rank, normal, uniform, zeros

Slices = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Place:
    """Writes an array into the range [start, start + width) of a flat side, zeros elsewhere."""

    start: int
    side: tuple[int, ...]

    def __call__(self, b: jnp.ndarray) -> jnp.ndarray:
        full = jnp.zeros((*b.shape[:-1], math.prod(self.side)), b.dtype)
        return full.at[..., self.start : self.start + b.shape[-1]].set(b).reshape(*b.shape[:-1], *self.side)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank update: dW = s a b with a (in, r), b (r, out), stored rank first: `a (r, in)`, `b (r, out)`.

    b starts at zero, so the adapted model starts as the base model. An `embedding` starts with a at zero and b
    normal, as loralib does: its rows are looked up by a.

    Attributes:
      rank: r, at most min(in, out). 0 leaves the weight alone.
      alpha: the numerator of s; defaults to the rank, so that s is 1.
      scaling: `"rank"` for s = alpha / r, `"sqrt"` for rsLoRA's alpha / sqrt(r).
      init: of a: `"kaiming"`, U(-1/sqrt(in), 1/sqrt(in)) as loralib has it, or `"gaussian"`, N(0, 1/r^2) as peft does.
      dropout: rate on the activation of this branch, in [0, 1); needs a key (`jlora.with_dropout`).
      slices: ranges `(start, stop)` of the flattened output axes that are adapted, each with factors of its own
        (loralib's MergedLinear for a fused projection); None for all.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> adapted = jlora.adapt(params, jlora.LoRA(rank=2))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'a': (2, 6), 'b': (2, 4)}

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.
    """

    rank: int = 8
    alpha: float | None = None
    scaling: Literal["rank", "sqrt"] = "rank"
    init: Literal["kaiming", "gaussian"] = "kaiming"
    dropout: float = 0.0
    slices: Slices | None = None
    target: Target = targets.attention

    def __post_init__(self) -> None:
        check_rank(self)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA(dropout={self.dropout}): a rate lies in [0, 1)")
        if self.scaling not in ("rank", "sqrt"):
            raise ValueError(f"LoRA(scaling={self.scaling!r}): write 'rank' (alpha / r) or 'sqrt' (alpha / sqrt(r))")
        if self.init not in ("kaiming", "gaussian"):
            raise ValueError(f"LoRA(init={self.init!r}): write 'kaiming' or 'gaussian'")
        if self.slices is not None:
            object.__setattr__(self, "slices", tuple((int(a), int(b)) for a, b in self.slices))

    @property
    def scale(self) -> float:
        """s: alpha / r, or alpha / sqrt(r)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    @property
    def trains_a(self) -> bool:
        """Whether a is trained."""
        return True

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        check_low_rank(leaf, self.rank)
        # exactly one of the two starts at zero, and it is trained
        flip = leaf.name == "embedding" and self.trains_a
        a = Array("a", zeros if flip else self._init_a(d_in), trained=self.trains_a)
        b = Array("b", normal(1.0) if flip else zeros)
        sizes = (("r", self.rank),)
        equation = "r I, r O -> I O"
        if self.slices is None:
            return Recipe((Delta(equation, (a, b), sizes, self.scale, ("r",), self.dropout),))
        deltas = []
        for n, (start, stop) in enumerate(self._checked_slices(d_out)):
            a_n = dataclasses.replace(a, name=f"a{n}")
            b_n = dataclasses.replace(b, name=f"b{n}", shape=(self.rank, stop - start))
            placed = Function(Place(start, leaf.sizes("o")), (b_n,))
            deltas.append(Delta(equation, (a_n, placed), sizes, self.scale, ("r",), self.dropout))
        return Recipe(tuple(deltas))

    def _init_a(self, d_in: int) -> Init:
        return uniform(1 / math.sqrt(d_in)) if self.init == "kaiming" else normal(1 / self.rank)

    def _checked_slices(self, d_out: int) -> Slices:
        assert self.slices is not None
        ends = 0
        for start, stop in sorted(self.slices):
            if not ends <= start < stop <= d_out:
                raise ValueError(f"slices {self.slices} must be disjoint ranges within the {d_out} output columns")
            if self.rank > stop - start:
                raise ValueError(f"rank {self.rank} is above the width of the slice {(start, stop)}")
            ends = stop
        if not self.slices:
            raise ValueError("slices=() adapts nothing; write the ranges, or None for all columns")
        return self.slices

    def canonical(self) -> "LoRA":
        return dataclasses.replace(self, alpha=None, scaling="rank", init="kaiming")

    def describe(self) -> str:
        return "LoRA" if self.slices is None else "LoRA in slices"
