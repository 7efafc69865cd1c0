"""Which weight of a parameter tree a module of peft's adapter is, and the other way round.

A torch model has one module a layer, where a scanned Flax model has one stacked kernel: so a module stands for a
path and an index into the stack axes there, a `Slot`.
"""

import contextlib
import dataclasses
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

from jlora._trees import _tree

Slot: TypeAlias = tuple[str, tuple[int, ...]]
ModuleNames: TypeAlias = "Mapping[str, str] | Callable[..., object] | None"

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
    *steps, last = _steps(path)
    return ".".join(steps) if steps and last in WEIGHTS else None


def _steps(path: str) -> list[str]:
    """The steps of a path as torch would have them, without Linen's name of the collection."""
    steps = [step.replace("%2F", "/").replace("%25", "%") for step in path.split("/")]
    return steps[1:] if len(steps) > 1 and steps[0] == "params" else steps


def _answer(answer: object, module: str) -> list[Slot]:
    """What a function said that a module is."""
    if answer is None or isinstance(answer, str):
        return [] if answer is None else [(answer, ())]
    if isinstance(answer, tuple) and len(answer) == 2 and isinstance(answer[0], str):
        with contextlib.suppress(TypeError, ValueError):
            return [(answer[0], tuple(map(operator.index, answer[1])))]
    raise TypeError(f"names({module!r:.100}) returned {answer!r:.100}: write a path, (path, (index, ...)) or None")


class Book:
    """The names of one tree: what the user says first, then the same steps in both worlds.

    Raises:
      TypeError: names of the wrong kind.
      ValueError: a template that is none.
    """

    def __init__(self, names: ModuleNames, paths: Sequence[str]) -> None:
        if names is not None and not isinstance(names, Mapping) and not callable(names):
            raise TypeError(f"names is a dictionary {{module: path}} or a function, not {names!r:.100}")
        self.paths = dict.fromkeys(paths)
        self.function = names if callable(names) else None
        self.templates = [Template(*pair) for pair in names.items()] if isinstance(names, Mapping) else []
        self.modules: dict[str, list[str]] = {}
        self.missed = 0
        for path in paths:
            name = plain_name(path)
            if name is not None:
                self.modules.setdefault(name, []).append(path)

    def said(self, module: str) -> list[Slot]:
        """What the user says that a module is."""
        if self.function is not None:
            return _answer(self.function(module), module)
        return list(dict.fromkeys(s for s in (t.slot(module) for t in self.templates) if s is not None))

    def slot(self, module: str) -> Slot:
        """The path of a module's weight, and an index into its stack axes; ValueError in words."""
        said = self.said(module) or [(path, ()) for path in self.modules.get(module, ())]
        if len(said) == 1 and said[0][0] in self.paths:
            return said[0]
        if len(said) > 1:
            raise ValueError(f"{module!r} could be any of {sorted(path for path, _ in said)}: say which with names=")
        wanted = said[0][0] if said else module.replace(".", "/") + "/kernel"
        self.missed += 1  # no more than eight are shown, and to look for near ones is slow
        near = ", ".join(_tree.nearest(wanted, tuple(self.paths), 3) if self.missed <= 8 else ())
        raise ValueError(f"{module!r} is not in params: no {wanted!r}; the nearest paths are {near}; use names=")

    def of_modules(self) -> "Book":
        """What a dictionary says, for names that are asked for from both sides: a function answers from one."""
        said = {t.module: t.path for t in self.templates}
        return Book(said or None, tuple(self.paths))

    def has(self, module: str) -> bool:
        """Whether a module has one weight here."""
        try:
            self.slot(module)
        except ValueError:
            return False
        return True

    def known(self) -> set[str]:
        """Every module of the tree, and every one that holds others, as far as their names are known.

        A number that is an index into stack axes is 0 here.
        """
        found = set()
        for path in self.paths:
            names = {t.name(path, (0,) * len(t.indices)) for t in self.templates} - {None}
            steps = _steps(path)[:-1]
            for name in names or {".".join(steps)}:
                parts = str(name).split(".")
                found.update(".".join(parts[:n]) for n in range(1, len(parts) + 1))
        return found - {""}

    def depth(self, path: str) -> int | None:
        """The number of stack axes that the templates give a path; None where none has it."""
        depths = {len(t.indices) for t in self.templates if _pattern(t.path).fullmatch(path)}
        if len(depths) > 1:
            raise ValueError(f"{path!r}: names= index it in unlike ways")
        return next(iter(depths), None)

    def name(self, path: str, index: tuple[int, ...]) -> str:
        """The module of a slot; ValueError in words."""
        if self.function is not None:
            answer = self.function(path, index)
            if answer is not None and not isinstance(answer, str):
                raise TypeError(f"names({path!r}, {index}) returned {answer!r:.100}: write a module's name or None")
            answers = [answer]
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
