"""The quantised leaf, and how it is made and read."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from jlora._algebra._mesh import automatic
from jlora._trees._compound import Compound
from jlora._types import Cut, DType, Shape
from jlora.quant._layout import Layout
from jlora.quant._schemes import POINTS, TINY, Scheme, dynamic_codes, dynamic_levels, levels_of

SECOND = 256  # scales that share a second scale


@dataclasses.dataclass(frozen=True)
class Codec:
    """How one layer's weight becomes arrays, and they the weight again. Hashable: equal layers are one program.

    w = level[code] * scale, computed in float32, then cast to `dtype`.
    """

    scheme: Scheme
    layout: Layout
    dtype: str

    @property
    def arrays(self) -> dict[str, tuple[Shape, DType]]:
        """Shape and dtype of each array of a layer."""
        planes = enumerate(self.scheme.planes)
        held = {f"codes{n or ''}": (self.layout.codes(bits), jnp.dtype(self.scheme.code)) for n, bits in planes}
        counts = self.layout.counts
        if not self.scheme.double:
            return held | {"scales": (counts, jnp.dtype(jnp.float32))}
        second = (-(-math.prod(counts) // SECOND),)
        return held | {
            "scales": (counts, jnp.dtype(jnp.uint8)),
            "scales2": (second, jnp.dtype(jnp.float32)),
            "offset": ((), jnp.dtype(jnp.float32)),
        }

    # --- making ---------------------------------------------------------------------------------------------------

    def encode(self, w: jax.Array) -> tuple[jax.Array, ...]:
        """The arrays of one layer, in the order of `arrays`."""
        w = self.layout.laid(w.astype(jnp.float32))
        scales = self.layout.largest(w)
        x = w * self.layout.spread(1 / jnp.maximum(scales, TINY))
        q = self.scheme.encode(x)
        codes, left = [], self.scheme.bits
        for plane in self.scheme.planes:
            left -= plane
            part = q if plane == 8 else q >> left & np.uint8(2**plane - 1)
            codes.append(self.layout.packed(part, plane))
        return (*codes, *(self._doubled(scales) if self.scheme.double else (scales,)))

    def _order(self) -> tuple[int, ...]:
        """The axes of the scales in torch's order, in which bitsandbytes takes them as one run."""
        return (0,) if self.layout.flat else self.layout.order

    def _doubled(self, scales: jax.Array) -> tuple[jax.Array, ...]:
        """Double quantisation: the scales, less their mean, as codes on the dynamic map, in blocks of 256."""
        run = jnp.transpose(scales, self._order())
        shape, flat = run.shape, run.reshape(-1)
        # Behind a barrier the compiler does not know the divisor. Else it multiplies by its rounded reciprocal, and the
        # mean is not bitsandbytes' to the last bit.
        offset = _sum(flat) / jax.lax.optimization_barrier(jnp.float32(flat.size))
        blocks = jnp.pad(flat - offset, (0, -flat.size % SECOND)).reshape(-1, SECOND)
        real = (np.arange(blocks.size) < flat.size).reshape(blocks.shape)
        largest = jnp.max(jnp.abs(jnp.where(real, blocks, 0)), 1)
        x = blocks * (1 / jnp.maximum(largest, TINY))[:, None]
        point = (jnp.clip(x, -1, 1) + 1) * np.float32(0.5) * np.float32(POINTS - 1) + np.float32(0.5)
        q = jnp.asarray(dynamic_codes()).at[point.astype(jnp.int32)].get(mode="promise_in_bounds")
        q = q.reshape(-1)[: flat.size].reshape(shape)
        back = [self._order().index(n) for n in range(len(shape))]
        return jnp.transpose(q, back), largest, offset

    # --- reading --------------------------------------------------------------------------------------------------

    def _scales(self, arrays: tuple[jax.Array, ...]) -> jax.Array:
        return automatic(self._read_scales, arrays) if self.scheme.double else arrays[0]

    def _read_scales(self, q: jax.Array, second: jax.Array, offset: jax.Array) -> jax.Array:
        run = [self.layout.counts[n] for n in self._order()]
        back = [self._order().index(n) for n in range(len(run))]
        second = jnp.transpose(jnp.repeat(second, SECOND)[: math.prod(run)].reshape(run), back)
        # The product is to be rounded before the offset is added, as bitsandbytes has it. LLVM on CPU would make both
        # one instruction with one rounding, whatever barrier stands between. So a zero is added first: that is what is
        # fused, and the product comes out rounded. No compiler may drop x * 0.0, which is NaN where x is infinite.
        parts = levels_of(q, dynamic_levels()) * second + second * np.float32(0)
        # The barrier keeps this from being fused into what follows, and computed for each element of a block anew.
        return jax.lax.optimization_barrier(parts) + offset

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        """One layer's weight, in its own axes."""
        return automatic(self._read, arrays, PartitionSpec() if self.layout.flat else None)

    @functools.partial(jax.jit, static_argnums=0)  # equal layers are traced once
    def _read(self, *arrays: jax.Array) -> jax.Array:
        planes = self.scheme.planes
        codes, scales = arrays[: len(planes)], self._scales(arrays[len(planes) :])
        q = None
        for plane, part in zip(planes, codes, strict=True):
            part = self.layout.unpacked(part, plane)
            if q is not None:  # a plane may be longer than another by what fills its last byte
                n = min(q.shape[self.layout.pack], part.shape[self.layout.pack])
                q, part = (jax.lax.slice_in_dim(x, 0, n, axis=self.layout.pack) for x in (q, part))
            q = part if q is None else q << plane | part
        assert q is not None
        w = self.scheme.decode(q)
        scale = self.layout.spread(scales)
        if self.layout.flat:
            w, scale = (x[: self.layout.axes[0]] for x in (w, scale))
        return self.layout.unlaid(w * scale).astype(self.dtype)

    def free(self, axis: int) -> bool:
        """Whether the arrays can be cut along an axis of the weight: no block and no byte crosses it."""
        return not self.layout.flat and self.layout.block[axis] == 1 and self.layout.pack != axis

    def along(
        self, arrays: tuple[jax.Array, ...], axis: int, front: int, f: Cut
    ) -> "tuple[tuple[jax.Array, ...], Codec]":
        """The arrays cut by `f(array, axis)` along a free axis, behind `front` stack axes; and how they are read.

        A second scale stands for 256 scales in a row, across the axes, and cannot be cut with them. So the scales are
        computed first; they are a sixty-fourth of the weight.
        """
        planes = len(self.scheme.planes)
        scales = self._scales
        for _ in range(front):
            scales = jax.vmap(scales)
        made = [f(a, axis + front) for a in (*arrays[:planes], scales(arrays[planes:]))]
        shape = tuple(made[0].shape[axis + front] if n == axis else s for n, s in enumerate(self.layout.shape))
        scheme = dataclasses.replace(self.scheme, double=False)
        return tuple(made), dataclasses.replace(
            self, scheme=scheme, layout=dataclasses.replace(self.layout, shape=shape)
        )


def _sum(x: jax.Array) -> jax.Array:
    """The sum of a vector in the order in which torch sums on a CPU, which gives bitsandbytes' offset bit for bit.

    torch has 8 lanes in each of 4 registers, and adds up 16 rows of them at a time.
    """
    lanes, ways = 8, 4
    n = x.size // lanes
    vectors = x[: n * lanes].reshape(n, lanes)
    rows = n // ways
    total = vectors[: rows * ways].reshape(rows, ways * lanes)
    while total.shape[0] > 1:
        total = jnp.pad(total, ((0, -total.shape[0] % 16), (0, 0))).reshape(-1, 16, ways * lanes)
        total = functools.reduce(jnp.add, [total[:, k] for k in range(16)])
    parts = total.reshape(ways, lanes) if rows else jnp.zeros((ways, lanes), x.dtype)
    part = functools.reduce(jnp.add, [parts[0], *(vectors[k] for k in range(rows * ways, n)), *parts[1:]])
    rest = [x[k] for k in range(n * lanes, x.size)]
    return functools.reduce(jnp.add, [*rest, *(part[k] for k in range(lanes))])


Static: TypeAlias = tuple[Codec, str]  # of a leaf: how its arrays are read, and the letters of its axes


@jax.tree_util.register_pytree_with_keys_class
class Quantized(Compound):
    """A quantised weight: one leaf, of the weight's shape and dtype, that holds codes and scales.

    Attributes:
      arrays: `{name: array}`: `codes` (and `codes1`, the lowest bit of 3), `scales`; with double quantisation the
        scales are codes themselves, with `scales2` and `offset`. Stack axes stand first in all of them.
      codec: how they are read.

    `leaf.dequantize()` is the weight; so is `jnp.asarray(leaf)`. `jlora.lift` contracts with the codes instead.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> leaf = jlora.quantize({"query": {"kernel": jnp.ones((128, 4))}}, "nf4")["query"]["kernel"]
      >>> leaf
      Quantized((128, 4), float32, nf4)
      >>> {name: a.shape for name, a in leaf.arrays.items()}
      {'codes': (64, 4), 'scales': (2, 4)}
    """

    def __init__(self, arrays: tuple[jax.Array, ...], codec: Codec, kernel: str):
        self._arrays = arrays
        self.codec = codec
        self.kernel = kernel

    def tree_flatten_with_keys(self) -> tuple[tuple[tuple[object, jax.Array], ...], Static]:
        names = self.codec.arrays
        return tuple((jax.tree_util.GetAttrKey(n), a) for n, a in zip(names, self._arrays, strict=True)), self._static

    def tree_flatten(self) -> tuple[tuple[jax.Array, ...], Static]:
        return self._arrays, self._static

    @property
    def _static(self) -> Static:
        return self.codec, self.kernel

    @classmethod
    def tree_unflatten(cls, static: Static, arrays: Iterable[jax.Array]) -> "Quantized":
        return cls(tuple(arrays), *static)

    @property
    def arrays(self) -> dict[str, jax.Array]:
        return dict(zip(self.codec.arrays, self._arrays, strict=True))

    @property
    def scheme(self) -> Scheme:
        return self.codec.scheme

    @property
    def dtype(self) -> DType:
        return jnp.dtype(self.codec.dtype)

    @property
    def _stack(self) -> tuple[int, ...]:
        """The sizes of the stack axes, which `vmap` and `scan` take away and `jnp.stack` adds."""
        codes = self._arrays[0]
        return tuple(codes.shape[: len(codes.shape) - len(self.codec.layout.axes)])

    @property
    def roles(self) -> str:
        more = len(self._stack) - self.kernel.count("s")
        return "s" * more + self.kernel if more > 0 else self.kernel.replace("s", "", -more)

    @property
    def shape(self) -> tuple[int, ...]:
        stack, own = iter(self._stack), iter(self.codec.layout.shape)
        return tuple(next(stack) if role == "s" else next(own) for role in self.roles)

    @property
    def nbytes(self) -> int:
        """The bytes of all its arrays."""
        return sum(math.prod(a.shape) * jnp.dtype(a.dtype).itemsize for a in self._arrays)

    def parts(self) -> tuple[tuple[jax.Array, ...], Callable[..., jax.Array]]:
        return self._arrays, self.codec

    def wrong(self) -> str:
        pairs = zip(self.codec.arrays.items(), self._arrays, strict=True)
        return ", ".join(f"{name} is {a.dtype}, not {dtype}" for (name, (_, dtype)), a in pairs if a.dtype != dtype)

    def axes(self) -> tuple[tuple[int | None, ...], ...]:
        stack = [n for n, role in enumerate(self.roles) if role == "s"]
        own: list[int | None] = [n for n, role in enumerate(self.roles) if role != "s"]
        found = []
        for name, (shape, _) in self.codec.arrays.items():
            follows = not self.codec.layout.flat and name not in ("scales2", "offset")
            found.append((*stack, *(own if follows else [None] * len(shape))))
        return tuple(found)

    def describe(self) -> str:
        return str(self.scheme)

    def __repr__(self) -> str:
        if not all(hasattr(a, "shape") for a in self._arrays):
            return f"Quantized(a prefix or a mask, {self.scheme})"
        return f"Quantized({self.shape}, {self.dtype}, {self.scheme})"
