"""NNX modules. They are pytrees, so the module itself stands where the parameters stand."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from zoo._case import fill, integers, normal, registry

CASES, case = registry("nnx")


def made(build):
    """The module with values: made abstractly, as running initialisers one by one is slow."""
    return fill(nnx.eval_shape(lambda: build(nnx.Rngs(0))))


def call(module, *args):
    return module(*args)


def module(build, *args):
    return call, made(build), args


class MLP(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, width: int = 13, out: int = 7, dtype: Any = None):
        self.up = nnx.Linear(11, width, dtype=dtype, rngs=rngs)
        self.down = nnx.Linear(width, out, dtype=dtype, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Block(nnx.Module):
    """Residual, so that it can be repeated."""

    def __init__(self, rngs: nnx.Rngs):
        self.norm = nnx.RMSNorm(11, rngs=rngs)
        self.mlp = MLP(rngs, out=11)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


# Layers -----------------------------------------------------------------------------------


@case(r"kernel$")
def linear():
    return module(lambda rngs: nnx.Linear(11, 7, rngs=rngs), normal(1, 5, 11))


@case(r"kernel$", dtype="bfloat16")
def linear_bfloat16():
    return module(lambda rngs: MLP(rngs, dtype=jnp.bfloat16), normal(1, 5, 11))


@case(r"kernel$", axes={r"kernel$": "iioo"})
def linear_general():
    def build(rngs):
        return nnx.LinearGeneral((3, 5), (2, 7), axis=(-2, -1), rngs=rngs)

    return module(build, normal(1, 4, 3, 5))


@case(r"kernel$", axes={r"kernel$": "ioo"})
def einsum():
    return module(lambda rngs: nnx.Einsum("btd,dhk->bthk", (11, 3, 5), rngs=rngs), normal(1, 2, 4, 11))


@case(r"kernel$")
def conv():
    build = lambda rngs: nnx.Conv(5, 7, (3, 2), strides=2, rngs=rngs)  # noqa: E731
    return module(build, normal(1, 2, 9, 8, 5))


@case(r"kernel$")
def conv_grouped():
    build = lambda rngs: nnx.Conv(6, 9, (3, 2), feature_group_count=3, rngs=rngs)  # noqa: E731
    return module(build, normal(1, 2, 5, 4, 6))


class Language(nnx.Module):
    """Token embeddings, one block, and the embeddings again as the output head."""

    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(23, 11, rngs=rngs)
        self.block = Block(rngs)

    def __call__(self, ids):
        return self.embed.attend(self.block(self.embed(ids)))


@case(r"embedding$|kernel$")
def tied_embed():
    return module(Language, integers(7, 2, 5, below=23))


@case(r"kernel$", axes={r"(query|key|value)/kernel$": "ioo", r"out/kernel$": "iio"})
def multi_head_attention():
    def build(rngs):
        return nnx.MultiHeadAttention(3, 11, qkv_features=15, decode=False, rngs=rngs)

    return module(build, normal(1, 2, 7, 11))


class Listed(nnx.Module):
    """Layers in a list: the steps of their paths are integers."""

    def __init__(self, rngs: nnx.Rngs):
        self.layers = nnx.List([Block(rngs) for _ in range(3)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@case(r"layers/\d/mlp/up/kernel$")
def layers():
    return module(Listed, normal(1, 5, 11))


# Transforms -------------------------------------------------------------------------------


class Wrapped(nnx.Module):
    """A block called through a transform."""

    def __init__(self, transform, rngs: nnx.Rngs):
        self.block = Block(rngs)
        self.transform = transform

    def __call__(self, x):
        return self.transform(call)(self.block, x)


@case(r"kernel$")
def jit():
    return module(lambda rngs: Wrapped(nnx.jit, rngs), normal(1, 5, 11))


@case(r"kernel$")
def remat():
    return module(lambda rngs: Wrapped(nnx.remat, rngs), normal(1, 5, 11))


@case(r"kernel$")
def jit_of_remat():
    transform = lambda fn: nnx.jit(nnx.remat(fn))  # noqa: E731
    return module(lambda rngs: Wrapped(transform, rngs), normal(1, 5, 11))


class Scanned(nnx.Module):
    """Three blocks whose parameters are stacked on axis 0."""

    def __init__(self, rngs: nnx.Rngs, transform=lambda fn: fn):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=0, out_axes=0)
        def build(rngs):
            return Block(rngs)

        self.layers = build(rngs)
        self.transform = transform

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        @self.transform
        def step(block, x):
            return block(x)

        return step(self.layers, x)


@case(r"kernel$", axes={r"kernel$": "sio"})
def scan():
    return module(Scanned, normal(1, 5, 11))


@case(r"kernel$", axes={r"kernel$": "sio"})
def scan_remat():
    return module(lambda rngs: Scanned(rngs, nnx.remat), normal(1, 5, 11))


@case(r"kernel$")
def scan_constant():
    """One block at every step of a scan over time."""

    def fn(block, x):
        step = nnx.scan(
            lambda block, carry, x: (block(carry + x), x.sum()),
            in_axes=(None, nnx.Carry, 0),
            out_axes=(nnx.Carry, 0),
        )
        return step(block, jnp.zeros_like(x[0]), x)

    return fn, made(Block), (normal(1, 3, 5, 11),)


@case(r"kernel$")
def fori_loop():
    """The module rides in the carry."""

    def fn(block, x):
        def turn(i, carry):
            block, x = carry
            return block, block(x)

        return nnx.fori_loop(0, 3, turn, (block, x))[1]

    return fn, made(Block), (normal(1, 5, 11),)


@case(r"kernel$", differentiable=False)
def while_loop():
    def fn(block, x):
        def turn(carry):
            block, x, i = carry
            return block, block(x), i + 1

        return nnx.while_loop(lambda carry: carry[2] < 3, turn, (block, x, 0))[1]

    return fn, made(Block), (normal(1, 5, 11),)


@case(r"kernel$")
def cond():
    def fn(modules, x, left):
        branches = (lambda a, b, x: a(b(x)), lambda a, b, x: b(a(x)))
        return nnx.cond(left, *branches, *modules, x)

    return fn, (made(Block), made(Block)), (normal(1, 5, 11), jnp.array(True))


@case(r"kernel$", axes={r"kernel$": "sio"})
def vmap_experts():
    def build(rngs):
        return nnx.split_rngs(splits=4)(nnx.vmap(MLP))(rngs)

    def fn(experts, x):
        return nnx.vmap(call)(experts, x)

    return fn, made(build), (normal(1, 4, 5, 11),)


# State ------------------------------------------------------------------------------------


class Normed(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.conv = nnx.Conv(4, 6, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(6, rngs=rngs)
        self.dropout = nnx.Dropout(0.3)
        self.head = nnx.Linear(6, 5, rngs=rngs)

    def __call__(self, x, rngs):
        x = self.norm(self.conv(x))
        return self.head(self.dropout(nnx.relu(x), rngs=rngs))


@case(r"kernel$")
def split_state():
    """Only the parameters: the rest of the state goes in and comes back beside them."""
    graphdef, params, rest = nnx.split(made(Normed), nnx.Param, ...)

    def fn(params, rest, x, key):
        # A copy: inside a transform of its own, Flax refuses to update variables from outside.
        model = nnx.merge(graphdef, params, rest, copy=True)
        y = model(x, nnx.Rngs(dropout=key))
        return y, nnx.state(model, nnx.BatchStat)

    return fn, params, (rest, normal(1, 2, 5, 4, 4), jax.random.key(3))


@case(r"kernel$")
def state():
    """The whole state of a module in evaluation: statistics stand beside the parameters."""
    model = made(Normed)
    model.eval()
    graphdef, state = nnx.split(model)

    def fn(state, x):
        return nnx.merge(graphdef, state)(x, None)

    return fn, state, (normal(1, 2, 5, 4, 4),)


@case(r"kernel$")
def pure_dictionary():
    """The state as plain dictionaries, as checkpoints hold it."""
    graphdef, state = nnx.split(made(Listed))

    def fn(pure, x):
        return nnx.merge(graphdef, nnx.State(pure))(x)

    return fn, nnx.to_pure_dict(state), (normal(1, 5, 11),)


class Shared(nnx.Module):
    """One layer under two attributes; `nnx.split` keeps it once."""

    def __init__(self, rngs: nnx.Rngs):
        self.first = Block(rngs)
        self.second = self.first

    def __call__(self, x):
        return self.second(self.first(x))


@case(r"kernel$")
def shared_state():
    graphdef, state = nnx.split(Shared(nnx.Rngs(0)))
    state = fill(state)
    return lambda state, x: nnx.merge(graphdef, state)(x), state, (normal(1, 5, 11),)
