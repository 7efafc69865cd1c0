"""Compiled temporary memory of a scanned, rematerialised model, as ratios.

    python benchmarks/memory.py

12 transformer blocks of width 384 under `nn.scan(nn.remat(...))`, batch 32 x 64, float32; the gradient of a sum. The
floor trains the query's bias alone (the plain model); LoRA adapts all six dense kernels of every block, r = 8.
"""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import flax.linen as nn
import jax
import jax.numpy as jnp
from tracing import Block

import jlora

LAYERS, WIDTH, BATCH, LENGTH = 12, 384, 32, 64


class Step(nn.Module):
    """A block as the body of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return Block(name="block")(x), None


class Model(nn.Module):
    """The blocks, scanned and rematerialised."""

    @nn.compact
    def __call__(self, x):
        body = nn.remat(Step, prevent_cse=False)
        scan = nn.scan(body, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
        return scan(name="layers")(x, None)[0]


def main():
    """Prints the table."""
    model, x = Model(), jax.ShapeDtypeStruct((BATCH, LENGTH, WIDTH), jnp.float32)
    params = jax.eval_shape(model.init, jax.random.key(0), x)["params"]
    bias = params["layers"]["block"]["query"].pop("bias")

    def with_bias(bias, params):
        block = params["layers"]["block"]
        block = {**block, "query": {**block["query"], "bias": bias}}
        return {"layers": {"block": block}}

    whole = with_bias(bias, params)
    adapted = jax.eval_shape(lambda p: jlora.adapt(p, jlora.LoRA(rank=8, target="kernel$")), whole)
    trainable, frozen = jlora.split(adapted)

    def temp(loss, *args):
        return jax.jit(jax.grad(loss)).lower(*args).compile().memory_analysis().temp_size_in_bytes / 1e6

    def lifted(**how):
        apply = jlora.lift(model.apply, **how)
        return temp(lambda t, f, x: apply({"params": jlora.join(t, f)}, x).sum(), trainable, frozen, x)

    rows = {
        "floor": temp(lambda b, p, x: model.apply({"params": with_bias(b, p)}, x).sum(), bias, params, x),
        "LoRA, all kernels": lifted(),
        "materialise": lifted(dense=True),
        "full": temp(lambda p, x: model.apply({"params": p}, x).sum(), whole, x),
    }
    print(f"jax {jax.__version__}: {LAYERS} scanned, rematerialised blocks\n")
    print(f"{'':18s}  {'temp MB':>8s}  {'x floor':>7s}  {'x materialise':>13s}")
    for name, megabytes in rows.items():
        ratios = megabytes / rows["floor"], megabytes / rows["materialise"]
        print(f"{name:18s}  {megabytes:8.1f}  {ratios[0]:7.3f}  {ratios[1]:13.3f}")


if __name__ == "__main__":
    main()
