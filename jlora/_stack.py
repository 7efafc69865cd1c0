"""Several adapters of one plan as one, for `jax.vmap`."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from jlora._plan import _fits
from jlora._types import PyTree
from jlora.adapted import Adapted, Frozen, check_any, is_adapted


class Stacked(NamedTuple):
    """`adapted`, whose factors have the adapters as their first axis, and `axes`, its `in_axes` for `jax.vmap`."""

    adapted: Adapted
    axes: Adapted


def stack(adapters: Sequence[Adapted]) -> Stacked:
    """Several adapters over one base as one: trainable and frozen factors get a leading axis, the base stays as it is.

    Inside `jax.vmap` each adapter has its own a, b and s: stacking trainable halves alone would give all of them the
    frozen factors, and so the scale, of one. Frozen factors that are the same array in all stay that array.

    Args:
      adapters: adapters of one plan: the same methods, ranks and weights; alpha, keys and values may differ. They share
        one base, or have equal ones.

    Returns:
      `Stacked(adapted, axes)`. `axes.trainable` and `axes.frozen` are those of the halves; `unstack` takes it apart.

    Raises:
      TypeError: no sequence of `Adapted`s.
      ValueError: none at all, or adapters of unlike plans, over unlike bases, or of which some have a dropout key.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params, x = {"query": {"kernel": jnp.ones((6, 4))}}, jnp.ones((3, 6))
      >>> one, other = (jlora.adapt(params, jlora.LoRA(rank=2, alpha=alpha)) for alpha in (2, 8))
      >>> apply = jlora.lift(lambda params, x: x @ params["query"]["kernel"])
      >>> stacked, axes = jlora.stack([one, other])
      >>> jax.vmap(apply, in_axes=(axes, None))(stacked, x).shape
      (2, 3, 4)
      >>> trainable, frozen = jlora.split(stacked)
      >>> loss = lambda trainable, frozen: jnp.sum(apply(jlora.join(trainable, frozen), x))
      >>> grads = jax.vmap(jax.grad(loss), in_axes=(0, axes.frozen))(trainable, frozen)
      >>> grads["query/kernel"]["b"].shape
      (2, 2, 4)
    """
    every: list[PyTree] = list(adapters) if isinstance(adapters, (list, tuple)) else [adapters]
    strange = [type(a).__name__ for a in every if not (is_adapted(a) and isinstance(a.frozen, Frozen))]
    if strange or not isinstance(adapters, (list, tuple)):
        kinds = ", ".join(strange or [type(adapters).__name__])
        raise TypeError(f"stack takes a list of Adapteds, stack([one, other]), not {kinds}")
    if not every:
        raise ValueError("stack takes at least one adapter")
    first, plan = every[0], every[0].frozen.plan
    for n, other in enumerate(every):
        if other.frozen.plan is not plan:
            raise ValueError(
                f"stack: adapter {n} is {other.frozen.plan!r}, adapter 0 is {plan!r}; their methods, ranks and weights "
                "are the same, or they do not stand on each other (jlora.rank.resize changes ranks)"
            )
        _fits.check_trainable(other.trainable, plan)
        if not _same(first.frozen.base, other.frozen.base):
            raise ValueError(
                f"stack: adapter {n} has another base than adapter 0, and the stack has one; if they are meant to be "
                "the same, adapt or load both over one tree of parameters"
            )
    keys = [a.frozen.key for a in every]
    if any(k is None for k in keys) and any(k is not None for k in keys):
        raise ValueError("stack: some adapters have a dropout key and some have none; with_dropout comes behind it")
    trainable = jax.tree.map(lambda *xs: jnp.stack(xs), *[a.trainable for a in every])
    shared = jax.tree.map(lambda x, *xs: all(y is x for y in xs), *[a.frozen.factors for a in every])
    fill = lambda same, x, *xs: x if same else jnp.stack((x, *xs))
    factors = jax.tree.map(fill, shared, *[a.frozen.factors for a in every])
    key = None if keys[0] is None else jnp.stack(keys)
    gates, gate_axes = _gates([a.frozen.gates for a in every])
    frozen = dataclasses.replace(first.frozen, factors=factors, key=key, gates=gates)
    axes = jax.tree.map(lambda same: None if same else 0, shared)
    return Stacked(
        Adapted(trainable, frozen),
        Adapted(
            0,
            dataclasses.replace(first.frozen, base=None, factors=axes, key=None if key is None else 0, gates=gate_axes),
        ),
    )


def _gates(every: Sequence[Mapping[str, jax.Array]]) -> tuple[dict[str, jax.Array], dict[str, int | None]]:
    """The gates of several adapters as one, and their axes: one array in all stays that array."""
    first = every[0]
    if any(set(gates) != set(first) for gates in every):
        raise ValueError(
            "stack: some adapters have gates that others have not; give none, and with_gates inside of the mapped "
            "function: jax.vmap(lambda a, x: apply(jlora.with_gates(a, active=g), x), in_axes=(axes, None))"
        )
    same = {name: all(gates[name] is first[name] for gates in every) for name in first}
    made = {name: first[name] if same[name] else jnp.stack([gates[name] for gates in every]) for name in first}
    return made, {name: None if same[name] else 0 for name in first}


def unstack(adapted: Adapted) -> list[Adapted]:
    """The adapters of a stack, in their order; without gates, which are values of a call.

    Args:
      adapted: `stack(...).adapted`, as it was or with other values; of trained halves, `Adapted(trainable, frozen)`.

    Raises:
      TypeError: no `Adapted`.
      ValueError: factors without the leading axis of a stack.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> stacked, _ = jlora.stack([jlora.adapt(params, jlora.LoRA(rank=2, alpha=alpha)) for alpha in (2, 8)])
      >>> [float(one.frozen.factors["query/kernel"]["s"]) for one in jlora.unstack(stacked)]
      [1.0, 4.0]
    """
    plan = check_any("jlora.unstack", adapted).frozen.plan
    want = plan.shapes
    sizes = set()
    for side, names in ((adapted.trainable, True), (adapted.frozen.factors, False)):
        for group, named in side.items():
            for name, x in named.items():
                more = x.shape[: x.ndim - len(want[group, name][0])]
                if len(more) > 1 or (names and not more) or x.shape[len(more) :] != want[group, name][0]:
                    raise ValueError(
                        f"unstack: {group!r}: {name!r} has shape {x.shape}, not (adapters, *{want[group, name][0]}): "
                        "it is no stack of jlora.stack (the layers of a scan are taken apart by jlora.rank.unstack)"
                    )
                sizes |= set(more)
    if len(sizes) != 1:
        raise ValueError(f"unstack: the factors stand for {sorted(sizes)} adapters at once")
    key = adapted.frozen.key

    def one(n: int) -> Adapted:
        cut = lambda side: {
            group: {name: x[n] if x.ndim > len(want[group, name][0]) else x for name, x in named.items()}
            for group, named in side.items()
        }
        own = None if key is None else key[n]
        frozen = dataclasses.replace(adapted.frozen, factors=cut(adapted.frozen.factors), key=own, gates={})
        return Adapted(cut(adapted.trainable), frozen)

    return [one(n) for n in range(sizes.pop())]


def _same(one: PyTree, other: PyTree) -> bool:
    """Whether two bases are one: the same arrays, or equal ones."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if x is y:
            continue
        if any(isinstance(v, (Tracer, jax.ShapeDtypeStruct)) for v in (x, y)):
            return False
        x, y = (jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in (x, y))
        if x.shape != y.shape or x.dtype != y.dtype or np.asarray(x).tobytes() != np.asarray(y).tobytes():
            return False
    return True
