"""The fingerprint of a base: paths, shapes, dtypes, and a digest of some values of every leaf."""

import hashlib
import itertools
import math
from collections.abc import Hashable, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from jlora._trees import _tree
from jlora._trees._compound import is_compound, sound
from jlora._types import PyTree, Shape
from jlora.io._record import several

SAMPLES = 1024

Row: TypeAlias = tuple[str, Shape, str, str | None]
"""Path, shape, dtype, and a digest of some values, where a leaf has any."""


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A step for each axis that leaves at most 1,024 elements, as evenly over the axes as can be.

    A step through the flattened array would be simpler, but where a row's length divides it, it sees one column;
    and it gathers an array that is sharded.
    """
    counts = list(shape)
    while math.prod(counts) > SAMPLES:
        longest = counts.index(max(counts))
        counts[longest] = -(-counts[longest] // 2)
    return tuple(-(-n // m) if m else 1 for n, m in zip(shape, counts, strict=True))


def _sample(arrays: list[jax.Array], starts: tuple[Shape, ...], steps: tuple[Shape, ...]) -> list[jax.Array]:
    return [
        x[tuple(slice(a, None, s) for a, s in zip(*cut, strict=True))]
        for x, *cut in zip(arrays, starts, steps, strict=True)
    ]


_sample_jit = jax.jit(_sample, static_argnums=(1, 2))


def samples(leaves: Sequence[PyTree]) -> list[np.ndarray | None]:
    """At most 1,024 strided elements of each leaf, None where there are no values to read.

    One jitted program a device: each shard is sliced where it lies, so nothing is gathered, whatever the mesh.
    """
    out: list[np.ndarray | None] = [None] * len(leaves)
    pieces: dict[Hashable, list[tuple[int, jax.Array, Shape, Shape]]] = {}
    for n, leaf in enumerate(leaves):
        if not _has_values(leaf):
            continue
        steps = _strides(np.shape(leaf))
        cut = tuple(slice(None, None, s) for s in steps)
        if not isinstance(leaf, jax.Array):
            out[n] = np.asarray(leaf)[cut]
            continue
        out[n] = np.empty([-(-k // s) for k, s in zip(leaf.shape, steps, strict=True)], leaf.dtype)
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0 and shard.data.size:
                first = tuple(i.start or 0 for i in shard.index)
                pieces.setdefault(shard.device, []).append((n, shard.data, first, steps))
    if not pieces:
        return out
    nowhere = jax.sharding.Mesh(np.empty((), dtype=object), ())
    with jax.set_mesh(nowhere):  # if the caller has set a mesh, JAX refuses arrays of one device
        for group in pieces.values():
            numbers, arrays, firsts, steps = zip(*group, strict=True)
            local = tuple(tuple(-a % s for a, s in zip(*pair, strict=True)) for pair in zip(firsts, steps, strict=True))
            found = jax.device_get(_sample_jit(list(arrays), local, steps))
            for n, first, step, value in zip(numbers, firsts, steps, found, strict=True):
                at = [-(-a // s) for a, s in zip(first, step, strict=True)]
                place = tuple(slice(a, a + k) for a, k in zip(at, value.shape, strict=True))
                target = out[n]
                assert target is not None
                target[place] = value
    return out


def _has_values(leaf: object) -> bool:
    if isinstance(leaf, Tracer):
        return False
    if isinstance(leaf, jax.Array):  # a PRNG key is no weight: two runs of one model differ in it
        return not jnp.issubdtype(leaf.dtype, jax.dtypes.extended)
    return isinstance(leaf, (np.ndarray, np.generic, bool, int, float, complex))


def fingerprint(params: PyTree, tree: _tree.Named) -> list[Row]:
    """The row of every leaf. The state of random streams has no digest."""
    sound(zip(tree.paths, tree.leaves, strict=True))
    is_stream = lambda x: isinstance(x, nnx.RngState)  # noqa: E731
    boxes = [x for x in jax.tree.leaves(params, is_leaf=is_stream) if is_stream(x)]
    streams = {id(x) for box in boxes for x in jax.tree.leaves(box)}
    # of a quantised leaf all arrays count: two weights that differ by a factor have the same codes, and other scales
    known = [jax.tree.leaves(x) if is_compound(x) else [x] for x in tree.leaves]
    values = iter(samples([None if id(x) in streams else x for x in itertools.chain.from_iterable(known)]))
    rows = []
    for path, leaf, arrays in zip(tree.paths, tree.leaves, known, strict=True):
        shape, dtype = _tree.shape_dtype(leaf)
        dtype = f"{leaf.describe()} of {dtype}" if is_compound(leaf) else dtype
        mine = [next(values) for _ in arrays]
        digest = None if any(x is None for x in mine) else ":".join(_digest(x) for x in mine if x is not None)
        rows.append((path, shape, str(dtype), digest))
    return rows


def _digest(values: np.ndarray) -> str:
    return hashlib.sha256(values.tobytes()).hexdigest()[:32]


def _differ(old: str | None, new: str | None) -> bool:
    """Whether two digests are of other values. Files of the first version have that of the codes alone."""
    pairs = zip(old.split(":"), new.split(":"), strict=False) if old and new else ()
    return any(a != b for a, b in pairs)


def compare(saved: Sequence[Row], here: Sequence[Row], check: str, where: str) -> None:
    """ValueError where the base an adapter was trained on is not the one at hand, by `check`'s standard."""
    was = {path: (tuple(shape), dtype, digest) for path, shape, dtype, digest in saved}
    now = {path: (tuple(shape), dtype, digest) for path, shape, dtype, digest in here}
    shape_of = [f"{p!r} is not in params" for p in was if p not in now]
    shape_of += [f"{p!r} is in params alone" for p in now if p not in was]
    value_of = []
    for path in (p for p in was if p in now):
        (old, old_dtype, old_digest), (new, new_dtype, new_digest) = was[path], now[path]
        if old != new:
            shape_of.append(f"{path!r} has shape {new}, was {old}")
        elif old_dtype != new_dtype:
            value_of.append(f"{path!r} has dtype {new_dtype}, was {old_dtype}")
        elif _differ(old_digest, new_digest):
            value_of.append(f"{path!r} has other values")
    bad = shape_of + (value_of if check == "values" else [])
    if bad:
        way = (
            "check='none' asks for no more than that the adapted weights fit"
            if shape_of
            else "check='shapes' asks for equal paths and shapes alone"
        )
        moved = (
            ""
            if shape_of
            else "; if it began with this one, an optimizer has moved it: tx.init(adapted) without jlora.masked(tx)"
        )
        raise ValueError(f"{where} was trained on another base ({way}){moved}:" + several(bad))
