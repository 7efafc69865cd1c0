"""The fields of adapter_config.json: a JSON object from anywhere, each field of a kind that is checked.

A check takes a field's name and value and the list of what is wrong so far, to which it adds.
"""

import collections
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import NoReturn, TypeAlias, TypeGuard

Fields: TypeAlias = dict[str, object]
"""Of a JSON object, whatever they are."""

_LARGEST = 2**24


def parse(path: Path) -> Fields:
    """The fields of a file.

    Raises:
      ValueError: no JSON object.
    """
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is too large to be a configuration")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or damaged: it is not JSON ({str(error)[:200]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not the fields of a configuration")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _no_twins(pairs: list[tuple[str, object]]) -> Fields:
    twice = [name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]!r:.60} stands there twice")
    return dict(pairs)


def unknown(content: Fields, known: Collection[str]) -> list[str]:
    """The fields that are not known, and not off, in words."""
    off = lambda value: value in (None, False, "") or value == [] or value == {}  # noqa: E731
    return [
        f"{name} is {value!r:.60}, which jlora has no maths for"
        for name, value in content.items()
        if name not in known and not off(value)
    ]


def whole(name: str, value: object, bad: list[str]) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        bad.append(f"{name} is {value!r:.60}, not a whole number above 0")
        return 1
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def number(name: str, value: object, bad: list[str]) -> float:
    if not _is_number(value) or not abs(value) < 1e30:  # beyond float32's range it is no scale
        bad.append(f"{name} is {value!r:.60}, not a number")
        return 0.0
    return value


def rate(name: str, value: object, bad: list[str]) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        bad.append(f"{name} is {value!r:.60}, not a rate in [0, 1)")
        return 0.0
    return float(value)


def flag(name: str, value: object, bad: list[str]) -> bool:
    if value is not None and type(value) is not bool:
        bad.append(f"{name} is {value!r:.60}, neither true nor false")
    return bool(value)


def bias(name: str, value: object, bad: list[str]) -> str:
    if value not in ("none", "all", "lora_only"):
        bad.append(f"{name} is {value!r:.60}, not 'none', 'all' or 'lora_only'")
    return str(value)


def modules(name: str, value: object, bad: list[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        bad.append(f"{name} is {value!r:.60}, not a list of names")
        return ()
    return tuple(value)


def target_modules(name: str, value: object, bad: list[str]) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):  # a pattern over the torch model's modules: the tensors say the rest
        return value
    return modules(name, value, bad)


def ids(name: str, value: object, bad: list[str]) -> tuple[int, ...]:
    """A list of ids of tokens, each there once."""
    if not isinstance(value, list) or not value or not all(type(n) is int and 0 <= n < 2**31 for n in value):
        bad.append(f"{name} is {value!r:.60}, not a list of ids of tokens, from 0 on")
        return ()
    if len(set(value)) < len(value):
        bad.append(f"{name} has {[n for n, k in collections.Counter(value).items() if k > 1][:5]} twice")
    return tuple(value)


def tokens(name: str, value: object, bad: list[str]) -> Mapping[str, tuple[int, ...]] | tuple[int, ...] | None:
    if isinstance(value, dict):
        return {k: ids(f"{name}[{k!r:.60}]", v, bad) for k, v in value.items()} or None
    return ids(name, value, bad) if value else None


def ranks(name: str, value: object, bad: list[str]) -> dict[str, int]:
    return {k: whole(f"{name}[{k!r:.60}]", v, bad) for k, v in _patterns(name, value, bad).items()}


def alphas(name: str, value: object, bad: list[str]) -> dict[str, float]:
    return {k: number(f"{name}[{k!r:.60}]", v, bad) for k, v in _patterns(name, value, bad).items()}


def _patterns(name: str, value: object, bad: list[str]) -> Fields:
    """A dictionary; its keys are regular expressions, which `Config.misread` reads."""
    if value is not None and not isinstance(value, dict):
        bad.append(f"{name} is {value!r:.60}, not a dictionary")
    return value if isinstance(value, dict) else {}
