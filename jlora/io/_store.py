"""A folder of a manifest and its arrays: jlora's own formats.

The manifest names the folder of the arrays, and says the size and digest of every file in it. Saving over such a
folder makes new arrays and a new manifest in a folder inside, moves the arrays beside the old ones, and then replaces
the manifest, in one step of the file system: so at every moment the folder holds one whole save, and what else is in it
stays.
"""

import contextlib
import dataclasses
import math
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from jlora._types import AnyPath
from jlora.io import _checkpoint, _folder
from jlora.io._record import Content, Form, several

T = TypeVar("T")

#: Elements that any file may ask for; and what each element of the base, and each byte of the files, adds to that.
_FREE, _PER_ELEMENT, _PER_BYTE = 2**24, 4, 64


@dataclasses.dataclass(frozen=True)
class Store:
    """One kind of such a folder.

    Attributes:
      form: of its manifest.
      prefix: of the names of folders of arrays.
      what: it holds, for error messages.
      load: what a user calls to open it.
      before: what the folder of arrays was called before it had a number.
    """

    form: Form
    prefix: str
    what: str
    load: str
    before: str | None = None

    def _is_name(self, name: str) -> bool:
        """Whether this is the name of a folder of arrays: all of it, for what begins so may be a user's own."""
        return bool(re.fullmatch(rf"{self.prefix}-[0-9a-f]{{16}}", name))

    def _is_data(self, entry: Path) -> bool:
        return self._is_name(entry.name) and _folder.is_folder(entry)

    # --- save ---

    def place(self, path: AnyPath, overwrite: bool) -> Path:
        """The folder to save into; raises where something else is there."""
        target = _folder.local(path)
        _folder.check_free(target, overwrite, self.form.name, self.what)
        return target

    def save(self, target: Path, arrays: Mapping[str, np.ndarray], content: Content) -> None:
        """Saves arrays and what a manifest says besides them."""
        if not target.is_dir():
            with _folder.new_folder(target) as made:
                new = made / "new"
                new.mkdir()
                self._write(new, arrays, content)
                _folder.appear(new, target)
            return
        with _folder.locked(target), _folder.temporary(target) as made:
            was = None
            with contextlib.suppress(OSError, ValueError):
                was = self.read(target)["data"]
            try:
                data = self._write(made, arrays, content)
                if data is not None:
                    (made / data).rename(target / data)
                    _folder.sync(target)
                (made / self.form.name).replace(
                    target / self.form.name
                )  # with this rename the new adapter takes the place of the old
                _folder.sync(target)
            finally:
                self._sweep(target, was)

    def _write(self, folder: Path, arrays: Mapping[str, np.ndarray], content: Content) -> str | None:
        """Writes and reads back; the name of the folder of arrays."""
        data, entries = None, {}
        if arrays:
            data = f"{self.prefix}-{secrets.token_hex(8)}"
            _checkpoint.write(folder / data, arrays)
            _folder.sync_all(folder / data)
            entries = {name: list(entry) for name, entry in _folder.files(folder / data).items()}
        path = folder / self.form.name
        path.write_bytes(self.form.seal({**content, "format": self.form.format, "data": data, "files": entries}))
        self.read(folder)
        _folder.sync(path, folder)
        return data

    def _sweep(self, folder: Path, was: str | None) -> None:
        """Removes arrays that the manifest does not name: those that it did, and those of saves that were cut short."""
        with contextlib.suppress(OSError, ValueError):
            current = self.read(folder)["data"]
            for entry in folder.iterdir():
                stale = entry.name != current and (self._is_data(entry) or entry.name == was)
                if stale or _folder.is_temporary(entry):  # no other process is saving, as this one holds the lock
                    _folder.remove(entry)

    # --- load ---

    def find(self, path: AnyPath) -> Path:
        """The folder to open; raises where there is none. Its manifest may be missing."""
        folder = _folder.local(path)
        if not folder.exists():
            raise FileNotFoundError(f"there is nothing at {folder}")
        if not folder.is_dir():
            raise ValueError(f"{folder} is a file; a saved {self.what} is a folder with {self.form.name} in it")
        if not self.is_here(folder) and any(map(self._is_data, folder.iterdir())):
            raise ValueError(f"{folder} is cut short: its manifest, {self.form.name}, is missing")
        return folder

    def is_here(self, folder: Path) -> bool:
        """Whether there is a manifest of this kind, sound or not."""
        return os.path.lexists(folder / self.form.name)

    def read(self, folder: Path) -> Content:
        """The manifest; ValueError where it is none."""
        content = self.form.read(folder)
        content.setdefault("data", self.before)
        content.setdefault("files", None)
        data = content["data"]
        if data is not None and data != self.before and not self._is_name(data):
            where = folder / self.form.name
            raise ValueError(f"{where} is no manifest that jlora wrote: {data!r:.100} is no name of its arrays")
        return content

    def open(self, folder: Path, make: Callable[[Content, int], T]) -> T:
        """What `make(content, bytes of the files)` makes; of one save, if another process saves in the meantime."""
        while True:
            content = self.read(folder)
            try:
                return make(content, _check_files(folder, content))
            except (ValueError, OSError):
                if self.read(folder) == content:
                    raise
                # another process has saved over it in the meantime: the new one is read


def _check_files(folder: Path, content: Content) -> int:
    """Compares every file of the arrays with its digest, before Orbax reads any; the bytes of them all."""
    if content["data"] is None:
        return 0
    data = folder / content["data"]
    if data.is_symlink() or not data.is_dir():
        raise ValueError(f"{folder} is cut short: its arrays, {data.name}, are missing or a link")
    have, want = _folder.files(data), content["files"]
    if want is not None:
        bad = [f"{name} is missing" for name in want if name not in have]
        bad += [f"{name} was not saved with it" for name in have if name not in want]
        for name in (n for n in have if n in want and have[n] != want[n]):
            size, expected = have[name][0], want[name][0]
            bad.append(f"{name} has " + ("other bytes" if size == expected else f"{size} bytes of {expected}"))
        if bad:
            raise ValueError(f"{data} is cut short or damaged:" + several(bad))
    return sum(size for size, _ in have.values())


def check_size(shapes: Iterable[tuple[int, ...]], base: int, size: int, where: str) -> None:
    """ValueError where arrays of these shapes are far more than files of this size can be meant to hold.

    Zeros compress to nothing and random factors are drawn again from a number: a small file can ask for any amount of
    memory. What is honest is about as large as its files, or made for a base about as large.
    """
    need = sum(math.prod(shape) for shape in shapes)
    most = _FREE + _PER_ELEMENT * base + _PER_BYTE * size
    if need > most:
        raise ValueError(
            f"{where} asks for arrays of more than {most:,} elements, from {size:,} bytes of files and for a base of "
            f"{base:,} elements: no honest file does, and they might fill the memory"
        )
