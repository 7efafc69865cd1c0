"""The whole form: an optimizer for the trainable leaves of an `Adapted`."""

from typing import cast

import jax
import jax.numpy as jnp
import optax

from jlora._trees._tree import shape_dtype
from jlora._types import PyTree
from jlora.adapted import is_adapted, trainable_mask
from jlora.optim._checks import transformation_of


def masked(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """`tx` on the trainable leaves of an `Adapted`, and an update of -0.0 on the frozen ones.

    For the whole form, where an `Adapted` is the `params` of a TrainState. `optax.masked` alone passes the frozen
    leaves' raw gradients through and so moves the base; and +0.0 would turn a -0.0 in the base into +0.0. The state
    holds nothing for frozen leaves (float32 denormals in the base are flushed by XLA's additions on CPU all the
    same; the split form touches nothing). Transforms that mix leaves
    (clipping by the global norm) and wrappers that withhold updates (`MultiSteps`, `apply_if_finite`) belong inside.
    `tx` gets the frozen half of `params` as the extra argument `frozen`, for those that read it (`lora_fa`).

    Raises:
      TypeError: no optax transformation; a base with integer leaves, which has no whole form: split it.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> tx = jlora.masked(optax.adamw(1e-3))
      >>> state = tx.init(adapted)
    """
    inner = optax.masked(transformation_of("masked", tx), trainable_mask)

    def init(params: PyTree) -> PyTree:
        _check_floating(params)
        return inner.init(params)

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> PyTree:
        _check_floating(updates)
        if is_adapted(params):
            extra = {"frozen": params.frozen, **extra}  # `tx` itself sees it masked out
        updates, state = inner.update(updates, state, cast(optax.Params, params), **extra)
        still = lambda u, moves: u if moves else jnp.full_like(u, -0.0)
        return jax.tree.map(still, updates, trainable_mask(updates)), state

    return optax.GradientTransformationExtraArgs(init, update)


def _check_floating(tree: PyTree) -> None:
    for adapted in jax.tree.leaves(tree, is_leaf=is_adapted):
        if not is_adapted(adapted):
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(adapted.frozen):
            dtype = shape_dtype(leaf)[1]
            if not jnp.issubdtype(dtype, jnp.floating):
                raise TypeError(
                    f"the base holds {jax.tree_util.keystr(path)} of dtype {dtype}, which has no gradient; train in "
                    "the split form: trainable, frozen = jlora.split(adapted), and optimise trainable alone"
                )
