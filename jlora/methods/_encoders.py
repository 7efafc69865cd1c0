"""Networks that make prompts, P = f(E): E is trained in place of P, and f is dropped after training."""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jlora._algebra._words import Array
from jlora.methods.base import normal, uniform


@dataclasses.dataclass(frozen=True)
class MLP:
    """f(E) = g(... g(E w1 + b1) ...) w + b.

    Attributes:
      sizes: of E, the inner layers, P: (e, h, ..., d).
      activation: g, a function of `jax.nn` by name.
    """

    sizes: tuple[int, ...]
    activation: str

    def arrays(self, count: int) -> tuple[Array, ...]:
        """E `(count, e)`, then the weight and bias of each layer; drawn as torch draws them."""
        return (Array("embedding", normal(1.0), (count, self.sizes[0])), *linear(self.sizes, ""))

    def __call__(self, x: jax.Array, *layers: jax.Array) -> jax.Array:
        for n, (w, b) in enumerate(zip(layers[::2], layers[1::2], strict=True)):
            x = (getattr(jax.nn, self.activation)(x) if n else x) @ w + b
        return x


@dataclasses.dataclass(frozen=True)
class LSTM:
    """f(E) = MLP(h), h = [forward; backward] of a bidirectional LSTM of several layers over E's rows.

    i, f, g, o = x wx + h wh + b;  c = sigma(f) c + sigma(i) tanh(g);  h = sigma(o) tanh(c).

    Attributes:
      sizes: of E, of h in one direction, of P.
      layers: how many.
    """

    sizes: tuple[int, int, int]
    layers: int = 2

    @property
    def head(self) -> MLP:
        _, h, d = self.sizes
        return MLP((2 * h, 2 * h, d), "relu")

    def arrays(self, count: int) -> tuple[Array, ...]:
        """E `(count, e)`; of each layer and direction wx `(in, 4 h)`, wh `(h, 4 h)`, b `(4 h)`; the MLP's."""
        e, h, _ = self.sizes
        drawn = uniform(1 / math.sqrt(h))
        cells = [
            array
            for n in range(self.layers)
            for way in ("forward", "backward")
            for array in (
                Array(f"wx_{n}_{way}", drawn, (2 * h if n else e, 4 * h)),
                Array(f"wh_{n}_{way}", drawn, (h, 4 * h)),
                Array(f"b_{n}_{way}", drawn, (4 * h,)),
            )
        ]
        return (Array("embedding", normal(1.0), (count, e)), *cells, *linear(self.head.sizes, ""))

    def __call__(self, x: jax.Array, *arrays: jax.Array) -> jax.Array:
        for n in range(self.layers):
            ways = [self._over(x, *arrays[6 * n + 3 * k : 6 * n + 3 * k + 3], back=bool(k)) for k in range(2)]
            x = jnp.concatenate(ways, -1)
        return self.head(x, *arrays[6 * self.layers :])

    def _over(self, x: jax.Array, wx: jax.Array, wh: jax.Array, b: jax.Array, back: bool) -> jax.Array:
        """One layer in one direction."""

        def cell(state: tuple[jax.Array, jax.Array], x: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
            h, c = state
            i, f, g, o = jnp.split(x + h @ wh, 4)
            c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
            h = jax.nn.sigmoid(o) * jnp.tanh(c)
            return (h, c), h

        zero = jnp.zeros(wh.shape[0], x.dtype)
        _, h = lax.scan(cell, (zero, zero), x @ wx + b, reverse=back)
        return h


def linear(sizes: Sequence[int], name: str) -> tuple[Array, ...]:
    """A weight `(in, out)` and a bias for each step from one size to the next."""
    arrays: list[Array] = []
    for n, (i, o) in enumerate(zip(sizes, sizes[1:], strict=False), 1):
        drawn = uniform(1 / math.sqrt(i))
        arrays += [Array(f"w{n}{name}", drawn, (i, o)), Array(f"b{n}{name}", drawn, (o,))]
    return tuple(arrays)
