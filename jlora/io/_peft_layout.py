"""How torch lays an adapter's tensors out, and how jlora does; and the file that holds them.

torch stores (out, in), and (out, in, *window) of a convolution; Flax (in, out) and (*window, in, out), its axes
split where a kernel has several. jlora's factors have the rank first: `a (r, in...)` in the kernel's order, `b (r,
out...)`. All functions are of one layer: a leaf here has no stack axes.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from jlora._trees._leaf import Leaf
from jlora._types import Shape

TENSORS_FILE = "adapter_model.safetensors"
DIGEST = "jlora_sha256"

#: The dtypes of tensors that fit into float32, the usual dtype of factors, without loss.
DTYPES = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


def one_layer(leaf: Leaf, index: Shape) -> Leaf:
    """A leaf without its stack axes; a vector (norm, bias) of a stacked module has one leading axis an index."""
    if not leaf.axes("ik") and not leaf.stack:
        leaf = dataclasses.replace(leaf, roles="s" * len(index) + leaf.roles[len(index) :])
    kept = [n for n, role in enumerate(leaf.roles) if role != "s"]
    roles = "".join(leaf.roles[n] for n in kept)
    return dataclasses.replace(leaf, shape=tuple(leaf.shape[n] for n in kept), roles=roles)


def is_embedding(leaf: Leaf) -> bool:
    """Whether a leaf is an Embedding's, which torch stores as Flax does."""
    return leaf.name == "embedding"


# --- low-rank factors ---------------------------------------------------------------------------------------------


def factor_names(leaf: Leaf) -> dict[str, str]:
    """What peft calls a, b and m of a leaf."""
    two = ("lora_embedding_A", "lora_embedding_B") if is_embedding(leaf) else ("lora_A.weight", "lora_B.weight")
    return {"a": two[0], "b": two[1], "m": "lora_magnitude_vector"}


def factor_shapes(leaf: Leaf, rank: int) -> dict[str, Shape]:
    """The shapes of peft's tensors for a, b and m."""
    d_in, d_out, window = leaf.size("i"), leaf.size("o"), leaf.sizes("k")
    ones = (1,) * len(window)
    m = (1, d_out, *ones) if window else (d_out,)
    return {"a": (rank, d_in, *window), "b": (d_out, rank, *ones), "m": m}


def _order(leaf: Leaf) -> tuple[list[int], list[int]]:
    """The axes of a's input side as torch has them (channels, then window), and as the kernel does."""
    return [*leaf.axes("i"), *leaf.axes("k")], list(leaf.axes("ik"))


def from_torch(leaf: Leaf, name: str, tensor: np.ndarray) -> np.ndarray:
    """One of peft's tensors, of the shape above, as jlora's factor a, b or m."""
    if name == "a":
        theirs, ours = _order(leaf)
        tensor = tensor.reshape(-1, *(leaf.shape[n] for n in theirs))
        return tensor.transpose(0, *(1 + theirs.index(n) for n in ours))
    if name == "b":
        return tensor.reshape(leaf.size("o"), -1).T.reshape(-1, *leaf.sizes("o"))
    return tensor.reshape(leaf.sizes("o"))


def to_torch(leaf: Leaf, name: str, factor: np.ndarray) -> np.ndarray:
    """The inverse of `from_torch`."""
    shape = factor_shapes(leaf, factor.shape[0] if name in "ab" else 0)[name]
    if name == "a":
        theirs, ours = _order(leaf)
        return factor.transpose(0, *(1 + ours.index(n) for n in theirs)).reshape(shape)
    return (factor.reshape(factor.shape[0], -1).T if name == "b" else factor).reshape(shape)


# --- whole leaves -------------------------------------------------------------------------------------------------


def _weight_order(leaf: Leaf) -> list[int]:
    return [n for roles in ("iok" if is_embedding(leaf) else "oik") for n in leaf.axes(roles)]


def weight_shape(leaf: Leaf) -> Shape:
    """The shape torch gives a whole leaf: (out, in, *window), (in, out) of an Embedding, (out,) of a vector."""
    sides = [math.prod(leaf.sizes(r)) for r in ("io" if is_embedding(leaf) else "oi") if leaf.axes(r)]
    return (*sides, *leaf.sizes("k"))


def weight_from_torch(leaf: Leaf, tensor: np.ndarray) -> np.ndarray:
    """A whole leaf from torch's layout."""
    order = _weight_order(leaf)
    return tensor.reshape([leaf.shape[n] for n in order]).transpose(*(order.index(n) for n in range(len(order))))


def weight_to_torch(leaf: Leaf, value: np.ndarray) -> np.ndarray:
    """A whole leaf in torch's layout."""
    return value.transpose(*_weight_order(leaf)).reshape(weight_shape(leaf))


def table(leaf: Leaf, value: np.ndarray) -> np.ndarray:
    """A table with one row for each id."""
    return value.transpose(*leaf.axes("ik"), *leaf.axes("o")).reshape(leaf.size("ik"), -1)


def change(value: np.ndarray, base: np.ndarray) -> np.ndarray:
    """value - base in float32. The sum `base + change` is the value but for its rounding, and has this change again."""
    return (value - base).astype(np.float32)


# --- the file -----------------------------------------------------------------------------------------------------


def _needs() -> ImportError:
    return ImportError("files of peft need safetensors: pip install 'jlora[peft]'")


def read(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of a safetensors file.

    Raises:
      ImportError: safetensors is not installed.
      ValueError: a file that is cut short or damaged, or holds other numbers than float32, float16 and bfloat16.
    """
    try:
        import safetensors
    except ImportError:
        raise _needs() from None
    try:
        found = dict(safetensors.deserialize(path.read_bytes()))
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is cut short or damaged ({str(error)[:200]})") from None
    bad = sorted({f"{name!r:.100} ({x['dtype']})" for name, x in found.items() if x["dtype"] not in DTYPES})
    if bad:
        raise ValueError(f"{path}: jlora loads F32, F16 and BF16, not {', '.join(bad[:8])}")
    return {n: np.frombuffer(bytearray(x["data"]), DTYPES[x["dtype"]]).reshape(x["shape"]) for n, x in found.items()}


def stated(path: Path) -> str | None:
    """The digest that jlora wrote into a safetensors file; None in files of others."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))  # `read` has looked at it
    return header.get("__metadata__", {}).get(DIGEST)


def digest(tensors: Mapping[str, np.ndarray], config: str) -> str:
    """Of tensors, and of what a configuration says of them."""
    found = hashlib.sha256(config.encode())
    for name, a in sorted(tensors.items()):
        found.update(f"{name} {a.dtype} {a.shape} ".encode())
        found.update(np.ascontiguousarray(a).tobytes())
    return found.hexdigest()


def write(tensors: Mapping[str, np.ndarray], config: str) -> bytes:
    """Tensors as the bytes of a safetensors file, with a digest of them and of what the configuration says.

    Raises:
      ImportError: safetensors is not installed.
    """
    try:
        import safetensors.numpy
    except ImportError:
        raise _needs() from None
    whole = {name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)}
    return safetensors.numpy.save(whole, {"format": "pt", DIGEST: digest(whole, config)})
