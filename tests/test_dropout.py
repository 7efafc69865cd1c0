"""Dropout: what a draw depends on, and what says so where there is none."""

import gc
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora

SIZE, RATE = 16, 0.5
ROWS = jnp.ones((4, SIZE))
KEY = jax.random.key(5)


def transparent(*stack, spec=None):
    """W0 = 0 and a = b = 1: what comes out is the mask, divided by 1 - rate."""
    spec = spec or jlora.LoRA(rank=SIZE, target="w", dropout=RATE)
    ad = jlora.adapt({"w": jnp.zeros((*stack, SIZE, SIZE))}, spec, axes={"w": "s" * len(stack) + "io"})
    return jlora.join(jax.tree.map(lambda a: jnp.broadcast_to(jnp.eye(SIZE), a.shape), ad.trainable), ad.frozen)


def drawn(f, ad, key=KEY):
    return np.asarray(jax.jit(lambda ad, x: jlora.lift(f)(ad, x))(jlora.with_dropout(ad, key), ROWS))


# --- what a draw depends on ---------------------------------------------------------------------------------------


def looped(layer):
    return lambda p, x: jnp.stack([layer(x, p["w"]) for _ in range(4)])


def dot(x, w):
    return x @ w


def dot2(p, x):
    return x @ p["w"]


def half(x, w):
    return jax.jit(lambda x, w: jnp.stack([x @ w, x @ w]))(x, w)


def counted_while(p, x):
    turn = lambda c: (c[0] + 1, c[1].at[c[0]].set(x @ p["w"]))
    return lax.while_loop(lambda c: c[0] < 4, turn, (0, jnp.zeros((4, *x.shape))))[1]


def scanned(unroll):
    return lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 4, unroll=unroll)[1]


FLAT = looped(dot)
SAME = {
    "jit": looped(jax.jit(dot)),
    "jit that is inlined": looped(jax.jit(dot, inline=True)),
    "remat": looped(jax.checkpoint(dot)),
    "remat of jit of remat": looped(jax.checkpoint(jax.jit(jax.checkpoint(dot)))),
    "a model that is jitted": jax.jit(FLAT),
    "two calls of two uses": lambda p, x: jnp.concatenate([half(x, p["w"]), half(x, p["w"])]),
    "one use before a block of three": lambda p, x: jnp.concatenate(
        [(x @ p["w"])[None], jax.jit(lambda x, w: jnp.stack([x @ w] + [x @ w, x @ w]))(x, p["w"])]
    ),
    "a cast and two transpositions inside": looped(jax.jit(lambda x, w: x @ w.T.astype(jnp.float32).T)),
    "a weight that a block returns": looped(lambda x, w: x @ jax.jit(lambda w: w.T)(w).T),
    "scan": scanned(1),
    "scan unrolled by two": scanned(2),
    "scan unrolled": scanned(True),
    "scan in remat in scan": lambda p, x: lax.scan(
        lambda c, _: (c, jax.checkpoint(lambda w: lax.scan(lambda c, _: (c, x @ w), 0, None, 2)[1])(p["w"])), 0, None, 2
    )[1].reshape(4, *x.shape),
    "fori_loop": lambda p, x: lax.fori_loop(
        0, 4, lambda i, ys: ys.at[i].set(x @ p["w"]), jnp.zeros((4, *x.shape))
    ),
    "while_loop": counted_while,
    "cond": looped(lambda x, w: lax.cond(x.sum() > 0, lambda: x @ w, lambda: 0 * x)),
    "a dead use is none": looped(jax.jit(lambda x, w: (x @ w, 2 * (x @ w))[0])),
}  # fmt: skip


@pytest.mark.parametrize("name", SAME)
def test_how_a_program_is_nested_changes_no_bit_of_a_draw(name):
    """The same uses in the same order draw the same masks, whatever stands around them."""
    ad = transparent()
    np.testing.assert_array_equal(drawn(SAME[name], ad), drawn(FLAT, ad))


LAYERS = {
    "scan": lambda p, x: lax.scan(lambda _, w: (None, x @ w), None, p["w"])[1],
    "scan unrolled by three": lambda p, x: lax.scan(lambda _, w: (None, x @ w), None, p["w"], unroll=3)[1],
    "scan unrolled, rematerialised": lambda p, x: lax.scan(
        jax.checkpoint(lambda _, w: (None, x @ w)), None, p["w"], unroll=True
    )[1],
    "map": lambda p, x: lax.map(lambda w: x @ w, p["w"]),
    "indexed by an array": lambda p, x: lax.map(lambda n: x @ p["w"][n], jnp.arange(3)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_scanned_stack_draws_as_the_layers_one_by_one(name):
    """A layer draws the same mask in a loop over its stack as where it is indexed by hand."""
    ad = transparent(3)
    one_by_one = drawn(lambda p, x: jnp.stack([x @ p["w"][n] for n in range(3)]), ad)
    np.testing.assert_array_equal(drawn(LAYERS[name], ad), one_by_one)


def test_layers_that_a_model_groups_anew_draw_as_before():
    """Two axes of layers, the second of them cut into groups before it is scanned: each layer's own mask."""
    over = lambda f: lambda w, x: jax.lax.map(lambda w: f(w, x), w)
    layer = lambda w, x: x @ w
    plain = lambda p, x: over(over(layer))(p["w"], x)
    grouped = lambda p, x: over(over(over(layer)))(p["w"].reshape(2, 2, 3, SIZE, SIZE), x)
    ad = transparent(2, 6)
    np.testing.assert_array_equal(drawn(grouped, ad).reshape(2, 6, *ROWS.shape), drawn(plain, ad))


def test_a_layer_that_is_used_twice_draws_twice():
    """Also where it is indexed twice: two slices of one stack are two uses."""
    one, two = drawn(lambda p, x: jnp.stack([x @ p["w"][0], x @ p["w"][0]]), transparent(3))
    assert 0.25 < np.mean(one == two) < 0.75


def test_the_condition_of_a_loop_draws_apart_from_its_body():
    """A weight that a loop's condition uses too has a whole mask in the body: each element is zero or doubled."""

    def f(p, x):
        def turn(c):
            return c[0] + 1, x @ p["w"]

        more = lambda c: (c[0] < 1) | jnp.isnan((x @ p["w"]).sum())
        return lax.while_loop(more, turn, (0, 0 * x))[1]

    assert set(np.unique(drawn(f, transparent()))) == {0.0, 2.0}


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_use_the_masks_of_the_forward_pass(remat):
    """d/da of sum(drop(x) a b) is the sum of the dropped rows: zero where a whole column fell away."""
    ad = jlora.with_dropout(transparent(), KEY)
    layer = jax.checkpoint(dot) if remat else dot
    f = jlora.lift(lambda p, x: layer(x, p["w"]))
    out, grads = jax.value_and_grad(lambda t: f(jlora.join(t, ad.frozen), ROWS).sum(), has_aux=False)(ad.trainable)
    mask = drawn(lambda p, x: x @ p["w"], transparent())
    assert out == mask.sum()
    np.testing.assert_allclose(grads["w"]["a"], np.tile(mask.sum(0), (SIZE, 1)))


# --- ranks and modules ----------------------------------------------------------------------------------------------

RATES = {"dropout": 0.3, "rank_dropout": 0.25, "module_dropout": 0.2}
METHODS = {
    "LoRA": lambda **o: jlora.LoRA(rank=3, **o),
    "LoRA in slices": lambda **o: jlora.LoRA(rank=2, slices=((0, 3), (5, 8)), **o),
    "LoRA in a pair": lambda **o: jlora.LoRA(rank=2, init="pissa", **o),
    "AdaLoRA": lambda **o: jlora.AdaLoRA(rank=3, **o),
    "SoRA": lambda **o: jlora.SoRA(rank=3, **o),
    "LoHa": lambda **o: jlora.LoHa(rank=2, **o),
    "LoKr": lambda **o: jlora.LoKr(rank=1, factor=2, **o),
    "LoKr, both low-rank": lambda **o: jlora.LoKr(rank=1, decompose_both=True, **o),
    "VeRA": lambda **o: jlora.VeRA(rank=6, **o),
    "TiedLoRA": lambda **o: jlora.TiedLoRA(rank=3, **o),
    "VBLoRA": lambda **o: jlora.VBLoRA(rank=2, vectors=5, length=4, **o),
    "MiCA": lambda **o: jlora.MiCA(rank=3, **o),
    "KaSA": lambda **o: jlora.KaSA(rank=3, **o),
    "PSOFT": lambda **o: jlora.PSOFT(rank=2, **o),
    "LoRAXS": lambda **o: jlora.LoRAXS(rank=2, **o),
    "GraLoRA": lambda **o: jlora.GraLoRA(rank=3, blocks=1, hybrid=2, **o),
    "MiSS": lambda **o: jlora.MiSS(rank=3, **o),
    "HiRA": lambda **o: jlora.HiRA(rank=2, **o),
    "RandLoRA": lambda **o: jlora.RandLoRA(rank=3, **o),
    "DeLoRA": lambda **o: jlora.DeLoRA(rank=3, strength=2, **o),
    "DoRA": lambda **o: jlora.DoRA(jlora.LoRA(rank=3, **o)),
}


@pytest.mark.parametrize("name", METHODS)
def test_every_method_is_right_in_the_mean(name):
    """All three rates at once: the mean over keys is the method without dropout. merge and dense know no key."""
    params = {"w": jax.random.normal(jax.random.key(1), (9, 8))}
    x = jax.random.normal(jax.random.key(2), (5, 9))
    ad = jlora.adapt(params, METHODS[name](target="w", **RATES), axes={"w": "io"})
    begun = np.asarray(jlora.lift(dot2)(ad, x), np.float64)
    leaves, tree = jax.tree.flatten(ad.trainable)
    leaves = [a + 0.5 * jax.random.normal(jax.random.key(n), a.shape) for n, a in enumerate(leaves)]
    ad = jlora.join(jax.tree.unflatten(tree, leaves), ad.frozen)
    f = jlora.lift(dot2)
    keys = jax.random.split(KEY, 6000)
    made = np.asarray(jax.jit(jax.vmap(lambda key: f(jlora.with_dropout(ad, key), x)))(keys), np.float64)
    want, base = np.asarray(f(ad, x), np.float64), np.asarray(x @ params["w"])
    spread = made.std(0)
    assert np.mean(spread > 1e-3) > 0.7
    assert np.all(np.abs(made.mean(0) - want) < 6 * spread / np.sqrt(len(keys)) + 1e-5)
    keyed = jlora.with_dropout(ad, KEY)
    np.testing.assert_array_equal(jlora.lift(dot2, dense=True)(keyed, x), jlora.lift(dot2, dense=True)(ad, x))
    if name == "KaSA":  # whose base is W0 without noise
        base = begun
    if name != "DoRA":  # whose magnitude stays
        off = np.isclose(made, base, rtol=1e-6, atol=1e-6).all((1, 2)).mean()
        assert off >= 0.17, "a module is away at its rate, and the layer then is the base"


@pytest.mark.parametrize("name", METHODS)
def test_a_rate_of_zero_changes_no_bit(name):
    """A rate of zero is no dropout: the plan is the same, and under a key the output is, bit for bit."""
    params = {"w": jax.random.normal(jax.random.key(1), (9, 8))}
    plain, zero = (
        jlora.adapt(params, METHODS[name](target="w", **rates), axes={"w": "io"})
        for rates in ({}, dict.fromkeys(RATES, 0))
    )
    assert plain.frozen.plan is zero.frozen.plan
    x = jax.random.normal(jax.random.key(2), (5, 9))
    f = jax.jit(jlora.lift(dot2))
    np.testing.assert_array_equal(f(jlora.with_dropout(zero, KEY), x), f(plain, x))


def gates(f, *stack, **rates):
    return drawn(f, transparent(*stack, spec=jlora.LoRA(rank=SIZE, target="w", **rates)))


def test_a_dropped_rank_is_away_for_all_rows():
    """One draw a use and a layer, the same in a loop and in a scan; what is kept is divided by 1 - rate."""
    loop = gates(lambda p, x: jnp.stack([x @ p["w"][n] for n in (0, 1, 2)]), 3, rank_dropout=RATE)
    assert set(np.unique(loop)) == {0.0, 2.0}
    assert (loop == loop[:, :1]).all()
    assert all(0.1 < np.mean(loop[n] == loop[m]) < 0.9 for n in range(3) for m in range(n))
    np.testing.assert_array_equal(gates(LAYERS["scan"], 3, rank_dropout=RATE), loop)
    vmapped = gates(lambda p, x: jax.vmap(jnp.matmul)(jnp.stack([x] * 3), p["w"]), 3, rank_dropout=RATE)
    assert all((vmapped[n] != vmapped[m]).any() for n in range(3) for m in range(n))


def test_a_dropped_module_is_away_as_a_whole():
    """One draw decides for the whole update and all rows of a use; each turn of a loop is a use of its own."""
    each = gates(scanned(1), module_dropout=RATE).reshape(4, -1)
    many = gates(lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 64)[1], module_dropout=RATE)
    assert (each == each[:, :1]).all() and set(np.unique(many)) == {0.0, 2.0}
    assert 0.25 < (many[:, 0, 0] == 0).mean() < 0.75


def test_slices_of_one_module_go_together_and_two_methods_of_a_sum_apart():
    """The slices of a weight are one module and go together; the two methods of a Sum are two and go apart."""
    half = SIZE // 2
    lora = lambda **o: jlora.LoRA(rank=2, target="w", module_dropout=RATE, **o)

    def away(spec):
        ad = jlora.adapt({"w": jnp.zeros((SIZE, SIZE))}, spec, axes={"w": "io"})
        ad = jlora.join(jax.tree.map(jnp.ones_like, ad.trainable), ad.frozen)
        made = drawn(lambda p, x: lax.scan(lambda c, _: (c, x @ p["w"]), 0, None, 64)[1], ad)
        return made[:, 0, 0], made[:, 0, -1]

    one, other = away(lora(slices=((0, half), (half, SIZE))))
    np.testing.assert_array_equal(one, other)
    both, _ = away(jlora.Sum(lora(), lora()))
    assert len(np.unique(both)) == 3, "none, one, both"


def test_ranks_of_a_table_are_dropped_where_it_is_looked_up():
    """A look-up drops ranks as a product does: each is away, or divided by 1 - rate."""
    table = {"embedding": jnp.zeros((SIZE, SIZE))}
    ad = jlora.adapt(table, jlora.LoRA(rank=SIZE, target="embedding", rank_dropout=RATE))
    ones = {"a": jnp.ones((SIZE, SIZE)), "b": jnp.eye(SIZE)}  # so that column r of every row is rank r's
    ad = jlora.join({"embedding": ones}, ad.frozen)
    rows = np.asarray(jlora.lift(lambda p: p["embedding"][jnp.arange(SIZE)])(jlora.with_dropout(ad, KEY)))
    assert set(rows[0]) == {0.0, 2.0} and (rows == rows[0]).all(), "one draw a rank, the same in all rows"


def test_ranks_of_a_method_that_has_none_are_not_dropped_in_silence():
    """A rank dropout on a weight whose update has no rank is refused, as it would do nothing unnoticed."""
    with pytest.raises(ValueError, match="rank_dropout=0.1, and it has no rank here"):
        jlora.adapt({"w": jnp.zeros((4, 4))}, jlora.LoKr(rank=8, rank_dropout=0.1, target="w"), axes={"w": "io"})


# --- keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("raw", [jax.random.PRNGKey(5), np.asarray(jax.random.PRNGKey(5))], ids=["jax", "numpy"])
def test_a_raw_key_draws_as_the_typed_one(raw):
    """A raw key, JAX's or NumPy's, gives the masks and the factors of the typed key that it spells."""
    ad = transparent(3)
    np.testing.assert_array_equal(drawn(LAYERS["scan"], ad, raw), drawn(LAYERS["scan"], ad))
    adapted = lambda key: jlora.adapt({"w": jnp.zeros((4, 4))}, jlora.LoRA(rank=2, target="w"), key=key)
    np.testing.assert_array_equal(adapted(raw).trainable["w"]["a"], adapted(KEY).trainable["w"]["a"])


def test_keys_of_other_implementations_draw():
    """A raw key of four words is one of rbg, whatever the default is."""
    typed = jax.random.key(5, impl="rbg")
    ad = transparent()
    made = drawn(FLAT, ad, jax.random.key_data(typed))
    np.testing.assert_array_equal(made, drawn(FLAT, ad, typed))
    assert set(np.unique(made)) == {0.0, 2.0}
    with jax.default_prng_impl("unsafe_rbg"):
        np.testing.assert_array_equal(drawn(FLAT, ad, jax.random.PRNGKey(5)), drawn(FLAT, ad, jax.random.key(5)))


@pytest.mark.parametrize("key", [jax.random.split(KEY, 3), jax.random.split(jax.random.PRNGKey(0), 3)])
def test_several_keys_are_refused_and_vmapped(key):
    """Several keys at once are refused with both ways out, and under vmap each draws as it does alone."""
    ad = transparent()
    with pytest.raises(TypeError, match=r"keys of shape \(3,\); write key=keys\[0\], or vmap"):
        jlora.with_dropout(ad, key)
    f = lambda key: jlora.lift(dot2)(jlora.with_dropout(ad, key), ROWS)
    np.testing.assert_array_equal(jax.vmap(f)(key), jnp.stack([f(k) for k in key]))


def test_with_dropout_of_something_else_says_where_it_goes():
    """A key for what is no Adapted is refused: the error names what to make, or where in the tree the Adapted is."""
    for other in ({"w": ROWS}, {"params": transparent()}):
        with pytest.raises(TypeError, match="with_dropout takes an Adapted.*(jlora.adapt|inside, at ..params..)"):
            jlora.with_dropout(other, KEY)


# --- saying that there is none -------------------------------------------------------------------------------------


def loss(trainable, frozen, x, f=dot2):
    return jlora.lift(f)(jlora.join(trainable, frozen), x).sum()


TRAINED = {
    "grad": lambda ad: jax.grad(loss)(ad.trainable, ad.frozen, ROWS),
    "jit of grad": lambda ad: jax.jit(jax.grad(loss))(ad.trainable, ad.frozen, ROWS),
    "grad of jit": lambda ad: jax.grad(jax.jit(loss))(ad.trainable, ad.frozen, ROWS),
    "grad of remat": lambda ad: jax.grad(jax.checkpoint(loss))(ad.trainable, ad.frozen, ROWS),
    "vjp": lambda ad: jax.vjp(lambda t: loss(t, ad.frozen, ROWS), ad.trainable)[1](jnp.ones(())),
    "grad of scan": lambda ad: jax.grad(
        lambda t: lax.scan(lambda c, x: (c + loss(t, ad.frozen, x), None), 0.0, ROWS[None])[0]
    )(ad.trainable),
}
EVALUATED = {
    "eager": lambda ad: loss(ad.trainable, ad.frozen, ROWS),
    "jit": lambda ad: jax.jit(loss)(ad.trainable, ad.frozen, ROWS),
    "gradient of the input": lambda ad: jax.jit(jax.grad(loss, argnums=2))(ad.trainable, ad.frozen, ROWS),
    "vmap": lambda ad: jax.vmap(loss, (None, None, 0))(ad.trainable, ad.frozen, ROWS[None]),
    "explain": lambda ad: jlora.explain(dot2, ad, ROWS),
    "forward mode": lambda ad: jlora.lift(dot2, forward_mode=True)(ad, ROWS),
    "merge": lambda ad: jlora.merge(ad),
    "trained with a key": lambda ad: jax.grad(loss)(ad.trainable, jlora.with_dropout(ad, KEY).frozen, ROWS),
}


@pytest.mark.parametrize("name", TRAINED)
def test_a_training_step_without_a_key_says_so(name):
    """A gradient of factors without a key warns that dropout is off, in whatever way it is taken."""
    with pytest.warns(UserWarning, match=r"dropout 0.5 is off without a key: jlora.with_dropout\(adapted, key\)"):
        TRAINED[name](transparent())


@pytest.mark.parametrize("name", EVALUATED)
def test_evaluation_without_a_key_says_nothing(name):
    """Nothing warns where dropout is off by right, without a gradient of factors, or where there is a key."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EVALUATED[name](transparent())


def test_it_is_said_once():
    """By Python's own rule: once a place in the code and text, however often a step is traced."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        for _ in range(3):
            TRAINED["grad"](transparent(spec=jlora.LoRA(rank=SIZE, target="w", dropout=0.0625)))
    assert len(said) == 1


def test_the_table_says_it():
    """The table notes dropout that has no key, and is silent with a key or without dropout."""
    ad = transparent()
    assert "note: dropout 0.5 is off without a key: jlora.with_dropout(adapted, key), in the loss" in str(ad)
    assert "dropout" not in str(jlora.with_dropout(ad, KEY))
    assert "dropout" not in str(jlora.adapt({"w": ROWS}, jlora.LoRA(rank=2, target="w")))


# --- JAX's checks, and meshes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["jit", "remat of jit of remat", "scan", "cond", "while_loop"])
def test_no_tracer_outlives_its_trace(name):
    """Counting draws leaks no tracer out of a step, out of `explain` or out of any control flow."""
    ad = transparent()
    step = lambda ad: jax.grad(loss)(ad.trainable, ad.frozen, ROWS, SAME[name] if name != "while_loop" else FLAT)
    gc.freeze()  # JAX collects after each trace, and what other tests have left need not be looked through each time
    try:
        with jax.checking_leaks():
            keyed = jlora.with_dropout(ad, KEY)
            jax.jit(step)(keyed)
            jlora.explain(SAME[name], keyed, ROWS)
            drawn(SAME[name], ad)
    finally:
        gc.unfreeze()


@pytest.fixture(params=["Auto", "Explicit"])
def mesh(request):
    return jax.make_mesh((4,), ("data",), axis_types=(getattr(AxisType, request.param),))


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("closed", [False, True])
def test_a_mask_lives_where_its_activation_does(mesh, inside, closed):
    """On a mesh with explicit axes too, set or not, the activation an argument or a constant: the draw is the same."""
    ad = transparent()
    place = lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec))
    x = place(ROWS, P("data"))
    frozen = jax.tree.map(lambda a: place(a, P()), ad.frozen)
    trainable = jax.tree.map(lambda a: place(a, P()), ad.trainable)

    def value(t, x):
        return jlora.lift(dot2)(jlora.with_dropout(jlora.join(t, frozen), KEY), x)

    plain = jax.value_and_grad(lambda t: jnp.sum(jlora.lift(dot2)(jlora.with_dropout(jlora.join(t, ad.frozen), KEY),
                                                                 ROWS)))(ad.trainable)  # fmt: skip
    slope = jax.value_and_grad(lambda t, x: jnp.sum(value(t, x)))
    step = jax.jit(lambda t: slope(t, x)) if closed else jax.jit(slope)
    with jax.set_mesh(mesh) if inside else warnings.catch_warnings():
        made = step(trainable) if closed else step(trainable, x)
    for one, other in zip(jax.tree.leaves(made), jax.tree.leaves(plain), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_shards_inside_shard_map_draw_apart(mesh):
    """An activation that varies over a mesh axis has a mask a shard; one that does not has one."""
    ad = transparent()
    cut = jax.device_put(ROWS, NamedSharding(mesh, P("data")))
    f = lambda ad, x: jlora.lift(dot2)(ad, x)
    keyed = jlora.with_dropout(ad, KEY)
    apart = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data")))(keyed, cut)
    alike = jax.jit(jax.shard_map(f, mesh=mesh, in_specs=(P(), P()), out_specs=P()))(keyed, ROWS[:1])
    apart = np.asarray(apart)
    assert set(np.unique(apart)) == {0.0, 2.0}
    assert all(0.1 < np.mean(apart[n] == apart[m]) < 0.9 for n in range(4) for m in range(n))
    np.testing.assert_array_equal(alike, drawn(lambda p, x: x[:1] @ p["w"], ad))
