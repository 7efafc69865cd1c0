"""What stands beside arrays in a folder: one JSON object, its manifest.

A manifest has one spelling and ends in a digest of itself, so that any byte of it that changes is noticed. Nothing in
it is ever imported, evaluated or used as the name of a file to open: it may come from anywhere.
"""

import collections.abc
import dataclasses
import hashlib
import json
import stat
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

Content: TypeAlias = dict[str, Any]
"""The fields of a manifest, or of a part of it: each of the type that a schema says, by which it is read."""

Schema: TypeAlias = Mapping[str, object]
"""`{field: type}`, types as annotations write them."""

#: No manifest is larger: it has less than a kilobyte a weight.
LARGEST = 2**26


def several(bad: Sequence[str], most: int = 8) -> str:
    """The lines of an error that has many, none of them long."""
    lines = [line if len(line) < 400 else line[:400] + "..." for line in bad[:most]]
    more = [f"and {len(bad) - most} more"] if len(bad) > most else []
    return "\n  ".join(["", *lines, *more])


def lines(content: Content) -> str:
    """A spelling: sorted keys, a line for each of the outermost."""
    rows = (f"{json.dumps(k)}: {json.dumps(v, sort_keys=True, allow_nan=False)}" for k, v in sorted(content.items()))
    return "{\n" + ",\n".join(rows) + "\n}\n"


def line(content: Content) -> str:
    """A spelling: sorted keys, all in one line."""
    return json.dumps(content, sort_keys=True, allow_nan=False)


@dataclasses.dataclass(frozen=True)
class Form:
    """One kind of manifest.

    Attributes:
      name: of its file.
      format: the newest number that is read, and the one that is written.
      schema: `{field: type}` of everything it holds.
      spell: its one spelling.
      check: looks closer at what has these types; TypeError in words.
      older: the fields that files of format 1 had before they had digests, where there are such files.
      added: fields that files of format 1 do not have, and what stands for them there.
    """

    name: str
    format: int
    schema: Schema
    spell: Callable[[Content], str]
    check: Callable[[Content], Content]
    older: Schema | None = None
    added: Content = dataclasses.field(default_factory=dict)

    def _digest(self, content: Content) -> str:
        return hashlib.sha256(self.spell(content).encode()).hexdigest()

    def seal(self, content: Content) -> bytes:
        """A manifest as the bytes of its file."""
        return self.spell({**content, "sha256": self._digest(content)}).encode()

    def unseal(self, raw: bytes, where: str) -> Content:
        """The content of a manifest, its types checked; ValueError in words for anything else."""
        damaged = f"{where} is cut short or damaged"
        try:
            content = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{damaged}: it is not JSON ({str(error)[:200]})") from None
        version = content.get("format") if isinstance(content, dict) else None
        if type(version) is not int or version < 1:
            raise ValueError(f"{damaged}: it has no format number")
        if version > self.format:
            raise ValueError(
                f"{where} is of format {str(version)[:20]}, newer than {self.format}, the newest this jlora reads; "
                "upgrade jlora"
            )
        schema = self.schema
        if self.older is not None and set(content) == set(self.older):
            schema = self.older  # there was nothing to hold it against
        else:
            digest = content.pop("sha256", None)
            try:
                intact = type(digest) is str and digest == self._digest(content) and raw == self.seal(content)
            except (ValueError, RecursionError, UnicodeError):
                intact = False
            if not intact:
                raise ValueError(f"{damaged}: its content does not have the digest it states")
        if version == 1:
            content = {**self.added, **content}
        try:
            return self.check(record(content, schema, "the manifest"))
        except (TypeError, RecursionError) as error:
            raise ValueError(f"{where} is no manifest that jlora wrote: {str(error)[:500]}") from None

    def read(self, folder: Path) -> Content:
        """The manifest in a folder."""
        path = folder / self.name
        info = path.lstat()
        if not stat.S_ISREG(info.st_mode) or info.st_size > LARGEST:
            raise ValueError(f"{path} is a link, no plain file or too large to be a manifest")
        return self.unseal(path.read_bytes(), str(path))


# --- types --------------------------------------------------------------------------------------------------------


def record(content: Content, schema: Schema, where: str) -> Content:
    """The fields of a JSON object, each of its type; TypeError where one is missing, unknown or something else."""
    odd = sorted(set(content) ^ set(schema))
    if odd:
        raise TypeError(f"{where} has a missing or unknown field {odd[0]!r:.100}")
    return {k: cast(content[k], hint, f"{k!r} of {where}") for k, hint in schema.items()}


def cast(value: object, hint: object, where: str) -> Any:
    """A JSON value as a type hint says it (lists become tuples); TypeError where it is something else."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin is typing.Annotated:  # only the type is checked here; the method checks the range
        return cast(value, args[0], where)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            try:
                return cast(value, option, where)
            except TypeError:
                pass
    elif origin is typing.Literal:
        if any(type(value) is type(a) and value == a for a in args):
            return value
    elif origin in (tuple, list, collections.abc.Sequence):
        endless = origin is not tuple or args[-1] is Ellipsis
        if isinstance(value, list) and (endless or len(value) == len(args)):
            each = [args[0]] * len(value) if endless else args
            return tuple(cast(v, h, where) for v, h in zip(value, each, strict=True))
    elif origin is dict:
        if isinstance(value, dict):
            return {k: cast(v, args[1], where) for k, v in value.items()}
    elif hint is type(value) or value is hint is None or hint is float and type(value) is int:
        return value
    raise TypeError(f"{where} is {_short(value)!r}, not of type {getattr(hint, '__name__', hint)}")


def _short(value: object) -> str:
    """The beginning of a JSON value: the whole of a large one takes long to spell."""
    if isinstance(value, (list, dict)) and len(value) > 60:
        return f"{type(value).__name__} of {len(value)}"
    return str(value)[:60]
