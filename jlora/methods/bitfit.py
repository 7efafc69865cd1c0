"""BitFit: b = b0 + db, biases alone.

Ben Zaken et al, `BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked Language-models
<https://arxiv.org/abs/2106.10199>`_, 2021.
"""

import dataclasses

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods.base import Method
from jlora.methods.full import dense_delta


@dataclasses.dataclass(frozen=True, kw_only=True)
class BitFit(Method):
    """Trains biases (those of norms among them), each as a float32 delta from zero.

    Attributes:
      target: defaults to every bias; the paper's subset is `target=r"(query|intermediate/dense)/bias$"`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.zeros(2)}}
      >>> jlora.count(jlora.adapt(params, jlora.BitFit()))
      (2, 10)

    References:
      Ben Zaken et al, `BitFit <https://arxiv.org/abs/2106.10199>`_, 2021.
    """

    target: Target = targets.biases

    def recipe(self, leaf: Leaf) -> Recipe | None:
        return dense_delta(leaf)
