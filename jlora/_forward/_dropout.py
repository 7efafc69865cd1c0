"""What one use of an adapted weight draws: a mask on the activation, on ranks, on a whole product.

A draw depends on the key, the weight's path, its layer, and the number of the use in the order of the program; on
nothing else, so that `jit`, `remat` and the unrolling of a loop change no bit of it.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.typing import ArrayLike

from jlora._algebra._mesh import explicit_mesh, varying
from jlora._algebra._term import Drop, Operand, Term
from jlora._algebra._weight import Weight
from jlora._algebra._words import Labels
from jlora._types import Key

X = TypeVar("X", jax.Array, None)


def each(f: Callable[[Key], jax.Array], keys: Key) -> jax.Array:
    """`f` of every key of a stack."""
    for _ in range(keys.ndim):
        f = jax.vmap(f)
    return f(keys)


def fold_keys(keys: jax.Array, data: ArrayLike) -> jax.Array:
    """`fold_in` for a stack of keys."""
    return each(lambda key: jax.random.fold_in(key, data), keys)


def dropped(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """An activation with elements dropped at a rate, the rest divided by 1 - rate; the mask lives where it does."""
    for axis in sorted(varying(x) - varying(key)):  # inside `shard_map`: each shard draws a mask of its own
        key = jax.random.fold_in(key, lax.axis_index(axis))
    meshed = explicit_mesh([x]) is not None
    if not isinstance(x, Tracer) and jax.sharding.get_abstract_mesh().empty:
        meshed = False  # outside of jit an array that is on no mesh follows the others
    keep = jax.random.bernoulli(key, 1 - rate, x.shape, out_sharding=jax.typeof(x).sharding if meshed else None)
    kept = x / (1 - rate)
    return jnp.where(
        keep, kept, jnp.zeros_like(kept)
    )  # zeros like `kept`: under an explicit mesh a new constant lives nowhere in particular


def thinned(w: Weight, term: Term, x: X) -> tuple[X, Term]:
    """An activation and a product as this use meets them; neither changes without a key.

    Dropped ranks and products are zeros in a gate, one more operand: so they need no word in any contraction. Each
    layer of a stack has gates of its own. A mask on the activation tells layers and experts apart itself: it is drawn
    from the first key of the stack.
    """
    drop = term.dropout
    if w.key is None or not drop:
        return x, term
    keys = fold_keys(w.key, drop.stream)
    gate = lambda n, rate, shape: each(
        lambda key: jnp.where(jax.random.bernoulli(jax.random.fold_in(key, n), 1 - rate, shape), 1 / (1 - rate), 0.0),
        keys,
    )
    sizes = term.sizes() if drop.letters else {}
    gates: list[tuple[Labels, jax.Array]] = [
        ((letter,), gate(n + 2, rate, (sizes[letter],))) for n, (letter, rate) in enumerate(drop.letters)
    ]
    if drop.module:
        gates.append(((), gate(1, drop.module, ())))
    more = tuple(Operand((value,), None, (), w.key_labels + labels) for labels, value in gates)
    if drop.rate and x is not None:
        x = dropped(x, drop.rate, fold_keys(keys.reshape(-1)[0], 0))
    return x, dataclasses.replace(term, operands=(*term.operands, *more), dropout=Drop())
