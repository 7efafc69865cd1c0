"""What is a step: microbatches under `optax.MultiSteps`, and gradients that `optax.apply_if_finite` skips.

The oracles are other runs: one call on the mean gradient for a window of microbatches, and the run that never met the
gradient which was skipped.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora

pytestmark = pytest.mark.settled

PARAMS = {"query": {"kernel": jax.random.normal(jax.random.key(0), (2, 6, 5))}, "bias": jnp.ones(5)}
STEPS, MICRO = 4, 3


def adapted(method):
    """Random factors on a stack of two layers, and a whole leaf."""
    made = jlora.adapt(PARAMS, [method, jlora.Full(target="bias")], axes={"query/kernel": "sio"})
    leaves, treedef = jax.tree.flatten(made.trainable)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.3 * jax.random.normal(k, x.shape) for x, k in zip(leaves, keys, strict=True)]
    return jlora.join(treedef.unflatten(moved), made.frozen)


def method(cls, **options):
    return cls(rank=3, target="kernel", **options)


def chained(*parts):
    return optax.chain(*(optax.GradientTransformationExtraArgs(p.init, p.update) for p in parts))


# name: the adapter's method, the optimizer of (inner, adapter), what an update is given besides
OPTIMIZERS = {
    "adalora": (method(jlora.AdaLoRA), lambda tx, ad: jlora.rank.adalora(tx, ad, target_rank=1, total_steps=STEPS), {}),
    "adalora revive": (
        method(jlora.AdaLoRA),
        lambda tx, ad: jlora.rank.adalora(tx, ad, target_budget=2, total_steps=STEPS, interval=2, revive=True),
        {},
    ),
    "sora": (method(jlora.SoRA), lambda tx, ad: jlora.rank.sora(tx, ad, learning_rate=0.1, sparsity=1.0), {}),
    "sora l1": (
        method(jlora.SoRA),
        lambda tx, ad: jlora.rank.sora(
            tx, ad, learning_rate=0.1, sparsity=jlora.rank.linear(0.0, 2.0, 3), l1=0.1, gates=optax.sgd(0.1)
        ),
        {},
    ),
    "selora": (method(jlora.LoRA), lambda tx, ad: jlora.rank.selora(tx, ad, interval=2, threshold=1.0), {}),
    "dylora": (method(jlora.LoRA), lambda tx, ad: jlora.rank.dylora(tx, ad), {"b": 2}),
    "lora_plus": (method(jlora.LoRA), lambda tx, ad: chained(tx, jlora.optim.lora_plus(ad)), {}),
    "riemannian": (method(jlora.LoRA), lambda tx, ad: chained(jlora.optim.riemannian(ad), tx), {}),
    "lora_fa": (method(jlora.LoRAFA), lambda tx, ad: chained(jlora.optim.lora_fa(ad), tx), "frozen"),
    "offload": (method(jlora.LoRA), lambda tx, ad: jlora.optim.offload(tx, size=10), {}),
}
TABLE = pytest.mark.parametrize("name", OPTIMIZERS)


def gradients(trainable, count, seed=2):
    leaves, treedef = jax.tree.flatten(trainable)
    draw = lambda key: [jax.random.normal(k, x.shape) for k, x in zip(jax.random.split(key, len(leaves)), leaves)]  # noqa: B905
    return [treedef.unflatten(draw(key)) for key in jax.random.split(jax.random.key(seed), count)]


def trained(tx, ad, grads, given):
    """The trainable half and the state after these gradients."""
    extra = {"frozen": ad.frozen} if given == "frozen" else given
    trainable, state = ad.trainable, tx.init(ad.trainable)

    @jax.jit
    def step(grad, state, trainable):
        updates, state = tx.update(grad, state, trainable, **extra)
        return optax.apply_updates(trainable, updates), state

    for grad in grads:
        trainable, state = step(grad, state, trainable)
    return trainable, state


def decided(state):
    """What a schedule of ranks has decided: counts, masks, ranks and scores, without the optimizer inside."""
    kinds = (jlora.rank.AdaLoRAState, jlora.rank.SoRAState, jlora.rank.SeLoRAState)
    found = [x for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, kinds)) if isinstance(x, kinds)]
    return [x._replace(inner=(), gathered=()) for x in found]


def assert_same(one, other):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6, err_msg=jax.tree_util.keystr(path))


INNER = optax.adamw(0.05, weight_decay=0.1)


@TABLE
@pytest.mark.parametrize("where", ["around", "inside"])
def test_a_window_of_microbatches_is_one_step_on_their_mean(name, where):
    """MultiSteps in either place: parameters, masks, ranks and scores are those of the mean gradients."""
    spec, make, given = OPTIMIZERS[name]
    ad = adapted(spec)
    grads = gradients(ad.trainable, STEPS * MICRO)
    means = [jax.tree.map(lambda *xs: sum(xs) / MICRO, *grads[n : n + MICRO]) for n in range(0, STEPS * MICRO, MICRO)]
    want, state = trained(make(INNER, ad), ad, means, given)
    if where == "around":
        tx = optax.MultiSteps(make(INNER, ad), MICRO)
    else:
        tx = make(optax.MultiSteps(INNER, MICRO), ad)
    got, held = trained(tx, ad, grads, given)
    assert_same(got, want)
    assert_same(decided(held), decided(state))


@TABLE
@pytest.mark.parametrize("where", ["around", "inside"])
def test_a_skipped_gradient_leaves_no_trace(name, where):
    """apply_if_finite in either place: NaN, infinity and NaN outside the ranks are as if they had not been."""
    spec, make, given = OPTIMIZERS[name]
    ad = adapted(spec)
    good = gradients(ad.trainable, STEPS)
    bad = [jax.tree.map(lambda x, v=v: jnp.full_like(x, v), good[0]) for v in (jnp.nan, jnp.inf)]
    outside = good[1] | {"bias": jax.tree.map(lambda x: x * jnp.nan, good[1]["bias"])}
    safe = lambda tx: optax.apply_if_finite(tx, 10)
    tx = safe(make(INNER, ad)) if where == "around" else make(safe(INNER), ad)
    want, state = trained(make(INNER, ad), ad, good, given)
    got, held = trained(tx, ad, [bad[0], *good[:2], bad[1], outside, *good[2:], bad[0]], given)
    assert_same(got, want)
    assert_same(decided(held), decided(state))


def test_microbatches_that_multisteps_skips_are_no_part_of_the_mean():
    """`should_skip_update_fn` inside adalora: scores are of the microbatches that were taken."""
    spec, make, given = OPTIMIZERS["adalora"]
    ad = adapted(spec)
    grads = gradients(ad.trainable, 2 * STEPS)
    large = jax.tree.map(lambda x: 100 * x, grads[0])
    skip = lambda updates, step, params: ((norm := optax.global_norm(updates)) > 50, norm)
    means = [jax.tree.map(lambda x, y: (x + y) / 2, *grads[n : n + 2]) for n in range(0, 2 * STEPS, 2)]
    want, state = trained(make(INNER, ad), ad, means, given)
    tx = make(optax.MultiSteps(INNER, 2, should_skip_update_fn=skip), ad)
    got, held = trained(tx, ad, [large, *grads[:1], large, *grads[1:]], given)
    assert_same(got, want)
    assert_same(decided(held), decided(state))


def test_gates_that_gather_themselves():
    """`sora` with MultiSteps inside for the gates too: the same as one step on the mean."""
    ad = adapted(method(jlora.SoRA))
    make = lambda tx, gates: jlora.rank.sora(tx, ad, learning_rate=0.1, sparsity=1.0, gates=gates)
    grads = gradients(ad.trainable, 4)
    means = [jax.tree.map(lambda x, y: (x + y) / 2, *grads[n : n + 2]) for n in (0, 2)]
    want, state = trained(make(INNER, optax.sgd(0.1)), ad, means, {})
    gathers = lambda tx: optax.MultiSteps(tx, 2)
    got, held = trained(make(gathers(INNER), gathers(optax.sgd(0.1))), ad, grads, {})
    assert_same(got, want)
    assert_same(decided(held), decided(state))


def test_masked_hands_extra_arguments_through_multisteps():
    """The whole form of LoRA-FA under MultiSteps is its split form; optax alone would drop `frozen`."""
    ad = adapted(method(jlora.LoRAFA))
    grads = gradients(ad.trainable, 4)
    tx = optax.chain(jlora.optim.lora_fa(ad), INNER)
    want, _ = trained(optax.MultiSteps(tx, 2), ad, grads, "frozen")
    whole, state = ad, jlora.masked(optax.MultiSteps(tx, 2)).init(ad)
    for grad in grads:
        updates = jlora.Adapted(grad, jax.tree.map(jnp.zeros_like, ad.frozen))
        updates, state = jlora.masked(optax.MultiSteps(tx, 2)).update(updates, state, whole)
        whole = optax.apply_updates(whole, updates)
    assert_same(whole.trainable, want)
    for x, y in zip(jax.tree.leaves(whole.frozen), jax.tree.leaves(ad.frozen), strict=True):
        np.testing.assert_array_equal(x, y)


# What optimizers are given ------------------------------------------------------------------------

LORA, ADALORA, SORA = (adapted(method(cls)) for cls in (jlora.LoRA, jlora.AdaLoRA, jlora.SoRA))
RANK, OPTIM, NAN = jlora.rank, jlora.optim, float("nan")
SCORES = RANK.magnitude(LORA)


def updated(tx, ad, **extra):
    return tx.update(ad.trainable, tx.init(ad.trainable), ad.trainable, **extra)


MISTAKES = {
    "a rate for an optimizer": (lambda: jlora.masked(1e-3), "masked takes an optax transformation.*not float"),
    "an adapter for an optimizer": (lambda: jlora.masked(LORA), "masked takes an optax transformation.*not Adapted"),
    "offload of a rate": (lambda: OPTIM.offload(1e-3), "offload takes an optax"),
    "adalora of a rate": (lambda: RANK.adalora(1e-3, ADALORA, total_steps=9, target_rank=1), "adalora takes an optax"),
    "sora of a rate": (lambda: RANK.sora(1e-3, SORA, learning_rate=0.1, sparsity=1.0), "sora takes an optax"),
    "gates of a rate": (
        lambda: RANK.sora(INNER, SORA, learning_rate=0.1, sparsity=1.0, gates=1),
        "gates=.*takes an optax",
    ),
    "selora of a rate": (lambda: RANK.selora(1e-3, LORA), "selora takes an optax"),
    "dylora of a rate": (lambda: RANK.dylora(1e-3, LORA), "dylora takes an optax"),
    "a size in words": (lambda: OPTIM.offload(INNER, size="x"), "offload\\(size='x'"),
    "a size of nan": (lambda: OPTIM.offload(INNER, size=NAN), "offload\\(size=nan"),
    "a ratio in words": (lambda: OPTIM.lora_plus(LORA, "16"), "lora_plus\\(ratio='16'"),
    "a ratio of nan": (lambda: OPTIM.lora_plus(LORA, NAN), "ratio=nan"),
    "a ratio of infinity": (lambda: OPTIM.lora_plus(LORA, jnp.inf), "ratio=inf"),
    "an array of ratios": (lambda: OPTIM.lora_plus(LORA, jnp.ones(2)), "ratio="),
    "eps in words": (lambda: OPTIM.riemannian(LORA, "x"), "riemannian\\(eps='x'"),
    "eps of nan": (lambda: OPTIM.riemannian(LORA, np.float32("nan")), "eps=.*positive"),
    "a traced b that is none": (lambda: RANK.prune(LORA, SCORES, -1), "prune\\(b=-1"),
    "half a rank": (lambda: RANK.prune(LORA, SCORES, 2.5), "prune\\(b=2.5"),
    "scores of nan": (lambda: RANK.prune(LORA, jax.tree.map(lambda x: x * NAN, SCORES), 2), "6 of 6 scores are NaN"),
    "scores and b swapped": (lambda: RANK.prune(LORA, 2, SCORES), "scores in the form of"),
    "at rank 1.5": (lambda: RANK.at_rank(LORA, 1.5), "at_rank\\(b=1.5"),
    "at rank nan": (lambda: RANK.at_rank(LORA, NAN), "at_rank\\(b=nan"),
    "at rank True": (lambda: RANK.at_rank(LORA, True), "at_rank\\(b=True"),
    "at rank 0 of jax": (lambda: RANK.at_rank(LORA, jnp.int32(0)), "at_rank\\(b=.*from 1 to 3"),
    "at rank '1'": (lambda: RANK.at_rank(LORA, "1"), "at_rank\\(b='1'"),
    "a step at rank 0": (lambda: updated(RANK.dylora(INNER, LORA), LORA, b=0), "dylora\\(b=0.*from 1 to 3"),
    "a step at rank 99": (lambda: updated(RANK.dylora(INNER, LORA), LORA, b=99), "dylora\\(b=99"),
    "a search on nan": (lambda: RANK.search(LORA, lambda ad: NAN), "nan at rank 3"),
    "a search on None": (lambda: RANK.search(LORA, lambda ad: None), "evaluate.*returned None"),
    "a search on arrays": (lambda: RANK.search(LORA, lambda ad: jnp.ones(2)), "evaluate.*one number"),
    "a start above the rank": (lambda: RANK.selora(INNER, LORA, start=99), "selora\\(start=99.*from 1 to 3"),
    "half an interval": (lambda: RANK.selora(INNER, LORA, interval=1.5), "interval=1.5"),
    "a threshold in words": (lambda: RANK.selora(INNER, LORA, threshold="x"), "threshold='x'"),
    "a threshold of nan": (lambda: RANK.selora(INNER, LORA, threshold=NAN), "threshold=nan"),
    "a rate of nan": (lambda: RANK.sora(INNER, SORA, learning_rate=NAN, sparsity=1.0), "learning_rate=nan"),
    "a rate of None": (lambda: RANK.sora(INNER, SORA, learning_rate=None, sparsity=1.0), "learning_rate=None"),
    "a sparsity of infinity": (lambda: RANK.sora(INNER, SORA, learning_rate=0.1, sparsity=jnp.inf), "sparsity=inf"),
    "a negative l1": (lambda: RANK.sora(INNER, SORA, learning_rate=0.1, sparsity=1.0, l1=-1), "l1=-1"),
    "half a step": (lambda: RANK.adalora(INNER, ADALORA, total_steps=10.5, target_rank=1), "total_steps=10.5"),
    "half a warm-up": (
        lambda: RANK.adalora(INNER, ADALORA, total_steps=9, init_warmup=0.5, target_rank=1),
        "init_warmup",
    ),
    "half a budget": (lambda: RANK.adalora(INNER, ADALORA, total_steps=9, target_budget=2.5), "target_budget=2.5"),
    "a mean rank of nan": (lambda: RANK.adalora(INNER, ADALORA, total_steps=9, target_rank=NAN), "target_rank=nan"),
    "a beta in words": (lambda: RANK.adalora(INNER, ADALORA, total_steps=9, target_rank=1, beta1="x"), "beta1='x'"),
    "a negative threshold": (lambda: RANK.soft_threshold(jnp.ones(3), -1.0), "threshold=-1"),
    "a threshold of nothing": (lambda: RANK.soft_threshold(jnp.ones(3), NAN), "threshold=nan"),
    "a resized rank in words": (lambda: RANK.resize(LORA, rank="1"), "resize\\(rank='1'"),
    "half a resized rank": (lambda: RANK.resize(LORA, rank=1.5), "resize\\(rank=1.5"),
    "an energy of nan": (lambda: RANK.resize(LORA, energy=NAN), "resize\\(energy=nan"),
    "factors of nan": (
        lambda: RANK.resize(jlora.join(jax.tree.map(lambda x: x * NAN, LORA.trainable), LORA.frozen), rank=1),
        "'query/kernel' hold NaN",
    ),
    "a scale of None": (lambda: jlora.scale(LORA, None), "takes a scalar x"),
    "scales by path": (lambda: jlora.scale(LORA, {"query": 0.5}), "takes a scalar x"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_answered_in_words(mistake):
    """What is wrong, by name and value, and what it takes."""
    call, words = MISTAKES[mistake]
    with pytest.raises((ValueError, TypeError), match=words):
        call()


@pytest.mark.parametrize("name", ["adalora", "sora", "selora", "dylora"])
def test_an_optimizer_of_the_frozen_half_is_refused(name):
    """AdamW on a whole Adapted inside a schedule of ranks moves the base; masked, in either place, it does not."""
    spec, make, _ = OPTIMIZERS[name]
    ad = adapted(spec)
    with pytest.raises(ValueError, match=rf"{name}: the optimizer's state holds the frozen half.*jlora.masked"):
        make(INNER, ad).init(ad)
    jlora.masked(make(INNER, ad)).init(ad)
    make(jlora.masked(INNER), ad).init(ad)
    optax.MultiSteps(make(jlora.masked(INNER), ad), 2).init(ad)
