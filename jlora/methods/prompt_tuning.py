"""Prompt tuning: E = [E0; P], p virtual tokens in front of every input, whose embeddings P alone are trained.

Lester et al, `The Power of Scale for Parameter-Efficient Prompt Tuning <https://arxiv.org/abs/2104.08691>`_, 2021.
Liu et al, `GPT Understands, Too <https://arxiv.org/abs/2103.10385>`_, 2021: P-tuning, P = f(E), f an MLP or an LSTM.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

import jax

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._rows import Rows
from jlora._algebra._words import Function
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Place
from jlora.methods._encoders import LSTM, MLP
from jlora.methods._fields import Holds
from jlora.methods.base import Method
from jlora.methods.deep_prompts import Count
from jlora.methods.new_tokens import NewTokens


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptTuning(NewTokens):
    """Virtual tokens in front of every input, whose embeddings alone are trained.

    They are the ids V to V + p - 1 behind the end of a table of V tokens, as those of `NewTokens`: put them in front
    (`jlora.prompts.prepend`), and take what stands there off the output (`jlora.prompts.remove`). Positions, masks and
    lengths follow from longer ids by the model's own rules: the first real token has position p. What decodes with a
    cache gives them once. A head that is tied to the table keeps its V columns. `merge` gives the taller table.

    Attributes:
      count: p; the paper's 100, of which it finds 20 enough for large models.
      init: where they begin: `"vocabulary"`, rows of tokens drawn from the first 5,000, which are the most common in
        most vocabularies; ids of a text that says the task, or of the labels, repeated or cut to p; `"uniform"`, drawn
        from U(-0.5, 0.5); or as `NewTokens` says.
      target: by default the tables of tokens (`jlora.targets.tokens`).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> adapted = jlora.adapt(params, jlora.PromptTuning(count=2, init=(3, 1, 7)))
      >>> f = jlora.lift(lambda params, ids: jnp.take(params["embed"]["embedding"], ids, axis=0))
      >>> given = jlora.prompts.prepend(jlora.prompts.virtual_ids(adapted), jnp.array([[4, 5, 6]]))
      >>> f(adapted, given.ids).shape, jlora.count(adapted)
      ((1, 5, 4), (8, 48))

    References:
      Lester et al, `The Power of Scale for Prompt Tuning <https://arxiv.org/abs/2104.08691>`_, 2021.
    """

    init: Literal["mean", "normal", "vocabulary", "uniform"] | tuple[int, ...] = "vocabulary"

    def __post_init__(self) -> None:
        if isinstance(self.init, (tuple, list)) and len(self.init):
            text = tuple(self.init)
            object.__setattr__(self, "init", (text * (self.count // len(text) + 1))[: self.count])
        super().__post_init__()


@dataclasses.dataclass(frozen=True, kw_only=True)
class PTuning(Method):
    """Prompt tuning whose prompts a network makes while they are trained: P = f(E).

    E and the network are trained, and `jlora.prompts.encoded` drops them after that: what is left is what
    `PromptTuning` has, p rows behind the table.

    Attributes:
      count: p.
      encoder: `"lstm"`, a bidirectional LSTM of two layers and an MLP, or `"mlp"`, of three layers.
      hidden: h, the width of the MLP's inner layers, or of the LSTM in one direction.
      width: of E; that of the table by default (0).
      target: by default the tables of tokens (`jlora.targets.tokens`).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> adapted = jlora.adapt(params, jlora.PTuning(count=2, encoder="mlp", hidden=8))
      >>> jlora.count(adapted)[0], jlora.count(jlora.prompts.encoded(adapted))[0]
      (156, 8)

    References:
      Liu et al, `GPT Understands, Too <https://arxiv.org/abs/2103.10385>`_, 2021.
    """

    count: Count
    encoder: Literal["lstm", "mlp"] = "lstm"
    hidden: Annotated[int, Holds(lambda n: 1 <= n <= 2**16, "a width from 1 to 65,536")] = 128
    width: Annotated[int, Holds(lambda n: 0 <= n <= 2**16, "a width up to 65,536, or 0 for that of the table")] = 0
    target: Target = targets.tokens

    def recipe(self, leaf: Leaf) -> Recipe:
        if leaf.stack:
            raise ValueError("prompts are made for one table, and here is a stack of them; exclude it")
        size, d, h = leaf.size("ik"), leaf.size("o"), self.hidden
        e = self.width or d
        f = LSTM((e, h, d)) if self.encoder == "lstm" else MLP((e, h, h, d), "relu")
        made = Function(Made(f, leaf.sizes("o")), f.arrays(self.count))
        return Recipe(rows=(Rows(made, range(size, size + self.count)),))

    def encoded(self, leaf: Leaf, get: Callable[[Place], jax.Array]) -> tuple[Method, dict[Place, jax.Array]]:
        (rows,) = self.recipe(leaf).rows
        assert isinstance(rows.made, Function)
        made = rows.made.fn(*(get((leaf.path, a.name)) for a in rows.made.arrays))
        plain = PromptTuning(count=self.count, target=self.target, exclude=self.exclude, dtype=self.dtype)
        return plain, {(leaf.path, "rows"): made.astype(self.dtype)}


@dataclasses.dataclass(frozen=True)
class Made:
    """The rows that an encoder makes, in the axes of a table."""

    encoder: LSTM | MLP
    features: tuple[int, ...]

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        made = self.encoder(*arrays)
        return made.reshape(made.shape[0], *self.features)
