"""Bottleneck adapters: y = h + s (U f(D h + d) + u), serial, where h is a layer's output; or parallel, where x is the
input of a block and h its output: y = h + s (U f(D x + d) + u).

Houlsby et al, `Parameter-Efficient Transfer Learning for NLP <https://arxiv.org/abs/1902.00751>`_, 2019.
He et al, `Towards a Unified View of Parameter-Efficient Transfer Learning <https://arxiv.org/abs/2110.04366>`_, 2021.
"""

import dataclasses
import functools
from typing import Annotated, TypeAlias

import jax
from jax.typing import DTypeLike

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Step, constant
from jlora._trees._leaf import Leaf
from jlora._types import Init, Key, Shape
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

    `target` names the layers, by their kernels: the output projections of attention and feed-forward block for
    Houlsby, that of the feed-forward block alone for Pfeiffer. The adapter comes after the layer's bias, before the
    block's residual. Another method of the spec may take the same kernel or bias. It cannot be merged. U starts at
    zero, so that the start is the base bit for bit; the paper draws it as D.

    Attributes:
      bottleneck: m, the width of the inner layer.
      activation: f, a function of `jax.nn` by name.
      bias: whether there are d and u.
      scale: s, frozen; `jlora.scale` multiplies it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"output": {"kernel": jnp.ones((3, 4)), "bias": jnp.zeros(4)}}
      >>> jlora.count(jlora.adapt(params, jlora.Houlsby(bottleneck=2, target="output/kernel")))
      (22, 38)

    References:
      Houlsby et al, `Parameter-Efficient Transfer Learning for NLP <https://arxiv.org/abs/1902.00751>`_, 2019;
      Pfeiffer et al, `AdapterFusion <https://arxiv.org/abs/2005.00247>`_, 2020.
    """

    bottleneck: Rank = 64
    activation: Activation = "gelu"
    bias: bool = True
    scale: Annotated[float, nonzero("scale")] = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self).__name__
        if self.target == "":
            raise ValueError(f"{name}() needs the layers named: {name}(target=r'output/dense/kernel$')")

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
class Parallel(Houlsby):
    """A two-layer network beside a block: h + s (U f(D x + d) + u), x the block's input and h its output.

    `target` names the last layer of each block, `input` the first: its path from the nearest place above the last that
    has it. Input and output of the block are of one width. The paper's s beside a feed-forward block is 4, its f ReLU.

    Attributes:
      input: such as `intermediate/dense/kernel`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"mlp": {"up": {"kernel": jnp.ones((3, 8))}, "down": {"kernel": jnp.ones((8, 3))}}}
      >>> spec = jlora.Parallel(bottleneck=2, scale=4, target="down/kernel", input="up/kernel")
      >>> jlora.count(jlora.adapt(params, spec, axes={"kernel": "io"}))
      (17, 65)

    References:
      He et al, `Towards a Unified View of Parameter-Efficient Transfer Learning <https://arxiv.org/abs/2110.04366>`_,
      2021.
    """

    activation: Activation = "relu"
    input: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.input:
            raise ValueError(
                "Parallel() needs the block's first layer: Parallel(input='intermediate/dense/kernel', ...)"
            )

    @property
    def of(self) -> str:
        return self.input
