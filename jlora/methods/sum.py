"""Two methods on one weight: W = W0 + dW1 + dW2."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable

import jax

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, Function, Word
from jlora._trees._leaf import Leaf
from jlora._types import W0, Keys, Place
from jlora.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Sum(Method):
    """Both updates of `Sum(LoRA(rank=8), KronA())`, each with factors of its own; three nest.

    One of the two may rescale or turn the weight: it then acts on the sum, `gain * (W0 + dW1 + dW2)`. Steps on the
    output follow one another. Factors of the second are named `a_2` where the first has an `a`.

    Attributes:
      first: a method.
      second: another, or the same with other hyperparameters.
      target: that of the two methods, which must be one, unless it is said here.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> adapted = jlora.adapt(params, jlora.Sum(jlora.LoRA(rank=2), jlora.LoRA(rank=1)))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'a': (2, 6), 'b': (2, 4), 'a_2': (1, 6), 'b_2': (1, 4)}
    """

    first: Method
    second: Method

    def __post_init__(self) -> None:
        if not isinstance(self.first, Method) or not isinstance(self.second, Method):
            raise TypeError(f"Sum takes two methods, Sum(LoRA(rank=8), KronA()), not {self.first!r}, {self.second!r}")
        super().__post_init__()
        for name in ("target", "exclude"):
            if getattr(self, name) not in ("", ()):
                continue
            one, other = (_said(method, name) for method in (self.first, self.second))
            if one is not None and other is not None and one != other:
                raise ValueError(f"Sum: the two methods have unlike {name}s, {one!r} and {other!r}; write one")
            chosen = one if one is not None else other if other is not None else getattr(self.first, name)
            object.__setattr__(self, name, chosen)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        first, second = (m.recipe(leaf) for m in (self.first, self.second))
        first = first and renamed(first, {}, leaf.path, self.first.dtype)
        second = second and renamed(second, {}, leaf.path, self.second.dtype)
        if first is None or second is None:
            return first or second
        second = renamed(second, apart(first.arrays(leaf), second, leaf), leaf.path, self.second.dtype)
        for word in ("gain", "left", "right"):
            if getattr(first, word) and getattr(second, word):
                raise ValueError(f"Sum: both methods have a {word}, and their order would matter")
        if not any(dataclasses.replace(recipe, rows=(), steps=()).additive for recipe in (first, second)):
            raise ValueError("Sum: neither method simply adds to W0")
        for recipe in (first, second):
            if recipe.gain is not None and any(isinstance(w, Function) and w.base for w in recipe.gain.operands):
                raise ValueError("Sum: a norm of one update would rescale both; write DoRA(Sum(m1, m2))")
        return Recipe(
            (*first.deltas, *second.deltas),
            first.gain or second.gain,
            first.left or second.left,
            first.right or second.right,
            (*first.rows, *second.rows),
            (*first.steps, *second.steps),
        )

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        first, second = self.first.recipe(leaf), self.second.recipe(leaf)
        arrays = {} if first is None else self.first.initial(leaf, first, keys, weight)
        if second is None:
            return arrays
        place = self._places(leaf)
        found = self.second.initial(leaf, second, lambda *at: keys(*place(at)), weight)
        return arrays | {place(at): value for at, value in found.items()}

    def encoded(self, leaf: Leaf, get: Callable[[Place], jax.Array]) -> tuple[Method, dict[Place, jax.Array]]:
        place = self._places(leaf)
        first, arrays = self.first.encoded(leaf, get)
        second, others = self.second.encoded(leaf, lambda at: get(place(at)))
        both = dataclasses.replace(self, first=first, second=second)
        place = both._places(leaf)
        return both, arrays | {place(at): value for at, value in others.items()}

    def _places(self, leaf: Leaf) -> Callable[[Place], Place]:
        """Where the factors of the second method stand."""
        first, second = self.first.recipe(leaf), self.second.recipe(leaf)
        names = {} if first is None or second is None else apart(first.arrays(leaf), second, leaf)
        return lambda at: (at[0], names.get(at, at[1]))

    def canonical(self) -> "Sum":
        bare = lambda m: dataclasses.replace(m.canonical(), target=(), exclude=())
        return dataclasses.replace(self, first=bare(self.first), second=bare(self.second))

    def describe(self) -> str:
        return f"{self.first.describe()} + {self.second.describe()}"


def _said(method: Method, name: str) -> object:
    """A target that somebody wrote, None where it is the method's default."""
    default = next(f.default for f in dataclasses.fields(method) if f.name == name)
    value = getattr(method, name)
    return None if value == default or value == () else tuple(value) if isinstance(value, list) else value


def apart(given: Iterable[Place], second: Recipe, leaf: Leaf) -> dict[Place, str]:
    """New names for those factors of the second recipe that stand where others do."""
    mine, theirs = set(given), second.arrays(leaf)
    taken, names = mine | set(theirs), dict[Place, str]()
    for group, name in theirs:
        if (group, name) in mine:
            n = next(n for n in itertools.count(2) if (group, f"{name}_{n}") not in taken)
            names[group, name] = f"{name}_{n}"
            taken.add((group, names[group, name]))
    for rows in second.rows:  # their scale is called after them
        first = rows.made.arrays[0]
        if new := names.get((first.group or leaf.path, first.name)):
            names[leaf.path, rows.network.s] = f"s_{new}"
    return names


def renamed(recipe: Recipe, names: dict[Place, str], path: str, dtype: str) -> Recipe:
    """A recipe inside another method's: its factors under other names, in the dtype of the method that they are of.

    `path` is the group of its own.
    """

    def array(a: Array) -> Array:
        return dataclasses.replace(a, name=names.get((a.group or path, a.name), a.name), dtype=a.dtype or dtype)

    def word(w: Word) -> Word:
        if isinstance(w, Array):
            return array(w)
        return dataclasses.replace(w, arrays=tuple(map(array, w.arrays))) if isinstance(w, Function) else w

    def delta(d: Delta) -> Delta:
        own = {"s": names.get((path, d.s), d.s), "dtype": d.dtype or dtype}
        return dataclasses.replace(d, operands=tuple(map(word, d.operands)), **own)

    others = (None if d is None else delta(d) for d in (recipe.gain, recipe.left, recipe.right))
    rows = tuple(dataclasses.replace(r, made=word(r.made)) for r in recipe.rows)
    steps = tuple(dataclasses.replace(step, arrays=tuple(map(array, step.arrays))) for step in recipe.steps)
    return Recipe(tuple(map(delta, recipe.deltas)), *others, rows=rows, steps=steps)
