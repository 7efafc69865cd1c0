"""Bottleneck adapters: y = h + s (U f(D h + d) + u), serial, where h is a layer's output; or parallel, where x is the
input of a block and h its output: y = h + s (U f(D x + d) + u).

Houlsby et al, `Parameter-Efficient Transfer Learning for NLP <https://arxiv.org/abs/1902.00751>`_, 2019.
Pfeiffer et al, `AdapterFusion <https://arxiv.org/abs/2005.00247>`_, 2020.
He et al, `Towards a Unified View of Parameter-Efficient Transfer Learning <https://arxiv.org/abs/2110.04366>`_, 2021.
"""

import dataclasses
import functools
from typing import Annotated, TypeAlias

import jax
from jax.typing import DTypeLike

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Step, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Init, Key, Shape
from jlora.methods._beside import Beside, check_widths
from jlora.methods._fields import Holds, Rank, nonzero
from jlora.methods.base import Method, zeros

Activation: TypeAlias = Annotated[
    str, Holds(lambda name: callable(getattr(jax.nn, name, None)), "it is a function of jax.nn by name, such as 'gelu'")
]


@dataclasses.dataclass(frozen=True)
class Bottleneck:
    """h + s (U f(D x + d) + u); x is h where no other is given."""

    activation: str
    bias: bool

    def __call__(self, h: jax.Array, *others: jax.Array) -> jax.Array:
        *x, s, down, up = others[: len(others) - 2 * self.bias]
        d, u = others[-2:] if self.bias else (0, 0)
        check_widths(h, *x)
        inner = getattr(jax.nn, self.activation)((x[0] if x else h) @ down.T + d)
        return h + s * (inner @ up + u)


def near_zero(std: float) -> Init:
    """N(0, std^2), cut at two standard deviations."""
    return functools.partial(_near_zero, std)


def _near_zero(std: float, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
    return std * jax.lax.optimization_barrier(jax.random.truncated_normal(key, -2, 2, shape, dtype))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Houlsby(Method):
    """A two-layer network after a layer's output, with a residual: h + U f(D h + d) + u.

    By default after the last layer of self-attention and of the feed-forward block, known by their names: two a
    transformer layer, as in the paper, and none after cross-attention, as in AdapterHub's configuration of that name
    (add `targets.cross_attention_outputs` to have it). Each comes after the layer's bias, before the residual and the
    norm, so that post-norm and pre-norm models are alike. Another method of the spec may take the same kernel or
    bias; the paper trains the norms too, `[Houlsby(64), LNTuning()]`. It cannot be merged. U starts at zero, so that
    the start is the base bit for bit; the paper draws it as D.

    Attributes:
      bottleneck: m, the width of the inner layer.
      activation: f, a function of `jax.nn` of one argument, by name.
      bias: whether there are d and u.
      scale: s, frozen; `jlora.scale` multiplies it.
      target: the layers, by their kernels.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> mlp = {"fc1": {"kernel": jnp.ones((4, 8))}, "fc2": {"kernel": jnp.ones((8, 4)), "bias": jnp.zeros(4)}}
      >>> jlora.count(jlora.adapt({"layer_0": {"mlp": mlp}}, jlora.Houlsby(2)))
      (22, 90)

    References:
      Houlsby et al, `Parameter-Efficient Transfer Learning for NLP <https://arxiv.org/abs/1902.00751>`_, 2019.
    """

    bottleneck: Rank = dataclasses.field(default=64, kw_only=False)
    activation: Activation = "gelu"
    bias: bool = True
    scale: Annotated[float, nonzero("scale")] = 1.0
    target: Target = targets.block_outputs

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.bottleneck == 0:
            return None
        d, m = leaf.size("o"), self.bottleneck
        if not leaf.axes("o"):
            raise ValueError("there is no output axis for an adapter to see")
        arrays = (
            Array("s", constant(self.scale), (), trained=False, scale=True),
            Array("down", near_zero(0.01), (m, d)),
            Array("up", zeros, (m, d)),
        )
        if self.bias:
            arrays += (Array("down_bias", zeros, (m,)), Array("up_bias", zeros, (d,)))
        return Recipe(steps=(Step(Bottleneck(self.activation, self.bias), arrays, self.of),))

    @property
    def on_outputs(self) -> bool:
        return True

    @property
    def of(self) -> str:
        """The weight whose input it sees; none, as it sees the output."""
        return ""

    def canonical(self) -> "Houlsby":
        return dataclasses.replace(self, scale=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pfeiffer(Houlsby):
    """One adapter a layer, after the last layer of the feed-forward block: half of Houlsby's, h + U f(D h + d) + u.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> mlp = {"fc1": {"kernel": jnp.ones((4, 8))}, "fc2": {"kernel": jnp.ones((8, 4))}}
      >>> adapted = jlora.adapt(
      ...     {"layer_0": {"attention": {"out": {"kernel": jnp.ones((4, 4))}}, "mlp": mlp}}, jlora.Pfeiffer(2)
      ... )
      >>> list(adapted.trainable)
      ['layer_0/mlp/fc2/kernel']

    References:
      Pfeiffer et al, `AdapterFusion <https://arxiv.org/abs/2005.00247>`_, 2020, 3.3: which of the places served best.
    """

    activation: Activation = "relu"
    target: Target = targets.feed_forward_outputs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parallel(Beside, Houlsby):
    """A two-layer network beside a block: h + s (U f(D x + d) + u), x the block's input and h its output.

    By default beside each feed-forward block, s = 4 and f ReLU, which the paper found best;
    `Parallel(target=targets.attention_outputs)` stands beside attention. Input and output of the block are of one
    width. In a pre-norm model the block's input is what the norm makes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"mlp": {"up": {"kernel": jnp.ones((3, 8))}, "down": {"kernel": jnp.ones((8, 3))}}}
      >>> jlora.count(jlora.adapt(params, jlora.Parallel(2)))
      (17, 65)
      >>> mine = {"widen": {"kernel": jnp.ones((3, 8))}, "narrow": {"kernel": jnp.ones((8, 3))}}
      >>> jlora.count(jlora.adapt(mine, jlora.Parallel(2, target="narrow/kernel", input="widen/kernel")))
      (17, 65)

    References:
      He et al, `Towards a Unified View of Parameter-Efficient Transfer Learning <https://arxiv.org/abs/2110.04366>`_,
      2021, section 4.
    """

    activation: Activation = "relu"
    scale: Annotated[float, nonzero("scale")] = 4.0
    target: Target = targets.feed_forward_outputs
