"""Which axes of a weight are input, output, window or stack.

One letter an axis: `i` input, `o` output, `k` a convolution's window, `s` stack (scanned layers, experts). The
letters come from the user (`axes={pattern: letters}`), from a trace (`jlora.infer_axes`), or, failing both, from
the Flax conventions below. A wrong guess never makes a wrong number, only a worse contraction.
"""

import dataclasses
import math
import re
from typing import Any

import jax.numpy as jnp

from jlora import _tree

_INTO_HEADS = re.compile(r"(^|[_.])(q|k|v|qkv|kv|query|key|value|q_proj|k_proj|v_proj)([_.]|\d|$)")
_OUT_OF_HEADS = re.compile(r"(^|[_.])(out|o|o_proj|out_proj|output|attn_vec)([_.]|\d|$)")
_CONV = re.compile(r"conv|patch|projection", re.IGNORECASE)
_VECTOR = ("bias", "scale", "offset", "gamma", "beta")


@dataclasses.dataclass(frozen=True)
class Leaf:
    """What a method may know of a weight: its path, shape, dtype and one letter an axis. No values."""

    path: str
    shape: tuple[int, ...]
    dtype: Any
    roles: str

    @property
    def name(self) -> str:
        """The last step of the path: `kernel`, `bias`, `embedding`, ..."""
        return self.path.rsplit("/", 1)[-1]

    def axes(self, roles: str) -> tuple[int, ...]:
        """The axes that carry one of `roles`, in the kernel's order."""
        return tuple(n for n, r in enumerate(self.roles) if r in roles)

    def sizes(self, roles: str) -> tuple[int, ...]:
        """Their sizes."""
        return tuple(self.shape[n] for n in self.axes(roles))

    def size(self, roles: str) -> int:
        """The product of their sizes: `size("ik")` is the fan-in, `size("o")` the fan-out."""
        return math.prod(self.sizes(roles))

    @property
    def stack(self) -> tuple[int, ...]:
        """The sizes of the stack axes, which stand first in every stored factor."""
        return self.sizes("s")


def conventions(path: str, shape: tuple[int, ...]) -> str:
    """The letters that Flax's names and shapes suggest."""
    steps = path.split("/")
    name, parent = steps[-1], steps[-2] if len(steps) > 1 else ""
    n = len(shape)
    if n == 0:
        return ""
    if n == 1 or name in _VECTOR:
        return "o" * n
    if n == 2:
        return "io"
    if name == "embedding":
        return "s" * (n - 2) + "io"
    a, b, c = shape[-3:]
    if _INTO_HEADS.search(parent) and a % (b * c) == 0:
        return "s" * (n - 3) + "ioo"
    if _OUT_OF_HEADS.search(parent) and c % (a * b) == 0:
        return "s" * (n - 3) + "iio"
    if _CONV.search(parent) or n == 4 and max(shape[:2]) <= 16 and name == "kernel":
        windows = min(n - 2, 3)
        return "s" * (n - 2 - windows) + "k" * windows + "io"
    return "s" * (n - 2) + "io"


def roles(path: str, shape: tuple[int, ...], axes: dict[str, str] | None) -> str:
    """The letters of one weight: the user's where a pattern matches, else the conventions'."""
    for pattern, letters in (axes or {}).items():
        if _tree.search(pattern, path):
            if len(letters) != len(shape) or set(letters) - set("iosk"):
                raise ValueError(
                    f"axes={{{pattern!r}: {letters!r}}} does not fit {path!r} of shape {shape}: "
                    f"write {len(shape)} letters out of i (in), o (out), k (window), s (stack)"
                )
            return letters
    return conventions(path, shape)


def is_trainable_dtype(dtype: Any) -> bool:
    """Whether a weight of this dtype can be adapted: a real floating point type."""
    return jnp.issubdtype(dtype, jnp.floating)
