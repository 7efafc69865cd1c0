"""What a method computes from its factors is there for one layer at a time, whatever the number of layers."""

import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora._algebra._term import Drop, Operand, Term
from jlora._algebra._weight import Weight
from jlora._forward._anew import bulky

WIDTH = 96

METHODS = {
    "fastfood": jlora.IntrinsicDimension(8, projection="fastfood", target="kernel"),
    "sparse": jlora.IntrinsicDimension(8, projection="sparse", target="kernel"),
    "dense": jlora.IntrinsicDimension(8, projection="dense", target="kernel"),
    "VeRA": jlora.VeRA(rank=128, target="kernel"),
    "RandLoRA": jlora.RandLoRA(rank=8, target="kernel"),
    "OFT": jlora.OFT(block=24, target="kernel"),
    "HiRA": jlora.HiRA(rank=2, target="kernel"),
}


def temporaries(method, layers, rows):
    """Temporary memory of one gradient step of unrolled layers, in dense layers."""
    params = {f"l{n}": {"kernel": jnp.full((WIDTH, WIDTH), 0.01 * (n + 1))} for n in range(layers)}
    adapted = jlora.adapt(params, method)

    def model(params, x):
        for n in range(layers):
            x = jnp.tanh(x @ params[f"l{n}"]["kernel"])
        return x

    def step(trainable, frozen, x):
        loss = lambda t: jnp.sum(jlora.lift(model)(jlora.join(t, frozen), x) ** 2)
        return jax.grad(loss)(trainable)

    x = jax.ShapeDtypeStruct((rows, WIDTH), jnp.float32)
    compiled = jax.jit(step).lower(adapted.trainable, adapted.frozen, x).compile()
    return compiled.memory_analysis().temp_size_in_bytes / (4 * WIDTH * WIDTH)


SLOW = ("fastfood", "sparse", "dense")


@pytest.mark.parametrize(
    "method",
    [pytest.param(m, id=n, marks=(pytest.mark.slow,) if n in SLOW else ()) for n, m in METHODS.items()],
)
def test_what_is_made_of_factors_does_not_pile_up_over_layers(method):
    """With few rows, three layers more take less than a tenth of a dense layer each: their activations."""
    assert temporaries(method, 5, 4) - temporaries(method, 2, 4) < 3 * 0.1


@pytest.mark.parametrize("shape", [(64, 4), (4, 64)], ids=["in", "out"])
@pytest.mark.parametrize("size", [64, 192])
def test_wide_sides_of_a_product_are_made_anew(shape, size):
    """Two sides of rank 2, of 136 elements, exceed a small activation, whichever side of the weight is wide."""
    names, x = ("i0", "o1"), jax.ShapeDtypeStruct((size // shape[0], shape[0]), jnp.float32)
    a, d, b, g = jnp.ones((2, shape[0])), jnp.ones(2), jnp.ones((2, shape[1])), jnp.ones(shape[1])
    operand = lambda value, *labels: Operand((value,), None, (), labels)
    operands = (operand(a, "r", "i0"), operand(d, "r"), operand(b, "r", "o1"), operand(g, "o1"))
    term = Term(operands, tuple(((n,), (n,)) for n in names), Drop())
    w = Weight(
        jnp.ones(shape),
        (term,),
        None,
        tuple((n,) for n in names),
        tuple(zip(names, shape, strict=True)),
        True,
        (),
        None,
    )
    assert bulky(w, x) == (size == 64)
