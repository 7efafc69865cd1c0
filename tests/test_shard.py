"""Eight devices: factors live where their equations say, and training gives the numbers of one device."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
import tpu_programs
from benchmarks import hlo
from methods import METHODS

WIDE, INNER, LAYERS, ROWS, LENGTH, STEPS = 16, 32, 2, 16, 4, 20


def mesh_of(shape, names, kind="Auto"):
    return jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * len(shape))


def shapes(**leaves):
    return {name: {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32)} for name, shape in leaves.items()}


def specs_of(params, spec, base_specs, mesh=None, axes=None):
    abstract = jax.eval_shape(lambda p: jlora.adapt(p, spec, axes=axes), params)
    return jlora.shard.partition_specs(abstract, base_specs, mesh)


# Specs from equations -------------------------------------------------------------------------

MESH = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
RULES = [("kernel$", P("fsdp", "tensor"))]
TAKE = {"target": "kernel$"}


def named(method, shape=(16, 24), rules=RULES, mesh=MESH, axes=None):
    found = specs_of(shapes(query=shape), method, rules, mesh, axes)
    merged = {}
    for half in (found.trainable, found.frozen.factors):
        for factors in half.values():
            merged |= factors
    return merged


@pytest.mark.parametrize(
    "method,want",
    [
        (jlora.LoRA(rank=2, **TAKE), {"a": P(None, "fsdp"), "b": P(None, "tensor"), "s": P()}),
        (jlora.LoRAFA(rank=2, **TAKE), {"a": P(None, "fsdp"), "b": P(None, "tensor"), "s": P()}),
        (jlora.AdaLoRA(rank=2, **TAKE), {"p": P(None, "fsdp"), "lam": P(), "q": P(None, "tensor"), "s": P()}),
        (
            jlora.DoRA(jlora.LoRA(rank=2, **TAKE)),
            {"a": P(None, "fsdp"), "b": P(None, "tensor"), "m": P("tensor"), "n0": P("tensor"), "t": P(), "s": P()},
        ),
        (
            jlora.LoRA(rank=2, init="pissa", **TAKE),
            {"a": P(None, "fsdp"), "b": P(None, "tensor"), "a0": P(None, "fsdp"), "b0": P(None, "tensor"), "s": P()},
        ),
        (
            jlora.VeRA(rank=4, **TAKE),
            {"A": P(None, "fsdp"), "B": P(None, "tensor"), "d": P(), "b": P("tensor"), "s": P()},
        ),
        (jlora.Full(**TAKE), {"delta": P("fsdp", "tensor"), "s": P()}),
        (jlora.IA3(**TAKE), {"l": P("tensor"), "s": P()}),
        # 16 x 24 is (4 4) x (4 6): the slow letters are i and o
        (jlora.LoKr(rank=1, **TAKE), {"c": P("fsdp", "tensor"), "a": P(), "b": P(), "s": P()}),
        (jlora.KronA(**TAKE), {"a": P("fsdp", "tensor"), "b": P(), "s": P()}),
    ],
    ids=lambda x: x.describe() if isinstance(x, jlora.methods.Method) else "",
)
def test_specs_follow_the_equation(method, want):
    """A factor is cut where its letters are the weight's cut axes, and is whole in its rank and its scale."""
    assert named(method) == want


@pytest.mark.parametrize("row", METHODS, ids=lambda row: row.name)
def test_every_method_fits_a_mesh(row):
    """Specs in the structure of the Adapted, that divide what they cut."""
    struct = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    params = {"query": {"kernel": struct(2, 24, 24), "bias": struct(2, 24)}}  # square, for KronA's residual
    target = "bias" if row.on == "vectors" else "kernel"
    axes = {"kernel": "sio", "bias": "so"}
    adapted = jax.eval_shape(lambda p: jlora.adapt(p, row.spec(target), axes=axes), params)
    rules = [("kernel", P("data", "fsdp", "tensor")), ("bias", P("data", "tensor"))]
    places = jlora.shard.shardings(MESH, adapted, rules)
    assert jax.tree.structure(places) == jax.tree.structure(adapted)
    cut = jax.tree.map(lambda a, place: place.shard_shape(a.shape) != a.shape, adapted, places)
    assert any(jax.tree.leaves(cut.trainable))


def test_slow_letters_need_sizes_that_divide():
    """An axis is left whole where its mesh axis does not divide it, or where no mesh tells the sizes."""
    # 9 x 15 is (3 3) x (3 5)
    assert set(named(jlora.KronA(**TAKE), (9, 15)).values()) == {P()}
    assert named(jlora.KronA(**TAKE), (16, 24), mesh=None)["a"] == P()
    assert named(jlora.LoRA(rank=2, **TAKE), (9, 24))["a"] == P(), "nine rows are not cut in two"


def test_stack_axes_keep_their_place():
    """Factors have the stack first, wherever the kernel has it, and are cut there as the kernel is."""
    rules = [("kernel$", P("fsdp", "data", "tensor"))]
    found = named(jlora.LoRA(rank=2, **TAKE), (16, 4, 24), rules, axes={"kernel": "iso"})
    assert found == {"a": P("data", None, "fsdp"), "b": P("data", None, "tensor"), "s": P("data")}


def test_several_axes_a_side():
    """Of a side with several axes, a factor is cut as each of them is; a slow letter only as the slowest."""
    rules = [("kernel$", P("fsdp", "tensor"))]
    found = named(jlora.LoRA(rank=2, **TAKE), (16, 4, 6), rules, axes={"kernel": "ioo"})
    assert found == {"a": P(None, "fsdp"), "b": P(None, "tensor"), "s": P()}
    krona = named(jlora.KronA(**TAKE), (16, 4, 6), rules, axes={"kernel": "ioo"})
    assert krona == {"a": P("fsdp", "tensor"), "b": P(), "s": P()}
    inner = [("kernel$", P("fsdp", None, "tensor"))]  # the fast axis of the side: no run of rows
    assert named(jlora.KronA(**TAKE), (16, 4, 6), inner, axes={"kernel": "ioo"})["a"] == P("fsdp")


def test_shared_factors_are_sharded_where_their_weights_agree():
    """A shared factor is cut along a side that all its weights cut alike, and is whole along any other."""
    params = shapes(query=(16, 24), value=(16, 24))
    method = jlora.VeRA(rank=4, target="kernel$")
    agreed = specs_of(params, method, [("kernel$", P("fsdp", "tensor"))], MESH).frozen.factors
    split = specs_of(params, method, [("query", P("fsdp", "tensor")), ("value", P("fsdp"))], MESH).frozen.factors
    get = lambda tree, name: next(f[name] for f in tree.values() if name in f)
    assert (get(agreed, "A"), get(agreed, "B")) == (P(None, "fsdp"), P(None, "tensor"))
    assert (get(split, "A"), get(split, "B")) == (P(None, "fsdp"), P())


# Specs of the base ------------------------------------------------------------------------------


def test_every_form_of_base_specs():
    """A tree, a prefix of one, rules and a preset that mean the same give the same specs."""
    params = shapes(query=(16, 24), out=(24, 16))
    want = {"query": {"kernel": P("fsdp")}, "out": {"kernel": P(None, "fsdp")}}
    tree = {"query": {"kernel": P("fsdp", None)}, "out": P(None, "fsdp")}  # one above several leaves is for them all
    rules = [("query", P("fsdp")), ("out", P(None, "fsdp"))]
    for given in (want, tree, rules, "fsdp"):
        assert jlora.shard.partition_specs(params, given, MESH) == want
    both = jlora.shard.partition_specs(params, "fsdp+tensor", MESH)
    assert both == {"query": {"kernel": P("fsdp", "tensor")}, "out": {"kernel": P("tensor", "fsdp")}}
    assert jlora.shard.partition_specs(params, P(), MESH)["query"]["kernel"] == P()


def test_flax_metadata():
    """The partition specs that Linen and NNX keep with their parameters are taken as they are."""
    init = nn.with_partitioning(nn.initializers.lecun_normal(), ("fsdp", "tensor"))
    variables = nn.Dense(24, kernel_init=init, name="query").init(jax.random.key(0), jnp.ones((1, 16)))
    found = jlora.shard.partition_specs(variables, nn.get_partition_spec(variables), MESH)
    assert jax.tree.leaves(found) == [P(), P("fsdp", "tensor")]
    init = nnx.with_partitioning(nnx.initializers.lecun_normal(), ("fsdp", "tensor"))
    with jax.set_mesh(mesh_of((2, 2, 2), ("data", "fsdp", "tensor"))):
        model = nnx.eval_shape(lambda: nnx.Linear(16, 24, kernel_init=init, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    adapted = jax.eval_shape(lambda p: jlora.adapt(p, jlora.LoRA(rank=2, target="kernel")), state)
    found = jlora.shard.partition_specs(adapted, nnx.get_partition_spec(state), MESH)
    assert found.trainable["kernel"] == {"a": P(None, "fsdp"), "b": P(None, "tensor")}


def test_presets_know_heads_stacks_and_biases():
    """A preset cuts heads and not their width, leaves stacks and norms whole, and cuts biases over `tensor` alone."""
    sizes = {
        "embed/embedding": (64, 16),
        "layers/query/kernel": (3, 16, 4, 4),
        "layers/query/bias": (3, 4, 4),
        "layers/out/kernel": (3, 4, 4, 16),
        "layers/out/bias": (3, 16),
        "layers/norm/scale": (3, 16),
        "layers/up/bias": (3, 32),
        "layers/up/kernel": (3, 16, 32),
        "lm_head/kernel": (16, 64),
    }
    params = {}
    for path, shape in sizes.items():
        *parents, last = path.split("/")
        node = params
        for step in parents:
            node = node.setdefault(step, {})
        node[last] = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = jlora.shard.partition_specs(params, "fsdp+tensor", MESH)
    assert found == {
        "embed": {"embedding": P("tensor", "fsdp")},
        "layers": {
            "query": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
            "out": {"kernel": P(None, "tensor", None, "fsdp"), "bias": P()},
            "norm": {"scale": P()},
            "up": {"kernel": P(None, "fsdp", "tensor"), "bias": P(None, "tensor")},
        },
        "lm_head": {"kernel": P("fsdp", "tensor")},
    }


def test_unknown_leaves_are_printed_or_refused(capsys):
    """A leaf unknown to a preset is never replicated in silence, and half of the parameters not at all."""
    params = shapes(query=(64, 64), mystery=(4, 4))
    found = jlora.shard.partition_specs(params, "fsdp", MESH)
    assert found["mystery"]["kernel"] == P()
    assert "'fsdp' does not know mystery/kernel (4, 4): replicated" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"(?s)does not know 50.0 % .*mystery/kernel \(64, 64\).*write rules"):
        jlora.shard.partition_specs(shapes(query=(64, 64), mystery=(64, 64)), "fsdp", MESH)


@pytest.mark.parametrize(
    "given,words",
    [
        ("fspd", "the presets are 'fsdp', 'tensor'"),
        ([("qery", P("fsdp"))], "match no leaf.*nearest.*query/kernel"),
        ([("query", P("model"))], r"'query/kernel'.*names \['model'\], and the mesh has \['data', 'fsdp', 'tensor'\]"),
        ([("query", P(None, None, "fsdp"))], r"'query/kernel' of shape \(16, 24\).*more entries than axes"),
        ({"key": P()}, "says nothing of .*query/kernel.*write P"),
        ({"query": {"kernel": "fsdp"}}, "holds str at 'query/kernel'"),
        ([("query", "fsdp")], "'query/kernel': 'fsdp' is no PartitionSpec"),
        ([("query", None)], "'query/kernel': None is no PartitionSpec"),
        ([("query", P("fsdp", "fsdp"))], r"'query/kernel'.* \['fsdp'\] more than once"),
        ([("query", P(("fsdp", "tensor"), "tensor"))], r"'query/kernel'.* \['tensor'\] more than once"),
        ([("query", P(P.UNCONSTRAINED))], "'query/kernel'.*neither a mesh axis nor None"),
    ],
)
def test_specs_that_do_not_fit(given, words):
    """A wrong preset, pattern, mesh axis or entry is refused with the leaf it is for and what there is instead."""
    with pytest.raises(ValueError, match=f"(?s){words}"):
        jlora.shard.partition_specs(shapes(query=(16, 24)), given, MESH)


def test_arrays_on_no_mesh_are_named():
    """An adapter that lies on no mesh is told by path, with the call that places it."""
    adapted = jlora.adapt({"query": {"kernel": jnp.ones((4, 4))}}, jlora.LoRA(rank=2))
    with pytest.raises(ValueError, match=r"'query/kernel'.*are on no mesh; write .*jlora.shard.shardings"):
        jlora.shard.state_shardings(optax.adam(1e-3), adapted)
    with pytest.raises(TypeError, match="takes an Adapted, not a dict"):
        jlora.shard.state_shardings(optax.adam(1e-3), adapted.trainable)


@pytest.mark.parametrize(
    "given,words",
    [
        ({"clip": 0.0}, "clip=0.0.*above 0"),
        ({"clip": -1.0}, "clip=-1.0.*above 0"),
        ({"accumulate": 0}, "accumulate=0.*at least one"),
        ({"batch": "data"}, "batch='data'.*a PartitionSpec"),
        ({"batch": None}, "batch=None.*a PartitionSpec"),
        ({"mesh": ((4,), ("data",))}, "the adapter lives on Mesh.*'data': 8.*not on the mesh that was given, Mesh.*4"),
    ],
)
def test_steps_that_cannot_be(given, words):
    """A clip, an accumulation, a batch or a mesh that makes no step is refused when it is made, not when it runs."""
    mesh = mesh_of((8,), ("data",))
    whole = jax.eval_shape(lambda p: jlora.adapt(p, jlora.LoRA(rank=2)), shapes(query=(8, 8)))
    adapted = jlora.shard.abstract(mesh, whole, P())
    few = {"axis_types": (AxisType.Auto,), "devices": jax.devices()[:4]}
    other = jax.make_mesh(*given["mesh"], **few) if "mesh" in given else mesh
    options = {"batch": P("data"), **{k: v for k, v in given.items() if k != "mesh"}}
    with pytest.raises(ValueError, match=f"(?s){words}"):
        jlora.shard.train_step(lambda ad, x: 0.0, optax.adam(1e-3), other, adapted, **options)


# Training -----------------------------------------------------------------------------------------


def weights(*stack):
    draw = lambda seed, *shape: (np.random.default_rng(seed).standard_normal((*stack, *shape)) / 4).astype(np.float32)
    up = {"kernel": draw(1, WIDE, INNER), "bias": draw(2, INNER)}
    return {"up": up, "down": {"kernel": draw(3, INNER, WIDE), "bias": draw(4, WIDE)}}


def block(p, x, place):
    """Under explicit axes a model says where a sharded weight is used, and where a sum over devices lives."""
    whole, out = place
    h = jnp.tanh(x @ whole(p["up"]["kernel"], 1) + p["up"]["bias"])
    return x + jnp.einsum("btf,fd->btd", h, whole(p["down"]["kernel"], 0), **out) + p["down"]["bias"]


def model(scanned, place):
    if scanned:
        return lambda p, x: lax.scan(lambda x, layer: (block(layer, x, place), None), x, p["layers"])[0]
    return lambda p, x: functools.reduce(lambda x, n: block(p[f"layer_{n}"], x, place), range(LAYERS), x)


def params_of(scanned):
    if scanned:
        return {"layers": weights(LAYERS)}
    return {f"layer_{n}": jax.tree.map(lambda a, n=n: a[n], weights(LAYERS)) for n in range(LAYERS)}


AXES = {"layers/.*bias": "so"}
TRAINED = {
    "LoRA": jlora.LoRA(rank=2, target="kernel"),
    "DoRA": jlora.DoRA(jlora.LoRA(rank=2, target="kernel")),
    "AdaLoRA": jlora.AdaLoRA(rank=2, target="kernel"),
    "VeRA": jlora.VeRA(rank=8, target="kernel"),
    "LoKr": jlora.LoKr(rank=1, target="kernel"),
    "BitFit": jlora.BitFit(),
}
PLACES = {
    # name: (mesh shape, names, base specs, batch)
    "data8": ((8,), ("data",), P(), P("data")),
    "fsdp8": ((8,), ("fsdp",), "fsdp", P("fsdp")),
    "data4 tensor2": ((4, 2), ("data", "tensor"), "tensor", P("data")),
    "data2 fsdp2 tensor2": ((2, 2, 2), ("data", "fsdp", "tensor"), "fsdp+tensor", P(("data", "fsdp"))),
}
X = np.random.default_rng(0).standard_normal((ROWS, LENGTH, WIDE)).astype(np.float32)
Y = np.random.default_rng(1).standard_normal((ROWS, LENGTH, WIDE)).astype(np.float32)


def place_of(mesh, batch):
    """How the model speaks of a mesh: not at all where its axes are automatic."""
    if AxisType.Explicit not in mesh.axis_types:
        return (lambda w, cut: w), {}

    def whole(w, cut):
        if "fsdp" not in mesh.axis_names:
            return w
        axis = "tensor" if "tensor" in mesh.axis_names else None
        return jax.sharding.reshard(w, NamedSharding(mesh, P(*(axis if n == cut else None for n in range(2)))))

    return whole, {"out_sharding": NamedSharding(mesh, P(*batch, None, None))}


def train(method, scanned, mesh, base_specs, batch, place, **options):
    f = jlora.lift(model(scanned, place))
    axes = AXES if scanned and isinstance(method, jlora.BitFit) else None
    adapted = jlora.shard.init(params_of(scanned), method, mesh, base_specs, axes=axes)
    loss = lambda ad, xy: jnp.mean((f(ad, xy[0]) - xy[1]) ** 2)
    tx = optax.adamw(1e-3)
    step = jlora.shard.train_step(loss, tx, mesh, adapted, batch=batch, **options)
    trainable, frozen = jlora.split(adapted)
    state = jax.jit(tx.init, out_shardings=jlora.shard.state_shardings(tx, adapted))(trainable)
    xy = (X, Y)
    if n := options.get("accumulate"):
        xy = jax.tree.map(lambda a: a.reshape(n, ROWS // n, LENGTH, WIDE), xy)
    losses = []
    for _ in range(STEPS):
        trainable, state, metrics = step(trainable, state, frozen, xy)
        losses.append(float(metrics["loss"]))
    return losses, trainable


@functools.cache
def alone(method, scanned):
    mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:1])
    losses, trainable = train(TRAINED[method], scanned, mesh, P(), P("data"), place_of(mesh, P()))
    return losses, jax.tree.map(np.asarray, trainable)


def runs():
    """LoRA and DoRA everywhere; of any other method every form in every place, under one kind of axes and the other.

    Which kind is another for each method, form and place that follows: any two of the four meet.
    """
    quick = {("LoRA", False, "data2 fsdp2 tensor2", "Auto"), ("DoRA", True, "data4 tensor2", "Explicit")}
    for m, method in enumerate(TRAINED):
        for scanned in (False, True):
            for p, place in enumerate(PLACES):
                kinds = ("Auto", "Explicit")
                for kind in kinds if method in ("LoRA", "DoRA") else [kinds[(m + scanned + p) % 2]]:
                    row = (method, scanned, place, kind)
                    marks = () if row in quick else (pytest.mark.slow,)
                    name = f"{method}-{'scanned' if scanned else 'unrolled'}-{place}-{kind}"
                    yield pytest.param(*row, id=name.replace(" ", "_"), marks=marks)


@pytest.mark.parametrize("method,scanned,place,kind", list(runs()))
def test_training_gives_the_numbers_of_one_device(method, scanned, place, kind):
    """On any mesh, automatic or explicit, scanned or not, twenty steps have the losses and factors of one device."""
    shape, names, base_specs, batch = PLACES[place]
    mesh = mesh_of(shape, names, kind)
    losses, trainable = train(TRAINED[method], scanned, mesh, base_specs, batch, place_of(mesh, batch))
    want_losses, want = alone(method, scanned)
    assert losses[-1] < losses[0]
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(np.asarray(a), b, rtol=1e-5, atol=1e-5), trainable, want)


def test_accumulation_and_clipping():
    """Four microbatches are the batch, and a clip far above the norm changes nothing."""
    mesh = mesh_of((4, 2), ("data", "tensor"), "Explicit")
    place = place_of(mesh, P("data"))
    whole = train(TRAINED["LoRA"], False, mesh, "tensor", P("data"), place, clip=1e9)
    parts = train(TRAINED["LoRA"], False, mesh, "tensor", P("data"), place, accumulate=4)
    np.testing.assert_allclose(whole[0], parts[0], rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), whole[1], parts[1])


def test_the_clip_bounds_the_gradient():
    """A gradient above the clip is cut to it before the optimizer, and the norm that is told is the one before."""
    mesh = mesh_of((8,), ("data",))
    adapted = jlora.shard.init({"query": {"kernel": jnp.eye(4)}}, jlora.LoRA(rank=2), mesh, P())
    lifted = jlora.lift(lambda p, x: x @ p["query"]["kernel"])
    loss = lambda ad, x: 100 * jnp.mean(lifted(ad, x))
    step = jlora.shard.train_step(loss, optax.sgd(1.0), mesh, adapted, batch=P("data"), clip=0.5)
    before = jax.tree.map(np.asarray, adapted.trainable)
    after, _, metrics = step(adapted.trainable, optax.sgd(1.0).init(adapted.trainable), adapted.frozen, np.ones((8, 4)))
    moved = optax.global_norm(jax.tree.map(lambda a, b: np.asarray(a) - b, after, before))
    assert metrics["grad_norm"] > 0.5 and abs(float(moved) - 0.5) < 1e-5


def test_donated_buffers_are_freed_and_nothing_moves():
    """A step frees the factors and state it was given, keeps the frozen half, and leaves each array where it was."""
    mesh = mesh_of((2, 2, 2), ("data", "fsdp", "tensor"))
    adapted = jlora.shard.init(params_of(True), TRAINED["LoRA"], mesh, "fsdp+tensor")
    f = jlora.lift(model(True, place_of(mesh, P())))
    tx = optax.adamw(1e-3)
    step = jlora.shard.train_step(lambda ad, x: jnp.mean(f(ad, x) ** 2), tx, mesh, adapted, batch=P(("data", "fsdp")))
    trainable, frozen = jlora.split(adapted)
    places = jlora.shard.state_shardings(tx, adapted)
    state = jax.jit(tx.init, out_shardings=places)(trainable)
    first, live = (trainable, state), []
    for _ in range(3):
        trainable, state, _ = step(trainable, state, frozen, X)
        live.append(sum(a.nbytes for a in jax.live_arrays() if not a.is_deleted()))
    assert all(a.is_deleted() for a in jax.tree.leaves(first)) and live[1] == live[2]
    assert not any(a.is_deleted() for a in jax.tree.leaves(frozen))
    for a, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
        assert a.sharding.is_equivalent_to(place, a.ndim)


def equations(jaxpr):
    """All of a jaxpr, those inside others too."""
    for eqn in jaxpr.eqns:
        yield eqn
        for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from equations(inner)


@pytest.mark.parametrize("rows", [11, 1021])  # where s multiplies what is narrow, and where it comes last
def test_devices_add_gradients_in_float32(rows):
    """What a device sums over its rows is not rounded to bfloat16 before it is summed over devices."""
    adapted = jlora.adapt({"query": {"kernel": jnp.ones((WIDE, INNER), jnp.bfloat16)}}, jlora.LoRA(rank=2))
    f = jlora.lift(lambda p, x: x @ p["query"]["kernel"])
    loss = lambda t, frozen, x: jnp.sum(f(jlora.join(t, frozen), x))
    made = jax.make_jaxpr(jax.grad(loss))(*jlora.split(adapted), jnp.ones((rows, WIDE), jnp.bfloat16))
    dots = [e.outvars[0].aval for e in equations(made.jaxpr) if e.primitive.name == "dot_general"]
    dtypes = {a.dtype for a in dots if a.shape in ((2, WIDE), (2, INNER))}
    assert dtypes == {jnp.dtype(jnp.float32)}


# Bytes a device -----------------------------------------------------------------------------------


def on_a_device(tree, device):
    return sum(s.data.nbytes for a in jax.tree.leaves(tree) for s in a.addressable_shards if s.device == device)


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA", "LoKr"])
def test_bytes_a_device_are_those_of_the_estimate(method, place):
    """Every device holds the bytes that were foretold, to the byte, and a share of the base where it is cut."""
    shape, names, base_specs, batch = PLACES[place]
    mesh = mesh_of(shape, names)
    tx = optax.adamw(1e-3)
    adapted = jlora.shard.init(params_of(True), TRAINED[method], mesh, base_specs)
    state = jax.jit(tx.init, out_shardings=jlora.shard.state_shardings(tx, adapted))(adapted.trainable)
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params_of(True)))
    guess = jlora.shard.estimate(shapes, TRAINED[method], AbstractMesh(shape, names), base_specs, batch=batch, tx=tx)
    for device in jax.devices():
        held = [on_a_device(t, device) for t in (adapted.frozen.base, adapted.frozen.factors, adapted.trainable, state)]
        assert held == [guess.base, guess.factors, guess.trainable, guess.optimizer]
    if place != "data8":
        whole = sum(a.nbytes for a in jax.tree.leaves(adapted.frozen.base))
        assert guess.base < whole / (1.8 if "2" in place and "8" not in place else 6), "replication is no sharding"


# Starting -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("method", ["LoRA", "DoRA", "VeRA"])
def test_values_do_not_depend_on_the_mesh(method):
    """The same keys give the same base and factors on every mesh: no draw depends on how it is cut."""
    make = lambda: jax.tree.map(lambda a: jax.random.normal(jax.random.key(a.size), a.shape), params_of(False))
    mesh = jax.make_mesh((1,), ("data",), devices=jax.devices()[:1])
    want = jlora.shard.init(make, TRAINED[method], mesh, P())
    for shape, names, base_specs, _ in PLACES.values():
        for kind in ("Auto", "Explicit"):
            got = jlora.shard.init(make, TRAINED[method], mesh_of(shape, names, kind), base_specs)
            assert jax.tree.structure(got) == jax.tree.structure(want)
            exact = np.testing.assert_array_equal if method != "DoRA" else functools.partial(
                np.testing.assert_allclose, rtol=1e-6)  # norms are sums over devices  # fmt: skip
            jax.tree.map(lambda a, b, same=exact: same(np.asarray(a), np.asarray(b)), got, want)


def test_a_start_that_decomposes_the_weight():
    """PiSSA of a sharded weight is that of one device, with its factors cut and the base where it lay, uncopied."""
    mesh = mesh_of((2, 2, 2), ("data", "fsdp", "tensor"), "Explicit")
    method = jlora.LoRA(rank=2, init="pissa", target="kernel")
    there = jax.device_put(params_of(False), jlora.shard.shardings(mesh, params_of(False), "fsdp+tensor"))
    want = jlora.adapt(params_of(False), method)
    with jax.set_mesh(mesh):
        inside = jlora.shard.init(there, method, mesh, "fsdp+tensor")
    for got in (inside, jlora.shard.init(there, method, mesh, "fsdp+tensor")):
        a, b = (
            np.asarray(ad.trainable["layer_0/up/kernel"]["a"]).T @ np.asarray(ad.trainable["layer_0/up/kernel"]["b"])
            for ad in (got, want)
        )
        np.testing.assert_allclose(a, b, atol=1e-5)
        assert got.frozen.factors["layer_0/up/kernel"]["a0"].sharding.spec == P(None, "fsdp")
        held = (ad["layer_0"]["up"]["kernel"].addressable_shards for ad in (got.frozen.base, there))
        assert all(a.data.unsafe_buffer_pointer() == b.data.unsafe_buffer_pointer() for a, b in zip(*held, strict=True))


def test_values_are_those_of_adapt():
    """Bit for bit: what a compiler may do to a constant factor, it does not do to a start."""
    params, method = params_of(False), jlora.LoRA(rank=2, init="gaussian", target="up/kernel")
    want, got = jlora.adapt(params, method), jlora.shard.init(params, method, mesh_of((8,), ("fsdp",)), "fsdp")
    jax.tree.map(np.testing.assert_array_equal, got.trainable, want.trainable)


def test_what_init_refuses():
    """Shapes without values and one array under two paths are refused before anything is placed."""
    mesh = mesh_of((8,), ("data",))
    with pytest.raises(ValueError, match="'query'.*has no values"):
        jlora.shard.init(shapes(query=(4, 4)), jlora.LoRA(rank=2), mesh, P())
    tied = jnp.ones((8, 8))
    with pytest.raises(ValueError, match="one array"):
        params = {"query": {"kernel": tied}, "key": {"kernel": tied}}
        jlora.shard.init(params, jlora.LoRA(rank=2, target="query"), mesh, P())


def test_orbax_across_meshes(tmp_path):
    """A base and a training checkpoint, written from one mesh and read into the shards of another."""
    first = mesh_of((8,), ("fsdp",))
    tx = optax.adamw(1e-3)
    adapted = jlora.shard.init(params_of(True), TRAINED["DoRA"], first, "fsdp")
    state = jax.jit(tx.init, out_shardings=jlora.shard.state_shardings(tx, adapted))(adapted.trainable)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "base", adapted.frozen.base)
        checkpointer.save(tmp_path / "step", {"trainable": adapted.trainable, "opt_state": state})
    other = mesh_of((4, 2), ("data", "tensor"), "Explicit")
    shapes = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, params_of(True)))
    with ocp.StandardCheckpointer() as checkpointer:
        base = checkpointer.restore(tmp_path / "base", jlora.shard.abstract(other, shapes, "tensor"))
        again = jlora.shard.init(base, TRAINED["DoRA"], other, "tensor")
        places = jlora.shard.state_shardings(tx, again)
        fresh = jax.jit(tx.init, out_shardings=places)(again.trainable)
        step = checkpointer.restore(tmp_path / "step", {"trainable": again.trainable, "opt_state": fresh})
    assert base["layers"]["up"]["kernel"].sharding.spec == P(None, None, "tensor")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), base, adapted.frozen.base)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b), step["trainable"], adapted.trainable)
    assert step["trainable"]["layers/up/kernel"]["b"].sharding.spec == P(None, None, "tensor")
    assert step["opt_state"][0].mu["layers/up/kernel"]["b"].sharding.spec == P(None, None, "tensor")


# Compiled programs ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def programs():
    """Compiled in a process of its own, with XLA's optimisers on."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "shard_programs.py"],
        cwd=here, env=os.environ | {"PYTHONPATH": str(here.parent)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def total(sent, kind):
    return sum(size * times for k, _, size, times in sent if k == kind)


def gathered(sent, weight):
    return total([row for row in sent if (row[1] == WEIGHT) == weight], "all-gather")


def guessed(found, kind, what, over=None):
    return sum(n for k, w, o, n in found["guess"] if k in kind and what in w and over in (None, o))


REDUCED = ("all-reduce", "reduce-scatter")
WEIGHT, LAYERS_OF_PROGRAMS = 48 * 80, 3  # of the programs' models


@pytest.mark.slow
@pytest.mark.parametrize("model", ["unrolled", "scanned"])
class TestPrograms:
    def test_data_parallel_sends_gradients_of_the_adapter_alone(self, programs, model):
        """Data parallelism adds up the gradients of the factors and a few scalars: nothing of the base is sent."""
        found = programs[f"{model} data"]
        assert {kind for kind, *_ in found["sent"]} == {"all-reduce"}
        gradients = 4 * found["trainable"]
        assert gradients <= total(found["sent"], "all-reduce") <= gradients + 64

    def test_tensor_parallel_gathers_nothing(self, programs, model):
        """Beside sums there is no traffic: no weight, factor or activation is gathered for the adapter."""
        for place in ("tensor", "tensor, long"):
            assert {kind for kind, *_ in programs[f"{model} {place}"]["sent"]} == {"all-reduce"}

    def test_fsdp_gathers_each_weight_as_often_as_the_plain_model(self, programs, model):
        """The adapter costs no further gathering of any weight, short batch or long."""
        gathered = lambda sent: sum(times for kind, n, _, times in sent if kind == "all-gather" and n == WEIGHT)
        for place in ("fsdp", "fsdp, long"):
            found = programs[f"{model} {place}"]
            assert gathered(found["sent"]) == gathered(found["with x"]) == gathered(found["plain"]) > 0

    def test_batch_and_sequence_sharded_move_no_activation(self, programs, model):
        """Over rows and positions what is sent is sums no larger than the gradients of the factors."""
        for place in ("sequence", "sequence, long"):
            found = programs[f"{model} {place}"]
            assert {kind for kind, *_ in found["sent"]} == {"all-reduce"}
            assert total(found["sent"], "all-reduce") <= guessed(found, REDUCED, "factor gradients") + 64

    @pytest.mark.parametrize("place", ["data", "tensor", "fsdp", "sequence", "groups"])
    @pytest.mark.parametrize("long", ["", ", long"])
    def test_the_estimate_is_what_is_held_and_sent(self, programs, model, place, long):
        """Every array counted; beside them scalars: the loss, and a norm for each factor that is cut."""
        found = programs[f"{model} {place}{long}"]
        assert found["arguments"] == found["held"]
        again = 2 if model == "unrolled" else 1  # unrolled, XLA keeps what it gathered
        assert again * gathered(found["with x"], True) == guessed(found, "all-gather", "base weights")
        assert again * gathered(found["with x"], False) == guessed(found, "all-gather", "factors")
        # without a reduce-scatter, the CPU backend adds over all devices at once: no share is left to be added
        shares = guessed(found, REDUCED, "factor gradients", ["data"]) if place == "groups" else 0
        assert total(found["with x"], "all-reduce") == guessed(found, REDUCED, "") - shares
        assert (shares > 0) == (place == "groups")
        scalars = [row for row in found["sent"] if row[1] == 1]
        assert total(scalars, "all-reduce") <= 64


@pytest.mark.slow
@pytest.mark.parametrize("place", ["data", "tensor", "fsdp"])
def test_no_temporary_of_the_size_of_the_base(programs, place):
    """A scanned step makes no array as large as all its weights. (Unrolled, XLA keeps them, in the plain model too.)"""
    assert programs[f"scanned {place}"]["temporary"] < 4 * 2 * 3 * WEIGHT


@pytest.mark.slow
@pytest.mark.parametrize("method", ["DoRA", "AdaLoRA", "VeRA", "LoKr", "LoHa", "Full"])
def test_what_other_methods_send(programs, method):
    """Each method adds up gradients of its factors, VeRA those of its products, and gathers no further weight."""
    data, fsdp = programs[f"{method} data"], programs[f"{method} fsdp, long"]
    assert {kind for kind, *_ in data["sent"]} == {"all-reduce"}
    gradients, found = 4 * data["trainable"], total(data["sent"], "all-reduce")
    if method == "VeRA":  # at most those of the two products that its factors make, which are a LoRA of its rank
        assert gradients < found <= 4 * LAYERS_OF_PROGRAMS * 2 * 8 * (48 + 80) + 64
    else:  # AdaLoRA's gates are summed where their product's gradient is
        assert abs(found - gradients) <= 64
    assert gathered(fsdp["sent"], True) == gathered(fsdp["plain"], True) > 0
    joined = 4 * 2 * LAYERS_OF_PROGRAMS * 48 if method == "VeRA" else 0  # its b meets B where both are cut
    assert gathered(fsdp["sent"], False) == guessed(fsdp, "all-gather", "factors") - joined


@pytest.mark.slow
def test_shares_are_added_over_groups(programs):
    """Of LoHa's products the CPU backend adds what a group has, and then the shares of the groups."""
    found = programs["LoHa groups"]
    assert guessed(found, REDUCED, "factor gradients", ["data"]) > 0
    assert total(found["with x"], "all-reduce") == guessed(found, REDUCED, "factor gradients")


@pytest.mark.parametrize("program", tpu_programs.PROGRAMS, ids=lambda x: str(x).replace(" ", ""))
def test_the_estimate_is_what_a_tpu_sends(program):
    """Programs that libtpu compiled, read into a golden file: shares over groups, and bfloat16."""
    method, dtype, shape, _ = program
    sent = json.loads(tpu_programs.GOLDEN.read_text())[" ".join(map(str, program))]
    mesh, params = AbstractMesh(shape, tpu_programs.AXES), tpu_programs.params(dtype)
    options = {"batch": P(tpu_programs.AXES), "activations": dtype}
    guess = jlora.shard.estimate(params, tpu_programs.METHODS[method], mesh, "fsdp", **options)
    rows = [hlo.Sent(kind, dtype, tuple(shape), times) for kind, dtype, shape, times in sent]
    reduced = [s for s in rows if s.kind in REDUCED and s.shape]
    assert sum(s.bytes for s in reduced) == guess.sent("", "factor gradients")
    is_weight = lambda s: s.elements == tpu_programs.WIDE * tpu_programs.INNER
    gathers = [
        s for s in rows if s.kind == "all-gather" and s.dtype != "s32"
    ]  # the tokens are gathered to be looked up
    weights, factors = ([s for s in gathers if is_weight(s) == whole] for whole in (True, False))
    # a TPU multiplies float32 in bfloat16 unless told otherwise, and sends it so
    assert sum(s.elements * s.times for s in weights) * jnp.dtype(dtype).itemsize == guess.sent("all-gather", "base")
    want = guess.sent("all-gather", "factors")
    if dtype == "bfloat16" and want:  # of the four, one in two layouts
        assert {s.dtype for s in factors} == {"bf16"}
        want += want // 4
    assert sum(s.bytes for s in factors) == want


HLO = """HloModule m

%add (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %sum = f32[] add(%x, %y)
}

%all-reduce-scatter.1 (input: f32[16,8]) -> f32[16,2] {
  %input = f32[16,8]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[16,8]{1,0:T(8,128)} all-reduce(%input), channel_id=1, to_apply=%add
  ROOT %slice = f32[16,2]{1,0} dynamic-slice(%all-reduce.1), dynamic_slice_sizes={16,2}
}

%condition (c: (s32[], f32[16,8])) -> pred[] {
  %c = (s32[], f32[16,8]{1,0}) parameter(0)
  %n = s32[] get-tuple-element(%c), index=0
  %limit = s32[]{:T(128)} constant(32)
  ROOT %less = pred[] compare(%n, %limit), direction=LT
}

%body (b: (s32[], f32[16,8])) -> (s32[], f32[16,8]) {
  %b = (s32[], f32[16,8]{1,0}) parameter(0)
  %w = f32[16,8]{1,0} get-tuple-element(%b), index=1
  %fusion = f32[16,2]{1,0} fusion(%w), kind=kCustom, calls=%all-reduce-scatter.1
  %start = (f32[4,8]{1,0}, bf16[2,2]{1,0}, f32[16,8]{1,0}, bf16[8,2]{1,0}) all-gather-start(%p, %q), dimensions={0}
  %wide = f32[16,8]{1,0} dot(%w, %h), lhs_contracting_dims={1}
  ROOT %out = (s32[], f32[16,8]{1,0}) tuple(%n, %wide)
}

ENTRY %main (p: f32[16,8], h: bf16[8,8]) -> f32[] {
  %p = f32[16,8]{1,0} parameter(0)
  %h = bf16[8,8]{1,0} parameter(1)
  %near = bf16[8,8]{1,0:T(8,128)(2,1)S(1)} copy(%h)
  %loop = (s32[], f32[16,8]{1,0}) while(%t), condition=%condition, body=%body
  %rs = f32[2,8]{1,0} reduce-scatter(%p), replica_groups={{0,1,2,3,4,5,6,7}}, dimensions={0}, to_apply=%add
  ROOT %all = (f32[], /*index=1*/f32[3]{0}) all-reduce(%u, %v), to_apply=%add
}
"""


def test_reading_a_program():
    """Trip counts, tuples, asynchronous gathers, and the TPU's way to write a reduce-scatter."""
    assert hlo.sent(HLO) == [
        ("all-gather", "bf16", (8, 2), 32),
        ("all-gather", "f32", (16, 8), 32),
        ("all-reduce", "f32", (), 1),
        ("all-reduce", "f32", (3,), 1),
        ("reduce-scatter", "f32", (8, 2, 8), 1),
        ("reduce-scatter", "f32", (16, 8), 32),
    ]
    assert [s.bytes for s in hlo.sent(HLO)] == [32 * 32, 32 * 512, 4, 12, 512, 32 * 512]
    assert hlo.dots(HLO) == [("f32", "bf16")]
    made = hlo.made(HLO)
    assert ("bf16", (8, 8)) not in made, "it lies in the fast memory"
    assert made["f32", (16, 8)] == 1 and made["f32", (2, 8)] == 1


@pytest.mark.slow
def test_the_estimate_of_layers_that_are_cut_apart():
    """The stack axis is cut over the batch's mesh axis: each factor's stack is gathered, as its weight's is."""
    params = {"layers": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((8, 64, 64)) / 8, jnp.float32)}}
    spec, rules, mesh = jlora.LoRA(rank=4, target="kernel"), [("kernel", P("fsdp"))], mesh_of((8,), ("fsdp",))
    adapted = jlora.shard.init(params, spec, mesh, rules)
    lifted = jlora.lift(lambda p, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, p["layers"]["kernel"])[0])
    tx = optax.sgd(1.0)
    step = jlora.shard.train_step(lambda a, x: jnp.mean(lifted(a, x) ** 2), tx, mesh, adapted, batch=P("fsdp"))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))
    text = step.lower(adapted.trainable, tx.init(adapted.trainable), adapted.frozen, x).compile().as_text()
    sent = [one for one in hlo.sent(text) if one.kind == "all-gather" and one.elements == 8 * 4 * 64]
    guess = jlora.shard.estimate(params, spec, mesh, rules, batch=P("fsdp"), activations=jnp.float32)
    assert sum(one.bytes for one in sent) == guess.sent("all-gather", "factors") == 32768


def test_a_step_with_the_state_of_a_whole_adapter():
    """It is told what the state is of; JAX alone would print two structures."""
    mesh = jax.make_mesh((1,), ("data",))
    adapted = jlora.shard.init(lambda: {"query": {"kernel": jnp.eye(4)}}, jlora.LoRA(rank=2), mesh, P())
    apply = jlora.lift(lambda params, x: x @ params["query"]["kernel"])
    loss = lambda adapted, x: jnp.mean((apply(adapted, x) - 1) ** 2)
    step = jlora.shard.train_step(loss, optax.adam(1e-2), mesh, adapted, batch=P("data"))
    with pytest.raises(ValueError, match="train_step: the optimizer's state holds the frozen half"):
        step(adapted.trainable, optax.adam(1e-2).init(adapted), adapted.frozen, jnp.ones((3, 4)))
