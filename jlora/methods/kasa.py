"""KaSA: W = W0 - noise + s v diag(sigma) u, the noise being what the r least singular values make of W0.

    noise = sum_{i > m - r} S_i U_i V_i^T of W0 = U S V, m = min(in, out)

Wang et al, `KaSA: Knowledge-Aware Singular-Value Adaptation of Large Language Models
<https://arxiv.org/abs/2412.06071>`_, 2024.
"""

import dataclasses
import math

import jax

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import W0, Keys, Place
from jlora.methods._fields import Rank
from jlora.methods.base import LowRank, filled, normal, of_the_weight, uniform, zeros
from jlora.methods.starts import singular


@dataclasses.dataclass(frozen=True, kw_only=True)
class KaSA(LowRank):
    """W0 without its r least singular values, and an update in the form of a singular value decomposition.

    v (r, in), sigma (r,) and u (r, out) are trained: the paper's delta V, delta Sigma and delta U of a weight (out,
    in). u starts at zero, v as LoRA's a, sigma at N(0, 1). What W0 loses stands in frozen factors, `v_noise` (r, in)
    and `u_noise` (r, out), and is subtracted: the base stays as it is, and `jlora.scale(adapted, 0)` is the base. So
    the start is not the base but W0 without its noise, as the paper's is.

    The paper adds a penalty to the loss, beta sum(sigma^2) + gamma (||u u^T - I|| + ||v v^T - I||), with 1e-4 and 1e-3
    on GLUE; its second part is `jlora.rank.orthogonality(adapted, "norms")`.

    Attributes:
      rank: r.
      alpha: s = alpha / r; the rank by default.
      noise: how many singular values W0 loses, below min(in, out); r by default, as in the paper. 0 for none.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.diag(jnp.array([3.0, 1.0, 2.0]))}}
      >>> adapted = jlora.adapt(params, jlora.KaSA(rank=1))
      >>> jnp.diag(jlora.merge(adapted)["query"]["kernel"])
      Array([3., 0., 2.], dtype=float32)
      >>> sizes = [jnp.sum(held["sigma"] ** 2) for held in adapted.trainable.values()]
      >>> penalty = 1e-4 * sum(sizes) + 1e-3 * jlora.rank.orthogonality(adapted, "norms")

    References:
      Wang et al, `KaSA <https://arxiv.org/abs/2412.06071>`_, 2024.
    """

    noise: Rank | None = None
    target: Target = targets.attention

    @property
    def lost(self) -> int:
        """How many singular values W0 loses."""
        return self.rank if self.noise is None else self.noise

    def delta(self, leaf: Leaf) -> Delta:
        v, sigma, u = (
            Array("v", uniform(1 / math.sqrt(leaf.size("ik")))),
            Array("sigma", normal(1.0)),
            Array("u", zeros),
        )
        return Delta("r I, r, r O -> I O", (v, sigma, u), (("r", self.rank),), self.scale, ("r",))

    def recipe(self, leaf: Leaf) -> Recipe | None:
        made = super().recipe(leaf)
        if made is None or self.lost == 0:
            return made
        least = min(leaf.size("ik"), leaf.size("o"))
        if self.lost >= least:
            raise ValueError(
                f"{leaf.path!r} of shape {leaf.shape} has {least} singular values and would lose {self.lost}, so that "
                f"nothing of it is left; write KaSA(noise={least - 1}) or less"
            )
        v, u = (Array(name, of_the_weight, trained=False) for name in ("v_noise", "u_noise"))  # `initial` fills them
        noise = Delta("t I, t O -> I O", (v, u), (("t", self.lost),), -1.0, s="s_noise")
        return dataclasses.replace(made, deltas=(*made.deltas, noise))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        arrays = super().initial(leaf, recipe, keys, weight)
        if self.lost == 0:
            return arrays
        u, s, v = (x[..., -self.lost :, :] for x in singular(weight, leaf))
        return filled(arrays, {"v_noise": u, "u_noise": s * v}, self.dtype)

    def canonical(self) -> "KaSA":
        return dataclasses.replace(self, alpha=None, noise=self.lost)  # what is lost stays, whatever the ranks become
