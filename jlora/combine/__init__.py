"""Adapters of one base made into one: exactly, at a rank, or by electing signs; and an adapter out of two checkpoints.

    combine.weighted([a, b], [1, 0.5])              dW = sum of w_k dW_k, exactly, or it is refused
    combine.truncated([a, b], rank=8)               the best LoRA of rank 8 of that sum, and what it leaves out
    combine.ties([a, b], density=0.2, rank=8)       TIES of the updates; `dare`, `pruned`
    combine.extract(base, tuned, [LoRA(rank=8)])    a full fine-tune as an adapter
    combine.to_lora(adapted, rank=8)                any method as a LoRA
    combine.diff(a, b)                              how far two adapters are from each other, weight by weight

All of them are for use outside of `jit`: shapes follow from values. None changes what it is given.
"""

from jlora.combine.approximate import dare as dare
from jlora.combine.approximate import pruned as pruned
from jlora.combine.approximate import ties as ties
from jlora.combine.approximate import to_lora as to_lora
from jlora.combine.approximate import truncated as truncated
from jlora.combine.difference import Difference as Difference
from jlora.combine.difference import diff as diff
from jlora.combine.exact import weighted as weighted
from jlora.combine.extract import extract as extract
