"""Saving, loading, exporting: bit for bit, or an error in words. A damaged file never becomes a wrong number."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import subprocess
import sys
import textwrap
import warnings

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import jlora
from jlora import methods, network
from jlora._trees import _tree
from jlora.io import _arrays, _fingerprint, _folder, _manifest, _untrained, export, load, save
from methods import METHODS, away_from_start

# --- bases and adapters -------------------------------------------------------------------------------------------


def array(*shape, seed=0, dtype="float32"):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def plain():
    return {"query": {"kernel": array(6, 4), "bias": array(4)}, "head": {"kernel": array(4, 2)}}


def odd_names():
    """Names that a file system, a URL, JSON or Orbax could trip over."""
    names = ("a.b", "a/b", "a", "a%2Eb", "é ", "..", "x:y", "trainable:a", "\n\0", "A" * 150)
    tree = {name: {"kernel": array(4, 3, seed=n), "b.a": array(4, 3)} for n, name in enumerate(names)}
    return {"query": tree, "a.b": {"query": {"kernel": array(4, 3)}}, "a": {"b.query": {"kernel": array(4, 3)}}}


class Model(nnx.Module):
    def __init__(self, rngs):
        self.query = nnx.Linear(6, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])


def boxes():
    class Boxed(nn.Module):
        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.lecun_normal(), ("in", "out"))
            return nn.Dense(4, kernel_init=init, name="query")(x)

    return Boxed().init(jax.random.key(0), jnp.ones((1, 6)))["params"]


BASES = {
    "plain": plain,
    "flat": lambda: {"query/kernel": array(6, 4), "value.kernel": array(6, 4), "query.bias": array(4)},
    "odd names": odd_names,
    "sequence": lambda: [{"query": {"kernel": array(6, 4)}}, ({"bias": array(3)},)],
    "numpy": lambda: jax.tree.map(np.asarray, plain()),
    "bfloat16": lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), plain()),
    "nnx module": lambda: Model(nnx.Rngs(0)),
    "nnx state": lambda: nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)[1],
    "boxes": boxes,
    "stacked": lambda: {"query": {"kernel": array(3, 6, 4), "bias": array(3, 4)}},
}
SPECS = {
    "lora": lambda: jlora.LoRA(rank=2, alpha=7, scaling="sqrt", dropout=0.25, target=r"kernel$"),
    "sequence": lambda: [
        jlora.LoRA(rank=1, target=["query.*kernel", "(query|value).*kernel"]),
        jlora.LoRA(rank=2, alpha=1, target="query", exclude=["bias", "query.*bias"]),  # overlaps the first
        jlora.Full(target="bias$", dtype="bfloat16"),
    ],
    "slices": lambda: jlora.LoRA(rank=1, slices=((0, 1), (2, 3)), target=jlora.targets.linear),
    "bitfit": lambda: jlora.BitFit(),
    "rank 0": lambda: jlora.LoRA(rank=0, target="query"),
}
AXES = {"stacked": {"kernel": "sio", "bias": "so"}}


def adapted(base="plain", spec="sequence"):
    made = jlora.adapt(BASES[base](), SPECS[spec](), axes=AXES.get(base))
    return trained(made)


def trained(adapter, seed=1):
    """The same with factors that no initialiser gives."""
    fill = lambda x: jnp.asarray(np.random.default_rng(seed).normal(size=x.shape), x.dtype)
    return jlora.Adapted(jax.tree.map(fill, adapter.trainable), adapter.frozen)


def bits(tree):
    def of(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return x.shape, str(x.dtype), np.asarray(x).tobytes()

    return [of(x) for x in jax.tree.leaves(tree)]


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and bits(a) == bits(b)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """One adapter, its base, and a folder that it is saved in; tests copy the folder."""
    adapter = adapted()
    path = tmp_path_factory.mktemp("saved") / "adapter"
    save(path, adapter)
    return path, adapter, adapter.frozen.base


@pytest.fixture
def copy(saved, tmp_path):
    return shutil.copytree(saved[0], tmp_path / "copy")


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


# --- there and back -----------------------------------------------------------------------------------------------


FITS = [(b, s) for s in SPECS for b in BASES if s == "lora" or b in ("plain", "nnx module")]
FITS += [(b, "sequence") for b in BASES if b not in ("plain", "nnx module", "sequence", "odd names")]


@pytest.mark.parametrize("base,spec", FITS)
def test_round_trip(base, spec, tmp_path):
    """An adapter of any kind of tree comes back bit for bit with its plan, and saving it moves no bit of it."""
    adapter = adapted(base, spec)
    before = bits(adapter)
    save(tmp_path / "x", adapter)
    back = load(tmp_path / "x", adapter.frozen.base)
    assert same(back, adapter) and bits(adapter) == before
    assert back.frozen.plan is adapter.frozen.plan and str(back) == str(adapter)
    assert back.frozen.base is adapter.frozen.base
    assert os.listdir(tmp_path) == ["x"], "nothing is left beside it"
    other = load(tmp_path / "x", BASES[base]())  # made anew, as another process would
    assert same(other.trainable, adapter.trainable)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3", "int4"])
def test_dtypes(dtype, tmp_path):
    """Factors of the narrow dtypes, float8 and int4 among them, come back bit for bit."""
    adapter = adapted()
    cast = jax.tree.map(lambda x: x.astype(dtype), adapter.trainable)
    adapter = jlora.Adapted(cast, adapter.frozen)
    save(tmp_path / "x", adapter)
    assert same(load(tmp_path / "x", adapter.frozen.base), adapter)


def test_values_that_compare_oddly(tmp_path):
    """NaN with a payload, -0.0, infinities and subnormals, in factors and in the base."""
    odd = np.array([0x7FC00123, 0xFFC00000, 0x80000000, 0x7F800000, 0x00000001, 0], np.uint32).view(np.float32)
    base = {"head": jnp.asarray(odd), "query": {"kernel": jnp.ones((2, 2))}}
    adapter = jlora.adapt(base, [jlora.Full(target="head"), jlora.LoRA(rank=1)])
    adapter.trainable["head"]["delta"] = jnp.asarray(odd[::-1].copy())
    save(tmp_path / "x", adapter)
    assert same(load(tmp_path / "x", base), adapter)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shared(methods.Method):
    """A method of a user's own: a shared frozen factor, a PRNG key, an array without elements."""

    width: int = 3
    note: "str | None" = None
    bounds: tuple[tuple[float, float], ...] = ()
    mode: int | str = 1
    odd: "Anything" = None  # noqa: F821
    target: str = "kernel$"

    def recipe(self, leaf):
        words = (
            network.Array("shift", methods.base.normal(1.0), shape=(self.width,)),
            network.Array("seed", lambda key, shape, dtype: key, shape=(), trained=False, group="shared"),
            network.Array("none", methods.base.zeros, shape=(0, 5)),
        )
        spread = network.Function(Spread(leaf.shape), words)
        return network.Recipe((network.Delta("I O -> I O", (spread,)),))


@dataclasses.dataclass(frozen=True)
class Spread:
    shape: tuple[int, ...]

    def __call__(self, shift, seed, none):
        return jnp.broadcast_to(shift.sum(), self.shape) + jax.random.normal(seed, self.shape)


def test_a_method_of_ones_own(tmp_path):
    """A user's method comes back with its fields where its class is given, and no class can pass for another."""
    spec = Shared(width=4, note='"', bounds=((0.1, 2),), mode="x")
    adapter = jlora.adapt(plain(), spec)
    save(tmp_path / "x", adapter)
    assert same(load(tmp_path / "x", plain(), methods=[Shared]), jlora.adapt(plain(), spec))
    assert same(load(tmp_path / "x", adapter.frozen.base, methods=[Shared]), adapter)
    with pytest.raises(ValueError, match=r"unknown method 'Shared'.*methods=\[MyMethod\]"):
        load(tmp_path / "x", plain())
    with pytest.raises(TypeError, match="subclasses"):
        load(tmp_path / "x", plain(), methods=[Spread])
    impostor = dataclasses.make_dataclass("LoRA", [], bases=(Shared,), frozen=True, kw_only=True)
    with pytest.raises(ValueError, match="two classes 'LoRA'"):
        load(tmp_path / "x", plain(), methods=[impostor])
    with pytest.raises(ValueError, match="rename your class"):
        save(tmp_path / "y", jlora.adapt(plain(), impostor()))
    with pytest.raises(ValueError, match="Shared.odd is .* cannot be saved"):
        save(tmp_path / "y", jlora.adapt(plain(), Shared(odd=print)))
    with pytest.raises(ValueError, match=r"Shared\(note=.*: a string or None"):
        Shared(note=print)
    assert os.listdir(tmp_path) == ["x"]


def test_callable_targets_become_paths(tmp_path):
    """A callable that only Python knows is not saved; the weights that it took are."""
    spec = [jlora.LoRA(rank=1, target=lambda path, leaf: "head" in path), jlora.LoRA(rank=2)]
    adapter = jlora.adapt(plain(), spec)
    save(tmp_path / "x", adapter)
    back = load(tmp_path / "x", adapter.frozen.base)
    assert bits(back) == bits(adapter) and str(back) == str(adapter)
    places = lambda a: [(s.leaf, s.index, s.recipe) for s in a.frozen.plan.sites]
    assert places(back) == places(adapter)
    save(tmp_path / "y", back)
    assert same(load(tmp_path / "y", back.frozen.base), back)


@pytest.mark.parametrize("kind", ["Explicit", "Auto"])
def test_sharded(kind, tmp_path):
    """Factors and base on a mesh of either kind, also with the mesh in the context."""
    adapter = adapted("stacked", "lora")
    save(tmp_path / "one", adapter)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(getattr(jax.sharding.AxisType, kind),) * 2)

    def place(x, *spec):
        return jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))

    kernel, bias = (adapter.frozen.base["query"][name] for name in ("kernel", "bias"))
    base = {"query": {"kernel": place(kernel, None, "y", "x"), "bias": place(bias, None, "x")}}
    factors = adapter.trainable["query/kernel"]
    spread = {"query/kernel": {"a": place(factors["a"], None, None, "y"), "b": place(factors["b"], None, "y", "x")}}
    whole = jlora.Adapted(spread, dataclasses.replace(adapter.frozen, base=base))
    for context in (contextlib.nullcontext(), jax.set_mesh(mesh)):
        with context:
            save(tmp_path / "x", whole, overwrite=True)
            assert bits(load(tmp_path / "x", base).trainable) == bits(adapter.trainable)
            assert bits(load(tmp_path / "one", base).trainable) == bits(adapter.trainable)
    assert same(load(tmp_path / "x", adapter.frozen.base), adapter)
    merged = jlora.Adapted(jax.tree.map(jnp.zeros_like, spread), whole.frozen)
    export(tmp_path / "merged", merged)
    assert bits(restored(tmp_path / "merged")) == bits(base)


def test_samples_do_not_depend_on_where_a_leaf_lies():
    """A fingerprint is of at most 1,024 elements, the same ones from NumPy, from one device and from a mesh."""
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    for shape, spec in [((4096, 30), ("x", "y")), ((12, 3000, 8), ("x",)), ((40_000,), ("x",)), ((8,), ()), ((), ())]:
        host = np.arange(np.prod(shape, dtype=int), dtype=np.float32).reshape(shape)
        laid = jax.device_put(host, jax.NamedSharding(mesh, jax.P(*spec)))
        a, b, c = _fingerprint.samples([host, jnp.asarray(host), laid])
        assert a.size <= 1024 and (a.size > 500 or a.size == host.size)
        assert np.array_equal(a, b) and np.array_equal(a, c)


def test_abstract_base(saved):
    """An adapter loads onto a base of structs, with all its factors, and keeps those structs for its base."""
    path, adapter, base = saved
    shapes = jax.eval_shape(lambda: base)
    back = load(path, shapes)
    assert bits((back.trainable, back.frozen.factors)) == bits((adapter.trainable, adapter.frozen.factors))
    assert back.frozen.base is shapes


def test_the_dropout_key_is_not_saved(saved, tmp_path):
    """A dropout key is not in the file: what is loaded has none."""
    _, adapter, base = saved
    save(tmp_path / "x", jlora.with_dropout(adapter, jax.random.key(3)))
    assert same(load(tmp_path / "x", base), adapter)


def test_inside_an_event_loop(saved, tmp_path):
    """As in a notebook."""
    import asyncio

    _, adapter, base = saved

    async def cell():
        save(tmp_path / "x", adapter)
        return load(tmp_path / "x", base)

    assert same(asyncio.run(cell()), adapter)


# all of VB-LoRA's factors are drawn: where they are says nothing
KNOWN = [row for row in METHODS if row.name != "vblora"]


@pytest.mark.parametrize("row", KNOWN, ids=lambda row: row.name)
def test_an_untrained_adapter_is_recognised(row):
    """Whatever the method: all factors where they began, and none once they have moved."""
    base = {"query": {"kernel": array(12, 12), "bias": array(12)}}
    fresh = jlora.adapt(base, row.spec("bias" if row.on == "vectors" else "kernel"))
    with pytest.warns(jlora.UntrainedWarning):
        _untrained.warn("save(path", fresh)
    with warnings.catch_warnings():
        warnings.simplefilter("error", jlora.UntrainedWarning)
        _untrained.warn("save(path", jlora.join(away_from_start(fresh.trainable), fresh.frozen))


def test_a_magnitude_that_moved_alone_is_training():
    """A DoRA of which m was trained and a, b were not is no adapter that was never trained."""
    fresh = jlora.adapt(plain(), jlora.DoRA(jlora.LoRA(rank=2, target="query/kernel")))
    factors = fresh.trainable["query/kernel"]
    moved = {"query/kernel": {**factors, "m": factors["m"] * 1.01}}
    with warnings.catch_warnings():
        warnings.simplefilter("error", jlora.UntrainedWarning)
        _untrained.warn("save(path", jlora.join(moved, fresh.frozen))


SAVES = {"save": jlora.save, "export": jlora.export, "jlora.io.peft.save": jlora.io.peft.save}


@pytest.mark.parametrize("init", ["kaiming", "pissa"])
@pytest.mark.parametrize("name", SAVES)
def test_saving_what_was_not_trained_says_so(name, init, tmp_path):
    """Training went on in `trainable`, and the Adapted of before was saved: the line that saves the trained one."""
    adapted = jlora.adapt(plain(), jlora.LoRA(rank=2, init=init, target="query/kernel"))
    seen = {"kaiming": "'b' of 'query/kernel' is 0.0 everywhere", "pissa": "'a' of 'query/kernel' is where it began"}
    line = re.escape(f"{name}(path, jlora.join(trainable, adapted.frozen))")
    with pytest.warns(jlora.UntrainedWarning, match=f"{seen[init]}, and no factor.* write {line}") as said:
        SAVES[name](tmp_path / "adapter", adapted)
    assert said[0].filename == __file__


# --- what cannot be saved, and where ------------------------------------------------------------------------------


def test_save_refuses(saved, tmp_path):
    """What is no adapter with all its values is refused by what is wrong with it, and nothing is left on the disk."""
    _, adapter, base = saved
    extra = jlora.Adapted({**adapter.trainable, "more": {"a": jnp.ones(2)}}, adapter.frozen)
    less = jlora.Adapted({}, adapter.frozen)
    stack = jlora.Adapted(jax.tree.map(lambda x: jnp.stack([x, x]), adapter.trainable), adapter.frozen)
    wide = jlora.Adapted(jax.tree.map(lambda x: np.zeros(x.shape), adapter.trainable), adapter.frozen)
    words = jlora.Adapted(jax.tree.map(lambda x: np.full(x.shape, "x"), adapter.trainable), adapter.frozen)
    gone = jlora.Adapted(jax.tree.map(lambda x: x + 0, adapter.trainable), adapter.frozen)
    jax.tree.map(lambda x: x.delete(), gone.trainable)
    table = [
        (base, TypeError, "takes an Adapted, not a dict"),
        (jlora.Adapted(adapter.trainable, None), TypeError, "takes an Adapted"),
        (jax.eval_shape(lambda: adapter), ValueError, "ShapeDtypeStruct and has no values"),
        (gone, ValueError, "donated"),
        (extra, ValueError, "extra 'more': 'a'"),
        (less, ValueError, "missing 'query/kernel': 'a'"),
        (stack, ValueError, "this is a stack of 2 adapters, and jlora.save takes one"),
        (wide, ValueError, "float64, which JAX truncates.*jax_enable_x64"),
        (words, ValueError, "not of numbers"),
    ]
    for value, error, message in table:
        with pytest.raises(error, match=message):
            save(tmp_path / "x", value)
    with pytest.raises(TypeError, match="cannot be traced: call it outside jit"):
        jax.jit(lambda t: save(tmp_path / "x", jlora.join(t, adapter.frozen)))(adapter.trainable)
    with pytest.raises(ValueError, match="local folder"):
        save("gs://bucket/x", adapter)
    assert os.listdir(tmp_path) == []


def test_one_of_several_processes_is_told_what_to_write(tmp_path, monkeypatch):
    """Nothing is written; what the words say works (`test_example_multihost` does it in two processes)."""
    params, spec = plain(), jlora.LoRA(rank=2)
    adapted = jlora.adapt(params, spec)
    writers = {"jlora.save": save, "jlora.export": export, "jlora.io.peft.save": jlora.io.peft.save}
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        for name, write in writers.items():
            with pytest.raises(NotImplementedError, match=rf"^{name} runs .*one of 2\.") as told:
                write(tmp_path / "x", adapted)
    assert os.listdir(tmp_path) == []
    words = str(told.value).splitlines()
    assert "jlora.load(path, params, spec=" in words[-1]
    exec(textwrap.dedent("\n".join(words[1:-1])), {"ocp": ocp, "adapted": adapted, "path": tmp_path / "x"})
    opened = load(tmp_path / "x", params, spec=spec)
    assert jax.tree.structure(opened) == jax.tree.structure(adapted)
    jax.tree.map(np.testing.assert_array_equal, opened, adapted)


def test_an_existing_path(saved, tmp_path):
    """Nothing is replaced unasked, and with overwrite=True only an empty folder or one that jlora wrote so itself."""
    _, adapter, base = saved
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").write_text("mine")
    (tmp_path / "empty").mkdir()
    save(tmp_path / "deep" / "er" / "x", adapter)
    for name in ("file", "folder", "empty", "deep/er/x"):
        with pytest.raises(FileExistsError, match="overwrite=True"):
            save(tmp_path / name, adapter)
    for name in ("file", "folder"):
        with pytest.raises(FileExistsError, match="holds no adapter"):
            save(tmp_path / name, adapter, overwrite=True)
        with pytest.raises(FileExistsError, match="holds no exported"):
            export(tmp_path / name, adapter, overwrite=True)
    with pytest.raises(FileExistsError, match="holds no exported"):
        export(tmp_path / "deep" / "er" / "x", adapter, overwrite=True)
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "notes").read_text() == "mine"
    other = trained(adapter, 5)
    for name in ("empty", "deep/er/x", "new"):
        save(tmp_path / name, other, overwrite=True)
        assert same(load(tmp_path / name, base), other)
        assert len(os.listdir(tmp_path / name)) == 2, "the old arrays are gone"


def test_leftovers_are_swept(saved, tmp_path):
    """A killed process's folder goes after a day; an abandoned half of an overwrite goes with the next."""
    _, adapter, base = saved
    for name, age in ((f".jlora-tmp-{1:016x}", 1e6), (f".jlora-tmp-{2:016x}", 0), (".jlora-tmp-mine", 1e6)):
        (tmp_path / name).mkdir()
        os.utime(tmp_path / name, (1e9, _folder.time.time() - age))
    save(tmp_path / "x", adapter)
    (tmp_path / "x" / f"arrays-{'0' * 16}").mkdir()
    (tmp_path / "x" / f".jlora-tmp-{3:016x}").mkdir()
    (tmp_path / "x" / "README").write_text("mine")
    assert same(load(tmp_path / "x", base), adapter)
    save(tmp_path / "x", adapter, overwrite=True)
    assert sorted(os.listdir(tmp_path)) == [f".jlora-tmp-{2:016x}", ".jlora-tmp-mine", "x"]
    assert len(os.listdir(tmp_path / "x")) == 3 and (tmp_path / "x" / "README").exists()


# --- interrupted saves --------------------------------------------------------------------------------------------


KILL = """
    import os, random, shutil, signal, sys, time
    import jlora
    from jlora.io import load, save
    import test_io

    folder, times = sys.argv[1], int(sys.argv[2])
    for n in range(times):
        shutil.copytree(f"{folder}/first", f"{folder}/{n}")
        pid = os.fork()
        if not pid:
            adapters = [test_io.trained(test_io.adapted(), seed) for seed in (5, 1)]
            open(f"{folder}/{n}-started", "w").close()
            while True:
                for adapter in adapters:
                    save(f"{folder}/{n}", adapter, overwrite=True)
        while not os.path.exists(f"{folder}/{n}-started"):
            time.sleep(0.01)
            assert os.waitpid(pid, os.WNOHANG) == (0, 0)
        time.sleep(random.Random(n).uniform(0, 0.8))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
"""


@pytest.mark.slow
def test_killed_at_random(saved, tmp_path):
    """SIGKILL in a loop of saves over one path: what is there is one of the two, whole."""
    _, adapter, base = saved
    shutil.copytree(saved[0], tmp_path / "first")
    times = 5
    here = os.path.dirname(__file__)
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([here, os.path.dirname(here), *sys.path])}
    script = textwrap.dedent(KILL)
    subprocess.run([sys.executable, "-c", script, str(tmp_path), str(times)], check=True, env=env, timeout=300)
    both = [adapter, trained(adapter, 5)]
    for n in range(times):
        assert any(same(load(tmp_path / str(n), base), x) for x in both)


# --- damage -------------------------------------------------------------------------------------------------------


def test_a_flipped_byte(saved, copy):
    """One bit or all of them, in each file, at its ends and at random places: an error, and never a wrong number."""
    _, _, base = saved
    rng = random.Random(0)
    for path in files(copy):
        raw = path.read_bytes()
        at = {0, len(raw) - 1, len(raw) // 2, *(rng.randrange(len(raw)) for _ in range(5))}
        if path.name == "jlora.json":
            at |= {rng.randrange(len(raw)) for _ in range(60)}
        for n in at:
            for mask in (1 << rng.randrange(8), 0xFF, 0x20):
                path.write_bytes(raw[:n] + bytes([raw[n] ^ mask]) + raw[n + 1 :])
                with pytest.raises(ValueError, match=f"{copy}.*(damaged|newer)"):
                    load(copy, base)
        path.write_bytes(raw)
    load(copy, base)


def test_a_file_cut_short_or_missing(saved, copy):
    """A file that is missing, short, long or one too many is refused, and a whole folder loads again."""
    _, _, base = saved
    for path in files(copy):
        raw = path.read_bytes()
        for keep in {0, 1, len(raw) // 2, len(raw) - 1}:
            path.write_bytes(raw[:keep])
            with pytest.raises(ValueError, match="cut short or damaged"):
                load(copy, base)
        path.write_bytes(raw + b"\0")
        with pytest.raises(ValueError, match="damaged"):
            load(copy, base)
        path.unlink()
        with pytest.raises(ValueError, match=f"cut short(.|\n)*{path.name}.* is missing"):
            load(copy, base)
        path.write_bytes(raw)
    load(copy, base)
    arrays = next(p for p in copy.iterdir() if p.is_dir())
    (arrays / "more").write_text("x")
    with pytest.raises(ValueError, match="more was not saved with it"):
        load(copy, base)
    shutil.rmtree(arrays)
    with pytest.raises(ValueError, match="cut short.*missing"):
        load(copy, base)


def test_damage_that_digests_of_files_miss(saved, copy):
    """Arrays replaced together with the digests of their files: the digest of the array itself names the factor."""
    _, adapter, base = saved
    content = read(copy)

    def rearrange(change):
        arrays = _arrays.gather(adapter)[0]
        data = copy / content["data"]
        shutil.rmtree(data)
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(data, args=ocp.args.PyTreeSave(change(arrays)))
        write(copy, {**content, "files": {n: list(f) for n, f in _folder.files(data).items()}})

    name = "trainable:query%2Fkernel:b"
    table = [
        (lambda a: {**a, name: -a[name]}, "factor 'query/kernel': 'b' is damaged"),
        (lambda a: {k: v for k, v in a.items() if k != name}, f"missing '{name}'"),
        (lambda a: {**a, "more": a[name]}, "extra 'more'"),
        (lambda a: {**a, name: a[name].T}, rf"'{name}' has shape \(4, 1\), not \(1, 4\)"),
        (lambda a: {**a, name: a[name].astype(np.float16)}, f"'{name}' has dtype float16, not float32"),
        (lambda a: {name: {"x": a[name]}}, "has shape None"),
    ]
    for change, message in table:
        rearrange(change)
        with pytest.raises(ValueError, match=message):
            load(copy, base)
    rearrange(lambda a: a)
    assert same(load(copy, base), adapter)


# --- hostile files ------------------------------------------------------------------------------------------------


def read(folder):
    content = json.loads((folder / "jlora.json").read_bytes())
    del content["sha256"]
    return content


def write(folder, content):
    """A manifest with a digest that is right, whatever is in it."""
    (folder / "jlora.json").write_bytes(_manifest.seal(content))


def put(*path_and_value):
    *path, last, value = path_and_value

    def change(content):
        node = content
        for step in path:
            node = node[step]
        if value is None and isinstance(last, str) and last.startswith("-"):
            del node[last[1:]]
        else:
            node[last] = value

    return change


FACTOR = "trainable:query%2Fkernel:a"
HOSTILE = [
    (put("format", 3), "of format 3, newer than 2.*upgrade jlora"),
    (put("format", 10**40), "newer than 2"),
    (put("format", "1"), "no format number"),
    (put("format", True), "no format number"),
    (put("format", 0), "no format number"),
    (put("-notes", None), "missing or unknown field 'notes'"),
    (put("more", 1), "missing or unknown field 'more'"),
    (put("notes", [1]), "'notes' of the manifest is '1', not of type str"),
    (put("files", []), "'files' of the manifest"),
    (put("files", "../../secret", [1, "0"]), "../../secret is missing"),
    (put("files", "/etc/passwd", [1, "0"]), "/etc/passwd is missing"),
    (put("data", "../elsewhere"), "'../elsewhere' is no name of its arrays"),
    (put("data", "/etc"), "no name of its arrays"),
    (put("data", None), "holds no arrays, but names"),
    (put("data", "arrays-0000000000000000"), "missing or a link"),
    (put("base", {}), "'base' of the manifest"),
    (put("base", 0, 1, ["x"]), "not of type int"),
    (put("base", []), "not in its base"),
    (put("sites", 0, 0, "nowhere/kernel"), "not in its base"),
    (put("sites", 0, 1, "xx"), "'xx' are not the letters of"),
    (put("sites", 1, 1, "o"), "'o' are not the letters of 'query/kernel'"),
    (put("sites", 1, 1, "ss"), "LoRA on 'query/kernel' .*needs input and output axes"),
    (put("sites", 0, 2, 99), "a method that it does not hold"),
    (put("sites", 0, 2, -1), "a method that it does not hold"),
    (put("sites", 0, 2, True), "not of type int"),
    (put("rules", [7]), "a method that it does not hold"),
    (put("methods", []), "a method that it does not hold"),
    (put("methods", [1]), "'methods' of the manifest"),
    (put("methods", 0, "method", "os.system"), "unknown method 'os.system'; this jlora has .*BitFit, .*Full, "),
    (put("methods", 0, "method", "Method"), "unknown method"),
    (put("methods", 0, "method", "base"), "unknown method"),
    (put("methods", 0, "method", ["LoRA"]), "unknown method"),
    (put("methods", 0, "-method", None), "unknown method"),
    (put("methods", 0, "ranks", 1), "'ranks' of LoRA is unknown; it has .*rank"),
    (put("methods", 0, "rank", "2"), "'rank' of LoRA is '2', not of type int"),
    (put("methods", 0, "rank", 2.0), "not of type int"),
    (put("methods", 0, "rank", True), "not of type int"),
    (put("methods", 0, "rank", -1), "at least 0"),
    (put("methods", 0, "rank", 10**30), "a rank is an integer .* in 31 bits"),
    (put("methods", 0, "rank", 0), "leaves this weight alone"),
    (put("methods", 0, "rank", 2), "'a' has shape .*, not"),
    (put("methods", 0, "dropout", 1.0), r"\[0, 1\)"),
    (put("methods", 0, "dropout", "0.5"), "'dropout' of LoRA"),
    (put("methods", 0, "init", "evil"), "'init' of LoRA"),
    (put("methods", 0, "slices", [[0, "1"]]), "'slices' of LoRA"),
    (put("methods", 0, "slices", [[0, 1, 2]]), "'slices' of LoRA"),
    (put("methods", 0, "slices", [[0, 1]]), "missing .*'a0'"),
    (put("methods", 0, "target", {"jlora.targets": "re"}), "is unknown"),
    (put("methods", 0, "target", {"jlora.targets": ["linear"]}), "is unknown"),
    (put("methods", 0, "target", {"os": "system"}), "is unknown"),
    (put("factors", FACTOR, "shape", [10**12, 10**12]), "'a' has shape .*, not"),
    (put("factors", FACTOR, "shape", [-1, 6]), "'a' has shape .*, not"),
    (put("factors", FACTOR, "dtype", "object"), "unknown dtype, 'object'"),
    (put("factors", FACTOR, "dtype", "f4,(1000000000,)f4"), "unknown dtype"),
    (put("factors", FACTOR, "dtype", "finfo"), "unknown dtype"),
    (put("factors", FACTOR, "dtype", "int32"), "dtype float32, not int32"),
    (put("factors", FACTOR, "key", "threefry2x32"), "is no key"),
    (put("factors", FACTOR, "key", "evil"), "is no key"),
    (put("factors", FACTOR, "sha256", "0" * 64), "factor 'query/kernel': 'a' is damaged"),
    (put("factors", FACTOR, {}), "missing or unknown field"),
    (put("factors", "-" + FACTOR, None), "missing 'query/kernel': 'a'"),
    (put("factors", "../x", {"shape": [], "dtype": "float32", "key": None, "sha256": ""}), "extra '../x'"),
]


@pytest.mark.parametrize("change,message", HOSTILE, ids=[f"{n}" for n in range(len(HOSTILE))])
def test_a_hostile_manifest(change, message, saved, copy):
    """A manifest with a right digest is refused in a short text where it is false of files, methods or arrays."""
    content = read(copy)
    change(content)
    write(copy, content)
    with pytest.raises(ValueError, match=message) as error:
        load(copy, saved[2])
    assert len(str(error.value)) < 2000


RAW = [b"", b"\0" * 9, b"[]", b"1", b'{"format": 1}', b"{" * 100_000, b"[" * 100_000, b"\xff\xfe{}"]
RAW += [b'{"format": 1' + b"0" * 9000 + b"}", b'{"format": NaN}', b'{"format": 1, "sha256": NaN}']
RAW += [b'{"format": 1, "x": 1e999, "sha256": ""}', b'{"format": 1, "format": 1}']


@pytest.mark.parametrize("raw", RAW, ids=range(len(RAW)))
def test_no_manifest_at_all(raw, saved, copy):
    """Whatever bytes stand for a manifest, they are refused as damaged, and deep or long ones break no parser."""
    (copy / "jlora.json").write_bytes(raw)
    with pytest.raises(ValueError, match="jlora.json is (cut short or damaged|of format)"):
        load(copy, saved[2])


def test_a_manifest_spelt_otherwise(saved, copy):
    """What it says is the same; but nothing jlora writes looks so."""
    content = json.loads((copy / "jlora.json").read_bytes())
    (copy / "jlora.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="digest"):
        load(copy, saved[2])


def test_links(saved, copy, tmp_path):
    """A user's link to a folder is followed; a link or a pipe inside one is refused, as it could lead anywhere."""
    path, _, base = saved
    (tmp_path / "latest").symlink_to(copy)
    load(tmp_path / "latest", base)  # the user's own link to a whole folder is fine
    data = next(p for p in copy.iterdir() if p.is_dir())
    for inside in [copy / "jlora.json", data, data / "_METADATA", data / "d"]:
        real = tmp_path / "real"
        inside.rename(real)
        inside.symlink_to(real)
        with pytest.raises(ValueError, match="link"):
            load(copy, base)
        inside.unlink()
        real.rename(inside)
    os.mkfifo(data / "pipe")
    with pytest.raises(ValueError, match="no plain file"):
        load(copy, base)


def test_load_refuses(saved, tmp_path):
    """What cannot be loaded, or not so, is refused with what is there instead or what to write."""
    path, adapter, base = saved
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    table = [
        (tmp_path / "nowhere", {}, FileNotFoundError, "nothing at"),
        (tmp_path / "file", {}, ValueError, "is a file"),
        (tmp_path / "empty", {}, ValueError, r"holds no jlora.json.*spec=jlora.LoRA"),
        (tmp_path / "empty", {"spec": jlora.LoRA(rank=1)}, ValueError, "no Orbax checkpoint"),
        (path, {"check": "all"}, ValueError, "write 'values', 'shapes' or 'none'"),
        (path, {"spec": jlora.LoRA(rank=1)}, ValueError, "leave it out"),
        ("s3://bucket", {}, ValueError, "local"),
    ]
    for where, kwargs, error, message in table:
        with pytest.raises(error, match=message):
            load(where, base, **kwargs)
    with pytest.raises(TypeError, match="takes the base"):
        load(path, adapter)


# --- the base -----------------------------------------------------------------------------------------------------


def changed(**leaves):
    base = plain()
    for path, change in leaves.items():
        node, name = path.split("__")
        old = base[node].pop(name, None)
        if change is not None:
            base[node][name] = change(old)
    return base


OTHER_BASES = [
    ({}, {"values", "shapes", "none"}, ""),
    ({"head__kernel": lambda x: x.at[3, 1].add(1e-6)}, {"shapes", "none"}, "'head/kernel' has other values"),
    ({"head__kernel": lambda x: -x}, {"shapes", "none"}, "check='shapes'.*\n.*'head/kernel' has other values"),
    ({"query__kernel": lambda x: x + 1}, {"shapes", "none"}, "'query/kernel' has other values"),
    ({"head__kernel": lambda x: x.astype("bfloat16")}, {"shapes", "none"}, "has dtype bfloat16, was float32"),
    ({"query__kernel": lambda x: x.astype("bfloat16")}, {"shapes", "none"}, "has dtype bfloat16, was float32"),
    ({"head__kernel": lambda x: x[:3]}, {"none"}, r"check='none'.*\n.*has shape \(3, 2\), was \(4, 2\)"),
    ({"head__kernel": None}, {"none"}, "'head/kernel' is not in params"),
    ({"head__more": lambda x: jnp.ones(1)}, {"none"}, "'head/more' is in params alone"),
    ({"query__kernel": lambda x: x[:5]}, set(), r"'query/kernel' has shape \(5, 4\), the adapter's is \(6, 4\)"),
    ({"query__kernel": lambda x: x.astype(int)}, set(), "only real floating point"),
    ({"query__kernel": None}, set(), "'query/kernel' is not in params; the nearest paths are"),
]


@pytest.mark.parametrize("base,allowed,message", OTHER_BASES, ids=range(len(OTHER_BASES)))
def test_another_base(base, allowed, message, saved):
    """A base that is not the adapter's is refused by leaf and difference as `check` asks, a misfit at every `check`."""
    path, adapter, _ = saved
    base = changed(**base)
    for check in ("values", "shapes", "none"):
        if check in allowed:
            assert bits(load(path, base, check=check).trainable) == bits(adapter.trainable)
        else:
            with pytest.raises(ValueError, match=message):
                load(path, base, check=check)


def test_the_state_of_random_streams_is_no_base(tmp_path):
    """A random stream may have gone on since the save and the base is the same; a batch statistic may not."""
    model = Model(nnx.Rngs(0))
    adapter = jlora.adapt(model, jlora.LoRA(rank=1))
    save(tmp_path / "x", adapter)
    model.dropout.rngs.count[...] += 3
    assert same(load(tmp_path / "x", model).trainable, adapter.trainable)
    model.norm.mean[...] += 1
    with pytest.raises(ValueError, match="'norm/mean' has other values"):
        load(tmp_path / "x", model)


def test_integers_keys_and_scalars_in_the_base(tmp_path):
    """Integers, flags, masks and plain scalars of a base are compared by value, and PRNG keys are not."""
    base = {"query": {"kernel": array(6, 4)}, "codes": jnp.arange(7, dtype=jnp.uint8), "key": jax.random.key(0)}
    base |= {"step": 3, "rate": 0.5, "on": True, "mask": np.ones(2, bool)}
    base |= {"int4": jnp.ones(4, "int4"), "none": jnp.ones((0, 3)), "complex": jnp.ones(2, complex)}
    adapter = jlora.adapt(base, jlora.LoRA(rank=1))
    save(tmp_path / "x", adapter)
    assert same(load(tmp_path / "x", base).trainable, adapter.trainable)
    load(tmp_path / "x", base | {"key": jax.random.key(1)})
    for name, value in [("codes", base["codes"] + 1), ("step", 4), ("on", False), ("mask", np.zeros(2, bool))]:
        with pytest.raises(ValueError, match=f"'{name}' has other values"):
            load(tmp_path / "x", base | {name: value})


# --- training checkpoints -----------------------------------------------------------------------------------------


def state(adapter, seed):
    tx = optax.adam(1e-3)
    tree = trained(adapter, seed).trainable
    return {"trainable": tree, "opt_state": tx.init(tree), "step": jnp.int32(seed), "key": jax.random.key(seed)}


def manager(path, composite=False, **options):
    def request(tree):
        item = ocp.args.StandardSave(tree)
        return ocp.args.Composite(state=item, info=ocp.args.JsonSave({})) if composite else item

    adapter = jlora.adapt(plain(), SPECS["sequence"]())
    with ocp.CheckpointManager(path, options=ocp.CheckpointManagerOptions(**options)) as checkpoints:
        for step in (2, 9, 10):
            checkpoints.save(step, args=request(state(adapter, step)))
        checkpoints.wait_until_finished()


@pytest.mark.parametrize("composite", [False, True])
def test_training_checkpoint(composite, tmp_path):
    """A run of Orbax opens at its last whole step or at a step or item named; a spec that does not fit is refused."""
    options = {"step_prefix": "run_1", "step_format_fixed_length": 6} if composite else {}
    manager(tmp_path / "x", composite, **options)
    (tmp_path / "x" / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "x" / "12").mkdir()  # cut short: it holds nothing
    base, spec = plain(), SPECS["sequence"]()
    fresh = jlora.adapt(base, spec)
    back = load(tmp_path / "x", base, spec=spec)
    assert same(back, trained(fresh, 10))
    assert same(load(tmp_path / "x", base, spec=fresh), back)
    older = tmp_path / "x" / ("run_1_000009" if composite else "9")
    assert same(load(older, base, spec=spec), trained(fresh, 9))
    item = older / ("state" if composite else "default")
    assert same(load(item, base, spec=spec), trained(fresh, 9))
    with pytest.raises(ValueError, match=r"spec=jlora.LoRA\(...\)"):
        load(tmp_path / "x", base)
    with pytest.raises(ValueError, match=r"do not fit the spec:\n.*missing .*\n.*"):
        load(tmp_path / "x", base, spec=jlora.LoRA(rank=2, target="head|query/kernel"))
    with pytest.raises(ValueError, match=r"has shape \(1, 6\), not \(2, 6\)"):
        load(tmp_path / "x", base, spec=[jlora.LoRA(rank=2, target="kernel"), *SPECS["sequence"]()[1:]][:2])
    with pytest.raises(ValueError, match="'query/kernel' of the Adapted given as spec is not so in params"):
        load(tmp_path / "x", changed(query__kernel=lambda x: x[:5]), spec=fresh)


def test_other_forms_of_training_checkpoints(tmp_path):
    """A tree and both forms of a TrainState open alike; a folder with no trainable half, or several, is refused."""
    base, spec = plain(), SPECS["lora"]()
    adapter = trained(jlora.adapt(base, spec))
    tx = optax.sgd(0.1)
    split = TrainState.create(apply_fn=None, params=adapter.trainable, tx=tx)
    whole = TrainState.create(apply_fn=None, params=adapter, tx=jlora.masked(tx))
    trees = {"tree": state(adapter, 1), "split": split, "whole": whole, "odd": {"weights": adapter.trainable}}
    for name, tree in trees.items():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
    for name in ("tree", "split", "whole"):
        assert same(load(tmp_path / name, base, spec=spec), adapter)
    with pytest.raises(ValueError, match="no item with a 'trainable' half; it holds\n  odd: weights"):
        load(tmp_path / "odd", base, spec=spec)
    with ocp.CheckpointManager(tmp_path / "two") as checkpoints:
        half = {"params": adapter.trainable}
        args = {"a": ocp.args.StandardSave(half), "b": ocp.args.StandardSave(half)}
        checkpoints.save(1, args=ocp.args.Composite(**args))
    with pytest.raises(ValueError, match="several items"):
        load(tmp_path / "two", base, spec=spec)
    assert same(load(tmp_path / "two" / "1" / "b", base, spec=spec), adapter)


@pytest.mark.parametrize("name", ["lora", "pissa", "lora_fa", "dora"])
def test_a_whole_checkpoint_has_its_frozen_factors(name, tmp_path):
    """Scales and frozen factors that no spec knows come from the file: another alpha, another key."""
    spec = {
        "lora": lambda alpha: jlora.LoRA(rank=2, alpha=alpha),
        "pissa": lambda alpha: jlora.LoRA(rank=2, alpha=alpha, init="pissa"),
        "lora_fa": lambda alpha: jlora.LoRAFA(rank=2, alpha=alpha),
        "dora": lambda alpha: jlora.DoRA(jlora.LoRA(rank=2, alpha=alpha)),
    }[name]
    base = {"query": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
    adapter = trained(jlora.adapt(base, spec(8.0), key=jax.random.key(5)))
    whole = TrainState.create(apply_fn=None, params=adapter, tx=jlora.masked(optax.adam(0.1)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", whole)
    assert same(load(tmp_path / "x", base, spec=spec(2.0)), adapter)
    with pytest.raises(ValueError, match=r"another base, or its optimizer moved.*jlora.masked\(tx\).*\n.*query/kernel"):
        load(tmp_path / "x", jax.tree.map(lambda x: x * 0.9, base), spec=spec(2.0))


def test_an_optimizer_that_moved_the_base_is_named(tmp_path):
    """AdamW on a whole Adapted without `masked`: by its state at save, by the base at load, in either file."""
    base = {"query": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
    adapter, tx = jlora.adapt(base, jlora.LoRA(rank=2)), optax.adamw(0.1, weight_decay=0.1)
    opt_state = tx.init(adapter)
    updates, opt_state = tx.update(jax.tree.map(jnp.zeros_like, adapter), opt_state, adapter)
    moved = optax.apply_updates(adapter, updates)
    with pytest.raises(ValueError, match="save: the optimizer's state holds the frozen half.*jlora.masked"):
        save(tmp_path / "x", moved, opt_state=opt_state)
    assert not (tmp_path / "x").exists()
    save(tmp_path / "x", moved)
    with pytest.raises(ValueError, match=r"an optimizer has moved it.*jlora.masked\(tx\)"):
        load(tmp_path / "x", base)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", {"params": moved, "opt_state": opt_state})
    with pytest.raises(ValueError, match=r"its optimizer moved the base.*jlora.masked\(tx\)"):
        load(tmp_path / "run", base, spec=jlora.LoRA(rank=2))
    assert same(load(tmp_path / "run", moved.frozen.base, spec=jlora.LoRA(rank=2)), moved)


@pytest.mark.parametrize("call", ["metadata", "restore"])
def test_what_orbax_cannot_read(call, tmp_path, monkeypatch):
    """A failure inside Orbax comes out as a ValueError that says Orbax cannot read the folder, and why."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", {"trainable": adapted(spec="lora").trainable})

    def broken(*args, **kwargs):
        raise RuntimeError("no such chunk")

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, call, broken)
    with pytest.raises(ValueError, match="Orbax cannot read .*: no such chunk"):
        load(tmp_path / "x", plain(), spec=SPECS["lora"]())


def test_frozen_factors_are_not_in_a_training_checkpoint(tmp_path):
    """Ones that depend on a key that nobody has said would be others."""
    adapter = jlora.adapt(plain(), Shared(), key=jax.random.key(7))
    keep = jlora.Adapted({k: {"shift": v["shift"]} for k, v in adapter.trainable.items()}, adapter.frozen)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "x", {"trainable": keep.trainable})
    with pytest.raises(ValueError, match=r"frozen factors \['seed'\].*spec=jlora.adapt"):
        load(tmp_path / "x", plain(), spec=Shared())
    with pytest.raises(ValueError, match="missing 'head/kernel': 'none'"):
        load(tmp_path / "x", plain(), spec=adapter)


def test_names_that_orbax_confuses_in_training(tmp_path):
    """Dotted names survive jlora's files and Orbax's; where two keys are one name to Orbax, nothing is guessed."""
    base = {"w.a": array(4, 4), "w": {"a.b": array(4, 4)}}
    spec = jlora.LoRA(rank=2, target="w")
    adapter = jlora.adapt(base, spec)
    save(tmp_path / "ours", adapter)
    assert same(load(tmp_path / "ours", base), adapter)
    confused = {"trainable": adapter.trainable, "x.a": jnp.ones(1), "x": {"a": jnp.ones(1)}}
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "fine", {"trainable": adapter.trainable})
        checkpointer.save(tmp_path / "x", confused)
    assert same(load(tmp_path / "fine", base, spec=spec), adapter)
    with pytest.raises(ValueError, match=r"\('x', 'a'\) and \('x.a',\) one name"):
        load(tmp_path / "x", base, spec=spec)


# --- export -------------------------------------------------------------------------------------------------------


def restored(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


def inner(node):
    return [] if isinstance(node, np.ndarray) else [node, *(x for child in node.values() for x in inner(child))]


def named(tree):
    """`{path: bits}`; keys as their data."""
    flat = _tree.flatten(tree)
    is_key = lambda x: jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    leaves = [jax.random.key_data(x) if is_key(x) else x for x in flat.leaves]
    return dict(zip(flat.paths, bits(leaves), strict=True))


@pytest.mark.parametrize("base", ["plain", "flat", "sequence", "nnx module", "boxes", "stacked"])
def test_export(base, tmp_path):
    """An export is the merged model in plain dicts, bit for bit, and is replaced on request alone, without remains."""
    adapter = jlora.scale(adapted(base, "lora"), 1)
    export(tmp_path / "x", adapter)
    back = restored(tmp_path / "x")

    assert all(type(node) is dict for node in inner(back))
    assert named(back) == named(jlora.merge(adapter))
    assert os.listdir(tmp_path) == ["x"]
    with pytest.raises(FileExistsError, match="overwrite=True"):
        export(tmp_path / "x", adapter)
    export(tmp_path / "x", jlora.scale(adapter, 0), overwrite=True)
    assert bits(jax.tree.leaves(restored(tmp_path / "x"))) != bits(jax.tree.leaves(back))
    assert os.listdir(tmp_path) == ["x"]


def test_export_recovers(saved, tmp_path):
    """Killed between the two renames of a replacement."""
    _, adapter, _ = saved
    export(tmp_path / "x", adapter)
    before = bits(restored(tmp_path / "x"))
    (tmp_path / "x").rename(tmp_path / ".x.jlora-old")
    with pytest.raises(FileExistsError):
        export(tmp_path / "x", adapter)
    assert bits(restored(tmp_path / "x")) == before
    shutil.copytree(tmp_path / "x", tmp_path / ".x.jlora-old")  # killed after the second
    export(tmp_path / "x", adapter, overwrite=True)
    assert os.listdir(tmp_path) == ["x"]


def test_export_refuses_to_lose_an_update(tmp_path):
    """An export that loses most of an update is refused unless `allow_loss`; one that loses a part of it warns."""
    base = {"query": {"kernel": jnp.ones((8, 8), jnp.bfloat16)}}
    fresh = jlora.adapt(base, jlora.LoRA(rank=2, alpha=2))
    ones = jlora.Adapted(jax.tree.map(jnp.ones_like, fresh.trainable), fresh.frozen)
    for size, kept in ((1.5 * 2**-10, 0.0), (1.2 * 2**-7, 0.8), (0.25, 1.0)):
        adapter = jlora.scale(ones, size / 2)
        assert abs(jlora.merge_report(adapter).worst - kept) < 0.1
        path = tmp_path / str(kept)
        if kept < 0.5:
            with pytest.raises(ValueError, match="allow_loss=True.*\n.*survives.*\n.*\nquery/kernel"):
                export(path, adapter)
            assert not path.exists()
            with pytest.warns(UserWarning, match="loses a part of the update of 1 weight"):
                export(path, adapter, allow_loss=True)
        elif kept < 0.9:
            with pytest.warns(UserWarning, match="query/kernel"):
                export(path, adapter)
        else:
            export(path, adapter)  # a warning would be an error here
        assert bits(restored(path)) == bits(jlora.merge(adapter))


def test_export_refuses(saved, tmp_path):
    """What Orbax would confuse or cannot store is refused by its path, without remains; integer keys become strings."""
    _, adapter, base = saved
    spec = jlora.LoRA(rank=1, target="query")
    query = {"query": {"kernel": array(6, 4)}}
    table = [
        ({"a.b": {"c": array(1)}, "a": {"b.c": array(1)}} | query, "'a/b.c' and 'a.b/c' are one name to Orbax"),
        ({"empty": jnp.ones((0, 2))} | query, r"'empty' has shape \(0, 2\)"),
        ({"shape": jax.ShapeDtypeStruct((1,), jnp.float32)} | query, "'shape' is ShapeDtypeStruct, not an array"),
    ]
    for tree, message in table:
        with pytest.raises(ValueError, match=message):
            export(tmp_path / "x", jlora.adapt(tree, spec))
    with pytest.raises(TypeError, match="takes an Adapted, not a dict"):
        export(tmp_path / "x", base)
    with pytest.raises(TypeError, match="cannot be traced"):
        jax.jit(lambda t: export(tmp_path / "x", jlora.join(t, adapter.frozen)))(adapter.trainable)
    with pytest.raises(ValueError, match="'odd' has dtype float8_e4m3, which Orbax cannot store"):
        export(tmp_path / "x", jlora.adapt({"odd": jnp.ones(2, "float8_e4m3")} | query, spec))
    assert os.listdir(tmp_path) == []
    export(tmp_path / "x", jlora.adapt({"n": {0: query, 1: array(2)}, "a/b": array(1), "a": {"b": array(2)}}, spec))
    back = restored(tmp_path / "x")
    assert set(back["n"]) == {"0", "1"} and back["a/b"].shape == (1,) and back["a"]["b"].shape == (2,)


def test_an_export_opens_on_other_devices(tmp_path):
    """In a process without jlora, with one device where this one has eight."""
    mesh = jax.make_mesh((8,), ("x",))
    base = {"query": {"kernel": jax.device_put(array(8, 8), jax.NamedSharding(mesh, jax.P("x")))}}
    export(tmp_path / "x", jlora.adapt(base, jlora.LoRA(rank=1)))
    script = f"""
import sys, orbax.checkpoint as ocp
tree = ocp.StandardCheckpointer().restore({str(tmp_path / "x")!r})
assert "jlora" not in sys.modules
sys.stdout.write(tree["query"]["kernel"].tobytes().hex())
"""
    env = {**os.environ, "XLA_FLAGS": ""}
    out = subprocess.run([sys.executable, "-c", script], check=True, env=env, capture_output=True, text=True).stdout
    assert bytes.fromhex(out) == np.asarray(base["query"]["kernel"]).tobytes()


def test_64_bits(tmp_path):
    """float64 factors come back whole under x64, and without it they are refused and not truncated."""
    base = {"query": {"kernel": np.asarray(array(6, 4))}}
    with jax.enable_x64(True):
        adapter = trained(jlora.adapt(base, jlora.LoRA(rank=1, dtype="float64")))
        save(tmp_path / "x", adapter)
        assert same(load(tmp_path / "x", base), adapter)
    with pytest.raises(ValueError, match="float64 .*jax_enable_x64"):
        load(tmp_path / "x", base)


@pytest.mark.parametrize("module,name", [(_folder, "files"), (_arrays, "restore"), (_manifest, "read_plan")])
def test_loading_while_another_saves(module, name, saved, tmp_path, monkeypatch):
    """The manifest is read, then the folder is saved over: the reader begins again."""
    _, adapter, base = saved
    other = trained(adapter, 5)
    save(tmp_path / "x", adapter)
    real, turns = getattr(module, name), []

    def late(*args):
        turns.append(name)
        if len(turns) == 1:
            save(tmp_path / "x", other, overwrite=True)
        return real(*args)

    monkeypatch.setattr(module, name, late)
    assert same(load(tmp_path / "x", base), other) and len(turns) > 1
