"""Which axes of a weight a function contracts, keeps, indexes or scans: read off its jaxpr, nothing is evaluated.

A weight is followed through what moves, cuts, casts, scales and joins it, into every sub-jaxpr, until it meets data: in
a dot, a convolution, a lookup, or element by element. Arrays that weights alone went into are no data.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence, Set
from typing import TypeAlias

import jax
from jax.extend import core

from jlora._interpret.following import RULES
from jlora._interpret.jaxpr import Eqn, aval, open_jaxpr
from jlora._interpret.views import KINDS, Known, Use, View, grown, pairs, whole
from jlora._trees import _tree
from jlora._trees._leaf import Leaf
from jlora._types import PyTree, Shape

Contradiction: TypeAlias = tuple[str, Shape, str, str]
"""`(path, shape, letters taken, letters read)` of a weight that a function uses otherwise than it was taken."""


def read(jaxpr: core.Jaxpr, weights: int, consts: Sequence[bool]) -> list[list[Use]]:
    """The uses of each of a jaxpr's first inputs, in order.

    Args:
      jaxpr: an open jaxpr.
      weights: how many of its inputs are weights; the others are data.
      consts: for each constant whether it is data.
    """
    shapes = [aval(v).shape for v in jaxpr.invars[:weights]]
    reader = Reader(shapes)
    known = [Known((whole(n, shape),)) for n, shape in enumerate(shapes)]
    rest = [Known((), True)] * (len(jaxpr.invars) - weights)
    reader.run(jaxpr, [Known((), d) for d in consts], known + rest)
    return reader.uses


def first(uses: Sequence[Use]) -> str:
    """What a weight is for: the first of its uses in the order of `KINDS`, nothing where there is none."""
    return next((kind for kind in KINDS if any(use.kind == kind for use in uses)), "")


def decided(uses: Sequence[Use]) -> str | None:
    """The letters that the uses of a weight say, None where they do not tell."""
    for kind in KINDS:
        for use in uses:
            if use.kind == kind:
                return use.letters or None
    return None


def contradictions(jaxpr: core.Jaxpr, consts: Sequence[bool], named: Sequence[tuple[str, Leaf]]) -> list[Contradiction]:
    """Each of the first inputs that a jaxpr uses otherwise alone.

    A weight is used as it was taken if one of its dots, convolutions or lookups says so: a tied head turns its table,
    a score may turn a key's weight.
    """
    read_as = list(zip(named, read(jaxpr, len(named), consts), strict=True))
    strong = [[use for use in uses if use.letters and use.kind in ("lookup", "dot")] for _, uses in read_as]
    deep = {leaf.shape[n] for (_, leaf), uses in zip(named, strong, strict=True) for u in uses for n in _both(leaf, u)}
    return [
        (path, leaf.shape, leaf.roles, uses[0].letters)
        for (path, leaf), uses in zip(named, strong, strict=True)
        if uses and not any(_agrees(leaf, use, deep) for use in uses)
    ]


def _both(leaf: Leaf, use: Use) -> list[int]:
    """The axes that are a stack both in the leaf's letters and in this use."""
    return [n for n, (a, b) in enumerate(zip(leaf.roles, use.letters, strict=True)) if a == b == "s"]


def _agrees(leaf: Leaf, use: Use, deep: Set[int]) -> bool:
    """Whether one use is what the letters of a leaf say; `deep` are the sizes of stacks that the function has."""
    taken, seen = (x.replace("k", "i") for x in (leaf.roles, use.letters))
    axes = [n for n, size in enumerate(leaf.shape) if size > 1 and n not in use.static]
    # experts that all see the same activation look to a dot like heads: outputs, not a stack
    experts = re.search(r"(^|[/_])(experts?|moe|moeblock)([/_]|$)", leaf.path, re.IGNORECASE) is not None
    stacked = lambda n: experts or leaf.shape[n] in deep
    alike = lambda n: taken[n] == seen[n] or (taken[n] == "s" and seen[n] == "o" and stacked(n))
    if all(map(alike, axes)):
        return True
    turned = all((taken[n], seen[n]) in (("i", "o"), ("o", "i"), ("o", "s"), ("s", "s")) for n in axes)
    # Two uses in which the sides are turned, and nothing is wrong: a table that is the output head as well, and keys
    # that were multiplied into the queries of each head.
    return turned and (
        re.search("emb|wte", leaf.path) is not None or any((taken[n], seen[n]) == ("o", "s") for n in axes)
    )


def traced(fn: Callable[..., PyTree], leaves: Sequence[PyTree], others: Sequence[PyTree]) -> list[list[Use]]:
    """The uses of each leaf in a call of `fn(leaves, others)`, whose outputs may be anything.

    Shapes are enough for all of them.
    """

    def arrays(leaves: list[PyTree], others: list[PyTree]) -> list[jax.Array]:
        return [x for x in jax.tree.leaves(fn(leaves, others)) if isinstance(x, jax.Array)]

    shapes = lambda xs: [jax.ShapeDtypeStruct(*_tree.shape_dtype(x)) for x in xs]
    closed = jax.make_jaxpr(arrays)(shapes(leaves), list(others))
    # a function without other arguments has its data in its closure
    return read(closed.jaxpr, len(leaves), [not others] * len(closed.consts))


class Reader:
    """Walks a jaxpr with a `Known` for each variable."""

    def __init__(self, shapes: Sequence[tuple[int, ...]]):
        self.shapes = shapes
        self.uses: list[list[Use]] = [[] for _ in shapes]

    def run(self, jaxpr: core.Jaxpr, consts: Sequence[Known], args: Sequence[Known]) -> list[Known]:
        env: dict[core.Var, Known] = dict(pairs(jaxpr.constvars, consts)) | dict(pairs(jaxpr.invars, args))
        read = lambda v: Known() if isinstance(v, core.Literal) else env[v]
        for eqn in jaxpr.eqns:
            env.update(pairs(eqn.outvars, self.equation(eqn, [read(v) for v in eqn.invars])))
        return [read(v) for v in jaxpr.outvars]

    def equation(self, eqn: Eqn, ins: list[Known]) -> list[Known]:
        plain = Known((), any(k.data for k in ins), eqn.primitive.name == "eq")
        if not any(k.views or k.product or k.hot for k in ins):
            inner = eqn.primitive.name in ("jit", "pjit", "closed_call")  # may hold an `==`, as `one_hot` does
            made = self.inside(eqn, ins) if inner else None
            return [plain] * len(eqn.outvars) if made is None else made
        rule = RULES.get(eqn.primitive.name)
        if rule is not None:
            return rule(self, eqn, ins)
        made = self.inside(eqn, ins)
        return self.elementwise(eqn, ins) if made is None else made

    # -- recording --

    def use(self, v: View, said: dict[int, str], kind: str) -> None:
        """A weight meets data; axes of the array that `said` does not name are `o`."""
        contracted = kind in ("lookup", "dot", "between weights") and "i" in said.values()
        if any(how == "m" for _, how in v.gone):
            kind = "between weights" if contracted else "elementwise"
            if not contracted:  # a product of two weights that data scales: the axis that joined them counts as summed
                v = dataclasses.replace(v, gone=frozenset((a, "r" if how == "m" else how) for a, how in v.gone))
        if kind == "elementwise" and v.picked:
            kind = "lookup"
            said = {n: "i" for n, g in enumerate(v.groups) if any(set(axes) & set(v.picked) for axes, _ in g)}
        letters = v.letters(said, contracted)
        shape = self.shapes[v.source]
        if letters is None:
            self.uses[v.source].append(Use("unsure", ""))
            return
        static = frozenset(a for a, how in v.gone if how == "z")
        said_so = "".join(letters.get(n, "o") for n in range(len(shape)))
        if kind == "lookup" and len(shape) > 1 and "o" not in said_so:
            said_so = ""  # `table[rows, columns]` takes single elements: no axis is an output
        self.uses[v.source].append(Use(kind, said_so, static))

    def unsure(self, views: Sequence[View]) -> None:
        for v in views:
            self.uses[v.source].append(Use("unsure", ""))

    # -- rules --

    def inside(self, eqn: Eqn, ins: list[Known]) -> list[Known] | None:
        """Into the sub-jaxpr of a call, of remat, of a custom rule, of shard_map: whatever has one that fits."""
        if eqn.primitive.name == "pallas_call":
            return None
        for value in eqn.params.values():
            inner = open_jaxpr(value)[0] if isinstance(value, (core.Jaxpr, core.ClosedJaxpr)) else None
            if inner is not None and len(inner.invars) == len(ins) and len(inner.outvars) == len(eqn.outvars):
                return self.run(inner, [Known()] * len(inner.constvars), ins)
        if not any(k.views or k.product or k.hot for k in ins):
            return [Known((), any(k.data for k in ins))] * len(eqn.outvars)
        return None

    def elementwise(self, eqn: Eqn, ins: list[Known]) -> list[Known]:
        """Operations on arrays of one rank, and all that no rule is for."""
        shapes = [getattr(v.aval, "shape", ()) for v in eqn.invars]
        out = getattr(eqn.outvars[0].aval, "shape", ())
        fits = [len(s) == len(out) and all(a in (1, b) for a, b in pairs(s, out)) for s in shapes]
        one = all(getattr(v.aval, "shape", None) == out for v in eqn.outvars)
        seen = [(v, s) for k, s, fit in pairs(ins, shapes, fits) for v in k.views if fit and one]
        lost = [v for k, fit in pairs(ins, fits) for v in k.views if not (fit and one)]
        if any(k.data and s for k, s in pairs(ins, shapes)):
            self.unsure(lost)
            for v, _ in seen:
                self.use(v, {}, "elementwise")
            kept = [v for v, _ in seen if eqn.primitive.name == "mul" and v.wide() > 1]
            return [Known((), True, product=tuple(kept))] * len(eqn.outvars)
        # A weight divided by its own norm: the norm comes back to the weight, whose axes say more.
        full = {(v.source, a) for v, _ in seen for a in v.held}
        views = [grown(v, s, out) for v, s in seen if not any((v.source, a) in full for a, how in v.gone if how == "r")]
        self.unsure([v for v in lost if v.source not in {w.source for w in views}])
        return [Known(tuple(dict.fromkeys(views)))] * len(eqn.outvars)

    def moved(self, ins: list[Known], move: Callable[[View], View | None]) -> list[Known]:
        """One array moved: each weight in it is, or is lost."""
        made = lambda views: tuple(w for w in (move(v) for v in views) if w is not None)
        k = ins[0]
        views, product = made(k.views), made(k.product)
        self.unsure([v for v in k.views if v.source not in {w.source for w in views}])
        return [dataclasses.replace(k, views=views, product=product)]
