"""What passes between the rooms, by name: the types that the signatures are written in."""

import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias, TypeVar

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, Mesh

Value = TypeVar("Value")

PyTree: TypeAlias = Any
"""A tree of whatever the user has: parameters, masks, states; a leaf is the smallest.

It is `Any` underneath, as JAX's own is: a container is whatever was registered, a leaf whatever was not, and no type
says either.
"""

TreeDef: TypeAlias = Hashable
"""The form of a tree, as `jax.tree.structure` gives it."""

Key: TypeAlias = jax.Array
"""A typed PRNG key, or several along leading axes."""

Shape: TypeAlias = tuple[int, ...]

DType: TypeAlias = np.dtype
"""Of an array that is there; what a user may write for one is a `jax.typing.DTypeLike`."""

AnyPath: TypeAlias = str | os.PathLike[str]

Place: TypeAlias = tuple[str, str]
"""Where a factor stands: its group (the path of a weight, or a name that several share), and its name."""

Traced: TypeAlias = Mapping[str, tuple[str, str]]
"""What a trace says of the weights, by their paths: how each is used, and one letter an axis."""

Half: TypeAlias = Mapping[str, Mapping[str, jax.Array]]
"""Half of an adapter: `{group: {name: array}}`."""

Keys: TypeAlias = Callable[[str, str], Key]
"""The key of each factor, by its group and name."""

W0: TypeAlias = jax.Array | jax.ShapeDtypeStruct
"""The frozen weight in its own axes, or its shape where there are no values."""

Init: TypeAlias = Callable[..., jax.Array]
"""How a factor begins: `init(key, shape, dtype)`, such as those of `jax.nn.initializers`."""

Fill: TypeAlias = Callable[[Sequence[PyTree]], tuple[tuple[PyTree, ...], dict[str, PyTree]]]
"""The arguments of a call, by position and by name, with these in place of its adapters."""

AnyMesh: TypeAlias = Mesh | AbstractMesh

MeshAxes: TypeAlias = str | tuple[str, ...] | None
"""The mesh axes that one axis of an array is cut over: an entry of a `PartitionSpec`."""

Precision: TypeAlias = lax.PrecisionLike

Dimensions: TypeAlias = lax.DotDimensionNumbers
"""Of a dot: the contracted axes of both sides, then their batch axes."""

Cut: TypeAlias = Callable[[jax.Array, int], jax.Array]
"""What is done to an array along one of its axes."""


class Shaped(Protocol):
    """An array, or what says as much of one: its shape and its dtype."""

    @property
    def shape(self) -> Shape: ...

    @property
    def dtype(self) -> np.dtype: ...
