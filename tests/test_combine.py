"""Several adapters as one, exactly or as near as is asked for; and an adapter out of two checkpoints."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import combine
from methods import EVERY, adapted, as_bytes, assert_close, away_from_start, each_row

pytestmark = pytest.mark.settled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def far(ad, seed=0):
    leaves, treedef = jax.tree.flatten(ad.trainable)
    return jlora.join(treedef.unflatten([draw(100 * seed + n, *x.shape) for n, x in enumerate(leaves)]), ad.frozen)


PARAMS = {
    "q": {"kernel": draw(0, 6, 5), "bias": draw(1, 5)},
    "stack": {"kernel": draw(2, 3, 4, 4)},
    "heads": {"kernel": draw(3, 6, 2, 2)},
    "conv": {"kernel": draw(4, 3, 2, 2, 5)},
}
AXES = {"stack": "sio", "heads": "ioo", "conv": "kkio"}
KERNELS, Q = "kernel$", "q/kernel"


def of(spec, seed=0):
    return far(jlora.adapt(PARAMS, spec, axes=AXES), seed)


def updates(ad):
    """W - W0 of every leaf, in float64."""
    pairs = zip(jax.tree.leaves(jlora.merge(ad)), jax.tree.leaves(PARAMS), strict=True)
    return [np.float64(a) - np.float64(b) for a, b in pairs]


# Exactly ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", each_row(EVERY))
def test_one_adapter_with_weight_one_is_itself(row):
    """Bit for bit and in its own method, whatever it is."""
    _, params, _ = row.home.build()
    ad = adapted(row, row.home, params)
    ad = jlora.join(away_from_start(ad.trainable), ad.frozen)
    made = combine.weighted([ad], [1])
    assert jax.tree.structure(made.trainable) == jax.tree.structure(ad.trainable)
    assert as_bytes(made) == as_bytes(ad)
    assert [s.method for s in made.frozen.plan.sites] == [s.method for s in ad.frozen.plan.sites]


PAIRS = {
    "LoRA and LoRA": (jlora.LoRA(rank=2, alpha=3, target=KERNELS), jlora.LoRA(rank=3, alpha=1, target=KERNELS)),
    "unlike targets": (jlora.LoRA(rank=2, target=Q), jlora.LoRA(rank=2, alpha=8, target="stack|q/kernel")),
    "AdaLoRA and SoRA": (jlora.AdaLoRA(rank=2, target=KERNELS), jlora.SoRA(rank=2, target=KERNELS)),
    "VeRA and a pair": (jlora.VeRA(rank=3, target=KERNELS), jlora.LoRA(rank=2, init="pissa", target=KERNELS)),
    "tied and tied": (jlora.TiedLoRA(rank=2, target=KERNELS), jlora.TiedLoRA(rank=2, target=KERNELS)),
    "Full and LoRA": (jlora.Full(target=KERNELS), jlora.LoRA(rank=2, target=KERNELS)),
    "biases": ([jlora.BitFit(), jlora.LoRA(rank=1, target=Q)], jlora.BitFit()),
    "LoHa and nothing beside it": (jlora.LoHa(rank=2, target=Q), jlora.KronA(target="stack|heads")),
    "slices": (jlora.LoRA(rank=1, slices=((0, 1), (2, 4)), target=Q), jlora.LoRA(rank=2, target=Q)),
}  # fmt: skip


@pytest.mark.parametrize("name", PAIRS)
def test_updates_are_the_weighted_sums(name):
    """dW = sum of w_k dW_k, element by element, against what merging each alone gives."""
    weights = 0.7, -1.3
    ads = [of(spec, n) for n, spec in enumerate(PAIRS[name])]
    before = as_bytes(ads)
    made = combine.weighted(ads, weights)
    want = [sum(w * d for w, d in zip(weights, ds, strict=True)) for ds in zip(*map(updates, ads), strict=True)]
    assert_close(updates(made), want, 1e-5)
    assert as_bytes(ads) == before
    x = draw(9, 4, 6)
    f = lambda p, x: x @ p["q"]["kernel"] + p["q"]["bias"]
    assert_close(jlora.lift(f)(made, x), f(jlora.merge(made), x))


def test_what_is_made_trains_saves_and_loads(tmp_path):
    """It is an adapter as any other."""
    made = combine.weighted([of(jlora.LoRA(rank=2, target=KERNELS), n) for n in range(2)])
    jlora.save(tmp_path / "x", made)
    assert as_bytes(jlora.load(tmp_path / "x", PARAMS)) == as_bytes(made)
    loss = lambda t: jnp.sum(jlora.lift(lambda p: jnp.ones(6) @ p["q"]["kernel"])(jlora.join(t, made.frozen)) ** 2)
    grads = jax.grad(loss)(made.trainable)
    assert np.any(grads["q/kernel"]["a"])


def test_rows_of_one_adapter_stay_rows():
    """New and trained tokens go along where no other adapter has the table."""
    params = {"embed": {"embedding": draw(0, 9, 4)}, "q": {"kernel": draw(1, 4, 4)}}
    tokens = far(jlora.adapt(params, [jlora.NewTokens(count=2), jlora.LoRA(rank=1, target=Q)]))
    lora = far(jlora.adapt(params, jlora.LoRA(rank=2, target=Q)), 1)
    made = combine.weighted([tokens, lora], [1, 0.5])
    assert as_bytes(made.trainable["embed/embedding"]) == as_bytes(tokens.trainable["embed/embedding"])
    assert jlora.merge(made)["embed"]["embedding"].shape == (11, 4)


REFUSED = {
    "two rotations": lambda: combine.weighted([of(jlora.OFT(block=2, target="stack")), of(jlora.HRA(target="stack"))]),
    "half a DoRA": lambda: combine.weighted([of(jlora.DoRA(jlora.LoRA(rank=2, target=Q)))], [0.5]),
    "half a gain": lambda: combine.weighted([of(jlora.IA3(target=Q))], [0.5]),
    "KronA and LoHa": lambda: combine.weighted([of(jlora.KronA(target=Q)), of(jlora.LoRA(rank=1, target=Q))]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_exact_sum_is_refused(name):
    """All such weights at once, with the methods, and with what approximates."""
    with pytest.raises(ValueError, match="no method says these sums exactly; combine.truncated.*\n.*(q|stack)/"):
        REFUSED[name]()


ONE = jlora.adapt(PARAMS, jlora.LoRA(rank=2, target=Q))
OTHER = jlora.adapt(
    {**PARAMS, "q": {"kernel": draw(7, 6, 5), "bias": PARAMS["q"]["bias"]}}, jlora.LoRA(rank=2, target=Q)
)
MISTAKES = {
    "one adapter": (lambda: combine.weighted(ONE), TypeError, "in a list"),
    "none": (lambda: combine.weighted([]), TypeError, "in a list"),
    "parameters": (lambda: combine.weighted([PARAMS]), TypeError, "combine.weighted takes an Adapted"),
    "a weight too many": (lambda: combine.weighted([ONE], [1, 2]), ValueError, "2 weights for 1 adapters"),
    "a weight in words": (lambda: combine.weighted([ONE], ["x"]), TypeError, "a weight is a number, not 'x'"),
    "a weight of nan": (lambda: combine.weighted([ONE], [float("nan")]), ValueError, "weight of nan"),
    "zeros": (lambda: combine.weighted([ONE], [0]), ValueError, "all weights are zero"),
    "another base": (lambda: combine.weighted([ONE, OTHER]), ValueError, "another base.*q/kernel"),
    "no rank": (lambda: combine.truncated([ONE]), ValueError, "rank=None, energy=None"),
    "density of 0": (lambda: combine.ties([ONE], density=0), ValueError, r"density=0\): the share"),
    "a sign": (lambda: combine.ties([ONE], density=1, sign="both"), ValueError, "sign='both'"),
    "inside jit": (lambda: jax.jit(lambda t: combine.weighted([jlora.join(t, ONE.frozen)]))(ONE.trainable), ValueError,
                   "outside of jit|outside\nof jit"),
    "an adapter": (lambda: combine.extract(PARAMS, ONE, jlora.LoRA(rank=2, target=Q)), TypeError, "plain parameters"),
    "unchanged": (lambda: combine.extract(PARAMS, PARAMS, jlora.LoRA(rank=2, target=Q)), ValueError, "tuned is base"),
    "unlike forms": (lambda: combine.extract(PARAMS, {"q": PARAMS["q"]}, jlora.LoRA(rank=2, target=Q)), ValueError,
                     "unlike form; .*conv/kernel"),
    "KronA": (lambda: combine.extract(PARAMS, jax.tree.map(lambda x: x + 1, PARAMS), jlora.KronA(target=Q)),
              ValueError, "makes LoRA and Full .*not KronA"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_told(name):
    """What happened, where, and what to write."""
    call, kind, words = MISTAKES[name]
    with pytest.raises(kind, match=words):
        call()


# At a rank ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [jlora.KronA(target=KERNELS), jlora.DoRA(jlora.LoRA(rank=2, target=KERNELS)),
                                  jlora.OFT(block=2, target="(q|stack)/kernel"), jlora.LoHa(rank=2, target=KERNELS)],
                         ids=lambda s: s.describe())  # fmt: skip
def test_any_method_at_a_rank_is_the_best_of_that_rank(spec):
    """Eckart and Young: the error is what NumPy's singular values leave out, and at full rank nothing is."""
    ad = of(spec)
    small, error = combine.to_lora(ad, rank=1)
    whole, none = combine.to_lora(ad, energy=1.0)
    assert_close(updates(whole), updates(ad), 1e-4)
    assert max(none.values()) < 1e-3
    for site in ad.frozen.plan.sites:
        W = np.asarray(updates(ad)[site.index], np.float64)
        S = np.linalg.svd(np.asarray(site.leaf.matrix(W)), compute_uv=False)
        np.testing.assert_allclose(error[site.leaf.path], np.sqrt((S[..., 1:] ** 2).sum() / (S**2).sum()), rtol=1e-3)
        got = np.asarray(site.leaf.matrix(np.asarray(updates(small)[site.index] - W)))
        np.testing.assert_allclose(np.linalg.norm(got), np.sqrt((S[..., 1:] ** 2).sum()), rtol=1e-3)


GOLDEN = np.load(Path(__file__).parent / "fixtures" / "combine" / "peft.npz")


def golden(name):
    params = {
        "q": {"kernel": jnp.asarray(GOLDEN["q"])},
        "c": {"kernel": jnp.asarray(GOLDEN["c"].transpose(2, 3, 1, 0))},
    }
    rank = len(GOLDEN[f"{name}.a"])
    ad = jlora.adapt(
        params, jlora.LoRA(rank=rank, alpha=rank * float(GOLDEN[f"{name}.s"]), target="kernel"), axes={"c/": "kkio"}
    )
    window = GOLDEN[f"{name}.ca"].transpose(0, 2, 3, 1), GOLDEN[f"{name}.cb"][:, :, 0, 0].T
    halves = {"q/kernel": (GOLDEN[f"{name}.a"], GOLDEN[f"{name}.b"]), "c/kernel": window}
    return jlora.join({p: {"a": jnp.asarray(a), "b": jnp.asarray(b)} for p, (a, b) in halves.items()}, ad.frozen)


MADE = {
    "cat": combine.weighted,
    "svd": lambda ads, w: combine.truncated(ads, w, rank=2).adapted,
    "ties_svd": lambda ads, w: combine.ties(ads, w, density=0.4).adapted,
    "ties_freq": lambda ads, w: combine.ties(ads, w, density=0.4, sign="frequency", rank=5).adapted,
    "magnitude_prune_svd": lambda ads, w: combine.pruned(ads, w, density=0.3, rank=5).adapted,
}


@pytest.mark.parametrize("name", MADE)
def test_numbers_of_peft(name):
    """peft 0.21.2's `add_weighted_adapter` of two LoRAs, weights 0.7 and -1.3, on a dense layer and a convolution."""
    made = MADE[name]([golden("one"), golden("two")], [0.7, -1.3])
    found = jax.tree.map(lambda a, b: np.asarray(a - b), jlora.merge(made), made.frozen.base)
    np.testing.assert_allclose(found["q"]["kernel"], GOLDEN[f"made.{name}"], atol=2e-5)
    np.testing.assert_allclose(found["c"]["kernel"].transpose(3, 2, 0, 1), GOLDEN[f"conv.{name}"], atol=2e-5)


def test_dare_keeps_the_mean():
    """Each entry stays with the given probability and is then divided by it; one key gives one adapter."""
    ad = far(jlora.adapt({"w": jnp.zeros((64, 64))}, jlora.Full(target="w")))
    d = np.asarray(ad.trainable["w"]["delta"])
    one, again, other = (
        combine.dare([ad], density=0.25, key=jax.random.key(n)).adapted.trainable["w"]["delta"] for n in (0, 0, 1)
    )
    kept = np.asarray(one) != 0
    np.testing.assert_allclose(np.asarray(one)[kept], 4 * d[kept], rtol=1e-6)
    assert 0.2 < kept.mean() < 0.3 and as_bytes(one) == as_bytes(again) and as_bytes(one) != as_bytes(other)
    mean = np.mean([np.asarray(combine.dare([ad], density=0.5, key=jax.random.key(n)).adapted.trainable["w"]["delta"])
                    for n in range(64)], 0)  # fmt: skip
    assert np.abs(mean - d).mean() < 3 * np.abs(d).mean() / 64**0.5


def test_dare_elects_a_sign_as_ties_does():
    """With nothing dropped it is TIES without trimming."""
    ads = [of(jlora.LoRA(rank=2, target=KERNELS), n) for n in range(3)]
    dare = combine.dare(ads, density=1.0, key=jax.random.key(0), sign="total").adapted
    assert_close(updates(dare), updates(combine.ties(ads, density=1.0).adapted))


# Out of two checkpoints ---------------------------------------------------------------------------------------------


def test_extracting_is_the_best_of_a_rank():
    """tuned - base at rank 2 by NumPy; biases whole; what no rule takes is told, and counts as lost."""
    tuned = jax.tree.map(lambda x: x + 0.3 * draw(5, *x.shape), PARAMS)
    spec = [jlora.LoRA(rank=2, target="(q|stack|heads)/kernel"), jlora.BitFit()]
    with pytest.warns(UserWarning, match="1 leaves changed that no rule.*conv/kernel.*Full"):
        small, error = combine.extract(PARAMS, tuned, spec, axes=AXES)
    assert error["conv/kernel"] == 1 and error["q/bias"] == 0
    merged = jlora.merge(small)
    np.testing.assert_allclose(merged["q"]["bias"], tuned["q"]["bias"], atol=1e-6)
    for path, shape in (("q", (6, 5)), ("stack", (3, 4, 4)), ("heads", (6, 4))):
        D, got = (np.float64(x[path]["kernel"] - PARAMS[path]["kernel"]).reshape(shape) for x in (tuned, merged))
        U, S, V = np.linalg.svd(D, full_matrices=False)
        best = (U[..., :2] * S[..., None, :2]) @ V[..., :2, :]
        np.testing.assert_allclose(got, best, atol=1e-5)
        np.testing.assert_allclose(error[f"{path}/kernel"], np.linalg.norm(D - best) / np.linalg.norm(D), rtol=1e-4)


def test_a_lora_that_was_merged_comes_back():
    """By energy its rank is found, its update to rounding, and nothing else is touched."""
    ad = of(jlora.LoRA(rank=2, target="(q|stack)/kernel"))
    tuned = jlora.merge(ad)
    small, error = combine.extract(PARAMS, tuned, jlora.LoRA(rank=1, target=KERNELS), energy=0.99999, axes=AXES)
    assert set(error) == {"q/kernel", "stack/kernel"} and max(error.values()) < 1e-2
    assert small.trainable["q/kernel"]["a"].shape == (2, 6)
    assert_close(updates(small), updates(ad), 1e-2)


def test_large_matrices_by_random_projections():
    """Within a hundredth of what the best of that rank leaves out."""
    rng = np.random.default_rng(0)
    D = (rng.standard_normal((1100, 12)) * 2.0 ** -np.arange(12)) @ rng.standard_normal((12, 1060)) / 30
    D = (D + 0.001 * rng.standard_normal(D.shape)).astype(np.float32)
    base = {"w": jnp.zeros(D.shape)}
    _, error = combine.extract(base, {"w": jnp.asarray(D)}, jlora.LoRA(rank=4, target="w"))
    S = np.linalg.svd(D, compute_uv=False)
    best = np.sqrt((S[4:] ** 2).sum() / (S**2).sum())
    assert best <= error["w"] * (1 + 1e-4) and error["w"] < 1.01 * best


def test_a_quantised_base_and_bfloat16():
    """Differences are of what codes stand for, in float32."""
    base = {"w": draw(0, 64, 32)}
    small = jlora.quantize(base, "int8", target="w")
    stands_for = jlora.quant.dequantize(small)["w"]
    tuned = {"w": stands_for + jnp.outer(draw(1, 64), draw(2, 32))}
    made, error = combine.extract(small, tuned, jlora.LoRA(rank=1, target="w"))
    assert error["w"] < 1e-5
    assert_close(jlora.merge(made)["w"], tuned["w"], 1e-5)


# How far apart ------------------------------------------------------------------------------------------------------


def test_differences_are_those_of_numpy():
    """Norms and the cosine of two updates; a weight that one alone has is apart by all of it."""
    one, two = (
        of(jlora.LoRA(rank=2, target="(q|stack)/kernel")),
        of(jlora.DoRA(jlora.LoRA(rank=1, target=Q)), 1),
    )
    found = combine.diff(one, two)
    assert list(found) == ["q/kernel", "stack/kernel"]
    index = {s.leaf.path: s.index for s in one.frozen.plan.sites}["q/kernel"]
    a, b = (updates(ad)[index].ravel() for ad in (one, two))
    want = np.linalg.norm(a), np.linalg.norm(b), np.linalg.norm(a - b), a @ b / np.linalg.norm(a) / np.linalg.norm(b)
    np.testing.assert_allclose(found["q/kernel"], want, rtol=1e-4)
    assert found["stack/kernel"].second == 0 and found["stack/kernel"].apart == found["stack/kernel"].first
