"""What lifting adds before the first step and to each dispatch, as ratios.

    python benchmarks/tracing.py

Trace and lower: the gradient of a 24-layer transformer, plain (with respect to all parameters) and lifted (LoRA on
every dense kernel), unrolled, under `nn.remat` and under `nn.jit`; the smallest of several. Dispatch: a jitted
function of 1,000 weights, called with the plain tree of the same leaves and with an Adapted.
"""

import argparse
import gc
import os
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp

import jlora

LAYERS, WIDTH = 24, 64


class Block(nn.Module):
    """A transformer block: attention of four heads and a two-layer perceptron."""

    @nn.compact
    def __call__(self, x):
        b, t, d = x.shape
        heads = lambda name: nn.Dense(d, name=name)(x).reshape(b, t, 4, d // 4)
        q, k, v = heads("query"), heads("key"), heads("value")
        a = nn.softmax(jnp.einsum("bthd,bshd->bhts", q, k))
        y = nn.Dense(d, name="out")(jnp.einsum("bhts,bshd->bthd", a, v).reshape(b, t, d))
        x = nn.LayerNorm(name="norm_1")(x + y)
        y = nn.Dense(d, name="down")(nn.gelu(nn.Dense(4 * d, name="up")(x)))
        return nn.LayerNorm(name="norm_2")(x + y)


class Model(nn.Module):
    """The blocks, each wrapped."""

    wrap: str

    @nn.compact
    def __call__(self, x):
        block = {"unrolled": lambda b: b, "nn.remat": nn.remat, "nn.jit": nn.jit}[self.wrap](Block)
        for n in range(LAYERS):
            x = block(name=f"layer_{n}")(x)
        return x


def cpu(f):
    """Seconds of processor time of one call (tracing is one thread), with the garbage collector off as in timeit."""
    gc.collect()
    gc.disable()
    start = time.process_time()
    f()
    seconds = time.process_time() - start
    gc.enable()
    return seconds


def trace(wrap, repeats):
    """Seconds of trace + lower, plain and lifted: the smallest of several, in turn."""
    model, x = Model(wrap), jnp.ones((2, 8, WIDTH))
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    params = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), params)
    trainable, frozen = jlora.split(jlora.adapt(params, jlora.LoRA(rank=8, target="kernel$")))
    apply = jlora.lift(model.apply)

    def plain():
        loss = lambda p: model.apply({"params": p}, x).sum()
        jax.jit(jax.grad(loss)).lower(params)

    def lifted():
        loss = lambda t, f: apply({"params": jlora.join(t, f)}, x).sum()
        jax.jit(jax.grad(loss)).lower(trainable, frozen)

    times = {plain: [], lifted: []}
    for _ in range(repeats):
        for f, seconds in times.items():
            jax.clear_caches()
            seconds.append(cpu(f))
    return min(times[plain]), min(times[lifted])


def dispatch(weights, repeats):
    """Seconds of one call of a jitted function of `weights` weights: the plain leaves, and an Adapted."""
    params = {f"w{n:04d}": {"kernel": jnp.ones((2, 2))} for n in range(weights)}
    adapted = jlora.adapt(params, jlora.LoRA(rank=1, target="kernel$"))
    plain = {"base": params, "factors": adapted.frozen.factors, "trainable": adapted.trainable}
    f = jax.jit(lambda tree, x: x + jax.tree.leaves(tree)[0].sum())
    best = {}
    for name, tree in (("plain", plain), ("adapted", adapted)) * 2:
        f(tree, 1.0)
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            f(tree, 1.0)
            seconds.append(time.perf_counter() - start)
        best[name] = min(best.get(name, 1e9), min(seconds))
    return best["plain"], best["adapted"]


def main():
    """Prints both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    print(f"jax {jax.__version__}: trace and lower the gradient of {LAYERS} layers, smallest of {options.repeats}\n")
    print(f"{'':10s}  {'plain s':>8s}  {'lifted s':>8s}  {'ratio':>6s}")
    for wrap in ("unrolled", "nn.remat", "nn.jit"):
        a, b = trace(wrap, options.repeats)
        print(f"{wrap:10s}  {a:8.3f}  {b:8.3f}  {b / a:6.3f}")
    a, b = dispatch(1000, 200)
    print(f"\ndispatch over 1,000 weights: plain {1e6 * a:.0f} us, Adapted {1e6 * b:.0f} us, ratio {b / a:.3f}")


if __name__ == "__main__":
    main()
