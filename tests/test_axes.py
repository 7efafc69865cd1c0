"""Where the letters of a weight's axes come from; what is said where nothing tells, or a function contradicts them."""

import functools
import re
import warnings

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jlora
from jlora._trees import _axes, _layouts, _tree

X = jax.ShapeDtypeStruct((3, 6), jnp.float32)


class Heads(nn.Module):
    """Heads first, as gemma has them."""

    @nn.compact
    def __call__(self, x, scale=1.0):
        q = self.param("q", nn.initializers.normal(), (2, 6, 4))
        out = self.param("out", nn.initializers.normal(), (2, 4, 6))
        return scale * jnp.einsum("tnh,nhd->td", jnp.einsum("td,ndh->tnh", x, q), out)


MODEL = Heads()
PARAMS = MODEL.init(jax.random.key(0), jnp.ones((3, 6)))["params"]
LORA = jlora.LoRA(rank=2, target=".")
KERNELS = jlora.LoRA(rank=1, target="kernel")


def letters(adapted):
    return {site.leaf.path: site.leaf.roles for site in adapted.frozen.plan.sites}


# --- a trace ---


@pytest.mark.parametrize(
    "how",
    [
        dict(fn=MODEL.apply, args=(X,)),
        dict(fn=MODEL.apply, args=({"params": PARAMS}, X)),
        dict(fn=MODEL.apply, args=({"params": PARAMS}, X), kwargs={"scale": 2.0}),
        dict(fn=lambda x, params: MODEL.apply({"params": params}, x), args=(X,), kwargs={"params": PARAMS}),
        dict(fn=lambda params: MODEL.apply({"params": params}, jnp.ones((3, 6)))),
    ],
    ids=["apply", "variables", "keywords", "params by name", "data closed over"],
)
def test_a_trace_tells_the_axes(how):
    """However the parameters stand in the call, a trace finds what the einsums say."""
    assert letters(jlora.adapt(PARAMS, LORA, **how)) == {"q": "oio", "out": "iio"}


def test_what_the_user_says_comes_first():
    """Letters given in axes= stand before a trace; the others are the trace's."""
    adapted = jlora.adapt(PARAMS, LORA, axes={"^q$": "sio"}, fn=MODEL.apply, args=(X,))
    assert letters(adapted) == {"q": "sio", "out": "iio"}


def test_args_without_a_function_are_refused():
    """args= alone would be ignored."""
    with pytest.raises(TypeError, match="fn="):
        jlora.adapt(PARAMS, LORA, args=(X,))


class Noisy(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        x = nn.BatchNorm(use_running_average=not train)(nn.Dense(4)(x))
        return nn.Dense(3)(nn.Dropout(0.5, deterministic=not train)(x))


FAILING = {
    "a collection is missing": (dict(args=(X,)), '"batch_stats": batch_stats}, x)'),
    "a key is missing": (dict(args=(X,), kwargs={"train": True, "mutable": ["batch_stats"]}), 'kwargs={"rngs": '),
    "no input": ({}, "write args=(x,)"),
    "the module for its apply": (dict(fn=Noisy(), args=(X,)), "the function is fn=model.apply"),
}


@pytest.mark.parametrize("name", FAILING)
def test_a_call_that_fails_while_it_is_traced(name):
    """In words: which call it was, what failed, what to write; the model's own error is the cause."""
    how, line = FAILING[name]
    variables = Noisy().init(jax.random.key(0), jnp.ones((3, 6)))
    params = variables if "key" in name else variables["params"]
    with pytest.raises(ValueError, match=r"the call fn\(.*failed with \w+: ") as caught:
        jlora.adapt(params, KERNELS, **{"fn": Noisy().apply, **how})
    assert line in str(caught.value) and "axes={pattern: letters}" in str(caught.value)
    assert type(caught.value.__cause__).__name__ in str(caught.value)


def test_the_lines_that_the_answer_gives_work():
    """Collections beside the parameters, keys and what is mutable."""
    variables = Noisy().init(jax.random.key(0), jnp.ones((3, 6)))
    kwargs = {"train": True, "rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    for params in (variables, variables["params"]):
        args = (X,) if params is variables else ({"params": params, "batch_stats": variables["batch_stats"]}, X)
        found = letters(jlora.adapt(params, KERNELS, fn=Noisy().apply, args=args, kwargs=kwargs))
        assert set(found.values()) == {"io"}


TRACES = {
    "looked up and tied": (
        lambda p, i: p["w"][i] @ p["w"].T, (jnp.ones((7, 4)),), jnp.zeros((2, 3), int), "io"
    ),
    "looked up by one-hot": (
        lambda p, i: jax.nn.one_hot(i, 7) @ p["w"] @ p["w"].T, (jnp.ones((7, 4)),), jnp.zeros((2, 3), int), "io"
    ),
    "scanned behind": (
        lambda p, x: jax.lax.scan(lambda h, w: (h @ w, None), x, jnp.moveaxis(p["w"], 1, 0))[0],
        (jnp.ones((4, 3, 4)),), jnp.ones((2, 4)), "iso",
    ),
    "remat and a custom rule": (
        lambda p, x: jax.checkpoint(_custom)(x, p["w"]), (jnp.ones((4, 5)),), jnp.ones((2, 4)), "io"
    ),
    "cast, scaled, masked": (
        lambda p, x: x @ (jnp.tril(jnp.ones((5, 4))) * p["w"].astype(jnp.bfloat16) / 3).T,
        (jnp.ones((5, 4)),), jnp.ones((2, 4)), "oi",
    ),
    "normalised": (
        lambda p, x: x @ (p["w"] / jnp.linalg.norm(p["w"], axis=0)), (jnp.ones((4, 5)),), jnp.ones((2, 4)), "io"
    ),
    "a window": (
        lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")),
        (jnp.ones((3, 4, 5)),), jnp.ones((1, 6, 4)), "kio",
    ),
    "experts": (
        lambda p, x: jax.lax.ragged_dot(x, p["w"], jnp.array([2, 4])), (jnp.ones((2, 4, 5)),), jnp.ones((6, 4)), "sio"
    ),
    "fused and split": (
        lambda p, x: sum(jnp.split(x @ p["w"].reshape(4, 6), 3, -1)), (jnp.ones((4, 3, 2)),), jnp.ones((2, 4)), "ioo"
    ),
    "an axis of the weight alone": (
        lambda p, x: jnp.einsum("bd,cdh->bh", x, p["w"]), (jnp.ones((3, 4, 5)),), jnp.ones((2, 4)), "iio"
    ),
    "positions added": (lambda p, x: x + p["w"], (jnp.ones((1, 6, 4)),), jnp.ones((2, 6, 4)), "ooo"),
    "turned": (lambda p, x: jnp.einsum("od,bd->bo", p["w"], x), (jnp.ones((5, 4)),), jnp.ones((2, 4)), "oi"),
}  # fmt: skip


@jax.custom_vjp
def _custom(x, w):
    return x @ w


_custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, res[0].T @ g))


@pytest.mark.parametrize("name", TRACES)
def test_infer_axes_sees_through(name):
    """Lookups before tied heads; scans, remat and custom rules; what is cast, scaled, normalised, fused or turned."""
    fn, (w,), x, right = TRACES[name]
    assert jlora.infer_axes(fn, {"w": w}, x) == {"^w$": right}


# --- nothing tells ---


def test_a_refusal_names_all_weights_and_the_lines_to_write():
    """All at once, layers folded, with letters to check and a pattern that takes them alone."""
    params = {"a": {"u": jnp.ones((3, 4, 5))}, "b": [{"v": jnp.ones((2, 4, 4))} for _ in range(3)]}
    with pytest.raises(ValueError, match="nothing here tells") as error:
        jlora.adapt(params, jlora.LoRA(rank=1, target="u|v"))
    text = str(error.value)
    assert "'a/u' of shape (3, 4, 5)" in text and "'b/{0-2}/v' (x3)" in text and "fn=model.apply, args=(x,)" in text
    written = eval(re.search(r"axes=(\{.*\})", text)[1])
    assert letters(jlora.adapt(params, jlora.LoRA(rank=1, target="u|v"), axes=written)).keys() == {
        "a/u", "b/0/v", "b/1/v", "b/2/v",
    }  # fmt: skip


@pytest.mark.parametrize("method", [jlora.Full, jlora.BitFit, functools.partial(jlora.IntrinsicDimension, 3)])
def test_methods_that_do_not_split_a_weight_do_not_ask(method):
    """A delta of the weight's own shape is the same whatever its axes are called."""
    assert len(jlora.adapt({"u": jnp.ones((3, 4, 5))}, method(target="u")).frozen.plan.sites) == 1


def test_quantize_asks_too():
    """Blocks run along the input: with nothing that tells it, they are refused."""
    with pytest.raises(ValueError, match=r"write fn=model.apply, args="):
        jlora.quantize({"u": jnp.ones((3, 64, 64))}, target="u")


def test_a_saved_adapter_keeps_its_letters(tmp_path):
    """What a trace found is in the file: load needs neither the function nor axes=."""
    adapted = jlora.adapt(PARAMS, LORA, fn=MODEL.apply, args=(X,))
    jlora.save(tmp_path / "a", adapted)
    assert letters(jlora.load(tmp_path / "a", PARAMS)) == {"q": "oio", "out": "iio"}


# --- a function contradicts ---


def dense(turned):
    return lambda p, x: x @ (p["dense"]["kernel"].T if turned else p["dense"]["kernel"])


@pytest.mark.parametrize("letters, turned", [("io", True), ("oi", False)])
def test_lift_and_explain_say_what_contradicts(letters, turned):
    """A weight whose every use turns its sides: a warning of `lift`, a line of `explain`, and the letters to write."""
    params = {"dense": {"kernel": jnp.ones((4, 4))}}
    adapted = jlora.adapt(params, jlora.LoRA(rank=1, target="kernel"), axes={"kernel": letters})
    right = letters[::-1]
    with pytest.warns(jlora.RolesWarning, match=re.escape(f"axes={{r'^dense/kernel$': '{right}'}}")):
        jlora.lift(dense(turned))(adapted, jnp.ones((2, 4)))
    report = jlora.explain(dense(turned), adapted, jnp.ones((2, 4)))
    assert report.roles == (("dense/kernel", (4, 4), letters, right),)
    assert f"'{right}' here, and was taken for '{letters}'" in str(report)
    assert jlora.explain(dense(not turned), adapted, jnp.ones((2, 4))).roles == ()


def test_a_stack_that_is_none_is_said():
    """Heads taken for a stack train once too many factors a head."""
    adapted = jlora.adapt(PARAMS, LORA, axes={"^q$": "sio", "^out$": "iio"})
    call = lambda params, x: MODEL.apply({"params": params}, x)
    assert jlora.explain(call, adapted, X).roles == (("q", (2, 6, 4), "sio", "oio"),)


HONEST = {
    "tied head alone": ("embedding", (7, 4), "io", lambda p, x: x @ p["embedding"].T, (2, 4)),
    "used both ways": ("w", (4, 4), "io", lambda p, x: (x @ p["w"]) @ p["w"].T, (2, 4)),
    "stack unrolled": ("w", (2, 4, 4), "sio", lambda p, x: x @ p["w"][0] @ p["w"][1], (2, 4)),
    "keys absorbed": ("w", (6, 2, 4), "ioo", lambda p, q: jnp.einsum("tnh,cnh->tnc", q, p["w"]), (3, 2, 4)),
    "all experts": ("experts", (3, 4, 5), "sio", lambda p, x: jnp.einsum("ti,eio->eto", x, p["experts"]), (2, 4)),
    "fused, indexed": ("w", (3, 4, 5), "oio", lambda p, x: x @ p["w"][0] + x @ p["w"][1] * (x @ p["w"][2]), (2, 4)),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_uses_are_not_contradictions(name):
    """Tied heads, scores, stacks unrolled by hand, experts that all see a token, fused kernels indexed: no warning."""
    leaf, shape, said, fn, x = HONEST[name]
    adapted = jlora.adapt({leaf: jnp.ones(shape)}, jlora.LoRA(rank=1, target=leaf), axes={f"^{leaf}$": said})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(jlora.lift(fn), adapted, jnp.ones(x))
    assert jlora.explain(fn, adapted, jnp.ones(x)).roles == ()


# --- transformers ---

SIZES = dict(
    vocab_size=99, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=36, head_dim=6,
    num_key_value_heads=2, embedding_size=20, n_embd=24, n_layer=2, n_head=4, n_positions=40, d_model=24, d_ff=36,
    d_kv=6, max_position_embeddings=40, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
    decoder_attention_heads=4, encoder_ffn_dim=36, decoder_ffn_dim=36, ffn_dim=36, num_layers=2, num_heads=4,
    num_decoder_layers=2, dim=24,
    n_heads=4, n_layers=2, hidden_dim=36, word_embed_proj_dim=24, attention_heads=4, image_size=16, patch_size=8,
    attention_type="original_full", rotary_dim=4, pad_token_id=1, bos_token_id=0, eos_token_id=2,
    max_source_positions=20, max_target_positions=20, num_mel_bins=10, decoder_start_token_id=1,
)  # fmt: skip
TINY = dict(vocab_size=99, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4, projection_dim=16)
OWN = {
    "gpt_neo": dict(attention_types=[[["global", "local"], 1]]),
    "clip": dict(
        text_config=TINY | dict(hidden_size=24, max_position_embeddings=20),
        vision_config=TINY | dict(hidden_size=20, image_size=16, patch_size=8),
    ),
    "resnet": dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2]),
    "regnet": dict(embedding_size=8, hidden_sizes=[16, 32], depths=[1, 2], groups_width=8),
    "wav2vec2": dict(
        conv_dim=(16, 16, 16), conv_kernel=(4, 3, 2), conv_stride=(2, 2, 2), num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2, do_stable_layer_norm=True, feat_extract_norm="layer",
    ),
}  # fmt: skip
FAMILIES = (
    "albert bart beit bert big_bird blenderbot blenderbot-small bloom clip dinov2 distilbert electra gemma gpt-sw3 "
    "gpt2 gpt_neo gptj llama longt5 marian mbart mistral mt5 opt pegasus regnet resnet roberta roberta-prelayernorm "
    "roformer t5 vit wav2vec2 whisper xglm xlm-roberta"
).split()
IMAGES = ("vit", "beit", "dinov2", "resnet", "regnet")


def inputs(name, config):
    """Shapes of a model's inputs."""
    ids, of = jax.ShapeDtypeStruct((1, 8), jnp.int32), lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)
    if name in IMAGES:
        return (of(1, 3, 16, 16),)
    first = {"clip": ids, "whisper": of(1, 10, 40), "wav2vec2": of(1, 200)}.get(name, ids)
    more = {"clip": (of(1, 3, 16, 16),)}.get(name, (ids,) if config.is_encoder_decoder else ())
    return (first, *more)


@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_families_are_right_by_their_trees_and_by_a_trace(name, monkeypatch):
    """For every Flax family of transformers, what the tree decides is what a trace of the model finds."""
    transformers = pytest.importorskip("transformers", reason="transformers<5 is not installed")
    auto = pytest.importorskip("transformers.models.auto.modeling_flax_auto", reason="transformers 5 has no Flax")
    clip = jnp.clip  # T5 calls it by the names that it had
    monkeypatch.setattr(jnp, "clip", lambda x, *a, a_min=None, a_max=None, **k: clip(x, *(a or (a_min, a_max)), **k))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Flax support ends with version 5
        make, had = transformers.CONFIG_MAPPING[name], transformers.CONFIG_MAPPING[name]()
        sizes = {k: v for k, v in SIZES.items() if hasattr(had, k) and name not in ("clip", "resnet", "regnet")}
        config = make(**sizes | OWN.get(name, {}))
        which = auto.FLAX_MODEL_MAPPING_NAMES[name]
        model = getattr(transformers, which if isinstance(which, str) else which[0])(config, _do_init=False)
        params = model.params_shape_tree

        def call(params, first, *more):
            if config.is_encoder_decoder:
                return model(first, decoder_input_ids=more[0], params=params).to_tuple()[0]
            return model(first, *more, params=params).to_tuple()

        traced = jlora.infer_axes(call, params, *inputs(name, config))
    tree = _tree.flatten(params)
    found = _layouts.decide({p: tuple(leaf.shape) for p, leaf in zip(tree.paths, tree.leaves, strict=True)})
    both = {p: (found[p], traced.get(f"^{re.escape(p)}$")) for p in tree.paths if len(found[p] or "..") > 1}
    wrong = {p: x for p, x in both.items() if None not in x and x[0] != x[1]}
    silent = [p for p, x in both.items() if x[0] is None and "weight_" not in p]  # a weight norm's parts are no kernels
    assert (wrong, silent) == ({}, []) and len(traced) >= 0.9 * len(both) > 0


@pytest.mark.parametrize(
    "module,letters",
    [
        pytest.param({"kernel": (2, 16, 16), "bias": (2, 16)}, "sio", id="a bias a layer"),
        pytest.param({"kernel": (4, 6, 4)}, "sio", id="heads that no step above excludes"),
        pytest.param({"kernel": (24, 6, 4)}, None, id="two readings"),
    ],
)
def test_a_step_that_says_stacked_outweighs_the_name_of_heads(module, letters):
    """Below `layers` a query alone is a layer of a scan, or is asked about: its name alone makes no heads of it."""
    params = {"layers": {"query": {name: jax.ShapeDtypeStruct(s, jnp.float32) for name, s in module.items()}}}
    adapt = lambda: jlora.adapt(params, jlora.LoRA(rank=1, target="kernel"))
    if letters is None:
        with pytest.raises(ValueError, match="asks which axes"):
            adapt()
    else:
        assert adapt().frozen.plan.sites[0].leaf.roles == letters


def test_what_wraps_apply_is_looked_through():
    """`jax.jit` and `functools.partial` of a module's apply take bare parameters as apply itself does."""
    model, x = nn.Sequential([nn.Dense(8)]), jnp.ones((2, 4))
    params = model.init(jax.random.key(0), x)["params"]
    for fn in (model.apply, jax.jit(model.apply), functools.partial(model.apply, mutable=False)):
        adapted = jlora.adapt(params, jlora.LoRA(rank=1, target="kernel"), fn=fn, args=(x,))
        assert [s.leaf.roles for s in adapted.frozen.plan.sites] == ["io"]


@pytest.mark.parametrize("turned", [False, True])
def test_a_transposed_convolution_without_a_bias_is_asked_about(turned):
    """Flax stores it (in, out) or (out, in), by a flag that the tree does not hold."""
    layer = nn.ConvTranspose(8, (3, 3), transpose_kernel=turned, use_bias=False)
    params = {"ConvTranspose_0": layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 4)))["params"]}
    with pytest.raises(ValueError, match="asks which axes"):
        jlora.adapt(params, jlora.IA3(target="kernel"))


def test_a_bias_of_three_axes_says_the_outputs():
    """DenseGeneral onto (3, heads, width) with its bias leaves one reading."""
    params = {"qkv": nn.DenseGeneral((3, 4, 4)).init(jax.random.key(0), jnp.ones((2, 16)))["params"]}
    adapted = jlora.adapt(params, jlora.LoRA(rank=1, target="kernel"))
    assert adapted.frozen.plan.sites[0].leaf.roles == "iooo"


def test_members_that_share_an_input_are_a_stack():
    """The first layer of an ensemble meets one input: a trace reads members as outputs, and the tree knows better."""

    class Member(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(nn.relu(nn.Dense(32)(x)))

    class Ensemble(nn.Module):
        @nn.compact
        def __call__(self, x):
            several = nn.vmap(Member, {"params": 0}, {"params": True}, in_axes=None, axis_size=2)
            return several()(x)

    model, x = Ensemble(), jnp.ones((4, 16))
    params = model.init(jax.random.key(0), x)["params"]
    for how in ({}, {"fn": model.apply, "args": (x,)}):
        adapted = jlora.adapt(params, jlora.LoRA(rank=1, target="kernel"), **how)
        assert {s.leaf.roles for s in adapted.frozen.plan.sites} == {"sio"}


@pytest.mark.parametrize("leaf", ["{}", "{}/kernel"])
def test_experts_that_all_see_one_activation_are_a_stack(leaf):
    """`td,edf->etf` alone looks like heads; the weight behind it, with one matrix each, tells."""
    up, down, q, out = (leaf.format(name) for name in ("up", "down", "query", "out"))
    flat = {up: jnp.ones((3, 4, 5)), down: jnp.ones((3, 5, 4)), q: jnp.ones((3, 4, 5)), out: jnp.ones((3, 5, 4))}
    params = flax.traverse_util.unflatten_dict(flat, sep="/")

    def model(params, x):
        p = flax.traverse_util.flatten_dict(params, sep="/")
        moe = jnp.einsum("etf,efd->etd", jax.nn.relu(jnp.einsum("td,edf->etf", x, p[up])), p[down])
        return moe.sum(0) + jnp.einsum("tnh,nhd->td", jnp.einsum("td,ndh->tnh", x, p[q]), p[out])

    adapted = jlora.adapt(params, LORA, fn=model, args=(jnp.ones((2, 4)),))
    assert letters(adapted) == {up: "sio", down: "sio", q: "oio", out: "iio"}
    jlora.lift(model)(adapted, jnp.ones((2, 4)))


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("norm", [True, False])
def test_a_scan_is_found_on_any_axis(axis, norm):
    """Layers in front, behind the input, or last: from the tree alone, and as the function uses them."""

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            h = nn.LayerNorm()(x) if norm else x
            return x + nn.Dense(12)(nn.relu(nn.Dense(20)(h))), None

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            axes, rngs = {"params": axis}, {"params": True}
            return nn.Dense(3)(nn.scan(Block, variable_axes=axes, split_rngs=rngs, length=5)()(x, None)[0])

    model, x = Model(), jnp.ones((2, 12))
    params = model.init(jax.random.key(0), x)["params"]
    adapted = jlora.adapt(params, KERNELS)
    stacked = {0: "sio", 1: "iso", -1: "ios"}[axis]
    assert [x for path, x in letters(adapted).items() if "Scan" in path] == [stacked, stacked]
    jlora.lift(lambda params, x: model.apply({"params": params}, x))(adapted, x)


@pytest.mark.parametrize("turned", [False, True])
def test_a_square_transposed_convolution_is_asked_about(turned):
    """Its bias fits both sides."""
    layer = nn.ConvTranspose(8, (3, 3), transpose_kernel=turned)
    params = {"ConvTranspose_0": layer.init(jax.random.key(0), jnp.ones((1, 4, 4, 8)))["params"]}
    with pytest.raises(ValueError, match="asks which axes"):
        jlora.adapt(params, jlora.IA3(target="kernel"))


@pytest.mark.parametrize(
    "layer,right",
    [
        (lambda r: nnx.Conv(3, 8, (3,), rngs=r), "kio"),
        (lambda r: nnx.Conv(3, 8, 3, use_bias=False, rngs=r), "kio"),
        (lambda r: nnx.Conv(8, 8, (1, 1), use_bias=False, rngs=r), "kkio"),
        (lambda r: nnx.ConvTranspose(8, 8, (3, 3), rngs=r), "kkio"),
        (lambda r: nnx.ConvTranspose(8, 8, (3, 3), transpose_kernel=True, rngs=r), "kkoi"),
        (lambda r: nnx.LinearGeneral((3, 4), (5,), axis=(-2, -1), use_bias=False, rngs=r), "iio"),
    ],
)
def test_the_class_of_an_nnx_layer_tells(layer, right):
    """What shapes leave open the layer's class knows, alone and inside another module."""
    one = layer(nnx.Rngs(0))
    assert letters(jlora.adapt(one, KERNELS)) == {"kernel": right}
    two = nnx.Sequential(one, nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    assert {right, "io"} == set(letters(jlora.adapt(two, KERNELS)).values())


def test_convolutions_without_a_bias_under_any_name():
    """Windows of 3 x 3 are convolutions, 1 x 1 beside them too; where a transposed one may stand, it is asked about."""
    params = {name: {"kernel": jnp.ones(shape)} for name, shape in [
        ("stem", (7, 7, 3, 8)), ("c1", (3, 3, 8, 8)), ("downsample", (1, 1, 8, 16)), ("shortcut", (2, 2, 8, 16)),
    ]}  # fmt: skip
    assert set(letters(jlora.adapt(params, LORA)).values()) == {"kkio"}
    with pytest.raises(ValueError, match="asks which axes"):
        jlora.adapt(params | {"up": {"kernel": jnp.ones((2, 2, 8, 4))}}, LORA)


def test_single_elements_say_nothing_of_axes():
    """`table[rows, columns]` picks along both axes: neither is an output, and nothing is contradicted."""
    params, at = {"embedding": jnp.ones((5, 4))}, jnp.array([0, 1])
    model = lambda params, at: params["embedding"][at, at]
    assert letters(jlora.adapt(params, LORA, fn=model, args=(at,))) == {"embedding": "io"}
    jlora.lift(model)(jlora.adapt(params, LORA), at)


@pytest.mark.parametrize(
    "path,shape,bias,right",
    [
        ("foo/kernel", (3, 4, 8), (8,), "kio"), ("foo/kernel", (3, 4, 8), (4, 8), "ioo"),
        ("foo/kernel", (30, 40, 8), (8,), "iio"), ("foo/kernel", (3, 4, 8), (3, 8), "sio"),
        ("foo/kernel", (5, 6), (5,), "oi"), ("query/kernel", (3, 4, 6), (4, 6), "ioo"),
    ],
)  # fmt: skip
def test_a_proposal_fits_the_bias_beside_it(path, shape, bias, right):
    """The line that a refusal proposes is one that the tree does not exclude."""
    assert _axes.guess(path, shape, bias) == right


def test_heads_with_a_bias_are_no_layers():
    """(heads, in, width) and a bias (heads, width), alone: asked about, and what a trace says where there is one."""
    params = {"attend": {"kernel": jnp.ones((3, 6, 4)), "bias": jnp.ones((3, 4))}}
    model = lambda p, x: jnp.einsum("td,ndh->tnh", x, p["attend"]["kernel"]) + p["attend"]["bias"]
    with pytest.raises(ValueError, match="asks which axes"):
        jlora.adapt(params, KERNELS)
    adapted = jlora.adapt(params, KERNELS, fn=model, args=(X,))
    assert letters(adapted) == {"attend/kernel": "oio"}
    jlora.lift(model)(adapted, jnp.ones((3, 6)))
