"""Smaller adapters: the same outputs, the same scale, the same steps; and best approximations of lower rank."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora.rank import adalora, compact, magnitude, orthogonality, rank_table, resize
from methods import as_bytes, assert_close, away_from_start

pytestmark = pytest.mark.settled


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params():
    return {
        "dense": {"kernel": draw(1, 8, 5), "bias": draw(2, 5)},
        "layers": {"kernel": draw(3, 3, 8, 8)},
        "query": {"kernel": draw(4, 8, 2, 4)},
    }


def model(p, x):
    x, _ = jax.lax.scan(lambda x, k: (jnp.tanh(x @ k), None), x, p["layers"]["kernel"])
    heads = jnp.einsum("bi,ihd->bhd", x, p["query"]["kernel"])
    return x @ p["dense"]["kernel"] + p["dense"]["bias"], heads


X = draw(9, 7, 8)
METHODS = {
    "adalora": jlora.AdaLoRA(rank=4, alpha=3, target="kernel"),
    "sora": jlora.SoRA(rank=4, alpha=3, target="kernel"),
    "lora": jlora.LoRA(rank=4, alpha=3, target="kernel"),
    "lora_fa": jlora.LoRAFA(rank=4, alpha=3, target="kernel"),
    "slices": jlora.LoRA(rank=2, alpha=3, slices=((0, 2), (2, 5)), target="kernel"),
    "dora": jlora.DoRA(jlora.AdaLoRA(rank=4, alpha=3, target="kernel")),
    "loha": jlora.LoHa(rank=4, alpha=3, target="kernel"),
}


def few(*fast, of):
    """All of them, and those that are not named in the slow part."""
    return [pytest.param(x, marks=[pytest.mark.slow] * (x not in fast)) for x in of]


ALIVE = {"dense/kernel": [1, 3], "layers/kernel": [[0], [0, 2, 3], []], "query/kernel": []}


@functools.cache
def pruned(name):
    """Ranks dead by name of the weight: two of four, unlike ones in a stack, and all."""
    adapted = jlora.adapt(params(), METHODS[name])
    trainable = {g: dict(f) for g, f in away_from_start(adapted.trainable).items()}
    for group, alive in ALIVE.items():
        for factor, x in trainable[group].items():
            if factor == "m":
                trainable[group][factor] = 1 + 0.1 * x
            if factor not in ("lam", "g", "b", "b0", "b1", "a1", "a2", "b2"):
                continue
            x = np.array(x)
            for layer, kept in zip(x, alive, strict=True) if group == "layers/kernel" else [(x, alive)]:
                layer[[n for n in range(len(layer)) if n not in kept]] = 0
            trainable[group][factor] = jnp.asarray(x)
    return jlora.join(trainable, adapted.frozen)


def ranks(adapted):
    return {s.leaf.path: {size for d in s.recipe.deltas for _, size in d.sizes} for s in adapted.frozen.plan.sites}


@pytest.mark.parametrize("name", few("adalora", "lora", of=METHODS))
def test_a_compact_adapter_computes_the_same(name):
    """Dead ranks leave without a change of outputs or scale; a stack keeps its largest layer's, padded with zeros."""
    adapted = pruned(name)
    small = compact(adapted)
    for lifted in (jlora.lift(model), jlora.lift(model, dense=True)):
        assert_close(lifted(small, X), lifted(adapted, X), 1e-6)
    some = (
        {"dense/kernel": {1}, "layers/kernel": {1}} if name == "slices" else {"dense/kernel": {2}, "layers/kernel": {3}}
    )
    # a magnitude without an update is still no base weight
    assert ranks(small) == (some | {"query/kernel": {1}} if name == "dora" else some)
    assert jlora.count(small)[0] < jlora.count(adapted)[0] and small.frozen.base is adapted.frozen.base
    for group, factors in small.frozen.factors.items():
        assert as_bytes(factors["s"]) == as_bytes(adapted.frozen.factors[group]["s"])
    if name not in ("slices", "lora_fa", "dora"):
        for x in small.trainable["layers/kernel"].values():
            assert x.ndim < 2 or [bool(np.any(x[n, m])) for n, m in ((0, 1), (2, 0), (1, 2))] == [False, False, True]
    assert compact(small).frozen.plan is small.frozen.plan
    assert jlora.join(*jlora.split(small)).frozen.plan is small.frozen.plan


@pytest.mark.parametrize("name", ["adalora", "sora"])
def test_plain_lora_on_request(name):
    """AdaLoRA and SoRA made plain are LoRAs of the same outputs: the diagonal goes into a factor."""
    adapted = pruned(name)
    small = compact(adapted, plain=True)
    assert {type(s.method) for s in small.frozen.plan.sites} == {jlora.LoRA}
    assert_close(jlora.lift(model)(small, X), jlora.lift(model)(adapted, X), 1e-6)
    assert set(small.trainable["layers/kernel"]) == {"a", "b"}


def test_a_compact_adapter_is_saved_and_loaded(tmp_path):
    """A file of a compact adapter opens to its plan and bits on the base it came from."""
    for n, small in enumerate((compact(pruned("adalora")), compact(pruned("sora"), plain=True))):
        jlora.save(tmp_path / str(n), small)
        again = jlora.load(tmp_path / str(n), params())
        assert again.frozen.plan is small.frozen.plan and as_bytes(again.trainable) == as_bytes(small.trainable)


def steps(tx, adapted, trainable, state, n, penalty=0.1):
    lifted = jlora.lift(model)

    def loss(trainable):
        now = jlora.join(trainable, adapted.frozen)
        return sum(jnp.mean((y - 1) ** 2) for y in lifted(now, X)) + penalty * orthogonality(now)

    @jax.jit
    def step(trainable, state):
        updates, state = tx.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(n):
        trainable, state = step(trainable, state)
    return trainable, state


@pytest.mark.slow
def test_padding_stays_zero_and_training_goes_on_as_it_was():
    """20 more steps under Adam, decay and the penalty: what is padding moves nothing and is moved by nothing."""
    adapted = pruned("adalora")
    dead = jax.tree.map(lambda x: x == 0, magnitude(adapted))
    # the ranks that are dead in the large adapter: zero in all of their factors, as padding is
    whole = {g: dict(f) for g, f in adapted.trainable.items()}
    for group, marks in dead.items():
        for factor, x in whole[group].items():
            d = marks["lam"].reshape(*marks["lam"].shape, *(1,) * (x.ndim - marks["lam"].ndim))
            whole[group][factor] = jnp.where(d, 0, x)
    tx = optax.adamw(0.02, weight_decay=0.1)
    whole, state = steps(tx, adapted, whole, tx.init(whole), 3)
    adapted = jlora.join(whole, adapted.frozen)
    small, small_state = compact(adapted, state)
    assert small_state[0].mu["layers/kernel"]["p"].shape == (3, 3, 8) and "query/kernel" not in small_state[0].mu
    assert jax.tree.structure(small_state) == jax.tree.structure(tx.init(small.trainable))
    got, got_state = steps(tx, small, small.trainable, small_state, 20)
    want, want_state = steps(tx, adapted, whole, state, 20)
    kept = jlora.join(got, small.frozen)
    assert_close(jlora.lift(model)(kept, X), jlora.lift(model)(jlora.join(want, adapted.frozen), X), 1e-4)
    for tree in (got, got_state[0].mu, got_state[0].nu):
        for layer, n in enumerate((1, 3, 0)):
            for x in tree["layers/kernel"].values():
                assert not np.any(x[layer, n:]) and (n == 0 or np.any(x[layer, :n]))


def test_the_penalty_does_not_count_padding():
    """The penalty is over the living rows of each layer, and pushes none that is padding."""
    adapted = pruned("adalora")
    small = compact(adapted)
    for form in ("paper", "reference"):
        value = orthogonality(small, form)
        padded = small.trainable["layers/kernel"]
        squares = []
        for group, factors in small.trainable.items():
            for name in "pq":
                x = np.asarray(factors[name], np.float64)
                for layer in x if group == "layers/kernel" else [x]:
                    layer = layer.reshape(len(layer), -1)
                    layer = layer[np.any(layer != 0, 1)]
                    squares.append(np.sum((layer @ layer.T - np.eye(len(layer))) ** 2))
        want = np.sum(squares) if form == "paper" else np.mean(np.sqrt(squares))
        np.testing.assert_allclose(value, want, rtol=1e-5)
        grads = jax.grad(lambda t, form=form: orthogonality(jlora.join(t, small.frozen), form))(small.trainable)
        assert not np.any(np.asarray(grads["layers/kernel"]["p"])[np.all(np.asarray(padded["p"]) == 0, -1)])


def test_stacks_refuse_on_request():
    """Where padding is not wanted, a stack of unlike ranks is refused with its ranks."""
    with pytest.raises(ValueError, match=r"layers of 'layers/kernel' .* unlike ranks, \[0, 1, 3\]"):
        compact(pruned("adalora"), stacks="refuse")


def unrolled():
    """The same parameters for a model with its layers apart."""
    flat = params()
    stacked = flat.pop("layers")["kernel"]
    return flat | {f"layer_{n}": {"kernel": stacked[n]} for n in range(3)}


def apart(p, x):
    for n in range(3):
        x = jnp.tanh(x @ p[f"layer_{n}"]["kernel"])
    return model(p | {"layers": {"kernel": jnp.zeros((0, 8, 8))}}, x)


def names(path, index):
    return path.replace("layers", f"layer_{index[0]}") if index else path


@pytest.mark.parametrize("name", few("adalora", of=METHODS))
def test_layers_unstacked_have_ranks_of_their_own(name):
    """One function; each layer is as small as it became, and one without ranks leaves the plan."""
    adapted = pruned(name)
    alone = jlora.rank.unstack(adapted, unrolled(), names)
    want = jlora.lift(model)(adapted, X)
    assert_close(jlora.lift(apart)(alone, X), want, 1e-6)
    assert_close(jlora.lift(apart, dense=True)(alone, X), want, 1e-5)
    assert len({id(x) for x in jax.tree.leaves(alone)}) == len(jax.tree.leaves(alone))
    assert jlora.count(alone)[0] == jlora.count(adapted)[0]
    small = compact(alone)
    assert_close(jlora.lift(apart)(small, X), want, 1e-6)
    if name == "adalora":
        assert ranks(small) == {"dense/kernel": {2}, "layer_0/kernel": {1}, "layer_1/kernel": {3}}


def test_an_unstacked_adapter_is_written_with_a_rank_a_module(tmp_path):
    """A peft file of unstacked layers has each layer's own rank, and reads back to the same merged weights."""
    pytest.importorskip("safetensors", reason="peft's files are an extra")
    base = {"layers": {"kernel": draw(3, 3, 8, 8)}}
    adapted = jlora.adapt(base, jlora.LoRA(rank=4, alpha=3, target="kernel"))
    trainable = away_from_start(adapted.trainable)
    b = np.array(trainable["layers/kernel"]["b"])
    b[0, 1:], b[1, 2:] = 0, 0
    trainable["layers/kernel"]["b"] = jnp.asarray(b)
    separate = {f"layer_{n}": {"kernel": base["layers"]["kernel"][n]} for n in range(3)}
    small = compact(jlora.rank.unstack(jlora.join(trainable, adapted.frozen), separate, names))
    jlora.io.peft.save(tmp_path / "adapter", small)
    back = jlora.io.peft.load(tmp_path / "adapter", separate)
    assert jlora.rank.ranks(back) == {"layer_0/kernel": 1, "layer_1/kernel": 2, "layer_2/kernel": 4}
    assert_close(jlora.merge(back), jlora.merge(small), 1e-6)


def test_layers_unstacked_share_what_they_shared(tmp_path):
    """Tied-LoRA: one a and one b for all layers, as in the stack; values, and gradients of every factor, are those."""
    adapted = jlora.adapt(params(), jlora.TiedLoRA(rank=2, target="kernel"))
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    alone = jlora.rank.unstack(adapted, unrolled(), names)
    assert jlora.count(alone)[0] == jlora.count(adapted)[0]
    merged, stack = jlora.merge(alone), jlora.merge(adapted)["layers"]["kernel"]
    assert_close([merged[f"layer_{n}"]["kernel"] for n in range(3)], [stack[n] for n in range(3)], 1e-6)

    def grads(fn, ad):
        loss = lambda t: sum(jnp.sum(jnp.sin(y)) for y in jlora.lift(fn)(jlora.join(t, ad.frozen), X))
        return jax.jit(jax.grad(loss))(ad.trainable)

    one, each = grads(model, adapted), grads(apart, alone)
    assert_close(each["tied/layers/kernel"], one["tied/layers/kernel"], 1e-5)
    rows = {name: jnp.stack([each[f"layer_{n}/kernel"][name] for n in range(3)]) for name in one["layers/kernel"]}
    assert_close(rows, one["layers/kernel"], 1e-5)
    jlora.save(tmp_path / "adapter", alone)
    assert as_bytes(jlora.load(tmp_path / "adapter", unrolled()).trainable) == as_bytes(alone.trainable)


def test_unstack_refuses_in_words():
    """Names that are not there or taken twice are refused together by path, and so is a layer of another shape."""
    adapted = pruned("lora")
    with pytest.raises(ValueError) as error:
        jlora.rank.unstack(adapted, unrolled(), lambda path, index: "layer_0/kernel" if index else f"{path}s")
    for words in ("'dense/kernels', which is not there", "'query/kernels'", "where another layer is already"):
        assert words in str(error.value)
    with pytest.raises(ValueError, match=r"of shape \(8, 8\) goes to 'dense/kernel', of shape \(8, 5\)"):
        jlora.rank.unstack(adapted, unrolled(), lambda path, index: "dense/kernel" if index else path)
    with pytest.raises(TypeError, match="unstack takes an Adapted"):
        jlora.rank.unstack(params(), unrolled(), names)


@pytest.mark.parametrize("form", ["split", "whole", "multi", "chain"])
@pytest.mark.slow
def test_the_state_of_adalora_goes_along(form):
    """Allocated, made small with its state, and trained on: the losses go on as they did."""
    adapted = jlora.adapt(params(), METHODS["adalora"])
    schedule = dict(target_budget=7, total_steps=6, init_warmup=1, final_warmup=2)
    make = lambda adapted, **to: adalora(optax.adam(0.05), adapted, **(schedule | to))
    wrap = {
        "split": lambda tx: tx,
        "whole": jlora.masked,
        "multi": lambda tx: optax.MultiSteps(tx, 1).gradient_transformation(),
        "chain": lambda tx: optax.chain(optax.clip_by_global_norm(100.0), tx),
    }[form]
    lifted = jlora.lift(model)

    def run(tx, params, state, n):
        @jax.jit
        def step(params, state):
            join = lambda p: p if form == "whole" else jlora.join(p, frozen)
            loss = lambda p: sum(jnp.mean((y - 1) ** 2) for y in lifted(join(p), X))
            value, grads = jax.value_and_grad(loss)(params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, value

        values = []
        for _ in range(n):
            params, state, value = step(params, state)
            values.append(float(value))
        return params, state, values

    frozen = adapted.frozen
    tx = wrap(make(adapted))
    large = adapted if form == "whole" else adapted.trainable
    large, state, _ = run(tx, large, tx.init(large), 6)
    joined = large if form == "whole" else jlora.join(large, frozen)
    small, small_state = compact(joined, state)
    left = sum(int(jnp.sum(x)) for f in jax.tree.leaves(magnitude(small)) for x in [f != 0])
    assert left == 7
    tx2 = wrap(make(small, target_budget=7))
    start = small if form == "whole" else small.trainable
    assert jax.tree.structure(small_state) == jax.tree.structure(tx2.init(start))
    _, _, want = run(tx, large, state, 5)
    frozen = small.frozen
    _, _, got = run(tx2, start, small_state, 5)
    np.testing.assert_allclose(got, want, rtol=1e-4)


class Own(NamedTuple):
    """The state of a user's optimizer, in which `save` knows no name."""

    count: jax.Array

    def never_ran(self):
        return "" if self.count else "mine never ran"


def one_update(name):
    """A state before and after an update of the optimizer that is called so."""
    adapted = jlora.adapt(params(), METHODS[{"selora": "lora"}.get(name, name)])
    tx = {
        "adalora": lambda: adalora(optax.sgd(0.1), adapted, target_rank=1, total_steps=3),
        "sora": lambda: jlora.rank.sora(optax.sgd(0.1), adapted, learning_rate=0.1, sparsity=0.1),
        "selora": lambda: jlora.rank.selora(optax.sgd(0.1), adapted),
    }[name]()
    before = tx.init(adapted.trainable)
    return before, tx.update(adapted.trainable, before, adapted.trainable)[1]


RAN = {
    "adalora": lambda: one_update("adalora"),
    "sora": lambda: one_update("sora"),
    "selora": lambda: one_update("selora"),
    "mine": lambda: (Own(jnp.zeros((), int)), Own(jnp.ones((), int))),
}


@pytest.mark.parametrize("name", RAN)
def test_save_asks_the_state_whether_a_schedule_ran(name, tmp_path):
    """A state that says that it never ran is refused wherever it stands, and after an update it is not."""
    adapted = jlora.adapt(params(), METHODS["lora"])
    trained = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    before, after = RAN[name]()
    with pytest.raises(ValueError, match=f"save: .*{name} never ran.*apply tx.update to every step, or save without"):
        jlora.save(tmp_path / "adapter", trained, opt_state={"opt": (optax.EmptyState(), before)})
    assert not any(tmp_path.iterdir())
    jlora.save(tmp_path / "adapter", trained, opt_state={"opt": (optax.EmptyState(), after)})
    assert as_bytes(jlora.load(tmp_path / "adapter", params()).trainable) == as_bytes(trained.trainable)


def test_compact_refuses_in_words():
    """What would leave nothing, has no values or a state that does not fit is refused; no dead rank is warned of."""
    adapted = jlora.adapt(params(), METHODS["adalora"])
    with pytest.raises(ValueError, match="no adapter would be left; has it been trained"):
        compact(adapted)
    away = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    with pytest.warns(UserWarning, match="no dead rank: has the schedule"):
        assert as_bytes(compact(away).trainable) == as_bytes(away.trainable)
    state = adalora(optax.sgd(0.1), adapted, target_rank=1, total_steps=3).init(adapted.trainable)
    with pytest.raises(ValueError, match="schedule of adalora never ran"):
        compact(away, (state,))
    with pytest.raises(ValueError, match="has no values here.*outside of jit"):
        jax.jit(lambda t: compact(jlora.join(t, adapted.frozen)).trainable)(away.trainable)
    with pytest.raises(TypeError, match="compact takes an Adapted"):
        compact(away.trainable)
    with pytest.raises(ValueError, match="'pad' or 'refuse'"):
        compact(away, stacks="unstack")
    with pytest.raises(ValueError, match="moments"):
        compact(away, state, plain=True)
    with pytest.raises(ValueError, match="begin its state anew"):
        compact(pruned("adalora"), {"dense/kernel": {"p": jnp.ones((2, 2))}})


def test_stacks_of_stacks_and_partitioned_states():
    """Experts in layers, each with ranks of its own; a state in parts, one an optimizer of some factors."""
    adapted = jlora.adapt({"k": draw(1, 2, 3, 6, 5)}, jlora.SoRA(rank=4, target="k"), axes={"k": "ssio"})
    trainable = away_from_start(adapted.trainable)
    dead = np.random.default_rng(0).random((2, 3, 4)) < 0.6
    trainable["k"]["g"] = jnp.where(dead, 0, trainable["k"]["g"])
    adapted = jlora.join(trainable, adapted.frozen)
    tx = optax.partition({"g": optax.adam(0.1), "rest": optax.sgd(0.1, momentum=0.9)}, lambda t: jax.tree.map_with_path(
        lambda path, _: "g" if path[-1].key == "g" else "rest", t
    ))  # fmt: skip
    _, state = tx.update(trainable, tx.init(trainable), trainable)
    small, small_state = compact(adapted, state)
    assert small.trainable["k"]["a"].shape == (2, 3, int((~dead).sum(-1).max()), 6)
    assert_close(jlora.merge(small), jlora.merge(adapted), 1e-6)
    assert jax.tree.structure(small_state) == jax.tree.structure(tx.init(small.trainable))
    tx.update(small.trainable, small_state, small.trainable)


def test_shared_factors_stay():
    """An adapter whose ranks are of shared factors, as VeRA's, stays whole, however many of them are dead."""
    tied = jlora.adapt(params(), jlora.VeRA(rank=3, target="kernel"))
    tied = jlora.join(away_from_start(tied.trainable), tied.frozen)
    zeroed = {g: dict(f) | {"d": jnp.zeros_like(f["d"])} for g, f in tied.trainable.items()}
    assert as_bytes(compact(jlora.join(zeroed, tied.frozen))) == as_bytes(jlora.join(zeroed, tied.frozen))


# --- resize -------------------------------------------------------------------------------------------------------


def deltas(adapted):
    base = {s.leaf.path: s.leaf for s in adapted.frozen.plan.sites}
    merged, plain = jlora.merge(adapted), adapted.frozen.base
    found = {}
    for path in base:
        name = path.split("/")[0]
        d = np.asarray(merged[name]["kernel"], np.float64) - np.asarray(plain[name]["kernel"], np.float64)
        found[path] = d if name == "layers" else d.reshape(1, 8, -1)
    return found


@pytest.mark.parametrize("name", few("adalora", of=("lora", "adalora", "sora")))
@pytest.mark.parametrize("how", [{"rank": 2}, {"energy": 0.9}], ids=str)
def test_resize_is_eckart_and_young(name, how):
    """Each update becomes its best approximation, by rank or by energy, with the error of the singular values left."""
    adapted = jlora.adapt(params(), METHODS[name])
    adapted = jlora.join(away_from_start(adapted.trainable, 1.0), adapted.frozen)
    small, error = resize(adapted, **how)
    got, want = deltas(small), deltas(adapted)
    for path, d in want.items():
        u, s, v = np.linalg.svd(d, full_matrices=False)
        k = 2
        if "energy" in how:
            share = np.cumsum(s**2, -1) / np.sum(s**2, -1, keepdims=True)
            k = int((share < 0.9).sum(-1).max()) + 1
        best = (u[..., :k] * s[..., None, :k]) @ v[..., :k, :]
        np.testing.assert_allclose(got[path], best, atol=2e-5)
        np.testing.assert_allclose(error[path], np.sqrt(np.sum(s[..., k:] ** 2) / np.sum(s**2)), rtol=1e-4, atol=1e-6)
        assert ranks(small)[path] == {k}
    for f in small.trainable.values():
        if "lam" in f:
            p = f["p"].reshape(*f["lam"].shape, -1)
            assert_close(
                p @ jnp.swapaxes(p, -1, -2), jnp.broadcast_to(jnp.eye(p.shape[-2]), (*p.shape[:-1], p.shape[-2]))
            )


def test_resize_to_the_own_rank_changes_nothing():
    """A rank at least that of the adapter leaves plan and outputs as they are, and no error."""
    adapted = jlora.adapt(params(), METHODS["lora"])
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    same, error = resize(adapted, rank=9)
    assert_close(jlora.lift(model)(same, X), jlora.lift(model)(adapted, X), 1e-5)
    assert same.frozen.plan is adapted.frozen.plan and max(error.values()) == 0


def test_resize_refuses_in_words():
    """Zero updates, no rank or two, and methods without a low-rank update are refused."""
    adapted = jlora.adapt(params(), METHODS["lora"])
    with pytest.raises(ValueError, match="update of 'dense/kernel' is zero"):
        resize(adapted, rank=2)
    with pytest.raises(ValueError, match="update of 'dense/kernel' is zero"):
        resize(adapted, energy=0.5)
    for wrong in ({}, {"rank": 1, "energy": 0.5}):
        with pytest.raises(ValueError, match="write one of the two"):
            resize(adapted, **wrong)
    for wrong in ({"rank": 0}, {"energy": 1.5}):
        with pytest.raises(ValueError, match="rank is at least 1"):
            resize(adapted, **wrong)
    with pytest.raises(ValueError, match="resize finds no low-rank update under Full"):
        resize(jlora.adapt(params(), jlora.Full(target="dense")), rank=1)


def test_the_table_of_ranks():
    """Every weight stands there with its living ranks, layer by layer, and LoHa's with those of each term."""
    text = rank_table(pruned("adalora"))
    rows = [line.split() for line in text.splitlines()]
    assert ["dense/kernel", "1", "4", "2"] in rows and ["layers/kernel", "1", "4", "1", "3", "0"] in rows
    assert text.endswith("6 of 20 ranks alive")
    assert ["dense/kernel", "1", "4+4", "2", "+", "2"] in [
        row.split() for row in rank_table(pruned("loha")).splitlines()
    ]
    with pytest.raises(ValueError, match="finds no ranks of a weight's own under VeRA"):
        rank_table(jlora.adapt(params(), jlora.VeRA(rank=3, target="kernel")))


def test_the_table_has_every_weights_own_rank():
    """The rank that stands there is the one that a weight is stored with, whatever other weights have."""
    both = [jlora.LoRA(rank=3, target="dense/kernel"), jlora.LoRA(rank=2, target="layers/kernel")]
    rows = [line.split()[:3] for line in rank_table(jlora.adapt(params(), both)).splitlines()]
    assert ["dense/kernel", "1", "3"] in rows and ["layers/kernel", "1", "2"] in rows


# What optimizers hold ---------------------------------------------------------------------------

ENTRYWISE = {
    "adamw": optax.adamw(0.01), "sgd": optax.sgd(0.01, momentum=0.9, nesterov=True), "lion": optax.lion(0.01),
    "amsgrad": optax.amsgrad(0.01), "adan": optax.adan(0.01), "adabelief": optax.adabelief(0.01),
    "yogi": optax.yogi(0.01), "rprop": optax.rprop(0.01), "sm3": optax.sm3(0.01), "adagrad": optax.adagrad(0.01),
    "rmsprop": optax.rmsprop(0.01, centered=True), "adamax": optax.adamax(0.01),
    "schedule_free": optax.contrib.schedule_free_adamw(0.01), "ademamix": optax.contrib.ademamix(0.01),
    "adafactor, entry by entry": optax.adafactor(0.01, multiply_by_parameter_scale=False, clipping_threshold=None),
    "multisteps": optax.MultiSteps(optax.adam(0.01), 3), "if finite": optax.apply_if_finite(optax.adam(0.01), 3),
}  # fmt: skip
BY_FACTORS = {
    "muon": optax.contrib.muon(0.01), "prodigy": optax.contrib.prodigy(), "novograd": optax.novograd(0.01),
    "dog": optax.contrib.dog(), "dadapt": optax.contrib.dadapt_adamw(), "momo": optax.contrib.momo_adam(),
    "factored": optax.adafactor(0.01, min_dim_size_to_factor=2), "lbfgs": optax.scale_by_lbfgs(),
}  # fmt: skip


def half_dead():
    """An adapter of rank 4 that has been trained, and the same with two dead ranks."""
    adapted = jlora.adapt({"w": {"kernel": jnp.ones((8, 6))}}, jlora.LoRA(rank=4, target="kernel"))
    draw = lambda n: jax.tree.map(lambda x: jax.random.normal(jax.random.key(n + x.size), x.shape), adapted.trainable)
    whole = jlora.join(draw(0), adapted.frozen)
    return whole, jlora.rank.at_rank(whole, 2), draw


@pytest.mark.parametrize("name", ENTRYWISE)
def test_the_step_after_is_that_of_the_living_ranks(name):
    """The uncut optimizer, on the rows that live, is the oracle."""
    whole, dead, draw = half_dead()
    tx, state = ENTRYWISE[name], ENTRYWISE[name].init(whole.trainable)
    for n in (1, 2):
        _, state = tx.update(draw(n), state, whole.trainable)
    small, cut = jlora.rank.compact(dead, state)
    rows = lambda tree: jax.tree.map(lambda x: x[:2], tree)
    grads = jax.tree.map(lambda x, p: jnp.where(p != 0, x, 0), draw(3), dead.trainable)
    want, _ = tx.update(grads, state, dead.trainable)
    got, _ = tx.update(rows(grads), cut, small.trainable)
    assert_close(got, rows(want))


def test_what_a_default_adafactor_holds_is_cut():
    """Its placeholders of shape (1,) stay; the step goes by the root mean square of a factor, as documented."""
    whole, dead, draw = half_dead()
    tx = optax.adafactor(0.01)
    _, state = tx.update(draw(1), tx.init(whole.trainable), whole.trainable)
    small, cut = jlora.rank.compact(dead, state)
    assert {x.shape for x in jax.tree.leaves(cut)} == {(), (1,), (2, 8), (2, 6)}
    tx.update(small.trainable, cut, small.trainable)


@pytest.mark.parametrize("name", BY_FACTORS)
def test_a_state_of_whole_factors_is_refused(name):
    """A sum over a factor has the dead ranks in it."""
    whole, dead, _ = half_dead()
    with pytest.raises(ValueError, match="compact the adapter alone, and begin its state anew"):
        jlora.rank.compact(dead, BY_FACTORS[name].init(whole.trainable))


@pytest.mark.parametrize("scores", [[[4, 3, 2, 1], [4, 3, 2, 1]], [[4, 3, 2, 1], [1, 2, 3, 4]]])
def test_sm3_keeps_one_row_for_all_layers(scores):
    """Layers that keep the same ranks share the cut; layers that do not are refused."""
    adapted = jlora.adapt({"w": {"kernel": jnp.ones((2, 8, 6))}}, jlora.LoRA(rank=4, target="kernel"),
                          axes={"w/kernel": "sio"})  # fmt: skip
    adapted = jlora.join(jax.tree.map(jnp.ones_like, adapted.trainable), adapted.frozen)
    tx = optax.sm3(0.01)
    _, state = tx.update(adapted.trainable, tx.init(adapted.trainable), adapted.trainable)
    dead = jlora.rank.prune(adapted, {"w/kernel": {"b": jnp.array(scores, jnp.float32)}}, 4)
    if scores[0] == scores[1]:
        small, cut = jlora.rank.compact(dead, state)
        tx.update(small.trainable, cut, small.trainable)
        return
    with pytest.raises(ValueError, match="one row of ranks for all layers.*sm3"):
        jlora.rank.compact(dead, state)


def test_a_state_of_the_frozen_half_is_refused():
    """A state that moves the base, made of a whole Adapted without `masked`."""
    whole, dead, _ = half_dead()
    with pytest.raises(ValueError, match=r"holds the frozen half.*jlora.masked"):
        jlora.rank.compact(dead, optax.adam(0.01).init(whole))


def test_a_weight_that_is_not_its_base_without_its_ranks_stays():
    """KaSA whose update is zero is still W0 without its noise: compact leaves it in the plan."""
    base = {"w": jnp.asarray(np.random.default_rng(0).standard_normal((6, 5)), jnp.float32)}
    adapted = jlora.adapt(base, jlora.KaSA(rank=2, target="w"))
    np.testing.assert_array_equal(jlora.merge(compact(adapted))["w"], jlora.merge(adapted)["w"])
    far = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    far.trainable["w"]["sigma"] = far.trainable["w"]["sigma"].at[0].set(0)
    small = compact(far)
    assert small.trainable["w"]["sigma"].shape == (1,) and small.frozen.factors["w"]["u_noise"].shape == (2, 5)
    assert_close(jlora.merge(small), jlora.merge(far), 1e-6)
    assert_close(jlora.merge(resize(far, rank=1).adapted), jlora.merge(far), 1e-6)
