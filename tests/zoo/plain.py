"""Plain JAX functions of plain trees."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from zoo._case import normal, registry

CASES, case = registry("plain")


def weight(seed: int, *shape: int, **options) -> jax.Array:
    return normal(seed, *shape, scale=0.3, **options)


def x() -> jax.Array:
    return normal(40, 5, 11)


# Trees ------------------------------------------------------------------------------------


@case(r"^w")
def dictionary():
    def fn(params, x):
        return jnp.tanh(x @ params["w1"]) @ params["w2"] + params["b"]

    return fn, {"w1": weight(1, 11, 13), "w2": weight(2, 13, 7), "b": normal(3, 7)}, (x(),)


@case(r"^\d/0$")
def lists_of_tuples():
    def fn(params, x):
        for w, b in params:
            x = jnp.tanh(x @ w + b)
        return x

    return fn, [(weight(1, 11, 13), weight(2, 13)), (weight(3, 13, 7), weight(4, 7))], (x(),)


@case(r"^$")
def bare_array():
    """The tree is one leaf; its path is empty."""
    return lambda w, x: x @ w, weight(1, 11, 7), (x(),)


class Layer(NamedTuple):
    kernel: jax.Array
    bias: jax.Array

    def __call__(self, x):
        return jnp.tanh(x @ self.kernel + self.bias)


@case(r"kernel$")
def named_tuples():
    params = {
        "in": Layer(weight(1, 11, 13), weight(2, 13)),
        "out": Layer(weight(3, 13, 7), weight(4, 7)),
    }
    return lambda params, x: params["out"](params["in"](x)), params, (x(),)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["up", "down"], meta_fields=["activation"])
@dataclasses.dataclass
class Net:
    up: Layer
    down: Layer
    activation: str


@case(r"kernel$")
def dataclasses_with_metadata():
    net = Net(Layer(weight(1, 11, 13), weight(2, 13)), Layer(weight(3, 13, 7), weight(4, 7)), "gelu")

    def fn(net, x):
        return net.down(getattr(jax.nn, net.activation)(net.up(x)))

    return fn, net, (x(),)


@case(r"^a\.b/w$|odd")
def odd_names():
    """Dots in names, empty subtrees, None, and integers among the leaves."""

    def fn(params, x):
        y = x @ params["a.b"]["w"] @ params["odd name (1)"]
        return jnp.where(params["steps"] > 0, y, 0.0)

    params = {
        "a.b": {"w": weight(1, 11, 13), "none": None},
        "empty": {},
        "odd name (1)": weight(2, 13, 7),
        "steps": jnp.array(3),
    }
    return fn, params, (x(),)


# Label-moving operations ------------------------------------------------------------------


@case(r"w$")
def barrier():
    def fn(params, x):
        params, x = jax.lax.optimization_barrier((params, x))
        return x @ params["w"]

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"w$")
def named_for_checkpoint():
    def fn(params, x):
        return x @ checkpoint_name(params["w"], "w")

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"w$", dtype="bfloat16")
def casts():
    def fn(params, x):
        w = params["w"].astype(jnp.bfloat16)
        return (x.astype(jnp.bfloat16) @ w).astype(jnp.float32)

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"w$", dtype="bfloat16")
def accumulated():
    """Products of bfloat16 that come out as float32."""

    def fn(params, x):
        return jnp.dot(x.astype(jnp.bfloat16), params["w"], preferred_element_type=jnp.float32)

    return fn, {"w": weight(1, 11, 7, dtype=jnp.bfloat16)}, (x(),)


@case(r"w$", dtype="bfloat16")
def mixed_precision_tree():
    """The whole tree cast at the top, as mixed-precision policies do."""

    def fn(params, x):
        half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
        return x.astype(jnp.bfloat16) @ half["w"] + half["b"]

    return fn, {"w": weight(1, 11, 7), "b": weight(2, 7)}, (x(),)


@case(r"w$", axes={r"w$": "iioo"})
def squeezed():
    def fn(params, x):
        return x @ params["w"].squeeze((0, 2))

    return fn, {"w": weight(1, 1, 11, 1, 7)}, (x(),)


@case(r"^w$")
def stopped_gradient():
    """A second, stopped use of the weight."""

    def fn(params, x):
        w = params["w"]
        return x @ w + jnp.tanh(x @ jax.lax.stop_gradient(w))

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"^w$", dense_ok=(r"^w$",))
def statistics():
    """A weight that is contracted, and whose norm and shape are read besides."""

    def fn(params, x):
        w = params["w"]
        return x @ w / w.shape[0], jnp.sum(w * w), jnp.zeros_like(w)

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"^w$")
def high_precision():
    def fn(params, x):
        return jnp.dot(x, params["w"], precision=jax.lax.Precision.HIGHEST)

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"^w$", axes={r"^w$": "oioi"})
def general_product():
    """`lax.dot_general` with interleaved free and contracted axes."""

    def fn(params, x):
        return jax.lax.dot_general(params["w"], x, (((3, 1), (0, 2)), ((), ())))

    return fn, {"w": weight(1, 3, 4, 7, 5)}, (normal(40, 5, 6, 4),)


@case(r"^w$", axes={r"^w$": "oi"})
def matrix_vector():
    return lambda params, x: jnp.tanh(params["w"] @ x), {"w": weight(1, 7, 11)}, (normal(40, 11),)


@case(r"^w$")
def mapped_examples():
    """The model is written for one example and mapped over the batch."""

    def fn(params, x):
        return jax.vmap(lambda x: jnp.tanh(x @ params["w"]))(x)

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"^w$")
def gradient_inside():
    """The model takes a gradient of its own, with respect to its input."""

    def fn(params, x):
        def energy(x):
            return jnp.sum(jnp.tanh(x @ params["w"]) ** 2)

        return jax.grad(energy)(x)

    return fn, {"w": weight(1, 11, 7)}, (x(),)


@case(r"w$", axes={r"w$": "kio"})
def raw_convolution():
    """Channels first, and a dilated input."""

    def fn(params, x):
        return jax.lax.conv_general_dilated(
            x,
            params["w"],
            (2,),
            [(1, 2)],
            lhs_dilation=(2,),
            dimension_numbers=("NCH", "HIO", "NCH"),
        )

    return fn, {"w": weight(1, 3, 5, 7)}, (normal(40, 2, 5, 9),)


@case(r"w$", axes={r"w$": "oikk"})
def torch_convolution():
    """Kernels (out, in, height, width), as ported from torch."""

    def fn(params, x):
        return jax.lax.conv_general_dilated(x, params["w"], (1, 2), "SAME")

    return fn, {"w": weight(1, 7, 5, 3, 2)}, (normal(40, 2, 5, 6, 7),)


@case(r"embed$")
def lookups():
    """Three ways to write a row lookup."""

    def fn(params, ids):
        table = params["embed"]
        return table[ids] + jnp.take(table, ids + 1, axis=0), table.at[ids].get(mode="clip")

    return fn, {"embed": weight(1, 23, 7)}, (jnp.array([[0, 3, 21], [3, 3, 1]]),)


@case(r"embed$")
def one_hot_lookup():
    def fn(params, ids):
        return jax.nn.one_hot(ids, 23) @ params["embed"]

    return fn, {"embed": weight(1, 23, 7)}, (jnp.array([[0, 3, 22], [3, 3, 1]]),)


@case(r"embed$", dense_ok=(r"embed$",))
def element_gather():
    """Single elements, which are no rows."""

    def fn(params, ids):
        return params["embed"][ids, ids[::-1]]

    return fn, {"embed": weight(1, 11, 7)}, (jnp.array([0, 3, 6, 2]),)


# Transforms -------------------------------------------------------------------------------


@case(r"w$")
def inner_jit():
    @jax.jit
    def layer(x, w):
        return jnp.tanh(x @ w)

    def fn(params, x):
        for layer_params in params:
            x = x + layer(x, layer_params["w"])
        return x

    return fn, [{"w": weight(i, 11, 11)} for i in range(3)], (x(),)


@case(r"w$")
def jit_returns_weight():
    """The weight goes through an inner `jit` and comes back."""

    def fn(params, x):
        y, w = jax.jit(lambda w, x: (jnp.tanh(x @ w), w))(params["w"], x)
        return x + y @ w

    return fn, {"w": weight(1, 11, 11)}, (x(),)


@case(r"w[12]$")
def checkpoint():
    @functools.partial(jax.checkpoint, policy=jax.checkpoint_policies.save_only_these_names("h"))
    def fn(params, x):
        h = checkpoint_name(jnp.tanh(x @ params["w1"]), "h")
        return jnp.tanh(h @ params["w2"])

    return fn, {"w1": weight(1, 11, 13), "w2": weight(2, 13, 7)}, (x(),)


@case(r"w$", axes={r"w$": "sio"})
def scan():
    """Weights as scanned inputs."""

    def fn(params, x):
        def step(x, layer):
            x = jnp.tanh(x @ layer["w"] + layer["b"])
            return x, x.mean()

        return jax.lax.scan(step, x, params)

    return fn, {"w": weight(1, 3, 11, 11), "b": weight(2, 3, 11)}, (x(),)


@case(r"w$", axes={r"layers/w$": "sio"})
def square():
    """As many outputs as inputs, in a stack and alone, both sides a product of two numbers."""

    def fn(params, x):
        many = jnp.stack([x[:, :6], x[:, 2:8], x[:, 4:10]])
        x = jnp.tanh(jnp.einsum("sni,sio->sno", many, params["layers"]["w"]))
        return jnp.einsum("sni,oi->sno", x, params["last"]["w"].T)

    return fn, {"layers": {"w": weight(1, 3, 6, 6)}, "last": {"w": weight(2, 6, 6)}}, (x(),)


@case(r"w$", axes={r"w$": "sio"})
def scan_reversed():
    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), x), x, params["w"], reverse=True)

    return fn, {"w": weight(1, 3, 11, 11)}, (x(),)


@case(r"w$")
def scan_constant():
    """Weights as constants: a recurrent net over time."""

    def fn(params, xs):
        def step(state, x):
            state = jnp.tanh(x @ params["in"]["w"] + state @ params["state"]["w"])
            return state, state @ params["out"]["w"]

        return jax.lax.scan(step, jnp.zeros((2, 13)), xs)

    shapes = {"in": (11, 13), "state": (13, 13), "out": (13, 7)}
    params = {name: {"w": weight(i, *shape)} for i, (name, shape) in enumerate(shapes.items())}
    return fn, params, (normal(40, 4, 2, 11),)


@case(r"stack$|^w$", axes={r"stack$": "sio"})
def scan_mixed():
    """Scanned and constant weights in one body, and a layer index."""

    def fn(params, x):
        def step(x, layer):
            index, w = layer
            return jnp.tanh(x @ w + index * (x @ params["w"])), None

        return jax.lax.scan(step, x, (jnp.arange(3.0), params["stack"]))[0]

    return fn, {"stack": weight(1, 3, 11, 11), "w": weight(2, 11, 11)}, (x(),)


@case(r"w$", axes={r"w$": "sio"})
def scan_of_checkpoint():
    def fn(params, x):
        step = jax.checkpoint(lambda x, w: (jnp.tanh(x @ w), None), prevent_cse=False)
        return jax.lax.scan(step, x, params["w"])[0]

    return fn, {"w": weight(1, 3, 11, 11)}, (x(),)


@case(r"kernel$", axes={r"up/kernel$": "iso", r"down/kernel$": "iso", r"query/kernel$": "isoo"})
def scan_axis_1():
    """Layers on axis 1, moved to the front by hand, as in MaxText."""

    def fn(params, x):
        def step(x, layer):
            heads = jnp.einsum("bi,ihk->bhk", x, layer["query"]["kernel"])
            h = jnp.tanh(x @ layer["up"]["kernel"])
            return x + h @ layer["down"]["kernel"], heads

        stack = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), params)
        return jax.lax.scan(step, x, stack)

    params = {
        "query": {"kernel": weight(1, 11, 3, 2, 5)},
        "up": {"kernel": weight(2, 11, 3, 13)},
        "down": {"kernel": weight(3, 13, 3, 11)},
    }
    return fn, params, (x(),)


@case(r"w$", axes={r"w$": "ssio"})
def scan_of_scan():
    def fn(params, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        def outer(x, w):
            return jax.lax.scan(inner, x, w)

        return jax.lax.scan(outer, x, params["w"])[0]

    return fn, {"w": weight(1, 2, 3, 11, 11)}, (x(),)


@case(r"w$", axes={r"w$": "sio"})
def scan_in_groups():
    """A stack of six layers, reshaped to two groups of three."""

    def fn(params, x):
        def outer(x, group):
            for i in range(3):
                x = jnp.tanh(x @ group[i])
            return x, None

        return jax.lax.scan(outer, x, params["w"].reshape(2, 3, 11, 11))[0]

    return fn, {"w": weight(1, 6, 11, 11)}, (x(),)


@case(r"w$", axes={r"w$": "sio"})
def mapped_layers():
    def fn(params, x):
        return jax.lax.map(lambda w: jnp.tanh(x @ w), params["w"])

    return fn, {"w": weight(1, 3, 11, 7)}, (x(),)


@case(r"w$", axes={r"w$": "sio"}, dense_ok=(r"w$",))
def associative_scan():
    """Products of weights with one another."""

    def fn(params, x):
        return x @ jax.lax.associative_scan(jnp.matmul, params["w"])[-1]

    return fn, {"w": weight(1, 3, 11, 11)}, (x(),)


@case(r"w$")
def cond():
    """A branch that uses the weight, and one that does not."""

    def fn(params, x, left):
        return jax.lax.cond(left, lambda w, x: x @ w, lambda w, x: x[:, :7], params["w"], x)

    return fn, {"w": weight(1, 11, 7)}, (x(), jnp.array(True))


@case(r"w\d$")
def cond_of_weights():
    """The branches differ in the weight they use."""

    def fn(params, x, left):
        y = jax.lax.cond(left, lambda: x @ params["w1"], lambda: x @ params["w2"])
        return y + jax.lax.cond(left, lambda: x @ params["w2"], lambda: x @ params["w1"])

    return fn, {"w1": weight(1, 11, 7), "w2": weight(2, 11, 7)}, (x(), jnp.array(True))


@case(r"w\d$", dense_ok=(r"w\d$",))
def selected_weights():
    """A branch returns a weight."""

    def fn(params, x, left):
        w = jax.lax.cond(left, lambda u, v: (u, v), lambda u, v: (v, u), params["w1"], params["w2"])
        return x @ w[0] - 2 * (x @ w[1])

    return fn, {"w1": weight(1, 11, 7), "w2": weight(2, 11, 7)}, (x(), jnp.array(True))


@case(r"w$")
def loop_carry():
    """The weight rides in the carry of a loop, unchanged."""

    def fn(params, x):
        def turn(i, carry):
            params, x = carry
            return params, jnp.tanh(x @ params["w"])

        return jax.lax.fori_loop(0, 3, turn, (params, x))[1]

    return fn, {"w": weight(1, 11, 11)}, (x(),)


@case(r"w$", axes={r"w$": "sio"})
def loop_over_stack():
    """A stack indexed by the turn of a `while_loop` of known length."""

    def fn(params, x):
        def turn(i, x):
            w = jax.lax.dynamic_index_in_dim(params["w"], i, keepdims=False)
            return jnp.tanh(x @ w)

        return jax.lax.fori_loop(0, 3, turn, x)

    return fn, {"w": weight(1, 3, 11, 11)}, (x(),)


# Blocks and tokens ------------------------------------------------------------------------


def attention(p, x):
    """One head, with biases."""
    q, k, v = (x @ p[name]["kernel"] + p[name]["bias"] for name in ("query", "key", "value"))
    return jax.nn.softmax(q @ k.mT / 3, -1) @ v @ p["out"]["kernel"] + p["out"]["bias"]


def layers(width: int, *stack: int):
    """Parameters of an attention and a feed-forward block."""
    dense = lambda seed, i, o: {"kernel": weight(seed, *stack, i, o), "bias": weight(seed + 20, *stack, o)}
    names = ("query", "key", "value", "out")
    heads = {name: dense(n, width, width) for n, name in enumerate(names)}
    return {"attention": heads, "mlp": {"up": dense(5, width, 10), "down": dense(6, 10, width)}}


@case(r"(out|down)/kernel$", axes={r"kernel$": "sio", r"bias$": "so"})
def scanned_blocks():
    """Layers of attention and a feed-forward block, by the names that blocks have."""

    def fn(params, x):
        def layer(x, p):
            x = x + attention(p["attention"], x)
            hidden = jnp.tanh(x @ p["mlp"]["up"]["kernel"] + p["mlp"]["up"]["bias"])
            return x + hidden @ p["mlp"]["down"]["kernel"] + p["mlp"]["down"]["bias"], None

        return jax.lax.scan(layer, x, params)[0]

    return fn, layers(6, 2), (normal(40, 2, 5, 6),)


@case(r"embedding$|(key|value)/kernel$")
def virtual_tokens():
    """Ids behind the end of a table, in front of the others; alone, the model reads its last row for them."""

    def fn(params, ids):
        x = jnp.take(params["embedding"], ids, axis=0, mode="clip")
        x = x * params["norm"]["scale"] + params["norm"]["bias"]
        return jnp.tanh(x + attention(params["attention"], x))

    norm = {"scale": 1 + weight(8, 6), "bias": weight(9, 6)}
    ids = jnp.array([[11, 12, 3, 1, 7], [11, 12, 0, 10, 3]])
    return fn, {"embedding": weight(7, 11, 6), "norm": norm, "attention": layers(6)["attention"]}, (ids,)


# Vectors ----------------------------------------------------------------------------------


@case(r"scale$", vectors=True, dense_ok=(r"scale$",))
def norm_scales():
    def fn(params, x):
        x = params["scale"] * x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
        return x @ params["w"]

    return fn, {"scale": 1 + weight(1, 11), "w": weight(2, 11, 7)}, (x(),)


@case(r"b$|bias$", vectors=True, dense_ok=(r"b$|bias$",))
def biases():
    def fn(params, x):
        return jnp.tanh(x @ params["w"] + params["b"]) + params["bias"][None, :]

    return fn, {"w": weight(1, 11, 7), "b": weight(2, 7), "bias": weight(3, 7)}, (x(),)


@case(r"gate$", vectors=True, dense_ok=(r"gate$",))
def scalar_gates():
    def fn(params, x):
        return x + jnp.tanh(params["gate"]) * (x @ params["w"])

    return fn, {"gate": jnp.array(0.3), "w": weight(1, 11, 11)}, (x(),)


@case(r"scale$|bias$", vectors=True, dense_ok=(r"scale$|bias$",), axes={r"scale$|bias$": "so"})
def scanned_vectors():
    """Scales and biases stacked over layers: matrices to look at, vectors to use."""

    def fn(params, x):
        def step(x, layer):
            return jnp.tanh(layer["scale"] * x @ layer["w"] + layer["bias"]), None

        return jax.lax.scan(step, x, params)[0]

    params = {"w": weight(1, 3, 11, 11), "scale": 1 + weight(2, 3, 11), "bias": weight(3, 3, 11)}
    return fn, params, (x(),)
