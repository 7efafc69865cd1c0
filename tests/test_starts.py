"""Where the factors of every method begin: distributions and constants, as the papers or their authors' code say."""

import dataclasses
import math
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jlora

pytestmark = pytest.mark.settled

IN, OUT = 48 * 48, 40 * 40
DENSE, WINDOW = (IN, OUT), (3, 2, 24 * 24, 20 * 20)


def even(bound: float, x: np.ndarray) -> None:
    """U(-bound, bound), by its ends and its spread."""
    spread(bound / math.sqrt(3), x)
    assert (1 - 30 / x.size) * bound < np.abs(x).max() <= bound * (1 + 1e-6)


def bell(std: float, x: np.ndarray) -> None:
    """N(0, std^2), by its spread and its fourth moment."""
    spread(std, x)
    assert abs(np.mean(x**4) / np.mean(x**2) ** 2 - 3) < 5 * math.sqrt(24 / x.size)


def spread(std: float, x: np.ndarray) -> None:
    """Mean and standard deviation, to five errors of a sample of normal numbers."""
    assert x.size > 400
    assert abs(x.mean()) < 5 * std / math.sqrt(x.size)
    assert abs(x.std() / std - 1) < 5 / math.sqrt(2 * x.size)


def at(value: float, x: np.ndarray) -> None:
    """All the same."""
    np.testing.assert_allclose(x, value, rtol=1e-6, atol=0)


def pairs(start: Any) -> Any:
    """Each two neighbours are equal, and the first of each begin so."""

    def both(x: np.ndarray) -> None:
        np.testing.assert_array_equal(x[::2], x[1::2])
        start(x[::2])

    return both


def distinct(x: np.ndarray) -> None:
    """Entries of a DENSE weight, none twice and spread evenly, in digits of 256."""
    x = x @ 256.0 ** np.arange(4)
    assert len(np.unique(x)) == len(x) and x.min() >= 0 and x.max() < IN * OUT
    spread(1 / math.sqrt(12), x / (IN * OUT) - 0.5)


zero, one = partial(at, 0.0), partial(at, 1.0)
kaiming = lambda fan_in: partial(even, 1 / math.sqrt(fan_in))  # torch's kaiming_uniform_(a=sqrt(5)): loralib, LyCORIS

# name -> (method, shape of the weight, the start of each of its factors, None where they are too few to tell)
STARTS: dict[str, tuple[Any, tuple[int, ...], dict[str, Any]]] = {
    "lora": (jlora.LoRA(rank=4), DENSE, {"a": kaiming(IN), "b": zero}),
    "lora_window": (jlora.LoRA(rank=4), WINDOW, {"a": kaiming(6 * 24**2), "b": zero}),
    "lora_gaussian": (jlora.LoRA(rank=4, init="gaussian"), DENSE, {"a": partial(bell, 1 / 4), "b": zero}),
    "lora_slices": (
        jlora.LoRA(rank=4, slices=((0, 9), (9, 20))),
        DENSE,
        {"a0": kaiming(IN), "b0": zero, "a1": kaiming(IN), "b1": zero},
    ),
    "lora_fa": (jlora.LoRAFA(rank=4), DENSE, {"a": kaiming(IN), "b": zero}),
    "kasa": (
        jlora.KaSA(rank=512),
        (600, 576),
        {"v": kaiming(600), "sigma": partial(bell, 1.0), "u": zero, "v_noise": None, "u_noise": None},
    ),
    "adalora": (jlora.AdaLoRA(rank=4), DENSE, {"p": partial(bell, 0.02), "lam": zero, "q": partial(bell, 0.02)}),
    "sora": (jlora.SoRA(rank=512), DENSE, {"a": kaiming(IN), "g": partial(bell, 1.0), "b": zero}),
    "loha": (
        jlora.LoHa(rank=4),
        DENSE,
        {"a1": partial(bell, 1.0), "b1": partial(bell, 0.1), "a2": partial(bell, 1.0), "b2": zero},
    ),
    "loha_tucker": (
        jlora.LoHa(rank=16, tucker=True),
        WINDOW,
        {
            **{"t1": partial(bell, 0.1), "a1": partial(bell, 1.0), "b1": partial(bell, 0.1)},
            **{"t2": partial(bell, 0.1), "a2": partial(bell, 1.0), "b2": zero},
        },
    ),
    "lokr": (jlora.LoKr(rank=12), DENSE, {"c": kaiming(48), "a": kaiming(48), "b": zero}),
    "lokr_whole": (jlora.LoKr(rank=24), DENSE, {"c": kaiming(48), "b": zero}),
    "lokr_both": (
        jlora.LoKr(rank=12, decompose_both=True),
        DENSE,
        {"c1": kaiming(48), "c2": kaiming(12), "a": kaiming(48), "b": zero},
    ),
    "lokr_window": (jlora.LoKr(rank=11), WINDOW, {"c": kaiming(24), "a": kaiming(24 * 6), "b": zero}),
    "lokr_tucker": (
        jlora.LoKr(rank=11, factor=4, tucker=True),
        WINDOW[:2] + (4 * 144, 4 * 100),
        {"c": None, "t": kaiming(11 * 6), "a": kaiming(144), "b": zero},
    ),
    "krona": (jlora.KronA(), DENSE, {"a": kaiming(48), "b": zero}),
    "krona_residual": (jlora.KronA(residual=True), (IN, IN), {"a": kaiming(48), "b": zero, "s_res": zero}),
    "hira": (jlora.HiRA(rank=4), DENSE, {"a": kaiming(IN), "b": zero}),
    "gralora": (
        jlora.GraLoRA(rank=4, blocks=4, hybrid=2),
        DENSE,
        {"a": kaiming(IN // 4), "b": zero, "a_hybrid": kaiming(IN), "b_hybrid": zero},
    ),
    "gralora_window": (jlora.GraLoRA(rank=4), WINDOW, {"a": kaiming(6 * 24**2 // 2), "b": zero}),
    "miss": (jlora.MiSS(rank=4), DENSE, {"d": zero}),
    "miss_bat": (jlora.MiSS(rank=8, bat=True), DENSE, {"d": zero}),
    "vera": (  # kaiming with a gain of sqrt(2)
        jlora.VeRA(rank=5),
        DENSE,
        {
            **{"A": partial(even, math.sqrt(6 / IN)), "B": partial(even, math.sqrt(6 / 5))},
            **{"d": partial(at, 0.1), "b": zero},
        },
    ),
    "vblora": (
        jlora.VBLoRA(vectors=60, length=64),
        DENSE,
        {"bank": partial(even, 0.02), "sigma_a": partial(bell, 0.1), "sigma_b": partial(bell, 0.1)},
    ),
    "randlora": (  # bases of unit variance
        jlora.RandLoRA(rank=512),
        DENSE,
        {
            **{"A": partial(even, math.sqrt(3)), "B": partial(even, math.sqrt(3))},
            **{"lam": zero, "gam": partial(at, 1 / IN)},
        },
    ),
    "tied": (jlora.TiedLoRA(rank=4), DENSE, {"a": kaiming(IN), "b": zero, "u": one, "v": one}),
    "tied_frozen_b": (
        jlora.TiedLoRA(rank=4, trained=("u", "v")), DENSE, {"a": kaiming(IN), "b": kaiming(4), "u": one, "v": zero}
    ),
    "glora": (
        jlora.GLoRA(rank=4, b="vector"),
        DENSE,
        {"au": partial(even, math.sqrt(6 / (4 + IN))), "ad": zero, "b": zero},
    ),
    "delora": (
        jlora.DeLoRA(rank=4, strength=3),
        DENSE,
        {"a": kaiming(IN), "b": zero, "lam": partial(at, 3.0), "w": partial(at, math.sqrt(OUT))},
    ),
    "oft": (jlora.OFT(), DENSE, {"q": zero}),
    "fourierft": (jlora.FourierFT(), DENSE, {"c": zero, "entries": distinct}),
    "shira": (jlora.SHiRA(rank=1), DENSE, {"v": zero, "entries": distinct}),
    "trained_tokens": (jlora.TrainedTokens(ids=(1,)), DENSE, {"rows": zero}),
    "new_tokens": (jlora.NewTokens(count=2), DENSE, {"rows": one}),  # the mean of ones
    "c3a": (jlora.C3A(), DENSE, {"w": zero}),
    "psoft": (jlora.PSOFT(rank=4), (48, 40), {"a": None, "b": None, "q": zero, "alpha": one, "beta": one}),
    "boft": (jlora.BOFT(), DENSE, {"q": zero, "g": one}),
    "hra": (jlora.HRA(rank=8), DENSE, {"u": pairs(kaiming(4))}),  # as peft has it, over half the rank
    "road": (jlora.RoAd(), DENSE, {"theta": zero, "alpha": one}),
    "ia3": (jlora.IA3(), DENSE, {"l": one}),
    "ia3_in": (jlora.IA3(side="in"), DENSE, {"l": one}),
    "ssf": (jlora.SSF(target="."), DENSE, {"gamma": one}),
    "intrinsic": (jlora.IntrinsicDimension(5), (6, 4), {"theta": zero, "lam": one}),
    "ln_tuning": (jlora.LNTuning(), DENSE, {"delta": zero}),
    "full": (jlora.Full(target="."), DENSE, {"delta": zero}),
}  # fmt: skip

SCALES = {"s", "s_noise", "s_one", "eye", "place", "s_rows"}  # no factors that begin anywhere


@pytest.mark.parametrize("name", STARTS)
def test_factors_begin_as_the_papers_say(name):
    """Each factor has the distribution of its paper, in the sizes of the weight; the one that must be is zero."""
    method, shape, starts = STARTS[name]
    params = {"kernel": jnp.ones(shape)}
    adapted = jlora.adapt(
        params, dataclasses.replace(method, target="kernel"), axes={"kernel": "k" * (len(shape) - 2) + "io"}
    )
    begun = {
        n: x for half in (adapted.trainable, adapted.frozen.factors) for held in half.values() for n, x in held.items()
    }
    assert set(begun) - SCALES == set(starts)
    for factor, start in starts.items():
        if start is not None:
            start(np.float64(begun[factor]))


def test_dora_begins_at_the_norms_of_its_weight():
    """m is the norm of each output's column."""
    W0 = np.random.default_rng(0).standard_normal((6, 4)).astype(np.float32)
    adapted = jlora.adapt({"w": jnp.asarray(W0)}, jlora.DoRA(jlora.LoRA(rank=2, target="w")))
    np.testing.assert_allclose(adapted.trainable["w"]["m"], np.linalg.norm(np.float64(W0), axis=0), rtol=1e-6)


def spectral(W0: np.ndarray, r: int, s: float) -> dict[str, tuple[Any, dict[str, np.ndarray]]]:
    """The methods that begin at a decomposition of W0 (in, out), and where: rows up to a sign, the same in all."""
    U, S, Vt = np.linalg.svd(W0, full_matrices=False)
    Q, R = np.linalg.qr(W0.T)
    root, noise = np.sqrt(S[:r] / s), slice(len(S) - r, None)
    pissa, olora = ((root * U[:, :r]).T, root[:, None] * Vt[:r]), (R[:r], Q[:, :r].T)
    pair = lambda a, b: {"a": a, "b": b, "a0": a, "b0": b}
    return {
        "lora_xs": (jlora.LoRAXS(rank=r), {"a": (U * S)[:, :r].T, "b": Vt[:r], "r": np.zeros((r, r))}),
        "pissa": (jlora.LoRA(rank=r, alpha=s * r, init="pissa"), pair(*pissa)),
        "olora": (jlora.LoRA(rank=r, alpha=s * r, init="olora"), pair(*olora)),
        "mica": (jlora.MiCA(rank=r), {"a": np.zeros((r, len(W0))), "b": Vt[noise]}),
        "kasa": (jlora.KaSA(rank=r), {"v_noise": U[:, noise].T, "u_noise": (S[:, None] * Vt)[noise]}),
    }


@pytest.mark.parametrize("letters", ["io", "ikok"])
@pytest.mark.parametrize("name", spectral(np.ones((4, 4)), 2, 1.0))
def test_factors_begin_at_the_decomposition_of_the_weight(name, letters):
    """Singular vectors and QR of W0 as NumPy has them in float64, in the paper's shares, for a window too."""
    W = np.random.default_rng(3).standard_normal({"io": (12, 10), "ikok": (3, 2, 5, 4)}[letters]).astype(np.float32)
    into, out = ([n for n, x in enumerate(letters) if x in side] for side in ("ik", "o"))
    W0 = np.float64(W).transpose(*into, *out).reshape(-1, math.prod(W.shape[n] for n in out))
    method, starts = spectral(W0, 3, 1.5)[name]
    adapted = jlora.adapt({"w": jnp.asarray(W)}, dataclasses.replace(method, target="w"), axes={"w": letters})
    begun = adapted.trainable["w"] | adapted.frozen.factors["w"]
    signs = []
    for factor, want in starts.items():
        got = np.float64(begun[factor]).reshape(3, -1)
        signs.append(np.sign(np.sum(got * want, 1)))
        np.testing.assert_allclose(got, signs[-1][:, None] * want, rtol=1e-4, atol=1e-5, err_msg=factor)
    told = [sign for sign in signs if sign.any()]
    assert all((sign == told[0]).all() for sign in told)
