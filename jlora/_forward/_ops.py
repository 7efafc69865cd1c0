"""What every way of meeting an activation has in common (`_dot` has dots, `_conv` convolutions and ragged dots,
`_rows` rows of tables).

Each of them takes the operation's own parameters and returns the result, or `Refusal` with a reason where labels
cannot say it; the weight is then made dense. None of them knows what a jaxpr is.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra._mesh import varying
from jlora._algebra._rows import Refusal as Refusal
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._forward._rule import Dot, Product, Written, rule
from jlora._types import Precision, Shaped


@dataclasses.dataclass(frozen=True)
class Spent:
    """What a contraction cost: its plan in words, FLOPs of the delta as planned and of the dense dot."""

    plan: str
    flops: float
    dense_flops: float


Note = Callable[[Spent], None]


def is_vector(w: Weight) -> bool:
    """Whether there is nothing to contract but a single axis: made dense, it costs nothing."""
    if w.positional:
        return False
    return sum(not a.startswith("s") for a in w.atoms) <= 1 or not any(a[0] in "ik" for a in w.atoms)


def is_dense_delta(w: Weight) -> bool:
    """Whether every product is already a matrix in the weight's own axes: adding it to W0 is all there is to do."""
    return (
        w.plain
        and bool(w.terms)
        and not w.gain
        and all(sum(bool(o.labels) for o in t.operands) == 1 and all(t.simple(a) for a in w.atoms) for t in w.terms)
    )


def label_sizes(w: Weight, values: Sequence[jax.Array], labels: Sequence[Labels]) -> dict[str, int]:
    sizes = dict(w.size)
    for a, ls in zip(values, labels, strict=True):
        sizes.update(zip(ls, a.shape, strict=True))
    return sizes


def check_real(x: Shaped) -> None:
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise Refusal(f"an activation of dtype {x.dtype}")


def same_varying(arrays: Sequence[jax.Array]) -> list[jax.Array]:
    """Inside shard_map: every array made varying over the mesh axes that any of them varies over."""
    axes = [varying(a) for a in arrays]
    union = frozenset().union(*axes)
    return [
        a if v == union else lax.pcast(a, tuple(sorted(union - v)), to="varying")
        for a, v in zip(arrays, axes, strict=True)
    ]


def product(
    x: jax.Array,
    x_labels: Labels,
    operands: Sequence[jax.Array],
    labels: Sequence[Labels],
    out: Labels,
    forward_mode: bool,
    precision: Precision = None,
) -> jax.Array:
    """`contract` of an activation with factors, under the custom rule."""
    sizes = {
        n: s for a, ls in ((x, x_labels), *zip(operands, labels, strict=True)) for n, s in zip(ls, a.shape, strict=True)
    }
    shape = tuple(sizes[n] for n in out)
    p = Product(tuple(x_labels), x.shape, tuple(out), shape, tuple(map(tuple, labels)), (), ((), (), ()))
    made = Dot(tuple(x_labels), None, tuple(out), (p,), Written(precision=precision), x.dtype, merged=False)
    x, *operands = same_varying([x, *operands])
    return rule(made, forward_mode)((x,), None, tuple(operands))
