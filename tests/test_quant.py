"""Quantised weights: golden files, layouts, what is refused; and that the library computes with them as with arrays."""

import re
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import nnx

import jlora
from jlora.quant._schemes import dynamic_levels, normal_levels, thresholds

GOLDEN = Path(__file__).parent / "fixtures" / "nf4.npz"


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


# --- bitsandbytes' files, bit for bit -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "zero_block"])
@pytest.mark.parametrize("parity", [None, "torch"])
def test_golden(case, parity):
    """Codes, scales and what they stand for are bitsandbytes' bits, whatever the layout and XLA's optimiser."""
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
            read, as_users = lambda leaf: leaf.dequantize(), {"xla_backend_optimization_level": 3}  # 0 in these tests
            for made in (read(leaf), jax.jit(read)(leaf), jax.jit(read, compiler_options=as_users)(leaf)):
                np.testing.assert_array_equal(np.asarray(made).T, get("dequant"))


def test_golden_tables():
    """The levels of 4 bits and of double quantisation are bitsandbytes' own, which the formula gives to 2e-7."""
    with np.load(GOLDEN) as golden:
        np.testing.assert_array_equal(jlora.quant.NF(4).levels, golden["plain.code"])
        np.testing.assert_array_equal(dynamic_levels(), golden["plain.dq.code2"])
    assert np.abs(normal_levels(4) - jlora.quant.NF(4).levels).max() < 2e-7  # the same construction


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_normal_levels_against_quantiles(bits):
    """At every width the levels are quantiles of the normal law, with one exact zero and a top of 1."""
    from scipy.stats import norm

    d = 1 - (1 / (2 * (2**bits - 1)) + 1 / 2 ** (bits + 1)) / 2
    up = norm.ppf(np.linspace(d, 0.5, 2 ** (bits - 1) + 1)[:-1])
    down = -norm.ppf(np.linspace(d, 0.5, 2 ** (bits - 1))[:-1])
    want = np.sort(np.concatenate([up, [0], down])) / up.max()
    np.testing.assert_allclose(normal_levels(bits), want, atol=1e-12)
    assert len(want) == 2**bits and (want == 0).sum() == 1 and want[-1] == 1


# --- lifting ----------------------------------------------------------------------------------------------------------

SCHEMES = ["nf4+double", "nf4", "int8", "int4", "nf2", "nf3", "nf8"]


def two_layers(params, x):
    return jnp.tanh(x @ params["query"]["kernel"]) @ params["value"]["kernel"] + params["value"]["bias"]


@pytest.mark.parametrize(
    "scheme", [pytest.param(s, marks=() if s == "nf4+double" else pytest.mark.slow) for s in SCHEMES]
)
def test_lift_is_the_dense_model(scheme):
    """On codes, the lifted model and its gradients are those of the weights that they stand for, merged too."""
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


# --- what is quantised, and what is refused ---------------------------------------------------------------------------


def by_hand(w, block=64, levels=None):
    """NF4 of a (in, out) weight in float64 NumPy: torch's run of outputs, then inputs, in blocks."""
    levels = np.float64(jlora.quant.NF(4).levels) if levels is None else levels
    run = np.float64(w).T.reshape(-1)
    made = np.empty_like(run)
    for start in range(0, run.size, block):
        part = run[start : start + block]
        top = np.abs(part).max()
        distance = np.abs((part / top if top else part)[:, None] - levels)
        made[start : start + block] = levels[distance.argmin(1)] * top
    return made.reshape(w.T.shape).T


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(128, 3), (64, 1), (100, 7), (63, 1), (1, 130), (5, 13)])
@pytest.mark.parametrize("parity", [None, "torch"])
def test_blocks_and_a_partial_one(shape, parity):
    """Each block has its own scale in either layout; a size that no block divides costs one partial block at most."""
    w = normal(3, *shape)
    leaf = jlora.quantize({"w": w}, target="w", axes={"w": "io"}, parity=parity)["w"]
    np.testing.assert_allclose(leaf.dequantize(), by_hand(w), rtol=1e-6, atol=1e-7)
    assert leaf.nbytes <= -(-w.size // 2) + 4 * -(-w.size // 64)  # at most one partial block
    assert leaf.shape == w.shape and leaf.dtype == w.dtype and leaf.size == w.size


def test_bits_a_parameter():
    """NF4 with double quantisation costs QLoRA's 4.127 bits a parameter, and `nbytes` is what is really held."""
    leaf = jlora.quantize({"w": normal(0, 1536, 576)}, "nf4+double", target="w")["w"]
    assert 8 * leaf.nbytes / leaf.size < 4.127 + 8 * 8 / leaf.size
    held = sum(a.nbytes for a in jax.tree.leaves(leaf))
    assert held == leaf.nbytes


def test_zeros_and_midpoints():
    """A block of zeros stays zeros; a value at a midpoint goes to the lower level, as in bitsandbytes."""
    levels = jlora.quant.NF(4).levels
    middle = thresholds(levels)
    block = np.zeros((64, 2), np.float32)
    block[0, 0], block[1 : 1 + len(middle), 0] = 1, middle
    leaf = jlora.quantize({"w": jnp.asarray(block)}, target="w")["w"]
    got = np.asarray(leaf.dequantize())
    np.testing.assert_array_equal(got[1 : 1 + len(middle), 0], levels[:-1])
    assert not got[:, 1].any() and not got[1 + len(middle) :, 0].any()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("scheme", ["nf4", "int8"])
def test_half_precision(dtype, scheme):
    """A weight in half precision has the codes of its float32 values, and is read and multiplied in its own dtype."""
    w = normal(4, 64, 8, dtype=dtype)
    leaf = jlora.quantize({"w": w}, scheme, target="w")["w"]
    wide = jlora.quantize({"w": w.astype(jnp.float32)}, scheme, target="w")["w"]
    assert leaf.dtype == dtype and leaf.dequantize().dtype == dtype
    np.testing.assert_array_equal(leaf.dequantize(), wide.dequantize().astype(dtype))
    y = jlora.lift(lambda p, x: x @ p["w"])({"w": leaf}, jnp.ones((2, 64), dtype))
    assert y.dtype == dtype


def test_a_call_of_the_model_tells_the_axes():
    """fn= and args= say what axes= says, also of an adapter's base; infer_axes says it to LoftQ."""
    params, x = {"q": normal(0, 2, 64, 32), "v": normal(1, 64, 64)}, jnp.ones((3, 2, 64))
    call = dict(fn=lambda p, x: jnp.einsum("bhi,hio->bo", x, p["q"]), args=(x,))
    with pytest.raises(ValueError, match=r"tells it of:\n +'q' of shape \(2, 64, 32\)\n.*write fn=model.apply, args="):
        jlora.quantize(params, target="q")
    want = jlora.quantize(params, target="q", axes={"q": "iio"})["q"]
    spec = jlora.LoRA(rank=2, target="q")
    adapted = jlora.quantize(jlora.adapt(params, jlora.LoRA(rank=2, target="v")), target="q", **call).frozen.base
    mended, _ = jlora.init.loftq(params, spec, "nf4", axes=jlora.infer_axes(call["fn"], params, *call["args"]))
    for got in (jlora.quantize(params, target="q", **call), adapted, mended):
        assert got["q"].roles == want.roles and got["q"].codec == want.codec


def test_refused_in_words():
    """NaN, integers, and patterns, schemes or starts that are none are refused, each by its name."""
    good, bad = normal(0, 64, 2), normal(0, 64, 2).at[3, 1].set(jnp.nan).at[0, 0].set(jnp.inf)
    with pytest.raises(ValueError, match=r"'a' of shape \(64, 2\) has 1 NaN and 1 infinite(.|\n)*'c'"):
        jlora.quantize({"a": bad, "b": good, "c": bad}, target=".")
    with pytest.raises(ValueError, match="only real floating point"):
        jlora.quantize({"a": jnp.ones((4, 4), int)}, target="a")
    with pytest.raises(ValueError, match="matches no leaf; the nearest paths are query"):
        jlora.quantize({"query": good}, target="kernel")
    with pytest.raises(ValueError, match="no scheme is called 'nf5'; there are nf2"):
        jlora.quantize({"a": good}, "nf5", target="a")
    with pytest.raises(ValueError, match=r"NF\(bits=5\)"):
        jlora.quant.NF(5)
    for start in (jlora.init.loftq, jlora.init.qpissa):
        with pytest.raises(ValueError, match=r"'query/kernel' of shape \(64, 2\) has 1 NaN"):
            start({"query": {"kernel": bad}}, jlora.LoRA(rank=2), "nf4")


def deleted():
    w = jnp.ones((64, 2))
    w.delete()
    return w


MISTAKEN = {
    "a pattern, integers and letters at once": lambda: dict(
        params={"a": jnp.ones((4, 4), int), "b": normal(0, 64, 2)}, target=["a", "b", "c"], axes={"b": "ioo", "d": "io"}
    ),
    "words for an array": lambda: dict(params={"a": "kernel", "b": normal(0, 64, 2)}, target="."),
    "nothing tells the sides": lambda: dict(params={"a": normal(0, 3, 64, 64)}, target="a"),
    "an array that is gone": lambda: dict(params={"a": deleted(), "b": deleted()}, target="."),
    "all excluded": lambda: dict(params={"a": normal(0, 64, 2)}, target="a", exclude="a"),
}


@pytest.mark.parametrize("what", MISTAKEN)
def test_adapt_and_quantize_refuse_a_tree_in_the_same_words(what):
    """A target means one thing: both name the same leaves and patterns, all at once, and what to write instead."""
    given = MISTAKEN[what]()
    axes = {"axes": given.pop("axes")} if "axes" in given else {}
    params, method = given.pop("params"), jlora.LoRA(rank=1, **given)
    with pytest.raises(ValueError, match="cannot adapt this tree") as of_adapt:
        jlora.adapt(params, method, **axes)
    with pytest.raises(ValueError, match="cannot quantise this tree") as of_quantize:
        jlora.quantize(params, **given, **axes)
    lines = str(of_quantize.value).replace("quantize, whose blocks run along the input, asks", "LoRA asks")
    assert lines.replace("quantize(", "LoRA(").split("\n")[1:] == str(of_adapt.value).split("\n")[1:]
    assert "\n" in lines


def test_a_cast_is_refused_wherever_codes_are_read(tmp_path):
    """All leaves at once, by their paths."""
    base = jlora.quantize({name: {"kernel": normal(n, 64, 2)} for n, name in enumerate(("query", "value"))})
    adapted = jlora.adapt(base, jlora.LoRA(rank=2))
    narrow = lambda tree: jax.tree.map(lambda a: a.astype(jnp.bfloat16), tree)
    cast, over = narrow(base), jlora.join(adapted.trainable, narrow(adapted.frozen))
    model = lambda p: p["query"]["kernel"] + p["value"]["kernel"]
    for read in (
        lambda: jlora.lift(model)(cast),
        lambda: jlora.lift(model)(over),
        lambda: jlora.adapt(cast, jlora.LoRA(rank=2)),
        lambda: jlora.merge(over),
        lambda: jlora.quantize(cast, "int8"),
        lambda: jlora.save(tmp_path / "adapter", over),
        lambda: jlora.io.quantised.save(tmp_path / "base", cast),
    ):
        with pytest.raises(
            TypeError, match=r"query/kernel' of shape .64, 2.: codes is bfloat16, not uint8(.|\n)*'value/"
        ):
            read()
    with pytest.raises(TypeError, match="codes is bfloat16"):
        jnp.asarray(cast["query"]["kernel"])
    assert not any(tmp_path.iterdir())


def test_left_as_they_are():
    """Empty leaves, scalars and what is quantised already pass as the same objects; a tied weight stays tied."""
    tree = {"empty": jnp.ones((0, 3)), "scalar": jnp.ones(()), "w": normal(0, 64, 2)}
    small = jlora.quantize(tree, target=".")
    assert small["empty"] is tree["empty"] and small["scalar"] is tree["scalar"]
    assert jlora.quantize(small, target=".")["w"] is small["w"]  # quantised already
    tied = jlora.quantize({"a": tree["w"], "b": tree["w"]}, target=".")
    assert tied["a"] is tied["b"]


def test_donation_frees_each_weight():
    """A donated weight is freed unless another leaf still needs it, and none is freed by a call that is refused."""
    w = normal(0, 64, 2)
    leaf = jlora.quantize({"w": w}, target="w", donate=True)["w"]
    assert w.is_deleted() and leaf.shape == (64, 2)
    tree = {"first": normal(1, 64, 2), "second": normal(2, 64, 2).at[0, 0].set(jnp.nan)}
    with pytest.raises(ValueError, match="'second'.*1 NaN"):
        jlora.quantize(tree, target=".", donate=True)
    assert not any(w.is_deleted() for w in tree.values())  # refused whole
    w = normal(3, 64, 64)  # one array under two paths: in two layouts, or plain under one
    tree = jlora.quantize({"table": {"embedding": w}, "head": {"kernel": w}}, target=".", donate=True)
    assert w.is_deleted() and isinstance(tree["table"]["embedding"], jlora.quant.Quantized)
    w = normal(3, 64, 64)
    assert jlora.quantize({"table": w, "head": w}, target="head", donate=True)["table"] is w and not w.is_deleted()


@pytest.mark.slow
def test_normal_weights_are_nearer_to_normal_floats():
    """On normal weights four bits of NF lose less than four of Int, and each bit more loses less."""
    w = normal(5, 4096, 64)
    error = lambda scheme: float(jnp.mean((jlora.quantize({"w": w}, scheme, target="w")["w"].dequantize() - w) ** 2))
    assert max(error("nf8"), error("int8")) < error("nf4") < error("int4") < error("nf3") < error("nf2")


def test_shapes_alone():
    """Under `eval_shape`, and given shapes, `quantize` tells the arrays it would make and needs no values."""
    made = jax.eval_shape(lambda: jlora.quantize({"w": jnp.ones((128, 4))}, "nf4+double", target="w"))
    assert made["w"].shape == (128, 4)
    again = jlora.quantize({"w": jax.ShapeDtypeStruct((128, 4), jnp.float32)}, "nf4+double", target="w")
    assert jax.tree.leaves(again) == jax.tree.leaves(made)


@pytest.mark.parametrize("shape", [(3, 512, 8), pytest.param((2, 60, 8), marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["Explicit", pytest.param("Auto", marks=pytest.mark.slow)])
def test_weights_that_lie_on_a_mesh(shape, kind):
    """The numbers of one device; codes and scales where the weight is, as far as the mesh divides them."""
    mesh = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=2 * (jax.sharding.AxisType[kind],))
    w = normal(16, *shape)
    cut = jax.device_put(w, jax.NamedSharding(mesh, jax.P(None, "fsdp", "tensor")))
    for scheme in ("nf4+double", "nf3", "nf8", "int8"):
        there, here = (jlora.quantize({"layers": {"kernel": x}}, scheme)["layers"]["kernel"] for x in (cut, w))
        for name, a in here.arrays.items():
            np.testing.assert_array_equal(there.arrays[name], a, err_msg=f"{scheme} {name}")
        np.testing.assert_allclose(there.dequantize(), here.dequantize(), rtol=3e-7)
        if shape[1] == 512:
            assert there.arrays["codes"].sharding.spec == jax.P(None, "fsdp", "tensor")


def test_stacks_are_quantised_apart():
    """Stack axes are those of the arrays: `vmap`, slices and `jnp.stack` of the leaf are those of the weight."""
    w = normal(6, 3, 128, 4)
    whole = jlora.quantize({"layers": {"kernel": w}}, "nf4+double")["layers"]["kernel"]
    apart = [jlora.quantize({"kernel": one}, "nf4+double", target="kernel")["kernel"] for one in w]
    assert whole.roles == "sio" and apart[0].roles == "io"
    np.testing.assert_array_equal(whole.dequantize(), jnp.stack([one.dequantize() for one in apart]))
    one = jax.tree.map(lambda a: a[1], whole)
    assert one.shape == (128, 4)
    np.testing.assert_array_equal(one.dequantize(), apart[1].dequantize())
    stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *apart)
    assert stacked.shape == (3, 128, 4)


def test_rows_of_an_embedding_alone():
    """A lookup makes the rows it looks up, and nothing of the size of the table; a row that is not there is NaN."""
    table, ids = normal(7, 1000, 64), jnp.array([[3, 999], [0, 1000]])
    for scheme in ("int8", "nf4+double"):
        leaf = jlora.quantize({"embedding": table}, scheme, target="embedding")["embedding"]
        look = jlora.lift(lambda p, ids: jnp.take(p, ids, axis=0, fill_value=jnp.nan))
        want = jnp.take(leaf.dequantize(), ids, axis=0, fill_value=jnp.nan)
        np.testing.assert_allclose(look(leaf, ids), want, rtol=3e-7)
        traced = str(jax.make_jaxpr(look)(leaf, ids))
        assert "f32[1000,64]" not in traced


# --- merging, files, starts -------------------------------------------------------------------------------------------


def drawn(adapted, scale):
    draw = lambda n, a: scale * normal(n, *a.shape)
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    return jlora.join(treedef.unflatten([draw(n, a) for n, a in enumerate(leaves)]), adapted.frozen)


def small_model():
    return {"query": {"kernel": normal(8, 64, 16)}, "norm": {"scale": jnp.ones(16)}}


def test_merging_and_quantising_again():
    """Merging adds the update to what the codes mean; new codes that lose most of it are refused unless allowed."""
    base = jlora.quantize(small_model())
    adapted = drawn(jlora.adapt(base, jlora.LoRA(rank=2)), 0.05)
    merged = jlora.merge(adapted)
    assert isinstance(merged["query"]["kernel"], jax.Array) and jlora.merge_report(adapted).worst > 0.999
    a, b = (np.float64(adapted.trainable["query/kernel"][n]) for n in "ab")
    want = np.float64(base["query"]["kernel"].dequantize()) + a.T @ b
    np.testing.assert_allclose(merged["query"]["kernel"], want, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="would lose most of the update(.|\n)*query/kernel"):
        jlora.quant.requantize(adapted)
    again, report = jlora.quant.requantize(adapted, allow_loss=True)
    kept = np.float64(again["query"]["kernel"].dequantize()) - np.float64(base["query"]["kernel"].dequantize())
    delta = a.T @ b
    np.testing.assert_allclose(report.worst, (kept * delta).sum() / (delta * delta).sum(), atol=1e-3)
    params, report = jlora.quant.requantize(drawn(adapted, 1.0))
    assert report.worst > 0.9 and isinstance(params["query"]["kernel"], jlora.quant.Quantized)
    with pytest.raises(ValueError, match=r"'query/kernel' of shape \(64, 16\) has 1024 NaN"):
        jlora.quant.requantize(drawn(adapted, jnp.nan), allow_loss=True)
    for wrong, words in ((base, "takes an Adapted, not a dict"), (adapted, "outside of jit")):
        with pytest.raises(TypeError, match=words):
            jax.jit(jlora.quant.requantize)(wrong)


def test_merged_parameters_are_exported(tmp_path):
    """Plain arrays, of the weights without an adapter too."""
    base = jlora.quantize(small_model() | {"key": {"kernel": normal(9, 64, 16)}}, "nf4+double")
    adapted = drawn(jlora.adapt(base, jlora.LoRA(rank=2, target="query")), 0.1)
    jlora.export(tmp_path / "merged", adapted)
    found = ocp.StandardCheckpointer().restore(tmp_path / "merged")
    jax.tree.map(np.testing.assert_array_equal, found, jax.tree.map(np.asarray, jlora.merge(adapted)))
    np.testing.assert_array_equal(found["key"]["kernel"], base["key"]["kernel"].dequantize())


def test_an_adapted_is_quantised_under_its_adapter():
    """Quantising an Adapted changes its base alone: factors and plan are the very ones."""
    adapted = drawn(jlora.adapt(small_model(), jlora.LoRA(rank=2)), 0.1)
    small = jlora.quantize(adapted, "int8")
    assert small.trainable is adapted.trainable and small.frozen.plan is adapted.frozen.plan
    assert isinstance(small.frozen.base["query"]["kernel"], jlora.quant.Quantized)


@pytest.mark.parametrize("scheme", ["nf4+double", "nf3", "int8"])
def test_a_base_is_saved_once(tmp_path, scheme):
    """A base comes back from its file bit for bit, and one of other shapes, another scheme or damaged is refused."""
    base = jlora.quantize(small_model(), scheme)
    jlora.io.quantised.save(tmp_path / "base", base)
    for like in (None, small_model()):
        found = jlora.io.quantised.load(tmp_path / "base", like)
        assert jax.tree.structure(found) == jax.tree.structure(base)
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(base), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(a, b)
    with pytest.raises(ValueError, match=r"'query/kernel' has shape \(64, 16\) in the file"):
        jlora.io.quantised.load(tmp_path / "base", small_model() | {"query": {"kernel": jnp.ones((2, 2))}})
    with pytest.raises(ValueError, match=f"'query/kernel' is {re.escape(scheme)} in the file, nf2 here"):
        jlora.io.quantised.load(tmp_path / "base", jlora.quantize(small_model(), "nf2"))
    about = tmp_path / "base" / "jlora_base.json"
    about.write_text(about.read_text().replace('"bits"', '"bitz"'))
    with pytest.raises(ValueError, match="damaged: its content does not have the digest"):
        jlora.io.quantised.load(tmp_path / "base")
    with pytest.raises(TypeError, match="jlora.save"):
        jlora.io.quantised.save(tmp_path / "other", jlora.adapt(base, jlora.LoRA(rank=2)))


def test_an_adapter_moves_to_the_plain_base(tmp_path):
    """An adapter knows its base by values and scheme: the plain one takes it under check='shapes' alone, unchanged."""
    params = jax.tree.map(lambda a: a.astype(jnp.bfloat16), small_model())
    adapted = drawn(jlora.adapt(jlora.quantize(params), jlora.LoRA(rank=2)), 0.1)
    jlora.save(tmp_path / "adapter", adapted)
    assert jlora.load(tmp_path / "adapter", jlora.quantize(params)).frozen.plan is adapted.frozen.plan
    with pytest.raises(ValueError, match="check='shapes'(.|\n)*has dtype bfloat16, was nf4 of bfloat16"):
        jlora.load(tmp_path / "adapter", params)
    with pytest.raises(ValueError, match=r"was nf4 of bfloat16"):
        jlora.load(tmp_path / "adapter", jlora.quantize(params, "int8"))
    same_codes = params | {"query": {"kernel": 2 * params["query"]["kernel"]}}
    with pytest.raises(ValueError, match="'query/kernel' has other values"):
        jlora.load(tmp_path / "adapter", jlora.quantize(same_codes))
    moved = jlora.load(tmp_path / "adapter", params, check="shapes")
    for a, b in zip(jax.tree.leaves(moved.trainable), jax.tree.leaves(adapted.trainable), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.slow
@pytest.mark.parametrize("start", [jlora.init.loftq, jlora.init.qpissa])
@pytest.mark.parametrize("scheme", ["nf4", "nf2"])
def test_starts_that_mend_what_quantising_lost(start, scheme):
    """LoftQ and QPiSSA start nearer to the weight than its codes, more so with more steps; `quantize` leaves both."""
    w = normal(9, 128, 64) * jnp.exp(normal(10, 64)) + normal(11, 128, 4) @ normal(12, 4, 64)
    params = {"query": {"kernel": w}, "norm": {"scale": jnp.ones(16)}}
    error = lambda made: float(jnp.linalg.norm(made - w))
    plain = error(jlora.quantize(params, scheme)["query"]["kernel"].dequantize())
    errors = []
    for steps in (1, 5):
        base, method = start(params, jlora.LoRA(rank=8, alpha=4), scheme, steps=steps)
        assert isinstance(base["query"]["kernel"], jlora.quant.Quantized)
        adapted = jlora.adapt(base, method)
        assert adapted.frozen.base is base
        errors.append(error(jlora.merge(adapted)["query"]["kernel"]))
    assert errors[1] < errors[0] < 0.9 * plain
    more = {"other": {"kernel": normal(13, 128, 8)}, **params}
    both, given = start(more, jlora.LoRA(rank=8, alpha=4, target="query"), scheme)
    both = jlora.quantize(both, scheme)
    for made, one in ((both["query"], base["query"]), (jlora.adapt(both, given).trainable, adapted.trainable)):
        jax.tree.map(np.testing.assert_array_equal, made, one)
    assert isinstance(both["other"]["kernel"], jlora.quant.Quantized)


@pytest.mark.parametrize(
    "read",
    [
        pytest.param(lambda leaf: np.asarray(leaf), id="np.asarray"),
        pytest.param(lambda leaf: jnp.asarray(leaf), id="jnp.asarray"),
        pytest.param(lambda leaf: leaf[...], id="index"),
        pytest.param(lambda leaf: leaf.T.T, id="transposed twice"),
        pytest.param(lambda leaf: jnp.eye(64) @ leaf, id="operator"),
    ],
)
def test_values_without_lift(read):
    """Whoever asks a quantised leaf for values gets the weight that its codes stand for."""
    leaf = jlora.quantize({"kernel": jax.random.normal(jax.random.key(0), (64, 8))}, "nf4", target="kernel")["kernel"]
    got = read(leaf)
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(np.asarray(got), np.asarray(leaf.dequantize()))


# --- without lift, and what is said --------------------------------------------------------------------------------


class Block(nn.Module):
    """One layer of a scan."""

    @nn.compact
    def __call__(self, x, _):
        return jnp.tanh(nn.Dense(64, name="up")(x)), None


class Scanned(nn.Module):
    """Three layers, stacked."""

    @nn.compact
    def __call__(self, x):
        scan = nn.scan(Block, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return scan(name="layers")(x, None)[0]


@pytest.mark.parametrize("model", [nn.Dense(32), Scanned()], ids=["dense", "scanned"])
def test_linen_takes_a_quantised_tree_without_lift(model):
    """Called as it stands, a model gets the whole array, alone, under jit, and a layer of it in a scan."""
    x = normal(0, 4, 64)
    params = model.init(jax.random.key(1), x)["params"]
    base = jlora.quantize(params, "nf4", target="kernel")
    want = model.apply({"params": jlora.quant.dequantize(base)}, x)
    apply = lambda base: model.apply({"params": base}, x)
    for y in (apply(base), jax.jit(apply)(base), jlora.lift(apply)(base)):
        np.testing.assert_allclose(y, want, rtol=1e-5, atol=1e-6)


def test_nnx_and_numpy_take_a_quantised_leaf_without_lift():
    """An NNX layer indexes its kernel, NumPy asks for an array of numbers: both get the weight."""
    x = normal(0, 4, 64)
    module = jlora.quantize(nnx.Linear(64, 32, rngs=nnx.Rngs(0)), "nf4", target="kernel")
    leaf = module.kernel.get_value()
    dense = leaf.dequantize()
    np.testing.assert_allclose(module(x), x @ dense + module.bias[...], rtol=1e-5, atol=1e-6)
    assert np.asarray(leaf).dtype == np.float32 and np.asarray(leaf, np.float16).dtype == np.float16
    for got, want in ((leaf, dense), (leaf.T, dense.T), (leaf[1:3], dense[1:3]), (list(leaf), list(dense))):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))


def test_quantize_says_what_became_codes_and_what_stayed(capsys):
    """One line outside of jit, none inside or on shapes, and a table of every leaf."""
    params = {f"layer_{n}": {"query": {"kernel": normal(n, 128, 64), "bias": jnp.zeros(64)}} for n in range(2)}
    params |= {"embed": {"embedding": normal(3, 10, 64)}}
    base = jlora.quantize(params, "nf4")
    out, said = capsys.readouterr()
    assert not out and said.count("\n") == 1
    for words in ("2 weights as nf4", "65.5 kB are 9.22 kB", "3 leaves stay", "embed/embedding 2.56 kB"):
        assert words in said
    jax.eval_shape(jlora.quantize, params)
    jax.jit(jlora.quantize)(params)
    jlora.quantize(jax.eval_shape(lambda: params))
    assert capsys.readouterr() == ("", "")
    text = jlora.quant.table(base)
    for words in ("layer_{0-1}/query/kernel", "(128, 64)", "nf4", "9,216", "4.5", "embed/embedding", "2 of 5 leaves"):
        assert words in text
    assert jlora.quant.table(jlora.adapt(base, jlora.LoRA(rank=2, target="query/kernel"))) == text
