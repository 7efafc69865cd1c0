"""Adapters, prompts and prefixes on the Flax models of transformers: trained, decoded with a cache, written by hand."""

import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import prompts, targets
from zoo._case import fill

transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
if not hasattr(transformers, "FlaxPreTrainedModel"):
    pytest.skip("transformers 5 has no Flax", allow_module_level=True)

P, V, D = 3, 40, 16
IDS = jnp.asarray(np.random.default_rng(0).integers(3, V, (2, 6)))
TEXT = dict(
    vocab_size=V, hidden_size=D, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4,
    max_position_embeddings=32,
)  # fmt: skip
GPT2 = dict(vocab_size=V, n_embd=D, n_layer=1, n_head=2, n_positions=32)
T5 = dict(
    vocab_size=V, d_model=D, d_kv=4, d_ff=24, num_layers=1, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0, relative_attention_num_buckets=8, relative_attention_max_distance=12,
)  # fmt: skip
MODELS = {
    "bert": ("BertForMaskedLM", "Bert", TEXT),
    "gpt2": ("GPT2LMHeadModel", "GPT2", GPT2),
    "llama": ("LlamaForCausalLM", "Llama", dict(TEXT, num_key_value_heads=2)),
    "t5": ("T5ForConditionalGeneration", "T5", T5),
}
SPECS = {
    "houlsby": jlora.Houlsby(4),
    "pfeiffer": jlora.Pfeiffer(4),
    "parallel": jlora.Parallel(4),
    "prompt": jlora.PromptTuning(count=P),
    "prefix": jlora.PrefixTuning(count=P),
}


@pytest.fixture(autouse=True)
def clip(monkeypatch):
    """T5 calls `jnp.clip` by the names that it had."""
    now = jnp.clip
    monkeypatch.setattr(jnp, "clip", lambda x, *a, a_min=None, a_max=None, **k: now(x, *(a or (a_min, a_max)), **k))


def client(name, config, options):
    """A model without values, and parameters for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Flax support ends with version 5
        make = getattr(transformers, f"Flax{name}")
        model = make(getattr(transformers, f"{config}Config")(**options), _do_init=False)
    return model, fill(model.params_shape_tree)


def away(adapted, by=0.5):
    """The same adapter with noise on each trained factor."""
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    noisy = [x + by * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
    return jlora.join(jax.tree.unflatten(treedef, noisy), adapted.frozen)


def virtual(adapted):
    """The virtual ids of an adapter; none of one without."""
    return prompts.virtual_ids(adapted) if any(s.recipe.rows for s in adapted.frozen.plan.sites) else range(0)


def lowered(loss, adapted, steps=25, rate=5e-2):
    """By what part a loss of an adapter falls in some steps."""
    trainable, frozen = jlora.split(adapted)
    tx = optax.adam(rate)

    @jax.jit
    def step(trainable, state):
        value, grads = jax.value_and_grad(lambda t: loss(jlora.join(t, frozen)))(trainable)
        updates, state = tx.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    state, losses = tx.init(trainable), []
    for _ in range(steps):
        trainable, state, value = step(trainable, state)
        losses.append(float(value))
    return 1 - losses[-1] / losses[0]


# adapters on the other models: test_bottleneck.py
TRAINED = [(m, s) for m in MODELS for s in SPECS if m == "t5" or s in ("prompt", "prefix")]


@pytest.mark.parametrize("name,spec", TRAINED)
def test_training_lowers_a_loss(name, spec):
    """By a tenth at least in 25 steps, through the call that its users write."""
    model, params = client(*MODELS[name])
    adapted = jlora.adapt(params, SPECS[spec])
    mask = jnp.ones_like(IDS).at[1, 4:].set(0)
    given = prompts.prepend(virtual(adapted), IDS, mask=mask, labels=jnp.where(mask, IDS, -100))
    more = {"decoder_input_ids": given.ids} if name == "t5" else {}
    call = jlora.lift(lambda p: model(given.ids, attention_mask=given.mask, params=p, **more).logits)

    def loss(adapted):
        logits, labels = call(adapted), given.labels
        if name != "bert":
            logits, labels = logits[:, :-1], labels[:, 1:]
        each = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
        return jnp.mean(each, where=labels >= 0)

    assert lowered(loss, adapted) > 0.1


# Generation ----------------------------------------------------------------------------------

GENERATED = {"prompt": SPECS["prompt"], "prefix and houlsby": [SPECS["prefix"], SPECS["houlsby"]]}


@pytest.mark.slow
@pytest.mark.parametrize("spec", GENERATED)
@pytest.mark.parametrize("name", ["gpt2", "llama", "t5"])
def test_generation_with_a_cache_is_generation_without(name, spec):
    """`generate`, the virtual ids given once: each token is the likeliest behind all before it, read whole."""
    kind, config, options = MODELS[name]
    model, params = client(kind, config, dict(options, tie_word_embeddings=False))
    params = jax.tree.map(lambda x: 2 * x, params)  # a model that repeats one token would show nothing
    start = jlora.adapt(params, GENERATED[spec])
    adapted, new = away(start), 6
    mask = jnp.ones_like(IDS).at[1, :2].set(0)
    given = prompts.prepend(virtual(adapted), IDS, mask=mask)
    settings = dict(do_sample=False, pad_token_id=1, eos_token_id=V + 100)
    if name == "t5":
        begun = prompts.prepend(virtual(adapted), jnp.zeros((2, 1), jnp.int32)).ids
        settings |= dict(decoder_input_ids=begun)
    else:
        begun = given.ids
    length = begun.shape[1] + new
    write = lambda p: model.generate(given.ids, attention_mask=given.mask, params=p, max_length=length, **settings)
    tokens = jax.jit(jlora.lift(lambda p: write(p).sequences))(adapted)

    def read(p, tokens):
        if name == "t5":
            return model(given.ids, attention_mask=given.mask, decoder_input_ids=tokens, params=p).logits
        whole = jnp.concatenate([given.mask, jnp.ones((2, new), int)], 1)
        places = jnp.maximum(jnp.cumsum(whole, 1) - 1, 0)
        return model(tokens, attention_mask=whole, position_ids=places, params=p).logits

    whole = jax.jit(jlora.lift(read))
    likeliest = lambda adapted: whole(adapted, tokens)[:, -new - 1 : -1].argmax(-1)
    np.testing.assert_array_equal(tokens[:, :-new], begun)
    np.testing.assert_array_equal(tokens[:, -new:], likeliest(adapted))
    assert (tokens[:, -new:] != likeliest(start)).any()
    assert len(set(tokens[:, -new:].ravel().tolist())) > 2


# T5 in float64 -------------------------------------------------------------------------------


def bucket(distance, both):
    """The number of a bias by how far a key is behind a query: near ones exactly, then by logarithms, up to 12."""
    count, side = (4, np.where(distance > 0, 4, 0)) if both else (8, 0)
    far = np.abs(distance) if both else np.maximum(-distance, 0)
    exact = count // 2
    grown = exact + np.log(np.maximum(far, 1) / exact) / np.log(12 / exact) * (count - exact)
    return side + np.where(far < exact, far, np.minimum(grown, count - 1)).astype(int)


def attention(p, x, memory, bias, prefix):
    """Attention to `memory`, with the first P keys and values those of the prefix where there is one."""
    heads = lambda y: y.reshape(*y.shape[:2], 4, 4)
    k, v = (memory @ p[name]["kernel"] for name in "kv")
    if prefix is not None:
        k[:, :P], v[:, :P] = prefix
    scores = np.einsum("bqnh,bknh->bnqk", heads(x @ p["q"]["kernel"]), heads(k)) + bias
    share = np.exp(scores - scores.max(-1, keepdims=True))
    made = np.einsum("bnqk,bknh->bqnh", share / share.sum(-1, keepdims=True), heads(v))
    return made.reshape(x.shape) @ p["o"]["kernel"]


def layers(p, x, seen, prefix, memory=None, there=None):
    """An encoder, or a decoder where there is a memory: pre-norm, relative positions of the first layer in all."""
    norm = lambda x, p: x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * p["layer_norm"]["weight"]
    masked = lambda seen: np.where(np.asarray(seen)[:, None, None, :], 0, -1e30)
    distance = np.arange(x.shape[1]) - np.arange(x.shape[1])[:, None]
    table = p["block"]["0"]["layer"]["0"]["SelfAttention"]["relative_attention_bias"]["embedding"]
    bias = table[bucket(distance, memory is None)].transpose(2, 0, 1) + masked(seen)
    if memory is not None:
        bias = bias + np.where(distance > 0, -1e30, 0)
    for n, block in p["block"].items():
        first, *across, last = block["layer"].values()
        h = norm(x, first)
        x = x + attention(first["SelfAttention"], h, h, bias, prefix(f"block/{n}/layer/0"))
        for layer in across:
            its = layer["EncDecAttention"]
            x = x + attention(its, norm(x, layer), memory, masked(there), prefix(f"block/{n}/layer/1"))
        inner, h = last["DenseReluDense"], norm(x, last)
        x = x + np.maximum(h @ inner["wi"]["kernel"], 0) @ inner["wo"]["kernel"]
    return norm(x, {"layer_norm": p["final_layer_norm"]})


CROSS = ("seen", "masked", "its own prefix")


@pytest.mark.slow
@pytest.mark.parametrize("cross", CROSS)
def test_a_prefix_of_t5_is_keys_and_values_at_the_first_places(cross):
    """In the encoder and the decoder, with relative positions that count it; cross-attention as the docs say."""
    model, params = client("T5ForConditionalGeneration", "T5", dict(T5, num_layers=2))
    both = [targets.keys_and_values, r"EncDecAttention/[kv]/"]
    spec = jlora.PrefixTuning(count=P, **({"target": both} if cross == "its own prefix" else {}))
    adapted = away(jlora.adapt(params, spec))
    mask = jnp.ones_like(IDS).at[1, 4:].set(0)
    given = prompts.prepend(virtual(adapted), IDS, mask=mask)
    written = prompts.prepend(virtual(adapted), IDS[::-1, :4]).ids
    there = given.mask.at[:, :P].set(0) if cross == "masked" else given.mask

    def run(p):
        memory = model.encode(given.ids, attention_mask=given.mask, params=p)
        return model.decode(written, memory, encoder_attention_mask=there, params=p).logits

    def whole(p):  # what users call, with one mask for both
        return model(given.ids, attention_mask=given.mask, decoder_input_ids=written, params=p).logits

    found = jax.jit(jlora.lift(run))(adapted)
    if cross == "seen":
        np.testing.assert_allclose(jax.jit(jlora.lift(whole))(adapted), found, rtol=1e-5, atol=1e-5)

    wide = lambda tree: jax.tree.map(lambda x: np.asarray(x, np.float64), tree)
    p, trained = wide(params), wide(adapted.trainable)
    table = np.pad(p["shared"]["embedding"], ((0, P), (0, 0)))  # virtual tokens begin as zeros

    def prefix(stack):
        def at(path):
            rows = [f["prompts"] for name, f in sorted(trained.items()) if name.startswith(f"{stack}/{path}/")]
            return rows or None

        return at

    memory = layers(p["encoder"], table[given.ids], given.mask, prefix("encoder"))
    ones = np.ones(written.shape)
    y = layers(p["decoder"], table[written], ones, prefix("decoder"), memory, there)
    want = y * D**-0.5 @ p["shared"]["embedding"].T
    np.testing.assert_allclose(found[:, P:], want[:, P:], rtol=2e-4, atol=2e-5)


# Models that read their first position, and images -------------------------------------------


def test_a_prefix_behind_the_first_token_leaves_a_pooler_its_token():
    """BERT's classifier reads position 0: with `at=1` it is attention from there, P_K and P_V among the others."""
    model, params = client("BertForSequenceClassification", "Bert", TEXT)
    adapted = away(jlora.adapt(params, SPECS["prefix"]))
    mask = jnp.ones_like(IDS).at[1, 4:].set(0)
    given = prompts.prepend(virtual(adapted), IDS, mask=mask, positions=jnp.arange(6)[None], at=1)
    np.testing.assert_array_equal(given.ids[:, :5], [[row[0], V, V + 1, V + 2, row[1]] for row in np.asarray(IDS)])
    np.testing.assert_array_equal(given.positions, np.arange(6 + P)[None])
    np.testing.assert_array_equal(prompts.remove(given.ids, P, at=1), IDS)
    call = jlora.lift(lambda p: model(given.ids, attention_mask=given.mask, params=p).logits)

    def before(call, args, kwargs, context):
        y = call(*args, **kwargs)
        if context.module.name not in ("key", "value") or context.method_name != "__call__":
            return y
        rows = adapted.trainable["/".join((*context.module.path, "bias"))]["prompts"]
        return jnp.concatenate([jnp.broadcast_to(rows, (2, P, D)), y], 1)

    @jax.jit
    def written_out(params):
        longer = jnp.concatenate([jnp.ones((2, P), int), mask], 1)
        places = jnp.broadcast_to(jnp.array([0, 4, 5, 6, 7, 8]), IDS.shape)
        with nn.intercept_methods(before):
            return model(IDS, attention_mask=longer, position_ids=places, params=params).logits

    np.testing.assert_allclose(jax.jit(call)(adapted), written_out(params), rtol=1e-5, atol=1e-5)


IMAGES = {
    "shallow": [jlora.Full(target="^prompts$")],
    "deep": [jlora.Full(target="^prompts$"), jlora.DeepPrompts(count=P, target=r"layernorm_before/bias$", first=1)],
    "prefix": [jlora.DeepPrompts(count=P, target=r"attention/(key|value)/bias$", first=1)],
}


@pytest.mark.parametrize("spec", IMAGES)
def test_visual_prompts_of_a_model_that_is_not_edited(spec):
    """Prompts go among the patches of a ViT as its embeddings leave them, by Flax's own hook; a loss falls."""
    options = dict(image_size=12, patch_size=4, num_channels=3, num_labels=3, num_hidden_layers=2)
    sizes = {name: TEXT[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads")}
    model, params = client("ViTForImageClassification", "ViT", sizes | options)
    images = jnp.asarray(np.random.default_rng(0).standard_normal((4, 3, 12, 12)), jnp.float32)

    def fn(params, images):
        rest = {name: x for name, x in params.items() if name != "prompts"}

        def among(call, args, kwargs, context):
            y, met = call(*args, **kwargs), (context.module.name, context.method_name)
            return prompts.insert(y, params["prompts"]) if met == ("embeddings", "__call__") else y

        with nn.intercept_methods(among):
            return model(images, params=rest).logits

    adapted = jlora.adapt(params | {"prompts": jnp.ones((P, D))}, IMAGES[spec])
    call, labels = jlora.lift(fn), jnp.array([0, 1, 2, 1])
    loss = lambda a: optax.softmax_cross_entropy_with_integer_labels(call(a, images), labels).mean()
    assert lowered(loss, adapted) > 0.1
