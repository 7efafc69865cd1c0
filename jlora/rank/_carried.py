"""An optimizer's state, cut along with the factors it is of."""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jlora._plan._sites import Plan
from jlora._types import Place, PyTree
from jlora.adapted import Adapted, Frozen, is_adapted

# States of optax's that are sums over whole factors. What the dead ranks have added to them cannot be taken out.
WHOLE = frozenset(
    f"{name}State"
    for name in ("Muon", "Prodigy", "DAdaptAdamW", "DoG", "DoWG", "ScaleByDistanceOverGradients", "ScaleByNovograd",
                 "Mechanic", "Momo", "MomoAdam", "ScaleByLBFGS", "GaLore")
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Kept:
    """Which ranks of a factor stay, and where they go: `order` (stack..., k), `alive` where it is no padding."""

    order: np.ndarray
    alive: np.ndarray

    def cut(self, x: jax.Array) -> jax.Array:
        """(stack..., r, side...) -> (stack..., k, side...), zero where it is padding."""
        more = (1,) * (jnp.ndim(x) - self.order.ndim)
        x = jax.device_put(x, jax.memory.Space.Device)  # offloaded moments are on the host, where nothing is computed
        taken = jnp.take_along_axis(x, self.order.reshape(*self.order.shape, *more), self.order.ndim - 1)
        return jnp.where(self.alive.reshape(*self.alive.shape, *more), taken, jnp.zeros_like(taken))


def carried(state: PyTree, old: Plan, new: Plan, kept: dict[Place, Kept]) -> PyTree:
    """An optimizer's state with every copy of the factors cut as they were.

    Raises:
      ValueError: a state of sums over whole factors; an array whose ranks cannot be told.
    """
    had, have = old.shapes, new.shapes
    groups, left = {group for group, _ in had}, {group for group, _ in have}
    is_part = lambda x: isinstance(x, Mapping) and bool(groups & set(x))
    is_whole = lambda x: type(x).__name__ in WHOLE
    for x in jax.tree.leaves(state, is_leaf=is_whole):
        if is_whole(x):
            raise ValueError(
                f"compact: the optimizer's state has a {type(x).__name__}, whose step comes from sums over whole "
                "factors, dead ranks included; compact the adapter alone, and begin its state anew"
            )

    def array(place: Place, x: PyTree) -> PyTree:
        # A scalar is a counter. Adafactor has an array of shape (1,) where it keeps nothing.
        if place not in kept or not hasattr(x, "shape") or x.shape in ((), (1,)) and x.shape != had[place][0]:
            return x
        if x.shape != had[place][0]:
            raise ValueError(
                f"compact: the optimizer holds an array of shape {x.shape} for {place[0]!r}: {place[1]!r} of shape "
                f"{had[place][0]}, whose ranks cannot be told; compact the adapter alone, and begin its state anew"
            )
        return kept[place].cut(x)

    def leaf(place: Place, x: PyTree) -> PyTree:
        shape = had[place][0]
        if place in kept and isinstance(x, (list, tuple)) and [jnp.shape(v) for v in x] == [(n,) for n in shape]:
            rows = kept[place]
            axis, order = rows.order.ndim - 1, rows.order.reshape(-1, rows.order.shape[-1])
            if not (rows.alive.all() and (order == order[0]).all()):
                raise ValueError(
                    f"compact: the optimizer holds one row of ranks for all layers of {place[0]!r}: {place[1]!r} "
                    "(sm3), and the layers keep unlike ones; compact the adapter alone, and begin its state anew"
                )
            row = Kept(order[0], np.ones(order.shape[-1], bool))
            return type(x)(row.cut(v) if n == axis else v for n, v in enumerate(x))
        return jax.tree.map(lambda v: array(place, v), x)

    def part(half: PyTree) -> PyTree:
        rows = {g: named for g, named in half.items() if g in left or g not in groups}
        return {
            g: {n: leaf((g, n), x) for n, x in named.items() if (g, n) in have} if g in groups else named
            for g, named in rows.items()
        }

    def visit(x: PyTree) -> PyTree:
        if is_part(x):
            return part(x)
        if not is_adapted(x):
            return x
        frozen = x.frozen
        if isinstance(frozen, Frozen):
            factors = part(frozen.factors) if is_part(frozen.factors) else frozen.factors
            frozen = dataclasses.replace(frozen, factors=factors, plan=new)
        return Adapted(part(x.trainable) if is_part(x.trainable) else x.trainable, frozen)

    return jax.tree.map(visit, state, is_leaf=lambda x: is_part(x) or is_adapted(x))
