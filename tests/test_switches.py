"""JAX's own switches: under each, steps, merges and tools are what they are without it."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jlora
from methods import CHOSEN, METHODS, assert_close, away_from_start, each_row

# What each refuses or changes, it refuses and changes beside the others, too: one program has them all.
STRICT = {
    "numpy_rank_promotion": "raise",
    "numpy_dtype_promotion": "strict",
    "debug_nans": True,
    "enable_x64": True,
    "default_matmul_precision": "highest",
}
NO_JIT = {"disable_jit": True}
WEIGHTS = [row for row in METHODS if row.on != "vectors"]


@contextlib.contextmanager
def switched(values):
    with contextlib.ExitStack() as stack:
        for name, value in values.items():
            stack.enter_context(getattr(jax, name)(value))
        yield


def draw(seed, *shape, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def params(dtype=jnp.float32):
    one = {"kernel": draw(0, 8, 8, dtype=dtype), "bias": draw(1, 8, dtype=dtype)}
    return {"one": one, "stack": {"kernel": draw(2, 2, 8, 8, dtype=dtype)}}


def model(params, x):
    """A dense layer with a bias, and a scan."""
    x = jnp.tanh(x @ params["one"]["kernel"] + jnp.expand_dims(params["one"]["bias"], 0))
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["stack"]["kernel"])[0]


def made(spec, dtype=jnp.float32):
    return jlora.adapt(params(dtype), spec, axes={"stack": "sio"})


def step(trainable, frozen, key, x):
    """Loss, gradients and merged weights, with dropout's key handed in as training does."""

    def loss(trainable):
        joined = jlora.with_dropout(jlora.join(trainable, frozen), key)
        return jnp.sum(jlora.lift(model)(joined, x) ** 2)

    return jax.value_and_grad(loss)(trainable), jlora.merge(jlora.join(trainable, frozen))


def stepped(row):
    adapted = made(row.spec("kernel"))
    return jax.jit(step)(away_from_start(adapted.trainable), adapted.frozen, jax.random.key(0), draw(3, 3, 8))


@pytest.mark.parametrize("row", each_row(WEIGHTS))
def test_methods(row):
    """How an adapter begins, a step and a merge are the same under unlike switches, dtypes included.

    Without jit, op by op and slowly, for one row of each word of the algebra: what runs without it is the words.
    """
    with switched(STRICT):
        got = stepped(row)
    with switched(NO_JIT if row.name in CHOSEN else {}):
        want = stepped(row)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(want)]
    assert_close(got, want, 1e-4)


@pytest.mark.parametrize("row", each_row(WEIGHTS))
def test_unlike_dtypes_under_strict_promotion(row):
    """Trained factors, frozen ones and the model have three dtypes, and meet by casts that are written out."""
    with switched(STRICT):
        adapted = made(row.spec("kernel"), "float64")
        trainable = jax.tree.map(lambda x: x.astype("bfloat16"), adapted.trainable)
        x = draw(3, 3, 8, dtype="float64")
        (value, grads), merged = jax.eval_shape(step, trainable, adapted.frozen, jax.random.key(0), x)
    assert {value.dtype, *(x.dtype for x in jax.tree.leaves(merged))} == {jnp.dtype("float64")}
    assert {x.dtype for x in jax.tree.leaves(grads)} == {jnp.dtype("bfloat16")}


# --- tools ---------------------------------------------------------------------------------------------------------


def moved_from(spec):
    adapted = made(spec)
    return jlora.join(away_from_start(adapted.trainable), adapted.frozen)


LORA = jlora.LoRA(rank=2, alpha=3, target="kernel")
ADALORA = jlora.AdaLoRA(rank=3, target="kernel")
OPTIMIZERS = {
    "lora_plus": (LORA, lambda ad: optax.chain(optax.sgd(0.1), jlora.optim.lora_plus(ad))),
    "riemannian": (LORA, lambda ad: optax.chain(jlora.optim.riemannian(ad), optax.sgd(0.1))),
    "lora_fa": (
        jlora.LoRAFA(rank=2, target="kernel"),
        lambda ad: optax.chain(jlora.optim.lora_fa(ad), optax.sgd(0.1)),
    ),
    "adalora": (
        ADALORA,
        lambda ad: jlora.rank.adalora(optax.sgd(0.1, 0.9), ad, total_steps=3, target_rank=1, final_warmup=1),
    ),
    "sora": (
        jlora.SoRA(rank=3, target="kernel"),
        lambda ad: jlora.rank.sora(optax.sgd(0.1), ad, learning_rate=0.1, sparsity=0.5, l1=0.1, gates=optax.sgd(0.1)),
    ),
    "dylora": (LORA, lambda ad: jlora.rank.dylora(optax.sgd(0.1, 0.9), ad)),
    "selora": (LORA, lambda ad: jlora.rank.selora(optax.sgd(0.1), ad, interval=1)),
}


def optimized(name):
    """Where two updates lead, the decayed ones too, and the state."""
    spec, make = OPTIMIZERS[name]
    adapted = moved_from(spec)
    tx = optax.chain(make(adapted), optax.add_decayed_weights(0.1, jlora.optim.decay_mask(adapted)))

    @jax.jit
    def update(trainable, state):
        grads = jax.tree.map(jnp.cos, trainable)
        more = {"b": 1} if name == "dylora" else {}
        updates, state = tx.update(grads, state, trainable, frozen=adapted.frozen, **more)
        return optax.apply_updates(trainable, updates), state

    trainable, state = adapted.trainable, tx.init(adapted.trainable)
    for _ in range(2):
        trainable, state = update(trainable, state)
    return trainable, state


def ranked():
    one, three = moved_from(LORA), moved_from(ADALORA)
    pair = moved_from(jlora.LoRA(rank=2, init="pissa", target="kernel"))
    kept = lambda adapted, b: jlora.rank.prune(adapted, jlora.rank.magnitude(adapted), b)
    names = lambda path, index: path.replace("stack", "stack" + "".join(map(str, index)))
    unrolled = {"one": params()["one"]} | {f"stack{n}": {"kernel": params()["stack"]["kernel"][n]} for n in (0, 1)}
    return (
        jax.value_and_grad(lambda t: jlora.rank.orthogonality(jlora.join(t, three.frozen)))(three.trainable),
        jlora.rank.compact(kept(three, 4), plain=True),
        kept(pair, 2),
        jlora.rank.resize(one, rank=1).adapted,
        jlora.rank.at_rank(one, 1),
        jlora.rank.unstack(one, unrolled, names),
    )


@pytest.mark.parametrize("switch", [{}, STRICT], ids=["plain", "strict"])
def test_ranks_of_a_pair_in_another_dtype_than_its_start(switch):
    """Trained factors in bfloat16 beside a frozen start in float32: what is switched off stays in bfloat16."""
    with switched(switch):
        pair = moved_from(jlora.LoRA(rank=2, init="pissa", target="kernel"))
        pair = jlora.join(jax.tree.map(lambda x: x.astype("bfloat16"), pair.trainable), pair.frozen)
        off = [jlora.rank.prune(pair, jlora.rank.magnitude(pair), 2), jlora.rank.at_rank(pair, 1)]
        off.append(jlora.rank.compact(off[0]))
    assert {x.dtype for x in jax.tree.leaves([ad.trainable for ad in off])} == {jnp.dtype("bfloat16")}


def analysed():
    adapted = moved_from(LORA)
    a = jlora.analysis
    update, other = a.updates(adapted)["stack/kernel"], a.updates(moved_from(ADALORA))["stack/kernel"]
    weight = a.weights(adapted)["stack/kernel"]
    return (
        *(a.factors(adapted), a.updates(adapted), a.similarity(update, other), a.random_similarity(8, 2, 3)),
        *(a.principal_angles(update.u, other.u), a.distances(update.u, other.u[..., :2]), a.truncate(update, 1)),
        *(a.amplification(update, weight), a.inside(update, a.svd(weight)), a.intruders(weight, weight + 1, k=2)),
        *(a.effective_rank(update.s), a.stable_rank(update.s)),
    )


def begun():
    x = draw(3, 5, 8)
    grads = jlora.init.gradients(lambda p, x: jnp.sum(model(p, x)), params(), [x], LORA, axes={"stack": "sio"})
    seen = jlora.init.activations(model, params(), [x], LORA, axes={"stack": "sio"})
    starts = [jlora.init.GA(grads), jlora.init.EVA(seen), jlora.init.CorDA(seen), "orthogonal"]
    made_so = [made(jlora.LoRA(rank=2, init=start, target="kernel")) for start in starts]
    return grads, seen, [adapted.trainable for adapted in made_so], jlora.init.plain(made_so[0])


def quantised():
    found = []
    for scheme in ("nf4+double", "int4", "nf3"):
        small = jlora.quantize({"w": draw(0, 64, 8)}, scheme)
        adapted = jlora.adapt(small, jlora.LoRA(rank=2, target="w"))
        loss = lambda t, f: jnp.sum(jlora.lift(lambda p, x: x @ p["w"])(jlora.join(t, f), draw(1, 3, 64)) ** 2)
        found.append(jax.jit(jax.value_and_grad(loss))(away_from_start(adapted.trainable), adapted.frozen))
    base, method = jlora.init.loftq({"w": draw(0, 64, 8)}, jlora.LoRA(rank=2, target="w"), "nf4")
    return found, jlora.quant.dequantize(base), jlora.adapt(base, method).trainable


def whole():
    adapted = moved_from(LORA)
    merged = jlora.merge(adapted)
    report = jlora.merge_report(adapted)
    several, axes = jlora.stack([adapted, jlora.scale(adapted, 0.5)])
    ran = jax.jit(jax.vmap(jlora.lift(model), (axes, None)))(several, draw(3, 3, 8))
    survives = np.array([row.survives for row in report.rows])
    return jlora.unmerge(merged, adapted).params, survives, ran


TOOLS = {name: lambda name=name: optimized(name) for name in OPTIMIZERS}
TOOLS |= {"rank": ranked, "analysis": analysed, "init": begun, "quant": quantised, "the rest": whole}


@pytest.mark.parametrize("name", TOOLS)
def test_tools(name):
    """What they make under all refusals at once is what they make without, dtypes included."""
    want = TOOLS[name]()
    with switched(STRICT):
        got = TOOLS[name]()
    assert jax.tree.structure(got) == jax.tree.structure(want)
    dtypes = lambda tree: [getattr(x, "dtype", None) for x in jax.tree.leaves(tree)]
    assert dtypes(got) == dtypes(want)
    assert_close(got, want, 1e-4)
