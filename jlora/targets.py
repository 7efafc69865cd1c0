"""Which weights to adapt, as callables `(path, leaf) -> bool` under the names that common models use.

Any of them can be a method's `target` or `exclude`; so can a regular expression, searched in the path, or a list.
"""

import re
from typing import Any

from jlora._axes import is_trainable_dtype
from jlora._tree import shape_dtype

_WEIGHTS = ("kernel", "w", "weight", "embedding")
_ATTENTION = re.compile(
    r"(^|[/_.])(query|value|q|v|q_proj|v_proj|to_q|to_v|qkv|kv|c_attn|query_key_value|in_proj|q_einsum|kv_einsum|qkv_einsum)$"
)
_EDGES = re.compile(
    r"(^|[/_.])(embed\w*|\w*embeddings?|wte|wpe|lm_head|head|classifier|score|output_head|logits|pooler)([/_.]|$)"
)
_NORM = re.compile(r"norm|(^|[/_])ln(_|\d|/|$)|batch_?stats", re.IGNORECASE)


def _floating(leaf: Any) -> tuple[int, ...] | None:
    shape, dtype = shape_dtype(leaf)
    return shape if is_trainable_dtype(dtype) else None


def attention(path: str, leaf: Any) -> bool:
    """Query and value projections (and fused ones that hold them): the LoRA paper's choice.

    Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, section 7.1.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.attention("layer_0/query/kernel", jnp.ones((4, 4)))
      True
    """
    shape = _floating(leaf)
    owner, _, name = path.rpartition("/")
    return shape is not None and len(shape) >= 2 and name in _WEIGHTS and _ATTENTION.search(owner) is not None


def linear(path: str, leaf: Any) -> bool:
    """Every matrix or convolution but embeddings and the output head: QLoRA's choice.

    Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.linear("layer_0/mlp/kernel", jnp.ones((4, 8)))
      True
      >>> jlora.targets.linear("lm_head/kernel", jnp.ones((4, 8)))
      False
    """
    shape = _floating(leaf)
    owner, _, name = path.rpartition("/")
    if shape is None or len(shape) < 2 or biases(path, leaf) or norms(path, leaf):
        return False
    return name != "embedding" and not _EDGES.search(path if name not in _WEIGHTS else owner)


def biases(path: str, leaf: Any) -> bool:
    """Every bias, those of norms among them: what BitFit trains.

    Ben Zaken et al, `BitFit <https://arxiv.org/abs/2106.10199>`_, 2021.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.biases("layer_0/mlp/bias", jnp.ones(8))
      True
    """
    return _floating(leaf) is not None and re.search(r"(^|[/_])(bias|beta|b)$", path) is not None


def norms(path: str, leaf: Any) -> bool:
    """Scales and biases of normalisation layers.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.norms("layer_0/LayerNorm_0/scale", jnp.ones(8))
      True
    """
    if _floating(leaf) is None:
        return False
    owner, _, name = path.rpartition("/")
    return name == "scale" or _NORM.search(owner) is not None


def everything(path: str, leaf: Any) -> bool:
    """Every floating-point leaf: what a subspace of all parameters moves.

    Li et al, `Measuring the Intrinsic Dimension of Objective Landscapes <https://arxiv.org/abs/1804.08838>`_, 2018.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.everything("layer_0/mlp/bias", jnp.ones(8)), jlora.targets.everything("step", jnp.ones(1, int))
      (True, False)
    """
    return _floating(leaf) is not None
