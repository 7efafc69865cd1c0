"""SoRA, DyLoRA and SeLoRA stopped and resumed, over eight devices, and in half precision (AdaLoRA has its own file)."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora.rank import dylora, geometric, selora, sora
from methods import as_bytes, assert_close, away_from_start

pytestmark = pytest.mark.settled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params():
    return {"layers": {"kernel": draw(1, 3, 8, 8)}, "query": {"kernel": draw(2, 8, 4, 2)}}


@functools.cache
def start(method, dtype="float32"):
    adapted = jlora.adapt(params(), method(rank=4, alpha=6, target="kernel", dtype=dtype))
    return adapted if method is jlora.LoRA else jlora.join(away_from_start(adapted.trainable, 1.0), adapted.frozen)


SPARSE = {"learning_rate": 0.05, "sparsity": geometric(0.5, 4.0, 4, every=2)}
WAYS = {
    "sora": (jlora.SoRA, lambda adapted: sora(optax.adamw(0.05), adapted, **SPARSE), lambda n: {}),
    "dylora": (
        jlora.LoRA,
        lambda adapted: dylora(optax.adamw(0.05, weight_decay=0.1), adapted),
        lambda n: {"b": 1 + n % 3},
    ),
    "selora": (
        jlora.LoRA,
        lambda adapted: selora(optax.adamw(0.05), adapted, threshold=1.2, interval=2),
        lambda n: {},
    ),
}


def gradients(step, trainable):
    leaves, treedef = jax.tree.flatten(trainable)
    return treedef.unflatten([draw(1000 * step + n, *x.shape).astype(x.dtype) for n, x in enumerate(leaves)])


def train(name, trainable, steps, first=1, state=None, dtype="float32", place=lambda tree: tree):
    method, make, more = WAYS[name]
    tx = make(start(method, dtype))
    step = jax.jit(tx.update)
    state = tx.init(trainable) if state is None else state
    for n in range(first, first + steps):
        updates, state = step(place(gradients(n, trainable)), state, trainable, **more(n))
        trainable = optax.apply_updates(trainable, updates)
    return trainable, state


@pytest.mark.parametrize("name", ["dylora", "selora"])
def test_stopping_in_the_middle_changes_no_bit(name):
    """Trainable half and state hold all there is: DyLoRA and SeLoRA resumed end with the same bits."""
    trainable = start(jlora.LoRA).trainable
    whole = train(name, trainable, 9)
    at, state = train(name, trainable, 5)
    at, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (at, state))  # through a file
    assert as_bytes(train(name, at, 4, 6, state)) == as_bytes(whole)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
@pytest.mark.parametrize("name", WAYS)
def test_eight_devices_decide_the_same(name, kind):
    """Factors sharded over their weight's axes: the same steps, zeros and ranks, and factors stay where they were."""
    trainable = start(WAYS[name][0]).trainable
    want, want_state = train(name, trainable, 8)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, kind),) * 2)
    one = {"a": P(None, "x"), "b": P(None, ("x", "y")), "g": P()}
    axes = {"query/kernel": one | {"b": P(None, "x", "y")}, "layers/kernel": {n: P(None, *s) for n, s in one.items()}}
    shard = lambda group, factor, x: jax.device_put(x, NamedSharding(mesh, axes[group][factor]))
    place = lambda tree: {g: {f: shard(g, f, x) for f, x in named.items()} for g, named in tree.items()}
    with jax.set_mesh(mesh):
        got, got_state = train(name, place(trainable), 8, place=place)
    assert_close(got, want)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert ((np.asarray(x) == 0) == (np.asarray(y) == 0)).all()
    zeros = [float(np.mean(np.asarray(x) == 0)) for x in jax.tree.leaves(want)]
    assert any(0 < share < 1 for share in zeros)
    if name == "selora":
        assert as_bytes(got_state.ranks) == as_bytes(want_state.ranks)
        assert any(np.any(x > 1) for x in jax.tree.leaves(want_state.ranks))
    b = got["layers/kernel"]["b"]
    assert b.sharding.is_equivalent_to(NamedSharding(mesh, axes["layers/kernel"]["b"]), b.ndim)


@pytest.mark.slow
@pytest.mark.parametrize("name", WAYS)
def test_half_precision_factors_have_exact_zeros(name):
    """In bfloat16 what is pruned, undrawn or not grown is exactly zero, and SeLoRA's ratios are float32."""
    adapted = start(WAYS[name][0], "bfloat16")
    got, state = train(name, adapted.trainable, 8, dtype="bfloat16")
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype(jnp.bfloat16)}
    if name == "sora":
        g = np.concatenate([np.ravel(named["g"]) for named in got.values()])
        assert 0 < np.count_nonzero(g) < g.size
        return
    for group, named in got.items():
        b = np.asarray(named["b"], np.float32)
        rows = np.any(b.reshape(*b.shape[: b.ndim - (2 if group == "query/kernel" else 1)], -1), -1)
        active = 3 if name == "dylora" else np.asarray(state.ranks[group]["b"])[..., None]
        # a row that has just become active has not moved yet
        assert not np.any(rows & (np.arange(4) >= active))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(getattr(state, "ratio", ())))


def test_sparsity_may_be_traced():
    """One program for every lambda: `optax.inject_hyperparams` keeps it in the state."""
    adapted = start(jlora.SoRA)
    inject = optax.inject_hyperparams(sora, static_args=("inner", "adapted", "gates", "scale_by_lr", "prox", "l1"))
    tx = inject(optax.sgd(0.1), adapted, learning_rate=0.05, sparsity=0.0)
    step = jax.jit(tx.update)
    state, grads = tx.init(adapted.trainable), gradients(1, adapted.trainable)
    left = []
    for sparsity in (0.0, 5.0, 50.0):
        state.hyperparams["sparsity"] = jnp.asarray(sparsity)
        plain = sora(optax.sgd(0.1), adapted, learning_rate=0.05, sparsity=sparsity)
        got, _ = step(grads, state, adapted.trainable)
        want, _ = plain.update(grads, plain.init(adapted.trainable), adapted.trainable)
        assert_close(got, want, 1e-6)
        new = optax.apply_updates(adapted.trainable, got)
        left.append(sum(np.count_nonzero(named["g"]) for named in new.values()))
    assert left[0] > left[1] > left[2] and step._cache_size() == 1
