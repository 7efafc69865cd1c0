"""Models of `transformers<5`, from random tiny configurations: nothing is downloaded."""

from __future__ import annotations

import warnings

import jax.numpy as jnp
import pytest

from zoo._case import fill, integers, normal, registry

CASES, case = registry("clients")

slow = dict(marks=(pytest.mark.slow,))
LINEAR = r"(query|key|value|dense|[qkvo]_proj|(gate|up|down|out)_proj|fc\d|projection)/kernel$"


def client(name: str, config: str, **options):
    """The Flax module of a model, and parameters of its shapes."""
    import transformers

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Flax support ends with version 5
        make = getattr(transformers, f"Flax{name}")
        model = make(getattr(transformers, f"{config}Config")(**options), _do_init=False)
    return model.module, fill(model.params_shape_tree)


def ids(*shape: int, below: int = 37):
    return integers(5, *shape, below=below)


def positions(ids):
    return jnp.broadcast_to(jnp.arange(ids.shape[-1]), ids.shape)


TEXT = dict(
    vocab_size=37,
    hidden_size=24,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=40,
    max_position_embeddings=19,
)


@case(LINEAR + r"|word_embeddings/embedding$")
def bert():
    """Masked language model: the output head is the word embeddings, transposed."""
    module, params = client("BertForMaskedLM", "Bert", **TEXT)
    tokens = ids(2, 7)
    mask = jnp.ones_like(tokens).at[1, 4:].set(0)

    def fn(params, ids, mask):
        rest = jnp.zeros_like(ids), positions(ids), None
        return module.apply({"params": params}, ids, mask, *rest, deterministic=True).logits

    return fn, params, (tokens, mask)


@case(r"c_(attn|proj|fc)/kernel$|wte/embedding$", axes={r"c_(attn|proj|fc)/kernel$": "oi"})
def gpt2():
    """Kernels stored (out, in); query, key and value are one of them."""
    options = dict(vocab_size=37, n_embd=24, n_layer=2, n_head=3, n_inner=40, n_positions=19)
    module, params = client("GPT2LMHeadModel", "GPT2", **options)

    def fn(params, ids):
        mask = jnp.ones_like(ids)
        return module.apply({"params": params}, ids, mask, positions(ids), deterministic=True).logits

    return fn, params, (ids(2, 7),)


@case(LINEAR + r"|lm_head/kernel$", **slow)
def llama():
    """Three query heads to each of two key and value heads."""
    options = TEXT | dict(hidden_size=36, num_attention_heads=6, num_key_value_heads=2)
    module, params = client("LlamaForCausalLM", "Llama", **options)

    def fn(params, ids):
        mask = jnp.ones_like(ids)
        return module.apply({"params": params}, ids, mask, positions(ids), deterministic=True).logits

    return fn, params, (ids(2, 7),)


@case(LINEAR, **slow)
def vit():
    """The patches are a convolution."""
    options = dict(TEXT, image_size=12, patch_size=4, num_channels=3)
    del options["vocab_size"], options["max_position_embeddings"]
    module, params = client("ViTModel", "ViT", **options)

    def fn(params, images):
        return module.apply({"params": params}, images, deterministic=True)

    return fn, params, (normal(1, 2, 12, 12, 3),)


@case(LINEAR + r"|conv\d/kernel$", axes={r"conv\d/kernel$": "kio"}, **slow)
def whisper():
    """Encoder and decoder in one tree, behind two one-dimensional convolutions."""
    options = dict(
        vocab_size=37,
        d_model=24,
        num_mel_bins=10,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=3,
        decoder_attention_heads=3,
        encoder_ffn_dim=40,
        decoder_ffn_dim=44,
        max_source_positions=9,
        max_target_positions=11,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    module, params = client("WhisperForConditionalGeneration", "Whisper", **options)

    def fn(params, sound, ids):
        rest = jnp.ones_like(ids), positions(ids)
        return module.apply({"params": params}, sound, ids, *rest, deterministic=True).logits

    return fn, params, (normal(1, 2, 10, 18), ids(2, 5))


@case(LINEAR + r"|patch_embedding/kernel$", **slow)
def clip():
    """Two towers and a learned temperature."""
    text = dict(TEXT, eos_token_id=2)
    vision = dict(TEXT, hidden_size=20, num_attention_heads=2, image_size=12, patch_size=4)
    options = dict(text_config=text, vision_config=vision, projection_dim=14)
    module, params = client("CLIPModel", "CLIP", **options)

    def fn(params, ids, images):
        rest = jnp.ones_like(ids), positions(ids)
        return module.apply({"params": params}, ids, images, *rest, deterministic=True)

    return fn, params, (ids(2, 7), normal(1, 2, 12, 12, 3))


@case(r"(query|key|value|dense|ffn|ffn_output|mapping_in)/kernel$", **slow)
def albert():
    """One layer for the whole depth, and factored embeddings."""
    options = dict(TEXT, embedding_size=14, num_hidden_layers=3)
    module, params = client("AlbertModel", "Albert", **options)

    def fn(params, ids):
        rest = jnp.ones_like(ids), jnp.zeros_like(ids), positions(ids)
        return module.apply({"params": params}, ids, *rest, deterministic=True)

    return fn, params, (ids(2, 7),)


@case(r"params/.*kernel$", **slow)
def resnet():
    """Parameters and running statistics in one tree."""
    options = dict(num_channels=3, embedding_size=6, hidden_sizes=[8, 10], depths=[1, 1], layer_type="basic")
    module, variables = client("ResNetModel", "ResNet", **options)

    def fn(variables, images):
        return module.apply(variables, images, deterministic=True)

    return fn, variables, (normal(1, 2, 20, 16, 3),)
