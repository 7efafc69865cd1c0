"""AdaLoRA's allocation: peft's recorded run, a slow allocator in NumPy, and every form that optax has."""

import functools
import gc
import json
import weakref
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import load_file

import jlora
from jlora.rank import Budget, adalora, magnitude, prune
from methods import as_bytes, assert_close, away_from_start

pytestmark = pytest.mark.settled

FILES = Path(__file__).parent / "fixtures" / "peft" / "adalora_trained"


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def params():
    return {
        "dense": {"kernel": draw(1, 6, 5)},
        "layers": {"kernel": draw(2, 3, 6, 5)},
        "query": {"kernel": draw(3, 8, 2, 4)},
    }


GROUPS = ("dense/kernel", "layers/kernel", "query/kernel")
SCHEDULE = dict(target_rank=1, total_steps=12, init_warmup=2, final_warmup=3, interval=2)


@functools.cache
def start(rank=3):
    """Two weights and a stack of three: 15 triplets."""
    return jlora.adapt(params(), jlora.AdaLoRA(rank=rank, target="kernel"))


def gradients(step, trainable):
    leaves, treedef = jax.tree.flatten(trainable)
    return treedef.unflatten([draw(1000 * step + n, *x.shape) for n, x in enumerate(leaves)])


def train(tx, trainable, steps, first=1, state=None, grads=gradients, programs=1):
    """(trainable, state) after each step, in one compiled program (adamw alone has two in bfloat16 and on a mesh)."""

    @jax.jit
    def step(g, state, trainable):
        updates, state = tx.update(g, state, trainable)
        return optax.apply_updates(trainable, updates), state

    state, history = tx.init(trainable) if state is None else state, []
    for n in range(first, first + steps):
        trainable, state = step(grads(n, trainable), state, trainable)
        history.append((trainable, state))
    assert step._cache_size() <= programs
    return history


def gates(trainable):
    return np.concatenate([np.ravel(factors["lam"]) for _, factors in sorted(trainable.items())])


# --- the budget ---------------------------------------------------------------------------------------------------


def test_the_budget_is_the_papers():
    """The budget falls by the paper's cubic between the warm-ups; masks come at intervals, and the last at its end."""
    budget = Budget(864, 576, 3000, 500, 1500, 10)
    assert [budget.at(t) for t in (500, 501, 750, 1000, 1499, 1500, 3000, 10**6)] == [
        864, 863, 697, 612, 576, 576, 576, 576,
    ]  # fmt: skip
    assert [budget.masks(t) for t in (500, 505, 510, 1500, 1510)] == [False, False, True, True, False]


@pytest.mark.parametrize("numbers", [(864, 576, 3000, 500, 1500), (12, 6, 20, 2, 4), (9, 9, 5, 0, 0), (40, 1, 7, 3, 3)])
def test_the_traced_budget_is_the_plain_one_at_every_step(numbers):
    """What is counted under `jit` is never one rank off the plain count, from the first step to past the last."""
    budget = Budget(*numbers, interval=3)
    steps = range(numbers[2] + 3)
    traced = jax.jit(jax.vmap(budget.traced))(jnp.arange(numbers[2] + 3))
    assert traced.tolist() == [budget.at(t) for t in steps]
    assert traced[0] == numbers[0] and traced[-1] == numbers[1]


# --- the reference's run ------------------------------------------------------------------------------------------


def test_pefts_run_is_reproduced():
    """20 steps of SGD under peft's own allocator: the same zeros at every step, values to 1e-5."""
    t = load_file(FILES / "trace.safetensors")
    lin, lin2 = ({"kernel": t[f"base.{n}.weight"].T, "bias": t[f"base.{n}.bias"]} for n in ("lin", "lin2"))
    # peft divides alpha by r + 1e-5
    method = jlora.AdaLoRA(rank=6, alpha=8 * 6 / (6 + 1e-5), target="kernel")
    adapted = jlora.adapt(jax.tree.map(jnp.asarray, {"lin": lin, "lin2": lin2}), method)
    trainable = {
        f"{n}/kernel": {
            "p": jnp.asarray(t[f"init.{n}.lora_A"]),
            "lam": jnp.asarray(t[f"init.{n}.lora_E"][:, 0]),
            "q": jnp.asarray(t[f"init.{n}.lora_B"].T),
        }
        for n in ("lin", "lin2")
    }
    layer = lambda p, x: x @ p["kernel"] + p["bias"]
    apply = jlora.lift(lambda p, x: layer(p["lin2"], jax.nn.relu(layer(p["lin"], x))))

    def loss(trainable, x, y):
        adapted_now = jlora.join(trainable, adapted.frozen)
        penalty = jlora.rank.orthogonality(adapted_now, "reference")
        task = jnp.mean((apply(adapted_now, x) - y) ** 2)
        return task + 0.1 * penalty, task

    schedule = dict(total_steps=20, init_warmup=2, final_warmup=4, interval=2, beta1=0.85, beta2=0.9)
    tx = adalora(optax.sgd(0.5), adapted, target_rank=3, ties="reference", revive=True, **schedule)
    budget = Budget(12, 6, 20, 2, 4, 2)
    recorded = json.loads((FILES / "budget.json").read_text())

    @jax.jit
    def step(trainable, state, x, y):
        (_, task), grads = jax.value_and_grad(loss, has_aux=True)(trainable, x, y)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, task

    state = tx.init(trainable)
    for n in range(1, 21):
        trainable, state, value = step(trainable, state, t["X"][n - 1], t["Y"][n - 1])
        assert budget.at(n) == recorded[n - 1][0]
        assert bool(budget.masks(n)) or n > 16 or not recorded[n - 1][1]
        np.testing.assert_allclose(value, t[f"step{n:02}.loss"], rtol=1e-5)
        for name in ("lin", "lin2"):
            got, want = trainable[f"{name}/kernel"]["lam"], t[f"step{n:02}.{name}.lora_E"][:, 0]
            assert ((np.asarray(got) == 0) == (want == 0)).all(), (n, name)
            np.testing.assert_allclose(got, want, atol=1e-5)
    for name in ("lin", "lin2"):
        np.testing.assert_allclose(trainable[f"{name}/kernel"]["p"], t[f"final.{name}.lora_A"], atol=1e-5)
        np.testing.assert_allclose(trainable[f"{name}/kernel"]["q"], t[f"final.{name}.lora_B"].T, atol=1e-5)
    assert [int(np.count_nonzero(f["lam"])) for f in trainable.values()] == [2, 4]


# --- a slow allocator ---------------------------------------------------------------------------------------------


class Plain:
    """The formulas, one number at a time, in float64."""

    def __init__(self, trainable, rate, target, total, warm, final, interval, beta1, beta2, importance, ties, revive):
        self.__dict__.update(locals())
        self.w = {(g, n): np.array(x, np.float64) for g, fs in trainable.items() for n, x in fs.items()}
        self.mean = {k: np.zeros_like(x) for k, x in self.w.items()}
        self.spread = {k: np.zeros_like(x) for k, x in self.w.items()}
        self.dead, self.t = set(), 0

    def triplets(self):
        """(group, index of the triplet) of all of them, in the order of the plan."""
        for group in GROUPS:
            yield from ((group, index) for index in np.ndindex(self.w[group, "lam"].shape))

    def score(self, group, index):
        if self.importance == "magnitude":
            return abs(self.w[group, "lam"][index])
        s = lambda name: np.mean((self.mean[group, name] * self.spread[group, name])[index])
        return s("lam") + s("p") + s("q")

    def budget(self, all_of_them):
        left = 1 - (self.t - self.warm) / (self.total - self.final - self.warm)
        return int(self.target + (all_of_them - self.target) * left**3)

    def step(self, grads):
        self.t += 1
        last = self.total - self.final
        for (g, n), x in self.w.items():
            gradient = np.array(grads[g][n], np.float64)
            x -= self.rate * gradient
            if self.t < last:
                size = np.abs(x * gradient)
                self.mean[g, n] = self.beta1 * self.mean[g, n] + (1 - self.beta1) * size
                distance = np.abs(size - self.mean[g, n])
                self.spread[g, n] = self.beta2 * self.spread[g, n] + (1 - self.beta2) * distance
        event = self.warm < self.t < last and self.t % self.interval == 0 or self.t == last
        if event:
            every = list(self.triplets())
            by_score = sorted(every, key=lambda at: self.score(*at))  # stable: later ones of a tie first
            drop = len(every) - self.budget(len(every))
            if self.ties == "reference":
                worst = self.score(*by_score[drop - 1]) if drop else -1.0
                self.dead = {at for at in every if self.score(*at) <= worst}
            else:
                self.dead = set(sorted(every[::-1], key=lambda at: self.score(*at))[:drop])
        if event or self.t > last or not self.revive:
            for group, index in self.dead:
                self.w[group, "lam"][index] = 0
        return event


def configuration(seed):
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(2, 5))
    total = int(rng.integers(8, 25))
    warm = int(rng.integers(0, total // 3))
    final = int(rng.integers(0, total // 3))
    return rank, dict(
        rate=float(rng.uniform(0.05, 0.5)), target=int(rng.integers(1, 5 * rank + 1)), total=total, warm=warm,
        final=final, interval=int(rng.integers(1, 5)), beta1=float(rng.uniform(0, 0.95)),
        beta2=float(rng.uniform(0, 0.95)), importance=str(rng.choice(["sensitivity", "sensitivity", "magnitude"])),
        ties=str(rng.choice(["exact", "reference"])), revive=bool(rng.integers(2)),
    )  # fmt: skip


@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] * (n > 1)) for n in range(20)])
def test_a_slow_allocator_takes_the_same_steps(seed):
    """Whatever the configuration, each step has the values, averages and zeros of the formulas in float64."""
    rank, c = configuration(seed)
    adapted = start(rank)
    trainable = away_from_start(adapted.trainable)
    plain = Plain(trainable, **c)
    tx = adalora(
        optax.sgd(c["rate"]), adapted, target_budget=c["target"], total_steps=c["total"], init_warmup=c["warm"],
        final_warmup=c["final"], interval=c["interval"], beta1=c["beta1"], beta2=c["beta2"],
        importance=c["importance"], ties=c["ties"], revive=c["revive"],
    )  # fmt: skip
    events = 0
    for n, (got, state) in enumerate(train(tx, trainable, c["total"] + 2), 1):
        event = plain.step(gradients(n, trainable))
        for (g, name), want in plain.w.items():
            np.testing.assert_allclose(got[g][name], want, rtol=2e-4, atol=2e-5, err_msg=f"step {n} {g} {name}")
        if c["importance"] == "sensitivity":  # U~ from the old I~ would be in proportion: no mask would tell
            for averages, wants in ((state.sensitivity, plain.mean), (state.uncertainty, plain.spread)):
                for (g, name), want in wants.items():
                    np.testing.assert_allclose(averages[g][name], want, rtol=2e-3, atol=1e-5)
        assert [at for at in plain.triplets() if got[at[0]]["lam"][at[1]] == 0] == [
            at for at in plain.triplets() if plain.w[at[0], "lam"][at[1]] == 0
        ]
        if event:
            events += 1
            alive = sum(int(np.sum(m["lam"])) for m in state.mask.values())
            assert alive == np.count_nonzero(gates(got)) == plain.budget(5 * rank)
    assert events and np.count_nonzero(gates(got)) == c["target"]


def test_equal_scores_never_go_below_the_budget():
    """All gradients zero: every score is 0. The reference prunes them all, and says less than it was asked for."""
    adapted = start()
    still = lambda step, trainable: jax.tree.map(jnp.zeros_like, trainable)
    alive = {}
    for ties in ("exact", "reference"):
        tx = adalora(optax.sgd(0.1), adapted, ties=ties, **SCHEDULE)
        alive[ties] = np.count_nonzero(gates(train(tx, away_from_start(adapted.trainable), 12, grads=still)[-1][0]))
    assert alive == {"exact": 5, "reference": 0}


def test_pruned_values_stay_zero_between_masks_and_momentum_revives_them_if_asked():
    """Between masks no momentum moves what is pruned, unless `revive` lets it; after the last mask nothing does."""
    adapted = start()
    trainable = away_from_start(adapted.trainable)
    schedule = SCHEDULE | dict(interval=4)
    held = train(adalora(optax.adam(0.1), adapted, **schedule), trainable, 12)
    free = train(adalora(optax.adam(0.1), adapted, revive=True, **schedule), trainable, 12)
    alive = lambda history: [int(np.count_nonzero(gates(t))) for t, _ in history]
    assert alive(held) == [15, 15, 15, 8, 8, 8, 8, 5, 5, 5, 5, 5]
    assert alive(free) == [15, 15, 15, 8, 15, 15, 15, 5, 5, 5, 5, 5]


# --- every form ---------------------------------------------------------------------------------------------------


def test_every_form_takes_the_same_steps():
    """Split, whole, beside other parameters or in a chain: the steps are the same, and the base takes no part."""
    adapted = start()
    trainable, frozen = jlora.split(adapted)
    trainable = away_from_start(trainable)
    adapted = jlora.join(trainable, frozen)
    make = lambda: adalora(optax.adamw(0.05), adapted, **SCHEDULE)
    grads = functools.cache(lambda n: gradients(n, trainable))
    want = train(make(), trainable, 12, grads=lambda n, _: grads(n))[-1][0]
    assert np.count_nonzero(gates(want)) == 5

    whole = lambda n, _: jlora.Adapted(grads(n), jax.tree.map(jnp.zeros_like, frozen))
    got, state = train(jlora.masked(make()), adapted, 12, grads=whole)[-1]
    assert as_bytes(got.trainable) == as_bytes(want) and as_bytes(got.frozen) == as_bytes(frozen)
    beside = lambda n, _: {"model": whole(n, _), "head": jnp.ones(3)}
    got, _ = train(jlora.masked(make()), {"model": adapted, "head": jnp.ones(3)}, 12, grads=beside)[-1]
    assert as_bytes(got["model"].trainable) == as_bytes(want) and np.all(got["head"] != 1)
    clipped = optax.chain(optax.clip_by_global_norm(1e6), make())
    assert_close(train(clipped, trainable, 12, grads=lambda n, _: grads(n))[-1][0], want)
    assert optax.tree_utils.tree_map_params(make(), lambda x: x, make().init(trainable))


def test_steps_under_multi_steps_are_real_updates():
    """Under MultiSteps the schedule counts updates and not microbatches, and prunes the same ranks."""
    adapted = start()
    trainable = away_from_start(adapted.trainable)
    make = lambda: adalora(optax.sgd(0.1), adapted, **SCHEDULE)
    want = train(make(), trainable, 12)
    halves = lambda n, t: jax.tree.map(
        lambda x, y: x + y if n % 2 else x - y, gradients((n + 1) // 2, t), away_from_start(t, scale=0.1)
    )
    several = optax.MultiSteps(make(), 2).gradient_transformation()
    fixed = trainable
    got = train(several, trainable, 24, grads=lambda n, _: halves(n, fixed))
    for (a, _), (b, _) in zip(want, got[1::2], strict=True):
        assert_close(b, a, 1e-4)
        assert ((gates(a) == 0) == (gates(b) == 0)).all()
    assert int(got[-1][1].inner_opt_state.count) == 12


def test_stopping_in_the_middle_changes_no_bit():
    """The state holds all there is: a run stopped before or amid the final phase ends with the same bits."""
    adapted = start()
    trainable = away_from_start(adapted.trainable)
    tx = adalora(optax.adamw(0.05), adapted, **SCHEDULE)
    whole = train(tx, trainable, 14)[-1]
    for stop in (5, 10):
        at, state = train(tx, trainable, stop)[-1]
        at, state = jax.tree.map(lambda x: jnp.asarray(np.asarray(x)), (at, state))  # through a file
        again = adalora(optax.adamw(0.05), start(), **SCHEDULE)
        assert as_bytes(train(again, at, 14 - stop, stop + 1, state)[-1]) == as_bytes(whole)


def test_layers_of_a_scan_have_ranks_of_their_own():
    """A scanned model in a TrainState learns a task in which one layer matters; the budget goes there."""
    base = {"layers": {"kernel": 0.1 * draw(4, 3, 6, 6)}}
    adapted = jlora.adapt(base, jlora.AdaLoRA(rank=3, target="kernel"))
    body = lambda x, kernel: (x + x @ kernel, None)
    apply = jlora.lift(lambda p, x: jax.lax.scan(body, x, p["layers"]["kernel"])[0])
    x = draw(5, 32, 6)
    target = x @ (jnp.eye(6) + base["layers"]["kernel"][0] + jnp.outer(draw(6, 6), draw(7, 6)))
    for layer in base["layers"]["kernel"][1:]:
        target = target + target @ layer
    schedule = dict(target_budget=4, total_steps=40, init_warmup=5, final_warmup=10, interval=5)
    tx = jlora.masked(optax.chain(optax.clip_by_global_norm(10.0), adalora(optax.adam(0.05), adapted, **schedule)))
    state = TrainState.create(apply_fn=apply, params=adapted, tx=tx).replace(step=jnp.zeros((), jnp.int32))

    @jax.jit
    def step(state):
        loss = lambda p: jnp.mean((apply(p, x) - target) ** 2)
        value, grads = jax.value_and_grad(loss)(state.params)
        return state.apply_gradients(grads=grads), value

    losses = []
    for _ in range(40):
        state, value = step(state)
        losses.append(float(value))
    assert step._cache_size() == 1
    assert losses[-1] < 0.2 * losses[0] and as_bytes(state.params.frozen.base) == as_bytes(base)
    alive = np.count_nonzero(np.asarray(state.params.trainable["layers/kernel"]["lam"]), axis=1)
    assert alive.sum() == 4 and len(set(alive.tolist())) > 1


def test_it_keeps_no_array_alive_but_its_state():
    """The transformation holds no factor of the adapter that it was made of."""
    adapted = jlora.adapt(params(), jlora.AdaLoRA(rank=3, target="kernel"))
    alive = [weakref.ref(x) for x in jax.tree.leaves((adapted.trainable, adapted.frozen.factors))]
    tx = adalora(optax.sgd(0.1), adapted, **SCHEDULE)
    del adapted
    gc.collect()
    assert not any(ref() is not None for ref in alive), f"kept by {tx}"


@pytest.mark.parametrize("kind", ["Auto", pytest.param("Explicit", marks=pytest.mark.slow)])
@pytest.mark.parametrize("ties", ["exact", pytest.param("reference", marks=pytest.mark.slow)])
def test_eight_devices_prune_the_same_ranks(kind, ties):
    """Factors sharded over their weight's axes: the same zeros, and averages that live where the factors do."""
    wide = {"layers": {"kernel": draw(1, 3, 8, 8)}, "query": {"kernel": draw(2, 8, 4, 2)}}
    adapted = jlora.adapt(wide, jlora.AdaLoRA(rank=3, target="kernel"))
    trainable = away_from_start(adapted.trainable)
    make = lambda: adalora(optax.adamw(0.05), adapted, ties=ties, **SCHEDULE | dict(target_rank=2))
    grads = functools.cache(lambda n: gradients(n, trainable))
    want = train(make(), trainable, 10, grads=lambda n, _: grads(n))
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(AxisType, kind),) * 2)
    axes = {"p": P(None, "x"), "lam": P(), "q": P(None, ("x", "y"))}
    axes = {"query/kernel": axes | {"q": P(None, "x", "y")}, "layers/kernel": {n: P(None, *s) for n, s in axes.items()}}
    place = lambda tree: jax.tree.map(lambda x, s: jax.device_put(x, NamedSharding(mesh, s)), tree, axes)
    with jax.set_mesh(mesh):
        got = train(make(), place(trainable), 10, grads=lambda n, _: place(grads(n)), programs=2)
    for (a, _), (b, _) in zip(want, got, strict=True):
        assert_close(b, a)
        assert ((gates(a) == 0) == (gates(b) == 0)).all()
    q = got[-1][1].sensitivity["layers/kernel"]["q"]
    assert q.sharding.is_equivalent_to(NamedSharding(mesh, axes["layers/kernel"]["q"]), q.ndim)


@pytest.mark.slow
def test_half_precision_factors_have_exact_zeros():
    """In bfloat16 the budget is kept by exact zeros, and the averages are float32."""
    adapted = jlora.adapt(params(), jlora.AdaLoRA(rank=3, target="kernel", dtype="bfloat16"))
    tx = adalora(optax.adamw(0.05), adapted, **SCHEDULE)
    got, state = train(tx, away_from_start(adapted.trainable), 12, programs=2)[-1]
    assert np.count_nonzero(gates(got)) == 5 and got["dense/kernel"]["lam"].dtype == jnp.bfloat16
    assert state.sensitivity["dense/kernel"]["p"].dtype == jnp.float32


def test_only_triplets_take_part():
    """LoRA and whole leaves beside it are trained as ever."""
    mixed = [jlora.AdaLoRA(rank=3, target="dense"), jlora.LoRA(rank=2, target="query"), jlora.Full(target="layers")]
    adapted = jlora.adapt(params(), mixed)
    trainable = away_from_start(adapted.trainable)
    tx = adalora(optax.sgd(0.1), adapted, target_rank=1, total_steps=3)
    got, state = train(tx, trainable, 3)[-1]
    assert set(state.sensitivity) == {"dense/kernel"} == set(state.mask)
    plain, _ = train(optax.sgd(0.1), trainable, 3)[-1]
    for group in ("query/kernel", "layers/kernel"):
        assert as_bytes(got[group]) == as_bytes(plain[group])
    assert np.count_nonzero(got["dense/kernel"]["lam"]) == 1


def test_mistakes_are_refused_in_words():
    """Budgets out of reach, schedules without steps and optimizers inside out are refused before a step is taken."""
    adapted, tx = start(), optax.sgd(0.1)
    with pytest.raises(TypeError, match="takes an Adapted.*dict"):
        adalora(tx, adapted.trainable, **SCHEDULE)
    with pytest.raises(ValueError, match=r"would do nothing.*LoRA has.*jlora.AdaLoRA"):
        adalora(tx, jlora.adapt(params(), jlora.LoRA(rank=2)), **SCHEDULE)
    with pytest.raises(ValueError, match="budget of 20 ranks cannot be reached from the 15"):
        adalora(tx, adapted, **SCHEDULE | dict(target_rank=4))
    with pytest.raises(ValueError, match="budget of 0 ranks"):
        adalora(tx, adapted, **SCHEDULE | dict(target_rank=0))
    with pytest.raises(ValueError, match="write one of the two"):
        adalora(tx, adapted, **SCHEDULE | dict(target_budget=3))
    with pytest.raises(ValueError, match="total_steps=12 nothing is left.*init_warmup=6 and final_warmup=6"):
        adalora(tx, adapted, **SCHEDULE | dict(init_warmup=6, final_warmup=6))
    with pytest.raises(ValueError, match="interval=0"):
        adalora(tx, adapted, **SCHEDULE | dict(interval=0))
    with pytest.raises(ValueError, match="beta1=1.0"):
        adalora(tx, adapted, beta1=1.0, **SCHEDULE)
    with pytest.raises(ValueError, match="'sensitivity' or 'magnitude'"):
        adalora(tx, adapted, importance="random", **SCHEDULE)
    with pytest.raises(ValueError, match="'exact' or 'reference'"):
        adalora(tx, adapted, ties="none", **SCHEDULE)
    made = adalora(tx, adapted, **SCHEDULE)
    state = made.init(adapted.trainable)
    with pytest.raises(ValueError, match=r"needs the parameters.*tx.update\(grads, state, params\)"):
        made.update(adapted.trainable, state)
    with pytest.raises(ValueError, match="one adapter with the groups .* and finds 0"):
        made.init({"head": jnp.ones(3)})
    with pytest.raises(ValueError, match="finds 2"):
        made.init([adapted.trainable, adapted.trainable])
    gates_only = {g: {"p": f["p"], "lam": optax.MaskedNode(), "q": f["q"]} for g, f in adapted.trainable.items()}
    with pytest.raises(ValueError, match="wraps the whole optimizer"):
        made.init(gates_only)


# --- prune --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [jlora.AdaLoRA, jlora.SoRA, jlora.LoRA])
def test_prune_keeps_the_largest_of_all(method):
    """Over all weights and layers together the b largest ranks are left, as they are, and the others are zero."""
    adapted = jlora.adapt(params(), method(rank=3, target="kernel"))
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    scores = magnitude(adapted)
    flat = np.concatenate([np.ravel(x) for named in scores.values() for x in named.values()])
    assert flat.size == 15
    for b in (0, 1, 7, 15):
        small = prune(adapted, scores, b)
        left = magnitude(small)
        now = np.concatenate([np.ravel(x) for named in left.values() for x in named.values()])
        want = np.sort(flat)[::-1][:b]
        np.testing.assert_allclose(np.sort(now[now > 0])[::-1], want, rtol=1e-6)
        assert small.frozen is adapted.frozen
    assert as_bytes(prune(adapted, scores, 15).trainable) == as_bytes(adapted.trainable)


def test_magnitude_is_the_norm_of_each_ranks_part():
    """A rank's score is the Frobenius norm of what it adds to the weight, the scale in it, layer by layer."""
    adapted = jlora.adapt(params(), jlora.AdaLoRA(rank=3, alpha=5, target="kernel"))
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    f = {n: np.asarray(x, np.float64) for n, x in adapted.trainable["layers/kernel"].items()}
    parts = 5 / 3 * np.einsum("lri,lr,lro->lrio", f["p"], f["lam"], f["q"])
    want = np.linalg.norm(parts.reshape(3, 3, -1), axis=-1)
    np.testing.assert_allclose(magnitude(adapted)["layers/kernel"]["lam"], want, rtol=1e-5)


def test_prune_is_compiled_once_and_ties_are_exact():
    """One program serves every budget, equal scores leave just as many as asked for, and NaN goes first."""
    adapted = jlora.join(away_from_start(start().trainable), start().frozen)
    scores = jax.tree.map(jnp.ones_like, magnitude(adapted))
    alive = jax.jit(lambda t, b: jnp.stack([
        jnp.sum(f["lam"] != 0) for f in prune(jlora.join(t, adapted.frozen), scores, b).trainable.values()
    ]).sum())  # fmt: skip
    assert [int(alive(adapted.trainable, b)) for b in range(16)] == list(range(16)) and alive._cache_size() == 1
    assert np.count_nonzero(gates(prune(adapted, scores, 4, ties="reference").trainable)) == 0
    assert np.count_nonzero(gates(prune(adapted, scores, 15, ties="reference").trainable)) == 15
    nan = jax.tree.map(lambda x: x.at[..., 0].set(jnp.nan), scores)
    assert all(not np.any(f["lam"][..., 0]) for f in prune(adapted, nan, 10).trainable.values())


def test_prune_refuses_in_words():
    """Scores that are missing, of no rank or misshapen are named, and methods without ranks are refused."""
    adapted = start()
    scores = magnitude(adapted)
    with pytest.raises(TypeError, match="prune takes an Adapted"):
        prune(adapted.trainable, scores, 3)
    with pytest.raises(ValueError, match="prune finds no ranks under Full"):
        prune(jlora.adapt(params(), jlora.Full(target="dense")), scores, 3)
    with pytest.raises(ValueError, match=r"(?s)missing \('dense/kernel', 'lam'\).*extra \('x', 'lam'\)"):
        prune(adapted, {"x": {"lam": jnp.ones(3)}}, 3)
    with pytest.raises(ValueError, match=r"has shape \(3, 3\), not \(3,\)"):
        prune(adapted, scores | {"dense/kernel": {"lam": jnp.ones((3, 3))}}, 3)
    with pytest.raises(ValueError, match="'exact' or 'reference'"):
        prune(adapted, scores, 3, ties="all")
