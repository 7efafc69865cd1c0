"""What libraries call their weights and how they lay them out: one row a library, each with its source.

Nothing here decides. `_layouts` holds the rows against a whole tree, and takes a row only where all sizes agree.
"""

import dataclasses
from typing import TypeAlias

Members: TypeAlias = tuple[tuple[str, str, str], ...]


@dataclasses.dataclass(frozen=True)
class Library:
    """One library, or one family of models in it.

    Attributes:
      name: what it is called.
      source: where it is read: the file and the class or einsum.
      layouts: groups of weights that stand in one module. A member is `(path, sizes, roles)`: a regular expression that
        fits all steps of a path below that module, one word a size, and one letter an axis as in `_axes`. Equal words
        are equal sizes in all members; `3D` is three times D, and a number is that size. D, C and E are widths of the
        model, which neither a number of heads (N, K) nor a width of one (H, V) exceeds; F is no less than D.
      module: a regular expression found in the path of that module; all modules by default.
      whole: whether every weight of a layout must be there.
      last: whether it counts only where no other row fits: a square kernel reads both ways.
      stacks: where an axis of scanned layers may stand, counted from the front.
    """

    name: str
    source: str
    layouts: tuple[Members, ...] = ()
    module: str = ""
    whole: bool = False
    last: bool = False
    stacks: tuple[int, ...] = ()


def _heads(q: str, k: str, v: str, out: str, leaf: str, sizes: str = "D N H, C K H, C K V, N V E") -> Members:
    """Heads as an axis: (D, N, H) into them, (N, H, D) out of them; biases on what each makes."""
    names, letters = (q, k, v), {"D": "i", "C": "i"}
    into, ends = zip(names, sizes.split(", ")[:3], strict=True), sizes.split(", ")[3]
    role = lambda axes: "".join(letters.get(a, "o") for a in axes.split())
    return (
        *((f"{name}/{leaf}", axes, role(axes)) for name, axes in into),
        (f"{out}/{leaf}", ends, "iio"),
        (f"{q}/bias", "N H", "oo"),
        (f"{k}/bias", "K H", "oo"),
        (f"{v}/bias", "K V", "oo"),
        (f"{out}/bias", "E", "o"),
    )


def _pair(sizes: str, roles: str, bias: str, leaf: str = "kernel") -> Members:
    return ((leaf, sizes, roles), ("bias", bias, "o" * len(bias.split())))


def _gpt2(turned: bool) -> Members:
    names = (("attn/c_attn", "D 3D"), ("attn/c_proj", "D D"), ("mlp/c_fc", "D F"), ("mlp/c_proj", "F D"))
    turn = lambda sizes: " ".join(reversed(sizes.split())) if turned else sizes
    return (
        *((f"{name}/kernel", turn(sizes), "oi" if turned else "io") for name, sizes in names),
        *((f"{name}/bias", sizes.split()[1], "o") for name, sizes in names),
    )


_CONV = r"(?i)conv[^/]*$|dwconv|(^|/)patch[^/]*$"
# flax/linen/linear.py ConvTranspose may hold (in, out) or (out, in)
TRANSPOSED = r"(?i)transpose|deconv|upconv|upsampl|(^|/)up(_?\d*)?/"
_PLAIN_CONV = r"(?i)^(?!.*transpose[^/]*$).*(" + _CONV.removeprefix("(?i)") + ")"
_NO_CONV = r"(?i)^(?!.*(conv|patch)[^/]*$)"

LIBRARIES = (
    Library(
        "Flax attention",
        "flax/linen/attention.py MultiHeadDotProductAttention: DenseGeneral((heads, head_dim)), out: axis=(-2, -1); "
        "MaxText src/MaxText/layers/attentions.py, T5X t5x/examples/scalable_t5/layers.py and keras "
        "layers/attention/multi_head_attention.py (attention_output) have the same",
        (
            _heads("query", "key", "value", "(out|attention_output)", "kernel"),
            # a gate beside each query, MaxText src/MaxText/layers/qwen3.py Qwen3NextFullAttention
            _heads("query", "key", "value", "out", "kernel", "D N 2H, C K H, C K H, N H E")[:4],
        ),
        stacks=(0, 1),
    ),
    Library(
        "keras-hub Gemma",
        "keras_hub/src/models/gemma/gemma_attention.py: EinsumDense('btd,ndh->btnh'), attention_output 'btnh,nhd->btd'",
        (_heads("query", "key", "value", "attention_output", "kernel", "N D H, K D H, K D H, N H D")[:4],),
        whole=True,
    ),
    Library(
        "tunix",
        "tunix/models/llama3/model.py, qwen3/model.py Attention: q_proj 'BTD,DNH->BTNH', o_proj 'BTNH,NHD->BTD'",
        (_heads("q_proj", "k_proj", "v_proj", "o_proj", "w", "D N H, D K H, D K H, N H D"),),
    ),
    Library(
        "gemma attention",
        "gemma/gm/nn/_modules.py and tunix/models/gemma/model.py Attention: q_einsum 'BTD,NDH->BTNH', kv_einsum "
        "'BSD,CKDH->CBSKH', qkv_einsum 'BTD,SNDH->SBTNH', attn_vec_einsum 'BTNH,NHD->BTD'",
        (
            (
                ("q_einsum/w", "N D H", "oio"),
                ("kv_einsum/w", "2 K D H", "ooio"),
                ("qkv_einsum/w", "3 N D H", "ooio"),
                ("attn_vec_einsum/w", "N H D", "iio"),
            ),
        ),
    ),
    Library(
        "gemma feed-forward",
        "gemma/gm/nn/_modules.py FeedForward: gating_einsum '...F,NHF->...NH', turned where transpose_gating_einsum; "
        "linear '...H,HF->...F'",
        (
            (("gating_einsum", "2 D F", "oio"), ("linear", "F D", "io")),
            (("gating_einsum", "2 F D", "ooi"), ("linear", "F D", "io")),
        ),
    ),
    Library(
        "experts",
        "tunix/models/qwen3/model.py MoELayer: ragged dots of (experts, D, F) and (experts, F, D); keras_hub/src/"
        "models/mixtral/mixtral_decoder.py MixtralExpertBank: 'th,ehm->etm'; MaxText src/MaxText/layers/moe.py",
        (
            (("gate_proj", "X D F", "sio"), ("up_proj", "X D F", "sio"), ("down_proj", "X F D", "sio")),
            (
                ("expert_feedforward_gate_dense", "X D F", "sio"),
                ("expert_feedforward_intermediate_dense", "X D F", "sio"),
                ("expert_feedforward_output_dense", "X F D", "sio"),
            ),
            (("wi_0", "X D F", "sio"), ("wi_1", "X D F", "sio"), ("wo", "X F D", "sio")),
            (
                ("wi_0", "X D F", "sio"), ("wi_1", "X D F", "sio"), ("wo", "X F D", "sio"),
                ("wi_0_bias", "X F", "so"), ("wi_1_bias", "X F", "so"), ("wo_bias", "X D", "so"),
            ),
        ),
        whole=True,
    ),
    Library(
        "MaxText, fused and low-rank",
        "MaxText src/MaxText/layers/attentions.py qkv_projection, attention_mla.py wq_b and wkv_b, linears.py MlpBlock "
        "with fused_mlp: DenseGeneral onto several axes",
        (
            (("qkv_proj/kernel", "D N H", "ioo"), ("qkv_proj/bias", "N H", "oo")),
            (("qkv_proj/kernel", "D 3 N H", "iooo"), ("qkv_proj/bias", "3 N H", "ooo")),
            (("wq_b/kernel", "D N H", "ioo"), ("wkv_b/kernel", "C N V", "ioo")),
            (("wi/kernel", "D 2 F", "ioo"),),
        ),
    ),
    Library(
        "GPT-2",
        "transformers/models/gpt2/modeling_flax_gpt2.py FlaxConv1D: kernel (features, inputs), dot(x, kernel.T); "
        "ports with nn.Dense use the same names",
        (_gpt2(True), _gpt2(False)),
    ),
    Library(
        "Equinox layers",
        "equinox/nn/_linear.py Linear: weight (out, in), bias (out,); _conv.py Conv: weight (out, in / groups, "
        "window...), bias (out, 1, ...)",
        (
            _pair("O I", "oi", "O", "weight"),
            _pair("O I A", "oik", "O 1", "weight"),
            _pair("O I A B", "oikk", "O 1 1", "weight"),
            _pair("O I A B G", "oikkk", "O 1 1 1", "weight"),
            _pair("I O", "io", "O", "weight"),
        ),
        whole=True,
        stacks=(0,),
    ),
    Library(
        "recurrent cells",
        "equinox/nn/_rnn.py GRUCell: weight_ih (3 hidden, in), weight_hh (3 hidden, hidden); LSTMCell: 4",
        (
            (("weight_ih", "3D I", "oi"), ("weight_hh", "3D D", "oi")),
            (("weight_ih", "4D I", "oi"), ("weight_hh", "4D D", "oi")),
        ),
        whole=True,
    ),
    Library(
        "Flax layers with a bias",
        "flax/linen/linear.py Dense: kernel (in, out), bias (out,); DenseGeneral: kernel (in..., out...), bias "
        "(out...)",
        (
            _pair("I O", "io", "O"),
            _pair("I O P", "ioo", "O P"),
            _pair("I J O", "iio", "O"),
            _pair("I J O P", "iioo", "O P"),
            _pair("I O P Q", "iooo", "O P Q"),
            (("w", "I O", "io"), ("b", "O", "o")),
        ),
        module=_NO_CONV,
        whole=True,
        stacks=(0, 1),
    ),
    Library(
        "Flax convolutions with a bias",
        "flax/linen/linear.py Conv: kernel (window..., in / groups, out), bias (out,)",
        (
            _pair("A I O", "kio", "O"),
            _pair("A B I O", "kkio", "O"),
            _pair("A B G I O", "kkkio", "O"),
        ),
        module=_CONV,
        whole=True,
        stacks=(0, 1),
    ),
    Library(
        "turned",
        "flax/linen/linear.py ConvTranspose(transpose_kernel=True): kernel (window..., out, in); a user's own layers",
        (
            _pair("O I", "oi", "O"),
            _pair("A O I", "koi", "O"),
            _pair("A B O I", "kkoi", "O"),
            _pair("A B G O I", "kkkoi", "O"),
        ),
        whole=True,
        last=True,
    ),
    Library(
        "windows in two or three dimensions",
        "flax/linen/linear.py Conv under a name that says nothing, such as vision_transformer's embedding",
        (_pair("A B I O", "kkio", "O"), _pair("A B G I O", "kkkio", "O"), _pair("A I O", "kio", "O")),
        module=r"(?i)^(?!.*(conv|dense|linear|logits|head|fc)[^/]*$)",
        whole=True,
    ),
    Library(
        "convolutions without a bias",
        "flax/linen/linear.py Conv, haiku/_src/conv.py ConvND: (window..., in / groups, out)",
        tuple(((leaf, sizes, roles),) for leaf in ("kernel", "w") for sizes, roles in
              (("A I O", "kio"), ("A B I O", "kkio"), ("A B G I O", "kkkio"))),
        module=_PLAIN_CONV,
    ),
)  # fmt: skip

# Names that say what a leaf is, whatever stands beside it: (pattern on the last step, number of axes or None, letters).
BY_NAME: tuple[tuple[str, int | None, str], ...] = (
    # keras_hub/src/layers/modeling/position_embedding.py slices and adds it, vit_layers.py looks it up
    (r"position_embedding/embeddings", 2, ""),
    # nn.Embed embedding, hk.Embed and keras embeddings, gemma input_embedding, keras-hub reverse_embeddings: (rows, D)
    (r"embedding|embeddings|input_embedding", 2, "io"),
    # t5x/examples/scalable_t5/layers.py RelativePositionBiases: einsum('hb,qkb->hqk') with one-hot buckets
    (r"rel_embedding", 2, "oi"),
    # flax and haiku layers, and x @ w in plain JAX
    (r"kernel|w", 2, "io"),
    # added or multiplied element by element
    (r"bias|scale|offset|gamma|beta|mean|var|A_log|dt_bias", None, "o"),
    (r"(pos|position|positional)_?emb\w*|cls|\w*token|\w*tokens|mask_emb\w*|latents?|query_tokens", None, "o"),
)
# Two axes under these names may be a stack of vectors, or (out, in).
UNCLEAR = r"weight\w*|\w*bias|\w*scale|sinks|\w*norm"

# Steps of a path that say that what stands below is stacked, where no number follows.
STACKS = r"(\w+_)?(layers|blocks|stack|stacked|st|scan|scanned|experts)|Scan\w*_\d+"

# The same anywhere in a path; flax/linen/transforms.py names what `nn.vmap` and `nn.scan` make `VmapDense_0`.
MAPPED = r"(^|/)(Vmap|Scan)|(?i:layers|blocks|stack|experts?|ensemble|members?|moe)"

# Words of logical axis names: MaxText src/MaxText/configs/base.yml, T5X t5x/partitioning.py
# standard_logical_axis_rules, MaxDiffusion, Flax examples/lm1b and examples/gemma.
MODEL_WORDS = r"embed(_\w+)?|emb|d_model|model_dim|hidden(_size|_dim)?|features_in"
MADE_WORDS = (
    r"(q_|kv_|k_|v_|num_)?heads|kv(_\w+)?|q_lora\w*|head_dim|kv_head_dim|qkv|joined_kv|mlp(_\w+)?|ff|d_ff|ffn|vocab(_\w+)?"
    r"|classes|features_out|q_rank|kv_rank"
)
STACK_WORDS = r"layers?|stack|stages?|scan|blocks?|\w+_layers|circular_repeats"
EXPERT_WORDS = r"exp|experts?|num_experts|expert_\w+"
INDEX_WORDS = r"relpos_buckets|abspos_buckets|length|position\w*"
WINDOW_WORDS = r"keep_\d|(kernel_)?(height|width)|window\w*|conv_window"
CONV_WORDS = {"conv_in": "i", "conv_out": "o"}
