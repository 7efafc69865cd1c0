"""Folders of all four kinds: odd names, full disks, kills at every step, a user's own files; bases that were edited."""

import contextlib
import errno
import json
import os
import pathlib
import random
import re
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jlora
from jlora.io import _checkpoint, _folder, _manifest, _pattern, _record, peft, quantised

RNG = np.random.default_rng(0)
BASE = {"query": {"kernel": jnp.asarray(RNG.normal(size=(64, 8)), jnp.float32)}, "bias": jnp.zeros(3)}


def normal(tree):
    return jax.tree.map(lambda x: jnp.asarray(RNG.normal(size=x.shape), x.dtype), tree)


def adapter():
    fresh = jlora.adapt(BASE, jlora.LoRA(rank=2, target="kernel"))
    return jlora.join(normal(fresh.trainable), fresh.frozen)


def quantized():
    return jlora.quantize(normal(BASE), "int4+double", target="kernel")


def restored(path):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path)


#: Of each kind: something to save, how it is saved, how it is opened, and what of it must be the same.
KINDS = {
    "adapter": (adapter, jlora.save, lambda path: jlora.load(path, BASE), lambda x: x),
    "export": (adapter, jlora.export, restored, lambda x: jlora.merge(x) if isinstance(x, jlora.Adapted) else x),
    "quantised": (quantized, quantised.save, quantised.load, lambda x: x),
    "peft": (adapter, peft.save, lambda path: peft.load(path, BASE), lambda x: x),
}  # fmt: skip


def bits(kind, value):
    return [(x.shape, str(x.dtype), np.asarray(x).tobytes()) for x in jax.tree.leaves(KINDS[kind][3](value))]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Of each kind: a folder with an old one and a user's own files, and the old and the new one."""
    found = {}
    for kind, (make, save, _, _) in KINDS.items():
        path = tmp_path_factory.mktemp(kind) / "x"
        old, new = make(), make()
        save(path, old)
        (path / "README.md").write_text("mine")
        (path / "more" / "d").mkdir(parents=True)
        (path / "more" / "d" / "_METADATA").write_text("mine")
        found[kind] = path, old, new
    return found


def mine(path):
    return (path / "README.md").read_text() == (path / "more" / "d" / "_METADATA").read_text() == "mine"


@pytest.fixture
def remembered(monkeypatch, tmp_path):
    """What Orbax writes, once each: what is tested is what is round it."""
    write, stored = ocp.Checkpointer.save, {}

    def save(self, directory, args):
        content = tuple((str(k), np.asarray(x).tobytes()) for k, x in jax.tree_util.tree_leaves_with_path(args.item))
        if content in stored:
            shutil.copytree(stored[content], directory)
        else:
            write(self, directory, args=args)
            stored[content] = shutil.copytree(directory, tmp_path / f"stored {len(stored)}")

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    monkeypatch.setattr(_checkpoint, "read_back", lambda *args: None)


# --- paths --------------------------------------------------------------------------------------------------------

NAMES = [
    "lr=[0.1,0.2]",
    "a*b?",
    "{a,b}",
    "a\\b",
    "gs:",
    "é中\n",
    "~",
    "1.__lock",
    "a" * 255,
    ".hidden ",
    "ocdbt.process_0",
    "a\udcffb",
    "x.orbax-checkpoint-tmp-1",
]
#: What Orbax cannot open where it is: a user would not either.
UNREADABLE = {
    "a\\b": "backslash",
    "gs:": "called gs:",
    "1.__lock": "ends in .__lock",
    "a\udcffb": "not UTF-8",
    "x.orbax-checkpoint-tmp-1": "not finished",
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_a_path_is_what_is_written(kind, name, pairs, tmp_path):
    """Whatever its letters, what was saved there is there, and is replaced there; or the words say why not."""
    _, old, new = pairs[kind]
    _, save, load, _ = KINDS[kind]
    path = tmp_path / name / name
    if kind == "export" and name in UNREADABLE:
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(ValueError, match=f"{UNREADABLE[name]}.*Orbax cannot"),
        ):
            patch.setattr(_folder, "new_folder", None)  # nothing is written before it is said
            save(path, old)
        assert os.listdir(tmp_path) == []
        return
    save(path, old)
    save(path, new, overwrite=True)
    assert bits(kind, load(path)) == bits(kind, new)
    assert os.listdir(tmp_path) == [name] and os.listdir(tmp_path / name) == [name]


@pytest.mark.parametrize("kind", KINDS)
def test_paths_of_other_kinds(kind, pairs, tmp_path, monkeypatch):
    """Relative ones, with a slash at the end, as a `Path`, through links, below a file; and what is none."""
    _, old, new = pairs[kind]
    _, save, load, _ = KINDS[kind]
    monkeypatch.chdir(tmp_path)
    save("a/../x/", old)
    (tmp_path / "link").symlink_to("x")
    (tmp_path / "ahead").symlink_to("later")
    save(pathlib.Path("link"), new, overwrite=True)
    save("ahead", new)
    for path in ("x", "./x//", "link", pathlib.Path("later")):
        assert bits(kind, load(os.path.abspath(path) if kind == "export" else path)) == bits(kind, new)
    assert sorted(os.listdir()) == ["ahead", "later", "link", "x"] and os.readlink("link") == "x"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="file"):
        save("file/x", old)
    for bad, error, words in [
        ("", ValueError, "empty"),
        ("~/x", ValueError, "expanduser"),
        (b"x", TypeError, "path.*bytes"),
        (None, TypeError, "path.*NoneType"),
        (old, TypeError, "path of a folder is a string.*comes first"),
        ("s3://bucket/x", ValueError, "no path of a local folder"),
        ("x\0", ValueError, "no path of a local folder"),
    ]:
        with pytest.raises(error, match=words):
            save(bad, old)
    assert sorted(os.listdir()) == ["ahead", "file", "later", "link", "x"] and os.listdir(tmp_path / "x")


def test_what_was_not_written_is_not_said_to_be(pairs, tmp_path, monkeypatch):
    """A disk that loses what it is given: no save returns, and nothing is left."""
    real = np.ndarray.tobytes

    def lost(folder, want, restore):
        return read_back(folder, jax.tree.map(lambda x: np.asarray(x) + np.ones((), x.dtype), want), restore)

    read_back = _checkpoint.read_back
    monkeypatch.setattr(_checkpoint, "read_back", lost)
    monkeypatch.setattr(peft._peft_layout, "read", lambda path: {})
    for kind, (_, save, _, _) in KINDS.items():
        with pytest.raises(OSError, match="does not hold what was written"):
            save(tmp_path / kind / "x", pairs[kind][1])
    assert os.listdir(tmp_path) == [] and real


# --- interrupted --------------------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


STEPS = "mkdir rename replace fsync rmdir unlink link".split()


@contextlib.contextmanager
def steps(monkeypatch, at_once, act):
    """Calls `act(n)` at the nth change of the file system. Yields the count so far."""
    count = [0]

    def counted(real):
        def call(*args, **kwargs):
            count[0] += 1
            act(count[0])
            return real(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in STEPS:
            patch.setattr(os, name, counted(getattr(os, name)))
        patch.setattr(_folder, "exchange", counted(_folder.exchange if at_once else lambda one, other: False))
        patch.setattr(pathlib.Path, "write_bytes", counted(pathlib.Path.write_bytes))
        patch.setattr(_folder.time, "sleep", lambda seconds: None)
        yield count


#: jlora's own kinds never let two folders change places.
WAYS = [(kind, at_once) for kind in KINDS for at_once in (True, False) if at_once or kind in ("export", "peft")]


@pytest.mark.parametrize("kind,at_once", WAYS)
def test_killed_at_any_step(kind, at_once, pairs, remembered, tmp_path, monkeypatch):
    """What is there afterwards opens, and is the old one or the new one; the user's files stay; the next save works.

    Where a file system cannot let two folders change places at once, an export, which others open, is away between two
    renames, and the next export brings it back.
    """
    start, old, new = pairs[kind]
    _, save, load, _ = KINDS[kind]
    before, after = bits(kind, old), bits(kind, new)
    save(tmp_path / "first", new)
    seen = []
    for last in range(300):
        path = tmp_path / str(last) / "x"
        shutil.copytree(start, path)

        def die(n, last=last):
            if n > last:
                raise Killed

        with steps(monkeypatch, at_once, die) as count, contextlib.suppress(Killed):
            save(path, new, overwrite=True)
        if kind == "export" and not at_once and not path.exists():
            with pytest.raises(FileExistsError):
                save(path, new)
        found = bits(kind, load(path))
        assert found in (before, after)
        seen.append(found == after)
        if last % 5 == 0:
            save(path, old, overwrite=True)
            assert bits(kind, load(path)) == before
        assert mine(path if path.exists() else _folder.old(path)) and (path.exists() or not at_once)
        if count[0] <= last:
            break
    assert not seen[0] and seen[-1] and seen == sorted(seen), "one moment divides old from new"
    assert os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_first_save_killed_at_any_step(kind, pairs, remembered, tmp_path, monkeypatch):
    """There is nothing, or a whole one, and the next save is as the first."""
    _, _, new = pairs[kind]
    _, save, load, _ = KINDS[kind]
    save(tmp_path / "first", new)
    for last in range(300):
        path = tmp_path / str(last) / "x"

        def die(n, last=last):
            if n > last:
                raise Killed

        with steps(monkeypatch, True, die) as count, contextlib.suppress(Killed):
            save(path, new)
        assert not path.exists() or bits(kind, load(path)) == bits(kind, new)
        if not path.exists() and last % 5 == 0:
            save(path, new)
            assert bits(kind, load(path)) == bits(kind, new)
        if count[0] <= last:
            break
    assert os.listdir(path.parent) == ["x"]


@pytest.mark.parametrize("first", [True, False], ids=["first", "overwrite"])
@pytest.mark.parametrize("kind,at_once", WAYS)
def test_a_disk_that_is_full_at_any_step(kind, first, at_once, pairs, remembered, tmp_path, monkeypatch):
    """A save that fails leaves what was there, or the new one, and nothing else: no half of it, no temporary folder."""
    start, old, new = pairs[kind]
    _, save, load, _ = KINDS[kind]
    save(tmp_path / "first", new)
    names = lambda folder: {re.sub("[0-9a-f]{16}", "", p.name) for p in folder.iterdir()} - {"ocdbt.process_0"}
    for last in range(300):
        path = tmp_path / str(last) / "deep" / "x"
        if not first:
            shutil.copytree(start, path)

        def fail(n, last=last):
            if n == last + 1:
                raise OSError(errno.ENOSPC, "No space left on device")

        with steps(monkeypatch, at_once, fail) as count, contextlib.suppress(OSError):
            save(path, new, overwrite=True)
        if path.exists():
            found = bits(kind, load(path))
            assert found == bits(kind, new) or not first and found == bits(kind, old)
            assert names(path) == names(tmp_path / "first" if first else start)
            assert os.listdir(path.parent) == ["x"]
        else:
            assert first and not (tmp_path / str(last)).exists()
        if count[0] <= last:
            break
    assert bits(kind, load(path)) == bits(kind, new)


def test_a_writer_that_is_late(tmp_path):
    """Threads of a writer that failed make their folders again after they were removed; these go too."""
    made = []

    def late():
        time.sleep(0.15)
        made[0].mkdir()
        (made[0] / "half").write_text("half")

    thread = threading.Thread(target=late)
    with pytest.raises(OSError, match="full"), _folder.temporary(tmp_path) as folder:
        made.append(folder)
        thread.start()
        raise OSError("the disk is full")
    thread.join()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_users_own_files_stay(kind, pairs, tmp_path):
    """Links, folders and what came while it was being saved, too; a folder's mode as well."""
    start, old, new = pairs[kind]
    _, save, load, _ = KINDS[kind]
    path = shutil.copytree(start, tmp_path / "x")
    (path / "gone").symlink_to("nowhere")
    (path / "latest").symlink_to("more", target_is_directory=True)
    path.chmod(0o750)
    real = _folder.exchange

    def late(one, other):
        (path / "log").write_text("late")
        return real(one, other)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_folder, "exchange", late)
        save(path, new, overwrite=True)
    assert bits(kind, load(path)) == bits(kind, new) and mine(path) and path.stat().st_mode & 0o777 == 0o750
    assert os.readlink(path / "gone") == "nowhere" and os.readlink(path / "latest") == "more"
    assert kind in ("adapter", "quantised") or (path / "log").read_text() == "late"


#: Beside each kind: what begins or ends as a name of its own does, or has one and is something else.
NEARLY = {
    "adapter": f"arrays-{1:016x}.bak/ arrays-{1:016x}_old/ old-arrays-{1:016x}/ arrays-{10:016X}/ jlora.json-before "
    f"jlora.json-{1:016x} arrays-{1:016x}",
    "quantised": f"base-{1:016x}_old/ base-{1:016x}-mine base/ jlora_base.json-copy arrays/ base-{1:016x}",
    "export": "_MY_METADATA _METADATA.bak _sharding2 ocdbt.process_7/ ocdbt.process_8 d2/ manifest.ocdbt.old "
    "array_metadatas_mine/",
    "peft": "adapter_model.safetensors.bak adapter_config.json~ my_adapter_model.bin README",
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_whose_names_are_nearly_ours_stay(kind, pairs, tmp_path):
    """Only what was written with the old one goes with it: names are compared whole."""
    start, _, new = pairs[kind]
    path = shutil.copytree(start, tmp_path / "x")
    names = [*NEARLY[kind].split(), ".jlora-tmp-mine/", f".jlora-tmp-{1:016x}.bak/", f".jlora-tmp-{1:016x}"]
    notes = [path / name / "notes" if name.endswith("/") else path / name for name in names]
    for note in notes:
        note.parent.mkdir(exist_ok=True)
        note.write_text("mine")
    KINDS[kind][1](path, new, overwrite=True)
    assert [note for note in notes if not note.is_file()] == []
    assert bits(kind, KINDS[kind][2](path)) == bits(kind, new) and mine(path)


def test_opening_a_base_while_another_process_saves(pairs, tmp_path, monkeypatch):
    """The manifest is read, then the folder is saved over: the reader begins again."""
    _, old, new = pairs["quantised"]
    for name in ("tree_of", "restore_part"):
        quantised.save(tmp_path / name, old)
        real, turns = getattr(_checkpoint, name), []

        def late(*args, real=real, turns=turns, name=name, **kwargs):
            turns.append(name)
            if len(turns) == 1:
                quantised.save(tmp_path / name, new, overwrite=True)
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(_checkpoint, name, late)
            assert bits("quantised", quantised.load(tmp_path / name)) == bits("quantised", new) and len(turns) > 1


# --- damage -------------------------------------------------------------------------------------------------------


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file() and "more" not in p.parts and p.name != "README.md")


#: What a flipped bit may leave as it was: names that no number hangs on.
FLIPPED = {"adapter": 40, "quantised": 60, "peft": 150}


@pytest.mark.parametrize("kind", FLIPPED)
def test_a_flipped_bit(kind, pairs, tmp_path):
    """In each file, at its ends and at random places: an error in words, or the very same numbers."""
    start, old, _ = pairs[kind]
    path, load, rng = shutil.copytree(start, tmp_path / "x"), KINDS[kind][2], random.Random(0)
    for file in files(path):
        raw = file.read_bytes()
        for n in {
            0,
            len(raw) - 1,
            *(rng.randrange(len(raw)) for _ in range(FLIPPED[kind] if "json" in file.name else 9)),
        }:
            file.write_bytes(raw[:n] + bytes([raw[n] ^ 1 << rng.randrange(8)]) + raw[n + 1 :])
            try:
                found = load(path)
            except ValueError as error:
                assert str(path) in str(error)
            else:
                assert kind == "peft" and bits(kind, found) == bits(kind, old)
        file.write_bytes(raw)
    assert bits(kind, load(path)) == bits(kind, old)


def sealed(path, form, *keys, value):
    """A manifest with one field changed, and a digest that is right all the same."""
    content = json.loads((path / form.name).read_bytes())
    content.pop("sha256", None)
    node = content
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    (path / form.name).write_bytes(form.seal(content))


QUERY = ("leaves", "query/kernel")
HOW, CODES = (*QUERY, "quantised"), (*QUERY, "arrays", "codes")
HOSTILE = [
    ((*HOW, "scheme", "kind"), "Of", "not described as quantising"),
    ((*HOW, "scheme", "kind"), "NF", None),  # whoever writes the digest may write another base
    ((*HOW, "scheme", "bits"), 5, "codes of"),
    ((*HOW, "scheme", "bits"), 4.0, "not of type int"),
    ((*HOW, "scheme", "block"), True, "'block' of 'query/kernel'"),
    ((*HOW, "scheme", "double"), "no", "not of type bool"),
    ((*HOW, "scheme", "more"), 1, "unknown field 'more'"),
    ((*HOW, "scheme"), [], "'scheme' of 'query/kernel'"),
    ((*HOW, "layout", "block"), [65, 1], "not described as quantising"),
    ((*HOW, "layout", "block"), [0, 1], "not described as quantising"),
    ((*HOW, "layout", "block"), [-64, 1], "not described as quantising"),
    ((*HOW, "layout", "block"), [64], "not described as quantising"),
    ((*HOW, "layout", "order"), [1, 1], "not described as quantising"),
    ((*HOW, "layout", "pack"), 2, "not described as quantising"),
    ((*HOW, "layout", "pack"), -1, "not described as quantising"),
    ((*HOW, "layout", "pack"), 1, "not of the shape and dtype that its codes have"),
    ((*HOW, "layout", "flat"), True, "not described as quantising"),
    ((*HOW, "layout", "shape"), [64, 16], "not of the shape and dtype that its codes have"),
    ((*HOW, "layout", "shape"), [10**400, 8], "not described as quantising"),
    ((*HOW, "dtype"), "gloat32", "unknown dtype"),
    ((*HOW, "dtype"), "int8", "not of floating point"),
    ((*HOW, "kernel"), "xx", "not described as quantising"),
    ((*HOW, "kernel"), "i", "not described as quantising"),
    (HOW, None, "is no one array"),
    ((*CODES, "shape"), [2**40, 32, 8], "stacked in unlike ways"),
    ((*CODES, "shape"), [-1, 8], "no array of shape"),
    ((*CODES, "dtype"), "int8", "not of the shape and dtype that its codes have"),
    ((*CODES, "key"), "threefry2x32", "no array of shape"),
    ((*QUERY, "arrays"), {}, "not described as quantising"),
    (("leaves", "bias", "arrays", "", "shape"), [2**50], r"more than [\d,]* elements"),
    (("leaves", "bias", "arrays", "", "shape"), [0, 10**30], "no array of shape"),
    (("leaves",), 5, "'leaves' of the manifest"),
    (("leaves",), {}, "extra"),
    (("data",), "../elsewhere", "no name of its arrays"),
    (("data",), "more", "no name of its arrays"),
    (("data",), None, "missing"),
    (("files",), {}, "not saved with it"),
    (("format",), 2, "upgrade jlora"),
    (("format",), None, "no format number"),
    (("x" * 300_000,), 1, "unknown field"),
]


@pytest.mark.parametrize("keys,value,words", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_base(keys, value, words, pairs, tmp_path):
    """Refused in words, and at once, whatever it asks for."""
    path = shutil.copytree(pairs["quantised"][0], tmp_path / "x")
    sealed(path, quantised._FORM, *keys, value=value)
    if words is None:
        quantised.load(path)
        return
    with pytest.raises(ValueError, match=words) as error:
        quantised.load(path)
    assert len(str(error.value)) < 2000


def test_a_base_of_an_older_jlora(pairs, tmp_path):
    """Without digests, its arrays under their old name: it opens as before, and is saved over as any other."""
    _, old, new = pairs["quantised"]
    path = tmp_path / "x"
    quantised.save(path, old)
    content = json.loads((path / "jlora_base.json").read_bytes())
    (path / content["data"]).rename(path / "arrays")
    (path / "jlora_base.json").write_text(json.dumps({"format": 1, "leaves": content["leaves"]}))
    assert bits("quantised", quantised.load(path, old)) == bits("quantised", old)
    quantised.save(path, new, overwrite=True)
    assert bits("quantised", quantised.load(path)) == bits("quantised", new) and len(os.listdir(path)) == 2


def test_each_kind_says_what_opens_it(pairs, tmp_path):
    """A folder of one kind, given to the loader of another."""
    opens = {"adapter": "jlora.load", "quantised": "jlora.io.quantised.load", "peft": "jlora.io.peft.load"}
    for kind, words in opens.items():
        for other in opens:
            if other != kind:
                with pytest.raises((ValueError, FileNotFoundError), match=f"{re.escape(words)} opens it"):
                    KINDS[other][2](pairs[kind][0])
    for kind in opens:
        (tmp_path / "file").write_text("")
        for path, error in (
            (tmp_path / "nothing", FileNotFoundError),
            (tmp_path / "file", (ValueError, FileNotFoundError)),
        ):
            with pytest.raises(error, match=path.name):
                KINDS[kind][2](path)


# --- sizes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec,field,value",
    [
        (jlora.VeRA(rank=2, target="kernel"), "rank", 10**9),
        (jlora.VeRA(rank=2, target="kernel"), "rank", 10**400),
        (jlora.IntrinsicDimension(5, target="kernel"), "d", 10**12),
        (jlora.OFT(block=8, target="kernel"), "block", 10**12),
        (jlora.LoRA(rank=2, target="kernel"), "rank", 10**12),
    ],
)
def test_a_small_file_that_asks_for_much(spec, field, value, tmp_path):
    """Nothing is made before all sizes are held against the files' and the base's; OFT's block is at most the width."""
    jlora.save(tmp_path / "x", jlora.adapt(BASE, spec))
    content = json.loads((tmp_path / "x" / "jlora.json").read_bytes())
    del content["sha256"]
    content["methods"][0][field] = value
    content["format"] = 1  # which has no digests of what is drawn, that would tell first
    del content["drawn"], content["generator"]
    for name in list(content["factors"]):
        if name.endswith((":d", ":theta")):
            content["factors"][re.sub("F5:", f"F{value}:", name)] = content["factors"].pop(name) | {"shape": [value]}
    for name in list(content.get("drawn") or ()):  # their names say the rank
        content["drawn"][name.replace("%2F2%2F", f"%2F{value}%2F")] = content["drawn"].pop(name)
    (tmp_path / "x" / "jlora.json").write_bytes(_manifest.seal(content))
    with pytest.raises(ValueError, match=r"asks for arrays of more than|has shape|above min|in 31 bits"):
        jlora.load(tmp_path / "x", BASE)


def test_honest_sizes_are_opened(tmp_path):
    """Zeros compress to nothing, and random factors are not saved at all."""
    base = {"query": {"kernel": jnp.zeros((2048, 2048))}}
    jlora.save(tmp_path / "full", jlora.adapt(base, jlora.Full(target="kernel")))
    assert jlora.load(tmp_path / "full", base).trainable["query/kernel"]["delta"].shape == (2048, 2048)
    jlora.save(tmp_path / "vera", jlora.adapt(BASE, jlora.VeRA(rank=1024, target="kernel")))
    assert jlora.load(tmp_path / "vera", BASE).frozen.factors


@pytest.mark.parametrize("raw", [b"{" * 10**5, b"[" * 10**5, b'{"format": 1' + b"0" * 9000 + b"}", b'{"format": NaN}'])
def test_no_manifest_of_a_base(raw, pairs, tmp_path):
    """Depth, digits and numbers that JSON has not."""
    path = shutil.copytree(pairs["quantised"][0], tmp_path / "x")
    (path / "jlora_base.json").write_bytes(raw)
    with pytest.raises(ValueError, match=r"jlora_base.json is cut short or damaged"):
        quantised.load(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_record, "LARGEST", 1)
        with pytest.raises(ValueError, match="too large to be a manifest"):
            quantised.load(path)


# --- patterns -----------------------------------------------------------------------------------------------------


def keys(rng, depth=0):
    """Random regular expressions over a few letters."""
    if depth > 3 or rng.random() < 0.35:
        return rng.choice(["a", "b", ".", "x", r"\.", "[ab]", "[^a]", r"\w", "^", "$", "ab", "a.b", "", "^a.b"])
    form = rng.choice(
        ["{0}{1}", "{0}{1}", "({0}|{1})", "(?:{0})", "({0})*", "({0})+", "({0})?", "({0}){{1,2}}", "({0})*?"]
    )
    return form.format(keys(rng, depth + 1), keys(rng, depth + 1))


def test_patterns_match_as_those_of_python():
    """The same answer as `re`, on random patterns and names."""
    rng = random.Random(0)
    for _ in range(1500):
        key = keys(rng)
        try:
            pattern = _pattern.parsed(key)
        except ValueError:
            continue
        for _ in range(8):
            module = "".join(rng.choice("ab.x") for _ in range(rng.randrange(7)))
            want = re.match(rf"(.*\.)?({key})$", module) is not None
            assert pattern.matches(module) == want, (key, module)


def test_the_first_pattern_wins():
    """Of names and expressions mixed, the answer of `re` over the keys in turn; each key is built once."""
    rng, built = random.Random(1), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _pattern.Pattern,
            "__init__",
            lambda self, key, real=_pattern.Pattern.__init__: (built.append(key), real(self, key))[1],
        )
        for _ in range(200):
            given = {rng.choice([keys(rng), "a.b", "b", r"^a\.b", r"a\.b", "x.b", "^b"]): n for n in range(6)}
            rows = _pattern.Patterns(given)
            good = {k: n for k, n in given.items() if not any(repr(k) in line for line in rows.bad)}
            for module in ("a.b", "b", "x.a.b", "aab", "axb", "x.b", "xb", "a", "a\nb", ""):
                want = next((n for k, n in good.items() if re.match(rf"(.*\.)?({k})$", module)), None)
                assert rows.value(module, None) == want, (given, module)
            assert len(built) == len(set(built)), "each once"
            built.clear()


@pytest.mark.parametrize(
    "letters,most", [("q{}", 200_000), ("(q{}|y)*", 3000), ("a" * 900 + "|{}", 300), ("({}a?){{900}}", 200)]
)
def test_many_patterns_are_not_built(letters, most):
    """What building takes is bounded for all of them together, and what an honest model has is far below it."""
    with pytest.raises(ValueError, match="take too long"):
        _pattern.Patterns({letters.format(n): n for n in range(most)})
    assert _pattern.Patterns({letters.format(n): n for n in range(most // 10)}).left > 0


@pytest.mark.parametrize("key", ["a?" * 250 + "a" * 250, "(a|a)" * 150 + "b", "(a+)+b", "(((a*)*)*)*b", ".*.*.*.*.*x"])
def test_patterns_take_no_longer_than_they_are_long(key):
    """`re` takes exponential time, or the fourth power of the length, for these."""
    pattern = _pattern.parsed(key)
    assert pattern.matches("a" * 400) == key.startswith("a?") and pattern.steps < 10**6
    rows = _pattern.Patterns({key: 1})
    with pytest.raises(ValueError, match="take too long"):
        for n in range(10**5):
            rows.left -= 10**6
            rows.value(f"{n}", 0)
