"""What quantising a tree did: which leaves hold codes, which stayed, and how many bytes that is."""

import math
import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jlora import _answers
from jlora._trees import _table, _tree
from jlora._trees._compound import is_compound
from jlora._trees._table import in_bytes
from jlora._types import PyTree, Shaped
from jlora.adapted import is_adapted


def _bytes(leaf: PyTree) -> int:
    """The bytes of a leaf; of a key, those of its data."""
    whole = 0
    for part in jax.tree.leaves(leaf):
        shape, dtype = _tree.shape_dtype(part)
        is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
        whole += math.prod(shape) * (8 if is_key else jnp.dtype(dtype).itemsize)
    return whole


def _dense(leaf: Shaped) -> int:
    """The bytes of a quantised leaf as the array that it stands for."""
    return math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize


def table(params: PyTree) -> str:
    """A quantised tree as text of at most 100 columns: every leaf (repeated layers folded), its shape, how it is held,
    its bytes and its bits a parameter; and what all of it was and is.

    Args:
      params: what `quantize` returned; of an `Adapted` its base.

    Raises:
      TypeError: no tree of parameters.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((128, 64)), "bias": jnp.zeros(64)}}
      >>> print(jlora.quant.table(jlora.quantize(params, "nf4")))
      path          leaves  shape      held as  bytes  bits
      ------------  ------  ---------  -------  -----  ----
      query/bias         1  (64,)      float32    256    32
      query/kernel       1  (128, 64)  nf4      4,608   4.5
      <BLANKLINE>
      1 of 2 leaves in codes: 33 kB are 4.86 kB
    """
    tree = _tree.flatten(params.frozen.base if is_adapted(params) else params)
    _answers.check_params("quant.table", params)
    rows = []
    for path, leaf in zip(tree.paths, tree.leaves, strict=True):
        shape, dtype = _tree.shape_dtype(leaf)
        size = _bytes(leaf)
        held = leaf.describe() if is_compound(leaf) else str(dtype)
        rows.append((path, (shape, held, size, f"{8 * size / max(math.prod(shape), 1):.4g}")))
    folded = [(path, str(n), shape, held, f"{n * b:,}", bits) for path, n, (shape, held, b, bits) in _table.fold(rows)]
    text = _table.render(("path", "leaves", "shape", "held as", "bytes", "bits"), folded, right=(1, 4, 5))
    packed = [leaf for leaf in tree.leaves if is_compound(leaf)]
    now = sum(map(_bytes, tree.leaves))
    before = now + sum(_dense(leaf) - _bytes(leaf) for leaf in packed)
    return f"{text}\n\n{len(packed)} of {len(tree.leaves)} leaves in codes: {in_bytes(before)} are {in_bytes(now)}"


def say(paths: Sequence[str], before: Sequence[PyTree], after: Sequence[PyTree]) -> None:
    """One line on standard error on what became codes and what stayed, the largest of those by name."""
    pairs = list(zip(paths, before, after, strict=True))
    made = [(old, new) for _, old, new in pairs if is_compound(new) and not is_compound(old)]
    stayed = sorted((-_bytes(new), path) for path, _, new in pairs if not is_compound(new))
    held = ", ".join(dict.fromkeys(new.describe() for _, new in made)) or "codes"
    text = f"jlora.quantize: {len(made)} weights as {held}"
    if made:
        text += f", {in_bytes(sum(_dense(new) for _, new in made))} are {in_bytes(sum(_bytes(new) for _, new in made))}"
    if stayed:
        largest = ", ".join(f"{path} {in_bytes(-size)}" for size, path in stayed[:2])
        more = ", ..." if len(stayed) > 2 else ""
        text += f"; {len(stayed)} leaves stay, {in_bytes(-sum(size for size, _ in stayed))} ({largest}{more})"
    print(text, file=sys.stderr)
