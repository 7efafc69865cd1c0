"""From a spec and a tree to the plan: which weight gets which recipe, and what is wrong, all at once."""

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from jlora._algebra import _wellformed
from jlora._algebra._recipe import Recipe
from jlora._plan import _sites
from jlora._plan._sites import Plan, Site
from jlora._trees import _axes, _select, _tree
from jlora._trees._blocks import Blocks
from jlora._trees._choice import Choice, Wanted
from jlora._trees._compound import Compound
from jlora._trees._leaf import Leaf
from jlora._types import Traced
from jlora.methods.base import Method
from jlora.methods.sum import Sum


def resolve(
    tree: _tree.Named,
    spec: object,
    axes: dict[str, str] | None,
    allow_untied: bool,
    traced: Traced | None = None,
) -> tuple[Plan, list[tuple[Method, Recipe]]]:
    """Matches a spec against a tree: the plan, and for each site the method and recipe with their data as given.

    All bad leaves are reported at once.

    Raises:
      ValueError: a pattern without a match, vectors that patterns took, integer or complex leaves, ties adapted at
        one end, what a method refuses.
    """
    try:
        methods = [m for rule in _sites.rules(spec) for m in rule.rules(tree, traced)]
    except ValueError as error:
        raise ValueError(f"cannot adapt this tree:\n  {error}") from error
    choice = Choice(tree, [Wanted(m.describe(), m.target, m.exclude) for m in methods], axes, traced)
    found = Resolution(methods, choice)
    for index in range(len(tree.leaves)):
        takers = choice.takers(index)
        found.take(index, [n for n in takers if not found.methods[n].on_outputs])
        found.take_output(index, [n for n in takers if found.methods[n].on_outputs])
    found.take_biases()
    found.take_outputs()
    choice.bad += [*_vectors(found), *_ties(tree, set(found.took), allow_untied)]
    choice.check("adapt")
    took = [found.took[index] for index in sorted(found.took)]
    plan = _sites.intern(tuple(t.site for t in took), tuple(map(_sites.named, found.methods)), tuple(found.notes))
    return plan, [(t.method, t.recipe) for t in took]


@dataclasses.dataclass(frozen=True)
class Taken:
    """A leaf that a rule took: the rule's number, the method and recipe with their data, and the site in the plan."""

    rule: int
    method: Method
    recipe: Recipe
    site: Site


@dataclasses.dataclass
class Resolution:
    """A tree under the methods of a spec, leaf by leaf. What is wrong goes to its `choice`.

    Attributes:
      methods: of the spec, in its order.
      choice: which leaves each of them takes.
      took: `{index: Taken}` of the leaves that are adapted.
      notes: what the table says.
      vectors: of each method, the leaves without an input side that patterns took, and what it says of them.
      shapes: `{(group, factor): (shape, trained)}` so far: what weights share has one shape.
      outputs: `{index: rule}` of the leaves whose operation's output a rule takes.
    """

    methods: Sequence[Method]
    choice: Choice
    took: dict[int, Taken] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    vectors: dict[int, dict[int, str]] = dataclasses.field(default_factory=dict)
    shapes: dict[tuple[str, str], tuple[tuple[int, ...], bool]] = dataclasses.field(default_factory=dict)
    outputs: dict[int, int] = dataclasses.field(default_factory=dict)

    def take(self, index: int, takers: Sequence[int]) -> None:
        """Leaf `index` by the first of the rules that match it."""
        if not takers:
            return
        rule = self._first(index, takers)
        method = self.methods[rule]
        weight = self.choice.weight(index)
        if weight is None:
            return
        leaf, told = weight
        try:
            if 0 in leaf.shape:
                raise ValueError("a weight without elements cannot be adapted; exclude it")
            if told is None and _splits(method, leaf):
                self.choice.unclear.append((leaf, method.describe()))
                return
            recipe = self._recipe(method, leaf)
            if recipe is None:
                return
            if recipe.steps:
                raise ValueError(
                    "its recipe has steps on the output, which come after the layer's bias: a method of steps alone "
                    "says so, `on_outputs = True`; beside a change of the weight, or of another step, write the two "
                    "as rules of their own, [LoRA(...), Houlsby(...)]"
                )
            self._check(method, recipe, leaf)
        except ValueError as error:
            self._refused(rule, index, leaf, error)
            return
        self.took[index] = Taken(rule, method, recipe, Site(leaf, index, _sites.named(method), recipe))

    def _first(self, index: int, takers: Sequence[int]) -> int:
        """The first of several rules; the others are noted."""
        rule, *others = takers
        if others:
            names = ", ".join(self.methods[n].describe() for n in others)
            said = f"rule {rule + 1} ({self.methods[rule].describe()}) takes it before {names}"
            kept = [self.methods[n].describe() for n in others if not self.methods[n].yields]
            if kept:
                self.choice.bad.append(f"{self.choice.tree.paths[index]!r}: {said}, and {kept[0]} cannot do without it")
            self.notes.append(f"{self.choice.tree.paths[index]}: {said}")
        return rule

    def _recipe(self, method: Method, leaf: Leaf) -> Recipe | None:
        """What a method says of a leaf; that it leaves it alone is noted."""
        recipe = method.recipe(leaf)
        if recipe is None:
            self.notes.append(f"{leaf.path}: rank 0, left as it is")
        else:
            _wellformed.check_kind(recipe)
        return recipe

    def _check(self, method: Method, recipe: Recipe, leaf: Leaf) -> None:
        """Raises ValueError where equation and leaf, or factors that weights share, do not fit each other."""
        _wellformed.check(recipe, leaf)
        arrays = recipe.arrays(leaf)
        _wellformed.check_constants(arrays, method.dtype_of)
        for place, (array, full) in arrays.items():
            if self.shapes.setdefault(place, (full, array.trained)) != (full, array.trained):
                raise ValueError(
                    f"it would share the factor {place[1]!r} of {place[0]!r}, which has shape {self.shapes[place][0]} "
                    f"elsewhere and {full} here"
                )

    def _refused(self, rule: int, index: int, leaf: Leaf, error: ValueError) -> None:
        """What a method says of a leaf that it cannot take; of vectors, for `_vectors` to sum up."""
        vector = "it needs input and output axes, and a vector has one; target a matrix, or use BitFit() or Full()"
        why = vector if leaf.roles.strip("s") == "o" else error
        said = f"{self.methods[rule].describe()} on {leaf.path!r} of shape {leaf.shape} ({leaf.roles}): {why}"
        if leaf.axes("ik") or 0 in leaf.shape:
            self.choice.bad.append(said)
        else:
            self.vectors.setdefault(rule, {})[index] = said

    def take_biases(self) -> None:
        """The biases of layers whose output a method rescales, as sites of the same method."""
        index = {path: n for n, path in enumerate(self.choice.tree.paths)}
        for taken in [self.took[n] for n in sorted(self.took)]:
            layer, slash, name = taken.site.leaf.path.rpartition("/")
            path = layer + slash + BIASES.get(name, "")
            other = taken.method.beside(taken.site.leaf) if name in BIASES and path in index else None
            if other is not None:
                self._take_bias(index[path], other, taken)

    def take_output(self, index: int, takers: Sequence[int]) -> None:
        """What leaf `index` makes, by the first of the rules that match it; another may take the leaf itself."""
        if takers:
            self.outputs[index] = self._first(index, takers)

    def take_outputs(self) -> None:
        """Steps on outputs, where these are whole: at the layer's bias, or at its weight where it has none."""
        tree = self.choice.tree
        index, blocks = {path: n for n, path in enumerate(tree.paths)}, Blocks(tree)
        homes: dict[int, tuple[int, int]] = {}  # of each output, the rule that takes it and the leaf that names it

        def home(of: int) -> int:
            layer, slash, name = tree.paths[of].rpartition("/")
            return index.get(layer + slash + BIASES[name], of) if name in BIASES else of

        for of, rule in self.outputs.items():
            homes[home(of)] = min(homes.get(home(of), (rule, of)), (rule, of))
        for of, other in self.outputs.items():
            rule, first = homes[home(of)]
            if other != rule:
                said = f"rule {rule + 1} ({self.methods[rule].describe()}) takes this layer's output"
                self.notes.append(f"{tree.paths[of]}: {said} at {tree.paths[first]}, before {other + 1}")
        for at, (rule, of) in homes.items():
            try:
                self._take_output(at, of, rule, blocks)
            except ValueError as error:
                self.choice.bad.append(f"{self.methods[rule].describe()} on the output of {tree.paths[of]!r}: {error}")

    def _take_output(self, at: int, of: int, rule: int, blocks: Blocks) -> None:
        """The step of one output, with what its leaf has already."""
        weight = self.choice.weight(of)
        if weight is None:
            return
        leaf, told = weight
        method = dataclasses.replace(self.methods[rule].placed(leaf, blocks), target=(), exclude=())
        if at in self.took:
            leaf, before = self.took[at].site.leaf, self.took[at].method
            method = Sum(dataclasses.replace(before, target=(), exclude=()), method)
        elif at != of:
            leaf = self._bias(at, leaf)
        elif told is None:
            self.choice.unclear.append((leaf, method.describe()))
            return
        recipe = self._recipe(method, leaf)
        if recipe is None:
            return
        for step in recipe.steps:
            if step.of and _sites.beside(leaf.path, step.of, self.choice.tree.paths) is None:
                raise ValueError(
                    f"it sees the input of {step.of!r}, and no weight of that name stands beside it or above"
                )
        self._check(method, recipe, leaf)
        self.took[at] = Taken(rule, method, recipe, Site(leaf, at, _sites.named(method), recipe))

    def _bias(self, at: int, of: Leaf) -> Leaf:
        """The bias at `at` of a layer with the weight `of`."""
        path = self.choice.tree.paths[at]
        shape, dtype = _tree.shape_dtype(self.choice.tree.leaves[at])
        said = _axes.users_letters(path, shape, self.choice.axes) or self.choice.traced.get(path)
        roles = said or _axes.added(of, shape)
        if roles is None or not _axes.is_trainable_dtype(dtype):
            raise ValueError(f"{path!r} of shape {shape} is no bias of {of.path!r} of shape {of.shape} ({of.roles})")
        return Leaf(path, shape, np.dtype(dtype), roles)

    def _take_bias(self, at: int, method: Method, weight: Taken) -> None:
        """The bias at `at` by the method that its weight's one says."""
        tree, rule, name = self.choice.tree, weight.rule, weight.method.describe()
        path = tree.paths[at]
        if self.methods[rule].exclude and _select.taken(self.methods[rule].exclude, tree)[at]:
            return
        if at in self.took and self.took[at].rule != rule:
            self.notes.append(f"{path}: rule {self.took[at].rule + 1} takes it, so {name} does not rescale it")
            return
        try:
            leaf = self._bias(at, weight.site.leaf)
        except ValueError as error:
            advice = 'rescales the output, bias included; write exclude="bias$" to leave it as it is'
            self.choice.bad.append(f"{error}, and {name} {advice}")
            return
        recipe = method.recipe(leaf)
        assert recipe is not None
        self.took[at] = Taken(rule, method, recipe, Site(leaf, at, _sites.named(method), recipe))


BIASES = {"kernel": "bias", "weight": "bias", "scale": "bias", "w": "b"}  # what is added to a weight's output


def _splits(method: Method, leaf: Leaf) -> bool:
    """Whether a method asks which axes are input and which output; one that cannot be asked does."""
    sides = leaf.roles if {"i", "o"} <= set(leaf.roles) else "i" + "o" * (len(leaf.shape) - 1)
    one = dataclasses.replace(leaf, roles=sides)
    try:
        recipe = method.recipe(one)
    except ValueError:
        return True
    return isinstance(recipe, Recipe) and recipe.splits(one)


def _vectors(found: Resolution) -> list[str]:
    """What to write where a rule's pattern took weights and, beside them, vectors."""
    bad: list[str] = []
    for n, said in found.vectors.items():
        m = found.methods[n]
        others = [index for index, it in enumerate(found.choice.takes[n]) if it and index not in said]
        if others:
            bad.append(_select.vectors(m.describe(), m.target, found.choice.tree, tuple(said), others))
        else:
            bad += said.values()
    return bad


def _ties(tree: _tree.Named, adapted: set[int], allow_untied: bool) -> list[str]:
    """One array (or NNX variable) under two paths: adapted at one end only, the two would part."""
    ends: dict[int, list[int]] = {}
    for index, (owner, leaf) in enumerate(zip(tree.owners, tree.leaves, strict=True)):
        if isinstance(leaf, (jax.Array, np.ndarray, Compound)) and leaf.ndim:
            ends.setdefault(owner, []).append(index)
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
