"""A stacked adapter on the parameters of an unrolled model: a rank of its own for every layer, in memory too."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jlora import _answers, _read
from jlora._plan import _fits, _sites
from jlora._plan._sites import Site
from jlora._trees import _tree
from jlora._trees._leaf import Leaf
from jlora._types import PyTree
from jlora.adapted import Adapted, Frozen
from jlora.rank.prune import plan_of


def unstack(adapted: Adapted, params: PyTree, names: Callable[[str, tuple[int, ...]], str]) -> Adapted:
    """The same adapter on a model whose layers are separate: each layer of a stack becomes a weight of its own.

    A scan needs arrays of one shape, so layers that end with unlike ranks are padded to the largest as long as they
    are stacked. A model that does not scan has no such need: `compact(unstack(adapted, params, names))` drops the
    dead ranks of each layer, for serving, for files of peft (`io.peft.save` writes a rank for each module), or for
    training on without a scan. A weight's own factor that has no stack axis becomes each layer's own; what weights
    share they still share.

    Args:
      adapted: an adapter of a model with stacked layers.
      params: the parameters of the unrolled model, the base of the new adapter; shapes are checked, values are not.
      names: the path in `params` of layer `index` of the weight at `path`. A weight that is not stacked has the index
        `()`.

    Returns:
      An adapter with `params` as its base; factors are slices.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: paths that `params` does not have or that two layers share, shapes that do not fit, a factor that
        two layers would share by their new paths; all at once.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"layers": {"kernel": jnp.ones((2, 6, 4))}}, jlora.LoRA(rank=3, target="kernel"))
      >>> adapted.trainable["layers/kernel"]["b"] = jnp.ones((2, 3, 4)).at[0, 1:].set(0)
      >>> params = {"layer_0": {"kernel": jnp.ones((6, 4))}, "layer_1": {"kernel": jnp.ones((6, 4))}}
      >>> names = lambda path, index: path.replace("layers", f"layer_{index[0]}")
      >>> jlora.rank.ranks(jlora.rank.compact(jlora.rank.unstack(adapted, params, names)))
      {'layer_0/kernel': array(1), 'layer_1/kernel': array(3)}
    """
    plan = plan_of("unstack", adapted)
    _answers.check_params("unstack", params)
    if not callable(names):
        raise TypeError(f"unstack takes names(path, index) -> path in params, a function, not {_answers.kind(names)}")
    get = _read.factors_of(adapted)
    tree = _tree.flatten(params)
    places = {path: n for n, path in enumerate(tree.paths)}
    sites: dict[int, Site] = {}
    halves: dict[bool, dict[str, dict[str, PyTree]]] = {True: {}, False: {}}
    bad: list[str] = []
    origin: dict[
        tuple[str, str], tuple[tuple[str, str], tuple[int, ...]]
    ] = {}  # from which factor each new one comes, and which layer of it
    for site in plan.sites:
        old = site.leaf
        axes = [n for n, role in enumerate(old.roles) if role == "s"]
        rest = [n for n, role in enumerate(old.roles) if role != "s"]
        shape, roles = tuple(old.shape[n] for n in rest), "".join(old.roles[n] for n in rest)
        for index in np.ndindex(*(old.shape[n] for n in axes)):
            path = names(old.path, index)
            if path not in places:
                near = ", ".join(_tree.nearest(path, tree.paths))
                bad.append(f"{old.path!r}{list(index)} goes to {path!r}, which is not there; the nearest are {near}")
                continue
            n = places[path]
            found, dtype = _tree.shape_dtype(tree.leaves[n])
            if found != shape or n in sites:
                why = f"of shape {found}" if found != shape else "where another layer is already"
                bad.append(f"{old.path!r}{list(index)} of shape {shape} goes to {path!r}, {why}")
                continue
            leaf = Leaf(path, shape, np.dtype(dtype), roles)
            method = site.method.elsewhere(old, lambda other, index=index: names(other, index))
            recipe = method.recipe(leaf)
            assert recipe is not None, path
            sites[n] = Site(leaf, n, method, recipe)
            # both have the same equation, so their arrays come in the same order, under other paths
            for came, (goes, (array, _)) in zip(site.recipe.arrays(old), recipe.arrays(leaf).items(), strict=True):
                layer = index if array.stacked else ()
                if origin.setdefault(goes, (came, layer)) != (came, layer):
                    bad.append(f"{old.path!r}{list(index)} would share {goes[1]!r} of {goes[0]!r} with another layer")
                elif goes[1] not in halves[array.trained].setdefault(goes[0], {}):
                    value = get(*came)  # copied below: two leaves of one buffer could not be donated
                    halves[array.trained][goes[0]][goes[1]] = value[layer] if layer else jnp.copy(value)
    if bad:
        raise ValueError("cannot unstack onto these parameters:\n  " + "\n  ".join(bad[:8]))
    methods = tuple(dict.fromkeys(site.method for site in sites.values()))
    new = _sites.intern(tuple(sites[n] for n in sorted(sites)), methods, plan.notes)
    _fits.check_trainable(halves[True], new)
    return Adapted(halves[True], Frozen(params, halves[False], adapted.frozen.key, new, adapted.frozen.gates))
