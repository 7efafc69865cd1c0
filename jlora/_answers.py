"""What was given where something else belongs, in words: what it is, and the line to write instead."""

import math
import numbers
from collections.abc import Callable, Mapping
from typing import NoReturn, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax.core import Tracer

from jlora._types import PyTree, Shaped

# The names by which libraries call arrays of a layer: what stands under one of them is no factor of an adapter.
_WEIGHTS = {"kernel", "bias", "scale", "embedding", "weight", "w", "offset", "var", "mean"}


def kind(x: object) -> str:
    """What something is, in a few words."""
    if x is None:
        return "None"
    if isinstance(x, type):
        return f"the class {x.__name__}"
    if isinstance(x, (bool, int, float, complex, str, bytes)):
        return f"the {type(x).__name__} {x!r:.60}"
    if isinstance(x, (list, tuple, dict, set)):
        return f"a {type(x).__name__} of {len(x)}"
    if hasattr(x, "shape") and hasattr(x, "dtype"):
        return f"an array of shape {tuple(cast(Shaped, x).shape)}"
    named = getattr(x, "__name__", None)
    return f"the function {named}" if named else f"{'an' if type(x).__name__[0] in 'AEIOU' else 'a'} {type(x).__name__}"


def no_adapter(
    caller: str, x: PyTree, is_adapted: Callable[[object], bool], is_frozen: Callable[[object], bool]
) -> str:
    """Why `caller`, which takes an Adapted, cannot take `x`."""
    head = f"{caller} takes an Adapted, not {kind(x)}"
    if is_adapted(x):
        return f"{caller} takes an Adapted with its plan; this one is a prefix, a mask or a tree of labels"
    if isinstance(x, (tuple, list)) and len(x) == 2 and is_frozen(x[1]):
        return f"{head}: these are the two halves; write {caller}(jlora.join(*halves))"
    if is_frozen(x) or is_half(x):
        half = "frozen" if is_frozen(x) else "trainable"
        return f"{head}: it looks like the {half} half alone; write {caller}(jlora.join(trainable, frozen))"
    try:
        found = jax.tree_util.tree_leaves_with_path(x, is_leaf=is_adapted)
    except (TypeError, ValueError):  # keys that cannot be sorted, which is not what is wrong here
        found = []
    inside = [jax.tree_util.keystr(path) for path, leaf in found if is_adapted(leaf)]
    if inside:
        return f"{head}: there is an Adapted inside, at {inside[0]}; hand over that one"
    return f"{head}: jlora.adapt(params, spec) makes one, jlora.join(trainable, frozen) puts its halves together"


def is_half(x: object) -> bool:
    """Whether this looks like a trainable half, `{group: {factor: array}}`, and like no parameters of a library."""
    if not isinstance(x, Mapping) or not x:
        return False
    return all(
        isinstance(group, str) and isinstance(named, Mapping) and named and not _WEIGHTS & set(named)
        and all(isinstance(name, str) and hasattr(array, "shape") for name, array in named.items())
        for group, named in x.items()
    )  # fmt: skip


def check_params(caller: str, params: object) -> None:
    """Raises TypeError for what is taken for a tree of parameters and is none."""
    if isinstance(params, linen.Module):
        name = type(params).__name__
        raise TypeError(
            f"{caller}: {name} is a Linen module, which holds no arrays; "
            "its parameters are model.init(jax.random.key(0), x)['params']"
        )
    if params is None or isinstance(params, (str, bytes, bool, int, float)) or callable(params) and _no_tree(params):
        raise TypeError(f"{caller}: params is {kind(params)}; give it the model's tree of parameters, such as a dict")


def no_array(leaf: object) -> str:
    """What a leaf is that JAX cannot compute with, and what to write; empty for an array."""
    dtype = getattr(leaf, "dtype", None)
    if dtype is None:
        return "" if isinstance(leaf, (bool, int, float, complex)) else kind(leaf) + ", not an array"
    try:
        return "" if jnp.issubdtype(dtype, np.generic) else f"of dtype {dtype}, not of numbers"
    except TypeError:
        library = type(leaf).__module__.partition(".")[0]
        return (
            f"a {library} {type(leaf).__name__} of dtype {dtype}; jnp.asarray(x.detach().numpy()) makes an array of it"
        )


def gone(path: str, leaf: Shaped) -> str:
    """What is wrong with a weight that was donated or deleted: it has a shape and no values; empty for any other."""
    deleted = lambda x: isinstance(x, jax.Array) and not isinstance(x, Tracer) and x.is_deleted()
    if not any(map(deleted, jax.tree.leaves(leaf))):
        return ""
    return f"{path!r} of shape {tuple(leaf.shape)} was donated or deleted: it has no values"


def _no_tree(x: PyTree) -> bool:
    """Whether JAX sees one leaf (a module of NNX can be called too, and is a tree)."""
    return jax.tree.structure(x) == jax.tree.structure(0)


def check_function(caller: str, fn: object) -> None:
    """Raises TypeError unless `fn` is a function of parameters: a module computes with its own, or with none."""
    if isinstance(fn, linen.Module):
        raise TypeError(f"{caller} takes a function of parameters: write {caller}(model.apply), not a Linen module")
    if isinstance(fn, nnx.Module):
        raise TypeError(f"{caller} takes a function of parameters: write {caller}(lambda model, x: model(x)) for NNX")
    if isinstance(fn, Mistaken) or not callable(fn):
        raise TypeError(f"{caller} takes a function first, such as model.apply, not {kind(fn)}")


def check_optimizer(caller: str, tx: object) -> None:
    """Raises TypeError unless `tx` is an optax transformation."""
    if not (callable(getattr(tx, "init", None)) and callable(getattr(tx, "update", None))):
        hint = f"; write optax.adamw({tx!r})" if isinstance(tx, float) else ""
        raise TypeError(f"{caller} takes an optax transformation, such as optax.adamw(1e-3), not {kind(tx)}{hint}")


def check_integer(said: str, x: object, least: int, words: str, most: float = math.inf) -> None:
    """Raises ValueError unless `x` is an integer from `least` to `most`; `said` is the call as written, `f(name`."""
    if isinstance(x, (bool, np.bool_)) or not isinstance(x, (int, np.integer)) or not least <= x <= most:
        raise ValueError(f"{said}={x!r}): {words}")


def check_number(said: str, x: float | np.ndarray | jax.Array, allowed: Callable[[float], bool], words: str) -> None:
    """Raises ValueError unless `x` is a real number, no NaN, that is allowed; a traced one is not looked at."""
    if isinstance(x, Tracer):
        return
    scalar = isinstance(x, numbers.Real) or hasattr(x, "dtype") and np.ndim(x) == 0
    real = scalar and not isinstance(x, (bool, np.bool_)) and np.isrealobj(np.asarray(x))
    if not real or math.isnan(float(x)) or not allowed(float(x)):
        raise ValueError(f"{said}={x!r}): {words}")


def check_axes(axes: object) -> None:
    """Raises TypeError unless `axes` is `{pattern: letters}`, or None."""
    if axes is None or isinstance(axes, Mapping) and all(isinstance(x, str) for pair in axes.items() for x in pair):
        return
    shown = f"{axes!r:.100}" if isinstance(axes, (str, Mapping)) else kind(axes)
    raise TypeError(
        f"axes={shown}: write {{pattern: letters}}, such as axes={{'query/kernel$': 'io'}}, with one letter an axis in "
        "one string: i (in), o (out), k (window), s (stack)"
    )


class Mistaken:
    """What an `Adapted` says where it is taken for a model, a dictionary or an array.

    It is none of them: names that start with an underscore are absent without words, `hasattr` is False for all that is
    absent, and nothing is stored.
    """

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # the probes of copy, pickle, NumPy and IPython
            raise AttributeError(name)
        raise AttributeError(
            f"an Adapted has no {name!r}: it is no dictionary, array or module. A function of parameters takes it "
            f"through jlora.lift, jlora.lift(model.apply)({{'params': adapted}}, x); its plain parameters are "
            "adapted.frozen.base, its merged ones jlora.merge(adapted), its factors adapted.trainable"
        )

    def __getitem__(self, name: object) -> NoReturn:
        raise TypeError(
            f"adapted[{name!r:.40}]: an Adapted is not indexed. jlora.lift(fn)(adapted, x) computes with it, where fn "
            "reads params[...]; plain weights are in adapted.frozen.base[...], merged ones in jlora.merge(adapted)"
            "[...], factors in adapted.trainable[path]; its halves are trainable, frozen = jlora.split(adapted)"
        )

    def __call__(self, *args: object, **kwargs: object) -> "Mistaken":
        # A tree of masks or labels in the form of an Adapted: optax asks whether it can be called, and then calls it.
        if not any(hasattr(leaf, "dtype") for leaf in jax.tree.leaves(self)):
            return self
        raise TypeError(
            "an Adapted holds parameters and cannot be called: write jlora.lift(model.apply)({'params': adapted}, x) "
            "for Linen, jlora.lift(lambda model, x: model(x))(adapted, x) for NNX (inside optax.inject_hyperparams: "
            "static_args='adapted')"
        )

    def _no_number(self, *_: object) -> NoReturn:
        raise TypeError(
            "an Adapted is no array: jlora.scale(adapted, x) weakens the update, jlora.lift(fn)(adapted, x) computes "
            "with it, and jax.tree.map over adapted.trainable reaches the factors (averages, sums, differences)"
        )

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __matmul__ = __rmatmul__ = _no_number
    __neg__ = __pow__ = _no_number
