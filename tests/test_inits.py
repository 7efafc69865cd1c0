"""Where LoRA's a and b begin: against peft's file, closed forms in float64 NumPy, and the base, bit for bit.

Singular vectors and the columns of Q have no sign of their own: products and subspaces are compared, not factors.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from safetensors.numpy import load_file

import jlora
from methods import CASES, METHODS, adapted, as_bytes, as_function_of_arrays, assert_close, away_from_start, floats

pytestmark = pytest.mark.settled

PEFT = load_file(Path(__file__).parent / "fixtures" / "peft" / "inits.safetensors")
PAIRS = ("pissa", "olora", "orthogonal")
DENSE = lambda p, x: x @ p["w"]


def normal(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def factors(ad, path="w"):
    """Everything a weight has, in float64."""
    return {k: np.float64(x) for k, x in {**ad.trainable.get(path, {}), **ad.frozen.factors.get(path, {})}.items()}


def product(a, b):
    """a (..., r, in), b (..., r, out) -> a^T b."""
    return np.swapaxes(a, -1, -2) @ b


def span(rows):
    """The projector onto the rows' span."""
    q, _ = np.linalg.qr(np.swapaxes(np.float64(rows), -1, -2))
    return q @ np.swapaxes(q, -1, -2)


def best(w, r):
    """Eckart-Young: the best approximation of rank r."""
    u, s, vh = np.linalg.svd(np.float64(w), full_matrices=False)
    return (u[..., :r] * s[..., None, :r]) @ vh[..., :r, :]


# --- the formulas -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_against_peft(name):
    """peft trains A, B beside Wres = W - s B A; here the base stays W, and what is subtracted is s a0 b0."""
    ad = jlora.adapt({"w": jnp.asarray(PEFT["W"].T)}, jlora.LoRA(rank=4, alpha=8, init=name, target="w"))
    f = factors(ad)
    want = (np.float64(PEFT[f"{name}.B"]) @ PEFT[f"{name}.A"]).T
    np.testing.assert_allclose(product(f["a"], f["b"]), want, atol=2e-5)
    np.testing.assert_allclose(PEFT["W"].T - f["s"] * product(f["a0"], f["b0"]), PEFT[f"{name}.Wres"].T, atol=2e-5)
    norms = lambda a, b: (np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1))
    for mine, theirs in zip(norms(f["a"], f["b"]), norms(PEFT[f"{name}.A"], PEFT[f"{name}.B"].T), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)  # how the product is shared between the two


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_pissa_is_the_best_approximation(dtype):
    """PiSSA begins at the best approximation of its rank, shared evenly by a and b, for a bfloat16 weight too."""
    w = normal(0, 12, 10, dtype=dtype)
    f = factors(jlora.adapt({"w": w}, jlora.LoRA(rank=3, alpha=5, init="pissa", target="w")))
    want = best(np.float64(w), 3)
    np.testing.assert_allclose(f["s"] * product(f["a"], f["b"]), want, atol=1e-5)
    rest = np.linalg.svd(np.float64(w), compute_uv=False)[3:]
    error = np.linalg.norm(np.float64(w) - f["s"] * product(f["a"], f["b"]))
    np.testing.assert_allclose(error, np.sqrt((rest**2).sum()), rtol=1e-5)
    np.testing.assert_allclose((f["a"] ** 2).sum(1), (f["b"] ** 2).sum(1), rtol=1e-5)  # halved between them


def test_olora_is_orthonormal_and_orthogonal_is_zero():
    """OLoRA's b is orthonormal and its a is R; the orthogonal start is a zero product of factors that are not."""
    w = normal(1, 12, 10)
    f = factors(jlora.adapt({"w": w}, jlora.LoRA(rank=4, alpha=5, init="olora", target="w")))
    np.testing.assert_allclose(f["b"] @ f["b"].T, np.eye(4), atol=1e-6)
    np.testing.assert_allclose(f["a"], f["b"] @ np.float64(w).T, atol=1e-5)  # R = Q^T W^T
    f = factors(jlora.adapt({"w": w}, jlora.LoRA(rank=4, init="orthogonal", target="w")))
    assert np.abs(product(f["a"], f["b"])).max() < 1e-6
    assert all(np.abs(f[k]).max() > 0.05 for k in "ab")


@pytest.mark.parametrize("name", ["pissa", "olora"])
def test_many_axes_are_flattened_and_stacks_stay_apart(name):
    """(layers, in, heads, size), a stack in the middle, and a convolution's window with its channels."""
    method = lambda target: jlora.LoRA(rank=2, alpha=3, init=name, target=target)
    for shape, roles, flat in (
        ((3, 6, 2, 5), "sioo", lambda w: w.reshape(3, 6, 10)),
        ((6, 3, 4), "iso", lambda w: w.transpose(1, 0, 2)),
        ((3, 3, 2, 5), "kkio", lambda w: w.reshape(18, 5)),
    ):
        w = normal(2, *shape)
        f = factors(jlora.adapt({"w": w}, method("w"), axes={"w": roles}))
        matrices = np.float64(flat(np.asarray(w)))
        got = f["s"][..., None, None] * product(
            f["a"].reshape(*matrices.shape[:-2], 2, -1), f["b"].reshape(*matrices.shape[:-2], 2, -1)
        )
        if name == "pissa":
            np.testing.assert_allclose(got, best(matrices, 2), atol=1e-5)
        else:
            q, r = np.linalg.qr(np.swapaxes(matrices, -1, -2))
            np.testing.assert_allclose(got, 1.5 * np.swapaxes(q[..., :2] @ r[..., :2, :], -1, -2), atol=1e-5)


# --- the pair -----------------------------------------------------------------------------------------------------

MODELS = ("linen/bfloat16_params", "linen/scan_axis_1_remat", "linen/tied_attend")


@pytest.mark.parametrize("model", [MODELS[0], *(pytest.param(m, marks=pytest.mark.slow) for m in MODELS[1:])])
def test_the_start_is_the_base_bit_for_bit_however_it_is_computed(model):
    """Lifted, eager and compiled, and merged; no sum cancels, so nothing that a compiler fuses can matter."""
    case = CASES[model]
    fn, params, args = case.build()
    ad = adapted(next(row for row in METHODS if row.name == "pissa"), case, params)
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    lifted = jlora.lift(call)
    # compiled, the tied model's own dots are fused otherwise once they are lifted, under a LoRA of zeros too
    compiled = model != "linen/tied_attend"
    for wrap in (lambda f: f, *[jax.jit] * compiled):
        run = lambda f, p, wrap=wrap: wrap(f)(p, arrays)
        for got in (run(lifted, ad), run(call, jlora.merge(ad)), run(lifted, jlora.scale(ad, 0))):
            for a, b in zip(floats(got), floats(run(call, params)), strict=True):
                np.testing.assert_array_equal(np.float64(a), np.float64(b))


@pytest.mark.parametrize("shape", [(64, 8, 8), (2, 64, 64)], ids=["merged", "factored"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_start_where_the_planner_merges(shape, dtype):
    """A pair starts at the base bit for bit where the planner merges and where it does not, and at a scale of 0."""
    tokens, d_in, d_out = shape
    params, x = {"w": normal(3, d_in, d_out, dtype=dtype)}, normal(4, tokens, d_in, dtype=dtype)
    ad = jlora.adapt(params, jlora.LoRA(rank=4, alpha=3, init="pissa", target="w"))
    (row,) = jlora.explain(DENSE, ad, x).rows
    assert row.plan == ("merged" if shape == (64, 8, 8) and dtype == jnp.float32 else "factored")
    for f in (jlora.lift(DENSE), jax.jit(jlora.lift(DENSE))):
        np.testing.assert_array_equal(np.float64(f(ad, x)), np.float64(DENSE(params, x)))
    np.testing.assert_array_equal(np.float64(jlora.merge(jlora.scale(ad, 0))["w"]), np.float64(params["w"]))


def test_what_is_learned_is_not_drowned_in_bfloat16():
    """Two products of the weight's size, each rounded and then subtracted, would err by percents of the update."""
    w, x = normal(5, 64, 64, dtype=jnp.bfloat16), normal(6, 32, 64, dtype=jnp.bfloat16)
    ad = jlora.adapt({"w": w}, jlora.LoRA(rank=8, init="pissa", target="w"))
    step = away_from_start(ad.trainable, 1e-3)
    ad = jlora.join(jax.tree.map(jnp.add, ad.trainable, step), ad.frozen)
    f = factors(ad)
    want = np.float64(x) @ (product(f["a"], f["b"]) - product(f["a0"], f["b0"]))
    alone = jlora.join(ad.trainable, dataclasses.replace(ad.frozen, base={"w": 0 * w}))
    delta = jlora.lift(DENSE)(alone, x)
    assert np.linalg.norm(np.float64(delta) - want) < 0.01 * np.linalg.norm(want)


@pytest.mark.parametrize("name", PAIRS)
def test_the_update_is_the_difference_of_the_products(name):
    """A pair's update is s (a b - a0 b0), merged and lifted, and unmerging takes the same away."""
    params = {"w": normal(7, 12, 10)}
    ad = jlora.adapt(params, jlora.LoRA(rank=2, alpha=3, init=name, target="w"))
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    f = factors(ad)
    want = np.float64(params["w"]) + f["s"] * (product(f["a"], f["b"]) - product(f["a0"], f["b0"]))
    np.testing.assert_allclose(jlora.merge(ad)["w"], want, rtol=1e-5, atol=1e-5)
    x = normal(8, 5, 12)
    np.testing.assert_allclose(jlora.lift(DENSE)(ad, x), np.float64(x) @ want, rtol=1e-4, atol=1e-4)
    params_again, drift = jlora.unmerge(jlora.merge(ad), ad)
    np.testing.assert_allclose(params_again["w"], params["w"], atol=1e-5)
    assert drift["w"] < 1e-6


@pytest.mark.parametrize("model", ["linen/mlp", "linen/scan_axis_1_remat"])
def test_a_pair_as_a_plain_lora_of_twice_the_rank(model):
    """A pair is a plain LoRA of twice the rank, which merges and computes bit for bit as the pair did."""
    case = CASES[model]
    fn, params, args = case.build()
    ad = adapted(next(row for row in METHODS if row.name == "olora"), case, params)
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    flat = jlora.init.plain(ad)
    assert as_bytes(jlora.merge(flat)) == as_bytes(jlora.merge(ad))
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    got, want = (floats(jax.jit(jlora.lift(call))(a, arrays)) for a in (flat, ad))
    assert as_bytes(got) == as_bytes(want)
    again = jlora.adapt(params, jlora.LoRA(rank=4, target=case.target), axes=dict(case.axes or {}))
    assert jax.tree.structure(flat) == jax.tree.structure(again), "it is a LoRA like any other"


def test_lora_fa_of_a_pair_trains_b_alone():
    """LoRA-FA over PiSSA starts at the base and trains b alone: its update is s a (b - b0)."""
    params = {"w": normal(9, 8, 6)}
    ad = jlora.adapt(params, jlora.LoRAFA(rank=2, init="pissa", target="w"))
    assert set(ad.trainable["w"]) == {"b"} and set(ad.frozen.factors["w"]) == {"a", "b0", "s"}
    np.testing.assert_array_equal(jlora.merge(ad)["w"], params["w"])
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    f = factors(ad)
    np.testing.assert_allclose(jlora.merge(ad)["w"], params["w"] + product(f["a"], f["b"] - f["b0"]), atol=1e-5)
    assert as_bytes(jlora.merge(jlora.init.plain(ad))) == as_bytes(jlora.merge(ad))


def test_dora_over_a_pair():
    """DoRA's direction is W0 plus the pair's difference, and starts at the base; lifting it in a scan is the same."""
    params = {"w": normal(10, 3, 8, 6)}
    spec = jlora.DoRA(jlora.LoRA(rank=2, alpha=3, init="pissa", target="w"))
    ad = jlora.adapt(params, spec, axes={"w": "sio"})
    np.testing.assert_allclose(jlora.merge(ad)["w"], params["w"], rtol=1e-6)
    trained = {"w": {**away_from_start(ad.trainable)["w"], "m": ad.trainable["w"]["m"] + 0.5}}
    ad = jlora.join(trained, ad.frozen)
    f = factors(ad)
    direction = np.float64(params["w"]) + 1.5 * (product(f["a"], f["b"]) - product(f["a0"], f["b0"]))
    want = f["m"][:, None] * direction / np.linalg.norm(direction, axis=1, keepdims=True)
    np.testing.assert_allclose(jlora.merge(ad)["w"], want, rtol=1e-4, atol=1e-5)
    scanned = lambda p, x: lax.scan(lambda x, w: (x @ w @ w.T, None), x, p["w"])[0]
    x = normal(11, 4, 8)
    assert_close(jlora.lift(scanned)(ad, x), jlora.lift(scanned, dense=True)(ad, x), 1e-5)


def test_two_pairs_share_one_base_and_one_program():
    """Alpha and the kind of start are data: adapters that differ in them share base, plan and compiled program."""
    params, x = {"w": normal(12, 8, 6)}, normal(13, 4, 8)
    make = lambda alpha, name: jlora.adapt(params, jlora.LoRA(rank=2, alpha=alpha, init=name, target="w"))
    a, b = make(2, "pissa"), make(8, "olora")
    assert a.frozen.plan is b.frozen.plan and a.frozen.base is b.frozen.base is params
    f = jax.jit(jlora.lift(DENSE))
    f(a, x), f(b, x)
    assert f._cache_size() == 1


@pytest.mark.parametrize("compiled", [False, True])
def test_trained_and_frozen_factors_share_no_buffer(compiled):
    """Donating the trained factors leaves the frozen starts alive, though both began as the same numbers."""
    params = {"w": normal(14, 8, 6)}
    make = lambda p: jlora.adapt(p, jlora.LoRA(rank=2, init="pissa", target="w"))
    trainable, frozen = jlora.split(jax.jit(make)(params) if compiled else make(params))
    more = lambda t, f, x: (jax.tree.map(lambda a: a + 1, t), jlora.lift(DENSE)(jlora.join(t, f), x))
    step = jax.jit(more, donate_argnums=0)
    for _ in range(2):
        trainable, _ = step(trainable, frozen, normal(15, 4, 8))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(frozen))


def test_a_pair_is_saved_and_loaded(tmp_path):
    """A pair comes back from its file with its starts and its plan, bit for bit, and prints as a pair."""
    params = {"w": normal(16, 8, 6)}
    ad = jlora.adapt(params, jlora.LoRA(rank=2, alpha=3, init="olora", target="w"))
    jlora.save(tmp_path / "x", ad)
    back = jlora.load(tmp_path / "x", params)
    assert back.frozen.plan is ad.frozen.plan and as_bytes(back) == as_bytes(ad)
    assert "pair" in str(back)


# --- LoRA-GA ------------------------------------------------------------------------------------------------------


def squares(p, batch):
    x, y = batch
    return jnp.mean((jnp.tanh(x @ p["a"]["w"]) @ p["b"]["w"] - y) ** 2)


def two_layers():
    params = {"a": {"w": normal(20, 9, 8)}, "b": {"w": normal(21, 8, 7)}, "bias": jnp.zeros(3)}
    return params, [(normal(22 + n, 16, 9), normal(32 + n, 16, 7)) for n in range(3)]


def test_gradients_are_the_mean_over_batches():
    """The gradients of LoRA-GA are those of the plain weights, averaged over the batches, of the targets alone."""
    params, batches = two_layers()
    spec = jlora.LoRA(rank=2, target="w$")
    got = jlora.init.gradients(squares, params, iter(batches), spec)
    want = [jax.grad(squares)(params, batch) for batch in batches]
    assert set(got) == {"a/w", "b/w"}
    for path, name in (("a/w", "a"), ("b/w", "b")):
        np.testing.assert_allclose(got[path], sum(g[name]["w"] for g in want) / 3, rtol=1e-5, atol=1e-7)


def test_lora_ga_takes_the_best_first_step():
    """One SGD step moves the weight along the best approximation of rank 2r of its gradient, and no other would."""
    params, batches = two_layers()
    spec = jlora.LoRA(rank=2, alpha=3, target="w$")
    grads = jlora.init.gradients(squares, params, batches[:1], spec)
    ad = jlora.adapt(params, dataclasses.replace(spec, init=jlora.init.GA(grads)))
    trainable, frozen = jlora.split(ad)
    lifted = jlora.lift(squares)
    np.testing.assert_allclose(lifted(ad, batches[0]), squares(params, batches[0]), rtol=1e-6)
    assert as_bytes(jlora.merge(ad)) == as_bytes(params)
    steps = jax.grad(lambda t: lifted(jlora.join(t, frozen), batches[0]))(trainable)
    for path in ("a/w", "b/w"):
        g = np.float64(grads[path])
        f = factors(ad, path)
        c = g.shape[1] ** 0.25 / 4
        np.testing.assert_allclose(f["a"] @ f["a"].T, c**2 * np.eye(2), atol=1e-5)
        np.testing.assert_allclose(f["b"] @ f["b"].T, c**2 * np.eye(2), atol=1e-5)
        # to first order dW = -lr s (grad_a^T b + a^T grad_b), each gradient itself times s
        s = f["s"]
        first = product(np.float64(steps[path]["a"]), f["b"]) + product(f["a"], np.float64(steps[path]["b"]))
        np.testing.assert_allclose(first, s * c**2 * best(g, 4), rtol=1e-3, atol=2e-5 * np.abs(g).max())


def test_lora_ga_refuses_in_words():
    """LoRA-GA names the weight whose gradient is missing or misshapen and the rank that it can still make."""
    grads = {"w": normal(23, 6, 5)}
    make = lambda params, rank: jlora.adapt(params, jlora.LoRA(rank=rank, init=jlora.init.GA(grads), target="."))
    with pytest.raises(ValueError, match="rank of at most 2"):
        make({"w": normal(0, 6, 5)}, 3)
    with pytest.raises(ValueError, match="no gradient for 'v'; there are some for"):
        make({"v": normal(0, 6, 5)}, 2)
    with pytest.raises(ValueError, match=r"shape \(6, 5\) for 'w' of shape \(5, 6\)"):
        make({"w": normal(0, 5, 6)}, 2)
    with pytest.raises(ValueError, match="positive number"):
        jlora.init.GA(grads, gamma=0)
    with pytest.raises(ValueError, match="no batch"):
        jlora.init.gradients(squares, {"w": normal(0, 6, 5)}, [], jlora.LoRA(rank=2, target="w"))


# --- EVA ----------------------------------------------------------------------------------------------------------


def test_eva_is_the_svd_of_the_stacked_inputs():
    """Heads on either side, a kernel that a jitted block flattens, over three batches."""
    params = {"query": {"kernel": normal(40, 9, 2, 4)}, "out": {"kernel": normal(41, 2, 4, 7)}}
    flat = jax.jit(lambda h, w: h.reshape(*h.shape[:-2], 8) @ w.reshape(8, 7))

    def fn(p, x):
        h = jnp.einsum("btd,dhk->bthk", x, p["query"]["kernel"])
        return flat(jnp.tanh(h), p["out"]["kernel"])

    batches = [normal(42 + n, 3, 5, 9) for n in range(3)]
    spec, axes = jlora.LoRA(rank=3, target="kernel"), {"query": "ioo", "out": "iio"}
    moments = jlora.init.activations(fn, params, iter(batches), spec, axes=axes)
    x = np.concatenate([np.float64(b).reshape(-1, 9) for b in batches])
    h = np.tanh(np.einsum("td,dhk->thk", x, np.float64(params["query"]["kernel"]))).reshape(-1, 8)
    ad = jlora.adapt(params, dataclasses.replace(spec, init=jlora.init.EVA(moments)), axes=axes)
    for path, seen in (("query/kernel", x), ("out/kernel", h)):
        np.testing.assert_allclose(moments[path], seen.T @ seen, rtol=1e-4, atol=1e-4)
        _, _, vh = np.linalg.svd(seen, full_matrices=False)
        a = np.float64(ad.trainable[path]["a"]).reshape(3, -1)
        np.testing.assert_allclose(np.abs(a @ vh[:3].T), np.eye(3), atol=1e-3)
        assert not np.any(ad.trainable[path]["b"]) and set(ad.frozen.factors[path]) == {"s"}
    np.testing.assert_array_equal(jlora.lift(fn)(ad, batches[0]), fn(params, batches[0]))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_is_the_svd_of_the_moment_times_the_weight(mode):
    """s a0^T b0 = C^-1 (first or last r of C W0), C with a hundredth of its mean on the diagonal, layer by layer."""
    W = np.random.default_rng(80).standard_normal((2, 7, 5)).astype(np.float32)
    X = np.random.default_rng(81).standard_normal((2, 30, 7)) * np.arange(1, 8)
    moments = {"w": jnp.asarray(np.swapaxes(X, -1, -2) @ X, jnp.float32)}
    ad = jlora.adapt(
        {"w": jnp.asarray(W)},
        jlora.LoRA(rank=2, alpha=3, init=jlora.init.CorDA(moments, mode), target="w"),
        axes={"w": "sio"},
    )
    assert as_bytes(jlora.merge(ad)) == [W.tobytes()]
    f = factors(ad)
    for layer in range(2):
        C = X[layer].T @ X[layer]
        C = C / np.mean(np.diag(C)) + 0.01 * np.eye(7)
        U, S, Vt = np.linalg.svd(C @ np.float64(W[layer]), full_matrices=False)
        r = slice(2) if mode == "ipm" else slice(3, 5)
        want = np.linalg.inv(C) @ (U[:, r] * S[r]) @ Vt[r]
        np.testing.assert_allclose(1.5 * product(f["a0"], f["b0"])[layer], want, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(f["b"][layer] @ f["b"][layer].T, np.diag(S[r]) / 1.5, rtol=1e-4, atol=1e-5)


def test_corda_does_not_ask_how_many_inputs_there_were():
    """More rows, or larger ones, begin alike; no input but zeros begins as PiSSA; of rank min(in, out) it is W0."""
    W = np.random.default_rng(82).standard_normal((6, 4)).astype(np.float32)
    X = np.random.default_rng(83).standard_normal((3, 6))
    begun = lambda moment, rank=2, mode="ipm": factors(
        jlora.adapt(
            {"w": jnp.asarray(W)}, jlora.LoRA(rank=rank, init=jlora.init.CorDA({"w": moment}, mode), target="w")
        )
    )
    few, many = begun(jnp.asarray(X.T @ X)), begun(jnp.asarray(1e4 * X.T @ X))
    for name in "ab":
        np.testing.assert_allclose(few[name], many[name], rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(product(few["a"], few["b"]), product(many["a"], many["b"]), atol=1e-4)
    none = begun(jnp.zeros((6, 6)))
    np.testing.assert_allclose(product(none["a"], none["b"]), best(W, 2), atol=1e-5)
    for mode in ("ipm", "kpm"):
        whole = begun(jnp.asarray(X.T @ X), 4, mode)
        np.testing.assert_allclose(product(whole["a"], whole["b"]), W, atol=1e-4)


def test_corda_refuses_in_words():
    """An unknown mode, a moment of another size and a rank above min(in, out) are answered with what to write."""
    make = lambda rank, size: jlora.adapt(
        {"w": normal(84, 6, 5)}, jlora.LoRA(rank=rank, init=jlora.init.CorDA({"w": jnp.eye(size)}), target="w")
    )
    with pytest.raises(ValueError, match="mode='qpm'.*'ipm'.*'kpm'"):
        jlora.init.CorDA({}, mode="qpm")
    with pytest.raises(ValueError, match=r"second moment for 'w' has shape \(5, 5\), not \(6, 6\)"):
        make(2, 5)
    with pytest.raises(ValueError, match="6 is above min"):
        make(6, 6)


@pytest.mark.parametrize("how", ["scan", "remat", "vmap"])
def test_eva_of_a_stack_tells_its_layers_apart(how):
    """`shared` meets every layer: its inputs are added up."""
    params = {"w": normal(50, 3, 6, 6), "shared": normal(51, 6, 6)}
    x = normal(52, 5, 6)

    def step(x, w, shared):
        return jnp.tanh(x @ w) @ shared

    def fn(p, x):
        if how == "vmap":
            return jax.vmap(step, in_axes=(None, 0, None))(x, p["w"], p["shared"])
        body = jax.checkpoint(step) if how == "remat" else step
        return lax.scan(lambda x, w: (body(x, w, p["shared"]), None), x, p["w"])[0]

    seen, between, h = [], [], np.float64(x)
    for w in np.float64(params["w"]):
        at = np.float64(x) if how == "vmap" else h
        seen.append(at.T @ at)
        h = np.tanh(at @ w)
        between.append(h.T @ h)
        h = h @ np.float64(params["shared"])
    spec = jlora.LoRA(rank=2, target=".")
    moments = jlora.init.activations(fn, params, [x], spec, axes={"^w$": "sio"})
    np.testing.assert_allclose(moments["w"], seen, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(moments["shared"], sum(between), rtol=1e-4, atol=1e-4)
    ad = jlora.adapt(params, dataclasses.replace(spec, init=jlora.init.EVA(moments)), axes={"^w$": "sio"})
    for layer in range(3):
        _, vectors = np.linalg.eigh(seen[layer])
        np.testing.assert_allclose(span(ad.trainable["w"]["a"][layer]), span(vectors[:, -2:].T), atol=2e-3)


def test_two_uses_of_one_weight_add_up():
    """Moments sum over uses and batches; a scaled input counts as it is scaled, a scaled or cast weight does not."""
    w, x = normal(57, 6, 6), normal(58, 5, 6)
    fn = lambda p, x: (x @ (2 * p["w"].T)).astype(jnp.bfloat16) + 3 * x @ p["w"].T
    moments = jlora.init.activations(fn, {"w": w}, [x, x], jlora.LoRA(rank=2, target="w"), axes={"w": "oi"})
    np.testing.assert_allclose(moments["w"], 2 * (1 + 9) * np.float64(x.T) @ np.float64(x), rtol=1e-4, atol=1e-4)


def test_moments_of_a_side_split_again_and_again():
    """They stand in the kernel's order, whatever the parts of its side are called and in which order they are met."""
    w, x = normal(59, 24, 3), normal(60, 5, 24)

    def fn(p, x):
        parts = p["w"].reshape(6, 4, 3).reshape(2, 3, 4, 3).reshape(2, 3, 2, 2, 3)
        return jnp.einsum("nadcb,abcdo->no", x.reshape(-1, 2, 3, 2, 2).swapaxes(2, 4), parts)

    moments = jlora.init.activations(fn, {"w": w}, [x], jlora.LoRA(rank=2, target="w"), axes={"w": "io"})
    np.testing.assert_allclose(moments["w"], np.float64(x.T) @ np.float64(x), rtol=1e-4, atol=1e-4)


def test_eva_of_a_stack_of_stacks_scanned_from_within():
    """The second axis is the outer loop's: moments still stand in the kernel's order."""
    params, x = {"w": normal(55, 2, 2, 4, 4)}, normal(56, 5, 4)
    inner = lambda x, ws: lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, ws)
    fn = lambda p, x: lax.scan(inner, x, p["w"].swapaxes(0, 1))[0]
    moments = jlora.init.activations(fn, params, [x], jlora.LoRA(rank=2, target="w"), axes={"w": "ssio"})
    h = np.float64(x)
    for outer in range(2):
        for layer in range(2):
            np.testing.assert_allclose(moments["w"][layer, outer], h.T @ h, rtol=1e-4, atol=1e-4)
            h = np.tanh(h @ np.float64(params["w"][layer, outer]))


def test_inputs_that_cannot_be_seen_are_refused():
    """Weights whose inputs the trace cannot see are named in an error, and so is one with a moment of another size."""
    params = {"table": normal(60, 5, 6), "w": normal(61, 6, 6)}
    fn = lambda p, i: lax.cond(i[0] > 0, lambda: p["table"][i] @ p["w"], lambda: p["table"][i])
    with pytest.raises(ValueError, match=r"inputs of \['table', 'w'\] could not be seen"):
        jlora.init.activations(fn, params, [jnp.arange(3)], jlora.LoRA(rank=2, target="."))
    with pytest.raises(ValueError, match="second moment for 'w' has shape"):
        jlora.adapt(params, jlora.LoRA(rank=2, init=jlora.init.EVA({"w": jnp.eye(3)}), target="w"))


@pytest.mark.parametrize("scaling", ["rank", "sqrt"])
def test_ranks_go_where_the_variance_is(scaling):
    """A budget of 2 a weight; ten shares sorted by hand; at most rho * r; s stays."""
    params = {name: normal(70, 6, 6) for name in ("flat", "steep", "two", "none")}
    spectra = {"flat": [3, 3, 3, 3, 3, 3], "steep": [90, 4, 3, 1, 1, 1], "two": [30, 30, 20, 10, 5, 5], "none": [0] * 6}
    q = np.linalg.qr(np.random.default_rng(71).standard_normal((6, 6)))[0]
    moments = {k: jnp.asarray(q @ np.diag(np.float64(v)) @ q.T, jnp.float32) for k, v in spectra.items()}
    method = jlora.LoRA(rank=2, alpha=6, scaling=scaling, dropout=0.1)
    rules = jlora.init.redistributed(method, moments, rho=2)
    # steep .9 | two .3 .3 .2 | flat 4 x .17: eight, and nothing is left for two's .1
    ad = jlora.adapt(params, rules)
    ranks = {path: named["a"].shape[0] for path, named in ad.trainable.items()}
    assert ranks == {"flat": 4, "steep": 1, "two": 3}, "rank 0 leaves a weight alone"
    assert all(r.dropout == 0.1 for r in rules)
    for path in ranks:
        np.testing.assert_allclose(ad.frozen.factors[path]["s"], method.scale, rtol=1e-6)
    capped = {path: r.rank for r in jlora.init.redistributed(method, moments, rho=1) for path in r.target}
    assert capped == {"^flat$": 2, "^steep$": 2, "^two$": 2, "^none$": 2}


def test_a_stack_has_one_rank_and_each_layer_costs():
    """A stack has one rank for all its layers and pays for it once a layer; a rho below 1 is refused."""
    stack = jnp.stack([jnp.diag(jnp.array([5.0, 3.0, 1.0, 1.0])), jnp.diag(jnp.array([6.0, 2.0, 1.0, 1.0]))])
    moments = {"stack": stack, "one": jnp.diag(jnp.array([4.0, 3.0, 2.0, 1.0]))}
    rules = jlora.init.redistributed(jlora.LoRA(rank=2), moments)  # 6 in all: stack .55, one .4, .3, stack .25
    assert {path: r.rank for r in rules for path in r.target} == {"^stack$": 2, "^one$": 2}
    with pytest.raises(ValueError, match="rho of at least 1"):
        jlora.init.redistributed(jlora.LoRA(rank=2), moments, rho=0.5)


# --- LoftQ --------------------------------------------------------------------------------------------------------


def test_loftq_mends_what_quantising_lost():
    """LoftQ's factors mend all that their rank can of what quantising lost, and more steps leave less."""
    params = {"w": normal(80, 3, 12, 10), "other": jnp.ones(3)}
    levels = lambda w: jnp.where(w > 0, 0.75, -0.75)  # the nearest of fixed ones: no step can make it worse
    method = jlora.LoRA(rank=3, alpha=6, target="w")
    errors = []
    for steps in (1, 5):
        base, start = jlora.init.loftq(params, method, levels, steps=steps, axes={"w": "sio"})
        assert base["other"] is params["other"] and base["w"].dtype == params["w"].dtype
        np.testing.assert_array_equal(levels(base["w"]), base["w"])
        ad = jlora.adapt(base, start, axes={"w": "sio"})
        assert ad.frozen.base is base and set(ad.frozen.factors["w"]) == {"s"}, "nothing is subtracted"
        f = factors(ad)
        rest = np.float64(params["w"]) - np.float64(base["w"])
        # the least error that rank 3 can leave; of two singular values that nearly tie, either may be kept
        left = np.linalg.norm(rest - f["s"][0] * product(f["a"], f["b"]), axis=(-2, -1))
        least = np.linalg.norm(np.linalg.svd(rest, compute_uv=False)[:, 3:], axis=-1)
        np.testing.assert_allclose(left, least, rtol=1e-6)
        errors.append(np.linalg.norm(np.float64(params["w"]) - np.float64(jlora.merge(ad)["w"])))
        if steps == 1:
            np.testing.assert_array_equal(base["w"], levels(params["w"]))
            assert errors[0] < 0.9 * np.linalg.norm(rest)
    assert errors[1] < errors[0]


# --- edges --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["pissa", "olora", jlora.init.PiSSA()])
def test_a_start_that_reads_the_weight_needs_one(init):
    """A start made from a weight's values is refused on structs by its path, and traced by `eval_shape` it is not."""
    params = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    with pytest.raises(ValueError, match=r"'w' of shape \(8, 6\) is made from the values of the weight"):
        jlora.adapt(params, jlora.LoRA(rank=2, init=init, target="w"))
    shapes = jax.eval_shape(lambda p: jlora.adapt(p, jlora.LoRA(rank=2, init=init, target="w")), params)
    assert shapes.frozen.factors["w"]["a0"].shape == (2, 8)


def test_a_start_that_does_not_read_the_weight_needs_none():
    """A start that reads no values of the weight adapts a tree of structs."""
    params = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32)}
    moments = {"w": jnp.eye(8)}
    for init in ("orthogonal", jlora.init.EVA(moments), jlora.init.GA({"w": normal(0, 8, 6)})):
        assert "w" in jlora.adapt(params, jlora.LoRA(rank=2, init=init, target="w")).trainable


WRONG = {"w": (jnp.ones((2, 8)), jnp.ones((1, 6)))}


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: jlora.LoRA(init="svd"), "'kaiming', 'gaussian', 'orthogonal', 'pissa', 'olora', 'paired'"),
        (lambda: jlora.LoRA(init="pissa", slices=((0, 2),)), "slices start as"),
        (lambda: jlora.LoRA(rank=3, init="orthogonal", target="w"), "write an even one"),
        (lambda: jlora.LoRA(rank=2, init="paired", target="w"), "names the form of an adapter"),
        (lambda: jlora.LoRA(rank=1, init=jlora.init.Given(WRONG), target="w"), "a given for 'w' has shape"),
    ],
)
def test_refused_in_words(make, words):
    """A start that cannot be had is refused with what can be: the known names, an even rank, the right shape."""
    with pytest.raises(ValueError, match=words):
        jlora.adapt({"w": jnp.ones((8, 6))}, make())


def test_twice_the_rank_above_the_matrix_rank_is_warned_of():
    """A pair made plain at a rank above the matrix's is warned of, and merges bit for bit as it did."""
    ad = jlora.adapt({"w": normal(0, 8, 6)}, [jlora.LoRA(rank=4, init="pissa", target="w")])
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    with pytest.warns(UserWarning, match=r"'w': rank 8 is above min\(in, out\) = 6"):
        flat = jlora.init.plain(ad)
    assert as_bytes(jlora.merge(flat)) == as_bytes(jlora.merge(ad))


def ranks_of_a_pair():
    """A stack of pairs of rank 4 in which ranks 1 of layer 0, and 0 and 2 of layer 1, are where they began."""
    ad = jlora.adapt(
        {"w": normal(3, 2, 8, 6)}, jlora.LoRA(rank=4, alpha=3, init="pissa", target="w"), axes={"w": "sio"}
    )
    new = away_from_start(ad.trainable)
    still = np.array([[False, True, False, False], [True, False, True, False]])[..., None]
    new["w"] = {x: jnp.where(still, ad.frozen.factors["w"][x + "0"], new["w"][x]) for x in "ab"}
    return jlora.join(new, ad.frozen), ~still[..., 0]


def parts(ad):
    """s (a_i b_i - a0_i b0_i) of every rank, (stack, r, in, out), in float64."""
    f = {name: np.asarray(x, np.float64) for name, x in factors(ad).items()}
    outer = lambda a, b: a[..., :, None] * b[..., None, :]
    return f["s"][:, None, None, None] * (outer(f["a"], f["b"]) - outer(f["a0"], f["b0"]))


def change(ad):
    return np.float64(jlora.merge(ad)["w"]) - np.float64(ad.frozen.base["w"])


def test_the_size_of_a_rank_of_a_pair():
    """The size of a pair's rank is the norm of what it adds to the update, zero where it is as it began."""
    ad, _ = ranks_of_a_pair()
    want = np.linalg.norm(parts(ad), axis=(-2, -1))
    np.testing.assert_allclose(jlora.rank.magnitude(ad)["w"]["b"], want, rtol=1e-5, atol=1e-6)


def test_a_pruned_rank_of_a_pair_is_where_it_began():
    """Of eight ranks in two layers the three largest stay; what is left is the sum of their parts, and W0 of none."""
    ad, _ = ranks_of_a_pair()
    sizes = np.linalg.norm(parts(ad), axis=(-2, -1))
    kept = sizes >= np.sort(sizes.ravel())[-3]
    small = jlora.rank.prune(ad, jlora.rank.magnitude(ad), 3)
    want = (parts(ad) * kept[..., None, None]).sum(1)
    np.testing.assert_allclose(change(small), want, atol=1e-5)
    np.testing.assert_array_equal(change(jlora.rank.prune(ad, jlora.rank.magnitude(ad), 0)), 0 * want)


def test_a_pair_at_a_rank():
    """dW = (alpha / b) of the first b parts."""
    ad, _ = ranks_of_a_pair()
    np.testing.assert_allclose(change(jlora.rank.at_rank(ad, 3)), parts(ad)[:, :3].sum(1) * 4 / 3, atol=1e-5)


def test_a_compact_pair_is_a_smaller_pair(tmp_path):
    """Ranks that are where they began go, starts and all; the update stays, and training goes on."""
    ad, alive = ranks_of_a_pair()
    assert jlora.rank.ranks(ad)["w"].tolist() == alive.sum(-1).tolist() == [3, 2]
    small = jlora.rank.compact(ad)
    assert {n: x.shape for n, x in factors(small).items()} == {
        "a": (2, 3, 8), "b": (2, 3, 6), "a0": (2, 3, 8), "b0": (2, 3, 6), "s": (2,)
    }  # fmt: skip
    np.testing.assert_allclose(change(small), change(ad), atol=1e-5)
    jlora.save(tmp_path / "x", small)
    assert as_bytes(jlora.load(tmp_path / "x", ad.frozen.base)) == as_bytes(small)


@pytest.mark.parametrize("rank", [2, 6])
def test_a_resized_pair_is_a_plain_lora(rank):
    """The best approximation of the whole update, whose rank is up to 2 r."""
    ad = jlora.adapt({"w": normal(3, 12, 10)}, jlora.LoRA(rank=3, init="pissa", target="w"))
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    u, sizes, v = np.linalg.svd(change(ad))
    small, error = jlora.rank.resize(ad, rank=rank)
    assert sorted(factors(small)) == ["a", "b", "s"] and small.trainable["w"]["a"].shape == (rank, 12)
    np.testing.assert_allclose(change(small), u[:, :rank] * sizes[:rank] @ v[:rank], atol=1e-4)
    np.testing.assert_allclose(error["w"], np.sqrt((sizes[rank:] ** 2).sum() / (sizes**2).sum()), atol=1e-3)


def test_optimizers_of_pairs():
    """LoRA+ multiplies b's update; the Riemannian metric is that of a and b; LoRA-FA's is that of a."""
    ad = jlora.adapt({"w": normal(3, 8, 6)}, jlora.LoRA(rank=2, init="pissa", target="w"))
    grads = away_from_start(ad.trainable)
    turn = lambda tx, ad, grads, **more: tx.update(grads, tx.init(ad.trainable), ad.trainable, **more)[0]["w"]
    plus = turn(jlora.optim.lora_plus(ad, ratio=4.0), ad, grads)
    np.testing.assert_array_equal(plus["a"], grads["w"]["a"])
    np.testing.assert_array_equal(plus["b"], 4 * grads["w"]["b"])
    metric = lambda x: np.linalg.inv(np.float64(x) @ np.float64(x).T)
    riemann = turn(jlora.optim.riemannian(ad, eps=1e-9), ad, grads)
    np.testing.assert_allclose(riemann["a"], metric(ad.trainable["w"]["b"]) @ np.float64(grads["w"]["a"]), rtol=1e-3)
    np.testing.assert_allclose(riemann["b"], metric(ad.trainable["w"]["a"]) @ np.float64(grads["w"]["b"]), rtol=1e-3)
    fa = jlora.adapt({"w": normal(3, 8, 6)}, jlora.LoRAFA(rank=2, init="pissa", target="w"))
    grads = away_from_start(fa.trainable)
    a = fa.frozen.factors["w"]["a"]
    got = turn(jlora.optim.lora_fa(fa, eps=1e-9), fa, grads, frozen=fa.frozen)
    np.testing.assert_allclose(got["b"], metric(a) @ np.float64(grads["w"]["b"]), rtol=1e-3)


def test_growing_ranks_are_none_of_a_pair():
    """SeLoRA grows no rank of a pair, and refuses an adapter that has nothing else."""
    ad = jlora.adapt({"w": normal(3, 8, 6)}, jlora.LoRA(rank=2, init="pissa", target="w"))
    with pytest.raises(ValueError, match="selora would do nothing"):
        jlora.rank.selora(optax.sgd(0.1), ad)


def test_other_methods_stay_when_pairs_become_plain():
    """Making pairs plain leaves weights of other methods in place and every merged weight as it was."""
    params = {"w": normal(0, 8, 6), "v": normal(1, 8, 6), "b": jnp.ones(6)}
    ad = jlora.adapt(
        params, [jlora.LoRA(rank=2, init="pissa", target="w"), jlora.LoRA(rank=1, target="v"), jlora.BitFit(target="b")]
    )
    flat = jlora.init.plain(ad)
    assert as_bytes(jlora.merge(flat)) == as_bytes(jlora.merge(ad)) and set(flat.trainable) == set(ad.trainable)


def test_pissa_learns():
    """Gradient steps on a PiSSA adapter lower the loss."""
    params, batches = two_layers()
    ad = jlora.adapt(params, jlora.LoRA(rank=2, init="pissa", target="w$"))
    trainable, frozen = jlora.split(ad)
    tx, lifted = optax.sgd(0.05), jlora.lift(squares)
    value = jax.jit(jax.value_and_grad(lambda t: lifted(jlora.join(t, frozen), batches[0])))
    state, losses = tx.init(trainable), []
    for _ in range(20):
        loss, grads = value(trainable)
        updates, state = tx.update(grads, state)
        trainable = optax.apply_updates(trainable, updates)
        losses.append(float(loss))
    assert losses[-1] < 0.8 * losses[0]
