"""New tokens: E = [E0; rows], an embedding with rows behind its end, which are trained alone: textual inversion.

Gal et al, `An Image is Worth One Word <https://arxiv.org/abs/2208.01618>`_, 2022.
"""

import dataclasses
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._rows import Rows
from jlora._algebra._words import Array
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import W0, Keys, Place
from jlora.methods._fields import Holds
from jlora.methods.base import Method, filled, of_the_weight

COMMON = 5000  # of a vocabulary in the order of frequency; Lester et al, section 3.1.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class NewTokens(Method):
    """Gives an embedding of V rows `count` more, and trains these alone: the ids V to V + count - 1 read them.

    The model stays as it is, and sees a table of V rows; so does a head that is tied to the table, whose logits keep
    their V columns. Only lookups (`jnp.take`, `table[ids]`, `nn.Embed`) know the new ids; where a model does anything
    else with the table by which such an id could be lost (a product with one-hot rows, a loop that carries it), a
    lifted call raises ValueError. Ids that the model changes before it looks them up (`mode="wrap"`, a clip of its own)
    are what it made of them. `merge` and `export` give the taller table, V + count rows, for a model that is built with
    so many. `jlora.scale` leaves new rows alone: there is no base that they could go back to.

    Attributes:
      count: how many.
      init: where they begin: `"mean"`, the mean of all rows; `"normal"`, drawn with the mean and the deviation that
        the rows have in each feature; `"vocabulary"`, rows of tokens drawn from the first 5,000; `"uniform"`, drawn
        from U(-0.5, 0.5); or ids of tokens whose rows are copied, one for each new token, or one for all (the paper's:
        the coarse word of what is to be learned).
      target: by default the tables of tokens (`jlora.targets.tokens`).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> adapted = jlora.adapt(params, jlora.NewTokens(count=2, init=(3,)))
      >>> f = jlora.lift(lambda params, ids: jnp.take(params["embed"]["embedding"], ids, axis=0))
      >>> f(adapted, jnp.array([0, 9, 10, 11])).shape, jlora.merge(adapted)["embed"]["embedding"].shape
      ((4, 4), (12, 4))

    References:
      Gal et al, `Textual Inversion <https://arxiv.org/abs/2208.01618>`_, 2022.
    """

    count: Annotated[int, Holds(lambda n: 0 < n < 2**31, "a number of new tokens, at least 1")]
    init: Literal["mean", "normal", "vocabulary", "uniform"] | tuple[int, ...] = "mean"
    target: Target = targets.tokens

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.init, tuple) and len(self.init) not in (1, self.count):
            name = type(self).__name__
            raise ValueError(f"{name}(init={self.init}): one id for each of {self.count} new tokens, or one for all")

    def recipe(self, leaf: Leaf) -> Recipe | None:
        size = leaf.size("ik")
        return Recipe(rows=(Rows(Array("rows", of_the_weight), range(size, size + self.count)),))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        arrays = super().initial(leaf, recipe, keys, weight)
        if isinstance(weight, jax.ShapeDtypeStruct):
            raise ValueError(f"new rows of {leaf.path!r} begin at values of the table, and it has none")
        table = leaf.matrix(weight)
        (place,) = arrays
        shape = (*leaf.stack, self.count, table.shape[-1])
        drawn = keys(*place)
        if isinstance(self.init, tuple):
            if wrong := [n for n in self.init if not 0 <= n < table.shape[-2]]:
                raise ValueError(f"init={self.init}: the table has rows 0 to {table.shape[-2] - 1}, and no {wrong[0]}")
            begun = table[..., jnp.array(self.init), :]
        elif self.init == "vocabulary":
            common = min(COMMON, table.shape[-2])
            at = jax.random.choice(drawn, common, (self.count,), replace=self.count > common)
            begun = table[..., at, :]
        elif self.init == "uniform":
            begun = jax.random.uniform(drawn, shape, table.dtype, -0.5, 0.5)
        else:
            begun = jnp.mean(table, -2, keepdims=True)
            if self.init == "normal":
                begun = begun + jnp.std(table, -2, keepdims=True) * jax.random.normal(drawn, shape, table.dtype)
        return filled(arrays, {"rows": jnp.broadcast_to(begun, shape)}, jnp.dtype(self.dtype))

    def canonical(self) -> "NewTokens":
        return dataclasses.replace(self, init="mean")
