"""What is done to the output of an adapted operation: y becomes f(y), or f(y, x) with the input of another weight.

A step sees its output in one form, `(stack..., positions..., features)`, whatever axes the model gave it.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra._mesh import reshaped
from jlora._algebra._term import NoArray, Operand
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._forward import _gates

Groups = Sequence[Labels | None]  # of each axis, the atoms of the weight that it stands for; None or none for others


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["flat"],
    meta_fields=["is_lost", "readers", "earlier", "several"],
    drop_fields=["x"],
)
@dataclasses.dataclass
class Met:
    """An input that steps read, on its way through sub-jaxprs too.

    Attributes:
      flat: with its features last.
      is_lost: whether one before it was read by no step, so that which of the two is meant cannot be told.
      readers: the weights whose steps have read it, by their origins.
      earlier: those whose steps have read one before it.
      several: whether there was one before it.
      x: as it was met, in the jaxpr where it was.
    """

    flat: jax.Array
    is_lost: bool = False
    readers: tuple[int, ...] = ()
    earlier: tuple[int, ...] = ()
    several: bool = False
    x: jax.Array | None = None

    def after(self, flat: jax.Array, x: jax.Array) -> "Met":
        """The next input of the same weight, where this one was met before."""
        if self.x is x:
            return dataclasses.replace(self, flat=flat)
        return Met(flat, not self.readers, (), (*self.earlier, *self.readers), True, x)

    def read(self, origin: int) -> bool:
        """Notes a reader; whether it is told which input it means, where there were several.

        Calls one after another read each in turn: all readers read every input once, or one input has readers of its
        own, as the halves of an encoder-decoder have. A second reading of one input, or a reader that has passed over
        an input which another read, is of calls that are interleaved.
        """
        passed = origin not in self.earlier and bool(set(self.readers) & set(self.earlier))
        told = not self.several or origin not in self.readers and not passed
        self.readers = (*self.readers, origin)
        return told and not self.is_lost


def applied(w: Weight, y: jax.Array, groups: Groups, inputs: Mapping[int, Met]) -> jax.Array:
    """The output of a weight's operation after its steps; `inputs` has those of other weights, by their origins."""
    for o, of in zip(w.steps, w.reads, strict=True):
        if of >= 0 and of not in inputs:
            raise NoArray(
                f"{w.named}: a step on its output reads the input of another weight, and the model does not use that "
                "one before it, or in a loop or branch that has ended or that uses it later; leave a weight without "
                "such an input, as of an encoder that reads no ids, to no such method (exclude=...)"
            )
        met = inputs.get(of)
        if met is not None and not met.read(w.origin):
            raise NoArray(
                f"{w.named}: a step on its output reads the input of another weight, and the model uses that one on "
                "two inputs before it: which of them it means cannot be told. Call the block on one after the other, "
                "or leave the weight to no such method (exclude=...)"
            )
        with jax.named_scope("delta"):
            y = _one(w, o, y, groups, met and met.flat)
    return y


def features_last(x: jax.Array, features: Sequence[int], stack: Sequence[int] = ()) -> jax.Array:
    """`(stack..., positions..., features)`: the axes of the features flattened, in the order given."""
    rest = [n for n in range(x.ndim) if n not in (*features, *stack)]
    x = _turned(x, (*stack, *rest, *features))
    return reshaped(x, (*x.shape[: x.ndim - len(features)], math.prod(x.shape[x.ndim - len(features) :])))


def _one(w: Weight, o: Operand, y: jax.Array, groups: Groups, x: jax.Array | None) -> jax.Array:
    """One step."""
    labels = [a for n, g in enumerate(groups) for a in (g or (f"y{n}",))]
    shape = [w.size[a] if g else y.shape[n] for n, g in enumerate(groups) for a in (g or ("",))]
    outs = [a for a in o.labels if o.pending(a)]
    if not set(outs) <= set(labels):
        raise NoArray(f"{w.named}: a step on its output, and the operation leaves no output axis")
    carried = list(dict.fromkeys(a for s in o.stacks for a in s))
    if not set(carried) <= set(labels):
        raise NoArray(f"{w.named}: a step on its output is one a layer, and the operation mixes layers")
    stack = [*carried, *(a for a in labels if a[0] == "s" and a not in carried)]  # in the order of the arrays
    split = reshaped(y, tuple(shape))
    made = features_last(split, [labels.index(a) for a in outs], [labels.index(a) for a in stack])
    order = [*stack, *(a for a in labels if a not in (*stack, *outs)), *outs]
    try:
        new = _of_layers(_ungated(o), stack, made, x)
    except Exception as error:  # whatever an author's function raises
        why = str(error) if isinstance(error, ValueError) else f"it fails: {type(error).__name__}: {error}"
        raise NoArray(f"{w.named}: a step on its output of shape {made.shape}: {why}") from error
    if new.shape != made.shape:
        raise NoArray(f"{w.named}: a Step of an output of shape {made.shape} returns {new.shape}, not what it is given")
    if o.gate:
        g = _gates.spread(w.named, o.gate, o.arrays[-1], made.shape[len(stack) : -1])[..., None].astype(y.dtype)
        new = g * new + (1 - g) * made  # where g is 0 or 1, one of the two bit for bit
    new = reshaped(new.astype(y.dtype), tuple(shape[labels.index(a)] for a in order))
    return reshaped(_turned(new, [order.index(a) for a in labels]), y.shape)


def _ungated(o: Operand) -> Operand:
    """The same step without its gate, its last array."""
    return dataclasses.replace(o, arrays=o.arrays[:-1], stacks=o.stacks[:-1]) if o.gate else o


def _of_layers(o: Operand, stack: Sequence[str], y: jax.Array, x: jax.Array | None) -> jax.Array:
    """The function on an output, once for each layer that its arrays have in front."""
    floating = lambda a: jnp.issubdtype(a.dtype, jnp.floating)
    cast = lambda a: a.astype(y.dtype) if floating(a) else a
    met = (y,) if x is None else (y, cast(x))
    ahead: list[int | None] = [0 for _ in met]
    if x is not None and x.shape[:-1] == y.shape[len(stack) : -1]:  # the same in all layers of a stack, as ids are
        ahead[1] = None
    elif x is not None and x.shape[:-1] != y.shape[:-1]:
        raise NoArray(
            f"a Step reads an output of shape {y.shape} and the input of another weight of shape {x.shape}: all but "
            "their features must be alike"
        )
    assert o.fn is not None
    fn = o.fn
    for a in reversed(stack):
        fn = jax.vmap(fn, in_axes=(*ahead, *(0 if a in s else None for s in o.stacks)))
    return fn(*met, *map(cast, o.arrays))


def _turned(x: jax.Array, order: Sequence[int]) -> jax.Array:
    return x if list(order) == list(range(x.ndim)) else lax.transpose(x, order)
