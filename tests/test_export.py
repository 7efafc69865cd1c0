"""A lifted model leaves through `jax.export` with sizes left open."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jlora
from methods import METHODS, alone, assert_close, moved

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


@pytest.mark.parametrize("row", alone(MATRICES))
def test_symbolic_sizes(row):
    """Exported with batch and length open, values and gradients are those of the lifted model at any size."""
    adapted = jlora.adapt(weights(), row.spec("kernel|embedding"), axes=ROLES)
    trainable, frozen = moved(adapted.trainable), adapted.frozen

    def step(trainable, ids):
        loss = lambda t: jnp.sum(jlora.lift(model)(jlora.join(t, frozen), ids) ** 2)
        return jax.value_and_grad(loss)(trainable)

    open_ids = jax.ShapeDtypeStruct(export.symbolic_shape("b, t"), jnp.int32)
    exported = export.export(jax.jit(step))(trainable, open_ids)
    ids = jnp.arange(8).reshape(2, 4)
    assert_close(exported.call(trainable, ids), step(trainable, ids))
