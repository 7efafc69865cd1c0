"""What one call chooses of a tree: the leaves that its rules take, their letters, and all that is wrong with them.

`adapt` and `quantize` both stand on this, so that a target means the same to them, and is refused in the same words.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jlora import _answers
from jlora._trees import _axes, _select, _tree
from jlora._trees._compound import sound
from jlora._trees._leaf import Leaf
from jlora._types import Traced


@dataclasses.dataclass(frozen=True)
class Wanted:
    """Which leaves are wanted, and who wants them: a method of a spec, or `quantize`."""

    who: str
    target: object
    exclude: object = ()


class Choice:
    """A tree under the rules of one call. What is wrong is gathered, so that one error names it all: see `check`.

    Attributes:
      tree, rules: what was given.
      takes: for each rule, whether it takes each leaf.
      axes: the user's letters, without the patterns that match no leaf.
      roles: where the letters of all leaves come from: the user, the leaves, a trace, the tree as a whole.
      bad: what is wrong so far, in words.
      unclear: weights whose sides nothing tells, each with the name of the rule that asks.
    """

    def __init__(
        self, tree: _tree.Named, rules: Sequence[Wanted], axes: dict[str, str] | None, traced: Traced | None = None
    ) -> None:
        """`traced` is what a trace of a call found, `{path: (use, letters)}`.

        Raises:
          TypeError: a target, an exclude or axes of the wrong kind; quantised leaves that were cast.
        """
        _answers.check_axes(axes)
        sound(zip(tree.paths, tree.leaves, strict=True))
        nowhere = _select.unmatched(axes, tree)
        selected = [_select.select(rule.who, rule.target, rule.exclude, tree, traced) for rule in rules]
        self.tree, self.rules = tree, rules
        self.takes = [takes for takes, _ in selected]
        self.axes = {pattern: letters for pattern, letters in (axes or {}).items() if pattern not in nowhere}
        self.traced = {path: letters for path, (_, letters) in (traced or {}).items() if letters}
        self.roles = _axes.Roles(tree, self.axes, self.traced)
        self.bad = [*(text for _, wrong in selected for text in wrong), *nowhere.values()]
        self.unclear: list[tuple[Leaf, str]] = []

    def takers(self, index: int) -> list[int]:
        """The rules that take a leaf; the first has it."""
        return [n for n, takes in enumerate(self.takes) if takes[index]]

    def weight(self, index: int) -> tuple[Leaf, str | None] | None:
        """A leaf of real numbers, with guessed letters where nothing tells them, and what is told: all or None.

        None, and a line in `bad`, where the leaf is no such array, or the user's letters do not fit it.
        """
        path, array = self.tree.paths[index], self.tree.leaves[index]
        if what := _answers.no_array(array):
            self.bad.append(f"{path!r} is {what}")
            return None
        shape, dtype = _tree.shape_dtype(array)
        if not _axes.is_trainable_dtype(dtype):
            self.bad.append(
                f"{path!r} of shape {shape} and dtype {dtype}: only real floating point leaves can be adapted or "
                "quantised; exclude it"
            )
            return None
        try:
            told = self.roles.of(index)
        except ValueError as error:
            self.bad.append(str(error))
            return None
        return Leaf(path, shape, np.dtype(dtype), told or self.roles.likely(index)), told

    def check(self, verb: str) -> None:
        """Raises ValueError with all that is wrong; `verb` is what cannot be done."""
        asked = [_axes.unclear(self.unclear, self.tree.paths)] if self.unclear else []
        if lines := [*self.bad, *asked]:
            raise ValueError(f"cannot {verb} this tree:\n  " + "\n  ".join(lines))
