"""The form of a case, and the few helpers all families use."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

Build = tuple[Callable[..., Any], Any, tuple]


@dataclasses.dataclass(frozen=True, eq=False)
class Case:
    """A tiny model, and what the laws may ask of it.

    `build()` returns `(fn, params, args)`; the model is called `fn(params, *args, **kwargs)`.
    Nothing is built before it is called, and two calls return equal values.
    """

    name: str
    build: Callable[[], Build]
    target: str
    """A regular expression, searched in paths of the user's names, for the weights to adapt."""
    axes: Mapping[str, str] | None = None
    """`{pattern: letters}`, one letter an axis: `i`n, `o`ut, `s`tack, `k` a convolution's window.

    Given wherever a name and a rank do not tell the layout: all but (in, out) matrices,
    (rows, columns) embeddings and two-dimensional convolutions.
    """
    dense_ok: tuple[str, ...] = ()
    """Paths that may be made dense by the design: vectors, and uses that no rule can follow."""
    vectors: bool = False
    """The target is vectors or scalars: for methods that train those, not for low-rank ones."""
    differentiable: bool = True
    """False where JAX itself refuses reverse mode: a `while_loop` whose turns depend on data."""
    dtype: str = "float32"
    """`bfloat16` where the model computes in it, for the tolerance."""
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Keyword arguments of the call; the model has defaults for them."""
    marks: tuple = ()

    def __repr__(self) -> str:
        return f"Case({self.name})"

    @property
    def param(self):
        """The case as a row of `pytest.mark.parametrize`."""
        return pytest.param(self, id=self.name, marks=self.marks)


def registry(family: str):
    """A list of cases, and the decorator that turns a `build` function into one of them."""
    cases: list[Case] = []

    def case(target: str, **options):
        def register(build):
            cases.append(Case(f"{family}/{build.__name__}", build, target, **options))
            return build

        return register

    return cases, case


def normal(seed: int, *shape: int, scale: float = 1.0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def integers(seed: int, *shape: int, below: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(below, size=shape), jnp.int32)


def fill(tree):
    """Values for a tree of shapes: made by NumPy, as compiling an initialiser takes seconds."""

    def value(seed: int, path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.inexact):
            return leaf
        at_one = re.search(r"scale|var|norm.*weight", jax.tree_util.keystr(path)) is not None
        return normal(seed, *leaf.shape, scale=0.1 if at_one else 0.3, dtype=leaf.dtype) + at_one

    paths, treedef = jax.tree_util.tree_flatten_with_path(tree)
    return treedef.unflatten(value(seed, *pair) for seed, pair in enumerate(paths))


def loss(outputs) -> jax.Array:
    """A scalar of all floating-point outputs, in which no two elements play the same part."""
    total = jnp.zeros(())
    for leaf in jax.tree.leaves(outputs):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.inexact):
            flat = leaf.astype(jnp.float32).ravel()
            total += jnp.mean(jnp.sin(flat + jnp.arange(flat.size)) + 0.1 * flat)
    return total


def arrays(outputs) -> list[jax.Array]:
    """The outputs that are arrays: strings, None and flags cannot leave a `jit`."""
    return [leaf for leaf in jax.tree.leaves(outputs) if isinstance(leaf, jax.Array)]
