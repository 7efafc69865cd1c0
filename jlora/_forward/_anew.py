"""A weight whose products are larger than what they meet: made when the activation is there, and anew for gradients.

A random projection, a rotation, a W0 multiplied element by element are computed from factors alone. A compiler would
make those of all layers before it needs the first, and keep them for the backward pass: many dense layers a layer.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jlora._algebra._contract import elements
from jlora._algebra._term import Operand, Term
from jlora._algebra._unmade import again
from jlora._algebra._weight import Weight
from jlora._types import PyTree, Shaped, Value


def _made(o: Operand) -> int:
    """Elements of an operand that a function makes out of fewer; a view of an array makes none."""
    if o.fn is None or o.is_base:
        return 0
    size = math.prod(jax.eval_shape(o.value).shape)
    return size if size > sum(a.size for a in o.arrays) else 0


def _joined(t: Term) -> int:
    """Elements of the two operands that three or more are first contracted to (`_ops`), one a side of the weight."""
    sizes, total = t.sizes(), 0
    for roles in ("ik", "o"):
        side = {x for atoms, made in t.blocks for x in made if atoms and atoms[0][0] in roles}
        held = {x for o in t.operands if side & set(o.labels) for x in o.labels}
        total += math.prod(sizes[x] for x in held)
    return total


def bulky(w: Weight, x: Shaped) -> bool:
    """Whether a dot of `w` with `x` makes an array that is larger than `x`, or as large as the weight, on its way."""
    whole = math.prod(w.shape)
    for term in w.terms:
        made = sum(map(_made, term.operands))
        if made >= whole:
            return True
        labelled = [o for o in term.operands if (o.labels or o.is_base) and not o.at]
        if len(labelled) > 2:
            made += whole if any(o.is_base for o in labelled) else _joined(term)
        if made > elements(x.shape):
            return True
    return False


def anew(use: Callable[[Weight, jax.Array, bool], Value], w: Weight, x: jax.Array, forward_mode: bool) -> Value:
    """`use(w, x, forward_mode)`; what it makes of the factors waits for `x`, and is no residual.

    W0 and the dropout key are frozen, and get no cotangent.
    """
    leaves, treedef = jax.tree.flatten((w.terms, w.gain))
    real = [jnp.issubdtype(a.dtype, jnp.inexact) for a in leaves]
    held = (w.base, w.key, [a for a, r in zip(leaves, real, strict=True) if not r])
    form = w.replace(
        base=None, key=None, terms=(), gain=()
    )  # the form of the expression: the backward pass keeps it, and it must hold no array

    def call(mode: bool) -> Callable[..., Value]:
        def f(held: PyTree, x: jax.Array, factors: list[jax.Array]) -> Value:
            base, key, others = held
            parts = {True: iter(factors), False: iter(others)}
            terms, gain = jax.tree.unflatten(treedef, [next(parts[r]) for r in real])
            return use(form.replace(base=base, key=key, terms=terms, gain=gain), x, mode)

        return f

    factors = [a for a, r in zip(leaves, real, strict=True) if r]
    whole = lambda held: held  # the arrays themselves
    return again(call, whole, forward_mode)(held, x, factors)
