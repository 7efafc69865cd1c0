"""The second moments of the activations that meet a weight, read off labels: what `init.activations` collects."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra._term import Operand
from jlora._algebra._weight import Weight
from jlora._dtypes import widened


def place(atom: str) -> tuple[int, str]:
    """Where an atom stands in the kernel: by its axis, then by the marks of `_reshape`."""
    number = atom[1:].rstrip("&'")
    return int(number), atom[1 + len(number) :]


def moment(
    w: Weight, x: jax.Array, pairs: Sequence[tuple[int, int]], batch: Sequence[tuple[int, int]]
) -> Operand | None:
    """X^T X of an activation that meets a weight, `(stack..., in, in)` with the stack axes labelled.

    None where it meets other axes than the input. `pairs` are the contracted axes and `batch` the batch axes, (the
    weight's, the activation's). The input axes stand flat, in the kernel's order, whatever the model made of them. A
    stack that the activation lacks meets the whole of it.
    """
    inner = [a for n, _ in pairs for a in w.axes[n]]
    stacked = [a for n, _ in batch for a in w.axes[n]]
    if set(inner) != {a for a in w.atoms if a[0] in "ik"} or any(a[0] != "s" for a in stacked):
        return None
    lead = [m for _, m in sorted(batch, key=lambda pair: [place(a) for a in w.axes[pair[0]]])]
    last = [m for _, m in pairs]
    free = [m for m in range(x.ndim) if m not in (*lead, *last)]
    rows = widened(lax.transpose(x, (*lead, *free, *last)))
    rows = rows.reshape(*(x.shape[m] for m in lead), -1, *(w.size[a] for a in inner))
    front = len(lead) + 1
    order = sorted(range(len(inner)), key=lambda n: place(inner[n]))
    rows = lax.transpose(rows, (*range(front), *(front + n for n in order)))
    rows = rows.reshape(*rows.shape[:front], -1)
    made = jnp.einsum("...ti,...tj->...ij", rows, rows, precision=lax.Precision.HIGHEST)
    layers = tuple(sorted((a for a in w.atoms if a[0] == "s"), key=place))
    for n, atom in enumerate(layers):
        if atom not in stacked:
            made = jnp.repeat(jnp.expand_dims(made, n), w.size[atom], n)
    return Operand((made,), None, (), layers)


def in_order(made: Operand) -> jax.Array:
    """A second moment with its stack axes in the kernel's order."""
    n = len(made.labels)
    order = sorted(range(n), key=lambda axis: place(made.labels[axis]))
    return jnp.transpose(made.arrays[0], (*order, n, n + 1))
