"""Rows of a table: trained changes of some, and new ones behind its end. Every other row is the table's, bit for bit.

    W = rows put into L (gain * (W0 + sum of deltas)) R

A table is looked up by the numbers of its rows. Where a change of 5 rows in 50,000 was a product like any other, it
would be added to all of them: as much work as the table is large, and -0.0 + 0.0 is another number. So rows are no
product: they stay beside the expression, and a lookup or a dot puts them into its result.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jlora._algebra._mesh import automatic, reshaped
from jlora._algebra._term import Operand
from jlora._algebra._words import Array, Delta, Function, Labels
from jlora._trees._leaf import Leaf


class Refusal(Exception):
    """The labels cannot say this operation; its message is the reason."""


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of a table, `(stack..., rows, out...)`: the word of a `Recipe` for tokens.

    Of numbers that the table has, `made` is what is added to its rows: zero is no change, and `jlora.scale` acts on it
    (the scale is a frozen factor of its own). Of the numbers that come after them, it is the rows themselves: the model
    still sees a table of V rows, and a lookup knows V + n.

    Attributes:
      made: the rows, in the order of `at`: a stored factor, or a function of some (an encoder that makes prompts).
      at: their numbers, ascending: all below V, or exactly V to V + n - 1 (a `range` will do).
    """

    made: Array | Function
    at: Sequence[int]

    @property
    def network(self) -> Delta:
        """As an equation, for all that reads letters and sizes: `n` counts the rows."""
        return Delta("n O -> O", (self.made,), (("n", len(self.at)),), s=f"s_{self.made.arrays[0].name}")

    def new(self, leaf: Leaf) -> bool:
        """Whether they stand behind the table's end."""
        return self.at[0] >= leaf.size("ik")

    def check(self, leaf: Leaf) -> None:
        """Raises ValueError where they are no rows of a weight of this shape."""
        size = leaf.size("ik")
        if leaf.roles.count("i") != 1 or leaf.axes("k") or not leaf.axes("o"):
            raise ValueError(
                f"rows are put into a table, which has one axis of ids (i) and others of features (o); here they are "
                f"{leaf.roles!r}: name them with axes={{pattern: 'io'}}, or exclude it"
            )
        at = np.asarray(self.at)
        if at.ndim != 1 or not at.size or not np.issubdtype(at.dtype, np.integer):
            raise ValueError(f"rows have numbers, at=(3, 17), not {self.at!r:.60}")
        if at[0] < 0 or np.any(np.diff(at) < 1):
            raise ValueError(f"the numbers of rows ascend from 0 on, each once, not {self.at!r:.60}")
        if at[-1] >= size and not np.array_equal(at, np.arange(size, size + at.size)):
            raise ValueError(
                f"the table has rows 0 to {size - 1}, and there is no row {at[at >= size][-1]}; new rows are those "
                f"from {size} on, without a gap"
            )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Put:
    """`Rows` in an expression.

    Attributes:
      values: labelled with atoms, the table's own axis among them, which counts the rows of `at` here.
      atom: that axis.
      at: their numbers.
      new: whether they stand behind the table's end.
    """

    values: Operand
    atom: str = dataclasses.field(metadata={"static": True})
    at: Sequence[int] = dataclasses.field(metadata={"static": True})
    new: bool = dataclasses.field(metadata={"static": True})

    def on(self, f: Callable[[Operand], Operand], atom: str | None = None) -> "Put":
        """`f` on the rows, where it does something to `atom`; Refusal where that is the axis that counts them."""
        if atom == self.atom:
            raise Refusal("a cut through a table with rows put in")
        return dataclasses.replace(self, values=f(self.values))

    def scaled(self, c: jax.Array) -> "Put":
        """Times a scalar."""
        times = lambda a: a * jnp.asarray(c).astype(a.dtype)
        return self.on(lambda o: dataclasses.replace(o, arrays=tuple(map(times, o.arrays))))

    def as_table(self, axes: Sequence[Labels], size: Mapping[str, int]) -> jax.Array:
        """A table of these rows alone, in the axes that the weight has now."""
        value, labels = self.values.value(), self.values.labels
        own = {**size, self.atom: len(self.at)}
        value = lax.transpose(value, [labels.index(a) for g in axes for a in g])
        shape = [int(np.prod([own[a] for a in g], dtype=int)) for g in axes]
        return reshaped(value, shape)

    def axis(self, axes: Sequence[Labels]) -> int:
        """The weight's axis that counts rows; Refusal where it holds something else, too."""
        if (self.atom,) not in axes:
            raise Refusal("a table whose rows are joined with another axis, with rows put in")
        return list(axes).index((self.atom,))


def changed(w: jax.Array, rows: Sequence[Put], axes: Sequence[Labels], size: Mapping[str, int]) -> jax.Array:
    """A dense weight with the changes of its rows added; new rows are none of its own."""
    atoms = [(a,) for g in axes for a in g]
    for put in (p for p in rows if not p.new):
        at: tuple[slice | np.ndarray, ...] = (slice(None),) * put.axis(atoms)
        at = (*at, np.asarray(put.at))
        add = lambda w, values, at=at: w.at[at].add(values, indices_are_sorted=True, unique_indices=True)
        split = reshaped(w, [size[a] for (a,) in atoms])
        w = reshaped(automatic(add, (split, put.as_table(atoms, size).astype(w.dtype))), w.shape)
    return w


def taller(w: jax.Array, rows: Sequence[Put], axes: Sequence[Labels], size: Mapping[str, int]) -> jax.Array:
    """A dense weight with its new rows behind it."""
    for put in (p for p in rows if p.new):
        w = jnp.concatenate([w, put.as_table(axes, size).astype(w.dtype)], put.axis(axes))
    return w


def shorter(w: jax.Array, rows: Sequence[Rows], leaf: Leaf) -> jax.Array:
    """A dense weight without its new rows; one of another height is left to whoever asks for shapes."""
    for put in (r for r in rows if r.new(leaf)):
        (axis,) = leaf.axes("i")
        if jnp.shape(w) == (*leaf.shape[:axis], leaf.shape[axis] + len(put.at), *leaf.shape[axis + 1 :]):
            w = lax.slice_in_dim(w, 0, leaf.shape[axis], axis=axis)
    return w
