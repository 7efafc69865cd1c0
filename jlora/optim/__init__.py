"""Optimizer pieces: what optax needs to know of an adapter.

All are optax transformations, or trees for them. They take both forms: `{group: {factor: array}}`, which is
`adapted.trainable`, and a whole `Adapted`, alone or inside a larger tree. What a factor is to its weight (the rank it
shares, the side it serves) is read off the equation in the adapter's static plan; no array is held.
"""

from jlora.optim.decay import decay_mask as decay_mask
from jlora.optim.labels import factor_labels as factor_labels
from jlora.optim.masking import masked as masked
from jlora.optim.memory import offload as offload
from jlora.optim.preconditioners import lora_fa as lora_fa
from jlora.optim.preconditioners import riemannian as riemannian
from jlora.optim.rates import lora_plus as lora_plus
