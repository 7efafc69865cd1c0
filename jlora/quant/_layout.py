"""Where the codes and scales of one layer's weight stand: blocks along axes, and bits in bytes."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jlora.quant._schemes import Scheme


@dataclasses.dataclass(frozen=True)
class Layout:
    """The blocks of a weight of one layer, of `shape`.

    Codes and scales keep the weight's own axes: codes are packed along one of them, and a scale stands for `block`
    elements along each. So whatever shards the weight's axes shards codes and scales, and computing the weight is
    elementwise. Where blocks do not fit the axes (an input side that 64 does not divide), the layout is *flat*: the
    weight as torch lays it out, outputs first, in one run with one partial block at its end.

    Attributes:
      shape: of the weight.
      order: its axes in torch's order: outputs, then inputs.
      block: how many elements a scale stands for along each axis; `(n,)` of the one run where `flat`.
      pack: the axis along which codes share bytes.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    block: tuple[int, ...]
    pack: int
    flat: bool = False

    @property
    def axes(self) -> tuple[int, ...]:
        """The sizes of the axes that codes and scales have, before packing."""
        return (math.prod(self.shape),) if self.flat else self.shape

    @property
    def counts(self) -> tuple[int, ...]:
        """The shape of the scales."""
        return tuple(-(-n // b) for n, b in zip(self.axes, self.block, strict=True))

    def codes(self, plane: int) -> tuple[int, ...]:
        """The shape of the array of bytes that holds `plane` bits of each code."""
        return tuple(-(-n * plane // 8) if a == self.pack else n for a, n in enumerate(self.axes))

    # --- between the weight and blocks ---------------------------------------------------------------------------

    def laid(self, w: jax.Array) -> jax.Array:
        """The weight in the layout's axes; of a flat one, zeros fill the last block."""
        if not self.flat:
            return w
        w = jnp.transpose(w, self.order).reshape(-1)
        return jnp.pad(w, (0, self.counts[0] * self.block[0] - w.size))

    def unlaid(self, w: jax.Array) -> jax.Array:
        """The inverse of `laid`."""
        if not self.flat:
            return w
        w = w[: self.axes[0]].reshape([self.shape[n] for n in self.order])
        return jnp.transpose(w, [self.order.index(n) for n in range(len(self.order))])

    @property
    def _cells(self) -> tuple[int, ...]:
        """Each axis as two: which block, and where in it."""
        return tuple(x for pair in zip(self.counts, self.block, strict=True) for x in pair)

    def largest(self, w: jax.Array) -> jax.Array:
        """The largest magnitude of each block."""
        return jnp.max(jnp.abs(w.reshape(self._cells)), tuple(range(1, 2 * len(self.block), 2)))

    def spread(self, scales: jax.Array) -> jax.Array:
        """A scale for every element."""
        cells = jnp.expand_dims(scales, tuple(range(1, 2 * len(self.block), 2)))
        whole = jnp.broadcast_to(cells, self._cells)
        return whole.reshape([n * b for n, b in zip(self.counts, self.block, strict=True)])

    # --- bits ------------------------------------------------------------------------------------------------------

    def packed(self, q: jax.Array, plane: int) -> jax.Array:
        """Codes of `plane` bits, several to a byte; the first is in the highest bits."""
        per = 8 // plane
        q = jax.lax.slice_in_dim(q, 0, self.axes[self.pack], axis=self.pack)
        if per == 1:
            return q
        short = -q.shape[self.pack] % per
        q = jnp.pad(q, [(0, short if a == self.pack else 0) for a in range(q.ndim)])
        q = q.reshape(*q.shape[: self.pack], -1, per, *q.shape[self.pack + 1 :])
        parts = [jax.lax.index_in_dim(q, n, self.pack + 1, keepdims=False) << (8 - plane * (n + 1)) for n in range(per)]
        return sum(parts[1:], parts[0])

    def unpacked(self, codes: jax.Array, plane: int) -> jax.Array:
        """The inverse of `packed`; longer where codes do not fill the last byte."""
        per = 8 // plane
        if per == 1:
            return codes
        shifts = np.arange(8 - plane, -1, -plane, dtype=np.uint8)
        shifts = np.expand_dims(shifts, [n for n in range(codes.ndim + 1) if n != self.pack + 1])
        q = jnp.expand_dims(codes, self.pack + 1) >> shifts & np.uint8(2**plane - 1)
        return q.reshape(*codes.shape[: self.pack], -1, *codes.shape[self.pack + 1 :])


def layout(scheme: Scheme, shape: tuple[int, ...], ins: tuple[int, ...], torch: bool) -> Layout:
    """The layout of one layer's weight whose axes `ins` are its input side; flat where `torch` asks for it."""
    outs = tuple(n for n in range(len(shape)) if n not in ins)
    order = (*outs, *ins)
    # A block runs along the last input axis. Where that is shorter, it spans the next one too, if the sizes divide it.
    block = [1] * len(shape)
    left = scheme.block
    for n in reversed(ins):
        block[n] = shape[n] if left is None else math.gcd(left, shape[n])
        if left is not None:
            if block[n] not in (left, shape[n]):
                break
            left //= block[n]
    wide = [n for n in ins if shape[n] > 1]
    pack = wide[-1] if wide else len(shape) - 1
    whole = all(shape[pack] * plane % 8 == 0 for plane in scheme.planes)
    if left in (1, None) and whole and not torch:
        return Layout(shape, order, tuple(block), pack)
    size = scheme.block or math.prod(shape[n] for n in ins)
    return Layout(shape, order, (size,), 0, flat=True)
