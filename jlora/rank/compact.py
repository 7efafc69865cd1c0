"""An adapter without its dead ranks: the same function in fewer parameters."""

import dataclasses
import functools
import operator
import warnings
from collections.abc import Callable
from typing import Literal

import jax
import numpy as np
from jax.core import Tracer

from jlora import _read
from jlora._dtypes import alike
from jlora._plan import _pairs, _sites
from jlora._plan._pairs import Get, Pair
from jlora._plan._sites import Plan, Site
from jlora._types import Place, PyTree
from jlora.adapted import Adapted
from jlora.methods.base import Method
from jlora.methods.lora import LoRA
from jlora.optim._checks import check_ran
from jlora.optim._halves import check_masked
from jlora.rank._carried import Kept, carried
from jlora.rank.prune import plan_of


def compact(
    adapted: Adapted, opt_state: PyTree = None, *, plain: bool = False, stacks: Literal["pad", "refuse"] = "pad"
) -> PyTree:
    """A smaller adapter with the same outputs: ranks that add nothing, those with a zero in some factor, are dropped
    (of a pair as PiSSA's, those that are where they began).

    For use outside of `jit`, since shapes follow from values: after AdaLoRA or SoRA, after `prune` or
    `at_rank`, and before `save`: a schedule that never ran is told here, by its state or by ranks of which none is
    dead. `save` tells it by the state alone, as what was compacted has no dead rank either.

    s stays what it was, so alpha is still over the rank that the adapter began with. A weight without ranks leaves
    the plan. Layers of a stack share their shapes: they keep as many ranks as the largest needs, each
    its own in front and zeros behind, which training leaves at zero and `orthogonality` does not count. For a model
    that does not scan, `compact(unstack(adapted, params, names))` gives every layer a rank of its own.

    Weights whose factors are shared with others (VeRA, tied ones) and sums of two methods stay as they are.

    Args:
      adapted: any adapter, with values.
      opt_state: the state of an optimizer of `adapted`, in either form. Every array that has a factor's name and
        shape is cut with it, and so are sm3's rows; go on with an optimizer made for the smaller adapter. The state
        under `adalora` or `sora` is their state's `inner`. The next step is that of the uncut adapter on its living
        ranks for optimizers whose steps are of one entry each (the Adam family, sgd, rmsprop, lion, sm3, ...). What
        looks at a whole factor sees fewer rows: adafactor scales by the root mean square of a factor, lamb, lars and
        clipping by norms go by norms; their state carries over, and their step may change in size. States of muon,
        prodigy, dog and others that go by a whole factor's history are refused: begin theirs anew.
      plain: p diag(lam) q becomes a plain `LoRA` with a = diag(lam) p and b = q.
      stacks: `"refuse"` raises where the layers of a stack end with unlike ranks.

    Returns:
      The adapter; with `opt_state`, `(adapter, opt_state)`.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: factors without values (inside `jit`); an adapter of which nothing would be left; a schedule that
        never ran; an optimizer state that does not follow the factors' shapes, goes by whole factors, or was made
        of a whole adapter without `jlora.masked`; one with `plain`.

    Warns:
      UserWarning: weights made to be pruned, of which no rank is dead.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SoRA(rank=3))
      >>> adapted.trainable["query/kernel"] |= {"g": jnp.array([0.5, 0.0, 0.0]), "b": jnp.ones((3, 4))}
      >>> jlora.rank.compact(adapted)
      Adapted(1 weight, 11 trainable)
      >>> jlora.rank.compact(adapted, plain=True)
      Adapted(1 weight, 10 trainable)
    """
    plan = plan_of("compact", adapted)
    _check(adapted, opt_state, plain, stacks)
    get = _read.factors_of(adapted)
    by_path: dict[str, list[Pair]] = {}
    for pair in _pairs.pairs(plan):
        by_path.setdefault(pair.path, []).append(pair)

    sites: list[Site] = []
    kept: dict[Place, Kept] = {}
    folded: dict[Place, jax.Array] = {}
    notes: list[str] = []
    for site in plan.sites:
        ours = by_path.get(site.leaf.path, [])
        new, own = _smaller(site, ours, get, stacks)
        if new is None:
            notes.append(f"{site.leaf.path}: no rank left, it is as it was")
            continue
        kept |= own
        if plain and len(ours) == 1 and ours[0].diagonal and site.recipe.additive and len(site.recipe.deltas) == 1:
            new = _plain(new, ours[0], kept, get, folded)
        sites.append(new)
    if not sites:
        raise ValueError(
            "compact: every rank of every weight adds nothing, so no adapter would be left; has it been trained?"
        )
    gated = [pair for ours in by_path.values() for pair in ours if pair.diagonal]
    if gated and all(alive(pair, get).all() for pair in gated):
        warnings.warn(
            "compact found no dead rank: has the schedule (jlora.rank.adalora, sora) or jlora.rank.prune run?",
            stacklevel=2,
        )
    small = planned(plan, sites, notes)

    def value(place: Place) -> PyTree:
        if place in folded:
            return folded[place]
        return kept[place].cut(get(*place)) if place in kept else get(*place)

    made = adapter_of(adapted, small, value)
    return made if opt_state is None else (made, carried(opt_state, plan, small, kept))


def planned(plan: Plan, sites: list[Site], notes: list[str] | None = None) -> Plan:
    """A plan with other sites."""
    methods = dict.fromkeys(site.method for site in sites)
    return _sites.intern(tuple(sites), tuple(methods), (*plan.notes, *(notes or ())))


def adapter_of(adapted: Adapted, plan: Plan, value: Callable[[Place], PyTree]) -> Adapted:
    """The adapter of another plan over the same base."""
    halves: dict[bool, dict[str, dict[str, PyTree]]] = {True: {}, False: {}}
    for place, (shape, trained) in plan.shapes.items():
        x = value(place)
        assert x.shape == shape, (place, x.shape, shape)
        halves[trained].setdefault(place[0], {})[place[1]] = x
    return Adapted(halves[True], dataclasses.replace(adapted.frozen, factors=halves[False], plan=plan))


def of_rank(site: Site, ours: list[Pair], k: int) -> Site | None:
    """The weight under the same method at rank k; None where the method has not one rank for all its factors."""
    method = with_rank(site.method, k)
    recipe = None if method is None else method.recipe(site.leaf)
    if method is None or recipe is None:
        return None
    axis = _places(ours)
    cut = lambda place, shape: (*shape[: axis[place]], k, *shape[axis[place] + 1 :]) if place in axis else shape
    want = {place: (cut(place, shape), a.trained) for place, (a, shape) in site.recipe.arrays(site.leaf).items()}
    have = {place: (shape, a.trained) for place, (a, shape) in recipe.arrays(site.leaf).items()}
    return dataclasses.replace(site, method=method, recipe=recipe) if want == have else None


def with_rank(method: Method, k: int) -> Method | None:
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    if "rank" in fields:
        return dataclasses.replace(method, rank=k)  # type: ignore[call-arg]
    inner = {name: with_rank(value, k) for name, value in fields.items() if isinstance(value, Method)}
    if len(inner) != 1 or None in inner.values():
        return None
    return dataclasses.replace(method, **inner)  # type: ignore[arg-type]


# --- inside -------------------------------------------------------------------------------------------------------


def _check(adapted: Adapted, opt_state: PyTree, plain: bool, stacks: str) -> None:
    if stacks not in ("pad", "refuse"):
        raise ValueError(
            f"compact(stacks={stacks!r}): write 'pad' or 'refuse'; jlora.rank.unstack comes before it, for a model "
            "that does not scan"
        )
    if plain and opt_state is not None:
        raise ValueError("compact: the moments of p, lam and q are none of a plain LoRA's; compact one or the other")
    concrete("compact", adapted)
    check_ran("compact", opt_state)
    check_masked("compact", opt_state)


def concrete(caller: str, adapted: Adapted) -> None:
    """Raises unless the factors have values: shapes that follow from them cannot be made under `jit`."""
    for group, named in (*adapted.trainable.items(), *adapted.frozen.factors.items()):
        for name, x in named.items():
            if isinstance(x, (Tracer, jax.ShapeDtypeStruct)):
                raise ValueError(
                    f"{caller}: {group!r}: {name!r} has no values here; shapes follow from values, so call it outside "
                    "of jit (jlora.rank.prune and at_rank keep shapes and may be traced)"
                )


def alive(pair: Pair, get: Get) -> np.ndarray:
    """(stack..., r): whether no factor has zeros there, and not all of a difference are where they began."""
    some = lambda m: (lambda x: x.reshape(*x.shape[: m.stack + 1], -1).any(-1))(
        np.asarray(operator.ne(*alike(get(*m.place), m.rest(get))))
    )
    rows = [some(m) for m in (*pair.members, *pair.gates) if m.start is None]
    if pair.begun:  # a b - a0 b0: the rank adds something as soon as one of the two has left its start
        rows.append(functools.reduce(np.logical_or, map(some, pair.begun)))
    return np.asarray(functools.reduce(np.logical_and, rows))


def _places(pairs: list[Pair]) -> dict[Place, int]:
    """The axis of the rank in every factor of some pairs, starts among them."""
    members = [m for pair in pairs for m in (*pair.members, *pair.gates)]
    return {place: m.stack for m in members for place in (m.place, m.start) if place is not None}


def simple(site: Site, ours: list[Pair]) -> bool:
    """Whether every factor of its pairs is the weight's own, with all of its stack axes."""
    members = [m for pair in ours for m in (*pair.members, *pair.gates)]
    return bool(members) and all(m.array.group is None and m.stack == len(site.leaf.stack) for m in members)


def _smaller(site: Site, ours: list[Pair], get: Get, stacks: str) -> tuple[Site | None, dict[Place, Kept]]:
    """The weight without its dead ranks (None: without any), and what stays of its factors."""
    if not simple(site, ours):
        return site, {}
    living = {pair.output.place: alive(pair, get) for pair in ours}
    counts = [x.sum(-1) for x in living.values()]
    k, rank = max(int(n.max()) for n in counts), max(pair.rank for pair in ours)
    if stacks == "refuse" and any(n.min() != n.max() for n in counts):
        uneven = sorted({int(x) for n in counts for x in n.ravel()})
        raise ValueError(
            f"compact: the layers of {site.leaf.path!r} of shape {site.leaf.shape} end with unlike ranks, {uneven}; "
            "stacks='pad' fills them up with zeros, jlora.rank.unstack gives each a weight of its own"
        )
    trained = {place for place, (array, _) in site.recipe.arrays(site.leaf).items() if array.trained}
    # a delta without a rank, as KaSA has one, changes the weight though all ranks are dead
    ranked = all(delta.ranks for delta in site.recipe.deltas)
    if (
        k == 0
        and ranked
        and site.recipe.additive
        and trained <= {m.place for p in ours for m in (*p.members, *p.gates)}
    ):
        return None, {}
    k = max(k, 1)
    new = of_rank(site, ours, k) if k < rank else None
    if new is None:
        return site, {}
    kept = {}
    for pair in ours:
        order = np.argsort(~living[pair.output.place], axis=-1, kind="stable")[..., :k]
        one = Kept(order, np.take_along_axis(living[pair.output.place], order, -1))
        kept |= dict.fromkeys(_places([pair]), one)
    return new, kept


def _plain(site: Site, pair: Pair, kept: dict[Place, Kept], get: Get, folded: dict[Place, jax.Array]) -> Site:
    """The weight as a LoRA; its a and b go to `folded`."""
    p, q, lam = (
        kept[m.place].cut(get(*m.place)) if m.place in kept else get(*m.place) for m in (*pair.members, *pair.gates)
    )
    rank = p.shape[pair.input.stack]
    method = _sites.named(LoRA(rank=rank, dtype=site.method.dtype))
    recipe = method.recipe(site.leaf)
    assert recipe is not None
    path = site.leaf.path
    lam, p = alike(lam, p)
    folded[path, "a"] = lam.reshape(*lam.shape, *(1,) * (p.ndim - lam.ndim)) * p
    folded[path, "b"] = q
    folded[path, "s"] = get(*pair.scale)
    return dataclasses.replace(site, method=method, recipe=recipe)
