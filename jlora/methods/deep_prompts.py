"""Deep prompts: what a layer makes at virtual positions j is trained, y_j = P_j, and every other position is its own.

Jia et al, `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_, 2022.
Liu et al, `P-Tuning v2 <https://arxiv.org/abs/2110.07602>`_, 2021.
Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021: of keys and values, see `PrefixTuning`.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Step
from jlora._trees._leaf import Leaf
from jlora._types import Place
from jlora.methods._encoders import MLP
from jlora.methods._fields import Holds, at_least, nonzero
from jlora.methods.base import Method, normal

Count = Annotated[int, Holds(lambda n: 0 < n < 2**31, "a number of virtual tokens, at least 1")]


@dataclasses.dataclass(frozen=True)
class Placed:
    """The rows P in the place of those of y at positions `start` on, or where the ids are `start` on.

    Attributes:
      start: the first position, or the first id.
      ids: whether it is an id.
      features: of y, from and to; all where there are none.
      encoder: what makes P.
    """

    start: int
    ids: bool
    features: tuple[int, ...]
    encoder: MLP | None

    def __call__(self, y: jax.Array, *given: jax.Array) -> jax.Array:
        a, b = self.features or (0, y.shape[-1])
        own = y[..., a:b]
        if self.ids:
            ids, *arrays = given
            p = self.rows(*arrays)
            slot = ids[..., 0] - jnp.asarray(self.start, ids.dtype)
            hit = (slot >= 0) & (slot < p.shape[0])
            own = jnp.where(hit[..., None], jnp.take(p, jnp.where(hit, slot, 0), axis=0, mode="clip"), own)
        else:
            p = self.rows(*given)
            n, end = y.shape[-2] if y.ndim > 1 else 0, self.start + p.shape[0]
            if n < end:
                raise ValueError(
                    f"deep prompts stand at positions {self.start} to {end - 1}, and the output of shape {y.shape} has "
                    f"{n} positions: give the model longer inputs (jlora.prompts), and where it decodes with a cache, "
                    "virtual tokens by their ids (table=...)"
                )
            own = own.at[..., self.start : end, :].set(p)
        return own if (a, b) == (0, y.shape[-1]) else jnp.concatenate([y[..., :a], own, y[..., b:]], -1)

    def rows(self, *arrays: jax.Array) -> jax.Array:
        """P `(count, features)`."""
        return self.encoder(*arrays) if self.encoder else arrays[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeepPrompts(Method):
    """Trained rows in the place of what layers make at virtual positions: y_j = P_j.

    Where the virtual positions are is said by the ids of a table, so that they may stand anywhere, in a cache too (see
    `PrefixTuning`, which gives the table such ids); or it is one place, as in images, which have no ids.

    On the last norm in front of an attention this is VPT-deep, P behind the norm: what the virtual positions of the
    layer before held is seen by no other position. A norm without a bias has no sum that a step could stand behind.
    `merge` refuses, as no weight does what this does. It does not start at the base: a model sees its prompts.

    Attributes:
      count: p, how many virtual positions.
      table: the table whose ids they are, by its path; its ids `first` to `first + count - 1` are virtual.
      first: the first such id; or, without a table, the first position.
      features: of the output, from and to, where a layer makes several things in one: `(768, 2304)`; all by default.
      encoder: widths (e, h) of the network that makes P while it is trained: P = tanh(E w1 + b1) w2 + b2, where E, w1
        and b1 are one for all layers; () for none. `jlora.prompts.encoded` drops it.
      std: of N(0, std^2), of which P is drawn without an encoder.
      group: whose E, w1 and b1 they are.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
      >>> adapted = jlora.adapt(params, jlora.DeepPrompts(count=2, target="norm/bias$", first=1))
      >>> f = jlora.lift(lambda params, x: x * params["norm"]["scale"] + params["norm"]["bias"])
      >>> y = f(adapted, jnp.ones((3, 5, 4)))
      >>> bool((y[:, 1:3] == adapted.trainable["norm/bias"]["prompts"]).all()), bool((y[:, 3:] == 1).all())
      (True, True)

    References:
      Jia et al, `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_, 2022.
    """

    count: Count
    table: str = ""
    first: Annotated[int, at_least(0, "a position or an id is at least 0")] = 0
    features: tuple[int, ...] = ()
    encoder: tuple[int, ...] = ()
    std: Annotated[float, nonzero("std")] = 0.02
    group: str = "prompts"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "":
            raise ValueError("DeepPrompts() needs the layers named: DeepPrompts(target=r'norm1/bias$')")
        if len(self.features) not in (0, 2):
            raise ValueError(f"DeepPrompts(features={self.features}): from and to, such as (768, 2304)")
        if len(self.encoder) not in (0, 2) or any(n < 1 for n in self.encoder):
            raise ValueError(f"DeepPrompts(encoder={self.encoder}): two widths, (e, h), each at least 1, or ()")

    @property
    def on_outputs(self) -> bool:
        return True

    def elsewhere(self, leaf: Leaf, path: Callable[[str], str]) -> "DeepPrompts":
        return dataclasses.replace(self, table=self.table and path(self.table))

    def recipe(self, leaf: Leaf) -> Recipe:
        if not leaf.axes("o"):
            raise ValueError("there is no output axis that prompts could be rows of")
        size = leaf.size("o")
        a, b = self.features or (0, size)
        if not 0 <= a < b <= size:
            raise ValueError(f"features={self.features}: the output has {size}")
        mlp = MLP((*self.encoder, b - a), "tanh") if self.encoder else None
        if mlp is None:
            arrays = (Array("prompts", normal(self.std), (self.count, b - a)),)
        else:  # the last layer of an encoder makes the rows of this output alone
            *shared, w, bias = mlp.arrays(self.count)
            arrays = (*(dataclasses.replace(x, group=self.group, stacked=False) for x in shared), w, bias)
        fn = Placed(self.first, bool(self.table), self.features, mlp)
        return Recipe(steps=(Step(fn, arrays, self.table, ids=bool(self.table)),))

    def encoded(self, leaf: Leaf, get: Callable[[Place], jax.Array]) -> tuple[Method, dict[Place, jax.Array]]:
        if not self.encoder:
            return super().encoded(leaf, get)
        (step,) = self.recipe(leaf).steps
        assert isinstance(step.fn, Placed)
        arrays = [get((a.group or leaf.path, a.name)) for a in step.arrays]
        rows = step.fn.rows
        for _ in leaf.stack:
            rows = jax.vmap(rows, in_axes=tuple(0 if a.stacked else None for a in step.arrays))
        plain = dataclasses.replace(self, encoder=())
        return plain, {(leaf.path, "prompts"): rows(*arrays).astype(plain.dtype)}

    def canonical(self) -> "DeepPrompts":
        return dataclasses.replace(self, std=0.02)
