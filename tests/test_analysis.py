"""What an update does to its weight, against closed forms in float64: planted subspaces, spikes and errors."""

import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import analysis
from jlora.methods._projections import PROJECTIONS, draws, permutation
from methods import FEW, adapted, as_bytes, assert_close, away_from_start, in_turn, pairs

pytestmark = pytest.mark.slow  # nothing else stands on this room


def rng(seed=0):
    return np.random.default_rng(seed)


def orthonormal(seed, d, r):
    return np.linalg.qr(rng(seed).standard_normal((d, r)))[0]


def planted(angles, d=40, seed=0):
    """Two orthonormal bases with these principal angles, each then turned within its span."""
    r = len(angles)
    q = orthonormal(seed, d, 2 * r)
    a, b = q[:, :r], q[:, :r] * np.cos(angles) + q[:, r:] * np.sin(angles)
    return a @ orthonormal(seed + 1, r, r), b @ orthonormal(seed + 2, r, r)


def phi(u, v):
    """The definition, one (i, j) at a time."""
    grid = [
        [np.sum((u[:, :i].T @ v[:, :j]) ** 2) / min(i, j) for j in range(1, v.shape[1] + 1)]
        for i in range(1, u.shape[1] + 1)
    ]
    return np.array(grid)


# --- subspaces ----------------------------------------------------------------------------------------------------


ANGLES = np.array([0.0, 1e-6, 3e-5, 1e-3, 0.4, np.pi / 4, 1.2, np.pi / 2])


def test_planted_angles_are_found_small_ones_too():
    """Angles are those of the spans, whatever their bases; small ones are right to 1e-6, where arccos alone is not."""
    a, b = planted(ANGLES)
    found = np.asarray(jax.jit(analysis.principal_angles)(a, b), np.float64)
    np.testing.assert_allclose(found, ANGLES, rtol=2e-5, atol=6e-7)
    assert abs(found[2] - 3e-5) < 6e-7, "arccos alone gives 0 or 3e-4 here"
    # scaled and sheared columns span the same; the order of the two does not matter
    shear = rng(9).standard_normal((8, 8)) + 4 * np.eye(8)
    np.testing.assert_allclose(analysis.principal_angles(b @ shear, 100 * a), found, rtol=1e-4, atol=3e-6)


def test_unlike_dimensions_and_a_stack():
    """There are as many angles as the smaller span has dimensions, and each layer of a stack has its own."""
    a, b = planted(ANGLES)
    line = analysis.principal_angles(a, b[:, :3])
    want = np.linalg.svd(a.T @ b[:, :3], compute_uv=False)
    assert line.shape == (3,)
    np.testing.assert_allclose(np.cos(line), want, atol=1e-6)
    both = analysis.principal_angles(np.stack([a, b]), b[:, :3])
    np.testing.assert_allclose(both[0], line, atol=1e-6)
    np.testing.assert_allclose(both[1], 0, atol=1e-6)


def test_distances_are_the_formulas():
    """Grassmann is the norm of the angles; chordal and projection are norms of the projectors' difference."""
    a, b = planted(ANGLES)
    found = analysis.distances(a, b)
    projector = a @ a.T - b @ b.T
    np.testing.assert_allclose(found.grassmann, np.sqrt(np.sum(ANGLES**2)), rtol=1e-5)
    np.testing.assert_allclose(found.chordal, np.linalg.norm(projector) / np.sqrt(2), rtol=1e-5)
    np.testing.assert_allclose(found.projection, np.linalg.norm(projector, 2), rtol=1e-5)
    u, v = np.linalg.svd(a)[0][:, :8], np.linalg.svd(b)[0][:, :8]
    np.testing.assert_allclose(found.chordal, np.sqrt(8 * (1 - phi(u, v)[-1, -1])), rtol=1e-5)


def test_similarity_of_planted_angles_is_the_mean_of_their_cosines_squared():
    """phi(8, 8) of the whole subspaces; and of the aligned bases, before they are turned, every phi(i, j)."""
    as_svd = lambda x: analysis.SVD(jnp.asarray(x, jnp.float32), jnp.ones(x.shape[1]), jnp.asarray(x, jnp.float32))
    a, b = planted(ANGLES)
    np.testing.assert_allclose(analysis.similarity(as_svd(a), as_svd(b))[-1, -1], np.mean(np.cos(ANGLES) ** 2), 1e-5)
    q = orthonormal(0, 40, 16)
    tilted = q[:, :8] * np.cos(ANGLES) + q[:, 8:] * np.sin(ANGLES)
    shared = np.cumsum(np.cos(ANGLES) ** 2)
    i, j = np.ogrid[1:9, 1:9]
    want = shared[np.minimum(i, j) - 1] / np.minimum(i, j)
    np.testing.assert_allclose(analysis.similarity(as_svd(q[:, :8]), as_svd(tilted)), want, rtol=1e-5)


def test_similarity_is_the_definition_on_either_side_and_in_stacks():
    """Every phi(i, j) is the definition's, layer by layer, and the right side is the left one of the transposes."""
    one, other = rng(1).standard_normal((3, 12, 5)), rng(2).standard_normal((3, 12, 4))
    found = jax.jit(analysis.similarity)(analysis.svd(one), analysis.svd(other))
    assert found.shape == (3, 5, 4)
    for layer in range(3):
        u, v = np.linalg.svd(one[layer])[0][:, :5], np.linalg.svd(other[layer])[0][:, :4]
        np.testing.assert_allclose(found[layer], phi(u, v), atol=2e-5)
    turned = analysis.similarity(analysis.svd(one.mT), analysis.svd(other.mT), side="right")
    np.testing.assert_allclose(turned, found, atol=2e-5)


def test_random_subspaces_share_what_the_baseline_says():
    """The baseline is what subspaces drawn at random share in the mean, max(i, j) / d."""
    d, count = 24, 400
    draw = lambda seed, r: np.linalg.qr(rng(seed).standard_normal((count, d, r)))[0]
    u, v = draw(1, 6), draw(2, 4)
    one, other = (analysis.SVD(jnp.asarray(x), jnp.ones(x.shape[::2]), jnp.asarray(x)) for x in (u, v))
    mean = np.asarray(analysis.similarity(one, other)).mean(0)
    np.testing.assert_allclose(mean, analysis.random_similarity(d, 6, 4), atol=0.02)
    np.testing.assert_allclose(analysis.random_similarity(d, 6, 4)[5, 3], 6 / d, rtol=1e-6)


@pytest.mark.parametrize(
    "call,words",
    [
        (lambda: analysis.similarity(np.ones((3, 2)), np.ones((3, 2))), "jlora.analysis.svd"),
        (lambda: analysis.similarity(analysis.svd(np.eye(3)), analysis.svd(np.eye(4))), "3 and 4 dimensions"),
        (lambda: analysis.similarity(analysis.svd(np.eye(3)), analysis.svd(np.eye(3)), "up"), "'left'"),
        (lambda: analysis.principal_angles(np.ones(3), np.ones(3)), "no matrix"),
        (lambda: analysis.random_similarity(3, 4, 1), "at most d"),
        (lambda: analysis.factored_svd(np.ones((2, 3)), np.ones((3, 3))), "differ in their rank"),
        (lambda: analysis.truncate(analysis.svd(np.eye(3)), 4), "rank of 0 to 3"),
        (lambda: analysis.truncate(np.eye(3), 1), "jlora.analysis.svd"),
        (lambda: analysis.amplification(analysis.svd(np.eye(3)), np.eye(4)), "do not belong"),
        (lambda: analysis.amplification(analysis.svd(np.eye(3)), np.eye(3), 0), "rank of 1 to 3"),
        (lambda: analysis.intruders(np.eye(3), np.eye(3)), "3 singular vectors"),
        (lambda: analysis.updates({"kernel": np.eye(3)}), "jlora.join"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_words(call, words):
    """Inputs that do not belong together have no figure: the error says what differs, or what to make first."""
    with pytest.raises((TypeError, ValueError), match=words):
        call()


# --- decompositions -----------------------------------------------------------------------------------------------


def test_the_svd_of_a_product_is_that_of_the_matrix():
    """Factors alone give the SVD of a^T b, with orthonormal bases, for each layer of a stack."""
    a, b = rng(3).standard_normal((2, 5, 30)), rng(4).standard_normal((2, 5, 20))
    found = jax.jit(analysis.factored_svd)(a, b)
    assert found.u.shape == (2, 30, 5) and found.v.shape == (2, 20, 5)
    np.testing.assert_allclose(found.s, np.linalg.svd(a.mT @ b, compute_uv=False)[:, :5], rtol=1e-5)
    np.testing.assert_allclose(found.matrix, a.mT @ b, atol=1e-4)
    for basis in (found.u, found.v):
        np.testing.assert_allclose(basis.mT @ basis, np.broadcast_to(np.eye(5), (2, 5, 5)), atol=1e-5)


def test_a_rank_above_the_sides_and_narrow_dtypes():
    """Factors of more rows than either side has columns still give a^T b, and bfloat16 is decomposed in float32."""
    a, b = rng(3).standard_normal((7, 4)), rng(4).standard_normal((7, 5))
    np.testing.assert_allclose(analysis.factored_svd(a, b).matrix, a.T @ b, atol=1e-4)
    half = jnp.asarray(a, jnp.bfloat16)
    assert analysis.svd(half).s.dtype == analysis.factored_svd(half, half).s.dtype == jnp.float32


def test_ranks_of_spectra():
    """Effective rank is exp of the entropy, stable rank sum s^2 / s_1^2; both are 0 of zeros and NaN where one is."""
    s = np.array([[4.0, 4.0, 4.0, 0.0], [3.0, 2.0, 1.0, 0.5], [0.0] * 4])
    p = s[1] / s[1].sum()
    np.testing.assert_allclose(analysis.effective_rank(s), [3, np.exp(-np.sum(p * np.log(p))), 0], rtol=1e-6)
    np.testing.assert_allclose(analysis.stable_rank(s), [3, np.sum(s[1] ** 2) / 9, 0], rtol=1e-6)
    for rank in (analysis.effective_rank, analysis.stable_rank):
        np.testing.assert_array_equal(rank(np.array([[2.0, np.nan], [np.nan, 0.0]])), [np.nan, np.nan])


def test_truncation_is_as_good_as_eckart_and_young_say():
    """The errors that a truncation states are those of its matrix, and the least that a matrix of its rank can have."""
    matrix = rng(5).standard_normal((2, 9, 6))
    whole, s = analysis.svd(matrix), np.linalg.svd(matrix, compute_uv=False)
    for rank in (0, 2, 6):
        cut = analysis.truncate(whole, rank)
        rest = matrix - np.asarray(cut.svd.matrix, np.float64)
        assert cut.svd.s.shape == (2, rank)
        np.testing.assert_allclose(cut.frobenius, np.linalg.norm(rest, axis=(-2, -1)), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(cut.spectral, np.linalg.norm(rest, 2, axis=(-2, -1)), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(cut.frobenius, np.sqrt(np.sum(s[:, rank:] ** 2, -1)), rtol=1e-4, atol=2e-5)
        np.testing.assert_allclose(cut.spectral, np.max(s[:, rank:], -1, initial=0), rtol=1e-4, atol=2e-5)


# --- an update against its weight ---------------------------------------------------------------------------------


def spiked(d_in=30, d_out=20, spikes=(7.0, 5.0), at=(12, 15)):
    """W of a known spectrum, and an update along some of its weaker directions."""
    u, v = orthonormal(1, d_in, d_out), orthonormal(2, d_out, d_out)
    s = np.linspace(10, 0.5, d_out)
    weight = (u * s) @ v.T
    update = (u[:, at] * np.array(spikes)) @ v[:, at].T
    return weight, update, s


def test_planted_spikes_are_amplified_by_what_was_planted():
    """The factor is ||dW|| over what W has along dW; the baseline is what W has along random directions."""
    weight, update, s = spiked()
    found = jax.jit(analysis.amplification, static_argnums=2)(analysis.svd(update), weight, 2)
    onto = np.hypot(s[12], s[15])
    np.testing.assert_allclose(found.update, np.hypot(7, 5), rtol=1e-5)
    np.testing.assert_allclose(found.onto_update, onto, rtol=1e-5)
    np.testing.assert_allclose(found.onto_weight, np.hypot(s[0], s[1]), rtol=1e-5)
    np.testing.assert_allclose(found.factor, np.hypot(7, 5) / onto, rtol=1e-5)
    drawn = [np.sum((orthonormal(n, 30, 2).T @ weight @ orthonormal(900 + n, 20, 2)) ** 2) for n in range(600)]
    np.testing.assert_allclose(found.onto_random, np.sqrt(np.mean(drawn)), rtol=0.06)
    np.testing.assert_allclose(found.onto_random, 2 * np.linalg.norm(weight) / np.sqrt(600), rtol=1e-5)


def test_shares_inside_the_weight():
    """A share is of ||dW||^2, in the first k directions of W on the left, the right and both, layer by layer."""
    weight, update, _ = spiked(at=(2, 15))
    found = analysis.inside(analysis.svd(update), analysis.svd(weight))
    share = 49 / 74
    want = np.select([np.arange(20) < 2, np.arange(20) < 15], [0, share], 1)
    for x in found:
        np.testing.assert_allclose(x, want, atol=1e-5)
    u, v = rng(7).standard_normal((2, 30, 3)), rng(8).standard_normal((2, 3, 20))
    dense = u @ v
    stacked = analysis.inside(analysis.factored_svd(u.mT, v), analysis.svd(np.stack([weight, weight])))
    left, right = np.linalg.svd(weight)[0][:, :6], np.linalg.svd(weight)[2].T[:, :6]
    for layer in range(2):
        total = np.sum(dense[layer] ** 2)
        np.testing.assert_allclose(stacked.both[layer, 5], np.sum((left.T @ dense[layer] @ right) ** 2) / total, 1e-4)
        np.testing.assert_allclose(stacked.left[layer, 5], np.sum((left.T @ dense[layer]) ** 2) / total, rtol=1e-4)


def test_intruders_are_the_directions_that_the_weight_had_not():
    """A strong direction is an intruder if the weight had nothing like it; one that it had is none at any size."""
    weight, _, _ = spiked()
    foreign = rng(4).standard_normal((30, 20))
    within = np.outer(orthonormal(1, 30, 20)[:, 3], orthonormal(2, 20, 20)[:, 3])
    strong = np.outer(*(x / np.linalg.norm(x) for x in (foreign[:, 0], foreign[0])))
    flags = analysis.intruders(weight, weight + 50 * strong, k=4)
    assert flags.tolist() == [True, False, False, False]
    assert not analysis.intruders(weight, weight + 50 * within, k=4, epsilon=0.9, side="right").any()


# --- adapters -----------------------------------------------------------------------------------------------------


def params():
    draw = lambda seed, *shape: jnp.asarray(rng(seed).standard_normal(shape), jnp.float32)
    return {
        "conv": {"kernel": draw(4, 3, 3, 4, 6), "bias": draw(5, 6)},
        "dense": {"kernel": draw(1, 12, 10)},
        "layers": {"query": {"kernel": draw(2, 3, 8, 2, 4)}},
    }


AXES = {"query/kernel": "sioo"}
LOW_RANK = {
    "lora": jlora.LoRA(rank=2, alpha=3, target="kernel"),
    "slices": jlora.LoRA(rank=1, slices=((0, 2), (3, 6)), target="kernel"),
    "pissa": jlora.LoRA(rank=2, alpha=3, init="pissa", target="kernel"),
    "adalora": jlora.AdaLoRA(rank=2, alpha=3, target="kernel"),
    "loha": jlora.LoHa(rank=2, target="dense|query"),
    "vera": jlora.VeRA(rank=3, target="kernel"),
    "sum": jlora.Sum(jlora.LoRA(rank=1, alpha=2), jlora.LoRA(rank=2), target="kernel"),
}
OTHERS = {
    "full": jlora.Full(target="kernel|bias"),
    "krona": jlora.KronA(target="kernel"),
    "hira": jlora.HiRA(rank=2, target="dense|query"),
    "dora": jlora.DoRA(jlora.LoRA(rank=2, target="dense|query")),
    "ia3": jlora.IA3(target="dense|query"),
}


def difference(adapted):
    """dW as merging has it, as (stack..., in, out)."""
    merged = jlora.adapt(jlora.merge(adapted), jlora.Full(target="kernel"), axes=AXES)
    old, new = analysis.weights(adapted), analysis.weights(merged)
    return {path: new[path] - old[path] for path in old}


FAST = ("lora", "dora")
EVERY = [pytest.param(n, marks=() if n in FAST else pytest.mark.slow) for n in (*LOW_RANK, *OTHERS)]


@pytest.mark.parametrize("name", EVERY)
def test_the_update_of_every_kind_of_method(name):
    """An update is what merging adds, whatever the method, and its factors, where it has any, multiply to it."""
    adapted = jlora.adapt(params(), (LOW_RANK | OTHERS)[name], axes=AXES)
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    found, pairs, want = jax.jit(lambda a: (analysis.updates(a), analysis.factors(a), difference(a)))(adapted)
    assert found.keys() == want.keys() and set(pairs) == (set(want) if name in LOW_RANK else set())
    for path, dense in want.items():
        np.testing.assert_allclose(found[path].matrix, dense, atol=2e-5 * max(1, np.abs(dense).max()))
        if path in pairs:
            a, b = pairs[path]
            assert a.shape[:-2] == b.shape[:-2] == dense.shape[:-2]
            np.testing.assert_allclose(a.mT @ b, dense, atol=2e-5 * max(1, np.abs(dense).max()))


@pytest.mark.slow
@pytest.mark.parametrize("row,case", in_turn(pairs(names=FEW, fast=())))
def test_every_method_has_an_update_and_a_budget(row, case):
    """Methods and shapes of the laws: dW against merging, and the budget from shapes against what is there."""
    _, tree, _ = case.build()
    start = adapted(row, case, tree)
    found = analysis.cost(tree, row.spec([s.leaf.path for s in start.frozen.plan.sites]), axes=case.axes)
    assert found.trainable == jlora.count(start)[0] and np.isfinite(found.step_flops) and found.delta_flops >= 0
    start = jlora.join(away_from_start(start.trainable), start.frozen)

    @jax.jit  # one program, where each operation alone would be one
    def both(adapted):
        """{path: (dW by `updates`, the same by merging)}"""
        updates, merged, weights = (
            analysis.updates(adapted),
            jax.tree.leaves(jlora.merge(adapted)),
            analysis.weights(adapted),
        )
        sites = {site.leaf.path: site for site in adapted.frozen.plan.sites if site.leaf.path in updates}
        change = lambda path, site: site.leaf.matrix(merged[site.index]) - weights[path]
        return {path: (updates[path].matrix, change(path, site)) for path, site in sites.items()}

    for found, want in both(start).values():
        largest = float(np.abs(want).max())  # the merged weight is rounded at its own size, of about 1
        assert_close(found, want, 3e-5 * max(1, 1 / largest))


def test_the_factors_of_lora_are_those_stored():
    """LoRA's a is the stored array and its b has the heads in one axis; a bias is no matrix and is left out."""
    adapted = jlora.adapt(params(), LOW_RANK["lora"], axes=AXES)
    pair = analysis.factors(adapted)["layers/query/kernel"]
    stored, s = adapted.trainable["layers/query/kernel"], adapted.frozen.factors["layers/query/kernel"]["s"]
    assert (pair.a == stored["a"]).all()
    np.testing.assert_allclose(pair.b, (stored["b"].T * s).T.reshape(3, 2, 8), rtol=1e-6)
    assert "conv/bias" not in analysis.weights(jlora.adapt(params(), OTHERS["full"]))


# --- budgets ------------------------------------------------------------------------------------------------------


def test_a_budget_from_shapes_is_what_adapting_costs(tmp_path):
    """Counted before training, against what is then there: parameters, the optimizer's state, the saved arrays."""
    shapes = jax.eval_shape(params)
    narrow = jlora.LoRA(rank=2, target="kernel", dtype="bfloat16")
    both = jlora.DoRA(jlora.Sum(jlora.VeRA(rank=3, target="kernel"), narrow))  # each in the dtype of its method
    for spec in (LOW_RANK["adalora"], LOW_RANK["vera"], both, [jlora.BitFit(), jlora.LoRA(rank=2, target="kernel")]):
        found = analysis.cost(shapes, spec, optimizer=optax.adam(1e-3), axes=AXES)
        adapted = jlora.adapt(params(), spec, axes=AXES)
        assert (found.trainable, found.trainable + found.base) == jlora.count(adapted)
        size = lambda tree: sum(x.nbytes for x in jax.tree.leaves(tree))
        assert found.optimizer_bytes == size(optax.adam(1e-3).init(adapted.trainable))
        assert found.gradient_bytes == size(adapted.trainable)
        assert found.memory_bytes == size((adapted.trainable, adapted.frozen.factors))
        drawn = [x for group, held in adapted.frozen.factors.items() if group.startswith("vera") for x in held.values()]
        assert found.disk_bytes == found.memory_bytes - size(drawn)
        assert sum(r.trainable for r in found.rows) == found.trainable and found.share == found.trainable / found.base


def test_flops_are_those_of_the_factors_and_of_the_trace():
    """A narrow batch meets the factors, a wide one a dW made once; both as `explain` counts them on the model."""
    tree = {"dense": {"kernel": jax.ShapeDtypeStruct((96, 64), jnp.float32)}}
    for spec in (jlora.LoRA(rank=4, target="kernel"), jlora.KronA(target="kernel"), jlora.Full(target="kernel")):
        adapted = jlora.adapt({"dense": {"kernel": jnp.ones((96, 64))}}, spec)
        for tokens in (16, 4096):
            x = jax.ShapeDtypeStruct((tokens, 96), jnp.float32)
            (row,) = jlora.explain(lambda p, x: x @ p["dense"]["kernel"], adapted, x).rows
            found = analysis.cost(tree, spec, tokens=tokens)
            assert found.base_flops == 2 * 96 * 64 and row.dense_flops in (0, tokens * found.base_flops)
            np.testing.assert_allclose(found.delta_flops * tokens, row.flops, rtol=0.02, atol=2 * 96 * 64)
    lora = analysis.cost(tree, jlora.LoRA(rank=4, target="kernel"), tokens=16)
    np.testing.assert_allclose(lora.delta_flops, 2 * 4 * (96 + 64), rtol=0.03)
    assert lora.step_flops == 2 * lora.base_flops + 3 * lora.delta_flops < lora.full_step_flops
    full = analysis.cost(tree, jlora.Full(target="kernel"), tokens=4096)
    np.testing.assert_allclose(full.step_flops, full.full_step_flops, rtol=1e-3)


def test_a_budget_prints_and_knows_lookups_vectors_and_stacks():
    """A token costs one row of a table, little in a vector and each layer of a stack; the print fits 120 columns."""
    tree = jax.eval_shape(params) | {"embed": {"embedding": jax.ShapeDtypeStruct((1000, 8), jnp.bfloat16)}}
    found = analysis.cost(
        tree, [jlora.LoRA(rank=2, target="embedding|query"), jlora.Full(target="bias")], axes={"query": "sioo"}
    )
    assert found.base_flops == 2 * (3 * 3 * 4 * 6 + 12 * 10 + 3 * 64)
    by_path = {r.path: r.flops for r in found.rows}
    assert by_path["embed/embedding"] < 2 * 2 * 8 + 20 and by_path["conv/bias"] < 1
    assert "MB" not in str(found) and "kB on disk" in str(found) and "layers/query/kernel" in str(found)
    assert all(len(line) <= 120 for line in str(found).splitlines())
    with pytest.raises(ValueError, match="at least one token"):
        analysis.cost(tree, jlora.LoRA(), tokens=0)


# --- a subspace of all parameters ---------------------------------------------------------------------------------


PLACE = jnp.array([17, 40000, 3], jnp.uint32)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def columns(kind, d, size, places):
    """P of each place, column by column."""
    project = lambda theta, place: PROJECTIONS[kind](theta, place, size)
    return jax.vmap(lambda place: jax.vmap(project, (0, None), 1)(jnp.eye(d), place))(places)


def matrix(kind, d, size):
    return np.asarray(columns(kind, d, size, PLACE[None])[0], np.float64)


@pytest.mark.parametrize("kind", PROJECTIONS)
@pytest.mark.parametrize("d,size", [(5, 300), pytest.param(40, 12, marks=pytest.mark.slow), (7, 64), (1, 1)])
def test_columns_have_unit_norm_and_are_those_of_no_other_place(kind, d, size):
    """P's columns have norm one (fastfood's nearly), so theta keeps its length, and no two places share a P."""
    p, *others = np.asarray(columns(kind, d, size, jnp.stack([PLACE, *(PLACE.at[n].add(1) for n in range(3))])))
    norms = np.linalg.norm(p, axis=0)
    exact = kind != "fastfood" or size == 64
    np.testing.assert_allclose(norms, 1, atol=1e-5 if exact else 6 / np.sqrt(size))
    if kind == "sparse":
        assert ((np.abs(p) > 0).sum(0) == np.ceil(np.sqrt(size))).all()
    if size > 1:
        assert all(np.abs(p - other).max() > 0.05 for other in others)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_columns_are_nearly_orthogonal_and_rows_alike(kind):
    """P^T P is the identity up to 1 / sqrt(D), and no row is favoured."""
    p = matrix(kind, 64, 4096)
    gram = p.T @ p - np.eye(64)
    assert np.abs(gram).max() < 6 / 64 and abs(gram.mean()) < 0.003
    rows = np.sum(p**2, 1).reshape(16, -1).sum(1)
    np.testing.assert_allclose(rows, 64 / 16, rtol=0.25)


@pytest.mark.parametrize("d,size", [(30, 20), pytest.param(5, 50, marks=pytest.mark.slow), (1, 1)])
def test_fastfood_is_the_product_that_it_says(d, size):
    """H G Pi H B as matrices; Pi a permutation; and its transpose the true one, which the authors' code has not."""
    bits = int(np.ceil(np.log2(max(d, size))))
    n = 2**bits
    signs, order, gauss = (np.asarray(x, np.float64) for x in draws(PLACE, bits, jnp.dtype("float32")))
    assert sorted(order) == list(range(n)) and set(signs) <= {-1, 1}
    h = np.ones((1, 1))
    for _ in range(bits):
        h = np.kron(h, [[1, 1], [1, -1]])
    pi = np.eye(n)[order.astype(int)]
    full = h @ np.diag(gauss) @ pi @ h @ np.diag(signs)
    want = full[:size, :d] / np.sqrt(n * np.sum(gauss**2)) / np.sqrt(size / n)
    np.testing.assert_allclose(matrix("fastfood", d, size), want, atol=1e-5)
    theta, g = rng(1).standard_normal(d).astype("f"), rng(2).standard_normal(size).astype("f")
    transposed = jax.vjp(lambda t: PROJECTIONS["fastfood"](t, PLACE, size), theta)[1](g)[0]
    np.testing.assert_allclose(transposed, want.T @ g, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_the_other_transposes_are_true_too(kind):
    """Dense and sparse projections pull gradients back by the transpose of the P that they apply."""
    theta, g = rng(1).standard_normal(30).astype("f"), rng(2).standard_normal(200).astype("f")
    transposed = jax.vjp(lambda t: PROJECTIONS[kind](t, PLACE, 200), theta)[1](g)[0]
    np.testing.assert_allclose(transposed, matrix(kind, 30, 200).T @ g, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_gradients_are_finite_differences_in_float64(kind):
    """The slope through a projection is the true one, and under x64 it is float64 all the way."""
    theta, u, g = (rng(n).standard_normal(size) for n, size in ((1, 6), (2, 6), (3, 40)))
    with jax.enable_x64(True):
        loss = jax.jit(lambda t: jnp.sum(jnp.sin(PROJECTIONS[kind](t, PLACE, 40)) * g))
        slope = jnp.vdot(jax.grad(loss)(jnp.asarray(theta)), u)
        assert slope.dtype == jnp.float64
        differences = (loss(theta + 1e-5 * u) - loss(theta - 1e-5 * u)) / 2e-5
        np.testing.assert_allclose(differences, slope, rtol=1e-7)


def test_the_permutation_has_no_favourites():
    """Where 0, 1 and neighbours land, over many keys: uniform means, no fixed distances."""
    orders = np.asarray(
        jax.vmap(lambda k: permutation(k, 8))(jax.random.key_data(jax.random.split(jax.random.key(0), 400))), np.float64
    )
    np.testing.assert_allclose(orders.mean(0), 127.5, atol=5 * 74 / 20)
    assert len(np.unique(orders[:, 0])) > 150
    steps = np.abs(np.diff(orders, axis=1))
    assert abs(steps.mean() - 256 / 3) < 4


@functools.cache
def model():
    def apply(tree, x):
        x = jnp.tanh(x @ tree["dense"]["kernel"])

        def layer(x, kernel):
            return jnp.tanh(jnp.einsum("bd,dhk->bhk", x, kernel).reshape(x.shape)), None

        return jax.lax.scan(layer, x[:, :8], tree["layers"]["query"]["kernel"])[0]

    tree = {name: params()[name] for name in ("dense", "layers")}
    return apply, tree, jnp.asarray(rng(6).standard_normal((5, 12)), jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["fastfood", "dense", "sparse"])
def test_a_model_in_a_subspace(kind):
    """Lifted equals dense, in values and gradients, through a scan; layers have projections of their own."""
    apply, tree, x = model()
    adapted = jlora.adapt(tree, jlora.IntrinsicDimension(6, kind))
    assert jlora.count(adapted)[0] == 6 + 1 + 3
    assert (jlora.lift(apply)(adapted, x) == apply(tree, x)).all()
    trainable, frozen = away_from_start(adapted.trainable), adapted.frozen
    loss = lambda f: lambda t: jnp.sum(jlora.lift(apply, dense=f)(jlora.join(t, frozen), x) ** 2)
    value, grads = jax.jit(jax.value_and_grad(loss(False)))(trainable)
    want, dense = jax.jit(jax.value_and_grad(loss(True)))(trainable)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    for got, grad in zip(jax.tree.leaves(grads), jax.tree.leaves(dense), strict=True):
        np.testing.assert_allclose(got, grad, rtol=1e-3, atol=1e-4)
    # finite differences, along a random direction
    along = away_from_start(trainable, 1.0)
    move = jax.jit(loss(True))
    at = lambda h: float(move(jax.tree.map(lambda t, u: t + h * u, trainable, along)))
    slope = sum(float(jnp.vdot(g, u)) for g, u in zip(*map(jax.tree.leaves, (grads, along)), strict=True))
    np.testing.assert_allclose((at(3e-3) - at(-3e-3)) / 6e-3, slope, rtol=0.02, atol=0.02)
    layers = analysis.weights(jlora.adapt(jlora.merge(jlora.join(trainable, frozen)), jlora.Full(target="query")))
    moves = np.asarray(layers["layers/query/kernel"] - tree["layers"]["query"]["kernel"].reshape(3, 8, 8))
    cosine = moves.reshape(3, -1) @ moves.reshape(3, -1).T
    scale = np.sqrt(np.outer(*[np.diag(cosine)] * 2))
    assert np.abs(cosine / scale - np.eye(3)).max() < 0.6 and (moves**2).sum((1, 2)).min() > 0


def test_the_projection_is_never_kept():
    """Between forward and backward pass there is nothing of the size of P, nor is it a constant of the program."""
    tree = {"w": jnp.ones((64, 50))}
    for kind in ("dense", "fastfood"):
        adapted = jlora.adapt(tree, jlora.IntrinsicDimension(100, kind))
        loss = lambda t, frozen: jnp.sum(jlora.lift(lambda p: jnp.sin(p["w"]))(jlora.join(t, frozen)))
        _, pull = jax.vjp(functools.partial(loss, frozen=adapted.frozen), adapted.trainable)
        assert sum(x.size for x in jax.tree.leaves(pull) if hasattr(x, "size")) < 4 * 64 * 50 + 1000
        constants = jax.make_jaxpr(jax.grad(loss))(adapted.trainable, adapted.frozen).consts
        assert all(np.size(c) <= 1024 for c in constants)


def test_a_subspace_is_saved_without_its_projection(tmp_path):
    """A subspace comes back bit for bit from a file that holds theta and no P, and a scale of zero is the base."""
    tree = model()[1]
    adapted = jlora.adapt(tree, jlora.IntrinsicDimension(6, "sparse", seed=3))
    adapted = jlora.join(away_from_start(adapted.trainable), adapted.frozen)
    jlora.save(tmp_path / "a", adapted)
    written = json.loads((tmp_path / "a" / "jlora.json").read_bytes())["factors"]
    assert sum(math.prod(x["shape"]) for x in written.values()) < 40 < sum(x.size for x in jax.tree.leaves(tree))
    loaded = jlora.load(tmp_path / "a", tree)
    assert as_bytes(loaded) == as_bytes(adapted) and loaded.frozen.plan is adapted.frozen.plan
    assert as_bytes(jlora.merge(loaded)) == as_bytes(jlora.merge(adapted))
    assert as_bytes(jlora.merge(jlora.scale(loaded, 0.0))) == as_bytes(tree)


def test_a_task_of_known_dimension_is_learned_in_as_many():
    """Reaching any of 10 numbers takes 10 dimensions, and fewer reach their share: least squares in closed form."""
    tree, want = {"w": jnp.zeros((10, 30))}, jnp.asarray(rng(1).standard_normal(10), jnp.float32)

    def train(adapted):
        trainable, frozen = jlora.split(adapted)
        place = next(iter(trainable))
        rows = jax.jit(jax.vmap(lambda t: jlora.merge(jlora.join({place: {"theta": t}}, frozen))["w"].sum(1)))
        jacobian = np.asarray(rows(jnp.eye(trainable[place]["theta"].size)), np.float64).T
        left = np.linalg.lstsq(jacobian, want, rcond=None)[0] @ jacobian.T - want
        return 1 - float(np.sum(left**2) / jnp.sum(want**2))

    method = jlora.IntrinsicDimension(1, "dense", said=False)
    found = analysis.intrinsic_dimension(train, tree, [8, 12], baseline=1.0, share=0.999, ratio=1.01, method=method)
    assert found.d == 10 and found.scores[10] > 0.999 > found.scores[9] and list(found.scores) == sorted(found.scores)
    assert analysis.intrinsic_dimension(train, tree, [4], baseline=1.0, method=method).d is None


def test_the_search_counts_as_the_paper_does():
    """d counts theta and lam but no head trained beside them; a search that cannot end or begin is refused."""
    tree, seen = model()[1], []

    def train(adapted):
        seen.append(jlora.count(adapted)[0])
        return 1.0

    head = jlora.Full(target="dense")
    found = analysis.intrinsic_dimension(train, tree, [9, 20], baseline=1.0, also=[head])
    assert found.d == 9 and seen == [9 + 120]  # three lam, theta of six, and the head
    with pytest.raises(ValueError, match="counts the 4 lam"):
        analysis.intrinsic_dimension(train, tree, [4], baseline=1.0)
    with pytest.raises(ValueError, match="no dimensions"):
        analysis.intrinsic_dimension(train, tree, [], baseline=1.0)
    with pytest.raises(ValueError, match="bisection"):
        analysis.intrinsic_dimension(train, tree, [4], baseline=1.0, ratio=1.0)
    with pytest.raises(ValueError, match="share=1.1"):
        analysis.intrinsic_dimension(train, tree, [9], baseline=1.0, share=1.1)
    with pytest.raises(ValueError, match="baseline=nan"):
        analysis.intrinsic_dimension(train, tree, [9], baseline=float("nan"))
    for wrong in (lambda: jlora.IntrinsicDimension(0), lambda: jlora.IntrinsicDimension(3, "hashed")):
        with pytest.raises(ValueError, match="whole number|'fastfood'"):
            wrong()
