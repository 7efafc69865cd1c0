"""What several adapters say of each weight, and an adapter made of sites and values."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp

from jlora import _read
from jlora._algebra._weight import Weight
from jlora._dtypes import widened
from jlora._plan import _sites
from jlora._plan._sites import Site
from jlora._trees import _tree
from jlora._trees._leaf import Leaf
from jlora._types import Place
from jlora.adapted import Adapted, Frozen, check_adapted
from jlora.analysis.adapters import Factors, factored
from jlora.io._fingerprint import fingerprint
from jlora.methods.full import Full
from jlora.methods.lora import LoRA
from jlora.rank.compact import concrete

Values = dict[Place, jax.Array]


@dataclasses.dataclass(frozen=True)
class Part:
    """One adapter's say of one weight: its number, what it is multiplied by, its site, and W as an expression."""

    adapter: int
    by: float
    site: Site
    weight: Weight

    @property
    def product(self) -> Factors | None:
        """dW = a^T b, what it is multiplied by in b; None where it is no low-rank product."""
        leaf = self.site.leaf
        matrix = leaf.axes("ik") and leaf.axes("o") and not self.site.recipe.steps
        made = factored(self.site, self.weight) if matrix else None
        return None if made is None else Factors(made.a, self.by * made.b)

    @property
    def change(self) -> jax.Array:
        """dW `(stack..., in, out)`, dense, in at least float32, not multiplied."""
        return widened(self.site.leaf.matrix(self.weight.delta()))


def parts(caller: str, adapters: Sequence[Adapted], weights: Sequence[float] | None) -> dict[str, list[Part]]:
    """`{path: its parts}` in the order of the base's leaves, those of weight zero left out.

    Raises:
      TypeError: no sequence of adapters; weights that are no numbers.
      ValueError: none, unlike bases, more or fewer weights than adapters, factors without values.
    """
    if isinstance(adapters, Adapted) or not isinstance(adapters, Sequence) or not adapters:
        raise TypeError(f"combine.{caller} takes adapters in a list, [first, second], not {type(adapters).__name__}")
    given = [1.0] * len(adapters) if weights is None else [_number(caller, w) for w in weights]
    if len(given) != len(adapters):
        raise ValueError(f"combine.{caller}: {len(given)} weights for {len(adapters)} adapters")
    for adapted in adapters:
        check_adapted(f"combine.{caller}", adapted)
        concrete(f"combine.{caller}", adapted)
    _check_bases(caller, adapters)
    leaves = _tree.leaves(adapters[0].frozen.base)
    found: dict[int, list[Part]] = {}
    for n, (adapted, by) in enumerate(zip(adapters, given, strict=True)):
        every = _read.expressions(adapted, leaves)
        for site, weight in zip(adapted.frozen.plan.sites, every, strict=True):
            if by:
                found.setdefault(site.index, []).append(Part(n, by, site, weight))
    if not found:
        raise ValueError(f"combine.{caller}: all weights are zero, so that nothing is left of the adapters")
    for ours in (ours for ours in found.values() if len({p.site.leaf.roles for p in ours}) > 1):
        letters = ", ".join(dict.fromkeys(p.site.leaf.roles for p in ours))
        raise ValueError(f"combine.{caller}: {ours[0].site.leaf.path!r} has unlike axes in them: {letters}")
    return {found[n][0].site.leaf.path: found[n] for n in sorted(found)}


def _number(caller: str, w: object) -> float:
    if isinstance(w, (str, bool)) or not jnp.isscalar(w) and getattr(w, "shape", None) != ():
        raise TypeError(f"combine.{caller}: a weight is a number, not {w!r:.40}")
    if not math.isfinite(by := float(w)):  # type: ignore[arg-type]
        raise ValueError(f"combine.{caller}: a weight of {by} is no number")
    return by


def _check_bases(caller: str, adapters: Sequence[Adapted]) -> None:
    """Raises ValueError unless all adapters are of one base: the same leaves, or the same in every sampled value."""
    first = adapters[0].frozen.base
    for n, other in enumerate((a.frozen.base for a in adapters[1:]), 2):
        ours, theirs = _tree.leaves(first), _tree.leaves(other)
        if len(ours) == len(theirs) and all(a is b for a, b in zip(ours, theirs, strict=True)):
            continue
        mine, its = (fingerprint(tree, _tree.flatten(tree)) for tree in (first, other))
        if mine != its:
            bad = [a[0] for a, b in zip(mine, its, strict=False) if a != b] or ["their numbers of leaves"]
            raise ValueError(
                f"combine.{caller}: adapter {n} is of another base than the first, at {bad[:3]}"
                f"{f' and {len(bad) - 3} more' if len(bad) > 3 else ''}; updates of unlike bases have no sum"
            )


# What is made -----------------------------------------------------------------------------------------------------


def lora(leaf: Leaf, index: int, a: jax.Array, b: jax.Array, dtype: str) -> tuple[Site, Values]:
    """dW = a^T b of `a (stack..., r, in)` and `b (stack..., r, out)` as a LoRA, with s one."""
    method = _sites.named(LoRA(rank=a.shape[-2], dtype=dtype))
    recipe = method.recipe(leaf)
    assert recipe is not None
    return _filled(Site(leaf, index, method, recipe), {"a": a, "b": b, "s": jnp.ones(leaf.stack)}, dtype)


def full(leaf: Leaf, index: int, change: jax.Array, dtype: str) -> tuple[Site, Values]:
    """dW `(stack..., in, out)` as a delta of the whole leaf."""
    method = _sites.named(Full(target=".", dtype=dtype))
    recipe = method.recipe(leaf)
    assert recipe is not None
    return _filled(Site(leaf, index, method, recipe), {"delta": change, "s": jnp.ones(leaf.stack)}, dtype)


def _filled(site: Site, given: Mapping[str, jax.Array], dtype: str) -> tuple[Site, Values]:
    arrays = site.recipe.arrays(site.leaf)
    return site, {place: given[place[1]].reshape(shape).astype(dtype) for place, (_, shape) in arrays.items()}


def adapter(base: Frozen, made: Sequence[tuple[Site, Values]]) -> Adapted:
    """The adapter of these sites over the base of another."""
    sites = tuple(sorted((site for site, _ in made), key=lambda site: site.index))
    plan = _sites.intern(sites, tuple(dict.fromkeys(s.method for s in sites)), ())
    halves: dict[bool, dict[str, dict[str, jax.Array]]] = {True: {}, False: {}}
    values = {place: value for _, ours in made for place, value in ours.items()}
    for place, (_, trained) in plan.shapes.items():
        halves[trained].setdefault(place[0], {})[place[1]] = values[place]
    return Adapted(halves[True], Frozen(base.base, halves[False], None, plan))


def values_of(site: Site, get: Callable[[str, str], jax.Array]) -> Values:
    """The arrays of one site."""
    return {place: get(*place) for place in site.recipe.arrays(site.leaf)}


def dtype_of(ours: Sequence[Part]) -> str:
    """The widest dtype of the factors of some methods."""
    return str(jnp.result_type(*(part.site.method.dtype for part in ours)))
