"""An adapter that is as it began: where training went on in `trainable`, the `Adapted` of before holds the start."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jlora._algebra._words import Array, Difference, begins
from jlora._plan._sites import Site
from jlora._trees import _compound, _tree
from jlora.adapted import Adapted
from jlora.methods.base import of_the_weight


class UntrainedWarning(UserWarning):
    """An adapter is saved, or exported, whose factors are all where they began.

    Where all of them are drawn at random, as VB-LoRA's, no start is known, and nothing is said.

    Example:
      >>> import tempfile, warnings, jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
      ...     warnings.simplefilter("always", jlora.UntrainedWarning)
      ...     jlora.save(folder + "/adapter", adapted)
      >>> print(str(said[0].message).partition(":")[0])
      this adapter was never trained
    """


def warn(caller: str, adapted: Adapted) -> None:
    """Warns, for the user's line that called `caller`, where no factor has left its start."""
    seen = _start(adapted)
    if seen:
        warnings.warn(
            f"this adapter was never trained: {seen}, and no factor has left a start that is known. Training moves "
            f"`trainable`, and the Adapted of before stays as it was; write {caller}, jlora.join(trainable, "
            "adapted.frozen)), of the half that was trained",
            UntrainedWarning,
            stacklevel=3,
        )


def _start(adapted: Adapted) -> str:
    """One factor that is where it began, in words; "" where some factor has moved, or none says how it began.

    A start is known of factors that begin at a constant, of pairs, which keep theirs beside them, of what is made of
    the weight alone, such as DoRA's m, and of initialisers that say what `could_begin`. So every method is asked by the
    words of its equation.
    """
    found, made = "", []
    for site in adapted.frozen.plan.sites:
        words = (word for delta, _ in site.recipe.networks for word in delta.operands)
        for word in (*words, *site.recipe.steps):
            for array in (a for a in word.arrays if a.trained):
                x = np.asarray(adapted.trainable[array.group or site.leaf.path][array.name])
                start: float | jax.Array | None = begins(array)
                where = f"{start} everywhere"
                if isinstance(word, Difference):
                    kept = word.arrays[1]
                    start, where = adapted.frozen.factors[kept.group or site.leaf.path][kept.name], "where it began"
                if array.init is of_the_weight:
                    made.append((site, array, x))
                could_begin = getattr(array.init, "could_begin", None)
                if could_begin is not None and not could_begin(x):
                    return ""
                if could_begin is not None:
                    found = found or f"{array.name!r} of {array.group or site.leaf.path!r} is as it is drawn"
                if start is None:
                    continue
                if not np.array_equal(x, np.broadcast_to(np.asarray(start, x.dtype), x.shape)):
                    return ""
                found = found or f"{array.name!r} of {array.group or site.leaf.path!r} is {where}"
    # these come last, as they read whole weights
    return found if all(_as_begun(adapted, site, array, x) for site, array, x in made) else ""


def _as_begun(adapted: Adapted, site: Site, array: Array, x: np.ndarray) -> bool:
    """Whether a factor that is made of the weight is as its method makes it, up to rounding."""
    weight = _compound.dense(_tree.flatten(adapted.frozen.base).leaves[site.index])
    key = jax.random.key(0)  # any key: only what is made of the weight is compared
    begun = site.method.initial(site.leaf, site.recipe, lambda *_: key, weight)
    start = begun[array.group or site.leaf.path, array.name]
    eps = float(jnp.finfo(x.dtype).eps)
    return np.allclose(np.asarray(x, np.float64), np.asarray(start, np.float64), rtol=8 * eps, atol=0)
