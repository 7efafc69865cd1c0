"""LoRA: h = W0 x + (alpha / r) B A x.

Hu et al, `LoRA: Low-Rank Adaptation of Large Language Models <https://arxiv.org/abs/2106.09685>`_, 2021.
Kalajdzievski, `A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA
<https://arxiv.org/abs/2312.03732>`_, 2023.
"""

import dataclasses
import math
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from jlora import targets
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Difference, Function
from jlora._dtypes import alike
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import W0, Init, Keys
from jlora.methods._fields import Alpha, Holds, Rank
from jlora.methods.base import Dropping, check_sides, filled, normal, uniform, zeros
from jlora.methods.starts import OLoRA, Orthogonal, PiSSA, Start

Range = Annotated[tuple[int, int], Holds(lambda r: True, "a range (start, stop) of whole numbers")]
Slices = tuple[Range, ...]
Begins = Annotated[Start, Holds(lambda s: isinstance(s, Start), "a value of jlora.init")]


@dataclasses.dataclass(frozen=True)
class IntoRange:
    """Writes an array into the range [start, start + width) of a flat side, zeros elsewhere."""

    start: int
    side: tuple[int, ...]

    def __call__(self, b: jax.Array) -> jax.Array:
        # JAX asks where the result of a scatter lives: whole, as only a part of it is b
        return automatic(self._placed, (b,), PartitionSpec(*jax.typeof(b).sharding.spec[:-1]))

    def _placed(self, b: jax.Array) -> jax.Array:
        full = jnp.zeros((*b.shape[:-1], math.prod(self.side)), b.dtype)
        return full.at[..., self.start : self.start + b.shape[-1]].set(b).reshape(*b.shape[:-1], *self.side)


@dataclasses.dataclass(frozen=True)
class Moved:
    """An operand of a pair: x - x0, and after it x0, or before it x (`starts` says why)."""

    also: Literal["x0", "x", ""] = ""

    def __call__(self, x: jax.Array, x0: jax.Array) -> jax.Array:
        x, x0 = alike(x, x0)
        moved = x - x0
        return jnp.concatenate({"x0": [moved, x0], "x": [x, moved], "": [moved]}[self.also])


NAMED = {"orthogonal": Orthogonal(), "pissa": PiSSA(), "olora": OLoRA(), "paired": Start()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRA(Dropping):
    """Low-rank update: dW = s a b with a (in, r), b (r, out), stored rank first: `a (r, in)`, `b (r, out)`.

    b starts at zero, so the adapted model starts as the base model. An `embedding` starts with a at zero and b
    normal, as loralib does: its rows are looked up by a.

    Where `init` begins with a product a0 b0 that is not zero, the adapter is a pair: it keeps a0 and b0, frozen, and
    dW = s (a b - a0 b0), computed as one delta of rank 2r, s [a - a0, a0] [b; b - b0]. So the base is never changed,
    the start is the base bit for bit, and `jlora.init.plain` gives the same update as a plain LoRA of rank 2r.

    Attributes:
      rank: r; 0 leaves the weight alone. Above min(in, out) it trains more parameters than the update has, and
        `adapt` warns.
      alpha: the numerator of s; defaults to the rank, so that s is 1.
      scaling: `"rank"` for s = alpha / r, `"sqrt"` for rsLoRA's alpha / sqrt(r).
      init: of a: `"kaiming"`, U(-1/sqrt(in), 1/sqrt(in)) as loralib has it, or `"gaussian"`, N(0, 1/r^2) as peft does;
        of a and b: `"pissa"`, `"olora"`, `"orthogonal"`, or a value of `jlora.init` (which explains these). `"paired"`
        is the form alone of those that are pairs, whose values come with a file.
      dropout: rate on the activation of this branch, in [0, 1); needs a key (`jlora.with_dropout`). So do
        `rank_dropout` and `module_dropout`, LyCORIS's: the rates at which ranks, and the whole branch, are dropped.
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

    rank: Rank = 8
    alpha: Alpha = None
    scaling: Literal["rank", "sqrt"] = "rank"
    init: Literal["kaiming", "gaussian", "orthogonal", "pissa", "olora", "paired"] | Begins = "kaiming"
    slices: Slices | None = None
    target: Target = targets.attention

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.slices is not None and self.start is not None:
            raise ValueError(f"LoRA(slices=..., init={self.init!r}): slices start as 'kaiming' or 'gaussian'")

    @property
    def scale(self) -> float:
        """s: alpha / r, or alpha / sqrt(r)."""
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (self.rank if self.scaling == "rank" else math.sqrt(self.rank))

    @property
    def trains_a(self) -> bool:
        """Whether a is trained."""
        return True

    @property
    def start(self) -> Start | None:
        """Where a and b begin; None where a alone is drawn and b is zero."""
        return self.init if isinstance(self.init, Start) else NAMED.get(self.init)

    @property
    def paired(self) -> bool:
        """Whether s a0 b0 is subtracted."""
        return self.start is not None and self.start.paired

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        d_in, d_out = leaf.size("ik"), leaf.size("o")
        check_sides(leaf)
        if self.paired:
            return Recipe((self.dropped(self._pair(leaf)),))
        # exactly one of the two starts at zero, and it is trained
        flip = leaf.name == "embedding" and self.trains_a
        a = Array("a", zeros if flip else self._init_a(d_in), trained=self.trains_a)
        b = Array("b", normal(1.0) if flip else zeros)
        sizes = (("r", self.rank),)
        equation = "r I, r O -> I O"
        if self.slices is None:
            return Recipe((self.dropped(Delta(equation, (a, b), sizes, self.scale, ("r",))),))
        deltas = []
        for n, (start, stop) in enumerate(self._checked_slices(d_out)):
            a_n = dataclasses.replace(a, name=f"a{n}")
            b_n = dataclasses.replace(b, name=f"b{n}", shape=(self.rank, stop - start))
            placed = Function(IntoRange(start, leaf.sizes("o")), (b_n,))
            deltas.append(self.dropped(Delta(equation, (a_n, placed), sizes, self.scale, ("r",))))
        return Recipe(tuple(deltas))

    def _pair(self, leaf: Leaf) -> Delta:
        a = Array("a", zeros, (self.rank, *leaf.sizes("ik")), trained=self.trains_a)
        b = Array("b", zeros, (self.rank, *leaf.sizes("o")))
        a0, b0 = (dataclasses.replace(x, name=f"{x.name}0", trained=False) for x in (a, b))
        if not self.trains_a:  # a (b - b0) is all there is
            rank, operands = self.rank, (a, Difference(Moved(), (b, b0)))
        else:
            rank, operands = 2 * self.rank, (Difference(Moved("x0"), (a, a0)), Difference(Moved("x"), (b, b0)))
        return Delta("r I, r O -> I O", operands, (("r", rank),), self.scale, ("r",))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[tuple[str, str], jax.Array]:
        arrays = super().initial(leaf, recipe, keys, weight)
        if self.start is None:
            return arrays
        a, b = self.start.factors(leaf, weight, self.rank, self.scale, keys(leaf.path, "a"))
        return filled(arrays, {"a": a, "b": b, "a0": a, "b0": b}, self.dtype)

    def _init_a(self, d_in: int) -> Init:
        return uniform(1 / math.sqrt(d_in)) if self.init == "kaiming" else normal(1 / self.rank)

    def _checked_slices(self, d_out: int) -> Slices:
        assert self.slices is not None
        ends = 0
        for start, stop in sorted(self.slices):
            if not ends <= start < stop <= d_out:
                raise ValueError(f"slices {self.slices} must be disjoint ranges within the {d_out} output columns")
            ends = stop
        if not self.slices:
            raise ValueError("slices=() adapts nothing; write the ranges, or None for all columns")
        return self.slices

    def canonical(self) -> "LoRA":
        form = "paired" if self.paired else "kaiming"
        return dataclasses.replace(self, alpha=None, scaling="rank", init=form)

    def unpaired(self) -> "LoRA":
        return dataclasses.replace(self, init="kaiming") if self.paired else self

    def describe(self) -> str:
        if self.paired:
            return f"LoRA in a pair, rank {self.rank}"
        return "LoRA" if self.slices is None else "LoRA in slices"
