"""What optax needs to know of an adapter: closed forms in float64, laws of the paper, and every form they must fit."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState

import jlora
from jlora import network
from jlora.optim import factor_labels, lora_fa, lora_plus, riemannian
from methods import as_bytes, assert_close, away_from_start


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def base():
    """A weight, a stack of three, one with heads, an embedding, and a bias."""
    return {
        "dense": {"kernel": draw(1, 6, 5), "bias": draw(2, 5)},
        "layers": {"kernel": draw(3, 3, 6, 5)},
        "query": {"kernel": draw(4, 8, 2, 4)},
        "embed": {"embedding": draw(5, 7, 4)},
    }


@functools.cache
def start(method=jlora.LoRA, target="dense/kernel|layers", **fields):
    """A weight and a stack under a method and the bias under BitFit, away from the start."""
    spec = [method(rank=2, alpha=3, target=target, **fields), jlora.BitFit(target="bias$")]
    adapted = jlora.adapt(base(), spec)
    return jlora.join(away_from_start(adapted.trainable), adapted.frozen)


def gradients(trainable):
    return jax.tree.map(lambda x: draw(x.size, *x.shape).astype(x.dtype), trainable)


def stepped(tx, trainable, grads, **extra):
    """The updates of a first step."""
    update = lambda trainable, grads, extra: tx.update(grads, tx.init(trainable), trainable, **extra)[0]
    return jax.jit(update)(trainable, grads, extra)


def flat(x, stack):
    """(layers, r, n) in float64."""
    x = np.asarray(x, np.float64)
    return x.reshape(math.prod(x.shape[:stack]), x.shape[stack], -1)


STACKS = {"layers/kernel": 1}  # of all others: none


# --- labels -------------------------------------------------------------------------------------------------------


def test_labels_are_the_factors_names():
    """A factor's label is its name, any other leaf's is its own, and all of a frozen half is 'frozen'."""
    adapted = start()
    labels = factor_labels(adapted.trainable)
    assert labels["dense/kernel"] == {"a": "a", "b": "b"} and labels["dense/bias"] == {"delta": "delta"}
    whole = factor_labels({"model": adapted, "head": {"kernel": jnp.ones(3)}})
    assert whole["model"].trainable == labels and whole["head"] == {"kernel": "kernel"}
    assert set(jax.tree.leaves(whole["model"].frozen)) == {"frozen"}


def test_labels_look_at_structure_alone():
    """Structs, tracers and masks have the labels of arrays; what is masked out has none."""
    adapted = start()
    want = factor_labels(adapted)
    assert factor_labels(jax.eval_shape(start)) == want == factor_labels(jlora.trainable_mask(adapted))
    seen = []
    jax.jit(lambda adapted: seen.append(factor_labels(adapted)))(adapted)
    assert seen == [want]
    hidden = jax.tree.map(lambda m, x: x if m else optax.MaskedNode(), jlora.trainable_mask(adapted), adapted)
    assert factor_labels(hidden).trainable == want.trainable and not jax.tree.leaves(factor_labels(hidden).frozen)


@pytest.mark.parametrize("given", ["labels", "callable"])
def test_labels_partition_both_forms(given):
    """Labels, as a tree or as the callable, give each factor an optimizer of its own in the split and whole form."""
    adapted = start()
    rates = {"a": 1.0, "b": 2.0, "delta": 3.0}
    rules = {name: optax.sgd(rate) for name, rate in rates.items()}
    grads = gradients(adapted.trainable)
    want = {g: {n: -rates[n] * x for n, x in fs.items()} for g, fs in grads.items()}
    split = optax.partition(rules, factor_labels(adapted.trainable) if given == "labels" else factor_labels)
    assert_close(stepped(split, adapted.trainable, grads), want)
    # where no frozen leaf is seen, no label is "frozen"
    whole = jlora.masked(optax.partition(rules, factor_labels))
    if given == "labels":
        whole = optax.partition(rules | {"frozen": optax.set_to_zero()}, factor_labels(adapted))
    zeros = jax.tree.map(jnp.zeros_like, adapted.frozen)
    assert_close(stepped(whole, adapted, jlora.Adapted(grads, zeros)).trainable, want)


# --- every form ---------------------------------------------------------------------------------------------------

CASES = {
    "lora_plus": (jlora.LoRA, lambda adapted: optax.chain(optax.adam(1e-2), lora_plus(adapted, 7.0))),
    "riemannian": (jlora.LoRA, lambda adapted: optax.chain(riemannian(adapted), optax.sgd(1e-2, momentum=0.9))),
    "lora_fa": (jlora.LoRAFA, lambda adapted: optax.chain(lora_fa(adapted), optax.sgd(1e-2, momentum=0.9))),
}


def train(tx, params, grads, **extra):
    """Three steps on fixed gradients, in one compiled program that holds no array of the adapter."""

    @jax.jit
    def step(params, state, grads, extra):
        updates, state = tx.update(grads, state, params, **extra)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state, grads, extra)
    assert step._cache_size() == 1
    return params


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_form_takes_the_same_steps(name):
    """Split, whole inside and outside `jlora.masked`, inside a larger tree, under masks and averaging."""
    method, make = CASES[name]
    adapted = start(method)
    trainable, frozen = jlora.split(adapted)
    grads = gradients(trainable)
    extra = {"frozen": frozen} if name == "lora_fa" else {}
    want = train(make(adapted), trainable, grads, **extra)
    assert as_bytes(want) != as_bytes(trainable)
    whole = jlora.Adapted(grads, jax.tree.map(jnp.zeros_like, frozen))
    beside = lambda x, head: {"model": x, "head": head}

    inside = train(jlora.masked(make(adapted)), adapted, whole)
    assert_close(inside.trainable, want)
    assert as_bytes(inside.frozen) == as_bytes(frozen)
    assert_close(train(optax.chain(make(adapted), jlora.masked(optax.identity())), adapted, whole).trainable, want)
    head, g = jnp.ones(3), jnp.zeros(3)
    assert_close(train(make(adapted), beside(adapted, head), beside(whole, g))["model"].trainable, want)
    assert_close(train(make(adapted), beside(trainable, head), beside(grads, g), **extra)["model"], want)
    all_true = jax.tree.map(lambda _: True, trainable)
    assert_close(train(optax.masked(make(adapted), all_true), trainable, grads, **extra), want)
    prefix = jlora.Adapted(True, False)
    got = train(optax.masked(make(adapted), prefix), adapted, whole, **extra)
    assert_close(got.trainable, want)
    several = optax.MultiSteps(make(adapted), 1).gradient_transformation()
    assert_close(train(several, trainable, grads, **extra), want)
    behind = optax.chain(make(adapted), jlora.masked(optax.MultiSteps(optax.identity(), 1)))
    assert_close(train(behind, adapted, whole).trainable, want)


@pytest.mark.parametrize("name", CASES)
def test_what_is_no_pair_passes_through(name):
    """A bias's update passes through as the very array, and optax finds its way through the states."""
    method, make = CASES[name]
    adapted = start(method)
    grads = gradients(adapted.trainable)
    alone = {"lora_plus": lora_plus, "riemannian": riemannian, "lora_fa": lora_fa}[name](adapted)
    got, _ = alone.update(grads, alone.init(adapted.trainable), adapted.trainable, frozen=adapted.frozen)
    assert got["dense/bias"]["delta"] is grads["dense/bias"]["delta"]
    state = make(adapted).init(adapted.trainable)
    same = optax.tree_utils.tree_map_params(make(adapted), lambda x: x, state)
    assert jax.tree.structure(same) == jax.tree.structure(state) and as_bytes(same) == as_bytes(state)


@pytest.mark.parametrize("name", CASES)
def test_steps_are_averaged_before_or_after(name):
    """Two halves of a batch under `MultiSteps`, around the chain or behind the projection, step as the whole does."""
    method, make = CASES[name]
    adapted = start(method)
    trainable, frozen = jlora.split(adapted)
    one, other = gradients(trainable), away_from_start(trainable)
    extra = {"frozen": frozen} if name == "lora_fa" else {}
    want = stepped(make(adapted), trainable, jax.tree.map(lambda x, y: (x + y) / 2, one, other), **extra)
    around = [optax.MultiSteps(make(adapted), 2)]
    if name == "lora_fa":
        around.append(optax.chain(lora_fa(adapted), optax.MultiSteps(optax.sgd(1e-2, momentum=0.9), 2)))
    for tx in around:
        update = jax.jit(lambda grads, state, extra, tx=tx: tx.update(grads, state, trainable, **extra))
        nothing, state = update(one, tx.init(trainable), extra)
        assert not any(np.any(x) for x in jax.tree.leaves(nothing))
        assert_close(update(other, state, extra)[0], want, 1e-4)


@pytest.mark.parametrize("name", CASES)
def test_factors_keep_their_dtype(name):
    """bfloat16 gradients of bfloat16 factors: solved in float32, given back as they came."""
    method, make = CASES[name]
    adapted = start(method, dtype="bfloat16")
    grads = gradients(adapted.trainable)
    got = stepped(make(adapted), adapted.trainable, grads, frozen=adapted.frozen)
    wide = lambda tree: jax.tree.map(lambda x: x.astype(jnp.float32), tree)
    frozen = dataclasses.replace(adapted.frozen, factors=wide(adapted.frozen.factors))
    want = stepped(make(adapted), wide(adapted.trainable), wide(grads), frozen=frozen)
    for group, factors in got.items():
        for factor, x in factors.items():
            assert x.dtype == grads[group][factor].dtype
            np.testing.assert_allclose(x.astype(jnp.float32), want[group][factor], rtol=2e-2)


def test_they_train_in_a_train_state():
    """Flax's own, whole form: what is frozen reaches the transformation, and no bit of it moves."""
    adapted = start(jlora.LoRAFA)
    apply = jlora.lift(lambda p, x: jnp.tanh(x @ p["dense"]["kernel"]) + x @ p["layers"]["kernel"][0])
    x = draw(9, 16, 6)
    tx = jlora.masked(optax.chain(lora_fa(adapted), optax.adam(0.1)))
    state = TrainState.create(apply_fn=apply, params=adapted, tx=tx)

    @jax.jit
    def step(state):
        loss, grads = jax.value_and_grad(lambda p: jnp.mean((apply(p, x) - 1) ** 2))(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(20):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0] and as_bytes(state.params.frozen) == as_bytes(adapted.frozen)


@pytest.mark.parametrize("make", [lora_plus, riemannian, lora_fa], ids=lambda make: make.__name__)
def test_mistakes_are_refused_in_words(make):
    """A transformation that would do nothing is not made, one of another adapter takes no step; the words say why."""
    method = jlora.LoRAFA if make is lora_fa else jlora.LoRA
    adapted = start(method)
    trainable = adapted.trainable
    with pytest.raises(TypeError, match="takes an Adapted.*dict"):
        make(trainable)
    with pytest.raises(TypeError, match="takes an Adapted"):
        make(jlora.trainable_mask(jlora.Adapted(trainable, True)))
    with pytest.raises(ValueError, match=f"{make.__name__} would do nothing.*BitFit"):
        make(jlora.adapt(base(), jlora.BitFit(target="bias$")))
    with pytest.raises(ValueError, match="would do nothing"):
        make(start(jlora.LoRA if make is lora_fa else jlora.LoRAFA))
    with pytest.raises(ValueError, match="another adapter"):
        stepped(make(adapted), {"x": {"a": jnp.ones(2)}}, {"x": {"a": jnp.ones(2)}})
    with pytest.raises(ValueError, match="positive"):
        make(adapted, 0.0)


# --- LoRA+ --------------------------------------------------------------------------------------------------------

CHAINS = {
    "adamw": lambda rate: optax.adamw(rate, weight_decay=0.3),
    "momentum": lambda rate: optax.sgd(rate, momentum=0.9, nesterov=True),
    "lion": lambda rate: optax.lion(rate, weight_decay=0.1),
    "clipped": lambda rate: optax.chain(optax.clip_by_global_norm(0.5), optax.adam(rate)),
}


@pytest.mark.parametrize("schedule", [False, True], ids=["constant", "schedule"])
@pytest.mark.parametrize("name", CHAINS)
def test_lora_plus_is_a_learning_rate_of_its_own(name, schedule):
    """The authors' parameter groups: an optimizer of the rate lr on a, one of ratio x lr on b."""
    adapted = jlora.adapt(base(), jlora.LoRA(rank=2, target="kernel$"))
    start, grads = away_from_start(adapted.trainable), gradients(adapted.trainable)
    rate = lambda by: (lambda n: by * 1e-2 / (1 + n)) if schedule else by * 1e-2
    transform = CHAINS[name]
    got = train(optax.chain(transform(rate(1)), lora_plus(adapted, 16)), start, grads)
    if name == "clipped":  # one norm over both groups
        by_rate = {"a": optax.adam(rate(1)), "b": optax.adam(rate(16))}
        want = train(optax.chain(optax.clip_by_global_norm(0.5), optax.partition(by_rate, factor_labels)), start, grads)
    else:
        want = train(optax.partition({"a": transform(rate(1)), "b": transform(rate(16))}, factor_labels), start, grads)
    assert_close(got, want)


def fast(method, params=None):
    """{group: factors that a ratio of two speeds up}"""
    adapted = jlora.adapt(base() if params is None else params, method)
    ones = jax.tree.map(jnp.ones_like, adapted.trainable)
    got = stepped(lora_plus(adapted, 2), ones, ones)
    return {g: {n for n, x in fs.items() if np.all(np.asarray(x) == 2)} for g, fs in got.items()}


@pytest.mark.parametrize(
    "method,names",
    [
        (jlora.LoRA(rank=2), {"b"}),
        (jlora.LoRA(rank=1, slices=((0, 3), (4, 8))), {"b0", "b1"}),
        (jlora.DoRA(jlora.LoRA(rank=2)), {"b"}),
        (jlora.SoRA(rank=2, target="query"), {"b"}),
        (jlora.AdaLoRA(rank=2, target="query"), {"q"}),
        (jlora.HiRA(rank=2), {"b"}),
        (jlora.LoHa(rank=2), {"b1", "b2"}),
        (jlora.LoKr(rank=1, factor=2), {"b"}),
    ],
    ids=lambda x: x.describe() if isinstance(x, jlora.methods.Method) else "-".join(sorted(x)),
)
def test_which_factor_is_fast_is_read_off_the_equation(method, names):
    """The fast factor of LoRA+ is the one in B's place in the equation of each method, and no other."""
    assert fast(method)["query/kernel"] == names


def test_the_fast_factor_of_an_embedding_is_the_one_that_starts_at_zero():
    """LoRA+ speeds up an embedding's a, which starts at zero, and no factor that is trained without its partner."""
    embedding = jlora.LoRA(rank=2, target="embedding$")
    assert fast(embedding) == {"embed/embedding": {"a"}}
    assert not np.any(jlora.adapt(base(), embedding).trainable["embed/embedding"]["a"])
    tied = fast(jlora.TiedLoRA(rank=2, target=["dense/kernel", "layers/kernel"]))
    assert {n for names in tied.values() for n in names} == {"b"}
    # nothing that is trained alone is sped up: LoRA-FA's b, whole leaves
    mixed = [jlora.LoRA(rank=2), jlora.LoRAFA(rank=2, target="dense/kernel"), jlora.Full(target="layers")]
    assert fast(mixed) == {"query/kernel": {"b"}, "dense/kernel": set(), "layers/kernel": set()}


def test_names_play_no_part():
    """A method whose letters stand the other way round, with a first factor that starts at zero."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Turned(jlora.methods.Method):
        def recipe(self, leaf):
            b = network.Array("b", jlora.methods.base.zeros)
            a = network.Array("a", jlora.methods.base.normal(1.0))
            return network.Recipe((network.Delta("k I, k O -> I O", (b, a), (("k", 2),), ranks=("k",)),))

    assert fast(Turned(target="dense/kernel")) == {"dense/kernel": {"b"}}
    assert fast(jlora.LoRA(rank=2, target="dense/kernel")) == {"dense/kernel": {"b"}}


# --- the Riemannian preconditioner --------------------------------------------------------------------------------


def test_riemannian_is_the_papers_formula():
    """A factor's gradient is multiplied by the inverse of its partner's Gram matrix plus eps, layer by layer."""
    adapted = start(target="kernel$|embedding$")
    trainable, grads = adapted.trainable, gradients(adapted.trainable)
    got = stepped(riemannian(adapted, eps=1e-3), trainable, grads)
    for group in ("dense/kernel", "layers/kernel", "query/kernel", "embed/embedding"):
        stack = STACKS.get(group, 0)
        for own, other in ("ab", "ba"):
            x, g = (flat(t[group][n], stack) for t, n in ((trainable, other), (grads, own)))
            want = np.linalg.inv(x @ x.swapaxes(-1, -2) + 1e-3 * np.eye(2)) @ g
            np.testing.assert_allclose(flat(got[group][own], stack), want, rtol=1e-3, atol=1e-4 * np.abs(want).max())


def test_a_window_is_of_the_input_side():
    """A convolution's a is (r, window..., in): one matrix, whatever the axes."""
    adapted = jlora.adapt({"conv": {"kernel": draw(1, 3, 3, 4, 5)}}, jlora.LoRA(rank=2, target="kernel"))
    trainable = away_from_start(adapted.trainable)
    grads = gradients(trainable)
    assert trainable["conv/kernel"]["a"].shape == (2, 3, 3, 4)
    got = stepped(riemannian(adapted, eps=1e-3), trainable, grads)["conv/kernel"]
    a, g = flat(trainable["conv/kernel"]["a"], 0)[0], flat(grads["conv/kernel"]["b"], 0)[0]
    np.testing.assert_allclose(got["b"], np.linalg.inv(a @ a.T + 1e-3 * np.eye(2)) @ g, rtol=1e-4, atol=1e-5)


def dense_steps(a, b, gradient, tx, adapted):
    """The first-order change of a^T b when both follow the loss <gradient, a^T b>."""
    trainable = {"dense/kernel": {"a": a, "b": b}}
    grads = jax.grad(lambda t: jnp.sum(gradient * (t["dense/kernel"]["a"].T @ t["dense/kernel"]["b"])))(trainable)
    step = stepped(tx, trainable, grads)["dense/kernel"]
    return step["a"].T @ b + a.T @ step["b"]


def test_riemannian_steps_do_not_depend_on_the_factors():
    """(m a, m^-T b) makes the same dW as (a, b), and the same step of dW: the projected gradients of dW itself."""
    adapted = jlora.adapt(base(), jlora.LoRA(rank=2, target="dense/kernel"))
    a, b, gradient = draw(1, 2, 6), draw(2, 2, 5), draw(3, 6, 5)
    m = jnp.array([[2.0, 0.3], [-0.7, 0.4]])
    turned = m @ a, jnp.linalg.inv(m).T @ b
    tx = riemannian(adapted, eps=1e-12)
    step = dense_steps(a, b, gradient, tx, adapted)
    np.testing.assert_allclose(dense_steps(*turned, gradient, tx, adapted), step, rtol=1e-3, atol=1e-4)
    rows = lambda x: np.linalg.pinv(np.asarray(x, np.float64)) @ np.asarray(x, np.float64)  # onto its row space
    want = gradient @ rows(b) + rows(a) @ gradient
    np.testing.assert_allclose(step, want, rtol=1e-3, atol=1e-4)
    plain = optax.identity()
    assert (
        np.max(np.abs(dense_steps(*turned, gradient, plain, adapted) - dense_steps(a, b, gradient, plain, adapted))) > 1
    )


def test_riemannian_at_the_start_and_at_lost_ranks():
    """b = 0 makes no step of a; equal rows, whose matrix has no inverse, make finite ones of every size."""
    adapted = jlora.adapt(base(), jlora.LoRA(rank=2, target="dense/kernel"))
    gradient = draw(3, 6, 5)
    loss = lambda t: jnp.sum(gradient * (t["dense/kernel"]["a"].T @ t["dense/kernel"]["b"]))
    got = stepped(riemannian(adapted), adapted.trainable, jax.grad(loss)(adapted.trainable))["dense/kernel"]
    assert not np.any(got["a"]) and np.all(np.isfinite(got["b"])) and np.any(got["b"])

    wide = jlora.adapt({"kernel": jnp.ones((512, 300))}, jlora.LoRA(rank=64, target="kernel"))
    for size in (1e-4, 1.0, 1e4):
        same = {"a": size * jnp.tile(draw(1, 1, 512), (64, 1)), "b": size * jnp.tile(draw(2, 1, 300), (64, 1))}
        trainable = {"kernel": same}
        got = stepped(riemannian(wide), trainable, gradients(trainable))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got)), size
    # the bound of the docstring, at its worst: a factor of size sqrt(eps)
    one = {"dense/kernel": {"a": jnp.zeros((2, 6)), "b": 1e-3 * jnp.eye(2, 5)}}
    got = stepped(riemannian(adapted), one, jax.grad(loss)(one))["dense/kernel"]["a"]
    assert np.linalg.norm(got) <= 1.01 * 500 * np.linalg.norm(gradient)


@pytest.mark.parametrize("tied", [None, ("a", "b"), ("a",)], ids=str)
def test_scanned_and_unrolled_models_take_the_same_steps(tied):
    """Layers of a stack are apart; factors that layers share meet the sum of the layers, stacked or listed."""
    kernel = base()["layers"]["kernel"]
    fields = {"rank": 2, "target": "kernel"}
    method = jlora.LoRA(**fields) if tied is None else jlora.TiedLoRA(tied=tied, **fields)
    scanned = jlora.adapt({"layers": {"kernel": kernel}}, method)
    unrolled = jlora.adapt({f"layer_{n}": {"kernel": kernel[n]} for n in range(3)}, method)
    trainable = away_from_start(scanned.trainable)
    grads = gradients(trainable)

    def of_layers(tree):
        """The unrolled adapter's tree with the scanned one's numbers."""
        values = {name: x for factors in tree.values() for name, x in factors.items()}
        pick = lambda g, n: values[n] if g.startswith("tied/") else values[n][int(g.split("/")[0][-1])]
        return {g: {n: pick(g, n) for n in factors} for g, factors in unrolled.trainable.items()}

    got = stepped(riemannian(scanned), trainable, grads)
    want = stepped(riemannian(unrolled), of_layers(trainable), of_layers(grads))
    assert_close(of_layers(got), want, 1e-4)


def test_tied_factors_meet_the_sum_of_their_layers():
    """A factor that layers share has the sum of its partners' Gram matrices for a metric; gates pass through."""
    adapted = jlora.adapt({"layers": {"kernel": draw(1, 3, 6, 5)}}, jlora.TiedLoRA(rank=2, tied="a", target="kernel"))
    trainable = away_from_start(adapted.trainable)
    grads = gradients(trainable)
    b = flat(trainable["layers/kernel"]["b"], 1)
    g = flat(grads["tied/layers/kernel"]["a"], 0)
    got = stepped(riemannian(adapted, eps=1e-3), trainable, grads)
    want = np.linalg.inv(np.einsum("lrn,lsn->rs", b, b) + 1e-3 * np.eye(2)) @ g[0]
    np.testing.assert_allclose(got["tied/layers/kernel"]["a"], want, rtol=1e-4, atol=1e-5)
    assert as_bytes(got["layers/kernel"]["u"]) == as_bytes(grads["layers/kernel"]["u"])


def test_riemannian_needs_its_partner():
    """A factor without its partner's values has no metric and is refused; a weight masked out whole passes through."""
    adapted = start()
    grads = gradients(adapted.trainable)
    tx = riemannian(adapted)
    with pytest.raises(ValueError, match="needs the parameters"):
        tx.update(grads, tx.init(adapted.trainable))
    with pytest.raises(ValueError, match="'a' of .* without 'b', which is masked out"):
        stepped(optax.partition({"a": tx, "b": tx, "delta": optax.identity()}, factor_labels), adapted.trainable, grads)
    # a weight that is masked out as a whole is none of its business
    mask = {group: group != "dense/kernel" for group in grads}
    got = stepped(optax.masked(tx, mask), adapted.trainable, grads)
    want = stepped(tx, adapted.trainable, grads)
    assert_close(got, want | {"dense/kernel": grads["dense/kernel"]})


# --- LoRA-FA ------------------------------------------------------------------------------------------------------


def test_lora_fa_is_the_gradient_of_dw_projected_on_the_rows_of_a():
    """dW moves by P G, the nearest to the dense gradient G that b alone can reach; each layer on its own."""
    adapted = start(jlora.LoRAFA, target="kernel$")
    trainable, frozen = jlora.split(adapted)
    dense = {"dense/kernel": draw(1, 1, 6, 5), "layers/kernel": draw(2, 3, 6, 5), "query/kernel": draw(3, 1, 8, 8)}

    def loss(trainable):
        merged = jlora.merge(jlora.join(trainable, frozen))
        leaf = lambda path: merged[path.split("/")[0]]["kernel"]
        return sum(jnp.sum(g.reshape(leaf(path).shape) * leaf(path)) for path, g in dense.items())

    got = stepped(lora_fa(adapted), trainable, jax.jit(jax.grad(loss))(trainable), frozen=frozen)
    for path, g in dense.items():
        stack = STACKS.get(path, 0)
        a, b = flat(frozen.factors[path]["a"], stack), flat(got[path]["b"], stack)
        change = 1.5 * a.swapaxes(-1, -2) @ b
        np.testing.assert_allclose(change, np.linalg.pinv(a) @ a @ np.asarray(g, np.float64), rtol=1e-4, atol=1e-4)
        # orthogonal to what is left of G: no other b comes nearer
        assert np.max(np.abs(a @ (g - change))) < 1e-4


def test_lora_fa_is_pefts_formula_and_follows_the_scale():
    """b's gradient is multiplied by (a a^T)^-1 / s^2, where a and s are data: another scale compiles nothing anew."""
    adapted = start(jlora.LoRAFA)
    grads = gradients(adapted.trainable)
    tx = lora_fa(adapted)
    update = jax.jit(lambda grads, frozen: tx.update(grads, tx.init(grads), frozen=frozen)[0])
    for by in (1.0, 0.5, -2.0):
        got = update(grads, jlora.scale(adapted, by).frozen)
        for group in ("dense/kernel", "layers/kernel"):
            stack = STACKS.get(group, 0)
            a, g = flat(adapted.frozen.factors[group]["a"], stack), flat(grads[group]["b"], stack)
            want = np.linalg.inv(a @ a.swapaxes(-1, -2) + 1e-8 * np.eye(2)) @ g / (1.5 * by) ** 2
            np.testing.assert_allclose(flat(got[group]["b"], stack), want, rtol=2e-4, atol=1e-5)
    assert update._cache_size() == 1  # a and s are data


def test_lora_fa_at_a_scale_of_zero_stands_still():
    """At a scale of zero b stands still, and at one whose square is no float32 its step is finite."""
    adapted = start(jlora.LoRAFA)
    grads = gradients(adapted.trainable)
    got = stepped(lora_fa(adapted), adapted.trainable, grads, frozen=jlora.scale(adapted, 0).frozen)
    assert not any(np.any(x) for g, fs in got.items() if g != "dense/bias" for x in fs.values())
    tiny = jlora.scale(adapted, 1e-24)  # its square is no float32
    small = jax.tree.map(lambda g: 1e-24 * g, grads)
    got = stepped(lora_fa(adapted), adapted.trainable, small, frozen=tiny.frozen)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(got))


def test_lora_fa_in_slices_and_among_others():
    """Each slice has an a of its own; LoRA's weights beside it pass through."""
    fa = jlora.LoRAFA(rank=1, slices=((0, 2), (2, 5)), target="dense/kernel")
    adapted = jlora.adapt(base(), [fa, jlora.LoRA(rank=2)])
    grads = gradients(adapted.trainable)
    got = stepped(lora_fa(adapted), adapted.trainable, grads, frozen=adapted.frozen)
    for n in "01":
        a = np.asarray(adapted.frozen.factors["dense/kernel"][f"a{n}"], np.float64)
        want = np.asarray(grads["dense/kernel"][f"b{n}"]) / (a @ a.T)
        np.testing.assert_allclose(got["dense/kernel"][f"b{n}"], want, rtol=1e-4)
    assert as_bytes(got["query/kernel"]) == as_bytes(grads["query/kernel"])


def test_lora_fa_leaves_gated_updates_alone():
    """a diag(u) b diag(v) is no s a b: its projection would be another one."""
    gated = jlora.TiedLoRA(rank=2, trained=("b", "u", "v"), target="dense/kernel")
    with pytest.raises(ValueError, match="would do nothing: no weight under TiedLoRA has the update s a b"):
        lora_fa(jlora.adapt(base(), gated))
    adapted = jlora.adapt(base(), [gated, jlora.LoRAFA(rank=2)])
    grads = gradients(adapted.trainable)
    got = stepped(lora_fa(adapted), adapted.trainable, grads, frozen=adapted.frozen)
    assert as_bytes({g: fs for g, fs in got.items() if g != "query/kernel"}) == as_bytes(
        {g: fs for g, fs in grads.items() if g != "query/kernel"}
    )
    assert as_bytes(got["query/kernel"]) != as_bytes(grads["query/kernel"])


def test_lora_fa_asks_for_what_is_frozen():
    """Where a is not to be seen LoRA-FA's step is refused, and the error says to pass frozen=frozen."""
    adapted = start(jlora.LoRAFA)
    grads = gradients(adapted.trainable)
    with pytest.raises(ValueError, match=r"(?s)no 'a' of 'dense/kernel'.*frozen=frozen"):
        stepped(lora_fa(adapted), adapted.trainable, grads)
    whole = jlora.Adapted(grads, jax.tree.map(jnp.zeros_like, adapted.frozen))
    with pytest.raises(ValueError, match="frozen=frozen"):
        stepped(optax.masked(lora_fa(adapted), jlora.trainable_mask), adapted, whole)


# Weight decay -----------------------------------------------------------------------------------

DECAY = {  # method: the factors whose zero is no zero update
    "lora": (jlora.LoRA(rank=2, target="kernel"), {}),
    "pissa": (jlora.LoRA(rank=2, target="kernel", init="pissa"), {"a", "b"}),
    "dora": (jlora.DoRA(jlora.LoRA(rank=2, target="kernel")), {"m"}),
    "ia3": (jlora.IA3(target="kernel"), {"l"}),
    "ssf": (jlora.SSF(target="query"), {"gamma"}),
    "oft": (jlora.OFT(block=2, target="kernel"), {}),
    "boft": (jlora.BOFT(block=2, target="kernel"), {"g"}),
    "hra": (jlora.HRA(rank=2, target="kernel"), {}),
    "road": (jlora.RoAd(target="kernel"), {"alpha"}),
    "vera": (jlora.VeRA(rank=2, target="kernel"), {}),
    "tied": (jlora.TiedLoRA(rank=2, target="kernel"), {}),
    "adalora": (jlora.AdaLoRA(rank=2, target="kernel"), {}),
    "krona": (jlora.KronA(target="kernel"), {}),
    "bitfit": (jlora.BitFit(target="bias"), {}),
    "intrinsic": (jlora.IntrinsicDimension(5, target="kernel"), {}),
}  # fmt: skip


@pytest.mark.parametrize("name", DECAY)
def test_what_decay_may_pull_to_zero(name):
    """Merged with each trained factor at zero in turn, the weight is the base exactly where the mask says so."""
    spec, against = DECAY[name]
    params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (8, 4)), "bias": jnp.arange(4.0)}}
    adapted = jlora.adapt(params, spec)
    mask = jlora.optim.decay_mask(adapted)(adapted.trainable)
    for group, named in mask.items():
        for factor, may in named.items():
            assert may == (factor not in against)
            zero = {g: dict(f) for g, f in adapted.trainable.items()}
            zero[group][factor] = jnp.zeros_like(zero[group][factor])
            merged = jlora.merge(jlora.join(zero, adapted.frozen))
            same = all(bool(jnp.allclose(x, y, atol=1e-6)) for x, y in zip(*map(jax.tree.leaves, (merged, params))))  # noqa: B905
            assert same == may, factor


def test_decay_under_the_mask_moves_towards_the_base():
    """A long decay without gradients, in both forms: the merged weight ends at the base, the frozen half stays."""
    params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
    spec = [jlora.LoRA(rank=2, target="head", init="pissa"), jlora.DoRA(jlora.LoRA(rank=2, target="query"))]
    adapted = jlora.adapt(params, spec)
    far = {g: f | {n: x + 0.1 for n, x in f.items() if n in "ab"} for g, f in adapted.trainable.items()}
    far["head/kernel"] = adapted.trainable["head/kernel"]
    adapted = jlora.join(far, adapted.frozen)
    decay = optax.adamw(0.5, weight_decay=1.0, mask=jlora.optim.decay_mask(adapted))
    for tx, start in ((decay, adapted.trainable), (jlora.masked(decay), adapted)):
        state, now = tx.init(start), start
        for _ in range(30):
            updates, state = tx.update(jax.tree.map(jnp.zeros_like, now), state, now)
            now = optax.apply_updates(now, updates)
        end = jlora.join(getattr(now, "trainable", now), adapted.frozen)
        for got, want in zip(jax.tree.leaves(jlora.merge(end)), jax.tree.leaves(params), strict=True):
            np.testing.assert_allclose(got, want, atol=1e-5)


# Several adapters at once --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "lora_fa", "vera", "dora", "pissa", "tied"])
def test_a_stack_is_each_of_its_adapters(name):
    """Values and gradients under vmap, with every alpha and frozen factor its own; the base is held once."""
    params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
    make = {
        "lora": lambda alpha: jlora.LoRA(rank=2, alpha=alpha, dropout=0.5),
        "lora_fa": lambda alpha: jlora.LoRAFA(rank=2, alpha=alpha),
        "vera": lambda alpha: jlora.VeRA(rank=2, target="kernel"),
        "dora": lambda alpha: jlora.DoRA(jlora.LoRA(rank=2, alpha=alpha)),
        "pissa": lambda alpha: jlora.LoRA(rank=2, alpha=alpha, init="pissa"),
        "tied": lambda alpha: jlora.TiedLoRA(rank=2),
    }[name]
    each = [jlora.adapt(params, make(alpha), key=jax.random.key(int(alpha))) for alpha in (2.0, 8.0, 3.0)]
    each = [jlora.join(jax.tree.map(lambda x: x + 0.1, a.trainable), a.frozen) for a in each]
    if name == "lora":
        each = [jlora.with_dropout(a, jax.random.key(n)) for n, a in enumerate(each)]
    x = jax.random.normal(jax.random.key(1), (3, 6))
    apply = jlora.lift(lambda p, x: x @ p["query"]["kernel"])
    stacked, axes = jlora.stack(each)
    assert all(a is b for a, b in zip(jax.tree.leaves(stacked.frozen.base), jax.tree.leaves(params), strict=True))
    got = jax.vmap(apply, in_axes=(axes, None))(stacked, x)
    np.testing.assert_allclose(got, jnp.stack([apply(a, x) for a in each]), rtol=1e-5, atol=1e-6)
    loss = lambda trainable, frozen: jnp.mean(apply(jlora.join(trainable, frozen), x) ** 2)
    grads = jax.vmap(jax.grad(loss), in_axes=(0, axes.frozen))(*jlora.split(stacked))
    for n, (a, again) in enumerate(zip(each, jlora.unstack(stacked), strict=True)):
        want = jax.grad(loss)(*jlora.split(a))
        jax.tree.map(lambda g, w, n=n: np.testing.assert_allclose(g[n], w, rtol=1e-4, atol=1e-6), grads, want)
        assert jax.tree.structure(again) == jax.tree.structure(a)
        for y, z in zip(*(jax.tree.leaves((b.trainable, b.frozen.factors)) for b in (a, again)), strict=True):
            np.testing.assert_array_equal(y, z)


def test_what_does_not_stack():
    """Unlike plans, bases and keys, and what is no adapter, in words."""
    params = {"query": {"kernel": jnp.ones((6, 4))}}
    one = jlora.adapt(params, jlora.LoRA(rank=2))
    with pytest.raises(ValueError, match="adapter 1 is Plan.*rank 3.*methods, ranks and weights"):
        jlora.stack([one, jlora.adapt(params, jlora.LoRA(rank=3))])
    with pytest.raises(ValueError, match="adapter 1 has another base"):
        jlora.stack([one, jlora.adapt({"query": {"kernel": jnp.zeros((6, 4))}}, jlora.LoRA(rank=2))])
    jlora.stack([one, jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))])
    with pytest.raises(ValueError, match="some adapters have a dropout key"):
        jlora.stack([one, jlora.with_dropout(one, jax.random.key(0))])
    with pytest.raises(ValueError, match="at least one"):
        jlora.stack([])
    for odd in (one, [one.trainable], [one, params]):
        with pytest.raises(TypeError, match="takes a list of Adapteds"):
            jlora.stack(odd)
    with pytest.raises(ValueError, match="no stack of jlora.stack"):
        jlora.unstack(one)
    with pytest.raises(TypeError, match="unstack takes an Adapted"):
        jlora.unstack(params)
