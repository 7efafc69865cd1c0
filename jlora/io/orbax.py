"""Adapters and merged parameters as Orbax checkpoints.

A saved adapter is a folder of two things: `jlora.json`, the manifest, and the arrays, as an Orbax checkpoint in a
folder that the manifest names (`_store`). Merged parameters are a plain Orbax checkpoint.
"""

import math
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jlora._merge import MergeReport, merge, merge_report
from jlora._read import check_mergeable
from jlora._trees import _tree
from jlora._trees._compound import is_compound
from jlora._types import AnyPath, PyTree
from jlora._version import __version__
from jlora.adapted import Adapted, Frozen, derived, is_adapted
from jlora.io import _arrays, _checkpoint, _fingerprint, _folder, _manifest, _store, _training, _untrained
from jlora.io._record import Content, several
from jlora.methods import _draws
from jlora.methods.base import Method
from jlora.optim._checks import check_ran
from jlora.optim._halves import check_masked

#: What stands at the top of an Orbax checkpoint, beside a folder for each process.
_OF_ORBAX = frozenset(
    "_METADATA _CHECKPOINT_METADATA _sharding _strings.json array_metadatas commit_success.txt d manifest.ocdbt".split()
)


# --- save ---------------------------------------------------------------------------------------------------------


def save(path: AnyPath, adapted: Adapted, *, opt_state: PyTree = None, overwrite: bool = False) -> None:
    """Saves an adapter: its trainable leaves, frozen factors and scales, the methods, a fingerprint of the base.

    Neither the base nor a dropout key is saved. Factors may be of any shape and dtype, and sharded over the devices
    of this process. The folder appears at once: a save that is interrupted leaves what was there before readable.
    A process that is killed leaves a folder `.jlora-tmp-...` beside it, which a save of a later day removes.

    Args:
      path: a local folder; its parents are made.
      adapted: what `adapt` made, trained or not.
      opt_state: the optimizer's state, if at hand. It is not saved, but asked whether what decides over ranks ran.
      overwrite: replace an adapter that was saved there. Nothing else is ever replaced, and other files there stay.

    Warns:
      UntrainedWarning: all factors are where they began: training moved another `trainable`.

    Raises:
      FileExistsError: the path exists (with `overwrite`: and holds no saved adapter).
      NotImplementedError: in one of several processes; the message says how they save together.
      TypeError: no `Adapted`, or one that is being traced.
      ValueError: factors without values (abstract or donated), ones that do not fit the plan, a method with a field
        that cannot be written down, a state that says that its schedule never ran (those of `jlora.rank.adalora`,
        `sora`, `selora`), or one made of a whole adapter without `jlora.masked`, which moves the base.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> adapted = jlora.adapt(params, jlora.LoRA(rank=2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.save(folder + "/adapter", adapted)
      ...     jlora.load(folder + "/adapter", params)
      Adapted(1 weight, 20 trainable)
    """
    check_ran("save", opt_state)
    check_masked("save", opt_state)
    target = _manifest.STORE.place(path, overwrite)
    _arrays.check_concrete(adapted, lambda x: (x.trainable, x.frozen.factors, x.frozen.base), "jlora.save")
    arrays, factors, drawn = _arrays.gather(adapted)
    _untrained.warn("save(path", adapted)
    tree = _tree.flatten(adapted.frozen.base)
    content = {
        "jlora": __version__,
        "factors": factors,
        "drawn": drawn,
        "generator": _draws.GENERATOR if drawn else None,
        **_manifest.write_methods(adapted.frozen.plan),
        "base": _fingerprint.fingerprint(adapted.frozen.base, tree),
    }
    _manifest.STORE.save(target, arrays, content)


# --- load ---------------------------------------------------------------------------------------------------------


def load(
    path: AnyPath,
    params: PyTree,
    *,
    check: Literal["values", "shapes", "none"] = "values",
    spec: object = None,
    methods: Sequence[type[Method]] = (),
) -> Adapted:
    """Opens a saved adapter over its base: `load(path, params) == adapted`, bit for bit, of the same structure.

    (A rule whose target was a callable of your own comes back with the paths it took.)

    A training checkpoint opens too: the tree `{"trainable": ..., "opt_state": ..., ...}` (or a TrainState whose
    `params` are the trainable half or a whole `Adapted`) under a `CheckpointManager`, of which the newest step is
    taken, or written by a `StandardCheckpointer`. It does not say which method it is of, so it needs a `spec`. Of a
    trainable half all that is checked is that the factors fit; a whole `Adapted` has its frozen factors and scales,
    which are read, and its base, whose adapted weights are compared with those of `params`.

    Args:
      path: the folder.
      params: the base, as `adapt` took it; it may be abstract. Arrays come to the default device.
      check: how the base is compared with the one that was trained on. `"values"`: paths, shapes, dtypes, and up to
        1,024 elements a leaf, bit for bit, where both have values. `"shapes"`: paths and shapes, so that an adapter
        of a quantised base opens over the original. `"none"`: only the adapted weights must fit.
      spec: for a training checkpoint, what `adapt` was given; or the `Adapted` that it made, where it was given a
        key or axes of its own.
      methods: classes of your own that the file may name. A file can name no others and imports nothing.

    Raises:
      FileNotFoundError: nothing at the path.
      ValueError: a folder that is cut short, damaged or of a newer format; another base; an unknown method; a key
        that is missing, extra or misshapen. A damaged file never becomes a wrong number.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.save(folder + "/adapter", jlora.adapt(params, jlora.LoRA(rank=2)))
      ...     other = {"query": {"kernel": jnp.zeros((6, 4))}}
      ...     jlora.load(folder + "/adapter", other, check="shapes")
      Adapted(1 weight, 20 trainable)
    """
    if check not in ("values", "shapes", "none"):
        raise ValueError(f"check={check!r}: write 'values', 'shapes' or 'none'")
    if is_adapted(params):
        raise TypeError("params is an Adapted; load takes the base: load(path, adapted.frozen.base)")
    _manifest.nameable(methods)
    folder = _manifest.STORE.find(path)
    if not _manifest.STORE.is_here(folder):
        if spec is None:
            _folder.check_kind(folder, _manifest.FORM.name)
        return _training.load(folder, params, spec)
    if spec is not None:
        raise ValueError(f"{folder} says itself what it is of; spec= is for training checkpoints, leave it out")
    return _manifest.STORE.open(folder, lambda content, size: _open(folder, content, size, params, check, methods))


def _open(
    folder: Path, content: Content, size: int, params: PyTree, check: str, methods: Sequence[type[Method]]
) -> Adapted:
    """The adapter of a manifest, whose files have so many bytes."""
    tree = _tree.flatten(params)
    plan = _manifest.read_plan(content, tree, methods, str(folder))
    if check != "none":
        _fingerprint.compare(content["base"], _fingerprint.fingerprint(params, tree), check, str(folder))
    want = {}
    records, drawn = content["factors"], content["drawn"]
    made_again = {}
    for place, make in derived(plan).items():
        name = _arrays.stored_name("frozen", *place)
        if name not in records:
            made_again[place] = name, make
    for (group, factor), (shape, trained) in plan.shapes.items():
        if (group, factor) in made_again:
            continue
        want[_arrays.stored_name("trainable" if trained else "frozen", group, factor)] = group, factor, trained, shape
    bad = [f"missing {g!r}: {n!r}" for name, (g, n, *_) in want.items() if name not in records]
    bad += [f"extra {name!r}" for name in records if name not in want]
    for name, (group, factor, _, shape) in want.items():
        key = name in records and records[name]["key"] is not None
        if name in records and not key and records[name]["shape"] != shape:
            bad.append(f"{group!r}: {factor!r} has shape {records[name]['shape']}, not {shape}")
    if drawn is not None:
        names = {name for name, _ in made_again.values()}
        bad += [f"{name!r} is said to be drawn from a seed" for name in sorted(set(drawn) - names)]
        bad += [f"missing {name!r}" for name in sorted(names - set(drawn))]
    if bad:
        raise ValueError(f"the factors in {folder} do not fit its methods:" + several(bad))
    asked = [shape for shape, _ in plan.shapes.values()] + [
        r["shape"] for r in records.values() if r["key"] is not None
    ]
    elements = sum(math.prod(_tree.shape_dtype(leaf)[0]) for leaf in tree.leaves)
    _store.check_size(asked, elements, size, str(folder))
    if drawn and content["generator"] != _draws.GENERATOR:
        raise ValueError(
            f"{folder} was drawn by {content['generator']!r:.60}, and this jlora draws by {_draws.GENERATOR!r}"
        )
    arrays = _read_arrays(folder, content)
    sides: dict[bool, dict[str, dict[str, jax.Array]]] = {True: {}, False: {}}
    for name, (group, factor, trained, shape) in want.items():
        value = _arrays.rebuild(arrays.get(name), records[name], f"{folder}: factor {group!r}: {factor!r}")
        if value.shape != shape:
            raise ValueError(f"{folder}: factor {group!r}: {factor!r} has shape {value.shape}, not {shape}")
        sides[trained].setdefault(group, {})[factor] = value
    for (group, factor), (name, make) in made_again.items():
        value = sides[False].setdefault(group, {})[factor] = make()
        if drawn is not None:
            _arrays.check_drawn(value, drawn[name], f"{folder}: factor {group!r}: {factor!r}")
    return Adapted(sides[True], Frozen(params, sides[False], None, plan))


def _read_arrays(folder: Path, content: Content) -> dict[str, np.ndarray]:
    want = {n: r for n, r in content["factors"].items() if 0 not in r["shape"]}
    if content["data"] is None:
        if want:
            raise ValueError(f"{folder} holds no arrays, but names {next(iter(want))!r:.200}")
        return {}
    return _arrays.restore(folder / content["data"], want)


# --- export -------------------------------------------------------------------------------------------------------


def export(path: AnyPath, adapted: Adapted, *, allow_loss: bool = False, overwrite: bool = False) -> None:
    """Saves merged parameters, for programs that know nothing of jlora.

    `orbax.checkpoint.StandardCheckpointer().restore(path)` gives them back, on any machine, as plain nested
    dictionaries of NumPy arrays: NNX variables, states and modules and Linen's boxes become their arrays under the
    user's names, and indices and integer keys become strings (`{"layers": [a, b]}` comes back as
    `{"layers": {"0": a, "1": b}}`). PRNG keys become their data (`jax.random.wrap_key_data`). All of it passes
    through the memory of this host.

    Args:
      path: a local folder; its parents are made.
      adapted: an adapter over a base with values.
      allow_loss: export although less than half of some update survives the cast to its weight's dtype.
      overwrite: replace an Orbax checkpoint that is there, in one step; other files there stay. Where a file system
        has no such step and the process is killed between two, the old one is `.<name>.jlora-old` beside it, and the
        next export puts it back.

    Warns:
      UntrainedWarning: all factors are where they began.
      UserWarning: less than 0.9 of some update survives (`jlora.merge_report`).

    Raises:
      FileExistsError: the path exists (with `overwrite`: and holds no checkpoint).
      NotImplementedError: in one of several processes; the message says how they save together.
      TypeError: no `Adapted`, or one that is being traced.
      ValueError: less than 0.5 of some update survives; abstract, donated or empty leaves, ones that are no arrays;
        names that Orbax confuses, since it joins them by dots; a path that Orbax could not open.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora, orbax.checkpoint as ocp
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.export(folder + "/merged", adapted)
      ...     ocp.StandardCheckpointer().restore(folder + "/merged")["query"]["kernel"].shape
      (6, 4)
    """
    target = _folder.local(path)
    _checkpoint.check_readable(target)
    _folder.recover(target)
    replaces = _folder.check_free(target, overwrite, "_METADATA", "exported parameters")
    _arrays.check_concrete(adapted, lambda x: x, "jlora.export")
    # paths are checked before the merging; a quantised weight is checked as the array that it will be merged to
    stands = lambda x: np.broadcast_to(np.zeros((), x.dtype), x.shape) if is_compound(x) else x
    params = _plain_tree(jax.tree.map(stands, adapted.frozen.base, is_leaf=is_compound))
    check_mergeable("export", adapted)
    _check_loss(merge_report(adapted), allow_loss)
    _untrained.warn("export(path", adapted)
    params = _plain_tree(merge(adapted))
    with _folder.new_folder(target) as folder:
        new = folder / target.name
        _checkpoint.write_tree(new, jax.tree.map(_portable, params))
        _folder.sync_all(new)
        _folder.appear(new, target, replaces, _is_of_orbax)


def _is_of_orbax(entry: Path) -> bool:
    """Whether an entry of a checkpoint is Orbax's, and not a user's own beside it."""
    of_process = re.fullmatch(r"ocdbt\.process_\d+", entry.name) and (entry / "manifest.ocdbt").is_file()
    return entry.name in _OF_ORBAX or bool(of_process)


def _check_loss(report: MergeReport, allow_loss: bool) -> None:
    lost = sorted((r for r in report.rows if not r.survives >= 0.9), key=lambda r: r.survives)
    if not lost:
        return
    table = str(MergeReport(tuple(lost[:8])))
    if any(not r.survives >= 0.5 for r in lost) and not allow_loss:
        raise ValueError(
            f"merging would lose most of the update of these weights; allow_loss=True exports them all the same, a "
            f"float32 base loses nothing:\n{table}"
        )
    warnings.warn(f"merging loses a part of the update of {len(lost)} weights:\n{table}", stacklevel=3)


def _is_key(leaf: object) -> bool:
    return isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _portable(leaf: PyTree) -> PyTree:
    """A leaf that Orbax restores without being told where: it refuses a jax.Array of devices that are not there."""
    leaf = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    return np.asarray(leaf) if isinstance(leaf, jax.Array) else leaf


def _plain_tree(params: PyTree) -> dict[str, PyTree]:
    """Nested dictionaries of arrays under the user's names; ValueError where Orbax could not give them back."""
    tree = _tree.flatten(params)
    plain: dict[str, PyTree] = {}
    names: dict[str, str] = {}
    bad = []
    for path, leaf in zip(tree.paths, tree.leaves, strict=True):
        *parents, last = (s.replace("%2F", "/").replace("%25", "%") for s in path.split("/"))
        if not isinstance(leaf, (jax.Array, np.ndarray, np.generic, bool, int, float)):
            bad.append(f"{path!r} is {type(leaf).__name__}, not an array")
        elif np.size(leaf) == 0:
            bad.append(f"{path!r} has shape {np.shape(leaf)}, and Orbax saves no array without elements")
        elif not (_is_key(leaf) or _arrays.storable(_tree.shape_dtype(leaf)[1])):
            bad.append(f"{path!r} has dtype {_tree.shape_dtype(leaf)[1]}, which Orbax cannot store")
        other = names.setdefault(".".join((*parents, last)), path)
        if other != path:
            bad.append(f"{other!r} and {path!r} are one name to Orbax, which joins names by dots; rename one")
        node = plain
        for step in parents:
            node = node.setdefault(step, {})
        node[last] = leaf
    if bad or not plain:
        raise ValueError("these parameters cannot be exported:" + several(bad or ["there are none"]))
    return plain
