"""Methods against layers of peft that computed with the same factors (`fixtures/peft_methods/write.py`)."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.settled

FILES = Path(__file__).parent / "fixtures" / "peft_methods"


def gralora(f):
    """a (k, in / k, r) and b (k, r, out / k) there: the rank of A holds (k, r / k), the blocks of the output first."""
    k, i, r = f["gralora_A"].shape
    made = {
        "a": f["gralora_A"].reshape(k, i, k, r // k).transpose(3, 0, 2, 1),
        "b": f["gralora_B"].reshape(k, k, r // k, -1).transpose(2, 1, 0, 3),
    }
    hybrid = {n: f[f"gralora_{n.upper()}_general.weight"] for n in "ab" if f"gralora_{n.upper()}_general.weight" in f}
    return made | {f"{n}_hybrid": x if n == "a" else x.T for n, x in hybrid.items()}


def numbered(f: dict[str, np.ndarray], indices: np.ndarray) -> np.ndarray:
    """Entries (out, in) of torch's weight as numbers through (in, out), in digits of 256."""
    numbers = indices[1] * len(f["base"]) + indices[0]
    return np.float32(numbers[:, None] // 256 ** np.arange(4) % 256)


def psoft(f):
    """The rotation, its scalings, and the frozen factors that peft makes of the base."""
    frozen = {"a": f["_psoft_A_cache"], "b": f["_psoft_B_cache"].T}
    return frozen | {"q": f["psoft_R.weight"], "alpha": f["psoft_R.vector_a"], "beta": f["psoft_R.vector_b"]}


def above(square: np.ndarray) -> np.ndarray:
    """What stands above the diagonals of the skew parts of (..., n, n)."""
    skew = (square - square.swapaxes(-1, -2)) / 2
    return skew[(..., *np.triu_indices(square.shape[-1], 1))]


def glora(f):
    """A and B are (out, r) (r, in), (out, 1) or (1,); D and E (out,) or (1,)."""
    own = lambda x: x.ravel() if x.size > 1 else x[0]
    made = {n: own(f[f"glora_{n.upper()}.X"]) for n in "abde" if f"glora_{n.upper()}.X" in f}
    pairs = {
        n: (f[f"glora_{n.upper()}.Xu"], f[f"glora_{n.upper()}.Xd"].T) for n in "ab" if f"glora_{n.upper()}.Xu" in f
    }
    return made | {f"{n}{x}": pair[at] for n, pair in pairs.items() for at, x in enumerate("ud")}


# file -> (method, its factors out of peft's tensors). Torch stores (out, in): the transpose of a kernel.
GOLDEN = {
    "mica": (
        jlora.MiCA(rank=2, alpha=3),
        lambda f: {"a": f["lora_A.weight"], "b": np.swapaxes(f["lora_B.weight"], 0, 1)},
    ),
    "kasa": (
        jlora.KaSA(rank=2, alpha=3),
        lambda f: {"v": f["lora_A.weight"], "sigma": f["lora_diag"], "u": np.swapaxes(f["lora_B.weight"], 0, 1)},
    ),
    "vblora": (
        jlora.VBLoRA(rank=2, vectors=5, length=2, k=3),
        lambda f: {
            "bank": f["vblora_vector_bank"],
            "sigma_a": f["vblora_logits_A"],
            "sigma_b": f["vblora_logits_B"].swapaxes(0, 1),
        },
    ),
    "gralora": (jlora.GraLoRA(rank=4, alpha=6), gralora),
    "gralora_hybrid": (jlora.GraLoRA(rank=4, alpha=6, hybrid=3), gralora),
    "delora": (
        jlora.DeLoRA(rank=2),
        lambda f: {"a": f["delora_A"], "b": f["delora_B"].T, "lam": f["delora_lambda"][0]},
    ),
    **{
        f"road_{n}": (
            jlora.RoAd(variant=n, group=4),
            lambda f, way=way: {x: f[f"road_{x}"].reshape(2, *way, 2) for x in ("theta", "alpha")},
        )
        for n, way in ((1, ()), (2, (2,)), (4, (2, 2)))
    },
    "glora": (jlora.GLoRA(rank=2, d="vector", e="vector"), glora),
    "glora_vectors": (jlora.GLoRA(a="vector", b="vector"), glora),
    "glora_numbers": (jlora.GLoRA(a="constant", b="constant", d="none", e="none"), glora),
    "miss": (jlora.MiSS(rank=2), lambda f: {"d": f["miss_block"]}),
    "miss_rest": (jlora.MiSS(rank=4), lambda f: {"d": f["miss_block"]}),
    "miss_mini": (jlora.MiSS(rank=2, mini=2), lambda f: {"d": f["miss_block"]}),
    "miss_bat": (jlora.MiSS(rank=2, bat=True), lambda f: {"d": f["miss_block"]}),
    "boft": (jlora.BOFT(block=4, factors=3), lambda f: {"q": above(-f["boft_R"]), "g": f["boft_s"][:, 0]}),
    "c3a": (jlora.C3A(block=4), lambda f: {"w": f["c3a_kernel"]}),
    "c3a_odd": (jlora.C3A(block=3), lambda f: {"w": f["c3a_kernel"]}),
    "fourierft": (
        jlora.FourierFT(n=7, scale=30),
        lambda f: {"c": f["fourierft_spectrum"], "entries": numbered(f, f["indices"])},
    ),
    "shira": (jlora.SHiRA(rank=1), lambda f: {"v": f["shira_weight"], "entries": numbered(f, f["shira_indices"])}),
    "psoft": (jlora.PSOFT(rank=3), psoft),
    "hra": (jlora.HRA(rank=4), lambda f: {"u": f["hra_u"].T}),
}


def read(name):
    with np.load(FILES / f"{name}.npz") as file:
        return dict(file)


@pytest.mark.parametrize("name", GOLDEN)
def test_weights_and_outputs_are_those_of_peft(name):
    """The merged layer and the lifted output are those that peft computes with these factors in float64."""
    method, ours = GOLDEN[name]
    f = read(name)
    check(method, f, ours(f))


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
def test_corda_takes_away_what_peft_does(mode):
    """The base less the start, made of the same covariance: with the same factors the layer is peft's."""
    f = read(f"corda_{mode}")
    method = jlora.LoRA(rank=2, alpha=3, init=jlora.init.CorDA({"w/kernel": f["covariance"]}, mode))
    check(method, f, {"a": f["lora_A.weight"], "b": f["lora_B.weight"].T})


def check(method, f, given):
    """Holds the merged layer and the lifted output against those of a file, with these factors."""
    params = {"w": {"kernel": jnp.asarray(f["base"].T), "bias": jnp.asarray(f["bias"])}}
    adapted = jlora.adapt(params, dataclasses.replace(method, target="w/kernel"))
    left = {n: a for held in adapted.trainable.values() for n, a in held.items()}
    drawn = {n: given.pop(n) for n in ("entries",) if n in given}  # by a generator of torch's
    factors = {n: given.pop(n) for n in adapted.frozen.factors["w/kernel"] if n in given}
    assert {n: a.shape for n, a in given.items()} == {n: a.shape for n, a in left.items()}
    trainable = {group: {n: jnp.asarray(given[n]) for n in held} for group, held in adapted.trainable.items()}
    for n, theirs in factors.items():  # made of the base, by us too: singular vectors, each with a sign of its own
        np.testing.assert_allclose(np.abs(adapted.frozen.factors["w/kernel"][n]), np.abs(theirs), rtol=1e-5, atol=1e-6)
        adapted.frozen.factors["w/kernel"][n] = jnp.asarray(theirs)
    for held in adapted.frozen.factors.values():
        held |= {n: jnp.asarray(x) for n, x in drawn.items() if n in held}
    adapted = jlora.join(trainable, adapted.frozen)
    made = {"y": jlora.lift(lambda p, x: x @ p["w"]["kernel"] + p["w"]["bias"])(adapted, jnp.asarray(f["x"]))}
    if "merged" in f:
        merged = jlora.merge(adapted)["w"]
        made |= {"merged": merged["kernel"].T, "merged_bias": merged["bias"]}
    for what, array in made.items():
        np.testing.assert_allclose(array, f[what], rtol=1e-5, atol=1e-6 * np.abs(f[what]).max(), err_msg=what)


def test_norms_are_those_of_peft():
    """LN tuning trains a scale and a shift, and a layer norm with them is the one that peft makes."""
    f = read("ln_tuning")
    base = {"norm": {"scale": jnp.asarray(f["base"]), "bias": jnp.asarray(f["bias"])}}
    adapted = jlora.adapt(base, jlora.LNTuning())
    want = {"scale": f["ln_tuning_layers.weight"], "bias": f["ln_tuning_layers.bias"]}
    deltas = {f"norm/{name}": {"delta": jnp.asarray(value) - base["norm"][name]} for name, value in want.items()}
    adapted = jlora.join(deltas, adapted.frozen)

    def norm(p, x):
        x = x - jnp.mean(x, -1, keepdims=True)
        return x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 1e-5) * p["norm"]["scale"] + p["norm"]["bias"]

    np.testing.assert_allclose(jlora.lift(norm)(adapted, jnp.asarray(f["x"])), f["y"], rtol=1e-5, atol=1e-5)
    merged = jlora.merge(adapted)["norm"]
    np.testing.assert_allclose(merged["scale"], f["merged"], rtol=1e-6)
    np.testing.assert_allclose(merged["bias"], f["merged_bias"], rtol=1e-6)


def test_the_penalty_of_kasa_is_that_of_peft():
    """1e-4 sum(sigma^2) + 1e-3 (||u u^T - I|| + ||v v^T - I||), as the paper's runs on GLUE have it."""
    method, ours = GOLDEN["kasa"]
    f = read("kasa")
    adapted = jlora.adapt({"w": jnp.asarray(f["base"].T)}, dataclasses.replace(method, target="w"))
    adapted = jlora.join({"w": {n: jnp.asarray(x) for n, x in ours(f).items()}}, adapted.frozen)
    penalty = 1e-4 * jnp.sum(f["lora_diag"] ** 2) + 1e-3 * jlora.rank.orthogonality(adapted, "norms")
    np.testing.assert_allclose(penalty, f["penalty"], rtol=1e-6)
