"""SoRA's gates: the proximal step against NumPy, the schedules of lambda, and every form that optax has."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jlora
from jlora.rank import geometric, linear, log_linear, soft_threshold, sora
from jlora.rank.sora import _soft
from methods import as_bytes, assert_close, away_from_start

pytestmark = pytest.mark.settled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params():
    return {"dense": {"kernel": draw(1, 6, 5), "bias": draw(2, 5)}, "layers": {"kernel": draw(3, 3, 6, 5)}}


@functools.cache
def start():
    """A weight and a stack of three, twelve gates, and a bias beside them."""
    adapted = jlora.adapt(params(), [jlora.SoRA(rank=3, target="kernel"), jlora.BitFit(target="bias")])
    return jlora.join(away_from_start(adapted.trainable), adapted.frozen)


def gradients(step, trainable):
    leaves, treedef = jax.tree.flatten(trainable)
    return treedef.unflatten([draw(1000 * step + n, *x.shape) for n, x in enumerate(leaves)])


def train(tx, trainable, steps, first=1, state=None, grads=gradients):
    @jax.jit
    def step(g, state, trainable):
        updates, state = tx.update(g, state, trainable)
        return optax.apply_updates(trainable, updates), state

    state = tx.init(trainable) if state is None else state
    for n in range(first, first + steps):
        trainable, state = step(grads(n, trainable), state, trainable)
    assert step._cache_size() == 1
    return trainable, state


# --- the proximal step --------------------------------------------------------------------------------------------


def test_the_soft_threshold_is_the_minimiser():
    """of (y - x)^2 / 2 + xi |y|, searched on a grid; and the authors' code, line by line."""
    x, xi = np.linspace(-3, 3, 49), 0.7
    grid = np.linspace(-4, 4, 80001)
    want = [grid[np.argmin((grid - a) ** 2 / 2 + xi * np.abs(grid))] for a in x]
    got = soft_threshold(jnp.asarray(x, jnp.float32), xi)
    np.testing.assert_allclose(got, want, atol=1e-4)
    p = x.copy()
    p[p > xi] -= xi
    p[p < -xi] += xi
    p[np.abs(p) < xi] = 0
    np.testing.assert_allclose(soft_threshold(jnp.asarray(x, jnp.float32), xi, prox="reference"), p, atol=1e-6)


def test_the_soft_threshold_at_its_corners():
    """At the threshold the exact step is zero, and never -0.0; the authors' keeps it, and zeroes up to twice it."""
    x = jnp.array([1.5, 1.99, 2.0, 2.5, 1.0, -1.0, 0.5, -0.0])
    one = lambda prox: np.asarray(soft_threshold(x, 1.0, prox=prox))
    np.testing.assert_allclose(one("exact"), [0.5, 0.99, 1.0, 1.5, 0, 0, 0, 0], atol=1e-6)
    np.testing.assert_allclose(one("reference"), [0, 0, 1.0, 1.5, 1.0, -1.0, 0, 0])
    assert as_bytes(jnp.asarray(one("exact")[4:])) == as_bytes(jnp.zeros(4))  # no -0.0
    np.testing.assert_allclose(soft_threshold(x, 0.0), x)
    assert soft_threshold(x.astype(jnp.bfloat16), 1.0).dtype == jnp.bfloat16
    soft_threshold(x, jnp.float32(0.1))
    before = _soft._cache_size()
    soft_threshold(x, jnp.float32(0.2))
    assert _soft._cache_size() == before


SCHEDULES = {
    linear: lambda a, b, n: np.linspace(a, b, n),
    log_linear: lambda a, b, n: np.log(np.linspace(np.exp(a), np.exp(b), n)),
    geometric: lambda a, b, n: np.geomspace(a, b, n),
}


@pytest.mark.parametrize("make", SCHEDULES, ids=lambda make: make.__name__)
def test_schedules_are_the_closed_forms(make):
    """Each stage of lambda holds for its steps at the closed form's value, and the last one for ever after."""
    for start, end, stages in ((1e-4, 7e-4, 6), (0.5, 2.0, 4), (2.0, 0.1, 3)):
        want = SCHEDULES[make](start, end, stages)
        got = jax.jit(jax.vmap(make(start, end, stages, every=5)))(jnp.arange(5 * stages + 7))
        np.testing.assert_allclose(got[:-7], np.repeat(want, 5), rtol=1e-5)
        np.testing.assert_allclose(got[-7:], end, rtol=1e-5)


def test_schedules_refuse_in_words():
    """One stage, a negative lambda and a geometric schedule from zero are no schedules."""
    for make in SCHEDULES:
        with pytest.raises(ValueError, match="at least two stages"):
            make(0.1, 0.2, 1)
        with pytest.raises(ValueError, match="lambda is at least 0"):
            make(-0.1, 0.2, 3)
    with pytest.raises(ValueError, match="geometric.*both ends are positive"):
        geometric(0.0, 1.0, 3)


# --- the optimizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prox,scale_by_lr",
    [("exact", True), ("reference", False)]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("exact", False), ("reference", True))],
)
def test_steps_are_the_formula(prox, scale_by_lr):
    """SGD on all, written out in NumPy: g <- T(g - eta grad), xi = eta lambda (or lambda), both scheduled."""
    adapted = start()
    eta, lam = (lambda n: 0.2 / (1 + n)), linear(0.1, 0.5, 4, every=2)
    tx = sora(
        optax.sgd(0.05), adapted, learning_rate=eta, gates=optax.sgd(eta), sparsity=lam, prox=prox,
        scale_by_lr=scale_by_lr, l1=0.3,
    )  # fmt: skip
    got, state = train(tx, adapted.trainable, 8)
    want = {(g, n): np.array(x, np.float64) for g, fs in adapted.trainable.items() for n, x in fs.items()}
    for n in range(8):
        grads = gradients(n + 1, adapted.trainable)
        for (g, name), x in want.items():
            gradient = np.array(grads[g][name], np.float64)
            if name != "g":
                x -= 0.05 * gradient
                continue
            x -= eta(n) * (gradient + 0.3 * np.sign(x) / 12)
            xi = float(lam(n)) * (eta(n) if scale_by_lr else 1)
            if prox == "exact":
                x[...] = np.sign(x) * np.maximum(np.abs(x) - xi, 0)
            else:
                x[x > xi] -= xi
                x[x < -xi] += xi
                x[np.abs(x) < xi] = 0
    for (g, name), x in want.items():
        np.testing.assert_allclose(got[g][name], x, rtol=1e-4, atol=1e-5)
        if name == "g":
            assert ((np.asarray(got[g][name]) == 0) == (x == 0)).all()
    assert int(state.count) == 8


def test_the_gates_have_the_authors_optimizer_by_default():
    """Gates alone step by Adam without decay, eps 1e-6; all else by the optimizer that was given."""
    adapted = start()
    got, _ = train(sora(optax.sgd(0.1), adapted, learning_rate=1e-2, sparsity=0.0), adapted.trainable, 5)
    adam = optax.adamw(1e-2, eps=1e-6, weight_decay=0.0)
    want, _ = train(adam, adapted.trainable, 5)
    other, _ = train(optax.sgd(0.1), adapted.trainable, 5)
    for group in ("dense/kernel", "layers/kernel"):
        assert_close(got[group]["g"], want[group]["g"])
        assert_close(got[group]["a"], other[group]["a"])
    assert_close(got["dense/bias"], other["dense/bias"])


def test_more_sparsity_leaves_fewer_gates_and_zeros_are_exact():
    """The number of gates left falls as lambda rises, from all to none, and a closed gate is +0.0."""
    adapted = start()
    left = []
    for lam in (0.0, 1.0, 2.0, 1e3):
        got, _ = train(sora(optax.sgd(0.1), adapted, learning_rate=2e-2, sparsity=lam), adapted.trainable, 10)
        g = np.concatenate([np.ravel(got[k]["g"]) for k in ("dense/kernel", "layers/kernel")])
        left.append(int(np.count_nonzero(g)))
        assert not np.signbit(g[g == 0]).any()
    assert left == sorted(left, reverse=True) and left[0] == 12 and left[-1] == 0 and 0 < left[2] < 12


def test_every_form_takes_the_same_steps():
    """Split, whole, in a chain, accumulated or beside other parameters: the same steps, and the base takes no part."""
    adapted = start()
    trainable, frozen = jlora.split(adapted)
    make = lambda: sora(optax.adamw(0.05), adapted, learning_rate=0.05, sparsity=geometric(0.1, 5.0, 4))
    grads = functools.cache(lambda n: gradients(n, trainable))
    want, _ = train(make(), trainable, 6, grads=lambda n, _: grads(n))
    assert any(np.any(np.asarray(f["g"]) == 0) for f in want.values() if "g" in f)
    whole = lambda n, _: jlora.Adapted(grads(n), jax.tree.map(jnp.zeros_like, frozen))
    got, _ = train(jlora.masked(make()), adapted, 6, grads=whole)
    assert as_bytes(got.trainable) == as_bytes(want) and as_bytes(got.frozen) == as_bytes(frozen)
    clipped = optax.chain(optax.clip_by_global_norm(1e6), make())
    assert_close(train(clipped, trainable, 6, grads=lambda n, _: grads(n))[0], want)
    several = optax.MultiSteps(make(), 2).gradient_transformation()
    got, _ = train(several, trainable, 12, grads=lambda n, _: grads((n + 1) // 2))
    assert_close(got, want, 1e-4)
    beside = lambda n, _: {"model": grads(n), "head": jnp.ones(2)}
    got, _ = train(make(), {"model": trainable, "head": jnp.ones(2)}, 6, grads=beside)
    assert as_bytes(got["model"]) == as_bytes(want)
    assert optax.tree_utils.tree_map_params(make(), lambda x: x, make().init(trainable))


def test_stopping_in_the_middle_changes_no_bit():
    """The state holds all there is, the stage of lambda in it: a resumed run ends with the same bits."""
    adapted = start()
    make = lambda: sora(optax.adamw(0.05), adapted, learning_rate=0.05, sparsity=geometric(0.1, 5.0, 4, every=2))
    whole = train(make(), adapted.trainable, 10)
    at, state = train(make(), adapted.trainable, 5)
    at, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (at, state))
    assert as_bytes(train(make(), at, 5, 6, state)) == as_bytes(whole)


def test_a_scanned_model_in_a_train_state_becomes_sparse():
    """Gates of a stack close in ordinary Flax training while the loss falls, and are then cut without a change."""
    base = {"layers": {"kernel": 0.1 * draw(4, 3, 6, 6)}}
    adapted = jlora.adapt(base, jlora.SoRA(rank=4, target="kernel"))
    apply = jlora.lift(lambda p, x: jax.lax.scan(lambda x, k: (x + x @ k, None), x, p["layers"]["kernel"])[0])
    x = draw(5, 32, 6)
    tx = jlora.masked(sora(optax.adam(0.03), adapted, learning_rate=0.03, sparsity=0.5))
    state = TrainState.create(apply_fn=apply, params=adapted, tx=tx)

    @jax.jit
    def step(state):
        value, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - x) ** 2))(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(80):
        state, value = step(state)
        losses.append(float(value))
    g = np.asarray(state.params.trainable["layers/kernel"]["g"])
    assert losses[-1] < losses[0] and 0 < np.count_nonzero(g) < g.size
    small = jlora.rank.compact(state.params)
    assert_close(apply(small, x), apply(state.params, x), 1e-6)


def test_mistakes_are_refused_in_words():
    """An adapter without gates, a negative lambda and updates without parameters are refused."""
    adapted, tx = start(), optax.sgd(0.1)
    with pytest.raises(TypeError, match="sora takes an Adapted.*dict"):
        sora(tx, adapted.trainable, learning_rate=0.1, sparsity=0.1)
    with pytest.raises(ValueError, match="would do nothing.*jlora.SoRA"):
        sora(tx, jlora.adapt(params(), jlora.LoRA(rank=2, target="kernel")), learning_rate=0.1, sparsity=0.1)
    with pytest.raises(ValueError, match="sparsity=-1"):
        sora(tx, adapted, learning_rate=0.1, sparsity=-1)
    with pytest.raises(ValueError, match="'exact' or 'reference'"):
        sora(tx, adapted, learning_rate=0.1, sparsity=0.1, prox="sora_ref")
    made = sora(tx, adapted, learning_rate=0.1, sparsity=0.1)
    with pytest.raises(ValueError, match="sora needs the parameters"):
        made.update(adapted.trainable, made.init(adapted.trainable))
    with pytest.raises(ValueError, match="finds 0"):
        made.init({"head": jnp.ones(3)})
