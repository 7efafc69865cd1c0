"""LoRA-FA: LoRA with A frozen.

Zhang et al, `LoRA-FA: Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning
<https://arxiv.org/abs/2308.03303>`_, 2023.
"""

import dataclasses

from jlora.methods.lora import LoRA


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoRAFA(LoRA):
    """dW = s a b with a frozen as it starts: b alone is trained, in the paper by `jlora.optim.lora_fa`'s gradient.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRAFA(rank=2)))
      (8, 32)

    References:
      Zhang et al, `LoRA-FA <https://arxiv.org/abs/2308.03303>`_, 2023.
    """

    @property
    def trains_a(self) -> bool:
        return False

    def describe(self) -> str:
        return super().describe().replace("LoRA", "LoRA-FA")
