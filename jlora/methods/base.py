"""What a method is: a frozen dataclass of hyperparameters that says how one weight is computed."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta, constant
from jlora._trees._blocks import Blocks
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Named, Target
from jlora._types import W0, Init, Key, Keys, Place, Shape, Traced
from jlora.methods import _fields
from jlora.methods._fields import Alpha, Dtype, Rank, Rate

#: Of the factor that makes a delta exactly zero at the start.
zeros: Init = constant(0.0)


def uniform(bound: float) -> Init:
    """U(-bound, bound)."""
    return functools.partial(_uniform, bound)


def normal(std: float) -> Init:
    """N(0, std^2)."""
    return functools.partial(_normal, std)


def of_the_weight(key: Key | None, shape: Shape, dtype: DTypeLike) -> jax.Array:
    """Room for what a method's `initial` makes of the weight, whatever the key."""
    return jnp.zeros(shape, dtype)


def _uniform(bound: float, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -bound, bound)


def _normal(std: float, key: Key, shape: Shape, dtype: DTypeLike) -> jax.Array:
    # a barrier, or a compiler multiplies two constants first: what `jit` draws is then not what is drawn without
    return std * jax.lax.optimization_barrier(jax.random.normal(key, shape, dtype))


def filled(
    arrays: Mapping[Place, jax.Array], begun: Mapping[str, jax.Array], dtype: DTypeLike
) -> dict[Place, jax.Array]:
    """Initial arrays, those that have a name in `begun` with its values: a copy, in the axes of the array."""
    # copies: a trained array shares no buffer with a frozen one, nor with what the start was made from
    of = lambda name, old: jnp.array(begun[name], dtype, copy=True).reshape(old.shape) if name in begun else old
    return {(group, name): of(name, old) for (group, name), old in arrays.items()}


def check_low_rank(leaf: Leaf, rank: int) -> None:
    """Raises unless a weight has two sides, each at least `rank` wide: for what is made of so many singular vectors."""
    check_sides(leaf)
    least = min(leaf.size("ik"), leaf.size("o"))
    if rank > least:
        raise ValueError(
            f"{leaf.path!r} of shape {leaf.shape} has {least} singular vectors, and rank {rank} is above min(in, out); "
            "write a smaller rank"
        )


def check_sides(leaf: Leaf) -> None:
    """Raises unless a weight has two sides. A rank above the narrower of them is a waste, of which `adapt` warns."""
    if not leaf.axes("o") or not leaf.axes("ik"):
        raise ValueError("a low-rank update needs input and output axes; name them with axes={pattern: 'io'}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Method:
    """The contract of a method.

    A subclass adds its hyperparameters as fields and says, in `recipe`, its equation for a leaf. From that the
    library derives merging, the forward pass, counting, the table, what is saved, and how factors are sharded.

    Fields are checked against their type hints when a method is made, and spelled as these say: `jnp.bfloat16` becomes
    "bfloat16", 4 becomes 4.0 where a float is meant; a flag is no number, and a number no flag. So what is trained can
    be saved. A `__post_init__` of a subclass begins with `super().__post_init__()`.

    Attributes:
      target: which weights it adapts: a regular expression searched in the path, a callable `(path, leaf) -> bool`
        (such as those of `jlora.targets`), or a list of these, each of which must match a leaf.
      exclude: which of those it leaves alone, said in the same way.
      dtype: of its factors, whatever the base's: a floating point dtype or its name.

    Example:
      >>> import dataclasses, jax.numpy as jnp, jlora
      >>> from jlora import methods, network
      >>> @dataclasses.dataclass(frozen=True, kw_only=True)
      ... class Shift(methods.Method):
      ...     "dW = s, one number a weight."
      ...
      ...     target: str = "kernel$"
      ...
      ...     def recipe(self, leaf):
      ...         word = network.Array(
      ...             "shift",
      ...             methods.base.zeros,
      ...             shape=(1,) * (leaf.roles.count("i") + leaf.roles.count("o")),
      ...         )
      ...         spread = network.Function(lambda x: jnp.broadcast_to(x, leaf.shape), (word,))
      ...         return network.Recipe((network.Delta("I O -> I O", (spread,)),))
      >>> adapted = jlora.adapt({"kernel": jnp.ones((2, 3))}, Shift())
      >>> jlora.count(adapted)
      (1, 7)
    """

    target: Target = ""
    exclude: Target = ()
    dtype: Dtype = "float32"

    def __post_init__(self) -> None:
        _fields.settle(self, but=("target", "exclude"))

    def recipe(self, leaf: Leaf) -> Recipe | None:
        """How a weight of this shape is computed; None where the method leaves it alone (rank 0).

        Raises:
          ValueError: where the method's formula makes no sense for this shape, in words.
        """
        raise NotImplementedError(f"{type(self).__name__} says no recipe(leaf): a method is a subclass that has one")

    def initial(self, leaf: Leaf, recipe: Recipe, keys: Keys, weight: W0) -> dict[Place, jax.Array]:
        """The initial arrays, `{(group, name): array}`; `weight` is there for methods that start from its values."""
        return {
            place: array.init(keys(*place), shape, self.dtype_of(array))
            for place, (array, shape) in recipe.arrays(leaf).items()
        }

    def dtype_of(self, array: Array) -> np.dtype:
        """The dtype of a factor: its own where the recipe says one, else the method's."""
        return jnp.dtype(array.dtype or self.dtype)

    def rules(self, tree: Named, traced: Traced | None = None) -> tuple["Method", ...]:
        """What it is on a tree: itself; or several rules, where it acts on weights of several kinds at once."""
        return (self,)

    @property
    def yields(self) -> bool:
        """Whether a rule before it may take a leaf of its own, and it does without."""
        return True

    def encoded(self, leaf: Leaf, get: Callable[[Place], jax.Array]) -> tuple["Method", dict[Place, jax.Array]]:
        """Itself without a network that makes its factors only while it is trained, and all factors as that made them.

        `get((group, name))` gives those of a recipe with the network.
        """
        recipe = self.recipe(leaf)
        return self, {} if recipe is None else {place: get(place) for place in recipe.arrays(leaf)}

    def canonical(self) -> "Method":
        """The method without what is data once it is applied (alpha, the initialiser): it names the program."""
        return self

    def beside(self, leaf: Leaf) -> "Method | None":
        """What the bias of this weight gets, whether or not a target names it; None where it stays as it is.

        A method that rescales a layer's output rescales its bias with it.
        """
        inner = [getattr(self, f.name) for f in dataclasses.fields(self) if f.init]
        found = (value.beside(leaf) for value in inner if isinstance(value, Method))
        return next((method for method in found if method is not None), None)

    def placed(self, leaf: Leaf, blocks: Blocks) -> "Method":
        """The method for this weight of this tree: what it has to look up there, it then says in its fields.

        Raises:
          ValueError: where the tree does not tell, in words.
        """
        return self.inside(lambda method: method.placed(leaf, blocks))

    def elsewhere(self, leaf: Leaf, path: Callable[[str], str]) -> "Method":
        """The method for a weight that stood at `leaf` and goes to another tree, where `path` says what goes where.

        What it read off the path there, and would read otherwise here, it then has to say (`rank.unstack`).
        """
        return self.inside(lambda method: method.elsewhere(leaf, path))

    def unpaired(self) -> "Method":
        """The method of the same form that subtracts no start; itself where it subtracts none."""
        return self.inside(lambda method: method.unpaired())

    def inside(self, change: Callable[["Method"], "Method"]) -> "Method":
        """The method with others in its fields: what is said of a DoRA or a Sum is said of what stands in it."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.init}
        inner = {name: change(value) for name, value in fields.items() if isinstance(value, Method)}
        return dataclasses.replace(self, **inner) if inner else self

    @property
    def on_outputs(self) -> bool:
        """Whether it acts on what a layer makes, and leaves the layer's weights to other methods of the spec."""
        return False

    def describe(self) -> str:
        """The method's short name for tables."""
        return type(self).__name__


def inherit(method: Method, inner: Method) -> None:
    """Takes over the `target` and `exclude` of the method that stands in this one; ValueError if it says others."""
    listed = lambda target: tuple(target) if isinstance(target, list) else target
    for name in ("target", "exclude"):
        mine, theirs = listed(getattr(method, name)), listed(getattr(inner, name))
        if theirs != () and mine not in ("", (), theirs):  # a plan keeps methods without their targets
            raise ValueError(f"{type(method).__name__}({name}={mine!r}): the {name} stands on the inner method")
        object.__setattr__(method, name, theirs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Dropping(Method):
    """A method of which something is dropped in training, where there is a key (`jlora.with_dropout`).

    What is kept is divided by 1 - rate, so that the mean over keys is the method without dropout, for each of the
    three (LyCORIS does not divide where it drops ranks or modules).

    Attributes:
      dropout: the rate at which elements of the activation of this branch are dropped, in [0, 1).
      rank_dropout: the rate at which ranks are dropped, for a whole use of the weight.
      module_dropout: the rate at which a use of the weight is without this branch.
    """

    dropout: Rate = 0.0
    rank_dropout: Rate = 0.0
    module_dropout: Rate = 0.0

    def dropped(self, delta: Delta) -> Delta:
        """A network with this method's rates; its ranks are those that rank operations act on, or else the letter r."""
        letters = delta.ranks or tuple({"r"} & set(delta.equation.replace(",", " ").split()))
        if self.rank_dropout and not letters:
            raise ValueError(f"rank_dropout={self.rank_dropout:g}, and it has no rank here; write 0, or exclude it")
        ranks = tuple((x, self.rank_dropout) for x in letters if self.rank_dropout)
        return dataclasses.replace(delta, dropout=self.dropout, rank_dropout=ranks, module_dropout=self.module_dropout)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(Dropping):
    """A method of one delta with a rank r and the scale s = alpha / r.

    A subclass says its `delta` for a leaf.

    Attributes:
      rank: r; 0 leaves a weight alone.
      alpha: the numerator of s; the rank by default, so that s is 1.
    """

    rank: Rank = 8
    alpha: Alpha = None

    @property
    def scale(self) -> float:
        """s."""
        return 1.0 if self.alpha is None else self.alpha / self.rank

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        check_sides(leaf)
        return Recipe((self.dropped(self.delta(leaf)),))

    def delta(self, leaf: Leaf) -> Delta:
        """The network of a weight of this shape."""
        raise NotImplementedError

    def canonical(self) -> "LowRank":
        return dataclasses.replace(self, alpha=None)
