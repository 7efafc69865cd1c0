"""The matrices of an `Adapted`: its weights, its updates as factors, and their singular values.

A weight's input axes (a convolution's window among them) are one side, its output axes the other: everything is
`(stack..., in, out)`. Vectors, such as biases, are no matrices and are left out.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jlora import _read
from jlora._algebra._contract import contract
from jlora._algebra._term import Term
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._dtypes import wide
from jlora._plan._sites import Site
from jlora._trees import _tree
from jlora.adapted import Adapted, check_adapted
from jlora.analysis.decompositions import SVD, factored_svd, svd


class Factors(NamedTuple):
    """dW = a^T b with `a (stack..., r, in)` and `b (stack..., r, out)`, both sides flat. Scale and gates are in b."""

    a: jax.Array
    b: jax.Array


def weights(adapted: Adapted) -> dict[str, jax.Array]:
    """The frozen weights under an adapter as matrices: `{path: (stack..., in, out)}`, in at least float32.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((8, 2, 2))}}, jlora.LoRA(rank=2))
      >>> jlora.analysis.weights(adapted)["query/kernel"].shape
      (8, 4)
    """
    leaves = _tree.leaves(check_adapted("analysis.weights", adapted).frozen.base)
    return {s.leaf.path: s.leaf.matrix(leaves[s.index]) for s in adapted.frozen.plan.sites if _is_matrix(s)}


def factors(adapted: Adapted) -> dict[str, Factors]:
    """The updates that are low-rank products, as two factors: `{path: (a, b)}`.

    Read off the equations: what carries the rank and the input side is a, the rest is b. Several products on one
    weight (`Sum`, slices) stand below each other, LoHa's two have the rank r^2. For LoRA a is the stored factor.
    Updates that no rank letter joins (`Full`, KronA, gains, rotations) are left out.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2, alpha=4))
      >>> a, b = jlora.analysis.factors(adapted)["query/kernel"]
      >>> a.shape, b.shape
      ((2, 6), (2, 4))
    """
    made = ((site.leaf.path, factored(site, weight)) for site, weight in _matrices("analysis.factors", adapted))
    return {path: pair for path, pair in made if pair is not None}


def updates(adapted: Adapted) -> dict[str, SVD]:
    """The singular value decomposition of every update: `{path: SVD}`.

    dW is what merging adds to W0. Where it is a product of factors, it is never made: two QR decompositions and the
    SVD of a matrix of the rank's size (`factored_svd`). Other updates are made dense.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> adapted.trainable["query/kernel"] |= {"a": jnp.eye(2, 6), "b": 3 * jnp.eye(2, 4)}
      >>> jlora.analysis.updates(adapted)["query/kernel"].s
      Array([3., 3.], dtype=float32)
    """
    found = {}
    for site, weight in _matrices("analysis.updates", adapted):
        pair = factored(site, weight)
        found[site.leaf.path] = svd(site.leaf.matrix(weight.delta())) if pair is None else factored_svd(*pair)
    return found


def _is_matrix(site: Site) -> bool:
    return bool(site.leaf.axes("ik")) and bool(site.leaf.axes("o"))


def _matrices(caller: str, adapted: Adapted) -> Iterator[tuple[Site, Weight]]:
    every = _read.expressions(check_adapted(caller, adapted), _tree.leaves(adapted.frozen.base))
    return ((s, w) for s, w in zip(adapted.frozen.plan.sites, every, strict=True) if _is_matrix(s))


def factored(site: Site, weight: Weight) -> Factors | None:
    """The products of a weight as one pair, None where one of them is no low-rank product."""
    alone = weight.plain and not weight.gain and not weight.rows
    pairs = [_pair(site, weight, term) for term in weight.terms] if alone else []
    if not pairs or any(pair is None for pair in pairs):
        return None
    a, b = (jnp.concatenate(parts, -2) for parts in zip(*filter(None, pairs), strict=True))
    return Factors(a, b)


def side_labels(blocks: Sequence[tuple[Labels, Labels]], roles: str) -> Labels | None:
    """The labels that make a side, in the kernel's order; None where a block makes axes of two sides."""
    number = lambda atom: int("".join(c for c in atom if c.isdigit()))
    mine = [(atoms, made) for atoms, made in blocks if any(a[0] in roles for a in atoms)]
    if not all(a[0] in roles for atoms, _ in mine for a in atoms):
        return None
    return tuple(x for _, made in sorted(mine, key=lambda block: number(block[0][0])) for x in made)


def _pair(site: Site, weight: Weight, term: Term) -> Factors | None:
    """One product as factors `(stack..., r, side)`: operands of the input side, and all others."""
    stack = tuple(a for a in weight.atoms if a[0] == "s")
    ins, outs = side_labels(term.blocks, "ik"), side_labels(term.blocks, "o")
    if not ins or not outs or any(o.is_base for o in term.operands):
        return None
    values, labels = weight.operands(term)
    first = [n for n, ls in enumerate(labels) if set(ls) & set(ins)]
    second = [n for n in range(len(labels)) if n not in first]
    held = lambda places: {x for n in places for x in labels[n]}
    if held(first) & set(outs) or not set(ins) <= held(first) or not set(outs) <= held(second):
        return None
    inner = tuple(x for x in dict.fromkeys(x for ls in labels for x in ls) if x not in {*ins, *outs, *stack})
    sizes = dict(weight.size) | {
        x: n for v, ls in zip(values, labels, strict=True) for x, n in zip(ls, v.shape, strict=True)
    }
    rank = math.prod(sizes[x] for x in inner)

    def flat(places: list[int], side: Labels) -> jax.Array:
        dtype = wide(weight.dtype)
        mine = held(places)
        kept = tuple(x for x in (*stack, *inner, *side) if x in mine)
        parts = [values[n].astype(dtype) for n in places]
        made = contract(parts, [labels[n] for n in places], kept, precision=lax.Precision.HIGHEST)
        whole = (*stack, *inner, *side)
        made = made.reshape([sizes[x] if x in mine else 1 for x in whole])
        made = jnp.broadcast_to(made, [sizes[x] for x in whole])
        return made.reshape(*site.leaf.stack, rank, math.prod(sizes[x] for x in side))

    return Factors(flat(first, ins), flat(second, outs))
