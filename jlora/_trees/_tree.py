"""Paths of any pytree, made of the user's own names.

A path is `a/b/0/c`: dictionary keys, attribute names and indices, joined by slashes. What JAX's own key paths add
for boxes (`nnx.Variable`, `nn.Partitioned`: a trailing `.value`) is left out: a box is one leaf. A slash inside a
name is written `%2F` and a percent sign `%25`, so that two different keys never share a path.
"""

import dataclasses
import functools
import heapq
import re
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax
import numpy as np
from flax import nnx
from flax.core import meta

from jlora._trees import _axis_names
from jlora._trees._compound import is_compound
from jlora._types import DType, PyTree, Shape, TreeDef

Target: TypeAlias = "str | Sequence[str] | Callable[[str, PyTree], bool]"


def is_box(x: object) -> bool:
    """Whether `x` wraps a leaf: its attribute steps are no part of a path."""
    return isinstance(x, (nnx.Variable, meta.AxisMetadata)) and not is_compound(x)


def escape(name: object) -> str:
    """One step of a path: `/` becomes `%2F`, `%` becomes `%25`."""
    return str(name).replace("%", "%25").replace("/", "%2F")


def _step(entry: object) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return escape(getattr(entry, attribute))
    return escape(entry)


def spelled(steps: Sequence[object]) -> str:
    """The path of JAX's own steps to a leaf, without a box's attribute at its end (an `nnx.Variable`'s `.value`)."""
    attribute = jax.tree_util.GetAttrKey("value")
    return "/".join(map(_step, steps[:-1] if steps and steps[-1] == attribute else steps))


@dataclasses.dataclass(frozen=True)
class Named:
    """A flattened tree: `leaves[n]` stands at `paths[n]`, and `owners[n]` is the identity of its array or box.

    `axis_names[n]` are the logical names of its axes, if its box has them.
    """

    paths: tuple[str, ...]
    leaves: tuple[PyTree, ...]
    owners: tuple[int, ...]
    treedef: TreeDef
    axis_names: tuple[tuple[str | None, ...] | None, ...]


def flatten(tree: PyTree) -> Named:
    """Flattens in JAX's own order, naming each leaf by the user's names alone.

    A `Compound` weight is one leaf.

    Raises:
      TypeError: keys that JAX cannot sort (an int beside a str).
      ValueError: two leaves with one path (the keys `0` and `"0"`).
    """
    paths, leaves, owners, names = [], [], [], []
    layers = {"/".join(map(escape, steps)): words for steps, words in _axis_names.of_layers(tree).items()}

    def walk(node: PyTree, prefix: tuple[str, ...], inside: bool) -> None:
        below = lambda x: is_box(x) and x is not node
        try:
            one = lambda x: below(x) or is_compound(x)
            children = jax.tree_util.tree_flatten_with_path(node, is_leaf=one)[0]
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"the tree at {'/'.join(prefix) or 'its root'!r} cannot be flattened ({error}); "
                "keys of one dictionary must be of one kind: use str keys throughout"
            ) from error
        for keys, child in children:
            steps = tuple(_step(k) for k in (keys[1:] if inside else keys))  # a box's first step is its attribute
            if below(child):
                walk(child, prefix + steps, True)
            else:
                paths.append("/".join(prefix + steps))
                leaves.append(child)
                owners.append(id(node) if inside else id(child))
                names.append((_axis_names.of(node) if inside else None) or layers.get(paths[-1]))

    walk(tree, (), is_box(tree))
    treedef = jax.tree.structure(tree, is_leaf=is_compound)
    if len(set(paths)) < len(paths):
        twice = sorted({p for p in paths if paths.count(p) > 1})
        raise ValueError(f"two leaves share the path {twice}: keys that print alike (0 and '0') cannot be told apart")
    return Named(tuple(paths), tuple(leaves), tuple(owners), treedef, tuple(names))


def leaves(tree: PyTree) -> list[PyTree]:
    """The leaves in JAX's own order; a `Compound` weight is one."""
    return jax.tree.leaves(tree, is_leaf=is_compound)


def rebuilt(tree: PyTree, leaves: Sequence[PyTree]) -> PyTree:
    """The same tree with other leaves."""
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_compound), leaves)


def matches(pattern: str, path: str) -> bool:
    """`re.search`, refusing in words what is no pattern."""
    try:
        return re.search(pattern, path) is not None
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None


@functools.lru_cache(maxsize=65536)
def _trigrams(text: str) -> frozenset[str]:
    padded = f"  {text} "
    return frozenset(padded[n : n + 3] for n in range(len(padded) - 2))


def nearest(target: object, paths: Sequence[str], count: int = 5) -> list[str]:
    """The paths that look most like a pattern without a match, for its error message.

    Likeness is the share of common runs of three characters, at the ends of both and of at most 200 characters: names
    come from files too, and may be as long as their writer likes.
    """
    wanted = target if isinstance(target, str) else ""
    words = re.sub(r"[^\w/]+", "/", wanted[-200:]).strip("/").lower()
    depth = words.count("/") + 1
    mine = _trigrams(words)

    def likeness(path: str) -> float:
        theirs = _trigrams("/".join(path[-200:].lower().rsplit("/", depth)[-depth:]))
        return len(mine & theirs) / (len(mine) + len(theirs))

    return heapq.nlargest(count, paths, key=likeness)


def shape_dtype(leaf: PyTree) -> tuple[Shape, DType]:
    """Shape and dtype of an array-like leaf without reading its values."""
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return tuple(leaf.shape), leaf.dtype
    array = np.asarray(leaf)
    return array.shape, array.dtype
