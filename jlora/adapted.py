"""An adapter and its base, as one pytree: made by `adapt`, taken apart by `split`, put together by `join`."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias

import jax

from jlora import _answers
from jlora._algebra import _wellformed
from jlora._keys import checked_key, stable_hash
from jlora._plan import _fits, _pairs, _resolve, _sites
from jlora._plan._sites import Plan, Spec, dropouts, trainable_size
from jlora._plan._sites import derived as derived
from jlora._trees import _axes, _compound, _kinds, _table, _tree
from jlora._types import Key, PyTree, Traced

if TYPE_CHECKING:
    from typing_extensions import TypeIs

Children: TypeAlias = tuple[tuple[object, PyTree], ...]  # the name of each child, as JAX writes it


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Frozen:
    """What no optimizer touches.

    Attributes:
      base: the user's tree, untouched and not copied.
      factors: frozen factors and scales, `{group: {factor: array}}`.
      key: a dropout key, or None.
      plan: which weight gets which recipe; static.
      gates: the values of gates, `{name: array}`: no part of what is saved, and no child of the tree where empty.
    """

    base: PyTree
    factors: PyTree
    key: PyTree
    plan: Plan
    gates: PyTree = dataclasses.field(default_factory=dict)

    def _children(self) -> tuple[str, ...]:
        empty = isinstance(self.gates, Mapping) and not self.gates
        return ("base", "factors", "key", *([] if empty else ["gates"]))

    def tree_flatten_with_keys(self) -> tuple[Children, Plan]:
        return tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in self._children()), self.plan

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], Plan]:
        return tuple(getattr(self, n) for n in self._children()), self.plan

    @classmethod
    def tree_unflatten(cls, plan: Plan, children: tuple[PyTree, ...]) -> "Frozen":
        base, factors, key, *gates = children
        return cls(base, factors, key, plan, *gates)

    def __repr__(self) -> str:
        return f"Frozen({len(self.plan.sites)} adapted weights)"


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True)
class Adapted(_answers.Mistaken):
    """A base and its adapter. A registered pytree with two children.

    Attributes:
      trainable: `{group: {factor: array}}`; a group is a weight's path, or a name for factors that weights share.
      frozen: `Frozen`: the base, frozen factors, and the static plan.

    `print(adapted)` shows a table. A lifted function takes an `Adapted` wherever a parameter tree stood.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> adapted
      Adapted(1 weight, 20 trainable)
    """

    trainable: PyTree
    frozen: PyTree

    def tree_flatten_with_keys(self) -> tuple[Children, None]:
        names = ("trainable", "frozen")
        return tuple((jax.tree_util.GetAttrKey(n), getattr(self, n)) for n in names), None

    def tree_flatten(self) -> tuple[tuple[PyTree, ...], None]:
        return (self.trainable, self.frozen), None

    @classmethod
    def tree_unflatten(cls, _: None, children: tuple[PyTree, ...]) -> "Adapted":
        return cls(*children)

    def __contains__(self, name: object) -> bool:
        """Whether a group is trained; Flax's TrainState asks for a name of its own."""
        return isinstance(self.trainable, Mapping) and name in self.trainable

    def __repr__(self) -> str:
        if not isinstance(self.frozen, Frozen):
            return "Adapted(a prefix or a mask)"
        n = len(self.frozen.plan.sites)
        return f"Adapted({n} weight{'s' * (n != 1)}, {trainable_size(self.frozen.plan):,} trainable)"

    def __str__(self) -> str:
        return table(self) if isinstance(self.frozen, Frozen) else repr(self)


def is_adapted(x: object) -> "TypeIs[Adapted]":
    """Whether `x` is an `Adapted`."""
    return isinstance(x, Adapted)


def check_adapted(caller: str, x: object) -> Adapted:
    """`x`; TypeError, in words, unless it is an `Adapted` with a plan; ValueError if it is a stack of several."""
    adapted = check_any(caller, x)
    _fits.check_one(caller, adapted.frozen.plan, adapted.trainable, adapted.frozen.factors)
    return adapted


def check_any(caller: str, x: object) -> Adapted:
    """`x`, one adapter or a stack of several; TypeError, in words, if it is neither."""
    if isinstance(x, Adapted) and isinstance(x.frozen, Frozen):
        return x
    raise TypeError(_answers.no_adapter(caller, x, is_adapted, lambda x: isinstance(x, Frozen)))


# --- making one ---------------------------------------------------------------------------------------------------


def adapt(
    params: PyTree,
    spec: Spec,
    *,
    key: Key | None = None,
    axes: dict[str, str] | None = None,
    fn: Callable[..., PyTree] | None = None,
    args: Sequence[PyTree] = (),
    kwargs: Mapping[str, PyTree] | None = None,
    allow_untied: bool = False,
) -> Adapted:
    """Freezes a parameter tree and hangs trainable factors beside the weights that a spec names.

    Args:
      params: any pytree of arrays: a Linen `params` dictionary, an NNX module or state, `ShapeDtypeStruct`s. It is
        neither copied nor changed. Values are read only by initialisers that start from them.
      spec: a method, or a sequence of methods; the first whose `target` matches a leaf takes it.
      key: a PRNG key, `jax.random.key(0)` by default. A factor's initial value depends on the key and on the path
        of its weight alone, so adding a target changes no other.
      axes: `{pattern: letters}` with one letter an axis, i (in), o (out), k (window) or s (stack). The first that
        decides tells a weight's axes: this, what its leaf says itself (a quantised layout, logical axis names of a
        Flax box or an NNX variable), a trace of `fn`, and conventions that the sizes of the tree leave no doubt of.
      fn: a function that uses the parameters, traced to see what it does with each axis; nothing is computed. It is
        called `fn(params, *args, **kwargs)`, or without `params` in front where that very object stands in `args` or
        `kwargs`. Linen's `model.apply` takes `params` as it is, or `args=({"params": params}, x)`.
      args, kwargs: its other arguments; `ShapeDtypeStruct`s will do.
      allow_untied: adapt one end of an array that stands under two paths.

    Returns:
      An `Adapted`.

    Raises:
      ValueError: weights whose axes nothing tells, for methods to which it matters (with the lines that would); a
        pattern that matches nothing, integer or complex leaves, ties, all at once; a call of `fn` that fails.
      TypeError: a key or a spec of the wrong kind, dictionary keys that cannot be sorted, quantised leaves that were
        cast.

    Warns:
      UserWarning: a rank above min(in, out).

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((6, 4))}, "head": {"kernel": jnp.ones((4, 2))}}
      >>> adapted = jlora.adapt(params, [jlora.LoRA(rank=2), jlora.Full(target="head/")])
      >>> jlora.count(adapted)
      (28, 60)
      >>> params, x = {"q": jnp.ones((2, 6, 4))}, jnp.ones((3, 6))
      >>> f = lambda params, x: jnp.einsum("td,ndh->tnh", x, params["q"])
      >>> jlora.adapt(params, jlora.LoRA(rank=2, target="q"), fn=f, args=(x,)).trainable["q"]["b"].shape
      (2, 2, 4)

    References:
      Hu et al, `LoRA <https://arxiv.org/abs/2106.09685>`_, 2021.
    """
    traced = None if is_adapted(params) else letters_of_call("adapt", fn, params, args, kwargs)
    adapted = begun(params, spec, key, axes, allow_untied, traced)
    if waste := _pairs.wasted(adapted.frozen.plan):
        warnings.warn(waste, stacklevel=2)
    return adapted


def begun(
    params: PyTree,
    spec: object,
    key: Key | None = None,
    axes: dict[str, str] | None = None,
    allow_untied: bool = False,
    traced: Traced | None = None,
) -> Adapted:
    """`adapt` without its advice, for what a file says."""
    key = checked_key(key)
    if is_adapted(params):
        raise TypeError("params is already an Adapted; adapt(adapted.frozen.base, [method, ...]) takes several methods")
    _answers.check_params("adapt", params)
    tree = _tree.flatten(params)
    plan, given = _resolve.resolve(tree, spec, axes, allow_untied, traced)
    trainable: dict[str, dict[str, jax.Array]] = {}
    factors: dict[str, dict[str, jax.Array]] = {}
    named = lambda group, name: jax.random.fold_in(jax.random.fold_in(key, stable_hash(group)), stable_hash(name))
    bad = []
    for site, (method, recipe) in zip(plan.sites, given, strict=True):
        arrays, weight = recipe.arrays(site.leaf), tree.leaves[site.index]
        try:
            if why := _answers.gone(site.leaf.path, weight):
                raise ValueError(why)
            made = method.initial(site.leaf, recipe, named, _compound.dense(weight))
            _wellformed.check_start(method.describe(), site.leaf, recipe, arrays, made)
        except ValueError as error:
            bad.append(str(error))
            continue
        except Exception as error:  # whatever an author's start raises
            error.add_note(f"raised by the start of {method.describe()} on {site.leaf.path!r} of {site.leaf.shape}")
            raise
        for (group, name), value in made.items():
            side = trainable if arrays[group, name][0].trained else factors
            side.setdefault(group, {}).setdefault(name, value)
    if bad:
        more = f"\n  and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError("cannot adapt this tree:\n  " + "\n  ".join(bad[:8]) + more)
    return Adapted(trainable, Frozen(params, factors, None, plan))


def letters_of_call(
    caller: str,
    fn: Callable[..., PyTree] | None,
    params: PyTree,
    args: Sequence[PyTree],
    kwargs: Mapping[str, PyTree] | None,
) -> Traced | None:
    """What a trace of `fn` says of the weights, `{path: (use, letters)}`; None where no function is given."""
    if fn is None and not args and not kwargs:
        return None
    from jlora._interpret import trace  # late: it stands above

    return trace.given(caller, fn, params, args, kwargs or {})


# --- taking it apart ----------------------------------------------------------------------------------------------


def split(adapted: Adapted) -> tuple[PyTree, Frozen]:
    """`(adapted.trainable, adapted.frozen)`: gradients are taken over the first alone.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> trainable, frozen = jlora.split(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2)))
      >>> sorted(trainable)
      ['query/kernel']
    """
    return check_any("split", adapted).trainable, adapted.frozen


def join(trainable: PyTree, frozen: Frozen) -> Adapted:
    """The inverse of `split`; free inside a jitted loss.

    It sees groups, names and shapes. Halves of two adapters of one plan fit each other, and what comes out is neither
    (s, and frozen factors, are of one and the rest of the other): several go through `jax.vmap` by `jlora.stack`.

    Raises:
      TypeError: the halves in the wrong order.
      ValueError: a group or factor that is missing, extra or misshapen.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> jlora.join(*jlora.split(adapted))
      Adapted(1 weight, 20 trainable)
    """
    if not isinstance(frozen, Frozen) or isinstance(trainable, (Frozen, Adapted)):
        kinds = f"{type(trainable).__name__}, {type(frozen).__name__}"
        raise TypeError(f"join takes (trainable, frozen) as split returned them, not ({kinds})")
    _fits.check_trainable(trainable, frozen.plan)
    return Adapted(trainable, frozen)


def with_dropout(adapted: Adapted, key: Key | None) -> Adapted:
    """The same adapter with a key for the dropout of its branches; without one there is none.

    Called inside the loss, with a key that differs from step to step, and not called in evaluation. A draw depends on
    the key, the weight's path, its layer and the number of the use in the order of the program: not on `jit`,
    `remat`, or how a loop is unrolled. `save`, `merge` and `lift(dense=True)` ignore the key.

    Args:
      adapted: an adapter whose methods have a dropout.
      key: one PRNG key, of `jax.random.key` or of `jax.random.PRNGKey`.

    Raises:
      TypeError: no `Adapted`, no key, or several.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2, dropout=0.1))
      >>> jlora.with_dropout(adapted, jax.random.key(1))
      Adapted(1 weight, 20 trainable)
    """
    check_any("with_dropout", adapted)
    if key is None:
        raise TypeError(
            "with_dropout takes a key, such as jax.random.key(0), not None; without a call there is no dropout"
        )
    return Adapted(adapted.trainable, dataclasses.replace(adapted.frozen, key=checked_key(key)))


def without_key(adapted: Adapted) -> str:
    """What to say of dropout that is off for want of a key; nothing where there is none, or a key."""
    rates = dropouts(adapted.frozen.plan) if adapted.frozen.key is None else {}
    if not rates:
        return ""
    shown = ", ".join(f"{rate:g}" for rate in sorted(set(rates.values())))
    return f"dropout {shown} is off without a key: jlora.with_dropout(adapted, key), in the loss"


# --- looking at it ------------------------------------------------------------------------------------------------


def base_size(frozen: Frozen) -> int:
    """The number of parameters of the base."""
    return sum(math.prod(_tree.shape_dtype(leaf)[0]) for leaf in _tree.leaves(frozen.base))


def count(adapted: Adapted) -> tuple[int, int]:
    """`(trainable, total)`: the total counts the base's parameters and the trainable ones.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.count(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2)))
      (20, 44)
    """
    trainable = trainable_size(check_any("count", adapted).frozen.plan)
    return trainable, trainable + base_size(adapted.frozen)


def table(adapted: Adapted) -> str:
    """The adapter as text of at most 100 columns: path (repeated layers folded), in -> out, method, rank, trainable.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> print(jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2)))
      path          weights  in -> out  method  rank  trainable
      ------------  -------  ---------  ------  ----  ---------
      query/kernel        1  6 -> 4     LoRA    2            20
      <BLANKLINE>
      20 trainable of 44 parameters (45.4545 %)
    """
    plan = check_any("table", adapted).frozen.plan
    rows, seen = [], set()
    for site in plan.sites:
        arrays = {p: v for p, v in site.recipe.arrays(site.leaf).items() if v[0].trained and p not in seen}
        seen |= set(arrays)
        size = sum(math.prod(shape) for _, shape in arrays.values())
        rest = (_axes.text(site.leaf), site.method.describe(), _sites.describe_rank(site), size)
        rows.append((site.leaf.path, rest))
    folded = [
        (path, str(n), axes, method, rank, f"{n * size:,}") for path, n, (axes, method, rank, size) in _table.fold(rows)
    ]
    trainable, total = count(adapted)
    lines = [
        _table.render(("path", "weights", "in -> out", "method", "rank", "trainable"), folded, right=(1, 5)),
        "",
    ]
    lines.append(f"{trainable:,} trainable of {total:,} parameters ({100 * trainable / max(total, 1):.4f} %)")
    left = _kinds.left(_tree.flatten(adapted.frozen.base), {site.index for site in plan.sites}, _table.WIDTH)
    lines += [left] if left else []
    off = without_key(adapted)
    notes = _table.fold([(note, ()) for note in plan.notes] + [(off, ())] * bool(off))
    lines += [_table.shorten(f"note: {text}" + (f" (x{n})" if n > 1 else ""), _table.WIDTH) for text, n, _ in notes]
    return "\n".join(lines)


def trainable_mask(tree: PyTree) -> PyTree:
    """True on trainable leaves, False on frozen ones; depends on structure alone, so optax takes it as a mask.

    Leaves outside any `Adapted` are trainable.

    Example:
      >>> import jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> jlora.trainable_mask(adapted).trainable["query/kernel"]
      {'a': True, 'b': True}
    """

    def mask(x: PyTree) -> PyTree:
        if not is_adapted(x):
            return True
        fill = lambda half, value: jax.tree.map(lambda _: value, half)
        return Adapted(fill(x.trainable, True), fill(x.frozen, False))

    return jax.tree.map(mask, tree, is_leaf=is_adapted)
