"""AdaLoRA's penalty, which keeps P diag(lam) Q near a singular value decomposition.

Zhang et al, `AdaLoRA: Adaptive Budget Allocation for Parameter-Efficient Fine-Tuning
<https://arxiv.org/abs/2303.10512>`_, 2023.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from jlora._dtypes import widened
from jlora._plan import _pairs
from jlora._types import PyTree
from jlora.adapted import check_adapted


def orthogonality(adapted: PyTree, form: Literal["paper", "reference", "norms"] = "paper") -> jax.Array:
    """AdaLoRA's penalty: the sum of ||p p^T - I||_F^2 + ||q q^T - I||_F^2 over the adapted weights.

    With p (stack..., r, in...) and q (stack..., r, out...), stored rank first, so that p p^T is (r, r). Each layer of
    a stack counts as a weight of its own; a factor that weights share counts once. It is added to the loss, times
    gamma: 0.1 in most of the paper's runs. A triplet that is pruned by lam_i = 0 counts, as in the authors' code, and
    its p_i and q_i stay orthogonal to the others: it can come back. Rows of zeros, with which `compact` pads a stack,
    do not: the identity has a zero there.

    Args:
      adapted: an `Adapted` with weights whose update is p diag(lam) q, all trained (AdaLoRA, SoRA, KaSA); other weights
        take no part. Inside a loss: `jlora.join(trainable, frozen)`.
      form: `"paper"`, the sum of squared norms; `"reference"`, as the authors' code has it: the mean of the norms,
        not squared, over all matrices, p and q counted apart; or `"norms"`, the sum of these: KaSA's.

    Returns:
      A scalar, computed in float32 or better. Its gradient is finite everywhere: zero, in both forms, where a matrix
      is exactly orthonormal.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: an unknown form; an adapter without such weights.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.AdaLoRA(rank=2))
      >>> adapted.trainable["query/kernel"] |= {"p": jnp.eye(2, 6), "q": 2 * jnp.eye(2, 4)}
      >>> float(jlora.rank.orthogonality(adapted))  # 0 + ||4 I - I||^2
      18.0

    References:
      Zhang et al, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023.
    """
    if form not in ("paper", "reference", "norms"):
        raise ValueError(f"orthogonality(form={form!r}): write 'paper', 'reference' or 'norms'")
    squares = jnp.concatenate([_squares(x, stack).ravel() for x, stack in _matrices(adapted)])
    if form == "paper":
        return jnp.sum(squares)
    return jnp.mean(_root(squares)) if form == "reference" else jnp.sum(_root(squares))


def _matrices(adapted: PyTree) -> list[tuple[jax.Array, int]]:
    """p and q of every weight that has them, with the number of their stack axes."""
    plan = check_adapted("orthogonality", adapted).frozen.plan
    diagonal = [pair for pair in _pairs.pairs(plan) if pair.diagonal]
    members = {member.place: member for pair in diagonal for member in pair.members}
    if not members:
        methods = ", ".join(dict.fromkeys(m.describe() for m in plan.methods))
        raise ValueError(f"orthogonality finds no update p diag(lam) q under {methods}; adapt with jlora.AdaLoRA(...)")
    return [(adapted.trainable[group][name], m.stack) for (group, name), m in members.items()]


def _squares(x: jax.Array, stack: int) -> jax.Array:
    """||x x^T - I||_F^2 of each matrix of a stack; a row of zeros, where a compacted stack is padded, is no row."""
    flat = widened(x.reshape(*x.shape[: stack + 1], -1))
    gram = jnp.einsum("...rn,...sn->...rs", flat, flat, precision=lax.Precision.HIGHEST)
    rows = jnp.any(flat != 0, -1).astype(gram.dtype)
    ones = jnp.broadcast_to(jnp.eye(gram.shape[-1], dtype=gram.dtype), gram.shape)
    return jnp.sum((gram - rows[..., None] * ones) ** 2, (-2, -1))


def _root(square: jax.Array) -> jax.Array:
    """The square root, with a gradient of zero at zero: the plain one is NaN where a matrix is orthonormal."""
    positive = square > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, square, 1)), 0)
