"""Every method's equation against numbers from outside: files that peft wrote, and what papers print."""

import contextlib
import dataclasses
import functools
import itertools
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import jlora
from methods import EVERY, as_bytes, away_from_start

pytestmark = pytest.mark.settled

FILES = Path(__file__).parent / "fixtures" / "peft"
BASE = load_file(FILES / "base.safetensors")
PARAMS = {name: {"kernel": jnp.asarray(BASE[f"{name}.weight"].T)} for name in ("lin0", "lin1")}
KERNELS = r"lin\d/kernel$"


def lora(f):
    return {"a": f["lora_A.weight"], "b": f["lora_B.weight"].T}


def lokr(f):
    """C is (out, in) there; W2 = w2_a w2_b."""
    return {"c": f["lokr_w1"].T, "a": f["lokr_w2_b"], "b": f["lokr_w2_a"].T}


# file -> (method, its factors for one layer's tensors). Torch stores (out, in): the transpose of a kernel.
GOLDEN = {
    "lora_linear": (jlora.LoRA(rank=4, alpha=6, target=KERNELS), lora),
    "dora_linear": (
        jlora.DoRA(jlora.LoRA(rank=4, alpha=6, target=KERNELS)),
        lambda f: lora(f) | {"m": f["lora_magnitude_vector"]},
    ),
    "adalora": (
        jlora.AdaLoRA(rank=6, alpha=8, target=KERNELS),
        lambda f: {"p": f["lora_A"], "lam": f["lora_E"][:, 0], "q": f["lora_B"].T},
    ),
    "loha_linear": (
        jlora.LoHa(rank=4, alpha=6, target=KERNELS),
        lambda f: {"a1": f["hada_w1_b"], "b1": f["hada_w1_a"].T, "a2": f["hada_w2_b"], "b2": f["hada_w2_a"].T},
    ),
    "lokr_linear": (jlora.LoKr(rank=2, alpha=3, target=KERNELS), lokr),
    "lokr_factor": (jlora.LoKr(rank=1, alpha=3, factor=2, decompose_both=True, target=KERNELS), lokr),
    "ia3": (
        [jlora.IA3(target="lin0/"), jlora.IA3(side="in", target="lin1/")],
        lambda f: {"l": f["ia3_l"].ravel()},
    ),
    "vera": (
        jlora.VeRA(rank=5, target=KERNELS),
        lambda f: {"d": f["vera_lambda_d"], "b": f["vera_lambda_b"]},
    ),
}


@pytest.mark.parametrize("name", GOLDEN)
def test_against_files_of_peft(name):
    """With peft's factors, merged weights and outputs are those that peft computed."""
    spec, factors = GOLDEN[name]
    tensors = load_file(FILES / name / "adapter_model.safetensors")
    adapted = jlora.adapt(PARAMS, spec)
    for layer in PARAMS:
        prefix = f"base_model.model.{layer}."
        mine = factors({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
        assert set(mine) == set(adapted.trainable[f"{layer}/kernel"])
        adapted.trainable[f"{layer}/kernel"].update({k: jnp.asarray(v) for k, v in mine.items()})
    if name == "vera":  # peft's random matrices are its own: the leading parts of one pair
        for group, arrays in adapted.frozen.factors.items():
            if group.startswith("vera/"):
                n = int(group.rsplit(" ", 1)[1])
                A, B = tensors["base_model.vera_A"], tensors["base_model.vera_B"]
                arrays.update({k: jnp.asarray(A[:, :n] if k == "A" else B[:n].T) for k in arrays})
    adapted = jlora.join(adapted.trainable, adapted.frozen)
    expected = load_file(FILES / name / "expected.safetensors")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((7, 5, 12)), jnp.float32)
    y = jlora.lift(lambda p, x: jnp.tanh(x @ p["lin0"]["kernel"]) @ p["lin1"]["kernel"])(adapted, x)
    want = [expected[f"merged.{layer}.weight"].T for layer in ("lin0", "lin1")]
    for layer, w in zip(PARAMS, want, strict=True):
        np.testing.assert_allclose(jlora.merge(adapted)[layer]["kernel"], w, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(y, np.tanh(x @ want[0]) @ want[1], rtol=1e-4, atol=1e-5)


W0 = np.random.default_rng(1).standard_normal((6, 8))


def test_lokr_on_convolutions_against_a_file_of_peft():
    """Its window belongs to the second factor; torch has (out, in, window)."""
    tensors = load_file(FILES / "lokr_conv" / "adapter_model.safetensors")
    expected = load_file(FILES / "lokr_conv" / "expected.safetensors")
    params = {name: {"kernel": jnp.asarray(BASE[f"{name}.weight"].transpose(2, 3, 1, 0))} for name in ("conv", "conv1")}
    adapted = jlora.adapt(params, jlora.LoKr(rank=1, alpha=3, target="kernel"))
    trained = {}
    for name in params:
        f = {k.rsplit(".", 1)[1]: v for k, v in tensors.items() if f".{name}." in k}
        shapes = {k: v.shape for k, v in adapted.trainable[f"{name}/kernel"].items()}
        mine = {"c": f["lokr_w1"].T, "a": f["lokr_w2_b"], "b": f["lokr_w2_a"].T}
        if "a" not in shapes:  # peft decomposes a 2 x 4 factor at rank 1; so do we
            raise AssertionError(shapes)
        trained[f"{name}/kernel"] = {k: jnp.asarray(v.reshape(shapes[k])) for k, v in mine.items()}
    merged = jlora.merge(jlora.join(trained, adapted.frozen))
    for name in params:
        want = expected[f"merged.{name}.weight"].transpose(2, 3, 1, 0)
        np.testing.assert_allclose(merged[name]["kernel"], want, rtol=2e-5, atol=2e-6)


def transformer(layers, **shapes):
    """Shapes of a stack of layers, no values."""
    one = {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in shapes.items()}
    return {f"layer_{n}": one for n in range(layers)}


ROBERTA_BASE = transformer(12, query=(768, 768), value=(768, 768))
ROBERTA_LARGE = transformer(24, query=(1024, 1024), value=(1024, 1024))
DEBERTA_BASE = transformer(
    12, query=(768, 768), key=(768, 768), value=(768, 768), out=(768, 768), up=(768, 3072), down=(3072, 768)
)
DEBERTA_XXL = transformer(48, query=(1536, 1536), value=(1536, 1536))
GPT3 = transformer(96, query=(12288, 12288), value=(12288, 12288))
LLAMA2 = transformer(32, qkv=(4096, 3 * 4096))
LLAMA2_APART = transformer(32, query=(4096, 4096), key=(4096, 4096), value=(4096, 4096))
APART = {"target": "kernel", "fused": "query|key|value"}

# Trained parameters as the papers print them (but VeRA's large r=16: its formula L (d + r) gives 49.9 K, its table has
# 49.5): (tree, method, printed, in units of)
PRINTED = {
    "LoRA, GPT-3 r=1": (GPT3, jlora.LoRA(rank=1), 4.7, 1e6),
    "LoRA, GPT-3 r=8": (GPT3, jlora.LoRA(rank=8), 37.7, 1e6),
    "LoRA, RoBERTa-base r=8": (ROBERTA_BASE, jlora.LoRA(rank=8), 0.3, 1e6),
    "LoRA, RoBERTa-large r=8": (ROBERTA_LARGE, jlora.LoRA(rank=8), 0.8, 1e6),
    "LoRA, DeBERTa-XXL r=16": (DEBERTA_XXL, jlora.LoRA(rank=16), 4.7, 1e6),
    "AdaLoRA's LoRA r=8": (DEBERTA_BASE, jlora.LoRA(rank=8, target="kernel"), 1.33, 1e6),
    "AdaLoRA's LoRA r=2": (DEBERTA_BASE, jlora.LoRA(rank=2, target="kernel"), 0.33, 1e6),
    "VeRA's LoRA, base r=1": (ROBERTA_BASE, jlora.LoRA(rank=1), 36.8, 1e3),
    "VeRA's LoRA, base r=16": (ROBERTA_BASE, jlora.LoRA(rank=16), 589.8, 1e3),
    "VeRA's LoRA, base r=256": (ROBERTA_BASE, jlora.LoRA(rank=256), 9437.1, 1e3),
    "VeRA's LoRA, large r=1": (ROBERTA_LARGE, jlora.LoRA(rank=1), 98.3, 1e3),
    "VeRA's LoRA, large r=256": (ROBERTA_LARGE, jlora.LoRA(rank=256), 25165.8, 1e3),
    "VeRA, base r=1": (ROBERTA_BASE, jlora.VeRA(rank=1), 18.4, 1e3),
    "VeRA, base r=16": (ROBERTA_BASE, jlora.VeRA(rank=16), 18.8, 1e3),
    "VeRA, base r=256": (ROBERTA_BASE, jlora.VeRA(rank=256), 24.5, 1e3),
    "VeRA, large r=1": (ROBERTA_LARGE, jlora.VeRA(rank=1), 49.2, 1e3),
    "VeRA, large r=256": (ROBERTA_LARGE, jlora.VeRA(rank=256), 61.4, 1e3),
    "Tied-LoRA, TL5": (LLAMA2, jlora.TiedLoRA.tl5(target="qkv"), 131_072, 1),
    "Tied-LoRA, TL6": (LLAMA2, jlora.TiedLoRA.tl6(target="qkv"), 524_544, 1),
    "Tied-LoRA's LoRA": (LLAMA2, jlora.TiedLoRA(tied=(), trained=("a", "b"), target="qkv"), 4_194_304, 1),
    "TL5, q, k, v apart": (LLAMA2_APART, jlora.TiedLoRA.tl5(**APART), 131_072, 1),
    "TL6, q, k, v apart": (LLAMA2_APART, jlora.TiedLoRA.tl6(**APART), 524_544, 1),
    "LoRA, q, k, v apart": (LLAMA2_APART, jlora.TiedLoRA(tied=(), trained=("a", "b"), **APART), 4_194_304, 1),
}


@pytest.mark.parametrize("name", PRINTED)
def test_counts_that_papers_print(name):
    """To half a unit of the last digit printed, or cut there: some tables round, some cut."""
    params, method, printed, unit = PRINTED[name]
    trained = jax.eval_shape(lambda: jlora.adapt(params, method)).trainable
    count = sum(x.size for x in jax.tree.leaves(trained)) / unit
    digits = len(repr(printed).partition(".")[2]) if isinstance(printed, float) else 0
    assert printed in (round(count, digits), math.floor(count * 10**digits) / 10**digits), count


def test_tied_lora_contains_lora_and_vera():
    """Untied it is LoRA; tied, with trained vectors over random matrices, VeRA: values and gradients."""
    params, x = {"w": jnp.asarray(W0, jnp.float32)}, jnp.asarray(np.random.default_rng(3).standard_normal((5, 6)))
    f = jlora.lift(lambda p, x: jnp.sin(x @ p["w"]).sum())

    gradient = lambda t, z: jax.grad(lambda t: f(jlora.join(t, z.frozen), x))(t)["w"]
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    untied = jlora.adapt(params, jlora.TiedLoRA(rank=2, tied=(), trained=("a", "b"), target="w"))
    lora = jlora.adapt(params, jlora.LoRA(rank=2, target="w"))
    trained = {"w": {"a": jnp.linspace(0, 1, 12).reshape(2, 6), "b": jnp.linspace(-1, 1, 16).reshape(2, 8)}}
    one, other = gradient(trained, untied), gradient(trained, lora)
    close(one["a"], other["a"])
    close(one["b"], other["b"])
    close(jlora.merge(jlora.join(trained, untied.frozen))["w"], jlora.merge(jlora.join(trained, lora.frozen))["w"])

    tied = jlora.adapt(params, jlora.TiedLoRA(rank=2, trained=("u", "v"), target="w"))
    vera = jlora.adapt(params, jlora.VeRA(rank=2, target="w"))
    drawn = {k: v for named in vera.frozen.factors.values() for k, v in named.items()}
    for named in tied.frozen.factors.values():
        named.update({k: drawn[k.upper()] for k in named if k in "ab"})
    d, v = jnp.array([0.3, -0.8]), jnp.linspace(0, 1, 8)
    one, other = gradient({"w": {"d": d, "b": v}}, vera), gradient({"w": {"u": d, "v": v}}, tied)
    close(one["d"], other["u"])
    close(one["b"], other["v"])
    pair = jlora.Adapted({"w": {"d": d, "b": v}}, vera.frozen), jlora.Adapted({"w": {"u": d, "v": v}}, tied.frozen)
    close(*(jlora.merge(z)["w"] for z in pair))


OUTPUTS = {  # kernel, bias, letters of the kernel, letters of the einsum that rescales both
    "dense": ((4, 3), (3,), "io"),
    "heads": ((4, 2, 3), (2, 3), "ioo"),
    "scanned": ((2, 4, 3), (2, 3), "sio"),
    "scanned on axis 1": ((4, 2, 3), (3, 2), "iso"),
    "convolution": ((2, 2, 4, 3), (3,), "kkio"),
}


@pytest.mark.parametrize("method", [jlora.IA3, jlora.SSF])
@pytest.mark.parametrize("name", OUTPUTS)
def test_a_rescaled_output_has_its_bias_rescaled(name, method, tmp_path):
    """l (x W + b): one l for the kernel, named alone, and for its bias; SSF adds beta. Saved and loaded as it was."""
    shape, out, letters = OUTPUTS[name]
    draw = lambda n, *shape: np.random.default_rng(n).standard_normal(shape)
    leaves = {"kernel": draw(0, *shape), "bias": draw(1, *out)}
    params = {"conv": {name: jnp.asarray(x, jnp.float32) for name, x in leaves.items()}}
    ad = jlora.adapt(params, method(target="kernel"), axes={"kernel": letters})
    far = jax.tree.map(lambda x: jnp.asarray(draw(2, *x.shape), x.dtype), ad.trainable)
    (named,) = far.values()
    stack_first = [np.float64(x) for x in named.values()]
    turn = (lambda x: np.swapaxes(x, 0, 1)) if letters == "iso" else (lambda x: x)  # the bias's own order of axes
    moved = jlora.join(far, ad.frozen)
    made = jlora.merge(moved)["conv"]
    gain = stack_first[-1]
    over = gain.reshape(*(n if r in "so" else 1 for r, n in zip(letters, shape, strict=True)))
    np.testing.assert_allclose(made["kernel"], leaves["kernel"] * over, rtol=1e-5, atol=1e-6)
    beta = turn(stack_first[0]) if method is jlora.SSF else 0
    np.testing.assert_allclose(made["bias"], leaves["bias"] * turn(gain) + beta, rtol=1e-5, atol=1e-5)
    jlora.save(tmp_path / "x", moved)
    back = jlora.load(tmp_path / "x", params)
    assert jax.tree.structure(back) == jax.tree.structure(moved)


def test_biases_that_are_not_rescaled(tmp_path):
    """Excluded, taken by another rule, or with an l of its own in a file; a shape that fits none is refused."""
    params = {"value": {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}}
    paths = lambda ad: [s.leaf.path for s in ad.frozen.plan.sites]
    assert paths(jlora.adapt(params, jlora.IA3(target="kernel", exclude="bias$"))) == ["value/kernel"]
    assert paths(jlora.adapt(params, jlora.IA3(side="in", target="kernel"))) == ["value/kernel"]
    both = jlora.adapt(params, [jlora.IA3(target="kernel"), jlora.BitFit(target="bias")])
    assert sorted(both.trainable["value/bias"]) == ["delta"] and "does not rescale it" in str(both)
    apart = jlora.adapt(params, [jlora.IA3(target="kernel", exclude="bias$"), jlora.IA3(target="bias")])
    assert sorted(apart.trainable) == ["value/bias", "value/kernel"]
    jlora.save(tmp_path / "x", apart)
    assert sorted(jlora.load(tmp_path / "x", params).trainable) == ["value/bias", "value/kernel"]
    assert sorted(jlora.adapt(params, jlora.IA3(target="value")).trainable) == ["value/kernel"]
    with pytest.raises(
        ValueError, match=r"'value/bias' of shape \(1, 3\) is no bias of 'value/kernel'.*exclude=\"bias\$\""
    ):
        odd = {"value": params["value"] | {"bias": jnp.ones((1, 3))}}
        jlora.adapt(odd, jlora.IA3(target="kernel"), axes={"kernel": "io"})


COMBINATIONS = [
    (tied, trained)
    for tied in ((), ("a",), ("b",), ("a", "b"))
    for trained in itertools.chain.from_iterable(itertools.combinations("abuv", n) for n in range(1, 5))
]


@pytest.mark.parametrize("tied,trained", COMBINATIONS, ids=["".join(a) + "-" + "".join(b) for a, b in COMBINATIONS])
def test_tied_lora_in_all_its_forms(tied, trained):
    """Each of a, b tied or not, each of a, b, u, v trained or not: W0 at the start, a way from there, the paper's W."""
    params = {f"l{n}": {"w": jnp.asarray(W0 + n, jnp.float32)} for n in range(2)}
    ad = jlora.adapt(params, jlora.TiedLoRA(rank=3, tied=tied, trained=trained, target="w"))
    weights = lambda t: jlora.merge(jlora.join(t, ad.frozen))
    for a, b in zip(jax.tree.leaves(weights(ad.trainable)), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)
    grads = jax.grad(lambda t: sum(jnp.sum(jnp.sin(3 * w["w"])) for w in weights(t).values()))(ad.trainable)
    assert any(np.abs(g).max() > 0 for g in jax.tree.leaves(grads)), "it would stay zero for ever"
    shared, own = "tied/l#/w", lambda n: f"l{n}/w"
    get = lambda n, name: (ad.trainable | {}).get(shared if name in tied else own(n), {}).get(name)
    assert [name for name in "abuv" if get(1, name) is not None] == list(trained)
    sizes = {"a": 18, "b": 24, "u": 3, "v": 8}
    assert jlora.count(ad)[0] == sum(sizes[x] * (1 if x in tied else 2) for x in trained)
    far = jax.tree.map(lambda x: x + 0.3, ad.trainable)
    held = {k: dict(far.get(k, {})) | dict(ad.frozen.factors.get(k, {})) for k in (shared, own(0), own(1))}
    for n, made in enumerate(weights(far).values()):
        f = {x: np.float64(held[shared if x in tied else own(n)][x]) for x in "abuv"}
        want = np.float64(params[f"l{n}"]["w"]) + (f["a"].T * f["u"]) @ f["b"] * f["v"]
        np.testing.assert_allclose(made["w"], want, atol=1e-5)


@pytest.mark.parametrize("tied", ["", "a", "b", "ab"])
@pytest.mark.parametrize("stacked", [False, True])
def test_projections_apart_are_tied_as_the_paper_ties_a_fused_one(tied, stacked, tmp_path):
    """`fused=`: q and v with one a and u, and b and v side by side, are a fused qv: merged, saved, and unrolled."""
    layers, cut = ("l#",) if stacked else ("l0", "l1"), ((..., slice(0, 4)), (..., slice(4, 8)))
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    whole = {layer: {"qv": draw(n, *((2,) if stacked else ()), 6, 8)} for n, layer in enumerate(layers)}
    apart = {layer: {name: w["qv"][at] for name, at in zip("qv", cut, strict=True)} for layer, w in whole.items()}
    axes = {".": "sio" if stacked else "io"}
    fused = jlora.adapt(whole, jlora.TiedLoRA(rank=2, tied=tied, target="."), axes=axes)
    two = jlora.adapt(apart, jlora.TiedLoRA(rank=2, tied=tied, target=".", fused="q$|v$"), axes=axes)
    assert jlora.count(two) == jlora.count(fused)
    trained = away_from_start(fused.trainable)
    held, columns = {}, dict(zip("qv", cut, strict=True))
    for group, named in two.trainable.items():
        stem, _, last = group.removeprefix("tied/").rpartition("/")
        there = trained.get(f"tied/{stem}/qv", {}) | trained.get(f"{stem}/qv", {})
        held[group] = {name: there[name][columns[last]] if name in "bv" else there[name] for name in named}
    two, fused = jlora.join(held, two.frozen), jlora.join(trained, fused.frozen)
    want = jlora.merge(fused)
    for layer, made in jlora.merge(two).items():
        both = jnp.concatenate([made["q"], made["v"]], -1)
        np.testing.assert_allclose(both, want[layer]["qv"], rtol=1e-5, atol=1e-6)
    jlora.save(tmp_path / "x", two)
    assert jax.tree.structure(jlora.load(tmp_path / "x", apart)) == jax.tree.structure(two)
    if stacked:
        unrolled = {f"l{n}": {name: w[n] for name, w in apart["l#"].items()} for n in range(2)}
        loose = jlora.rank.unstack(two, unrolled, lambda path, index: path.replace("#", str(index[0])))
        for n, made in enumerate(jlora.merge(loose).values()):
            np.testing.assert_allclose(made["q"], jlora.merge(two)["l#"]["q"][n], rtol=1e-6, atol=1e-7)


def test_lokr_with_whole_factors():
    """factor=1 leaves the sides whole, (1, n); where no factor is low-rank s is 1, whatever alpha is, as in LyCORIS."""
    ad = jlora.adapt({"w": jnp.asarray(W0, jnp.float32)}, jlora.LoKr(rank=4, alpha=2, factor=1, target="w"))
    far = jax.tree.map(lambda x: x + 0.5, ad.trainable)["w"]
    assert {n: x.shape for n, x in far.items()} == {"c": (1, 1), "b": (6, 8)} and ad.frozen.factors["w"]["s"] == 1
    want = W0 + np.kron(np.float64(far["c"]), np.float64(far["b"]))
    np.testing.assert_allclose(jlora.merge(jlora.join({"w": far}, ad.frozen))["w"], want, rtol=1e-5, atol=1e-6)


def test_dora_where_float32_cancels():
    """||W0 + dW|| at 0.005 of ||W0||, small or large: the identity alone is wrong by 6 %."""
    for size in (1, 64):
        adapted = jlora.adapt({"w": size * jnp.eye(4)}, jlora.DoRA(jlora.LoRA(rank=4, target="w")))
        for small in (0.05, 0.005, 0.0005):
            trained = {"w": {"a": jnp.eye(4), "b": -size * (1 - small) * jnp.eye(4), "m": jnp.ones(4)}}
            np.testing.assert_allclose(jlora.merge(jlora.join(trained, adapted.frozen))["w"], np.eye(4), atol=1e-3)


def test_many_rows_of_a_kronecker_product():
    """Two thousand rows, of which the backward pass takes some at a time: the sums are over all of them."""
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    x, dy = draw(1, 4, 512, 12), draw(2, 4, 512, 12)
    ad = jlora.adapt({"w": draw(3, 12, 12)}, jlora.KronA(factors=(3, 4), target="w"))
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    f = jlora.lift(lambda p, x: x @ p["w"])
    (row,) = jlora.explain(f, ad, x).rows
    assert row.plan == "merged"
    found = jax.jit(jax.grad(lambda t: jnp.sum(f(jlora.join(t, ad.frozen), x) * dy)))(ad.trainable)["w"]
    a, b = (np.float64(ad.trainable["w"][name]) for name in "ab")
    dW = np.einsum("nti,nto->io", np.float64(x), np.float64(dy)).reshape(3, 4, 4, 3)
    np.testing.assert_allclose(found["a"], np.einsum("ijop,jp->io", dW, b), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(found["b"], np.einsum("ijop,io->jp", dW, a), rtol=1e-4, atol=1e-3)


def test_tied_factors_are_a_group_that_is_no_leaf():
    """A leaf's own factors stand under its path, those that layers share under a name of their own."""
    ad = jlora.adapt({"w": jnp.asarray(W0, jnp.float32)}, jlora.TiedLoRA(rank=2, target="w"))
    assert set(ad.trainable) == {"w", "tied/w"}


def test_ssf_scales_and_shifts_the_output():
    """gamma * (x W0 + b0) + beta, kernel and bias named together."""
    params = {"dense": {"kernel": jnp.asarray(W0, jnp.float32), "bias": jnp.arange(8.0)}}
    adapted = jlora.adapt(params, jlora.SSF(target="dense/"))
    gamma, beta = np.linspace(0.5, 2, 8), np.linspace(-1, 1, 8)
    trained = {"ssf/dense": {"gamma": jnp.asarray(gamma, jnp.float32), "beta": jnp.asarray(beta, jnp.float32)}}
    x = np.random.default_rng(3).standard_normal((5, 6))
    f = jlora.lift(lambda p, x: x @ p["dense"]["kernel"] + p["dense"]["bias"])
    y = f(jlora.join(trained, adapted.frozen), jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(y, gamma * (x @ W0 + np.arange(8)) + beta, rtol=1e-4, atol=1e-4)


def test_tied_gradients_sum_over_layers():
    """One a and b for three layers, unrolled or stacked: the gradient is the sum of what each layer gives."""
    w = jnp.asarray(np.random.default_rng(4).standard_normal((3, 6, 6)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(5).standard_normal((2, 6)), jnp.float32)
    method = jlora.TiedLoRA(rank=2, target="w")
    unrolled = {f"layer_{n}": {"w": w[n]} for n in range(3)}
    one, many = jlora.adapt(w_stack := {"layer_0": {"w": w}}, method, axes={"w": "sio"}), jlora.adapt(unrolled, method)
    assert jlora.count(one) == jlora.count(many) == (12 + 12 + 3 * (2 + 6), w.size + 48)
    assert sum(jax.tree.leaves(jax.tree.map(jnp.size, w_stack))) == w.size
    shared = many.trainable["tied/layer_#/w"] | {"b": jnp.ones((2, 6))}
    scanned = lambda p, x: jax.lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, p["layer_0"]["w"])[0]

    def loop(p, x):
        for n in range(3):
            x = jnp.tanh(x @ p[f"layer_{n}"]["w"])
        return x

    def gradient(adapted, fn):
        loss = lambda s: jlora.lift(fn)(jlora.join({**adapted.trainable, "tied/layer_#/w": s}, adapted.frozen), x).sum()
        return jax.grad(loss)(shared)

    first, second = gradient(one, scanned), gradient(many, loop)
    for name in ("a", "b"):
        np.testing.assert_allclose(first[name], second[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: jlora.DoRA(jlora.IA3(target="w")), "must add to W0"),
        (lambda: jlora.DoRA(jlora.HiRA(rank=1, target="w")), "must not depend on W0"),
        (lambda: jlora.DoRA(jlora.OFT(target="w")), "must add to W0"),
        (lambda: jlora.OFT(block=1, target="w"), "at least two"),
        (lambda: jlora.Sum(jlora.LoRA(rank=1), jlora.KronA()), "matches no leaf"),
        (lambda: jlora.Sum(jlora.LoRA(target="w"), jlora.KronA(target="v")), "unlike targets"),
        (lambda: jlora.Sum(jlora.IA3(), jlora.IA3(), target="w"), "both methods have a gain"),
        (lambda: jlora.Sum(jlora.DoRA(jlora.LoRA(rank=1, target="w")), jlora.KronA(), target="w"), "write DoRA\\(Sum"),
        (lambda: jlora.DoRA(jlora.DoRA(jlora.LoRA(rank=1, target="w"))), "must add to W0"),
        (lambda: jlora.DoRA(jlora.LoRA(rank=1, target="w"), target="v"), "stands on the inner method"),
        (lambda: jlora.KronA(factors=(4, 2), target="w"), "do not divide"),
        (lambda: jlora.TiedLoRA(trained=(), target="w"), "stay zero for ever"),
        (lambda: jlora.TiedLoRA(fused="(", target="w"), "write a regular expression"),
        (lambda: jlora.KaSA(rank=6, target="w"), r"6 singular values and would lose 6.*KaSA\(noise=5\)"),
        (lambda: jlora.MiCA(rank=7, target="w"), "rank 7 is above min"),
        (lambda: jlora.VBLoRA(k=3, vectors=2, target="w"), "mixes more vectors than there are"),
        (lambda: jlora.VBLoRA(k=1, target="w"), "one has no logits to learn"),
        (lambda: jlora.SSF(), "layers named"),
        (lambda: jlora.LoRA(rank=7, init="pissa", target="w"), "above min"),
        (lambda: jlora.LoRA(rank=7, init="olora", target="w"), "above min"),
        (lambda: jlora.VeRA(rank=-1, target="w"), "integer of at least 0"),
    ],
)
def test_refused_in_words(make, words):
    """What makes no sense for a formula is refused before anything is made."""
    with pytest.raises(ValueError, match=words):
        jlora.adapt({"w": jnp.asarray(W0, jnp.float32)}, make())


@pytest.mark.parametrize("row", [row for row in EVERY if row.on != "vectors"], ids=lambda row: row.name)
def test_saved_and_loaded(row, tmp_path):
    """Every factor of every method comes back as it was."""
    if row.merges:
        params = {"w": jnp.asarray(np.random.default_rng(1).standard_normal((12, 12)), jnp.float32)}
        adapted = jlora.adapt(params, row.spec("w"))
    else:
        _, params, _ = row.home.build()
        adapted = jlora.adapt(params, row.spec(row.home.target), axes=dict(row.home.axes or {}))
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    jlora.save(tmp_path / "x", adapted)
    back = jlora.load(tmp_path / "x", params)
    assert jax.tree.structure(back) == jax.tree.structure(adapted)
    assert as_bytes(back) == as_bytes(adapted)


def test_random_matrices_are_drawn_again_not_saved(tmp_path):
    """A file holds no drawn matrix; loading draws the same bits, a narrow one the start of a wide one."""
    params = {"q": jnp.ones((6, 4)), "v": jnp.ones((6, 8))}
    adapted = jlora.adapt(params, jlora.VeRA(rank=5, target="."))
    jlora.save(tmp_path / "x", adapted)
    assert not [name for name in json.loads((tmp_path / "x" / "jlora.json").read_bytes())["factors"] if "vera" in name]
    back = jlora.load(tmp_path / "x", params).frozen.factors
    narrow, wide = back["vera/0/5/out 4"]["B"], back["vera/0/5/out 8"]["B"]
    np.testing.assert_array_equal(narrow, wide[:, :4])
    np.testing.assert_array_equal(wide, adapted.frozen.factors["vera/0/5/out 8"]["B"])


# Golden file -> (method, LyCORIS's names of our factors). There a weight is (out, in, window); `.T` turns a factor.
LYCORIS = {
    "loha_linear": (jlora.LoHa(rank=3, alpha=3), "a1=hada_w1_b b1=hada_w1_a.T a2=hada_w2_b b2=hada_w2_a.T"),
    "loha_conv": (jlora.LoHa(rank=2, alpha=3), "a1=hada_w1_b b1=hada_w1_a.T a2=hada_w2_b b2=hada_w2_a.T"),
    "loha_tucker": (
        jlora.LoHa(rank=2, alpha=3, tucker=True),
        "t1=hada_t1 a1=hada_w1_b b1=hada_w1_a t2=hada_t2 a2=hada_w2_b b2=hada_w2_a",
    ),
    "lokr_linear": (jlora.LoKr(rank=1, alpha=2), "c=lokr_w1.T a=lokr_w2_b b=lokr_w2_a.T"),
    "lokr_both": (
        jlora.LoKr(rank=1, alpha=2, decompose_both=True),
        "c1=lokr_w1_b c2=lokr_w1_a.T a=lokr_w2_b b=lokr_w2_a.T",
    ),
    "lokr_factor": (jlora.LoKr(rank=1, alpha=2, factor=2), "c=lokr_w1.T a=lokr_w2_b b=lokr_w2_a.T"),
    "lokr_full": (jlora.LoKr(rank=100, alpha=2), "c=lokr_w1.T b=lokr_w2.T"),
    "lokr_conv": (jlora.LoKr(rank=1, alpha=2), "c=lokr_w1.T a=lokr_w2_b b=lokr_w2_a.T"),
    "lokr_tucker": (jlora.LoKr(rank=1, alpha=2, tucker=True), "t=lokr_t2 c=lokr_w1.T a=lokr_w2_b b=lokr_w2_a"),
}


@pytest.mark.parametrize("name", LYCORIS)
def test_against_layers_of_lycoris(name):
    """The forward pass of LyCORIS's own layers (`fixtures/lycoris/write.py`), linear and convolutions."""
    method, names = LYCORIS[name]
    tensors = load_file(FILES.parent / "lycoris" / f"{name}.safetensors")
    kernel, x, y = (
        np.moveaxis(tensors[k], (0, 1), (-1, -2)) if k == "weight" else tensors[k] for k in ("weight", "x", "y")
    )
    last = lambda a: np.moveaxis(a, 1, -1)  # torch has channels second
    axes = {"kernel": "kk"[: kernel.ndim - 2] + "io"}
    adapted = jlora.adapt({"kernel": jnp.asarray(kernel)}, dataclasses.replace(method, target="kernel"), axes=axes)
    mine = adapted.trainable["kernel"]
    given = dict(pair.split("=") for pair in names.split())
    assert set(given) == set(mine)
    for factor, theirs in given.items():
        a = tensors["factor." + theirs.removesuffix(".T")]
        a = a.T if theirs.endswith(".T") else a
        if name == "loha_conv" and factor in ("a1", "a2"):  # (r, in window) -> (r, window, in)
            a = np.moveaxis(a.reshape(2, 6, 3, 2), 1, -1)
        mine[factor] = jnp.asarray(a.reshape(mine[factor].shape))

    def model(params, x):
        if x.ndim == 2:
            return x @ params["kernel"]
        return jax.lax.conv_general_dilated(
            x, params["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    got = jlora.lift(model)(adapted, jnp.asarray(last(x)))
    np.testing.assert_allclose(got, last(y), rtol=1e-5, atol=1e-5 * np.abs(y).max())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Everything(jlora.methods.Method):
    """L (gain * (W0 + dW)) R, with a rectangular number of blocks on either side."""

    def recipe(self, leaf):
        word = lambda name, *shape: jlora.network.Array(name, jlora.methods.base.normal(1.0), shape or None)
        side = lambda name, blocks, n: jlora.network.Delta(
            "b m n -> (b m) (b n)", (word(name, blocks, n, n),), (("b", blocks), ("m", n), ("n", n))
        )
        lora = jlora.network.Delta("r I, r O -> I O", (word("a"), word("b")), (("r", 2),), 0.7)
        kron = jlora.network.Delta(
            "i o, j p -> (i j) (o p)", (word("c"), word("d")), (("i", 3), ("o", 2), ("j", 2), ("p", 4)), 1.3, s="t"
        )
        gain = jlora.network.Delta("O -> O", (word("g"),))
        return jlora.network.Recipe((lora, kron), gain, side("l", 2, 3), side("r", 4, 2))


def test_every_word_at_once():
    """Values and gradients in float64 NumPy, through a weight that was transposed and split."""
    adapted = jlora.adapt({"w": jnp.asarray(W0, jnp.float32)}, Everything(target="w"))
    f = {k: np.float64(a) for k, a in adapted.trainable["w"].items()}

    def weight(a, b, c, d, g, l, r):
        L, R = np.zeros((6, 6)), np.zeros((8, 8))
        for n in range(2):
            L[3 * n : 3 * n + 3, 3 * n : 3 * n + 3] = l[n]
        for n in range(4):
            R[2 * n : 2 * n + 2, 2 * n : 2 * n + 2] = r[n]
        return L @ (g * (W0 + 0.7 * a.T @ b + 1.3 * np.kron(c, d))) @ R

    np.testing.assert_allclose(jlora.merge(adapted)["w"], weight(**f), rtol=1e-4, atol=1e-4)
    rng = np.random.default_rng(6)
    models = {
        "plain": (lambda p, x: x @ p["w"], (4, 6), lambda x, w: x @ w),
        "turned": (lambda p, x: jnp.einsum("to,oi->ti", x, p["w"].T), (4, 8), lambda x, w: x @ w.T),
        "split": (
            lambda p, x: jnp.einsum("tki,kio->to", x, p["w"].reshape(2, 3, 8)),
            (4, 2, 3),
            lambda x, w: np.einsum("tki,kio->to", x, w.reshape(2, 3, 8)),
        ),
        "cut": (lambda p, x: x @ p["w"][1:5], (3, 4), lambda x, w: x @ w[1:5]),
        "rows": (lambda p, x: p["w"][jnp.array([3, 0, 3])] * x, (3, 8), lambda x, w: w[[3, 0, 3]] * x),
    }
    for name, (fn, shape, want) in models.items():
        x = rng.standard_normal(shape)
        run = lambda t, fn=fn, x=x: jlora.lift(fn)(jlora.join(t, adapted.frozen), jnp.asarray(x, jnp.float32))
        turns = pytest.warns(jlora.RolesWarning) if name == "turned" else contextlib.nullcontext()
        with turns:
            y, pull = jax.vjp(run, adapted.trainable)
        np.testing.assert_allclose(y, want(x, weight(**f)), rtol=1e-4, atol=1e-3, err_msg=name)
        c = rng.standard_normal(y.shape)
        for k, grad in pull(jnp.asarray(c, jnp.float32))[0]["w"].items():
            d, grad = rng.standard_normal(grad.shape), np.float64(grad)
            at = lambda h, k=k, d=d, x=x, c=c, want=want: np.sum(c * want(x, weight(**(f | {k: f[k] + h * d}))))
            slope = (at(1e-5) - at(-1e-5)) / 2e-5
            assert abs(slope - np.sum(grad * d)) < 1e-4 * np.linalg.norm(grad) * np.linalg.norm(d), (name, k)


@pytest.mark.parametrize("shape", [(8, 160), (7, 200), (1280,)], ids=str)
@pytest.mark.parametrize("method", [jlora.KronA(target="w"), jlora.LoKr(rank=1, target="w")], ids=["krona", "lokr"])
def test_kronecker_gradients_of_long_activations(method, shape):
    """Sums over more than a thousand rows, which run row by row and in parts: in float64 NumPy, and in bfloat16."""
    rng = np.random.default_rng(7)
    W0, x, c = (rng.standard_normal(s) for s in ((12, 20), (*shape, 12), (*shape, 20)))
    adapted = jlora.adapt({"w": jnp.asarray(W0, jnp.float32)}, method)
    f = {k: rng.standard_normal(a.shape) for k, a in adapted.trainable["w"].items()}
    second = lambda f: f["a"].T @ f["b"] if "c" in f else f["b"]  # LoKr's c x (a b), KronA's a x b
    first = "c" if "c" in f else "a"

    @functools.partial(jax.jit, static_argnums=1)
    def grads(f, dtype):
        run = lambda f: jlora.lift(lambda p, x: x @ p["w"].astype(dtype))(
            jlora.join({"w": f}, adapted.frozen), jnp.asarray(x, dtype)
        )
        return jax.vjp(run, f)[1](jnp.asarray(c, dtype))[0]

    G = np.einsum("ni,no->io", x.reshape(-1, 12), c.reshape(-1, 20))  # of W
    G = np.einsum("ijop->iojp", G.reshape(*((n := f[first].shape)[0], 12 // n[0]), n[1], 20 // n[1]))
    want = {first: np.einsum("iojp,jp->io", G, second(f))}
    outer = np.einsum("iojp,io->jp", G, f[first])
    want |= {"a": f["b"] @ outer.T, "b": f["a"] @ outer} if first == "c" else {"b": outer}
    single = {k: jnp.asarray(a, jnp.float32) for k, a in f.items()}
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)):
        for k, grad in grads(single, dtype).items():
            error = np.linalg.norm(np.float64(grad) - want[k]) / np.linalg.norm(want[k])
            assert error < tolerance, (k, dtype, error)
