"""The words of the algebra: arrays, functions of arrays, and the equation that makes them a change of a weight.

    W = rows put into L (gain * (W0 + sum of deltas)) R

Each delta is a network: operands whose axes carry labels, and one einsum-like equation such as `r I, r O -> I O`.
`I` stands for all input axes of the kernel, `O` for all output axes, `K` for a convolution's window where an
equation names it (else the window belongs to `I`); other letters are the method's own. A side in parentheses,
`i o, j p -> (i j) (o p)`, is one flat axis made of several letters. `L` turns the input side, `R` the output side:
`b m n -> (b m) (b n)` is a matrix in blocks, its rows and its columns. A letter in parentheses that no operand carries
repeats: `j O -> (i j) O` is one block, i times. Stack axes are never written: every operand that is not shared carries
them in front.

Everything here is static: hashable, comparable, no array in sight.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from types import UnionType
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from jlora._types import Init, Key, Shape

Labels: TypeAlias = tuple[str, ...]


def check_tuple(said: str, held: object, kind: type[object] | UnionType) -> None:
    """Raises TypeError unless a field is a tuple of words: hashable, so that equal plans are equal."""
    if not isinstance(held, tuple) or not all(isinstance(x, kind) for x in held):
        name = getattr(kind, "__name__", str(kind).replace("jlora._algebra._words.", ""))
        raise TypeError(f"{said}, a tuple of {name} each, not {held!r:.80}")


@functools.cache
def _is_dtype(name: str, trained: bool) -> bool:
    try:
        dtype = jnp.dtype(name)
    except TypeError:
        return False
    return jnp.issubdtype(dtype, jnp.floating) or not trained and not jnp.issubdtype(dtype, jnp.complexfloating)


def is_size(size: object) -> bool:
    """Whether it is a number of elements."""
    return isinstance(size, int | np.integer) and not isinstance(size, bool) and int(size) >= 0


def spoken(equation: str) -> list[str]:
    """The letters of an equation, as often as they stand in it."""
    return re.findall(r"[^\s,()>-]+", equation)


@dataclasses.dataclass(frozen=True)
class Array:
    """A stored factor, `(stack..., letters...)`: the rank first, then the kernel's own axes.

    Attributes:
      name: its key in the tree, the paper's letter in lower case.
      init: `init(key, shape, dtype)`, a `jax.nn.initializers`-like callable.
      shape: the shape without stack axes; `None` where the equation says it.
      trained: whether it is a trainable leaf or a frozen factor.
      group: `None` for the weight's own; a name for a factor that several weights share.
      stacked: whether it carries the stack axes. One that does not enters a scan as a constant.
      scale: whether `jlora.scale` multiplies it: at zero the weight is the base.
      derived: whether `init` makes it bit for bit without a key: it is then no part of a saved adapter.
      dtype: the name of its dtype where that is not the method's.
    """

    name: str
    init: Init = dataclasses.field(compare=False, repr=False)
    shape: tuple[int, ...] | None = None
    trained: bool = True
    group: str | None = None
    stacked: bool = True
    scale: bool = False
    derived: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name or "/" in self.name:
            raise TypeError(f"an Array has a name without '/', such as Array('a', init), not {self.name!r:.60}")
        if self.shape is not None and not (isinstance(self.shape, tuple) and all(map(is_size, self.shape))):
            raise TypeError(f"Array({self.name!r}, shape={self.shape!r:.60}): a tuple of whole numbers, or None")
        for flag in ("trained", "stacked", "scale", "derived"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(f"Array({self.name!r}, {flag}={getattr(self, flag)!r:.60}): True or False")
        if not callable(self.init):
            raise TypeError(
                f"Array({self.name!r}, init): init(key, shape, dtype) makes it, and {self.init!r:.60} is not called"
            )
        if self.dtype is not None and not _is_dtype(self.dtype, self.trained):
            kind = "a floating point dtype" if self.trained else "a dtype"
            raise TypeError(f"Array({self.name!r}, dtype={self.dtype!r:.60}): the name of {kind}, such as 'float32'")

    @property
    def arrays(self) -> tuple["Array", ...]:
        """What an operand is made of: of a stored factor, itself."""
        return (self,)


@dataclasses.dataclass(frozen=True)
class Function:
    """An operand that is computed from arrays (and W0 where `base`) at the point of use, before anything is sliced.

    A view of a shared array, a placement into ranges of an axis, a norm, a mask, a seed. `fn(*arrays)`, or
    `fn(*arrays, W0)`, sees arrays without their stack axes; it must be hashable, so that equal plans are equal.
    Without arrays it is a constant, such as a fixed mask or pattern of signs.
    """

    fn: Callable[..., jax.Array]
    arrays: tuple[Array, ...]
    base: bool = False

    def __post_init__(self) -> None:
        check_tuple("a Function has arrays", self.arrays, Array)
        if not callable(self.fn):
            raise TypeError(f"a Function has a function first, fn(*arrays), not {self.fn!r:.60}")


@dataclasses.dataclass(frozen=True)
class Difference(Function):
    """A function of a trained factor x and of x0, frozen, where it started: `arrays` are these two, rank first.

    What it takes part in is a difference from the start, to which a rank adds nothing as long as its rows are those of
    x0. So rank operations act on the rows of x, and switch one off by putting those of x0 in their place.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if [a.trained for a in self.arrays] != [True, False]:
            held = ", ".join(f"{a.name} {'trained' if a.trained else 'frozen'}" for a in self.arrays)
            raise TypeError(f"a Difference has two arrays, one trained and where it started, frozen, not ({held})")


@dataclasses.dataclass(frozen=True)
class Base:
    """The frozen weight itself as an operand, in its own axes."""

    @property
    def arrays(self) -> tuple[Array, ...]:
        """None: nothing is stored for it."""
        return ()


@dataclasses.dataclass(frozen=True)
class Gate:
    """A factor of a delta that the caller gives with each call, and that differs from position to position.

    Its value is an array `(positions..., letters...)`: its leading axes are the leading free axes of the activation
    that the weight meets, such as batch and sequence, and its own letters, in the order of the equation, come last. It
    has no stack axes: one gate is that of all layers. Nothing is stored for it; `jlora.with_gates` takes its value.

    Attributes:
      name: what `with_gates` calls it; deltas whose gates have one name share its value.
    """

    name: str

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"a gate has a name, Gate('active'), not {self.name!r:.60}")

    @property
    def arrays(self) -> tuple[Array, ...]:
        """None: its value is no part of an adapter."""
        return ()


Word: TypeAlias = "Array | Function | Base | Gate"


@dataclasses.dataclass(frozen=True)
class Step:
    """A function of what an operation makes, with arrays of its own: y becomes `fn(y, *arrays)`.

    The operation is the one that the weight takes part in: a dot, a convolution, a lookup; or, of a bias, the sum that
    it is part of, so that a layer's output has its bias already. `fn` sees y as `(..., out)`, its features on one axis
    whatever axes the model has them on, and the arrays without stack axes in y's dtype. It returns y's shape. It must
    be hashable, so that equal plans are equal. A weight with a step cannot be merged: no array does what it does.

    Attributes:
      fn: the function.
      arrays: what it reads, each with its shape.
      of: another weight, whose input x `(..., in)` the function sees too, `fn(y, x, *arrays)`: its path, from the
        nearest place above this weight that has it (`up/kernel`).
      gate: a gate g, by name: y becomes g fn(y) + (1 - g) y at each position.
      ids: whether the other weight is a table, and x, integers `(..., 1)`, the ids of its last lookup.
    """

    fn: Callable[..., jax.Array]
    arrays: tuple[Array, ...]
    of: str = ""
    gate: str = ""
    ids: bool = False

    def __post_init__(self) -> None:
        check_tuple("a Step has arrays", self.arrays, Array)


@dataclasses.dataclass(frozen=True)
class Ones:
    """The constant of letters along which a result repeats."""

    sizes: tuple[int, ...]

    def __call__(self) -> jax.Array:
        return jnp.ones(self.sizes, jnp.float32)


@dataclasses.dataclass(frozen=True)
class Delta:
    """One network.

    Where a letter with a size stands in parentheses on the right and with no operand, the result repeats along it: the
    equation gets an operand of ones, and what reads it knows no other word for that.

    Attributes:
      equation: `"r I, r O -> I O"`.
      operands: one word for each operand of the equation.
      sizes: the size of each letter.
      scale: the frozen scalar `s` that multiplies it (`alpha/r` and its kin), one a layer in a stack.
      ranks: the letters that rank operations act on.
      dropout: the rate of the activation's dropout on this branch, in [0, 1).
      rank_dropout: rates at which single values of a letter are dropped, `(("r", 0.1),)`.
      module_dropout: the rate at which all of it is dropped at once.
      s: the name of the factor that holds the scale; deltas of one scale may share it.
      dtype: of that factor, where it is not the method's.
    """

    equation: str
    operands: tuple[Word, ...]
    sizes: tuple[tuple[str, int], ...] = ()
    scale: float = dataclasses.field(default=1.0, compare=False)  # data: it lives in the factor `s`
    ranks: tuple[str, ...] = ()
    dropout: float = 0.0
    rank_dropout: tuple[tuple[str, float], ...] = ()
    module_dropout: float = 0.0
    s: str = "s"
    dtype: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.equation, str):
            raise TypeError(f"a Delta has an equation in words, 'r I, r O -> I O', not {self.equation!r:.60}")
        check_tuple(f"{self.equation!r} has operands", self.operands, Array | Function | Base | Gate)
        check_tuple(f"{self.equation!r} has sizes", self.sizes, tuple)
        check_tuple(f"{self.equation!r} has ranks", self.ranks, str)
        check_tuple(f"{self.equation!r} has rates of rank dropout", self.rank_dropout, tuple)
        pairs = [x for x in self.sizes if len(x) != 2 or not isinstance(x[0], str)]
        twice = [x for x, _ in self.sizes if sum(x == y for y, _ in self.sizes) > 1] if not pairs else []
        if pairs or twice or {x for x, _ in self.sizes} & set("IOK"):
            raise ValueError(
                f"{self.equation!r} has sizes {self.sizes!r:.80}: pairs of a letter of its own, each once, and a number"
            )
        if not _is_number(self.scale):
            raise ValueError(f"{self.equation!r} has the scale {self.scale!r:.40}, which is no number")
        if rates := [rate for rate in self.rates if not _is_number(rate) or not 0 <= rate < 1]:
            raise ValueError(f"{self.equation!r} has a rate of dropout {rates[0]!r:.40}, which is not in [0, 1)")
        left, arrow, right = self.equation.partition("->")
        held, sized = left.replace(",", " ").split(), dict(self.sizes)
        inside = dict.fromkeys(x for group in re.findall(r"\(([^)]*)\)", right) for x in group.split())
        repeated = [x for x in inside if x in sized and x not in held]
        if repeated:
            ones = tuple(Function(Ones((sized[x],)), ()) for x in repeated)
            object.__setattr__(self, "equation", ", ".join([left.rstrip(), *repeated]) + f" {arrow}{right}")
            object.__setattr__(self, "operands", (*self.operands, *ones))

    @property
    def gates(self) -> tuple[tuple[str, Shape], ...]:
        """Each of its gates, and the sizes of that one's own letters."""
        held = self.equation.partition("->")[0].split(",")
        sizes = lambda letters: tuple(dict(self.sizes)[x] for x in letters.split())
        pairs = zip(self.operands, held, strict=True)
        return tuple((w.name, sizes(letters)) for w, letters in pairs if isinstance(w, Gate))

    @property
    def rates(self) -> tuple[float, ...]:
        """Every rate of dropout."""
        return (self.dropout, self.module_dropout, *(rate for _, rate in self.rank_dropout))


def _is_number(x: object) -> bool:
    try:
        return not isinstance(x, str | bytes) and math.isfinite(float(x))  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return False


def constant(value: float) -> Init:
    """An initialiser that fills."""
    return functools.partial(_constant, value)


def _constant(value: float, key: Key | None, shape: Shape, dtype: DTypeLike) -> jax.Array:
    return jnp.full(shape, value, dtype)


def begins(array: Array) -> float | None:
    """The number that a factor is filled with at the start; None where it is another start."""
    init = array.init
    return init.args[0] if isinstance(init, functools.partial) and init.func is _constant else None


def scale_of(delta: Delta) -> Array:
    """The scalar factor of a delta: data and not metadata, so that alphas share one compiled program."""
    return Array(delta.s, constant(delta.scale), (), trained=False, scale=True, dtype=delta.dtype)
