"""The arrays of an adapter: their names in an Orbax checkpoint, their bytes, and what the manifest says of them."""

import hashlib
import urllib.parse
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._types import DType, Place, PyTree
from jlora.adapted import Adapted, check_adapted, derived
from jlora.io import _checkpoint, _manifest
from jlora.io._record import Content, several


def check_concrete(adapted: Adapted, parts: Callable[[Adapted], PyTree], what: str) -> None:
    """Raises unless the parts of an `Adapted` that `what` writes are values of this process."""
    check_adapted(what, adapted)
    if jax.process_count() > 1:
        raise NotImplementedError(
            f"{what} runs in one process, and this is one of {jax.process_count()}. In all of them write\n"
            "  with ocp.StandardCheckpointer() as checkpointer:  # leaving it waits until all is written\n"
            "      checkpointer.save(path, {'trainable': adapted.trainable})\n"
            f"and in one process then adapted = jlora.load(path, params, spec=...), and {what}"
        )
    for leaf in jax.tree.leaves(parts(adapted)):
        if isinstance(leaf, Tracer):
            raise TypeError(f"{what} writes files and cannot be traced: call it outside jit, grad and vmap")
        if isinstance(leaf, jax.Array) and leaf.is_deleted():
            raise ValueError(f"an array of this adapter was donated: give {what} what the donating function returned")


def stored_name(side: str, group: str, factor: str) -> str:
    """A flat name without dots and slashes, which Orbax joins names by; two factors never share one."""
    quote = lambda x: urllib.parse.quote(x, safe="", errors="surrogatepass").replace(".", "%2E")  # noqa: E731
    return f"{side}:{quote(group)}:{quote(factor)}"


def _host(leaf: PyTree, where: str) -> tuple[np.ndarray, str | None]:
    """An array in the host's memory, and the name of its generator if it is a key."""
    number = hasattr(leaf, "dtype") or isinstance(leaf, (bool, int, float, complex))
    if isinstance(leaf, jax.ShapeDtypeStruct) or not number:
        raise ValueError(f"{where} is {type(leaf).__name__} and has no values to save")
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(leaf)), str(jax.random.key_impl(leaf))
    array = np.asarray(leaf if hasattr(leaf, "dtype") else jnp.asarray(leaf))
    check_dtype(array.dtype, where)
    return array.astype(array.dtype.newbyteorder("="), copy=False), None


def _is_number(dtype: np.dtype) -> bool:
    return dtype == np.bool_ or bool(jnp.issubdtype(dtype, jnp.number))  # float8, int4 and their like are numbers too


def check_dtype(dtype: np.dtype, where: str) -> None:
    """ValueError where JAX could not hold an array of this dtype as it is."""
    if not _is_number(dtype):
        raise ValueError(f"{where} is of dtype {dtype}, not of numbers")
    if dtype.itemsize > (16 if dtype.kind == "c" else 8) or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(f"{where} is of dtype {dtype}, which JAX truncates: jax.config.update('jax_enable_x64', True)")


def _dtype(name: str, where: str) -> np.dtype:
    try:
        dtype = np.dtype(name)
    except Exception:  # NumPy parses the string, and raises what it likes
        dtype = np.dtype(object)
    if not _is_number(dtype):
        raise ValueError(f"{where} has an unknown dtype, {name!r:.60}")
    return dtype


def floating(name: str, where: str) -> str:
    """The name of a dtype of weights; ValueError where it is another's, or spelled otherwise."""
    dtype = _dtype(name, where)
    check_dtype(dtype, where)
    if dtype.name != name or not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{where} is of dtype {name!r:.60}, not of floating point numbers")
    return name


#: What Orbax, that is TensorStore, can store beside NumPy's own numbers.
_STORABLE = frozenset(
    "bfloat16 int2 int4 float4_e2m1fn float8_e8m0fnu float8_e3m4 float8_e5m2 float8_e5m2fnuz float8_e4m3fn "
    "float8_e4m3fnuz float8_e4m3b11fnuz".split()
)


def storable(dtype: DType) -> bool:
    """Whether Orbax has a type for elements of this dtype."""
    return dtype.name in _STORABLE or dtype.kind in "biufc"


def _stored(dtype: np.dtype) -> np.dtype:
    """The dtype an array is stored in: Orbax knows bfloat16, but not all of the smaller types."""
    return dtype if dtype.kind in "biufc" or dtype.name == "bfloat16" else np.dtype(np.uint8)


def _digest(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()


def gather(adapted: Adapted) -> tuple[dict[str, np.ndarray], dict[str, Content], dict[str, str]]:
    """The arrays of an adapter by their stored names, what the manifest says of them, and digests of those left out.

    A factor that the plan makes again is left out where it is what would be made: a cast one is not, nor one that came
    from a weight of another path.
    """
    leaves: dict[Place, tuple[jax.Array, str]] = {}
    for side, tree in (("trainable", adapted.trainable), ("frozen", adapted.frozen.factors)):
        if not isinstance(tree, Mapping) or not all(isinstance(v, Mapping) for v in tree.values()):
            raise ValueError(f"the {side} factors are no {{group: {{factor: array}}}}")
        leaves |= {(group, factor): (leaf, side) for group, named in tree.items() for factor, leaf in named.items()}
    have = {place: (np.shape(leaf), side == "trainable") for place, (leaf, side) in leaves.items()}
    bad = _manifest.misfits(have, adapted.frozen.plan)
    if bad:
        raise ValueError("the factors of this adapter do not fit its plan:" + several(bad))
    arrays, factors, drawn = {}, {}, {}
    made_again = derived(adapted.frozen.plan)
    for (group, factor), (leaf, side) in leaves.items():
        name = stored_name(side, group, factor)
        array, said = as_stored(leaf, f"{side} factor {group!r}: {factor!r}")
        if (group, factor) in made_again and said == as_stored(made_again[group, factor](), name)[1]:
            drawn[name] = said["sha256"]
            continue
        factors[name] = said
        if array.size:  # Orbax refuses an array without elements; the manifest has its shape and dtype
            arrays[name] = array
    return arrays, factors, drawn


def as_stored(leaf: PyTree, where: str) -> tuple[np.ndarray, Content]:
    """An array as Orbax stores it, and what a manifest says of it."""
    array, key = _host(leaf, where)
    said = {"shape": list(array.shape), "dtype": array.dtype.name, "key": key, "sha256": _digest(array)}
    return np.ascontiguousarray(array).view(_stored(array.dtype)).reshape(array.shape), said


def check_drawn(value: jax.Array, sha256: str, where: str) -> None:
    """ValueError unless a factor that was made again is the one that was trained beside."""
    if as_stored(value, where)[1]["sha256"] != sha256:
        raise ValueError(f"{where} is made again from its seed, and comes out otherwise than when it was saved")


def rebuild(array: np.ndarray | None, record: Content, where: str) -> jax.Array:
    """The inverse: an array as it was, its digest checked."""
    dtype = _dtype(record["dtype"], where)
    check_dtype(dtype, where)
    try:
        array = np.zeros(record["shape"], dtype) if array is None else np.ascontiguousarray(array)
        array = array.view(dtype).reshape(record["shape"])
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{where} is not of shape {record['shape']} and dtype {dtype} ({error})") from None
    if _digest(array) != record["sha256"]:
        raise ValueError(f"{where} is damaged: its bytes do not have the digest that was saved")
    if record["key"] is None:
        return jnp.array(array)
    try:
        return jax.random.wrap_key_data(jnp.array(array), impl=record["key"])
    except Exception as error:
        raise ValueError(f"{where} is no key of {record['key']!r:.60}: {str(error)[:200]}") from None


def restore(data: Path, want: Mapping[str, Content]) -> dict[str, np.ndarray]:
    """The arrays of a manifest as they are stored; ValueError where keys, shapes or dtypes are not the manifest's."""
    found = _checkpoint.tree_of(data)
    bad = [f"missing {name!r}" for name in want if name not in found]
    bad += [f"extra {name!r}" for name in found if name not in want]
    for name in (n for n in want if n in found):
        shape = getattr(found[name], "shape", None)
        if shape != want[name]["shape"]:
            bad.append(f"{name!r} has shape {shape}, not {want[name]['shape']}")
    if bad:
        raise ValueError(f"the arrays in {data} are not those that were saved:" + several(bad))
    arrays = _checkpoint.restore_part(data, found)
    for name, array in arrays.items():
        stored = _stored(_dtype(want[name]["dtype"], f"{data}: {name!r}"))
        if np.asarray(array).dtype != stored:
            raise ValueError(f"{data}: {name!r} has dtype {np.asarray(array).dtype}, not {stored}")
    return arrays
