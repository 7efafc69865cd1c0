"""A lifted model leaves through `jax.export`: open sizes, its adapter as an argument; and Flax stores adapters."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jlora
from methods import METHODS, assert_close, away_from_start, each_row

ROLES = {"embedding": "io", "dense": "io", "stack": "sio", "heads": "ioo"}


def weights():
    draw = lambda n, *shape: jnp.asarray(np.random.default_rng(n).standard_normal(shape), jnp.float32)
    return {
        "embedding": {"embedding": draw(0, 9, 8)},
        "dense": {"kernel": draw(1, 8, 8)},
        "stack": {"kernel": draw(2, 2, 8, 8)},
        "heads": {"kernel": draw(3, 8, 2, 4)},
    }


def model(params, ids):
    """A lookup, a dot, a scan, a dot into heads, and the tied table as a head."""
    x = params["embedding"]["embedding"][ids]
    x = jnp.tanh(x @ params["dense"]["kernel"])
    x = lax.scan(lambda c, w: (jnp.tanh(c @ w), None), x, params["stack"]["kernel"])[0]
    x = jnp.einsum("btd,dhk->bthk", x, params["heads"]["kernel"]).reshape(x.shape)
    return x @ params["embedding"]["embedding"].T


MATRICES = [row for row in METHODS if row.on != "vectors" and not row.models]


@pytest.mark.parametrize("row", each_row(MATRICES))
def test_symbolic_sizes(row):
    """Exported with batch and length open, values and gradients are those of the lifted model at any size."""
    adapted = jlora.adapt(weights(), row.spec("kernel|embedding"), axes=ROLES)
    trainable, frozen = away_from_start(adapted.trainable), adapted.frozen

    def step(trainable, ids):
        loss = lambda t: jnp.sum(jlora.lift(model)(jlora.join(t, frozen), ids) ** 2)
        return jax.value_and_grad(loss)(trainable)

    open_ids = jax.ShapeDtypeStruct(export.symbolic_shape("b, t"), jnp.int32)
    exported = export.export(jax.jit(step))(trainable, open_ids)
    ids = jnp.arange(8).reshape(2, 4)
    assert_close(exported.call(trainable, ids), step(trainable, ids))


def adapters():
    plain = {"query": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
    spec = [jlora.DoRA(jlora.LoRA(rank=2, alpha=3, target="kernel")), jlora.BitFit()]
    one = jlora.adapt(plain, spec)
    return {
        "adapter": jlora.join(away_from_start(one.trainable), one.frozen),
        "quantised base": jlora.adapt(jlora.quantize(plain, "nf4", target="kernel"), jlora.LoRA(rank=2)),
        "quantised tree": jlora.quantize(plain, "int4+double", target="kernel"),
    }


apply = jlora.lift(lambda params, x: x @ params["query"]["kernel"] + params["query"]["bias"])


@pytest.mark.parametrize("name", ("adapter", "quantised base", "quantised tree"))
def test_adapter_as_an_argument(name):
    """What was exported and read back takes the adapter as an argument, and computes the same."""
    held, x = adapters()[name], jnp.ones((3, 64))
    read = export.deserialize(export.export(jax.jit(apply))(held, x).serialize())
    np.testing.assert_array_equal(read.call(held, x), jax.jit(apply)(held, x))


@pytest.mark.parametrize("name", ("adapter", "quantised base", "quantised tree"))
def test_flax_serialization(name):
    """Flax's bytes hold every array of an adapter and of its base; read into one of the same form, each bit is back."""
    held = adapters()[name]
    blank = jax.tree.map(jnp.zeros_like, held)
    back = flax.serialization.from_bytes(blank, flax.serialization.to_bytes(held))
    assert jax.tree.structure(back) == jax.tree.structure(held)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(held), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype
