"""A random subspace of all parameters: W = W0 + lam P theta, with one theta for the whole model.

Li et al, `Measuring the Intrinsic Dimension of Objective Landscapes <https://arxiv.org/abs/1804.08838>`_, 2018.
Aghajanyan, Zettlemoyer and Gupta, `Intrinsic Dimensionality Explains the Effectiveness of Language Model Fine-Tuning
<https://arxiv.org/abs/2012.13255>`_, 2020.
"""

import dataclasses
import math
import zlib
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._dtypes import alike, widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Key, Shape
from jlora.methods._fields import Seed, at_least
from jlora.methods._projections import PROJECTIONS
from jlora.methods.base import Method, zeros

BITS = (16, 16, 32)  # of the numbers that a place holds: the halves of a hash, and the layer


@dataclasses.dataclass(frozen=True)
class ProjectionOf:
    """Which projection is a weight's: `(stack..., 64)`, the bits of a hash of its path and of the layer, as +1 and -1.

    Data and not metadata: equal layers then share one program, and no compiler can draw P beforehand and keep it.
    Signs and not numbers: the least change of a number would be another P, and a sign outlives what is done to all
    leaves of a tree alike: a cast to any dtype, an average over steps, a decay.
    """

    path: str
    seed: int

    def __call__(self, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
        digest = zlib.crc32(f"{self.seed}/{self.path}".encode())
        layers = np.arange(math.prod(shape[:-1])).reshape(shape[:-1])
        numbers = np.broadcast_to(digest >> 16, layers.shape), np.broadcast_to(digest & 0xFFFF, layers.shape), layers
        bits = [(n[..., None] >> np.arange(width)) & 1 for n, width in zip(numbers, BITS, strict=True)]
        return jnp.asarray(2.0 * np.concatenate(bits, -1) - 1, dtype)


def numbers(place: jax.Array) -> list[jax.Array]:
    """The three whole numbers of a place."""
    up = (lax.stop_gradient(place) > 0).astype(jnp.uint32)
    bits = jnp.split(up, np.cumsum(BITS)[:-1])
    return [jnp.sum(lax.shift_left(b, lax.iota(jnp.uint32, len(b))), dtype=jnp.uint32) for b in bits]


@dataclasses.dataclass(frozen=True)
class Projected:
    """lam P theta in a weight's own axes. Nothing of P outlives the call: the backward pass draws it again."""

    kind: str
    shape: tuple[int, ...]

    def __call__(self, theta: jax.Array, place: jax.Array, *lam: jax.Array) -> jax.Array:
        project = jax.checkpoint(PROJECTIONS[self.kind], static_argnums=2)
        theta, *rest = alike(widened(theta), *lam)
        flat = project(theta, jnp.stack(numbers(place)), math.prod(self.shape))
        return math.prod(rest, start=flat.reshape(self.shape))


@dataclasses.dataclass(frozen=True)
class IntrinsicDimension(Method):
    """dW = lam P theta: all weights move in one random subspace of d dimensions, whatever the size of the model.

    theta (d,) is one vector for all weights, zero at the start; P, different for each weight and layer, has unit
    columns and is drawn from a seed where it is used, forward and backward, and never stored. lam is one number a
    weight (and layer), one at the start: the structure-aware form (SAID), which lets the update's size differ. The
    paper's d counts them: m weights and its d are `IntrinsicDimension(d - m)` here. That is how
    `jlora.analysis.intrinsic_dimension`, which looks for the smallest d that is enough, counts.

    A means to measure a task, not to save time: dW is made dense, at each step. Columns are of unit length a weight,
    as in the authors' code, and not over the whole model.

    Attributes:
      d: the size of theta.
      projection: `"fastfood"`, O(D log D) for a weight of D elements; `"sparse"`, O(d sqrt(D)); `"dense"`, O(d D), the
        original and slow.
      said: whether there is a lam.
      seed: of P.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> adapted = jlora.adapt(params, jlora.IntrinsicDimension(5))
      >>> {group: {name: x.shape for name, x in held.items()} for group, held in adapted.trainable.items()}
      {'intrinsic/0/5': {'theta': (5,)}, 'dense/bias': {'lam': ()}, 'dense/kernel': {'lam': ()}}

    References:
      Li et al, `Measuring the Intrinsic Dimension of Objective Landscapes <https://arxiv.org/abs/1804.08838>`_, 2018.
      Aghajanyan, Zettlemoyer and Gupta, `Intrinsic Dimensionality Explains the Effectiveness of Language Model
      Fine-Tuning <https://arxiv.org/abs/2012.13255>`_, 2020.
    """

    d: Annotated[int, at_least(1, "d is a whole number of at least 1")]
    projection: Literal["fastfood", "dense", "sparse"] = "fastfood"
    said: bool = True
    seed: Seed = 0
    target: Target = dataclasses.field(default=targets.everything, kw_only=True)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        theta = Array("theta", zeros, (self.d,), group=f"intrinsic/{self.seed}/{self.d}", stacked=False)
        place = Array("place", ProjectionOf(leaf.path, self.seed), (sum(BITS),), trained=False, derived=True)
        lam = (Array("lam", constant(1.0), ()),) * self.said
        made = Projected(self.projection, leaf.sizes("ik") + leaf.sizes("o"))
        sides = " ".join(s for s, roles in (("I", "ik"), ("O", "o")) if leaf.axes(roles))
        return Recipe((Delta(f"{sides} -> {sides}", (Function(made, (theta, place, *lam)),)),))
