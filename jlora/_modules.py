"""NNX modules as they stand: what Flax asks of an `Adapted`, and what a module does to itself while it is called."""

from collections.abc import Callable, Sequence
from typing import NoReturn

import jax
from flax import nnx
from flax.nnx import graphlib

from jlora import _read
from jlora._algebra._mesh import typed
from jlora._trees import _tree
from jlora._types import Fill, PyTree, Value
from jlora.adapted import Adapted

SPLIT = """\
  graphdef, weights, rest = nnx.split(module, nnx.Param, ...)
  adapted = jlora.adapt(weights, spec)

  def forward(weights, rest, x):
      module = nnx.merge(graphdef, weights, rest, copy=True)
      return module(x), nnx.state(module, nnx.Not(nnx.Param))

  y, rest = jlora.lift(forward)(adapted, rest, x)"""


def _no_node(adapted: Adapted) -> NoReturn:
    # nnx.state(adapted, nnx.Param) would be the parameters of the frozen base: an optimizer of these moves the base
    # and trains no factor
    raise TypeError(
        "an Adapted is no NNX module: nnx.Optimizer, nnx.state and nnx.split would find the nnx.Params of its frozen "
        "base, and none of its factors. Train with optax: trainable, frozen = jlora.split(adapted), state = "
        "tx.init(trainable), and jax.grad over trainable. nnx.jit(fn)(adapted, x) works, and nnx.state(jlora.merge("
        "adapted)) or nnx.state(adapted.frozen.base) say what they take"
    )


graphlib.register_pytree_node_type(Adapted, _no_node, lambda nodes, aux: None)  # type: ignore[arg-type]


def _variables(trees: Sequence[PyTree]) -> list[tuple[str, nnx.Variable[PyTree], PyTree]]:
    """Path, variable and value of every NNX variable in freshly made trees."""
    is_variable = lambda x: isinstance(x, nnx.Variable)
    found = []
    for tree in trees:
        for steps, x in jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_variable)[0]:
            if is_variable(x):
                found.append((_tree.spelled(steps), x, x.get_raw_value()))
    return found


def watched(fn: Callable[..., Value], fill: Fill) -> tuple[Callable[..., Value], Fill, Callable[[], bool]]:
    """`fn`, `fill`, and whether the call of `fn` has set a variable of a module that `fill` put in.

    The module is a copy, made of the adapter's base, and what is set in it is lost.
    """
    held: list[tuple[str, nnx.Variable[PyTree], PyTree]] = []
    touched: list[str] = []

    def filled(trees: Sequence[PyTree]) -> tuple[tuple[PyTree, ...], dict[str, PyTree]]:
        held[:] = _variables(trees)
        return fill(trees)

    def called(*args: PyTree, **kwargs: PyTree) -> Value:
        out = fn(*args, **kwargs)
        touched[:] = [path for path, variable, value in held if variable.get_raw_value() is not value]
        return out

    return called, filled, lambda: bool(touched)


def check_stateless(fn: Callable[..., PyTree], found: list[Adapted], fill: Fill) -> None:
    """Raises where the call computes new values for variables of the module, such as counts of its generators.

    NNX's transforms set every variable of a module, most of them to what it was: a trace tells these apart.
    """
    from jlora._interpret.jaxpr import arguments

    leaves = [list(_tree.leaves(a.frozen.base)) for a in found]
    for k, a in enumerate(found):
        for s in a.frozen.plan.sites:
            leaves[k][s.index] = typed(_read.held([(s.leaf.path, leaves[k][s.index])])[0])
    flat = [(k, n) for k, each in enumerate(leaves) for n, x in enumerate(each) if hasattr(x, "dtype")]
    named: list[tuple[str, str, int | None]] = []

    def traced(*arrays: jax.Array) -> list[PyTree]:
        filled = [list(each) for each in leaves]
        place = {}
        for number, ((k, n), x) in enumerate(zip(flat, arrays, strict=True)):
            filled[k][n] = x
            place[id(x)] = number
        trees = [_tree.rebuilt(a.frozen.base, each) for a, each in zip(found, filled, strict=True)]
        before = _variables(trees)
        args, kwargs = fill(trees)
        fn(*args, **kwargs)
        after = [(path, v, old) for path, v, old in before if v.get_raw_value() is not old]
        named[:] = [(path, type(v).__name__, place.get(id(old))) for path, v, old in after]
        return [v.get_raw_value() for _, v, _ in after]

    origins = arguments(traced, *[leaves[k][n] for k, n in flat])
    lost = [f"{path!r} ({kind})" for (path, kind, own), n in zip(named, origins, strict=True) if n is None or n != own]
    if lost:
        more = f" and {len(lost) - 4} more" if len(lost) > 4 else ""
        raise ValueError(
            f"this call changes the state of the NNX module, {', '.join(lost[:4])}{more}; lift calls a copy of the "
            "module, so the change would be lost and the next call would begin where this one did, with the same "
            f"dropout masks. Split the module, and return its state:\n{SPLIT}\nor call it as in evaluation: "
            "module.eval() before adapt, or adapted.frozen.base.eval()"
        )
