"""Adapters beside and behind blocks: equal to a model that has them inside, on models as they are named, counted."""

import contextlib
import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora
import zoo
from jlora import targets

pytestmark = pytest.mark.settled  # the laws hold the same methods on the newest JAX

D, M = 6, 3


class Adapter(nn.Module):
    """s (U f(D x + d) + u), and s (a x b) x + s_res x, as hand-written modules."""

    scale: float
    act: str
    kron: bool

    @nn.compact
    def __call__(self, x):
        p = functools.partial(self.param, init_fn=nn.initializers.normal(0.5), dtype=x.dtype)
        if self.kron:
            full = jnp.kron(p("a", shape=(2, 2)), p("b", shape=(3, 3)))
            return self.scale * (x @ full) + p("s_res", shape=()) * x
        inner = getattr(jax.nn, self.act)(x @ p("down", shape=(M, D)).T + p("down_bias", shape=(M,)))
        return self.scale * (inner @ p("up", shape=(M, D)) + p("up_bias", shape=(D,)))


class Block(nn.Module):
    """A transformer layer, with norms before or after, and adapters where they are asked for."""

    pre: bool = True
    bias: bool = True
    serial: tuple = ()
    beside: tuple = ()
    scale: float = 1.0
    act: str = "gelu"
    kron: bool = False

    @nn.compact
    def __call__(self, x, _=None):
        dense = functools.partial(nn.Dense, use_bias=self.bias, param_dtype=x.dtype)
        adapter = lambda name: Adapter(self.scale, self.act, self.kron, name=f"{name}_adapter")
        heads = nn.MultiHeadDotProductAttention(2, use_bias=self.bias, param_dtype=x.dtype, name="attention")
        first, last = dense(10, name="fc1"), dense(D, name="fc2")
        for name, block in (("attention", heads), ("mlp", lambda x: last(nn.relu(first(x))))):
            norm = nn.LayerNorm(param_dtype=x.dtype, name=f"{name}_norm")
            met = norm(x) if self.pre else x
            h = block(met)
            h = h + adapter(name)(h) if name in self.serial else h
            h = h + adapter(name)(met) if name in self.beside else h
            x = x + h if self.pre else norm(x + h)
        return x, None


BOTH = ("attention", "mlp")
INSIDE = {
    "houlsby": (jlora.Houlsby(M), dict(serial=BOTH)),
    "pfeiffer": (jlora.Pfeiffer(M), dict(serial=("mlp",), act="relu")),
    "parallel": (jlora.Parallel(M), dict(beside=("mlp",), scale=4.0, act="relu")),
    "parallel_attention": (
        jlora.Parallel(M, target=targets.attention_outputs, activation="silu", scale=0.5),
        dict(beside=("attention",), scale=0.5, act="silu"),
    ),
    "krona": (jlora.ParallelKronA(scale=0.5, residual=True), dict(beside=("mlp",), scale=0.5, kron=True)),
}


def away(trainable):
    """Factors that are not at their start."""
    leaves, treedef = jax.tree.flatten(trainable)
    noise = [np.random.default_rng(n).standard_normal(x.shape) for n, x in enumerate(leaves)]
    return treedef.unflatten([x + jnp.asarray(0.3 * e, x.dtype) for x, e in zip(leaves, noise, strict=True)])


def put(base, trainable):
    """The parameters of the model that has the adapters inside."""
    inside = dict(base)
    for name, ends in (("attention", "attention/out/"), ("mlp", "fc2/")):
        for path, factors in trainable.items():
            if ends in path:
                inside[f"{name}_adapter"] = factors
    return inside


def same(kind, x, tolerance, wrap=lambda block: block, **options):
    """Values and all gradients, of the factors and of the input, are those of the model that has them inside."""
    spec, inside = INSIDE[kind]
    spec = type(spec)(**{**vars(spec), "dtype": x.dtype.name})
    plain, whole = wrap(Block)(**options), wrap(Block)(**options, **inside)
    base = plain.init(jax.random.key(0), x)["params"]
    adapted = jlora.adapt(base, spec)
    trainable, frozen = away(adapted.trainable), adapted.frozen
    sites = {path.rpartition("/")[2] for path in trainable}
    assert sites == {"bias" if options.get("bias", True) else "kernel"}

    @jax.jit
    def both(trainable, x):
        run = lambda model, params, x: model.apply({"params": params}, x)[0]
        mine = lambda t, x: jlora.lift(functools.partial(run, plain))(jlora.join(t, frozen), x)
        theirs = lambda t, x: run(whole, put(base, t), x)
        graded = lambda f: jax.value_and_grad(lambda *a: jnp.sum(jnp.sin(f(*a))), argnums=(0, 1))(trainable, x)
        return (mine(trainable, x), theirs(trainable, x)), (graded(mine), graded(theirs))

    for got, want in both(trainable, x):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), got, want)


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
@pytest.mark.parametrize("kind", INSIDE)
def test_a_model_that_has_them_inside(kind, wide):
    """In value and in every gradient; pre-norm with biases, and, in float64, post-norm without."""
    with jax.enable_x64(True) if wide else contextlib.nullcontext():
        x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, D)), "float64" if wide else "float32")
        same(kind, x, 1e-11 if wide else 2e-5, pre=not wide, bias=not wide)


@pytest.mark.parametrize("kind", ["houlsby", "parallel_attention", "krona"])
def test_in_a_scan_of_remat(kind):
    """Each layer of a stack has its own, as in the stack of layers that have them inside."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, D)), "float32")
    stacked = lambda block: nn.scan(nn.remat(block), variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
    same(kind, x, 1e-4, wrap=stacked)


CLIENTS = {
    "bert": (r"layer/\d/(attention/)?output/dense/bias", 4),
    "gpt2": (r"h/\d/(attn|mlp)/c_proj/bias", 4),
    "llama": (r"layers/\d/(self_attn/o_proj|mlp/down_proj)/kernel", 4),
    "vit": (r"layer/\d/(attention/)?output/dense/bias", 4),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_training_lowers_a_loss(name):
    """By default on the outputs that the papers name and no others; a few steps, serial and parallel in turn."""
    pytest.importorskip("transformers", reason="the models are transformers' own")
    fn, params, args = {case.name: case for case in zoo.CASES}[f"clients/{name}"].build()
    pattern, count = CLIENTS[name]
    adapted = jlora.adapt(params, jlora.Houlsby(2))
    assert len(adapted.trainable) == count and all(re.search(pattern, path) for path in adapted.trainable)
    spec = [jlora.Parallel(2), jlora.Houlsby(2, target=targets.attention_outputs), jlora.LNTuning()]
    trainable, frozen = jlora.split(jlora.adapt(params, spec))
    assert len(trainable) > count
    tool, call = optax.adam(1e-2), jlora.lift(fn)
    first = lambda t: jax.tree.leaves(call(jlora.join(t, frozen), *args))[0]

    @jax.jit
    def step(trainable, state):
        loss, grads = jax.value_and_grad(lambda t: jnp.mean((first(t) - 1) ** 2))(trainable)
        updates, state = tool.update(grads, state)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tool.init(trainable), []
    for _ in range(4):
        trainable, state, loss = step(trainable, state)
        losses.append(float(loss))
    assert losses[-1] < losses[0]
    assert all(np.any(x) for x in jax.tree.leaves(trainable))


def layers(d, n):
    """Shapes of n layers of a BERT of width d."""
    s = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    dense = lambda i, o: {"dense": {"kernel": s(i, o), "bias": s(o)}}
    asked = {name: {"kernel": s(d, d), "bias": s(d)} for name in ("query", "key", "value")}
    layer = {
        "attention": {"self": asked, "output": dense(d, d)},
        "intermediate": dense(d, 4 * d),
        "output": dense(4 * d, d),
    }
    return {"layer": {str(k): layer for k in range(n)}}


@pytest.mark.parametrize("m", [8, 64, 256])
def test_counts_are_the_papers(m):
    """2 (2 d m + d + m) a layer for Houlsby (2.1), half of it for Pfeiffer and one beside a block; BERT large."""
    d, n = 1024, 24
    each = 2 * d * m + d + m
    count = lambda spec: jlora.count(jax.eval_shape(lambda p: jlora.adapt(p, spec), layers(d, n)))[0]
    assert count(jlora.Houlsby(m)) == n * 2 * each
    assert count(jlora.Pfeiffer(m)) == count(jlora.Parallel(m)) == n * each
    assert count(jlora.ParallelKronA(residual=True)) == n * (32 * 32 + 32 * 32 + 1)


class Decoder(nnx.Module):
    """One layer of NNX, named as its users do."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, D, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(D, 8, rngs=rngs), nnx.Linear(8, D, rngs=rngs)

    def __call__(self, x, behind=lambda name, h, x: h):
        x = x + behind("attention/out/bias", self.attention(x), x)
        return x + behind("down/bias", self.down(nnx.tanh(self.up(x))), x)


@pytest.mark.parametrize("kind", ["houlsby", "krona"])
def test_nnx(kind):
    """The same in NNX, where the module says what its adapters do."""
    graph, params = nnx.split(Decoder(nnx.Rngs(0)))
    spec, inside = INSIDE[kind]
    adapted = jlora.adapt(params, spec)
    trainable, frozen = away(adapted.trainable), adapted.frozen
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, D)), "float32")
    made = Adapter(inside.get("scale", 1.0), "gelu", inside.get("kron", False))

    def behind(name, h, x):
        met = h if kind == "houlsby" else x
        return h + made.apply({"params": trainable[name]}, met) if name in trainable else h

    found = jlora.lift(lambda params, x: nnx.merge(graph, params)(x))(jlora.join(trainable, frozen), x)
    np.testing.assert_allclose(found, nnx.merge(graph, params)(x, behind), rtol=2e-5, atol=2e-5)


def encoder():
    """(function, parameters, input) of a Linen block."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((8, 4, D)), "float32")
    params = Block().init(jax.random.key(0), x)["params"]
    return lambda params, x: Block().apply({"params": params}, x)[0], params, x


@pytest.mark.parametrize(
    "others", [[jlora.BitFit()], [jlora.LoRA(rank=2, dropout=0.5, target=r"fc\d/kernel")]], ids=["bitfit", "lora"]
)
@pytest.mark.parametrize("kind", ["houlsby", "parallel", "krona"])
def test_beside_methods_that_change_weights(kind, others, tmp_path):
    """Split, saved, loaded and explained with others, dropout among them; merging and exporting are refused."""
    fn, params, x = encoder()
    spec = INSIDE[kind][0]
    adapted = jlora.adapt(params, [spec, *others])
    alone = [jlora.count(jlora.adapt(params, s))[0] for s in (spec, others)]
    assert jlora.count(adapted)[0] == sum(alone)
    adapted = jlora.join(away(adapted.trainable), adapted.frozen)
    assert not jlora.explain(fn, adapted, x).unused and not jlora.explain(fn, adapted, x).dense
    jlora.save(tmp_path / "adapter", adapted)
    loaded = jlora.load(tmp_path / "adapter", params)
    assert loaded.frozen.plan is adapted.frozen.plan
    run = jax.jit(jlora.lift(fn))
    np.testing.assert_array_equal(run(loaded, x), run(adapted, x))
    if isinstance(others[0], jlora.LoRA):
        dropped = run(jlora.with_dropout(adapted, jax.random.key(0)), x)
        assert np.isfinite(dropped).all() and (dropped != run(adapted, x)).any()
    with pytest.raises(ValueError, match="have steps on their outputs"):
        jlora.merge(adapted)
    with pytest.raises(ValueError, match="have steps on their outputs"):
        jlora.export(tmp_path / "merged", adapted)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("kind", INSIDE)
def test_switched_off_it_is_the_base(kind):
    """`jlora.scale(adapted, 0)`, and the start: no bit differs."""
    fn, params, x = encoder()
    adapted = jlora.adapt(params, INSIDE[kind][0])
    off = jlora.scale(jlora.join(away(adapted.trainable), adapted.frozen), 0.0)
    for unmoved in (adapted, off):
        np.testing.assert_array_equal(jlora.lift(fn)(unmoved, x), fn(params, x))


def test_norms_are_trained_by_a_rule_of_their_own():
    """[Houlsby(16), LNTuning()] is the paper's: adapters and norms, and nothing else."""
    _, params, _ = encoder()
    adapted = jlora.adapt(params, [jlora.Houlsby(M), jlora.LNTuning()])
    assert jlora.count(adapted)[0] == 2 * (2 * M * D + M + D) + 2 * 2 * D


@pytest.mark.parametrize(
    "spec", [jlora.Houlsby(2), jlora.Parallel(2), jlora.ParallelKronA()], ids=lambda s: s.describe()
)
def test_where_names_tell_nothing(spec):
    """The usual error: what was looked for, what there is; and the first layer of a block that nobody knows."""
    params = {"a": {"kernel": jnp.ones((4, 8))}, "b": {"kernel": jnp.ones((8, 4))}}
    with pytest.raises(ValueError, match=r"_outputs\) matches no leaf; write a pattern .*a/kernel, b/kernel"):
        jlora.adapt(params, spec)
    if isinstance(spec, jlora.Houlsby) and not isinstance(spec, jlora.Parallel):
        return
    named = type(spec)(target="b/kernel")
    with pytest.raises(ValueError, match=r"names do not tell the first layer .*input='up/kernel'"):
        jlora.adapt(params, named)
    odd = type(spec)(target="b/kernel", input="b/kernel")
    with pytest.raises(ValueError, match="input has 8 features and whose output has 4"):
        jlora.lift(lambda p, x: x @ p["a"]["kernel"] @ p["b"]["kernel"])(
            jlora.adapt(params, odd, axes={"": "io"}), jnp.ones((2, 4))
        )
