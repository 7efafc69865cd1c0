"""PRNG keys that users give, and what depends on a path alone."""

import zlib
from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from jlora._types import Key, Shape


def stable_hash(text: str) -> int:
    """A hash that is the same in every process (Python's own is salted)."""
    return zlib.crc32(text.encode())


def checked_key(key: object) -> Key:
    """A user's key as a typed one, `jax.random.key(0)` for None; TypeError for what is no key, or several."""
    if key is None:
        return jax.random.key(0)
    dtype: DTypeLike | None = getattr(key, "dtype", None)
    shape: Shape = getattr(key, "shape", None) or ()
    is_key = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    is_raw = dtype == jnp.uint32 and shape[-1:] in ((2,), (4,))
    if is_key and shape == ():
        return cast(Key, key)
    if is_raw and len(shape) == 1:  # of jax.random.PRNGKey: it does not say its implementation, but its length does
        ours = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
        impl = None if ours == shape else {(2,): "threefry2x32", (4,): "rbg"}[shape]
        return jax.random.wrap_key_data(jnp.asarray(cast(Key, key)), impl=impl)
    if is_key or is_raw and len(shape) > 1:
        count = shape if is_key else shape[:-1]
        raise TypeError(f"key must be one PRNG key, not keys of shape {count}; write key=keys[0], or vmap over them")
    raise TypeError(f"key must be one PRNG key, not {key!r:.200}; write key=jax.random.key(0)")
