"""Optimizer state on the host: the same numbers, bit for bit, in every form; and where each array lives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import jlora
from jlora.optim import offload
from methods import as_bytes

SIZE = 40  # of the factors below, a of the stack is larger and b is smaller


def start(method=jlora.LoRA):
    rng = np.random.default_rng(0)
    params = {"layers": {"query": {"kernel": jnp.asarray(rng.standard_normal((3, 9, 5)), jnp.float32)}}}
    adapted = jlora.adapt(params, method(rank=2, target="kernel"))
    # What a loop that wants one compilation does: see the docstring.
    return jax.device_put(adapted, jax.memory.Space.Device)


apply = jlora.lift(lambda params, x: jnp.einsum("lbi,lio->lbo", x, params["layers"]["query"]["kernel"]))
X = jnp.asarray(np.random.default_rng(1).standard_normal((3, 4, 9)), jnp.float32)


def train(tx, adapted, whole, steps=5):
    """Parameters and states after some steps, jitted and donated; and how often the step was compiled."""
    join = (lambda t, f: t) if whole else jlora.join

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(trainable, state, frozen):
        loss = lambda t: jnp.mean(jnp.sin(apply(join(t, frozen), X)) - 1) ** 2
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    trainable, frozen = (adapted, None) if whole else jlora.split(adapted)
    trainable = jax.tree.map(jnp.copy, trainable)
    state = tx.init(trainable)
    first = jax.tree.leaves(state)
    for _ in range(steps):
        trainable, state = step(trainable, state, frozen)
    assert all(x.is_deleted() for x in first if x.size >= SIZE)
    return trainable, state, step._cache_size()


def kinds(state):
    return {x.size >= SIZE: x.sharding.memory_kind for x in jax.tree.leaves(state)}


SCHEDULE = {"target_rank": 1, "total_steps": 5}
OPTIMIZERS = {
    "adamw": lambda adapted: optax.adamw(1e-2),
    "chain": lambda adapted: optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(optax.linear_schedule(1, 0, 4))),
    "MultiSteps": lambda adapted: optax.MultiSteps(optax.adam(1e-2), 2),
    "adalora": lambda adapted: jlora.rank.adalora(optax.adamw(1e-2), adapted, **SCHEDULE),
}


@pytest.mark.parametrize("name", [n if n == "adamw" else pytest.param(n, marks=pytest.mark.slow) for n in OPTIMIZERS])
def test_numbers_are_those_of_the_plain_optimizer_bit_for_bit(name):
    """State on the host trains to the plain optimizer's bits in one compilation; small arrays stay on the device."""
    adapted = start(jlora.AdaLoRA if name == "adalora" else jlora.LoRA)
    tx = OPTIMIZERS[name](adapted)
    plain, state, _ = train(tx, adapted, whole=False)
    got, moved, compiled = train(offload(tx, size=SIZE), adapted, whole=False)
    assert as_bytes(got) == as_bytes(plain) and as_bytes(moved) == as_bytes(state) and compiled == 1
    assert jax.tree.structure(moved) == jax.tree.structure(state)
    assert kinds(moved) == {True: "pinned_host", False: "device"} and set(kinds(got).values()) == {"device"}


@pytest.mark.slow
@pytest.mark.parametrize("outside", [False, True])
def test_the_whole_form(outside):
    """On a whole Adapted, inside `masked` or around it, the bits are the plain optimizer's, in one compilation."""
    tx = optax.adamw(1e-2)
    both = offload(jlora.masked(tx), size=SIZE) if outside else jlora.masked(offload(tx, size=SIZE))
    plain, state, _ = train(jlora.masked(tx), start(), whole=True)
    got, moved, compiled = train(both, start(), whole=True)
    assert as_bytes(got) == as_bytes(plain) and as_bytes(moved) == as_bytes(state) and compiled == 1
    assert kinds(moved) == {True: "pinned_host", False: "device"}


def test_what_is_large_is_a_matter_of_size():
    """An array of at least `size` elements, by default 100,000, is on the host and a smaller one on the device."""
    trainable = {"a": jnp.ones((2, 50_000)), "b": jnp.ones(99_999)}
    state = offload(optax.adam(1.0)).init(trainable)
    assert [x.sharding.memory_kind for x in (state[0].mu["a"], state[0].mu["b"])] == ["pinned_host", "device"]
    all_of_it = offload(optax.adam(1.0), size=0).init({"b": jnp.ones(3)})
    assert {x.sharding.memory_kind for x in jax.tree.leaves(all_of_it)} == {"pinned_host"}
    with pytest.raises(ValueError, match="-1"):
        offload(optax.adam(1.0), size=-1)


def test_a_backend_without_host_memory_has_the_plain_optimizer(monkeypatch):
    """A backend that has no pinned host memory keeps all state on the device, and nothing fails."""

    class Memory:
        kind = "device"

    class Device:
        addressable_memories = lambda self: [Memory()]

    monkeypatch.setattr(jax, "local_devices", lambda: [Device()])
    tx = offload(optax.adam(1.0), size=0)
    monkeypatch.undo()
    state = tx.init({"b": jnp.ones(3)})
    assert {x.sharding.memory_kind for x in jax.tree.leaves(state)} == {"device"}


@pytest.mark.slow
def test_state_on_the_host_is_checkpointed_and_cut_as_any_other(tmp_path):
    """State on the host is restored to the host bit for bit, and compacted to what plain state is."""
    adapted = start(jlora.AdaLoRA)
    tx = offload(jlora.rank.adalora(optax.adamw(1e-2), adapted, **SCHEDULE), size=SIZE)
    trainable, state, _ = train(tx, adapted, whole=False)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        again = checkpointer.restore(tmp_path / "state", tx.init(trainable))
    assert as_bytes(again) == as_bytes(state) and kinds(again) == kinds(state)
    whole = jlora.join(trainable, adapted.frozen)
    whole = jlora.rank.prune(whole, jlora.rank.magnitude(whole), 1)  # of six
    small, cut = jlora.rank.compact(whole, state)
    assert jlora.count(small)[0] < jlora.count(whole)[0]
    plain = jlora.rank.compact(whole, jax.device_put(state, jax.memory.Space.Device))[1]
    assert as_bytes(cut) == as_bytes(plain)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_on_a_mesh_each_device_has_its_shards_on_the_host(kind):
    """On a mesh large state is on the host, sharded as its factor is, and the numbers are the plain optimizer's."""
    axes = (getattr(AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=axes)
    params = {"up": {"kernel": np.random.default_rng(0).standard_normal((8, 32)).astype(np.float32)}}
    adapted = jlora.shard.init(params, jlora.LoRA(rank=2, target="kernel"), mesh, {"up": {"kernel": P(None, "tensor")}})
    lifted = jlora.lift(lambda p, x: x @ p["up"]["kernel"])
    loss = lambda adapted, x: jnp.mean((lifted(adapted, x) - 1) ** 2)
    ends = []
    for tx in (optax.adamw(1e-2), offload(optax.adamw(1e-2), size=SIZE)):
        trainable, frozen = jlora.split(jax.tree.map(jnp.copy, adapted))
        places = jlora.shard.state_shardings(tx, adapted)
        state = jax.jit(tx.init, out_shardings=places)(trainable)
        step = jlora.shard.train_step(loss, tx, mesh, adapted, batch=P("data"))
        for _ in range(3):
            trainable, state, _ = step(trainable, state, frozen, np.ones((8, 8), np.float32))
        for x, place in zip(jax.tree.leaves(state), jax.tree.leaves(places), strict=True):
            assert x.sharding.is_equivalent_to(place, x.ndim) and x.sharding.memory_kind == place.memory_kind
        ends.append((trainable, state))
    (plain, state), (got, moved) = ends
    assert as_bytes(got) == as_bytes(plain) and as_bytes(moved) == as_bytes(state)
    assert kinds(moved) == {True: "pinned_host", False: "device"}
    assert moved[0].mu["up/kernel"]["b"].sharding.spec == P(None, "tensor")
