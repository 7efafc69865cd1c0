"""Which weight of a parameter tree a module of peft's adapter is, and the other way round.

A torch model has one module a layer, where a scanned Flax model has one stacked kernel: so a module stands for a
path and an index into the stack axes there, a `Slot`.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from jlora import _tree

Slot: TypeAlias = tuple[str, tuple[int, ...]]
Names: TypeAlias = "Mapping[str, str] | Callable[..., Any] | None"

#: What Flax calls the weight of a module that peft calls `weight`.
WEIGHTS = ("kernel", "embedding", "scale")
_FIELD = re.compile(r"\{([A-Za-z_]\w*)\}")


def _pattern(text: str) -> re.Pattern[str]:
    """A template as a regular expression: `{n}` is a number, the same one wherever it stands."""
    parts, seen = [], set()
    for n, part in enumerate(_FIELD.split(text)):
        if n % 2 == 0:
            parts.append(re.escape(part))
        else:
            parts.append(f"(?P={part})" if part in seen else f"(?P<{part}>0|[1-9][0-9]*)")
            seen.add(part)
    return re.compile("".join(parts))


@dataclasses.dataclass(frozen=True)
class Template:
    """`"layers.{n}.q_proj"` beside `"layers/{n}/query/kernel"`; a number that the path has not is an index."""

    module: str
    path: str

    def __post_init__(self) -> None:
        if not (isinstance(self.module, str) and isinstance(self.path, str) and self.module and self.path):
            raise TypeError(f"names={{{self.module!r}: {self.path!r}}}: write {{peft's module: path of its weight}}")
        extra = set(_FIELD.findall(self.path)) - set(_FIELD.findall(self.module))
        if extra or re.search(r"[{}]", _FIELD.sub("", self.module + self.path)):
            raise ValueError(
                f"names={{{self.module!r}: {self.path!r}}}: a number is written {{n}}, with a name that the module has"
            )

    @property
    def indices(self) -> tuple[str, ...]:
        """The numbers that are indices into stack axes, in the order of the module's name."""
        return tuple(dict.fromkeys(x for x in _FIELD.findall(self.module) if x not in _FIELD.findall(self.path)))

    def slot(self, module: str) -> Slot | None:
        """The slot of a module that this template has."""
        found = _pattern(self.module).fullmatch(module)
        if not found:
            return None
        path = _FIELD.sub(lambda m: found[m[1]], self.path)
        return path, tuple(int(found[name][:18]) for name in self.indices)

    def name(self, path: str, index: tuple[int, ...]) -> str | None:
        """The module of a slot that this template has."""
        found = _pattern(self.path).fullmatch(path)
        if not found or len(index) != len(self.indices):
            return None
        numbers = {**found.groupdict(), **dict(zip(self.indices, map(str, index), strict=True))}
        return _FIELD.sub(lambda m: numbers[m[1]], self.module)


def plain_name(path: str) -> str | None:
    """The module that has the same steps as a path: `model/layers/0/q_proj/kernel` is `model.layers.0.q_proj`."""
    *steps, last = path.split("/")
    steps = steps[1:] if steps[:1] == ["params"] else steps  # Linen's name of the collection
    unescape = lambda step: step.replace("%2F", "/").replace("%25", "%")  # noqa: E731
    return ".".join(map(unescape, steps)) if steps and last in WEIGHTS else None


class Book:
    """The names of one tree: what the user says first, then the same steps in both worlds.

    Raises:
      TypeError: names of the wrong kind.
      ValueError: a template that is none.
    """

    def __init__(self, names: Names, paths: Sequence[str]) -> None:
        if names is not None and not isinstance(names, Mapping) and not callable(names):
            raise TypeError(f"names is a dictionary {{module: path}} or a function, not {names!r:.100}")
        self.paths = dict.fromkeys(paths)
        self.function = names if callable(names) else None
        self.templates = [Template(*pair) for pair in names.items()] if isinstance(names, Mapping) else []
        self.modules: dict[str, list[str]] = {}
        for path in paths:
            name = plain_name(path)
            if name is not None:
                self.modules.setdefault(name, []).append(path)

    def slot(self, module: str) -> Slot:
        """The path of a module's weight, and an index into its stack axes; ValueError in words."""
        said = [s for s in (t.slot(module) for t in self.templates) if s is not None]
        if self.function is not None:
            answer = self.function(module)
            answer = (answer, ()) if isinstance(answer, str) else answer
            said = [] if answer is None else [(answer[0], tuple(answer[1]))]
        said = list(dict.fromkeys(said)) or [(path, ()) for path in self.modules.get(module, ())]
        if len(said) == 1 and said[0][0] in self.paths:
            path, index = said[0]
            return path, tuple(map(int, index))
        if len(said) > 1:
            raise ValueError(f"{module!r} could be any of {sorted(path for path, _ in said)}: say which with names=")
        wanted = said[0][0] if said else module.replace(".", "/") + "/kernel"
        near = ", ".join(_tree.nearest(wanted, tuple(self.paths), 3))
        raise ValueError(f"{module!r} is not in params: no {wanted!r}; the nearest paths are {near}; use names=")

    def depth(self, path: str) -> int | None:
        """The number of stack axes that the templates give a path; None where none has it."""
        depths = {len(t.indices) for t in self.templates if _pattern(t.path).fullmatch(path)}
        if len(depths) > 1:
            raise ValueError(f"{path!r}: names= index it in unlike ways")
        return next(iter(depths), None)

    def name(self, path: str, index: tuple[int, ...]) -> str:
        """The module of a slot; ValueError in words."""
        if self.function is not None:
            answers = [self.function(path, index)]
        else:
            answers = [t.name(path, index) for t in self.templates]
        said = {name for name in answers if name is not None}
        plain = plain_name(path)
        if not said and plain is not None and not index:
            return plain
        if len(said) > 1:
            raise ValueError(f"{path!r} could be any of {sorted(said)}: say which with names=")
        if not said:
            at = f"[{', '.join(map(str, index))}]" if index else ""
            raise ValueError(f"{path!r}{at} has no name there: names={{'layers.{{n}}.module': {path!r}}} gives it one")
        return said.pop()

    def bias(self, path: str) -> str:
        """The bias beside a weight; ValueError where there is none."""
        bias = "/".join([*path.split("/")[:-1], "bias"])
        if bias not in self.paths:
            raise ValueError(f"there is no {bias!r} beside {path!r}")
        return bias

    def weight(self, bias: str) -> str:
        """The weight beside a bias; ValueError where none, or more than one, could be it."""
        parent = bias.split("/")[:-1]
        beside = [p for p in self.paths if p.split("/")[:-1] == parent and p != bias]
        beside = [p for p in beside if p.split("/")[-1] in WEIGHTS] or beside
        if len(beside) != 1:
            raise ValueError(f"{bias!r} stands beside {beside}: which one it belongs to cannot be told")
        return beside[0]
