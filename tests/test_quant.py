"""Quantised weights: golden files, layouts, what is refused; and that the library computes with them as with arrays."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.quant._schemes import dynamic_levels, normal_levels

GOLDEN = Path(__file__).parent / "fixtures" / "nf4.npz"


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# --- bitsandbytes' files, bit for bit -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "zero_block"])
@pytest.mark.parametrize("parity", [None, "torch"])
def test_golden(case, parity):
    with np.load(GOLDEN) as golden:
        for scheme, part in (("nf4", "sq"), ("nf4+double", "dq")):
            get = lambda name, part=part: golden[f"{case}.{part}.{name}"]
            params = {"kernel": jnp.asarray(golden[f"{case}.w"].T)}  # torch's weights are (out, in)
            leaf = jlora.quantize(params, scheme, target="kernel", parity=parity)["kernel"]
            run = lambda name, leaf=leaf: np.asarray(leaf.arrays[name]).T.reshape(-1)
            np.testing.assert_array_equal(run("codes"), get("packed"))
            if part == "sq":
                np.testing.assert_array_equal(run("scales"), get("absmax"))
            else:
                np.testing.assert_array_equal(run("scales"), get("absmax_q"))
                np.testing.assert_array_equal(leaf.arrays["scales2"], get("absmax2"))
                np.testing.assert_array_equal(leaf.arrays["offset"], get("offset"))
            for made in (leaf.dequantize(), jax.jit(lambda leaf: leaf.dequantize())(leaf)):
                np.testing.assert_array_equal(np.asarray(made).T, get("dequant"))


def test_golden_tables():
    with np.load(GOLDEN) as golden:
        np.testing.assert_array_equal(jlora.quant.NF(4).levels, golden["plain.code"])
        np.testing.assert_array_equal(dynamic_levels(), golden["plain.dq.code2"])
    assert np.abs(normal_levels(4) - jlora.quant.NF(4).levels).max() < 2e-7  # the same construction


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_levels_against_quantiles(bits):
    from scipy.stats import norm

    d = 1 - (1 / (2 * (2**bits - 1)) + 1 / 2 ** (bits + 1)) / 2
    up = norm.ppf(np.linspace(d, 0.5, 2 ** (bits - 1) + 1)[:-1])
    down = -norm.ppf(np.linspace(d, 0.5, 2 ** (bits - 1))[:-1])
    want = np.sort(np.concatenate([up, [0], down])) / up.max()
    np.testing.assert_allclose(normal_levels(bits), want, atol=1e-12)
    assert len(want) == 2**bits and (want == 0).sum() == 1 and want[-1] == 1


# --- lifting ----------------------------------------------------------------------------------------------------------

SCHEMES = ["nf4", "nf4+double", "int8", "int4", "nf2", "nf3", "nf8"]


def two_layers(params, x):
    return jnp.tanh(x @ params["query"]["kernel"]) @ params["value"]["kernel"] + params["value"]["bias"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lift_is_the_dense_model(scheme):
    params = {"query": {"kernel": normal(0, 128, 64)}, "value": {"kernel": normal(1, 64, 8), "bias": jnp.ones(8)}}
    small, x = jlora.quantize(params, scheme), normal(2, 5, 128)
    dense = jlora.quant.dequantize(small)
    np.testing.assert_allclose(jlora.lift(two_layers)(small, x), two_layers(dense, x), rtol=1e-5, atol=1e-5)
    adapted = jlora.adapt(small, jlora.LoRA(rank=2))
    for factors in adapted.trainable.values():
        factors["b"] = jnp.full_like(factors["b"], 0.05)

    def gradients(dense):
        loss = lambda t, f, x: jnp.sum(jlora.lift(two_layers, dense=dense)(jlora.join(t, f), x) ** 2)
        return jax.jit(jax.grad(loss, (0, 2)))(*jlora.split(adapted), x)

    scale = lambda tree: max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))
    made, want = gradients(False), gradients(True)
    worst = scale(jax.tree.map(jnp.subtract, made, want))
    assert worst < 2e-5 * scale(want)
    np.testing.assert_allclose(
        jlora.lift(two_layers)(adapted, x), two_layers(jlora.merge(adapted), x), rtol=2e-5, atol=2e-5
    )


def test_tables_of_levels_stay_inside_a_scan():
    """JAX takes what depends on nothing out of a scan: the levels, each as large as a weight."""
    params = {"layers": {"up": {"kernel": jnp.ones((3, 256, 256))}}}

    def temporary(scheme):
        trainable, frozen = jlora.split(jlora.adapt(jlora.quantize(params, scheme), jlora.LoRA(rank=2, target="up")))
        model = lambda p, x: jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, p["layers"]["up"]["kernel"])[0]
        loss = lambda t, f, x: jlora.lift(model)(jlora.join(t, f), x).sum()
        step = jax.jit(jax.grad(loss)).lower(trainable, frozen, jnp.ones((4, 256))).compile()
        return step.memory_analysis().temp_size_in_bytes

    one = 256 * 256 * 4
    assert temporary("nf4") < temporary("int8") + 2 * one
