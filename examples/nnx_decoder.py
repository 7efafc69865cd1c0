"""Teach a small NNX decoder a new task with LoRA: sort letters downwards instead of upwards.

    python examples/nnx_decoder.py

About 30 seconds on two CPU cores, nothing is downloaded. The base model is trained here first, to
continue `hcafbg>` with the same letters in ascending order; an adapter of rank 4 then turns it to
descending order. Expect: share of descending answers all right 0.00 before, above 0.95 after.

Four things that NNX models need are shown on the way, each marked with its number below:

1. `adapt` and `lift` on the module itself, in three lines;
2. `nnx.split` into (graphdef, params, rest), and a lifted function of `params`;
3. dropout: the generator states are part of `rest`, and come back advanced;
4. a key-value cache: part of `rest` too, so every decoding step returns the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import jlora

LETTERS = "abcdefghijkl"
VOCABULARY = LETTERS + ">"

# --- the model: nothing in it knows of adapters -------------------------------------------------


class Block(nnx.Module):
    """Attention and a two-layer perceptron, each on a residual, normalised before."""

    def __init__(self, width: int, heads: int, dropout: float, *, rngs: nnx.Rngs):
        self.norm_attention = nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(heads, width, dropout_rate=dropout, rngs=rngs)
        self.norm_mlp = nnx.LayerNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, rngs=rngs)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)

    def __call__(self, x, mask, *, train: bool, decode: bool):
        h = self.norm_attention(x)
        h = self.attention(h, mask=mask, deterministic=not train, decode=decode)
        x = x + self.dropout(h, deterministic=not train)
        h = self.down(nnx.gelu(self.up(self.norm_mlp(x))))
        return x + self.dropout(h, deterministic=not train)


class Decoder(nnx.Module):
    """A causal transformer over `VOCABULARY`. With `decode=True` it reads one token at a time."""

    def __init__(self, width: int, heads: int, depth: int, length: int, *, rngs: nnx.Rngs):
        self.token = nnx.Embed(len(VOCABULARY), width, rngs=rngs)
        self.place = nnx.Embed(length, width, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, 0.05, rngs=rngs) for _ in range(depth)])
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, len(VOCABULARY), rngs=rngs)
        self.position: nnx.Cache | None = nnx.data(None)

    def init_cache(self, batch: int):
        """Make room for `batch` sequences of full length; needed before `decode=True`."""
        shape = (batch, self.place.num_embeddings, self.place.features)
        for block in self.blocks:
            block.attention.init_cache(shape)
        self.position = nnx.Cache(jnp.zeros((), jnp.int32))

    def __call__(self, tokens, *, train: bool = False, decode: bool = False):
        places = jnp.arange(tokens.shape[1])
        mask = nnx.make_causal_mask(tokens)
        if decode:
            # The attention masks what the cache does not hold yet; a causal mask of length one on
            # top of that would hide everything but the first token.
            places, mask = places + self.position[...], None
            self.position[...] += tokens.shape[1]
        x = self.token(tokens) + self.place(places)
        for block in self.blocks:
            x = block(x, mask, train=train, decode=decode)
        return self.head(self.norm(x))


# --- the task -----------------------------------------------------------------------------------


def make_batch(key, size: int, letters: int, *, descending: bool):
    """`size` sequences `letters > letters in order`, as token numbers: (size, 2 * letters + 1)."""
    question = jax.random.randint(key, (size, letters), 0, len(LETTERS))
    answer = jnp.sort(question, axis=1, descending=descending)
    separator = jnp.full((size, 1), VOCABULARY.index(">"))
    return jnp.concatenate([question, separator, answer], axis=1)


def to_text(tokens) -> str:
    """One sequence of token numbers as characters."""
    return "".join(VOCABULARY[int(t)] for t in tokens)


# --- the module as a pure function --------------------------------------------------------------


def split(model: Decoder):
    """(2) graphdef, the parameters, and the rest: the states of the dropout generators, when
    decoding the cache, in other models the running averages of a BatchNorm."""
    return nnx.split(model, nnx.Param, ...)


def call(graphdef, params, rest, *args, **kwargs):
    """What the module returns, and what became of `rest` while it did."""
    # A Variable remembers the trace that made it and refuses an update from another one, here that
    # of the gradient or of `lift`. `copy=True` makes new ones in the trace that runs this line.
    model = nnx.merge(graphdef, params, rest, copy=True)
    output = model(*args, **kwargs)
    return output, nnx.state(model, nnx.Not(nnx.Param))


# --- training: the same loop for the base and for the adapter ------------------------------------


@jax.jit
def answer_loss(logits, tokens):
    """Mean cross-entropy of the answer alone: the question is random, there is nothing to learn."""
    start = tokens.shape[1] // 2
    logits, labels = logits[:, start:], tokens[:, start + 1 :]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def schedule(peak: float, steps: int):
    """The learning rate: up to `peak` in a tenth of the steps, then down to zero."""
    return optax.warmup_cosine_decay_schedule(0.0, peak, steps // 10, steps)


def fit(
    apply: Callable,
    join: Callable,
    trainable,
    frozen,
    rest,
    *,
    tx: optax.GradientTransformation,
    steps: int,
    batches: Callable,
    key: jax.Array,
    progress: Progress,
    label: str,
):
    """Train `trainable`; `apply(join(trainable, frozen), rest, tokens)` gives logits and new rest.

    Returns the trained tree and the new `rest`. `frozen` is an argument of the compiled step, so
    that the base is not baked into the program as a constant.
    """

    def loss(trainable, frozen, rest, tokens):
        logits, rest = apply(join(trainable, frozen), rest, tokens[:, :-1])
        return answer_loss(logits, tokens), rest

    value_and_grad = jax.value_and_grad(loss, has_aux=True)

    @jax.jit
    def step(trainable, opt_state, frozen, rest, key):
        tokens = batches(key)
        (value, rest), grads = value_and_grad(trainable, frozen, rest, tokens)
        updates, opt_state = tx.update(grads, opt_state, trainable)
        return optax.apply_updates(trainable, updates), opt_state, rest, value

    opt_state = tx.init(trainable)
    bar = progress.add_task(label, total=steps, loss=float("nan"))
    for i in range(steps):
        step_key = jax.random.fold_in(key, i)
        trainable, opt_state, rest, value = step(trainable, opt_state, frozen, rest, step_key)
        if i % 20 == 0 or i == steps - 1:
            # Reading a loss waits for the device, so not at every step.
            progress.update(bar, completed=i + 1, loss=float(value))
    return trainable, rest


# --- generation ---------------------------------------------------------------------------------


def generate(decode, params, rest, question, length: int):
    """Continue `question` (batch, n) greedily to `length` tokens, one token and one cache update at
    a time.

    `decode(params, rest, token)` gives logits and the next `rest`; the cache in `rest` must be
    fresh. `params` may be an `Adapted` if `decode` is lifted: this function cannot tell.
    """

    def one(carry, t):
        rest, previous = carry
        token = jnp.where(t < question.shape[1], question[:, t], previous)
        logits, rest = decode(params, rest, token[:, None])
        return (rest, logits[:, -1].argmax(-1)), token

    # Past the end of the question `question[:, t]` reads its last column, which `where` discards.
    _, tokens = jax.lax.scan(one, (rest, question[:, 0]), jnp.arange(length))
    return tokens.T


def generate_without_cache(apply, params, rest, question, length: int):
    """The slow oracle of `generate`: the whole sequence again for every token."""

    def one(t, tokens):
        logits, _ = apply(params, rest, tokens)
        return tokens.at[:, t].set(logits[:, t - 1].argmax(-1))

    start = question.shape[1]
    tokens = jnp.pad(question, ((0, 0), (0, length - start)))
    return jax.lax.fori_loop(start, length, one, tokens)


def exact(tokens, expected) -> float:
    """The share of sequences that are right in every token."""
    return float((tokens == expected).all(axis=1).mean())


def gap(x, y) -> float:
    """The largest difference of two arrays, relative to the largest number in the second."""
    return float(jnp.abs(x - y).max() / jnp.abs(y).max())


# --- the example --------------------------------------------------------------------------------


class Result(NamedTuple):
    """What `main` measured, and the trees behind it for whoever wants to look."""

    loss_before: float  # on the descending task, without dropout
    loss_after: float
    right_before: float  # the share of descending answers that are right in every letter
    right_after: float
    merged_gap: float  # between merged and lifted logits, relative to the largest
    module_gap: float  # and between the module form and the split form
    same_text: bool  # generation with the cache and without it agree
    model: Decoder  # the pretrained base
    adapted: jlora.Adapted  # the trained adapter over the base's parameters
    rest: Any  # after training
    plain: Decoder  # the merged model
    base_before: Any  # host copies of the base's parameters, taken before anything was adapted


def main(
    steps: int = 800,
    pretrain_steps: int = 800,
    *,
    width: int = 64,
    heads: int = 4,
    depth: int = 2,
    letters: int = 6,
    batch: int = 32,
    rank: int = 4,
    seed: int = 0,
) -> Result:
    """Pretrain, adapt, train, merge and generate; print what came out and return it.

    Args:
        steps: training steps of the adapter.
        pretrain_steps: training steps of the base.
        width: of the model's residual stream.
        heads: attention heads.
        depth: blocks.
        letters: letters to sort.
        batch: sequences a step.
        rank: of the adapter.
        seed: of the weights and of the data.
    """
    started = time.perf_counter()
    length = 2 * letters + 1
    key_base, key_adapter, key_test = jax.random.split(jax.random.key(seed), 3)
    model = Decoder(width, heads, depth, length, rngs=nnx.Rngs(seed))
    graphdef, params, rest = split(model)

    def forward(params, rest, tokens):
        return call(graphdef, params, rest, tokens)

    def forward_train(params, rest, tokens):  # (3) the dropout keys of `rest` come back used up
        return call(graphdef, params, rest, tokens, train=True)

    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("step {task.completed}/{task.total}  loss {task.fields[loss]:.3f}"),
        TimeElapsedColumn(),
    )
    with progress:
        params, rest = fit(
            forward_train,
            lambda trainable, _: trainable,
            params,
            None,
            rest,
            tx=optax.adamw(schedule(3e-3, pretrain_steps)),
            steps=pretrain_steps,
            batches=lambda key: make_batch(key, batch, letters, descending=False),
            key=key_base,
            progress=progress,
            label="base, ascending    ",
        )
        nnx.update(model, params)
        base_before = jax.tree.map(np.array, params)

        # (1) The module itself can be adapted and lifted. It suits inference: a call's changes to
        # dropout keys and caches stay inside, because the module is an argument like any other.
        spec = jlora.LoRA(rank=rank, alpha=2 * rank, target=r"attention/\w+/kernel$")
        adapted_model = jlora.adapt(model, spec)
        forward_model = jlora.lift(lambda model, tokens: model(tokens))

        # (2) To train, adapt `params` alone and let `rest` stand beside it.
        untrained = jlora.adapt(params, spec)
        trainable, frozen = jlora.split(untrained)
        trainable, rest = fit(
            jlora.lift(forward_train),
            jlora.join,
            trainable,
            frozen,
            rest,
            tx=optax.adam(schedule(1e-2, steps)),
            steps=steps,
            batches=lambda key: make_batch(key, batch, letters, descending=True),
            key=key_adapter,
            progress=progress,
            label="adapter, descending",
        )
    adapted = jlora.join(trainable, frozen)

    test = make_batch(key_test, 256, letters, descending=True)
    question = test[:, : letters + 1]
    apply = jax.jit(jlora.lift(forward))
    logits_before, _ = apply(untrained, rest, test[:, :-1])
    logits_after, _ = apply(adapted, rest, test[:, :-1])

    # (4) Decoding has another graphdef and another rest, with a cache in it; the same parameters.
    with_cache = nnx.clone(model)
    with_cache.init_cache(len(test))
    cached_graphdef, _, cached_rest = split(with_cache)

    def decode(params, rest, token):
        return call(cached_graphdef, params, rest, token, decode=True)

    @jax.jit
    def continue_text(params, rest, question):
        return generate(jlora.lift(decode), params, rest, question, length)

    text_before = continue_text(untrained, cached_rest, question)
    text_after = continue_text(adapted, cached_rest, question)
    text_slow = generate_without_cache(jlora.lift(forward), adapted, rest, question, length)

    # The factors trained in one form fit the other: the paths are the same. Merged, the module is
    # an ordinary Decoder again, to be called, split, cached and saved like any other.
    adapted_model = jlora.join(trainable, adapted_model.frozen)
    plain = jlora.merge(adapted_model)

    # Compared on one sequence: over many tokens `lift` may itself choose to add the factors to the
    # weight first, and then there is nothing to compare.
    one = test[:1, :-1]
    logits_split, _ = apply(adapted, rest, one)
    logits_model = jax.jit(forward_model)(adapted_model, one)
    logits_plain = jax.jit(lambda model, tokens: model(tokens))(plain, one)

    result = Result(
        loss_before=float(answer_loss(logits_before, test)),
        loss_after=float(answer_loss(logits_after, test)),
        right_before=exact(text_before, test),
        right_after=exact(text_after, test),
        merged_gap=gap(logits_plain, logits_split),
        module_gap=gap(logits_model, logits_split),
        same_text=bool((text_after == text_slow).all()),
        model=model,
        adapted=adapted,
        rest=rest,
        plain=plain,
        base_before=base_before,
    )
    print(adapted)
    print()
    print(f"descending, loss        {result.loss_before:.3f} -> {result.loss_after:.3f}")
    print(f"descending, all right   {result.right_before:.2f} -> {result.right_after:.2f}")
    print(f"merged - lifted         {result.merged_gap:.1e}")
    print(f"module - split form     {result.module_gap:.1e}")
    print(f"with and without cache  {'the same text' if result.same_text else 'DIFFERENT TEXT'}")
    for i in range(3):
        print(f"  base {to_text(text_before[i])}   adapted {to_text(text_after[i])}")
    print(f"{time.perf_counter() - started:.0f} seconds")
    return result


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
