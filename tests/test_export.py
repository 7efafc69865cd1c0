"""A lifted model leaves through `jax.export`: open sizes, its adapter as an argument; and Flax stores adapters."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export, lax

import jlora
from methods import CHOSEN, METHODS, assert_close, away_from_start, each_row

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


# One row for each word of the algebra, and those whose functions see W0: no other knows how many rows there are.
WORDS = [row for row in METHODS if row.name in (*CHOSEN, "hira", "hra", "psoft", "kasa") and row.on != "vectors"]


@pytest.mark.parametrize("row", each_row(WORDS))
def test_symbolic_sizes(row):
    """Exported with batch and length open, values and gradients are those of the lifted model at any size."""
    adapted = jlora.adapt(weights(), row.spec("kernel|embedding"), axes=ROLES)
    trainable, frozen = away_from_start(adapted.trainable), adapted.frozen

    def step(trainable, ids):
        loss = lambda t: jnp.sum(jlora.lift(model)(jlora.join(t, frozen), ids) ** 2)
        return jax.value_and_grad(loss)(trainable)

    open_ids = jax.ShapeDtypeStruct(export.symbolic_shape("b, t"), jnp.int32)
    step = jax.jit(step)
    exported = export.export(step)(trainable, open_ids)
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


BASE = {"query": {"kernel": jnp.ones((64, 8)), "bias": jnp.zeros(8)}}
TURNED = {"query": {"kernel": jnp.ones((8, 64)), "bias": jnp.zeros(8)}}
HALF = {"query": {"kernel": jnp.ones((64, 8), jnp.bfloat16), "bias": jnp.zeros(8)}}
lora = lambda base=BASE, **fields: jlora.adapt(base, jlora.LoRA(target="kernel", **{"rank": 2} | fields))
small = lambda scheme, base=BASE: jlora.quantize(base, scheme, target="kernel")
keyed = lambda impl: jlora.with_dropout(lora(dropout=0.5), jax.random.key(0, impl=impl))

#: What is written, the form it is read into, and what the error must name of each.
UNLIKE = {
    "scheme": (lambda: small("nf4"), lambda: small("int4"), "int4 of .* here, nf4 of .* in the state"),
    "doubled": (lambda: small("nf4+double"), lambda: small("nf4"), "nf4 of .* here, nf4.double of .*'scales2' is in"),
    "block": (lambda: small("int8"), lambda: small(jlora.quant.Int(8, block=32)), "block 32.* here, .* in the state"),
    "turned": (lambda: small("int4"), lambda: small("int4", TURNED), r"of \(8, 64\).* here, int4 of \(64, 8\)"),
    "dtype": (lambda: small("int4", HALF), lambda: small("int4"), "float32.* here, int4 of .* bfloat16"),
    "cast": (
        lambda: jax.tree.map(lambda x: x.astype(jnp.bfloat16), small("int8")),
        lambda: small("int8"),
        "'scales' has dtype float32 here, bfloat16 in the state",
    ),
    "not quantised": (lambda: BASE, lambda: small("int4"), "several arrays here, and one array in the state"),
    "base": (lambda: lora(small("nf4")), lambda: lora(small("int4")), "base/query/kernel' is int4 .* here, nf4 of"),
    "base's dtype": (lambda: lora(HALF), lora, "base/query/kernel' has dtype float32 here, bfloat16 in the state"),
    "base's form": (lambda: lora(small("nf4")), lora, "base/query/kernel' is one array here, and several"),
    "base's shape": (lora, lambda: lora(TURNED), r"\(8, 64\), 'oi' here, .*\(64, 8\), 'io' in the state"),
    "rank": (lora, lambda: lora(rank=4), r"LoRA\(rank=4\).* here, LoRA\(rank=2\).* shape \(4, 64\) here, \(2, 64\) in"),
    "DoRA": (
        lambda: jlora.adapt(BASE, jlora.DoRA(jlora.LoRA(rank=2, target="kernel"))),
        lora,
        r"LoRA\(rank=2\) .* here, DoRA\(.*'trainable/query/kernel/m' is in the state alone",
    ),
    "same shapes": (
        lambda: jlora.adapt(BASE, jlora.HiRA(rank=2, target="kernel")),
        lora,
        r"LoRA\(rank=2\).* here, HiRA\(rank=2\)",
    ),
    "what is trained": (
        lambda: jlora.adapt(BASE, jlora.LoRAFA(rank=2, target="kernel")),
        lora,
        r"LoRA\(.* here, LoRAFA\(.*'trainable/query/kernel/a' is missing",
    ),
    "weights": (
        lora,
        lambda: jlora.adapt(BASE, [jlora.LoRA(rank=2, target="kernel"), jlora.BitFit()]),
        r"'query/bias' is BitFit\(\).* here, absent in the state",
    ),
    "stacked": (lambda: jlora.stack([lora(), lora()])[0], lora, r"a' has shape \(2, 64\) here, \(2, 2, 64\) in"),
    "key": (lambda: keyed("threefry2x32"), lora, "dropout key' is absent here, fry|threefry2x32 in the state"),
    "keys": (lambda: keyed("rbg"), lambda: keyed("threefry2x32"), "dropout key' is threefry2x32 here, rbg in"),
    "another tree": (lambda: BASE, lora, "'trainable' is missing in the state"),
}  # fmt: skip


@pytest.mark.parametrize("name", UNLIKE)
def test_flax_serialization_of_another_form(name):
    """Flax's bytes of another scheme, method, rank, shape or base are refused, and both are named."""
    written, form, words = UNLIKE[name]
    data = flax.serialization.to_bytes(written())
    with pytest.raises(ValueError, match=f"(?s){words}"):
        flax.serialization.from_bytes(form(), data)


def test_flax_serialization_of_what_may_differ():
    """Rates of dropout, alpha and the start of a run are no part of the form, and s comes with the factors."""
    written = lora(dropout=0.5, alpha=7, init="gaussian")
    back = flax.serialization.from_bytes(lora(), flax.serialization.to_bytes(written))
    assert_close(back.frozen.factors, written.frozen.factors)
    assert_close(back.trainable, written.trainable)
