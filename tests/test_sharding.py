"""Eight devices: the same numbers on any mesh, inside `shard_map` and named axes, and no needless communication."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import network
from jlora._algebra._mesh import reshaped
from jlora.methods.hra import RowsOfW0
from methods import ADDED, CASES, CHOSEN, METHODS, assert_close, away_from_start, cotangents, each_row

WIDE, INNER, HEADS, WORDS, LAYERS = 16, 24, 4, 32, 2


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape) / math.sqrt(shape[-2]), jnp.float32)


def mesh_of(kind, shape=(4, 2), names=("data", "model")):
    return jax.make_mesh(shape, names, axis_types=(getattr(AxisType, kind),) * len(shape))


def place(mesh, tree, specs):
    return jax.tree.map(lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)), tree, specs)


# Models, each with the sharding of its weights ---------------------------------------------
#
# Where a contracted axis is sharded, an explicit mesh wants to be told where the product lives; an automatic one
# does not mind.


def out_of(mesh, *axes):
    explicit = mesh is not None and AxisType.Explicit in mesh.axis_types
    return {"out_sharding": NamedSharding(mesh, P(*axes))} if explicit else {}


def mlp(p, x, mesh=None):
    h = jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    return jnp.einsum("bti,io->bto", h, p["down"]["kernel"], **out_of(mesh, "data", None, None))


def attention(p, x, mesh=None):
    query, value = (jnp.einsum("btd,dhk->bthk", x, p[name]["kernel"]) for name in ("query", "value"))
    h = jnp.tanh(query) * value
    return jnp.einsum("bthk,hkd->btd", h, p["out"]["kernel"], **out_of(mesh, "data", None, None))


def tied(p, ids, mesh=None):
    table = p["embed"]["embedding"]
    x = table.at[ids].get(**out_of(mesh, "data", None, None))
    return jnp.einsum("btd,vd->btv", jnp.tanh(x), table, **out_of(mesh, "data", None, None))


def layers(p, x, mesh=None):
    def step(x, layer):
        h = jnp.tanh(x @ layer["up"]["kernel"] + layer["up"]["bias"])
        return x + jnp.einsum("bti,io->bto", h, layer["down"]["kernel"], **out_of(mesh, "data", None, None)), None

    return lax.scan(step, x, p)[0]


def remat_layers(p, x, mesh=None):
    step = jax.checkpoint(lambda x, layer: (layers(jax.tree.map(lambda a: a[None], layer), x, mesh), None))
    return lax.scan(step, x, p)[0]


def experts(p, x, mesh=None):
    """One expert a device of the second axis."""
    x = jnp.moveaxis(x.reshape(*x.shape[:2], 2, WIDE // 2), 2, 0)
    if mesh is not None and AxisType.Explicit in mesh.axis_types:
        x = jax.sharding.reshard(x, NamedSharding(mesh, P("model", "data", None, None)))
    return jnp.einsum("ebti,eio->ebto", x, p["kernel"])


def convolution(p, x, mesh=None):
    x = x.reshape(x.shape[0], 4, 4, -1)
    return lax.conv_general_dilated(x, p["conv"]["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


def weights(*stack):
    up = {"kernel": normal(1, *stack, WIDE, INNER), "bias": normal(2, *stack, 1, INNER)[..., 0, :]}
    return {"up": up, "down": {"kernel": normal(3, *stack, INNER, WIDE)}}


def specs(*stack):
    up = {"kernel": P(*stack, None, "model"), "bias": P(*stack, "model")}
    return {"up": up, "down": {"kernel": P(*stack, "model", None)}}


X = normal(9, 8, 6, WIDE)
IDS = jnp.asarray(np.random.default_rng(9).integers(WORDS, size=(8, 6)), jnp.int32)
HEAD_AXES = {"(query|value)/kernel": "ioo", "out/kernel": "iio"}
MODELS = {
    # name: (function, parameters, their specs, input, axes)
    "mlp": (mlp, weights(), specs(), X, {}),
    "attention": (
        attention,
        {n: {"kernel": normal(4, *s)} for n, s in
         {"query": (WIDE, HEADS, 6), "value": (WIDE, HEADS, 6), "out": (HEADS, 6, WIDE)}.items()},
        {n: {"kernel": s} for n, s in
         {"query": P(None, "model"), "value": P(None, "model"), "out": P("model")}.items()},
        X, HEAD_AXES,
    ),
    "tied": (tied, {"embed": {"embedding": normal(5, WORDS, WIDE)}}, {"embed": {"embedding": P()}}, IDS, {}),
    "layers": (layers, weights(LAYERS), specs(None), X, {"kernel": "sio", "bias": "so"}),
    "remat_layers": (remat_layers, weights(LAYERS), specs(None), X, {"kernel": "sio", "bias": "so"}),
    "experts": (experts, {"kernel": normal(6, 2, WIDE // 2, 10)}, {"kernel": P("model")}, X, {"kernel": "sio"}),
    "convolution": (convolution, {"conv": {"kernel": normal(7, 3, 3, WIDE // 8, 10)}}, {"conv": {"kernel": P()}},
                    normal(8, 8, 16, WIDE // 8), {}),
}  # fmt: skip


def leaves(name):
    """The kernels of a model as a method sees them."""
    _, params, _, _, axes = MODELS[name]
    whole = dict(axes) | {".": "io"}
    for path, kernel in jax.tree_util.tree_leaves_with_path(params):
        path = jax.tree_util.keystr(path, simple=True, separator="/")
        if kernel.ndim > 1:
            roles = next(letters for pattern, letters in whole.items() if re.search(pattern, path))
            yield network.Leaf(path, kernel.shape, kernel.dtype, roles)


def on_heads(row):
    """Whether the method reads the several axes of attention's kernels as one, cut into letters of its own."""
    if row.on == "vectors" or not all(map(row.fits, leaves("attention"))):
        return False
    bound = [bound for leaf in leaves("attention") for bound in row.spec("kernel").recipe(leaf).bound(leaf)]
    return any(len(made) > 1 for b in bound for _, made in b.blocks)


# An adapter behind a layer, of a weight that a mesh cuts.
BEHIND = next(row for row in ADDED if row.name == "houlsby")


def rows():
    for row in (*METHODS, BEHIND):
        for name, (_, params, *_) in MODELS.items():
            has_bias = "up" in params
            if row.everywhere or name == "mlp" and all(map(row.fits, leaves(name))):
                kinds = ("Auto", "Explicit")
            elif name == "attention" and on_heads(row):
                kinds = ("Explicit",)
            else:
                continue
            if row.on != "vectors" or has_bias:
                for kind in kinds:
                    slow = row is not METHODS[0] and (row.name not in CHOSEN or (name, kind) != ("mlp", "Explicit"))
                    marks = (pytest.mark.slow,) if slow else ()
                    yield pytest.param(row, name, kind, id=f"{row.name}-{name}-{kind}", marks=marks)


def setting(row, name):
    f, params, places, x, axes = MODELS[name]
    target = "bias" if row.on == "vectors" else "kernel|embedding"
    ad = jlora.adapt(params, row.spec(target), axes={k: v for k, v in axes.items() if k != "bias" or "up" in params})
    return f, away_from_start(ad.trainable), ad.frozen, places, x


def run(f, trainable, frozen, x, **options):
    """Outputs and gradients of the lifted model, under `jit`."""
    lifted = jlora.lift(f, **options)

    @jax.jit
    def both(trainable, frozen, x, c):
        y, pull = jax.vjp(lambda t: lifted(jlora.join(t, frozen), x), trainable)
        if AxisType.Explicit in jax.typeof(y).sharding.mesh.axis_types:
            c = jax.sharding.reshard(c, jax.typeof(y).sharding)
        return y, pull(c)[0]

    (c,) = cotangents([jax.eval_shape(lambda: lifted(jlora.join(trainable, frozen), x))])
    return both, c


@pytest.mark.parametrize("row,name,kind", list(rows()))
def test_same_numbers_on_a_mesh(row, name, kind):
    """Batch over four devices, weights over two; the factors replicated."""
    f, trainable, frozen, places, x = setting(row, name)
    both, c = run(f, trainable, frozen, x)
    want = both(trainable, frozen, x, c)
    mesh = mesh_of(kind)
    with jax.set_mesh(mesh):
        base = place(mesh, frozen.base, places)
        everywhere = lambda tree: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P())), tree)
        sharded = jlora.Frozen(base, everywhere(frozen.factors), None, frozen.plan)
        x, c = (jax.device_put(a, NamedSharding(mesh, P("data"))) if a.shape[0] == 8 else a for a in (x, c))
        on_mesh = lambda p, x: f(p, x, mesh)
        lifted = jlora.lift(on_mesh)

        @jax.jit
        def both(trainable, frozen, x, c):
            y, pull = jax.vjp(lambda t: lifted(jlora.join(t, frozen), x), trainable)
            if kind == "Explicit":
                c = jax.sharding.reshard(c, jax.typeof(y).sharding)
            return y, pull(c)[0]

        y, grads = both(everywhere(trainable), sharded, x, c)
        if kind == "Explicit":  # gradients live where the factors live
            assert all(g.sharding.is_fully_replicated for g in jax.tree.leaves(grads))
    assert_close((y, grads), want)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in ADDED if row is not BEHIND])
def test_blocks_and_tokens_on_a_mesh(row):
    """Modules beside blocks, prompts and new tokens on weights that a mesh cuts: the numbers of one device."""
    case = CASES[row.models[0]]
    f, params, (x,) = case.build()
    x = jnp.concatenate([x, x])  # four examples, as many as devices
    start = jlora.adapt(params, row.spec(case.target), axes=dict(case.axes or {}))
    trainable = away_from_start(start.trainable)
    lifted = jlora.lift(f)

    @jax.jit
    def both(trainable, frozen, x, c):
        y, pull = jax.vjp(lambda t: lifted(jlora.join(t, frozen), x), trainable)
        return y, pull(c)[0]

    c = cotangents([f(params, x)])[0]
    want = both(trainable, start.frozen, x, c)
    mesh = mesh_of("Auto")  # under explicit axes the models themselves would have to say where their lookups go
    stack = (None,) * any("s" in letters for letters in (case.axes or {}).values())
    rules = [("(query|key|value|up)/kernel|embedding", P(*stack, None, "model"))]
    rules += [("(out|down)/kernel", P(*stack, "model", None)), (".", P())]
    with jax.set_mesh(mesh):
        held = jlora.shard.init(params, row.spec(case.target), mesh, rules, axes=dict(case.axes or {}))
        put = jax.tree.map(lambda a, like: jax.device_put(a, like.sharding), trainable, held.trainable)
        x, c = (jax.device_put(a, NamedSharding(mesh, P("data"))) for a in (x, c))
        assert_close(both(put, held.frozen, x, c), want, 2e-5)


@pytest.mark.parametrize("name", ["mlp", "attention", "tied", "layers", "convolution"])
def test_lift_does_not_change_where_outputs_live(name):
    """Under an explicit mesh the type says it: lifted and plain have one type."""
    f, trainable, frozen, places, x = setting(METHODS[0], name)
    mesh = mesh_of("Explicit")
    with jax.set_mesh(mesh):
        base = place(mesh, frozen.base, places)
        x = jax.device_put(x, NamedSharding(mesh, P("data")))
        ad = jlora.Adapted(trainable, jlora.Frozen(base, frozen.factors, None, frozen.plan))
        plain = jax.eval_shape(lambda p, x: f(p, x, mesh), base, x)
        lifted = jax.eval_shape(jlora.lift(lambda p, x: f(p, x, mesh)), ad, x)
        assert (plain.shape, plain.dtype, plain.sharding) == (lifted.shape, lifted.dtype, lifted.sharding)


@pytest.mark.parametrize(
    "old,new",
    [((2, 4, 6), (48,)), ((48,), (2, 4, 6)), ((4, 2, 6, 5), (48, 5)), ((8, 6), (2, 4, 3, 2)), ((6, 8), (8, 6))],
)
def test_a_reshape_under_explicit_axes_moves_no_number(old, new):
    """Whatever axes are joined or split, and whichever of them is cut."""
    mesh = mesh_of("Explicit")
    a = np.arange(np.prod(old), dtype=np.float32).reshape(old)
    for n in (n for n, size in enumerate(old) if size % 4 == 0):
        cut = jax.device_put(a, NamedSharding(mesh, P(*[None] * n, "data")))
        with jax.set_mesh(mesh):
            made = jax.jit(lambda a: reshaped(a, new))(cut)
        np.testing.assert_array_equal(made, a.reshape(new))


def test_reflected_rows_live_where_the_outputs_do():
    """What HRA makes of W0, rank by outputs, is cut over devices as W0's outputs are."""
    mesh = mesh_of("Explicit")
    leaf = network.Leaf("", (WIDE, INNER), jnp.float32, "io")
    u, w0 = normal(1, 4, WIDE), jax.device_put(normal(2, WIDE, INNER), NamedSharding(mesh, P(None, "model")))
    with jax.set_mesh(mesh):
        made = jax.jit(RowsOfW0(leaf))(jax.device_put(u, NamedSharding(mesh, P())), w0)
    assert made.sharding.spec == P(None, "model")
    np.testing.assert_allclose(made, RowsOfW0(leaf)(u, jnp.asarray(np.asarray(w0))), rtol=1e-4, atol=1e-5)


# Inside shard_map and named axes ------------------------------------------------------------


@pytest.mark.parametrize("check", [True, False], ids=["checked", "unchecked"])
@pytest.mark.parametrize(
    "row,name",
    [pytest.param(METHODS[0], name, id=name) for name in MODELS]
    + [
        pytest.param(row, "mlp", id=row.name, marks=pytest.mark.slow)
        for row in METHODS[1:]
        if row.name in CHOSEN and row.on != "vectors"
    ],
)
def test_inside_shard_map(row, name, check):
    """Each device has some rows of the batch and the whole adapter; gradients are summed by `shard_map` itself."""
    f, trainable, frozen, _, x = setting(row, name)
    both, c = run(f, trainable, frozen, x)
    want = both(trainable, frozen, x, c)
    mesh = mesh_of("Auto", (8,), ("data",))
    rows = P(None, "data") if name == "experts" else P("data")
    lifted = jlora.lift(f)
    local = lambda t, frozen, x: lifted(jlora.join(t, frozen), x)
    places = (P(), P(), P("data"))
    split = jax.shard_map(local, mesh=mesh, in_specs=places, out_specs=rows, check_vma=check)

    @jax.jit
    def both(trainable, frozen, x, c):
        y, pull = jax.vjp(lambda t: split(t, frozen, x), trainable)
        return y, pull(c)[0]

    assert_close(both(trainable, frozen, x, c), want)


def test_gradients_inside_shard_map():
    """`grad` and `psum` written inside, as data-parallel loops do."""
    f, trainable, frozen, _, x = setting(METHODS[0], "mlp")
    lifted = jlora.lift(f)
    loss = lambda t, x: jnp.square(lifted(jlora.join(t, frozen), x)).sum()
    want = jax.jit(jax.grad(loss))(trainable, x)

    def local(t, x):
        t = jax.tree.map(lambda a: lax.pcast(a, "data", to="varying"), t)
        return lax.psum(jax.grad(loss)(t, x), "data")

    mesh = mesh_of("Auto", (8,), ("data",))
    got = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(P(), P("data")), out_specs=P()))(trainable, x)
    assert_close(got, want)


def test_an_adapter_a_device():
    """The stacked factors of eight adapters, one to a device."""
    f, trainable, frozen, _, x = setting(METHODS[0], "mlp")
    stacked = jax.tree.map(lambda a: jnp.stack([n * a for n in range(8)]), trainable)
    lifted = jlora.lift(f)
    one = lambda t, x: lifted(jlora.join(jax.tree.map(lambda a: a[0], t), frozen), x)
    mesh = mesh_of("Auto", (8,), ("data",))
    got = jax.jit(jax.shard_map(one, mesh=mesh, in_specs=(P("data"), P("data")), out_specs=P("data")))(stacked, x)
    for n in range(8):
        ad = jlora.join(jax.tree.map(lambda a, n=n: a[n], stacked), frozen)
        assert_close(got[n], lifted(ad, x[n : n + 1])[0])


def test_under_vmap_with_a_named_axis():
    """The model itself speaks of the axis: a batch norm, an index, a gather."""

    def f(p, x):
        y = x @ p["up"]["kernel"]
        y = (y - lax.pmean(y, "rows")) * (1 + lax.axis_index("rows"))
        return jnp.tanh(y) @ p["down"]["kernel"] + lax.all_gather(x, "rows").sum(0)

    ad = jlora.adapt(weights(), jlora.LoRA(rank=2, target="kernel"))
    trainable = away_from_start(ad.trainable)
    x = X[:, 0]

    def run(dense):
        lifted = jlora.lift(f, dense=dense)
        mapped = lambda t: jax.vmap(lambda x: lifted(jlora.join(t, ad.frozen), x), axis_name="rows")(x)
        y, pull = jax.vjp(mapped, trainable)
        return y, pull(cotangents([y])[0])[0]

    assert_close(jax.jit(lambda: run(False))(), jax.jit(lambda: run(True))())


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Dense(8, name="up")(x)
        return nn.BatchNorm(use_running_average=False, axis_name="rows", name="norm")(x)


def test_batch_norm_over_a_named_axis():
    """Statistics that a lifted model takes over a named axis are those of the dense one, and so are its outputs."""
    variables = Normed().init(jax.random.key(0), jnp.ones((2, 4)))
    ad = jlora.adapt(variables["params"], jlora.LoRA(rank=2, target="kernel"))
    ad = jlora.Adapted(away_from_start(ad.trainable), ad.frozen)
    x = normal(1, 4, 2, 4)

    def run(dense):
        f = lambda p, x: Normed().apply(variables | {"params": p}, x, mutable=["batch_stats"])
        lifted = jlora.lift(f, dense=dense)
        return jax.jit(lambda ad, x: jax.vmap(lambda x: lifted(ad, x), axis_name="rows")(x))(ad, x)

    assert_close(run(False), run(True))


# Communication --------------------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= (\(?[^=]*?\)?) (?:all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\("
)


def collectives(compiled):
    """The sizes, in elements, of what the program sends between devices."""
    found = []
    for line in re.sub(r"/\*.*?\*/", "", compiled.as_text()).splitlines():
        if match := COLLECTIVE.search(line):
            for shape in re.findall(r"\[([\d,]*)\]", match[1]):
                found.append(math.prod(int(n) for n in shape.split(",") if n))
    return sorted(found)


class Layer(nn.Module):
    """Attention and a perceptron of MiniLM's form."""

    @nn.compact
    def __call__(self, x):
        attention = nn.MultiHeadDotProductAttention(4, name="attention", deterministic=True)
        x = x + attention(nn.LayerNorm(name="norm_0")(x))
        h = nn.gelu(nn.Dense(128, name="up")(nn.LayerNorm(name="norm_1")(x)))
        return x + nn.Dense(x.shape[-1], name="down")(h)


class Perceptron(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = nn.DenseGeneral((4, 16), name="query")(x)
        h = nn.gelu(nn.DenseGeneral(128, axis=(-2, -1), name="out")(heads))
        return x + nn.Dense(x.shape[-1], name="down")(h)


# Flax's attention does not say where its products live, so that an explicit mesh refuses it
@pytest.mark.parametrize("model,kind", [(Perceptron, "Auto"), (Perceptron, "Explicit"), (Layer, "Auto")])
def test_no_collective_on_wide_activations(model, kind):
    """Batch over four devices, sequence over two. What the adapter sends is gradients of factors, no activation."""
    rank, batch, length, width = 2, 8, 32, 64
    x = normal(1, batch, length, width)
    params = model().init(jax.random.key(0), x)
    axes = {"(query|key|value)/kernel": "ioo", "out/kernel": "iio"}
    if model is Perceptron:
        axes = {"query/kernel": "ioo", "out/kernel": "iio"}
    trainable, frozen = jlora.split(jlora.adapt(params, jlora.LoRA(rank=rank, target="kernel"), axes=axes))
    lifted = jlora.lift(model().apply)
    mesh = mesh_of(kind, (4, 2), ("batch", "sequence"))
    with jax.set_mesh(mesh):
        x = jax.device_put(x, NamedSharding(mesh, P("batch", "sequence")))
        everywhere = lambda tree: jax.tree.map(lambda a: jax.device_put(a, NamedSharding(mesh, P())), tree)
        trainable, frozen, params = everywhere(trainable), everywhere(frozen), everywhere(params)
        loss = lambda t, x, frozen: jnp.square(lifted(jlora.join(t, frozen), x)).sum()
        plain = lambda x, params: jnp.square(model().apply(params, x)).sum()
        with_adapter = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))).lower(trainable, x, frozen).compile()
        without = jax.jit(jax.value_and_grad(plain)).lower(x, params).compile()
    ours, theirs = collectives(with_adapter), collectives(without)
    for size in theirs:
        assert size in ours, (ours, theirs)
        ours.remove(size)
    assert ours, "the gradients of the factors are summed over devices"
    biggest = max(a.size for a in jax.tree.leaves(trainable))
    local = batch * length * width // 8
    assert biggest < local and max(ours) <= biggest, (ours, theirs, biggest)


# Scopes ---------------------------------------------------------------------------------------


class Encoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        for n in range(2):
            x = Named(name=f"layer_{n}")(x)
        return x


class Named(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jnp.tanh(nn.Dense(x.shape[-1], name="query")(x))


@pytest.mark.parametrize("tokens", [2, 4096], ids=["factored", "many tokens"])
def test_scopes_for_the_profiler(tokens):
    """The model's own, with `/delta` below for what the adapter added; in the backward pass too."""
    x = jnp.ones((tokens, WIDE))
    params = Encoder().init(jax.random.key(0), x)
    trainable, frozen = jlora.split(jlora.adapt(params, jlora.LoRA(rank=2)))
    apply = jlora.lift(Encoder().apply)
    loss = lambda t, frozen, x: apply(jlora.join(t, frozen), x).sum()
    text = jax.jit(jax.grad(loss)).lower(trainable, frozen, x).as_text(debug_info=True)
    for n in range(2):
        assert re.search(rf"[^\"]*layer_{n}/query/dot_general", text)
        assert re.search(rf"[^\"]*layer_{n}/query/delta/\w+", text)
        assert re.search(rf"transpose\([^\"]*layer_{n}/query/[^\"]*delta", text)
    compiled = jax.jit(apply).lower(jlora.join(trainable, frozen), x).compile().as_text()
    for n in range(2):
        assert re.search(rf'op_name="[^"]*layer_{n}/query/dot_general', compiled)
        assert re.search(rf'op_name="[^"]*layer_{n}/query/delta', compiled)


def test_scopes_in_a_scan_and_under_remat():
    """The names of layers, and `/delta` below them, outlast a scan and a remat."""
    scan = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    x = jnp.ones((2, WIDE))
    params = scan(name="layers").init(jax.random.key(0), x, None)
    ad = jlora.adapt(params, jlora.LoRA(rank=2), axes={"kernel": "sio"})
    text = jax.jit(jlora.lift(scan(name="layers").apply)).lower(ad, x, None).as_text(debug_info=True)
    assert re.search(r"layer/query/dot_general", text) and re.search(r"layer/query/delta/\w+", text)


class Step(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return Named(name="layer")(x), None


def here(p, x):
    return jnp.tanh(x @ p["up"]["kernel"])


def test_the_lines_of_the_model_are_kept():
    """What the compiler and a debugger are told of the product is where the model wrote it."""
    ad = jlora.adapt(weights(), jlora.LoRA(rank=2, target="up/kernel"))
    text = jax.jit(jlora.lift(here)).lower(ad, X).as_text(debug_info=True)
    line = here.__code__.co_firstlineno + 1
    assert re.search(rf'test_sharding.py":{line}\b', text)


# Merging ------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", each_row([row for row in METHODS if row.on != "vectors"]))
def test_merge_on_an_explicit_mesh(row):
    """Merged weights live where the base does, and are those of one device.

    Operation by operation for one row of each word; the others under `jit`, which compiles a tenth of the programs.
    """
    merge = jlora.merge if row.name in CHOSEN else jax.jit(jlora.merge)
    draw = lambda n, *shape: jnp.asarray(np.random.default_rng(n).standard_normal(shape), jnp.float32)
    params = {"one": {"kernel": draw(0, 16, 16)}, "stack": {"kernel": draw(1, 4, 16, 16)}}
    places = {"one": {"kernel": P("data", "model")}, "stack": {"kernel": P("data", None, "model")}}
    single = jlora.adapt(params, row.spec("kernel"), axes={"stack": "sio"})
    trainable = away_from_start(single.trainable)
    want = jax.jit(jlora.merge)(jlora.join(trainable, single.frozen))
    mesh = mesh_of("Explicit")
    specs = [(path, spec["kernel"]) for path, spec in places.items()]
    held = jlora.shard.init(params, row.spec("kernel"), mesh, specs, axes={"stack": "sio"})
    put = lambda a, like: jax.device_put(a, like.sharding)
    got = merge(jlora.join(jax.tree.map(put, trainable, held.trainable), held.frozen))
    assert jax.tree.map(lambda a: a.sharding.spec, got) == places
    assert_close(got, want)


@pytest.mark.slow
@pytest.mark.parametrize("row", [pytest.param(row, id=row.name) for row in METHODS if on_heads(row)])
def test_merge_of_heads_that_are_cut(row):
    """A side that is flat in the equation is several axes of the weight, and the merged weight is cut as they are."""
    _, trainable, frozen, places, _ = setting(row, "attention")
    merged = jax.jit(lambda t, frozen: jlora.merge(jlora.join(t, frozen)))
    want = merged(trainable, frozen)
    mesh = mesh_of("Explicit")
    with jax.set_mesh(mesh):
        base, everywhere = place(mesh, frozen.base, places), NamedSharding(mesh, P())
        sharded = jlora.Frozen(base, jax.device_put(frozen.factors, everywhere), None, frozen.plan)
        got = merged(jax.device_put(trainable, everywhere), sharded)
    assert jax.tree.all(jax.tree.map(lambda a, w0: a.sharding.is_equivalent_to(w0.sharding, a.ndim), got, base))
    assert_close(got, want)
