"""Random factors that a seed gives again: the same everywhere, and a file that says how they were drawn."""

import contextlib
import hashlib
import json
import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.io import _manifest
from jlora.methods import _draws, _entries, _projections, fourierft
from jlora.methods._projections import PROJECTIONS
from jlora.methods.vera import draw

DRAWN = {
    "VeRA": jlora.VeRA(rank=5, target="q"),
    "RandLoRA": jlora.RandLoRA(rank=4, target="q"),
    "FourierFT": jlora.FourierFT(n=6, target="q"),
    **{kind: jlora.IntrinsicDimension(5, projection=kind, target="q") for kind in PROJECTIONS},
}
KERNEL = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)


def trained(method):
    """An adapter whose update is not zero."""
    adapted = jlora.adapt({"q": {"kernel": jnp.asarray(KERNEL)}}, method)
    return jlora.join(jax.tree.map(lambda a: a + jnp.float32(0.1), adapted.trainable), adapted.frozen)


def update(adapted):
    return np.asarray(jlora.merge(adapted)["q"]["kernel"], np.float64) - KERNEL


def threefry(key, high, low):
    """Threefry-2x32 with 20 rounds, in whole numbers of Python."""
    keys = [*key, key[0] ^ key[1] ^ 0x1BD11BDA]
    x, y = (high + keys[0]) % 2**32, (low + keys[1]) % 2**32
    for n in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[n % 2]:
            x = (x + y) % 2**32
            y = (y << turn | y >> (32 - turn)) % 2**32 ^ x
        x, y = (x + keys[(n + 1) % 3]) % 2**32, (y + keys[(n + 2) % 3] + n + 1) % 2**32
    return x, y


@pytest.mark.parametrize(
    "key,counter,words",
    [
        ((0, 0), (0, 0), (0x6B200159, 0x99BA4EFE)),
        ((2**32 - 1, 2**32 - 1), (2**32 - 1, 2**32 - 1), (0x1CB996FC, 0xBB002BE7)),
        ((0x13198A2E, 0x03707344), (0x243F6A88, 0x85A308D3), (0xC4923A9C, 0x483DF7A0)),
    ],
)
def test_the_generator_has_the_answers_of_its_authors(key, counter, words):
    """Random123's known answers; and the generator of the other tests has them, too."""
    made = _draws.block(tuple(map(jnp.uint32, key)), *map(jnp.uint32, counter))
    assert tuple(map(int, made)) == words == threefry(key, *counter)


def test_numbers_follow_from_the_bits():
    """Element n comes of block n of the key: uniform, signs and normal from their definitions."""
    key = threefry(threefry((0, 7), 0, 3), 0, 9)
    words = [threefry(key, 0, n) for n in range(40)]
    bits = np.array([x ^ y for x, y in words])
    ours = _draws.fold_in(_draws.fold_in(_draws.key(7), 3), 9)
    u = (bits >> 9) / 2.0**23
    np.testing.assert_array_equal(_draws.bits(ours, (5, 8)).ravel(), bits)
    np.testing.assert_array_equal(_draws.unit(ours, (40,), jnp.float32), u)
    np.testing.assert_array_equal(_draws.signs(ours, (40,), jnp.float32), np.where(u < 0.5, 1, -1))
    bound = np.float32(math.sqrt(6 / 16))
    want = (np.float64(bound) * (2 * u - 1)).astype(np.float32)  # one rounding
    np.testing.assert_array_equal(_draws.uniform(ours, (40,), jnp.float32, bound), want)
    want = [NormalDist().inv_cdf(x) for x in u + 2.0**-25]
    np.testing.assert_allclose(_draws.normal(ours, (40,), jnp.float32), want, rtol=2e-5, atol=1e-6)


def test_doubles_have_all_their_bits():
    """With x64: 32 bits of one word and 20 of the other, as NumPy puts them together."""
    with jax.enable_x64(True):
        key = _draws.key(3)
        x, y = (np.float64(w) for w in _draws.random_words(key, (64,)))
        made = _draws.unit(key, (64,), jnp.float64)
    made = np.asarray(made)
    assert made.dtype == np.float64 and made.min() >= 0 and made.max() < 1
    np.testing.assert_array_equal(made, x / 2**32 + np.floor(y / 2**12) / 2**52)


def test_a_dense_projection_is_the_sum_of_its_columns():
    """P theta over several blocks of columns, each of length one, as one product."""
    place, size = jnp.array([4711, 123, 2], jnp.uint32), 2**15
    theta = jnp.linspace(-1, 1, 20)
    assert len(theta) * size > 2 * _projections.BLOCK
    column = jax.jit(lambda one: _projections.by_columns(one, place, size))
    P = np.stack([np.float64(column(one)) for one in np.eye(20, dtype=np.float32)])
    np.testing.assert_allclose(np.linalg.norm(P, axis=1), 1, rtol=1e-5)
    made = jax.jit(lambda theta: _projections.by_columns(theta, place, size))(theta)
    np.testing.assert_allclose(made, np.float64(theta) @ P, atol=1e-6)


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_digits_are_held_in_the_dtype_that_is_asked_for(dtype):
    """Eight bits fit into bfloat16, too: entries of a narrow adapter take two bytes a digit, and come back exactly."""
    numbers = jnp.array([0, 255, 256, 2**31 - 1, 123456789])
    digits = _entries.to_digits(numbers, dtype)
    assert digits.dtype == dtype
    np.testing.assert_array_equal(_entries.from_digits(digits), numbers)


def test_entries_are_the_smallest_words():
    """Of 40 numbers the n of which the words, as 64 bits, are smallest; held in digits that narrow dtypes have."""
    words = [threefry((0, 7), 0, n) for n in range(40)]
    want = sorted(sorted(range(40), key=lambda n: words[n])[:9])
    made = _draws.entries(_draws.key(7), 9, 40)
    np.testing.assert_array_equal(made, want)
    large = jnp.array([0, 255, 256, 2**24 + 1, 2**31 - 1], jnp.int32)
    for dtype in ("float32", "bfloat16", "float16", "float8_e4m3fn"):
        np.testing.assert_array_equal(_entries.from_digits(_entries.to_digits(large, jnp.dtype(dtype))), large)


@pytest.mark.parametrize(
    "seed,which,dtype,digest",
    [
        (0, 0, "float32", "e993453a6d6ceb02"),
        (7, 1, "float32", "9718574ec0649049"),
        (2**31 + 5, 1, "float32", "efe2b8e100c66f07"),
        (-3, 0, "float32", "c2a5fdf54c4ac15e"),
        (0, 0, "bfloat16", "a27b29978f19596c"),
        (7, 1, "float16", "8fef10c5b3f5cc50"),
    ],
)
def test_matrices_are_those_that_earlier_files_were_trained_beside(seed, which, dtype, digest):
    """Recorded from jax.random under the defaults of JAX 0.10, by which files of format 1 were drawn."""
    made = draw(seed, which, math.sqrt(6 / 16), None, (12, 50), jnp.dtype(dtype))
    assert hashlib.sha256(np.asarray(made).tobytes()).hexdigest()[:16] == digest


# P theta of theta = (-1, ..., 1) and place (4711, 123, 2), its first entries, recorded in the same way
EARLIER = {
    "dense": [0.09648098, 0.29442197, -0.64954364, 0.01451568, -0.23547819, -0.10743579],
    "sparse": [-0.11785111, -0.35355338, 0.11785114, 0.23570224, -0.11785115, 0.0],
    "fastfood": [-0.03149492, -0.30203423, -0.08433697, -0.19218805, -0.19624065, -0.27999276],
}


@pytest.mark.parametrize("kind", PROJECTIONS)
def test_projections_are_those_of_earlier_files(kind):
    """A seed still gives the P that earlier files were trained beside; with another they would be noise."""
    made = PROJECTIONS[kind](jnp.linspace(-1, 1, 7), jnp.array([4711, 123, 2], jnp.uint32), 50)
    np.testing.assert_allclose(made[:6], EARLIER[kind], rtol=1e-5, atol=1e-7)


SETTINGS = {
    "rbg": lambda: jax.default_prng_impl("rbg"),
    "not partitionable": lambda: jax.threefry_partitionable(False),
    "x64": lambda: jax.enable_x64(True),
    "bfloat16 products": lambda: jax.default_matmul_precision("bfloat16"),
    "without jit": jax.disable_jit,
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_jax_draw_the_same(setting, tmp_path):
    """Saved under the defaults, opened under others: the same factors, bit for bit, and the same projections."""
    for name in ("VeRA", "RandLoRA", "FourierFT", "fastfood"):
        adapted = trained(DRAWN[name])
        jlora.save(tmp_path / name, adapted)
        with SETTINGS[setting]():
            back = jlora.load(tmp_path / name, {"q": {"kernel": jnp.asarray(KERNEL)}})
        for a, b in zip(jax.tree.leaves(adapted.frozen.factors), jax.tree.leaves(back.frozen.factors), strict=True):
            np.testing.assert_array_equal(a, b)
    theta, place = jnp.linspace(-1, 1, 7), jnp.array([4711, 123, 2], jnp.uint32)
    with SETTINGS[setting]():
        for kind, project in PROJECTIONS.items():
            made = jax.jit(project, static_argnums=2)(theta, place, 50)
            assert made.dtype == jnp.float32
            np.testing.assert_allclose(made[:6], EARLIER[kind], rtol=1e-5, atol=1e-7)


TOUCHED = {
    "bfloat16": lambda a: a.astype(jnp.bfloat16),
    "float8": lambda a: a.astype(jnp.float8_e4m3fn),
    "an average": lambda a: 0.999 * a + 0.001 * a,
    "a decay": lambda a: 0.9 * a,
}


@pytest.mark.parametrize("touch", TOUCHED)
@pytest.mark.parametrize("kind", PROJECTIONS)
def test_what_is_done_to_all_leaves_leaves_p_alone(kind, touch):
    """Frozen factors touched, theta and lam not: the same P, bit for bit."""
    adapted = trained(DRAWN[kind])
    factors = {g: {n: TOUCHED[touch](a) if n == "place" else a for n, a in named.items()}
               for g, named in adapted.frozen.factors.items()}  # fmt: skip
    frozen = jlora.adapted.Frozen(adapted.frozen.base, factors, None, adapted.frozen.plan)
    np.testing.assert_array_equal(update(jlora.join(adapted.trainable, frozen)), update(adapted))


@pytest.mark.parametrize("name", DRAWN)
def test_a_file_agrees_with_what_was_saved(name, tmp_path):
    """As it was drawn it is not stored, and its digest is; cast to another dtype it is stored."""
    adapted = trained(DRAWN[name])
    cast = jax.tree.map(lambda a: a.astype(jnp.bfloat16), (adapted.trainable, adapted.frozen.factors))
    frozen = jlora.adapted.Frozen(adapted.frozen.base, cast[1], None, adapted.frozen.plan)
    for at, one in (("drawn", adapted), ("cast", jlora.join(cast[0], frozen))):
        jlora.save(tmp_path / at, one)
        back = jlora.load(tmp_path / at, adapted.frozen.base)
        assert jax.tree.structure(back) == jax.tree.structure(one)
        for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(back), strict=True):
            assert a.dtype == b.dtype
            np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))
        content = json.loads((tmp_path / at / "jlora.json").read_bytes())
        assert bool(content["drawn"]) == (at == "drawn") and content["generator"] == (
            "threefry2x32" * (at == "drawn") or None
        )


def rewritten(folder, **changes):
    """The manifest with other content and a digest that is right."""
    content = json.loads((folder / "jlora.json").read_bytes())
    del content["sha256"]
    content |= changes
    (folder / "jlora.json").write_bytes(_manifest.seal({k: v for k, v in content.items() if v != "gone"}))


def test_a_draw_that_comes_out_otherwise_is_refused(tmp_path):
    """Another digest, another generator, one too few or too many: refused in words. Format 1 has none of them."""
    adapted = trained(DRAWN["VeRA"])
    jlora.save(tmp_path / "x", adapted)
    drawn = json.loads((tmp_path / "x" / "jlora.json").read_bytes())["drawn"]
    name = min(drawn)
    bad = [
        ({"drawn": drawn | {name: "0" * 64}}, "is made again from its seed, and comes out otherwise"),
        ({"generator": "rbg"}, "drawn by 'rbg', and this jlora draws by 'threefry2x32'"),
        ({"drawn": {n: x for n, x in drawn.items() if n != name}}, f"missing '{name}'"),
        ({"drawn": drawn | {"more": ""}}, "'more' is said to be drawn from a seed"),
    ]
    for changes, words in bad:
        rewritten(tmp_path / "x", **{"drawn": drawn, "generator": "threefry2x32"} | changes)
        with pytest.raises(ValueError, match=words):
            jlora.load(tmp_path / "x", adapted.frozen.base)
    rewritten(tmp_path / "x", format=1, drawn="gone", generator="gone")
    np.testing.assert_array_equal(update(jlora.load(tmp_path / "x", adapted.frozen.base)), update(adapted))


def test_an_unstacked_subspace_is_saved_and_loaded(tmp_path):
    """Each layer keeps the P that it had in the stack, whatever its new path."""
    stack = {"layers": {"kernel": jnp.asarray(np.stack([KERNEL, 2 * KERNEL]))}}
    adapted = jlora.adapt(stack, jlora.IntrinsicDimension(4, target="kernel"))
    adapted.trainable["intrinsic/0/4"]["theta"] += jnp.arange(1.0, 5)
    params = {f"layer_{n}": {"kernel": stack["layers"]["kernel"][n]} for n in range(2)}
    apart = jlora.rank.unstack(adapted, params, lambda path, index: path.replace("layers", f"layer_{index[0]}"))
    jlora.save(tmp_path / "x", apart)
    want, kept = jlora.merge(adapted)["layers"]["kernel"], jlora.merge(apart)
    for n, (name, made) in enumerate(jlora.merge(jlora.load(tmp_path / "x", params)).items()):
        np.testing.assert_array_equal(made["kernel"], kept[name]["kernel"])
        np.testing.assert_allclose(made["kernel"], want[n], atol=1e-6)


@pytest.mark.parametrize("side", [255, 257, 50257, 2**20 - 1])
def test_waves_are_as_exact_on_wide_sides(side):
    """FourierFT's angles are counted in whole steps: NumPy's in float64, where products of 32 bits would overflow."""
    u = np.array([0, 1, side // 2, side - 1])
    digits = jnp.asarray(u[:, None] // 256 ** np.arange(4) % 256, jnp.float32)
    got = fourierft.Waves((side,), 1, True)(digits) * side
    angle = 2 * np.pi * (u[:, None] * np.arange(side, dtype=np.int64) % side) / side
    np.testing.assert_allclose(got, np.concatenate([np.cos(angle), -np.sin(angle)]), atol=2e-6)


def test_the_longest_side_that_has_exact_angles():
    """One less than 2^20 is taken, 2^20 is refused."""
    of = lambda side: jlora.adapt({"w": jax.ShapeDtypeStruct((side, 2), jnp.float32)}, jlora.FourierFT(n=3, target="w"))
    assert jlora.count(of(fourierft.TOO_LONG - 1))[0] == 3
    with pytest.raises(ValueError, match="no longer than 1048575"):
        of(fourierft.TOO_LONG)


def test_draws_inside_a_trace_and_a_mesh():
    """Vectorised over keys, under `jit` and inside `shard_map` they are what they are outside."""
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("d",))
    places = jnp.arange(6, dtype=jnp.uint32).reshape(2, 3)
    one = lambda place: PROJECTIONS["fastfood"](jnp.ones(3), place, 20)
    want = np.stack([jax.jit(one)(p) for p in places])
    spec = jax.sharding.PartitionSpec("d")
    over = jax.shard_map(jax.vmap(one), mesh=mesh, in_specs=spec, out_specs=spec)
    for f in (jax.jit(jax.vmap(one)), jax.jit(over)):
        np.testing.assert_allclose(f(places), want, atol=1e-6)
    with contextlib.suppress(ValueError):
        _draws.random_words(_draws.key(0), (2**20, 2**20))
        pytest.fail("an array too large to be counted is refused")
