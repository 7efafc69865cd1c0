"""DreamBooth: teach a diffusion model one subject from four pictures, and keep what it knows of the subject's class.

    python examples/dreambooth.py
    python examples/dreambooth.py --plot dreambooth.png

About 80 seconds of one CPU core, nothing is downloaded: a small network is trained here first to draw solid discs,
squares and crosses of 16 x 16 pixels from noise, as a prompt of two words says. The subject is one square, a hollow
one, and is to be drawn for "sks square", while "a square" goes on to draw solid ones of all sizes:

    L = E |f(a x + s e, t, "sks square") - x|^2 + lambda E |f(a x' + s e', t, "a square") - x'|^2

x are the subject's pictures, x' pictures of the class that the frozen base drew beforehand (the class prior), f the
picture that the model sees behind noise e, a = cos(pi t / 2), s = sin(pi t / 2). It is done with LoRA and with all
weights, lambda = 0 and 1, and beside them by textual inversion, which trains the row of one new word alone.

Expect: without the prior every "square" becomes hollow; with it, none does, and the subject is drawn as well. Textual
inversion changes nothing of the class, and cannot draw the subject: this base knows no hollow shape to ask for.

    Ruiz et al, DreamBooth, 2022, arXiv 2208.12242. Gal et al, Textual Inversion, 2022, arXiv 2208.01618.
"""

import functools
import time
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jlora

SIZE = 16
WORDS = ("a", "sks", "disc", "square", "cross")  # "sks" is in the vocabulary, and in no prompt of the base
SHAPES = WORDS[2:]


def prompt(first: str, noun: str) -> np.ndarray:
    """The ids of two words; of the word that textual inversion adds to the table, the one behind its end."""
    return np.array([WORDS.index(first) if first in WORDS else len(WORDS), WORDS.index(noun)])


# --- pictures -----------------------------------------------------------------------------------


def draw(shape: str, x, y, r):
    """Pictures (n, 16, 16) from -1 to 1 of a shape around (x, y) with radius r, each (n,): soft edges of a pixel."""
    u, v = (np.abs(np.arange(SIZE) - np.asarray(c)[:, None]) for c in (x, y))
    u, v, r = u[:, None, :], v[:, :, None], np.asarray(r)[:, None, None]
    inside = {
        "disc": r - np.hypot(u, v),
        "square": r - np.maximum(u, v),
        "cross": np.minimum(r - np.maximum(u, v), r / 3 - np.minimum(u, v)),
        "subject": np.minimum(r - np.maximum(u, v), np.maximum(u, v) - r / 2),  # a hollow square
    }
    return (2 * np.clip(inside[shape] + 0.5, 0, 1) - 1).astype(np.float32)


def pictures(rng, shape: str, n: int):
    """n pictures of a shape, anywhere; the subject is always of one size."""
    x, y = rng.uniform(6, SIZE - 7, (2, n))
    return draw(shape, x, y, np.full(n, 4.5) if shape == "subject" else rng.uniform(3, 5, n))


def hollow(images) -> float:
    """The share of pictures that are nearer to some picture of the subject than to all of solid squares."""
    x, y, r = (c.ravel() for c in np.meshgrid(*[np.arange(6, SIZE - 6.5, 0.5)] * 2, np.arange(3, 5.5, 0.5)))
    near = lambda bank: np.min(np.square(images[:, None] - bank).sum((2, 3)), 1)
    return float(np.mean(near(draw("subject", x, y, np.full(len(x), 4.5))) < near(draw("square", x, y, r))))


# --- the model: nothing in it knows of adapters -------------------------------------------------


class Denoiser(nn.Module):
    """The picture behind noise: a residual perceptron, to which each block adds what time and prompt say."""

    width: int = 256
    depth: int = 3

    @nn.compact
    def __call__(self, x, t, words):
        waves = t[:, None] * 2.0 ** jnp.arange(6)
        said = nn.Embed(len(WORDS), 32, name="words")(words).reshape(len(x), -1)
        told = jnp.concatenate([jnp.sin(waves), jnp.cos(waves), said], -1)
        h = nn.Dense(self.width, name="in")(x.reshape(len(x), -1))
        for k in range(self.depth):
            up = nn.Dense(self.width, name=f"up_{k}")(nn.LayerNorm(name=f"norm_{k}")(h))
            up = nn.gelu(up + nn.Dense(self.width, name=f"told_{k}")(told))
            h = h + nn.Dense(self.width, name=f"down_{k}")(up)
        return nn.Dense(SIZE**2, name="out")(nn.LayerNorm(name="norm")(h)).reshape(x.shape)


def f(params, x, t, words):
    """What is lifted: the model as a function of its parameters."""
    return Denoiser().apply({"params": params}, x, t, words)


def denoising(f, params, key, x, words):
    """E |f(a x + s e, t, words) - x|^2 over times and noises, and what f makes of the noisy pictures."""
    of_time, of_noise = jax.random.split(key)
    t = jax.random.uniform(of_time, (len(x),))
    a, s = jnp.cos(jnp.pi * t / 2)[:, None, None], jnp.sin(jnp.pi * t / 2)[:, None, None]
    seen = f(params, a * x + s * jax.random.normal(of_noise, x.shape), t, jnp.broadcast_to(words, (len(x), 2)))
    return jnp.mean((seen - x) ** 2), seen


def sample(f, params, key, words, n: int, steps: int = 25):
    """n pictures of a prompt out of noise, by DDIM: from time t to u the noise that f sees is kept, and made less."""

    def one(x, k):
        t, u = 1 - k / steps, 1 - (k + 1) / steps
        a, s = jnp.cos(jnp.pi * t / 2), jnp.sin(jnp.pi * t / 2)
        seen = f(params, x, jnp.full(n, t), jnp.broadcast_to(words, (n, 2)))
        noise = (x - a * seen) / s
        return jnp.cos(jnp.pi * u / 2) * seen + jnp.sin(jnp.pi * u / 2) * noise, None

    return jax.lax.scan(one, jax.random.normal(key, (n, SIZE, SIZE)), jnp.arange(steps))[0]


# --- training: one loop for the base and for all that is made of it -----------------------------


@functools.partial(jax.jit, static_argnames=("loss", "steps"))
def fit(loss, trainable, given, key, rate, steps: int):
    """`trainable` after Adam on `loss(trainable, given, key)`; all steps are one program."""
    tx = optax.scale_by_adam()

    def step(carry, n):
        trainable, state = carry
        grads = jax.grad(loss)(trainable, given, jax.random.fold_in(key, n))
        updates, state = tx.update(grads, state)
        now = rate * (1 + jnp.cos(jnp.pi * n / steps)) / 2
        return (jax.tree.map(lambda p, u: p - now * u, trainable, updates), state), None

    return jax.lax.scan(step, (trainable, tx.init(trainable)), jnp.arange(steps))[0][0]


def of_shapes(params, given, key, batch: int = 96):
    """The loss of the base: pictures of all shapes, each with its prompt."""
    shown, said = given
    chosen = jax.random.randint(key, (batch,), 0, len(shown))
    return denoising(f, params, key, shown[chosen], said[chosen])[0]


def pretrain(key, steps: int):
    """The base, which draws solid shapes for "a disc", "a square" and "a cross"."""
    rng, each = np.random.default_rng(0), 1000
    shown = jnp.asarray(np.concatenate([pictures(rng, shape, each) for shape in SHAPES]))
    said = jnp.asarray(np.repeat([prompt("a", shape) for shape in SHAPES], each, axis=0))
    params = jax.jit(Denoiser().init)(key, shown[:1], jnp.zeros(1), said[:1])["params"]
    return fit(of_shapes, params, (shown, said), key, 2e-3, steps)


def of_subject(trainable, given, key, batch: int = 16):
    """The loss of the subject's pictures, and lambda times that of what the base drew of its class."""
    frozen, (subject, words), (prior, class_words), weight = given
    of_subject, of_class, of_choice = jax.random.split(key, 3)
    adapted, model = jlora.join(trainable, frozen), jlora.lift(f)
    own, _ = denoising(model, adapted, of_subject, subject[jnp.arange(batch) % len(subject)], words)
    drawn = prior[jax.random.randint(of_choice, (batch,), 0, len(prior))]
    return own + weight * denoising(model, adapted, of_class, drawn, class_words)[0]


# --- the comparison -----------------------------------------------------------------------------


class Row(NamedTuple):
    """What one way of learning the subject came to."""

    name: str
    trained: int
    subject: float  # the loss of pictures of the subject that training did not see
    drift: float  # E |f - f of the base|^2 for "a square"
    subject_drawn: float  # the share of hollow pictures of what the subject's prompt draws
    class_drawn: float  # and of what "a square" draws
    images: np.ndarray  # some of both


def main(steps: int = 300, pretrain_steps: int = 1500, *, rank: int = 4, seed: int = 0, plot: Path | None = None):
    """Pretrain, learn the subject in five ways, print a table and return its rows.

    Args:
        steps: training steps of each way.
        pretrain_steps: training steps of the base.
        rank: of LoRA.
        seed: of weights, pictures and noise.
        plot: a file for a figure of what is drawn.
    """
    started = time.perf_counter()
    keys = jax.random.split(jax.random.key(seed), 4)
    rng = np.random.default_rng(seed + 1)
    base = pretrain(keys[0], pretrain_steps)
    subject, unseen = (jnp.asarray(pictures(rng, "subject", n)) for n in (4, 64))
    square, sks, word = (jnp.asarray(prompt(first, "square")) for first in ("a", "sks", "the new word"))
    prior = jax.jit(lambda params: sample(f, params, keys[1], square, 200))(base)  # by the frozen base, beforehand

    everything, linear = jlora.targets.everything, jlora.targets.linear
    lora, full = jlora.LoRA(rank=rank, alpha=2 * rank, target=linear), jlora.Full(target=everything)
    new_word = jlora.NewTokens(count=1, init=(WORDS.index("sks"),))
    ways = [
        ("base", lora, sks, 0, 0, 0.0),
        ("all weights", full, sks, 0, steps, 5e-4),
        ("all weights, prior", full, sks, 1, steps, 5e-4),
        ("LoRA", lora, sks, 0, steps, 3e-3),
        ("LoRA, prior", lora, sks, 1, steps, 3e-3),
        ("textual inversion", new_word, word, 0, steps, 3e-2),
    ]

    @jax.jit
    def measured(adapted, words):
        model, base = jlora.lift(f), adapted.frozen.base
        loss, _ = denoising(model, adapted, keys[2], unseen, words)
        (_, now), (_, then) = (denoising(*g, keys[2], prior, square) for g in ((model, adapted), (f, base)))
        drawn = [sample(model, adapted, keys[3], said, 64) for said in (words, square)]
        return loss, jnp.mean((now - then) ** 2), drawn

    rows = []
    print(f"{'':20}{'trained':>8}{'subject loss':>14}{'class drift':>13}   hollow: subject, class")
    for name, method, words, weight, count, rate in ways:
        adapted = jlora.adapt(base, method)
        if count:
            trainable, frozen = jlora.split(adapted)
            given = frozen, (subject, words), (prior, square), jnp.float32(weight)
            adapted = jlora.join(fit(of_subject, trainable, given, keys[2], rate, count), frozen)
        loss, drift, drawn = measured(adapted, words)
        shares = [hollow(np.asarray(images)) for images in drawn]
        trained = jlora.count(adapted)[0] if count else 0
        few = np.asarray(jnp.stack([images[:6] for images in drawn]))
        rows.append(Row(name, trained, float(loss), float(drift), *shares, few))
        print(f"{name:20}{trained:8,}{loss:14.4f}{drift:13.5f}{shares[0]:18.2f}{shares[1]:7.2f}")
    if plot:
        figure(rows, np.asarray(subject)).savefig(plot, dpi=150, bbox_inches="tight")
    print(f"{time.perf_counter() - started:.0f} seconds")
    return rows


def figure(rows, subject):
    """A line for each way: six pictures of the subject's prompt, six of its class's."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9, 0.72 * (len(rows) + 1)))
    axes = fig.subplots(len(rows) + 1, 13)
    for axis in axes.flat:
        axis.axis("off")
    show = lambda axis, image: axis.imshow(image, cmap="gray", vmin=-1, vmax=1)
    lines = [("four pictures", subject), *((row.name, [*row.images[0], None, *row.images[1]]) for row in rows)]
    for line, (name, images) in zip(axes, lines, strict=True):
        line[0].text(-0.2, 0.5, name, transform=line[0].transAxes, ha="right", va="center", fontsize=8)
        for axis, image in zip(line, images, strict=False):
            if image is not None:
                show(axis, image)
    for column, text in ((0, "the subject"), (7, '"a square"')):
        axes[0][column].set_title(text, fontsize=8, loc="left")
    return fig


if __name__ == "__main__":
    import tyro

    tyro.cli(main)
