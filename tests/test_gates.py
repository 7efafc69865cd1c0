"""Gates: a delta times an array of the positions that its weight meets, given with each call."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jlora
from jlora import methods
from jlora.network import Array, Delta, Gate, Recipe

S = 1.5  # alpha / rank


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def lora(target="w", **options):
    return jlora.LoRA(rank=2, alpha=3, target=target, **options)


def adapted(method, shape=(6, 4), roles="io"):
    """One weight under a method, its factors away from their start."""
    made = jlora.adapt({"w": jnp.asarray(drawn(0, *shape))}, method, axes={"w": roles})
    leaves, form = jax.tree.flatten(made.trainable)
    return jlora.join(form.unflatten([jnp.asarray(drawn(n + 10, *x.shape)) for n, x in enumerate(leaves)]), made.frozen)


def matrix(params, x):
    return x @ params["w"]


@dataclasses.dataclass(frozen=True)
class Kind:
    """One way in which a model meets a weight, in JAX, and in NumPy at every position.

    Attributes:
      shape, roles: of the weight.
      x: the shape of the activation, or the indices themselves.
      model: the JAX function.
      output: `(W, x) -> y`, linear in W; for a stack of layers `(W0, dW, x, g) -> y`.
      gate: the shape of the gate.
      spread: how the gate stands in the axes of y.
    """

    shape: tuple[int, ...]
    roles: str
    x: Any
    model: Callable[[Any, Any], Any]
    output: Callable[..., np.ndarray]
    gate: tuple[int, ...] = (2, 5)
    spread: Callable[[np.ndarray], np.ndarray] = lambda g: g[..., None]

    def activation(self):
        return self.x if isinstance(self.x, np.ndarray) else drawn(1, *self.x)

    def by_hand(self, w0, dw, x, g):
        """y[p] = x[p] (W0 + g[p] dW)."""
        if self.roles[0] == "s" and self.shape[0] == 3:
            return self.output(w0, dw, x, g)
        base = self.output(w0, x)
        return base + self.spread(g) * (self.output(w0 + dw, x) - base)


def turns(w0, dw, x, g):
    for w, d in zip(w0, dw, strict=True):
        x = x + x @ w + g[..., None] * (x @ d)
    return x


def convolved(w, x, stride=1):
    """(n, h, w, c) with a window (a, b, c, o), without padding."""
    a, b = w.shape[:2]
    rows, columns = (x.shape[1] - a) // stride + 1, (x.shape[2] - b) // stride + 1
    at = lambda r, c: x[:, r * stride : r * stride + a, c * stride : c * stride + b]
    y = [[np.tensordot(at(r, c), w, ((1, 2, 3), (0, 1, 2))) for c in range(columns)] for r in range(rows)]
    return np.stack([np.stack(row, 1) for row in y], 1)


def convolution(stride):
    numbers = {"dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    return lambda p, x: lax.conv_general_dilated(x, p["w"], (stride, stride), "VALID", **numbers)


def looked_up_and_tied(params, ids):
    return jnp.einsum("bti,vi->btv", jnp.take(params["w"], ids, axis=0), params["w"][:4])


IDS = np.random.default_rng(3).integers(0, 10, (2, 5))
KINDS = {
    "a dot": Kind((6, 4), "io", (2, 5, 6), matrix, lambda w, x: x @ w),
    "batch alone": Kind((6, 4), "io", (2, 5, 6), matrix, lambda w, x: x @ w, (2,), lambda g: g[:, None, None]),
    "the weight on the left": Kind(
        (6, 4), "io", (2, 5, 6), lambda p, x: lax.dot_general(p["w"], x, (((0,), (2,)), ((), ()))),
        lambda w, x: np.einsum("io,bti->obt", w, x), spread=lambda g: g,
    ),
    "into heads": Kind(
        (6, 2, 3), "ioo", (2, 5, 6), lambda p, x: jnp.einsum("bti,ihd->bthd", x, p["w"]),
        lambda w, x: np.einsum("bti,ihd->bthd", x, w), spread=lambda g: g[..., None, None],
    ),
    "out of heads": Kind(
        (2, 3, 4), "iio", (2, 5, 2, 3), lambda p, x: jnp.einsum("bthd,hdo->bto", x, p["w"]),
        lambda w, x: np.einsum("bthd,hdo->bto", x, w),
    ),
    "experts by vmap": Kind(
        (2, 6, 4), "sio", (2, 2, 5, 6), lambda p, x: jax.vmap(lambda x, w: x @ w)(x, p["w"]),
        lambda w, x: np.einsum("ebti,eio->ebto", x, w), spread=lambda g: g[None, ..., None],
    ),
    "examples by vmap": Kind(
        (6, 4), "io", (2, 5, 6), lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), lambda w, x: x @ w
    ),
    "batch and sequence joined": Kind(
        (6, 4), "io", (2, 5, 6), lambda p, x: (x.reshape(10, 6) @ p["w"]).reshape(2, 5, 4), lambda w, x: x @ w
    ),
    "one axis split in two": Kind(
        (6, 4), "io", (2, 5, 6), matrix, lambda w, x: x @ w, (10,), lambda g: g.reshape(2, 5, 1)
    ),
    "a scan with remat": Kind(
        (3, 6, 6), "sio", (2, 5, 6),
        lambda p, x: lax.scan(jax.checkpoint(lambda x, w: (x + x @ w, None)), x, p["w"])[0], turns,
    ),
    "layers under jit": Kind(
        (3, 6, 6), "sio", (2, 5, 6),
        lambda p, x: functools.reduce(lambda x, w: jax.jit(lambda x, w: x + x @ w)(x, w), p["w"], x), turns,
    ),
    "a lookup": Kind((10, 4), "io", IDS, lambda p, ids: p["w"][ids], lambda w, ids: w[ids]),
    "a convolution": Kind(
        (2, 3, 3, 4), "kkio", (2, 4, 5, 3), convolution(1), convolved, (2, 3, 3)
    ),
    "a strided convolution, batch alone": Kind(
        (2, 2, 3, 4), "kkio", (2, 5, 5, 3), convolution(2), functools.partial(convolved, stride=2), (2,),
        lambda g: g[:, None, None, None],
    ),
}  # fmt: skip


def update(trainable, roles):
    """s a b in the axes of the weight, of each layer, in float64."""
    a, b = (np.asarray(trainable["w"][n], np.float64) for n in "ab")
    pair = lambda a, b: S * np.tensordot(a, b, (0, 0))
    return np.stack(list(map(pair, a, b))) if roles[0] == "s" else pair(a, b)


def slopes(f, x, step=1e-5):
    """df / d(each element), by central differences."""
    found = np.zeros_like(x)
    for at in np.ndindex(x.shape):
        up, down = x.copy(), x.copy()
        up[at] += step
        down[at] -= step
        found[at] = (f(up) - f(down)) / (2 * step)
    return found


def close(got, want, tolerance=2e-5):
    np.testing.assert_allclose(got, want, atol=tolerance * max(1.0, float(np.abs(want).max())), rtol=0)


@pytest.mark.parametrize("name", KINDS)
def test_each_position_meets_a_weight_of_its_own(name):
    """y[p] = x[p] (W0 + g[p] dW), and its gradients for x, the factors and g, against float64 NumPy."""
    kind = KINDS[name]
    ad = adapted(jlora.Gated(lora()), kind.shape, kind.roles)
    x, g = kind.activation(), drawn(2, *kind.gate)
    w0 = np.asarray(ad.frozen.base["w"], np.float64)
    factors = {n: np.asarray(a, np.float64) for n, a in ad.trainable["w"].items()}
    hand = lambda factors, x, g: kind.by_hand(w0, update({"w": factors}, kind.roles), x, g)
    wide = x if x.dtype.kind == "i" else x.astype(np.float64)
    want = hand(factors, wide, g.astype(np.float64))
    c = drawn(4, *want.shape)

    def run(trainable, x, g):
        return jlora.lift(kind.model)(jlora.with_gates(jlora.join(trainable, ad.frozen), active=g), x)

    @jax.jit
    def both(trainable, x, g):
        if jnp.issubdtype(x.dtype, jnp.integer):
            y, pull = jax.vjp(lambda t, g: run(t, x, g), trainable, g)
            t, g = pull(c)
            return y, t, None, g
        y, pull = jax.vjp(run, trainable, x, g)
        return y, *pull(c)

    y, trained, of_x, of_g = both(ad.trainable, x, g)
    close(y, want)
    loss = lambda factors, x, g: float(np.sum(c * hand(factors, x, g)))
    close(of_g, slopes(lambda g: loss(factors, wide, g), g.astype(np.float64)))
    if of_x is not None:
        close(of_x, slopes(lambda x: loss(factors, x, g), wide))
    for n in "ab":
        close(trained["w"][n], slopes(lambda a, n=n: loss(factors | {n: a}, wide, g), factors[n]))


@pytest.mark.parametrize("name", ["a dot", "a scan with remat", "a lookup", "a convolution"])
def test_ones_are_the_method_and_zeros_the_base(name):
    """A gate of ones gives what the method alone gives, to rounding; zeros give the base bit for bit."""
    kind = KINDS[name]
    ad = adapted(jlora.Gated(lora()), kind.shape, kind.roles)
    alone = jlora.join(ad.trainable, adapted(lora(), kind.shape, kind.roles).frozen)
    x = kind.activation()
    run = jax.jit(lambda ad, x, g: jlora.lift(kind.model)(jlora.with_gates(ad, active=g), x))
    close(run(ad, x, jnp.ones(kind.gate)), jax.jit(jlora.lift(kind.model))(alone, x))
    plain = jax.jit(kind.model)(ad.frozen.base, x)
    assert np.array_equal(run(ad, x, jnp.zeros(kind.gate)), plain)


@pytest.mark.parametrize(
    "shape", [(), (1,), (2,), (1, 1), (2, 1), (1, 5), (2, 5)], ids=lambda shape: "x".join(map(str, shape)) or "scalar"
)
def test_an_axis_of_size_one_stands_for_any(shape):
    """Positions are read from the left; none, or one of size one, is the same for all."""
    ad, x, g = adapted(jlora.Gated(lora())), drawn(1, 2, 5, 6), drawn(2, *shape)
    w0, dw = np.asarray(ad.frozen.base["w"]), update(ad.trainable, "io")
    full = np.broadcast_to(g.reshape(*shape, *[1] * (2 - len(shape))), (2, 5))
    close(jlora.lift(matrix)(jlora.with_gates(ad, active=g), x), x @ w0 + full[..., None] * (x @ dw))


@pytest.mark.parametrize(
    "method",
    [
        lora(), jlora.AdaLoRA(rank=2, target="w"), jlora.LoHa(rank=2, target="w"), jlora.KronA(target="w"),
        jlora.LoKr(rank=1, target="w"), jlora.VeRA(rank=3, target="w"), jlora.HiRA(rank=2, target="w"),
        jlora.MiSS(rank=2, target="w"), jlora.C3A(block=2, target="w"), jlora.Full(target="w"),
        jlora.FourierFT(n=6, target="w"), jlora.Sum(lora(), jlora.KronA(target="w")),
    ],
    ids=lambda method: method.describe(),
)  # fmt: skip
def test_any_method_that_adds_is_gated_alike(method):
    """x W0 + g (x dW), dW what the method alone merges; an axis that the dot cuts is no exception."""
    ad, x, g = adapted(jlora.Gated(method)), drawn(1, 2, 5, 6), drawn(2, 2, 5)
    w0 = np.asarray(ad.frozen.base["w"], np.float64)
    merged = jlora.merge(jlora.Adapted(ad.trainable, dataclasses.replace(ad.frozen, plan=adapted(method).frozen.plan)))
    dw = np.asarray(merged["w"], np.float64) - w0
    halves = lambda p, x: x[..., :3] @ p["w"][:3] + x[..., 3:] @ p["w"][3:]
    for model in (matrix, halves):
        y = jax.jit(jlora.lift(model))(jlora.with_gates(ad, active=g), x)
        close(y, x @ w0 + g[..., None] * (x @ dw))


def test_a_gate_under_a_gain_and_a_rotation():
    """gain * (W0 + g dW), and R^T (W0 + g dW): what rescales and turns meets the gated weight."""
    x, g = drawn(1, 2, 5, 6), drawn(2, 2, 5)
    for outer in (jlora.IA3(target="w"), jlora.OFT(block=2, target="w")):
        ad = adapted(jlora.Sum(jlora.Gated(lora()), outer))
        y = jlora.lift(matrix)(jlora.with_gates(ad, active=g), x)
        at = lambda value: np.asarray(jlora.merge(jlora.with_gates(ad, active=value))["w"], np.float64)  # noqa: B023
        close(y, x @ at(0.0) + g[..., None] * (x @ (at(1.0) - at(0.0))))


# --- letters of its own: a bank of adapters ---------------------------------------------------


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bank(methods.base.LowRank):
    """W = W0 + s sum_n g[n] a_n b_n: n adapters, and how much of each."""

    count: int = 3

    def delta(self, leaf):
        a, b = Array("a", methods.base.normal(1.0)), Array("b", methods.base.zeros)
        sizes = (("n", self.count), ("r", self.rank))
        return Delta("n r I, n r O, n -> I O", (a, b, Gate("adapter")), sizes, self.scale, ("r",))


@pytest.mark.parametrize("positions", [(2,), (2, 5)], ids=["an example", "a position"])
def test_a_choice_among_adapters_is_each_adapter_alone(positions):
    """With a gate that is one-hot, every example (or position) gets what its own adapter alone gives."""
    ad, x = adapted(Bank(rank=2, alpha=3, target="w")), drawn(1, 2, 5, 6)
    chosen = np.random.default_rng(7).integers(0, 3, positions)
    gates = {"adapter": jax.nn.one_hot(chosen, 3)}
    y = jax.jit(lambda ad, x, gates: jlora.lift(matrix)(jlora.with_gates(ad, **gates), x))(ad, x, gates)
    one = lambda n: jlora.merge(jlora.with_gates(ad, adapter=jax.nn.one_hot(n, 3)))
    every = np.stack([x @ one(n)["w"] for n in range(3)])
    full = np.broadcast_to(chosen.reshape(*positions, *[1] * (3 - len(positions))), y.shape)
    close(y, np.take_along_axis(every, full[None], 0)[0])


@pytest.mark.parametrize("name", ["into heads", "a lookup", "a convolution", "a scan with remat"])
def test_letters_of_a_gate_are_summed_wherever_it_stands(name):
    """sum_n g[p, n] (x dW_n) in a dot with heads, a lookup, a convolution and a scan."""
    kind = KINDS[name]
    ad, x = adapted(Bank(rank=2, alpha=3, target="w"), kind.shape, kind.roles), kind.activation()
    g = drawn(2, *kind.gate, 3)
    y = jax.jit(lambda ad, x, g: jlora.lift(kind.model)(jlora.with_gates(ad, adapter=g), x))(ad, x, g)
    one = lambda n: {"w": {k: v[..., n, :, :] if kind.roles[0] == "s" else v[n] for k, v in ad.trainable["w"].items()}}
    if kind.roles[0] == "s":
        one = lambda n: {"w": {k: v[:, n] for k, v in ad.trainable["w"].items()}}
    w0 = np.asarray(ad.frozen.base["w"], np.float64)
    dws = [update(one(n), kind.roles) for n in range(3)]
    if kind.roles[0] == "s":
        want = x
        for layer in range(3):
            want = want + want @ w0[layer] + sum(g[..., n, None] * (want @ dws[n][layer]) for n in range(3))
    else:
        base = kind.output(w0, x)
        want = base + sum(kind.spread(g[..., n]) * (kind.output(w0 + dws[n], x) - base) for n in range(3))
    close(y, want)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedBank(methods.base.LowRank):
    """W = W0 + s (sum_n g[n] a_n) diag(d) b: the input side alone has the letter of the gate."""

    def delta(self, leaf):
        a, d, b = (Array(name, methods.base.normal(1.0)) for name in "adb")
        sizes = (("n", 3), ("r", self.rank))
        return Delta("n r I, r, r O, n -> I O", (a, d, b, Gate("adapter")), sizes, self.scale)


def test_a_letter_of_one_side_and_the_gate_is_kept_until_they_meet():
    """What is joined on one side of the product, a and d, keeps the letter that the gate has."""
    ad, x, g = adapted(SharedBank(rank=2, alpha=3, target="w")), drawn(1, 2, 5, 6), drawn(2, 2, 5, 3)
    a, d, b = (np.asarray(ad.trainable["w"][n], np.float64) for n in "adb")
    want = x @ np.asarray(ad.frozen.base["w"]) + S * np.einsum("btn,bti,nri,r,ro->bto", g, x, a, d, b)
    close(jlora.lift(matrix)(jlora.with_gates(ad, adapter=g), x), want)


def test_a_router_is_trained_through_its_gate():
    """A mixture g = softmax(x v) gives v a gradient, that of central differences; the base gets none."""
    ad, x = adapted(Bank(rank=2, alpha=3, target="w")), drawn(1, 2, 5, 6)
    v, c = drawn(2, 6, 3), drawn(3, 2, 5, 4)

    def loss(v, frozen):
        gates = jax.nn.softmax(x @ v)
        mixed = jlora.with_gates(jlora.join(ad.trainable, frozen), adapter=gates)
        return jnp.sum(c * jlora.lift(matrix)(mixed, x))

    a, b = (np.asarray(ad.trainable["w"][n], np.float64) for n in "ab")

    def by_hand(v):
        logits = x @ v
        g = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        return np.sum(c * (S * np.einsum("btn,bti,nri,nro->bto", g, x, a, b)))

    of_v, of_frozen = jax.grad(loss, (0, 1), allow_int=True)(v, ad.frozen)
    close(of_v, slopes(by_hand, v.astype(np.float64)))
    assert not np.any(of_frozen.base["w"])


# --- with everything else ------------------------------------------------------------------------


def test_bfloat16_keeps_its_dtype():
    """The result has the dtype of the model's dot; where the gate is zero it is the base's bits."""
    ad = adapted(jlora.Gated(lora()))
    ad = dataclasses.replace(
        ad, frozen=dataclasses.replace(ad.frozen, base={"w": ad.frozen.base["w"].astype("bfloat16")})
    )
    x, g = jnp.asarray(drawn(1, 2, 5, 6), "bfloat16"), np.random.default_rng(5).random((2, 5)) < 0.5
    y = jax.jit(lambda ad, x: jlora.lift(matrix)(ad, x))(jlora.with_gates(ad, active=g), x)
    plain = jax.jit(matrix)(ad.frozen.base, x)
    full = np.asarray(plain, np.float64) + g[..., None] * (np.asarray(x, np.float64) @ update(ad.trainable, "io"))
    assert y.dtype == jnp.bfloat16 and np.array_equal(y[~g], plain[~g])
    np.testing.assert_allclose(np.asarray(y, np.float64), full, atol=2.0**-6 * np.abs(full).max())


def test_dropout_and_a_gate_multiply():
    """With one key, the gated branch is the gate times the branch: masks do not depend on the gate."""
    ad, x, g = adapted(jlora.Gated(lora(dropout=0.4, rank_dropout=0.3))), drawn(1, 2, 5, 6), drawn(2, 2, 5)
    ad = jlora.with_dropout(ad, jax.random.key(3))
    run = jax.jit(lambda g: jlora.lift(matrix)(jlora.with_gates(ad, active=g), x))
    base = run(jnp.zeros((2, 5)))
    close(run(g), base + g[..., None] * (run(jnp.ones((2, 5))) - base))


def test_forward_mode():
    """The function is linear in the gate, so that its derivative along h is x dW h."""
    ad, x, h = adapted(jlora.Gated(lora())), drawn(1, 2, 5, 6), drawn(2, 2, 5)
    run = lambda g: jlora.lift(matrix, forward_mode=True)(jlora.with_gates(ad, active=g), x)
    _, along = jax.jvp(run, (jnp.ones((2, 5)),), (jnp.asarray(h),))
    close(along, h[..., None] * (x @ update(ad.trainable, "io")))


def test_a_quantised_base():
    """Of codes, W0 is what they stand for: as over that array."""
    params = {"query": {"kernel": jnp.asarray(drawn(0, 64, 64))}}
    quantised = jlora.quantize(params)
    x, g, method = drawn(1, 2, 5, 64), drawn(2, 2, 5), jlora.Gated(lora("query"))
    ad = jlora.adapt(quantised, method)
    there = jax.tree.map(lambda a: jnp.asarray(drawn(3, *a.shape)), ad.trainable)
    bare = jlora.adapt(jlora.merge(jlora.with_gates(ad, active=0.0)), method)
    model = lambda p, x: x @ p["query"]["kernel"]
    run = lambda ad: jax.jit(jlora.lift(model))(jlora.with_gates(jlora.join(there, ad.frozen), active=g), x)
    close(run(ad), run(bare))


def test_examples_under_vmap_and_microbatches_under_scan():
    """A transformation around the lifted call takes the gate along, as it takes the batch."""
    ad, x, g = adapted(jlora.Gated(lora())), drawn(1, 2, 5, 6), drawn(2, 2, 5)
    run = lambda x, g: jlora.lift(matrix)(jlora.with_gates(ad, active=g), x)
    want = run(x, g)
    close(jax.vmap(run)(x, g), want)
    close(lax.scan(lambda c, xs: (c, run(*xs)), 0, (x, g))[1], want)


def test_a_stack_of_adapters_takes_gates():
    """Given before `stack`, each adapter has its own; given in the mapped function, all have one."""
    one, other = (adapted(jlora.Gated(dataclasses.replace(lora(), alpha=alpha))) for alpha in (3, 8))
    x, g = drawn(1, 2, 5, 6), drawn(2, 2, 2, 5)
    each = [jlora.with_gates(a, active=v) for a, v in zip((one, other), g, strict=True)]
    apply = jlora.lift(matrix)
    want = np.stack([apply(a, x) for a in each])
    stacked, axes = jlora.stack(each)
    close(jax.vmap(apply, in_axes=(axes, None))(stacked, x), want)
    stacked, axes = jlora.stack([one, other])
    run = lambda a, g, x: apply(jlora.with_gates(a, active=g), x)
    close(jax.vmap(run, in_axes=(axes, 0, None))(stacked, g, x), want)
    with pytest.raises(ValueError, match="with_gates inside of the mapped function"):
        jlora.stack([one, each[1]])
    with pytest.raises(ValueError, match="a stack of 2 adapters, and with_gates takes one"):
        jlora.with_gates(stacked, active=1.0)


@pytest.mark.parametrize("name", ["a dot", "a scan with remat", "batch and sequence joined"])
@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_on_a_mesh_the_gate_goes_where_the_activation_is(name, axis_type):
    """The same numbers, gradients too, with a batch that is cut and a gate that is not."""
    kind = KINDS[name]
    if name == "batch and sequence joined":
        kind = dataclasses.replace(kind, model=lambda p, x: x @ p["w"])
    ad = adapted(jlora.Gated(lora()), kind.shape, kind.roles)
    x, g = kind.activation(), drawn(2, *kind.gate)

    def value(trainable, frozen, x, g):
        y = jlora.lift(kind.model)(jlora.with_gates(jlora.join(trainable, frozen), active=g), x)
        return jnp.sum(y * y)

    run = jax.jit(jax.value_and_grad(value, (0, 3)))
    want = run(ad.trainable, ad.frozen, x, g)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(axis_type,))
    with jax.set_mesh(mesh):
        everywhere = lambda tree: jax.device_put(tree, NamedSharding(mesh, P()))
        there = jax.device_put(x, NamedSharding(mesh, P("data")))
        got = run(everywhere(ad.trainable), everywhere(ad.frozen), there, everywhere(jnp.asarray(g)))
    jax.tree.map(close, jax.device_get(got), jax.device_get(want))


def test_no_dw_is_made_for_each_position():
    """Where a plain method is merged, or joins its operands, the gated one does not: nothing is larger than W0 or x."""
    x, g = drawn(1, 40, 50, 6), drawn(2, 40, 50)
    plain, ad = adapted(jlora.Full(target="w")), adapted(jlora.Gated(jlora.AdaLoRA(rank=2, target="w")))
    assert jlora.explain(matrix, adapted(lora()), x).rows[0].plan == "merged"
    assert jlora.explain(matrix, plain, x).rows[0].plan == "dense delta"
    report = jlora.explain(matrix, jlora.with_gates(ad, active=g), x)
    assert [(row.plan, row.reason) for row in report.rows] == [("factored", "")]

    def largest(jaxpr):
        for eqn in jaxpr.eqns:
            yield from (math.prod(v.aval.shape) for v in eqn.outvars)
            for inner in jax.tree.leaves(list(eqn.params.values()), is_leaf=lambda p: hasattr(p, "jaxpr")):
                if hasattr(inner, "jaxpr") or hasattr(inner, "eqns"):
                    yield from largest(getattr(inner, "jaxpr", inner))

    loss = lambda t: jlora.lift(matrix)(jlora.with_gates(jlora.join(t, ad.frozen), active=g), x).sum()
    assert max(largest(jax.make_jaxpr(jax.grad(loss))(ad.trainable).jaxpr)) <= x.size


def test_a_gate_makes_nothing_that_would_be_made_anew():
    """Few rows of a low-rank update keep their plain rule: the backward pass has no more barriers for the gate."""
    x = drawn(1, 2, 1, 6)

    def barriers(method, **gates):
        ad = adapted(method)
        loss = lambda t: jlora.lift(matrix)(jlora.with_gates(jlora.join(t, ad.frozen), **gates), x).sum()
        return str(jax.make_jaxpr(jax.grad(loss))(ad.trainable)).count("optimization_barrier")

    assert barriers(jlora.Gated(lora()), active=jnp.full((2, 1), 0.5)) == barriers(lora())


# --- what it is not a part of ----------------------------------------------------------------------


def test_values_are_no_part_of_an_adapter(tmp_path):
    """`adapt`, `count`, `table`, `split`, `scale`, `save` and `load` do without; what was saved opens with its gate."""
    ad = adapted(jlora.Gated(lora()))
    given = jlora.with_gates(ad, active=drawn(2, 2, 5))
    assert jlora.count(given) == jlora.count(ad) == (20, 44) and jlora.table(given) == jlora.table(ad)
    assert "Gated(LoRA)" in jlora.table(ad) and jax.tree.structure(ad) != jax.tree.structure(given)
    halves = jlora.join(*jlora.split(given))
    assert halves.frozen.gates["active"] is given.frozen.gates["active"]
    assert jlora.scale(given, 0.5).frozen.gates and not ad.frozen.gates
    jlora.save(tmp_path / "one", given)
    back = jlora.load(tmp_path / "one", ad.frozen.base)
    assert back.frozen.plan is ad.frozen.plan and not back.frozen.gates
    assert jlora.with_gates(given, active=1.0).frozen.gates["active"].shape == ()


def test_a_gate_that_is_the_same_everywhere_merges():
    """Without positions there is one weight: W0 + g dW, and back."""
    ad = adapted(jlora.Gated(lora()))
    half = jlora.with_gates(ad, active=0.5)
    merged = jlora.merge(half)
    w0 = np.asarray(ad.frozen.base["w"])
    close(merged["w"], w0 + 0.5 * update(ad.trainable, "io"))
    close(jlora.unmerge(merged, half).params["w"], w0)
    close(jlora.lift(matrix, dense=True)(half, drawn(1, 2, 5, 6)), drawn(1, 2, 5, 6) @ merged["w"])
    close(jlora.analysis.updates(half)["w"].s, 0.5 * jlora.analysis.updates(adapted(lora()))["w"].s)


@pytest.mark.parametrize("inner", [lora(), jlora.AdaLoRA(rank=2, target="w")], ids=["lora", "adalora"])
def test_rank_tools_see_through_a_gate(inner):
    """A number for all ranks is no part of the pair: a rank that adds nothing is cut, and the function stays."""
    ad, x, g = adapted(jlora.Gated(inner)), drawn(1, 2, 5, 6), drawn(2, 2, 5)
    dead = jlora.join({"w": {n: a.at[0].set(0) for n, a in ad.trainable["w"].items()}}, ad.frozen)
    small = jlora.rank.compact(dead)
    assert jlora.count(small)[0] < jlora.count(ad)[0] and "Gated" in jlora.table(small)
    run = lambda ad: jlora.lift(matrix)(jlora.with_gates(ad, active=g), x)
    close(run(small), run(dead))


def test_a_plan_is_costed_without_values():
    """FLOPs of a gated plan are those of the plan, and a scalar."""
    cost = lambda spec: jlora.analysis.cost({"w": jnp.ones((6, 4))}, spec, tokens=10).trainable
    assert cost(jlora.Gated(lora())) == cost(lora()) == 20


# --- what is refused -------------------------------------------------------------------------------

POSITIONS = functools.partial(jlora.with_gates, active=drawn(2, 2, 5))
DENSE = {
    "merge": lambda ad: jlora.merge(ad),
    "merge under jit": lambda ad: jax.jit(jlora.merge)(ad),
    "merge_report": lambda ad: jlora.merge_report(ad),
    "unmerge": lambda ad: jlora.unmerge(ad.frozen.base, ad),
    "export": lambda ad: jlora.export("never", ad),
    "dense": lambda ad: jlora.lift(matrix, dense=True)(ad, drawn(1, 2, 5, 6)),
    "analysis": lambda ad: jlora.analysis.updates(ad),
}


@pytest.mark.parametrize("name", DENSE)
def test_what_needs_one_weight_is_refused(name):
    """Where a gate has positions no dense weight exists, and it is not summed over them: said with gate and weight."""
    ad = adapted(jlora.Gated(lora()))
    words = r"no dense weight exists where a gate has positions: 'active' of shape \(2, 5\) on 'w'.*active=1.0"
    with pytest.raises(ValueError, match=words):
        DENSE[name](POSITIONS(ad))
    with pytest.raises(
        ValueError, match=r"the gate 'active' .* no value: write jlora.with_gates\(adapted, active=...\)"
    ):
        DENSE[name](ad)


def test_missing_gates_are_named_at_once():
    """By lift and explain: the names, and the call to write."""
    ad = adapted(jlora.Sum(jlora.Gated(lora(), "one"), jlora.Gated(lora(), "two")))
    words = r"gates 'one' and 'two' of this adapter have no value: write jlora.with_gates\(adapted, one=..., two=...\)"
    for call in (jlora.lift(matrix), functools.partial(jlora.explain, matrix)):
        with pytest.raises(ValueError, match=words):
            call(ad, drawn(1, 2, 5, 6))
    with pytest.raises(ValueError, match="the gate 'two' of this adapter has no value"):
        jlora.lift(matrix)(jlora.with_gates(ad, one=1.0), drawn(1, 2, 5, 6))


@pytest.mark.parametrize(
    "shape", [(5, 2), (2, 4), (3,), (2, 5, 6), (10, 2), (1, 10)], ids=lambda shape: "x".join(map(str, shape))
)
def test_positions_that_do_not_fit_are_refused(shape):
    """With the weight's path, the gate and its shape, the activation's, and what fits: never a dense weight."""
    ad = jlora.with_gates(adapted(jlora.Gated(lora())), active=jnp.ones(shape))
    words = rf"'w': the gate 'active' of shape {re.escape(str(shape))} does not fit an activation of shape \(2, 5, 6\)"
    for call in (jlora.lift(matrix), jax.jit(jlora.lift(matrix)), functools.partial(jlora.explain, matrix)):
        with pytest.raises(ValueError, match=words + r".*the free axes there are \(2, 5\).*exclude="):
            call(ad, drawn(1, 2, 5, 6))


def test_axes_that_changed_places_are_no_reshape():
    """(4, 6) is no (6, 4), though it holds as many; a model with the sequence in front is not followed."""
    ad = jlora.with_gates(adapted(jlora.Gated(lora())), active=jnp.ones((4, 6)))
    with pytest.raises(ValueError, match=r"has the positions \(4, 6\), and the free axes there are \(6, 4\)"):
        jlora.lift(matrix)(ad, drawn(1, 6, 4, 6))


MISTAKES = {
    "another name": ({"activ": 1.0}, ValueError, "no gate 'activ': its gates are 'adapter'"),
    "no array": ({"adapter": [1.0, 0.0, 0.0]}, TypeError, r"with_gates\(adapter=...\) takes an array.*a list of 3"),
    "a string": ({"adapter": "one"}, TypeError, "takes an array or a number"),
    "none": ({"adapter": None}, TypeError, "not None"),
    "letters of another size": (
        {"adapter": jnp.ones((2, 5, 4))}, ValueError, r"sizes \(3,\): its value is of shape \(positions..., 3\)",
    ),
    "no letters": ({"adapter": 1.0}, ValueError, r"sizes \(3,\).*not \(\)"),
    "an index": ({"adapter": jnp.zeros((2, 3), int)}, ValueError, r"int32; of an index write jax.nn.one_hot"),
    "complex": ({"adapter": jnp.zeros((2, 3), complex)}, ValueError, "floating point or boolean, not complex64"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_value_that_is_no_gate_is_refused(name):
    """Names, letters and kinds are checked where they are given."""
    gates, error, words = MISTAKES[name]
    with pytest.raises(error, match=words):
        jlora.with_gates(adapted(Bank(rank=2, target="w")), **gates)


def test_several_mistakes_are_named_at_once():
    """And an adapter without gates says that it has none."""
    with pytest.raises(ValueError, match="no gate 'one'.*no gate 'two'.*no method of it has one"):
        jlora.with_gates(adapted(lora()), one=1.0, two=1.0)
    with pytest.raises(TypeError, match="with_gates takes an Adapted"):
        jlora.with_gates({"w": jnp.ones(2)}, active=1.0)


def ragged(params, x):
    return lax.ragged_dot(x, params["w"], jnp.array([3, 7], jnp.int32))


USES = {
    "no rule": ((6, 4), "io", lambda p, x: x.sum() + jnp.sin(p["w"]), r"and sin asks for one \(sin has no rule at"),
    "returned": ((6, 4), "io", lambda p, x: p["w"], "returned by the function"),
    "experts' rows": ((2, 6, 4), "sio", ragged, "sorted by expert: they are no positions"),
    "in a loop": (
        (6, 6), "io", lambda p, x: lax.fori_loop(0, 2, lambda _, w: w + 1, p["w"]), "a loop carry that changes"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", USES)
def test_an_operation_that_needs_a_dense_weight_is_refused(name):
    """With the weight's path, the gate and the operation; under a mesh of jits too."""
    shape, roles, model, words = USES[name]
    ad = jlora.with_gates(adapted(jlora.Gated(lora()), shape, roles), active=jnp.ones(10))
    with pytest.raises(
        ValueError, match="'w': its gate 'active' of shape .* so that there is no dense weight.*" + words
    ):
        jlora.lift(lambda p, x: jax.jit(model)(p, x))(ad, drawn(1, 10, 6))


def test_a_ragged_dot_takes_a_gate_without_positions():
    """Half a delta is half of what the experts add."""
    ad, x = adapted(jlora.Gated(lora()), (2, 6, 4), "sio"), drawn(1, 10, 6)
    w = jlora.merge(jlora.with_gates(ad, active=0.5))
    close(jlora.lift(ragged)(jlora.with_gates(ad, active=0.5), x), ragged(w, x))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(methods.Method):
    """A method with any recipe."""

    made: Recipe
    target: str = "w"

    def recipe(self, leaf):
        return self.made


ZEROS = methods.base.zeros
A, B, GATE = Array("a", ZEROS), Array("b", ZEROS), Gate("on")
RECIPES = {
    "in a gain": (Recipe(gain=Delta("O, -> O", (B, GATE))), "'on' stands in a gain, an L or an R"),
    "in L": (
        Recipe(left=Delta("b m n, -> (b m) (b n)", (A, GATE), (("b", 2), ("m", 3), ("n", 3)))), "stands in a gain, an L"
    ),
    "a side": (Recipe((Delta("r I, r O, I -> I O", (A, B, GATE), (("r", 2),)),)), "'I', which is an axis"),
    "a flat side": (
        Recipe((Delta("i O, i, j -> (i j) O", (A, GATE, B), (("i", 2), ("j", 3))),)), "'i', which is an axis",
    ),
    "a rank": (Recipe((Delta("r I, r O, r -> I O", (A, B, GATE), (("r", 2),), 1.0, ("r",)),)), "'r', which is a rank"),
    "without a size": (Recipe((Delta("r I, r O, n -> I O", (A, B, GATE), (("r", 2),)),)), "letter 'n' has no size"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_an_author_is_told_where_a_gate_may_stand(name):
    """In a delta, with letters of the method's own that are summed."""
    made, words = RECIPES[name]
    with pytest.raises(ValueError, match=words):
        adapted(Mine(made=made))


OTHERS = {
    "a method that rescales": (lambda: jlora.Gated(jlora.IA3(target="w")), ValueError, "must add to W0, not rescale"),
    "DoRA inside": (lambda: jlora.Gated(jlora.DoRA(lora())), ValueError, r"Gated\(DoRA\(LoRA\)\): .* must add to W0"),
    "inside DoRA": (lambda: jlora.DoRA(jlora.Gated(lora())), ValueError, "at each position it would be another weight"),
    "no method": (lambda: jlora.Gated("active"), TypeError, "Gated takes a method"),
    "no name": (lambda: jlora.Gated(lora(), ""), ValueError, "has no name"),
    "another target": (lambda: jlora.Gated(lora(), target="v"), ValueError, "the target stands on the inner method"),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_gated_is_refused(name):
    """A gate multiplies what is added to W0."""
    method, error, words = OTHERS[name]
    with pytest.raises(error, match=words):
        adapted(method())


def test_a_vector_cannot_be_gated():
    """A bias is added, and meets no activation."""
    with pytest.raises(ValueError, match="input and output axes"):
        jlora.adapt({"dense": {"bias": jnp.ones(4)}}, jlora.Gated(jlora.BitFit()))


def test_a_vector_that_is_contracted_can_be():
    """x w with one output has positions too: y[p] = x[p] (w0 + g[p] dw)."""
    ad = adapted(Mine(made=Recipe((Delta("I, -> I", (Array("b", ZEROS), GATE)),))), (6,), "i")
    x, g = drawn(1, 2, 5, 6), drawn(2, 2, 5)
    want = x @ np.asarray(ad.frozen.base["w"]) + g * (x @ np.asarray(ad.trainable["w"]["b"]))
    close(jlora.lift(matrix)(jlora.with_gates(ad, on=g), x), want)


# --- activated LoRA --------------------------------------------------------------------------------


@pytest.mark.parametrize("invocation", [[1], [1, 2], [2, 1, 2], [0] * 9], ids=str)
def test_invoked_finds_the_last_occurrence(invocation):
    """1 from the start of the last occurrence on, 0 where there is none: against a loop, and under jit."""
    tokens = np.random.default_rng(0).integers(0, 3, (40, 8))
    want = np.zeros(tokens.shape)
    for row, mask in zip(tokens, want, strict=True):
        starts = [n for n in range(8) if row[n : n + len(invocation)].tolist() == invocation]
        if starts:
            mask[starts[-1] :] = 1
    got = jax.jit(lambda tokens: jlora.invoked(tokens, invocation))(tokens)
    assert got.dtype == jnp.float32 and np.array_equal(got, want)
    assert np.array_equal(jlora.invoked(tokens[0], invocation), want[0])


def test_before_the_invocation_an_activated_lora_is_the_base():
    """Keys of what stands before it are the base's, bit for bit, so that the base's cache serves."""
    ad, x = adapted(jlora.Gated(lora())), drawn(1, 2, 5, 6)
    mask = jlora.invoked(jnp.array([[1, 2, 9, 3, 4], [9, 1, 2, 9, 4]]), [9])
    y = jax.jit(lambda ad, x, mask: jlora.lift(matrix)(jlora.with_gates(ad, active=mask), x))(ad, x, mask)
    plain = jax.jit(matrix)(ad.frozen.base, x)
    off = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(y)[off], np.asarray(plain)[off])
    assert (np.abs(np.asarray(y - plain))[~off].max(-1) > 1e-3).all()


@pytest.mark.parametrize(
    "tokens,invocation", [(jnp.ones(3), [1]), (3, [1]), (jnp.ones(3, int), []), (jnp.ones(3, int), "ab")]
)
def test_invoked_takes_integers(tokens, invocation):
    """Anything else is said in words."""
    with pytest.raises(ValueError, match="invoked takes"):
        jlora.invoked(tokens, invocation)
