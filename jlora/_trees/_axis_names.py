"""What logical axis names say: `("embed", "layers", "heads", "kv")` is `isoo`.

Names come from Flax's boxes (`nn.LogicallyPartitioned`, `nn.Partitioned`), from the metadata of `nnx.Variable`s, and
from the classes of NNX layers. Names of mesh axes ("fsdp", "tensor") say nothing of sides.
"""

import re
from collections.abc import Callable, Sequence

from flax import nnx

from jlora._trees import _conventions as words
from jlora._types import PyTree

_KEYS = ("out_sharding", "sharding_names", "sharding", "names")  # flax from 0.10 to 0.12


def of(box: PyTree) -> tuple[str | None, ...] | None:
    """The names that a box or an `nnx.Variable` carries, one an axis; None where it carries none."""
    held = (
        box.get_metadata() if callable(getattr(box, "get_metadata", None)) else {"names": getattr(box, "names", None)}
    )
    names = next((held[key] for key in _KEYS if isinstance(held.get(key), tuple) and held[key]), None)
    return names and tuple(n if isinstance(n, str) else None for n in names)


def of_layers(module: object) -> dict[tuple[str | int, ...], tuple[str, ...]]:
    """`{steps: names}` of the kernels that the layers of an NNX module hold, by what their classes say."""
    if not isinstance(module, nnx.Module):
        return {}
    kernels = {(*steps, "kernel"): layer for steps, layer in nnx.iter_modules(module) if hasattr(layer, "kernel")}
    return {
        steps: names(layer)
        for steps, layer in kernels.items()
        for kind, names in _LAYERS
        if type(layer) is kind and len(names(layer)) == len(layer.kernel.shape)  # type: ignore[attr-defined]
    }


def _many(size: int | Sequence[int]) -> int:
    return 1 if isinstance(size, int) else len(size)


def _window(layer: nnx.Conv | nnx.ConvTranspose) -> tuple[str, ...]:
    return ("window",) * _many(layer.kernel_size)


# flax/nnx/nn/linear.py: what `kernel_shape` is made of
_LAYERS: tuple[tuple[type, Callable[[PyTree], tuple[str, ...]]], ...] = (
    (nnx.Linear, lambda layer: ("conv_in", "conv_out")),
    (nnx.LinearGeneral, lambda layer: ("conv_in",) * _many(layer.axis) + ("conv_out",) * _many(layer.out_features)),
    (nnx.Conv, lambda layer: (*_window(layer), "conv_in", "conv_out")),
    (
        nnx.ConvTranspose,
        lambda layer: (
            *_window(layer),
            *(("conv_out", "conv_in") if layer.transpose_kernel else ("conv_in", "conv_out")),
        ),
    ),
)


def letters(names: tuple[str | None, ...] | None, shape: tuple[int, ...]) -> str:
    """One letter an axis, `?` where the names do not tell."""
    if names is None or len(names) != len(shape):
        return "?" * len(shape)
    kinds = [_kind(name) for name in names]
    rest = [k for k in kinds if k != "s"]
    if "x" in rest:  # experts are a stack of matrices, or what a router's one matrix makes
        stack = "m" in rest and "h" in rest
        kinds = ["sh"[not stack] if k == "x" else k for k in kinds]
        rest = [k for k in kinds if k != "s"]
    sides = iter(_sides(rest))
    return "".join("s" if k == "s" else next(sides) for k in kinds)


def _kind(name: str | None) -> str:
    """s stack, x experts, m the model's side, h the other one, b an index, or a letter of a convolution; ? unknown."""
    if name is None:
        return "?"
    if name in words.CONV_WORDS:
        return words.CONV_WORDS[name]
    tables = (
        ("s", words.STACK_WORDS), ("x", words.EXPERT_WORDS), ("m", words.MODEL_WORDS), ("h", words.MADE_WORDS),
        ("b", words.INDEX_WORDS), ("k", words.WINDOW_WORDS),
    )  # fmt: skip
    return next((kind for kind, pattern in tables if re.fullmatch(pattern, name)), "?")


def _sides(kinds: list[str]) -> str:
    """Letters of what is no stack."""
    have = set(kinds)
    if len(kinds) < 2:
        return "o" * len(kinds)
    if have <= set("iok") and {"i", "o"} <= have:
        return "".join(kinds)
    if "b" in have and not have & set("?iok"):  # an index picks rows
        return "".join("i" if k == "b" else "o" for k in kinds)
    if have == {"h"} and len(kinds) <= 2:
        return "o" * len(kinds)  # a bias of heads
    if have != {"m", "h"}:
        return "?" * len(kinds)
    # what stands first is contracted, but for heads in front of a model's axis that is not the last
    first = "m" if kinds[0] == "m" or kinds[-1] != "m" else "h"
    return "".join("i" if k == first else "o" for k in kinds)
