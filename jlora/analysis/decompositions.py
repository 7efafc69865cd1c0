"""Singular values of matrices and of low-rank products, and what they say: ranks, and the best approximation.

    D = U diag(s) V^T        D_r = the first r terms        ||D - D_r||_F^2 = s_{r+1}^2 + s_{r+2}^2 + ...

Every function takes stacks of matrices `(stack..., in, out)` and computes in at least float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from jlora import _answers
from jlora._dtypes import widened


class SVD(NamedTuple):
    """D = u diag(s) v^T: `u (stack..., in, k)`, `s (stack..., k)` from the largest down, `v (stack..., out, k)`."""

    u: jax.Array
    s: jax.Array
    v: jax.Array

    @property
    def matrix(self) -> jax.Array:
        """D itself, dense: `(stack..., in, out)`."""
        return matmul(self.u * self.s[..., None, :], self.v.mT)


class Truncation(NamedTuple):
    """The first r terms as an `SVD`, and what they leave out: `frobenius` and `spectral` norm of D - D_r."""

    svd: SVD
    frobenius: jax.Array
    spectral: jax.Array


def matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    """a b in full precision: an accelerator's default would round to ten bits of mantissa or fewer."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def check_array(x: object, what: str) -> None:
    """Raises TypeError unless `x` is an array, or numbers that make one."""
    if isinstance(x, SVD):
        raise TypeError(
            f"{what} is an SVD (u, s, v): give its matrix, x.matrix, or its singular values, x.s, or a weight"
        )
    if not hasattr(x, "dtype") and not isinstance(x, (list, tuple, int, float)):
        raise TypeError(f"{what} is {_answers.kind(x)}, not an array")


def check_matrix(x: ArrayLike, what: str) -> None:
    """Raises unless `x` has two axes beside its stack."""
    check_array(x, what)
    if jnp.ndim(x) < 2:
        raise ValueError(f"{what} of shape {jnp.shape(x)} is no matrix; give (stack..., rows, columns)")


def check_svd(x: object) -> None:
    """Raises unless `x` is a decomposition."""
    if not isinstance(x, SVD):
        shape = getattr(x, "shape", None)
        kind = f"a {type(x).__name__}" if shape is None else f"an array of shape {shape}"
        raise TypeError(f"not {kind}, but its singular value decomposition: jlora.analysis.svd(x)")


def svd(matrix: ArrayLike) -> SVD:
    """The thin singular value decomposition of `(stack..., in, out)`, in at least float32.

    Of an update that is a product of factors, take `factored_svd`, which never makes the matrix.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.analysis.svd(jnp.diag(jnp.array([1.0, 3.0, 2.0]))).s
      Array([3., 2., 1.], dtype=float32)
    """
    check_matrix(matrix, "an array")
    u, s, vh = jnp.linalg.svd(widened(matrix), full_matrices=False)
    return SVD(u, s, vh.mT)


def factored_svd(a: ArrayLike, b: ArrayLike) -> SVD:
    """The decomposition of a^T b out of its factors `a (stack..., r, in)` and `b (stack..., r, out)`.

    With a^T = Qa Ra and b^T = Qb Rb, a^T b = Qa (Ra Rb^T) Qb^T: two thin QR decompositions and the SVD of a small
    matrix, at most (r, r). The matrix (in, out) is never made.

    Returns:
      An `SVD` with k = min(r, in, out) terms, those of s = 0 among them where the factors have a lower rank.

    Raises:
      ValueError: factors of unlike rank, or no matrices.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> a, b = jnp.eye(2, 6), jnp.array([[0.0, 3.0, 0.0], [2.0, 0.0, 0.0]])
      >>> jlora.analysis.factored_svd(a, b).s
      Array([3., 2.], dtype=float32)
    """
    check_matrix(a, "a")
    check_matrix(b, "b")
    if jnp.shape(a)[-2] != jnp.shape(b)[-2]:
        raise ValueError(f"a {jnp.shape(a)} and b {jnp.shape(b)} differ in their rank, the last axis but one")
    qa, ra = jnp.linalg.qr(widened(a).mT)
    qb, rb = jnp.linalg.qr(widened(b).mT)
    core = svd(matmul(ra, rb.mT))
    return SVD(matmul(qa, core.u), core.s, matmul(qb, core.v))


def effective_rank(s: ArrayLike) -> jax.Array:
    """exp of the entropy of s / sum(s): how many directions a spectrum `s (stack..., k)` spreads over, 1 to k.

    A spectrum of zeros has an effective rank of 0, one with NaN has NaN.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> float(jlora.analysis.effective_rank(jnp.array([2.0, 2.0, 0.0])).round(3))
      2.0

    References:
      Roy and Vetterli, `The effective rank: a measure of effective dimensionality
      <https://infoscience.epfl.ch/record/110188>`_, 2007.
    """
    check_array(s, "effective_rank: the spectrum s")
    s = widened(s)
    total = jnp.sum(s, -1, keepdims=True)
    p = s / jnp.where(total == 0, 1, total)
    entropy = -jnp.sum(p * jnp.log(jnp.where(p > 0, p, 1)), -1)
    return jnp.where(total[..., 0] == 0, 0, jnp.exp(entropy))


def stable_rank(s: ArrayLike) -> jax.Array:
    """||D||_F^2 / ||D||_2^2 of a spectrum `s (stack..., k)`: 1 to k, and blind to small singular values; 0 for zeros.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> float(jlora.analysis.stable_rank(jnp.array([2.0, 1.0, 1.0])))
      1.5

    References:
      Rudelson and Vershynin, `Sampling from large matrices <https://arxiv.org/abs/math/0503442>`_, 2007.
    """
    check_array(s, "stable_rank: the spectrum s")
    s = widened(s)
    largest = jnp.max(s, -1, keepdims=True)
    return jnp.sum((s / jnp.where(largest > 0, largest, 1)) ** 2, -1)


def truncate(whole: SVD, rank: int) -> Truncation:
    """The best approximation of a rank, in both norms, and its error.

    Args:
      whole: what `svd` or `factored_svd` returned.
      rank: how many terms to keep, 0 to all of them.

    Raises:
      TypeError: an array in place of its decomposition.
      ValueError: a rank outside of that.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> cut = jlora.analysis.truncate(jlora.analysis.svd(jnp.diag(jnp.array([5.0, 4.0, 3.0]))), 1)
      >>> float(cut.frobenius), float(cut.spectral)
      (5.0, 4.0)

    References:
      Eckart and Young, `The approximation of one matrix by another of lower rank
      <https://doi.org/10.1007/BF02288367>`_, 1936.
    """
    check_svd(whole)
    size = whole.s.shape[-1]
    words = f"there are {size} singular values; write a rank of 0 to {size}"
    _answers.check_integer("truncate(rank", rank, 0, words, most=size)
    rest = whole.s[..., rank:]
    kept = SVD(whole.u[..., :rank], whole.s[..., :rank], whole.v[..., :rank])
    spectral = rest[..., 0] if rank < size else jnp.zeros(rest.shape[:-1], rest.dtype)
    return Truncation(kept, jnp.linalg.norm(rest, axis=-1), spectral)
