"""SSF: y = gamma * (W0 x + b0) + beta.

Lian et al, `Scaling & Shifting Your Features: A New Baseline for Efficient Model Tuning
<https://arxiv.org/abs/2210.08823>`_, 2022.
"""

import dataclasses
from collections.abc import Callable

import jax

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, constant
from jlora._dtypes import alike
from jlora._trees._leaf import Leaf
from jlora.methods.base import Method, zeros
from jlora.methods.ia3 import gain


def shifted(gamma: jax.Array, beta: jax.Array, b0: jax.Array) -> jax.Array:
    """What takes b0 to gamma * b0 + beta."""
    gamma, beta, b0 = alike(gamma, beta, b0)
    return (gamma - 1) * b0 + beta


@dataclasses.dataclass(frozen=True, kw_only=True)
class SSF(Method):
    """W = W0 gamma and b = gamma b0 + beta: a scale and a shift after linear layers, norms and convolutions.

    `target` names kernels (or a norm's `scale`); a bias of theirs goes with them, named or not. The two share gamma,
    one at the start, and the bias adds beta, zero at the start. Both merge exactly. The authors start at N(1, 0.02^2)
    and N(0, 0.02^2).

    Attributes:
      of: on a bias, the path of the weight whose gamma it shares, where the layer does not say it; `adapt` writes it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> jlora.count(jlora.adapt(params, jlora.SSF(target="dense/")))
      (4, 12)

    References:
      Lian et al, `SSF <https://arxiv.org/abs/2210.08823>`_, 2022.
    """

    of: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target == "":
            raise ValueError("SSF() needs the layers named, kernels and biases: SSF(target=r'(kernel|scale|bias)$')")

    def beside(self, leaf: Leaf) -> "SSF":
        return self if leaf.name in ("kernel", "scale") else dataclasses.replace(self, of=leaf.path)

    def elsewhere(self, leaf: Leaf, path: Callable[[str], str]) -> "SSF":
        return dataclasses.replace(self, of=self.of and path(self.of))

    def recipe(self, leaf: Leaf) -> Recipe | None:
        sizes = leaf.sizes("o")
        if not sizes:
            raise ValueError("there is no output axis to scale")
        layer = leaf.path.rpartition("/")[0] if leaf.name in ("kernel", "scale", "bias") else leaf.path
        layer = self.of or layer
        group = f"ssf/{layer}"
        gamma = Array("gamma", constant(1.0), sizes, group=group)
        if leaf.name != "bias" and not self.of:
            return Recipe(gain=gain("O", gamma))
        beta = Array("beta", zeros, sizes, group=group)
        return Recipe((Delta("O -> O", (Function(shifted, (gamma, beta), base=True),)),))
