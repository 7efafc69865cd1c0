"""Llama in Flax NNX: grouped heads, rotary positions, RMSNorm, SwiGLU, tied embeddings, a key-value cache.

`read(file)` reads a GGUF, llama.cpp's format, and gives configuration, parameters and tokenizer:

    config, params, tokenizer = read(file)
    apply = function(config)
    logits, _ = apply(params, ids)  # (batch, length, vocabulary)

    logits, cache = apply(params, ids, empty_cache(config, batch, room))  # reads a beginning ...
    logits, cache = apply(params, token, cache)  # ... and goes on, token by token

The layers are one module whose parameters are stacked, `(layers, in, out)`, and run under `lax.scan`: thirty of them
compile as fast as one. Run as a program it continues a text, and knows nothing of adapters:

    python examples/llama.py MODEL.gguf "The capital of Germany is"
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a GGUF's header that matter here; the defaults are SmolLM2-135M's."""

    vocabulary: int = 49152
    width: int = 576
    layers: int = 30
    heads: int = 9
    groups: int = 3  # heads that share keys and values are a group
    inner: int = 1536
    context: int = 8192
    rope_base: float = 1e5
    epsilon: float = 1e-5

    @property
    def head(self) -> int:
        """The width of a head."""
        return self.width // self.heads


# --- the model ----------------------------------------------------------------------------------


def rotate(x, places, base):
    """Turns (x_j, x_{j + d/2}) by the angle place / base^(2j / d): x (batch, length, heads, d).

    Su et al, RoFormer, 2021, https://arxiv.org/abs/2104.09864; the halves are paired, as Llama's released weights want.
    """
    d = x.shape[-1]
    theta = places[:, None] * base ** (-2 * jnp.arange(d // 2, dtype=jnp.float32) / d)
    cos, sin = jnp.cos(theta)[:, None], jnp.sin(theta)[:, None]  # float32: bfloat16 has no place 257
    u, v = x[..., : d // 2], x[..., d // 2 :]
    return jnp.concatenate([u * cos - v * sin, u * sin + v * cos], -1).astype(x.dtype)


def linear(fan_in, fan_out, rngs):
    """A linear layer without a bias; it computes in the activation's dtype."""
    init = nnx.initializers.normal(fan_in**-0.5)
    return nnx.Linear(fan_in, fan_out, use_bias=False, kernel_init=init, rngs=rngs)


class Attention(nnx.Module):
    """softmax(q k' / sqrt(d)) v for every head; each group of heads has one k and one v."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        self.query = linear(c.width, c.heads * c.head, rngs)
        self.key = linear(c.width, c.groups * c.head, rngs)
        self.value = linear(c.width, c.groups * c.head, rngs)
        self.out = linear(c.heads * c.head, c.width, rngs)

    def __call__(self, x, places, cache):
        c = self.config
        split = lambda y: y.reshape(*y.shape[:2], -1, c.head)
        q = rotate(split(self.query(x)), places, c.rope_base)
        k = rotate(split(self.key(x)), places, c.rope_base)
        v = split(self.value(x))
        if cache is not None:  # (batch, room, groups, d): what was read before, and now this
            put = lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), places[0], 1)
            k, v = cache = put(cache[0], k), put(cache[1], v)
        past = jnp.arange(k.shape[1]) <= places[:, None]
        y = jax.nn.dot_product_attention(q, k.astype(q.dtype), v.astype(q.dtype), mask=past[None, None])
        return self.out(y.reshape(*y.shape[:2], -1)), cache


class Layer(nnx.Module):
    """Attention and a gated perceptron, each on a residual, normalised before."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = config
        norm = lambda: nnx.RMSNorm(c.width, epsilon=c.epsilon, rngs=rngs)
        self.norm_attention, self.norm_mlp = norm(), norm()
        self.attention = Attention(c, rngs=rngs)
        self.gate = linear(c.width, c.inner, rngs)
        self.up = linear(c.width, c.inner, rngs)
        self.down = linear(c.inner, c.width, rngs)

    def __call__(self, x, places, cache):
        y, cache = self.attention(self.norm_attention(x), places, cache)
        x = x + y
        y = self.norm_mlp(x)
        return x + self.down(nnx.silu(self.gate(y)) * self.up(y)), cache


class Llama(nnx.Module):
    """Logits (batch, length, vocabulary) of token ids (batch, length), and the cache after them."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        c = self.config = config
        init = nnx.initializers.normal(c.width**-0.5)
        self.embed = nnx.Embed(c.vocabulary, c.width, embedding_init=init, rngs=rngs)
        layers = nnx.split_rngs(splits=c.layers)(nnx.vmap(lambda rngs: Layer(c, rngs=rngs)))
        self.layers = layers(rngs)
        self.norm = nnx.RMSNorm(c.width, epsilon=c.epsilon, rngs=rngs)

    def __call__(self, ids, cache=None):
        start, past = (0, None) if cache is None else cache
        places = start + jnp.arange(ids.shape[1])
        graphdef, layers = nnx.split(self.layers)

        def layer(x, these):
            params, past = these
            return nnx.merge(graphdef, params)(x, places, past)

        x, past = jax.lax.scan(layer, self.embed(ids), (layers, past))
        logits = self.embed.attend(self.norm(x))
        return logits, None if cache is None else (start + ids.shape[1], past)


def function(config: Config):
    """`apply(params, ids, cache=None) -> (logits, cache)`; params is the state of a `Llama`."""
    graphdef, _ = nnx.split(abstract(config))
    return lambda params, ids, cache=None: nnx.merge(graphdef, params)(ids, cache)


def abstract(config: Config) -> Llama:
    """A `Llama` of shapes alone."""
    return nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0)))


def empty_cache(config: Config, batch: int, room: int, dtype=jnp.float32):
    """A cache without a token in it: how many it holds, and the keys and values of every layer."""
    shape = (config.layers, batch, room, config.groups, config.head)
    return jnp.int32(0), (jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))


def generate(apply, config: Config, params, ids, length: int, key=None, temperature=0.7):
    """Continues ids (batch, n) by `length` tokens, (batch, length): greedily, or drawn with a key. Pure: jit it."""
    keys = None if key is None else jax.random.split(key, length + 1)

    def choose(logits, key):
        last = logits[:, -1].astype(jnp.float32)
        return last.argmax(-1) if key is None else jax.random.categorical(key, last / temperature)

    def one(carry, key):
        cache, token = carry
        logits, cache = apply(params, token[:, None], cache)
        return (cache, choose(logits, key)), token

    logits, cache = apply(params, ids, empty_cache(config, len(ids), ids.shape[1] + length))
    first = choose(logits, None if keys is None else keys[-1])
    _, tokens = jax.lax.scan(one, (cache, first), None if keys is None else keys[:-1], length=length)
    return tokens.T


# --- GGUF: llama.cpp's file format --------------------------------------------------------------

# From the parameters above to the tensors of the file, where `blk.N.` stands for the layer.
NAMES = {
    "embed/embedding": "token_embd.weight",
    "norm/scale": "output_norm.weight",
    "layers/norm_attention/scale": "attn_norm.weight",
    "layers/norm_mlp/scale": "ffn_norm.weight",
    "layers/attention/query/kernel": "attn_q.weight",
    "layers/attention/key/kernel": "attn_k.weight",
    "layers/attention/value/kernel": "attn_v.weight",
    "layers/attention/out/kernel": "attn_output.weight",
    "layers/gate/kernel": "ffn_gate.weight",
    "layers/up/kernel": "ffn_up.weight",
    "layers/down/kernel": "ffn_down.weight",
}


def halves(weight, head: int):
    """Undoes llama.cpp's order of the rows of q and k: it pairs neighbours where `rotate` pairs halves."""
    out, width = weight.shape
    return weight.reshape(out // head, head // 2, 2, width).swapaxes(1, 2).reshape(out, width)


def read(file) -> tuple[Config, Any, Any]:
    """Configuration, float32 parameters (quantised tensors are dequantised) and tokenizer of a GGUF."""
    from gguf import GGUFReader, dequantize

    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} is no file")
    try:
        reader = GGUFReader(file)
    except (ValueError, IndexError) as error:  # cut short, or another kind of file
        raise ValueError(f"{file} is no GGUF that can be read: {error}") from error

    def field(name):
        if name not in reader.fields:
            raise ValueError(f"{file} has no {name} in its header")
        return reader.fields[name].contents()

    if field("general.architecture") != "llama":
        raise ValueError(f"{file} holds a {field('general.architecture')!r} model; this one is a 'llama'")
    config = Config(
        vocabulary=len(field("tokenizer.ggml.tokens")),
        width=field("llama.embedding_length"),
        layers=field("llama.block_count"),
        heads=field("llama.attention.head_count"),
        groups=field("llama.attention.head_count_kv"),
        inner=field("llama.feed_forward_length"),
        context=field("llama.context_length"),
        rope_base=field("llama.rope.freq_base"),
        epsilon=field("llama.attention.layer_norm_rms_epsilon"),
    )
    tensors, wrong = {tensor.name: tensor for tensor in reader.tensors}, []

    def tensor(name, shape):
        found = tensors.pop(name, None)
        if found is None:
            return wrong.append(f"{name} is missing")
        x = dequantize(found.data, found.tensor_type)
        if name.endswith(("attn_q.weight", "attn_k.weight")):
            x = halves(x, config.head)
        x = x if name.startswith("token_embd") else x.T  # a file holds (out, in)
        return x if x.shape == shape else wrong.append(f"{name} has the shape {x.T.shape}, not {shape[::-1]}")

    def fill(path, leaf):
        name = "/".join(str(key.key) for key in path if hasattr(key, "key"))
        if not name.startswith("layers"):
            return jnp.asarray(tensor(NAMES[name], leaf.shape))
        each = [tensor(f"blk.{n}.{NAMES[name]}", leaf.shape[1:]) for n in range(config.layers)]
        return jnp.asarray(np.stack([x for x in each if x is not None] or [np.nan]))

    params = jax.tree_util.tree_map_with_path(fill, nnx.state(abstract(config)))
    wrong += [f"{name} has no place in the model" for name in tensors]
    if wrong:
        raise ValueError(f"{file} does not fit its header:\n  " + "\n  ".join(wrong))
    return config, params, read_tokenizer(field)


def read_tokenizer(field):
    """The byte-level BPE of the file's header: SmolLM2's cuts numbers into digits first."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    kind = field("tokenizer.ggml.model"), field("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"this file's tokenizer is {kind}; only ('gpt2', 'smollm') is known here")
    words = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({word: n for n, word in enumerate(words)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    control = [word for word, kind in zip(words, field("tokenizer.ggml.token_type"), strict=True) if kind == 3]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    return tokenizer


def main(file: str, text: str, length: int = 32) -> None:
    """Prints a text and its greedy continuation."""
    try:
        config, params, tokenizer = read(file)
    except (ValueError, OSError) as error:
        raise SystemExit(f"llama: {error}") from error
    ids = jnp.array([tokenizer.encode(text).ids])
    tokens = jax.jit(lambda params: generate(function(config), config, params, ids, length))(params)
    print(text + tokenizer.decode(np.asarray(tokens[0])))


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python examples/llama.py MODEL.gguf TEXT")
    main(*sys.argv[1:])
