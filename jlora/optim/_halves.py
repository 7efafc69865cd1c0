"""Where the factors stand in the trees that optax hands round: split, whole, masked, or inside a larger tree."""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import jax
import optax

from jlora._plan import _pairs
from jlora._plan._pairs import Pair
from jlora._plan._sites import Plan
from jlora._types import Place, PyTree
from jlora.adapted import Adapted, check_adapted, is_adapted

Places: TypeAlias = dict[Place, jax.Array]
Change: TypeAlias = Callable[[tuple[Pair, ...], Places, Places, Places], Places]


def plan_with(caller: str, adapted: Adapted, wanted: Callable[[Pair], bool], what: str) -> Plan:
    """The plan of `adapted`, which must hold a pair that `wanted` takes: a transformation of nothing is a mistake."""
    check_adapted(caller, adapted)
    if not any(map(wanted, _pairs.pairs(adapted.frozen.plan))):
        methods = ", ".join(dict.fromkeys(m.describe() for m in adapted.frozen.plan.methods))
        raise ValueError(f"{caller} would do nothing: no weight under {methods} has {what}")
    return adapted.frozen.plan


def places(half: PyTree) -> Places:
    """`{(group, factor): leaf}`, without what is masked out."""
    name = lambda key: jax.tree_util.keystr((key,), simple=True)
    return {(name(p[0]), name(p[-1])): x for p, x in jax.tree_util.tree_leaves_with_path(half)}


def _put(half: PyTree, values: Mapping[Place, PyTree]) -> PyTree:
    """The half with these factors in their places, others as they are."""
    name = lambda key: jax.tree_util.keystr((key,), simple=True)
    return jax.tree_util.tree_map_with_path(lambda p, x: values.get((name(p[0]), name(p[-1])), x), half)


def check_masked(caller: str, opt_state: PyTree) -> None:
    """Raises where an optimizer's state has arrays for a frozen half: it was made without `masked`, and moves the base.

    What `optax.MultiSteps` gathers is of all that passes, and moves nothing.
    """
    gathers = lambda x: isinstance(x, optax.MultiStepsState)
    for state in jax.tree.leaves(opt_state, is_leaf=lambda x: is_adapted(x) or gathers(x)):
        if gathers(state):
            check_masked(caller, state.inner_opt_state)
        elif is_adapted(state) and jax.tree.leaves(state.frozen):
            raise ValueError(
                f"{caller}: the optimizer's state holds the frozen half: it was made of the whole Adapted, and its "
                "momentum and weight decay move the base and the scales s. Write jlora.masked(tx), as in state = "
                "jlora.masked(optax.adamw(1e-3)).init(adapted), or split: tx.init(adapted.trainable)"
            )


class Halves:
    """The trainable half of a plan inside the trees that optax hands round, wherever it stands there."""

    def __init__(self, plan: Plan) -> None:
        self.groups = frozenset(group for (group, _), (_, trained) in plan.shapes.items() if trained)

    def holds(self, x: object) -> bool:
        """Whether this node is an adapter: an `Adapted`, or a dictionary with all trained groups of the plan."""
        return is_adapted(x) or isinstance(x, Mapping) and self.groups <= set(x)

    def read(self, tree: PyTree, caller: str) -> Places:
        """The factors of the one adapter in a tree, by place."""
        found = [x for x in jax.tree.leaves(tree, is_leaf=self.holds) if self.holds(x)]
        if len(found) != 1:
            some = ", ".join(map(repr, sorted(self.groups)[:3]))
            raise ValueError(
                f"{caller} looks for one adapter with the groups {some}, ... and finds {len(found)}: give it that "
                "adapter's parameters, alone or inside a larger tree (optax.partition and masks of factors go inside)"
            )
        return places(found[0].trainable if is_adapted(found[0]) else found[0])

    def write(self, tree: PyTree, values: Mapping[Place, PyTree]) -> PyTree:
        """The tree with these factors in their places."""

        def visit(x: PyTree) -> PyTree:
            if not self.holds(x):
                return x
            return Adapted(_put(x.trainable, values), x.frozen) if is_adapted(x) else _put(x, values)

        return jax.tree.map(visit, tree, is_leaf=self.holds)


def transformation(plan: Plan, wanted: Callable[[Pair], bool], rule: Change) -> optax.GradientTransformationExtraArgs:
    """A stateless transformation of the factors of an adapter, wherever they stand.

    `rule(pairs, updates, params, frozen factors)` gives the new updates, by place; others stay. An `Adapted` speaks
    for its own plan and frozen factors; for a trainable half it is `plan`, and what came as the extra argument
    `frozen`.
    """
    ours = tuple(filter(wanted, _pairs.pairs(plan)))
    halves = Halves(plan)
    groups, is_half = halves.groups, halves.holds

    def update(
        updates: PyTree, state: PyTree, params: PyTree = None, *, frozen: PyTree = None, **extra: PyTree
    ) -> PyTree:
        if not any(map(is_half, jax.tree.leaves(updates, is_leaf=is_half))):
            some = ", ".join(map(repr, sorted(groups)[:3]))
            raise ValueError(f"these updates hold no adapter with the groups {some}, ...: is it another adapter's?")

        def visit(u: PyTree, p: PyTree = None) -> PyTree:
            if not is_half(u):
                return u
            own, inside = plan, u
            given = {} if frozen is None else places(frozen.factors)
            known = {} if p is None else places(p.trainable if is_adapted(p) else p)
            if is_adapted(u):
                own, inside = (
                    getattr(u.frozen, "plan", plan),
                    u.trainable,
                )  # a mask of optax may stand for the whole half
                given = _own_factors(p) or given
            pairs = ours if own is plan else tuple(filter(wanted, _pairs.pairs(own)))
            new = _put(inside, rule(pairs, places(inside), known, given))
            return Adapted(new, u.frozen) if is_adapted(u) else new

        rest = () if params is None else (params,)
        return jax.tree.map(visit, updates, *rest, is_leaf=is_half), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _own_factors(adapted: PyTree) -> Places:
    """The frozen factors of the parameters, where they are not masked out."""
    return places(getattr(adapted.frozen, "factors", {})) if is_adapted(adapted) else {}
