"""What a saved adapter says of itself: the fields of its manifest, and the methods and weights in it."""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jlora import methods
from jlora._algebra._recipe import Recipe
from jlora._plan import _sites
from jlora._plan._sites import Plan, Site
from jlora._trees import _tree
from jlora._trees._axes import is_trainable_dtype
from jlora._trees._leaf import Leaf
from jlora.io import _record
from jlora.io._record import Content, Schema, cast, several
from jlora.io._store import Store
from jlora.methods.base import Method

#: Everything a manifest of format 2 holds. (Format 1 has no `drawn` and no `generator`.) JSON's lists become tuples.
SCHEMA: Schema = {
    "format": int,
    "jlora": str,  # the version that wrote it; for people
    "data": str | None,  # the folder of the arrays, None where there are none
    "files": dict[str, tuple[int, str]],  # below it: {name: (size, sha256)}
    "factors": dict[str, Content],  # {name: FACTOR}
    "drawn": dict[str, str] | None,  # {name: sha256} of the factors that are made again and not stored
    "generator": str | None,  # what drew them
    "methods": tuple[Content, ...],  # {"method": class name, field: value, ...}
    "rules": tuple[int, ...],  # the spec, in the order of its rules
    "sites": tuple[tuple[str, str, int], ...],  # path, one letter an axis, method
    "notes": tuple[str, ...],
    "base": tuple[tuple[str, tuple[int, ...], str, str | None], ...],  # path, shape, dtype, digest
}
FACTOR: Schema = {"shape": tuple[int, ...], "dtype": str, "key": str | None, "sha256": str}


def _check(content: Content) -> Content:
    factors = {n: _record.record(f, FACTOR, f"factor {n!r:.200}") for n, f in content["factors"].items()}
    return {**content, "factors": factors}


FORM = _record.Form("jlora.json", 2, SCHEMA, _record.lines, _check, added={"drawn": None, "generator": None})
STORE = Store(FORM, "arrays", "adapter", "jlora.load")
seal = FORM.seal


# --- methods ------------------------------------------------------------------------------------------------------


def _tuples(value: object) -> object:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def nameable(extra: Sequence[type[Method]]) -> dict[str, type[Method]]:
    """The methods a file may name: those of `jlora.methods` and the ones the caller passes."""
    found = {k: v for k, v in vars(methods).items() if _is_method(v) and v is not Method}
    if not isinstance(extra, (list, tuple)):
        raise TypeError(f"methods=[...] takes a list of subclasses of jlora.methods.Method, not {extra!r:.100}")
    for cls in extra:
        if not _is_method(cls):
            raise TypeError(f"methods=[...] takes subclasses of jlora.methods.Method, not {cls!r}")
        if found.setdefault(cls.__name__, cls) is not cls:
            raise ValueError(f"methods=[...] names two classes {cls.__name__!r}; rename one")
    return found


def _is_method(cls: object) -> bool:
    return isinstance(cls, type) and issubclass(cls, Method)


def write_methods(plan: Plan) -> Content:
    """The fields `methods`, `rules` and `sites` of a manifest.

    A site is its exact path with its letters: nothing is matched again when the adapter is read, so rules may
    overlap and targets may be callables that only Python knows.
    """
    table = list(dict.fromkeys([*plan.methods, *(s.method for s in plan.sites)]))
    index = {m: n for n, m in enumerate(table)}
    return {
        "methods": [_write_method(m) for m in table],
        "rules": [index[m] for m in plan.methods],
        "sites": [[s.leaf.path, s.leaf.roles, index[s.method]] for s in plan.sites],
        "notes": list(plan.notes),
    }


def _write_method(method: Method) -> Content:
    cls = type(method)
    if vars(methods).get(cls.__name__, cls) is not cls:
        raise ValueError(f"{cls.__name__!r} is the name of one of jlora's own methods; rename your class")
    record: Content = {"method": cls.__name__}
    for field in dataclasses.fields(method):
        if field.init and field.name not in ("target", "exclude"):
            record[field.name] = _plain(getattr(method, field.name), f"{cls.__name__}.{field.name}")
    return record


def _plain(value: object, where: str) -> object:
    if isinstance(value, Method):
        return _write_method(value)
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, (tuple, list)):
        return [_plain(v, where) for v in value]
    if value is None or isinstance(value, (bool, int, str)) or isinstance(value, float) and math.isfinite(value):
        return value
    raise ValueError(
        f"{where} is {value!r:.100}, which cannot be saved: fields of a method are numbers, strings, None, and tuples "
        "of them"
    )


def _read_method(record: Content, classes: Mapping[str, type[Method]]) -> Method:
    name = record.get("method")
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"unknown method {str(name)[:100]!r}; this jlora has {', '.join(sorted(classes))}. A method of your own is "
            "passed as load(..., methods=[MyMethod])"
        )
    cls = classes[name]
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init and f.name not in ("target", "exclude")}
    values: Content = {"target": "."}  # not used: the sites say what it adapts
    for key, value in record.items():
        where = f"{key!r:.100} of {name}"
        if key in fields:
            hint = _hint(cls, fields[key])
            if isinstance(value, dict) and "method" in value:  # a method within a method
                values[key] = _read_method(value, classes)
                continue
            values[key] = _tuples(value) if hint is Any else cast(value, hint, where)
        elif key != "method":
            raise TypeError(f"{where} is unknown; it has {', '.join(fields)}")
    return _sites.named(cls(**values))


def _hint(cls: type, field: dataclasses.Field[Any]) -> object:
    """A field's type; Any where it is written as a string that cannot be looked up in the class's module."""
    if not isinstance(field.type, str):
        return field.type
    try:
        return eval(
            field.type, dict(vars(sys.modules[cls.__module__]))
        )  # evaluates the source of the class, nothing of the file
    except Exception:
        return Any


def read_plan(content: Content, tree: _tree.Named, extra: Sequence[type[Method]], where: str) -> Plan:
    """The plan of a manifest over a tree of parameters. All that does not fit is named at once."""
    classes, table = nameable(extra), []
    for record in content["methods"]:
        try:
            table.append(_read_method(record, classes))
        except Exception as error:  # on a value that makes no sense, a user's method may raise anything
            raise ValueError(f"{where}: {str(error)[:500]}") from None
    saved = {path: tuple(shape) for path, shape, _, _ in content["base"]}
    index = {path: n for n, path in enumerate(tree.paths)}
    sites: dict[str, Site] = {}
    bad = []
    if not all(0 <= n < len(table) for n in (*content["rules"], *(n for _, _, n in content["sites"]))):
        raise ValueError(f"{where} is no manifest that jlora wrote: it names a method that it does not hold")
    for path, roles, number in content["sites"]:
        if path in sites or path not in saved:
            raise ValueError(f"{where} is no manifest that jlora wrote: {path!r:.200} is twice or not in its base")
        if path not in index:
            near = (
                _tree.nearest(path, tree.paths, 3) if len(bad) < 8 else ()
            )  # only eight are shown, and to look for near ones is slow
            bad.append(f"{path!r:.200} is not in params; the nearest paths are {', '.join(near) or 'none'}")
            continue
        shape, dtype = _tree.shape_dtype(tree.leaves[index[path]])
        if shape != saved[path]:
            bad.append(f"{path!r} has shape {shape}, the adapter's is {saved[path]}")
        elif not is_trainable_dtype(dtype):
            bad.append(f"{path!r} has dtype {dtype}; only real floating point leaves can be adapted")
        elif len(roles) != len(shape) or set(roles) - set("iosk"):
            raise ValueError(f"{where}: {roles!r:.100} are not the letters of {path!r} of shape {shape}")
        else:
            leaf = Leaf(path, shape, np.dtype(dtype), roles)
            sites[path] = Site(leaf, index[path], table[number], _recipe(table[number], leaf, where))
    if bad:
        raise ValueError(f"{where}: the adapter's weights are not those of params:" + several(bad))
    rules = tuple(table[n] for n in content["rules"])
    return _sites.intern(tuple(sites.values()), rules, content["notes"])


def _recipe(method: Method, leaf: Leaf, where: str) -> Recipe:
    try:
        recipe = method.recipe(leaf)
        if recipe is not None:
            recipe.arrays(leaf)
            return recipe
        error = "it leaves this weight alone"
    except Exception as e:
        error = str(e)
    message = f"{where}: {method.describe()} on {leaf.path!r} of shape {leaf.shape}: {error[:500]}"
    raise ValueError(message) from None


def misfits(have: Mapping[tuple[str, str], tuple[tuple[int, ...], bool]], plan: Plan) -> list[str]:
    """What is missing, extra or misshapen in `{(group, factor): (shape, trained)}`, in words."""
    want = plan.shapes
    bad = [f"missing {g!r}: {n!r}" for g, n in want if (g, n) not in have]
    for (g, n), (shape, trained) in have.items():
        if (g, n) not in want:
            bad.append(f"extra {g!r}: {n!r}")
        elif shape != want[g, n][0]:
            bad.append(f"{g!r}: {n!r} has shape {shape}, not {want[g, n][0]}")
        elif trained != want[g, n][1]:
            bad.append(f"{g!r}: {n!r} is {'trained' if trained else 'frozen'}, and should not be")
    return bad
