"""Every method's equation is its paper's, on every kind of weight.

The oracle is `closed_forms.py` and, for what a model does with the weight, NumPy: no step of it is a step of jlora.
"""

import dataclasses
import itertools
import math
import re
import types
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import closed_forms as forms
import jlora
import zoo
from jlora import network
from jlora._trees._leaf import Leaf
from methods import ADDED, CHOSEN, METHODS, Row, adapted, assert_close, away_from_start

pytestmark = pytest.mark.settled

Leaves = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way in which a model uses its weights.

    Attributes:
      axes: the letters of each leaf.
      shapes: the shape of each leaf.
      x: the shape of the input, or the input.
      model: of JAX.
      output: the same, of NumPy, where `after(h, x, *layer)` stands for what an operation of input x made.
      all: which leaves a method takes that is for all weights.
    """

    axes: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    x: Any
    model: Callable[[Any, Any], Any]
    output: Callable[..., np.ndarray]
    all: str = "kernel|embedding"

    def case(self, on: str) -> zoo.Case:
        """As a model for methods that train `on` these weights."""
        target = {"matrices": "kernel|embedding", "vectors": "bias", "all": self.all}[on]
        return zoo.Case("", self.build, target, {f"^{name}$": letters for name, letters in self.axes.items()})

    def takes(self, row: Any) -> bool:
        """Whether there is a weight that the method is for, of a shape that fits its formula."""
        target = re.compile(self.case(row.on).target)
        leaves = [Leaf(name, shape, np.float32, self.axes[name]) for name, shape in self.shapes.items()]
        return any(target.search(leaf.path) and row.fits(leaf) for leaf in leaves)

    def build(self) -> tuple[Leaves, np.ndarray]:
        """The leaves and the input, in float32 so that both sides have the same numbers."""
        draw = lambda seed, shape: np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        leaves = {name: draw(seed, shape) for seed, (name, shape) in enumerate(self.shapes.items())}
        return leaves, draw(9, self.x) if isinstance(self.x, tuple) else np.array(self.x)


def untouched(h: np.ndarray, x: np.ndarray, *layer: int) -> np.ndarray:
    return h


def layers(p: Leaves, h: np.ndarray, after: Callable[..., np.ndarray]) -> np.ndarray:
    """Through one layer after the other."""
    for n, (kernel, bias) in enumerate(zip(p["kernel"], p["bias"], strict=True)):
        h = np.tanh(after(np.einsum("ni,io->no", h, kernel) + bias, h, n))
    return h


def experts(p: Leaves, x: np.ndarray, after: Callable[..., np.ndarray]) -> np.ndarray:
    """Each its own rows."""
    pairs = zip(x, p["kernel"], strict=True)
    return np.stack([after(np.einsum("ni,io->no", x, kernel), x, n) for n, (x, kernel) in enumerate(pairs)])


def heads(p: Leaves, x: np.ndarray, after: Callable[..., np.ndarray]) -> np.ndarray:
    """What comes after sees the features of all heads as one."""
    y = np.einsum("ni,ihk->nhk", x, p["kernel"]) + p["bias"]
    return after(y.reshape(len(y), -1), x).reshape(y.shape)


def convolution(p: Any, x: Any) -> Any:
    """No padding, no stride; channels last."""
    space = "DHW"[-(x.ndim - 2) :]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(x, p["kernel"], (1,) * len(space), "VALID", dimension_numbers=numbers)


def windows(p: Leaves, x: np.ndarray, after: Callable[..., np.ndarray] = untouched) -> np.ndarray:
    """The same, as a sum over the places of the window."""
    window, size = p["kernel"].shape[:-2], x.shape[1:-1]
    made = 0.0
    for place in itertools.product(*map(range, window)):
        seen = tuple(slice(at, at + n - k + 1) for at, n, k in zip(place, size, window, strict=True))
        made = made + np.tensordot(x[:, *seen], p["kernel"][place], 1)
    return after(made, x)


# Few sizes in all, 4, 5, 6 and 12: what a method draws is compiled once for each.
KINDS = {
    "matrix": Kind(
        {"kernel": "io", "bias": "o"},
        {"kernel": (6, 5), "bias": (5,)},
        (3, 6),
        lambda p, x: x @ p["kernel"] + p["bias"],
        lambda p, x, after: after(np.einsum("ni,io->no", x, p["kernel"]) + p["bias"], x),
        all=".",
    ),
    "turned": Kind(
        {"kernel": "oi"},
        {"kernel": (5, 6)},
        (3, 6),
        lambda p, x: x @ p["kernel"].T,
        lambda p, x, after: after(np.einsum("ni,oi->no", x, p["kernel"]), x),
    ),
    "scan": Kind(
        {"kernel": "sio", "bias": "so"},
        {"kernel": (3, 4, 4), "bias": (3, 4)},
        (2, 4),
        lambda p, x: lax.scan(lambda h, p: (jnp.tanh(h @ p["kernel"] + p["bias"]), None), x, p)[0],
        layers,
    ),
    "experts": Kind(
        {"kernel": "sio"},
        {"kernel": (2, 6, 5)},
        (2, 3, 6),
        lambda p, x: jnp.einsum("end,edf->enf", x, p["kernel"]),
        experts,
    ),
    "into_heads": Kind(
        {"kernel": "ioo", "bias": "oo"},
        {"kernel": (6, 3, 4), "bias": (3, 4)},
        (2, 6),
        lambda p, x: lax.dot_general(x, p["kernel"], (((1,), (0,)), ((), ()))) + p["bias"],
        heads,
    ),
    "out_of_heads": Kind(
        {"kernel": "iio"},
        {"kernel": (3, 4, 5)},
        (2, 3, 4),
        lambda p, x: lax.dot_general(x, p["kernel"], (((1, 2), (0, 1)), ((), ()))),
        lambda p, x, after: after(np.einsum("nhk,hko->no", x, p["kernel"]), x),
    ),
    "table": Kind(
        {"embedding": "io"},
        {"embedding": (6, 5)},
        [[0, 3, 5], [3, 1, 3]],
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0),
        lambda p, ids, after: after(np.stack([[p["embedding"][n] for n in row] for row in ids]), ids),
    ),
    "convolution_1d": Kind({"kernel": "kio"}, {"kernel": (3, 4, 5)}, (1, 5, 4), convolution, windows),
    "convolution_2d": Kind({"kernel": "kkio"}, {"kernel": (3, 2, 2, 5)}, (1, 4, 3, 2), convolution, windows),
    "convolution_3d": Kind({"kernel": "kkkio"}, {"kernel": (2, 1, 3, 2, 4)}, (1, 3, 2, 4, 2), convolution, windows),
}
# What some variants alone are about.
WIDER = {
    "eight": Kind(
        {"kernel": "io"},
        {"kernel": (8, 3)},
        (2, 8),
        lambda p, x: x @ p["kernel"],
        lambda p, x, after: after(np.einsum("ni,io->no", x, p["kernel"]), x),
    ),
}
WIDER["around"] = Kind(
    {"kernel": "ioi"},
    {"kernel": (2, 5, 3)},
    (4, 2, 3),
    lambda p, x: jnp.einsum("nab,aob->no", x, p["kernel"]),
    lambda p, x, after: after(np.einsum("nab,aob->no", x, p["kernel"]), x),
)
WIDER["turned_even"] = dataclasses.replace(KINDS["turned"], shapes={"kernel": (4, 6)})
# Ids behind the end of a table, for which the model alone reads its last row.
IDS = [[11, 12, 3], [0, 11, 10]]
TOKENS = {
    "rows": Kind(
        {"embedding": "io"},
        {"embedding": (11, 4)},
        IDS,
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0, mode="clip"),
        lambda p, ids, after: after(p["embedding"][np.minimum(ids, 10)], ids),
    ),
    "keys": Kind(
        {"embedding": "io", "keys": "io"},
        {"embedding": (11, 4), "keys": (4, 6)},
        IDS,
        lambda p, ids: jnp.take(p["embedding"], ids, axis=0, mode="clip") @ p["keys"],
        lambda p, ids, after: after(p["embedding"][np.minimum(ids, 10)] @ p["keys"], ids),
    ),
}


# What the papers say ----------------------------------------------------------------------


def as_matrices(array: np.ndarray, letters: str) -> np.ndarray:
    """(stack..., in, out) of an array in a weight's own axes."""
    stack, into, out = ([n for n, letter in enumerate(letters) if letter in side] for side in ("s", "ik", "o"))
    size = lambda axes: math.prod(array.shape[n] for n in axes)
    return array.transpose(*stack, *into, *out).reshape(*(array.shape[n] for n in stack), size(into), size(out))


def in_own_axes(made: np.ndarray, letters: str, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `as_matrices`."""
    order = [n for side in ("s", "ik", "o") for n, letter in enumerate(letters) if letter in side]
    return made.reshape([shape[n] for n in order]).transpose(np.argsort(order))


def factors(ad: jlora.Adapted, site: Any, layer: tuple[int, ...], trained: Any, **more: Any) -> types.SimpleNamespace:
    """The factors of one layer of a weight, by their names."""
    held = site.recipe.arrays(site.leaf)
    of = lambda group, name: (trained if held[group, name][0].trained else ad.frozen.factors)[group][name]
    layers = lambda group, name: layer if held[group, name][0].stacked else ()
    return types.SimpleNamespace(
        **{name: np.float64(of(group, name))[layers(group, name)] for group, name in held}, **more
    )


def weights(form: forms.Form, ad: jlora.Adapted, leaves: Leaves, trained: Any, fixed: Any) -> Leaves:
    """Every leaf in float64, those that are adapted by the closed form, layer for layer of a stack."""
    made = {name: np.float64(leaf) for name, leaf in leaves.items()}
    for site in ad.frozen.plan.sites:
        leaf = site.leaf
        W = as_matrices(made[leaf.path], leaf.roles).copy()
        for layer in np.ndindex(*leaf.stack):
            f = factors(ad, site, layer, trained, fixed=factors(ad, site, layer, fixed))
            W[layer] = form(W[layer].copy(), f)
        made[leaf.path] = in_own_axes(W, leaf.roles, leaf.shape)
    return made


def slopes(f: Callable[[Any], float], trained: Any, step: float = 1e-5) -> Any:
    """df / d(each element), by central differences in float64."""
    found = jax.tree.map(np.zeros_like, trained)
    for group, named in trained.items():
        for name, array in named.items():
            for at in np.ndindex(array.shape):

                def there(change: float, group=group, named=named, name=name, array=array, at=at) -> float:
                    other = array.copy()
                    other[at] += change
                    return f(trained | {group: named | {name: other}})

                found[group][name][at] = (there(step) - there(-step)) / (2 * step)
    return found


def pull(y: Any) -> np.ndarray:
    """One number for each output: `sum(pull(y) * y)` is a scalar in which no two outputs play the same part."""
    return np.random.default_rng(5).standard_normal(y.shape)


# What jlora makes -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Made:
    """What one method makes of one kind of weight: parameters, the output, the gradient of `sum(pull(y) * y)`."""

    merged: Any
    output: Any
    gradient: Any


def by_jlora(ad: jlora.Adapted, kind: Kind, x: np.ndarray, trained: Any) -> Made:
    """Merged, lifted, and differentiated."""

    @jax.jit
    def program(trained: Any, frozen: Any, x: Any) -> tuple[Any, ...]:
        y, back = jax.vjp(lambda t: jlora.lift(kind.model)(jlora.join(t, frozen), x), trained)
        return jlora.merge(jlora.join(trained, frozen)), y, back(jnp.asarray(pull(y), y.dtype))[0]

    return Made(*program(trained, ad.frozen, x))


def by_paper(row: Any, ad: jlora.Adapted, kind: Kind, leaves: Leaves, x: np.ndarray, trained: Any) -> Made:
    """The closed form, the model of NumPy over it, and that moved a little in each element of each factor."""
    here = jax.tree.map(lambda a: np.array(a, np.float64), trained)
    W = lambda at: weights(row.closed_form, ad, leaves, at, fixed=here)
    Y = lambda at: kind.output(W(at), x, untouched)
    y = Y(here)
    return Made(W(here), y, slopes(lambda at: float(np.sum(pull(y) * Y(at))), here))


def both(row: Any, kind: Kind) -> tuple[Made, Made]:
    """jlora's and the paper's, with factors away from their start."""
    leaves, x = kind.build()
    ad = adapted(row, kind.case(row.on), {name: jnp.asarray(leaf) for name, leaf in leaves.items()})
    trained = away_from_start(ad.trainable)
    return by_jlora(ad, kind, x, trained), by_paper(row, ad, kind, leaves, x, trained)


# The laws ---------------------------------------------------------------------------------


# Forms that no row of METHODS has: name -> (method, closed form, the kinds of weight that it is about).
VARIANTS = {
    "krona_sizes": (jlora.KronA(factors=(2, 5), scale=0.5, target="kernel"), partial(forms.krona, s=0.5), ["matrix"]),
    "lokr": (
        jlora.LoKr(rank=1, alpha=3, target="kernel"), partial(forms.lokr, alpha=3), ["matrix", "convolution_2d"]
    ),
    "lokr_both": (
        jlora.LoKr(rank=1, alpha=3, decompose_both=True, target="kernel"),
        partial(forms.lokr, alpha=3),
        ["into_heads", "out_of_heads"],
    ),
    "lokr_whole": (
        jlora.LoKr(rank=4, alpha=3, target="kernel"), partial(forms.lokr, alpha=3), ["matrix", "convolution_2d"]
    ),
    "randlora_rest": (
        jlora.RandLoRA(rank=3, alpha=4, target="kernel"), partial(forms.randlora, s=4 / 3), ["matrix", "turned"]
    ),
    "kasa_noise": (
        jlora.KaSA(rank=2, alpha=3, noise=4, target="kernel"), partial(forms.kasa, s=3 / 2, lost=4), ["matrix"]
    ),
    "kasa_no_noise": (
        jlora.KaSA(rank=2, alpha=3, noise=0, target="kernel"), partial(forms.kasa, s=3 / 2, lost=0), ["matrix"]
    ),
    "oft_blocks": (jlora.OFT(block=3, target="kernel"), forms.oft, ["matrix", "experts", "around"]),
    "c3a_blocks": (jlora.C3A(block=2, target="kernel"), forms.c3a, ["scan", "into_heads"]),
    "psoft_rotation": (jlora.PSOFT(rank=3, vectors=False, target="kernel"), forms.psoft, ["matrix", "scan"]),
    "boft_rotation": (
        jlora.BOFT(block=5, gain=False, target="kernel"), forms.boft, ["scan", "out_of_heads", "convolution_2d"]
    ),
    "boft_halves_of_two": (jlora.BOFT(block=4, target="kernel"), forms.boft, ["eight"]),
    "ia3_in": (jlora.IA3(side="in", target="kernel"), forms.ia3_in, ["matrix", "out_of_heads", "convolution_2d"]),
    "dora_adalora": (
        jlora.DoRA(jlora.AdaLoRA(rank=2, alpha=3, target="kernel")),
        partial(forms.dora, inner=partial(forms.adalora, s=3 / 2)),
        ["matrix"],
    ),
    "dora_loha": (
        jlora.DoRA(jlora.LoHa(rank=2, alpha=3, target="kernel")),
        partial(forms.dora, inner=partial(forms.loha, s=3 / 2)),
        ["matrix"],
    ),
    "dora_lokr": (  # its core has the name of a factor of DoRA's own
        jlora.DoRA(jlora.LoKr(rank=1, alpha=3, tucker=True, target="kernel")),
        partial(forms.dora, inner=partial(forms.lokr, alpha=3)),
        ["matrix", "convolution_2d"],
    ),
    "dora_krona": (
        jlora.DoRA(jlora.KronA(target="kernel")), partial(forms.dora, inner=partial(forms.krona, s=1)), ["matrix"]
    ),
    "dora_vera": (jlora.DoRA(jlora.VeRA(rank=3, target="kernel")), partial(forms.dora, inner=forms.vera), ["matrix"]),
    "gralora_hybrid": (
        jlora.GraLoRA(rank=3, blocks=3, hybrid=2, alpha=4, target="kernel"),
        partial(forms.gralora, alpha=4),
        ["into_heads"],
    ),
    "glora_vectors": (
        jlora.GLoRA(a="vector", b="vector", d="constant", e="vector", target="kernel"),
        forms.glora,
        ["scan", "into_heads", "convolution_2d"],
    ),
    "glora_numbers": (
        jlora.GLoRA(a="constant", b="constant", d="none", target="kernel"), forms.glora, ["scan", "into_heads"]
    ),
    "road_1": (jlora.RoAd(target="kernel"), forms.road, ["scan", "into_heads"]),
    "road_2": (jlora.RoAd(variant=2, group=6, target="kernel"), forms.road, ["into_heads"]),
    "dora_miss": (
        jlora.DoRA(jlora.MiSS(rank=2, target="kernel")), partial(forms.dora, inner=forms.miss), ["matrix"]
    ),
    "miss_rest": (jlora.MiSS(rank=4, target="kernel"), forms.miss, ["matrix", "turned"]),
    "miss_mini": (jlora.MiSS(rank=3, mini=4, target="kernel"), forms.miss, ["into_heads", "convolution_3d"]),
    "miss_bat": (
        jlora.MiSS(rank=2, bat=True, target="kernel"),
        forms.miss_bat,
        ["scan", "into_heads", "convolution_3d", "turned_even"],
    ),
    "gated": (  # by one half everywhere: see `methods.adapted`
        jlora.Gated(jlora.LoRA(rank=2, alpha=3, target="kernel")),
        partial(forms.lora, s=3 / 4),
        ["matrix", "experts", "into_heads", "convolution_2d"],
    ),
    "sum_of_three": (
        jlora.Sum(jlora.LoRA(rank=2, alpha=3), jlora.Sum(jlora.LoRA(rank=1), jlora.KronA()), target="kernel"),
        lambda W0, f: (
            W0 + 1.5 * forms.rows(f.a).T @ forms.rows(f.b) + np.kron(f.a_2, f.b_2)
            + forms.rows(f.a_3).T @ forms.rows(f.b_3)
        ),
        ["matrix"],
    ),
    "sum_and_gain": (
        jlora.Sum(jlora.IA3(side="in"), jlora.LoRA(rank=2), target="kernel"),
        lambda W0, f: forms.ia3_in(forms.lora(W0, f, s=1), f),
        ["matrix"],
    ),
    "sum_and_rotation": (
        jlora.Sum(jlora.LoHa(rank=2), jlora.OFT(block=2), target="kernel"),
        lambda W0, f: forms.oft(forms.loha(W0, f, s=1), f),
        ["matrix"],
    ),
}  # fmt: skip

PAIRS = [(row, name) for row in METHODS for name, kind in KINDS.items() if kind.takes(row)]
for made_of, (method, closed_form, kinds) in VARIANTS.items():
    variant = Row(made_of, lambda target, method=method: method, closed_form, count=lambda leaf: 0)
    PAIRS += [(variant, name) for name in kinds]


def marks(row: Row) -> Any:
    return () if row.name in CHOSEN else pytest.mark.slow


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((row, (KINDS | WIDER)[name]), id=f"{row.name}-{name}", marks=marks(row)) for row, name in PAIRS
    ],
)
def made(request):
    """jlora's and the paper's."""
    return both(*request.param)


def test_merged_weights_are_the_closed_form(made):
    """`merge` gives W as the paper writes it, and every other leaf as it was."""
    ours, papers = made
    assert_close(ours.merged, papers.merged)


def test_outputs_are_those_of_the_closed_form(made):
    """The lifted model computes what the model computes with the paper's W."""
    ours, papers = made
    assert_close(ours.output, papers.output)


def test_gradients_are_those_of_the_closed_form(made):
    """Every element of every trained factor has the slope of the paper's W, by central differences."""
    ours, papers = made
    assert_close(ours.gradient, papers.gradient)


# What adds computation or tokens -------------------------------------------------------------

LINEAR, SQUARE = ("matrix", "scan", "experts", "into_heads", "convolution_2d"), ("scan",)
BEHIND = {
    "houlsby": (jlora.Houlsby(2, scale=1.5, target="kernel"), LINEAR),
    "pfeiffer": (jlora.Pfeiffer(2, bias=False, target="kernel"), LINEAR[:1]),
    "parallel": (jlora.Parallel(2, target="kernel", input="kernel"), SQUARE),
    "krona_parallel": (jlora.ParallelKronA(scale=0.5, residual=True, target="kernel", input="kernel"), SQUARE),
    "deep_prompts": (jlora.DeepPrompts(count=2, target="keys"), ("keys",)),
    "prefix_tuning": (jlora.PrefixTuning(count=2, encoder=(3, 5), target="keys"), ("keys",)),
    "new_tokens": (jlora.NewTokens(count=2), ("rows",)),
    "prompt_tuning": (jlora.PromptTuning(count=2), ("rows",)),
    "p_tuning": (jlora.PTuning(count=2, encoder="mlp", hidden=5), ("rows",)),
}


@pytest.mark.parametrize(
    "row,name", [pytest.param(row, name, id=f"{row.name}-{name}") for row in ADDED for name in BEHIND[row.name][1]]
)
def test_what_stands_behind_an_output_is_the_closed_form(row, name):
    """Values, and every slope, of what no weight of the base's shape can say."""
    kind = (KINDS | TOKENS)[name]
    leaves, x = kind.build()
    ad = jlora.adapt({name: jnp.asarray(leaf) for name, leaf in leaves.items()}, BEHIND[row.name][0], axes=kind.axes)
    trained = away_from_start(ad.trainable)
    site = ad.frozen.plan.sites[-1]
    wide = {name: np.float64(leaf) for name, leaf in leaves.items()}

    def output(at: Any) -> np.ndarray:
        after = lambda h, x, *layer: row.closed_form(h, x, factors(ad, site, layer, at))
        return kind.output(wide, x, after)

    @jax.jit
    def program(trained: Any, frozen: Any, x: Any) -> Any:
        y, back = jax.vjp(lambda t: jlora.lift(kind.model)(jlora.join(t, frozen), x), trained)
        return y, back(jnp.asarray(pull(y), y.dtype))[0]

    y, gradient = program(trained, ad.frozen, x)
    here = jax.tree.map(lambda a: np.array(a, np.float64), trained)
    assert_close(y, output(here))
    assert_close(gradient, slopes(lambda at: float(np.sum(pull(y) * output(at))), here))


# What the laws find -----------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongLoRA(jlora.LoRA):
    """W0 - s A B."""

    def recipe(self, leaf):
        (delta,) = super().recipe(leaf).deltas
        return network.Recipe((dataclasses.replace(delta, scale=-delta.scale),))


def less(s, l):
    return 1 - s * (l - 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongIA3(jlora.IA3):
    """W0 diag(2 - l)."""

    def recipe(self, leaf):
        gain = super().recipe(leaf).gain
        (word,) = gain.operands
        return network.Recipe(gain=dataclasses.replace(gain, operands=(network.Function(less, word.arrays),)))


def shifted_back(gamma, beta, b0):
    return (gamma - 1) * b0 - beta


@dataclasses.dataclass(frozen=True, kw_only=True)
class WrongSSF(jlora.SSF):
    """gamma * b0 - beta."""

    def recipe(self, leaf):
        made = super().recipe(leaf)
        if not made.deltas:
            return made
        arrays = made.deltas[0].operands[0].arrays
        word = network.Function(shifted_back, arrays, base=True)
        return network.Recipe((dataclasses.replace(made.deltas[0], operands=(word,)),))


WRONG = {
    "lora": lambda target: WrongLoRA(rank=2, alpha=3, target=target),
    "ia3": lambda target: WrongIA3(target=target),
    "ssf": lambda target: WrongSSF(target=target),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_sign_that_is_wrong_is_found(name):
    """An equation with one sign flipped fails each of the laws."""
    row = next(row for row in METHODS if row.name == name)
    made = both(dataclasses.replace(row, spec=WRONG[name]), KINDS["matrix"])
    for law in (
        test_merged_weights_are_the_closed_form,
        test_outputs_are_those_of_the_closed_form,
        test_gradients_are_those_of_the_closed_form,
    ):
        with pytest.raises(AssertionError, match="off by"):
            law(made)
