"""Flax's TrainState and optax, in both forms: twenty steps, eager and jitted, over a base with -0.0 and bfloat16."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jlora
from methods import as_bytes, assert_close


def base():
    """Float32 and bfloat16 leaves, zeros of both signs, infinity and NaN where nothing reads them.

    No denormals: XLA flushes them in any addition, so that whatever the update, the whole form loses them on a CPU.
    """
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    return {
        "query": {"kernel": draw(1, 6, 8).at[0].set(-0.0), "bias": jnp.full(8, -0.0)},
        "value": {"kernel": draw(2, 8, 5).astype(jnp.bfloat16).at[:, 0].set(-0.0), "bias": jnp.zeros(5, jnp.bfloat16)},
        "unused": jnp.array([0.0, -0.0, jnp.inf, jnp.nan], jnp.float32),
        "scale": jnp.array(-0.0),
    }


def model(params, x):
    h = jnp.tanh(x @ params["query"]["kernel"] + params["query"]["bias"])
    return (1 + params["scale"]) * (h @ params["value"]["kernel"] + params["value"]["bias"]).astype(jnp.float32)


apply = jlora.lift(model)
SPEC = [jlora.LoRA(rank=2, alpha=4), jlora.BitFit(target="query/bias")]
X = jnp.asarray(np.random.default_rng(3).standard_normal((16, 6)), jnp.float32)
Y = jnp.asarray(np.random.default_rng(4).standard_normal((16, 5)), jnp.float32)


def adapted():
    return jlora.adapt(base(), SPEC)


def split_step(state, frozen):
    loss = lambda t: jnp.square(state.apply_fn(jlora.join(t, frozen), X) - Y).mean()
    value, grads = jax.value_and_grad(loss)(state.params)
    return state.apply_gradients(grads=grads), value


def whole_step(state, _):
    value, grads = jax.value_and_grad(lambda ad: jnp.square(state.apply_fn(ad, X) - Y).mean())(state.params)
    return state.apply_gradients(grads=grads), value


def trained(form, tx, jit, steps=20):
    """(first loss, last loss, state, frozen half at the end)"""
    trainable, frozen = jlora.split(adapted())
    if form == "split":
        state, step = TrainState.create(apply_fn=apply, params=trainable, tx=tx), split_step
    else:
        state = TrainState.create(apply_fn=apply, params=jlora.join(trainable, frozen), tx=jlora.masked(tx))
        step = whole_step
    step = jax.jit(step) if jit else step
    losses = []
    for _ in range(steps):
        state, loss = step(state, frozen)
        losses.append(float(loss))
    return losses, state, frozen if form == "split" else state.params.frozen


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
@pytest.mark.parametrize("form", ["split", "whole"])
def test_twenty_steps(form, jit):
    """The loss falls, all that is trained moves, and no bit of what is frozen does."""
    losses, state, frozen = trained(form, optax.adamw(2e-2), jit)
    assert losses[-1] < 0.9 * losses[0]
    assert int(state.step) == 20
    start = adapted()
    assert as_bytes(frozen) == as_bytes(start.frozen)
    now = state.params if form == "split" else state.params.trainable
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(now), jax.tree.leaves(start.trainable), strict=True):
        assert not np.array_equal(a, b), path


TRANSFORMS = {
    "sgd": optax.sgd(1e-2, momentum=0.9),
    "adamw": optax.adamw(1e-2, weight_decay=0.1),
    "clipped": optax.chain(optax.clip_by_global_norm(0.1), optax.adamw(1e-2)),
    "scheduled": optax.adamw(optax.cosine_decay_schedule(1e-2, 20)),
    "lion": optax.lion(1e-3),
    "adafactor": optax.adafactor(1e-2),
    "averaged": optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2).gradient_transformation(),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_both_forms_train_alike(name):
    """Whatever the transformation, one that mixes leaves among them: the frozen half takes no part in it."""
    (one, split, _), (other, whole, frozen) = (trained(form, TRANSFORMS[name], True) for form in ("split", "whole"))
    assert_close(whole.params.trainable, split.params)
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert as_bytes(frozen) == as_bytes(adapted().frozen)


def sizes(state):
    return sorted(x.size for x in jax.tree.leaves(state))


@pytest.mark.parametrize("form", ["split", "whole"])
def test_the_optimizer_holds_twice_what_is_trained_and_a_counter(form):
    """Adam keeps two moments of each factor and nothing of the base, in either form."""
    ad = adapted()
    params, tx = (ad.trainable, optax.adamw(1e-3)) if form == "split" else (ad, jlora.masked(optax.adamw(1e-3)))
    state = tx.init(params)
    assert sizes(state) == sorted([1] + 2 * [x.size for x in jax.tree.leaves(ad.trainable)])
    assert sum(sizes(state)) == 2 * jlora.count(ad)[0] + 1


def test_optax_masked_alone_moves_the_base():
    """Why `jlora.masked` exists: optax passes the gradients of what is masked out through, as they are.

    `lift` stops gradients at the frozen half, so that they are zeros there; an update of +0.0 still turns -0.0 over.
    """
    ad = adapted()
    tx = optax.masked(optax.sgd(1.0), jlora.trainable_mask)
    updates, _ = tx.update(jax.tree.map(jnp.ones_like, ad), tx.init(ad), ad)
    assert all(np.all(np.asarray(u, np.float32) == 1) for u in jax.tree.leaves(updates.frozen))
    grads = jax.grad(lambda ad: jnp.square(apply(ad, X) - Y).mean())(ad)
    assert not any(np.any(np.asarray(g)) for g in jax.tree.leaves(grads.frozen))
    updates, _ = tx.update(grads, tx.init(ad), ad)
    assert as_bytes(optax.apply_updates(ad, updates).frozen) != as_bytes(ad.frozen)


@pytest.mark.parametrize("jit", [False, True], ids=["eager", "jit"])
def test_masked_updates_are_minus_zero(jit):
    """x + -0.0 is x for every x, -0.0 and infinity among them; whatever gradients come in."""
    ad = adapted()
    tx = jlora.masked(optax.adamw(1e-3))
    update = jax.jit(tx.update) if jit else tx.update
    updates, state = update(jax.tree.map(jnp.ones_like, ad), tx.init(ad), ad)
    for update, leaf in zip(jax.tree.leaves(updates.frozen), jax.tree.leaves(ad.frozen), strict=True):
        assert update.shape == leaf.shape and update.dtype == leaf.dtype
        assert np.all(np.asarray(update, np.float32) == 0) and np.all(np.signbit(np.asarray(update, np.float32)))
    assert all(np.any(u) for u in jax.tree.leaves(updates.trainable))
    assert as_bytes(optax.apply_updates(ad, updates).frozen) == as_bytes(ad.frozen)
    chex.assert_trees_all_equal_structs(state, tx.init(ad))


def test_the_mask_is_structure_alone():
    """It can be given to optax as the mask, works on structs and tracers, and trains what stands beside an adapter."""
    ad = adapted()
    structs = jax.eval_shape(adapted)
    mask = jlora.trainable_mask(ad)
    assert jax.tree.structure(mask) == jax.tree.structure(ad) == jax.tree.structure(jlora.trainable_mask(structs))
    assert all(jax.tree.leaves(mask.trainable)) and not any(jax.tree.leaves(mask.frozen))
    both = jlora.trainable_mask({"model": ad, "head": jnp.ones(3)})
    assert both["head"] is True and both["model"] == mask
    frozen = jax.tree.map(lambda trained: not trained, mask)
    direct = optax.chain(optax.masked(optax.sgd(1.0), mask), optax.masked(optax.set_to_zero(), frozen))
    grads = jax.grad(lambda ad: jnp.square(apply(ad, X) - Y).mean())(ad)
    updates, _ = direct.update(grads, direct.init(ad), ad)
    assert_close(updates.trainable, jax.tree.map(lambda g: -g, grads.trainable))


def test_masked_beside_other_parameters():
    """A new head outside the adapter trains along; the adapter's frozen half does not."""
    params = {"model": adapted(), "head": jnp.ones((5, 2))}
    tx = jlora.masked(optax.adamw(1e-2))
    grads = jax.grad(lambda p: jnp.square(apply(p["model"], X) @ p["head"]).mean())(params)
    updates, _ = tx.update(grads, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert as_bytes(new["model"].frozen) == as_bytes(params["model"].frozen)
    assert as_bytes(new["head"]) != as_bytes(params["head"])


def test_integers_train_in_the_split_form():
    """A counter in the base has no gradient: the whole form says so, the split form does not mind."""
    params = base() | {"steps": jnp.array(3)}
    ad = jlora.adapt(params, SPEC)
    with pytest.raises(TypeError, match="(?s)steps.*int32.*jlora.split"):
        TrainState.create(apply_fn=apply, params=ad, tx=jlora.masked(optax.adamw(1e-3)))
    trainable, frozen = jlora.split(ad)
    state = TrainState.create(apply_fn=apply, params=trainable, tx=optax.adamw(1e-3))
    state, _ = jax.jit(split_step)(state, frozen)
    assert as_bytes(frozen) == as_bytes(ad.frozen)


def test_a_train_state_has_a_pytree_of_its_own():
    """What checkpoints and `jax.tree` see: the split form holds no base."""
    ad = adapted()
    state = TrainState.create(apply_fn=apply, params=ad.trainable, tx=optax.adamw(1e-3))
    held = sum(x.size for x in jax.tree.leaves(state) if hasattr(x, "size"))
    assert held == 3 * jlora.count(ad)[0] + 1
