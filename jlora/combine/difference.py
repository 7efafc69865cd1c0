"""How far two adapters of one base are from each other."""

from typing import NamedTuple

import jax.numpy as jnp

from jlora import _read
from jlora.adapted import Adapted
from jlora.combine._parts import parts


class Difference(NamedTuple):
    """Of one weight: the norms of both updates, that of their difference, and the cosine between them.

    All norms are Frobenius norms over all layers of a stack. The cosine is 0 where an update is zero.
    """

    first: float
    second: float
    apart: float
    cosine: float


def diff(first: Adapted, second: Adapted) -> dict[str, Difference]:
    """`{path: Difference}` of every weight that one of the two adapts, for any methods that merge.

    Raises:
      TypeError: no `Adapted`.
      ValueError: unlike bases; factors without values; a table with new rows.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> one = jlora.adapt({"query": {"kernel": jnp.zeros((2, 2))}}, jlora.Full(target="query"))
      >>> one.trainable["query/kernel"] |= {"delta": jnp.array([[3.0, 0.0], [0.0, 4.0]])}
      >>> jlora.combine.diff(one, jlora.scale(one, 2))["query/kernel"]
      Difference(first=5.0, second=10.0, apart=5.0, cosine=1.0)
    """
    found: dict[str, Difference] = {}
    both = parts("diff", [first, second], None)
    for adapted in (first, second):
        _read.check_mergeable("combine.diff", adapted)
    for path, ours in both.items():
        if any(put.new for part in ours for put in part.weight.rows):
            raise ValueError(f"combine.diff: {path!r} has new rows, which the base's table has not")
        changes = {part.adapter: part.change.reshape(-1) for part in ours}
        a, b = (changes.get(n, jnp.zeros(1)) for n in (0, 1))
        norm = lambda x: float(jnp.linalg.norm(x))
        lengths = norm(a) * norm(b)
        found[path] = Difference(norm(a), norm(b), norm(a - b), float(jnp.vdot(a, b)) / lengths if lengths else 0.0)
    return found
