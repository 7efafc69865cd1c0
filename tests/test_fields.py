"""Fields of methods: what is trained can be saved, and what is saved can be loaded."""

import dataclasses
import fractions
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora import methods
from jlora.io import _manifest

pytestmark = pytest.mark.settled

PARAMS = {
    "q": {"kernel": jax.random.normal(jax.random.key(1), (12, 8)), "bias": jnp.zeros(8)},
    "sq": {"kernel": jax.random.normal(jax.random.key(2), (8, 8))},
}
T = "q/(kernel|bias)$"
MADE = {
    "LoRA": lambda **o: jlora.LoRA(**{"rank": 2, "target": "q/kernel$", **o}),
    "LoRAXS": lambda **o: jlora.LoRAXS(**{"rank": 2, "target": "q/kernel$", **o}),
    "GraLoRA": lambda **o: jlora.GraLoRA(**{"rank": 2, "target": "q/kernel$", **o}),
    "GLoRA": lambda **o: jlora.GLoRA(**{"rank": 2, "target": "q/kernel$", **o}),
    "MiSS": lambda **o: jlora.MiSS(**{"rank": 2, "target": "q/kernel$", **o}),
    "LoRAFA": lambda **o: jlora.LoRAFA(**{"rank": 2, "target": "q/kernel$", **o}),
    "DeLoRA": lambda **o: jlora.DeLoRA(**{"rank": 2, "target": "q/kernel$", **o}),
    "DoRA": lambda **o: jlora.DoRA(**{"inner": jlora.LoRA(rank=2, target="q/kernel$"), **o}),
    "Sum": lambda **o: jlora.Sum(**{"first": jlora.LoRA(rank=2, target="q/kernel$"), "second": jlora.KronA(), **o}),
    "IntrinsicDimension": lambda **o: jlora.IntrinsicDimension(**{"d": 3, "target": T, **o}),
    "KronA": lambda **o: jlora.KronA(**{"target": "sq/kernel", **o}),
    "Full": lambda **o: jlora.Full(**{"target": T, **o}),
    "SSF": lambda **o: jlora.SSF(**{"target": T, **o}),
    "BitFit": lambda **o: jlora.BitFit(**o),
    "Houlsby": lambda **o: jlora.Houlsby(**{"target": T, "bottleneck": 2, **o}),
    "Pfeiffer": lambda **o: jlora.Pfeiffer(**{"target": T, "bottleneck": 2, **o}),
    "ParallelKronA": lambda **o: jlora.ParallelKronA(**{"target": T, "input": "kernel", **o}),
    "Parallel": lambda **o: jlora.Parallel(**{"target": T, "bottleneck": 2, "input": "kernel", **o}),
    "TrainedTokens": lambda **o: jlora.TrainedTokens(**{"ids": (1, 3), "target": "q/kernel$", **o}),
    "NewTokens": lambda **o: jlora.NewTokens(**{"count": 2, "target": "q/kernel$", **o}),
    "PromptTuning": lambda **o: jlora.PromptTuning(**{"count": 2, "target": "q/kernel$", **o}),
    "PTuning": lambda **o: jlora.PTuning(**{"count": 2, "hidden": 3, "target": "q/kernel$", **o}),
    "VirtualTokens": lambda **o: jlora.VirtualTokens(**{"count": 2, "target": "q/kernel$", **o}),
    "DeepPrompts": lambda **o: jlora.DeepPrompts(**{"count": 2, "target": T, **o}),
    "PrefixTuning": lambda **o: jlora.PrefixTuning(**{"count": 2, "table": "sq/kernel", "target": "^q/kernel$", **o}),
    "Gated": lambda **o: jlora.Gated(**{"inner": jlora.LoRA(rank=2, target="q/kernel$"), **o}),
    "LNTuning": lambda **o: jlora.LNTuning(**{"target": "bias$", **o}),
    "VBLoRA": lambda **o: jlora.VBLoRA(**{"rank": 2, "vectors": 3, "length": 4, "target": "q/kernel$", **o}),
    "MiCA": lambda **o: jlora.MiCA(**{"rank": 2, "target": "q/kernel$", **o}),
    "KaSA": lambda **o: jlora.KaSA(**{"rank": 2, "target": "q/kernel$", **o}),
    "IA3": lambda **o: jlora.IA3(**{"target": "q/kernel$", **o}),
    "BOFT": lambda **o: jlora.BOFT(**{"block": 4, "target": "q/kernel$", **o}),
    "RoAd": lambda **o: jlora.RoAd(**{"target": "q/kernel$", **o}),
    "FourierFT": lambda **o: jlora.FourierFT(**{"n": 4, "target": "q/kernel$", **o}),
    "C3A": lambda **o: jlora.C3A(**{"block": 4, "target": "q/kernel$", **o}),
    "OFT": lambda **o: jlora.OFT(**{"block": 4, "target": "q/kernel$", **o}),
}
for cls in (
    jlora.AdaLoRA, jlora.SoRA, jlora.LoHa, jlora.LoKr, jlora.VeRA, jlora.RandLoRA, jlora.HiRA, jlora.HRA,
    jlora.TiedLoRA, jlora.SHiRA, jlora.PSOFT,
):  # fmt: skip
    MADE[cls.__name__] = lambda cls=cls, **o: cls(**{"rank": 2, "target": "q/kernel$", **o})
ODD = [
    True, False, 0, 1, 2, -1, 3.0, 2.5, 0.0, -0.0, 1e-3, 1e40, -1e40, 1e-60, 2**40, 2**70, float("nan"), float("inf"),
    None, "", "out", "input", "16", "sqrt", "dense", "gaussian", "pissa", "ab", b"out", "bfloat16", "f4", "float",
    "float8_e4m3fn", "int32", "fp16", jnp.bfloat16, np.float32, np.dtype("float16"), float, int,
    np.bool_(True), np.int64(2), np.float32(0.25), np.float64(2), np.str_("out"), np.array(0.25), jnp.float32(2),
    np.array([[0, 2], [4, 6]]), [[0, 2], [4, 6]], ((0.0, 2.5),), (0, 2), ("q", "v"), (), [2, 2], (2.0, 2.0), (0, 2),
    (np.int64(2), np.int64(4)), {"a", "b"}, ["b"], ("v", "b"), {}, fractions.Fraction(1, 3), 1j, object(),
]  # fmt: skip
FIELDS = [
    (name, field.name)
    for name in sorted(MADE)
    for field in dataclasses.fields(getattr(jlora, name))
    if field.name not in ("target", "exclude")
]


def read_again(adapted):
    """The methods of a plan, and those of its weights, by way of the text of a manifest."""
    written = json.loads(json.dumps(_manifest.write_methods(adapted.frozen.plan)))
    table = [_manifest._read_method(record, _manifest.nameable([])) for record in written["methods"]]
    return [table[n] for n in written["rules"]], [table[n] for _, _, n in written["sites"]]


def test_every_method_is_here():
    """Every public method has a row in this file, so that none escapes its laws."""
    assert set(MADE) == {n for n, cls in vars(methods).items() if isinstance(cls, type)} - {"Method"}


@pytest.mark.parametrize(("name", "field"), FIELDS)
def test_an_odd_value_is_refused_when_a_method_is_made_or_can_be_saved_and_loaded(name, field):
    """And it then compares, prints and hashes as what is loaded: an equal plan may stand in its place."""
    refused = 0
    for value in ODD:
        if field in ("d", "rank") and isinstance(value, int) and value > 2**31:
            continue  # nobody has the memory
        try:
            method = MADE[name](**{field: value})
        except (ValueError, TypeError) as error:
            assert f"{name}({field}=" in str(error) or f"{name} " in str(error), (value, error)
            refused += 1
            continue
        held = getattr(method, field)
        assert not isinstance(held, (np.generic, jax.Array, np.ndarray, list)), value
        assert isinstance(held, jlora.init.Start) or hash(method) == hash(dataclasses.replace(method)), value
        try:
            adapted = jlora.adapt(PARAMS, method)
        except ValueError as error:
            assert "cannot adapt this tree" in str(error), (value, error)
            continue
        plan = adapted.frozen.plan
        held = list(plan.methods), [site.method for site in plan.sites]
        assert repr(read_again(adapted)) == repr(held), value
    assert refused


@pytest.mark.parametrize("name", sorted(MADE))
@pytest.mark.parametrize("dtype", [jnp.bfloat16, np.dtype("float16"), np.float32])
def test_factors_of_any_dtype_are_saved_and_loaded(name, dtype, tmp_path):
    """A dtype is one name in the plan however it was spelled, and factors of it come back bit for bit."""
    adapted = jlora.adapt(PARAMS, MADE[name](dtype=dtype))
    spelled = {jnp.dtype(dtype).name}
    assert {s.method.dtype for s in adapted.frozen.plan.sites} == spelled
    jlora.save(tmp_path / "a", adapted)
    back = jlora.load(tmp_path / "a", PARAMS)
    assert jax.tree.structure(back) == jax.tree.structure(adapted)
    for mine, theirs in zip(jax.tree.leaves(adapted), jax.tree.leaves(back), strict=True):
        assert mine.dtype == theirs.dtype
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


def test_all_bad_fields_are_named_at_once():
    """One error names every bad field of a method with its value."""
    with pytest.raises(ValueError) as caught:
        jlora.LoRA(rank=2.5, alpha="16", dropout=1, scaling="r", slices=("q", "v"), dtype="fp16")
    for words in ("rank=2.5", "alpha='16'", "dropout=1)", "scaling='r'", "slices=('q', 'v')", "dtype='fp16'"):
        assert f"LoRA({words}" in str(caught.value)


def test_equal_numbers_are_spelled_alike():
    """4 and 4.0, 0 and -0.0 are equal, so one plan may stand for the other: they are one number in a method."""
    assert repr(jlora.LoRA(alpha=4)) == repr(jlora.LoRA(alpha=np.float64(4))) == repr(jlora.LoRA(alpha=4.0))
    assert repr(jlora.LoRA(dropout=-0.0)) == repr(jlora.LoRA(dropout=0))
    assert repr(jlora.TiedLoRA(tied={"b", "a"})) == repr(jlora.TiedLoRA(tied="ba"))


def test_a_method_of_ones_own_is_checked_by_its_hints():
    """A user's method has its fields held to the hints that resolve, and without a recipe it adapts nothing."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(methods.Method):
        rank: "int" = 2
        odd: "Unknown" = None  # noqa: F821

    assert Mine(odd=np.int32(3)).odd == 3
    with pytest.raises(ValueError, match=r"Mine\(rank='2'\): an integer"):
        Mine(rank="2")
    with pytest.raises(NotImplementedError, match="Mine says no recipe"):
        jlora.adapt(PARAMS, Mine(target="q"))


@pytest.mark.parametrize("make", [
    lambda: jlora.LoRA(alpha=0), lambda: jlora.AdaLoRA(alpha=0.0), lambda: jlora.LoKr(alpha=1e-60),
    lambda: jlora.KronA(scale=0), lambda: jlora.VeRA(d_initial=0),
])  # fmt: skip
def test_an_adapter_that_could_never_change_anything_is_refused(make):
    """A method whose update is zero whatever is learned is refused where it is made."""
    with pytest.raises(ValueError, match="never change anything"):
        make()
