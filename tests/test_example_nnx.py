"""The NNX example at a small size: it trains, merges and generates, and says the truth about it."""

import importlib.util
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jlora

pytestmark = pytest.mark.slow  # whole programs

STEPS, PRETRAIN_STEPS = 40, 60
SIZE = {"width": 32, "heads": 2, "depth": 2, "letters": 4, "batch": 16}


@pytest.fixture(scope="module")
def example():
    """`examples/nnx_decoder.py` as a module: the folder is no package."""
    path = Path(__file__).parents[1] / "examples" / "nnx_decoder.py"
    spec = importlib.util.spec_from_file_location("nnx_decoder", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["nnx_decoder"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["nnx_decoder"]


@pytest.fixture(scope="module")
def result(example):
    """What the example's `main` returns."""
    return example.main(STEPS, PRETRAIN_STEPS, **SIZE)


def bits(tree):
    """The arrays of a tree as bytes, so that -0.0 and NaN count as what they are."""
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def numbers(rest):
    """The leaves of `rest`, the keys of the dropout generators as the numbers they hold."""
    leaves = jax.tree.leaves(rest)
    is_key = [jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves]
    return [jax.random.key_data(x) if k else x for x, k in zip(leaves, is_key, strict=True)]


def test_loss_falls(result):
    """An adapter of the attention teaches the decoder the task that its base was not trained on."""
    assert result.loss_after < 0.8 * result.loss_before


def test_merged_equals_lifted(result):
    """The module with merged weights has the logits of the lifted one, to rounding."""
    assert result.merged_gap < 1e-5


def test_module_form_equals_split_form(result):
    """Factors trained beside `rest` fit the adapted module as they are: the paths are the same."""
    assert result.module_gap < 1e-5


def test_base_is_untouched(result):
    """Neither the frozen half nor the module that was adapted has one bit changed by the training."""
    assert bits(result.adapted.frozen.base) == bits(result.base_before)
    assert bits(nnx.state(result.model, nnx.Param)) == bits(result.base_before)


def test_cache_changes_no_text(result):
    """The lifted model generates the same text with a cache as without one."""
    assert result.same_text


def test_merged_module_is_plain(example, result):
    """The merged model is a Decoder like any other: it can be given a cache and called."""
    assert type(result.plain) is example.Decoder
    tokens = example.make_batch(jax.random.key(5), 3, SIZE["letters"], descending=True)
    whole = result.plain(tokens)
    model = nnx.clone(result.plain)
    model.init_cache(3)
    one_by_one = [model(tokens[:, t : t + 1], decode=True) for t in range(tokens.shape[1])]
    chex.assert_trees_all_close(jnp.concatenate(one_by_one, axis=1), whole, atol=1e-5)


def test_dropout_keys_advance(result):
    """Every step draws once for the attention and twice for the residuals of a block, in the base's
    training and in the adapter's: the lifted function hands the counters on."""
    for block in result.rest["blocks"].values():
        assert int(block["attention"]["rngs"]["count"][...]) == PRETRAIN_STEPS + STEPS
        assert int(block["dropout"]["rngs"]["count"][...]) == 2 * (PRETRAIN_STEPS + STEPS)


@pytest.mark.parametrize("decode", [False, True], ids=["train", "decode"])
def test_lifted_equals_dense(example, result, decode):
    """Outputs, new `rest` and, when training, gradients; with dropout, and with a cache."""
    model = nnx.clone(result.model)
    if decode:
        model.init_cache(3)
    graphdef, _, rest = example.split(model)
    tokens = example.make_batch(jax.random.key(6), 3, SIZE["letters"], descending=True)
    trainable, frozen = jlora.split(result.adapted)

    def forward(params, rest, tokens):
        tokens = tokens[:, :1] if decode else tokens
        return example.call(graphdef, params, rest, tokens, train=not decode, decode=decode)

    def loss(lifted):
        def value(trainable, frozen, rest):
            logits, rest = lifted(jlora.join(trainable, frozen), rest, tokens)
            return jnp.square(logits).sum(), (logits, rest)

        return jax.jit(jax.value_and_grad(value, has_aux=True))

    lifted, dense = loss(jlora.lift(forward)), loss(jlora.lift(forward, dense=True))
    (_, (logits, new_rest)), grads = lifted(trainable, frozen, rest)
    (_, (logits_d, new_rest_d)), grads_d = dense(trainable, frozen, rest)
    scale = float(jnp.abs(logits_d).max())
    chex.assert_trees_all_close(logits, logits_d, atol=1e-5 * scale, rtol=1e-5)
    scale = max(float(jnp.abs(g).max()) for g in jax.tree.leaves(grads_d))
    chex.assert_trees_all_close(grads, grads_d, atol=1e-5 * scale, rtol=1e-5)

    old, new, new_d = numbers(rest), numbers(new_rest), numbers(new_rest_d)
    chex.assert_trees_all_close(new, new_d, atol=1e-5, rtol=1e-5)
    assert any(not np.array_equal(a, b) for a, b in zip(old, new, strict=True))


def test_explain_finds_every_weight(example, result):
    """Four kernels a block, none made dense."""
    graphdef, _, rest = example.split(result.model)
    tokens = example.make_batch(jax.random.key(7), 3, SIZE["letters"], descending=True)
    report = jlora.explain(
        lambda params, rest, tokens: example.call(graphdef, params, rest, tokens, train=True),
        result.adapted,
        rest,
        tokens,
    )
    assert len({row.path for row in report.rows}) == 4 * SIZE["depth"]
    assert not report.dense and not report.unused


@pytest.fixture(scope="module")
def untrained(example):
    """`(forward, step, parameters, an empty cache)` of a small decoder with room for 14 tokens of 3 sequences."""
    model = example.Decoder(16, 2, 2, 14, rngs=nnx.Rngs(0))
    graphdef, params, rest = example.split(model)
    model.init_cache(3)
    cached, _, empty = example.split(model)
    forward = lambda params, tokens: example.call(graphdef, params, rest, tokens)[0]
    step = lambda params, cache, token: example.call(cached, params, cache, token, decode=True)
    return forward, step, params, empty


def away(adapted):
    """The same adapter with noise on each trained factor."""
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    noisy = [x + 0.3 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
    return jlora.join(jax.tree.unflatten(treedef, noisy), adapted.frozen)


VIRTUAL = {
    "prompt": jlora.PromptTuning(count=3),
    "prefix and more": [jlora.PrefixTuning(count=3), jlora.Houlsby(2), jlora.LoRA(rank=2)],
}


@pytest.mark.parametrize("name", VIRTUAL)
def test_virtual_tokens_are_in_the_cache(example, untrained, name):
    """Given once, in front of the first token: logits token by token are those of the whole sequence."""
    forward, step, params, cache = untrained
    adapted = away(jlora.adapt(params, VIRTUAL[name]))
    assert not any(path.startswith("place/") for path in adapted.trainable)
    tokens = example.make_batch(jax.random.key(8), 3, 5, descending=True)
    ids = jlora.prompts.prepend(jlora.prompts.virtual_ids(adapted), tokens, longest=14).ids
    whole, step = jax.jit(jlora.lift(forward))(adapted, ids), jax.jit(jlora.lift(step))
    found = []
    for t in range(ids.shape[1]):
        logits, cache = step(adapted, cache, ids[:, t : t + 1])
        found.append(logits)
    chex.assert_trees_all_close(jnp.concatenate(found, 1), whole, rtol=1e-5, atol=1e-5)
    assert jnp.abs(whole[:, 3:] - forward(params, tokens)).max() > 0.1


ACTIVATED = {
    "lora": [jlora.LoRA(rank=2, target="kernel$")],
    "vera": [jlora.VeRA(rank=3, target="attention/.*kernel$")],
    "loha": [jlora.LoHa(rank=2, target="kernel$")],
    "lokr and houlsby": [jlora.LoKr(rank=2, target="attention/.*kernel$"), jlora.Houlsby(2)],
}


@pytest.mark.parametrize("name", ACTIVATED)
def test_an_activated_adapter_goes_on_from_the_cache_of_the_base(untrained, name):
    """The base reads what all rows have before their invocation; the adapter goes on, as if it had read the whole."""
    forward, step, params, cache = untrained
    adapted = away(jlora.adapt(params, [jlora.Gated(method) for method in ACTIVATED[name]]))
    tokens = jnp.array([[1, 2, 3, 4, 5, 6, 7, 8], [1, 5, 6, 3, 5, 5, 6, 2], [6, 5, 2, 4, 5, 7, 6, 1]])
    gate = jlora.invoked(tokens, [5, 6])
    np.testing.assert_array_equal(gate.sum(1), [4, 3, 0])
    want = jax.jit(jlora.lift(forward))(jlora.with_gates(adapted, active=gate), tokens)

    base, found = jax.jit(step), []
    for t in range(4):
        logits, cache = base(params, cache, tokens[:, t : t + 1])
        found.append(logits)
    on = jax.jit(lambda gate, cache, token: jlora.lift(step)(jlora.with_gates(adapted, active=gate), cache, token))
    for t in range(4, 8):
        logits, cache = on(gate[:, t : t + 1], cache, tokens[:, t : t + 1])
        found.append(logits)
    chex.assert_trees_all_close(jnp.concatenate(found, 1), want, rtol=1e-5, atol=1e-5)
    moved = jnp.abs(want - forward(params, tokens)).max(-1) > 1e-3
    np.testing.assert_array_equal(moved, gate > 0)
