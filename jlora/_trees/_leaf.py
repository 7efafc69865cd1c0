"""What a method may know of a weight."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jlora._dtypes import widened


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a method may know of a weight: its path, shape, dtype and one letter an axis. No values."""

    path: str
    shape: tuple[int, ...]
    dtype: DTypeLike
    roles: str

    @property
    def name(self) -> str:
        """The last step of the path: `kernel`, `bias`, `embedding`, ..."""
        return self.path.rsplit("/", 1)[-1]

    def axes(self, roles: str) -> tuple[int, ...]:
        """The axes that carry one of `roles`, in the kernel's order."""
        return tuple(n for n, r in enumerate(self.roles) if r in roles)

    def sizes(self, roles: str) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(self.shape[n] for n in self.axes(roles))

    def size(self, roles: str) -> int:
        """The product of their sizes: `size("ik")` is the fan-in, `size("o")` the fan-out."""
        return math.prod(self.sizes(roles))

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack axes, which stand first in every stored factor."""
        return self.sizes("s")

    @property
    def layer(self) -> "Leaf":
        """The leaf without its stack axes, as a `Function` sees W0."""
        kept = self.axes("iok")
        return Leaf(self.path, tuple(self.shape[n] for n in kept), self.dtype, "".join(self.roles[n] for n in kept))

    def matrix(self, array: ArrayLike) -> jax.Array:
        """An array in the weight's own axes as matrices `(stack..., in, out)`, in at least float32.

        Example:
          >>> import jax.numpy as jnp
          >>> from jlora.network import Leaf
          >>> leaf = Leaf("layers/conv/kernel", (5, 3, 3, 4, 8), jnp.dtype("float32"), "skkio")
          >>> leaf.matrix(jnp.ones(leaf.shape)).shape, leaf.layer.matrix(jnp.ones((3, 3, 4, 8))).shape
          ((5, 36, 8), (36, 8))
        """
        array = jnp.asarray(array)
        if array.shape != self.shape:
            raise ValueError(f"an array of shape {array.shape} for {self.path!r} of shape {self.shape}")
        order = (*self.axes("s"), *self.axes("ik"), *self.axes("o"))
        return jax.lax.transpose(widened(array), order).reshape(*self.stack, self.size("ik"), self.size("o"))

    def kernel(self, matrix: jax.Array) -> jax.Array:
        """The inverse of `matrix`.

        Example:
          >>> import jax.numpy as jnp
          >>> from jlora.network import Leaf
          >>> leaf = Leaf("query/kernel", (2, 6, 4), jnp.dtype("float32"), "oio")
          >>> leaf.kernel(jnp.ones((6, 8))).shape
          (2, 6, 4)
        """
        order = (*self.axes("s"), *self.axes("ik"), *self.axes("o"))
        back = [order.index(n) for n in range(len(order))]
        return jax.lax.transpose(matrix.reshape([self.shape[n] for n in order]), back)
