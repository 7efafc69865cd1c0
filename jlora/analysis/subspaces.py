"""How two subspaces lie to each other.

    phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j)      E phi = max(i, j) / d for random ones

    cos theta_k = sigma_k(U^T V)                   theta_k the principal angles, from the smallest up
    Grassmann sqrt(sum theta^2)    chordal sqrt(sum sin^2 theta)    projection sin theta_max

Stacks of subspaces are compared layer by layer: leading axes are kept, and broadcast.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jlora import _answers
from jlora._dtypes import widened
from jlora.analysis.decompositions import SVD, check_matrix, check_svd, matmul


class Distances(NamedTuple):
    """Distances between two subspaces; for unlike dimensions, between the smaller and its nearest in the larger.

    Attributes:
      grassmann: sqrt(sum theta^2), the geodesic.
      chordal: sqrt(sum sin^2 theta), which is ||P - P'||_F / sqrt(2) where the dimensions are equal, and
        sqrt(p (1 - phi)); some call this one the projection metric.
      projection: sin theta_max, which is ||P - P'||_2 where the dimensions are equal.
    """

    grassmann: jax.Array
    chordal: jax.Array
    projection: jax.Array


def basis(x: SVD, side: Literal["left", "right"]) -> jax.Array:
    """The singular vectors of one side, as columns."""
    if side not in ("left", "right"):
        raise ValueError(f"side={side!r}: write 'left' (the input side, u) or 'right' (the output side, v)")
    check_svd(x)
    return x.u if side == "left" else x.v


def check_space(a: jax.Array, b: jax.Array) -> None:
    """Raises unless two bases live in one space."""
    if a.shape[-2] != b.shape[-2]:
        raise ValueError(f"subspaces of spaces of {a.shape[-2]} and {b.shape[-2]} dimensions cannot be compared")


def similarity(one: SVD, other: SVD, side: Literal["left", "right"] = "left") -> jax.Array:
    """phi(i, j) = ||U_i^T V_j||_F^2 / min(i, j) for every i and j: how much the first i directions of one share with j.

    1 where the smaller subspace lies in the larger one, 0 where they are orthogonal; `random_similarity` is what
    chance gives. The LoRA paper compares the factor a of two ranks or seeds: here `svd(factors(adapted)[path].a)` on
    its right side (a is stored rank first), or an update's left side. Give the two adapters different keys: of one key,
    the a of a smaller rank begins as the first rows of that of a larger one, and phi finds what they shared untrained.

    Args:
      one: of the matrix, the factor or the update: `svd`, `factored_svd`, `updates`.
      other: another, in the same space. Directions of singular value 0 are arbitrary: cut them off with `truncate`.
      side: `"left"` for the input side, `"right"` for the output side.

    Returns:
      `(stack..., i, j)`; phi(1, 1) stands at [..., 0, 0].

    Raises:
      TypeError: an array in place of its decomposition.
      ValueError: unlike spaces, or another side.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> one = jlora.analysis.svd(jnp.diag(jnp.array([3.0, 2.0, 1.0]))[:, :2])
      >>> other = jlora.analysis.svd(jnp.diag(jnp.array([0.0, 2.0, 1.0]))[:, 1:])
      >>> jlora.analysis.similarity(one, other)
      Array([[0. , 0. ],
             [1. , 0.5]], dtype=float32)

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, section 7.2 and appendix G.
    """
    u, v = basis(one, side), basis(other, side)
    check_space(u, v)
    square = matmul(u.mT, v) ** 2
    shared = jnp.cumsum(jnp.cumsum(square, -2), -1)
    i, j = (jnp.arange(1, n + 1) for n in square.shape[-2:])
    smaller = jnp.minimum(i[:, None], j[None, :]).astype(square.dtype)
    return shared / jnp.broadcast_to(smaller, shared.shape)


def random_similarity(d: int, i: int, j: int) -> jax.Array:
    """max(i, j) / d: what `similarity` expects of random subspaces of a d-dimensional space, as its grid `(i, j)`.

    Example:
      >>> import jlora
      >>> jlora.analysis.random_similarity(4, 1, 2)
      Array([[0.25, 0.5 ]], dtype=float32)
    """
    for name, n in (("d", d), ("i", i), ("j", j)):
        _answers.check_integer(f"random_similarity({name}", n, 1, "a number of dimensions, an integer of at least 1")
    if max(i, j) > d:
        raise ValueError(f"random_similarity(d={d}, i={i}, j={j}): a subspace has at most d dimensions")
    i_, j_ = jnp.arange(1, i + 1), jnp.arange(1, j + 1)
    return jnp.maximum(i_[:, None], j_[None, :]).astype(jnp.float32) / d


def principal_angles(a: ArrayLike, b: ArrayLike) -> jax.Array:
    """The angles between the spans of the columns of `a (stack..., d, i)` and `b (stack..., d, j)`, in radians.

    arccos loses half of the digits where an angle is small: in float32 all below 0.0003 come out as 0. There the angle
    is the arcsin of its sine, a singular value of the residual b - a a^T b of orthonormal a and b.

    Args:
      a: columns that are linearly independent (else their span is that of some completion).
      b: other columns, in the same space.

    Returns:
      `(stack..., min(i, j))`, from the smallest up.

    Raises:
      ValueError: unlike spaces.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> a = jnp.array([[1.0], [0.0]])
      >>> f"{jlora.analysis.principal_angles(a, jnp.array([[1.0], [1e-6]]))[0]:.3g}"
      '1e-06'

    References:
      Bjorck and Golub, `Numerical methods for computing angles between linear subspaces
      <https://doi.org/10.1090/S0025-5718-1973-0348991-3>`_, 1973.
    """
    check_matrix(a, "a")
    check_matrix(b, "b")
    a, b = widened(a), widened(b)
    check_space(a, b)
    if a.shape[-1] < b.shape[-1]:  # the residual is taken of the smaller subspace
        a, b = b, a
    qa, qb = jnp.linalg.qr(a)[0], jnp.linalg.qr(b)[0]
    shared = matmul(qa.mT, qb)
    cosine = jnp.linalg.svd(shared, compute_uv=False)
    sine = jnp.linalg.svd(qb - matmul(qa, shared), compute_uv=False)[..., ::-1]
    small = cosine**2 >= 0.5
    return jnp.where(small, jnp.arcsin(jnp.clip(sine, 0, 1)), jnp.arccos(jnp.clip(cosine, 0, 1)))


def distances(a: ArrayLike, b: ArrayLike) -> Distances:
    """Grassmann, chordal and projection distance between the spans of the columns of a and b; see `Distances`.

    Args:
      a: `(stack..., d, i)`, as for `principal_angles`.
      b: `(stack..., d, j)`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> found = jlora.analysis.distances(jnp.eye(3)[:, :2], jnp.eye(3)[:, 1:])
      >>> [round(float(x), 4) for x in found]
      [1.5708, 1.0, 1.0]

    References:
      Ye and Lim, `Schubert varieties and distances between subspaces of different dimensions
      <https://arxiv.org/abs/1407.0900>`_, 2014, table 2.
    """
    angles = principal_angles(a, b)
    sine = jnp.sin(angles)
    norm = lambda x: jnp.sqrt(jnp.sum(x**2, -1))
    return Distances(norm(angles), norm(sine), jnp.max(sine, -1))
