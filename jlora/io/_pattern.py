"""The patterns of peft's configurations: regular expressions that match in time proportional to their length.

A configuration may come from anywhere, and Python's `re` takes exponential time for some short patterns. Here a pattern
is a set of states that all move on at once, one letter of the text at a time.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

_LONGEST, _STATES = 1000, 4000
#: Of all keys together; and how many it takes to read a name, to build a pattern, a letter and a state of it, and to
#: look a name up.
_STEPS, _NAMED, _BUILT, _LETTER, _STATE, _LOOKED_UP = 3 * 10**7, 200, 15_000, 300, 100, 5
#: What is read as an atom of one letter, as `re` reads it; and what is not read: groups with a question mark and more.
_ATOM = re.compile(r"\[\^?\]?(?:[^\]\\]|\\.)*\]|\\[dDwWsS]|\\[^a-zA-Z0-9]|[^\\\[(){}|*+?^$]", re.DOTALL)
_COUNT = re.compile(r"([*+?])|\{(\d{1,4})(?:(,)(\d{1,4})?)?\}")
_NAME = re.compile(r"(?:[\w.-]|\\[^a-zA-Z0-9])+")


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
            self.states: list[Any] = [None]  # the first is the end
            self.steps = 0  # of the last match
            self.start = self._build(self._either(), 0)
        except (re.error, RecursionError, OverflowError) as error:
            raise ValueError(f"it is no regular expression: {error}") from None
        if self.at < len(key):
            raise ValueError(f"{key[self.at :]!r:.20} in it is not read here")

    # --- from text to a tree: (kind, part, ...) ---

    def _either(self) -> Any:
        parts = [self._run()]
        while self._take("|"):
            parts.append(self._run())
        return parts[0] if len(parts) == 1 else ("either", parts)

    def _run(self) -> Any:
        parts = []
        while self.at < len(self.text) and self.text[self.at] not in "|)":
            atom = self._one()
            while self.at < len(self.text) and (count := _COUNT.match(self.text, self.at)):
                self.at = count.end()
                self._take("?")  # greedy or lazy: it does not matter for whether there is a match
                atom = ("times", atom, *_counts(count))
            parts.append(atom)
        return ("run", parts)

    def _one(self) -> Any:
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

    def _state(self, *state: Any) -> int:
        self.states.append(state)
        if len(self.states) > _STATES:
            raise ValueError("it repeats too much")
        return len(self.states) - 1

    def _build(self, node: Any, then: int) -> int:
        """The state in which the node is matched next, and after it `then`."""
        self.steps += 1
        if self.steps > 10 * _STATES:
            raise ValueError("it repeats too much")
        kind, *rest = node
        if kind == "run":
            for part in reversed(rest[0]):
                then = self._build(part, then)
            return then
        if kind == "either":
            return self._state("any", [self._build(part, then) for part in rest[0]])
        if kind != "times":
            return self._state(kind, rest[0], then)
        part, least, most = rest
        if most is None:
            loop = self._state("any", [then])
            self.states[loop][1].append(self._build(part, loop))
            then = loop
        for _ in range(0 if most is None else most - least):
            then = self._state("any", [then, self._build(part, then)])
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
                there = state[0] == "any" or n == (0 if state[1] == "^" else len(module))
                new = [] if not there else state[1] if state[0] == "any" else [state[2]]
                todo += [s for s in new if s not in seen]
                seen.update(new)
            self.steps += len(seen)
            if n == len(module):
                return 0 in seen
            letters = (self.states[s] for s in seen if s and self.states[s][0] == "letter")
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


class Patterns:
    """Keys with their values, in order: the first that names a module gives it its value.

    Attributes:
      bad: the keys that are none, in words.

    Raises:
      ValueError: building or matching them takes longer than it can for any model there is.
    """

    def __init__(self, values: Mapping[str, Any]) -> None:
        self.left, self.bad = _STEPS, list[str]()
        self.names: dict[Dots, dict[str, tuple[int, Any]]] = {}
        self.others: list[tuple[int, Pattern, Any]] = []
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

    def value(self, module: str, default: Any) -> Any:
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
