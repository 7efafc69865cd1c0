"""Where a and b of a LoRA begin, when that is neither noise nor zero.

A start with a product a0 b0 other than zero would change the model's output. So it is *paired*: the adapter keeps a0
and b0 beside a and b, frozen, and computes

    dW = s (a b - a0 b0) = s ((a - a0) b + a0 (b - b0)).

The right-hand form is one delta of rank 2r, `[a - a0, a0] [b; b - b0]`. At the start each of its products has a factor
that is exactly zero, so the output is the base's bit for bit, however a compiler orders or fuses the sums. And what
was learned is computed from small differences, taken in float32: two products of the weight's own size, each rounded
to bfloat16 and then subtracted, would drown it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar, Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer

from jlora import _answers
from jlora._dtypes import alike, widened
from jlora._trees._leaf import Leaf
from jlora._types import W0, Key, PyTree, Value
from jlora.methods.base import check_low_rank

AB: TypeAlias = tuple[jax.Array, jax.Array]


def flipped(matrix: jax.Array) -> jax.Array:
    """The transpose of the last two axes."""
    return jnp.swapaxes(matrix, -1, -2)


def best(matrix: jax.Array, rank: int, scale: float) -> AB:
    """a (r, in), b (r, out) with s a^T b the best approximation of rank r, its singular values halved between them.

    Eckart and Young, `The approximation of one matrix by another of lower rank
    <https://doi.org/10.1007/BF02288367>`_, 1936.
    """
    u, s, vh = jnp.linalg.svd(matrix, full_matrices=False)
    root = jnp.sqrt(s[..., :rank] / scale)[..., None]
    return root * flipped(u[..., :rank]), root * vh[..., :rank, :]


def values(weight: W0, leaf: Leaf) -> jax.Array:
    """A weight as matrices, for a start that reads it."""
    if isinstance(weight, jax.ShapeDtypeStruct):
        raise ValueError(
            f"this start of {leaf.path!r} of shape {leaf.shape} is made from the values of the weight, and it has "
            "none; give arrays, or, where it is a LoRA, write init='kaiming'"
        )
    _check_finite(weight, leaf, "values")
    return leaf.matrix(weight)


def singular(weight: W0, leaf: Leaf) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (stack..., m, in), S (stack..., m, 1) and V (stack..., m, out) of a weight, largest first, m = min(in, out)."""
    u, s, v = jnp.linalg.svd(values(weight, leaf), full_matrices=False)
    return flipped(u), s[..., None], v


def _known(data: Mapping[str, Value], leaf: Leaf, what: str) -> Value:
    if not isinstance(data, Mapping):
        raise ValueError(f"a start takes {{path: {what}}}, a dictionary, not {_answers.kind(data)}")
    if leaf.path not in data:
        raise ValueError(f"no {what} for {leaf.path!r}; there are some for {sorted(data)[:5]}")
    _check_finite(data[leaf.path], leaf, what)
    return data[leaf.path]


def _moment(moments: Mapping[str, jax.Array], leaf: Leaf) -> jax.Array:
    """X^T X of the inputs of a weight."""
    moment = jnp.asarray(_known(moments, leaf, "second moment"))
    want = (*leaf.stack, leaf.size("ik"), leaf.size("ik"))
    if moment.shape != want:
        raise ValueError(f"the second moment for {leaf.path!r} has shape {moment.shape}, not {want}")
    return moment


def _check_finite(arrays: PyTree, leaf: Leaf, what: str) -> None:
    """A decomposition of NaN is NaN: an adapter that is none from the start. Traced values cannot be looked at."""
    for x in jax.tree.leaves(arrays):
        if not isinstance(x, Tracer) and not bool(jnp.isfinite(jnp.asarray(x)).all()):
            raise ValueError(f"{leaf.path!r} of shape {leaf.shape}: its {what} hold NaN or infinities")


@dataclasses.dataclass(frozen=True)
class Start:
    """How a and b of one weight begin; a subclass says its `factors`.

    Attributes:
      paired: whether s a0 b0 is subtracted, so that the start is the base. False for a start whose product is zero,
        or meant to be added.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jlora
      >>> @dataclasses.dataclass(frozen=True)
      ... class Ones(jlora.init.Start):
      ...     def factors(self, leaf, weight, rank, scale, key):
      ...         return jnp.ones((rank, leaf.size("ik"))), jnp.ones((rank, leaf.size("o")))
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> adapted = jlora.adapt(params, jlora.LoRA(rank=2, init=Ones()))
      >>> bool((jlora.merge(adapted)["query"]["kernel"] == 1).all())
      True
    """

    paired: ClassVar[bool] = True

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        """`a (stack..., r, in)` and `b (stack..., r, out)`, both sides flat.

        Args:
          leaf: path, shape and axes of the weight.
          weight: the array itself, in its own axes; a `ShapeDtypeStruct` where there is none.
          rank: r.
          scale: s.
          key: a PRNG key.
        """
        raise ValueError(
            f"init='paired' names the form of an adapter, not how {leaf.path!r} begins; write 'pissa', 'olora', "
            "'orthogonal' or a value of jlora.init"
        )


@dataclasses.dataclass(frozen=True)
class PiSSA(Start):
    """a = U_r sqrt(S_r / s), b = sqrt(S_r / s) V_r of W0 = U S V: the principal part of the weight is trained.

    Also written `LoRA(init="pissa")`. The paper trains a b beside W0 - s a b; here the base stays W0 and the adapter
    subtracts s a0 b0, which is the same function.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.eye(4)}}, jlora.LoRA(rank=1, init=jlora.init.PiSSA()))
      >>> sorted(adapted.trainable["query/kernel"]), sorted(adapted.frozen.factors["query/kernel"])
      (['a', 'b'], ['a0', 'b0', 's'])

    References:
      Meng et al, `PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models
      <https://arxiv.org/abs/2404.02948>`_, 2024.
    """

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        check_low_rank(leaf, rank)
        return best(values(weight, leaf), rank, scale)


@dataclasses.dataclass(frozen=True)
class OLoRA(Start):
    """a = R[:r], b = Q[:, :r] of the transposed weight, W0^T = Q R: an orthonormal b.

    Also written `LoRA(init="olora")`. As in peft, a and b are not divided by s, so that s times the product is what is
    trained and subtracted.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.eye(4)}}, jlora.LoRA(rank=1, init=jlora.init.OLoRA()))
      >>> jnp.abs(adapted.trainable["query/kernel"]["b"])
      Array([[1., 0., 0., 0.]], dtype=float32)

    References:
      Büyükakyüz, `OLoRA: Orthonormal Low-Rank Adaptation of Large Language Models
      <https://arxiv.org/abs/2406.01775>`_, 2024.
    """

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        check_low_rank(leaf, rank)
        q, r = jnp.linalg.qr(flipped(values(weight, leaf)))
        return r[..., :rank, :], flipped(q[..., :rank])


@dataclasses.dataclass(frozen=True)
class Orthogonal(Start):
    """a = P^T X, b = Q^T Y with P and Q the odd and even rows of a random orthogonal (r, r) matrix, so a^T b = 0.

    X (r/2, in) and Y (r/2, out) are N(0, 0.01). Neither factor is zero, so both have a gradient from the first step.
    Also written `LoRA(init="orthogonal")`; r is even. The product is zero but for rounding, and the pair takes that
    away too.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.eye(4)}}, jlora.LoRA(rank=2, init="orthogonal"))
      >>> a, b = adapted.trainable["query/kernel"].values()
      >>> bool(jnp.abs(a.T @ b).max() < 1e-6)
      True

    References:
      peft's `init_lora_weights="orthogonal"`, after `Rethinking LoRA initialisation
      <https://datta0.github.io/posts/rethink-lora-init/>`_.
    """

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        if rank % 2:
            raise ValueError(f"init='orthogonal' on {leaf.path!r} halves the rank {rank}; write an even one")
        keys = jax.random.split(key, 3)
        draw = lambda key, *shape: jax.random.normal(key, (*leaf.stack, *shape), jnp.float32)
        q, _ = jnp.linalg.qr(draw(keys[0], rank, rank))
        a = flipped(q[..., 0::2, :]) @ draw(keys[1], rank // 2, leaf.size("ik"))
        b = flipped(q[..., 1::2, :]) @ draw(keys[2], rank // 2, leaf.size("o"))
        return a / 10, b / 10


@dataclasses.dataclass(frozen=True, eq=False)
class GA(Start):
    """LoRA-GA: a = c U[:, :r], b = c V[:, r:2r] of the gradient G = U S V of the weight, c = out^(1/4) / sqrt(gamma).

    The first step of the adapter then goes where the best step of rank 2r of full fine-tuning would: a's gradient
    lies in the span of the left vectors r..2r, b's in that of the right vectors 0..r. c is the paper's and its
    authors' code, for both factors; peft also multiplies one of them by the singular values, which this does not.
    2r is at most min(in, out).

    Attributes:
      gradients: `{path: dL/dW}` in the weights' own axes, as `jlora.init.gradients` returns them.
      gamma: 16, the constant of the paper's stable scale; the larger, the smaller the start.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.eye(4)}}
      >>> method = jlora.LoRA(rank=2)
      >>> loss = lambda params, x: jnp.sum((x @ params["query"]["kernel"]) ** 2)
      >>> grads = jlora.init.gradients(loss, params, [jnp.ones((3, 4))], method)
      >>> jlora.adapt(params, jlora.LoRA(rank=2, init=jlora.init.GA(grads)))
      Adapted(1 weight, 16 trainable)

    References:
      Wang, Yu and Li, `LoRA-GA: Low-Rank Adaptation with Gradient Approximation <https://arxiv.org/abs/2407.05000>`_,
      2024.
    """

    gradients: Mapping[str, jax.Array] = dataclasses.field(repr=False)
    gamma: float = 16.0

    def __post_init__(self) -> None:
        if not self.gamma > 0:
            raise ValueError(f"GA(gamma={self.gamma}): the start is divided by its root; write a positive number")

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        least = min(leaf.size("ik"), leaf.size("o"))
        if 2 * rank > least:
            raise ValueError(
                f"LoRA-GA on {leaf.path!r} of shape {leaf.shape} takes 2 * rank = {2 * rank} singular vectors, and "
                f"there are {least}; write a rank of at most {least // 2}"
            )
        u, _, vh = jnp.linalg.svd(leaf.matrix(_known(self.gradients, leaf, "gradient")), full_matrices=False)
        c = leaf.size("o") ** 0.25 / math.sqrt(self.gamma)
        return c * flipped(u[..., :rank]), c * vh[..., rank : 2 * rank, :]


@dataclasses.dataclass(frozen=True, eq=False)
class EVA(Start):
    """a = the first r right singular vectors of the weight's inputs X (tokens, in), b = 0.

    They are the eigenvectors of X^T X, which is all that is kept of the inputs. As b is zero the start is the base
    without a pair. `jlora.init.redistributed` gives each weight the rank that its inputs deserve.

    Attributes:
      moments: `{path: X^T X}`, `(stack..., in, in)`, as `jlora.init.activations` returns them.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.eye(4)}}
      >>> moments = {"query/kernel": jnp.diag(jnp.array([1.0, 9.0, 4.0, 0.0]))}
      >>> adapted = jlora.adapt(params, jlora.LoRA(rank=2, init=jlora.init.EVA(moments)))
      >>> jnp.abs(adapted.trainable["query/kernel"]["a"])
      Array([[0., 1., 0., 0.],
             [0., 0., 1., 0.]], dtype=float32)

    References:
      Paischer et al, `One Initialization to Rule them All: Fine-tuning via Explained Variance Adaptation
      <https://arxiv.org/abs/2410.07170>`_, 2024.
    """

    paired: ClassVar[bool] = False
    moments: Mapping[str, jax.Array] = dataclasses.field(repr=False)

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        moment = _moment(self.moments, leaf)
        if rank > moment.shape[-1]:
            raise ValueError(
                f"EVA on {leaf.path!r} of shape {leaf.shape}: its inputs have {moment.shape[-1]} directions"
            )
        _, vectors = jnp.linalg.eigh(widened(moment))  # ascending
        return flipped(vectors[..., ::-1][..., :rank]), jnp.zeros((*leaf.stack, rank, leaf.size("o")), moment.dtype)


@dataclasses.dataclass(frozen=True, eq=False)
class CorDA(Start):
    """a = sqrt(S_r / s) U_r^T C^-1, b = sqrt(S_r / s) V_r of C W0 = U S V: W0 as the inputs of a task see it.

    C is the second moment of the weight's inputs. In mode `"ipm"`, instruction-previewed, the first r components are
    trained, for inputs of the task to be learned; in `"kpm"`, knowledge-preserving, the last r, for inputs whose
    answers should stay as they are. A pair, as PiSSA: the base stays W0.

    C is divided by the mean of its diagonal, so that neither the number of rows nor the size of the inputs says how
    the product is shared between a and b (the authors' code divides each batch by its largest input). Then 0.01 is
    added to its diagonal, as there, which keeps its inverse exact: where inputs lie in few directions, too.

    Attributes:
      moments: `{path: X^T X}`, `(stack..., in, in)`, as `jlora.init.activations` returns them.
      mode: `"ipm"` or `"kpm"`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.eye(4)}}
      >>> moments = {"query/kernel": jnp.diag(jnp.array([1.0, 9.0, 4.0, 2.0]))}
      >>> first, last = (
      ...     jlora.adapt(params, jlora.LoRA(rank=1, init=jlora.init.CorDA(moments, mode))) for mode in ("ipm", "kpm")
      ... )
      >>> [int(jnp.abs(x.trainable["query/kernel"]["a"]).argmax()) for x in (first, last)]
      [1, 0]

    References:
      Yang et al, `CorDA: Context-Oriented Decomposition Adaptation of Large Language Models
      <https://arxiv.org/abs/2406.05223>`_, 2024.
    """

    moments: Mapping[str, jax.Array] = dataclasses.field(repr=False)
    mode: Literal["ipm", "kpm"] = "ipm"

    def __post_init__(self) -> None:
        if self.mode not in ("ipm", "kpm"):
            raise ValueError(
                f"CorDA(mode={self.mode!r}): write 'ipm' (instruction-previewed) or 'kpm' (knowledge-preserving)"
            )

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        check_low_rank(leaf, rank)
        moment, w = alike(widened(_moment(self.moments, leaf)), widened(values(weight, leaf)))
        times = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
        sizes, q = jnp.linalg.eigh(moment)  # C = Q diag(c) Q^T
        mean = jnp.mean(sizes, -1, keepdims=True)
        one = jnp.ones_like(mean)  # of a weight that met no input but zeros, C is the identity
        c = jnp.where(mean > 0, jnp.maximum(sizes, 0) / jnp.where(mean > 0, mean, one), one)[..., None] + 0.01
        u, s, vh = jnp.linalg.svd(times(q, c * times(flipped(q), w)), full_matrices=False)
        chosen = slice(rank) if self.mode == "ipm" else slice(s.shape[-1] - rank, None)
        root = jnp.sqrt(s[..., chosen] / scale)[..., None]
        return root * flipped(times(q, times(flipped(q), u[..., chosen]) / c)), root * vh[..., chosen, :]


@dataclasses.dataclass(frozen=True, eq=False)
class Given(Start):
    """a and b as they are given. s a b is added from the start on: nothing is subtracted.

    Attributes:
      pairs: `{path: (a, b)}` with `a (stack..., r, in)` and `b (stack..., r, out)`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> pairs = {"query/kernel": (jnp.ones((1, 4)), jnp.ones((1, 4)))}
      >>> method = jlora.LoRA(rank=1, init=jlora.init.Given(pairs))
      >>> float(jlora.merge(jlora.adapt({"query": {"kernel": jnp.eye(4)}}, method))["query"]["kernel"][0, 1])
      1.0

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.
    """

    paired: ClassVar[bool] = False
    pairs: Mapping[str, tuple[jax.Array, jax.Array]] = dataclasses.field(repr=False)

    def factors(self, leaf: Leaf, weight: W0, rank: int, scale: float, key: Key) -> AB:
        pair = _known(self.pairs, leaf, "pair (a, b)")
        if not isinstance(pair, (tuple, list)) or len(pair) != 2:
            raise ValueError(f"Given for {leaf.path!r} takes a pair (a, b) of arrays, not {_answers.kind(pair)}")
        a, b = map(jnp.asarray, pair)
        for name, x, side in (("a", a, "ik"), ("b", b, "o")):
            want = (*leaf.stack, rank, leaf.size(side))
            if x.shape != want:
                raise ValueError(f"{name} given for {leaf.path!r} has shape {x.shape}, not {want}")
        return a, b
