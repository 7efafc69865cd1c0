"""A step on an output is what its equation says, y = h + s (U f(D x + d) + u), in every kind of model."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import methods, network

X = jax.random.normal(jax.random.key(0), (2, 3, 5))
SERIAL = jlora.Houlsby(bottleneck=3, activation="tanh", scale=1.5, target="down/kernel")
BESIDE = jlora.Parallel(bottleneck=3, activation="tanh", scale=4, target="down/kernel", input="up/kernel")


class Block(nn.Module):
    """x + down(tanh(up(x)))."""

    bias: bool = True

    @nn.compact
    def __call__(self, x, _=None):
        h = nn.tanh(nn.Dense(7, name="up", use_bias=self.bias)(x))
        return x + nn.Dense(5, name="down", use_bias=self.bias)(h), None


def started(model, spec, x=X):
    """(the function, an adapter whose trained factors are all away from their start) of a Linen model."""
    params = model.init(jax.random.key(1), x)["params"]
    fn = lambda params, x: jax.tree.leaves(model.apply({"params": params}, x))[0]
    return fn, away(jlora.adapt(params, spec, fn=fn, args=(x,)))


def away(adapted):
    """The same adapter with noise on each trained factor."""
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    noisy = [x + 0.3 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
    return jlora.join(jax.tree.unflatten(treedef, noisy), adapted.frozen)


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def adapter(h, x, t, scale):
    """h + s (U tanh(D x + d) + u)."""
    return h + scale * (np.tanh(x @ t["down"].T + t["down_bias"]) @ t["up"] + t["up_bias"])


def block(params, factors, x, spec):
    """One block with its adapter, written out."""
    b = lambda name: params[name].get("bias", 0.0)
    h = np.tanh(x @ params["up"]["kernel"] + b("up")) @ params["down"]["kernel"] + b("down")
    return x + adapter(h, x if spec is BESIDE else h, factors, spec.scale)


def place(adapted):
    """Where the factors of the one step stand."""
    (group,) = adapted.trainable
    return group


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("spec", [SERIAL, BESIDE])
def test_a_step_is_its_equation(spec, bias):
    """After the bias where there is one, after the kernel where there is none; in values, and for every factor."""
    fn, adapted = started(Block(bias), spec)
    assert place(adapted) == ("down/bias" if bias else "down/kernel")
    params, factors = wide(adapted.frozen.base), wide(adapted.trainable[place(adapted)])
    np.testing.assert_allclose(jlora.lift(fn)(adapted, X), block(params, factors, wide(X), spec), rtol=1e-5, atol=1e-6)
    loss = lambda trainable: jnp.sum(jlora.lift(fn)(jlora.join(trainable, adapted.frozen), X) ** 2)
    for name, found in jax.jit(jax.grad(loss))(adapted.trainable)[place(adapted)].items():
        way = np.random.default_rng(0).standard_normal(found.shape)
        at = lambda e, name=name, way=way: {**factors, name: factors[name] + e * way}
        total = lambda e, at=at: np.sum(block(params, at(e), wide(X), spec) ** 2)
        np.testing.assert_allclose(np.sum(found * way), (total(1e-6) - total(-1e-6)) / 2e-6, rtol=1e-4)


@pytest.mark.parametrize("spec", [SERIAL, BESIDE])
@pytest.mark.parametrize("remat", [False, True])
def test_in_a_scan_each_layer_has_its_own(spec, remat):
    """The layers of a scan, with remat or without, are those written out one after another."""
    each = nn.remat(Block) if remat else Block
    layers = nn.scan(each, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)()
    fn, adapted = started(layers, spec)
    y, params, factors = wide(X), wide(adapted.frozen.base), wide(adapted.trainable[place(adapted)])
    for n in range(3):
        layer = lambda tree, n=n: jax.tree.map(lambda a: a[n], tree)
        y = block(layer(params), layer(factors), y, spec)
    found = jax.jit(jlora.lift(fn))(adapted, X)
    np.testing.assert_allclose(found, y, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.vmap(lambda x: jlora.lift(fn)(adapted, x))(X), found, rtol=1e-5, atol=1e-6)
    inside = jlora.lift(lambda params, x: jax.vmap(lambda x: fn(params, x))(x))
    np.testing.assert_allclose(inside(adapted, X), found, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [SERIAL, BESIDE])
def test_experts_under_vmap_have_their_own(spec):
    """Of a stack of blocks each on its own input, every one has its own adapter."""
    experts = nn.vmap(Block, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0)()
    fn, adapted = started(experts, spec)
    params, factors = wide(adapted.frozen.base), wide(adapted.trainable[place(adapted)])
    layer = lambda tree, n: jax.tree.map(lambda a: a[n], tree)
    want = [block(layer(params, n), layer(factors, n), wide(X)[n], spec) for n in range(2)]
    np.testing.assert_allclose(jlora.lift(fn)(adapted, X), want, rtol=1e-5, atol=1e-6)


def test_layers_in_another_order_keep_their_own():
    """Of two stack axes, the output has them in the model's order and the factors in the weight's."""
    params = {"kernel": jax.random.normal(jax.random.key(1), (2, 2, 5, 4))}
    x = jax.random.normal(jax.random.key(2), (2, 2, 3, 5))
    fn = lambda params, x: jnp.einsum("bati,abio->bato", x, params["kernel"])
    spec = jlora.Houlsby(bottleneck=3, activation="tanh", target="kernel")
    adapted = away(jlora.adapt(params, spec, axes={"kernel": "ssio"}))
    h, factors = wide(fn(params, x)), wide(adapted.trainable["kernel"])
    found = jlora.lift(fn)(adapted, x)
    for a, b in np.ndindex(2, 2):
        want = adapter(h[b, a], h[b, a], jax.tree.map(lambda t, at=(a, b): t[at], factors), 1.0)
        np.testing.assert_allclose(found[b, a], want, rtol=1e-5, atol=1e-6)
    both = {"up": params["kernel"], "down": jnp.swapaxes(params["kernel"], 2, 3)}
    fn = lambda params, x: jnp.einsum("bati,abio->bato", jnp.einsum("bati,abio->bato", x, params["up"]), params["down"])
    spec = jlora.Parallel(3, activation="tanh", scale=1, target="down", input="up")
    adapted = away(jlora.adapt(both, spec, axes={"": "ssio"}))
    h, factors = wide(fn(both, x)), wide(adapted.trainable["down"])
    found = jlora.lift(fn)(adapted, x)
    for a, b in np.ndindex(2, 2):
        want = adapter(h[b, a], wide(x)[b, a], jax.tree.map(lambda t, at=(a, b): t[at], factors), 1.0)
        np.testing.assert_allclose(found[b, a], want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "make",
    [
        lambda bias: nn.DenseGeneral((2, 3), use_bias=bias),
        lambda bias: nn.Conv(6, (3,), use_bias=bias),
        lambda bias: nn.Conv(6, (1, 2), use_bias=bias),
    ],
    ids=["heads", "convolution", "convolution_2d"],
)
def test_the_features_are_one_axis(make, bias):
    """Heads are flattened, channels are the features of a convolution."""
    fn, adapted = started(make(bias), jlora.Houlsby(bottleneck=3, activation="tanh", target="kernel"))
    h = fn(adapted.frozen.base, X)
    flat = wide(h).reshape(*h.shape[: h.ndim - (2 if h.shape[-1] == 3 else 1)], 6)
    want = adapter(flat, flat, wide(adapted.trainable[place(adapted)]), 1.0)
    np.testing.assert_allclose(jlora.lift(fn)(adapted, X), want.reshape(h.shape), rtol=1e-5, atol=1e-6)


def test_rows_of_a_table_are_outputs():
    """The step of a table is on the rows that are looked up."""
    ids = jnp.array([[1, 2, 3], [4, 4, 0]])
    fn, adapted = started(nn.Embed(6, 4), jlora.Houlsby(bottleneck=3, activation="tanh", target="embedding"), ids)
    h = wide(adapted.frozen.base["embedding"])[np.asarray(ids)]
    want = adapter(h, h, wide(adapted.trainable["embedding"]), 1.0)
    np.testing.assert_allclose(jlora.lift(fn)(adapted, ids), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("spec", [SERIAL, BESIDE])
def test_the_start_is_the_base(spec):
    """U and u are zero: bit for bit, with or without a scale."""
    params = Block().init(jax.random.key(1), X)["params"]
    fn = lambda params, x: Block().apply({"params": params}, x)[0]
    adapted = jlora.adapt(params, spec)
    assert (jax.jit(jlora.lift(fn))(adapted, X) == jax.jit(fn)(params, X)).all()
    assert jlora.count(adapted)[0] == 2 * 5 * 3 + 3 + 5
    switched_off = jlora.lift(fn)(jlora.scale(away(adapted), 0.0), X)
    np.testing.assert_array_equal(switched_off, fn(params, X))


def test_beside_methods_that_change_weights():
    """[LoRA, BitFit, Houlsby]: the bias has its update and the step after it, each of the others its own."""
    spec = [jlora.LoRA(rank=2, target="kernel"), jlora.BitFit(), BESIDE]
    fn, adapted = started(Block(), spec)
    params, factors = wide(adapted.frozen.base), wide(adapted.trainable)
    for name in ("up", "down"):
        params[name]["kernel"] = (
            params[name]["kernel"] + factors[f"{name}/kernel"]["a"].T @ factors[f"{name}/kernel"]["b"]
        )
        params[name]["bias"] = params[name]["bias"] + factors[f"{name}/bias"]["delta"]
    want = block(params, factors["down/bias"], wide(X), BESIDE)
    np.testing.assert_allclose(jlora.lift(fn)(adapted, X), want, rtol=1e-5, atol=1e-6)
    report = jlora.explain(fn, adapted, X)
    assert not report.dense and not report.unused
    assert [(r.path, r.plan) for r in report.rows if "step" in r.plan] == [
        ("up/kernel", "its input is read by a step"),
        ("down/bias", "a step on the output"),
    ]


@pytest.mark.parametrize("gate", [np.array([[1, 0, 0.5], [0, 1, 1]]), np.array([0, 1.0]), np.array(0.3)], ids=str)
@pytest.mark.parametrize("spec", [SERIAL, BESIDE])
def test_a_gate_says_at_which_positions(spec, gate):
    """g f(h) + (1 - g) h: where it is 0 the base, where it is 1 the adapter, bit for bit."""
    fn, plain = started(Block(), spec)
    _, adapted = started(Block(), jlora.Gated(spec, "on"))
    assert plain.trainable.keys() == adapted.trainable.keys()
    found = jlora.lift(fn)(jlora.with_gates(jlora.join(plain.trainable, adapted.frozen), on=gate), X)
    g = np.broadcast_to(gate.reshape(gate.shape + (1,) * (2 - gate.ndim)), (2, 3))[..., None]
    on, off = wide(jlora.lift(fn)(plain, X)), wide(fn(plain.frozen.base, X))
    np.testing.assert_allclose(found, g * on + (1 - g) * off, rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="'on'"):
        jlora.lift(fn)(jlora.with_gates(adapted, on=np.ones((2, 4))), X)


def test_the_first_rule_takes_an_output():
    """As with weights; the other is noted."""
    params = Block().init(jax.random.key(1), X)["params"]
    adapted = jlora.adapt(params, [SERIAL, jlora.Houlsby(bottleneck=2, target="kernel")])
    assert adapted.trainable["down/bias"]["down"].shape == (3, 5)
    assert adapted.trainable["up/bias"]["down"].shape == (2, 7)
    assert "down/kernel: rule 1 (Houlsby) takes it before Houlsby" in str(adapted)
    apart = jlora.adapt(params, [SERIAL, jlora.Houlsby(bottleneck=2, target="down/bias")])
    assert apart.frozen.plan.shapes == jlora.adapt(params, SERIAL).frozen.plan.shapes
    assert "takes this layer's output at down/kernel, before 2" in str(apart)
    with pytest.raises(ValueError, match=r"rules of their own, \[LoRA"):
        jlora.adapt(params, jlora.Sum(jlora.LoRA(rank=2), SERIAL, target="down/kernel"))


def test_a_layer_has_one_output():
    """Named by its kernel and its bias both, it has one adapter."""
    params = Block().init(jax.random.key(1), X)["params"]
    both = jlora.adapt(params, jlora.Houlsby(bottleneck=3, target="down/"))
    assert (
        both.frozen.plan.shapes
        == jlora.adapt(params, jlora.Houlsby(bottleneck=3, target="down/kernel")).frozen.plan.shapes
    )


def test_a_step_is_trained_saved_and_loaded(tmp_path):
    """Twenty steps lower a loss and move every factor; what is loaded computes the same bits."""
    fn, adapted = started(Block(), [SERIAL, jlora.LoRA(rank=2, target="up/kernel")])
    adapted = jlora.adapt(adapted.frozen.base, [SERIAL, jlora.LoRA(rank=2, target="up/kernel")])
    trainable, frozen = jlora.split(adapted)
    tool = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state):
        loss, grads = jax.value_and_grad(lambda t: jnp.mean(jlora.lift(fn)(jlora.join(t, frozen), X) ** 2))(trainable)
        updates, state = tool.update(grads, state)
        return optax.apply_updates(trainable, updates), state, loss

    state, losses = tool.init(trainable), []
    for _ in range(20):
        trainable, state, loss = step(trainable, state)
        losses.append(loss)
    assert losses[-1] < losses[0]
    assert all((a != b).any() for a, b in zip(*map(jax.tree.leaves, (trainable, adapted.trainable)), strict=True))
    trained = jlora.join(trainable, frozen)
    jlora.save(tmp_path / "adapter", trained)
    loaded = jlora.load(tmp_path / "adapter", adapted.frozen.base)
    np.testing.assert_array_equal(jlora.lift(fn)(loaded, X), jlora.lift(fn)(trained, X))


def test_a_model_in_bfloat16_stays_in_it():
    """Factors are cast to the output's dtype, and the result has it."""
    fn, adapted = started(Block(), SERIAL)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapted.frozen.base)
    low = jlora.join(adapted.trainable, jlora.adapt(half, SERIAL).frozen)
    found = jlora.lift(fn)(low, X.astype(jnp.bfloat16))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(found, np.float32), jlora.lift(fn)(adapted, X), atol=0.05)


def test_a_quantised_layer_has_steps():
    """The codes are read as without."""
    params = {"down": {"kernel": jax.random.normal(jax.random.key(3), (64, 64))}}
    quantised = jlora.quantize(params, target="kernel")
    fn, x = lambda params, x: x @ params["down"]["kernel"], jax.random.normal(jax.random.key(4), (3, 64))
    adapted = away(jlora.adapt(quantised, SERIAL, axes={"kernel": "io"}))
    h = wide(jlora.lift(fn)(quantised, x))
    np.testing.assert_allclose(
        jlora.lift(fn)(adapted, x), adapter(h, h, wide(adapted.trainable["down/kernel"]), 1.5), rtol=1e-5, atol=1e-5
    )


def table(params, ids):
    return params["embedding"][ids]


def took(use):
    """A use of the table in a lifted function."""
    return lambda adapted: jlora.lift(lambda params, x: use(params["embedding"], x))(adapted, jnp.ones((2, 4)))


SAID = {
    "derivative": (
        took(lambda table, x: jax.grad(lambda x: (x[:, :3] @ table[:3]).sum())(x)),
        "taken inside the lifted",
    ),
    "tangent": (
        took(lambda table, x: jax.jvp(lambda x: x[:, :3] @ table[:3], (x,), (x,))[1]),
        "taken inside the lifted",
    ),
    "merge": (lambda a: jlora.merge(a), r"merge: \['embedding'\] have steps on their outputs"),
    "merge_report": (lambda a: jlora.merge_report(a), "merge_report: .*steps on their outputs"),
    "dense": (lambda a: jlora.lift(table, dense=True)(a, jnp.array([1])), "steps on their outputs"),
    "tied": (took(lambda table, x: x @ table.T), "no output axis"),
    "sum": (
        lambda a: jlora.lift(lambda p, x: p["embedding"].sum() * x)(a, 1.0),
        "'embedding': .*reduce_sum asks for the weight alone",
    ),
    "slice": (
        lambda a: jlora.lift(lambda p, x: x @ p["embedding"][:, :2])(a, jnp.ones((2, 6))),
        "'embedding': .*sees all",
    ),
}


@pytest.mark.parametrize("case", SAID)
def test_what_no_array_can_say_is_refused(case):
    """A step is never lost: where the model takes something else of the weight than an output, it is named."""
    params = {"embedding": jax.random.normal(jax.random.key(0), (6, 4))}
    adapted = jlora.adapt(params, jlora.Houlsby(bottleneck=3, target="embedding"), axes={"embedding": "io"})
    call, words = SAID[case]
    with pytest.raises(ValueError, match=words):
        call(adapted)


def test_an_input_that_is_not_there_is_refused():
    """In the tree at once, in the model where it is used after, or elsewhere."""
    params = Block().init(jax.random.key(1), X)["params"]
    with pytest.raises(ValueError, match="sees the input of 'upward/kernel', and no"):
        jlora.adapt(params, jlora.Parallel(bottleneck=3, target="down/kernel", input="upward/kernel"))
    adapted = jlora.adapt(params, BESIDE)
    misplaced = lambda p, x: x + p["down"]["bias"] + (x[:, 0] @ p["up"]["kernel"]).sum()
    early = lambda p, x: (x[:, 0] @ p["up"]["kernel"]).sum() + x + p["down"]["bias"]
    with pytest.raises(ValueError, match="'down/bias': .*does not use that one before it"):
        jlora.lift(misplaced)(adapted, X)
    with pytest.raises(ValueError, match="must be alike"):
        jlora.lift(early)(adapted, X)


def test_of_two_inputs_the_step_takes_none():
    """Two calls of a block one after the other are two blocks; both first layers before both last ones are refused."""
    fn, adapted = started(Block(), BESIDE)
    up = lambda p, x: jnp.tanh(x @ p["up"]["kernel"] + p["up"]["bias"])
    down = lambda p, h: h @ p["down"]["kernel"] + p["down"]["bias"]
    one, two = X, 2 * X
    each = jlora.lift(lambda p, a, b: (fn(p, a), fn(p, b)))(adapted, one, two)
    for found, x in zip(each, (one, two), strict=True):
        np.testing.assert_allclose(found, jlora.lift(fn)(adapted, x), rtol=1e-5, atol=1e-6)
    again = jlora.lift(lambda p, x: x + down(p, up(p, x) * up(p, x)))(adapted, X)
    once = jlora.lift(lambda p, x: x + down(p, up(p, x) ** 2))(adapted, X)
    np.testing.assert_allclose(again, once, rtol=1e-5, atol=1e-6)
    pairs = lambda p, a, b: [down(p, h) for h in (up(p, a), up(p, b))]
    with pytest.raises(ValueError, match="'down/bias': .*on two inputs before it"):
        jlora.lift(pairs)(adapted, one, two)

    def between(p, a, b):
        """Of two inputs the first is read before the second is met, and once more after it."""
        of_one = up(p, a)
        return down(p, of_one), (of_two := up(p, b)), down(p, of_one), down(p, of_two)

    with pytest.raises(ValueError, match="'down/bias': .*on two inputs before it"):
        jlora.lift(between)(adapted, one, two)


def test_two_sequences_in_lockstep_are_refused():
    """Layer by layer, a second layer would read the second ids for the first sequence; one after the other is right."""
    params = {"embed": {"embedding": jnp.ones((9, 4))}, **{f"l{n}": {"key": {"kernel": jnp.eye(4)}} for n in "01"}}
    adapted = jlora.adapt(params, jlora.PrefixTuning(count=2, target="key/kernel"), axes={"kernel": "io"})
    emb = lambda p, ids: jnp.take(p["embed"]["embedding"], ids, axis=0, mode="clip")
    key = lambda p, n, x: x @ p[f"l{n}"]["key"]["kernel"]
    a, b = jnp.array([[9, 10, 1]]), jnp.array([[2, 9, 10]])

    def lockstep(p):
        x, y = emb(p, a), None
        first = key(p, 0, x)
        y = emb(p, b)
        return first, key(p, 0, y), key(p, 1, x), key(p, 1, y)

    with pytest.raises(ValueError, match="'l1/key/kernel': .*on two inputs before it"):
        jlora.lift(lockstep)(adapted)
    whole = lambda p, ids: (key(p, 0, emb(p, ids)), key(p, 1, emb(p, ids)))
    found = jlora.lift(lambda p: (whole(p, a), whole(p, b)))(adapted)
    for ids, made in zip((a, b), found, strict=True):
        for n, y in enumerate(made):
            rows = adapted.trainable[f"l{n}/key/kernel"]["prompts"]
            want = np.where((ids >= 9)[..., None], rows[np.clip(ids - 9, 0, 1)], 1)
            np.testing.assert_allclose(y, want, rtol=1e-6)


def test_a_step_must_keep_its_output():
    """An author's function that returns another shape is told when it is applied, with the method and the weight."""

    class Halved(methods.Method):
        on_outputs = True  # type: ignore[assignment]

        def recipe(self, leaf):
            return network.Recipe(steps=(network.Step(first_half, ()),))

    params = Block().init(jax.random.key(1), X)["params"]
    with pytest.raises(ValueError, match=r"Halved on 'down/bias' .*a Step of an output \(\d+, 5\) returns .*, ?2\)"):
        jlora.adapt(params, Halved(target="down/kernel"))


def first_half(y):
    return y[..., : y.shape[-1] // 2]


def test_decay_takes_the_matrices():
    """A zero in D or U alone leaves the output as it was; one in a bias does not."""
    _, adapted = started(Block(), SERIAL)
    mask = jlora.optim.decay_mask(adapted)(adapted.trainable)["down/bias"]
    assert mask == {"down": True, "up": True, "down_bias": False, "up_bias": False}


def test_an_untrained_step_is_warned_of(tmp_path):
    """And one of which the step alone was trained is not."""
    params = Block().init(jax.random.key(1), X)["params"]
    adapted = jlora.adapt(params, [SERIAL, jlora.LoRA(rank=2, target="up/kernel")])
    with pytest.warns(jlora.UntrainedWarning):
        jlora.save(tmp_path / "start", adapted)
    trainable = {**adapted.trainable, "down/bias": away(adapted).trainable["down/bias"]}
    jlora.save(tmp_path / "trained", jlora.join(trainable, adapted.frozen))


def test_cost_counts_steps():
    """Two FLOPs a parameter and token, forward."""
    params = Block().init(jax.random.key(1), X)["params"]
    found = jlora.analysis.cost(params, SERIAL)
    assert found.trainable == 38 and found.delta_flops == 2 * (38 + 1)
