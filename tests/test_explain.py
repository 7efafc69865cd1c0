"""What is printed of an adapter and of a lifted call, against golden files; and what `explain` and `infer_axes` find.

`JLORA_GOLDEN=write python -m pytest tests/test_explain.py` writes the files anew: read the difference first.
"""

import dataclasses
import os
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jlora
import zoo
from methods import CASES, SMALL, as_function_of_arrays, marks

GOLDEN = Path(__file__).parent / "golden"


def compare(name: str, text: str) -> None:
    file = GOLDEN / f"{name}.txt"
    if os.environ.get("JLORA_GOLDEN") == "write":
        file.write_text(text + "\n")
    assert text + "\n" == file.read_text()


PRINTED = {
    "bert": ("clients/bert", lambda case: [
        jlora.LoRA(rank=4, alpha=8, target=r"(query|value)/kernel$"),
        jlora.LoRA(rank=2, target=r"(dense/kernel|word_embeddings/embedding)$", exclude="predictions"),
        jlora.BitFit(exclude="LayerNorm|predictions"),
        jlora.Full(target="predictions/transform/dense/kernel"),
    ]),
    "bert_default": ("clients/bert", lambda case: jlora.LoRA()),
    "scan": ("linen/scan_attention", lambda case: [
        jlora.LoRA(rank=2, target=r"(query|out)/kernel$"),
        jlora.LoRA(rank=1, slices=((0, 4), (9, 15)), target=r"value/kernel$"),
        jlora.LoRA(rank=0, target="key/kernel"),
        jlora.Full(target=r"out/bias$"),
        jlora.BitFit(target="out/bias"),
    ]),
    "nnx": ("nnx/tied_embed", lambda case: jlora.LoRA(rank=2, target=case.target)),
    "nnx_scan": ("nnx/scan_remat", lambda case: jlora.LoRA(rank=2, target=case.target)),
    "dense": ("linen/raw_product", lambda case: jlora.LoRA(rank=2, target=case.target)),
}  # fmt: skip


@pytest.fixture(scope="module", params=PRINTED)
def printed(request):
    """(name, adapter, report)"""
    name, spec = PRINTED[request.param]
    case = CASES[name]
    fn, params, args = case.build()
    ad = jlora.adapt(params, spec(case), axes=dict(case.axes or {}))
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    return request.param, ad, jlora.explain(call, ad, arrays)


def test_table_is_as_it_was(printed):
    """The table is its golden file to the letter, and `str` of an adapter is that table."""
    name, ad, _ = printed
    assert str(ad) == jlora.table(ad)
    compare(f"{name}_table", str(ad))


def test_report_is_as_it_was(printed):
    """The report is its golden file to the letter, apart from the file and line of a fallback."""
    name, _, report = printed
    compare(f"{name}_explain", re.sub(r" at \w+\.py:\d+", " at FILE:LINE", str(report)))


def test_no_line_is_wider_than_a_hundred_columns(printed):
    """Table and report fit a terminal of a hundred columns on every model here."""
    _, ad, report = printed
    assert max(map(len, (str(ad) + "\n" + str(report)).splitlines())) <= 100


def test_totals_equal_count(printed):
    """The last column of the table sums to the trainable parameters, and the line below says both totals."""
    _, ad, _ = printed
    head, *_ = str(ad).split("\n\n")
    column = sum(int(line.split()[-1].replace(",", "")) for line in head.splitlines()[2:])
    trainable, total = jlora.count(ad)
    assert column == trainable == sum(a.size for a in jax.tree.leaves(ad.trainable))
    assert f"{trainable:,} trainable of {total:,} parameters ({100 * trainable / total:.4f} %)" in str(ad)
    weights = sum(int(re.split(r"  +", line)[1]) for line in head.splitlines()[2:])
    assert weights == len(ad.frozen.plan.sites)


def test_repeated_layers_are_folded():
    """A thousand layers are one row; what differs in shape, rank or method is another."""
    structs = lambda n: {"kernel": jax.ShapeDtypeStruct((64, 8 if n == 7 else 64), jnp.float32)}
    params = {f"layer_{n}": {"attention": {"query": structs(n)}} for n in range(1000)}
    ad = jax.eval_shape(lambda p: jlora.adapt(p, jlora.LoRA(rank=2)), params)
    rows = str(ad).splitlines()
    assert len(rows) == 6
    assert "layer_{0-6,8-999}/attention/query/kernel" in rows[2] and " 999 " in rows[2]
    assert "layer_7/attention/query/kernel" in rows[3] and "64 -> 8" in rows[3]


def test_long_paths_give_way():
    """A path too long for the line gives up its middle, so that the table stays within its width."""
    deep = {"a_rather_long_name_of_a_module_" * 3: {"another_one_that_goes_on_and_on_" * 2: {"query": {"kernel": 0}}}}
    params = jax.tree.map(lambda _: jnp.ones((6, 4)), deep)
    ad = jlora.adapt(params, jlora.LoRA(rank=2))
    assert max(map(len, str(ad).splitlines())) <= 100 and "…" in str(ad)


# Rows -------------------------------------------------------------------------------------


def one_layer(p, x):
    return jnp.tanh(x @ p["w"])


X = jnp.ones((3, 6))


def explained(f, w=(6, 4), rank=2, args=(X,), axes=None):
    ad = jlora.adapt({"w": jnp.ones(w)}, jlora.LoRA(rank=rank, target="w"), axes=axes)
    return jlora.explain(f, ad, *args)


def test_flops():
    """Multiply-adds count two: x A and (x A) B beside x W."""
    (row,) = explained(lambda p, x: x @ p["w"], (64, 48), args=(jnp.ones((8, 64)),)).rows
    assert (row.path, row.use, row.plan, row.reason) == ("w", "dot_general", "factored", "")
    assert row.dense_flops == 2 * 8 * 64 * 48
    assert 2 * 8 * 2 * (64 + 48) <= row.flops <= 1.1 * 2 * 8 * 2 * (64 + 48)


def test_flops_of_a_convolution():
    """As dense, 2 (outputs) (window) (inputs); factored, a window into the rank and a dot out of it."""
    params, x = {"w": jnp.ones((3, 2, 8, 16))}, jnp.ones((1, 7, 5, 8))
    dims = ("NHWC", "HWIO", "NHWC")
    f = lambda p, x: jax.lax.conv_general_dilated(x, p["w"], (1, 1), "VALID", dimension_numbers=dims)
    (row,) = jlora.explain(f, jlora.adapt(params, jlora.LoRA(rank=2, target="w"), axes={"w": "kkio"}), x).rows
    places, inputs = 5 * 4, 3 * 2 * 8
    assert row.dense_flops == 2 * places * 16 * inputs
    assert row.flops == 2 * places * 2 * (inputs + 16)


def test_flops_of_experts():
    """Each token goes through its expert's two factors, whatever the number of experts."""
    params, x, sizes = {"w": jnp.ones((3, 8, 16))}, jnp.ones((10, 8)), jnp.array([4, 5, 1])
    ad = jlora.adapt(params, jlora.LoRA(rank=2, target="w"), axes={"w": "sio"})
    (row,) = jlora.explain(lambda p, x, n: jax.lax.ragged_dot(x, p["w"], n), ad, x, sizes).rows
    assert row.dense_flops == 2 * 10 * 8 * 16
    assert row.flops == 2 * 10 * 2 * (8 + 16)


def test_one_row_of_a_table_costs_nothing():
    """A single id reads the entries of its row, and what is put into the table of it."""
    spec = jlora.Sum(jlora.LoRA(rank=2), jlora.TrainedTokens(ids=(2,)), target="w")
    (row,) = jlora.explain(lambda p: jnp.take(p["w"], 2, axis=0), jlora.adapt({"w": jnp.ones((9, 4))}, spec)).rows
    assert (row.plan, row.flops) == ("one row, 1 trained put in", 0)


BETWEEN = "W0 between factors"


@pytest.mark.parametrize(
    "spec,plan", [(jlora.OFT(block=2), BETWEEN), (jlora.RoAd(), BETWEEN), (jlora.HiRA(rank=2), "merged")]
)
def test_what_multiplies_w0_on_one_side_is_never_made(spec, plan):
    """A rotation of the inputs meets the activation, and W0 what comes out of it; an elementwise product is made."""
    ad = jlora.adapt({"w": jnp.ones((8, 6))}, dataclasses.replace(spec, target="w"))
    (row,) = jlora.explain(lambda p, x: x @ p["w"], ad, jnp.ones((3, 8))).rows
    assert row.plan == plan


def test_many_tokens_are_merged_and_few_factored():
    """Inside the rule, where tokens x (in + out) > in x out; and the report says which."""
    plan = lambda tokens: explained(one_layer, (64, 48), args=(jnp.ones((tokens, 64)),)).rows[0].plan
    assert plan(2) == "factored" and "merged" in plan(4096)


def masked(p, x):
    return x @ jnp.triu(p["w"])


def multiplied(p, x):
    return x @ (p["w"] * x.T)


def normalised(p, x):
    return x @ (p["w"] / jnp.linalg.norm(p["w"]))


@pytest.mark.parametrize("f", [multiplied, masked, normalised], ids=lambda f: f.__name__)
def test_a_dense_fallback_names_the_operation_and_the_line(f):
    """The user's line, also where the operation itself sits inside a function of JAX that is jitted."""
    report = explained(f, (6, 3))
    assert report.dense and all(row.path == "w" for row in report.dense)
    line = f"test_explain.py:{f.__code__.co_firstlineno + 1}"
    assert all(line in row.reason for row in report.dense), report.dense
    assert line in str(report)


@pytest.mark.parametrize("name", ["linen/mlp", "linen/dense_general", "linen/scan", "linen/scan_attention", "nnx/conv"])
def test_biases_are_no_fallback(name):
    """Nothing is contracted with a bias, whatever the number of its axes: dense is what it is."""
    case = CASES[name]
    fn, params, args = case.build()
    report = jlora.explain(fn, jlora.adapt(params, jlora.BitFit()), *args)
    assert report.rows and not report.unused
    assert not report.dense


def test_unused_weights_are_named():
    """Adapted weights that a call never meets are listed as unused, repeated layers in one line with their number."""
    params = {"w": jnp.ones((6, 4)), "v": jnp.ones((6, 4)), "layer_0": {"u": jnp.ones((6, 4))},
              "layer_1": {"u": jnp.ones((6, 4))}}  # fmt: skip
    ad = jlora.adapt(params, jlora.LoRA(rank=2, target="."))
    report = jlora.explain(one_layer, ad, X)
    assert report.unused == ("layer_0/u", "layer_1/u", "v")
    assert "unused: layer_{0-1}/u (x2)" in str(report) and "unused: v" in str(report)
    assert repr(report) == "Report(1 uses, 0 dense, 3 unused)"


def test_a_row_for_each_use():
    """Each use of a weight has its row, also where one jitted function is called again and again."""
    report = explained(lambda p, x: (x @ p["w"], x[:1] @ p["w"], p["w"][0]))
    assert [row.use for row in report.rows].count("dot_general") == 2
    twice = explained(lambda p, x: [jax.jit(lambda x, w: x @ w)(x, p["w"]) for _ in range(3)])
    assert len(twice.rows) == 3


def test_a_weight_that_comes_out_is_a_use():
    """A weight that the function returns is used, and its row says 'output'."""
    report = explained(lambda p, x: p)
    assert report.rows[0].use == "output" and not report.unused


def test_two_adapters_are_told_apart():
    """Where a call has two adapters, each path bears the number of its own, so that equal paths differ."""
    ad = jlora.adapt({"w": jnp.ones((6, 6))}, jlora.LoRA(rank=2, target="w"))
    report = jlora.explain(lambda p, q, x: x @ p["w"], ad, ad, X)
    assert {row.path for row in report.rows} == {"0:w"} and report.unused == ("1:w",)


def test_quantised_weights_without_an_adapter_have_their_paths():
    """Quantised weights are reported by their paths in the tree, used or unused, though nothing adapts them."""
    params = {name: nnx.Param(jnp.ones((64, 64))) for name in ("query", "value")}
    small = jlora.quantize(params, target=".")
    report = jlora.explain(lambda p, x: x @ p["query"][...], small, jnp.ones((2, 64)))
    assert [row.path for row in report.rows] == ["query"] and report.unused == ("value",)


def test_explain_takes_a_lifted_function_and_structs():
    """Nothing is computed, so the adapter may be abstract."""
    ad = jlora.adapt({"w": jnp.ones((6, 4))}, jlora.LoRA(rank=2, target="w"))
    want = jlora.explain(one_layer, ad, X)
    assert jlora.explain(jlora.lift(one_layer), ad, X) == want
    assert jlora.explain(one_layer, jax.eval_shape(lambda: ad), X) == want


def test_explain_passes_keywords_and_flags():
    """Keywords reach the function as they are, flags and strings too, and the adapter may be one of them."""
    ad = jlora.adapt({"w": jnp.ones((6, 4))}, jlora.LoRA(rank=2, target="w"))
    f = lambda p, x, *, transpose, name: (x.T if transpose else x) @ p["w"]
    assert len(jlora.explain(f, params := ad, X, transpose=False, name="name").rows) == 1
    assert len(jlora.explain(f, p=params, x=X, transpose=False, name="name").rows) == 1


# Axes -------------------------------------------------------------------------------------

# Where the trace reads other letters than the case gives, and both are right.
READ_OTHERWISE = (
    "linen/vmap_ensemble",  # mapped over the weight alone, the stack is one more output axis
    "plain/squeezed",  # an axis of size one belongs to either side
)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(c.name, marks=marks(c, c.name in SMALL))
        for c in zoo.CASES
        if c.axes and not c.vectors and not c.marks
    ],
)
def test_axes_are_read_off_the_trace(name):
    """What a case has to say of its axes by hand, `infer_axes` finds; and adapting with it makes nothing dense."""
    case = CASES[name]
    fn, params, args = case.build()
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    found = jlora.infer_axes(call, params, arrays)
    given = jlora.adapt(params, jlora.LoRA(rank=1, target=case.target), axes=dict(case.axes))
    inferred = jlora.adapt(params, jlora.LoRA(rank=1, target=case.target), axes=found)
    letters = lambda ad: {s.leaf.path: s.leaf.roles for s in ad.frozen.plan.sites}
    dense = any(re.search(p, path) for p in case.dense_ok for path in letters(given))
    if not dense and name not in READ_OTHERWISE:
        assert letters(inferred) == letters(given)
    report = jlora.explain(call, inferred, arrays)
    assert dense or not report.dense


def test_the_conventions_of_flax():
    """Names and ranks alone, without axes: attention in both forms, stacks before the kernel, convolutions."""
    shapes = {
        "dense/kernel": ((6, 4), "io"), "query/kernel": ((12, 3, 4), "ioo"), "out/kernel": ((3, 4, 12), "iio"),
        "layers/query/kernel": ((2, 12, 3, 4), "sioo"), "layers/out/kernel": ((2, 3, 4, 12), "siio"),
        "layers/up/kernel": ((30, 6, 8), "sio"), "conv/kernel": ((3, 3, 6, 8), "kkio"),
        "embed/embedding": ((20, 6), "io"), "norm/scale": ((6,), "o"),
    }  # fmt: skip
    params = {}
    for path, (shape, _) in shapes.items():
        *owners, name = path.split("/")
        node = params
        for owner in owners:
            node = node.setdefault(owner, {})
        node[name] = jax.ShapeDtypeStruct(shape, jnp.float32)
    ad = jax.eval_shape(lambda p: jlora.adapt(p, jlora.Full(target=".")), params)
    assert {s.leaf.path: s.leaf.roles for s in ad.frozen.plan.sites} == {p: r for p, (_, r) in shapes.items()}


def test_infer_axes_of_a_linen_model():
    """The trace of a Linen model, from shapes alone, tells the heads of a query from those of an output."""
    model = nn.MultiHeadDotProductAttention(2, qkv_features=8, name="attention")
    x = jnp.ones((2, 3, 5))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    found = jlora.infer_axes(model.apply, params, x)
    assert found["^params/out/kernel$"] == "iio" and found["^params/query/kernel$"] == "ioo"
