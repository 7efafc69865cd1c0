"""Rows of a table: trained changes of some and new ones behind its end; every other row is the table's, bit for bit."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import jlora
from jlora import network
from methods import as_bytes, assert_close

pytestmark = pytest.mark.settled

V, D, N = 11, 5, 3
IDS = (2, 7, 9)
TRAINED, NEW = jlora.TrainedTokens(ids=(9, 2, 7)), jlora.NewTokens(count=N)
BOTH = jlora.Sum(TRAINED, NEW)
SPECS = {"trained": TRAINED, "new": NEW, "both": BOTH}
PATH = "embed/embedding"


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def table(dtype="float32"):
    """With numbers in rows that nobody trains which no sum leaves as they are."""
    w = drawn(0, V, D)
    w[0, :2], w[1, :3] = -0.0, (np.nan, np.inf, -np.inf)
    return jnp.asarray(w, dtype)


def adapted(spec, w=None, far=True):
    """The table under a method, its rows away from their start."""
    ad = jlora.adapt({"embed": {"embedding": table() if w is None else w}}, spec)
    if not far:
        return ad
    return jlora.Adapted(
        jax.tree.map(lambda a: jnp.asarray(drawn(a.shape[0], *a.shape), a.dtype), ad.trainable), ad.frozen
    )


def rows_of(ad):
    """(changes of IDS, new rows), in float64; none where the method has none."""
    held = ad.trainable[PATH]
    parts = [np.float64(held[name]) for name in sorted(held)]
    kinds = [r.new(s.leaf) for s in ad.frozen.plan.sites for r in s.recipe.rows]
    of = lambda new: next((a for a, kind in zip(parts, kinds, strict=True) if kind == new), None)
    return of(False), of(True)


def whole(ad, w=None):
    """The table with its rows, in float64: what a lookup of id n reads is row n of it."""
    made = np.float64(np.asarray(table() if w is None else w, np.float64))
    change, new = rows_of(ad)
    if change is not None:
        made[list(IDS)] += change
    return made if new is None else np.concatenate([made, new])


def looked_up(p, ids):
    return jnp.take(p["embed"]["embedding"], ids, axis=0)


# Lookups ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_every_other_row_keeps_its_bits_through_training(spec, dtype):
    """Before and after 20 steps of Adam, looked up and merged: -0.0, NaN and infinities too. What is trained moves."""
    w, ids = table(dtype), jnp.arange(V + N * (spec is not TRAINED))
    ad, tx = adapted(spec, w, far=False), optax.adam(0.1)
    assert as_bytes(jlora.lift(looked_up)(ad, ids)[:V]) == as_bytes(w)  # the start is the base
    state, started = tx.init(ad.trainable), ad
    trained = jnp.asarray([*(IDS if spec is not NEW else ()), *range(V, len(ids))])

    @jax.jit
    def step(trainable, state):
        loss = lambda t: jnp.square(jlora.lift(looked_up)(jlora.join(t, ad.frozen), trained) - 1).mean()
        updates, state = tx.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    trainable = ad.trainable
    for _ in range(20):
        trainable, state = step(trainable, state)
    ad = jlora.join(trainable, ad.frozen)
    others = [n for n in range(V) if n not in trained]
    for rows in (jlora.lift(looked_up)(ad, ids), jlora.merge(ad)["embed"]["embedding"]):
        assert rows.shape == (len(ids), D) and rows.dtype == w.dtype
        assert as_bytes(rows[jnp.array(others)]) == as_bytes(w[jnp.array(others)])
        assert not np.any(rows[trained] == jlora.lift(looked_up)(started, trained))
    assert as_bytes(ad.frozen.base["embed"]["embedding"]) == as_bytes(w)


FORMS = {
    "take": lambda p, ids: jnp.take(p["embed"]["embedding"], ids, axis=0),
    "clip": lambda p, ids: jnp.take(p["embed"]["embedding"], ids, axis=0, mode="clip"),
    "index": lambda p, ids: p["embed"]["embedding"][ids],
    "vmap": lambda p, ids: jax.vmap(jax.vmap(lambda n: jnp.take(p["embed"]["embedding"], n, axis=0)))(ids),
    "vmap of one row": lambda p, ids: jax.vmap(jax.vmap(lambda n: p["embed"]["embedding"][n]))(ids),
    "scan": lambda p, ids: lax.scan(lambda c, n: (c, p["embed"]["embedding"][n]), 0, ids)[1],
    "one by one": lambda p, ids: lax.map(lambda row: lax.map(lambda n: p["embed"]["embedding"][n], row), ids),
    "turned": lambda p, ids: jnp.moveaxis(jnp.take(p["embed"]["embedding"].T, ids, axis=1), 0, -1),
    "remat": lambda p, ids: jax.checkpoint(jax.jit(lambda w: jnp.take(w, ids, axis=0)))(p["embed"]["embedding"]),
    "heads": lambda p, ids: jnp.take(p["embed"]["embedding"][:, 1:].reshape(V, 2, 2), ids, axis=0),
    "scaled": lambda p, ids: jnp.take(-p["embed"]["embedding"] * 2.0, ids, axis=0),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_lookup_reads_its_rows_whatever_its_form(form):
    """Values and the gradient of the rows are NumPy's in float64, each row summed over the places that it stands in."""
    ad = adapted(BOTH)
    ids = np.array([[2, 0, V + 1, 2], [9, 10, V, V + 2], [7, 3, 2, V + 1]])
    weight = drawn(5, 3, 4, D)
    want, picked = whole(ad), weight
    if form == "heads":
        want, picked, weight = (
            want[:, 1:].reshape(-1, 2, 2),
            np.pad(weight[..., 1:], ((0, 0), (0, 0), (1, 0))),
            weight[..., 1:].reshape(3, 4, 2, 2),
        )
    if form == "scaled":
        want, picked = -2 * want, -2 * weight

    def run(t, frozen, ids):
        f = lambda t: jlora.lift(FORMS[form])(jlora.join(t, frozen), ids)
        y, pull = jax.vjp(f, t)
        return y, pull(jnp.asarray(weight))[0]

    y, grads = jax.jit(run)(ad.trainable, ad.frozen, jnp.asarray(ids, jnp.int32))
    assert_close(y, want[ids])
    of = lambda n: np.sum(np.float64(picked)[ids == n], 0)
    assert_close(
        grads[PATH], {"rows": np.stack([of(n) for n in IDS]), "rows_2": np.stack([of(V + n) for n in range(N)])}
    )


@pytest.mark.parametrize("dtype", [jnp.int8, jnp.uint8, jnp.int16, jnp.uint32, jnp.int32])
def test_ids_that_are_in_neither_are_what_the_model_makes_of_them(dtype):
    """Filled, clipped or counted from the end of V, as in the plain model; of any integer dtype."""
    ad, base = adapted(BOTH), {"embed": {"embedding": table()}}
    ids = jnp.asarray([V + N, 100, 10] + ([-V - 1, -100] if jnp.issubdtype(dtype, jnp.signedinteger) else []), dtype)
    for mode in ("fill", "clip"):
        f = lambda p, ids, mode=mode: jnp.take(p["embed"]["embedding"], ids, axis=0, mode=mode)
        assert as_bytes(jlora.lift(f)(ad, ids)) == as_bytes(f(base, ids))
        assert_close(jlora.lift(f)(ad, jnp.asarray([2, V + 1], dtype)), whole(ad)[[2, V + 1]])
    last = adapted(jlora.TrainedTokens(ids=(0, V - 1)))
    clipped = jlora.lift(FORMS["clip"])(last, jnp.array([-4, 40]))  # of rows that are changed, their change
    assert as_bytes(clipped) == as_bytes(jlora.merge(last)["embed"]["embedding"][jnp.array([0, V - 1])])
    if jnp.issubdtype(dtype, jnp.signedinteger):
        assert as_bytes(jlora.lift(FORMS["take"])(ad, jnp.asarray([-1, -2], dtype))) == as_bytes(
            jlora.lift(FORMS["take"])(ad, jnp.array([V - 1, V - 2]))
        )


def test_many_scattered_ids_are_found_by_search():
    """300 of 1,000 rows: as few, as they are compared one by one."""
    rng = np.random.default_rng(0)
    at, w = sorted(rng.choice(1000, 300, replace=False).tolist()), jnp.asarray(drawn(1, 1000, 2))
    ad = adapted(jlora.TrainedTokens(ids=at), w)
    ids = jnp.asarray(rng.integers(0, 1000, 2000))
    assert as_bytes(jlora.lift(looked_up)(ad, ids)) == as_bytes(looked_up(jlora.merge(ad), ids))


@pytest.mark.parametrize("x64", [False, True])
def test_a_table_in_float64_starts_as_it_is(x64):
    """The change is zero in any dtype, so that no row is rounded at the start."""
    with jax.enable_x64(x64):
        w = jnp.asarray(np.random.default_rng(0).standard_normal((V, D)))
        ad = adapted(TRAINED, w, far=False)
        ids = jnp.asarray([2, 7, 10], jnp.int64 if x64 else jnp.int32)
        assert as_bytes(jlora.lift(looked_up)(ad, ids)) == as_bytes(w[ids])


# Heads ------------------------------------------------------------------------------------


def head(p, h):
    return h @ p["embed"]["embedding"].T


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_tied_head_has_its_trained_columns_changed_and_no_bit_of_another(dtype):
    """New rows have no column: the logits keep their V."""
    w, h = jnp.asarray(drawn(0, V, D), dtype), jnp.asarray(drawn(1, 4, D), dtype)
    others = np.array([n for n in range(V) if n not in IDS])
    for spec in SPECS.values():
        ad = adapted(spec, w)
        y, plain = jax.jit(lambda ad, h: (jlora.lift(head)(ad, h), head(ad.frozen.base, h)))(ad, h)
        assert y.shape == plain.shape and y.dtype == plain.dtype
        assert as_bytes(y[:, others]) == as_bytes(plain[:, others])
        relative = 1e-5 if dtype == "float32" else 2.0**-7
        assert_close(y, np.float64(h) @ whole(ad, w)[:V].T, relative)
        start = jlora.lift(head)(adapted(spec, w, far=False), h)
        np.testing.assert_array_equal(np.float32(start), np.float32(head({"embed": {"embedding": w}}, h)))


def one_hot(p, ids):
    return jax.nn.one_hot(ids, V) @ p["embed"]["embedding"]


@pytest.mark.parametrize("f,x", [(head, drawn(1, 4, D)), (one_hot, np.array([[2, 0, 9], [7, 2, 2]]))])
def test_gradients_through_a_dot(f, x):
    """Of rows and of what they meet: those of the merged table, to the rows alone."""
    ad = adapted(TRAINED, jnp.asarray(drawn(0, V, D)))

    def run(dense):
        def g(t, x):
            y = jlora.lift(f, dense=dense)(jlora.join(t, ad.frozen), x)
            return jnp.sum(jnp.sin(y))

        return jax.grad(g, argnums=(0, 1) if x.dtype == np.float32 else 0)(ad.trainable, jnp.asarray(x))

    assert_close(run(False), run(True))
    assert not jlora.explain(f, ad, jnp.asarray(x)).dense


class Tied(nn.Module):
    """An embedding at both ends."""

    rows: int = V

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.rows, D, name="embed")
        return embed.attend(jnp.tanh(embed(ids)))


def test_flax_models_keep_their_shapes_and_a_taller_one_takes_what_is_merged():
    """Linen and NNX see V rows; a model of V + n rows over merged parameters gives the same logits, and n more."""
    ids = jnp.array([[0, 2, V], [V + 2, 9, 10]])
    w = jnp.asarray(drawn(0, V, D))
    ad = adapted(BOTH, w)
    apply = lambda model: lambda p, ids: model.apply({"params": p}, ids)
    y = jlora.lift(apply(Tied()))(ad, ids)
    tall = apply(Tied(V + N))(jlora.merge(ad), ids)
    assert y.shape == (2, 3, V) and tall.shape == (2, 3, V + N)
    assert_close(y, tall[..., :V])
    module = nnx.Embed(V, D, rngs=nnx.Rngs(0))
    module.embedding.value = w
    mine = jlora.adapt(module, BOTH)
    mine = jlora.Adapted({"embedding": ad.trainable[PATH]}, mine.frozen)
    assert_close(jlora.lift(lambda m, ids: m.attend(jnp.tanh(m(ids))))(mine, ids), y)


def test_no_table_is_made_in_either_direction():
    """In the compiled step of a lookup and a tied head no array but W0 has the table's size."""
    rows, width = 1009, 13
    ad = adapted(jlora.Sum(jlora.TrainedTokens(ids=(5, 900)), NEW), jnp.asarray(drawn(0, rows, width)))

    def loss(t, frozen, ids):
        model = lambda p, ids: jnp.sin(head(p, jnp.tanh(looked_up(p, ids)))).sum()
        return jlora.lift(model)(jlora.join(t, frozen), ids)

    ids = jnp.array([[5, 900, 1010], [3, 5, 7]])
    compiled = jax.jit(jax.value_and_grad(loss)).lower(ad.trainable, ad.frozen, ids).compile().as_text()
    shape = rf"f32\[({rows},{width}|{width},{rows})\]\S* (\w[\w-]*)\("
    made = {m.group(2) for m in re.finditer(shape, compiled)}
    assert made <= {"parameter", "bitcast", "transpose", "copy"}, made  # the head's W0^T, as in the plain model
    dense = jax.jit(jax.value_and_grad(lambda t: loss_dense(t, ad.frozen, ids))).lower(ad.trainable).compile().as_text()
    assert {m.group(2) for m in re.finditer(shape, dense)} - {"parameter", "bitcast", "transpose", "copy"}


def loss_dense(t, frozen, ids):
    """What the test above would find."""
    return jnp.sum(looked_up(jlora.merge(jlora.join(t, frozen)), ids) ** 2)


# Anything else ----------------------------------------------------------------------------

ELSEWHERE = {
    "a sum": lambda p, ids: p["embed"]["embedding"].sum(0),
    "half of it": lambda p, ids: p["embed"]["embedding"][: V // 2],
    "its end first": lambda p, ids: jnp.flip(p["embed"]["embedding"], 0)[ids],
    "a loop over rows": lambda p, ids: lax.scan(lambda c, row: (c + row, None), jnp.zeros(D), p["embed"]["embedding"])[
        0
    ],
    "a flat table": lambda p, ids: jnp.take(p["embed"]["embedding"].reshape(-1), ids * D),
    "single elements": lambda p, ids: p["embed"]["embedding"][ids, 0],
    "the table itself": lambda p, ids: p["embed"]["embedding"],
    "a branch": lambda p, ids: lax.cond(ids[0] > 0, lambda w: w, lambda w: 2 * w, p["embed"]["embedding"])[ids],
}


@pytest.mark.parametrize("use", ELSEWHERE)
def test_where_rows_cannot_follow_the_table_is_dense_and_new_rows_are_refused(use):
    """Never a wrong number: changes are merged in, with a reason; an id of a new row could be lost: an error."""
    f, ids = ELSEWHERE[use], jnp.array([0, 2, 9])
    ad = adapted(TRAINED, jnp.asarray(drawn(0, V, D)))
    assert_close(jlora.lift(f)(ad, ids), jlora.lift(f, dense=True)(ad, ids), 2e-6)
    assert jlora.explain(f, ad, ids).dense[0].reason
    with pytest.raises(ValueError, match=rf"embed.*{V} to {V + N - 1}, which lookups alone can read"):
        jlora.lift(f)(adapted(NEW), ids)


def test_ids_of_new_rows_as_one_hot_are_refused():
    """A one-hot row of V places is all zeros for them, and would read a row of zeros."""
    with pytest.raises(ValueError, match="which lookups alone can read"):
        jlora.lift(one_hot)(adapted(NEW), jnp.array([1, V]))


def of_axes(letters):
    """Rows of what is no table."""
    return jlora.adapt({"w": jnp.ones((3, 4, 5))}, jlora.TrainedTokens(ids=(1,), target="w"), axes={"w": letters})


MATRIX = {"embed": {"embedding": jnp.ones((V, D))}}


@pytest.mark.parametrize(
    "make,words",
    [
        (lambda: jlora.TrainedTokens(ids=()), "at least one"),
        (lambda: jlora.TrainedTokens(ids=(3, -1)), "count from 0"),
        (lambda: jlora.TrainedTokens(ids=(3, 5, 3)), r"\[3\] stand there twice"),
        (lambda: jlora.TrainedTokens(ids=(1.5,)), "an integer"),
        (lambda: jlora.NewTokens(count=0), "at least 1"),
        (lambda: jlora.NewTokens(count=3, init=(1, 2)), "one id for each"),
        (lambda: jlora.NewTokens(count=3, init="zeros"), "mean"),
        (lambda: adapted(jlora.TrainedTokens(ids=(3, V))), "rows 0 to 10, and there is no row 11"),
        (lambda: adapted(jlora.NewTokens(count=1, init=(V,))), "rows 0 to 10, and no 11"),
        (lambda: adapted(jlora.Sum(NEW, jlora.NewTokens(count=1))), "from its end on"),
        (lambda: adapted(jlora.DoRA(TRAINED)), "must add to W0"),
        (lambda: of_axes("kio"), "one axis of ids"),
        (lambda: of_axes("iio"), "one axis of ids"),
        (lambda: jlora.adapt(jax.eval_shape(lambda: MATRIX), NEW), "it has none"),
        (lambda: jlora.adapt({"q": {"kernel": jnp.ones((3, 4))}}, NEW), "matches no leaf"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_words(make, words):
    """Numbers that are no rows, tables that are none, two that would give the same ids."""
    with pytest.raises(ValueError, match=words):
        make()


# The rest of the library ------------------------------------------------------------------


def test_where_new_rows_begin():
    """At the mean, at rows that are named, or drawn like the table's."""
    w = drawn(0, 400, D)
    start = lambda **how: np.asarray(adapted(jlora.NewTokens(**how), jnp.asarray(w), far=False).trainable[PATH]["rows"])
    assert_close(start(count=2), np.stack([w.mean(0, dtype=np.float64)] * 2))
    np.testing.assert_array_equal(start(count=2, init=(7, 3)), w[[7, 3]])
    np.testing.assert_array_equal(start(count=2, init=(5,)), w[[5, 5]])
    many = start(count=4000, init="normal")
    np.testing.assert_allclose(many.mean(0), w.mean(0), atol=0.06)
    np.testing.assert_allclose(many.std(0), w.std(0), rtol=0.05)


def test_the_table_of_tokens_is_the_default_target():
    """Not those of types and positions."""
    names = ("word_embeddings", "token_type_embeddings", "position_embeddings")
    params = {name: {"embedding": jnp.ones((4, 3))} for name in names}
    assert list(jlora.adapt(params, NEW).trainable) == ["word_embeddings/embedding"]


def test_scale_acts_on_changes_and_leaves_new_rows_alone():
    """At zero, changed rows are the base's; a new row has no other value to go back to."""
    w = jnp.asarray(drawn(0, V, D))
    ad = adapted(BOTH, w)
    off = jlora.merge(jlora.scale(ad, 0))["embed"]["embedding"]
    assert_close(off, np.concatenate([w, rows_of(ad)[1]]))
    half = jlora.lift(looked_up)(jlora.scale(ad, 0.5), jnp.array(IDS))
    assert_close(half, w[jnp.array(IDS)] + 0.5 * rows_of(ad)[0])


def test_unmerging_gives_the_table_back():
    """Changes are subtracted, new rows cut off, every other row is as it was."""
    w = jnp.asarray(drawn(0, V, D))
    ad = adapted(BOTH, w)
    back = jlora.unmerge(jlora.merge(ad), ad).params["embed"]["embedding"]
    assert back.shape == w.shape
    assert_close(back, w, 1e-6)
    others = jnp.array([n for n in range(V) if n not in IDS])
    assert as_bytes(back[others]) == as_bytes(w[others])
    assert jlora.merge_report(ad).worst > 0.999


def test_decay_may_pull_a_change_and_no_new_row():
    """Zero is no change of a row, and no row of the table."""
    mask = jlora.optim.decay_mask(adapted(BOTH))(adapted(BOTH).trainable)
    assert mask == {PATH: {"rows": True, "rows_2": False}}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_what_is_saved_is_the_rows_alone(spec, tmp_path):
    """A few rows, and they come back bit for bit; an untrained adapter is told from a trained one."""
    w = jnp.asarray(drawn(0, V, D))
    ad = adapted(spec, w)
    jlora.save(tmp_path / "a", ad)
    back = jlora.load(tmp_path / "a", {"embed": {"embedding": w}})
    assert as_bytes(back.trainable) == as_bytes(ad.trainable)
    assert back.frozen.plan is ad.frozen.plan
    assert jlora.count(ad)[0] == {TRAINED: 3 * D, NEW: N * D, BOTH: (3 + N) * D}[spec]
    if spec is TRAINED:
        with pytest.warns(jlora.UntrainedWarning):
            jlora.save(tmp_path / "b", adapted(spec, w, far=False))


def test_rows_live_whole_and_features_where_the_tables_do():
    """So that a lookup reads them where it reads the table."""
    specs = jlora.shard.partition_specs(adapted(BOTH), [("embedding$", P("tensor", "fsdp"))])
    assert specs.trainable[PATH] == {"rows": P(None, "fsdp"), "rows_2": P(None, "fsdp")}
    assert specs.frozen.factors[PATH] == {"s_rows": P()}


def test_other_methods_stand_below_the_rows():
    """LoRA on the table and rows put into that; LoRA on another weight beside them."""
    w, ids = jnp.asarray(drawn(0, V, D)), jnp.array([[2, 0, V], [9, 9, 3]])
    spec = jlora.Sum(BOTH, jlora.LoRA(rank=2, alpha=3, target=jlora.targets.tokens))
    f = lambda p, ids: (lookup := looked_up(p, ids), lookup @ p["q"]["kernel"])[1]
    params = {"embed": {"embedding": w}, "q": {"kernel": jnp.asarray(drawn(1, D, D))}}
    ad = jlora.adapt(params, [spec, jlora.LoRA(rank=1, target="q")])
    far = jax.tree.map(lambda a: jnp.asarray(drawn(a.size, *a.shape)), ad.trainable)
    run = lambda **how: jax.value_and_grad(lambda t: jlora.lift(f, **how)(jlora.join(t, ad.frozen), ids).sum())(far)
    assert_close(run(), run(dense=True))
    report = jlora.explain(f, jlora.join(far, ad.frozen), ids)
    assert not report.dense and report.rows[0].plan == "rows of the factors, 3 trained and 3 new put in"


def test_a_stack_of_tables_is_scanned_with_its_rows():
    """Each layer has rows of its own."""
    ws, ids = jnp.asarray(drawn(0, 2, V, D)), jnp.array([2, V + 1, 0])
    f = lambda p, ids: lax.scan(lambda c, w: (c, jnp.take(w, ids, axis=0)), 0, p["tables"])[1]
    ad = jlora.adapt({"tables": ws}, jlora.Sum(TRAINED, NEW, target="tables"), axes={"tables": "sio"})
    assert ad.trainable["tables"]["rows"].shape == (2, 3, D)
    ad = jlora.Adapted(jax.tree.map(lambda a: jnp.asarray(drawn(a.size, *a.shape)), ad.trainable), ad.frozen)
    assert_close(jlora.lift(f)(ad, ids), jlora.lift(f, dense=True)(ad, ids))
    assert not jlora.explain(f, ad, ids).dense


@pytest.mark.filterwarnings("ignore::jlora.RolesWarning")  # as a head, a table is used with its letters turned
@pytest.mark.parametrize("left", [False, True])
def test_a_stack_of_heads_in_one_dot(left):
    """Tables that are batch axes of a dot, with free axes of the activation before the rows' or behind them."""
    base = jnp.asarray(np.random.default_rng(0).standard_normal((2, 7, 4)), jnp.float32)
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 3, 4)), jnp.float32)
    ad = jlora.adapt({"w": base}, jlora.TrainedTokens(ids=(5, 1), target="w"), axes={"w": "sio"})
    ad = jlora.join(jax.tree.map(lambda a: a + 0.5, ad.trainable), ad.frozen)
    f = lambda p, x: lax.dot_general(*((p["w"], x) if left else (x, p["w"])), (((2,), (2,)), ((0,), (0,))))
    merged = np.float64(jlora.merge(ad)["w"])
    assert np.abs(merged - base).max() > 0.4
    want = np.einsum("evd,end->evn" if left else "evd,end->env", merged, np.float64(x))
    np.testing.assert_allclose(jlora.lift(f)(ad, x), want, rtol=1e-5, atol=1e-5)


def test_quantised_tables():
    """Rows are put into what the codes stand for; a merged table is that, and taller."""
    params = {"embed": {"embedding": jnp.asarray(drawn(0, 128, 64))}}
    small = jlora.quantize(params, "int8", target="embedding")
    ad = jlora.adapt(small, jlora.Sum(TRAINED, NEW))
    ad = jlora.Adapted(jax.tree.map(lambda a: jnp.asarray(drawn(a.size, *a.shape)), ad.trainable), ad.frozen)
    ids = jnp.array([0, 2, 130, 9])
    assert_close(jlora.lift(looked_up)(ad, ids), looked_up(jlora.merge(ad), ids))
    h = jnp.asarray(drawn(1, 3, 64))
    assert_close(jlora.lift(head)(ad, h), head(jlora.merge(ad), h)[:, :128])


def test_the_word_itself():
    """An author's rows: of any array, in any order of axes, one program for one set of numbers."""

    class Mine(jlora.Method):
        def recipe(self, leaf):
            return network.Recipe(rows=(network.Rows(network.Array("mine", jax.nn.initializers.ones), at=(1, 3)),))

    w = jnp.asarray(drawn(0, D, V))
    ad = jlora.adapt({"t": w}, Mine(target="t"), axes={"t": "oi"})
    assert ad.trainable["t"]["mine"].shape == (2, D)
    made = np.array(w)
    made[:, [1, 3]] += 1
    assert_close(jlora.merge(ad)["t"], made)
    assert_close(jlora.lift(lambda p, ids: p["t"][:, ids])(ad, jnp.array([3, 0])), made[:, [3, 0]])
    wrong = lambda at: network.Rows(network.Array("x", jax.nn.initializers.ones), at=at)
    for at, words in (((3, 1), "ascend"), ((-1,), "ascend"), ((V + 1,), "without a gap"), ((), "have numbers")):
        with pytest.raises(ValueError, match=words):
            wrong(at).check(ad.frozen.plan.sites[0].leaf)
