"""DyLoRA's nested ranks and SeLoRA's growing ones, against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.rank import at_rank, compact, dylora, sample_rank, search, selora
from methods import as_bytes, assert_close, away_from_start

pytestmark = pytest.mark.settled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params():
    return {"dense": {"kernel": draw(1, 6, 5), "bias": draw(2, 5)}, "layers": {"kernel": draw(3, 3, 6, 6)}}


def model(p, x):
    x, _ = jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, p["layers"]["kernel"])
    return x @ p["dense"]["kernel"] + p["dense"]["bias"]


X = draw(9, 7, 6)


@functools.cache
def start(method=jlora.LoRA, away=True):
    spec = [method(rank=4, alpha=6, target="kernel"), jlora.BitFit(target="bias")]
    adapted = jlora.adapt(params(), spec)
    return jlora.join(away_from_start(adapted.trainable), adapted.frozen) if away else adapted


# --- DyLoRA -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [jlora.LoRA, *(pytest.param(m, marks=pytest.mark.slow) for m in (jlora.SoRA, jlora.LoRAFA))],
    ids=lambda m: m.__name__,
)
def test_a_rank_is_a_slice_with_alpha_over_b(method):
    """Rank b is the first b rows at scale alpha / b, in one program for every b, and compacts to just those rows."""
    adapted = start(method)
    merged = jax.jit(lambda b: jlora.merge(at_rank(adapted, b)))
    lifted = jax.jit(lambda b: jlora.lift(model)(at_rank(adapted, b), X))
    for b in range(1, 5):
        for group, name in (("dense/kernel", "dense"), ("layers/kernel", "layers")):
            f = adapted.frozen.factors[group] | adapted.trainable[group]
            f = {n: np.asarray(x, np.float64) for n, x in f.items()}
            a, out = f["a"][..., :b, :], f["b"][..., :b, :]
            if "g" in f:
                a = a * f["g"][..., :b, None]
            want = np.asarray(adapted.frozen.base[name]["kernel"]) + 6 / b * np.einsum("...ri,...ro->...io", a, out)
            np.testing.assert_allclose(merged(b)[name]["kernel"], want, rtol=1e-4, atol=1e-5)
        assert_close(lifted(b), model(merged(b), X))
        if b == 4:
            continue  # nothing to cut
        small = compact(at_rank(adapted, b))
        assert {s.method.rank for s in small.frozen.plan.sites if hasattr(s.method, "rank")} == {b}
        assert_close(jlora.merge(small), merged(b), 1e-6)
    assert merged._cache_size() == lifted._cache_size() == 1
    assert_close(lifted(4), jlora.lift(model)(adapted, X))
    assert as_bytes(merged(0)["layers"]) == as_bytes(params()["layers"]) and merged._cache_size() == 1


@pytest.mark.parametrize("mode", ["normal", "frozen"])
@pytest.mark.parametrize("b", [3, *(pytest.param(b, marks=pytest.mark.slow) for b in (1, 4))])
def test_gradients_reach_the_rows_of_the_mode(mode, b):
    """Rows that are constants still take part: the others have the gradients that they have in the normal mode."""
    adapted = start()
    loss = lambda t, b, mode: jnp.sum(jlora.lift(model)(at_rank(jlora.join(t, adapted.frozen), b, mode), X) ** 2)
    grads = jax.jit(jax.grad(loss), static_argnums=2)
    got, full = (grads(adapted.trainable, b, m) for m in (mode, "normal"))
    moves = [mode == "normal" and n < b or n == b - 1 for n in range(4)]
    for group in ("dense/kernel", "layers/kernel"):
        for x, y in zip(got[group].values(), full[group].values(), strict=True):
            x, y = (np.moveaxis(np.asarray(z), -2, 0).reshape(4, -1) for z in (x, y))
            assert np.any(x != 0, 1).tolist() == moves
            np.testing.assert_allclose(x[moves], y[moves], rtol=1e-5)
    assert np.any(got["dense/bias"]["delta"])


@pytest.mark.parametrize(
    "mode,form",
    [("normal", "whole"), ("frozen", "split")]
    + [pytest.param(*case, marks=pytest.mark.slow) for case in (("normal", "split"), ("frozen", "whole"))],
)
def test_momentum_and_decay_move_no_other_row(mode, form):
    """Ranks drawn anew: at each step only the rows of its rank change, bit for bit."""
    adapted = start()
    tx = dylora(optax.adamw(0.05, weight_decay=0.3), adapted, mode)
    tx = jlora.masked(tx) if form == "whole" else tx
    join = lambda p: p if form == "whole" else jlora.join(p, adapted.frozen)
    loss = lambda p, b: jnp.sum(jlora.lift(model)(at_rank(join(p), b, mode), X) ** 2)

    @jax.jit
    def step(p, state, b):
        updates, state = tx.update(jax.grad(loss)(p, b), state, p, b=b)
        return optax.apply_updates(p, updates), state

    p = adapted if form == "whole" else adapted.trainable
    state = tx.init(p)
    for b in (4, 2, 3, 1, 4):
        new, state = step(p, state, b)
        moves = [mode == "normal" and n < b or n == b - 1 for n in range(4)]
        for group in ("dense/kernel", "layers/kernel"):
            old, now = (join(t).trainable[group]["a"] for t in (p, new))
            changed = np.any(np.moveaxis(np.asarray(old) != np.asarray(now), -2, 0).reshape(4, -1), 1)
            assert changed.tolist() == moves
        p = new
    assert step._cache_size() == 1


def test_ranks_are_drawn_as_said():
    """Drawn ranks are uniform or geometric between low and high, ends included, and never outside."""
    keys = jax.random.split(jax.random.key(1), 4000)
    shares = lambda **law: (
        np.bincount(jax.jit(jax.vmap(lambda k: sample_rank(k, 2, 5, **law)))(keys), minlength=6) / 4000
    )
    np.testing.assert_allclose(shares()[2:], 0.25, atol=0.03)
    want = 0.7 ** np.arange(4)
    np.testing.assert_allclose(shares(law="geometric", p=0.3)[2:], want / want.sum(), atol=0.03)
    assert not shares()[:2].any()


def test_the_search_returns_the_whole_curve():
    """Every rank is evaluated, in one program; the choice is the last before the first that is not good enough."""
    adapted = start()
    values = {4: 0.9, 3: 0.89, 2: 0.7, 1: 0.95}
    traces = []

    @jax.jit
    def evaluate(small):
        traces.append(1)
        return jnp.sum(jlora.lift(model)(small, X))

    found = search(adapted, evaluate)
    assert list(found.curve) == [4, 3, 2, 1] and len(traces) == 1
    for b, value in found.curve.items():
        np.testing.assert_allclose(value, float(jnp.sum(jlora.lift(model)(at_rank(adapted, b), X))), rtol=1e-5)
    given = iter(values.values())
    assert search(adapted, lambda _: next(given), tolerance=0.05) == (3, values)


def test_dylora_refuses_in_words():
    """Ranks beyond those of the adapter, and an update that is not told its rank, are refused."""
    adapted = start()
    for b in (0, 5, np.int64(5)):
        with pytest.raises(ValueError, match="ranks from 1 to 4"):
            at_rank(adapted, b)
    with pytest.raises(ValueError, match="'normal' or 'frozen'"):
        at_rank(adapted, 2, "cold")
    with pytest.raises(ValueError, match="finds no ranks under Full"):
        at_rank(jlora.adapt(params(), jlora.Full(target="dense")), 1)
    tx = dylora(optax.sgd(0.1), adapted)
    with pytest.raises(ValueError, match=r"tx.update\(grads, state, params, b=b\)"):
        tx.update(adapted.trainable, tx.init(adapted.trainable), adapted.trainable)
    with pytest.raises(ValueError, match="1 <= low <= high"):
        sample_rank(jax.random.key(0), 0, 3)
    with pytest.raises(ValueError, match="p in"):
        sample_rank(jax.random.key(0), 1, 3, "geometric", 1.0)


# --- SeLoRA -------------------------------------------------------------------------------------------------------


def dense_gradients(step, trainable):
    leaves, treedef = jax.tree.flatten(trainable)
    return treedef.unflatten([draw(1000 * step + n, *x.shape) for n, x in enumerate(leaves)])


def test_growth_is_the_formula():
    """Twelve steps on drawn gradients: ratios and ranks in NumPy, layer by layer; rows beyond stay bit for bit."""
    adapted = start(away=False)
    tx = selora(optax.adam(0.05), adapted, threshold=1.4, interval=2)
    trainable, state = adapted.trainable, tx.init(adapted.trainable)
    ranks = {"dense/kernel": np.array([1]), "layers/kernel": np.array([1, 1, 1])}
    update = jax.jit(tx.update)
    grown = 0
    for n in range(1, 13):
        grads = dense_gradients(n, trainable)
        updates, state = update(grads, state, trainable)
        new = optax.apply_updates(trainable, updates)
        for group, old in ranks.items():
            layered = lambda x: np.asarray(x, np.float64).reshape(-1, *x.shape[-2:])
            squares = sum(np.sum(layered(x) ** 2, -1) for x in grads[group].values())
            changed = [np.any(layered(new[group][f]) != layered(trainable[group][f]), -1) for f in "ab"]
            for layer, k in enumerate(old.copy()):
                for rows in changed:
                    assert rows[layer].tolist() == [r < k for r in range(4)]
                ratio = squares[layer, : k + 1].sum() / squares[layer, :k].sum()
                assert ratio >= 1
                if n % 2 == 0:
                    np.testing.assert_allclose(np.ravel(state.ratio[group]["b"])[layer], ratio, rtol=1e-5)
                    old[layer] += ratio >= 1.4 and k < 4
                    grown += ratio >= 1.4 and k < 4
            assert np.ravel(state.ranks[group]["b"]).tolist() == old.tolist()
        trainable = new
    assert grown >= 4 and len({*ranks["dense/kernel"].tolist(), *ranks["layers/kernel"].tolist()}) > 1


def test_a_probe_of_the_same_point_gives_a_ratio_of_at_least_one_and_is_the_row_inserted():
    """The row beyond the active rank adds nothing, so that its gradient is of the very same loss."""
    adapted = start(away=False)
    tx = selora(optax.adam(0.05), adapted, threshold=1.0, interval=1, start=2)
    loss = lambda t: jnp.mean((jlora.lift(model)(jlora.join(t, adapted.frozen), X) - 1) ** 2)

    @jax.jit
    def step(t, state):
        value, grads = jax.value_and_grad(loss)(t)
        updates, state = tx.update(grads, state, t)
        return optax.apply_updates(t, updates), state, value, grads

    t, state = adapted.trainable, tx.init(adapted.trainable)
    third = np.asarray(t["dense/kernel"]["a"][2])
    t, state, first, grads = step(t, state)
    assert not np.any(grads["dense/kernel"]["a"]) and np.any(grads["dense/kernel"]["b"][2])
    assert (np.asarray(t["dense/kernel"]["a"][2]) == third).all() and not np.any(t["dense/kernel"]["b"][2:])
    assert np.all(np.asarray(state.ranks["layers/kernel"]["b"]) == 3) and int(state.ranks["dense/kernel"]["b"]) == 3
    inner = state.inner[0].mu["dense/kernel"]["b"]
    assert np.any(inner[:2]) and not np.any(inner[2:])
    for _ in range(30):
        t, state, value, _ = step(t, state)
    assert float(value) < float(first) and int(state.ranks["dense/kernel"]["b"]) == 4
    assert all(np.all(np.asarray(x) >= 1) for x in jax.tree.leaves(state.ratio))


def test_what_never_grew_is_dropped_by_compact():
    """Rows that SeLoRA did not reach add nothing, and the adapter without them computes the same."""
    adapted = start(away=False)
    tx = selora(optax.sgd(0.1), adapted, start=2)
    t, state = adapted.trainable, tx.init(adapted.trainable)
    for n in range(3):
        updates, state = tx.update(dense_gradients(n, t), state, t)
        t = optax.apply_updates(t, updates)
    large = jlora.join(t, adapted.frozen)
    small = compact(large)
    assert {s.method.rank for s in small.frozen.plan.sites if hasattr(s.method, "rank")} == {2}
    assert_close(jlora.lift(model)(small, X), jlora.lift(model)(large, X), 1e-6)


def test_a_second_gradient_and_every_form():
    """Growth follows the probe where one is given; zero gradients grow nothing; the whole form has the same bits."""
    adapted = start(away=False)
    make = lambda: selora(optax.adam(0.05), adapted, threshold=1.3, interval=1)
    t = adapted.trainable
    grads, probe = dense_gradients(1, t), dense_gradients(2, t)
    zero = jax.tree.map(jnp.zeros_like, t)
    _, with_probe = make().update(grads, make().init(t), t, probe=probe)
    _, alone = make().update(probe, make().init(t), t)
    assert as_bytes(with_probe.ranks) == as_bytes(alone.ranks) and as_bytes(with_probe.ratio) == as_bytes(alone.ratio)
    _, still = make().update(zero, make().init(t), t)
    assert all(np.all(np.asarray(x) == 1) for x in jax.tree.leaves((still.ranks, still.ratio)))
    want, _ = make().update(grads, make().init(t), t)
    whole = jlora.Adapted(grads, jax.tree.map(jnp.zeros_like, adapted.frozen))
    masked = jlora.masked(make())
    got, _ = masked.update(whole, masked.init(adapted), adapted)
    assert as_bytes(got.trainable) == as_bytes(want)
    assert optax.tree_utils.tree_map_params(make(), lambda x: x, make().init(t))


def test_selora_refuses_in_words():
    """SeLoRA without a LoRA to grow, or with a threshold that every ratio passes, is refused."""
    with pytest.raises(ValueError, match="would do nothing.*jlora.LoRA"):
        selora(optax.sgd(0.1), jlora.adapt(params(), jlora.SoRA(rank=2, target="kernel")))
    with pytest.raises(ValueError, match="threshold=0.9.*at least 1"):
        selora(optax.sgd(0.1), start(), threshold=0.9)
