"""Folders that appear, and are replaced, in one step of the file system."""

import contextlib
import hashlib
import os
import secrets
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

TEMPORARY = ".jlora-tmp-"
_DAY = 86400.0


def local(path: "str | os.PathLike[str]") -> Path:
    """An absolute path; ValueError where it cannot be a local one."""
    text = os.fspath(path)
    if not isinstance(text, str) or "://" in text or "\0" in text:
        raise ValueError(f"{text!r} is no path of a local folder; save there, then copy it")
    return Path(os.path.abspath(text))


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


@contextlib.contextmanager
def beside(target: Path) -> Iterator[Path]:
    """A temporary folder beside the target, gone at the end unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(TEMPORARY + "*"):  # of processes that were killed
        with contextlib.suppress(OSError):
            if time.time() - stale.stat().st_mtime > _DAY:
                shutil.rmtree(stale, ignore_errors=True)
    folder = target.parent / (TEMPORARY + secrets.token_hex(8))
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lets one process at a time save over a folder, where the system has such locks."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def appear(folder: Path, target: Path, replaces: bool = False) -> None:
    """The moment at which a new folder is there, in the place of an old one where it replaces one.

    Two folders cannot change places in one step: a process that is killed at that very moment leaves the old one
    as `old(target)`.
    """
    if replaces:
        shutil.rmtree(old(target), ignore_errors=True)
        target.rename(old(target))
    try:
        folder.rename(target)
    except OSError as error:
        if os.path.lexists(target):
            raise FileExistsError(f"{target} was made by someone else in the meantime ({error})") from None
        raise
    finally:
        if replaces:
            recover(target)  # an exception lets the old one stay
    sync(target.parent)
    if replaces:
        shutil.rmtree(old(target), ignore_errors=True)


def old(target: Path) -> Path:
    """Where a folder stands while another takes its place."""
    return target.with_name(f".{target.name}.jlora-old")


def recover(target: Path) -> None:
    """Undoes the first half of a replacement whose process was killed before the second."""
    if not os.path.lexists(target) and old(target).is_dir():
        old(target).rename(target)


def check_free(target: Path, overwrite: bool, ours: str, what: str) -> bool:
    """Whether there is something to replace; FileExistsError where it must not be."""
    if not os.path.lexists(target):
        return False
    if not overwrite:
        raise FileExistsError(f"{target} exists; write overwrite=True to replace the {what} in it, or another path")
    if target.is_dir() and (target / ours).is_file():
        return True
    if target.is_dir() and not any(target.iterdir()):
        return False  # a rename puts a folder in the place of an empty one
    raise FileExistsError(f"{target} exists and holds no {what}: overwrite=True does not replace it, remove it first")


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
