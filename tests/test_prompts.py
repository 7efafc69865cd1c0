"""Prompts, prefixes and deep prompts are what their equations say, whatever the model does with positions."""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from jlora import prompts

pytestmark = pytest.mark.settled  # the laws hold the same methods on the newest JAX

P, V, D, HEADS = 3, 11, 8, 2
IDS = jax.random.randint(jax.random.key(0), (2, 5), 0, V)
MASKS = {
    "whole": jnp.ones((2, 5), int),
    "padded right": jnp.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]),
    "padded left": jnp.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]),
}


def turned(x, places, xp=jnp):
    """Rotary phases: halves of each head turned by their place."""
    half = x.shape[-1] // 2
    angle = places[..., None, None] / 100 ** (xp.arange(half) / half)
    a, b = x[..., :half], x[..., half:]
    c, s = xp.cos(angle), xp.sin(angle)
    return xp.concatenate([a * c - b * s, b * c + a * s], -1)


class Attention(nn.Module):
    """Attention with rotary phases or without, of as many key heads as it is told; a cache where `past` is given."""

    bias: bool = True
    rotary: bool = False
    key_heads: int = HEADS

    @nn.compact
    def __call__(self, x, mask, places, past=None):
        make = lambda name, heads: nn.DenseGeneral((heads, D // HEADS), name=name, use_bias=self.bias)(x)
        q, k, v = make("query", HEADS), make("key", self.key_heads), make("value", self.key_heads)
        if self.rotary:
            q, k = turned(q, places), turned(k, places)
        if past is not None:
            k, v = (jnp.concatenate([old, new], 1) for old, new in zip(past, (k, v), strict=True))
        each = lambda a: jnp.repeat(a, HEADS // self.key_heads, 2)
        scores = jnp.einsum("bqnh,bknh->bnqk", q, each(k)) / jnp.sqrt(D / HEADS)
        share = jax.nn.softmax(jnp.where(mask, scores, -1e9), -1)
        made = jnp.einsum("bnqk,bknh->bqnh", share, each(v))
        return nn.DenseGeneral(D, axis=(-2, -1), name="out", use_bias=self.bias)(made), (k, v)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(x)."""

    attention: functools.partial = functools.partial(Attention)

    @nn.compact
    def __call__(self, x, mask, places, past=None):
        made, cache = self.attention(name="attention")(nn.LayerNorm(name="norm")(x), mask, places, past)
        x = x + made
        return x + nn.Dense(D, name="down")(nn.gelu(nn.Dense(2 * D, name="up")(x))), cache


class Model(nn.Module):
    """Ids to logits of a tied head; learned positions, unless phases are rotary."""

    attention: functools.partial = functools.partial(Attention)
    causal: bool = True
    layers: int = 2
    vocabulary: int = V

    @nn.compact
    def __call__(self, ids, mask, past=None):
        table = nn.Embed(self.vocabulary, D, name="tokens")
        rotary = self.attention.keywords.get("rotary", False)
        before = 0 if past is None else past[0][0].shape[1]
        places = jnp.maximum(jnp.cumsum(mask, -1) - 1, 0)[:, before:]
        x = table(ids) + (0 if rotary else nn.Embed(16, D, name="positions")(places))
        seen = mask[:, None, None, :] > 0
        if self.causal:
            order = jnp.arange(mask.shape[1])
            seen = seen & (order <= order[before:, None])
        caches = []
        for n in range(self.layers):
            x, cache = Block(self.attention, name=f"layer_{n}")(x, seen, places, past and past[n])
            caches.append(cache)
        return table.attend(x), caches


def away(adapted):
    """The same adapter with noise on each trained factor."""
    leaves, treedef = jax.tree.flatten(adapted.trainable)
    noisy = [x + 0.5 * jax.random.normal(jax.random.key(n), x.shape) for n, x in enumerate(leaves)]
    return jlora.join(jax.tree.unflatten(treedef, noisy), adapted.frozen)


def begun(model, spec, ids=IDS, mask=MASKS["whole"]):
    """(logits of params, ids and mask; an adapter away from its start)."""
    params = model.init(jax.random.key(1), ids, mask)["params"]
    fn = lambda params, ids, mask: model.apply({"params": params}, ids, mask)[0]
    return fn, away(jlora.adapt(params, spec, fn=fn, args=(ids, mask)))


def wide(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


def norm(x, p):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6) * p["scale"] + p["bias"]


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def written_out(model, params, prefix, ids, mask):
    """Logits in float64: every attention has trained keys and values in front of those of the tokens."""
    setting, mask, ids = model.attention.keywords, np.asarray(mask), np.asarray(ids)
    bias, rotary, heads = (setting.get(k, d) for k, d in (("bias", True), ("rotary", False), ("key_heads", HEADS)))
    turn = lambda x, places: turned(x, places, np) if rotary else x
    places = P + np.maximum(np.cumsum(mask, -1) - 1, 0)
    x = params["tokens"]["embedding"][ids]
    if not rotary:
        x = x + params["positions"]["embedding"][places]
    for n in range(model.layers):
        p = params[f"layer_{n}"]
        h = norm(x, p["norm"])
        make = lambda name, p=p, h=h: (
            np.einsum("bsd,dnh->bsnh", h, p["attention"][name]["kernel"])
            + (p["attention"][name]["bias"] if bias else 0)
        )
        before = lambda name, n=n: np.broadcast_to(
            prefix[n][name].reshape(P, heads, D // HEADS), (len(ids), P, heads, D // HEADS)
        )
        q = turn(make("query"), places)
        k = np.concatenate([turn(before("key"), np.arange(P)[None]), turn(make("key"), places)], 1)
        v = np.concatenate([before("value"), make("value")], 1)
        k, v = (np.repeat(a, HEADS // heads, 2) for a in (k, v))
        seen = np.concatenate([np.ones((len(ids), P)), mask], 1)[:, None, None, :] > 0
        if model.causal:
            length = ids.shape[1]
            seen = seen & (np.arange(P + length) <= P + np.arange(length)[:, None])
        scores = np.where(seen, np.einsum("bqnh,bknh->bnqk", q, k) / np.sqrt(D / HEADS), -1e9)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        made = np.einsum("bnqk,bknh->bqnh", share / share.sum(-1, keepdims=True), v)
        out = p["attention"]["out"]
        x = x + np.einsum("bqnh,nhd->bqd", made, out["kernel"]) + (out["bias"] if bias else 0)
        inner = gelu(x @ p["up"]["kernel"] + p["up"]["bias"])
        x = x + inner @ p["down"]["kernel"] + p["down"]["bias"]
    return x @ params["tokens"]["embedding"].T


def prefix_of(adapted, layers=2):
    """`[{"key": P_K, "value": P_V}]` of each layer."""
    last = lambda n, name: f"layer_{n}/attention/{name}/"
    find = lambda n, name: next(f["prompts"] for group, f in adapted.trainable.items() if last(n, name) in group)
    return [{name: find(n, name) for name in ("key", "value")} for n in range(layers)]


KINDS = {
    "causal": Model(),
    "both ways": Model(causal=False),
    "rotary, one key head": Model(functools.partial(Attention, rotary=True, key_heads=1, bias=False)),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_prefix_is_attention_with_trained_keys_and_values_in_front(kind, mask):
    """In values and gradients; rotary keys are turned by the places 0 to p - 1, and the first token has place p."""
    model, mask = KINDS[kind], MASKS[mask]
    fn, adapted = begun(model, jlora.PrefixTuning(count=P))
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=mask)

    @jax.jit
    def logits(trainable):
        return prompts.remove(jlora.lift(fn)(jlora.join(trainable, adapted.frozen), given.ids, given.mask), P)

    real = np.asarray(mask, bool)
    params, prefix = wide(adapted.frozen.base), wide(prefix_of(adapted))
    want = written_out(model, params, prefix, IDS, mask)
    np.testing.assert_allclose(logits(adapted.trainable)[real], want[real], rtol=1e-5, atol=1e-5)
    weigh = np.random.default_rng(1).standard_normal(want.shape) * real[..., None]
    total = lambda prefix: np.sum(weigh * written_out(model, params, prefix, IDS, mask))
    gradient = prefix_of(jlora.join(jax.grad(lambda t: jnp.sum(weigh * logits(t)))(adapted.trainable), adapted.frozen))
    for n, layer in enumerate(gradient):
        for name, found in layer.items():
            way = np.random.default_rng(2).standard_normal(found.shape)
            at = lambda e, n=n, name=name, way=way: [
                {**x, name: x[name] + e * way} if m == n else x for m, x in enumerate(prefix)
            ]
            np.testing.assert_allclose(np.sum(found * way), (total(at(1e-6)) - total(at(-1e-6))) / 2e-6, rtol=2e-3)


def test_what_virtual_tokens_look_up_is_not_seen():
    """Their rows of the table are zeros that nothing reads: other values there change no bit of an output."""
    fn, adapted = begun(Model(), jlora.PrefixTuning(count=P))
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["whole"])
    with_rows = dict(adapted.frozen.factors)
    place = "tokens/embedding"
    assert not with_rows[place]["virtual"].any()
    with_rows[place] = {"virtual": jnp.full((P, D), 7.0)}
    other = jlora.Adapted(adapted.trainable, dataclasses.replace(adapted.frozen, factors=with_rows))
    f = lambda a: prompts.remove(jlora.lift(fn)(a, given.ids, given.mask), P)
    np.testing.assert_array_equal(f(adapted), f(other))


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_embeddings_in_front(kind):
    """Of ids behind the table's end, the model sees the trained rows, and is the model on longer embedded inputs."""
    model = KINDS[kind]
    fn, adapted = begun(model, jlora.PromptTuning(count=P))
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["padded right"])
    assert prompts.virtual_ids(adapted) == range(V, V + P)
    merged = jlora.merge(adapted)
    np.testing.assert_array_equal(merged["tokens"]["embedding"][V:], adapted.trainable["tokens/embedding"]["rows"])
    taller = model.clone(vocabulary=V + P)  # its head has more columns
    want = taller.apply({"params": merged}, given.ids, given.mask)[0][..., :V]
    np.testing.assert_allclose(jlora.lift(fn)(adapted, given.ids, given.mask), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", [jlora.PrefixTuning(count=P), jlora.PromptTuning(count=P)])
@pytest.mark.parametrize("kind", ["causal", "rotary, one key head"])
def test_decoding_with_a_cache_is_decoding_without(kind, spec):
    """The virtual tokens are given once, with the first real ones; the cache then holds their keys and values."""
    model = KINDS[kind]
    fn, adapted = begun(model, spec)
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["padded left"])
    whole = jlora.lift(fn)(adapted, given.ids, given.mask)
    call = jlora.lift(lambda params, ids, mask, past=None: model.apply({"params": params}, ids, mask, past))
    first = P + 3
    logits, past = call(adapted, given.ids[:, :first], given.mask[:, :first])
    found = [logits]
    for n in range(first, given.ids.shape[1]):
        logits, past = call(adapted, given.ids[:, n : n + 1], given.mask[:, : n + 1], past)
        found.append(logits)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("remat", [False, True])
def test_layers_of_a_scan_read_the_ids_from_outside(remat):
    """In a scan over stacked layers each has its own prefix, and is the layer written out."""

    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, seen, places):
            return Block(name="block")(x, seen, places)[0], None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, ids, mask):
            x = nn.Embed(V, D, name="tokens")(ids)
            places, seen = jnp.cumsum(mask, -1) - 1, mask[:, None, None, :] > 0
            layer = nn.remat(Layer) if remat else Layer
            scan = nn.scan(
                layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2, in_axes=nn.broadcast
            )
            return scan(name="layers")(x, seen, places)[0], None

    class Unrolled(nn.Module):
        @nn.compact
        def __call__(self, ids, mask):
            x = nn.Embed(V, D, name="tokens")(ids)
            places, seen = jnp.cumsum(mask, -1) - 1, mask[:, None, None, :] > 0
            for n in range(2):
                x = Block(name=f"layer_{n}")(x, seen, places)[0]
            return x, None

    fn, adapted = begun(Scanned(), jlora.PrefixTuning(count=P))
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["whole"])
    each = {n: jax.tree.map(lambda x, n=n: x[n], adapted.frozen.base["layers"]["block"]) for n in range(2)}
    base = {"tokens": adapted.frozen.base["tokens"], **{f"layer_{n}": each[n] for n in range(2)}}
    plain = lambda params, ids, mask: Unrolled().apply({"params": params}, ids, mask)[0]
    flat = jlora.adapt(base, jlora.PrefixTuning(count=P), fn=plain, args=(IDS, MASKS["whole"]))
    trained = {
        f"layer_{n}/{group.removeprefix('layers/block/')}": {k: a[n] for k, a in factors.items()}
        for group, factors in adapted.trainable.items()
        for n in range(2)
    }
    flat = jlora.join(trained, flat.frozen)
    want = prompts.remove(jlora.lift(plain)(flat, given.ids, given.mask), P)
    loss = lambda t: jnp.sum(jnp.sin(jlora.lift(fn)(jlora.join(t, adapted.frozen), given.ids, given.mask)[:, P:]))
    found = jax.jit(jlora.lift(fn))(adapted, given.ids, given.mask)
    np.testing.assert_allclose(prompts.remove(found, P), want, rtol=1e-5, atol=1e-5)
    other = lambda t: jnp.sum(jnp.sin(jlora.lift(plain)(jlora.join(t, flat.frozen), given.ids, given.mask)[:, P:]))
    ours, theirs = jax.jit(jax.grad(loss))(adapted.trainable), jax.grad(other)(trained)
    for group, factors in ours.items():
        for n in range(2):
            one = theirs[f"layer_{n}/{group.removeprefix('layers/block/')}"]
            np.testing.assert_allclose(factors["prompts"][n], one["prompts"], rtol=1e-4, atol=1e-5)


def test_ids_that_a_loop_looks_up_are_those_of_its_turn():
    """A loop that embeds and attends in one body sees virtual ids of that turn; those of before it are not known."""
    params = {"tokens": {"embedding": jnp.ones((V, D))}, "attention": {"key": {"kernel": jnp.eye(D)}}}
    adapted = away(jlora.adapt(params, jlora.PrefixTuning(count=2, target="key/kernel"), axes={"kernel": "io"}))
    rows = adapted.trainable["attention/key/kernel"]["prompts"]

    def inside(params, ids):
        def turn(total, one):
            x = jnp.take(params["tokens"]["embedding"], one, axis=0)
            return total + x @ params["attention"]["key"]["kernel"], None

        return jax.lax.scan(turn, jnp.zeros((2, D)), ids)[0]

    ids = jnp.array([[V, 1], [1, V + 1], [2, 3]])
    np.testing.assert_allclose(jlora.lift(inside)(adapted, ids), rows + 2, rtol=1e-6)

    def after(params, ids):
        x = jax.lax.map(lambda one: jnp.take(params["tokens"]["embedding"], one, axis=0), ids)
        return x @ params["attention"]["key"]["kernel"]

    with pytest.raises(ValueError, match="attention/key/kernel.*reads the input of another weight.*loop"):
        jlora.lift(after)(adapted, ids)


# Encoders ------------------------------------------------------------------------------------


def lstm(x, arrays, back):
    """A layer of an LSTM in one direction, in NumPy."""
    wx, wh, b = arrays
    width = wh.shape[0]
    h, c, made = np.zeros(width), np.zeros(width), [None] * len(x)
    sigma = lambda z: 1 / (1 + np.exp(-z))
    for n in reversed(range(len(x))) if back else range(len(x)):
        i, f, g, o = np.split(x[n] @ wx + h @ wh + b, 4)
        c = sigma(f) * c + sigma(i) * np.tanh(g)
        h = sigma(o) * np.tanh(c)
        made[n] = h
    return np.stack(made)


def mlp(x, t, count, g):
    for n in range(1, count + 1):
        x = (g(x) if n > 1 else x) @ t[f"w{n}"] + t[f"b{n}"]
    return x


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_p_tuning_makes_its_prompts_by_a_network(encoder):
    """P = MLP(E), or MLP of a bidirectional LSTM over E; without the network the adapter computes the same."""
    fn, adapted = begun(Model(), jlora.PTuning(count=P, encoder=encoder, hidden=5, width=6))
    t = wide(adapted.trainable["tokens/embedding"])
    relu = lambda x: np.maximum(x, 0)
    want = t["embedding"]
    if encoder == "lstm":
        for n in range(2):
            ways = [("forward", False), ("backward", True)]
            cells = [lstm(want, [t[f"{k}_{n}_{way}"] for k in ("wx", "wh", "b")], back) for way, back in ways]
            want = np.concatenate(cells, -1)
    want = mlp(want, t, 3 if encoder == "mlp" else 2, relu)
    plain = prompts.encoded(adapted)
    assert list(plain.trainable) == ["tokens/embedding"] and list(plain.trainable["tokens/embedding"]) == ["rows"]
    np.testing.assert_allclose(plain.trainable["tokens/embedding"]["rows"], want, rtol=1e-5, atol=1e-6)
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["whole"])
    outs = [jlora.lift(fn)(a, given.ids, given.mask) for a in (adapted, plain)]
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)
    started = jlora.adapt(plain.frozen.base, jlora.PromptTuning(count=P))
    assert plain.frozen.plan.sites == started.frozen.plan.sites


@pytest.mark.parametrize("beside", [False, True])
def test_a_prefix_of_an_encoder_is_a_prefix(beside):
    """P = tanh(E w1 + b1) w2 + b2, E, w1 and b1 one for all; dropped, it is the prefix that it made."""
    model = KINDS["rotary, one key head"]
    spec = jlora.PrefixTuning(count=P, encoder=(4, 5))
    spec = [jlora.LoRA(rank=2, target="key/kernel"), spec] if beside else spec
    fn, adapted = begun(model, spec)
    shared = wide(adapted.trainable["prefix"])
    assert sorted(shared) == ["b1", "embedding", "w1"]
    inner = np.tanh(shared["embedding"] @ shared["w1"] + shared["b1"])
    plain = prompts.encoded(adapted)
    for n, layer in enumerate(prefix_of(plain)):
        for name, found in layer.items():
            t = wide(adapted.trainable[f"layer_{n}/attention/{name}/kernel"])
            np.testing.assert_allclose(found, inner @ t["w2"] + t["b2"], rtol=1e-5, atol=1e-6)
    assert "prefix" not in plain.trainable
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["whole"])
    outs = [jlora.lift(fn)(a, given.ids, given.mask) for a in (adapted, plain)]
    np.testing.assert_allclose(*outs, rtol=1e-5, atol=1e-6)


# Images --------------------------------------------------------------------------------------


class Vision(nn.Module):
    """Patches and a class token through blocks; with prompts of its own where `count` is not 0."""

    count: int = 0
    deep: bool = False

    @nn.compact
    def __call__(self, images, prompts_in_front=None):
        x = nn.Conv(D, (2, 2), strides=2, name="patch_embedding")(images).reshape(len(images), -1, D)
        token = self.param("cls", nn.initializers.normal(1.0), (1, 1, D))
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, D)), x], 1)
        x = x + self.param("position", nn.initializers.normal(1.0), (1, x.shape[1], D))
        if self.count:
            own = self.param("prompts", nn.initializers.normal(1.0), (self.count, D))
            x = prompts.insert(x, own)
        elif prompts_in_front is not None:
            x = prompts.insert(x, prompts_in_front)
        ones = jnp.ones((len(x), 1, 1, x.shape[1])) > 0
        for n in range(2):
            h = nn.LayerNorm(name=f"norm_{n}")(x)
            if self.deep:
                own = self.param(f"prompts_{n}", nn.initializers.normal(1.0), (self.count, D))
                h = h.at[:, 1 : 1 + self.count].set(own)
            x = x + Attention(name=f"attention_{n}")(h, ones, None)[0]
        return nn.Dense(3, name="head")(x[:, 0])


@pytest.mark.parametrize("deep", [False, True])
def test_visual_prompts_are_a_model_with_prompts_inside(deep):
    """Shallow: a leaf of the parameters, put among the patches. Deep: behind each norm as well. Values, gradients."""
    images = jax.random.normal(jax.random.key(3), (2, 4, 4, 3))
    inside = Vision(count=P, deep=deep)
    params = inside.init(jax.random.key(1), images)["params"]
    own = {name: x for name, x in params.items() if name.startswith("prompts")}
    base = {name: x for name, x in params.items() if name not in own} | {"prompts": jnp.zeros((P, D))}
    spec = [jlora.Full(target="^prompts$")]
    if deep:
        spec.append(jlora.DeepPrompts(count=P, target=r"norm_\d/bias$", first=1))

    def fn(params, images):
        rest = {name: x for name, x in params.items() if name != "prompts"}
        return Vision().apply({"params": rest}, images, params["prompts"])

    adapted = jlora.adapt(base, spec, fn=fn, args=(images,))
    assert jlora.count(adapted)[0] == P * D * (3 if deep else 1)
    trained = {"prompts": {"d": own["prompts"]}}
    if deep:
        trained |= {f"norm_{n}/bias": {"prompts": own[f"prompts_{n}"]} for n in range(2)}
    trained = jax.tree.unflatten(jax.tree.structure(adapted.trainable), jax.tree.leaves(trained))
    loss = lambda t: jnp.sum(jnp.sin(jlora.lift(fn)(jlora.join(t, adapted.frozen), images)))
    other = lambda own: jnp.sum(jnp.sin(inside.apply({"params": params | own}, images)))
    found, gradient = jax.jit(jax.value_and_grad(loss))(trained)
    want, its = jax.value_and_grad(other)(own)
    np.testing.assert_allclose(found, want, rtol=1e-6)
    place = {"prompts": ("prompts", "d"), **{f"prompts_{n}": (f"norm_{n}/bias", "prompts") for n in range(2)}}
    for name, x in its.items():
        group, factor = place[name]
        (mine,) = [gradient[group][factor]] if factor in gradient[group] else gradient[group].values()
        np.testing.assert_allclose(mine, x, rtol=1e-5, atol=1e-6)


# What is refused, and what prompts ride in ---------------------------------------------------


def tree(*names):
    """A tree of projections by name under one attention, and a table of tokens."""
    of = lambda name: {"kernel": jnp.ones((D, 3 * D if "qkv" in name else D))}
    return {"embed": {"embedding": jnp.ones((V, D))}, "attention": {name: of(name) for name in names}}


REFUSED = {
    "no table": (
        {"attention": {"key": {"kernel": jnp.ones((D, D))}}}, jlora.PrefixTuning(count=2), "has none.*DeepPrompts"),
    "two tables": (
        {"a": tree("key"), "b": tree("key")}, jlora.PrefixTuning(count=2), "there are.*write table="),
    "another table": (tree("key"), jlora.PrefixTuning(count=2, table="embed/nothing"), "no leaf of that path"),
    "a fused projection": (tree("qkv"), jlora.PrefixTuning(count=2), "attention/qkv/kernel.*features="),
    "features that are not there": (
        tree("qkv"), jlora.PrefixTuning(count=2, features=(8, 99)), r"features=\(8, 99\): the output has 24"),
    "no projections": (tree("out"), jlora.PrefixTuning(count=2), "finds no projections"),
    "the table of another rule": (
        tree("key"), [jlora.NewTokens(count=1), jlora.PrefixTuning(count=2)], "VirtualTokens.* cannot do without"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_has_no_place_for_prompts_is_told_why(case):
    """At `adapt`, with the path and what to write."""
    params, spec, words = REFUSED[case]
    with pytest.raises(ValueError, match=words):
        jlora.adapt(params, spec, axes={"kernel": "io"})


def test_a_prefix_leaves_cross_attention_alone():
    """Its keys are of another sequence, whose ids are not those of the tokens."""
    params = tree("key", "value")
    params["cross_attention"] = params["attention"]
    adapted = jlora.adapt(jax.tree.map(jnp.array, params), jlora.PrefixTuning(count=2), axes={"kernel": "io"})
    assert not any("cross" in group for group in adapted.trainable)


def test_positions_that_are_not_there_are_told():
    """Deep prompts at fixed positions refuse a shorter output, such as a decoding step's."""
    params = {"norm": {"scale": jnp.ones(4), "bias": jnp.zeros(4)}}
    adapted = jlora.adapt(params, jlora.DeepPrompts(count=2, target="norm/bias$", first=1))
    f = jlora.lift(lambda params, x: x * params["norm"]["scale"] + params["norm"]["bias"])
    assert f(adapted, jnp.ones((3, 3, 4))).shape == (3, 3, 4)
    with pytest.raises(ValueError, match="positions 1 to 2, and the output of shape .* has 1 positions"):
        f(adapted, jnp.ones((3, 1, 4)))


BAD = {
    "no ids": (lambda: prompts.prepend([11], jnp.ones(3)), "integers"),
    "no axis": (lambda: prompts.prepend([11], jnp.int32(3)), "integers"),
    "another mask": (lambda: prompts.prepend([11], IDS, mask=jnp.ones((2, 4))), r"mask=...\) of shape \(2, 4\)"),
    "too long": (lambda: prompts.prepend(range(11, 14), IDS, longest=7), "more than the 7 positions"),
    "narrow ids": (lambda: prompts.prepend([300], IDS.astype(jnp.uint8)), "ids of dtype uint8 cannot hold 300"),
    "narrow labels": (
        lambda: prompts.prepend([11], IDS, labels=IDS.astype(jnp.uint16)), "labels of dtype uint16 cannot hold -100",
    ),
    "narrow positions": (
        lambda: prompts.prepend([11], IDS, positions=jnp.arange(5, dtype=jnp.int8)), "positions of dtype int8 may not",
    ),
    "a virtual id below zero": (lambda: prompts.prepend([-1, 3], IDS), "virtual ids as `virtual_ids` gives them"),
    "behind the end": (lambda: prompts.prepend([11], IDS, at=6), r"at=6\): there is no such position .*\(2, 5\)"),
    "nothing to remove": (lambda: prompts.remove(jnp.ones((2, 2)), 3), "no 3 positions"),
    "nothing behind": (lambda: prompts.remove(jnp.ones((2, 4)), 3, at=2), "no 3 positions stand behind the first 2"),
    "other features": (lambda: prompts.insert(jnp.ones((2, 5, 4)), jnp.ones((1, 3))), r"\(1, 3\) among"),
    "no such position": (lambda: prompts.insert(jnp.ones((2, 5, 4)), jnp.ones((1, 4)), at=6), "no position 6"),
    "no virtual ids": (
        lambda: prompts.virtual_ids(jlora.adapt(tree("key"), jlora.LoRA(rank=1, target="key"), axes={"kernel": "io"})),
        "no table of this adapter has new rows"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_what_is_no_batch_is_refused(case):
    """In words, with the shape that was given."""
    act, words = BAD[case]
    with pytest.raises(ValueError, match=words):
        act()


def test_virtual_tokens_behind_the_first_ones():
    """With `at`, ids, mask, labels and positions keep that many in front; `remove` and `prepend` undo each other."""
    places, mask = jnp.arange(5)[None], MASKS["padded right"]
    given = prompts.prepend(range(V, V + P), IDS, mask=mask, labels=IDS, positions=places, at=2)
    want = [[*row[:2], V, V + 1, V + 2, *row[2:]] for row in np.asarray(IDS).tolist()]
    np.testing.assert_array_equal(given.ids, want)
    np.testing.assert_array_equal(given.labels, np.where(np.array(want) < V, want, -100))
    np.testing.assert_array_equal(given.positions, [list(range(P + 5))])
    for made, had in ((given.ids, IDS), (given.mask, mask), (given.labels, IDS)):
        np.testing.assert_array_equal(prompts.remove(made, P, at=2), had)
    assert given.mask[:, 2 : 2 + P].all()


def test_everything_of_a_batch_goes_along():
    """Ids, mask, labels and positions each get what stands in front of them, in their own dtype."""
    labels, places = jnp.arange(10).reshape(2, 5), jnp.arange(5)[None]
    given = jax.jit(functools.partial(prompts.prepend, range(V, V + P)))(
        IDS, mask=MASKS["padded left"].astype(bool), labels=labels, positions=places
    )
    np.testing.assert_array_equal(given.ids, [[V, V + 1, V + 2, *row] for row in np.asarray(IDS)])
    np.testing.assert_array_equal(given.mask, np.concatenate([np.ones((2, P), bool), MASKS["padded left"]], 1))
    np.testing.assert_array_equal(given.labels, [[-100] * P + list(row) for row in np.asarray(labels)])
    np.testing.assert_array_equal(given.positions, [list(range(P + 5))])
    assert given.mask.dtype == bool


INITS = {
    "vocabulary": lambda rows, table: all(any((row == other).all() for other in table) for row in rows),
    "uniform": lambda rows, table: (abs(rows) <= 0.5).all() and rows.std() > 0.1,
    (3, 1): lambda rows, table: (rows == table[jnp.array([3, 1, 3])]).all(),
    (5, 4, 3, 2, 1): lambda rows, table: (rows == table[jnp.array([5, 4, 3])]).all(),
}


@pytest.mark.parametrize("init", INITS)
def test_prompts_begin_as_they_are_told(init):
    """At rows of the vocabulary, at the words of a text (repeated or cut), or drawn."""
    table = jax.random.normal(jax.random.key(5), (V, 40))
    adapted = jlora.adapt({"embed": {"embedding": table}}, jlora.PromptTuning(count=P, init=init))
    assert INITS[init](adapted.trainable["embed/embedding"]["rows"], table)


SPECS = {
    "prompt": jlora.PromptTuning(count=P),
    "p-tuning": jlora.PTuning(count=P, hidden=4),
    "prefix": jlora.PrefixTuning(count=P, encoder=(4, 5)),
    "prefix and more": [jlora.PrefixTuning(count=P), jlora.LoRA(rank=2, target="(key|query)/kernel"), jlora.BitFit()],
}


@pytest.mark.parametrize("name", SPECS)
def test_prompts_ride_where_factors_do(name, tmp_path):
    """Split, joined, counted, explained, saved and loaded; trained, a loss goes down; merged where that makes sense."""
    fn, adapted = begun(Model(), SPECS[name])
    given = prompts.prepend(prompts.virtual_ids(adapted), IDS, mask=MASKS["whole"])
    f = jax.jit(lambda a: jlora.lift(fn)(a, given.ids, given.mask))
    want = f(adapted)
    np.testing.assert_array_equal(f(jlora.join(*jlora.split(adapted))), want)
    assert jlora.count(adapted)[0] == sum(x.size for x in jax.tree.leaves(adapted.trainable))
    report = jlora.explain(fn, adapted, given.ids, given.mask)
    assert not report.unused
    assert ("a step on the output" in str(report)) == ("prefix" in name)
    jlora.save(tmp_path / "a", adapted)
    loaded = jlora.load(tmp_path / "a", adapted.frozen.base)
    np.testing.assert_array_equal(f(loaded), want)

    def loss(trainable):
        logits = prompts.remove(jlora.lift(fn)(jlora.join(trainable, adapted.frozen), given.ids, given.mask), P)
        return optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], IDS[:, 1:]).mean()

    tx = optax.adam(3e-2)

    @jax.jit
    def step(t, state):
        value, g = jax.value_and_grad(loss)(t)
        updates, state = tx.update(g, state)
        return optax.apply_updates(t, updates), state, value

    t, state = adapted.trainable, tx.init(adapted.trainable)
    losses = []
    for _ in range(15):
        t, state, value = step(t, state)
        losses.append(float(value))
    assert losses[-1] < 0.9 * losses[0]
    if "prefix" in name:
        with pytest.raises(ValueError, match="steps on their outputs"):
            jlora.merge(adapted)
    else:
        assert jlora.merge(adapted)["tokens"]["embedding"].shape == (V + P, D)
