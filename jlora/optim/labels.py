"""Factors by name: labels for `optax.partition`."""

import jax

from jlora._types import PyTree
from jlora.adapted import Adapted, is_adapted


def factor_labels(tree: PyTree) -> PyTree:
    """The name of each factor, in the structure of `tree`: labels for `optax.partition`.

    Looks at structure alone, so `optax.partition(transforms, factor_labels)` takes the function itself, and arrays,
    tracers, structs and masks are all the same to it.

    Args:
      tree: a trainable half, `{group: {factor: ...}}`, an `Adapted`, or a tree that holds either.

    Returns:
      A tree of strings: a factor's name (`"a"`, `"lam"`), `"frozen"` on the frozen leaves of an `Adapted`, and the
      last step of the path on any other leaf. Inside `jlora.masked`, where frozen leaves are no leaves, no label
      is `"frozen"`.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.AdaLoRA(rank=2))
      >>> jlora.optim.factor_labels(adapted.trainable)
      {'query/kernel': {'lam': 'lam', 'p': 'p', 'q': 'q'}}
      >>> decayed, plain = optax.adamw(1e-3, weight_decay=0.1), optax.adam(1e-3)
      >>> tx = optax.partition({"p": decayed, "q": decayed, "lam": plain}, jlora.optim.factor_labels)
      >>> state = tx.init(adapted.trainable)
    """

    def label(path: tuple[object, ...], x: PyTree) -> PyTree:
        if not is_adapted(x):
            return jax.tree_util.keystr(path[-1:], simple=True)
        named = jax.tree_util.tree_map_with_path(label, x.trainable)
        return Adapted(named, jax.tree.map(lambda _: "frozen", x.frozen))

    return jax.tree_util.tree_map_with_path(label, tree, is_leaf=is_adapted)
