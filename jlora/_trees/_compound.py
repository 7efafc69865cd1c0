"""A leaf that is several arrays: what the library asks of it, whatever is in them."""

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from flax.core import meta
from jax.typing import DTypeLike

from jlora._types import DType, MeshAxes, PyTree, Value

if TYPE_CHECKING:
    from typing_extensions import TypeIs


class Compound:
    """A weight that is held as other arrays and computed from them, such as a quantised one.

    It is one leaf: it has a shape, a dtype and one letter an axis, and its arrays are no part of a path. A subclass
    registers itself as a pytree of its arrays and says the following.

    Attributes:
      shape: of the weight.
      dtype: of the weight.
      roles: one letter an axis, as in `_axes`.
    """

    @property
    def shape(self) -> tuple[int, ...]:
        raise NotImplementedError

    @property
    def dtype(self) -> DType:
        raise NotImplementedError

    @property
    def roles(self) -> str:
        raise NotImplementedError

    def parts(self) -> tuple[tuple[jax.Array, ...], Callable[..., jax.Array]]:
        """The arrays, each with the weight's stack axes in front, and how they make the weight of one layer.

        The function is hashable, so that equal layers are one program. It takes the arrays of one layer and gives the
        weight's other axes, in the weight's order.
        """
        raise NotImplementedError

    def wrong(self) -> str:
        """What its arrays are and should not be, in words; empty where all is well."""
        raise NotImplementedError

    def axes(self) -> tuple[tuple[int | None, ...], ...]:
        """For each array, the axis of the weight that each of its axes stands for, None for one of its own."""
        raise NotImplementedError

    def spec(self) -> tuple[MeshAxes, ...]:
        """The mesh axes of each axis of the weight as the types of its arrays tell them: those that are explicit."""
        arrays, _ = self.parts()
        own: list[MeshAxes] = [None] * self.ndim
        for n, entry in zip(self.axes()[0], jax.typeof(arrays[0]).sharding.spec, strict=False):
            if n is not None:
                own[n] = entry
        return tuple(own)

    def describe(self) -> str:
        """What it is, in a word."""
        raise NotImplementedError

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        total = 1
        for n in self.shape:
            total *= n
        return total

    def dequantize(self) -> jax.Array:
        """The weight as an array."""
        sound([("", self)])
        arrays, fn = self.parts()
        stacks = [n for n, role in enumerate(self.roles) if role == "s"]
        for _ in stacks:
            fn = jax.vmap(fn)
        order = [*stacks, *(n for n, role in enumerate(self.roles) if role != "s")]
        return jnp.transpose(fn(*arrays), [order.index(n) for n in range(len(order))])

    # Without `lift` a model gets the whole array wherever it asks for one: jnp's functions and operators, NumPy, NNX
    # (`kernel[...]`), and Linen, which unboxes what it takes for a box (`meta.AxisMetadata`, below).

    def __jax_array__(self) -> jax.Array:
        return self.dequantize()

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("a quantised weight has no array to share: its values are computed; leave copy out")
        return np.asarray(self.dequantize(), dtype)

    def __getitem__(self, index: PyTree) -> jax.Array:
        return self.dequantize()[index]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.dequantize())

    @property
    def T(self) -> jax.Array:
        return self.dequantize().T

    def unbox(self) -> jax.Array:
        """Flax's word for what a box holds."""
        return self.dequantize()

    def replace_boxed(self, value: Value) -> Value:
        """Flax's word for a box with another value: what is computed from a weight is no weight in codes."""
        return value

    def add_axis(self, index: int, params: object) -> "Compound":
        """Flax's word for a stack (`nn.scan`, `nn.vmap`), whose axes are read off the arrays."""
        return self

    def remove_axis(self, index: int, params: object) -> "Compound":
        return self


meta.AxisMetadata.register(Compound)


def is_compound(x: object) -> "TypeIs[Compound]":
    """Whether a leaf is several arrays."""
    return isinstance(x, Compound)


def sound(named: Iterable[tuple[str, PyTree]]) -> None:
    """Raises TypeError unless the arrays of every `Compound` among leaves with their paths are what they should be."""
    found = [(path, leaf, leaf.wrong()) for path, leaf in named if is_compound(leaf)]
    bad = [f"\n  {repr(path) if path else 'one'} of shape {leaf.shape}: {why}" for path, leaf, why in found if why]
    if bad:
        raise TypeError(
            "quantised weights were cast: a tree_map over all arrays reaches their codes. Cast the plain parameters "
            "and quantise them, or skip such leaves with is_leaf=lambda x: isinstance(x, jlora.quant.Quantized)"
            + "".join(bad)
        )


def dense(leaf: PyTree) -> PyTree:
    """A leaf as one array; a leaf without values, or one that is an array, as it is."""
    if not is_compound(leaf):
        return leaf
    if any(isinstance(a, jax.ShapeDtypeStruct) for a in jax.tree.leaves(leaf)):
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    return leaf.dequantize()
