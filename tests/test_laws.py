"""The laws that hold for every method on every model. A method joins with one row of `methods.METHODS`."""

import copy
import dataclasses
import pickle
import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import jlora
import zoo
from jlora import network
from methods import (
    BLOCKS,
    CASES,
    CHOSEN,
    EVERY,
    FAST,
    VIRTUAL,
    adapted,
    as_bytes,
    as_function_of_arrays,
    assert_close,
    away_from_start,
    each_row,
    errors,
    floats,
    in_turn,
    outputs_and_pullback,
    pairs,
)

HALF_EPS = 2.0**-8  # bfloat16 keeps eight bits


def programs(row, case):
    """The adapter, and one compiled program of its factors that computes all that the first three laws compare.

    Under one `jit`, as compiling is what takes time: outputs and gradients lifted and dense, merged-then-plain, base.
    """
    fn, params, args = case.build()
    before = as_bytes(params)
    ad = adapted(row, case, params)
    trainable, frozen = jlora.split(ad)
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)

    @jax.jit
    def program(trainable, frozen, arrays):
        def run(**how):
            lifted = jlora.lift(call, **how)
            f = lambda t: floats(lifted(jlora.join(t, frozen), arrays))
            return outputs_and_pullback(f, trainable, case.differentiable)

        plain = floats(call(frozen.base, arrays))
        return run(), run(**row.oracle), plain

    return ad, lambda trainable: program(trainable, frozen, arrays), (call, arrays, params, before)


@pytest.mark.parametrize("row,case", pairs(EVERY, fast=FAST, newest=True))
def test_first_laws(row, case, subtests):
    """Lifted equals dense in value and gradient; at the start it is the base; merging gives the same; all is used.

    And counted: as the paper says it. Where no weight says what a method does, forward mode stands for dense.
    """
    ad, program, (call, arrays, params, before) = programs(row, case)
    far = away_from_start(ad.trainable)
    (y, grads), (y_dense, grads_dense), plain = program(far)

    with subtests.test("the count is the paper's formula, what stands in the tree and what an optimizer would hold"):
        size = lambda tree: sum(x.size for x in jax.tree.leaves(tree))
        leaves = [site.leaf for site in ad.frozen.plan.sites]
        formula = sum(map(row.count, leaves)) + sum(dict(map(row.shared, leaves)).values())
        assert (formula, formula + size(params)) == jlora.count(ad)
        assert formula == size(ad.trainable)

    with subtests.test("the adapter moves the outputs"):
        assert any(error > 1e-3 * size for error, size in errors(y_dense, plain))

    with subtests.test("values"):
        assert [a.dtype for a in y] == [a.dtype for a in y_dense]
        if case.dtype == "float32":
            assert_close(y, y_dense)

    with subtests.test("gradients"):
        assert [a.dtype for a in jax.tree.leaves(grads)] == [a.dtype for a in jax.tree.leaves(grads_dense)]
        if case.dtype == "float32":
            assert_close(grads, grads_dense)

    if row.starts_at_base:
        with subtests.test("at the start it is the base"):
            (y, first), _, plain = program(ad.trainable)
            # not bit for bit here: XLA fuses a forward pass beside its gradient in another way than one alone
            assert_close(y, plain, 1e-6 if case.dtype == "float32" else 2 * HALF_EPS)
    else:
        first = program(ad.trainable)[0][1]

    if case.differentiable:
        with subtests.test("every factor has a gradient within two steps"):
            step = jax.tree.map(lambda a, g: (a - 0.1 * g).astype(a.dtype), ad.trainable, first)
            second = program(step)[0][1]
            moves = jax.tree.map(lambda *gs: any(np.any(np.asarray(g, np.float32)) for g in gs), first, second)
            for group, named in moves.items():
                assert any(named.values()) if row.in_parts else all(named.values()), (group, named)

    with subtests.test("the base is untouched"):
        assert all(a is b for a, b in zip(jax.tree.leaves(ad.frozen.base), jax.tree.leaves(params), strict=True))
        assert as_bytes(ad.frozen.base) == before

    with subtests.test("explain finds every weight"):
        report = jlora.explain(call, jlora.join(far, ad.frozen), arrays)
        assert not report.unused
        rows = [r for r in report.rows if r.plan != "its input is read by a step"]
        assert {r.path for r in rows} == {s.leaf.path for s in ad.frozen.plan.sites}
        forced = [r for r in report.dense if not any(re.search(pattern, r.path) for pattern in case.dense_ok)]
        assert not forced or case.name in row.dense_on, f"made dense: {forced}"


# Op by op, a client takes as long as twenty other models, of whose operations it is made: one stands for all.
OP_BY_OP = [name for name in CASES if name == "clients/llama" or not name.startswith("clients/")]


@pytest.mark.parametrize("row,case", in_turn(pairs([row for row in EVERY if row.starts_at_base], OP_BY_OP)))
def test_start_is_the_base_bit_for_bit(row, case):
    """Each operation as the model wrote it, and a delta of exact zeros. Eager, where XLA has nothing to fuse."""
    fn, params, args = case.build()
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    lifted, plain = jlora.lift(call)(adapted(row, case, params), arrays), call(params, arrays)
    assert jax.tree.structure(lifted) == jax.tree.structure(plain)
    for a, b in zip(zoo.arrays(lifted), zoo.arrays(plain), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
        else:
            assert as_bytes(a) == as_bytes(b)


BFLOAT16 = [name for name, case in CASES.items() if case.dtype == "bfloat16"]


def in_float32(case, monkeypatch):
    """The same model with float32 wherever it says bfloat16, and its parameters and arguments as they were."""
    half = case.build()
    monkeypatch.setattr(jnp, "bfloat16", jnp.float32)  # undone by the caller
    fn, params, args = case.build()

    def widened(tree, like):
        leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(like), strict=True)
        return jax.tree.unflatten(jax.tree.structure(like), [a.astype(b.dtype) for a, b in leaves])

    return half, (fn, widened(half[1], params), widened(half[2], args))


@pytest.mark.parametrize("row,case", pairs(names=BFLOAT16))
def test_bfloat16(row, case, subtests):
    """Against float32, lifting errs at most twice as much as merging does, give or take one rounding.

    Merging rounds the weight once, and the product. Lifting rounds each factor, each inner product and the sum, so
    it cannot be better by rule; that it is not much worse says that nothing is accumulated in bfloat16 but what the
    model itself accumulates there. One rounding is half of 2^-8 of the largest element; two are given.
    """
    with pytest.MonkeyPatch.context() as patch:
        (fn, params, args), (fn32, params32, args32) = in_float32(case, patch)
        ad32 = adapted(row, case, params32)
        far = away_from_start(ad32.trainable)
        call32, arrays32 = as_function_of_arrays(fn32, args32, case.kwargs)
        oracle = jlora.lift(call32, dense=True)
        want = outputs_and_pullback(lambda t: floats(oracle(jlora.join(t, ad32.frozen), arrays32)), far)
        assert all(a.dtype == jnp.float32 for a in jax.tree.leaves(want))
    ad = adapted(row, case, params)
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)

    def run(dense):
        lifted = jlora.lift(call, dense=dense)
        f = lambda t, frozen, arrays: outputs_and_pullback(lambda t: floats(lifted(jlora.join(t, frozen), arrays)), t)
        return jax.jit(f)(far, ad.frozen, arrays)

    for what, got, dense, exact in zip(("values", "gradients"), run(False), run(True), want, strict=True):
        with subtests.test(what):
            found = errors(dense, exact)
            largest = max(size for _, size in found)
            for (error, _), (merged, size) in zip(errors(got, exact), found, strict=True):
                size = max(size, 0.2 * largest)  # a gradient may cancel out of terms of the others' size
                assert error <= 2 * merged + HALF_EPS * size, (error, merged, size)


# Training ---------------------------------------------------------------------------------

TRAINED = ("linen/mlp", "linen/scan_axis_1_remat", "linen/tied_attend", "linen/bfloat16_params", "plain/biases",
           *BLOCKS, *VIRTUAL)  # fmt: skip


@pytest.mark.parametrize("row,case", in_turn(pairs(EVERY, TRAINED)))
def test_twenty_steps_move_what_is_trained_alone(row, case):
    """In the whole form, where the optimizer sees the frozen half: the harder one for it."""
    fn, params, args = case.build()
    ad = adapted(row, case, params)
    frozen = as_bytes(ad.frozen)
    start = jax.tree.map(np.asarray, ad.trainable)
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    lifted, tx = jlora.lift(call), jlora.masked(optax.adamw(1e-2))

    @jax.jit
    def step(ad, state, arrays):
        loss = lambda ad: sum(jnp.square(y.astype(jnp.float32) - 1).mean() for y in floats(lifted(ad, arrays)))
        updates, state = tx.update(jax.grad(loss, allow_int=True)(ad), state, ad)
        return optax.apply_updates(ad, updates), state

    state = tx.init(ad)
    for _ in range(20):
        ad, state = step(ad, state, arrays)
    assert as_bytes(ad.frozen) == frozen
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ad.trainable), jax.tree.leaves(start), strict=True):
        assert not np.array_equal(a, b), path


# Composition ------------------------------------------------------------------------------

COMPOSED = ("linen/mlp", "linen/tied_attend", "linen/convolutions", "linen/scan_axis_1_remat", "linen/vmap_experts",
            "linen/ragged_experts", "nnx/scan", "plain/scanned_vectors", *BLOCKS, *VIRTUAL)  # fmt: skip


# One row for each word of the algebra: what stands around a call knows no method.
WORDS = [row for row in EVERY if row.name in (*CHOSEN, "houlsby", "prefix_tuning", "new_tokens")]


def setting(row, case):
    """(call, arrays, frozen, trainable away from its start)"""
    fn, params, args = case.build()
    call, arrays = as_function_of_arrays(fn, args, case.kwargs)
    trainable, frozen = jlora.split(adapted(row, case, params))
    return call, arrays, frozen, away_from_start(trainable)


# JAX itself has no vmap of ragged_dot
@pytest.mark.parametrize("row,case", in_turn(pairs(EVERY, [n for n in COMPOSED if "ragged" not in n])))
def test_vmap_over_adapters(row, case):
    """Three adapters of one plan, stacked: outputs and gradients as one by one."""
    call, arrays, frozen, one = setting(row, case)
    lifted = jlora.lift(call)
    run = jax.jit(lambda t, frozen: outputs_and_pullback(lambda t: floats(lifted(jlora.join(t, frozen), arrays)), t))
    many = [jax.tree.map(lambda a, c=c: c * a, one) for c in (1.0, -0.7, 0.0)]
    stacked = jax.tree.map(lambda *a: jnp.stack(a), *many)
    together = jax.jit(jax.vmap(run, in_axes=(0, None)))(stacked, frozen)
    for n, single in enumerate(many):
        assert_close(jax.tree.map(lambda a, n=n: a[n], together), run(single, frozen))


EXAMPLES = ("linen/mlp", "linen/tied_attend", "linen/convolutions", "plain/biases", *BLOCKS, *VIRTUAL)


@pytest.mark.parametrize("row,case", in_turn(pairs(EVERY, EXAMPLES)))
def test_vmap_over_examples(row, case):
    """Mapped over examples one by one, a lifted model gives what it gives the batch."""
    call, arrays, frozen, trainable = setting(row, case)
    lifted, ad = jlora.lift(call), jlora.join(trainable, frozen)
    alone = lambda *example: floats(lifted(ad, tuple(x[None] for x in example)))
    mapped, whole = jax.jit(lambda *arrays: (jax.vmap(alone)(*arrays), floats(lifted(ad, arrays))))(*arrays)
    assert_close([y[:, 0] for y in mapped], whole)


@pytest.mark.parametrize("row,case", in_turn(pairs(EVERY, COMPOSED)))
def test_products_with_the_hessian(row, case):
    """`jvp` of `grad`, without `forward_mode`."""
    call, arrays, frozen, trainable = setting(row, case)
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), trainable)

    @jax.jit
    def product(trainable, direction):
        def run(**how):
            lifted = jlora.lift(call, **how)
            loss = lambda t: sum(jnp.square(y).mean() for y in floats(lifted(jlora.join(t, frozen), arrays)))
            return jax.jvp(jax.grad(loss), (trainable,), (direction,))

        return run(), run(**row.oracle)

    lifted, dense = product(trainable, direction)
    assert_close(lifted, dense, 2e-5)


@pytest.mark.parametrize("row,case", in_turn(pairs(names=(*COMPOSED, "linen/einsum", "linen/dense_general"))))
def test_forward_mode(row, case):
    """`jvp` where a custom rule of reverse mode would refuse."""
    call, arrays, frozen, trainable = setting(row, case)
    direction = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), trainable)

    @jax.jit
    def both(trainable, direction):
        def run(**how):
            lifted = jlora.lift(call, **how)
            return jax.jvp(lambda t: floats(lifted(jlora.join(t, frozen), arrays)), (trainable,), (direction,))

        return run(forward_mode=True), run(dense=True)

    lifted, dense = both(trainable, direction)
    assert_close(lifted, dense)


@pytest.mark.parametrize("row", each_row([row for row in EVERY if row.on != "vectors"]))
def test_jacobian_in_forward_mode(row):
    """Column by column or row by row, the Jacobian of the factors is one."""
    call, arrays, frozen, trainable = setting(row, row.home)
    f = lambda t, **how: jlora.lift(call, **how)(jlora.join(t, frozen), arrays)
    forward = jax.jit(jax.jacfwd(lambda t: f(t, forward_mode=True)))(trainable)
    assert_close(forward, jax.jit(jax.jacrev(f))(trainable))


@pytest.mark.parametrize("row,case", in_turn(pairs(EVERY, COMPOSED)))
def test_eager_equals_jit(row, case):
    """Outputs do not depend on `jit`."""
    call, arrays, frozen, trainable = setting(row, case)
    lifted, ad = jlora.lift(call), jlora.join(trainable, frozen)
    assert_close(floats(lifted(ad, arrays)), floats(jax.jit(lifted)(ad, arrays)), 2e-6)


@pytest.mark.parametrize(
    "row,case", in_turn(pairs(WORDS, ("linen/mlp", "linen/scan_axis_1_remat", "nnx/scan", *BLOCKS, *VIRTUAL)))
)
def test_inside_other_transforms(row, case):
    """A lifted call in a `lax.scan`, in a `lax.cond` and under `jax.checkpoint`."""
    call, arrays, frozen, trainable = setting(row, case)
    lifted = jlora.lift(call)
    plain = lambda t: floats(lifted(jlora.join(t, frozen), arrays))

    def looped(t):
        step = lambda carry, _: (carry, plain(t))
        return jax.tree.map(lambda y: y[0], jax.lax.scan(step, 0, None, length=2)[1])

    chosen = lambda t: jax.lax.cond(jnp.array(True), plain, lambda t: jax.tree.map(jnp.zeros_like, plain(t)), t)
    run = jax.jit(lambda t: [outputs_and_pullback(f, t) for f in (plain, looped, chosen, jax.checkpoint(plain))])
    want, *others = run(trainable)
    for got in others:
        assert_close(got, want)


@pytest.mark.parametrize("row", each_row())
def test_dense_is_merge_then_call(row):
    """`dense=True` is the plain model over merged parameters, bit for bit; these have the base's shapes and dtypes."""
    call, arrays, frozen, trainable = setting(row, row.home)
    ad = jlora.join(trainable, frozen)
    merged = jlora.merge(ad)
    assert jax.tree.structure(merged) == jax.tree.structure(frozen.base)
    same = lambda a, b: a.shape == b.shape and a.dtype == b.dtype
    assert all(jax.tree.leaves(jax.tree.map(same, merged, frozen.base)))
    assert as_bytes(jlora.lift(call, dense=True)(ad, arrays)) == as_bytes(call(merged, arrays))
    assert_close(jax.jit(jlora.merge)(ad), merged, 1e-6)


@pytest.mark.parametrize("row", each_row())
def test_merged_at_the_start_or_at_scale_zero_it_is_the_base(row):
    """`merge` gives the base's own bits at the start, and the base where `scale` has switched the adapter off."""
    _, params, _ = row.home.build()
    ad = adapted(row, row.home, params)
    assert (as_bytes(jlora.merge(ad)) == as_bytes(params)) == row.merges_to_base
    far = jlora.join(away_from_start(ad.trainable), ad.frozen)
    assert_close(jlora.merge(jlora.scale(far, 0)), params, 1e-6)


# Moves of a weight, at random ---------------------------------------------------------------


def random_model(seed):
    """A chain of moves of a weight with random axes, and a contraction: (function, weight's shape, letters, x's)."""
    rng = np.random.default_rng(seed)
    pick = lambda n: int(rng.integers(n))
    ndim = 2 + pick(3)
    shape, letters = [int(rng.choice([2, 3, 4, 6])) for _ in range(ndim)], ""
    while not {"i", "o"} <= set(letters):
        letters = "".join(rng.choice(list("ios" if ndim > 2 else "io"), ndim))
    moves, s = [], list(shape)
    for kind in rng.choice(("transpose", "split", "join", "cut", "rev", "scale", "index", "expand"), pick(6)):
        n = pick(len(s))
        if kind == "transpose":
            order = tuple(int(k) for k in rng.permutation(len(s)))
            moves.append(lambda w, order=order: lax.transpose(w, order))
            s = [s[k] for k in order]
        elif kind in ("split", "join"):
            parts = [k for k in (2, 3) if s[n] % k == 0 and s[n] > k]
            if kind == "split" and parts:
                s[n : n + 1] = [parts[0], s[n] // parts[0]]
            elif kind == "join" and len(s) > 2 and n:
                s[n - 1 : n + 1] = [s[n - 1] * s[n]]
            moves.append(lambda w, to=tuple(s): w.reshape(to))
        elif kind == "cut" and s[n] > 2:
            s[n] -= 1
            if pick(2):
                moves.append(lambda w, n=n, size=s[n]: lax.dynamic_slice_in_dim(w, jnp.array(1), size, axis=n))
            else:
                moves.append(lambda w, n=n, size=s[n]: lax.slice_in_dim(w, 0, size, axis=n))
        elif kind == "rev":
            moves.append(lambda w, n=n: lax.rev(w, (n,)))
        elif kind == "scale":
            moves.append(lambda w: -0.7 * w)
        elif kind == "index" and len(s) > 2:
            k = pick(s.pop(n))
            moves.append(lambda w, n=n, k=k: lax.index_in_dim(w, k, n, keepdims=False))
        elif kind == "expand":
            s.insert(n, 1)
            moves.append(lambda w, n=n: lax.expand_dims(w, (n,)))
    axes = [int(k) for k in rng.permutation(len(s))]
    count = 1 + pick(max(1, len(s) - 1))
    batch = pick(2) if len(s) > count else 0
    names = [("w", k) for k in axes[: count + batch]] + [("free", int(rng.choice([1, 3, 5]))) for _ in range(pick(3))]
    names = [names[k] for k in rng.permutation(len(names))]
    place = lambda ks: [names.index(("w", k)) for k in ks]
    w_axes = axes[:count], axes[count : count + batch]
    x_axes = tuple(map(place, w_axes))
    left = pick(2)

    def f(params, x):
        w = params["w"]
        for move in moves:
            w = move(w)
        numbers = tuple(zip(w_axes, x_axes, strict=True) if left else zip(x_axes, w_axes, strict=True))
        return lax.dot_general(*((w, x) if left else (x, w)), numbers)

    return f, shape, letters, [s[k] if kind == "w" else k for kind, k in names]


# The letters here are any: what `lift` says of them is true, and the numbers are right whatever they are.
any_letters = pytest.mark.filterwarnings("ignore::jlora.RolesWarning")


@any_letters
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 10 else pytest.mark.slow) for n in range(100)])
def test_random_moves(seed):
    """Whatever the labels went through: lifted equals dense in value and in both gradients."""
    f, shape, letters, x_shape = random_model(seed)
    x, w = (jnp.asarray(np.random.default_rng(seed + n).standard_normal(s), jnp.float32)
            for n, s in enumerate((x_shape, shape)))  # fmt: skip
    ad = jlora.adapt({"w": w}, jlora.LoRA(rank=1, alpha=3, target="w"), axes={"w": letters})

    @jax.jit
    def program(trainable, frozen, x):
        def run(dense):
            lifted = jlora.lift(f, dense=dense)
            return outputs_and_pullback(lambda tx: [lifted(jlora.join(tx[0], frozen), tx[1])], (trainable, x))

        return run(False), run(True)

    lifted, dense = program(away_from_start(ad.trainable), ad.frozen, x)
    assert_close(lifted, dense)
    assert not jlora.explain(f, ad, x).unused


def random_convolution(seed):
    """Any layout, stride, padding, dilation and grouping; every fifth with letters that are wrong."""
    rng = np.random.default_rng(seed)
    pick = lambda n: 1 + int(rng.integers(n))
    space, groups = pick(3), int(rng.choice([1, 1, 2, 3]))
    into, out = groups * pick(3), groups * pick(4)
    order = lambda: [int(k) for k in rng.permutation(space + 2)]
    kernel, lhs, result = order(), order(), order()
    inverse = lambda order: tuple(order.index(k) for k in range(space + 2))
    arranged = lambda items, order: [items[k] for k in order]
    shape = arranged([out, into // groups, *(pick(3) for _ in range(space))], kernel)
    letters = "".join(arranged("oi" + "k" * space, kernel))
    if seed % 5 == 0:
        letters = "".join(rng.choice(list("iosk"), space + 2))
    x_shape = arranged([2, into, *(3 + pick(3) for _ in range(space))], lhs)
    numbers = lax.ConvDimensionNumbers(inverse(lhs), inverse(kernel), inverse(result))
    each = lambda n: [pick(n) for _ in range(space)]
    padding = list(zip(each(2), each(2), strict=True))
    options = dict(lhs_dilation=each(2), rhs_dilation=each(2), dimension_numbers=numbers, feature_group_count=groups)
    strides = each(2)
    return lambda p, x: lax.conv_general_dilated(x, p["w"], strides, padding, **options), shape, letters, x_shape


@any_letters
@pytest.mark.parametrize("seed", [pytest.param(n, marks=() if n < 6 else pytest.mark.slow) for n in range(40)])
def test_random_convolutions(seed):
    """Any layout, stride, padding, dilation and grouping: lifted equals dense in value and gradient."""
    f, shape, letters, x_shape = random_convolution(seed)
    x = jnp.asarray(np.random.default_rng(seed).standard_normal(x_shape), jnp.float32)
    for spec in (jlora.LoRA(rank=1, alpha=3, target="w"), jlora.Full(target="w")):
        if isinstance(spec, jlora.Full) or ("o" in letters and set("ik") & set(letters)):
            against_dense(f, shape, letters, x, spec=spec)


def against_dense(f, shape, letters, *args, spec=None):
    """Lifted and dense, in value and gradient, for one weight."""
    spec = jlora.LoRA(rank=2, alpha=3, target="w") if spec is None else spec
    w = jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)
    ad = jlora.adapt({"w": w}, spec, axes={"w": letters})

    @jax.jit
    def program(trainable, frozen):
        run = lambda dense: lambda t: [jlora.lift(f, dense=dense)(jlora.join(t, frozen), *args)]
        return outputs_and_pullback(run(False), trainable), outputs_and_pullback(run(True), trainable)

    assert_close(*program(away_from_start(ad.trainable), ad.frozen))


@any_letters
def test_a_convolution_whose_input_axis_is_called_a_stack():
    """A wrong letter costs speed, never the answer."""
    f = lambda p, x: lax.conv_general_dilated(x, p["w"], (1, 1), "SAME")
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 1, 4, 4)), jnp.float32)
    against_dense(f, (2, 1, 3, 2), "oskk", x, spec=jlora.Full(target="w"))


@any_letters
def test_an_axis_that_joins_two_beside_one_of_size_one():
    """As many labels as axes, and yet not one for each."""

    def f(p, x):
        w = lax.expand_dims(p["w"].reshape(2, 4, 2), (2,))
        return lax.dot_general(w, x, (([3], [1]), ([0], [3])))

    against_dense(f, (2, 2, 2, 2), "iois", jnp.ones((5, 2, 5, 2)))


def test_a_matrix_of_one_column_that_is_used_as_a_vector():
    """The column's axis is part of a side that the equation makes as a whole, and leaves with a reshape."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6)), jnp.float32)
    against_dense(lambda p, x: x @ p["w"].reshape(6), (6, 1), "io", x, spec=jlora.KronA(factors=(2, 1), target="w"))


def test_rows_out_of_range_that_are_masked_later():
    """`jnp.take` fills them with NaN, which no gradient must see."""
    ids = jnp.array([[0, 9], [12, 3]])
    f = lambda p, ids: jnp.where((ids < 10)[..., None], jnp.take(p["w"], ids, axis=0), 0)
    against_dense(f, (10, 4), "io", ids)


def test_an_operand_that_another_one_absorbs():
    """`m, m r I, n, n r O`, mixtures of bases on either side, on a convolution and on experts: chains, never dense."""

    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mixture(jlora.methods.Method):
        def recipe(self, leaf):
            arrays = tuple(network.Array(name, jax.nn.initializers.normal()) for name in "cadb")
            sizes = (("r", 2), ("m", 3), ("n", 2))
            return network.Recipe((network.Delta("m, m r I, n, n r O -> I O", arrays, sizes),))

    conv = lambda p, x: lax.conv_general_dilated(x, p["w"], (1,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
    against_dense(conv, (3, 4, 5), "kio", jnp.ones((2, 6, 4)), spec=Mixture(target="w"))
    experts = lambda p, x: lax.ragged_dot(x, p["w"], jnp.array([2, 0, 3]))
    against_dense(experts, (3, 6, 4), "sio", jnp.ones((5, 6)), spec=Mixture(target="w"))
    for f, shape, letters, x in ((conv, (3, 4, 5), "kio", (2, 6, 4)), (experts, (3, 6, 4), "sio", (5, 6))):
        ad = jlora.adapt({"w": jnp.ones(shape)}, Mixture(target="w"), axes={"w": letters})
        assert not jlora.explain(f, ad, jnp.ones(x)).dense


def test_complex_activations():
    """A complex activation meets a real weight: lifted equals dense in value and gradient."""
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 6)), jnp.float32)
    against_dense(lambda p, x: jnp.abs((x + 1j * jnp.flip(x)) @ p["w"]), (6, 4), "io", x)


@pytest.mark.parametrize("mode", ["fill", "clip", "wrap"])
@pytest.mark.parametrize("axis", [0, 1])
def test_modes_of_a_lookup(axis, mode):
    """Rows out of range are filled, clipped or counted from the end as the model's own mode says."""
    ids = jnp.array([[0, 5], [-3, 2]]) if mode == "fill" else jnp.array([[0, 5], [-3, 22]])
    f = lambda p, ids: jnp.take(p["w"], ids, axis=axis, mode=mode)
    against_dense(f, (10, 6) if axis == 0 else (6, 10), "io" if axis == 0 else "oi", ids)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_that_are_mapped_one_by_one_are_a_lookup(axis):
    """`vmap` of `table[i]` has a start for every axis, and makes no table for it."""
    ids = jnp.array([[0, 5], [3, 22]])
    f = lambda p, ids: jax.vmap(jax.vmap(lambda n: lax.dynamic_index_in_dim(p["w"], n, axis, False)))(ids)
    shape, letters = ((10, 6), "io") if axis == 0 else ((6, 10), "oi")
    against_dense(f, shape, letters, ids)
    ad = jlora.adapt({"w": jnp.ones(shape)}, jlora.LoRA(rank=2, target="w"), axes={"w": letters})
    assert not jlora.explain(f, ad, ids).dense


@pytest.mark.parametrize("spec", [jlora.KronA(factors=(2, 3)), jlora.GraLoRA(rank=2), jlora.MiSS(rank=5, mini=3)])
def test_rows_of_a_flat_side_are_looked_up_letter_by_letter(spec):
    """Where rows are `(i j)` the table is not made, and rows out of range are what the model's own mode makes them."""
    ids = jnp.array([[0, 5], [-3, 22]], jnp.int8)

    def f(p, ids):
        filled = jnp.where((ids < 10)[..., None], jnp.take(p["w"], ids, axis=0, mode="fill"), 0)
        return jnp.stack([filled, *(jnp.take(p["w"], ids, axis=0, mode=mode) for mode in ("clip", "wrap"))])

    spec = dataclasses.replace(spec, target="w")
    against_dense(f, (10, 6), "io", ids, spec=spec)
    assert not jlora.explain(f, jlora.adapt({"w": jnp.ones((10, 6))}, spec, axes={"w": "io"}), ids).dense


@pytest.mark.parametrize("spec", [jlora.IA3(target="w"), jlora.RoAd(target="w"), jlora.KronA(target="w")])
def test_a_row_that_is_not_there_is_no_number(spec):
    """`jnp.take` fills it with NaN, also where something multiplies W0."""
    ad = jlora.adapt({"w": jnp.ones((10, 6))}, spec, axes={"w": "io"})
    rows = jlora.lift(lambda p: jnp.take(p["w"], jnp.array([9, 10]), axis=0))(ad)
    assert np.isfinite(rows[0]).all() and np.isnan(rows[1]).all()


# Several adapters -------------------------------------------------------------------------


def test_several_adapters_in_one_call():
    """An encoder and a decoder in a tuple, one of them again under a keyword, and a plain tree beside them."""
    tree = lambda n: {"w": jnp.asarray(np.random.default_rng(n).standard_normal((6, 6)), jnp.float32)}
    ads = [jlora.adapt(tree(n), jlora.LoRA(rank=2, target="w")) for n in range(2)]
    ads = [jlora.Adapted(away_from_start(ad.trainable, 0.3 + n), ad.frozen) for n, ad in enumerate(ads)]

    def f(both, x, plain, *, memory):
        encoder, decoder = both["models"]
        return jnp.tanh(x @ encoder["w"]) @ decoder["w"] + x @ memory["w"] + x @ plain["w"], both["name"]

    x = jnp.ones((3, 6))

    def run(dense):
        lifted = jlora.lift(f, dense=dense)
        call = lambda one, other: lifted({"models": (one, other), "name": "pair"}, x, tree(2), memory=one)
        y, name = call(*ads)
        assert name == "pair"
        return y, jax.grad(lambda t: call(*[jlora.join(a, ad.frozen) for a, ad in zip(t, ads, strict=True)])[0].sum())(
            [ad.trainable for ad in ads]
        )

    assert_close(run(False), run(True))


# What is static ---------------------------------------------------------------------------


def matrices(**options):
    params = {"query": {"kernel": jnp.ones((6, 4))}, "value": {"kernel": jnp.ones((6, 4))}}
    return jlora.adapt(params, jlora.LoRA(rank=2, **options))


def traced_once():
    """A jitted lifted function that fails when it is traced a second time."""
    forward = lambda params, x: x @ params["query"]["kernel"] + x @ params["value"]["kernel"]
    return jax.jit(chex.assert_max_traces(jlora.lift(forward), n=1))


def test_calling_twice_compiles_once():
    """Other values, halves joined anew, an equal adapter or another scale trace nothing again."""
    chex.clear_trace_counter()
    f, x = traced_once(), jnp.ones((3, 6))
    ad = matrices()
    f(ad, x)
    f(ad, x + 1)
    f(jlora.join(*jlora.split(ad)), x)
    f(matrices(), x)  # adapted again: an equal plan is the same plan
    f(jlora.scale(ad, 0.5), x)
    assert f._cache_size() == 1


@pytest.mark.parametrize(
    "options", [{"alpha": 7}, {"alpha": 16, "scaling": "sqrt"}, {"init": "gaussian"}], ids=lambda o: str(o)
)
def test_what_is_data_shares_a_program(options):
    """Alpha, its rule and the initialiser are numbers: no recompilation, and the outputs differ."""
    chex.clear_trace_counter()
    f, x = traced_once(), jnp.ones((3, 6))
    adapters = matrices(alpha=2), matrices(**options)
    one, other = (jlora.Adapted(away_from_start(ad.trainable), ad.frozen) for ad in adapters)
    differ = as_bytes(f(one, x)) != as_bytes(f(other, x))
    assert differ == (float(other.frozen.factors["query/kernel"]["s"]) != 1.0)


def test_equal_specs_are_one_plan():
    """Equal methods on equal trees give one plan object, through copies and pickles; what is data is no part of it."""
    plan = matrices().frozen.plan
    assert matrices().frozen.plan is plan
    assert matrices(alpha=3, init="gaussian").frozen.plan is plan
    assert matrices(dropout=0.5).frozen.plan is not plan
    assert copy.deepcopy(plan) is plan
    assert pickle.loads(pickle.dumps(jlora.BitFit())) == jlora.BitFit()
    tree = {"bias": jnp.ones(3)}
    assert jlora.adapt(tree, jlora.BitFit()).frozen.plan is jlora.adapt(tree, jlora.BitFit()).frozen.plan
    assert jax.tree.structure(matrices()) == jax.tree.structure(matrices(alpha=5))
    assert hash(jax.tree.structure(matrices())) == hash(jax.tree.structure(matrices(alpha=5)))


def test_the_initial_value_depends_on_key_and_path_alone():
    """Other targets change no factor; another key or path changes it."""
    params = {"query": {"kernel": jnp.ones((6, 4))}, "value": {"kernel": jnp.ones((6, 4))}}
    both = jlora.adapt(params, jlora.LoRA(rank=2)).trainable
    one = jlora.adapt(params, jlora.LoRA(rank=2, target="value")).trainable
    assert as_bytes(one["value/kernel"]) == as_bytes(both["value/kernel"])
    assert as_bytes(both["value/kernel"]) != as_bytes(both["query/kernel"])
    other = jlora.adapt(params, jlora.LoRA(rank=2), key=jax.random.key(1)).trainable
    assert as_bytes(other["value/kernel"]) != as_bytes(both["value/kernel"])


def test_donation():
    """The trainable half alone is donated: it shares no buffer with the frozen one, which lives on."""
    ad = matrices()
    trainable, frozen = jlora.split(ad)
    pointers = lambda tree: {a.unsafe_buffer_pointer() for a in jax.tree.leaves(tree)}
    assert not pointers(trainable) & pointers(frozen)
    lifted = jlora.lift(lambda params, x: x @ params["query"]["kernel"] + x @ params["value"]["kernel"])
    x = jnp.ones((3, 6))

    def step(trainable, frozen):
        grads = jax.grad(lambda t: jnp.square(lifted(jlora.join(t, frozen), x) - 1).mean())(trainable)
        return jax.tree.map(lambda a, g: a - 0.1 * g, trainable, grads)

    start = jax.tree.map(jnp.copy, trainable)
    kept, donated = jax.jit(step), jax.jit(step, donate_argnums=0)
    want = kept(kept(start, frozen), frozen)
    got = donated(donated(trainable, frozen), frozen)
    assert all(a.is_deleted() for a in jax.tree.leaves(trainable))
    assert not any(a.is_deleted() for a in jax.tree.leaves(frozen))
    assert as_bytes(got) == as_bytes(want)


def test_base_may_be_stopped_or_differentiated_around():
    """Gradients stop at the frozen half, whoever asks for them."""
    ad = matrices()
    ad = jlora.Adapted(away_from_start(ad.trainable), ad.frozen)
    lifted = jlora.lift(lambda params, x: x @ params["query"]["kernel"] + x @ params["value"]["kernel"])
    grads, dx = jax.grad(lambda ad, x: jnp.sin(lifted(ad, x)).sum(), argnums=(0, 1))(ad, jnp.ones((3, 6)))
    assert not any(np.any(a) for a in jax.tree.leaves(grads.frozen))
    assert all(np.any(a) for a in jax.tree.leaves(grads.trainable)) and np.any(dx)
