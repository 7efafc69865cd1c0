"""Folders that appear, and are replaced, in one step of the file system.

A save is made in a folder of its own, and then either the whole folder takes the place of the old one (`appear`: for
formats that others read), or one file of it does (`_store`: jlora's own, where a manifest names the rest).
"""

import contextlib
import ctypes
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Generator
from pathlib import Path

from jlora._types import AnyPath

_TEMPORARY = re.compile(r"\.jlora-tmp-[0-9a-f]{16}")
_DAY = 86400.0


def local(path: AnyPath) -> Path:
    """A path as it is written, absolute and without links: what is renamed is then the folder, and not a link to it.

    Raises:
      TypeError: no path.
      ValueError: it cannot be a local one, or is meant for a shell.
    """
    try:
        text = os.fspath(path)
    except TypeError:
        text = None
    if not isinstance(text, str):
        raise TypeError(
            f"the path of a folder is a string or a pathlib.Path, and comes first; this is {type(path).__name__}"
        )
    if not text:
        raise ValueError("the path is empty; write the name of a folder, or '.' for the one this process runs in")
    if "://" in text or "\0" in text:
        raise ValueError(f"{text!r} is no path of a local folder; save there, then copy it")
    if text == "~" or text.startswith("~/"):
        raise ValueError(f"{text!r}: only a shell reads ~ as a home; write os.path.expanduser({text!r})")
    return Path(os.path.realpath(text))


def sync(*paths: "str | Path") -> None:
    """Waits until files, or the entries of folders, are on the disk and would outlive a power failure."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def sync_all(folder: Path) -> None:
    """The same for everything below a folder."""
    for parent, _, names in os.walk(folder):
        sync(*(Path(parent, name) for name in names), parent)


def remove(folder: Path, quiet: int = 1) -> None:
    """Removes a folder and whatever is in it.

    A writer that failed (a full disk) may have threads that still write, and make its folders again: after a failure
    it must be gone at several looks in a row.
    """
    gone = 0
    for _ in range(40):
        if os.path.lexists(folder):
            shutil.rmtree(folder, ignore_errors=True)
            gone = 0
        gone += not os.path.lexists(folder)
        if gone >= quiet:
            return
        time.sleep(0.05)


def is_temporary(entry: Path) -> bool:
    """Whether an entry is a folder that `temporary` made; a user's own of a longer name is not."""
    return bool(_TEMPORARY.fullmatch(entry.name)) and is_folder(entry)


def is_folder(entry: Path) -> bool:
    """Whether an entry is a folder, and not a link to one."""
    return entry.is_dir() and not entry.is_symlink()


@contextlib.contextmanager
def temporary(parent: Path) -> Generator[Path]:
    """A folder in this one, gone at the end unless it was renamed."""
    for stale in parent.iterdir():  # what processes left that were killed
        if is_temporary(stale):
            with contextlib.suppress(OSError):
                if time.time() - stale.stat().st_mtime > _DAY:
                    remove(stale)
    folder = parent / f".jlora-tmp-{secrets.token_hex(8)}"
    try:
        folder.mkdir()
        yield folder
    except BaseException:
        remove(folder, quiet=8)
        raise
    else:
        remove(folder)


@contextlib.contextmanager
def new_folder(target: Path) -> Generator[Path]:
    """A temporary folder beside the target, whose parents are made, and taken away again if nothing comes of it."""
    missing = [p for p in target.parents if not os.path.lexists(p)]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with temporary(target.parent) as folder:
            yield folder
    except BaseException:
        for parent in missing:
            with contextlib.suppress(OSError):  # not empty: another process has put something there
                parent.rmdir()
        raise


@contextlib.contextmanager
def locked(folder: Path) -> Generator[None]:
    """Lets one process at a time save over a folder, where the system has such locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# --- one folder in the place of another ---------------------------------------------------------------------------


def exchange(one: Path, other: Path) -> bool:
    """Lets two folders change places in one step; False where this system cannot."""
    a, b = os.fsencode(one), os.fsencode(other)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if hasattr(libc, "renameat2"):  # Linux: AT_FDCWD, RENAME_EXCHANGE
            return libc.renameat2(-100, a, -100, b, 2) == 0
        return libc.renamex_np(a, b, 2) == 0  # macOS: RENAME_SWAP
    except (OSError, TypeError, AttributeError):
        return False


def appear(folder: Path, target: Path, replaces: bool = False, ours: Callable[[Path], bool] = lambda _: True) -> None:
    """The moment at which a new folder is there, in the place of an old one where it replaces one.

    What is in the old one and not `ours` stays. Where two folders cannot change places in one step, a process that is
    killed at that very moment leaves the old one as `old(target)`.
    """
    if not replaces:
        _rename(folder, target)
        sync(target.parent)
        return
    _keep(target, folder, ours)
    shutil.copystat(target, folder)
    sync(folder)
    if exchange(folder, target):
        gone = folder
    else:
        gone = old(target)
        remove(gone)
        target.rename(gone)
        try:
            _rename(folder, target)
        finally:
            recover(target)  # after an exception the old folder is in its place again
    try:
        sync(target.parent)
    finally:
        for left in (gone, old(target)):  # the second, if a process was killed between two renames
            if left.is_dir():
                _keep(left, target, ours)  # files of the user that came while this was writing
                remove(left)


def _rename(folder: Path, target: Path) -> None:
    try:
        folder.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} was made by someone else in the meantime ({error})") from None
        raise


def _keep(source: Path, folder: Path, ours: Callable[[Path], bool]) -> None:
    """Gives the entries of one folder that are not ours, and not in the other, a second name there."""
    for entry in source.iterdir():
        if ours(entry) or is_temporary(entry) or os.path.lexists(folder / entry.name):
            continue
        if is_folder(entry):
            shutil.copytree(entry, folder / entry.name, symlinks=True, copy_function=_link)
        else:
            _link(str(entry), str(folder / entry.name))


def _link(source: str, copy: str) -> None:
    """A second name for a file, where the file system has such; else a copy."""
    with contextlib.suppress(OSError):
        os.link(source, copy, follow_symlinks=False)
        return
    shutil.copy2(source, copy, follow_symlinks=False)


def old(target: Path) -> Path:
    """Where a folder stands while another takes its place."""
    name = f".{target.name}.jlora-old"
    if len(os.fsencode(name)) > 255:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()}.jlora-old"
    return target.with_name(name)


def recover(target: Path) -> None:
    """Undoes the first half of a replacement whose process was killed before the second."""
    if not os.path.lexists(target) and old(target).is_dir():
        old(target).rename(target)


# --- what is there ------------------------------------------------------------------------------------------------


def check_free(target: Path, overwrite: bool, ours: str, what: str) -> bool:
    """Whether there is something to replace; FileExistsError where it must not be."""
    if not os.path.lexists(target):
        return False
    if not overwrite:
        raise FileExistsError(f"{target} exists; write overwrite=True to replace the {what} in it, or another path")
    if target.is_dir() and (target / ours).is_file():
        return True
    if target.is_dir() and all(map(is_temporary, target.iterdir())):
        return False  # nothing is there that could be lost
    raise FileExistsError(f"{target} exists and holds no {what}: overwrite=True does not replace it, remove it first")


#: What opens a folder that has a file of this name.
_OPENS = {
    "jlora.json": "jlora.load",
    "jlora_base.json": "jlora.io.quantised.load",
    "adapter_config.json": "jlora.io.peft.load",
}


def check_kind(folder: Path, name: str) -> None:
    """ValueError where a folder without the file of this name is of another kind that jlora knows."""
    for other, load in _OPENS.items():
        if other != name and (folder / other).is_file() and not os.path.lexists(folder / name):
            raise ValueError(f"{folder} holds {other} and no {name}: {load} opens it")


def files(folder: Path) -> dict[str, tuple[int, str]]:
    """Size and digest of every file below a folder; ValueError for links and whatever else is no plain file."""
    found = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent, name)
            mode = path.lstat().st_mode
            if not (stat.S_ISDIR(mode) or stat.S_ISREG(mode)):
                raise ValueError(f"{path} is a link or no plain file, which no saved adapter holds")
            if stat.S_ISREG(mode):
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found[path.relative_to(folder).as_posix()] = (path.stat().st_size, digest)
    return found
