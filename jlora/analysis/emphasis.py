"""An update against its weight: what it amplifies, and where it lies.

amplification = ||dW||_F / ||U^T W V||_F      U, V the first r singular vectors of dW

inside(k) = ||U_k^T dW V_k||_F^2 / ||dW||_F^2      U_k, V_k those of W
"""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from jlora import _answers
from jlora._dtypes import widened
from jlora.analysis.decompositions import SVD, check_matrix, matmul, svd
from jlora.analysis.subspaces import basis, check_space


class Amplification(NamedTuple):
    """How large W is along an update, one number a layer of a stack.

    Attributes:
      update: ||dW||_F.
      weight: ||W||_F.
      onto_update: ||U^T W V||_F with the first r singular vectors of dW.
      onto_weight: the same with those of W: the most that any could give.
      onto_random: the root mean square of it over random subspaces, r ||W||_F / sqrt(in out).
      factor: update / onto_update.
    """

    update: jax.Array
    weight: jax.Array
    onto_update: jax.Array
    onto_weight: jax.Array
    onto_random: jax.Array
    factor: jax.Array


class Inside(NamedTuple):
    """Shares of ||dW||_F^2 in the first k singular directions of W, `(stack..., k)` for k = 1, 2, ...

    Attributes:
      left: of the input side, ||U_k^T dW||^2.
      right: of the output side, ||dW V_k||^2.
      both: ||U_k^T dW V_k||^2. A random update has k / in, k / out and k^2 / (in out).
    """

    left: jax.Array
    right: jax.Array
    both: jax.Array


def _norm(x: jax.Array) -> jax.Array:
    return jnp.sqrt(jnp.sum(x**2, (-2, -1)))


def _check_shapes(update: SVD, rows: int, columns: int) -> None:
    have = basis(update, "left").shape[-2], basis(update, "right").shape[-2]
    if have != (rows, columns):
        raise ValueError(f"an update of shape {have} and a weight of shape {(rows, columns)} do not belong together")


def amplification(update: SVD, weight: ArrayLike, rank: int | None = None) -> Amplification:
    """How much dW emphasises directions that W has, but does not emphasise.

    Args:
      update: dW, from `updates` or `factored_svd`.
      weight: W, `(stack..., in, out)`, from `weights`.
      rank: r, at most the terms of `update`, which is the default. Directions of singular value 0 are arbitrary: an
        update of a lower rank than its factors needs it said.

    Raises:
      TypeError: an array in place of the update's decomposition.
      ValueError: a weight of another shape, or a rank that the update has not.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> update = jlora.analysis.svd(jnp.diag(jnp.array([0.0, 0.0, 6.0])))
      >>> found = jlora.analysis.amplification(update, jnp.diag(jnp.array([9.0, 5.0, 2.0])), rank=1)
      >>> float(found.onto_update), float(found.onto_weight), float(found.onto_random), float(found.factor)
      (2.0, 9.0, 3.49..., 3.0)

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, section 7.3.
    """
    check_matrix(weight, "a weight")
    weight = widened(weight)
    _check_shapes(update, *weight.shape[-2:])
    size = update.s.shape[-1]
    rank = size if rank is None else rank
    words = f"the update has {size} terms; write a rank of 1 to {size}"
    _answers.check_integer("amplification(rank", rank, 1, words, most=size)
    own = jnp.linalg.svd(weight, compute_uv=False)
    u, v = update.u[..., :rank], update.v[..., :rank]
    onto = _norm(matmul(matmul(u.mT, weight), v))
    norm, whole = jnp.linalg.norm(update.s, axis=-1), _norm(weight)
    random = rank * whole / math.sqrt(weight.shape[-2] * weight.shape[-1])
    return Amplification(norm, whole, onto, jnp.linalg.norm(own[..., :rank], axis=-1), random, norm / onto)


def inside(update: SVD, weight: SVD) -> Inside:
    """The share of dW that lies in the first k singular directions of W, for every k at once.

    Args:
      update: dW, from `updates` or `factored_svd`.
      weight: `svd` of W.

    Raises:
      TypeError: an array in place of a decomposition.
      ValueError: a weight of another shape.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> weight = jlora.analysis.svd(jnp.diag(jnp.array([3.0, 2.0, 1.0])))
      >>> update = jlora.analysis.svd(jnp.diag(jnp.array([0.0, 1.0, 1.0])))
      >>> jlora.analysis.inside(update, weight).both
      Array([0. , 0.5, 1. ], dtype=float32)
    """
    _check_shapes(update, basis(weight, "left").shape[-2], weight.v.shape[-2])
    left = matmul(weight.u.mT, update.u * update.s[..., None, :])
    right = matmul(weight.v.mT, update.v * update.s[..., None, :])
    both = matmul(left, matmul(update.v.mT, weight.v))
    total = jnp.sum(update.s**2, -1)
    total = jnp.where(total > 0, total, 1)[..., None]
    corner = jnp.cumsum(jnp.cumsum(both**2, -2), -1)
    each = lambda x: jnp.cumsum(jnp.sum(x**2, -1), -1) / total
    return Inside(each(left), each(right), jnp.diagonal(corner, axis1=-2, axis2=-1) / total)


def intruders(
    before: ArrayLike, after: ArrayLike, k: int = 10, epsilon: float = 0.5, side: Literal["left", "right"] = "left"
) -> jax.Array:
    """Which of the first k singular vectors of the trained weight no singular vector of the old one resembles.

    A vector is an intruder where max |cos| over all singular vectors of the old weight is below epsilon. LoRA makes
    some, full fine-tuning hardly any; vectors of near-equal singular values mix freely, and may count as intruders.

    Args:
      before: W, `(stack..., in, out)`.
      after: W + dW.
      k: how many of the first vectors of `after` to look at.
      epsilon: the paper looks at 0.3 to 0.9.
      side: `"left"` for the input side, `"right"` for the output side.

    Returns:
      `(stack..., k)` of bool.

    Raises:
      ValueError: weights of unlike shapes, or a k that they have not.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> before = jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))
      >>> after = before + 9 * jnp.full((4, 4), 0.25)  # a direction that none of the old ones is
      >>> jlora.analysis.intruders(before, after, k=2, epsilon=0.7)
      Array([ True, False], dtype=bool)

    References:
      Shuttleworth et al, `LoRA vs Full Fine-tuning: An Illusion of Equivalence
      <https://arxiv.org/abs/2410.21228>`_, 2024.
    """
    for x, name in ((before, "before"), (after, "after")):
        if isinstance(x, SVD):
            raise TypeError(f"intruders compares weights, and {name} is an SVD: give it the weight, or {name}.matrix")
        check_matrix(x, f"intruders: {name}")
    if jnp.shape(before) != jnp.shape(after):
        raise ValueError(f"weights of shapes {jnp.shape(before)} and {jnp.shape(after)} cannot be compared")
    old, new = basis(svd(before), side), basis(svd(after), side)
    check_space(old, new)
    words = f"there are {new.shape[-1]} singular vectors; write k of 1 to that"
    _answers.check_integer("intruders(k", k, 1, words, most=new.shape[-1])
    _answers.check_number("intruders(epsilon", epsilon, lambda x: 0 < x <= 1, "a bound on |cos|, above 0 and at most 1")
    return jnp.max(jnp.abs(matmul(old.mT, new[..., :k])), -2) < epsilon
