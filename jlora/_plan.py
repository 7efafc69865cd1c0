"""Which weight gets which recipe: the static half of an adapter, resolved from a spec and a tree."""

import dataclasses
import functools
import math
import threading
import weakref
import zlib
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _answers, _axes, _select, _tree, _wellformed
from jlora._axes import Leaf
from jlora._network import Difference, Recipe
from jlora._packed import Packed
from jlora.methods.base import Method


@dataclasses.dataclass(frozen=True)
class Site:
    """One adapted weight: its leaf, the place of its array among the base's leaves, its method and recipe."""

    leaf: Leaf
    index: int
    method: Method
    recipe: Recipe


@dataclasses.dataclass(frozen=True, eq=False)
class Plan:
    """The sites, in the order of the tree, and what there is to say of other leaves.

    Plans are interned: equal ones are one object, so comparing two is comparing identities. That keeps the dispatch
    of a jitted step cheap with a thousand weights, and lets two adapters of one spec share a compiled program.
    """

    sites: tuple[Site, ...]
    methods: tuple[Method, ...]
    notes: tuple[str, ...]

    @functools.cached_property
    def shapes(self) -> dict[tuple[str, str], tuple[tuple[int, ...], bool]]:
        """`{(group, factor): (shape, trained)}` of every array."""
        found: dict[tuple[str, str], tuple[tuple[int, ...], bool]] = {}
        for site in self.sites:
            for place, (array, shape) in site.recipe.arrays(site.leaf).items():
                found[place] = (shape, array.trained)
        return found

    def __repr__(self) -> str:
        # JAX prints plans where two structures differ: one line, but unlike for unlike plans
        digest = zlib.crc32(repr((self.sites, self.methods)).encode())
        methods = ", ".join(dict.fromkeys(m.describe() for m in self.methods))
        ranks = ", ".join(dict.fromkeys(describe_rank(s) for s in self.sites))
        return f"Plan({len(self.sites)} weights, {methods[:80]}, rank {ranks[:40]}, #{digest:08x})"

    def __deepcopy__(self, memo: Any) -> "Plan":
        return self

    def __reduce__(self) -> Any:
        return intern, (self.sites, self.methods, self.notes)


_lock = threading.Lock()
_interned: "weakref.WeakValueDictionary[Any, Plan]" = weakref.WeakValueDictionary()


def intern(sites: tuple[Site, ...], methods: tuple[Method, ...], notes: tuple[str, ...]) -> Plan:
    """The one plan with this content."""
    content = (sites, methods, notes)
    with _lock:
        return _interned.setdefault(content, Plan(*content))


def rules(spec: "Method | Sequence[Any]") -> tuple[Method, ...]:
    """A spec as a flat tuple of methods."""
    if isinstance(spec, Method):
        return (spec,)
    if isinstance(spec, Sequence) and not isinstance(spec, str) and spec:
        return tuple(m for s in spec for m in rules(s))
    raise TypeError(f"a spec is a method such as jlora.LoRA(rank=8), or a non-empty sequence of them, not {spec!r}")


def named(method: Method) -> Method:
    """A method as the plan keeps it: what it adapts is said by the sites, and its data by the arrays."""
    return dataclasses.replace(method.canonical(), target=(), exclude=())


def resolve(
    tree: _tree.Named,
    spec: Any,
    axes: dict[str, str] | None,
    allow_untied: bool,
    traced: _select.Traced | None = None,
) -> tuple[Plan, list[tuple[Method, Recipe]]]:
    """Matches a spec against a tree: the plan, and for each site the method and recipe with their data as given.

    `traced` is what a trace found, `{path: (use, letters)}`. All bad leaves are reported at once.

    Raises:
      ValueError: a pattern without a match, vectors that patterns took, integer or complex leaves, ties adapted at
        one end, what a method refuses.
    """
    _answers.check_axes(axes)
    methods = rules(spec)
    nowhere = _select.unmatched(axes, tree)
    axes = {pattern: letters for pattern, letters in (axes or {}).items() if pattern not in nowhere}
    selected = [_select.select(m.describe(), m.target, m.exclude, tree, traced) for m in methods]
    sites: list[Site] = []
    given: list[tuple[Method, Recipe]] = []
    rule: list[int] = []  # the number of the rule that took each site
    notes: list[str] = []
    bad: list[str] = [*(text for _, wrong in selected for text in wrong), *nowhere.values()]
    vectors: dict[int, dict[int, str]] = {}  # of each rule, the leaves without an input side that patterns took
    unclear: list[tuple[Leaf, str]] = []
    letters_of = {path: letters for path, (_, letters) in (traced or {}).items() if letters}
    roles = _axes.Roles(tree, axes, letters_of)
    places: dict[tuple[str, str], tuple[tuple[int, ...], bool]] = {}
    for index, (path, array) in enumerate(zip(tree.paths, tree.leaves, strict=True)):
        takers = [n for n, (taken, _) in enumerate(selected) if taken[index]]
        if not takers:
            continue
        method = methods[takers[0]]
        if len(takers) > 1:
            others = ", ".join(methods[n].describe() for n in takers[1:])
            notes.append(f"{path}: rule {takers[0] + 1} ({method.describe()}) takes it before {others}")
        shape, dtype = _tree.shape_dtype(array)
        if _answers.no_array(array):
            bad.append(f"{path!r} is {_answers.no_array(array)}")
            continue
        if not _axes.is_trainable_dtype(dtype):
            bad.append(f"{path!r} of dtype {dtype}: only real floating point leaves can be adapted; exclude it")
            continue
        try:
            letters = roles.of(index)
        except ValueError as error:
            bad.append(str(error))
            continue
        leaf = Leaf(path, shape, np.dtype(dtype), letters or roles.likely(index))
        try:
            if 0 in shape:
                raise ValueError("a weight without elements cannot be adapted; exclude it")
            if letters is None and _splits(method, leaf):
                unclear.append((leaf, method.describe()))
                continue
            recipe = method.recipe(leaf)
            if recipe is None:
                notes.append(f"{path}: rank 0, left as it is")
                continue
            _wellformed.check(recipe, leaf)
            arrays = recipe.arrays(leaf)
            _wellformed.check_constants(arrays, jnp.dtype(method.dtype))
            for place, (array, full) in arrays.items():
                if places.setdefault(place, (full, array.trained)) != (full, array.trained):
                    raise ValueError(
                        f"it would share the factor {place[1]!r} of {place[0]!r}, which has shape {places[place][0]} "
                        f"elsewhere and {full} here"
                    )
        except ValueError as error:
            vector = "it needs input and output axes, and a vector has one; target a matrix, or use BitFit() or Full()"
            why = vector if leaf.roles.strip("s") == "o" else error
            said = f"{method.describe()} on {path!r} of shape {shape} ({leaf.roles}): {why}"
            if leaf.axes("ik") or 0 in shape:
                bad.append(said)
            else:
                vectors.setdefault(takers[0], {})[index] = said
            continue
        sites.append(Site(leaf, index, named(method), recipe))
        given.append((method, recipe))
        rule.append(takers[0])
    _beside(tree, methods, axes, letters_of, (sites, given, rule), notes, bad)
    for n, said in vectors.items():
        m, (taken, _) = methods[n], selected[n]
        others = [index for index, it in enumerate(taken) if it and index not in said]
        bad += [_select.vectors(m.describe(), m.target, tree, tuple(said), others)] if others else said.values()
    bad += _ties(tree, sites, allow_untied)
    if unclear:
        bad.append(_axes.unclear(unclear, tree.paths))
    if bad:
        raise ValueError("cannot adapt this tree:\n  " + "\n  ".join(bad))
    return intern(tuple(sites), tuple(map(named, methods)), tuple(notes)), given


def _splits(method: Method, leaf: Leaf) -> bool:
    """Whether a method asks which axes are input and which output; one that cannot be asked does."""
    sides = leaf.roles if {"i", "o"} <= set(leaf.roles) else "i" + "o" * (len(leaf.shape) - 1)
    one = dataclasses.replace(leaf, roles=sides)
    try:
        recipe = method.recipe(one)
    except ValueError:
        return True
    return recipe is not None and recipe.splits(one)


BIASES = {"kernel": "bias", "weight": "bias", "scale": "bias", "w": "b"}  # what is added to a weight's output


def _beside(
    tree: _tree.Named,
    methods: Sequence[Method],
    axes: Any,
    traced: dict[str, str],
    found: Any,
    notes: list[str],
    bad: list[str],
) -> None:
    """The biases of layers whose output a method rescales: sites of the same method, in the order of the tree."""
    sites, given, rule = found
    index = {path: n for n, path in enumerate(tree.paths)}
    held = {site.index: n for n, site in enumerate(sites)}
    for site, (method, _), n in list(zip(sites, given, rule, strict=True)):
        layer, slash, name = site.leaf.path.rpartition("/")
        path = layer + slash + BIASES.get(name, "")
        other = method.beside(site.leaf) if name in BIASES and path in index else None
        if other is None:
            continue
        at = index[path]
        if methods[n].exclude and _select.taken(methods[n].exclude, tree)[at]:
            continue
        if at in held and rule[held[at]] != n:
            notes.append(f"{path}: rule {rule[held[at]] + 1} takes it, so {method.describe()} does not rescale it")
            continue
        shape, dtype = _tree.shape_dtype(tree.leaves[at])
        roles = _axes.given(path, shape, axes) or traced.get(path) or _axes.added(site.leaf, shape)
        if roles is None or not _axes.is_trainable_dtype(dtype):
            bad.append(
                f"{path!r} of shape {shape} is no bias of {site.leaf.path!r} of shape {site.leaf.shape} "
                f"({site.leaf.roles}), and {method.describe()} rescales the output, bias included; "
                'write exclude="bias$" to leave it as it is'
            )
            continue
        leaf = Leaf(path, shape, np.dtype(dtype), roles)
        recipe = other.recipe(leaf)
        assert recipe is not None
        made = Site(leaf, at, named(other), recipe)
        if at in held:
            sites[held[at]], given[held[at]] = made, (other, recipe)
        else:
            held[at] = len(sites)
            sites.append(made)
            given.append((other, recipe))
            rule.append(n)
    order = sorted(range(len(sites)), key=lambda n: sites[n].index)
    for each in found:
        each[:] = [each[n] for n in order]


def _ties(tree: _tree.Named, sites: Sequence[Site], allow_untied: bool) -> list[str]:
    """One array (or NNX variable) under two paths: adapted at one end only, the two would part."""
    ends: dict[int, list[int]] = {}
    for index, (owner, leaf) in enumerate(zip(tree.owners, tree.leaves, strict=True)):
        if isinstance(leaf, (jax.Array, np.ndarray, Packed)) and leaf.ndim:
            ends.setdefault(owner, []).append(index)
    adapted = {s.index for s in sites}
    bad = []
    for indices in ends.values():
        if len(indices) < 2 or not adapted & set(indices):
            continue
        paths = [tree.paths[n] for n in indices]
        if any(tree.owners[n] != id(tree.leaves[n]) for n in indices):
            bad.append(
                f"{paths} are one NNX variable under several attributes, which a pytree flattens to separate leaves; "
                "split the module first: graphdef, params, rest = nnx.split(model, nnx.Param, ...) and adapt(params)"
            )
        elif not adapted >= set(indices) and not allow_untied:
            bad.append(
                f"{paths} are one array (tied), adapted at one end only: after merging they would differ; "
                "target all of them, keep one entry in the tree, or say adapt(..., allow_untied=True)"
            )
    return bad


def describe_rank(site: Site) -> str:
    """The rank of a site, for tables: the sizes of its rank letters."""
    starts = lambda d: [w.arrays[1].shape[0] for w in d.operands if isinstance(w, Difference) and w.arrays[1].shape]
    ranks = [min([dict(d.sizes)[x], *starts(d)]) for d in site.recipe.deltas for x in d.ranks]
    return "+".join(map(str, ranks)) or "-"


def derived(plan: Plan) -> dict[tuple[str, str], Any]:
    """`{(group, factor): make()}` of the frozen factors that need not be saved: they are made again."""
    return {
        place: functools.partial(array.init, None, shape, jnp.dtype(site.method.dtype))
        for site in plan.sites
        for place, (array, shape) in site.recipe.arrays(site.leaf).items()
        if array.derived
    }


def trainable_size(plan: Plan) -> int:
    """The number of trainable parameters of a plan."""
    return sum(math.prod(shape) for shape, trained in plan.shapes.values() if trained)


def dropouts(plan: Plan) -> dict[str, float]:
    """`{path: the largest rate}` of the weights that have a dropout."""
    rates = {site.leaf.path: max((r for d in site.recipe.deltas for r in d.rates), default=0.0) for site in plan.sites}
    return {path: rate for path, rate in rates.items() if rate}
