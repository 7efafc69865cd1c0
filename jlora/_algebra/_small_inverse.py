"""The inverse of small symmetric positive definite matrices, inside a compiled step."""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def inverse(m: jax.Array) -> jax.Array:
    """m^-1 for m (..., n, n), symmetric and positive definite.

    On CPU by Gauss-Jordan and not by LAPACK: in one program of jaxlib 0.10 several batched factorisations wait for one
    another for ever, once as many run at a time as there are cores.
    """
    return lax.platform_dependent(m, cpu=_swept, default=jnp.linalg.inv)


@inverse.defjvp
def _(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """-m^-1 dm m^-1, which the backward pass needs no elimination for."""
    ((m,), (dm,)) = primals, tangents
    made = inverse(m)
    times = lambda a, b: jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
    return made, -times(times(made, dm), made)


def _swept(m: jax.Array) -> jax.Array:
    """Gauss-Jordan elimination in place, all matrices at a time; positive definite ones need no pivots."""
    n = m.shape[-1]

    def eliminate(k: jax.Array, m: jax.Array) -> jax.Array:
        here = lax.broadcasted_iota(jnp.int32, m.shape, m.ndim - 1) == k
        row, column = (lax.dynamic_index_in_dim(m, k, axis) for axis in (m.ndim - 2, m.ndim - 1))
        pivot = lax.dynamic_index_in_dim(row, k, m.ndim - 1)
        there = here.mT
        row = jnp.where(here[..., :1, :], 1 / pivot, row / pivot)
        swept = jnp.where(here, 0, m) - jnp.where(there[..., :1], 0, column) * row
        return jnp.where(there, row, swept)

    return lax.fori_loop(0, n, eliminate, m)
