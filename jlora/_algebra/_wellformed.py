"""What the author of a method is told: equations, words and starts that do not fit each other."""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora._algebra import _recipe, _words
from jlora._algebra._recipe import Bound, Recipe
from jlora._algebra._words import Array, Base, Delta, Function, Gate, Word
from jlora._trees._leaf import Leaf
from jlora._types import DType, Place, Shape, Shaped

Stored: TypeAlias = Mapping[Place, tuple[Array, Shape]]


def check(recipe: Recipe, leaf: Leaf) -> None:
    """Raises ValueError unless each equation of a recipe can be read on this leaf, and its words have its shapes."""
    _check(recipe, dataclasses.replace(leaf, path=""))  # thousands of leaves are alike in all else


@functools.lru_cache(maxsize=1024)
def _check(recipe: Recipe, leaf: Leaf) -> None:
    for n, (delta, sides) in enumerate(recipe.networks):
        try:
            _check_letters(delta, sides)
            if delta is recipe.gain and "(" in delta.equation:
                raise ValueError("a gain stands on whole sides, I, O or K, and has no groups in parentheses")
            _check_gates(delta, n < len(recipe.deltas))
            bound = _recipe.bind(delta, leaf, sides)
            known = dict[str, int]()
            for word, labels in bound.words:
                _check_sizes(known, bound, labels, word.shape if isinstance(word, Array) else None)
                if isinstance(word, Base) and set(labels) != {a for a in _recipe.atoms(leaf) if a[0] != "s"}:
                    raise ValueError(f"Base is W0 in its own axes, all of them, as in 'I O', not {' '.join(labels)!r}")
                if isinstance(word, Array):
                    _check_array(word, labels, [bound.sizes.get(x) for x in labels])
                for array in word.arrays:
                    if array.shape is None and isinstance(word, Function):
                        raise ValueError(f"{array.name!r} stands in a Function, so its shape is said: shape=(4,)")
        except ValueError as error:
            raise ValueError(f"{error} (in the equation {delta.equation!r})") from error.__cause__
    for rows in recipe.rows:
        rows.check(leaf)
    if sum(rows.new(leaf) for rows in recipe.rows) > 1:
        raise ValueError("two methods give the table new rows, and both would number them from its end on")
    for array in (array for step in recipe.steps for array in step.arrays):
        if array.shape is None:
            raise ValueError(f"{array.name!r} stands in a Step, so its shape is said: shape=(4,)")


def check_start(method: str, leaf: Leaf, recipe: Recipe, arrays: Stored, made: object) -> None:
    """Raises ValueError unless `initial` made the arrays of the recipe, and its functions make what they should."""
    where = f"{method} on {leaf.path!r} of shape {leaf.shape} ({leaf.roles})"
    if not isinstance(made, Mapping):
        raise ValueError(f"{where}: initial returns {{(group, name): array}}, not {type(made).__name__}")
    bad = [f"without {place}" for place in arrays if place not in made]
    bad += [f"{place}, which the recipe has not" for place in made if place not in arrays]
    for place, value in made.items():
        if place not in arrays:
            continue
        (array, want), shape = arrays[place], tuple(getattr(value, "shape", ()))
        if shape != want:
            stack = f", the stack {leaf.stack} in front" if leaf.stack else ""
            bad.append(
                f"{place} of shape {shape}, where the recipe has {want}{stack}{_letters_of(array, recipe, leaf)}"
            )
        elif array.trained and _is_floating(jnp.result_type(value)) != _is_floating(array.dtype or "float32"):
            # a frozen factor may be a key, or integers
            kind = array.dtype or "a floating point dtype"
            bad.append(f"{place} in {jnp.result_type(value)}, where the recipe has {kind}")
    if bad:
        raise ValueError(f"{where}: initial returns " + "; ".join(bad))
    try:
        check_functions(recipe, leaf, made)
        _check_steps(recipe, leaf, made)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error.__cause__


def check_kind(recipe: object) -> None:
    """Raises ValueError where an author's method returns no recipe."""
    if not isinstance(recipe, Recipe):
        raise ValueError(f"its recipe is a {type(recipe).__name__}, not a Recipe: write Recipe((Delta(...),))")


def _is_floating(dtype: DTypeLike) -> bool:
    return jnp.issubdtype(dtype, jnp.floating)


def _letters_of(array: Array, recipe: Recipe, leaf: Leaf) -> str:
    """The letters of an operand and its equation, in words."""
    for bound in recipe.bound(leaf):
        for word, labels in bound.words:
            if word is array:
                return f" (its letters are {' '.join(labels)} in the equation {bound.delta.equation!r})"
    return ""


def check_constants(arrays: Stored, dtype_of: Callable[[Array], np.dtype]) -> None:
    """Raises ValueError where a number that a factor begins with is zero, or none, in the dtype of the factors.

    A scale that is lost so is a dead adapter.
    """
    for array, _ in arrays.values():
        value, dtype = _words.begins(array), dtype_of(array)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            held = None if value is None else float(np.asarray(value).astype(dtype))
        if value and held is not None and not (np.isfinite(held) and held):
            raise ValueError(
                f"its {array.name!r} of {value:g} is {held:g} in {dtype}; another alpha, or a wider dtype="
            )


def _named(words: Sequence[Word]) -> str:
    name = lambda w: w.name if isinstance(w, Array | Gate) else type(w).__name__
    return ", ".join(map(name, words))


def _check_letters(delta: Delta, sides: str) -> None:
    """What can be said without a leaf: the arrow, the commas, sizes of letters, what is made of what."""
    if delta.equation.count("->") != 1:
        raise ValueError("it has no one '->' between the operands and what they make: write 'r I, r O -> I O'")
    left, right = delta.equation.split("->")
    operands = [part.split() for part in left.split(",")]
    if len(operands) != len(delta.operands):
        raise ValueError(
            f"{len(operands)} operands between its commas, and {len(delta.operands)} words ({_named(delta.operands)})"
        )
    sized = dict(delta.sizes)
    for word, letters in zip(delta.operands, operands, strict=True):
        needs = letters if isinstance(word, Gate) or isinstance(word, Array) and word.shape is None else []
        for letter in needs:
            if letter not in ("I", "O", "K") and letter not in sized:
                blanks = "; letters are separated by blanks" if len(letter) > 1 else ""
                raise ValueError(f"the letter {letter!r} has no size: write sizes=(({letter!r}, 4), ...){blanks}")
    _check_names({x for letters in operands for x in letters} | set(sized))
    if sum(isinstance(word, Base) for word in delta.operands) > 1:
        raise ValueError("Base stands in it twice; a Function with base=True may take powers of W0")
    if sides in ("II", "OO") and any(isinstance(word, Base) for word in delta.operands):
        raise ValueError("an L or R turns W0, and Base stands in it; a Function with base=True sees W0")
    for word, letters in zip(delta.operands, operands, strict=True):
        if twice := next((x for x in letters if letters.count(x) > 1), None):
            raise ValueError(f"the operand {' '.join(letters)!r} of {_named([word])} has the letter {twice!r} twice")
    for letter, size in delta.sizes:
        if not _words.is_size(size) or not size:
            raise ValueError(f"the letter {letter!r} has the size {size!r}, which is no number of elements")
    held = {x for letters in operands for x in letters}
    groups = re.findall(r"\(([^)]*)\)", right)
    plain = re.sub(r"\([^)]*\)", " ", right).split()
    if twice := next((x for x in plain if plain.count(x) > 1), None):
        raise ValueError(f"its right side has {twice!r} twice")
    if sides in ("II", "OO") and (plain or len(groups) != 2):
        raise ValueError("an L or R makes two groups, its rows and its columns: '-> (m) (n)'")
    for letter in plain:
        if letter not in ("I", "O", "K"):
            raise ValueError(f"{letter!r} on its right is no side of the weight: write I, O, K or a group (i j)")
    if len(groups) > len([side for side in sides if side not in plain]):
        raise ValueError(f"{len(groups)} groups in parentheses, and the weight has the sides {' and '.join(sides)}")
    made = [x for group in groups for x in group.split()]
    if sides == "IO" and (twice := next((x for x in made if made.count(x) > 1), None)):
        raise ValueError(f"{twice!r} makes two axes on its right; a matrix in blocks is an L or an R, '-> (b m) (b n)'")
    for letter in held - {"I", "O", "K", *made, *plain} if sides != "O" else ():  # of rows, which have a number each
        if sum(letter in letters for letters in operands) < 2:
            raise ValueError(
                f"the letter {letter!r} is carried by one operand and made by nobody: it would be summed over; sum it "
                "in a Function, or leave it out"
            )
    for letter in (x for group in groups for x in group.split()):
        if letter not in held:
            raise ValueError(
                f"no operand carries the letter {letter!r} that its right side makes an axis of, and it has no size: "
                f"write sizes=(({letter!r}, 4), ...) if it repeats"
            )
        if letter not in sized:
            raise ValueError(f"the letter {letter!r} has no size: write sizes=(({letter!r}, 4), ...)")
    for letter in (*delta.ranks, *(x for x, _ in delta.rank_dropout)):
        if letter not in held:
            raise ValueError(f"no operand carries {letter!r}, which is said to be a rank")


INSIDE = r"[iosk]\d+|[xwy]\d+|row\d+|group"  # axes of a weight, of a dot, of a lookup; groups of a convolution


def _check_names(letters: set[str]) -> None:
    """Letters are letters and digits, and none of the names that axes have inside, such as `i0`."""
    if odd := sorted(x for x in letters if re.fullmatch(INSIDE, x) or not x.isalnum() or not x.isascii()):
        raise ValueError(f"{odd[0]!r} is the name of an axis inside, or is no letter; write another, such as 'r'")


def _check_gates(delta: Delta, added: bool) -> None:
    """A gate multiplies what is added to W0, by letters that are summed and that no rank operation changes."""
    left, right = delta.equation.split("->")
    made = {"I", "O", "K", *right.replace("(", " ").replace(")", " ").split()}
    for word, letters in zip(delta.operands, left.split(","), strict=True):
        if not isinstance(word, Gate):
            continue
        if not added:
            raise ValueError(
                f"the gate {word.name!r} stands in a gain, an L or an R, which are the same at every position: a gate "
                "stands in a delta"
            )
        for letter in letters.split():
            if letter in made or letter in delta.ranks:
                what = "a rank" if letter in delta.ranks else "an axis of the weight"
                raise ValueError(
                    f"the gate {word.name!r} has the letter {letter!r}, which is {what}: its letters are the method's "
                    "own, and summed"
                )


def _check_sizes(known: dict[str, int], bound: Bound, labels: Sequence[str], shape: Shape | None) -> None:
    """A letter without a size has that of the first shape that it stands in, and no other."""
    for label, size in zip(labels, shape or (), strict=False):
        if label not in bound.sizes and known.setdefault(label, size) != size:
            raise ValueError(
                f"the letter {label!r} is {known[label]} in one shape and {size} in another: give it a size"
            )


def _check_array(word: Array, labels: Sequence[str], shape: Sequence[int | None]) -> None:
    if word.shape is None:
        return
    fits = len(word.shape) == len(shape) and all(b in (None, a) for a, b in zip(word.shape, shape, strict=True))
    if not fits:
        raise ValueError(f"{word.name!r} has the shape {word.shape}, and its letters {_spoken(labels, shape)}")


def check_functions(recipe: Recipe, leaf: Leaf, made: Mapping[Place, jax.Array]) -> None:
    """Raises ValueError unless each Function of a recipe makes the axes of its letters of the arrays that were made."""
    functions = [(d, sides, w) for d, sides in recipe.networks for w in d.operands if isinstance(w, Function)]
    place = lambda array: made[array.group or leaf.path, array.name]
    given = tuple(tuple((place(array).dtype, array.shape) for array in w.arrays) for _, _, w in functions)
    if functions:
        _check_functions(recipe, dataclasses.replace(leaf, path=""), given)


@functools.lru_cache(maxsize=1024)
def _check_functions(recipe: Recipe, leaf: Leaf, given: tuple[tuple[tuple[DType, Shape | None], ...], ...]) -> None:
    rest = iter(given)
    for bound in recipe.bound(leaf):
        known = dict[str, int]()
        for word, labels in bound.words:
            _check_sizes(known, bound, labels, word.shape if isinstance(word, Array) else None)
            if isinstance(word, Function):
                arrays = [jax.ShapeDtypeStruct(shape, dtype) for dtype, shape in next(rest)]
                if word.base:
                    arrays.append(jax.ShapeDtypeStruct(leaf.layer.shape, leaf.dtype))
                try:
                    made = _check_function(word, arrays, labels, [bound.sizes.get(x) for x in labels])
                    _check_sizes(known, bound, labels, made)
                except ValueError as error:
                    raise ValueError(f"{error} (in the equation {bound.delta.equation!r})") from error.__cause__


def _check_function(
    word: Function, given: Sequence[Shaped], labels: Sequence[str], shape: Sequence[int | None]
) -> Shape:
    """The shape that it makes."""
    shapes = ", ".join(str(x.shape) for x in given) or "(none)"
    try:
        made: object = jax.eval_shape(word.fn, *given)
    except Exception as error:  # whatever an author's function raises
        raise ValueError(f"a Function of arrays {shapes} fails: {type(error).__name__}: {error}") from error
    if not isinstance(made, jax.ShapeDtypeStruct):
        raise ValueError(f"a Function of arrays {shapes} returns {type(made).__name__}, not one array")
    if jnp.issubdtype(made.dtype, jnp.complexfloating):
        raise ValueError(f"a Function of arrays {shapes} returns {made.dtype}, and weights are real")
    if len(made.shape) != len(shape) or any(b not in (None, a) for a, b in zip(made.shape, shape, strict=True)):
        letters = _spoken(labels, shape)
        raise ValueError(f"a Function of arrays {shapes} returns {made.shape}, and its letters {letters}")
    return made.shape


POSITIONS = 2**20  # that a step is asked about: more than any that it wants


def _check_steps(recipe: Recipe, leaf: Leaf, made: Mapping[Place, jax.Array]) -> None:
    """Raises ValueError unless each step keeps the shape of an output; of another weight's input it cannot be asked."""
    y = jax.ShapeDtypeStruct((POSITIONS, leaf.size("o")), np.dtype("float32"))
    for step in (step for step in recipe.steps if not step.of):
        given = [
            jax.ShapeDtypeStruct(a.shape, made[a.group or leaf.path, a.name].dtype)
            for a in step.arrays
            if a.shape is not None
        ]
        try:
            found = jax.eval_shape(step.fn, y, *given)
        except Exception as error:  # whatever an author's function raises
            raise ValueError(f"a Step of an output {y.shape} fails: {type(error).__name__}: {error}") from error
        if getattr(found, "shape", None) != y.shape:
            raise ValueError(f"a Step of an output {y.shape} returns {found}; it returns what it is given")


def _spoken(labels: Sequence[str], shape: Sequence[int | None]) -> str:
    if not labels:
        return "are none, so that it is a scalar"
    return f"{' '.join(labels)} are ({', '.join('any' if n is None else str(n) for n in shape)})"
