"""The patterns of peft's configurations: regular expressions that match in time proportional to their length.

A configuration may come from anywhere, and Python's `re` takes exponential time for some short patterns. Here a pattern
is a set of states that all move on at once, one letter of the text at a time.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Generic, Literal, TypeAlias, TypeVar

_LONGEST, _STATES = 1000, 4000
#: Of all keys together; and how many it takes to read a name, to build a pattern, a letter and a state of it, and to
#: look a name up.
_STEPS, _NAMED, _BUILT, _LETTER, _STATE, _LOOKED_UP = 3 * 10**7, 200, 15_000, 300, 100, 5
#: What is read as an atom of one letter, as `re` reads it; and what is not read: groups with a question mark and more.
_ATOM = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]|\\[dDwWsS]|\\[^a-zA-Z0-9]|[^\\\[(){}|*+?^$]", re.DOTALL)
_COUNT = re.compile(r"([*+?])|\{(\d{1,4})(?:(,)(\d{1,4})?)?\}")
_NAME = re.compile(r"(?:[\w.-]|\\[^a-zA-Z0-9])+")


Match: TypeAlias = Callable[[str], re.Match[str] | None]
"""Whether an atom takes a letter."""

Parts: TypeAlias = "tuple[Literal['either', 'run'], list[Node]]"
Times: TypeAlias = "tuple[Literal['times'], Node, int, int | None]"
Node: TypeAlias = "Parts | Times | tuple[Literal['at'], str] | tuple[Literal['letter'], Match]"
"""A part of a pattern as it is read."""

State: TypeAlias = (
    tuple[Literal["any"], list[int]] | tuple[Literal["at"], str, int] | tuple[Literal["letter"], Match, int]
)
"""A part as it is matched, with the states that come next."""

V = TypeVar("V")


class Pattern:
    """A key of `rank_pattern`: it names the modules that end in it, after a dot or from the beginning.

    `Pattern(key).matches(module)` says what `re.match(rf"(.*\\.)?({key})$", module)` says.

    Raises:
      ValueError: no regular expression, or one with parts that are not read here.
    """

    def __init__(self, key: str) -> None:
        if len(key) > _LONGEST:
            raise ValueError(f"it is longer than {_LONGEST} letters")
        try:
            re.compile(rf"(.*\.)?({key})$")
            self.text, self.at = key, 0
            self.states: list[State | None] = [None]  # the first is the end
            self.steps = 0  # of the last match
            self.start = self._build(self._either(), 0)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if self.at < len(key):
            raise ValueError(f"{key[self.at :]!r:.20} in it is not read here")

    # --- from text to a tree ---

    def _either(self) -> Node:
        parts = [self._run()]
        while self._take("|"):
            parts.append(self._run())
        return parts[0] if len(parts) == 1 else ("either", parts)

    def _run(self) -> Node:
        parts: list[Node] = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            atom = self._one()
            while self.at < len(self.text) and (count := _COUNT.match(self.text, self.at)):
                self.at = count.end()
                self._take("?")  # greedy or lazy: it does not matter for whether there is a match
                atom = ("times", atom, *_counts(count))
            parts.append(atom)
        return ("run", parts)

    def _one(self) -> Node:
        if self._take("("):
            if self._take("?") and not self._take(":"):
                raise ValueError(f"{self.text[self.at - 2 :]!r:.20} in it is not read here")
            inner = self._either()
            self.at += 1  # the bracket, which is there: `re` has compiled the pattern
            return inner
        if self.text[self.at] in "^$":
            self.at += 1
            return ("at", self.text[self.at - 1])
        atom = _ATOM.match(self.text, self.at)
        if not atom:
            raise ValueError(f"{self.text[self.at :]!r:.20} in it is not read here")
        self.at = atom.end()
        return ("letter", re.compile(atom[0]).match)

    def _take(self, letter: str) -> bool:
        found = self.text.startswith(letter, self.at)
        self.at += found
        return found

    # --- from the tree to states, the last first ---

    def _state(self, state: State) -> int:
        self.states.append(state)
        if len(self.states) > _STATES:
            raise ValueError("it repeats too much")
        return len(self.states) - 1

    def _build(self, node: Node, then: int) -> int:
        """The state in which the node is matched next, and after it `then`."""
        self.steps += 1
        if self.steps > 10 * _STATES:
            raise ValueError("it repeats too much")
        match node:
            case ("run", parts):
                for part in reversed(parts):
                    then = self._build(part, then)
                return then
            case ("either", parts):
                return self._state(("any", [self._build(part, then) for part in parts]))
            case ("at", where):
                return self._state(("at", where, then))
            case ("letter", match):
                return self._state(("letter", match, then))
            case ("times", part, least, most):
                return self._times(part, least, most, then)

    def _times(self, part: Node, least: int, most: int | None, then: int) -> int:
        if most is None:
            ways = [then]
            then = self._state(("any", ways))
            ways.append(self._build(part, then))
        for _ in range(0 if most is None else most - least):
            then = self._state(("any", [then, self._build(part, then)]))
        for _ in range(least):
            then = self._build(part, then)
        return then

    # --- matching ---

    def matches(self, module: str) -> bool:
        """Whether the pattern names this module."""
        now: set[int] = set()
        self.steps = len(module)
        for n in range(len(module) + 1):
            if n == 0 or module[n - 1] == ".":
                now.add(self.start)
            seen, todo = set(now), list(now)
            while todo:
                state = self.states[todo.pop()]
                if state is None or state[0] == "letter":
                    continue
                if state[0] == "any":
                    new = state[1]
                else:
                    new = [state[2]] if n == (0 if state[1] == "^" else len(module)) else []
                todo += [s for s in new if s not in seen]
                seen.update(new)
            self.steps += len(seen)
            if n == len(module):
                return 0 in seen
            letters = (state for s in seen if (state := self.states[s]) is not None and state[0] == "letter")
            now = {then for _, match, then in letters if match(module[n])}
        return False


def _counts(count: re.Match[str]) -> tuple[int, int | None]:
    """The least and the most of a quantifier."""
    if count[1]:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[count[1]]
    least = int(count[2])
    return least, int(count[4]) if count[4] else None if count[3] else least


@dataclasses.dataclass(frozen=True)
class Dots:
    """Where a name has dots that are any letter; names of one form are found at once.

    Attributes:
      whole: whether it is all of a module's name (`^` in front).
    """

    length: int
    free: frozenset[int]
    whole: bool

    def end(self, module: str) -> str | None:
        """The name of this form that a module would have, if there is one."""
        before = len(module) - self.length
        if before < 0 or before > 0 and (self.whole or module[before - 1] != "."):
            return None
        own = list(module[before:])
        for n in self.free:
            own[n] = "." if own[n] != "\n" else "\n"
        return "".join(own)


@dataclasses.dataclass(frozen=True)
class Name:
    """A key that is a name: its dots are any letter, as in a regular expression, and an escaped one is a dot."""

    name: str
    form: Dots

    @staticmethod
    def read(key: str) -> "Name | None":
        """The name that a key is; None where it is more."""
        whole, key = key.startswith("^"), key.removeprefix("^")
        if not _NAME.fullmatch(key) or len(key) > _LONGEST:
            return None
        if "\\" not in key:
            return Name(key, Dots(len(key), frozenset(n for n, a in enumerate(key) if a == "."), whole))
        letters = re.findall(r"\\(.)|(.)", key, re.DOTALL)
        free = frozenset(n for n, (_, plain) in enumerate(letters) if plain == ".")
        return Name("".join(a or b for a, b in letters), Dots(len(letters), free, whole))

    def matches(self, module: str) -> bool:
        """Whether it names this module."""
        return self.form.end(module) == self.name


def parsed(key: str) -> "Name | Pattern":
    """A key of a configuration; ValueError where it is none that is read here."""
    return Name.read(key) or Pattern(key)


class Patterns(Generic[V]):
    """Keys with their values, in order: the first that names a module gives it its value.

    Attributes:
      bad: the keys that are none, in words.

    Raises:
      ValueError: building or matching them takes longer than it can for any model there is.
    """

    def __init__(self, values: Mapping[str, V]) -> None:
        self.left, self.bad = _STEPS, list[str]()
        self.names: dict[Dots, dict[str, tuple[int, V]]] = {}
        self.others: list[tuple[int, Pattern, V]] = []
        for place, (key, value) in enumerate(values.items()):
            self._spend(_NAMED + len(key))
            if name := Name.read(key):
                self.names.setdefault(name.form, {}).setdefault(name.name, (place, value))
                continue
            self._spend(_BUILT + _LETTER * min(len(key), _LONGEST))
            try:
                pattern = Pattern(key)
            except ValueError as error:
                self.bad.append(f"the key {key!r:.60}; {error}; write the modules' names")
                self._spend(_STATE * _STATES)
                continue
            self.others.append((place, pattern, value))
            self._spend(_STATE * len(pattern.states))

    def _spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise ValueError("its patterns take too long to match; write the modules' names")

    def value(self, module: str, default: V) -> V:
        """The value of a module."""
        first = None
        for form, names in self.names.items():
            self._spend(_LOOKED_UP)
            found = names.get(form.end(module) or "")
            if found and (first is None or found[0] < first[0]):
                first = found
        for place, key, value in self.others:
            if first and first[0] < place:
                break
            self._spend(0)
            named = key.matches(module)
            self.left -= key.steps
            if named:
                return value
        return first[1] if first else default
