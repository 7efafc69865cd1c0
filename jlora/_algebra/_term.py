"""One product of an expression: labelled operands, and which axes of the weight their labels make."""

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import jax

from jlora._algebra._mesh import reshaped
from jlora._algebra._recipe import Blocks
from jlora._algebra._words import Labels

_static = lambda: dataclasses.field(metadata={"static": True})
Sides: TypeAlias = tuple[tuple[str, int], ...]  # labels and their sizes


class NoArray(ValueError):
    """An array is asked for where none says what a weight does: its gate has positions, or its output a step.

    Or gate or step do not fit what the model does with the weight.
    """


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operand:
    """A labelled array, or a function of arrays that share leading stack labels; no array at all stands for W0.

    `sides` is W0's alone: axes that it shows under labels of another operand, `(atoms, ((label, size), ...))`.
    `gate` and `at` are a gate's: its name, and those of its labels, in front, that are no axes of the weight but
    positions of the activation that it meets.
    """

    arrays: tuple[jax.Array, ...]
    fn: Callable[..., jax.Array] | None = _static()
    stacks: tuple[Labels, ...] = _static()
    labels: Labels = _static()
    sides: tuple[tuple[Labels, Sides], ...] = dataclasses.field(default=(), metadata={"static": True})
    gate: str = dataclasses.field(default="", metadata={"static": True})
    at: Labels = dataclasses.field(default=(), metadata={"static": True})

    @property
    def is_base(self) -> bool:
        return not self.arrays

    def pending(self, label: str) -> bool:
        """Whether `label` is an axis that a function has yet to make."""
        return self.fn is not None and label in self.labels and not any(label in s for s in self.stacks)

    def value(self) -> jax.Array:
        if self.fn is None:
            return self.arrays[0]
        fn = self.fn
        stack = dict.fromkeys(x for s in self.stacks for x in s)
        for label in reversed(stack):
            fn = jax.vmap(fn, in_axes=tuple(0 if label in s else None for s in self.stacks))
        with jax.named_scope("delta"):
            return fn(*self.arrays)

    def forced(self) -> "Operand":
        return self if self.fn is None else Operand((self.value(),), None, (), self.labels)

    def shown(self, atoms: Labels, made: Sides) -> "Operand":
        """The same operand with the axes `atoms`, which stand together, under the labels `made`."""
        if self.is_base:
            return dataclasses.replace(self, sides=(*self.sides, (atoms, made)))
        if not set(atoms) & set(self.labels):
            return self
        n = self.labels.index(atoms[0])
        if self.labels[n : n + len(atoms)] != atoms:
            raise ValueError(f"a network on part of a side that {[x for x, _ in made]} makes as a whole")
        value = self.value()
        shape = (*value.shape[:n], *(size for _, size in made), *value.shape[n + len(atoms) :])
        labels = (*self.labels[:n], *(x for x, _ in made), *self.labels[n + len(atoms) :])
        return Operand((reshaped(value, shape),), None, (), labels)

    def axes(self, label: str) -> list[int | None]:
        """Where each array carries a label."""
        if self.fn is None:
            return [self.labels.index(label) if label in self.labels else None for _ in self.arrays]
        return [s.index(label) if label in s else None for s in self.stacks]

    def dropped(self, label: str, arrays: tuple[jax.Array, ...]) -> "Operand":
        """The same word after `label` was indexed away."""
        without = lambda ls: tuple(x for x in ls if x != label)
        stacks = tuple(map(without, self.stacks))
        return dataclasses.replace(self, arrays=arrays, stacks=stacks, labels=without(self.labels))


@dataclasses.dataclass(frozen=True)
class Drop:
    """What is dropped of a product where there is a key: rates on its activation, on letters, on all of it.

    Products of one `stream` draw alike (the slices of a fused projection), others apart (the two of a sum).
    """

    rate: float = 0.0
    letters: tuple[tuple[str, float], ...] = ()
    module: float = 0.0
    stream: int = 0

    def __bool__(self) -> bool:
        return bool(self.rate or self.letters or self.module)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """A product of operands; `blocks` says which axes of the weight its labels make."""

    operands: tuple[Operand, ...]
    blocks: Blocks = _static()
    dropout: Drop = _static()

    @property
    def gates(self) -> tuple[Operand, ...]:
        """The gates that differ from position to position."""
        return tuple(o for o in self.operands if o.at)

    def sizes(self) -> dict[str, int]:
        """The size of every label of an operand that is not W0."""
        shape = lambda o: jax.eval_shape(o.value).shape
        return {x: n for o in self.operands if not o.is_base for x, n in zip(o.labels, shape(o), strict=True)}

    def simple(self, atom: str) -> bool:
        """Whether an axis of the weight is simply one label of this product."""
        return ((atom,), (atom,)) in self.blocks

    def through(self, axes: Sequence[Labels]) -> list[tuple[int, Labels]] | None:
        """Reads axes, in order, as runs of whole blocks: (how many axes, the labels they make), or None."""
        runs: list[tuple[int, Labels]] = []
        todo = list(axes)
        while todo:
            count, group = 1, todo[0]
            while (labels := self._whole(group)) is None:
                if count == len(todo):
                    return None
                group += todo[count]
                count += 1
            runs.append((count, labels))
            todo = todo[count:]
        return runs

    def spelled(
        self, axes: Sequence[tuple[str, Labels | None]], shape: tuple[int, ...], sizes: Mapping[str, int]
    ) -> tuple[Labels, tuple[int, ...]] | None:
        """Labels and sizes of an array that meets the weight, None where one of its axes cuts a block.

        An axis is `(its label, None)` where it is the array's own, `(any, atoms)` where it stands for the weight's.
        """
        labels: list[str] = []
        split: list[int] = []
        n = 0
        while n < len(axes):
            label, group = axes[n]
            if group is None:
                labels.append(label)
                split.append(shape[n])
                n += 1
                continue
            run = [g for _, g in itertools.takewhile(lambda axis: axis[1] is not None, axes[n:])]
            # the shortest run of axes that is a run of whole blocks
            lengths = (k for k in range(1, len(run) + 1) if self.through(run[:k]) is not None)  # type: ignore[arg-type]
            count = next(lengths, None)
            if count is None:
                return None
            made = [x for _, ms in self.through(run[:count]) or () for x in ms]  # type: ignore[arg-type]
            labels += made
            split += [sizes[x] for x in made]
            n += count
        return tuple(labels), tuple(split)

    def _whole(self, group: Labels) -> Labels | None:
        labels: Labels = ()
        while group:
            for atoms, made in self.blocks:
                if atoms and group[: len(atoms)] == atoms:
                    labels, group = labels + made, group[len(atoms) :]
                    break
            else:
                return None
        return labels
