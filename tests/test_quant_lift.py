"""What a lifted model keeps of a quantised base: no dense copy, on one device or many; and every method's laws."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from benchmarks import hlo
from methods import (
    CASES,
    LORA,
    METHODS,
    adapted,
    as_bytes,
    as_function_of_arrays,
    assert_close,
    away_from_start,
    floats,
    outputs_and_pullback,
)

LAYERS, WIDTH = 4, 128


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape) / WIDTH**0.5


def scanned(params, x):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["kernel"])[0]


def remat(policy):
    def model(params, x):
        body = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), policy=policy)
        return jax.lax.scan(body, x, params["stack"]["kernel"])[0]

    return model


def unrolled(params, x):
    for layer in params["layers"]:
        x = jnp.tanh(x @ layer["kernel"])
    return x


def unrolled_remat(params, x):
    block = jax.checkpoint(lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.everything_saveable)
    for layer in params["layers"]:
        x = block(x, layer["kernel"])
    return x


MODELS = {
    "scanned": scanned,
    "scanned, everything saveable": remat(jax.checkpoint_policies.everything_saveable),
    "scanned, dots saveable": remat(jax.checkpoint_policies.dots_saveable),
    "scanned, nothing saveable": remat(None),
    "unrolled": unrolled,
    "unrolled, everything saveable": unrolled_remat,
}


def weights(name):
    stack = normal(0, LAYERS, WIDTH, WIDTH)
    return {"stack": {"kernel": stack}} if "scanned" in name else {"layers": [{"kernel": w} for w in stack]}


def loss(model):
    return lambda trainable, frozen, x: jnp.sum(jlora.lift(model)(jlora.join(trainable, frozen), x) ** 2)


METHODS_THAT_MEET_W0 = {
    "lora": jlora.LoRA(rank=2, target="."),
    "dora": jlora.DoRA(jlora.LoRA(rank=2, target=".")),
    "hira": jlora.HiRA(rank=2, target="."),
    "oft": jlora.OFT(block=8, target="."),
    "none": None,
}
OF_W0 = {"hra": jlora.HRA(rank=2, target=".")}  # a function of W0 is made anew by a checkpoint, which a policy may undo


@pytest.mark.parametrize(
    "name,method",
    [
        pytest.param(name, method, marks=() if method == "lora" and "everything" in name else pytest.mark.slow)
        for name in MODELS
        for method in (*METHODS_THAT_MEET_W0, *(OF_W0 if "everything" not in name else ()))
    ],
)
def test_no_dense_weight_is_a_residual(name, method):
    """What the compiled forward pass hands to the backward pass.

    Under a policy that saves dots, DoRA's own a b is saved, on any base: that product is left out of the count.
    """
    x, spec = normal(1, 5, WIDTH), (METHODS_THAT_MEET_W0 | OF_W0)[method]
    small = jlora.quantize(weights(name), "nf4+double", target=".")
    trainable, frozen = jlora.split(jlora.adapt(small, spec)) if spec else ({}, small)
    both = jlora.join if spec else lambda _, base: base

    def dense_residuals(near):
        run = lambda t, f, x: jnp.sum(jlora.lift(MODELS[name])(both(t, near(f)), x) ** 2)
        backward = lambda t, f, x: jax.vjp(lambda t, x: run(t, f, x), t, x)[1]
        made = hlo.outputs(jax.jit(backward).lower(trainable, frozen, x).compile().as_text())
        large = [shape for dtype, shape in made if "f" in dtype and math.prod(shape) >= WIDTH**2]
        return [shape for shape in large if shape[-2:] != x.shape]

    kept, plain = dense_residuals(lambda f: f), dense_residuals(jlora.quant.dequantize)
    products = 1 if (name, method) == ("scanned, dots saveable", "dora") else 0
    assert len(kept) == products and len(plain) > products, (kept, plain)


@pytest.mark.slow
@pytest.mark.parametrize("name", [n for n in MODELS if "scanned" in n])
def test_a_scan_makes_one_layer_at_a_time(name):
    """The compiled step holds the activations of the plain model and one layer's weight, not the stack of them."""
    layer, x = 4 * WIDTH**2, normal(1, 8, WIDTH)

    def temporary(params):
        trainable, frozen = jlora.split(jlora.adapt(params, jlora.LoRA(rank=2, target=".")))
        step = jax.jit(jax.grad(loss(MODELS[name]))).lower(trainable, frozen, x).compile()
        return step.memory_analysis().temp_size_in_bytes

    plain = temporary(weights(name))
    # without optimisation, as the tests compile, the codes of a layer are arrays of four bytes each
    assert temporary(jlora.quantize(weights(name), "nf4+double", target=".")) < plain + 0.8 * LAYERS * layer


@pytest.mark.parametrize(
    "name,method",
    [
        pytest.param(name, method, marks=() if (name, method) == ("unrolled", "lora") else pytest.mark.slow)
        for name in MODELS
        if "unrolled" in name
        for method in METHODS_THAT_MEET_W0
    ],
)
def test_unrolled_layers_make_few_weights_at_a_time(name, method):
    """In the step as an optimising compiler orders it: barriers alone do not hold XLA's scheduler for CPUs."""
    layers, x, spec = 6, normal(1, 2, WIDTH), METHODS_THAT_MEET_W0[method]
    small = jlora.quantize({"layers": [{"kernel": w} for w in normal(0, layers, WIDTH, WIDTH)]}, "nf4", target=".")
    trainable, frozen = jlora.split(jlora.adapt(small, spec)) if spec else ({}, small)
    both = jlora.join if spec else lambda _, base: base
    run = lambda t, x, f: jnp.sum(jlora.lift(MODELS[name])(both(t, f), x) ** 2)
    step = jax.jit(jax.grad(run, argnums=(0, 1))).lower(trainable, x, frozen)
    options = {"xla_backend_optimization_level": 2, "xla_llvm_disable_expensive_passes": False}
    held = step.compile(compiler_options=options).memory_analysis().temp_size_in_bytes
    assert held < 4 * (4 * WIDTH**2), held


def test_a_scan_meets_codes_alone():
    """The stack of a scan is never made dense: its body makes the one layer it needs."""
    small = jlora.quantize(weights("scanned"), "nf4", target=".")
    text = str(jax.make_jaxpr(jlora.lift(scanned))(small, normal(1, 8, WIDTH)))
    assert f"f32[{LAYERS},{WIDTH},{WIDTH}]" not in text and f"f32[{WIDTH},{WIDTH}]" in text


# --- meshes -----------------------------------------------------------------------------------------------------------


def block(x, layer):
    """A perceptron; on a mesh with explicit axes a sum over what is cut says where it lives."""
    h = jnp.tanh(x @ layer["up"]["kernel"])
    at = jax.typeof(x).sharding
    place = NamedSharding(at.mesh, P(*at.spec[:1])) if AxisType.Explicit in at.mesh.axis_types else None
    return x + jax.lax.dot_general(h, layer["down"]["kernel"], (((1,), (0,)), ((), ())), out_sharding=place)


PERCEPTRONS = {
    "unrolled": lambda params, x: functools.reduce(block, params["layers"], x),
    "scanned": lambda params, x: jax.lax.scan(lambda x, layer: (block(x, layer), None), x, params["layers"])[0],
    "remat": lambda params, x: jax.lax.scan(
        jax.checkpoint(lambda x, layer: (block(x, layer), None), policy=jax.checkpoint_policies.everything_saveable),
        x, params["layers"],
    )[0],
}  # fmt: skip
MESHES = {
    "tensor": ((8,), ("tensor",)),
    "data tensor": ((4, 2), ("data", "tensor")),
    "fsdp": ((8,), ("fsdp",)),
    "fsdp tensor": ((4, 2), ("fsdp", "tensor")),
}
SPREAD = [
    *((mesh, "nf4+double", kind, "unrolled") for mesh in MESHES for kind in ("Auto", "Explicit")),
    *((mesh, scheme, "Auto", "unrolled") for mesh in ("fsdp", "fsdp tensor") for scheme in ("nf4", "int8")),
    *((mesh, "nf4+double", kind, "scanned") for mesh, kind in (("fsdp", "Auto"), ("fsdp tensor", "Explicit"))),
    ("fsdp tensor", "nf4", "Auto", "remat"),
]


@pytest.mark.slow
@pytest.mark.parametrize("mesh,scheme,kind,model", SPREAD)
def test_sharded_over_eight_devices(mesh, scheme, kind, model):
    """Codes are cut as the kernels' specs say, a step's numbers are those of one device, and no weight crosses between
    devices dense: what fsdp gathers are codes and scales."""
    wide = 512
    layers = [
        {"up": {"kernel": normal(n, WIDTH, wide)}, "down": {"kernel": normal(9 + n, wide, WIDTH)}} for n in (0, 1)
    ]
    layers = layers if model == "unrolled" else jax.tree.map(lambda *ws: jnp.stack(ws), *layers)
    alone = jlora.adapt(jlora.quantize({"layers": layers}, scheme, target="."), jlora.LoRA(rank=2, target="."))
    alone = jlora.join(jax.tree.map(np.asarray, away_from_start(alone.trainable, 0.05)), alone.frozen)
    x, tx = normal(3, 16, WIDTH), optax.sgd(1000.0)  # gradients are small beside the factors
    lifted = jlora.lift(PERCEPTRONS[model])
    loss = lambda ad, x: jnp.mean(lifted(ad, x) ** 2)
    want = jax.jit(jax.value_and_grad(lambda t, f, x: loss(jlora.join(t, f), x)))(*jlora.split(alone), x)

    shape, names = MESHES[mesh]
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType[kind],) * len(shape))
    rows, tensor = (next((n for n in names if n in among), None) for among in (("data", "fsdp"), ("tensor",)))
    fsdp, stack = "fsdp" if "fsdp" in names else None, (None,) * (model != "unrolled")
    cut = {"up": (*stack, fsdp, tensor), "down": (*stack, tensor, fsdp)}
    rules = [(f"{name}/kernel", P(*spec)) for name, spec in cut.items()]
    placed = jax.device_put(alone, jlora.shard.shardings(mesh, alone, rules))
    layer = placed.frozen.base["layers"][0] if model == "unrolled" else placed.frozen.base["layers"]
    for name, spec in cut.items():
        for array in ("codes", "scales")[
            : 1 if fsdp or "double" not in scheme else 2
        ]:  # two blocks are not cut in eight
            held = layer[name]["kernel"].arrays[array]
            parts = [1 if n is None else mesh.shape[n] for n in spec]
            assert held.addressable_shards[0].data.shape == tuple(
                n // k for n, k in zip(held.shape, parts, strict=True)
            )

    step = jlora.shard.train_step(loss, tx, mesh, placed, batch=P(rows))
    trainable, frozen = jlora.split(placed)
    batch = jax.device_put(x, NamedSharding(mesh, P(rows)))
    text = step.lower(trainable, tx.init(trainable), frozen, batch).compile().as_text()
    after, _, metrics = step(trainable, tx.init(trainable), frozen, batch)
    assert_close(metrics["loss"], want[0], 1e-5)
    assert_close(after, jax.tree.map(lambda a, g: a - 1000 * g, alone.trainable, want[1]), 1e-5)
    found = hlo.sent(text)
    assert max((one.elements for one in found if one.dtype not in ("u8", "s8")), default=0) < WIDTH * wide / 8
    per = 1 if scheme == "int8" else 2
    gathered = WIDTH * wide // per // (mesh.shape["tensor"] if tensor else 1)
    assert max((one.elements for one in found if one.dtype in ("u8", "s8")), default=0) == (gathered if fsdp else 0)

    options = {"batch": P(rows), "tx": tx, "tokens": len(x), "activations": x.dtype}
    small = jax.eval_shape(lambda base: base, alone.frozen.base)
    guess = jlora.shard.estimate(small, jlora.LoRA(rank=2, target="."), mesh, rules, **options)
    assert guess.base == sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(frozen.base))
    if model != "unrolled":  # there XLA gathers the last weight once for both passes
        sent = sum(one.bytes for one in found if one.kind == "all-gather")
        assert sent == guess.sent("all-gather", "base") + guess.sent("all-gather", "factors")


@pytest.mark.slow
def test_a_stack_that_is_cut_and_taken_whole():
    """A kernel of three axes whose first one is taken for a stack, cut there, without an adapter: gathered as codes."""
    small = jlora.quantize(
        {"heads": {"kernel": normal(0, WIDTH, 4, 64)}}, "nf4", target="kernel", axes={"kernel": "sio"}
    )
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    places = jlora.shard.shardings(mesh, small, [("kernel", P("fsdp"))])
    lifted = jlora.lift(lambda p, x: jnp.einsum("bi,ihd->bhd", x, p["heads"]["kernel"]))
    x = normal(1, 8, WIDTH)
    rows = NamedSharding(mesh, P("fsdp"))
    f = lambda p, x: lifted(jlora.shard.gathered(p, places, P("fsdp")), x)
    f = jax.jit(f, in_shardings=(places, rows), out_shardings=rows)
    lines = [line for line in f.lower(small, x).compile().as_text().splitlines() if " all-gather(" in line]
    assert any("u8[128,128]" in line for line in lines) and not any("f32[128,4,64]" in line for line in lines)
    assert_close(f(small, x), lifted(small, x))


@pytest.mark.slow
def test_a_scan_outside_of_lift():
    """It takes the stack axis from a gathered leaf, which then still knows where its arrays are to be."""
    small = jlora.quantize(
        {"up": {"kernel": normal(0, 2, WIDTH, WIDTH)}}, "nf4+double", target="up", axes={"up": "sio"}
    )
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    places = jlora.shard.shardings(mesh, small, [("kernel", P(None, None, "fsdp"))])
    rows, x = NamedSharding(mesh, P("fsdp")), normal(1, 8, WIDTH)
    layer = jlora.lift(lambda p, x: jnp.tanh(x @ p["up"]["kernel"]))
    run = lambda p, x: jax.lax.scan(lambda x, p: (layer(p, x), None), x, p)[0]
    f = lambda p, x: run(jlora.shard.gathered(p, places, P("fsdp")), x)
    f = jax.jit(f, in_shardings=(places, rows), out_shardings=rows)
    found = hlo.sent(f.lower(small, x).compile().as_text())
    assert {one.dtype for one in found if one.kind == "all-gather"} == {"u8"}
    assert_close(f(small, x), run(small, x))


@pytest.mark.slow
def test_derivatives_without_the_custom_rule_through_a_gathered_base():
    """Reverse mode over forward mode, and a penalty on the gradient of the input."""
    small = jlora.quantize({"up": {"kernel": normal(0, WIDTH, WIDTH)}}, "nf4+double", target="up")
    ad = jlora.adapt(small, jlora.LoRA(rank=2, target="up"))
    ad = jlora.join(away_from_start(ad.trainable, 0.1), ad.frozen)
    fn, x = lambda p, x: jnp.tanh(x @ p["up"]["kernel"]), normal(1, 8, WIDTH)
    losses = {
        "forward": lambda ad, x: jnp.mean(jlora.lift(fn, forward_mode=True)(ad, x) ** 2),
        "penalty": lambda ad, x: jnp.mean(jax.grad(lambda x: jnp.sum(jlora.lift(fn)(ad, x) ** 2))(x) ** 2),
    }
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    placed = jax.device_put(ad, jlora.shard.shardings(mesh, ad, [("kernel", P("fsdp"))]))
    places = jax.tree.map(lambda a: a.sharding, placed.frozen)
    for loss in losses.values():
        near = lambda t, f, x, loss=loss: loss(jlora.join(t, jlora.shard.gathered(f, places, P("fsdp"))), x)
        want = jax.jit(jax.grad(lambda t, f, x, loss=loss: loss(jlora.join(t, f), x)))(ad.trainable, ad.frozen, x)
        rows = jax.device_put(x, NamedSharding(mesh, P("fsdp")))
        assert_close(jax.jit(jax.grad(near))(*jlora.split(placed), rows), want, 2e-5)


@pytest.mark.slow
def test_a_mesh_of_explicit_and_automatic_axes():
    """A step whose batch axis is explicit and whose weight axis is automatic is the step of one device."""
    small = jlora.quantize({"up": {"kernel": normal(0, WIDTH, WIDTH)}}, "nf4", target="up")
    ad = jlora.adapt(small, jlora.LoRA(rank=2, target="up"))
    ad = jlora.join(jax.tree.map(np.asarray, away_from_start(ad.trainable, 0.1)), ad.frozen)
    lifted, x = jlora.lift(lambda p, x: x @ p["up"]["kernel"]), normal(1, 8, WIDTH)
    loss, tx = lambda ad, x: jnp.mean(lifted(ad, x) ** 2), optax.sgd(100.0)
    want = jax.grad(lambda t: loss(jlora.join(t, ad.frozen), x))(ad.trainable)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Explicit, AxisType.Auto))
    placed = jax.device_put(ad, jlora.shard.shardings(mesh, ad, [("kernel", P(None, "tensor"))]))
    step = jlora.shard.train_step(loss, tx, mesh, placed, batch=P("data"))
    trainable, frozen = jlora.split(placed)
    after, *_ = step(trainable, tx.init(trainable), frozen, jax.device_put(x, NamedSharding(mesh, P("data"))))
    assert_close(after, jax.tree.map(lambda a, g: a - 100 * g, ad.trainable, want), 1e-5)


def experts(place):
    """Two experts taken together; `place` is where the model brings their weights first, None for nowhere."""

    def model(p, x):
        at = jax.typeof(x).sharding
        known = None if at.mesh.empty else NamedSharding(at.mesh, P(*at.spec))
        if known is not None and place is not None:
            p = jax.tree.map(lambda w: jax.sharding.reshard(w, NamedSharding(at.mesh, place)), p)
        dot = lambda h, w: jax.lax.dot_general(h, w, (((1,), (0,)), ((), ())), out_sharding=known)
        return jax.vmap(lambda e: dot(jnp.tanh(x @ e["up"]["kernel"]), e["down"]["kernel"]))(p).sum(0)

    return model


EXPLICIT = {
    # name: (mesh axes, stack, model, specs, batch)
    "tensor": (("data", "tensor"), (), lambda p, x: block(x, p), (P(None, "tensor"), P("tensor")), P("data")),
    "experts": (("expert", "tensor"), (4,), experts(None), (P("expert", None, "tensor"), P("expert", "tensor")), P()),
    "experts, data": (("expert", "data"), (4,), experts(None), (P("expert"), P("expert")), P("data")),
    "moved": (("expert", "data"), (4,), experts(P()), (P("expert"), P("expert")), P(("expert", "data"))),
    "moved, cut": (("data", "fsdp"), (4,), experts(P()), (P(None, None, "fsdp"), P(None, "fsdp")), P(("data", "fsdp"))),
}
TYPES_FIRST = ("nf4", "tensor"), ("nf4", "moved")  # in the fast part


@pytest.mark.parametrize(
    "scheme,name",
    [
        pytest.param(scheme, name, marks=() if (scheme, name) in TYPES_FIRST else pytest.mark.slow)
        for scheme in ("", "nf4")
        for name in EXPLICIT
    ],
)
def test_types_under_explicit_axes(scheme, name):
    """The lifted model has the types of the plain one, and the model sees those of dense weights at each step."""
    names, stack, model, specs, batch = EXPLICIT[name]
    mesh = jax.make_mesh((4, 2), names, axis_types=(AxisType.Explicit,) * 2)
    params = {"up": {"kernel": normal(1, *stack, WIDTH, 64)}, "down": {"kernel": normal(2, *stack, 64, WIDTH)}}
    rules = [(f"{layer}/kernel", spec) for layer, spec in zip(("up", "down"), specs, strict=True)]
    axes = {"kernel": "s" * len(stack) + "io"}
    dense = jlora.shard.abstract(mesh, params, rules)
    x = jax.ShapeDtypeStruct((8, WIDTH), jnp.float32, sharding=NamedSharding(mesh, batch))
    seen = []

    def watched(p, x):
        seen.append([jax.typeof(w).sharding.spec for w in jax.tree.leaves(p)])
        return model(p, x)

    with jax.set_mesh(mesh):
        want = jax.eval_shape(watched, dense, x)
        base = jlora.quantize(params, scheme, target=".", axes=axes) if scheme else params
        for spec in (jlora.LoRA(rank=2, target="."), jlora.DoRA(jlora.LoRA(rank=2, target="."))):
            ad = jlora.shard.abstract(mesh, jax.eval_shape(lambda spec=spec: jlora.adapt(base, spec, axes=axes)), rules)
            got = jax.eval_shape(jlora.lift(watched), ad, x)
            assert got == want and got.sharding == want.sharding
            places = jax.tree.map(lambda a: a.sharding, ad)
            near = lambda ad, x, places=places: jlora.lift(watched)(jlora.shard.gathered(ad, places, P()), x)
            assert jax.eval_shape(near, ad, x).sharding == want.sharding
    assert all(specs == seen[0] for specs in seen)


@pytest.mark.slow
@pytest.mark.parametrize(
    "method,name", [*(("LoRA", n) for n in EXPLICIT), ("DoRA", "experts"), ("DoRA", "moved, cut"), ("OFT", "experts")]
)
def test_numbers_under_explicit_axes(method, name):
    """A step on weights and on codes, with the mesh set as JAX's guides have it, is the step of one device."""
    names, stack, model, specs, batch = EXPLICIT[name]
    mesh = jax.make_mesh((4, 2), names, axis_types=(AxisType.Explicit,) * 2)
    params = {"up": {"kernel": normal(1, *stack, WIDTH, 64)}, "down": {"kernel": normal(2, *stack, 64, WIDTH)}}
    rules = [(f"{layer}/kernel", spec) for layer, spec in zip(("up", "down"), specs, strict=True)]
    axes = {"kernel": "s" * len(stack) + "io"}
    lora = jlora.LoRA(rank=2, target=".")
    spec = {"LoRA": lora, "DoRA": jlora.DoRA(lora), "OFT": jlora.OFT(block=16, target=".")}[method]
    lifted, x, tx = jlora.lift(model), normal(3, 8, WIDTH), optax.sgd(0.1)
    loss = lambda ad, x: jnp.mean(lifted(ad, x) ** 2)
    for base in (params, jlora.quantize(params, "nf4+double", target=".", axes=axes)):
        trainable, frozen = jlora.split(jlora.adapt(base, spec, axes=axes))
        trainable = jax.tree.map(np.asarray, away_from_start(trainable, 0.05))
        want = jax.jit(jax.grad(lambda t, f, x: loss(jlora.join(t, f), x)))(trainable, frozen, x)
        want = jax.tree.map(lambda a, g: a - 0.1 * g, trainable, want)
        with jax.set_mesh(mesh):
            ad = jlora.shard.init(base, spec, mesh, rules, axes=axes)
            step = jlora.shard.train_step(loss, tx, mesh, ad, batch=batch)
            places = jax.tree.map(lambda a: a.sharding, ad.trainable)
            after, *_ = step(jax.device_put(trainable, places), tx.init(ad.trainable), ad.frozen, x)
        assert_close(after, want, 1e-5)


def test_merging_codes_on_an_explicit_mesh():
    """A side that an equation makes as a whole is added to a weight that codes make, and lives where that does."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
    base = jlora.quantize({"up": {"kernel": normal(0, WIDTH, 64)}}, "int8", target="up")
    spec, rules = jlora.KronA(target="up"), [("up", P("data", "model"))]
    single = jlora.adapt(base, spec)
    trainable = away_from_start(single.trainable)
    want = jax.jit(jlora.merge)(jlora.join(trainable, single.frozen))
    held = jlora.shard.init(base, spec, mesh, rules)
    put = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), trainable, held.trainable)
    got = jax.jit(jlora.merge)(jlora.join(put, held.frozen))
    assert got["up"]["kernel"].sharding.spec == P("data", "model")
    assert_close(got, want)


MOVED = {
    "multiplied": lambda w: -0.5 * w,
    "cut behind a stack": lambda w: w[:, :, 4:20],
    "layers cut": lambda w: w[1:3],
}


@pytest.mark.parametrize("method", ["LoRA", "DoRA"])
@pytest.mark.parametrize("name", MOVED)
def test_what_a_model_does_to_codes_it_does_to_the_weight(name, method):
    """A quantised stack multiplied or cut before its layers are met: lifted is merged, in value and gradient."""
    spec = {"LoRA": jlora.LoRA, "DoRA": lambda **fields: jlora.DoRA(jlora.LoRA(**fields))}[method]
    base = jlora.quantize({"w": normal(0, LAYERS, WIDTH, 32)}, "int8", target="w", axes={"w": "sio"})
    ad = jlora.adapt(base, spec(rank=2, target="w"), axes={"w": "sio"})
    far, x = away_from_start(ad.trainable), normal(1, 3, WIDTH)

    def model(p, x):
        w = MOVED[name](p["w"])
        return jax.lax.scan(lambda total, w: (total, jnp.tanh(x @ w)), 0.0, w)[1]

    def run(dense):
        lifted = jlora.lift(model, dense=dense)
        return outputs_and_pullback(lambda t: [lifted(jlora.join(t, ad.frozen), x)], far)

    got, want = jax.jit(lambda: (run(False), run(True)))()
    assert_close(got, want, 2e-5)
    whole = np.asarray(MOVED[name](jlora.quant.dequantize(base)["w"]))
    plain = np.tanh(np.einsum("ni,lio->lno", x, whole))
    assert_close(jlora.lift(model)(ad, x), plain, 1e-4)


def test_places_that_do_not_fit_are_refused():
    """Places that are not those of `shardings` are refused with that call; a gathered leaf still says what it is."""
    small = jlora.quantize({"up": {"kernel": normal(0, WIDTH, 64)}}, target="up")
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    places = jlora.shard.shardings(mesh, small, [("kernel", P("fsdp"))])
    for bad in ({"up": {"kernel": NamedSharding(mesh, P())}}, {}, jax.tree.map(lambda a: a.sharding, small)):
        with pytest.raises(ValueError, match=r"shardings\(mesh, tree, base_specs\)"):
            jlora.shard.gathered(small, bad, P("fsdp"))
    near = jlora.shard.gathered(small, places, P("fsdp"))
    leaf = near["up"]["kernel"]
    assert leaf.shape == (WIDTH, 64) and leaf.scheme == jlora.quant.NF(4) and leaf.nbytes
    assert jax.tree.structure(jlora.shard.gathered(near, places, P("fsdp"))) == jax.tree.structure(near), "told before"


@pytest.mark.slow
def test_init_and_a_step_on_a_mesh():
    """A base quantised inside of `shard.init` has its codes cut as the rules say, and trains."""
    mesh = jax.make_mesh((8,), ("tensor",), axis_types=(AxisType.Auto,))
    make = lambda: jlora.quantize({"up": {"kernel": normal(0, WIDTH, 512)}}, target="up")
    rules = [("up/kernel", P(None, "tensor"))]
    ad = jlora.shard.init(make, jlora.LoRA(rank=2, target="up"), mesh, rules)
    assert ad.frozen.base["up"]["kernel"].arrays["codes"].sharding.spec == P(None, "tensor")
    apply = jlora.lift(lambda params, x: x @ params["up"]["kernel"])
    tx = optax.adam(1e-2)
    step = jlora.shard.train_step(lambda a, x: jnp.mean((apply(a, x) - 1) ** 2), tx, mesh, ad, batch=P())
    trainable, frozen = jlora.split(ad)
    state = jax.jit(tx.init, out_shardings=jlora.shard.state_shardings(tx, ad))(trainable)
    losses = []
    for _ in range(3):
        trainable, state, metrics = step(trainable, state, frozen, normal(1, 4, WIDTH))
        losses.append(float(metrics["loss"]))
    assert losses[0] > losses[1] > losses[2]


# --- the laws ---------------------------------------------------------------------------------------------------------

ON = ("linen/mlp", "linen/scan_axis_1_remat", "linen/tied_attend", "linen/conv_2d", "linen/ragged_experts", "nnx/scan")
ROWS = [
    pytest.param(row, CASES[name], id=f"{row.name}-{name}", marks=() if row in (LORA,) and name in ON[:3] else slow)
    for slow in (pytest.mark.slow,)
    for row in METHODS
    for name in row.models[:1] or (ON if row.name in ("lora", "dora", "hira", "oft") else ON[:1])
    if row.takes(CASES[name])
]


@pytest.mark.parametrize("row,case", ROWS)
def test_laws_on_a_quantised_base(row, case, tmp_path):
    """Lifted equals dense in values and gradients, merging gives plain parameters, the base stays, files open."""
    fn, params, args = case.build()
    small = jlora.quantize(params, jlora.quant.NF(4, block=2, double=True), target=case.target, axes=case.axes)
    before = as_bytes(small)
    ad = adapted(row, case, small)
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    far = away_from_start(ad.trainable)

    @jax.jit
    def program(trainable, frozen, arrays):
        def run(dense):
            lifted = jlora.lift(call, dense=dense)
            f = lambda t: floats(lifted(jlora.join(t, frozen), arrays))
            return outputs_and_pullback(f, trainable, case.differentiable)

        return run(False), run(True), floats(call(jlora.merge(jlora.join(trainable, frozen)), arrays))

    made, want, merged = program(far, ad.frozen, arrays)
    assert_close(made, want)
    assert_close(made[0], merged)
    assert as_bytes(ad.frozen.base) == before
    assert jax.tree.structure(jlora.merge(ad)) == jax.tree.structure(params)
    report = jlora.explain(call, jlora.join(far, ad.frozen), arrays)
    assert not report.unused
    jlora.save(tmp_path / "adapter", jlora.join(far, ad.frozen))
    assert as_bytes(jlora.load(tmp_path / "adapter", small).trainable) == as_bytes(far)


@pytest.mark.slow
def test_hessian_products_and_forward_mode():
    """Second derivatives and forward mode on codes are those of the dense model."""
    small = jlora.quantize(weights("unrolled"), "nf4+double", target=".")
    trainable, frozen = jlora.split(jlora.adapt(small, jlora.LoRA(rank=2, target=".")))
    trainable, x = away_from_start(trainable, 0.1), normal(1, 3, WIDTH)

    def product(dense):
        f = lambda t: jnp.sum(jlora.lift(unrolled, dense=dense)(jlora.join(t, frozen), x) ** 2)
        return jax.jit(lambda t: jax.jvp(jax.grad(f), (t,), (t,))[1])(trainable)

    assert_close(product(False), product(True), 2e-5)
    forward = lambda t: jlora.lift(unrolled, forward_mode=True)(jlora.join(t, frozen), x)
    plain = lambda t: jlora.lift(unrolled, dense=True)(jlora.join(t, frozen), x)
    assert_close(jax.jvp(forward, (trainable,), (trainable,)), jax.jvp(plain, (trainable,), (trainable,)), 2e-5)
