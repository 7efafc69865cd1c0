"""Arrays in Orbax checkpoints: the only room that asks Orbax for anything.

Orbax and what is below it read some characters of a path: brackets and stars as patterns, a backslash, `gs:`, a name
that is not UTF-8. So they only ever see plain paths, through a link where need be.
"""

import contextlib
import re
import tempfile
from collections.abc import Callable, Generator, Mapping
from pathlib import Path
from typing import TypeAlias

import jax
import numpy as np
import orbax.checkpoint as ocp

from jlora._types import PyTree

Tree: TypeAlias = dict[str, PyTree]
"""What Orbax keeps: nested dictionaries of arrays, or of what stands for them."""

_PLAIN = re.compile(r"[A-Za-z0-9_./-]*")
_AT_ONCE = 2**28


def _is_plain(path: Path) -> bool:
    return bool(_PLAIN.fullmatch(str(path))) and "__lock" not in str(path)


def check_readable(path: Path) -> None:
    """ValueError where Orbax, or TensorStore below it, could not open a checkpoint by this path of its own."""
    said = str(path)
    odd = {
        "a backslash": "\\" in said,
        "letters that are not UTF-8": any("\ud800" <= letter <= "\udfff" for letter in said),
        "a folder called gs:": "gs:/" in said,
        "a name that ends in .__lock": f"{said}/".count(".__lock/"),
        ".orbax-checkpoint-tmp, its mark of what is not finished,": ".orbax-checkpoint-tmp" in path.name,
    }
    if bad := " and ".join(name for name, found in odd.items() if found):
        raise ValueError(f"{said!r} has {bad} in it, and Orbax cannot read a checkpoint there: export to another path")


@contextlib.contextmanager
def _plainly(path: Path) -> Generator[Path]:
    """The same folder under a path of plain letters; its parent must be there."""
    if _is_plain(path):
        yield path
        return
    places = [Path(p) for p in (tempfile.gettempdir(), "/tmp", "/var/tmp")]
    places = [p for p in places if _is_plain(p) and p.is_dir()]
    if not places:
        raise ValueError(f"Orbax cannot read {str(path)!r} as it is written; use a path of plain letters")
    with tempfile.TemporaryDirectory(prefix="jlora-", dir=places[0]) as folder:
        link = Path(folder, "path")
        link.symlink_to(path.parent, target_is_directory=True)
        alias = link / path.name
        if not _is_plain(alias):
            alias = Path(folder, "name")
            alias.symlink_to(path, target_is_directory=True)
        yield alias


def write(folder: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a checkpoint of its own folder, and reads them back.

    Raises:
      OSError: they are not there as they were.
    """
    with _plainly(folder) as path, ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(dict(arrays)))
    read_back(folder, dict(arrays), lambda part: restore_part(folder, part))


def write_tree(folder: Path, tree: Tree) -> None:
    """The same for nested dictionaries, as `StandardCheckpointer` writes them, which must open them by their own name.

    Raises:
      ValueError: Orbax cannot save these, or cannot read a folder of this name.
    """
    written = folder.with_name("written")
    try:
        with _plainly(written) as path, ocp.Checkpointer(ocp.StandardCheckpointHandler()) as checkpointer:
            checkpointer.save(path, args=ocp.args.StandardSave(tree))
    except (ValueError, TypeError) as error:
        raise ValueError(f"Orbax cannot save these parameters: {str(error)[:500]}") from error
    written.rename(folder)
    read_back(folder, tree, lambda part: restore_part(folder, part, literal=True))


def read_back(folder: Path, want: Tree, restore: Callable[[PyTree], PyTree]) -> None:
    """Compares what is in a checkpoint with what was to be written, a part at a time: it may fill half the memory."""
    leaves, treedef = jax.tree.flatten(want)
    parts: list[list[int]] = [[]]
    size = 0
    for n, leaf in enumerate(leaves):
        size += np.asarray(leaf).nbytes
        if parts[-1] and size > _AT_ONCE:
            parts.append([])
            size = np.asarray(leaf).nbytes
        parts[-1].append(n)
    for numbers in parts:
        chosen = {n: leaves[n] for n in numbers}
        part = _pruned(jax.tree.unflatten(treedef, [chosen.get(n) for n in range(len(leaves))]))
        found = jax.tree.leaves(restore(part))
        for a, b in zip(jax.tree.leaves(part), found, strict=True):
            a, b = np.asarray(a), np.asarray(b)
            if a.dtype != b.dtype or a.shape != b.shape or a.tobytes() != b.tobytes():
                raise OSError(f"{folder} does not hold what was written to it: the disk, or what is between, lost it")


def _pruned(tree: PyTree) -> PyTree:
    """Nested dictionaries without the places where nothing is."""
    if not isinstance(tree, dict):
        return tree
    kept = {k: _pruned(v) for k, v in tree.items()}
    return {k: v for k, v in kept.items() if v is not None and not (isinstance(v, dict) and not v)}


def _handler() -> contextlib.closing[PyTree]:
    """Orbax's reader of one item: its Checkpointer would warn of metadata that items of a manager do not have.

    By its types it asks for paths of etils, and takes any.
    """
    return contextlib.closing(ocp.PyTreeCheckpointHandler())


def tree_of(folder: Path) -> Tree:
    """The tree of an Orbax checkpoint, with the shape of each array in its place."""
    try:
        with _plainly(folder) as path, _handler() as handler:
            found = handler.metadata(path)
        found = getattr(found, "tree", found)
    except Exception as error:
        raise ValueError(f"Orbax cannot read {folder}: {str(error)[:500]}") from error
    if not isinstance(found, dict):
        raise ValueError(f"Orbax cannot read {folder}: it is cut short, or holds no dictionary")
    return found


def restore_part(folder: Path, item: PyTree, literal: bool = False) -> PyTree:
    """A part of a checkpoint as NumPy arrays; under its own path, if `literal`."""
    to_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), item)
    request = ocp.args.PyTreeRestore(item=item, restore_args=to_numpy, partial_restore=True)
    try:
        with contextlib.nullcontext(folder) if literal else _plainly(folder) as path, _handler() as handler:
            return handler.restore(path, args=request)
    except Exception as error:
        raise ValueError(f"Orbax cannot read {folder}: {str(error)[:500]}") from error
