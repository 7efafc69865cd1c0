"""Which weights a target takes, by names and on recorded trees, and what is said of targets that fit nothing."""

import re
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import jlora
from jlora import targets
from jlora._trees import _select, _tree
from trees import models, nested

pytestmark = pytest.mark.settled

MODELS = models()
MATRICES = {"query", "key", "value", "qkv", "attn_out", "mlp", "conv", "other_linear", "router"}
TRUTH = {
    "attention": lambda leaf: leaf.kind in ("query", "value", "qkv"),
    "linear": lambda leaf: leaf.kind in MATRICES,
    "embeddings": lambda leaf: leaf.kind == "embedding",
    "head": lambda leaf: leaf.kind == "head",
    "norms": lambda leaf: leaf.kind == "norm",
    "biases": lambda leaf: (
        leaf.kind == "bias" or leaf.kind == "norm" and bool(re.search(r"(bias|offset|beta)$", leaf.path))
    ),
}
TWO = {"query": {"kernel": jnp.ones((8, 8))}, "value": {"kernel": jnp.ones((8, 8))}}
BIASED = {name: {**module, "bias": jnp.ones(8)} for name, module in TWO.items()}


@pytest.mark.parametrize("model", MODELS)
def test_targets_take_what_the_written_truth_says(model):
    """On every recorded tree each target takes exactly the leaves of its kinds, given the tree as `adapt` is."""
    tree = _tree.flatten(nested(MODELS[model], lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)))
    truth = {leaf.path: leaf for leaf in MODELS[model]}
    for name, wanted in TRUTH.items():
        taken = dict(zip(tree.paths, _select.taken(getattr(targets, name), tree), strict=True))
        wrong = {path: it for path, it in taken.items() if it != wanted(truth[path])}
        assert not wrong, (name, wrong)


# Paths of a matrix of 8 x 8 by what takes it: attention and linear; linear alone; head; embeddings; none of them.
NAMES = {
    "attention linear": """
        layer_0/attention/q_lin/kernel h/0/attention/wq/kernel h/0/attention/wv/kernel attn/query_proj/weight
        attn/value_proj/weight transformer%2Fattn_0%2Fquery/w gpt/~/attn%2Fvalue/w self_attn/qkv_proj/kernel
        attn/Wqkv/kernel attn1/to_qkv/kernel attn1/to_q/kernel attn1/to_v/kernel img_attn_qkv/kernel attn/qkv/kernel
        self_attention/wq_b/kernel self_attention/wkv_b/kernel attn/kv_b_proj/kernel attn/q_b_proj/kernel
        attn/q_einsum/w attn/kv_einsum/w MultiHeadDotProductAttention_0/query/kernel SelfAttention/q/kernel
        h_0/attn/c_attn/kernel crossattention/q_attn/kernel self_attention/query_key_value/kernel
        self_attn/in_proj_weight attn/in_proj/kernel attn/q_proj attn/wv multi_head_attention/query/w
        self_attention_layer/query_dense/kernel attention/value_dense/kernel attn/to_kv/kernel
        model.layers.0.self_attn.v_proj.weight attention/q_projection/kernel attention/query_projector/kernel
        attn/add_q_proj/kernel linear_attn/in_proj_qkvz/kernel attn/qkvproj/kernel attn/proj_v/kernel
        txt_attn_qkv/kernel mixer/Wqkv/kernel attn/fused_qkv/kernel attn/W_q attn/query_layer/kernel
        CrossAttention_0/to_q/kernel attn/q_kernel EncDecAttention/v/kernel attn/q_up_proj/kernel""",
    "linear": """
        layer_0/mlp/gating_einsum layer_0/mlp/linear embedder/mm_input_projection/w
        encoder/pos_conv_embed/conv/weight_v encoder/embedding_hidden_mapping_in/kernel embeddings_project/kernel
        embeddings/patch_embeddings/projection/kernel embedding/Conv_0/kernel patch_embed/proj/kernel
        time_embedding/linear_1/kernel time_emb_proj/kernel embedding/kernel add_embedding/linear_1/kernel
        t_embedder/mlp_0/kernel final_layer/linear/kernel multi_head_attention/out/kernel detection_head/conv/kernel
        head_proj/kernel cls/predictions/transform/dense/kernel mixer/in_proj/kernel normalizer/dense/kernel
        alignment/kernel norm_proj/kernel adaln_norm/linear/kernel norm1/linear/kernel AdaLayerNorm_0/Dense_0/kernel
        conditional_norm/to_scale/kernel bn_proj/w logits_proj/w routed_experts/b mlp/b/kernel self_attn/k_proj/kernel
        attn/wk/kernel attn/wo/kernel MultiHeadAttention_0/out/kernel multi_head_attention_1/linear/w
        attention_heads/out/kernel mlp/gate/kernel moe/router/kernel mlp/v1/kernel ffn/value/kernel glu/v/kernel
        pre_logits/kernel pre_classifier/kernel pooler/dense/kernel classifier/dense/kernel lm_head/dense/kernel
        discriminator_predictions/dense/kernel project_q/kernel quantizer/weight_proj/kernel text_projection/kernel
        head_norm_proj/kernel score_proj/kernel patch_embedding/weight time_embed/0/weight timestep_embedding/weight
        pos_proj/weight linear_pos/kernel embed_proj/w mamba/x_proj/kernel mamba/dt_proj/kernel multihead/kernel
        normal/kernel enormous/kernel lnn/kernel column/w embedding_proj/weight headless/kernel biased/kernel rebias/w
        abnormal/dense/kernel snorm_linear/kernel AdaLN_0/Dense_0/kernel layers/0/mlp/experts/down_proj
        self_attn/q_a_proj/kernel Dense_0/kernel linear/w conv/w x/kernel dense_4h_to_h/kernel cell/weight_hh
        lstm/hi/kernel""",
    "head": """
        transformer%2Flm_head/w scoring_head/kernel heads/kernel head/kernel cls/predictions/decoder/kernel
        qa_outputs/kernel decoder/logits_dense/kernel classifier/kernel score/kernel lm_head/decoder/kernel
        classifier/out_proj/kernel classifier/1/kernel lm_head/w head_0/kernel LMHead_0/kernel vocab_projector/kernel
        generator_lm_head/kernel discriminator_predictions/dense_prediction/kernel unembed/kernel embed_out/kernel
        logits/w mlm_head/kernel classification_head/out_proj/kernel softmax/logits_ffn/linear/w
        masked_msa_head/logits/weights""",
    "embeddings": """
        token_embedder/embedding y_embedder/embedding_table/embedding embedder/input_embedding
        transformer/wte/embedding embed_tokens/embedding embed_tokens/weight tok_embeddings/weight shared/embedding
        word_embeddings/weight Embed_0/embedding language_model%2Fembed/embeddings token_embedding/embeddings
        embeddings/token_type_embeddings/embedding wte/weight model.embed_tokens.weight lm/embedding_lookup/emb_var""",
    "": """
        decoder/relpos_bias/rel_embedding mixer/A_log pos_embedding posembed_input/pos_embedding cls cls_token lora_a
        Transformer/encoder_norm/scale relative_attention_bias/embedding wpe/embedding position_embeddings/embedding
        embed_positions/weight mask_token query_tokens latents layers/norm1/weight layers/ln_1/scale LayerNorm_0/bias
        layers/attn/q_norm/w q_proj/bias layers/attn/q_bias q_proj/lora_a query/lora_b/kernel_lora
        relative_position_bias_table positional_embeddings batch_stats/BatchNorm_0/mean rms_norm/kernel
        post_attention_layernorm/w register_tokens layer_scale inv_freq mixer/D
        temporal_position_embedding/embedding
        rel_bias/embedding object_queries norm_layer/weight norms/0/weight layernorm/gamma rel_pos_h ema_mean""",
}  # fmt: skip
CASES = [(path, kinds.split()) for kinds, paths in NAMES.items() for path in paths.split()]


@pytest.mark.parametrize(("path", "kinds"), CASES)
def test_names_in_wide_use_are_read_as_a_person_would(path, kinds):
    """A path alone says what a matrix is for: word by word, and by what stands directly above the leaf."""
    said = [k for k in ("attention", "linear", "head", "embeddings") if getattr(targets, k)(path, jnp.ones((8, 8)))]
    assert said == kinds


def test_what_is_no_real_floating_array_is_no_target():
    """Integer and complex leaves are taken by none."""
    for name in TRUTH:
        for dtype in (jnp.int8, jnp.complex64, jnp.bool_):
            assert not getattr(targets, name)("query/kernel", jax.ShapeDtypeStruct((8, 8), dtype))


def test_a_leaf_is_read_by_what_stands_beside_it():
    """Haiku's `b` is a bias beside a `w` also where layers are stacked; alone, with two axes, it is a matrix."""
    tree = {"linear": {"w": jnp.ones((2, 8, 8)), "b": jnp.ones((2, 8))}, "routed": {"b": jnp.ones((8, 8))}}
    tree["attention"] = {"gating_w": jnp.ones((8, 2, 4)), "gating_b": jnp.ones((2, 4)), "query_w": jnp.ones((8, 2, 4))}
    taken = lambda target: [path for path, it in zip(flat.paths, _select.taken(target, flat), strict=True) if it]
    flat = _tree.flatten(tree)
    assert taken(targets.linear) == ["attention/gating_w", "attention/query_w", "linear/w", "routed/b"]
    assert taken(targets.biases) == ["attention/gating_b", "linear/b"]


def test_a_last_projection_without_a_name_is_known_by_its_size():
    """Of plain names, the head is what makes a size that no other weight has: beside convolutions, or a vocabulary."""
    shape = lambda *s: {"kernel": jax.ShapeDtypeStruct(s, jnp.float32)}
    taken = lambda target, tree: [p for p, it in zip(tree.paths, _select.taken(target, tree), strict=True) if it]
    image = _tree.flatten({"Conv_0": shape(3, 3, 3, 8), "Dense_0": shape(72, 16), "Dense_1": shape(16, 10)})
    assert taken(targets.head, image) == ["Dense_1/kernel"]
    assert taken(targets.linear, image) == ["Conv_0/kernel", "Dense_0/kernel"]
    table = {"embedding": jax.ShapeDtypeStruct((50, 8), jnp.float32)}
    text = _tree.flatten({"wte": table, "fc": shape(8, 32), "mlp": shape(32, 8), "output": shape(8, 50)})
    assert taken(targets.head, text) == ["output/kernel"]
    unet = _tree.flatten({"Conv_0": shape(3, 3, 3, 8), "Dense_0": shape(8, 32), "block": {"Dense_0": shape(32, 8)}})
    assert taken(targets.head, unet) == []
    mlp = _tree.flatten({"Dense_0": shape(8, 32), "Dense_1": shape(32, 10)})
    assert taken(targets.head, mlp) == [] and len(taken(targets.linear, mlp)) == 2


def test_a_trace_decides_what_is_contracted():
    """Given a trace's letters, what no dot takes is no matrix, and a shape that looks like a token's keeps none out."""
    tree = _tree.flatten(
        {"a": {"theta": jnp.ones((8, 8)), "mix": jnp.ones((1, 8, 8))}, "wq": {"kernel": jnp.ones((8, 8))}}
    )
    assert tree.paths == ("a/mix", "a/theta", "wq/kernel")
    assert _select.taken(targets.linear, tree) == [False, True, True]
    traced = {"a/mix": ("dot", "sio"), "a/theta": ("elementwise", "oo"), "wq/kernel": ("unsure", "")}
    assert _select.taken(targets.linear, tree, traced) == [True, False, True]
    assert _select.taken(targets.attention, tree, traced) == [False, False, True]
    looked_up = {"a/theta": ("lookup", "io")}
    assert _select.taken(targets.embeddings, tree, looked_up) == [False, True, False]


def test_adapt_given_a_call_takes_what_dots_take():
    """`adapt(fn=, args=)`: a bare array that is looked up or multiplied elementwise is no matrix, one in a dot is."""

    def model(params, ids):
        x = params["rows"][ids] * params["theta"]
        return x @ params["mixing"][0] @ params["norm"]["kernel"]

    shape = lambda *s: jnp.ones(s)
    params = {"mixing": shape(1, 8, 8), "norm": {"kernel": shape(8, 6)}, "rows": shape(50, 8), "theta": shape(4, 8)}
    call = dict(fn=model, args=(jnp.zeros((2, 4), int),))
    paths = lambda target, **call: [
        site.leaf.path for site in jlora.adapt(params, jlora.LoRA(rank=1, target=target), **call).frozen.plan.sites
    ]
    assert paths(targets.linear, **call) == ["mixing", "norm/kernel"]
    assert paths(targets.embeddings, **call) == ["rows"]


def test_quantize_takes_attention_whose_name_holds_a_head():
    """Keras's and Haiku's own `multi_head_attention` is quantised, its head-like siblings are not."""
    names = ("query", "key", "value", "linear")
    tree = {"multi_head_attention": {n: {"w": jnp.ones((64, 64))} for n in names}, "lm_head": {"w": jnp.ones((64, 64))}}
    small = jlora.quantize(tree, "nf4")
    assert all(not isinstance(small["multi_head_attention"][n]["w"], jax.Array) for n in names)
    assert isinstance(small["lm_head"]["w"], jax.Array)


# --- targets that fit nothing, or too much ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "said"),
    {
        "one of a list": (
            dict(target=["query/kernel", "valeu/kernel"]),
            ["'valeu/kernel' matches no leaf", "are value/kernel"],
        ),
        "one of exclude": (dict(target="kernel", exclude=["value", "nothing"]), ["'nothing' matches no leaf"]),
        "exclude alone": (dict(target="kernel", exclude="nothing"), ["'nothing' matches no leaf"]),
        "all excluded": (dict(target="kernel", exclude="kernel"), ["matches no leaf that exclude='kernel' leaves"]),
        "a glob": (dict(target="*query*"), ["'*query*'", "glob", "write 'query/kernel'"]),
        "a glob that is a pattern": (dict(target="que?y*/kern*"), ["glob", "write 'que.y.*/kern'"]),
        "no pattern": (dict(target=["query/kernel", "value/[kernel"]), ["'value/[kernel'", "not a regular expression"]),
        "all-linear": (dict(target="all-linear"), ["write jlora.targets.linear"]),
        "a target as text": (dict(target=["embeddings"]), ["write jlora.targets.embeddings"]),
        "an empty list": (dict(target=[]), ["empty list"]),
        "a callable of a list": (dict(target=["query/kernel", targets.head]), ["head matches no leaf", "value/kernel"]),
        "peft's names": (
            dict(target=["query", "value"]),
            ["'query/bias' of shape (8,) and 1 more", "target=['query/kernel', 'value/kernel']", "exclude='/bias$'"],
        ),
        "a vector alone": (dict(target="query/bias"), ["and a vector has one", "BitFit()"]),
    }.values(),
    ids=lambda x: str(x)[:40],
)  # fmt: skip
def test_a_target_that_makes_no_sense_is_answered(fields, said):
    """The error names the pattern, where the nearest paths are, and what to write instead; what it says works."""
    with pytest.raises(ValueError) as error:
        jlora.adapt(BIASED, jlora.LoRA(rank=2, **fields))
    for text in said:
        assert text in str(error.value)
    for line in re.findall(r"write (target=\[.*?\])", str(error.value)):
        assert (
            repr(jlora.adapt(BIASED, jlora.LoRA(rank=2, **eval(f"dict({line})")))) == "Adapted(2 weights, 64 trainable)"
        )
    assert max(map(len, str(error.value).splitlines())) < 600


@pytest.mark.parametrize("field", ["target", "exclude"])
@pytest.mark.parametrize("value", [None, 5, re.compile("query"), {"query": 1}, b"query", [None]])
def test_what_is_no_target_is_refused(field, value):
    """None, numbers, compiled patterns, dictionaries and bytes: TypeError with the field's name, and what it takes."""
    with pytest.raises(TypeError, match=rf"{field}=.*regular expression"):
        jlora.adapt(TWO, jlora.LoRA(rank=2, **{"target": "kernel", field: value}))
    with pytest.raises(TypeError, match=rf"{field}=.*regular expression"):
        jlora.quantize(TWO, **{field: value})


def test_a_set_and_nested_lists_are_lists():
    """A set (as peft's files have it) and lists of lists take what their patterns take."""
    for target in ({"query/kernel", "value/kernel"}, ["query/kernel", ["value/kernel"]], frozenset({"kernel"})):
        assert repr(jlora.adapt(TWO, jlora.LoRA(rank=2, target=target))) == "Adapted(2 weights, 64 trainable)"


def test_quantize_answers_as_adapt_does():
    """`quantize` refuses a pattern of a list, or of exclude, that matches nothing."""
    for fields in (dict(target=["query", "valeu"]), dict(exclude=["nothing"])):
        with pytest.raises(ValueError, match="matches no leaf; the nearest paths are"):
            jlora.quantize(TWO, **fields)


def test_the_nearest_paths_are_found_fast_in_names_of_any_length():
    """Names come from files: a name of a million characters and a tree of a thousand paths take well below a second."""
    paths = tuple(
        f"block_{n}/{name}/kernel" for n in range(125) for name in "query key value out wi wo up down".split()
    )
    before = time.process_time()
    for _ in range(20):
        _tree.nearest("layer_" * 170_000, paths)
    assert time.process_time() - before < 2
    assert _tree.nearest("block_7/valeu/kernel", paths)[0] == "block_7/value/kernel"
    with pytest.raises(ValueError) as error:
        jlora.adapt(TWO, jlora.LoRA(rank=2, target=["layer_" * 170_000, "kernel"]))
    assert len(str(error.value)) < 2000


# --- the table ----------------------------------------------------------------------------------------------------


def test_the_table_says_what_of_the_kind_was_left():
    """One line of at most 100 columns: matrices beside matrices, biases beside biases, norms beside norms."""
    (leaves,) = [ls for name, ls in MODELS.items() if name.endswith("ViT-B16") and "R50" not in name]
    tree = nested(leaves, lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32))
    table = lambda spec: str(jax.eval_shape(lambda p: jlora.adapt(p, spec), tree)).splitlines()
    left = lambda spec: [line for line in table(spec) if line.startswith("left")]
    assert left(jlora.LoRA(rank=2)) == ["left: 11 matrices: Dense x4, key x2, out x2, embedding, head, pre_logits"]
    assert left(jlora.LoRA(rank=2, target=targets.linear)) == ["left: 1 matrix: head"]
    assert left(jlora.BitFit()) == [] and left(jlora.Full(target=targets.norms)) == []
    assert left(jlora.Full(target="LayerNorm_0/(scale|bias)")) == [
        "left: 3 norms' biases: LayerNorm x2, encoder_norm; 3 norms: LayerNorm x2, encoder_norm"
    ]
    many = {f"{name}_{'x' * 30}": {"kernel": jnp.ones((4, 4))} for name in "abcdefgh"}
    lines = str(jlora.adapt(many, jlora.LoRA(rank=1, target="a_"))).splitlines()
    assert [line for line in lines if line.startswith("left: 7 matrices")] and max(map(len, lines)) <= 100


# --- the last layers ----------------------------------------------------------------------------------------------

STACKS = {  # of recorded trees, read off the paths by eye: each stack's path up to its number, and the last layer there
    "convnets: ResNet50": "params/BottleneckResNetBlock_4",
    "dit: DiT-B/2": "DiTBlock_1",
    "easylm: llama_7b": "transformer/h/1",
    "equinox: GPT": "blocks/1",
    "gemma: Gemma3_4B": "layer_1 vision_encoder/siglip_encoder/Transformer/encoderblock_1",
    "keras_hub: vit base": "vit_encoder/transformer_block_2",
    "keras_hub: mixtral": "transformer_layer_0",
    "mamba: mamba-2.8b (mamba-minimal-jax, kcoopermiller)": "layers_1",
    "maxtext: gpt-oss-20b": "decoder/layers_1",
    "maxtext: mixtral-8x7b": "decoder/layers_0",
    "t5x: t5_1_1_base": "encoder/layers_1 decoder/layers_1",
    "tunix: gemma3-4b": "layers/1",
    "vision_transformer: ViT-B16": "Transformer/encoderblock_1",
    "vision_transformer: Mixer-B16": "MixerBlock_1",
}
UNTOLD = {  # what no path tells, and what the error says of it
    "equinox: GPT, blocks stacked": "the layers of 'blocks' are scanned",
    "maxtext: llama2-7b, scanned": "the layers of 'decoder/layers' are scanned",
    "maxtext: gpt-oss-20b, scanned": "the layers of 'decoder/layers' are scanned",
    "maxtext: gemma3-4b, scanned": "the layers of 'decoder/layers' are scanned",
    "t5x: scalable_t5 base, scanned": "no path here has the number of a layer",
    "diffusers: Stable Diffusion 1 U-Net": "'down_blocks_#' and 'up_blocks_#' stand beside each other",
    "keras_hub: t5 1.1 small": "layers=r'(?:transformer_decoder_layer_|transformer_encoder_layer_)",
    "maxtext: deepseek3-671b": "layers=r'dense_layers_",
    "haiku: transformer example": "no path here has the number of a layer",
}


def recorded(model):
    return _tree.flatten(nested(MODELS[model], lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.float32)))


@pytest.mark.parametrize("model", STACKS)
def test_the_last_layer_of_each_stack_is_taken_and_no_other_leaf(model):
    """On recorded trees: all parameters below the last layer of each stack; no table, head or final norm."""
    tree = recorded(model)
    taken = {p for p, it in zip(tree.paths, _select.taken(targets.TopLayers(1), tree), strict=True) if it}
    assert taken == {p for p in tree.paths if any(p.startswith(top + "/") for top in STACKS[model].split())}
    linear = zip(tree.paths, _select.taken(targets.linear, tree), strict=True)
    assert _select.taken(targets.TopLayers(1, of=targets.linear), tree) == [p in taken and it for p, it in linear]


@pytest.mark.parametrize("model", UNTOLD)
def test_layers_that_no_path_tells_are_asked_for(model):
    """Scanned layers, numbers of other things, two kinds beside each other: an error, and what it says works."""
    tree = recorded(model)
    with pytest.raises(ValueError) as error:
        _select.taken(targets.TopLayers(1), tree)
    assert UNTOLD[model] in str(error.value)
    for pattern in re.findall(r"layers=r'(.*?)'", str(error.value)):
        them = _select.taken(targets.TopLayers(1, layers=pattern), tree)
        taken = [p for p, it in zip(tree.paths, them, strict=True) if it]
        number = {int(re.search(pattern, p)[1]) for p in tree.paths if re.search(pattern, p)}
        assert taken and max(number) in {int(re.search(pattern, p)[1]) for p in taken}


def dense():
    return {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}


MLP = {f"Dense_{n}": dense() for n in range(11)}
DEEP = {"embed": {"embedding": jnp.ones((9, 4))}, "h": {str(n): {"mlp": dense()} for n in range(11)}}


@pytest.mark.parametrize(
    ("params", "top", "taken"),
    [
        (MLP, targets.TopLayers(2), "Dense_10/bias Dense_10/kernel Dense_9/bias Dense_9/kernel"),
        ([tuple(dense().values()) for _ in range(3)], targets.TopLayers(1, of=r"/0$"), "2/0"),
        (DEEP, targets.TopLayers(2, of=["kernel"]), "h/10/mlp/kernel h/9/mlp/kernel"),
        ({**DEEP, "h": {"3": DEEP["h"]["3"]}}, targets.TopLayers(1, of="kernel"), "h/3/mlp/kernel"),
        (
            {"stages": {str(s): {"layers": {str(n): dense() for n in range(2)}} for s in range(2)}},
            targets.TopLayers(3, of="kernel", layers=r"stages/(\d+)/layers/(\d+)/"),
            "stages/0/layers/1/kernel stages/1/layers/0/kernel stages/1/layers/1/kernel",
        ),
        (
            {f"net/h{n}_{part}": {"w": jnp.ones((4, 4))} for n in range(3) for part in ("attn", "mlp")},
            targets.TopLayers(1, layers=r"h(\d+)_"),
            "net%2Fh2_attn/w net%2Fh2_mlp/w",
        ),
    ],
    ids=["an MLP", "tuples", "numbers, not letters", "one layer", "two numbers", "Haiku"],
)
def test_the_largest_numbers_are_on_top(params, top, taken):
    """10 stands above 9; the layers of an MLP hold arrays; two numbers count as one of two digits."""
    adapted = jlora.adapt(params, jlora.Full(target=top))
    assert " ".join(sorted(adapted.trainable)) == taken
    rest = jlora.adapt(params, jlora.Full(target=targets.everything, exclude=top))
    assert not set(rest.trainable) & set(adapted.trainable)


@pytest.mark.parametrize(
    ("error", "make", "said"),
    [
        (ValueError, lambda: targets.TopLayers(0), "at least one layer"),
        (TypeError, lambda: targets.TopLayers(True), "a number of layers"),
        (TypeError, lambda: targets.TopLayers("2"), "a number of layers"),
        (TypeError, lambda: targets.TopLayers(2, of=None), r"of=None .*of=jlora.targets.linear"),
        (TypeError, lambda: targets.TopLayers(2, layers=2), "a group for the number"),
        (TypeError, lambda: targets.TopLayers(2)("h/1/mlp/kernel", 0), "counts the layers of a whole tree"),
        (ValueError, lambda: targets.TopLayers(12), "no 12 layers: h/# has 11"),
        (ValueError, lambda: targets.TopLayers(1, of="nothing"), r"TopLayers\(of='nothing'\) matches no leaf"),
        (ValueError, lambda: targets.TopLayers(1, of="embed"), "of='embed' takes nothing of the last 1 layers"),
        (ValueError, lambda: targets.TopLayers(1, layers="h/"), "no group for the number"),
        (ValueError, lambda: targets.TopLayers(1, layers="(h"), "no regular expression"),
        (ValueError, lambda: targets.TopLayers(1, layers="(h)"), "as numbers"),
        (ValueError, lambda: targets.TopLayers(1, layers=r"block(\d+)"), "found in no path"),
    ],
)
def test_layers_that_are_not_there_are_answered(error, make, said):
    """A count or a pattern that makes no sense is refused in words, beside whatever else is wrong with the call."""
    with pytest.raises(error, match=said):
        jlora.adapt(DEEP, jlora.Full(target=make()))
    if error is ValueError and "at least" not in said:
        with pytest.raises(ValueError, match=rf"(?s){said}.*'nowhere'\) matches no leaf"):
            jlora.adapt(DEEP, [jlora.Full(target=make()), jlora.LoRA(rank=1, target="nowhere")])


def test_the_lower_layers_of_a_scan_are_frozen_by_their_updates():
    """What the error of scanned layers says: updates of all but the last k are zeros; those keep every bit."""
    k, params = 2, {"layers": {"mlp": {"kernel": jax.random.normal(jax.random.key(0), (5, 4, 4))}}}
    with pytest.raises(ValueError, match=r"optax.chain\(tx, optax.stateless"):
        jlora.adapt(params, jlora.Full(target=targets.TopLayers(k)))
    trainable, frozen = jlora.split(jlora.adapt(params, jlora.Full(target="layers"), axes={"layers": "sio"}))
    tx = optax.chain(optax.adamw(1e-2), optax.stateless(lambda u, _: jax.tree.map(lambda u: u.at[:-k].set(0), u)))

    def loss(trainable):
        turn = lambda x, w: (jnp.tanh(x @ w), None)
        fn = jlora.lift(lambda params: jax.lax.scan(turn, jnp.ones((3, 4)), params["layers"]["mlp"]["kernel"])[0])
        return jnp.sum(fn(jlora.join(trainable, frozen)) ** 2)

    state = tx.init(trainable)
    for _ in range(2):
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        trainable = optax.apply_updates(trainable, updates)
    before, after = (
        params["layers"]["mlp"]["kernel"],
        jlora.merge(jlora.join(trainable, frozen))["layers"]["mlp"]["kernel"],
    )
    assert jnp.array_equal(before[:-k], after[:-k]) and bool(jnp.all(before[-k:] != after[-k:]))
