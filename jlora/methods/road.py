"""RoAd: W = W0 R and b = b0 R, R of 2 x 2 blocks that turn and stretch pairs of outputs.

    y_1 = alpha_1 cos(theta_1) z_1 - alpha_3 sin(theta_3) z_2
    y_2 = alpha_4 sin(theta_4) z_1 + alpha_2 cos(theta_2) z_2    with z = x W0 + b0

Liao and Monz, `3-in-1: 2D Rotary Adaptation for Efficient Finetuning, Efficient Batching and Composability
<https://arxiv.org/abs/2409.00119>`_, 2024.
"""

import dataclasses
from collections.abc import Callable
from typing import Annotated, Literal

import jax
import jax.numpy as jnp

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._dtypes import alike, widened
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Holds
from jlora.methods.base import Method, zeros

_EVEN = "a group holds an even number of outputs, at least two"
GroupSize = Annotated[int, Holds(lambda n: n >= 2 and n % 2 == 0, _EVEN)]


def turned(s: jax.Array, theta: jax.Array, alpha: jax.Array) -> jax.Array:
    """The blocks, (groups, pairs, 2, 2), rows first, of angles s theta under lengths 1 + s (alpha - 1).

    theta and alpha are (groups, pairs), (groups, 2, pairs), one for each output, or (groups, 2, 2, pairs), those of
    the cosines before those of the sines.
    """
    s, theta, alpha = alike(widened(s), theta, alpha)
    theta, alpha = s * theta, 1 + s * (alpha - 1)
    cos, sin = (alpha * f(theta) for f in (jnp.cos, jnp.sin))
    if theta.ndim == 4:
        cos, sin = cos[:, 0], sin[:, 1]
    shape = (theta.shape[0], 2, theta.shape[-1])
    by_output = lambda x: jnp.broadcast_to(x[:, None] if x.ndim == 2 else x, shape)
    cos, sin = by_output(cos), by_output(sin)
    rows = [cos[:, 0], sin[:, 1]], [-sin[:, 0], cos[:, 1]]
    return jnp.stack([jnp.stack(row, -1) for row in rows], -2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RoAd(Method):
    """W = W0 R: outputs are turned and stretched in pairs, and the bias of the layer with them.

    theta starts at zero and alpha at one, where R is the identity. The bias is turned whether or not `target` names
    it; `exclude="bias$"` leaves it as it is. `jlora.scale` multiplies the angles, and how far alpha is from one: at
    zero it is the base.

    Attributes:
      variant: 1 has one angle and one length for each pair, 2 one for each output, 4 one for each entry of R.
      group: the outputs among which the first half is paired with the second, at most: the largest even divisor of the
        output width up to it is taken. 2 pairs neighbours, as the paper's equation does; the loss knows no difference.
      of: on a bias, the path of the weight whose R this is; `adapt` writes it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
      >>> [jlora.count(jlora.adapt(params, jlora.RoAd(variant=n)))[0] for n in (1, 2, 4)]
      [4, 8, 16]

    References:
      Liao and Monz, `RoAd <https://arxiv.org/abs/2409.00119>`_, 2024.
    """

    variant: Literal[1, 2, 4] = 1
    group: GroupSize = 64
    of: str = ""
    target: Target = targets.attention

    def beside(self, leaf: Leaf) -> "RoAd":
        return dataclasses.replace(self, of=leaf.path)

    def elsewhere(self, leaf: Leaf, path: Callable[[str], str]) -> "RoAd":
        return dataclasses.replace(self, of=self.of and path(self.of))

    def recipe(self, leaf: Leaf) -> Recipe | None:
        d_out = leaf.size("o")
        if not leaf.axes("o"):
            raise ValueError("there is no output axis whose pairs could be turned")
        if d_out % 2:
            raise ValueError(f"outputs are turned in pairs, and {d_out} is odd")
        n = max(n for n in range(2, min(self.group, d_out) + 1, 2) if d_out % n == 0)
        shape = (d_out // n, *{1: (), 2: (2,), 4: (2, 2)}[self.variant], n // 2)
        theta = Array("theta", zeros, shape, group=self.of or None)
        alpha = Array("alpha", constant(1.0), shape, group=self.of or None)
        s = Array("s", constant(1.0), (), trained=False, scale=True)
        sizes = (("g", d_out // n), ("p", n // 2), ("m", 2), ("n", 2))
        blocks = Function(turned, (s, theta, alpha))
        return Recipe(right=Delta("g p m n -> (g m p) (g n p)", (blocks,), sizes))
