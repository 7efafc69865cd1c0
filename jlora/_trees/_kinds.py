"""What a leaf is for: read off the words of its path, its shape, and the leaves beside it.

`kinds` gives each leaf of a tree one word:

- `query`, `key`, `value`, and `qkv` for a fused one that holds a query or a value;
- `head`, the last projection, onto a vocabulary or classes; `linear`, any other matrix or convolution;
- `embedding`, a table that is looked up; `position`, one of positions; `token`, a vector that joins the sequence;
- `norm`, a scale or shift of a normalisation layer; `bias`, any other; `state`, of recurrences and statistics; `other`.

Names are compared word by word: `multi_head_attention` holds the word head, and is none. What stands directly above a
leaf decides, so `norm1/linear/kernel` is a matrix. The words are in `_names`, each line with its source.
"""

import collections
import functools
import re
from collections.abc import Collection, Mapping, Sequence

from jlora._trees import _names
from jlora._trees._axes import is_trainable_dtype
from jlora._trees._tree import Named, shape_dtype
from jlora._types import PyTree, Traced

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+")
MATRICES = frozenset({"query", "key", "value", "qkv", "linear"})


@functools.lru_cache(maxsize=65536)
def words(step: str) -> tuple[str, ...]:
    """The words of one name: `LayerNorm_0` is layer, norm, 0."""
    return tuple(word.lower() for word in _WORD.findall(step))


@functools.lru_cache(maxsize=65536)
def steps(path: str) -> tuple[str, ...]:
    """The names of a path, also where one key holds several: Haiku's `a/~/b`, and `a.b.weight` of a flat dictionary."""
    plain = path.replace("%2F", "/").replace("%25", "%")
    return tuple(step for step in re.split(r"[/.]", plain) if step not in ("", "~"))


def _is(kind: str, name: str, above: Sequence[str] = ()) -> bool:
    """Whether a name is of those that the table has for a kind."""
    return any(row.fit(name, "/".join(above)) for row in _names.NAMES[kind])


def _unnumbered(name: tuple[str, ...]) -> tuple[str, ...]:
    while name and name[-1].isdigit():
        name = name[:-1]
    return name


@functools.lru_cache(maxsize=65536)
def _named(path: str) -> tuple[str, str, tuple[str, ...]]:
    """The name of the leaf, of what owns it, and of what stands above that, outermost first: words joined by `_`.

    An array may be called as its module would be (`mlp/down_proj`): it owns itself. Numbers alone are no names.
    """
    names = [words(step) for step in steps(path)]
    leaf = "_".join(names[-1]) if names else ""
    above = ["_".join(_unnumbered(name)) for name in names[:-1]]
    if re.fullmatch(_names.LEAVES, leaf):
        above = [name for name in above if name]
        return leaf, above[-1] if above else "", tuple(above[:-1])
    return leaf, "_".join(_unnumbered(names[-1])) if names else "", tuple(name for name in above if name)


def _attention(owner: str, above: tuple[str, ...]) -> str:
    """Which of query, key, value or several a name says, or nothing."""
    said = _letters(owner, above)
    return {"": "", "q": "query", "k": "key", "v": "value"}.get(said, "qkv")


def letters(path: str) -> str:
    """Of which of queries, keys and values a name says that its weight makes them: `qkv`, `kv`, `k`, or nothing."""
    _, owner, above = _named(path)
    return _letters(owner, above)


def _letters(owner: str, above: tuple[str, ...]) -> str:
    """`letters` of the names of what owns a leaf."""
    inside = next((name for name in reversed(above) if re.search(_names.ATTENTION_OR_MLP, name)), "")
    if inside and not re.search(_names.ATTENTION, inside):
        return ""  # gated MLPs and RWKV's channel mixing have a k and a v of their own
    if re.fullmatch(_names.FUSED_IN_ATTENTION, owner) and inside:
        return "qkv"
    said = [w for w in owner.split("_") if w not in _names.BESIDE_QKV and not w.isdigit()]
    each = [_names.QKV.get(w, "") for w in said]
    return "".join(each) if all(each) else ""


def _one(path: str, shape: tuple[int, ...], beside: Mapping[str, int]) -> str:
    """The kind of one leaf by its names, its shape, and `{name: number of axes}` of it and the leaves beside it."""
    leaf, owner, above = _named(path)
    everything = (*above, owner)
    # a matrix has more axes than its bias; the scale of a norm that is called a weight has as many
    matrices = any(re.fullmatch(_names.MATRIX_LEAVES, name) and n > len(shape) for name, n in beside.items())
    if (
        _is("state", leaf, everything)
        or _is("statistics", leaf, everything)
        or any(_is("states", n) for n in everything)
    ):
        return "state"
    normal = _is("norm", owner) or "scale" in beside and not matrices and leaf in ("scale", "bias", "offset")
    if _is("position", leaf, everything) or leaf in _names.TABLE_LEAVES and _is("position", owner, above):
        return "position"
    paired = leaf.endswith("_b") and f"{leaf[:-1]}w" in beside  # AlphaFold's `gating_w` and `gating_b`
    if _is("bias", leaf) or paired or leaf == "b" and (len(shape) < 2 or matrices):
        return "norm" if normal and not matrices else "bias"
    if leaf == "scale" and not _is("layer_scale", owner):
        return "norm"
    if normal and re.fullmatch(_names.LEAVES, leaf) and not (len(shape) > 1 and _is("conditioned", owner)):
        return "norm"
    if len(shape) < 2:
        return "token" if _is("token", leaf) else "other"
    if _is("other", leaf, everything):
        return "other"
    bare = not re.fullmatch(_names.LEAVES, leaf)
    if bare and (_is("token", leaf) or shape[0] == 1):
        return "token" if _is("token", leaf) else "other"
    if _is("head", owner, above):
        return "head"
    if _is("embedding", leaf) or leaf in _names.TABLE_LEAVES and len(shape) == 2 and _is("embedding", owner):
        return "embedding"
    return _attention(owner, above) or "linear"


def leaf_name(path: str) -> str:
    """The last name of a path, its words joined by `_`."""
    return _named(path)[0]


def is_parameter(path: str) -> bool:
    """Whether a leaf is trained when the model is: no running average, cache or table that the model makes itself."""
    leaf, _, _ = _named(path)
    return not (_is("statistics", leaf) or any(_is("states", "_".join(words(step))) for step in steps(path)))


def counts_types(path: str) -> bool:
    """Whether the names of a table say that it has a row for each type, segment, language or class."""
    _, owner, above = _named(path)
    return any(_is("types", name) for name in (leaf_name(path), owner, *above))


def owner(path: str) -> str:
    """The name of what a leaf belongs to, as the user wrote it but for numbers at its end."""
    names = steps(path)
    named = (
        [re.sub(r"[_\d]+$", "", name) for name in names[:-1]] if re.fullmatch(_names.LEAVES, leaf_name(path)) else names
    )
    return next((name for name in reversed(named) if name), path)


def kinds(paths: Sequence[str], leaves: Sequence[PyTree], traced: Traced | None = None) -> list[str]:
    """One word for each leaf of a tree (see above); what is no real floating point array is `other`.

    `traced` is what a trace found, `{path: (use, letters)}`, a use being `lookup`, `dot` (a convolution too),
    `elementwise`, or what it could not tell. Then no name makes a matrix of what no dot takes, and what one takes is a
    matrix unless it is called a table, a token or a factor of an adapter.
    """
    described = [shape_dtype(leaf) for leaf in leaves]
    owners = [path.rpartition("/")[0] for path in paths]
    beside: dict[str, dict[str, int]] = {}
    for path, owner, (shape, _) in zip(paths, owners, described, strict=True):
        beside.setdefault(owner, {})[_named(path)[0]] = len(shape)
    found = [
        _one(path, shape, beside[owner]) if is_trainable_dtype(dtype) else "other"
        for path, owner, (shape, dtype) in zip(paths, owners, described, strict=True)
    ]
    for n in _last_projections(paths, [shape for shape, _ in described], found):
        found[n] = "head"
    if traced is None:
        return found
    return [_in_a_trace(p, k, *traced.get(p, ("", ""))) for p, k in zip(paths, found, strict=True)]


def _in_a_trace(path: str, kind: str, use: str, letters: str) -> str:
    """A kind in the light of what a trace does with the leaf; a use that it could not tell changes nothing."""
    if kind in MATRICES and use in ("lookup", "elementwise"):
        return "embedding" if use == "lookup" else "other"
    contracted = use == "dot" and "o" in letters and bool(set("ik") & set(letters))
    unnamed = kind in ("norm", "state") or kind == "other" and not _is("other", leaf_name(path))
    return "linear" if contracted and unnamed else kind


def left(tree: Named, taken: Collection[int], width: int) -> str:
    """One line on what was left of the kinds that were taken: how many, by the names of their modules; or nothing."""
    families = [_family(path, kind) for path, kind in zip(tree.paths, kinds(tree.paths, tree.leaves), strict=True)]
    said = []
    for family in dict.fromkeys(families[n] for n in sorted(taken) if n < len(families)):
        rest = [n for n, it in enumerate(families) if it == family and n not in taken]
        if family and rest:
            names = collections.Counter(owner(tree.paths[n]) for n in rest)
            one = {"matrices": "matrix", "biases": "bias"}.get(family, family.removesuffix("s"))
            parts = [name if n == 1 else f"{name} x{n}" for name, n in names.most_common()]
            said.append((f"{len(rest)} {family if len(rest) > 1 else one}", parts))
    shown = lambda most: "; ".join(
        f"{count}: {', '.join(parts[:most])}" + f" and {len(parts) - most} names more" * (len(parts) > most)
        for count, parts in said
    )
    most = next((most for most in range(20, 0, -1) if len(shown(most)) + 6 <= width), 0)
    return f"left: {shown(most) if most else '; '.join(count for count, _ in said)}"[:width] if said else ""


def _family(path: str, kind: str) -> str:
    """Kinds as one speaks of them together: what a method that takes one of them might have taken too."""
    if kind in MATRICES or kind in ("head", "embedding"):
        return "matrices"
    if kind == "norm":
        return "norms' biases" if _is("bias", leaf_name(path)) else "norms"
    return "biases" if kind == "bias" else ""


def _last_projections(paths: Sequence[str], shapes: Sequence[tuple[int, ...]], found: Sequence[str]) -> list[int]:
    """Heads that no name tells: `Dense_0` after the convolutions of a ResNet, `linear` of a language model.

    Such a one stands at the top of its tree, and no other weight takes what it makes: its output size is found in no
    other leaf but its own bias and a table that is looked up, of whose rows it then has as many.
    """
    if "head" in found:
        return []
    tables = {max(shape) for shape, kind in zip(shapes, found, strict=True) if kind == "embedding"}
    windows = any(
        len(shape) >= 3 and kind == "linear" and leaf_name(path) in ("kernel", "w", "weight")
        for path, shape, kind in zip(paths, shapes, found, strict=True)
    )
    if not tables and not windows:
        return []
    places: dict[int, set[str]] = {}
    for path, shape, kind in zip(paths, shapes, found, strict=True):
        if kind not in ("embedding", "position"):
            for size in set(shape):
                places.setdefault(size, set()).add(path.rpartition("/")[0])
    candidates = []
    for n, (path, shape, kind) in enumerate(zip(paths, shapes, found, strict=True)):
        leaf, owner, above = _named(path)
        if kind != "linear" or len(shape) != 2 or shape[0] == shape[1] or not re.fullmatch(_names.PLAIN, owner):
            continue
        above = tuple(name for name in above if name != "params")
        if len(above) > 1 or any(step.isdigit() for name in steps(path)[:-2] for step in words(name)):
            continue
        made = shape[0] if leaf == "weight" else shape[1]  # Equinox's and PyTorch's are (out, in)
        if places[made] == {path.rpartition("/")[0]} and (not tables or made in tables):
            candidates.append(n)
    return candidates if len(candidates) == 1 else []
