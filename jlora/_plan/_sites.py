"""Which weight has which recipe: the static half of an adapter."""

import dataclasses
import functools
import math
import threading
import weakref
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import TypeAlias

import jax

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Difference
from jlora._trees._leaf import Leaf
from jlora._types import Place, Shape
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
    def shapes(self) -> dict[Place, tuple[Shape, bool]]:
        """`{(group, factor): (shape, trained)}` of every array."""
        found: dict[Place, tuple[Shape, bool]] = {}
        for site in self.sites:
            for place, (array, shape) in site.recipe.arrays(site.leaf).items():
                found[place] = (shape, array.trained)
        return found

    @functools.cached_property
    def gates(self) -> dict[str, tuple[Shape, ...]]:
        """`{name: the sizes of its own letters}` of every gate; there is more than one only where methods differ."""
        found: dict[str, dict[Shape, None]] = {}
        for name, sizes in (gate for site in self.sites for gate in site.recipe.gates):
            found.setdefault(name, {})[sizes] = None
        return {name: tuple(every) for name, every in found.items()}

    def __repr__(self) -> str:
        # JAX prints plans where two structures differ: one line, but unlike for unlike plans
        digest = zlib.crc32(repr((self.sites, self.methods)).encode())
        methods = ", ".join(dict.fromkeys(m.describe() for m in self.methods))
        ranks = ", ".join(dict.fromkeys(describe_rank(s) for s in self.sites))
        return f"Plan({len(self.sites)} weights, {methods[:80]}, rank {ranks[:40]}, #{digest:08x})"

    def __deepcopy__(self, memo: object) -> "Plan":
        return self

    def __reduce__(self) -> tuple[Callable[..., "Plan"], tuple[object, ...]]:
        return intern, (self.sites, self.methods, self.notes)


_lock = threading.Lock()
_interned: "weakref.WeakValueDictionary[tuple[object, ...], Plan]" = weakref.WeakValueDictionary()


def intern(sites: tuple[Site, ...], methods: tuple[Method, ...], notes: tuple[str, ...]) -> Plan:
    """The one plan with this content."""
    content = (sites, methods, notes)
    with _lock:
        return _interned.setdefault(content, Plan(*content))


Spec: TypeAlias = "Method | Sequence[object]"  # a method, or several; they nest


def rules(spec: object) -> tuple[Method, ...]:
    """A spec as a flat tuple of methods."""
    if isinstance(spec, Method):
        return (spec,)
    if isinstance(spec, Sequence) and not isinstance(spec, str) and spec:
        return tuple(m for s in spec for m in rules(s))
    raise TypeError(f"a spec is a method such as jlora.LoRA(rank=8), or a non-empty sequence of them, not {spec!r}")


def named(method: Method) -> Method:
    """A method as the plan keeps it: what it adapts is said by the sites, and its data by the arrays."""
    return dataclasses.replace(method.canonical(), target=(), exclude=())


def describe_rank(site: Site) -> str:
    """The rank of a site, for tables: the sizes of its rank letters."""
    starts = lambda d: [w.arrays[1].shape[0] for w in d.operands if isinstance(w, Difference) and w.arrays[1].shape]
    ranks = [min([dict(d.sizes)[x], *starts(d)]) for d in site.recipe.deltas for x in d.ranks]
    return "+".join(map(str, ranks)) or "-"


def derived(plan: Plan) -> dict[Place, Callable[[], jax.Array]]:
    """`{(group, factor): make()}` of the frozen factors that need not be saved: they are made again."""
    return {
        place: functools.partial(array.init, None, shape, site.method.dtype_of(array))
        for site in plan.sites
        for place, (array, shape) in site.recipe.arrays(site.leaf).items()
        if array.derived
    }


def beside(path: str, of: str, paths: Collection[str]) -> str | None:
    """The path of `of` from the nearest place above `path` that has it."""
    above = path.split("/")[:-1]
    tried = ("/".join([*above[:n], of]) for n in range(len(above), -1, -1))
    return next((p for p in tried if p in paths), None)


def inputs_read(sites: Sequence[Site], paths: Collection[str]) -> Iterator[tuple[int, str | None]]:
    """For every step of every site, the site's number and the path whose input it reads; None where it reads none."""
    for n, site in enumerate(sites):
        for step in site.recipe.steps:
            yield n, beside(site.leaf.path, step.of, paths) if step.of else None


def trainable_size(plan: Plan) -> int:
    """The number of trainable parameters of a plan."""
    return sum(math.prod(shape) for shape, trained in plan.shapes.values() if trained)


def dropouts(plan: Plan) -> dict[str, float]:
    """`{path: the largest rate}` of the weights that have a dropout."""
    rates = {site.leaf.path: max((r for d in site.recipe.deltas for r in d.rates), default=0.0) for site in plan.sites}
    return {path: rate for path, rate in rates.items() if rate}
