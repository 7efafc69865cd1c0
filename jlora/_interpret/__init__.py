"""Evaluates a traced function with expressions in place of its adapted weights. The only room that knows jaxprs.

Identity is exact: an input variable is a weight. Operations that move labels move the expression (`moves`), operations
that contract it use its factors (`contractions`), control flow is rebuilt with JAX's public functions (`control`), and
anything else gets the dense weight as late as possible, which is always right. What differs between JAX releases is
read in one place (`jaxpr`).
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax.extend import core, source_info_util

from jlora import _read
from jlora._algebra._express import express
from jlora._algebra._mesh import typed
from jlora._algebra._term import NoArray
from jlora._algebra._weight import Operand, Weight, is_weight
from jlora._forward import _ops, _step, _table
from jlora._forward._dropout import fold_keys
from jlora._forward._ops import Refusal, Spent
from jlora._interpret import control, moves, outputs, roles
from jlora._interpret.jaxpr import Eqn, Evaluated, Outputs, Rule, bind_params, chosen, live, source
from jlora._interpret.moments import moment
from jlora._interpret.roles import Contradiction
from jlora._keys import stable_hash
from jlora._trees import _axes, _tree
from jlora._trees._axes import RolesWarning
from jlora._types import Fill, Half, PyTree, Value
from jlora.adapted import Adapted, without_key

RULES: Mapping[str, Rule] = {**moves.RULES, **outputs.RULES, **control.RULES}

Counted: TypeAlias = dict[int, int | jax.Array]
"""The number of the next use of each weight with a dropout key, by its origin."""


class Along(NamedTuple):
    """What goes into a sub-jaxpr beside its arguments, and what comes out of it.

    Attributes:
      numbers: of each weight with a dropout key, the number of its next use.
      inputs: of each weight whose input a step reads, what it met last; none where it has met nothing.
    """

    numbers: Counted
    inputs: dict[int, _step.Met]


Block: TypeAlias = tuple[int, tuple[bool, ...]]
"""The identity of a called jaxpr, and which of its outputs are computed."""

Moments: TypeAlias = dict[str, Operand] | None
"""`{path: X^T X}` as far as it is collected; None when nobody asked."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One use of one adapted weight: how it was contracted, or why it was made dense."""

    path: str
    use: str
    plan: str
    flops: float
    dense_flops: float
    reason: str


@dataclasses.dataclass
class Interpreter:
    """Walks jaxprs for one call of a lifted function.

    Attributes:
      forward_mode: plain factored dots in place of custom rules.
      rows: where `explain` collects its rows; None when nobody asked.
      moments: where `init.activations` collects `{path: X^T X}` (`moment`); None when nobody asked.
      numbers: of each weight with a dropout key, by its origin, the number of its next use in the order of the program.
      inputs: of each weight whose input a step reads, by its origin, what it met last.
    """

    forward_mode: bool = False
    rows: list[Row] | None = None
    moments: Moments = None
    memo: dict[Block, tuple[Callable[..., tuple[list[Evaluated], Moments, Along]], core.Jaxpr]] = dataclasses.field(
        default_factory=dict
    )
    numbers: Counted = dataclasses.field(default_factory=dict)
    inputs: dict[int, _step.Met] = dataclasses.field(default_factory=dict)
    contradicted: list[Contradiction] = dataclasses.field(default_factory=list)
    around: list[Eqn] = dataclasses.field(default_factory=list)  # the equations being evaluated, outermost first

    @property
    def watched(self) -> bool:
        return not (self.rows is self.moments is None)

    # -- walking --

    def run(
        self, jaxpr: core.Jaxpr, consts: Sequence[jax.Array], args: Sequence[Evaluated], want: Sequence[bool]
    ) -> Outputs:
        """The outputs of a jaxpr, None where not wanted; each may be an expression."""
        keep, needed = live(jaxpr, want)
        env: dict[core.Var, Evaluated] = {}
        env.update(zip(jaxpr.constvars, consts, strict=True))
        env.update(zip(jaxpr.invars, args, strict=True))
        read = lambda v: v.val if isinstance(v, core.Literal) else env[v]
        stack = source_info_util.current_name_stack()
        for eqn, kept in zip(jaxpr.eqns, keep, strict=True):
            if not kept:
                continue
            info = eqn.source_info
            with (
                source_info_util.user_context(info.traceback, name_stack=stack + info.name_stack),
                eqn.ctx.manager,
            ):
                outs = self.equation(eqn, [read(v) for v in eqn.invars], [v in needed for v in eqn.outvars])
            env.update({v: o for v, o in zip(eqn.outvars, outs, strict=True) if o is not None})
        return [read(v) if w else None for v, w in zip(jaxpr.outvars, want, strict=True)]

    def equation(self, eqn: Eqn, values: list[Evaluated], want: list[bool]) -> Outputs:
        plain = [v for v in values if not is_weight(v)]
        if len(plain) == len(values):
            return self.bind(eqn, plain)
        rule = RULES.get(eqn.primitive.name)
        if rule is None:
            return self.bind(eqn, self.arrays(values, eqn, f"{eqn.primitive.name} has no rule"))
        self.around.append(eqn)
        try:
            return rule(self, eqn, values, want)
        except Refusal as refusal:
            return self.bind(eqn, self.arrays(values, eqn, str(refusal)))
        finally:
            self.around.pop()

    def bind(self, eqn: Eqn, values: Sequence[jax.Array]) -> list[jax.Array]:
        subfuns, params = bind_params(eqn)
        out = eqn.primitive.bind(*subfuns, *values, **params)
        return list(out) if eqn.primitive.multiple_results else [out]

    def dense(self, value: Evaluated, eqn: Eqn | str, reason: str) -> jax.Array:
        """The array of an expression; an entry in the report unless it is a vector, which costs nothing."""
        if not is_weight(value):
            return value
        _table.check_whole(value, reason)
        name = eqn if isinstance(eqn, str) else eqn.primitive.name
        known = (source(e) for e in (*reversed(self.around), eqn) if not isinstance(e, str))
        where = next(filter(None, known), "")
        if value.steps:
            at = f" at {where}" if where else ""
            raise NoArray(
                f"{value.named}: it has a step on its output, which stands behind a dot, a convolution, a lookup, or "
                f"the sum of an output with a bias, and {name} asks for the weight alone ({reason}{at}). Leave this "
                "weight to no such method (exclude=...)"
            )
        if _ops.is_vector(value):
            self.record(value, name, Spent("dense (a vector)", 0.0, 0.0))
        else:
            if value.positional:
                at = f" at {where}" if where else ""
                raise NoArray(
                    f"{value.named}: {value.gated()}, so that there is no dense weight, and {name} asks for one "
                    f"({reason}{at}). Leave this weight to no gated method (exclude=...)"
                )
            plan = "dense" if value.key is None else "dense, no dropout"
            self.record(value, name, Spent(plan, 0.0, 0.0), f"{reason} at {where}" if where else reason)
        return value.dense()

    def record(self, w: Weight, use: str, cost: Spent, reason: str = "") -> None:
        if self.rows is not None and w.path is not None:
            self.rows.append(Row(w.path, use, cost.plan, cost.flops, cost.dense_flops, reason))

    def check(self, closed: core.ClosedJaxpr, found: Sequence[Adapted], leaves: Sequence[Sequence[PyTree]]) -> None:
        """Holds the axes that `adapt` took against what the function does with them: a warning, or a report's lines."""
        sites = [s for a in found for s in a.frozen.plan.sites]
        if not any(s.recipe.splits(s.leaf) for s in sites):
            return
        own = {id(leaf) for each in leaves for leaf in each}
        paths = [path for each in names(list(found)) for path in each]
        named = [(path, s.leaf) for path, s in zip(paths, sites, strict=True)]
        seen = roles.contradictions(closed.jaxpr, [id(c) not in own for c in closed.consts], named)
        asked = {path for path, s in zip(paths, sites, strict=True) if s.recipe.splits(s.leaf)}
        self.contradicted = [c for c in seen if c[0] in asked]
        if self.contradicted and not self.watched:
            warnings.warn(_axes.contradiction(self.contradicted), RolesWarning, stacklevel=4)

    def meet(self, w: Weight, x: jax.Array, pairs: Sequence[tuple[int, int]], batch: Sequence[tuple[int, int]]) -> None:
        if self.moments is not None and w.path is not None and (made := moment(w, x, pairs, batch)) is not None:
            self.seen({w.path: made})

    def seen(self, moments: Moments) -> None:
        """Adds to what was collected."""
        for path, made in (moments or {}).items():
            assert self.moments is not None
            known = self.moments.get(path)
            shapes = [x.arrays[0].shape for x in (known or made, made)]
            if shapes[0] != shapes[1] or known is not None and known.labels != made.labels:
                raise ValueError(f"{path!r} meets its inputs in unlike parts, of shapes {shapes}; exclude it")
            self.moments[path] = made if known is None else jax.tree.map(jnp.add, known, made)

    def apart(self, along: Along, f: Callable[[], Value]) -> tuple[Value, Moments, Along]:
        """`f()` and what was collected meanwhile: a sub-jaxpr returns it, as its arrays must not leak out."""
        outer, self.moments = self.moments, None if self.moments is None else {}
        try:
            outs, along = self.within(along, f)
            return outs, self.moments, along
        finally:
            self.moments = outer

    # -- what sub-jaxprs are told --

    def used(self, w: Weight) -> Weight:
        """A weight with this use's dropout key: two uses draw two masks."""
        if w.key is None:
            return w
        number = self.numbers.get(w.origin, 0)
        self.numbers[w.origin] = number + 1
        return w.replace(key=fold_keys(w.key, number))

    def entering(self, values: Sequence[Evaluated], again: bool = False) -> tuple[list[Evaluated], Along, list[int]]:
        """Expressions on their way into a sub-jaxpr, and what goes along.

        Origins are renamed in the order in which they come, so that equal layers look alike; the last result has them.
        A loop or a branch (`again`) knows no input of a weight that it may use itself: which one was last is not known
        before it runs.
        """
        weights = [v for v in values if is_weight(v)]
        origins = list(dict.fromkeys(o for v in weights for o in _origins(v)))
        inside = [_renamed(v, {o: n for n, o in enumerate(origins)}) if is_weight(v) else v for v in values]
        own = {v.origin for v in weights if v.is_read} if again else set[int]()
        known = {n: self.inputs[o] for n, o in enumerate(origins) if o in self.inputs and o not in own}
        return inside, Along({n: jnp.int32(self.numbers.get(o, 0)) for n, o in enumerate(origins)}, known), origins

    def within(self, along: Along, f: Callable[[], Value]) -> tuple[Value, Along]:
        """`f()` and what goes along after it, which a sub-jaxpr returns: no array of its trace is kept here."""
        outer, self.numbers, inputs, self.inputs = self.numbers, dict(along.numbers), self.inputs, dict(along.inputs)
        try:
            return f(), Along({n: jnp.int32(self.numbers[n]) for n in along.numbers}, self.inputs)
        finally:
            self.numbers, self.inputs = outer, inputs

    def left(self, outs: Sequence[Evaluated], along: Along, origins: Sequence[int]) -> list[Evaluated]:
        """What a sub-jaxpr returned, under the names outside; uses counted, and what is no longer known forgotten."""
        self.numbers.update({o: along.numbers[n] for n, o in enumerate(origins)})
        for n, o in enumerate(origins):
            self.inputs.pop(o, None)
            if n in along.inputs:
                self.inputs[o] = along.inputs[n]
        return [_renamed(v, dict(enumerate(origins))) if is_weight(v) else v for v in outs]

    def arrays(self, values: Sequence[Evaluated], eqn: Eqn, reason: str) -> list[jax.Array]:
        return [self.dense(v, eqn, reason) for v in values]


def _origins(w: Weight) -> tuple[int, ...]:
    """The origins that matter to a weight: its own where it has a key or is read, and those that its steps read."""
    own = (w.origin,) if w.key is not None or w.is_read else ()
    return (*own, *(o for o in w.reads if o >= 0))


def _renamed(w: Weight, to: dict[int, int]) -> Weight:
    if not _origins(w):
        return w
    return w.replace(origin=to.get(w.origin, w.origin), reads=tuple(to.get(o, o) for o in w.reads))


def names(found: list[Adapted]) -> list[list[str]]:
    """What the weights are called in a report: their paths, behind a number where several trees share one."""
    paths = [[s.leaf.path for s in a.frozen.plan.sites] for a in found]
    every = [path for each in paths for path in each]
    alone = len(set(every)) == len(every)
    return [[path if alone else f"{k}:{path}" for path in each] for k, each in enumerate(paths)]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _told(words: str, factors: Half) -> Half:
    """The same factors; where a gradient is taken with respect to them, and only there, a warning."""
    return factors


def _tell(words: str, factors: Half) -> tuple[Half, None]:
    warnings.warn(words, stacklevel=1)  # always from this line, so that Python shows it once
    return factors, None


_told.defvjp(_tell, lambda words, _, cotangent: (cotangent,))


def noticed(adapted: Adapted) -> Adapted:
    """The same adapter; one that has dropout and no key says so where it is trained."""
    words = without_key(adapted)
    return Adapted(_told(words, adapted.trainable), adapted.frozen) if words else adapted


def _linked(expressions: list[Weight], adapted: Adapted) -> list[Weight]:
    """The last of these, an adapter's, where a step of one reads the input of another: each knows the other."""
    first = len(expressions) - len(adapted.frozen.plan.sites)
    for n, others in _read.inputs_read(adapted).items():
        w = expressions[first + n]
        expressions[first + n] = w.replace(reads=tuple(-1 if o is None else first + o for o in others))
        for o in others:
            if o is not None:
                expressions[first + o] = expressions[first + o].replace(origin=first + o, is_read=True)
    return expressions


def call(
    fn: Callable[..., Value],
    found: list[Adapted],
    fill: Fill,
    *,
    forward_mode: bool = False,
    me: Interpreter | None = None,
) -> Value:
    """`fn` on a call's arguments, with expressions where the Adapteds' weights stand."""
    me = me or Interpreter(forward_mode)
    try:
        return _called(fn, found, fill, me)
    except NoArray:
        if me.watched:
            raise
        # equal layers share a program, and so have no names: with them, once more, for the message
        return _called(fn, found, fill, Interpreter(forward_mode, rows=[]))


def _called(fn: Callable[..., Value], found: list[Adapted], fill: Fill, me: Interpreter) -> Value:
    """`call` by one interpreter."""
    leaves = [_tree.leaves(a.frozen.base) for a in found]
    bases = _read.held([(s.leaf.path, leaves[k][s.index]) for k, a in enumerate(found) for s in a.frozen.plan.sites])
    beside: list[PyTree] = []

    def traced(*arrays: jax.Array) -> list[jax.Array]:
        rest = iter(arrays)
        trees = [_read.replaced(a, [next(rest) for _ in a.frozen.plan.sites]) for a in found]
        args, kwargs = fill(trees)
        outs, treedef = jax.tree.flatten(fn(*args, **kwargs))
        inside = [isinstance(o, jax.Array) for o in outs]
        beside[:] = [treedef, inside, [None if i else o for o, i in zip(outs, inside, strict=True)]]
        return [o for o, i in zip(outs, inside, strict=True) if i]

    if not me.forward_mode:  # what asks for gradients is noticed in a custom rule, and that mode has none
        found = [noticed(a) for a in found]
    closed = jax.make_jaxpr(traced)(*map(typed, bases))
    me.check(closed, found, leaves)
    expressions: list[Weight] = []
    for a, paths in zip(found, names(found), strict=True):
        get = _read.factors_of(a)
        for s, path in zip(a.frozen.plan.sites, paths, strict=True):
            key = a.frozen.key
            if key is not None:
                key = jax.random.fold_in(key, stable_hash(s.leaf.path))
            base = bases[len(expressions)]
            # tables are few, so they do not need to share programs
            shown = path if me.watched or s.recipe.rows else None
            origin, gates = len(expressions), a.frozen.gates
            made = express(s.leaf, s.recipe, base, get, gates=gates, key=key, origin=origin, path=shown)
            expressions.append(made)
        expressions = _linked(expressions, a)
    want = [True] * len(closed.jaxpr.outvars)
    outs, _ = me.within(Along({}, {}), lambda: chosen(me.run(closed.jaxpr, closed.consts, expressions, want), want))
    treedef, inside, others = beside
    results = iter(me.dense(o, "output", "returned by the function") for o in outs)
    filled = [jnp.asarray(next(results)) if i else o for i, o in zip(inside, others, strict=True)]
    return jax.tree.unflatten(treedef, filled)
