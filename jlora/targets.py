"""Which weights to adapt, as callables `(path, leaf) -> bool`.

Each can be a method's `target` or `exclude`; so can a regular expression, searched in the path, or a list. Each
asks what a leaf is for (`_kinds`). Given a whole tree, as `adapt` and `quantize` do, it looks at what stands beside a
leaf too: a classifier that is called `Dense_0` is known by the tree around it, not by its path.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Sequence
from typing import TypeAlias

from jlora import _answers
from jlora._trees import _blocks, _kinds, _layers, _select
from jlora._trees._axes import is_trainable_dtype
from jlora._trees._tree import Named, Target, shape_dtype
from jlora._types import PyTree, Traced

Test: TypeAlias = Callable[[str, PyTree], bool]


Among: TypeAlias = Callable[[Sequence[str], Sequence[PyTree], Traced | None], list[bool]]
"""For each leaf of a tree, `(paths, leaves, what a trace found)`, whether it is taken."""


def _seeing(among: Among) -> Callable[[Test], Test]:
    """Makes a target of what sees whole trees; the function has its words."""

    def decorate(function: Test) -> Test:
        @functools.wraps(function)
        def target(path: str, leaf: PyTree) -> bool:
            return among((path,), (leaf,), None)[0]

        vars(target)["among"] = among
        return target

    return decorate


def _of(*wanted: str, named: Collection[str] = ()) -> Callable[[Test], Test]:
    """Of some kinds, and of the leaves of norms those with one of some names."""

    def among(paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None) -> list[bool]:
        kinds = _kinds.kinds(paths, leaves, traced)
        return [
            kind in wanted or kind == "norm" and bool(named) and _kinds.leaf_name(path) in named
            for path, kind in zip(paths, kinds, strict=True)
        ]

    return _seeing(among)


def _at(*wanted: str) -> Callable[[Test], Test]:
    """What stands at some ends of blocks."""
    return _seeing(lambda paths, leaves, traced: [end in wanted for end in _blocks.ends(paths, leaves, traced)])


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


def _tokens(paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None) -> list[bool]:
    kinds = _kinds.kinds(paths, leaves, traced)
    return [kind == "embedding" and not _kinds.counts_types(path) for path, kind in zip(paths, kinds, strict=True)]


@_seeing(_tokens)
def tokens(path: str, leaf: PyTree) -> bool:
    """Tables that are looked up by the ids of tokens: `embeddings` but those that are named after types or classes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.tokens("bert/embeddings/word_embeddings/embedding", jnp.ones((100, 4)))
      True
      >>> jlora.targets.tokens("bert/embeddings/token_type_embeddings/embedding", jnp.ones((2, 4)))
      False
    """
    raise NotImplementedError


def _own_keys(paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None) -> list[bool]:
    kinds = zip(paths, _kinds.kinds(paths, leaves, traced), strict=True)
    return [kind in ("key", "value", "qkv") and not _blocks.is_cross_attention(path) for path, kind in kinds]


@_seeing(_own_keys)
def keys_and_values(path: str, leaf: PyTree) -> bool:
    """Projections of keys and values in self-attention, alone or fused with queries: what a prefix is written into.

    Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.keys_and_values("layer_0/attention/key/kernel", jnp.ones((4, 4)))
      True
      >>> jlora.targets.keys_and_values("layer_0/crossattention/key/kernel", jnp.ones((4, 4)))
      False
    """
    raise NotImplementedError


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


@_at("last attention")
def attention_outputs(path: str, leaf: PyTree) -> bool:
    """The output projections of self-attention; those of cross-attention are `cross_attention_outputs`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.attention_outputs("layer/0/attention/output/dense/kernel", jnp.ones((4, 4)))
      True
      >>> jlora.targets.attention_outputs("layer/0/output/dense/kernel", jnp.ones((8, 4)))
      False
    """
    raise NotImplementedError


@_at("last cross attention")
def cross_attention_outputs(path: str, leaf: PyTree) -> bool:
    """The output projections of a decoder's attention to an encoder, where names tell them from those of the other.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.cross_attention_outputs("layers/0/encoder_attn/out_proj/kernel", jnp.ones((4, 4)))
      True
    """
    raise NotImplementedError


@_at("last feed forward")
def feed_forward_outputs(path: str, leaf: PyTree) -> bool:
    """The last layers of feed-forward blocks. Where numbers alone tell them (`Dense_1`), it takes the tree to know.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.feed_forward_outputs("layers/0/mlp/down_proj/kernel", jnp.ones((8, 4)))
      True
      >>> jlora.targets.feed_forward_outputs("layers/0/mlp/up_proj/kernel", jnp.ones((4, 8)))
      False
    """
    raise NotImplementedError


@_at("last attention", "last feed forward")
def block_outputs(path: str, leaf: PyTree) -> bool:
    """`attention_outputs` and `feed_forward_outputs`: where a residual is added, and where Houlsby's adapters stand.

    Houlsby et al, `Parameter-Efficient Transfer Learning for NLP <https://arxiv.org/abs/1902.00751>`_, 2019, 2.1.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.targets.block_outputs("h/0/mlp/c_proj/kernel", jnp.ones((8, 4)))
      True
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


def _parameters(path: str, leaf: PyTree) -> bool:
    return everything(path, leaf) and _kinds.is_parameter(path)


@dataclasses.dataclass(frozen=True)
class TopLayers:
    r"""The weights of the last k layers: `Full(target=TopLayers(2))` freezes all below.

    Layers are modules with numbers in their paths, `layers_11/`, `layer/11/`, `h/11/`, which hold modules and are
    alike (in a model without such, as an MLP, numbered modules that hold arrays); the largest numbers are on top.
    Where numbers nest (`block/3/layer/1`), the outermost counts. Each stack counts on its own: the encoder and the
    decoder of a T5 have k layers each. What stands outside of the layers is not taken: embeddings, a final norm, a
    head. The last two layers as the LoRA paper counts them (25.19 M of GPT-2 medium) have none of these; add them as
    further rules, `[Full(target=TopLayers(2)), Full(target=targets.head)]`.

    Layers under a scan are one leaf, of which a target takes all or nothing; what to write then is said by the error.

    Attributes:
      k: how many layers, from the last one down.
      of: what is taken of them, a target: by default every parameter (running averages are none).
      layers: a regular expression that says where the numbers are if their paths do not, with a group for each:
        `r"h(\d+)_"`, or with two, `r"stages/(\d+)/layers/(\d+)/"`, which count as one number of two digits. What is
        before the first group names the stack.

    Raises:
      TypeError, ValueError: `k` is no number of layers, `of` no target. When used: fewer than k layers, none with a
        number, layers that are one leaf, two kinds of numbered modules beside each other, as an error of `adapt`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> layer = lambda: {"attn": {"query": {"kernel": jnp.ones((4, 4))}}, "mlp": {"kernel": jnp.ones((4, 4))}}
      >>> params = {"embed": {"embedding": jnp.ones((9, 4))}, "layers": {str(n): layer() for n in range(12)}}
      >>> jlora.adapt(params, jlora.Full(target=jlora.targets.TopLayers(2)))
      Adapted(4 weights, 64 trainable)
      >>> top = jlora.targets.TopLayers(4, of=jlora.targets.attention)
      >>> sorted(jlora.adapt(params, jlora.LoRA(rank=2, target=top)).trainable)[:2]
      ['layers/10/attn/query/kernel', 'layers/11/attn/query/kernel']

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021, section 5.1: the baseline FT^Top2.
      Houlsby et al, `Parameter-Efficient Transfer Learning for NLP <https://arxiv.org/abs/1902.00751>`_, 2019, 3.
    """

    k: int
    of: Target = _parameters
    layers: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.k, bool) or not isinstance(self.k, int):
            raise TypeError(f"TopLayers takes a number of layers, TopLayers(2), not {_answers.kind(self.k)}")
        if self.k < 1:
            raise ValueError(f"TopLayers({self.k}): at least one layer; to adapt none, leave the rule out")
        if not isinstance(self.layers, (str, type(None))):
            raise TypeError(
                f"TopLayers(layers={self.layers!r}): a regular expression with a group for the number, or None"
            )
        if not isinstance(self.of, str) and not callable(self.of):
            object.__setattr__(self, "of", _select.parts(self.of, "of"))

    def __repr__(self) -> str:
        rest = [f"of={_select.short(self.of)}"] if self.of is not _parameters else []
        rest += [f"layers={self.layers!r}"] if self.layers is not None else []
        return f"TopLayers({', '.join([str(self.k), *rest])})"

    def __call__(self, path: str, leaf: PyTree) -> bool:
        raise TypeError(
            "TopLayers counts the layers of a whole tree, and one leaf does not tell how many there are: give it as "
            "target= or exclude= itself, alone or in a list, and narrow it by of="
        )

    def among(self, paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None = None) -> list[bool]:
        """For each leaf of a tree whether it is taken."""
        tree = Named(tuple(paths), tuple(leaves), (), None, ())
        wanted, bad = _select.select("TopLayers", self.of, (), tree, traced, "of")
        if bad:
            raise ValueError("; ".join(bad))
        if self.layers is not None:
            places = _layers.told(paths, self.layers)
        else:
            places = _layers.found(paths, [len(shape_dtype(leaf)[0]) > 1 for leaf in leaves])
        numbers: dict[str, set[_layers.Numbers]] = {}
        for place in places:
            if place is not None:
                numbers.setdefault(place.stack, set()).add(place.number)
        if short := [f"{stack}# has {len(them)}" for stack, them in numbers.items() if len(them) < self.k]:
            raise ValueError(
                f"there are no {self.k} layers: {', '.join(short[:5])}"
                + rf"; name the stack by layers=, as layers=r'{max(numbers, key=lambda s: len(numbers[s]))}(\d+)'"
                * (len(short) < len(numbers))
            )
        top = {stack: sorted(them)[-self.k :] for stack, them in numbers.items()}
        taken = [bool(it and p and p.number in top[p.stack]) for it, p in zip(wanted, places, strict=True)]
        if not any(taken):
            raise ValueError(f"of={_select.short(self.of)} takes nothing of the last {self.k} layers")
        return taken
