"""DoRA: W = m (W0 + dW) / ||W0 + dW||, the norm taken over each output's column.

Liu et al, `DoRA: Weight-Decomposed Low-Rank Adaptation <https://arxiv.org/abs/2402.09353>`_, 2024.
"""

import dataclasses
from collections.abc import Iterator
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from jlora._algebra import _recipe, _words
from jlora._algebra._contract import contract
from jlora._algebra._mesh import automatic
from jlora._algebra._recipe import Bound, Recipe
from jlora._algebra._unmade import KEPT
from jlora._algebra._words import Array, Delta, Function, Labels, constant
from jlora._dtypes import alike
from jlora._trees._leaf import Leaf
from jlora._types import W0, Keys, Place
from jlora.methods.base import Method, inherit, of_the_weight
from jlora.methods.sum import apart, renamed

# The operands of a delta, its scale among them; their labels; and its equation.
Valued: TypeAlias = tuple[list[jax.Array], list[Labels], Bound]


@dataclasses.dataclass(frozen=True)
class Gain:
    """1 + t (m / ||W0 + dW|| - 1), the norm from ||W0||^2 + 2 <W0, dW> + ||dW||^2 without forming W0 + dW.

    float32 cancels where the result is far below ||W0||: below a tenth, the norm is taken of the sum itself. The
    norm is a constant of the gradient, as in the paper.
    """

    leaf: Leaf  # of one layer of a stack
    deltas: tuple[Delta, ...]

    def __call__(self, *arrays: jax.Array) -> jax.Array:
        if all(atoms == made for d in self.deltas for atoms, made in _recipe.bind(d, self.leaf).blocks):
            return self._gain(*arrays)
        # of a side that is flat no array says how a mesh cuts its parts; the gain lives where m does
        *rest, m, t, w0 = arrays
        return automatic(lambda m, *others: self._gain(*others[:-2], m, *others[-2:]), (m, *rest, t, w0))

    def _gain(self, *arrays: jax.Array) -> jax.Array:
        *factors, n0, m, t, w0 = arrays
        w0 = w0.astype(jnp.float32)
        out = tuple(_recipe.atoms(self.leaf)[n] for n in self.leaf.axes("o"))
        terms = list(self._terms([a.astype(jnp.float32) for a in factors]))
        square = n0 + sum(2 * self._over(term, out, w0=w0) for term in terms)
        square = square + sum(self._over(x, out, other=y) for x in terms for y in terms)
        values, tree = jax.tree.flatten([made for made, *_ in terms])

        def exact(square: jax.Array, w0: jax.Array, n0: jax.Array, *values: jax.Array) -> jax.Array:
            here = [(made, names, bound) for made, (_, names, bound) in zip(tree.unflatten(values), terms, strict=True)]
            direct = lambda: jnp.sum((w0 + sum(map(self._dense, here))) ** 2, self.leaf.axes("ik"))
            return lax.cond(jnp.any(square < 0.01 * n0), direct, lambda: square)

        # of a batch of experts that are cut along outputs too, JAX's select wants the predicate cut as they are
        norm = checkpoint_name(jnp.sqrt(automatic(exact, lax.stop_gradient([square, w0, n0, *values]))), KEPT)
        t, m, norm = alike(t, m, norm)
        return 1 + t * (m / jnp.where(norm > 0, norm, 1.0) - 1)

    def _terms(self, arrays: list[jax.Array]) -> Iterator[Valued]:
        """(operands, their labels, blocks) of each delta, its scale among the operands."""
        for delta in self.deltas:
            bound = _recipe.bind(delta, self.leaf)
            values = []
            for word in delta.operands:
                own, arrays = arrays[: len(word.arrays)], arrays[len(word.arrays) :]
                values.append(word.fn(*own) if isinstance(word, Function) else own[0])
            yield [*values, arrays[0]], [*bound.labels, ()], bound
            arrays = arrays[1:]

    def _over(self, term: Valued, out: Labels, w0: jax.Array | None = None, other: Valued | None = None) -> jax.Array:
        """The sum over input axes of dW times W0, or times another dW."""
        values, names, bound = term
        made = {atom: labels for atoms, labels in bound.blocks for atom in atoms}
        result = tuple(dict.fromkeys(x for atom in out for x in made[atom]))
        if other is None:
            assert w0 is not None
            axes = _recipe.atoms(self.leaf)
            w0 = lax.transpose(w0, [axes.index(a) for a in bound.order]).reshape(bound.shape(bound.made))
            square = contract([w0, *values], [bound.made, *names], result)
        elif other[2].blocks == bound.blocks:
            mark = lambda ls: tuple(x if x in bound.made else "other " + x for x in ls)
            square = contract([*values, *other[0]], [*names, *map(mark, other[1])], result)
        else:
            square = jnp.sum(self._dense(term) * self._dense(other), self.leaf.axes("ik"))
        return square.reshape(self.leaf.sizes("o"))

    def _dense(self, term: Valued) -> jax.Array:
        values, names, bound = term
        dense = contract(values, names, bound.made).reshape(bound.shape(bound.order))
        return lax.transpose(dense, [bound.order.index(a) for a in _recipe.atoms(self.leaf)])


@dataclasses.dataclass(frozen=True)
class DoRA(Method):
    """The direction of W0 + dW under a trained magnitude m (out,): `DoRA(LoRA(rank=8))`.

    m starts at the column norms of W0, so that the start is the base; reading them takes the values of the weight.
    `target` and `exclude` are the inner method's.

    Attributes:
      inner: a method that adds to W0: LoRA, AdaLoRA, SoRA, LoHa, LoKr, KronA, VeRA, Tied-LoRA.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}}
      >>> jlora.count(jlora.adapt(params, jlora.DoRA(jlora.LoRA(rank=2))))
      (24, 48)

    References:
      Liu et al, `DoRA <https://arxiv.org/abs/2402.09353>`_, 2024.
    """

    inner: Method

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method):
            raise TypeError(f"DoRA takes a method, DoRA(LoRA(rank=8)), not {self.inner!r}")
        super().__post_init__()
        inherit(self, self.inner)

    def _inside(self, leaf: Leaf) -> tuple[Recipe | None, dict[Place, str]]:
        """The inner method's recipe, and new names for those of its factors that are named as DoRA's own."""
        inner = self.inner.recipe(leaf)
        return inner, {} if inner is None else apart([(leaf.path, name) for name in ("m", "n0", "t")], inner, leaf)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        inner, names = self._inside(leaf)
        if inner is None:
            return None
        inner = renamed(inner, names, leaf.path, self.inner.dtype)
        if not inner.additive:
            raise ValueError(
                f"DoRA({self.inner.describe()}): the inner method must add to W0, not rescale or turn it, and what it "
                "adds must not depend on W0"
            )
        if inner.gates:
            raise ValueError(
                f"DoRA({self.inner.describe()}): at each position it would be another weight, with a norm of its own"
            )
        kept = [n for n, role in enumerate(leaf.roles) if role != "s"]
        roles = "".join(leaf.roles[n] for n in kept)
        one = Leaf(leaf.path, tuple(leaf.shape[n] for n in kept), leaf.dtype, roles)
        arrays: list[Array] = []
        for delta in inner.deltas:
            arrays += [dataclasses.replace(a, shape=shape) for a, shape in _recipe.bind(delta, one).stored()]
            arrays.append(_words.scale_of(delta))
        out = leaf.sizes("o")
        n0 = Array("n0", of_the_weight, out, trained=False, dtype="float32")
        t = Array("t", constant(1.0), (), trained=False, scale=True, dtype="float32")
        gain = Function(Gain(one, inner.deltas), (*arrays, n0, Array("m", of_the_weight, out), t), base=True)
        return Recipe(inner.deltas, Delta("O -> O", (gain,)))

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        if isinstance(weight, jax.ShapeDtypeStruct):
            raise ValueError(f"DoRA on {leaf.path!r} starts from the values of the weight, and it has none")
        inner, names = self._inside(leaf)
        assert inner is not None, "without a recipe there is no site"

        def place(group: str, name: str) -> Place:
            return group, names.get((group, name), name)

        begun = self.inner.initial(leaf, inner, lambda *at: keys(*place(*at)), weight)
        arrays = {place(*at): value for at, value in begun.items()}
        w0 = jnp.asarray(weight).astype(jnp.float32)
        order = [*leaf.axes("s"), *(n for n, role in enumerate(leaf.roles) if role != "s")]
        w0 = lax.transpose(w0, order)
        n0 = jnp.sum(w0 * w0, tuple(n for n, k in enumerate(order) if leaf.roles[k] in "ik"))
        norms = {"n0": n0, "m": jnp.sqrt(n0).astype(self.dtype), "t": jnp.ones(leaf.stack, jnp.float32)}
        return arrays | {(leaf.path, name): value for name, value in norms.items()}

    def canonical(self) -> "DoRA":
        inner = dataclasses.replace(self.inner.canonical(), target=(), exclude=())
        return dataclasses.replace(self, inner=inner, target=(), exclude=())

    def describe(self) -> str:
        return f"DoRA({self.inner.describe()})"
