"""What libraries call their parts: the words that `_kinds` looks for, each line with the libraries that use it.

A name is compared as its words in lower case, joined by `_`: `LayerNorm_0` is `layer_norm`, `to_out_0` is `to_out` (the
numbers at the end of a module's name are left out), `RMSNorm` is `rms_norm`, `wi_0` of a bare array `wi_0`.
"""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Names:
    """One line: what a name must be (a regular expression for all of it), who says so, and where in the path it counts.

    `within` is searched in the names above, outermost first and joined by slashes.
    """

    are: str
    source: str
    within: str = ""

    def fit(self, name: str, above: str = "") -> bool:
        return re.fullmatch(self.are, name) is not None and re.search(self.within, above) is not None


# Leaves that are called after what they are in a module; any other names a part itself (`mlp/down_proj`).
MATRIX_LEAVES = r"kernel|w|weights?|weight_v|weight_(ih|hh)(_.*)?"
LEAVES = MATRIX_LEAVES + r"|embeddings?|embedding_table|scale|offset|bias|beta|gamma|b|g|bias_.*|weight_g"

_NORM = r"(.*_)?(norms?|(layer|layr|rms|batch|group|instance|scale)norm|ln|bn|gn|rms|normali[sz]ation)"

ATTENTION_END = r"(^|[_/])(attention|attn)$"

NAMES = {
    "norm": (
        Names(_NORM, "Flax LayerNorm_0, norm1; Haiku layer_norm; HF pre_layrnorm; Keras layer_normalization"),
        Names(
            _NORM + r"_(f|final|out|in|init|root|pre|post|q|k|d|[a-z]*_?attn|embedding|before|after|mlp|ffn|layer)",
            "GPT-2 ln_f, ln_cross_attn; Mamba norm_f; Flax bn_init; ViT gn_root; HF layernorm_before; batch_norm2d",
        ),
    ),
    "conditioned": (Names(r".*(ada|cond|film|mod).*", "DiT AdaLayerNorm: its kernel makes scales out of a condition"),),
    "layer_scale": (Names(r"(.*_)?(layer_scale|logit_scale|ls)(_\d+)?", "ConvNeXt, CaiT, CLIP"),),
    "bias": (
        Names(
            r"(.*_)?(bias|biases|beta|offset)(_[a-z0-9]{1,2}(_.*)?)?",
            "Flax; Haiku offset; Keras beta; PyTorch bias_ih_l0; tunix; no bias_table",
        ),
    ),
    "state": (
        Names(r"[abcd]", "Mamba, S4", r"(^|[_/])(mixer|mamba\d*|ssm|s4d?|s5|lru)([_/]|$)"),
        Names(r"a_log|dt_bias|lambda(_re|_im)?|(nu|theta|gamma)_log|log_(step|dt)", "Mamba, S4, LRU"),
    ),
    "statistics": (
        Names(r"(running_|moving_|pop_)?(mean|var|variance)|num_batches_tracked", "BatchNorm of Flax, PyTorch, Keras"),
        Names(r"average|hidden|counter", "haiku/_src/moving_averages.py ExponentialMovingAverage"),
        Names(r"(cached|cache)_.*|.*_cache|inv_freq|freqs(_.*)?|(.*_)?rotary(_.*)?", "caches and rotary tables"),
    ),
    "states": (Names(r"batch_stats|batchstats|cache|ema_params|spectral_stats|.*_ema", "collections of Flax, Haiku"),),
    "position": (
        Names(
            r"(.*_)?(pos|position|positions|positional|posemb|posembed|relpos|places?|wpe)(_ids)?(_(emb|embs|embed|embeds|embedding|"
            r"embeddings|embedder|encoding|encodings|enc|bias|table|param|k|x|y|1d|2d|h|w|index|[uv]))*",
            "ViT pos_embedding; Haiku positional_embeddings; T5X relpos_bias; GPT-2 wpe; HF position_embeddings",
        ),
        Names(r"(.*_)?embed(ding)?s?_positions", "HF Bart embed_positions"),
        Names(r"(.*_)?bias_table", "Swin relative_position_bias_table"),
        Names(r"rel_(embedding|bias|pos)|(.*_)?relative_(attention|position|pos)(_.*)?bias(_.*)?", "T5X; HF T5, Beit"),
        Names(r"embeddings?", "keras-hub T5: self_attention/embeddings", ATTENTION_END),
        Names(r"(.*_)?(r_w|r_r|r_s)_bias", "Transformer-XL"),
    ),
    "token": (
        Names(
            r"(.*_)?(cls|class|mask|dist|distill|distillation|register|registers|storage|sep|pad|eos|bos|query|prompt|latent|"
            r"null|global|probe)_?(tokens?|embed|embedding|embeddings|queries)",
            "ViT, HF cls_token, mask_token, class_embedding, query_tokens",
        ),
        Names(r"cls|probe|latents?|query_pos|masked_spec_embed|tokens?|prompts?|(.*_)?queries", "big_vision; wav2vec2"),
    ),
    "other": (
        Names(r"(.*_)?lora(_.*)?", "factors of adapters"),
        Names(r"(.*_)?(gamma|layer_scale|skip_scale|ls)(_\d+)?|lambda_?\d*", "LayerScale: ConvNeXt, CaiT, HF Beit"),
        Names(r"weight_g|g", "weight normalisation: HF wav2vec2, Haiku"),
        Names(r"scales?|logit_scale|temperature|tau|alpha|gates?_scale", "scales without a module"),
        Names(r"(.*_)?sinks?(_\d+)?", "attention sinks: gpt-oss in MaxText"),
        Names(r"codevectors|codebook|code_?book_.*|ema_.*", "wav2vec2, VQ-VAE"),
        Names(r"(time|token)_(mix|shift|decay|first|maa|faaaa).*", "RWKV"),
    ),
    "head": (
        Names(r"(?!(.*_)?(multi|attention|attn|per|num|n)_heads?$)(.*_)?heads?", "ViT head; HF lm_head; scoring_head"),
        Names(
            r"(?!(.*_)?(pre|router|gate|gating|attn|attention|mask|similarity)_)"
            r"(.*_)?(logits?|classifiers?|scores?|unembed|unembedding|unembedder|deembed)",
            "Haiku logits; HF classifier, score",
        ),
        Names(r"logits_dense|score_dense", "T5X, MaxText"),
        Names(r"qa_outputs|vocab_projector|seq_relationship|embed_out|reverse_embeddings?", "HF; GPT-NeoX; keras-hub"),
        Names(r"decoder", "HF Bert predictions/decoder, Roberta lm_head/decoder", r"(^|/)(predictions|(.*_)?head)$"),
        Names(r"linear", "praxis softmax/logits_ffn/linear", r"(^|/)logits_ffn$"),
        Names(r"dense_prediction", "HF Electra discriminator_predictions/dense_prediction"),
        Names(r"out_proj", "HF Roberta, Bart", r"(^|/)(classifier|classification_head)$"),
    ),
    "embedding": (
        Names(
            r"(?!(.*_)?(patch|patches|conv|time|timestep|step|proj|linear|sinusoidal|fourier|frame|frames)_)(.*_)?"
            r"(embed|embeds|embedding|embeddings|emb|embs|wte|embed_in|embed_tokens|emb_var|shared|lookup|embedding_table|tables?)",
            "Flax embedding; gemma input_embedding; Equinox embedding; HF wte, embed_tokens; Haiku; praxis emb_var",
        ),
    ),
    "types": (
        Names(
            r"(.*_)?(types?|segments?|langs?|languages?|class|classes|labels?|tasks?|speakers?|entity|entities)(_.*)?",
            "HF token_type_embeddings, lang_embeddings; T5X segment; flax DiT label_embed",
        ),
    ),
}  # fmt: skip

# Leaves that are a table in a module called as one: Equinox's `embedding/weight`, not Flax's `embedding/kernel`.
TABLE_LEAVES = ("embedding", "embeddings", "embedding_table", "weight", "w", "weights")

# Attention: the words that say what a projection makes, and those that may stand beside them.
QKV = {
    **dict.fromkeys(("q", "query", "queries", "wq", "qlin", "qproj", "mq"), "q"),
    **dict.fromkeys(("k", "key", "keys", "wk", "klin", "kproj"), "k"),
    **dict.fromkeys(("v", "value", "values", "wv", "vlin", "vproj"), "v"),
    **dict.fromkeys(("qkv", "wqkv", "kqv", "qkvz", "qkvproj"), "qkv"),
    **dict.fromkeys(("kv", "wkv", "kvproj"), "kv"),
    **dict.fromkeys(("qk", "wqk"), "qk"),
}
BESIDE_QKV = frozenset(
    "proj projection projections projector lin linear dense einsum layer fc to w c x attn attention self cross mha b "
    "up in add added img txt image text fused combined kernel weight mat matrix encoder decoder states heads multi "
    "head".split()
)
FUSED_IN_ATTENTION = r"c_attn|in_proj|in_proj_weight|attn_in|in_projection"
ATTENTION = (
    r"(^|_)(attn|attention|attentions|attn\d*|mha|mqa|gqa|mla|selfattn|crossattn|selfattention|crossattention)(_|$)"
)
ATTENTION_OR_MLP = (
    ATTENTION + r"|(^|_)(mlp|ffn|ff|feed_forward|feedforward|glu|experts?|mamba|channel_mix|channel_mixing|moe)(_|$)"
)

# Names that say no more than that a matrix stands there.
PLAIN = r"dense|linear|lin|fc|proj|projection|output|out|decoder|w|kernel|output_layer|final|final_layer|readout"

# Modules that hold attention or a feed-forward block, by the end of their name or path.
ATTENTION_MODULE = (
    r"(^|[_/])(attn|attention|mha|mqa|gqa|mla|msa|self_?attn|cross_?attn|selfattention|crossattention)(_layer)?(_\d+)?$"
)
FEED_FORWARD_MODULE = (
    r"(^|[_/])(mlp|ffn?|ffw|feed_?forward|dense_relu_dense|dense_act_dense|(ge|swi)?glu|moe|experts?)"
    r"(_block|_layer|_module)?(_\d+)?$"
)
CROSS_ATTENTION = (
    r"(^|[_/])(cross|enc_dec|encoder_decoder|encoder_attn|src_attn|multihead_attn)|crossattention|crossattn"
)

_IN_ATTENTION = rf"^(?!.*(^|[_/])(pool|pooler|pooling|map_head)).*{ATTENTION_MODULE}"
_IN_OUTPUT = r"(^|[_/])(attention|attn|crossattention)/output$"

# The ends of a block. Queries and what holds them are known by QKV.
BLOCKS = {
    "last attention": (
        Names("dense", "HF Flax Bert, Roberta, Electra, ViT, Beit: attention/output/dense", _IN_OUTPUT),
        Names(
            r"o|wo|out|output|dense|linear|proj|post",
            "HF T5 SelfAttention/o; Llama attention/wo; Flax MultiHeadDotProductAttention_0/out, nnx, MaxText; "
            "HF Albert, Bloom attention/dense; Haiku linear; DINO attn/proj; praxis self_attention/post",
            _IN_ATTENTION,
        ),
        Names(
            r"(.*_)?(c_proj|out_?proj|out_?projection|output_?projection|to_out|out_lin|attention_output|vec_einsum)(_0)?",
            "HF GPT-2 attn/c_proj; Bart, CLIP, OPT, GPT-J out_proj; diffusers to_out_0; DistilBert out_lin; Keras "
            "attention_output; gemma attn_vec_einsum",
            _IN_ATTENTION,
        ),
        Names(r"o_proj", "HF Flax Llama, Gemma, Mistral; tunix"),
    ),
    "first feed forward": (
        Names("dense", "HF Flax Bert, Roberta, Electra, ViT, Beit: intermediate/dense", r"(^|/)intermediate$"),
        Names(
            r"wi(_\d)?|up|gate|in|input|w_[13]|c_fc|fc_in|linear_in|gating_einsum|weights_in|(.*_)?(up|gate)",
            "HF T5, T5X, MaxText wi, wi_0; Llama feed_forward/w1; gemma gating_einsum; GPT-J fc_in; Dinov2 weights_in",
            FEED_FORWARD_MODULE,
        ),
        Names(r"(.*_)?(up|gate)_?proj(ection)?|gate_up_proj", "HF Flax Llama, Gemma, Mistral; tunix"),
        Names(r"dense_h_to_(_?)4_?h", "Bloom, GPT-NeoX mlp/dense_h_to_4h"),
        Names(r"(.*_)?(intermediate_dense|intermediate|gating)", "HF Wav2Vec2 intermediate_dense; Keras Hub"),
        Names(r"ffn", "HF Flax Albert: ffn, ffn_output"),
        Names(r"linear", "praxis ffn_layer1/linear", r"(^|/)ffn_layer_1$"),
    ),
    "last feed forward": (
        Names("dense", "HF Flax Bert, Roberta, Electra, ViT: output/dense", rf"^(?!.*{_IN_OUTPUT}).*(^|/)output$"),
        Names(
            r"wo|down|out|output|c_proj|w_2|fc_out|linear_out|proj_out|weights_out|(.*_)?down",
            "HF T5, T5X, MaxText wo; GPT-2 mlp/c_proj; Llama feed_forward/w2; GPT-J fc_out; Dinov2 weights_out",
            FEED_FORWARD_MODULE,
        ),
        Names(r"(.*_)?down_?proj(ection)?", "HF Flax Llama, Gemma, Mistral; tunix"),
        Names(r"dense_4_?h_to_h", "Bloom, GPT-NeoX mlp/dense_4h_to_h"),
        Names(r"(.*_)?(ffn|ffw|feed_?forward)_?(output|out|linear)(_dense)?|output_dense", "Albert, Wav2Vec2, Keras"),
        Names(r"linear", "gemma mlp/linear; praxis ffn_layer2/linear", r"(^|/)(mlp|ffn_layer_2)$"),
    ),
}  # fmt: skip

# First and last layers that make a feed-forward block of what holds both, whatever it is called.
PAIRS = (("up", "down"), ("intermediate", "output"))

# Layers of a feed-forward block that their numbers alone tell apart: Flax Dense_0, Dense_1; HF fc1, fc2, lin1, lin2;
# praxis ffn_layer1; Haiku linear, linear_1; Equinox layers/0.
NUMBERED = r"(.*_)?(dense|linear|lin|fc|layers?|proj|conv|c)"
