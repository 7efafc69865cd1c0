"""Which leaves of a tree a target takes, and what to write instead where it makes no sense."""

import re
from collections.abc import Callable, Sequence, Set

from jlora._trees import _tree
from jlora._types import Traced

_PRESETS = ("attention", "linear", "embeddings", "head", "biases", "norms", "everything")


def parts(target: object, said: str = "target") -> tuple["str | Callable[..., object]", ...]:
    """A target as a flat tuple of patterns and callables.

    Raises:
      TypeError: what is neither a pattern, nor a callable, nor several of them.
    """
    if isinstance(target, str) or callable(target):
        return (target,)
    if isinstance(target, Set):  # what peft reads from its files; the order of a target says nothing
        target = sorted(target, key=repr)
    if isinstance(target, Sequence) and not isinstance(target, (bytes, bytearray)):
        return tuple(p for t in target for p in parts(t, said))
    hint = ""
    if target is None:
        hint = (
            "; leave it out for what the method adapts by default, or write "
            + ("exclude=()" if said == "exclude" else f"{said}=jlora.targets.linear for every matrix")
        )  # fmt: skip
    elif isinstance(target, re.Pattern):
        hint = f"; write {said}={target.pattern!r}"
    raise TypeError(
        f"{said}={short(target)} is no regular expression (searched in the path), no callable (path, leaf) -> bool, "
        f"and no list of them{hint}"
    )


def taken(target: object, tree: _tree.Named, traced: Traced | None = None) -> list[bool]:
    """For each leaf, whether a target takes it; a pattern that is no regular expression takes none.

    A target of `jlora.targets` sees the whole tree, and what a trace does with each leaf, `{path: (use, letters)}`.
    """
    columns = [_column(part, tree, traced) for part in parts(target)]
    return [any(column[n] for column in columns) for n in range(len(tree.paths))]


def _column(part: "str | Callable[..., object]", tree: _tree.Named, traced: Traced | None) -> list[bool]:
    if isinstance(part, str):
        try:
            pattern = re.compile(part)
        except re.error:
            return [False] * len(tree.paths)
        return [pattern.search(path) is not None for path in tree.paths]
    among: Callable[..., list[bool]] | None = getattr(part, "among", None)
    if among is not None:
        return among(tree.paths, tree.leaves, traced)
    return [bool(part(path, leaf)) for path, leaf in zip(tree.paths, tree.leaves, strict=True)]


def select(
    who: str,
    target: object,
    exclude: object,
    tree: _tree.Named,
    traced: Traced | None = None,
    said: str = "target",
) -> tuple[list[bool], list[str]]:
    """For each leaf whether it is adapted, and what is wrong with the target, in words that begin with `who`.

    `said` is what the target is called there.

    Every pattern of a target or an exclude must match a leaf, as must every callable of a target.

    Raises:
      TypeError: what is no target.
    """
    bad: list[str] = []

    def columns(parts: Sequence["str | Callable[..., object]"], field: str) -> list[list[bool] | None]:
        """Of each part, or None where it says itself what is wrong with it."""
        found: list[list[bool] | None] = []
        for part in parts:
            try:
                found.append(_column(part, tree, traced))
            except ValueError as error:
                if not hasattr(part, "among"):  # the caller's own function: its traceback says more
                    raise
                bad.append(f"{who}({field}): {error}")
                found.append(None)
        return found

    whole = f"{who}({said}={short(target)})"
    these, those = parts(target, said), parts(exclude, "exclude")
    takes = columns(these, f"{said}={short(target)}")
    leaves_out = columns(those, f"exclude={short(exclude)}")
    wanted = [(part, column) for part, column in zip(these, takes, strict=True) if column is not None]
    spared = [(part, column) for part, column in zip(those, leaves_out, strict=True) if column is not None]
    for part, column in wanted:
        if not any(column):
            alone = len(these) == 1
            bad.append((whole if alone else f"{whole}: {short(part)}") + f" matches no leaf{_instead(part, tree)}")
    for part, column in spared:
        if isinstance(part, str) and not any(column):
            bad.append(f"{who}(exclude={short(exclude)}): {short(part)} matches no leaf{_instead(part, tree)}")
    if not these:
        bad.append(f"{whole}: an empty list names no leaf; leave it out for the default")
    both = [
        any(column[n] for _, column in wanted) and not any(column[n] for _, column in spared)
        for n in range(len(tree.paths))
    ]
    if not bad and not any(both):
        bad.append(f"{whole} matches no leaf that exclude={short(exclude)} leaves")
    return both, bad


def unmatched(axes: "dict[str, str] | None", tree: _tree.Named) -> dict[str, str]:
    """`{pattern: words}` of the patterns of `axes=` that match no leaf."""
    wrong = {p: not any(taken(p, tree)) for p in axes or {}}
    return {p: f"axes={{{p!r}: ...}} matches no leaf{_instead(p, tree)}" for p, it in wrong.items() if it}


def short(value: object) -> str:
    """A target in an error message: a name or a repr, at most 200 characters of it."""
    name = getattr(value, "__name__", None)
    if isinstance(value, (list, tuple)):
        text = "[" + ", ".join(map(short, value[:8])) + (f", and {len(value) - 8} more" if len(value) > 8 else "") + "]"
    else:
        text = name if isinstance(name, str) and name != "<lambda>" else repr(value)
    return text if len(text) <= 200 else f"{text[:120]}... ({len(text):,} characters)"


def _instead(part: object, tree: _tree.Named) -> str:
    """What to write instead of a pattern or callable without a match."""
    said = ""
    if not isinstance(part, str):
        ranks = [len(_tree.shape_dtype(leaf)[0]) for leaf in tree.leaves]
        wide = [p for p, n in zip(tree.paths, ranks, strict=True) if n > 1]
        matrices = [p for p in wide if not re.search(r"(^|/)(bias|scale)$", p)]
        shown = ", ".join(map(_clip, matrices[:5])) or "none"
        return f"; write a pattern that does (matrices here are {shown}{', ...' * (len(matrices) > 5)})"
    near = ", ".join(map(_clip, _tree.nearest(part, tree.paths))) or "none: the tree has no leaves"
    if part:
        word = re.sub(r"[^a-z]+", "-", part.lower()).strip("-")
        preset = "linear" if word == "all-linear" else word
        if preset in _PRESETS:
            said = f" (a text is a pattern, searched in the path): write jlora.targets.{preset}"
            return f"{said}; the nearest paths are {near}"
        try:
            re.compile(part)
        except re.error as error:
            said = f": it is not a regular expression ({error})"
        glob = _of_glob(part)
        hits = [n for n, path in enumerate(tree.paths) if glob and re.search(glob, path)]
        if hits:
            flat = [n for n in hits if len(_tree.shape_dtype(tree.leaves[n])[0]) < 2]
            better = flat and _sharpened(glob, tree, flat, [n for n in hits if n not in flat]) or glob
            said += "; it reads as a glob, and a pattern is a regular expression, searched anywhere in the path: write "
            said += repr(better)
    return f"{said}; the nearest paths are {near}"


def _of_glob(text: str) -> str:
    """The regular expression of what was written as a glob, or nothing."""
    if not re.search(r"[*?]", text) or len(text) > 1000:
        return ""
    pieces = [re.escape(p).replace(r"\-", "-") for p in re.split(r"[*?]+", text)]
    stars = [".*" if "*" in s else "." for s in re.findall(r"[*?]+", text)]
    body = pieces[0] + "".join(s + p for s, p in zip(stars, pieces[1:], strict=True))
    body = re.sub(r"^(\.\*)+|(\.\*)+$", "", body)
    try:
        re.compile(body)
    except re.error:
        return ""
    return body


def _clip(path: str) -> str:
    return path if len(path) <= 200 else f"{path[:120]}..."


def vectors(who: str, target: object, tree: _tree.Named, taken: Sequence[int], left: Sequence[int]) -> str:
    """What to write where patterns took vectors (`taken`) beside the matrices (`left`) that a method can adapt.

    peft's `["query", "value"]` names modules, whose matrices it means; a pattern is searched in the path of a leaf.
    """
    first = tree.paths[taken[0]]
    more = f" and {len(taken) - 1} more such" if len(taken) > 1 else ""
    shape = _tree.shape_dtype(tree.leaves[taken[0]])[0]
    said = f"{who}(target={short(target)}) takes {_clip(first)!r} of shape {shape}{more} too, which has no input side"
    instead = [_sharpened(part, tree, taken, left) for part in parts(target)]
    lines = []
    if instead and all(instead):
        lines.append("target=" + (repr(instead) if len(instead) > 1 else repr(instead[0])))
    from_names = {tree.paths[n].rsplit("/", 1)[-1] for n in taken}
    keep = {tree.paths[n].rsplit("/", 1)[-1] for n in left}
    if not from_names & keep and len(from_names) <= 3:
        top = {tree.paths[n] for n in taken} & from_names  # leaves at the top have no slash before their name
        ends = [("(^|/)" if name in top else "/") + f"{re.escape(name)}$" for name in sorted(from_names)]
        lines.append("exclude=" + repr(ends if len(ends) > 1 else ends[0]))
    if not lines:
        lines.append("exclude=lambda path, leaf: leaf.ndim < 2")
    return f"{said}: a pattern is searched in the path of each leaf; write {', or '.join(lines)}"


def _sharpened(part: object, tree: _tree.Named, taken: Sequence[int], left: Sequence[int]) -> str | None:
    """A pattern that takes the same matrices and no vector: the old one and the name of the leaf after it."""
    if not isinstance(part, str):
        return None
    mine = {n for n in left if _tree.matches(part, tree.paths[n])}
    for name in sorted({tree.paths[n].rsplit("/", 1)[-1] for n in mine}):
        for glue in ("/", ".*/"):
            new = part.rstrip("/") + glue + name
            hits = {n for n in (*taken, *left) if _tree.matches(new, tree.paths[n])}
            if hits == mine:
                return new
    return None
