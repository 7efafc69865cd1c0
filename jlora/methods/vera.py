"""VeRA: h = W0 x + diag(b) B diag(d) A x, with A and B random, frozen and shared by all layers.

Kopiczko et al, `VeRA: Vector-based Random Matrix Adaptation <https://arxiv.org/abs/2310.11454>`_, 2023.
"""

import dataclasses
import functools
import math
from typing import Annotated

import jax
from jax import lax
from jax.typing import DTypeLike

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Init, Key, Shape
from jlora.methods import _draws
from jlora.methods._fields import Rank, Seed, nonzero
from jlora.methods.base import Dropping, zeros


def draw(seed: int, which: int, bound: float, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """A (r, n) matrix of U(-bound, bound), drawn column by column: a narrower one is the leading slice of a wider."""
    root = _draws.fold_in(_draws.key(seed), which)
    column = lambda n: _draws.uniform(_draws.fold_in(root, n), shape[:1], dtype, bound)
    return jax.vmap(column, out_axes=1)(lax.iota("uint32", shape[1]))


@dataclasses.dataclass(frozen=True)
class Side:
    """A matrix with its rows in axes of their own, its columns in the axes of a side."""

    rows: tuple[int, ...]
    sizes: tuple[int, ...]

    def __call__(self, a: jax.Array) -> jax.Array:
        return a.reshape(*self.rows, *self.sizes)


def shared(
    name: str,
    group: str,
    rows: tuple[int, ...],
    sizes: tuple[int, ...],
    init: Init,
    *,
    trained: bool = True,
    derived: bool = False,
) -> Function:
    """A matrix that several weights share, seen through the axes of one of them."""
    shape = (math.prod(rows), math.prod(sizes))
    array = Array(name, init, shape, trained, group, stacked=False, derived=derived)
    return Function(Side(rows, sizes), (array,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class VeRA(Dropping):
    """dW = a diag(d) b' diag(b): only the vectors d (r,) and b (out,) are trained.

    A (r, in) and B (r, out) are drawn from a seed, one pair for every width, and shared by all weights of that
    width; the narrower are leading slices of the wider. They are no part of a saved adapter: they are drawn again,
    bit for bit. d starts at `d_initial`, b at zero.

    Attributes:
      rank: r, which may be large: each costs one parameter.
      d_initial: 0.1, as in the paper.
      seed: of the random matrices.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.VeRA(rank=16))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'d': (16,), 'b': (4,)}

    References:
      Kopiczko et al, `VeRA <https://arxiv.org/abs/2310.11454>`_, 2023.
    """

    rank: Rank = 256
    d_initial: Annotated[float, nonzero("d_initial")] = 0.1
    seed: Seed = 0
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        if not leaf.axes("ik") or not leaf.axes("o"):
            raise ValueError("VeRA needs input and output axes; name them with axes={pattern: 'io'}")
        r, n_in, n_out = self.rank, leaf.size("ik"), leaf.size("o")
        # kaiming with a gain of sqrt(2): A's fan is the input, B's the rank
        group = f"vera/{self.seed}/{r}"
        a_init = functools.partial(draw, self.seed, 0, math.sqrt(6 / n_in))
        b_init = functools.partial(draw, self.seed, 1, math.sqrt(6 / r))
        frozen = {"trained": False, "derived": True}
        a = shared("A", f"{group}/in {n_in}", (r,), leaf.sizes("ik"), a_init, **frozen)
        big_b = shared("B", f"{group}/out {n_out}", (r,), leaf.sizes("o"), b_init, **frozen)
        d, b = Array("d", constant(self.d_initial)), Array("b", zeros)
        return Recipe((self.dropped(Delta("r I, r, r O, O -> I O", (a, d, big_b, b), (("r", r),))),))

    def canonical(self) -> "VeRA":
        return dataclasses.replace(self, d_initial=0.1)
