"""BERT in Flax Linen: embeddings, encoder, the mean of the hidden states, a linear head.

`Config.read(folder)` reads a `config.json`, `load(folder, config)` a `model.safetensors` in the layout
that PyTorch checkpoints have, and the model is used as any Linen model is:

    config = Config.read(folder)
    logits = Bert(config).apply({"params": load(folder, config)}, ids, mask)

Run as a program it is the whole of inference, and knows nothing of how the weights were trained:

    python examples/bert.py MODEL TOKENS.npz LOGITS.npy
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of a `config.json` that matter here, and the number of labels of the head."""

    vocab_size: int = 30522
    hidden_size: int = 384
    num_hidden_layers: int = 6
    num_attention_heads: int = 12
    intermediate_size: int = 1536
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    num_labels: int = 2

    @classmethod
    def read(cls, folder, **changes) -> "Config":
        """The configuration in `folder/config.json`, with some fields changed."""
        file = Path(folder) / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is no BERT checkpoint: it has no config.json")
        raw = json.loads(file.read_text())
        if raw.get("model_type", "bert") != "bert":
            raise ValueError(f"{file} describes a {raw['model_type']!r} model; this one is a BERT")
        if raw.get("position_embedding_type", "absolute") != "absolute":
            raise ValueError(f"{file}: only absolute position embeddings are known here")
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**({k: v for k, v in raw.items() if k in names} | changes))


ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_new": nn.gelu,
    "relu": nn.relu,
}


class Embeddings(nn.Module):
    """Word + position + token type, normalised."""

    config: Config

    @nn.compact
    def __call__(self, ids, types, deterministic):
        c = self.config
        init = nn.initializers.normal(0.02)
        embed = lambda n, name: nn.Embed(n, c.hidden_size, embedding_init=init, name=name)
        x = embed(c.vocab_size, "word_embeddings")(ids)
        x += embed(c.max_position_embeddings, "position_embeddings")(jnp.arange(ids.shape[-1]))
        x += embed(c.type_vocab_size, "token_type_embeddings")(types)
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, name="LayerNorm")(x)
        return nn.Dropout(c.hidden_dropout_prob)(x, deterministic)


class Attention(nn.Module):
    """softmax(q k' / sqrt(d)) v, for every head, and the output projection."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, deterministic):
        c = self.config
        B, T, D = x.shape
        H = c.num_attention_heads
        heads = lambda name: dense(D, name)(x).reshape(B, T, H, D // H)
        q, k, v = heads("query"), heads("key"), heads("value")
        a = jnp.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D // H)
        a = jnp.where(mask[:, None, None, :], a, jnp.finfo(a.dtype).min)
        a = nn.Dropout(c.attention_probs_dropout_prob)(nn.softmax(a), deterministic)
        y = jnp.einsum("bhts,bshd->bthd", a, v).reshape(B, T, D)
        return dense(D, "output")(y)


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each added to its input and normalised after."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, deterministic):
        c = self.config
        drop = lambda y: nn.Dropout(c.hidden_dropout_prob)(y, deterministic)
        y = Attention(c, name="attention")(x, mask, deterministic)
        x = nn.LayerNorm(epsilon=c.layer_norm_eps, name="attention_norm")(x + drop(y))
        y = dense(c.intermediate_size, "intermediate")(x)
        y = dense(c.hidden_size, "output")(ACTIVATIONS[c.hidden_act](y))
        return nn.LayerNorm(epsilon=c.layer_norm_eps, name="output_norm")(x + drop(y))


class Encoder(nn.Module):
    """The layers, one after the other."""

    config: Config

    @nn.compact
    def __call__(self, x, mask, deterministic):
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, mask, deterministic)
        return x


class Bert(nn.Module):
    """Logits (batch, num_labels) of token ids (batch, length); `mask` is false on the padding."""

    config: Config

    @nn.compact
    def __call__(self, ids, mask, types=None, deterministic=True):
        c = self.config
        mask = mask.astype(bool)
        types = jnp.zeros_like(ids) if types is None else types
        x = Embeddings(c, name="embeddings")(ids, types, deterministic)
        x = Encoder(c, name="encoder")(x, mask, deterministic)
        x = jnp.where(mask[..., None], x, 0).sum(-2) / mask.sum(-1, keepdims=True)
        x = nn.Dropout(c.hidden_dropout_prob)(x, deterministic)
        return nn.Dense(c.num_labels, kernel_init=nn.initializers.zeros, name="classifier")(x)


def dense(width, name):
    """A linear layer initialised as BERT's are."""
    return nn.Dense(width, kernel_init=nn.initializers.normal(0.02), name=name)


def shapes(config: Config) -> dict:
    """The parameters of `Bert(config)`, as shapes and dtypes alone."""
    ids = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    return jax.eval_shape(Bert(config).init, jax.random.key(0), ids, ids)["params"]


# From the names of the modules above to those of a PyTorch checkpoint.
RENAMES = [
    (r"layer_(\d+)", r"layer.\1"),
    (r"(query|key|value)$", r"self.\1"),
    (r"attention_norm$", "attention.output.LayerNorm"),
    (r"output_norm$", "output.LayerNorm"),
    (r"(output|intermediate)$", r"\1.dense"),
]


def load(folder, config: Config) -> dict:
    """The parameters of `Bert(config)` from `folder/model.safetensors`, with a head of zeros."""
    from safetensors.numpy import load_file

    file = Path(folder) / "model.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{folder} is no checkpoint in safetensors: it has no {file.name}")
    tensors = {}
    for name, x in load_file(file).items():
        name = re.sub(r"^bert\.", "", name)
        name = re.sub(r"\.gamma$", ".weight", re.sub(r"\.beta$", ".bias", name))
        # Poolers, other heads and position_ids are no part of this model.
        if name.startswith(("embeddings.", "encoder.")) and not name.endswith("position_ids"):
            tensors[name] = x
    wrong = []

    def fill(path, leaf):
        *modules, kind = (key.key for key in path)
        if modules == ["classifier"]:
            return np.zeros(leaf.shape, leaf.dtype)
        name = ".".join(modules)
        for pattern, new in RENAMES:
            name = re.sub(pattern, new, name)
        name += ".bias" if kind == "bias" else ".weight"
        shape = leaf.shape[::-1] if kind == "kernel" else leaf.shape
        x = tensors.pop(name, None)
        if x is None:
            wrong.append(f"{name} {shape} is missing")
        elif x.shape != shape:
            wrong.append(f"{name} has the shape {x.shape}, not {shape}")
        else:
            return np.asarray(x.T if kind == "kernel" else x, leaf.dtype)

    params = jax.tree_util.tree_map_with_path(fill, shapes(config))
    wrong += [f"{name} {x.shape} has no place in the model" for name, x in tensors.items()]
    if wrong:
        raise ValueError(f"{file} does not fit its config.json:\n  " + "\n  ".join(wrong))
    return params


def main(folder: str, tokens: str, out: str) -> None:
    """Logits of the ids and masks in a file, under the Orbax parameters in `folder/params`."""
    import orbax.checkpoint as ocp

    config = Config.read(folder)
    with ocp.StandardCheckpointer() as checkpointer:
        params = checkpointer.restore(Path(folder, "params").absolute(), shapes(config))
    forward = jax.jit(lambda ids, mask: Bert(config).apply({"params": params}, ids, mask))
    batch = np.load(tokens)
    parts = range(0, len(batch["ids"]), 50)
    ids, mask = batch["ids"], batch["mask"]
    np.save(out, np.concatenate([forward(ids[i : i + 50], mask[i : i + 50]) for i in parts]))


if __name__ == "__main__":
    main(*sys.argv[1:])
