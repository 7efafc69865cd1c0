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
