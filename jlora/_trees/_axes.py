"""Which axes of a weight are input, output, window or stack.

One letter an axis: `i` input, `o` output, `k` a convolution's window, `s` stack (scanned layers, experts). They
are facts: other letters are another method with other parameters. `Roles` says where they come from; where nothing
decides, `adapt` refuses for methods to which it matters.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._trees import _axis_names, _layouts, _table, _tree
from jlora._trees._compound import is_compound
from jlora._trees._leaf import Leaf

_INTO_HEADS = re.compile(r"(^|[_.])(q|k|v|qkv|kv|query|key|value|q_proj|k_proj|v_proj)([_.]|\d|$)")
_OUT_OF_HEADS = re.compile(r"(^|[_.])(out|o|o_proj|out_proj|output|attn_vec)([_.]|\d|$)")
_VECTOR = ("bias", "scale", "offset", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class Roles:
    """Where the letters of a tree's weights come from, the first that decides: what the user says, what the leaves
    themselves say (a quantised layout, logical axis names), a trace, and what the tree as a whole leaves possible.

    Attributes:
      tree: the flattened tree.
      axes: the user's `{pattern: letters}`.
      traced: `{path: letters}` of a trace, if there is one.
    """

    tree: _tree.Named
    axes: dict[str, str] | None = None
    traced: dict[str, str] | None = None

    def of(self, n: int) -> str | None:
        """The letters of leaf n, None where nothing decides; ValueError where the user's do not fit."""
        path, leaf = self.tree.paths[n], self.tree.leaves[n]
        said = users_letters(path, _tree.shape_dtype(leaf)[0], self.axes)
        if is_compound(leaf):
            if said not in (None, leaf.roles):
                raise ValueError(
                    f"{path!r} of shape {leaf.shape} was quantised with the axes {leaf.roles!r}, not {said!r}; "
                    "give the same axes= to quantize"
                )
            return leaf.roles
        if said is not None:
            return said
        named = self._named[n]
        if "?" not in named:
            return named
        return (self.traced or {}).get(path) or self.decided[n]

    def likely(self, n: int) -> str:
        """The letters of leaf n, a guess where nothing decides: for what an error proposes, or placement."""
        path, shape = self.tree.paths[n], _tree.shape_dtype(self.tree.leaves[n])[0]
        beside = f"{path.rpartition('/')[0]}/bias".lstrip("/")
        bias = self._shapes.get(beside) if path != beside else None
        return self.of(n) or guess(path, shape, bias)

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {p: _tree.shape_dtype(x)[0] for p, x in zip(self.tree.paths, self.tree.leaves, strict=True)}

    @functools.cached_property
    def _named(self) -> list[str]:
        shapes = [_tree.shape_dtype(leaf)[0] for leaf in self.tree.leaves]
        return [_axis_names.letters(names, shape) for names, shape in zip(self.tree.axis_names, shapes, strict=True)]

    @functools.cached_property
    def decided(self) -> list[str | None]:
        """By the tree as a whole, without the stacks that axis names tell."""
        shapes = {}
        for path, leaf, named in zip(self.tree.paths, self.tree.leaves, self._named, strict=True):
            shapes[path] = tuple(n for n, x in zip(_tree.shape_dtype(leaf)[0], named, strict=True) if x != "s")
        found = _layouts.decide(shapes)

        def whole(path: str, named: str) -> str | None:
            rest = iter(found[path] or "")
            return "".join("s" if x == "s" else next(rest) for x in named) if found[path] is not None else None

        return [whole(path, named) for path, named in zip(self.tree.paths, self._named, strict=True)]


def guess(path: str, shape: tuple[int, ...], bias: tuple[int, ...] | None = None) -> str:
    """Letters that Flax's names and shapes suggest, and a bias beside the weight allows. Nothing that counts rests on
    them.
    """
    first = _first_guess(path, shape)
    made = lambda letters: tuple(n for n, x in zip(shape, letters, strict=True) if x in "so")
    if bias is None or "i" not in first or made(first) == bias:
        return first
    others = ("".join(x) for x in itertools.product("skio", repeat=len(shape)))
    # the sides in Flax's order first, (in, out), then the other one; windows and stacks in front
    forms = [x for x in others if re.fullmatch("s?(k*(i+o+|o+i+))", x)]
    fits = [x for x in forms if made(x) == bias]
    small = [n <= 16 for n in shape]
    order = lambda x: (
        "oi" in x,
        "s" in x,
        sum((c == "k") != (n < len(shape) - 2 and small[n]) for n, c in enumerate(x)),
    )
    return min(fits, key=order, default=first)


def _first_guess(path: str, shape: tuple[int, ...]) -> str:
    steps = path.split("/")
    parent, n = steps[-2] if len(steps) > 1 else "", len(shape)
    if n < 2 or steps[-1] in _VECTOR:
        return "o" * n
    if _INTO_HEADS.search(parent) and n > 2:
        return "s" * (n - 3) + "ioo"
    if _OUT_OF_HEADS.search(parent) and n > 2:
        return "s" * (n - 3) + "iio"
    if n == 4 and max(shape[:2]) <= 16:
        return "kkio"
    return "s" * (n - 2) + "io"


def members(tree: _tree.Named, read: dict[str, str]) -> dict[str, str]:
    """The letters that a trace read, members of one input as a stack.

    Experts that all see one activation look like outputs of it to a dot: `td,edf->etf`. They are a stack where another
    weight of their module, of the same number in front, is contracted member by member, `etf,efd->etd`; and where the
    tree reads a stack, and the trace has one of that size on that axis elsewhere.
    """
    shapes = {path: _tree.shape_dtype(leaf)[0] for path, leaf in zip(tree.paths, tree.leaves, strict=True)}
    module = lambda path: re.sub(r"(^|/)(kernel|w|weight)$", "", path).rpartition("/")[0]
    deep = {(module(path), shapes[path][0]) for path, letters in read.items() if re.match("s.*i", letters)}

    def beside(path: str, letters: str) -> str:
        one = re.fullmatch("o(?=.*i).*o.*", letters) and (module(path), shapes[path][0]) in deep
        return "s" + letters[1:] if one and not _names_heads(module(path), path) else letters

    read = {path: beside(path, letters) for path, letters in read.items()}
    stacks = {(n, shapes[path][n]) for path, letters in read.items() for n, x in enumerate(letters) if x == "s"}
    decided = dict(zip(tree.paths, Roles(tree).decided, strict=True))

    def in_tree(path: str, letters: str) -> str:
        other = decided[path] or ""
        apart = [n for n, pair in enumerate(zip(letters, other, strict=False)) if pair[0] != pair[1]]
        agree = all((letters[n], other[n]) == ("o", "s") and (n, shapes[path][n]) in stacks for n in apart)
        return other if letters and other and agree else letters

    return {path: in_tree(path, letters) for path, letters in read.items()}


def _names_heads(module: str, path: str) -> bool:
    """Whether a weight's name, below its module's, is one of attention's."""
    name = path[len(module) :].strip("/").partition("/")[0]
    return _INTO_HEADS.search(name) is not None or _OUT_OF_HEADS.search(name) is not None


def users_letters(path: str, shape: tuple[int, ...], axes: dict[str, str] | None) -> str | None:
    """The user's letters of one weight, None where no pattern matches."""
    for pattern, letters in (axes or {}).items():
        if _tree.matches(pattern, path):
            if len(letters) != len(shape) or set(letters) - set("iosk"):
                raise ValueError(
                    f"axes={{{pattern!r}: {letters!r}}} does not fit {path!r} of shape {shape}: "
                    f"write {len(shape)} letters out of i (in), o (out), k (window), s (stack)"
                )
            return letters
    return None


_SIDES = {"s": "stack", "i": "in", "k": "in", "o": "out"}


def text(leaf: Leaf) -> str:
    """Its sizes for a table: `12 x (768 -> 12x64)`."""
    sizes: dict[str, list[str]] = {"stack": [], "in": [], "out": []}
    for role, n in zip(leaf.roles, leaf.shape, strict=True):
        sizes[_SIDES[role]].append(str(n))
    sides = " -> ".join("x".join(sizes[side]) for side in ("in", "out") if sizes[side])
    return f"{'x'.join(sizes['stack'])} x ({sides})" if sizes["stack"] else sides


class RolesWarning(UserWarning):
    """A lifted function contracts other axes of a weight than those that `adapt` took for its input.

    It is no error: the adapter still trains, as another method than the one that was asked for. The text has the line
    to write.

    Example:
      >>> import warnings
      >>> import jax.numpy as jnp, jlora
      >>> params = {"dense": {"kernel": jnp.ones((4, 3))}}  # used transposed below: (out, in)
      >>> model = lambda params, x: x @ params["dense"]["kernel"].T
      >>> adapted = jlora.adapt(params, jlora.LoRA(rank=1, target="kernel"))
      >>> with warnings.catch_warnings(record=True) as caught:
      ...     warnings.simplefilter("always", jlora.RolesWarning)
      ...     y = jlora.lift(model)(adapted, jnp.ones((2, 3)))
      >>> print(caught[0].message)
      this function uses axes otherwise than adapt took them (i in, o out, k window, s stack):
        'dense/kernel' of shape (4, 3) is 'oi' here, and was taken for 'io':
          write adapt(..., axes={r'^dense/kernel$': 'oi'})
        or adapt(params, spec, fn=..., args=...), which reads them off a call
    """


def contradiction(found: Sequence[tuple[str, tuple[int, ...], str, str]]) -> str:
    """What a function does otherwise with `(path, shape, letters taken, letters read)`, and the lines that mend it."""
    rows = [(path, (shape, taken, read)) for path, shape, taken, read in found]
    lines = ["this function uses axes otherwise than adapt took them (i in, o out, k window, s stack):"]
    for path, n, (shape, taken, read) in _table.fold(rows)[:8]:
        times = f" (x{n})" if n > 1 else ""
        pattern = re.escape(path) if n == 1 else re.sub(r"\{[^}]*\}", r"\\d+", path)
        lines.append(f"{path!r}{times} of shape {shape} is {read!r} here, and was taken for {taken!r}:")
        lines.append(f"  write adapt(..., axes={{r'^{pattern}$': {read!r}}})")
    lines.append("or adapt(params, spec, fn=..., args=...), which reads them off a call")
    return "\n  ".join(lines)


def unclear(found: Sequence[tuple[Leaf, str]], paths: Sequence[str]) -> str:
    """What to write for weights whose sides nothing tells, each with the name of who asks."""
    rows = [(leaf.path, (leaf.shape, leaf.roles)) for leaf, _ in found]
    folded = _table.fold(rows)
    who = ", ".join(dict.fromkeys(name for _, name in found))
    lines = [f"{who} asks which axes of a weight are input and which output, and nothing here tells it of:"]
    for path, n, (shape, _) in folded[:_SHOWN]:
        lines.append(f"    {path!r}{f' (x{n})' if n > 1 else ''} of shape {shape}")
    if len(folded) > _SHOWN:
        lines.append(f"    and {len(folded) - _SHOWN} more such groups")
    patterns = {_pattern(p, {leaf.path for leaf, _ in found if leaf.roles == r}, paths): r for p, (_, r) in rows}
    said = ", ".join(f"r{pattern!r}: {letters!r}" for pattern, letters in list(patterns.items())[:_SHOWN])
    more = ", ..." if len(patterns) > _SHOWN else ""
    lines += [
        "  let a call of the model tell: write fn=model.apply, args=(x,), where shapes are enough,",
        "  or say it, one letter an axis, i (in), o (out), k (window), s (stack). If these are right, write",
        f"    axes={{{said}{more}}}",
    ]
    return "\n  ".join(lines)


_SHOWN = 8


def _pattern(path: str, alike: set[str], paths: Sequence[str]) -> str:
    """The shortest end of a path, numbers left open, that matches none but those that are alike."""
    steps = [re.sub(r"\d+", r"\\d+", re.escape(step)) for step in path.split("/")]
    for n in range(1, len(steps) + 1):
        pattern = "(^|/)" + "/".join(steps[-n:]) + "$"
        if all(p in alike for p in paths if re.search(pattern, p)):
            return pattern if n < len(steps) else "^" + "/".join(steps) + "$"
    return f"^{re.escape(path)}$"


def added(weight: Leaf, shape: tuple[int, ...]) -> str | None:
    """The letters of an array that is added to a weight's output, its layers where they may be; None where none fit."""
    kept = [n for n, role in enumerate(weight.roles) if role in "so"]
    for order in itertools.permutations(kept):
        apart = [[n for n in order if weight.roles[n] == role] for role in "so"]
        if all(x == sorted(x) for x in apart) and tuple(weight.shape[n] for n in order) == shape:
            return "".join(weight.roles[n] for n in order)
    return None


def is_trainable_dtype(dtype: DTypeLike) -> bool:
    """Whether a weight of this dtype can be adapted: a real floating point type."""
    return jnp.issubdtype(dtype, jnp.floating)
