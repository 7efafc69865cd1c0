"""Which weights to adapt, as callables `(path, leaf) -> bool`.

Each can be a method's `target` or `exclude`; so can a regular expression, searched in the path, or a list. Each
asks what a leaf is for (`_kinds`). Given a whole tree, as `adapt` and `quantize` do, it looks at what stands beside a
leaf too: a classifier that is called `Dense_0` is known by the tree around it, not by its path.
"""

import functools
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from jlora._trees import _kinds
from jlora._trees._axes import is_trainable_dtype
from jlora._trees._tree import shape_dtype
from jlora._types import PyTree, Traced

Test: TypeAlias = Callable[[str, PyTree], bool]


def _of(*wanted: str, named: Collection[str] = ()) -> Callable[[Test], Test]:
    """Makes a target of some kinds, and of the leaves of norms with one of some names; the function has its words."""

    def decorate(function: Test) -> Test:
        @functools.wraps(function)
        def target(path: str, leaf: PyTree) -> bool:
            return among((path,), (leaf,))[0]

        def among(paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None = None) -> list[bool]:
            kinds = _kinds.kinds(paths, leaves, traced)
            return [
                kind in wanted or kind == "norm" and bool(named) and _kinds.leaf_name(path) in named
                for path, kind in zip(paths, kinds, strict=True)
            ]

        vars(target)["among"] = among
        return target

    return decorate


@_of("query", "value", "qkv")
def attention(path: str, leaf: PyTree) -> bool:
    """Query and value projections (and fused ones that hold them): the LoRA paper's choice.

    Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, section 7.1.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.attention("layer_0/query/kernel", jnp.ones((4, 4)))
      True
      >>> jlora.targets.attention("layer_0/self_attn/k_proj/kernel", jnp.ones((4, 4)))
      False
    """
    raise NotImplementedError


@_of(*_kinds.MATRICES)
def linear(path: str, leaf: PyTree) -> bool:
    """Every matrix or convolution but tables that are looked up and the output head: QLoRA's choice.

    Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.linear("layer_0/mlp/kernel", jnp.ones((4, 8)))
      True
      >>> jlora.targets.linear("lm_head/kernel", jnp.ones((4, 8)))
      False
    """
    raise NotImplementedError


@_of("embedding")
def embeddings(path: str, leaf: PyTree) -> bool:
    """Tables that are looked up by the ids of tokens, types or classes; those of positions are none.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.embeddings("transformer/wte/embedding", jnp.ones((100, 4)))
      True
      >>> jlora.targets.embeddings("vit/patch_embedding/kernel", jnp.ones((2, 2, 3, 4)))
      False
    """
    raise NotImplementedError


def tokens(path: str, leaf: PyTree) -> bool:
    """Tables that are looked up by the ids of tokens: `embeddings` but those that are named after types or classes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.tokens("bert/embeddings/word_embeddings/embedding", jnp.ones((100, 4)))
      True
      >>> jlora.targets.tokens("bert/embeddings/token_type_embeddings/embedding", jnp.ones((2, 4)))
      False
    """
    return _tokens((path,), (leaf,))[0]


def _tokens(paths: Sequence[str], leaves: Sequence[PyTree], traced: _kinds.Traced | None = None) -> list[bool]:
    tables = vars(embeddings)["among"](paths, leaves, traced)
    return [it and not _kinds.counts_types(path) for path, it in zip(paths, tables, strict=True)]


vars(tokens)["among"] = _tokens


@_of("head")
def head(path: str, leaf: PyTree) -> bool:
    """The last projection, onto a vocabulary or classes. A table that is both ends of a model is an embedding.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.head("lm_head/kernel", jnp.ones((4, 8)))
      True
      >>> jlora.targets.head("multi_head_attention/out/kernel", jnp.ones((4, 4)))
      False
    """
    raise NotImplementedError


@_of("bias", named=("bias", "beta", "b", "offset"))
def biases(path: str, leaf: PyTree) -> bool:
    """Every bias, those of norms among them: what BitFit trains.

    Ben Zaken et al, `BitFit <https://arxiv.org/abs/2106.10199>`_, 2021.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.biases("layer_0/mlp/bias", jnp.ones(8))
      True
    """
    raise NotImplementedError


@_of("norm")
def norms(path: str, leaf: PyTree) -> bool:
    """Scales and biases of normalisation layers.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.norms("layer_0/LayerNorm_0/scale", jnp.ones(8))
      True
      >>> jlora.targets.norms("layer_0/norm1/linear/kernel", jnp.ones((8, 8)))
      False
    """
    raise NotImplementedError


def everything(path: str, leaf: PyTree) -> bool:
    """Every floating-point leaf: what a subspace of all parameters moves.

    Li et al, `Measuring the Intrinsic Dimension of Objective Landscapes <https://arxiv.org/abs/1804.08838>`_, 2018.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.everything("layer_0/mlp/bias", jnp.ones(8)), jlora.targets.everything("step", jnp.ones(1, int))
      (True, False)
    """
    return is_trainable_dtype(shape_dtype(leaf)[1])
