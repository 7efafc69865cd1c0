"""A method times a gate: W = W0 + g dW, g of the position, given with each call."""

import dataclasses

import jax

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Delta, Gate
from jlora._trees._leaf import Leaf
from jlora._types import W0, Keys, Place
from jlora.methods.base import Method, check_sides, inherit
from jlora.methods.sum import renamed


@dataclasses.dataclass(frozen=True)
class Gated(Method):
    """Any method that adds to W0, switched by position: `Gated(LoRA(rank=8), "active")` computes x W0 + g (x dW).

    g is not stored. `jlora.with_gates(adapted, active=g)` gives it with each call, (batch, seq) or (batch,) for a batch
    of sequences. With `active=jlora.invoked(tokens, [...])` it is activated LoRA, of which the cache of what stands
    before the invocation is that of the base. Where each example takes one of several adapters, or a router mixes
    them, a `Sum` of methods has a gate for each. `target` and `exclude` are the inner method's.

    Attributes:
      inner: a method that adds to W0: LoRA, AdaLoRA, LoHa, LoKr, KronA, VeRA, a Sum, HiRA; or one that acts on
        outputs, y = g f(h) + (1 - g) h: Houlsby, Parallel.
      gate: what `with_gates` calls g; methods with one name share it.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params, x = {"query": {"kernel": jnp.ones((6, 4))}}, jnp.ones((2, 5, 6))
      >>> adapted = jlora.adapt(params, jlora.Gated(jlora.LoRA(rank=2, init="gaussian")))
      >>> tokens = jnp.array([[1, 2, 9, 3, 4], [9, 1, 2, 3, 4]])
      >>> adapted = jlora.with_gates(adapted, active=jlora.invoked(tokens, [9]))
      >>> jlora.lift(lambda params, x: x @ params["query"]["kernel"])(adapted, x).shape
      (2, 5, 4)

    References:
      Greenewald et al, `Activated LoRA: Fine-tuned LLMs for Intrinsics <https://arxiv.org/abs/2504.12397>`_, 2025.
    """

    inner: Method
    gate: str = "active"

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Method):
            raise TypeError(f"Gated takes a method, Gated(LoRA(rank=8), 'active'), not {self.inner!r}")
        super().__post_init__()
        if not self.gate:
            raise ValueError("Gated(gate='') has no name; write Gated(method, 'active')")
        inherit(self, self.inner)

    def recipe(self, leaf: Leaf) -> Recipe | None:
        inner = self.inner.recipe(leaf)
        if inner is None:
            return None
        others = inner.gain or inner.left or inner.right or inner.rows
        if others or self.inner.beside(leaf) is not None:
            raise ValueError(
                f"Gated({self.inner.describe()}): the inner method must add to W0, not rescale or turn it, nor "
                "put rows in: its gate multiplies what is added"
            )
        if any(step.gate for step in inner.steps):
            raise ValueError(f"Gated({self.inner.describe()}): its step has a gate already")
        if inner.deltas:
            check_sides(leaf)
        inner = renamed(inner, {}, leaf.path, self.inner.dtype)
        steps = tuple(dataclasses.replace(step, gate=self.gate) for step in inner.steps)
        return Recipe(tuple(map(self._gated, inner.deltas)), steps=steps)

    def _gated(self, delta: Delta) -> Delta:
        left, right = delta.equation.split("->")
        return dataclasses.replace(
            delta, equation=f"{left.rstrip()}, ->{right}", operands=(*delta.operands, Gate(self.gate))
        )

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        inner = self.inner.recipe(leaf)
        assert inner is not None, "without a recipe there is no site"
        return self.inner.initial(leaf, inner, keys, weight)

    @property
    def on_outputs(self) -> bool:
        return self.inner.on_outputs

    def canonical(self) -> "Gated":
        inner = dataclasses.replace(self.inner.canonical(), target=(), exclude=())
        return dataclasses.replace(self, inner=inner, target=(), exclude=())

    def describe(self) -> str:
        return f"Gated({self.inner.describe()})"
