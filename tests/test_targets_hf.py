"""Targets on the Flax models of transformers, built live: what each leaf is, is known from the class of its module."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora import targets
from jlora._trees import _select, _tree

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")

BERT = dict(
    hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, vocab_size=40,
    max_position_embeddings=32,
)  # fmt: skip
BART = dict(
    vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
    encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=32,
)  # fmt: skip
VIT = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4)
GPT = dict(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)
T5 = dict(vocab_size=40, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, tie_word_embeddings=False)
DISTIL = dict(vocab_size=40, dim=16, n_layers=1, n_heads=2, hidden_dim=24, max_position_embeddings=32)
WAV = dict(
    conv_dim=(8, 8), conv_stride=(2, 2), conv_kernel=(3, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer", codevector_dim=8,
    proj_codevector_dim=8, num_codevectors_per_group=4,
)  # fmt: skip
UNTIED = dict(tie_word_embeddings=False)

# A class, its configuration, and the modules that are its heads.
MODELS = {
    "AlbertForPreTraining": (dict(BERT, embedding_size=8), "sop_classifier/classifier"),
    "BartForSequenceClassification": (BART, "classification_head/out_proj"),
    "BeitForMaskedImageModeling": (dict(VIT, vocab_size=40, use_relative_position_bias=True), "lm_head"),
    "BertForPreTraining": (dict(BERT, **UNTIED), "cls/predictions/decoder cls/seq_relationship"),
    "BertForQuestionAnswering": (BERT, "qa_outputs"),
    "BigBirdForPreTraining": (dict(BERT, **UNTIED), "cls/predictions/decoder cls/seq_relationship"),
    "BlenderbotForConditionalGeneration": (dict(BART, **UNTIED), "lm_head"),
    "BlenderbotSmallForConditionalGeneration": (dict(BART, **UNTIED), "lm_head"),
    "BloomForCausalLM": (dict(hidden_size=16, n_layer=1, n_head=2, vocab_size=40, **UNTIED), "lm_head"),
    "CLIPModel": (dict(text_config=BERT, vision_config=VIT, projection_dim=8), ""),
    "Dinov2ForImageClassification": (dict(VIT, use_swiglu_ffn=True), "classifier"),
    "DistilBertForMaskedLM": (dict(DISTIL, **UNTIED), "vocab_projector"),
    "DistilBertForSequenceClassification": (DISTIL, "classifier"),
    "ElectraForPreTraining": (dict(BERT, embedding_size=8), "discriminator_predictions/dense_prediction"),
    "ElectraForMaskedLM": (dict(BERT, embedding_size=8, **UNTIED), "generator_lm_head"),
    "GemmaForCausalLM": (dict(BERT, num_key_value_heads=1, head_dim=8, **UNTIED), "lm_head"),
    "GPT2LMHeadModel": (dict(GPT, add_cross_attention=True, **UNTIED), "lm_head"),
    "GPTNeoForCausalLM": (
        dict(hidden_size=16, num_layers=1, num_heads=2, attention_types=[[["global"], 1]], vocab_size=40, **UNTIED),
        "lm_head",
    ),
    "GPTJForCausalLM": (dict(GPT, rotary_dim=4), "lm_head"),
    "LlamaForCausalLM": (BERT, "lm_head"),
    "LongT5ForConditionalGeneration": (
        dict(T5, encoder_attention_type="local", feed_forward_proj="gated-gelu"),
        "lm_head",
    ),
    "MarianMTModel": (dict(BART, pad_token_id=0, **UNTIED), "lm_head"),
    "MBartForSequenceClassification": (BART, "classification_head/out_proj"),
    "MistralForCausalLM": (dict(BERT, num_key_value_heads=1), "lm_head"),
    "MT5ForConditionalGeneration": (T5, "lm_head"),
    "OPTForCausalLM": (
        dict(vocab_size=40, hidden_size=16, num_hidden_layers=1, ffn_dim=24, num_attention_heads=2,
             word_embed_proj_dim=8, max_position_embeddings=32, **UNTIED),
        "lm_head",
    ),
    "PegasusForConditionalGeneration": (dict(BART, **UNTIED), "lm_head"),
    "RegNetForImageClassification": (
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], groups_width=4),
        "classifier/1",
    ),
    "ResNetForImageClassification": (dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]), "classifier/1"),
    "RobertaForMaskedLM": (dict(BERT, **UNTIED), "lm_head/decoder"),
    "RobertaForSequenceClassification": (BERT, "classifier/out_proj"),
    "RobertaPreLayerNormForTokenClassification": (BERT, "classifier"),
    "RoFormerForMaskedLM": (dict(BERT, **UNTIED), "cls/predictions/decoder"),
    "T5ForConditionalGeneration": (T5, "lm_head"),
    "ViTForImageClassification": (VIT, "classifier"),
    "Wav2Vec2ForPreTraining": (dict(BERT, **WAV), ""),
    "Wav2Vec2ForCTC": (dict(BERT, **WAV), "lm_head"),
    "WhisperForConditionalGeneration": (
        dict(BART, num_mel_bins=8, max_source_positions=16, max_target_positions=16, pad_token_id=0, bos_token_id=0,
             eos_token_id=0, decoder_start_token_id=0, **UNTIED),
        "lm_head",
    ),
    "XGLMForCausalLM": (
        dict(vocab_size=40, d_model=16, ffn_dim=24, num_layers=1, attention_heads=2, max_position_embeddings=32,
             **UNTIED),
        "lm_head",
    ),
    "XLMRobertaForMultipleChoice": (BERT, "classifier"),
}  # fmt: skip

MATRIX = ("Dense", "Conv", "FlaxConv1D", "FlaxConvWithWeightNorm")
TABLE = ("Embed", "FlaxOPTLearnedPositionalEmbedding")
NORM = re.compile(r"(LayerNorm|BatchNorm|GroupNorm|RMSNorm)$")
POSITIONS = {
    "position_embeddings", "position_embedding", "embed_positions", "wpe", "relative_attention_bias",
    "global_relative_attention_bias",
}  # fmt: skip
QV = {
    "q", "v", "query", "value", "q_proj", "v_proj", "q_lin", "v_lin", "c_attn", "q_attn", "query_key_value",
}  # fmt: skip

# The last layers of self-attention and of feed-forward blocks, as the classes of these models call them.
ATTENTION_OUT = re.compile(
    r"(^|/)(attention/output/dense|attention/dense|(self_attn|attention|attn)/(out_proj|o_proj|c_proj|out_lin)"
    r"|(Local)?SelfAttention/o|self_attention/dense)$"
)
FEED_FORWARD_OUT = re.compile(
    r"(^|/)(layer/0/output/dense|ffn_output|fc2|fc_out|mlp/(c_proj|down_proj|weights_out|dense_4h_to_h)|lin2"
    r"|DenseReluDense/wo|feed_forward/output_dense)$"
)


def built(name):
    """The tree of a model's parameters, as shapes, and `{path of a module: its class}`."""
    make = getattr(transformers, f"Flax{name}")
    model = make(make.config_class(**MODELS[name][0]), _do_init=False)
    classes = {}

    def see(call, args, kwargs, context):
        classes["/".join(context.module.path)] = type(context.module).__name__
        return call(*args, **kwargs)

    with nn.intercept_methods(see):
        tree = jax.eval_shape(lambda key: model.init_weights(key, model.input_shape), jax.random.key(0))
    return tree, classes


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_targets_take_what_the_modules_are(name, monkeypatch):
    """Dense, convolutions, Embed and norms, by the class of the module that made it; heads, q and v as written."""
    clip = jnp.clip  # the T5s call it by names that newer JAX does not have
    monkeypatch.setattr(jnp, "clip", lambda x, *a, a_min=None, a_max=None, **k: clip(x, *(a or (a_min, a_max)), **k))
    tree, classes = built(name)
    flat = _tree.flatten(tree)
    heads = {head for head in MODELS[name][1].split() if head}
    truth = {}
    for path, leaf in zip(flat.paths, flat.leaves, strict=True):
        owner, _, last = path.removeprefix("params/").rpartition("/")
        kind, module = classes.get(owner, ""), owner.rsplit("/", 1)[-1]
        matrix = kind in MATRIX and last in ("kernel", "weight_v") and len(leaf.shape) > 1
        bias = last == "bias" or last == "final_logits_bias"
        truth[path] = {
            "head": owner in heads and matrix,
            "linear": matrix and owner not in heads,
            "attention": matrix and module in QV,
            "embeddings": kind in TABLE and module not in POSITIONS,
            "norms": bool(NORM.search(kind)) and not path.startswith("batch_stats/"),
            "biases": bias,
            "attention_outputs": matrix and bool(ATTENTION_OUT.search(owner)),
            "feed_forward_outputs": matrix and bool(FEED_FORWARD_OUT.search(owner)),
            "cross_attention_outputs": matrix
            and bool(re.search(r"(encoder_attn/out_proj|crossattention/c_proj|EncDecAttention/o)$", owner)),
        }
    assert heads <= {p.removeprefix("params/").rpartition("/")[0] for p in flat.paths}
    blocks = [sum(at[f"{end}_outputs"] for at in truth.values()) for end in ("attention", "feed_forward")]
    assert blocks[0] == blocks[1] > 0 or "ResNet" in name or "RegNet" in name
    for target in truth[path]:
        taken = dict(zip(flat.paths, _select.taken(getattr(targets, target), flat), strict=True))
        assert not (wrong := [p for p in taken if taken[p] != truth[p][target]]), (target, wrong)


TWO = {
    "BertForPreTraining": (dict(num_hidden_layers=2), ["bert/encoder/layer/1"]),
    "GPT2LMHeadModel": (dict(n_layer=2), ["transformer/h/1"]),
    "LlamaForCausalLM": (dict(num_hidden_layers=2), ["model/layers/1"]),
    "T5ForConditionalGeneration": (dict(num_layers=2), ["encoder/block/1", "decoder/block/1"]),
    "ViTForImageClassification": (dict(num_hidden_layers=2), ["vit/encoder/layer/1"]),
    "CLIPModel": ({}, ["text_model/encoder/layers/0", "vision_model/encoder/layers/0"]),
    "ResNetForImageClassification": ({}, ["params/resnet/encoder/stages/1"]),
}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
@pytest.mark.parametrize("name", TWO)
def test_the_last_layer_is_that_of_the_configuration(name, monkeypatch):
    """Every parameter of the last layer, of encoder and decoder each, also where the first has one more (T5's bias)."""
    clip = jnp.clip
    monkeypatch.setattr(jnp, "clip", lambda x, *a, a_min=None, a_max=None, **k: clip(x, *(a or (a_min, a_max)), **k))
    changed, tops = TWO[name]
    monkeypatch.setitem(MODELS, name, (dict(MODELS[name][0], **changed), ""))
    flat = _tree.flatten(built(name)[0])
    taken = {p for p, it in zip(flat.paths, _select.taken(targets.TopLayers(1), flat), strict=True) if it}
    assert taken == {p for p in flat.paths if any(p.startswith(top + "/") for top in tops)}


@pytest.mark.filterwarnings("ignore:.*:FutureWarning")
def test_two_layers_of_gpt2_medium_are_what_the_paper_counts():
    """FT^Top2 of GPT-2 medium: 25.19 M (LoRA, Table 3), so no embedding, final norm or head."""
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    model = transformers.FlaxGPT2LMHeadModel(config, _do_init=False)
    tree = jax.eval_shape(lambda key: model.init_weights(key, (1, 4)), jax.random.key(0))
    adapted = jax.eval_shape(lambda p: jlora.adapt(p, jlora.Full(target=targets.TopLayers(2))), tree)
    assert round(jlora.count(adapted)[0] / 1e6, 2) == 25.19
