"""LN tuning: gamma = gamma0 + dgamma, beta = beta0 + dbeta, normalisation layers alone.

Zhao et al, `Tuning LayerNorm in Attention: Towards Efficient Multi-Modal LLM Finetuning
<https://arxiv.org/abs/2312.11420>`_, 2023.
"""

import dataclasses

from jlora import targets
from jlora._trees._tree import Target
from jlora.methods.full import Full


@dataclasses.dataclass(frozen=True, kw_only=True)
class LNTuning(Full):
    """Trains scales and biases of norms: `Full` on `jlora.targets.norms`, each leaf as a float32 delta from zero.

    Attributes:
      target: defaults to every norm, those of RMS and batches among them. The paper's are those of attention blocks,
        without a last one: `LNTuning(exclude="final_norm")`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"norm": {"scale": jnp.ones(2), "bias": jnp.zeros(2)}, "query": {"kernel": jnp.ones((2, 2))}}
      >>> jlora.count(jlora.adapt(params, jlora.LNTuning()))
      (4, 12)

    References:
      Zhao et al, `Tuning LayerNorm in Attention <https://arxiv.org/abs/2312.11420>`_, 2023.
    """

    target: Target = targets.norms
