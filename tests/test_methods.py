"""Each method against its closed form, written out in float64 NumPy or in loops, and against what papers say of it."""

import itertools
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

import jlora
from jlora import methods, network
from methods import as_bytes, assert_close, away_from_start

pytestmark = pytest.mark.settled


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def lifted_and_grads(f, params, spec, x, cotangent, axes=None, key=None):
    """Output, gradients and factors of `f(params, x)` under a spec with factors away from their start."""
    cast = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)
    trainable, frozen = jlora.split(jlora.adapt(cast(params), spec, axes=axes))
    trainable = away_from_start(trainable)
    call = lambda t: jlora.lift(f)(jlora.join(t, frozen), jnp.asarray(x, jnp.float32) if x.dtype == float else x)
    y, pull = jax.vjp(jax.jit(call), trainable)
    wide = lambda tree: jax.tree.map(lambda a: np.asarray(a, np.float64), tree)
    (grads,) = pull(jnp.asarray(cotangent, jnp.float32))
    return wide(y), wide(grads), wide(trainable), jlora.merge(jlora.join(trainable, frozen))


# LoRA -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options,scale", [
    ({}, 1.0),
    ({"alpha": 3}, 3 / 2),
    ({"alpha": 3, "scaling": "sqrt"}, 3 / math.sqrt(2)),
    ({"scaling": "sqrt"}, math.sqrt(2)),
])  # fmt: skip
def test_lora(options, scale):
    """y = x W + s (x A) B, and the two gradients of it (Hu et al 2021, equation 3; rsLoRA's scale)."""
    w, x, c = normal(1, 6, 5), normal(2, 4, 3, 6), normal(3, 4, 3, 5)
    spec = jlora.LoRA(rank=2, target="w", **options)
    y, grads, factors, merged = lifted_and_grads(lambda p, x: x @ p["w"], {"w": w}, spec, x, c)
    a, b = factors["w"]["a"], factors["w"]["b"]
    delta = scale * np.einsum("ri,ro->io", a, b)
    assert_close(y, x @ w + x @ delta)
    assert_close(merged["w"], w + delta)
    assert_close(grads["w"]["a"], scale * np.einsum("bti,bto,ro->ri", x, c, b))
    assert_close(grads["w"]["b"], scale * np.einsum("bti,bto,ri->ro", x, c, a))


def test_lora_of_a_kernel_stored_out_by_in():
    """x W^T: a stands on the second axis, b on the first; value, gradients and merged weight."""
    w, x, c = normal(1, 5, 6), normal(2, 4, 6), normal(3, 4, 5)
    spec = jlora.LoRA(rank=2, alpha=3, target="w")
    y, grads, factors, merged = lifted_and_grads(lambda p, x: x @ p["w"].T, {"w": w}, spec, x, c, {"w": "oi"})
    a, b = factors["w"]["a"], factors["w"]["b"]
    assert a.shape == (2, 6) and b.shape == (2, 5)
    assert_close(y, x @ w.T + 1.5 * (x @ a.T) @ b)
    assert_close(merged["w"], w + 1.5 * b.T @ a)
    assert_close(grads["w"]["a"], 1.5 * np.einsum("bi,bo,ro->ri", x, c, b))


def test_lora_of_a_stack_has_factors_for_each_layer():
    """Layers on the middle axis of the kernel; the factors' stack comes first all the same."""
    w, x, c = normal(1, 6, 3, 5), normal(2, 3, 4, 6), normal(3, 3, 4, 5)
    f = lambda p, x: jax.lax.map(lambda wx: wx[1] @ wx[0], (jnp.moveaxis(p["w"], 1, 0), x))
    spec = jlora.LoRA(rank=2, alpha=3, target="w")
    y, grads, factors, merged = lifted_and_grads(f, {"w": w}, spec, x, c, {"w": "iso"})
    a, b = factors["w"]["a"], factors["w"]["b"]
    assert a.shape == (3, 2, 6) and b.shape == (3, 2, 5)
    assert_close(y, np.einsum("lti,ilo->lto", x, w) + 1.5 * np.einsum("lti,lri,lro->lto", x, a, b))
    assert_close(merged["w"], w + 1.5 * np.einsum("lri,lro->ilo", a, b))
    assert_close(grads["w"]["b"], 1.5 * np.einsum("lti,lto,lri->lro", x, c, a))


def test_lora_of_dense_general():
    """All input axes are one side, all output axes the other: the matrix the model would have without heads."""
    into, out = normal(1, 6, 2, 3), normal(2, 2, 3, 5)
    x, c = normal(3, 4, 6), normal(4, 4, 5)
    f = lambda p, x: jnp.einsum("thk,hkd->td", jnp.einsum("td,dhk->thk", x, p["query"]), p["out"])
    spec = jlora.LoRA(rank=2, alpha=3, target=".")
    axes = {"query": "ioo", "out": "iio"}
    y, grads, factors, merged = lifted_and_grads(f, {"query": into, "out": out}, spec, x, c, axes)
    (a1, b1), (a2, b2) = ((factors[n]["a"], factors[n]["b"]) for n in ("query", "out"))
    assert (a1.shape, b1.shape, a2.shape, b2.shape) == ((2, 6), (2, 2, 3), (2, 2, 3), (2, 5))
    w1 = into.reshape(6, 6) + 1.5 * a1.T @ b1.reshape(2, 6)
    w2 = out.reshape(6, 5) + 1.5 * a2.reshape(2, 6).T @ b2
    assert_close(y, x @ w1 @ w2)
    assert_close(merged["query"], w1.reshape(6, 2, 3))
    assert_close(merged["out"], w2.reshape(2, 3, 5))
    dh = c @ w2.T
    assert_close(grads["query"]["a"], 1.5 * b1.reshape(2, 6) @ dh.T @ x)
    assert_close(grads["query"]["b"].reshape(2, 6), 1.5 * a1 @ x.T @ dh)
    assert_close(grads["out"]["a"].reshape(2, 6), 1.5 * b2 @ c.T @ (x @ w1))


@pytest.mark.parametrize("groups", [1, 2])
def test_lora_of_a_convolution(groups):
    """The kernel's window belongs to its input: dW[y, x, i, o] = s sum_r a[r, y, x, i] b[r, o], in loops."""
    w, x, c = normal(1, 3, 2, 4 // groups, 6), normal(2, 2, 7, 5, 4), normal(3, 2, 3, 4, 6)

    def f(p, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, p["conv"]["kernel"], (2, 1), "VALID", dimension_numbers=numbers, feature_group_count=groups
        )

    spec = jlora.LoRA(rank=2, alpha=3, target="kernel")
    y, grads, factors, merged = lifted_and_grads(f, {"conv": {"kernel": w}}, spec, x, c)
    a, b = factors["conv/kernel"]["a"], factors["conv/kernel"]["b"]
    assert a.shape == (2, 3, 2, 4 // groups) and b.shape == (2, 6)
    whole = w + 1.5 * np.einsum("ryxi,ro->yxio", a, b)
    want, dw = np.zeros_like(c), np.zeros_like(w)
    for row, column, dy, dx, i, o in itertools.product(range(3), range(4), range(3), range(2), range(4), range(6)):
        group, inside = divmod(i, 4 // groups)
        if o // (6 // groups) == group:
            seen = x[:, 2 * row + dy, column + dx, i]
            want[:, row, column, o] += seen * whole[dy, dx, inside, o]
            dw[dy, dx, inside, o] += seen @ c[:, row, column, o]
    assert_close(y, want)
    assert_close(merged["conv"]["kernel"], whole)
    assert_close(grads["conv/kernel"]["a"], 1.5 * np.einsum("yxio,ro->ryxi", dw, b))
    assert_close(grads["conv/kernel"]["b"], 1.5 * np.einsum("yxio,ryxi->ro", dw, a))


def test_lora_of_an_embedding():
    """loralib's Embedding: rows of A are looked up, then B. It starts with A at zero and B normal."""
    table, ids, c = normal(1, 300, 40), np.array([[0, 3, 299], [3, 3, 7]]), normal(2, 2, 3, 40)
    spec = jlora.LoRA(rank=2, alpha=3, target="embedding")
    f = lambda p, ids: p["embed"]["embedding"][ids]
    y, grads, factors, merged = lifted_and_grads(f, {"embed": {"embedding": table}}, spec, jnp.asarray(ids), c)
    a, b = factors["embed/embedding"]["a"], factors["embed/embedding"]["b"]
    assert_close(y, table[ids] + 1.5 * a.T[ids] @ b)
    assert_close(merged["embed"]["embedding"], table + 1.5 * a.T @ b)
    da = np.zeros((300, 2))
    np.add.at(da, ids, 1.5 * c @ b.T)
    assert_close(grads["embed/embedding"]["a"], da.T)
    assert_close(grads["embed/embedding"]["b"], 1.5 * np.einsum("rbt,btd->rd", a[:, ids], c))
    start = jlora.adapt({"embed": {"embedding": table}}, jlora.LoRA(rank=8, target="embedding")).trainable
    assert not np.any(start["embed/embedding"]["a"])
    assert abs(np.std(start["embed/embedding"]["b"]) - 1) < 0.15


def test_lora_of_tied_embeddings_sums_both_uses():
    """A table looked up and multiplied has the gradient of both uses."""
    table, ids, c = normal(1, 9, 6), np.array([4, 1, 4]), normal(2, 3, 9)
    f = lambda p, ids: jnp.tanh(p["embedding"][ids]) @ p["embedding"].T
    spec = jlora.LoRA(rank=2, alpha=3, target="embedding")
    y, grads, factors, _ = lifted_and_grads(f, {"embedding": table}, spec, jnp.asarray(ids), c)
    a, b = factors["embedding"]["a"], factors["embedding"]["b"]
    whole = table + 1.5 * a.T @ b
    h = np.tanh(whole[ids])
    assert_close(y, h @ whole.T)
    dw = c.T @ h
    np.add.at(dw, ids, (c @ whole) * (1 - h**2))
    assert_close(grads["embedding"]["a"], 1.5 * b @ dw.T)
    assert_close(grads["embedding"]["b"], 1.5 * a @ dw)


def merged_linear(w, factors, enable, scale):
    """loralib's MergedLinear: the enabled thirds of a fused projection get B_g A_g, the others zeros."""
    width, start, n = w.shape[1] // len(enable), 0, 0
    delta = np.zeros_like(w)
    for on in enable:
        if on:
            delta[:, start : start + width] = scale * factors[f"a{n}"].T @ factors[f"b{n}"]
            n += 1
        start += width
    return delta


@pytest.mark.parametrize("enable", [(True, False, True), (True, True, True), (False, True, False)], ids=str)
def test_slices_are_the_merged_linear_of_loralib(enable):
    """Enabled thirds of a fused projection have factors of their own; others are the base."""
    w, x, c = normal(1, 6, 12), normal(2, 5, 6), normal(3, 5, 12)
    slices = tuple((4 * n, 4 * n + 4) for n, on in enumerate(enable) if on)
    spec = jlora.LoRA(rank=2, alpha=3, slices=slices, target="kernel")
    f = lambda p, x: x @ p["c_attn"]["kernel"]
    y, grads, factors, merged = lifted_and_grads(f, {"c_attn": {"kernel": w}}, spec, x, c)
    factors, grads = factors["c_attn/kernel"], grads["c_attn/kernel"]
    assert set(factors) == {f"{name}{n}" for n in range(sum(enable)) for name in "ab"}
    delta = merged_linear(w, factors, enable, 1.5)
    assert_close(y, x @ (w + delta))
    assert_close(merged["c_attn"]["kernel"], w + delta)
    untouched = np.repeat(np.logical_not(enable), 4)
    np.testing.assert_array_equal(merged["c_attn"]["kernel"][:, untouched], w.astype(np.float32)[:, untouched])
    for n, (start, stop) in enumerate(slices):
        part = c[:, start:stop]
        assert_close(grads[f"a{n}"], 1.5 * factors[f"b{n}"] @ part.T @ x)
        assert_close(grads[f"b{n}"], 1.5 * factors[f"a{n}"] @ x.T @ part)


def test_slices_of_a_projection_into_heads():
    """Ranges of the flattened output: here they cut through the heads."""
    w, x, c = normal(1, 6, 3, 4), normal(2, 5, 6), normal(3, 5, 3, 4)
    spec = jlora.LoRA(rank=2, slices=((2, 6), (9, 12)), target="w")
    f = lambda p, x: jnp.einsum("ti,ihk->thk", x, p["w"])
    y, _, factors, _ = lifted_and_grads(f, {"w": w}, spec, x, c, {"w": "ioo"})
    factors = factors["w"]
    delta = np.zeros((6, 12))
    delta[:, 2:6], delta[:, 9:12] = factors["a0"].T @ factors["b0"], factors["a1"].T @ factors["b1"]
    assert_close(y, (x @ (w.reshape(6, 12) + delta)).reshape(5, 3, 4))


@pytest.mark.parametrize("shape,letters,fan_in", [
    ((400, 90), "io", 400), ((90, 400), "oi", 400), ((3, 200, 90), "sio", 200), ((10, 40, 90), "iio", 400),
    ((3, 3, 50, 90), "kkio", 450),
])  # fmt: skip
def test_initial_values(shape, letters, fan_in):
    """A: kaiming_uniform(a=sqrt(5)) is U(-1/sqrt(in), 1/sqrt(in)) as loralib has it; N(0, 1/r^2) as peft. B: zero."""
    start = lambda **how: jlora.adapt(
        {"w": jnp.zeros(shape)}, jlora.LoRA(rank=8, target="w", **how), axes={"w": letters}
    ).trainable["w"]
    uniform, gaussian = np.asarray(start()["a"]), np.asarray(start(init="gaussian")["a"])
    bound = 1 / math.sqrt(fan_in)
    assert 0.95 * bound < np.abs(uniform).max() <= bound
    assert abs(uniform.std() / (bound / math.sqrt(3)) - 1) < 0.05 and abs(uniform.mean()) < 0.1 * bound
    assert abs(gaussian.std() * 8 - 1) < 0.05
    assert not np.any(start()["b"]) and not np.any(start(init="gaussian")["b"])
    assert uniform.dtype == np.float32


def test_layers_of_a_stack_start_apart():
    """No two layers of a stack begin with the same a."""
    start = jlora.adapt({"w": jnp.zeros((3, 6, 5))}, jlora.LoRA(rank=2, target="w"), axes={"w": "sio"}).trainable
    a = np.asarray(start["w"]["a"])
    assert not np.array_equal(a[0], a[1]) and not np.array_equal(a[1], a[2])


def test_factors_are_float32_whatever_the_base_is():
    """Factors have the method's dtype, and the output that of the unlifted model."""
    params = {"query": {"kernel": jnp.ones((6, 4), jnp.bfloat16)}}
    trainable = jlora.adapt(params, jlora.LoRA(rank=2)).trainable
    assert {a.dtype for a in jax.tree.leaves(trainable)} == {jnp.dtype("float32")}
    half = jlora.adapt(params, jlora.LoRA(rank=2, dtype="bfloat16")).trainable
    assert {a.dtype for a in jax.tree.leaves(half)} == {jnp.dtype("bfloat16")}
    y = jlora.lift(lambda p, x: x @ p["query"]["kernel"])(jlora.adapt(params, jlora.LoRA(rank=2)), jnp.ones((3, 6)))
    assert y.dtype == jnp.float32  # what the unlifted model gives: float32 times bfloat16
    assert jlora.merge(jlora.adapt(params, jlora.LoRA(rank=2)))["query"]["kernel"].dtype == jnp.bfloat16


def test_ranks_and_alphas_by_path():
    """Several rules in a sequence: the first that matches takes a weight."""
    params = {f"layer_{n}": {"query": {"kernel": jnp.ones((8, 8))}} for n in range(3)}
    spec = [jlora.LoRA(rank=4, alpha=8, target="layer_0/"), jlora.LoRA(rank=2, alpha=1, target="query")]
    ad = jlora.adapt(params, spec)
    assert [ad.trainable[f"layer_{n}/query/kernel"]["a"].shape[0] for n in range(3)] == [4, 2, 2]
    assert [float(ad.frozen.factors[f"layer_{n}/query/kernel"]["s"]) for n in range(3)] == [2.0, 0.5, 0.5]


# BitFit and Full --------------------------------------------------------------------------


WIDE = {
    "LoRA": (jlora.LoRA(rank=6, alpha=12, target="w"), lambda f: f["a"].T @ f["b"]),
    "AdaLoRA": (jlora.AdaLoRA(rank=6, alpha=12, target="w"), lambda f: (f["p"].T * f["lam"]) @ f["q"]),
    "HiRA": (jlora.HiRA(rank=6, alpha=12, target="w"), lambda f: f["w0"] * (f["a"].T @ f["b"])),
    "DoRA": (jlora.DoRA(jlora.LoRA(rank=6, alpha=12, target="w")), None),
}


@pytest.mark.parametrize("name", WIDE)
def test_a_rank_above_the_matrix_rank_is_warned_of(name):
    """Rank 6 on (24, 5), as AdaLoRA's authors have it: the formula as it stands, s = alpha / r, and a warning."""
    method, update = WIDE[name]
    w0 = np.random.default_rng(0).standard_normal((24, 5))
    with pytest.warns(UserWarning, match=r"'w': rank 6 is above min\(in, out\) = 5"):
        ad = jlora.adapt({"w": jnp.asarray(w0, jnp.float32)}, method)
    far = jlora.join(away_from_start(ad.trainable), ad.frozen)
    x = np.random.default_rng(1).standard_normal((3, 24))
    lifted = jlora.lift(lambda p, x: x @ p["w"])(far, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(lifted, x @ np.float64(jlora.merge(far)["w"]), rtol=1e-4, atol=1e-4)
    if update is not None:
        f = {n: np.float64(v) for n, v in far.trainable["w"].items()} | {"w0": w0}
        np.testing.assert_allclose(jlora.merge(far)["w"], w0 + 2 * update(f), rtol=1e-4, atol=1e-4)


def test_a_rank_above_the_width_of_a_slice_is_warned_of():
    """Rank 3 on a slice of 2 columns: each slice by its own formula, and the narrower one in the warning."""
    w0 = np.random.default_rng(0).standard_normal((8, 6))
    method = jlora.LoRA(rank=3, alpha=6, slices=((0, 2), (2, 6)), target="w")
    with pytest.warns(UserWarning, match=r"'w': rank 3 is above min\(in, out\) = 2$"):
        ad = jlora.adapt({"w": jnp.asarray(w0, jnp.float32)}, method)
    far = jlora.join(away_from_start(ad.trainable), ad.frozen)
    f = {n: np.float64(v) for n, v in far.trainable["w"].items()}
    want = w0 + 2 * np.concatenate([f["a0"].T @ f["b0"], f["a1"].T @ f["b1"]], 1)
    np.testing.assert_allclose(jlora.merge(far)["w"], want, rtol=1e-4, atol=1e-4)
    x = np.random.default_rng(1).standard_normal((3, 8))
    lifted = jlora.lift(lambda p, x: x @ p["w"])(far, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(lifted, x @ want, rtol=1e-4, atol=1e-4)


def test_a_wide_rank_can_be_resized_and_compacted():
    """A rank above min(in, out), which `adapt` warns of, is cut without a change."""
    with pytest.warns(UserWarning, match="above min"):
        ad = jlora.adapt({"w": jnp.ones((24, 5))}, jlora.LoRA(rank=6, target="w"))
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    small, error = jlora.rank.resize(ad, rank=6)
    assert small.trainable["w"]["a"].shape == (5, 24) and error["w"] < 1e-5
    np.testing.assert_allclose(jlora.merge(small)["w"], jlora.merge(ad)["w"], atol=1e-4)
    assert jlora.rank.compact(jlora.rank.prune(ad, jlora.rank.magnitude(ad), 5)).trainable["w"]["b"].shape == (5, 5)


@pytest.mark.parametrize(
    ("options", "shape", "ranks"),
    [
        ({"decompose_both": True, "factor": 8}, (64, 64), ("q", "r")),
        ({"factor": 8}, (64, 64), ("r",)),
        ({"factor": 2, "rank": 40}, (64, 64), ()),
        ({"factor": 8, "tucker": True}, (3, 64, 64), ("r", "u")),
    ],
    ids=["both", "second", "none", "tucker"],
)
def test_the_ranks_of_lokr(options, shape, ranks):
    """Each factor that is a product of two has a rank of its own; a core between two has two."""
    params = {"conv": {"kernel": jnp.ones(shape)}}
    spec = jlora.LoKr(**{"rank": 2, "target": "kernel", **options})
    adapted = jlora.adapt(params, spec, axes={"kernel": "kio"[-len(shape) :]})
    assert adapted.frozen.plan.sites[0].recipe.deltas[0].ranks == ranks


class Blocks(methods.Method):
    """dW of one array whose two letters are the rows."""

    def recipe(self, leaf):
        word = network.Array("x", methods.base.normal(1.0))
        sizes = (("i", 3), ("j", leaf.size("i") // 3))
        return network.Recipe((network.Delta("i j O -> (i j) O", (word,), sizes),))


def test_rows_of_two_letters_of_one_array():
    """The index of a row is taken apart into that of each letter, the slow one first."""
    params, ids = {"embedding": jnp.zeros((12, 5))}, jnp.array([[0, 1, 4], [11, 7, 8]])
    adapted = jlora.adapt(params, Blocks(target="embedding"), axes={"embedding": "io"})
    found = jlora.lift(lambda params, ids: jnp.take(params["embedding"], ids, axis=0))(adapted, ids)
    x = np.asarray(adapted.trainable["embedding"]["x"]).reshape(12, 5)
    np.testing.assert_array_equal(found, x[np.asarray(ids)])


def test_bitfit_and_full():
    """W0 + dW and b0 + db, float32 deltas from zero."""
    params = {"dense": {"kernel": normal(1, 6, 5), "bias": normal(2, 5)}}
    x, c = normal(3, 4, 6), normal(4, 4, 5)
    f = lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"]
    spec = [jlora.BitFit(), jlora.Full(target="kernel")]
    y, grads, factors, merged = lifted_and_grads(f, params, spec, x, c)
    kernel = params["dense"]["kernel"] + factors["dense/kernel"]["delta"]
    bias = params["dense"]["bias"] + factors["dense/bias"]["delta"]
    assert_close(y, x @ kernel + bias)
    assert_close(merged, {"dense": {"kernel": kernel, "bias": bias}})
    assert_close(grads["dense/kernel"]["delta"], x.T @ c)
    assert_close(grads["dense/bias"]["delta"], c.sum(0))


def test_bitfit_takes_every_bias_and_nothing_else():
    """Biases by all their names; no scale, kernel or table."""
    params = {
        "dense": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)},
        "norm": {"scale": jnp.ones(2), "bias": jnp.ones(2)},
        "old": {"gamma": jnp.ones(2), "beta": jnp.ones(2), "b": jnp.ones(2)},
        "attention_bias_table": jnp.ones((4, 4)),
    }
    assert set(jlora.adapt(params, jlora.BitFit()).trainable) == {"dense/bias", "norm/bias", "old/beta", "old/b"}


# Scaling, merging, unmerging --------------------------------------------------------------


def settled(dtype=jnp.float32, size=1.0):
    """One adapted kernel with factors of a given size, and its float64 parts."""
    w = jnp.asarray(normal(1, 40, 30), dtype)
    ad = jlora.adapt({"query": {"kernel": w}}, jlora.LoRA(rank=4, alpha=8))
    ad = jlora.Adapted(away_from_start(ad.trainable, size), ad.frozen)
    a, b = (np.asarray(ad.trainable["query/kernel"][n], np.float64) for n in "ab")
    return ad, np.asarray(w, np.float64), 2.0 * a.T @ b


@pytest.mark.parametrize("x", [0, 0.5, 1, -2.0])
def test_scale(x):
    """W0 + x dW, under `jit` too; exactly W0 at x = 0."""
    ad, w, delta = settled()
    assert_close(jlora.merge(jlora.scale(ad, x))["query"]["kernel"], w + x * delta)
    traced = jax.jit(lambda ad, x: jlora.merge(jlora.scale(ad, x)))(ad, x)
    assert_close(traced["query"]["kernel"], w + x * delta)
    if x == 0:
        np.testing.assert_array_equal(traced["query"]["kernel"], ad.frozen.base["query"]["kernel"])
    inputs = normal(5, 3, 40)
    f = jlora.lift(lambda p, x: x @ p["query"]["kernel"])
    assert_close(f(jlora.scale(ad, x), jnp.asarray(inputs, jnp.float32)), inputs @ (w + x * delta))


def test_the_gradient_of_a_scale():
    """It is data, so that merging has a slope in it; a lifted function has none."""
    ad, w, delta = settled()
    inputs = normal(5, 3, 40)
    f = jlora.lift(lambda p, x: x @ p["query"]["kernel"])
    slope = jax.jacrev(lambda x: f(jlora.scale(ad, x), jnp.asarray(inputs, jnp.float32)))(0.5)
    assert not np.any(slope)  # `lift` stops gradients at what is frozen, and the scale is
    _, tangent = jax.jvp(lambda x: jlora.merge(jlora.scale(ad, x))["query"]["kernel"], (1.0,), (1.0,))
    assert_close(tangent, delta)


@pytest.mark.parametrize("size", [1.0, 0.1, 0.02])
def test_merge_report_in_bfloat16(size):
    """The share of the delta that the cast leaves, by its definition in float64."""
    ad, w, delta = settled(jnp.bfloat16, size)
    kept = np.asarray(jnp.asarray(w + delta, jnp.bfloat16), np.float64) - w
    lost = np.linalg.norm(kept - delta) / np.linalg.norm(delta)
    (row,) = jlora.merge_report(ad).rows
    assert row.path == "query/kernel"
    assert abs(row.relative_error - lost) < 1e-2 * lost
    assert abs(row.survives - np.sum(kept * delta) / np.sum(delta**2)) < 1e-2
    assert jlora.merge_report(settled(size=size)[0]).worst > 0.9999


OPTIMISED = """
import jax, jax.numpy as jnp, jlora
w = jax.random.normal(jax.random.key(0), (64, 64)).astype(jnp.bfloat16)
fresh = jlora.adapt({"w": w}, jlora.LoRA(rank=4, target="w"))
a, b = (jax.random.normal(jax.random.key(n), (4, 64)) for n in (1, 2))
print(jlora.merge_report(jlora.join({"w": {"a": 5e-4 * a, "b": b}}, fresh.frozen)).worst)
"""


def test_merge_report_with_the_optimiser_on():
    """Left to itself XLA drops a cast and its inverse together, and finds that nothing is lost."""
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run([sys.executable, "-c", OPTIMISED], env=env, capture_output=True, text=True, check=True)
    assert 0.3 < float(done.stdout) < 0.7  # a thousandth of the weight: half is lost in bfloat16


def test_unmerge():
    """What is subtracted in float32 comes back to rounding, and the drift says how far."""
    ad, w, _ = settled()
    params, drift = jlora.unmerge(jlora.merge(ad), ad)
    assert_close(params["query"]["kernel"], w, 1e-6)
    assert 0 <= drift["query/kernel"] < 1e-6
    half, w, _ = settled(jnp.bfloat16)
    params, drift = jlora.unmerge(jlora.merge(half), half)
    assert_close(params["query"]["kernel"], w, 2**-6)
    assert drift["query/kernel"] < 2**-7


# Adapter dropout --------------------------------------------------------------------------
#
# W0 = 0, a = b = 1 and x = 1, so that what comes out is the mask itself, divided by 1 - rate.

RATE, SIZE = 0.5, 32


def transparent(stack=(), letters="io", shape=None, rank=SIZE):
    """An adapter whose delta is the identity on what dropout leaves."""
    shape = (*stack, SIZE, SIZE) if shape is None else shape
    spec = jlora.LoRA(rank=rank, target="w", dropout=RATE)
    ad = jlora.adapt({"w": jnp.zeros(shape)}, spec, axes={"w": letters})
    eye = jax.tree.map(lambda a: jnp.broadcast_to(jnp.eye(SIZE), a.shape), ad.trainable)
    return jlora.Adapted(eye, ad.frozen)


ROWS = jnp.ones((4, SIZE))


def twice(p, x):
    return x @ p["w"], x @ p["w"]


def in_jit(p, x):
    layer = jax.jit(lambda x, w: x @ w)
    return layer(x, p["w"]), layer(x, p["w"])


def in_remat(p, x):
    layer = jax.checkpoint(lambda x, w: x @ w)
    return layer(x, p["w"]), layer(x, p["w"])


def in_scan_over_layers(p, x):
    return jax.lax.scan(lambda _, w: (None, x @ w), None, p["w"])[1]


def in_scan_over_time(p, x):
    return jax.lax.scan(lambda _, x: (None, x @ p["w"]), None, jnp.stack([x, x, x]))[1]


def in_scan_of_two_uses(p, x):
    return tuple(jax.lax.scan(lambda _, x: (None, twice(p, x)), None, jnp.stack([x, x]))[1])


def in_map(p, x):
    return jax.lax.map(lambda w: x @ w, p["w"])


def in_vmap(p, x):
    """Each layer with a stream of its own. (One stream for all of them is one activation, and is masked once.)"""
    return jax.vmap(lambda w, x: x @ w)(p["w"], jnp.stack([x, x, x]))


def in_fori_loop(p, x):
    put = lambda i, ys: ys.at[i].set(x @ p["w"])
    return jax.lax.fori_loop(0, 3, put, jnp.zeros((3, 4, SIZE)))


def in_while_loop(p, x):
    turn = lambda c: (c[0] + 1, c[1].at[c[0]].set(x @ p["w"]))
    return jax.lax.while_loop(lambda c: c[0] < 3, turn, (0, jnp.zeros((3, 4, SIZE))))[1]


def in_indexed_stack(p, x):
    return tuple(x @ p["w"][n] for n in range(3))


def in_cond(p, x):
    use = lambda: jax.lax.cond(True, lambda: x @ p["w"], lambda: 0 * x)
    return use(), use()


def transposed(p, x):
    return x @ p["w"], x @ p["w"].T


STACKED = (in_scan_over_layers, in_map, in_vmap, in_indexed_stack)
SINGLE = (twice, in_jit, in_remat, in_scan_over_time, in_scan_of_two_uses, in_fori_loop, in_while_loop, in_cond,
          transposed)  # fmt: skip


def masks(f, key, **options):
    ad = transparent(**({"stack": (3,), "letters": "sio"} if f in STACKED else {}), **options)
    ad = jlora.with_dropout(ad, key)
    out = jax.jit(lambda ad, x: jlora.lift(f)(ad, x))(ad, ROWS)
    out = [np.asarray(y).reshape(-1, 4, SIZE) for y in jax.tree.leaves(out)]
    return np.concatenate(out)


@pytest.mark.slow
@pytest.mark.parametrize("f", (*SINGLE, *STACKED), ids=lambda f: f.__name__)
def test_every_use_draws_a_mask_of_its_own(f, key):
    """Uses, layers and turns: each mask keeps half, and no two are alike; the next key draws others."""
    drawn = masks(f, key)
    assert set(np.unique(drawn)) == {0.0, 1 / (1 - RATE)}
    assert len(drawn) >= 2
    for one, other in itertools.combinations(drawn, 2):
        assert 0.25 < np.mean(one == other) < 0.75
    assert all(abs(np.mean(mask) - 1) < 0.4 for mask in drawn)
    assert np.array_equal(drawn, masks(f, key))
    assert not np.array_equal(drawn, masks(f, jax.random.key(7)))


def test_rows_draw_masks_of_their_own(key):
    """No two rows of an activation share a mask."""
    (mask, _) = masks(twice, key)
    assert all(0.2 < np.mean(a == b) < 0.8 for a, b in itertools.combinations(mask, 2))


@pytest.mark.parametrize("f", (twice, in_scan_over_layers, in_while_loop), ids=lambda f: f.__name__)
def test_without_a_key_there_is_no_dropout(f):
    """Without a key, and in `merge`, every element is kept."""
    ad = transparent(**({"stack": (3,), "letters": "sio"} if f in STACKED else {}))
    for y in jax.tree.leaves(jlora.lift(f)(ad, ROWS)):
        np.testing.assert_array_equal(y, np.ones_like(y))
    assert as_bytes(jlora.merge(jlora.with_dropout(ad, jax.random.key(0)))) == as_bytes(jlora.merge(ad))


def test_weights_draw_masks_of_their_own(key):
    """Two weights under one key have unlike masks."""
    params = {"u": jnp.zeros((SIZE, SIZE)), "w": jnp.zeros((SIZE, SIZE))}
    ad = jlora.adapt(params, jlora.LoRA(rank=SIZE, target=".", dropout=RATE))
    eye = jax.tree.map(lambda a: jnp.eye(SIZE), ad.trainable)
    ad = jlora.with_dropout(jlora.Adapted(eye, ad.frozen), key)
    one, other = jlora.lift(lambda p, x: (x @ p["u"], x @ p["w"]))(ad, ROWS)
    assert 0.25 < np.mean(np.asarray(one) == np.asarray(other)) < 0.75


@pytest.mark.parametrize("how", ["indexed", "scanned"])
def test_layers_of_a_stack_that_is_split_draw_masks_of_their_own(key, how):
    """Layers taken from a stack one by one have unlike masks."""
    ad = jlora.adapt(
        {"w": jnp.zeros((4, SIZE, SIZE))}, jlora.LoRA(rank=SIZE, target=".", dropout=RATE), axes={"w": "sio"}
    )
    eye = jax.tree.map(lambda a: jnp.broadcast_to(jnp.eye(SIZE), (4, SIZE, SIZE)), ad.trainable)
    ad = jlora.with_dropout(jlora.Adapted(eye, ad.frozen), key)

    def f(p):
        w = p["w"].reshape(2, 2, SIZE, SIZE)
        if how == "indexed":
            return jnp.stack([ROWS @ w[n, m] for n in range(2) for m in range(2)])
        layer = lambda _, w: (None, ROWS @ w)
        return jax.lax.scan(lambda _, ws: jax.lax.scan(layer, None, ws), None, w)[1].reshape(4, *ROWS.shape)

    made = np.asarray(jlora.lift(f)(ad))
    for n in range(4):
        for m in range(n):
            assert 0.25 < np.mean(made[n] == made[m]) < 0.75


def uses():
    """(name, function, weight, letters, input): dropout reaches every kind of contraction."""
    numbers = ("NHWC", "HWIO", "NHWC")
    convolve = lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=numbers)
    groups = jnp.array([2, 0, 3], jnp.int32)
    return {
        "dot": (lambda p, x: x @ p["w"], (6, 5), "io", (4, 6)),
        "heads": (lambda p, x: jnp.einsum("ti,ihk->thk", x, p["w"]), (6, 2, 3), "ioo", (4, 6)),
        "merged heads": (lambda p, x: jnp.einsum("thk,hko->to", x, p["w"]), (2, 3, 5), "iio", (4, 2, 3)),
        "experts": (lambda p, x: jnp.einsum("eti,eio->eto", x, p["w"]), (3, 6, 5), "sio", (3, 4, 6)),
        "convolution": (convolve, (3, 2, 4, 5), "kkio", (2, 6, 5, 4)),
        "ragged": (lambda p, x: jax.lax.ragged_dot(x, p["w"], groups), (3, 6, 5), "sio", (5, 6)),
    }


@pytest.mark.parametrize("rates", [{"dropout": 0.3}, {"rank_dropout": 0.3, "module_dropout": 0.2}], ids=" ".join)
@pytest.mark.parametrize("name", uses())
def test_dropout_spares_the_base_and_is_right_in_the_mean(name, rates, key):
    """The mean over many keys is the output without dropout; single draws differ; the base's own part has none."""
    f, shape, letters, inputs = uses()[name]
    x = jnp.asarray(normal(2, *inputs), jnp.float32)
    ad = jlora.adapt({"w": jnp.asarray(normal(1, *shape), jnp.float32)}, jlora.LoRA(rank=2, target="w", **rates),
                     axes={"w": letters})  # fmt: skip
    ad = jlora.Adapted(away_from_start(ad.trainable), ad.frozen)
    one = lambda key: jlora.lift(f)(jlora.with_dropout(ad, key), x)
    run = jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=None if name == "ragged" else 4000))
    drawn = np.asarray(run(jax.random.split(key, 4000)), np.float64)
    want = np.asarray(jlora.lift(f)(ad, x), np.float64)
    spread = drawn.std(axis=0)
    assert np.mean(spread > 0.01) > 0.8
    assert np.all(np.abs(drawn.mean(axis=0) - want) < 6 * spread / math.sqrt(4000) + 1e-5)
    base = np.asarray(f(ad.frozen.base, x))
    off = jlora.scale(ad, 0)
    np.testing.assert_array_equal(jlora.lift(f)(jlora.with_dropout(off, key), x), base)


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + nn.Dense(6, name="down")(nn.tanh(nn.Dense(9, name="up")(x))), None


@pytest.mark.slow
@pytest.mark.parametrize("how", ["plain", "remat", "forward_mode"])
def test_the_gradient_under_a_key_is_the_slope_of_what_was_drawn(how, key):
    """Finite differences along one direction: the backward pass, and what remat computes again, use the same masks."""
    block = nn.remat(Block) if how == "remat" else Block
    scan = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    x = jnp.asarray(normal(2, 4, 6), jnp.float32)
    params = scan().init(key, x, None)
    ad = jlora.adapt(params, jlora.LoRA(rank=2, target="kernel", dropout=0.4), axes={"kernel": "sio"})
    trainable, frozen = away_from_start(ad.trainable), ad.frozen
    direction = away_from_start(trainable, 0.5)
    apply = jlora.lift(scan().apply, forward_mode=how == "forward_mode")

    @jax.jit
    def loss(t, key):
        ad = jlora.with_dropout(jlora.join(t, frozen), key)
        return jnp.sum(jnp.sin(apply(ad, x, None)[0]))

    along = lambda h: jax.tree.map(lambda a, d: a + h * d, trainable, direction)
    slope = (float(loss(along(3e-3), key)) - float(loss(along(-3e-3), key))) / 6e-3
    grads = jax.jit(jax.grad(loss))(trainable, key)
    inner = sum(float(jnp.vdot(g, d)) for g, d in zip(jax.tree.leaves(grads), jax.tree.leaves(direction), strict=True))
    assert abs(slope - inner) < 2e-3 * max(1, abs(inner))
    other = jax.jit(jax.grad(loss))(trainable, jax.random.key(9))
    assert as_bytes(other) != as_bytes(grads)


def test_what_is_said_of_a_method_is_said_of_those_inside_it():
    """A DoRA or a Sum without the start that it subtracts has parts without theirs; with none inside it is itself."""
    pissa = jlora.LoRA(rank=2, init="pissa", target="w")
    bare = pissa.unpaired()
    assert bare != pissa
    assert jlora.DoRA(pissa).unpaired() == jlora.DoRA(bare)
    assert jlora.Sum(pissa, jlora.KronA(), target="w").unpaired() == jlora.Sum(bare, jlora.KronA(), target="w")
    assert jlora.KronA(target="w").unpaired() == jlora.KronA(target="w")
