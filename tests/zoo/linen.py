"""Linen models made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from zoo._case import fill, integers, normal, registry

CASES, case = registry("linen")

QKV = r"(query|key|value)/kernel$"
ATTENTION = {QKV: "ioo", r"out/kernel$": "iio"}


def shapes(model: nn.Module, *args, **kwargs):
    return jax.eval_shape(lambda key: model.init(key, *args, **kwargs), jax.random.key(0))


def linen(model: nn.Module, *args, **kwargs):
    """The model as a function of its parameters alone."""
    params = fill(shapes(model, *args, **kwargs)["params"])
    return lambda params, *args: model.apply({"params": params}, *args, **kwargs), params, args


class MLP(nn.Module):
    width: int = 13
    out: int = 7
    dtype: Any = None
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        options = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = nn.gelu(nn.Dense(self.width, name="up", **options)(x))
        return nn.Dense(self.out, name="down", **options)(x)


class Block(nn.Module):
    """Residual, so that it can be repeated."""

    width: int = 13

    @nn.compact
    def __call__(self, x):
        h = nn.Dense(self.width, name="up")(nn.LayerNorm(name="norm")(x))
        return x + nn.Dense(x.shape[-1], name="down")(nn.silu(h))


class Step(nn.Module):
    """A block in the form `nn.scan` wants: a carry and an output."""

    block: Callable[..., nn.Module] = Block

    @nn.compact
    def __call__(self, x, _):
        x = self.block(name="block")(x)
        return x, x.mean()


# Dense kinds ------------------------------------------------------------------------------


@case(r"kernel$")
def mlp():
    return linen(MLP(), normal(1, 5, 11))


@case(r"kernel$")
def mlp_three_dimensional():
    return linen(MLP(), normal(1, 2, 5, 11))


@case(r"kernel$")
def mlp_one_dimensional():
    return linen(MLP(), normal(1, 11))


@case(r"down/bias$|up/bias$", vectors=True, dense_ok=(r"bias$",))
def mlp_biases():
    return linen(MLP(), normal(1, 5, 11))


@case(r"kernel$", dtype="bfloat16")
def bfloat16_compute():
    return linen(MLP(dtype=jnp.bfloat16), normal(1, 5, 11))


@case(r"kernel$", dtype="bfloat16")
def bfloat16_params():
    model = MLP(dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
    return linen(model, normal(1, 5, 11, dtype=jnp.bfloat16))


class Attention(nn.Module):
    """Attention of DenseGeneral, with the softmax written out."""

    heads: int = 3
    size: int = 5

    @nn.compact
    def __call__(self, x):
        def project(name):
            return nn.DenseGeneral((self.heads, self.size), name=name)(x)

        query, key, value = project("query"), project("key"), project("value")
        weights = nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", query, key) / self.size**0.5)
        context = jnp.einsum("bhqk,bkhd->bqhd", weights, value)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), name="out")(context)


@case(r"kernel$", axes=ATTENTION)
def dense_general():
    return linen(Attention(), normal(1, 2, 7, 11))


class DenseGeneralAxes(nn.Module):
    """Contracts axes that are not the last, and carries a batch axis."""

    @nn.compact
    def __call__(self, x):
        y = nn.DenseGeneral((4, 7), axis=(1, 3), name="mixed")(x)
        return nn.DenseGeneral(6, axis=-1, batch_dims=(0,), name="batched")(y)


@case(r"kernel$", axes={r"mixed/kernel$": "iioo", r"batched/kernel$": "sio"})
def dense_general_axes():
    return linen(DenseGeneralAxes(), normal(1, 3, 5, 2, 11))


@case(r"kernel$", axes=ATTENTION)
def multi_head_attention():
    model = nn.MultiHeadDotProductAttention(num_heads=3, qkv_features=15)
    return linen(model, normal(1, 2, 7, 11), normal(2, 2, 5, 10))


class Einsum(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.Einsum((11, 3, 5), "btd,dhk->bthk", name="split")(x)
        x = nn.Einsum((5, 3, 13), "bthk,khd->btd", name="merge")(nn.tanh(x))
        return nn.Einsum((7, 13), "btd,od->bto", use_bias=False, name="turned")(x)


@case(
    r"kernel$",
    axes={r"split/kernel$": "ioo", r"merge/kernel$": "iio", r"turned/kernel$": "oi"},
)
def einsum():
    return linen(Einsum(), normal(1, 2, 5, 11))


# Embeddings -------------------------------------------------------------------------------


class Language(nn.Module):
    """Token embeddings, one block, and an output head that may be the same matrix."""

    tied: bool = True
    vocabulary: int = 23

    @nn.compact
    def __call__(self, ids):
        embed = nn.Embed(self.vocabulary, 11, name="embed")
        x = Block(name="block")(embed(ids))
        return embed.attend(x) if self.tied else nn.Dense(self.vocabulary, name="head")(x)


@case(r"embedding$|kernel$")
def tied_attend():
    return linen(Language(), integers(7, 2, 5, below=23))


@case(r"embedding$|kernel$")
def untied_embed():
    return linen(Language(tied=False), integers(7, 2, 5, below=23))


# Convolutions -----------------------------------------------------------------------------


def conv(x, features: int, window: tuple[int, ...], **options):
    return linen(nn.Conv(features, window, **options), x)


@case(r"kernel$", axes={"kernel$": "kio"})
def conv_1d():
    return conv(normal(1, 2, 13, 5), 7, (3,), strides=2, padding="VALID")


@case(r"kernel$", axes={"kernel$": "kio"})
def conv_1d_causal():
    return conv(normal(1, 2, 13, 5), 7, (4,), padding="CAUSAL", kernel_dilation=2)


@case(r"kernel$")
def conv_2d():
    return conv(normal(1, 2, 9, 8, 5), 7, (3, 2))


@case(r"kernel$")
def conv_2d_attributes():
    options = dict(strides=(2, 1), padding=((1, 2), (0, 3)), kernel_dilation=(1, 2))
    return conv(normal(1, 2, 9, 8, 5), 7, (3, 2), **options)


@case(r"kernel$")
def conv_2d_input_dilation():
    options = dict(input_dilation=(2, 3), padding=((1, 2), (0, 3)))
    return conv(normal(1, 2, 5, 4, 5), 7, (3, 3), **options)


@case(r"kernel$", axes={"kernel$": "kkkio"})
def conv_3d():
    return conv(normal(1, 1, 5, 4, 6, 4), 7, (2, 3, 2), strides=(1, 2, 1))


class Convolutions(nn.Module):
    """One to three dimensions in one model: what each kernel makes is the input of the next."""

    @nn.compact
    def __call__(self, x):
        x = nn.gelu(nn.Conv(6, (3,), name="one")(x))
        x = nn.gelu(nn.Conv(7, (3, 2), name="two")(x.reshape(len(x), 4, 3, 6)))
        return nn.Conv(5, (2, 3, 2), name="three")(x.reshape(len(x), 2, 2, 3, 7))


@case(r"kernel$", axes={r"one/kernel$": "kio", r"three/kernel$": "kkkio"})
def convolutions():
    return linen(Convolutions(), normal(1, 2, 12, 5))


@case(r"kernel$")
def conv_circular():
    return conv(normal(1, 2, 5, 4, 5), 7, (3, 2), padding="CIRCULAR")


@case(r"kernel$")
def conv_1x1():
    return conv(normal(1, 2, 4, 3, 5), 7, (1, 1))


@case(r"kernel$")
def conv_grouped():
    return conv(normal(1, 2, 7, 5, 6), 9, (3, 2), feature_group_count=3, strides=2)


@case(r"kernel$")
def conv_depthwise():
    return conv(normal(1, 2, 7, 5, 6), 12, (3, 2), feature_group_count=6)


@case(r"kernel$")
def conv_transpose():
    return linen(nn.ConvTranspose(7, (3, 2), strides=(2, 1)), normal(1, 2, 5, 4, 5))


@case(r"kernel$", axes={"kernel$": "kkoi"})
def conv_transpose_kernel():
    model = nn.ConvTranspose(7, (3, 2), strides=(2, 1), transpose_kernel=True)
    return linen(model, normal(1, 2, 5, 4, 5))


# Repeated blocks --------------------------------------------------------------------------


class Scanned(nn.Module):
    """Three blocks as one scanned block; `axis` is where the stack stands in a parameter."""

    axis: int = 0
    block: Callable[..., nn.Module] = Block
    unroll: int = 1

    @nn.compact
    def __call__(self, x):
        step = nn.scan(
            Step,
            variable_axes={"params": self.axis},
            split_rngs={"params": True},
            length=3,
            unroll=self.unroll,
        )
        return step(block=self.block, name="layers")(x, None)


@case(r"kernel$", axes={"kernel$": "sio"})
def scan():
    return linen(Scanned(), normal(1, 5, 11))


@case(r"kernel$", axes={"kernel$": "sio"})
def scan_unrolled():
    return linen(Scanned(unroll=3), normal(1, 5, 11))


@case(r"kernel$", axes={"kernel$": "iso"})
def scan_axis_1():
    return linen(Scanned(axis=1), normal(1, 5, 11))


@case(r"kernel$", axes={"kernel$": "ios"})
def scan_axis_last():
    return linen(Scanned(axis=-1), normal(1, 5, 11))


@case(r"kernel$", axes={"kernel$": "sio"})
def scan_remat():
    return linen(Scanned(block=nn.remat(Block, prevent_cse=False)), normal(1, 5, 11))


@case(r"kernel$", axes={"kernel$": "iso"})
def scan_axis_1_remat():
    return linen(Scanned(axis=1, block=nn.remat(Block)), normal(1, 5, 11))


@case(r"kernel$", axes={r"(query|key|value)/kernel$": "sioo", r"out/kernel$": "siio"})
def scan_attention():
    return linen(Scanned(block=Attention), normal(1, 2, 5, 11))


class RematScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.remat_scan(Block, lengths=(2, 3))(name="layers")(x)


@case(r"kernel$", axes={"kernel$": "ssio"})
def remat_scan():
    return linen(RematScan(), normal(1, 5, 11))


class ScannedTwice(nn.Module):
    """Two groups of three layers: a scan in a scan."""

    outer: int = 0
    inner: int = 0

    @nn.compact
    def __call__(self, x):
        def over(module, length, axis):
            return nn.scan(
                module,
                variable_axes={"params": axis},
                split_rngs={"params": True},
                length=length,
            )

        layers = over(over(Step, 3, self.inner), 2, self.outer)
        return layers(name="layers")(x, None)


@case(r"kernel$", axes={"kernel$": "ssio"})
def scan_nested():
    return linen(ScannedTwice(), normal(1, 5, 11))


@case(r"kernel$", axes={"kernel$": "siso"})
def scan_nested_axes():
    return linen(ScannedTwice(outer=0, inner=1), normal(1, 5, 11))


class Experts(nn.Module):
    """Four experts on four streams."""

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(MLP, variable_axes={"params": 0}, split_rngs={"params": True}, in_axes=0, out_axes=0)
        return experts(name="experts")(x)


@case(r"kernel$", axes={"kernel$": "sio"})
def vmap_experts():
    return linen(Experts(), normal(1, 4, 5, 11))


class Ensemble(nn.Module):
    """Four experts on one stream; the stack stands on axis 1."""

    @nn.compact
    def __call__(self, x):
        experts = nn.vmap(
            MLP,
            variable_axes={"params": 1},
            split_rngs={"params": True},
            in_axes=None,
            out_axes=1,
            axis_size=4,
        )
        return experts(name="experts")(x)


@case(r"kernel$", axes={"kernel$": "iso"})
def vmap_ensemble():
    return linen(Ensemble(), normal(1, 5, 11))


class Deep(nn.Module):
    """Three blocks, one after another, under whatever transform `block` carries."""

    block: Callable[..., nn.Module] = Block

    @nn.compact
    def __call__(self, x):
        for i in range(3):
            x = self.block(name=f"layers_{i}")(x)
        return x


@case(r"kernel$")
def remat():
    return linen(Deep(nn.remat(Block)), normal(1, 5, 11))


@case(r"kernel$")
def remat_policy():
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return linen(Deep(nn.remat(Block, policy=policy)), normal(1, 5, 11))


@case(r"kernel$")
def jit_blocks():
    return linen(Deep(nn.jit(Block)), normal(1, 5, 11))


# Boxes and shared weights -----------------------------------------------------------------


class Boxed(nn.Module):
    box: Callable

    @nn.compact
    def __call__(self, x):
        kernel = self.box(nn.initializers.lecun_normal(), ("embed", "mlp"))
        x = nn.relu(nn.Dense(13, kernel_init=kernel, name="up")(x))
        return nn.Dense(7, name="down")(x)


@case(r"kernel$")
def logical_boxes():
    return linen(Boxed(nn.with_logical_partitioning), normal(1, 5, 11))


@case(r"kernel$")
def partitioned_boxes():
    return linen(Boxed(nn.with_partitioning), normal(1, 5, 11))


class BoxedStep(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return x + Boxed(nn.with_logical_partitioning, name="mlp")(x)[..., :1], None


class BoxedScan(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(
            BoxedStep,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        return scan(name="layers")(x, None)[0]


@case(r"kernel$", axes={r"kernel$": "sio"})
def scan_boxes():
    return linen(BoxedScan(), normal(1, 5, 11))


class Shared(nn.Module):
    """One layer applied three times, as in ALBERT."""

    @nn.compact
    def __call__(self, x):
        layer = Block(name="layer")
        for _ in range(3):
            x = layer(x)
        return x


@case(r"kernel$")
def shared_layer():
    return linen(Shared(), normal(1, 5, 11))


# Raw parameters ---------------------------------------------------------------------------


def raw(*shapes: tuple[int, ...], x: jax.Array):
    """A model whose parameters are `w0`, `w1`, ... and whose body is the decorated function."""

    def model(body):
        class Raw(nn.Module):
            @nn.compact
            def __call__(self, x):
                init = nn.initializers.normal(0.3)
                return body(x, *(self.param(f"w{i}", init, s) for i, s in enumerate(shapes)))

        return linen(Raw(), x)

    return model


X = (5, 11)


@case(r"w0$")
def raw_right():
    return raw((11, 7), x=normal(1, *X))(lambda x, w: x @ w)


@case(r"w0$", axes={r"w0$": "oi"})
def raw_transposed():
    return raw((7, 11), x=normal(1, *X))(lambda x, w: x @ w.T)


@case(r"w0$", axes={r"w0$": "oi"})
def raw_left():
    return raw((7, 5), x=normal(1, *X))(lambda x, w: w @ x)


@case(r"w0$")
def raw_both_ways():
    """An autoencoder with one matrix: contracted over its first axis, then over its second."""
    return raw((11, 7), x=normal(1, *X))(lambda x, w: jnp.tanh(x @ w) @ w.T)


@case(r"w0$", axes={r"w0$": "ioo"})
def raw_einsum_three():
    def body(x, w, gate):
        return jnp.einsum("tbi,iho,bh->btho", x, w, gate)

    return raw((11, 3, 7), (5, 3), x=normal(1, 2, *X))(body)


@case(r"w0$", axes={r"w0$": "siio"})
def raw_einsum_batched():
    """Contracted over two axes, with a batch axis in the weight."""
    x = normal(1, 2, 3, 4, 5)
    return raw((3, 4, 5, 7), x=x)(lambda x, w: jnp.einsum("bhij,hijo->bho", x, w))


@case(r"w0$", axes={r"w0$": "iso"})
def raw_einsum_batched_axis_1():
    x = normal(1, 5, 3, 4)
    return raw((4, 3, 7), x=x)(lambda x, w: jnp.einsum("bhi,iho->hbo", x, w))


@case(r"w[01]$", dense_ok=(r"w[01]$",))
def raw_product():
    """The weights are multiplied with one another first."""
    x = normal(1, 37, 11)
    return raw((11, 4), (4, 7), x=x)(lambda x, u, v: x @ (u @ v))


@case(r"w0$", axes={r"w0$": "io"})
def raw_split():
    """A matrix split into heads."""

    def body(x, w):
        return jnp.einsum("bi,ihk->bhk", x, w.reshape(11, 3, 5))

    return raw((11, 15), x=normal(1, *X))(body)


@case(r"w0$", axes={r"w0$": "io"})
def raw_split_thrice():
    """The outer part of a split side is split again, then the inner one."""

    def body(x, w):
        w = w.reshape(6, 4, 3).reshape(2, 3, 4, 3).reshape(2, 3, 2, 2, 3)
        return jnp.einsum("nabcd,abcdo->no", x.reshape(-1, 2, 3, 2, 2), w)

    return raw((24, 3), x=normal(1, 5, 24))(body)


@case(r"w0$", axes={r"w0$": "iio"})
def raw_merge():
    """Heads merged into a matrix."""
    return raw((3, 5, 7), x=normal(1, 4, 15))(lambda x, w: x @ w.reshape(15, 7))


@case(r"w0$", axes={r"w0$": "ioo"})
def raw_turned_heads():
    """A transpose, then a merge: the heads' two axes change places on the way."""

    def body(x, w):
        return x @ w.transpose(0, 2, 1).reshape(11, 15)

    return raw((11, 3, 5), x=normal(1, *X))(body)


@case(r"w0$", dense_ok=(r"w0$",))
def raw_regrouped():
    """A part of the output side joins the input side."""
    return raw((11, 6), x=normal(1, 5, 22))(lambda x, w: x @ w.reshape(22, 3))


@case(r"w0$", dense_ok=(r"w0$",))
def raw_scrambled():
    """A reshape to sides that share no grid with the old ones."""
    return raw((10, 6), x=normal(1, 5, 12))(lambda x, w: x @ w.reshape(12, 5))


@case(r"w0$", axes={r"w0$": "sio"})
def raw_stack():
    def body(x, w):
        return jnp.tanh(x @ w[0]) @ w[2] + x @ w[-2]

    return raw((3, 11, 11), x=normal(1, *X))(body)


@case(r"w0$", axes={r"w0$": "sio"})
def raw_stack_part():
    """The upper two of three matrices, on two streams."""
    x = normal(1, 2, 5, 11)
    return raw((3, 11, 7), x=x)(lambda x, w: x @ w[1:] + (x @ w[0])[:, :1])


@case(r"w0$", axes={r"w0$": "sio"})
def raw_dynamic_index():
    def body(x, w):
        return jax.lax.fori_loop(0, 3, lambda i, x: jnp.tanh(x @ w[i]), x)

    return raw((3, 11, 11), x=normal(1, *X))(body)


@case(r"w0$", axes={r"w0$": "sio"}, dense_ok=(r"w0$",))
def raw_gathered_experts():
    """Each row picks the matrix it goes through."""

    def body(x, w):
        return jnp.einsum("bi,bio->bo", x, w[jnp.array([1, 0, 3, 3, 2])])

    return raw((4, 11, 7), x=normal(1, *X))(body)


@case(r"w0$", dense_ok=(r"w0$",))
def raw_sliced_rows():
    return raw((11, 7), x=normal(1, *X))(lambda x, w: x[:, :4] @ w[:4] + x[:, 4:] @ w[4:])


@case(r"w0$", dense_ok=(r"w0$",))
def raw_split_columns():
    """A fused projection, cut before the product."""

    def body(x, w):
        query, key, value = jnp.split(w, (4, 9), axis=1)
        return (x @ query).sum(-1), x @ key, x @ value

    return raw((11, 14), x=normal(1, *X))(body)


@case(r"w0$")
def raw_scaled():
    return raw((11, 7), x=normal(1, *X))(lambda x, w: x @ (2.0 * w) + x[:, ::-1] @ (w / 11**0.5))


@case(r"w0$")
def raw_scaled_by_parameter():
    return raw((11, 7), (), x=normal(1, *X))(lambda x, w, gate: x @ (gate * w))


@case(r"w0$", dense_ok=(r"w0$",))
def raw_normalised():
    def body(x, w):
        return x @ (w / jnp.linalg.norm(w, axis=0, keepdims=True))

    return raw((11, 7), x=normal(1, *X))(body)


@case(r"w0$", dense_ok=(r"w0$",))
def raw_masked():
    return raw((11, 11), x=normal(1, *X))(lambda x, w: x @ jnp.tril(w))


@case(r"w[01]$", dense_ok=(r"w[01]$",))
def raw_sum():
    return raw((11, 7), (11, 7), x=normal(1, *X))(lambda x, w, v: x @ (w + v))


@case(r"w[01]$", dense_ok=(r"w[01]$",))
def raw_concatenated():
    def body(x, w, v):
        return x @ jnp.concatenate([w, v], axis=1)

    return raw((11, 7), (11, 4), x=normal(1, *X))(body)


@case(r"w0$")
def raw_double_use():
    """A weight in two products of one expression."""
    x = normal(1, *X)
    return raw((11, 11), x=x)(lambda x, w: (x @ w) * jnp.tanh(x @ w.T) + (x @ w) @ w)


# Custom rules and transforms --------------------------------------------------------------


@jax.custom_vjp
def squashed(w):
    return w / (1 + jnp.abs(w))


# A rule that is not the derivative: a lift that lost it would show.
squashed.defvjp(lambda w: (squashed(w), None), lambda _, g: (3 * g,))


@jax.custom_jvp
def bent(w):
    return jnp.sin(w)


bent.defjvp(lambda primals, tangents: (bent(*primals), 2 * tangents[0]))


@jax.custom_vjp
def product(x, w):
    return x @ w


product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (2 * g @ kept[1].T, 3 * kept[0].T @ g))


@case(r"w0$", dense_ok=(r"w0$",))
def custom_vjp():
    return raw((11, 7), x=normal(1, *X))(lambda x, w: x @ squashed(w))


@case(r"w0$", dense_ok=(r"w0$",))
def custom_vjp_product():
    return raw((11, 7), x=normal(1, *X))(lambda x, w: jnp.tanh(product(x, w)))


@case(r"w0$", dense_ok=(r"w0$",))
def custom_jvp():
    return raw((11, 7), x=normal(1, *X))(lambda x, w: x @ bent(w))


@case(r"w0$")
def custom_rules_beside():
    """Rules on activations leave the weight alone."""
    return raw((11, 7), x=normal(1, *X))(lambda x, w: squashed(bent(x) @ w))


def over_batch(fn):
    """The function on each half of the batch, by `shard_map` over two devices (or one)."""
    devices = jax.devices()[:2]
    mesh = jax.sharding.Mesh(np.array(devices), ("data",))
    rows = jax.sharding.PartitionSpec("data")
    whole = jax.sharding.PartitionSpec()
    return jax.shard_map(fn, mesh=mesh, in_specs=(rows, whole), out_specs=rows)


@case(r"w0$", dense_ok=(r"w0$",))
def shard_map_inside():
    x = normal(1, 6, 11)
    return raw((11, 7), x=x)(lambda x, w: over_batch(lambda x, w: jnp.tanh(x @ w))(x, w))


@case(r"w0$")
def sharding_constraint():
    def body(x, w):
        mesh = jax.sharding.Mesh(np.array(jax.devices()[:2]), ("data",))
        spec = jax.sharding.PartitionSpec(None, "data")
        w = jax.lax.with_sharding_constraint(w, jax.sharding.NamedSharding(mesh, spec))
        return x @ w

    return raw((11, 6), x=normal(1, *X))(body)


@case(r"w0$", axes={r"w0$": "sio"})
def ragged_experts():
    """Rows sorted by expert: 2, 0, 3 and 4 of them."""

    def body(x, w):
        return jax.lax.ragged_dot(x, w, jnp.array([2, 0, 3, 4], jnp.int32))

    return raw((4, 11, 7), x=normal(1, 9, 11))(body)


# Control flow -----------------------------------------------------------------------------


class Cond(nn.Module):
    """Branches that share one layer, and own one each."""

    @nn.compact
    def __call__(self, x, left):
        shared = nn.Dense(11, name="shared")
        one, two = nn.Dense(11, name="left"), nn.Dense(11, name="right")
        branches = (lambda mdl, x: one(shared(x)), lambda mdl, x: shared(nn.tanh(two(x))))
        if self.is_initializing():
            return branches[0](self, x) + branches[1](self, x)
        y = nn.cond(left, *branches, self, x)
        return y + nn.cond(~left, *branches, self, x)


@case(r"kernel$")
def cond():
    return linen(Cond(), normal(1, 5, 11), jnp.array(True))


class Switch(nn.Module):
    @nn.compact
    def __call__(self, x, index):
        layers = [Block(width=9 + i, name=f"layers_{i}") for i in range(3)]
        branches = [lambda mdl, x, layer=layer: layer(x) for layer in layers]
        if self.is_initializing():
            return sum(branch(self, x) for branch in branches)
        return sum(nn.switch(index + i, branches, self, x) for i in range(3))


@case(r"kernel$")
def switch():
    return linen(Switch(), normal(1, 5, 11), jnp.array(0))


class While(nn.Module):
    """A layer applied until the sum is large: the number of turns depends on the data."""

    @nn.compact
    def __call__(self, x):
        layer = nn.Dense(11, name="layer")
        if self.is_initializing():
            return layer(x)

        def more(mdl, carry):
            turn, x = carry
            return (turn < 4) & (jnp.abs(x).sum() < 1000)

        def body(mdl, carry):
            turn, x = carry
            return turn + 1, nn.tanh(layer(x))

        return nn.while_loop(more, body, self, (0, x))


@case(r"kernel$", differentiable=False)
def while_loop():
    return linen(While(), normal(1, 5, 11))


@case(r"w0$", differentiable=False)
def while_constant():
    def body(x, w):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 3, lambda x: jnp.tanh(x @ w) + 1, x)

    return raw((11, 11), x=normal(1, *X))(body)


@case(r"w0$", differentiable=False)
def while_carry():
    """The weight rides in the carry, unchanged."""

    def body(x, w):
        def turn(carry):
            i, x, w = carry
            return i + 1, jnp.tanh(x @ w), w

        return jax.lax.while_loop(lambda carry: carry[0] < 3, turn, (0, x, w))[1]

    return raw((11, 11), x=normal(1, *X))(body)


@case(r"w0$", dense_ok=(r"w0$",))
def loop_carry_changed():
    """The weight shrinks from turn to turn."""

    def body(x, w):
        def turn(i, carry):
            x, w = carry
            return jnp.tanh(x @ w), 0.9 * w

        return jax.lax.fori_loop(0, 3, turn, (x, w))[0]

    return raw((11, 11), x=normal(1, *X))(body)


# Collections, outputs, arguments ----------------------------------------------------------


class Normed(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Conv(7, (3, 3), name="conv")(x)
        x = nn.BatchNorm(use_running_average=not train, name="norm")(x)
        return nn.Dense(5, name="head")(nn.relu(x))


@case(r"kernel$")
def batch_stats():
    """Returns the output and the updated statistics."""
    x = normal(1, 2, 5, 4, 4)
    variables = fill(shapes(Normed(), x, False))

    def fn(params, stats, x, train):
        variables = {"params": params, "batch_stats": stats}
        return Normed().apply(variables, x, train, mutable=["batch_stats"])

    return fn, variables["params"], (variables["batch_stats"], x, True)


@case(r"params/.*kernel$")
def whole_variables():
    """All collections in one tree, and the model's own `apply`."""
    x = normal(1, 2, 5, 4, 4)
    return Normed().apply, fill(shapes(Normed(), x, False)), (x, False)


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x, train: bool):
        x = nn.Dropout(0.4)(nn.Dense(13, name="up")(x), deterministic=not train)
        return nn.Dense(7, name="down")(x)


@case(r"kernel$")
def dropout():
    x = normal(1, 5, 11)
    params = fill(shapes(Dropped(), x, False)["params"])

    def fn(params, x, key):
        return Dropped().apply({"params": params}, x, True, rngs={"dropout": key})

    return fn, params, (x, jax.random.key(3))


@case(r"kernel$", dense_ok=(r"kernel$",))
def returns_params():
    fn, params, args = mlp()
    return lambda params, x: (fn(params, x), params), params, args


@case(r"kernel$")
def returns_objects():
    """Outputs of which some are no arrays."""
    fn, params, args = mlp()

    def described(params, x):
        y = fn(params, x)
        return {"y": y, "name": "mlp", "loss": None, "shape": y.shape, "flag": True, "x": x}

    return described, params, args


class Optional(nn.Module):
    @nn.compact
    def __call__(self, x, bias=None, *, activation: str = "relu", train: bool = False):
        x = getattr(nn, activation)(nn.Dense(13, name="up")(x))
        x = x if bias is None else x + bias
        return nn.Dense(7, name="down")(x if train else x / 2)


@case(r"kernel$", kwargs={"activation": "gelu", "train": True})
def keyword_arguments():
    """Strings, flags and None among the arguments."""
    x = normal(1, 5, 11)

    def fn(params, x, bias, **options):
        return Optional().apply({"params": params}, x, bias, **options)

    return fn, fill(shapes(Optional(), x)["params"]), (x, None)


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x, memory):
        attention = nn.MultiHeadDotProductAttention(3, qkv_features=15, name="attention")
        return MLP(name="mlp")(x + attention(x, memory))


@case(r"kernel$", axes=ATTENTION)
def encoder_decoder():
    """Two trees of parameters in one call."""
    source, target = normal(1, 2, 6, 10), normal(2, 2, 5, 11)
    encoder, decoder = MLP(out=7), Decoder()
    memory = normal(3, 2, 6, 7)
    params = (
        fill(shapes(encoder, source)["params"]),
        fill(shapes(decoder, target, memory)["params"]),
    )

    def fn(params, source, target):
        memory = encoder.apply({"params": params[0]}, source)
        return decoder.apply({"params": params[1]}, target, memory)

    return fn, params, (source, target)


class UNet(nn.Module):
    """Down, attention to a context, up; with a skip."""

    @nn.compact
    def __call__(self, x, context):
        skip = nn.Conv(6, (3, 3), name="in")(x)
        h = nn.silu(nn.GroupNorm(2, name="norm")(skip))
        h = nn.Conv(10, (3, 3), strides=2, name="down")(h)
        flat = h.reshape(h.shape[0], -1, h.shape[-1])
        attention = nn.MultiHeadDotProductAttention(2, qkv_features=14, name="attention")
        h = h + attention(flat, context).reshape(h.shape)
        h = nn.ConvTranspose(6, (2, 2), strides=(2, 2), name="up")(nn.silu(h))
        return nn.Conv(3, (3, 3), name="last")(jnp.concatenate([h, skip], axis=-1))


@case(r"kernel$", axes={QKV: "ioo", r"attention/out/kernel$": "iio"})
def unet():
    return linen(UNet(), normal(1, 2, 4, 6, 3), normal(2, 2, 5, 9))
