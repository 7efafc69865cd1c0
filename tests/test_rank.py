"""Who gets which rank: AdaLoRA's orthogonality penalty against closed forms in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
from jlora.rank import orthogonality
from methods import away_from_start

pytestmark = pytest.mark.settled


def params():
    draw = lambda seed, *shape: jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)
    return {
        "dense": {"kernel": draw(1, 6, 5)},
        "layers": {"kernel": draw(2, 3, 6, 5)},
        "query": {"kernel": draw(3, 8, 2, 4)},
    }


SPEC = jlora.AdaLoRA(rank=3, target="kernel")
STACKS = {"layers/kernel": 1}


@functools.cache
def away():
    adapted = jlora.adapt(params(), SPEC)
    return jlora.join(away_from_start(adapted.trainable), adapted.frozen)


def norms(adapted):
    """||x x^T - I||_F of every matrix, layer by layer."""
    found = []
    for group, factors in adapted.trainable.items():
        for name in "pq":
            x = np.asarray(factors[name], np.float64)
            for layer in x if group in STACKS else [x]:
                layer = layer.reshape(len(layer), -1)
                found.append(np.linalg.norm(layer @ layer.T - np.eye(len(layer))))
    return np.array(found)


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_orthogonality_is_the_formula(form):
    """The penalty is the sum of squares, or the mean of norms, of p p^T - I and q q^T - I over every layer."""
    adapted = away()
    found = norms(adapted)
    assert len(found) == 2 * (1 + 3 + 1)
    want = np.sum(found**2) if form == "paper" else np.mean(found)
    np.testing.assert_allclose(jax.jit(orthogonality, static_argnums=1)(adapted, form), want, rtol=1e-5)


def test_the_size_at_the_start():
    """N(0, 0.02^2) on d inputs: about |0.0004 d - 1| sqrt(r)."""
    adapted = jlora.adapt({"kernel": jnp.ones((768, 768))}, jlora.AdaLoRA(rank=8, target="kernel"))
    assert abs(float(orthogonality(adapted, "reference")) - abs(0.0004 * 768 - 1) * 8**0.5) < 0.05


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_gradients_by_finite_differences(form):
    """Its gradient is the slope of it, and the diagonal, which is no part of it, has none."""
    adapted = away()
    penalty = lambda t: orthogonality(jlora.join(t, adapted.frozen), form)
    penalty = jax.jit(penalty)
    grads = jax.jit(jax.grad(penalty))(adapted.trainable)
    direction = away_from_start(jax.tree.map(jnp.negative, adapted.trainable), 1.0)
    slope = sum(float(jnp.vdot(g, d)) for g, d in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
    h = 1e-2
    at = lambda h: float(penalty(jax.tree.map(lambda x, d: x + h * d, adapted.trainable, direction)))
    np.testing.assert_allclose((at(h) - at(-h)) / (2 * h), slope, rtol=1e-2)
    assert not np.any(grads["dense/kernel"]["lam"])


@pytest.mark.parametrize("form", ["paper", "reference"])
def test_gradients_at_exact_orthogonality_are_zero(form):
    """A norm's own gradient is NaN there; one matrix that is orthonormal leaves the others' gradients alone."""
    adapted = away()
    trainable = {g: dict(fs) for g, fs in adapted.trainable.items()}
    trainable["dense/kernel"] |= {"p": jnp.eye(3, 6), "q": jnp.eye(3, 5)}
    trainable["layers/kernel"]["p"] = trainable["layers/kernel"]["p"].at[1].set(jnp.eye(3, 6))
    value, grads = jax.value_and_grad(lambda t: orthogonality(jlora.join(t, adapted.frozen), form))(trainable)
    assert np.isfinite(value) and all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert not np.any(grads["dense/kernel"]["p"]) and not np.any(grads["dense/kernel"]["q"])
    layers = grads["layers/kernel"]["p"]
    assert not np.any(layers[1]) and np.any(layers[0]) and np.any(layers[2])


def test_only_weights_with_a_diagonal_take_part():
    """LoRA and whole leaves beside AdaLoRA add nothing to the penalty, and DoRA around it changes nothing."""
    alone = jlora.adapt(params(), jlora.AdaLoRA(rank=3, target="dense"))
    mixed = [jlora.AdaLoRA(rank=3, target="dense"), jlora.LoRA(rank=2, target="query"), jlora.Full(target="layers")]
    adapted = jlora.adapt(params(), mixed)
    assert float(orthogonality(adapted)) == float(orthogonality(alone))
    inner = jlora.adapt(params(), jlora.DoRA(jlora.AdaLoRA(rank=3, target="dense")))
    assert float(orthogonality(inner)) == float(orthogonality(alone))


def test_bfloat16_factors_are_summed_in_float32():
    """Half-precision factors lose nothing more in the penalty: products and sums are in float32."""
    adapted = away()
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapted.trainable)
    got = orthogonality(jlora.join(half, adapted.frozen))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, np.sum(norms(jlora.join(half, adapted.frozen)) ** 2), rtol=1e-5)


def test_mistakes_are_refused_in_words():
    """An unknown form, what is no adapter, and methods without a diagonal are refused, never penalised by nothing."""
    adapted = away()
    with pytest.raises(ValueError, match="form='squared'.*'paper', 'reference' or 'norms'"):
        orthogonality(adapted, "squared")
    with pytest.raises(TypeError, match="takes an Adapted.*dict"):
        orthogonality(adapted.trainable)
    for method in (jlora.LoRA(rank=2), jlora.TiedLoRA(rank=2), jlora.VeRA(rank=2), jlora.Full(target="dense")):
        with pytest.raises(ValueError, match=r"no update p diag\(lam\) q under .*jlora.AdaLoRA"):
            orthogonality(jlora.adapt(params(), method))
