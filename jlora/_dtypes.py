"""The dtype in which things meet: JAX's promotion, also where a user forbids it (`jax_numpy_dtype_promotion="strict"`).

What jlora adds to a model has dtypes of its own, and says in words of code which casts it makes.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from jlora._types import DType


def promoted(*dtypes: DTypeLike) -> DType:
    """The dtype that has room for all of these."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def alike(*arrays: jax.Array) -> list[jax.Array]:
    """Arrays in the dtype that has room for all of them."""
    dtype = promoted(*(x.dtype for x in arrays))
    return [x.astype(dtype) for x in arrays]


def wide(dtype: DTypeLike) -> DTypeLike:
    """What sums of this dtype are made in: float32 or better."""
    return dtype if jnp.issubdtype(dtype, jnp.inexact) and jnp.dtype(dtype).itemsize > 4 else jnp.float32


def widened(x: ArrayLike) -> jax.Array:
    """An array in at least float32."""
    x = jnp.asarray(x)
    return x.astype(wide(x.dtype))
