"""The zoo itself: every case builds, runs, has finite gradients, and names the weights it means."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import zoo
from methods import SMALL, marks


def names(path) -> str:
    """A path of the user's names: steps into boxes (`.value`) are no part of it."""
    return "/".join(
        str(getattr(step, "key", getattr(step, "idx", getattr(step, "name", None))))
        for i, step in enumerate(path)
        if not (i == len(path) - 1 and str(step) == ".value")
    )


def leaves(params) -> dict:
    return {names(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}


def trainable(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def value_and_grad(call, params):
    """Outputs, and gradients over the floating-point leaves, in one program."""
    flat, treedef = jax.tree.flatten(params)
    floats = {str(i): leaf for i, leaf in enumerate(flat) if trainable(leaf)}

    def of(floats):
        outputs = call(treedef.unflatten(floats.get(str(i), leaf) for i, leaf in enumerate(flat)))
        return zoo.loss(outputs), zoo.arrays(outputs)

    (_, outputs), grads = jax.jit(jax.value_and_grad(of, has_aux=True))(floats)
    return outputs, [grads[i] for i in floats]


def finite(arrays) -> bool:
    return all(np.isfinite(np.asarray(x, np.float32)).all() for x in arrays if trainable(x))


@pytest.mark.parametrize("case", [pytest.param(c, id=c.name, marks=marks(c, c.name in SMALL)) for c in zoo.CASES])
def test_case(case):
    """A case's patterns and axes are those of its weights, and its targets have finite gradients, each not all zero."""
    fn, params, args = case.build()
    paths = leaves(params)
    chosen = [path for path in paths if re.search(case.target, path)]
    assert chosen, f"{case.target!r} matches none of {list(paths)}"
    assert len(paths) == len(jax.tree.leaves(params)), "two leaves under one path"
    for pattern in case.dense_ok:
        assert any(re.search(pattern, path) for path in chosen), pattern
    for path in chosen:
        ndim = paths[path].ndim
        matching = [v for k, v in (case.axes or {}).items() if re.search(k, path)]
        assert (ndim - "".join(matching).count("s") < 2) == case.vectors, (path, paths[path].shape)
        assert len(matching) <= 1, (path, matching)
        assert all(len(letters) == ndim for letters in matching), (path, paths[path].shape)
        assert matching or ndim in (1, 2, 4) or case.vectors, (path, paths[path].shape)

    def call(params):
        return fn(params, *args, **case.kwargs)

    if not case.differentiable:
        assert finite(jax.jit(lambda params: zoo.arrays(call(params)))(params))
        return
    outputs, grads = value_and_grad(call, params)
    assert outputs and finite(outputs) and finite(grads)
    floats = [path for path in paths if trainable(paths[path])]
    dead = [path for path, grad in zip(floats, grads, strict=True) if not np.any(grad)]
    assert not set(dead) & set(chosen), f"no gradient reaches {set(dead) & set(chosen)}"


@pytest.mark.slow
@pytest.mark.parametrize("case", [case.param for case in zoo.CASES if not case.marks])
def test_building_twice_gives_the_same_values(case):
    """A case is a function of nothing: two builds have the same floating-point parameters, bit for bit."""
    for a, b in zip(*(jax.tree.leaves(case.build()[1]) for _ in range(2)), strict=True):
        assert not trainable(a) or np.array_equal(a, b)
