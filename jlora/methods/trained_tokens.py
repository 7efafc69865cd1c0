"""Trained tokens: E[ids] = E0[ids] + c, the rows of some ids of an embedding, and every other row bit for bit.

peft's `trainable_tokens <https://huggingface.co/docs/peft/package_reference/trainable_tokens>`_, 2025.
"""

import dataclasses
from typing import Annotated

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._rows import Rows
from jlora._algebra._words import Array, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Reads, as_hinted
from jlora.methods.base import Method


def _ids(value: object) -> tuple[int, ...]:
    """Numbers of rows, ascending."""
    ids = as_hinted(sorted(value) if isinstance(value, (set, frozenset, range)) else value, tuple[int, ...])
    assert isinstance(ids, tuple)
    if not ids or min(ids) < 0:
        raise ValueError("ids of tokens count from 0 on, and there is at least one")
    if twice := sorted({n for n in ids if ids.count(n) > 1}):
        raise ValueError(f"{twice[:5]} stand there twice (a tokenizer has one id for all words that it does not know)")
    return tuple(sorted(ids))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainedTokens(Method):
    """Trains the rows of some tokens in an embedding, and leaves every other row as it is, to the bit.

    What is trained is the change c of these rows, one row for each id in ascending order, from zero: so the start is
    the base, weight decay leads back to it, and `jlora.scale` acts on it. Nothing as large as the table is made in the
    forward or backward pass, nor saved. A head that is tied to the table has these tokens' logits changed, and no
    other. The ids are of the table as it is: a lookup of them in any form (`jnp.take`, `table[ids]`, `nn.Embed`) and a
    dot with one-hot rows read the change.

    Attributes:
      ids: of the tokens, in any order.
      target: by default the tables of tokens (`jlora.targets.tokens`).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> adapted = jlora.adapt(params, jlora.TrainedTokens(ids=(7, 2)))
      >>> adapted.trainable["embed/embedding"]["rows"].shape
      (2, 4)
      >>> f = jlora.lift(lambda params, ids: jnp.take(params["embed"]["embedding"], ids, axis=0))
      >>> moved = jlora.join({"embed/embedding": {"rows": jnp.array([[0.0] * 4, [1.0] * 4])}}, adapted.frozen)
      >>> f(moved, jnp.array([1, 2, 7]))[:, 0]
      Array([1., 1., 2.], dtype=float32)

    References:
      Mangrulkar et al, `peft <https://github.com/huggingface/peft>`_, 2022.
    """

    ids: Annotated[tuple[int, ...], Reads(_ids)]
    target: Target = targets.tokens

    def recipe(self, leaf: Leaf) -> Recipe | None:
        # the one number that no other is changed by: -0.0 + -0.0 is -0.0
        return Recipe(rows=(Rows(Array("rows", constant(-0.0)), self.ids),))
