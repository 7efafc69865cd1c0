"""Trained and virtual tokens in peft's files: outputs of torch (`fixtures/peft_tokens/write.py`), what is refused."""

import functools
import json
import operator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import unflatten_dict
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import peft

pytestmark = pytest.mark.settled

FILES = Path(__file__).parent / "fixtures" / "peft_tokens"
MODELS = json.loads((FILES / "models.json").read_text())
CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@functools.cache
def model(name):
    """transformers' Flax model that torch had, and its parameters."""
    transformers = pytest.importorskip("transformers", reason="the models are transformers' own")
    made = MODELS[name]
    config = getattr(transformers, made["config"])(**made["options"])
    params = {tuple(k.split("/")): jnp.asarray(x) for k, x in load_file(FILES / f"{name}.safetensors").items()}
    return getattr(transformers, made["flax"])(config, _do_init=False), unflatten_dict(params)


def expected(case):
    return operator.itemgetter("ids", "mask", "logits")(load_file(FILES / case / "expected.safetensors"))


def tensors(folder):
    return load_file(folder / TENSORS)


# --- trained tokens -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["gpt2", "gpt2_lora", "llama", "llama_new"])
def test_trained_tokens_of_peft(case, tmp_path):
    """The logits are those of torch, a tied head's too; no other row has another bit; saved, it is the same file."""
    flax, params = model(case.split("_")[0])
    adapted = peft.load(FILES / case, params)
    ids, mask, want = expected(case)
    out = jax.jit(jlora.lift(lambda p: flax(ids, mask, params=p).logits))(adapted)
    real = mask == 1  # what stands at padding is no one's concern
    np.testing.assert_allclose(out[real], want[real][:, : out.shape[-1]], atol=1e-5)

    table, rows = load_file(FILES / f"{case.split('_')[0]}.safetensors"), tensors(FILES / case)
    (path,) = (p for p in table if p.endswith(("wte/embedding", "embed_tokens/embedding")))
    merged = np.asarray(functools.reduce(operator.getitem, path.split("/"), jlora.merge(adapted)))
    config = json.loads((FILES / case / CONFIG).read_text())
    chosen = config.get("token_indices") or config["trainable_token_indices"]
    others = np.setdiff1d(np.arange(len(table[path])), chosen)
    assert merged[others].tobytes() == table[path][others].tobytes()
    (found,) = (x for k, x in rows.items() if "trainable_tokens" in k and "lm_head" not in k)
    np.testing.assert_allclose(merged[chosen], found, atol=2e-7)  # a change in float32 has no more bits than the base

    peft.save(tmp_path / "x", adapted)
    again = tensors(tmp_path / "x")
    assert set(again) == {k for k in rows if "lm_head" not in k}
    for k, tensor in again.items():
        order = np.argsort(chosen) if "trainable_tokens" in k else slice(None)
        exact = "trainable_tokens" not in k or min(chosen) >= len(table[path])
        np.testing.assert_allclose(tensor, rows[k][order], atol=0 if exact else 2e-7)
    assert_same(peft.load(tmp_path / "x", params), adapted)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# --- virtual tokens -----------------------------------------------------------------------------------------------

P = 3


def turned_by_llama(keys, positions):
    """x R(j): pairs (i, i + d / 2) are turned by j 10000^(-2i / d)."""
    half = keys.shape[-1] // 2
    angle = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
    cos, sin, (x, y) = jnp.cos(angle), jnp.sin(angle), jnp.split(keys, 2, -1)
    return jnp.concatenate([x * cos - y * sin, y * cos + x * sin], -1)


VIRTUAL = {
    "gpt2_prompt": (jlora.PromptTuning(count=P), {"task_type": "CAUSAL_LM"}),
    "llama_encoder": (jlora.PromptTuning(count=P), {"task_type": "CAUSAL_LM"}),
    "bert_prompt": ([jlora.PromptTuning(count=P), jlora.Full(target="classifier")], {"task_type": "SEQ_CLS"}),
    "gpt2_prefix": (jlora.PrefixTuning(count=P), {"task_type": "CAUSAL_LM", "heads": 2}),
    "llama_prefix": (
        jlora.PrefixTuning(count=P), {"task_type": "CAUSAL_LM", "heads": 2, "rotate": turned_by_llama}),
    "bert_prefix": (
        [jlora.PrefixTuning(count=P), jlora.Full(target="classifier")], {"task_type": "SEQ_CLS", "heads": 2}),
}  # fmt: skip


@pytest.mark.parametrize("case", VIRTUAL)
def test_virtual_tokens_of_peft(case, tmp_path):
    """The logits are those of torch, under padding and grouped heads; the plan is `adapt`'s; saved, it is the file."""
    spec, said = VIRTUAL[case]
    rotate = {k: v for k, v in said.items() if k == "rotate"}
    flax, params = model(case.split("_")[0])
    adapted = peft.load(FILES / case, params, **rotate)
    assert adapted.frozen.plan.sites == jlora.adapt(params, spec).frozen.plan.sites
    ids, mask, want = expected(case)
    given = jlora.prompts.prepend(jlora.prompts.virtual_ids(adapted), ids, mask=mask, positions=np.arange(8)[None])
    if case == "bert_prefix":  # its first position is pooled, which is a token's to peft
        given = jax.tree.map(lambda x: jnp.roll(x, -P, 1), given)
    places = {"position_ids": jnp.broadcast_to(given.positions, given.ids.shape)}
    out = jax.jit(jlora.lift(lambda p: flax(given.ids, given.mask, params=p, **places).logits))(adapted)
    if want.ndim == 3:
        out, want = jlora.prompts.remove(out, P)[mask == 1], want[:, -8:][mask == 1]
    np.testing.assert_allclose(out, want, atol=1e-5)

    peft.save(tmp_path / "x", adapted, **said)
    mine, theirs = tensors(tmp_path / "x"), tensors(FILES / case)
    assert set(mine) == set(theirs)
    for k, tensor in theirs.items():  # turned there and back, and a change in float32, are not exact
        np.testing.assert_allclose(mine[k], tensor, atol=1e-6 if rotate else 2e-7 * (k != "prompt_embeddings"))
    written, read = (json.loads((f / CONFIG).read_text()) for f in (tmp_path / "x", FILES / case))
    if case != "llama_encoder":  # prompts without their network
        assert {k: v for k, v in written.items() if v != read[k]}.keys() <= {"modules_to_save", "prefix_projection"}
    again = peft.load(tmp_path / "x", params, **rotate)
    assert jax.tree.structure(again) == jax.tree.structure(adapted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6 if rotate else 0), again, adapted)


# --- what is refused ----------------------------------------------------------------------------------------------


RNG = np.random.default_rng(0)
V, D = 7, 4


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


TABLE = normal(V, D)
TREE = {
    "embed": {"embedding": jnp.asarray(TABLE)},
    "types": {"embedding": jnp.asarray(normal(3, D))},
    "head": {"kernel": jnp.asarray(normal(D, V))},
    "q": {"kernel": jnp.asarray(normal(D, 5))},
}
DELTA, IN_LORA = "trainable_tokens_delta", "token_adapter.trainable_tokens_delta"
PAIR = {"q.lora_A.weight": normal(2, D), "q.lora_B.weight": normal(5, 2)}


def folder_of(path, tensors, prefix="base_model.model.", **config):
    """A folder as peft writes it; keys without the prefix."""
    path.mkdir(exist_ok=True)
    save_file(
        {prefix * (k != "prompt_embeddings") + k: np.ascontiguousarray(v) for k, v in tensors.items()}, path / TENSORS
    )
    (path / CONFIG).write_text(json.dumps(config))
    return path


def trained_tokens(path, tensors, ids, **config):
    return folder_of(path, tensors, peft_type="TRAINABLE_TOKENS", token_indices=ids, **config)


def lora_with_tokens(path, tensors, ids, **config):
    return folder_of(path, PAIR | tensors, peft_type="LORA", r=2, lora_alpha=2, trainable_token_indices=ids, **config)


def test_a_table_that_was_resized_is_read_with_its_new_rows(tmp_path):
    """peft stores all of a table that it sees resized: rows behind the end that no one trained are new rows, too."""
    taller, rows = np.concatenate([TABLE, normal(3, D)]), normal(2, D)
    want = taller.copy()
    want[[8, 1]] = rows
    taller[1] = rows[1]  # as it is where an adapter was merged before it was saved
    for name, write in enumerate((trained_tokens, lora_with_tokens)):
        inner = "" if write is trained_tokens else "token_adapter."
        held = {
            f"{m}.{inner}{k}": x for m in ("embed", "tied") for k, x in ((DELTA, rows), ("base_layer.weight", taller))
        }
        adapted = peft.load(write(tmp_path / str(name), held, [8, 1]), TREE)
        np.testing.assert_allclose(jlora.merge(adapted)["embed"]["embedding"], want, atol=2e-7)
        assert jlora.merge(adapted)["embed"]["embedding"][7:].tobytes() == want[7:].tobytes()
        peft.save(tmp_path / f"{name} again", adapted)
        assert_same(peft.load(tmp_path / f"{name} again", TREE), adapted)


def test_sums_of_rows_are_written_as_what_they_make(tmp_path):
    """Changes of one row add up, in whichever order a sum has them, and are scaled as they are in the adapter."""
    both = jlora.Sum(jlora.NewTokens(count=1), jlora.TrainedTokens(ids=(5, 2)), target="embed/")
    adapted = jlora.adapt(TREE, jlora.Sum(both, jlora.TrainedTokens(ids=(2, 3)), target="embed/"))
    drawn = jax.tree.map(lambda x: jnp.asarray(normal(*x.shape)), adapted.trainable)
    adapted = jlora.scale(jlora.join(drawn, adapted.frozen), 0.5)
    peft.save(tmp_path / "x", adapted)
    want = jlora.merge(adapted)["embed"]["embedding"][jnp.array([2, 3, 5, 7])]
    np.testing.assert_allclose(tensors(tmp_path / "x")[f"base_model.model.embed.{DELTA}"], want, atol=3e-7)


def test_tables_of_a_lora_have_ids_of_their_own(tmp_path):
    """Two tables, each with its ids: trained, written and read by the ends of their names."""
    rows = {f"embed.{IN_LORA}": normal(2, D), f"types.{IN_LORA}": normal(1, D)}
    adapted = peft.load(lora_with_tokens(tmp_path / "x", rows, {"bed": [5, 0], "types": [2]}), TREE)
    merged = jlora.merge(adapted)
    np.testing.assert_allclose(merged["embed"]["embedding"][jnp.array([5, 0])], rows[f"embed.{IN_LORA}"], atol=2e-7)
    np.testing.assert_allclose(merged["types"]["embedding"][2:], rows[f"types.{IN_LORA}"], atol=2e-7)
    peft.save(tmp_path / "y", adapted)
    config = json.loads((tmp_path / "y" / CONFIG).read_text())
    assert config["trainable_token_indices"] == {"embed": [0, 5], "types": [2]}
    assert_same(peft.load(tmp_path / "y", TREE), adapted)


TWO = normal(2, D)
BAD_TOKENS = {
    "a gap behind the end": (trained_tokens, {f"embed.{DELTA}": TWO}, [1, 8], r"rows 0 to 6.*\[8\].*follow the end, 7"),
    "one row too few": (trained_tokens, {f"embed.{DELTA}": TWO}, [1, 2, 3], r"shape \(2, 4\), not \(3, 4\)"),
    "rows of a head": (trained_tokens, {f"head.{DELTA}": TWO}, [1, 2], "no table that is looked up"),
    "an unknown module": (
        trained_tokens, {f"embed.{DELTA}": TWO, f"x.{DELTA}": TWO + 1}, [1, 2], "'x' is not in params"),
    "no rows": (trained_tokens, {}, [1, 2], "missing the rows of any module"),
    "ids twice": (trained_tokens, {f"embed.{DELTA}": TWO}, [1, 1], r"token_indices has \[1\] twice"),
    "no ids": (trained_tokens, {f"embed.{DELTA}": TWO}, [], "token_indices is .*not a list of ids"),
    "another tensor": (trained_tokens, {f"embed.{DELTA}": TWO, **PAIR}, [1, 2], "q.lora_A.*no tensor of an adapter of"),
    "another table": (
        trained_tokens, {f"embed.{DELTA}": TWO, "embed.base_layer.weight": TABLE + 1}, [1, 2], "not those of params"),
    "a shorter table": (
        trained_tokens, {f"embed.{DELTA}": TWO, "embed.base_layer.weight": TABLE[:5]}, [1, 2],
        r"base_layer.weight' has shape \(5, 4\)"),
    "ids that say not which": (
        lora_with_tokens, {f"embed.{IN_LORA}": TWO}, {"types": [1, 2]},
        "missing the rows of 'types'.*does not say which"),
    "a table without rows": (
        lora_with_tokens, {"embed.token_adapter.base_layer.weight": TABLE}, None, "extra .*no row of it is trained"),
    "a head that was resized": (
        lora_with_tokens, {f"embed.{IN_LORA}": TWO, "head.weight": normal(V + 2, D)}, [1, 2],
        r"shape \(9, 4\), not \(7, 4\).*'head' was resized.*save_embedding_layers=False"),
    "unlike rows of a tied head": (
        lora_with_tokens, {f"embed.{IN_LORA}": TWO, f"tied.{IN_LORA}": TWO}, {"embed": [1, 2], "tied": [1, 3]},
        "'tied' is not in params"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_TOKENS)
def test_tokens_that_do_not_fit_are_refused(case, tmp_path):
    """What is missing, left over, misshapen or of another model is named, and nothing is left out in silence."""
    write, held, ids, words = BAD_TOKENS[case]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        peft.load(write(tmp_path / "x", held, ids), TREE)


def test_all_that_is_wrong_with_tokens_is_named_at_once(tmp_path):
    """Fields that are not known, and modules that do not fit, each in one error."""
    with pytest.raises(ValueError, match="(?s)a_new_field is 1.*token_indices is 'x'"):
        peft.load(trained_tokens(tmp_path / "x", {}, "x", a_new_field=1), TREE)
    with pytest.raises(
        ValueError, match="(?s)missing.*of 'types'.*'embed' has rows.*target_modules does not name.*'y'"
    ):
        held = {f"embed.{DELTA}": TWO, f"y.{DELTA}": TWO + 1}
        peft.load(trained_tokens(tmp_path / "y", held, [1, 2], target_modules=["types", "y"]), TREE)
    with pytest.raises(ValueError, match="'embed/embedding' is abstract"):
        peft.load(trained_tokens(tmp_path / "z", {f"embed.{DELTA}": TWO}, [1, 2]), jax.eval_shape(lambda: TREE))


REFUSED = {
    "unlike ids alone": (
        [jlora.TrainedTokens(ids=(1,), target="embed/"), jlora.TrainedTokens(ids=(2,), target="types")],
        "train unlike tokens; a file of tokens alone has one list"),
    "a bias beside them": (
        [jlora.TrainedTokens(ids=(1,), target="embed/"), jlora.Full(target="head")], "stand alone or beside one"),
    "a sum of others": (
        jlora.Sum(jlora.NewTokens(count=1), jlora.LoRA(rank=2), target="embed/"), "neither LoRA, .* nor tokens"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_tokens_that_peft_cannot_say_are_not_written(case, tmp_path):
    """An error says what of an adapter has no name in such a file, and nothing is written."""
    spec, words = REFUSED[case]
    adapted = jlora.adapt(TREE, spec, axes={"kernel": "io"})
    with pytest.raises(ValueError, match=words):
        peft.save(tmp_path / "x", adapted)
    assert not (tmp_path / "x").exists()


# --- prompts and prefixes -----------------------------------------------------------------------------------------

W = 6  # of keys and values, of two heads
KEPT = {"embed": {"embedding": jnp.asarray(TABLE)}, "positions": {"embedding": jnp.ones((9, D))}}


def decoder(layers=2, **more):
    """Layers apart, `h_0` and `h_1`, under a table of positions."""
    attention = lambda: {name: {"kernel": jnp.asarray(normal(D, W))} for name in ("key", "value")}
    return KEPT | {f"h_{n}": {"attention": attention()} for n in range(layers)} | more


def stacked(tree):
    """The same layers as one stack."""
    of_layers = [x for name, x in tree.items() if name.startswith("h_")]
    return KEPT | {"h": jax.tree.map(lambda *x: jnp.stack(x), *of_layers)}


PREFIX = {
    "peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": P, "token_dim": W, "num_layers": 2,
    "num_attention_heads": 2, "num_transformer_submodules": 1,
}  # fmt: skip
PROMPT = PREFIX | {"peft_type": "PROMPT_TUNING", "token_dim": D}
ROWS = normal(P, 4 * W)


@pytest.mark.parametrize("says", ["paths", "names", "a stack", "a stack by names", "a function"])
def test_layers_of_a_prefix_are_known_by_numbers_or_names(says, tmp_path):
    """Key and value of layer 0, of layer 1: in the order of the paths, of a stack, or as names have it."""
    depth = 11 if says == "paths" else 2  # behind layer 9 stands layer 10, and not behind layer 1
    tree, names, rows = decoder(depth), {}, normal(P, 2 * depth * W)
    paths = [tuple(f"h_{n}/attention/{x}/kernel" for x in ("key", "value")) for n in range(depth)]
    slots = [(path, ()) for pair in paths for path in pair]
    if "stack" in says:
        tree = stacked(tree)
        slots = [(f"h/attention/{x}/kernel", (n,)) for n in range(2) for x in ("key", "value")]
    if says == "a stack by names":
        names = {f"layers.{{n}}.{x}": f"h/attention/{x}/kernel" for x in ("key", "value")}
    if says == "names":  # keys are values and values keys
        names = {"layers.{n}.key": "h_{n}/attention/value/kernel", "layers.{n}.value": "h_{n}/attention/key/kernel"}
        slots = [(path, ()) for pair in paths for path in reversed(pair)]
    if says == "a function":

        def names(module):
            _, n, x = module.split(".") if "." in module else (module, "", "")
            return f"h_{n}/attention/{x}/kernel" if n else "embed/embedding"

    axes = {"kernel": "sio" if "stack" in says else "io"}
    folder = folder_of(tmp_path / "x", {"prompt_embeddings": rows}, **PREFIX | {"num_layers": depth})
    adapted = peft.load(folder, tree, names, axes=axes)
    for n, (path, index) in enumerate(slots):
        np.testing.assert_array_equal(adapted.trainable[path]["prompts"][index], rows[:, n * W : (n + 1) * W])
    peft.save(tmp_path / "y", adapted, None if callable(names) else names, task_type="CAUSAL_LM", heads=2)
    np.testing.assert_array_equal(tensors(tmp_path / "y")["prompt_embeddings"], rows)
    config = json.loads((tmp_path / "y" / CONFIG).read_text())
    assert {k: config[k] for k in PREFIX} == PREFIX | {"num_layers": depth}


def test_prompts_of_an_encoder_decoder_are_the_first_half(tmp_path):
    """peft stores as many again for a decoder, and gives the encoder the first alone."""
    two = PROMPT | {"num_transformer_submodules": 2, "task_type": "SEQ_2_SEQ_LM"}
    rows = normal(2 * P, D)
    adapted = peft.load(folder_of(tmp_path / "x", {"prompt_embeddings": rows}, **two), KEPT)
    np.testing.assert_array_equal(adapted.trainable["embed/embedding"]["rows"], rows[:P])


def test_keys_that_are_turned_in_part_are_turned_back(tmp_path):
    """Rotations of any form: here of two features of three, and scaled, as some long contexts are."""
    scale = 0.7

    def rotate(keys, positions):
        turn, rest = keys[..., :2], keys[..., 2:]
        return jnp.concatenate([turned_by_llama(turn, positions) * scale, rest], -1)

    tree = {k: x for k, x in decoder().items() if k != "positions"}
    folder = folder_of(tmp_path / "x", {"prompt_embeddings": ROWS}, **PREFIX)
    adapted = peft.load(folder, tree, axes={"kernel": "io"}, rotate=rotate)
    keys = ROWS[:, 2 * W : 3 * W].astype(float).reshape(P, 2, 3)
    j = np.arange(P)[:, None]
    x, y = keys[..., 0] / scale, keys[..., 1] / scale
    want = np.stack([x * np.cos(j) + y * np.sin(j), y * np.cos(j) - x * np.sin(j), keys[..., 2]], -1)
    np.testing.assert_allclose(adapted.trainable["h_1/attention/key/kernel"]["prompts"], want.reshape(P, W), atol=1e-5)
    np.testing.assert_array_equal(
        adapted.trainable["h_1/attention/value/kernel"]["prompts"], ROWS[:, 3 * W :], err_msg="values are not turned"
    )


NORMED = decoder(h_0={"attention": decoder()["h_0"]["attention"] | {"k_norm": {"scale": jnp.ones(3)}}})
ROTARY = {k: x for k, x in decoder().items() if k != "positions"}
BAD_VIRTUAL = {
    # tree, tensors, configuration, words
    "no tensor": (decoder(), {}, PREFIX, "missing 'prompt_embeddings'"),
    "another count": (
        decoder(), {"prompt_embeddings": ROWS[:2]}, PREFIX, r"shape \(2, 24\), and by num_virtual.*\(3, 24\)"),
    "another depth": (
        decoder(3), {"prompt_embeddings": ROWS}, PREFIX, "num_layers is 2, and params has .* of 3 layers"),
    "another width": (
        decoder(), {"prompt_embeddings": normal(P, 32)}, PREFIX | {"token_dim": 8},
        r"8 features of 'layers.0.key'.*makes 6"),
    "no rotation said": (ROTARY, {"prompt_embeddings": ROWS}, PREFIX, "no table of positions.*give rotate=f"),
    "norms of keys": (NORMED, {"prompt_embeddings": ROWS}, PREFIX, "h_0/attention/k_norm/scale.* norm keys"),
    "no layers to be told": (
        decoder(h_2={"attention": {"key": {"kernel": jnp.ones((D, W))}}}), {"prompt_embeddings": ROWS}, PREFIX,
        "cannot be told: names="),
    "no attention": (KEPT, {"prompt_embeddings": ROWS}, PREFIX, "no projections.*for a file of peft.*names="),
    "a decoder behind an encoder": (
        decoder(h_2={"cross_attention": {"key": {"kernel": jnp.ones((D, W))}}}), {"prompt_embeddings": ROWS}, PREFIX,
        "num_transformer_submodules: .*h_2/cross_attention/key/kernel"),
    "an encoder-decoder": (
        decoder(), {"prompt_embeddings": ROWS}, PREFIX | {"num_transformer_submodules": 2},
        "submodules is 2.*layer 2n"),
    "heads that do not divide": (
        decoder(), {"prompt_embeddings": ROWS}, PREFIX | {"num_attention_heads": 4}, "num_attention_heads 4 does not"),
    "fields": (
        decoder(), {"prompt_embeddings": ROWS}, PREFIX | {"a_new_field": 1, "num_layers": None},
        "a_new_field is 1.*num_layers is None"),
    "tensors left over": (
        decoder(), {"prompt_embeddings": ROWS, "x.lora_A": ROWS, "y.weight": ROWS}, PREFIX | {"num_layers": 3},
        r"shape.*x.lora_A.* no tensor of prompts.*'y' is not in params.*num_layers is 3"),
    "a module that is not saved": (
        decoder(), {"prompt_embeddings": ROWS, "h_0.attention.key.weight": normal(W, D)}, PREFIX,
        "trained by nothing"),
    "a module that is saved and not there": (
        decoder(), {"prompt_embeddings": ROWS}, PREFIX | {"modules_to_save": ["nothing", "h_1.attention"]},
        "missing the tensors of 'h_1.attention', which modules_to_save names"),
    "prompts of another width": (
        KEPT, {"prompt_embeddings": normal(P, 5)}, PROMPT | {"token_dim": 5},
        r"token_dim is 5, and 'embed/embedding'.*has 4"),
    "halves of no encoder-decoder": (
        KEPT, {"prompt_embeddings": normal(2 * P, D)}, PROMPT | {"num_transformer_submodules": 2},
        "SEQ_2_SEQ_LM alone"),
    "two tables": (
        KEPT | {"tokens": {"embedding": jnp.ones((5, D))}}, {"prompt_embeddings": normal(P, D)}, PROMPT,
        "names={'word_embeddings': path}"),
    "prompts of tasks": (
        KEPT, {}, PROMPT | {"peft_type": "MULTITASK_PROMPT_TUNING"}, "jlora reads LORA, TRAINABLE_TOKENS"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_VIRTUAL)
def test_virtual_tokens_that_do_not_fit_are_refused(case, tmp_path):
    """What cannot be said exactly, or is of another model, is refused by the field or the leaf that it is about."""
    tree, held, config, words = BAD_VIRTUAL[case]
    with pytest.raises(ValueError, match=f"(?s){words}"):
        peft.load(folder_of(tmp_path / "x", held, "base_model.", **config), tree, axes={"kernel": "io"})


@pytest.mark.parametrize(
    "rotate",
    [lambda keys, at: keys + 1, lambda keys, at: 0 * keys, lambda keys, at: keys[:, :1]],
    ids=["not linear", "not to be undone", "of another shape"],
)
def test_what_is_no_rotation_is_refused(rotate, tmp_path):
    """A function that adds, forgets or cuts turns no keys."""
    folder = folder_of(tmp_path / "x", {"prompt_embeddings": ROWS}, **PREFIX)
    with pytest.raises(ValueError, match="rotate="):
        peft.load(folder, decoder(), axes={"kernel": "io"}, rotate=rotate)


SAID = {"task_type": "CAUSAL_LM", "heads": 2}
NOT_WRITTEN = {
    "no task": (jlora.PromptTuning(count=2), {}, "task_type is None"),
    "no heads": (jlora.PrefixTuning(count=2), {"task_type": "CAUSAL_LM"}, "num_attention_heads.*give heads="),
    "heads that do not divide": (jlora.PrefixTuning(count=2), SAID | {"heads": 4}, "heads=4 does not divide"),
    "a LoRA beside": (
        [jlora.PromptTuning(count=2), jlora.LoRA(rank=2, target="h_0/attention/key")], SAID,
        "'h_0/attention/key/kernel': LoRA.*beside virtual tokens"),
    "a network": (jlora.PTuning(count=2, encoder="mlp"), SAID, r"prompts.encoded\(adapted\)"),
    "a network of a prefix": (jlora.PrefixTuning(count=2, encoder=(3, 3)), SAID, r"prompts.encoded\(adapted\)"),
    "some layers": (jlora.PrefixTuning(count=2, target="h_1"), SAID, "layer 0, has no prefix"),
    "layers that names leave out": (
        jlora.PrefixTuning(count=2),
        SAID | {"names": {f"layers.0.{x}": f"h_0/attention/{x}/kernel" for x in ("key", "value")}},
        "'h_1/attention/key/kernel', .*of no layer"),
    "places alone": (jlora.VirtualTokens(count=2, target="embed/"), SAID, r"PrefixTuning\(\.\.\.\)"),
    "prompts of images": (jlora.DeepPrompts(count=2, target="key"), SAID, r"PrefixTuning\(\.\.\.\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", NOT_WRITTEN)
def test_virtual_tokens_that_peft_cannot_say_are_not_written(case, tmp_path):
    """An error names the field of peft, or what to write instead, and nothing is written."""
    spec, said, words = NOT_WRITTEN[case]
    adapted = jlora.adapt(decoder(), spec, axes={"kernel": "io"})
    with pytest.raises(ValueError, match=f"(?s){words}"):
        peft.save(tmp_path / "x", adapted, **said)
    assert not (tmp_path / "x").exists()
