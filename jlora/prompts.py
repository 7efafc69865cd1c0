"""Virtual tokens around a call: ids in front of every input, what stands there off the output, encoders dropped.

    given = prompts.prepend(prompts.virtual_ids(adapted), ids, mask=mask, labels=labels)
    logits = prompts.remove(jlora.lift(model)(adapted, given.ids, given.mask), count)

Everything here is pure, and works under `jit`. A virtual token is an id behind the end of a table (`PromptTuning`,
`PTuning`, `PrefixTuning`, `NewTokens`), so a model gives it a position, lets others attend to it and keeps it in a
cache by its own rules.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from jlora._plan import _sites
from jlora._read import factors_of
from jlora.adapted import Adapted


class Prompted(NamedTuple):
    """A batch with virtual tokens in front; what was not given is None.

    Attributes:
      ids: `(..., count + seq)`.
      mask: ones at the virtual positions.
      labels: `ignored` there, so that no loss is taken.
      positions: 0 to count - 1 there, and each other that many later.
    """

    ids: jax.Array
    mask: jax.Array | None
    labels: jax.Array | None
    positions: jax.Array | None


def virtual_ids(adapted: Adapted, table: str = "") -> range:
    """The ids behind the end of a table that an adapter gave rows: V to V + count - 1.

    Args:
      table: its path, where several tables have some.

    Raises:
      ValueError: no table has new rows, or several and none is named.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"embed": {"embedding": jnp.ones((10, 4))}}, jlora.PromptTuning(count=3))
      >>> jlora.prompts.virtual_ids(adapted)
      range(10, 13)
    """
    found = {
        site.leaf.path: range(rows.at[0], rows.at[-1] + 1)
        for site in adapted.frozen.plan.sites
        for rows in site.recipe.rows
        if rows.new(site.leaf)
    }
    if table not in found and (table or len(found) != 1):
        raise ValueError(
            f"virtual_ids({table!r}): the tables with new rows are {list(found)}"
            + (not table) * "; name one of them, and leave out by target= what is no table of tokens"
            if found
            else "virtual_ids: no table of this adapter has new rows, as PromptTuning and PrefixTuning give it"
        )
    return found[table] if table else next(iter(found.values()))


def prepend(
    virtual: Sequence[int],
    ids: ArrayLike,
    *,
    mask: ArrayLike | None = None,
    labels: ArrayLike | None = None,
    positions: ArrayLike | None = None,
    ignored: int = -100,
    longest: int | None = None,
    at: int = 0,
) -> Prompted:
    """A batch with virtual tokens in front of every sequence.

    Padding may stand on either side: the virtual tokens come in front of it. Where positions are given, or a model
    counts them off the mask, the first real token has position `len(virtual)`. A model that reads its answer off its
    first position, as BERT's pooler does, keeps its first token there with `at=1`; a prefix is then what it would be in
    front, but for positions. In a causal model no token before a virtual one sees it.

    Args:
      virtual: the ids, such as `virtual_ids(adapted)`.
      ids: integers `(..., seq)`.
      mask: of attention, `(..., seq)`; ones (of its dtype) are put where the virtual tokens are.
      labels: `(..., seq)` of a model that makes one output a position; `ignored` is put there. Labels of another
        sequence (a decoder's) are not to be given.
      positions: integers that broadcast with `ids`.
      ignored: the label that a loss leaves out.
      longest: how many positions the model has; a longer result is an error here, where a table of positions would
        give what is not a number, or its last row.
      at: how many tokens stay in front of the virtual ones, and keep their positions.

    Returns:
      A `Prompted`.

    Raises:
      ValueError: ids without an axis or that are no integers; other arrays of another length; more than `longest`;
        fewer tokens than `at`.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> given = jlora.prompts.prepend(range(10, 12), jnp.array([[4, 5, 0]]), mask=jnp.array([[1, 1, 0]]))
      >>> given.ids, given.mask
      (Array([[10, 11,  4,  5,  0]], dtype=int32), Array([[1, 1, 1, 1, 0]], dtype=int32))
    """
    tokens, count = jnp.asarray(ids), len(virtual)
    if tokens.ndim == 0 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"prepend takes ids as integers (..., seq), not {tokens.dtype} of shape {tokens.shape}")
    length = tokens.shape[-1]
    if not 0 <= at <= length:
        raise ValueError(f"prepend(at={at}): there is no such position in ids of shape {tokens.shape}")
    if longest is not None and count + length > longest:
        raise ValueError(
            f"{count} virtual tokens and {length} others are more than the {longest} positions of the model"
        )

    def around(name: str, given: ArrayLike | None, own: ArrayLike) -> jax.Array | None:
        if given is None:
            return None
        array = jnp.asarray(given)
        if array.ndim == 0 or array.shape[-1] != length:
            raise ValueError(
                f"prepend({name}=...) of shape {array.shape}: its last axis is the {length} positions of ids"
            )
        own = np.broadcast_to(np.asarray(own, np.int64), (count,))
        held = jnp.iinfo(array.dtype) if jnp.issubdtype(array.dtype, jnp.integer) else None
        if odd := [int(x) for x in own if held is not None and not held.min <= x <= held.max]:
            raise ValueError(f"{name} of dtype {array.dtype} cannot hold {odd[0]}; cast them to int32")
        among = jnp.broadcast_to(jnp.asarray(own, array.dtype), (*array.shape[:-1], count))
        return jnp.concatenate([array[..., :at], among, array[..., at:]], -1)

    first = np.asarray(virtual, np.int64)
    if count and first.min() < 0:
        raise ValueError(f"prepend takes virtual ids as `virtual_ids` gives them, not {int(first.min())}")
    made = around("ids", tokens, first)
    assert made is not None
    places = None if positions is None else around("positions", positions, np.arange(at, at + count))
    if places is not None:
        if jnp.issubdtype(places.dtype, jnp.integer) and jnp.iinfo(places.dtype).bits < 32:
            raise ValueError(f"positions of dtype {places.dtype} may not hold {count} more; cast them to int32")
        places = places.at[..., at + count :].add(count)
    return Prompted(made, around("mask", mask, 1), around("labels", labels, ignored), places)


def remove(outputs: jax.Array, count: int, axis: int = 1, at: int = 0) -> jax.Array:
    """An output, or generated ids, without the virtual positions in front.

    Args:
      outputs: with an axis of positions.
      count: how many are virtual, `len(virtual_ids(adapted))`.
      axis: that of positions.
      at: how many positions stand in front of them, as `prepend` was told.

    Raises:
      ValueError: fewer positions than that.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.prompts.remove(jnp.ones((2, 7, 5)), 3).shape
      (2, 4, 5)
    """
    if not -outputs.ndim <= axis < outputs.ndim or at < 0 or outputs.shape[axis] < at + count:
        behind = f" behind the first {at}" if at else " in front"
        raise ValueError(f"remove: no {count} positions stand{behind} on axis {axis} of shape {outputs.shape}")
    kept = lambda first, end: jax.lax.slice_in_dim(outputs, first, end, axis=axis)
    rest = kept(at + count, outputs.shape[axis])
    return jnp.concatenate([kept(0, at), rest], axis) if at else rest


def insert(tokens: jax.Array, prompts: jax.Array, at: int = 1) -> jax.Array:
    """Embedded tokens with prompts among them: shallow visual prompts, behind the class token.

    For models whose inputs are no ids. `prompts` is a leaf of the parameters, `{**params, "prompts": ...}`, trained by
    `Full(target="^prompts$")`; the function that is lifted embeds, inserts, and goes on.

    Args:
      tokens: `(..., seq, features)`.
      prompts: `(count, features)`.
      at: the position of the first of them.

    Raises:
      ValueError: other features, or no such position.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> jlora.prompts.insert(jnp.ones((2, 5, 4)), jnp.zeros((3, 4))).shape
      (2, 8, 4)

    References:
      Jia et al, `Visual Prompt Tuning <https://arxiv.org/abs/2203.12119>`_, 2022.
    """
    if tokens.ndim < 2 or prompts.ndim != 2 or tokens.shape[-1] != prompts.shape[-1]:
        raise ValueError(f"insert: prompts of shape {prompts.shape} among tokens of shape {tokens.shape}")
    if not 0 <= at <= tokens.shape[-2]:
        raise ValueError(f"insert: there is no position {at} among tokens of shape {tokens.shape}")
    among = jnp.broadcast_to(prompts.astype(tokens.dtype), (*tokens.shape[:-2], *prompts.shape))
    return jnp.concatenate([tokens[..., :at, :], among, tokens[..., at:, :]], -2)


def encoded(adapted: Adapted) -> Adapted:
    """The same adapter without the networks that made its prompts: they are stored as they are.

    For `PTuning` and for `PrefixTuning(encoder=...)` after training. It computes the same. An optimizer's state is that
    of the network, and is to be made anew where training goes on. Without them the adapter is returned as it is.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> adapted = jlora.adapt(params, jlora.PTuning(count=2, encoder="mlp", hidden=8))
      >>> sorted(jlora.prompts.encoded(adapted).trainable["embed/embedding"])
      ['rows']
    """
    plan, get = adapted.frozen.plan, factors_of(adapted)
    sites, given = [], dict[tuple[str, str], jax.Array]()
    for site in plan.sites:
        method, arrays = site.method.encoded(site.leaf, lambda place: get(*place))
        recipe = site.recipe if method == site.method else method.recipe(site.leaf)
        assert recipe is not None
        sites.append(dataclasses.replace(site, method=_sites.named(method), recipe=recipe))
        given.update(arrays)
    new = _sites.intern(tuple(sites), tuple(dict.fromkeys(s.method for s in sites)), plan.notes)
    if new.sites == plan.sites:
        return adapted
    trainable, frozen = dict[str, dict[str, jax.Array]](), dict[str, dict[str, jax.Array]]()
    for (group, name), (_, trained) in new.shapes.items():
        (trainable if trained else frozen).setdefault(group, {})[name] = given[group, name]
    return Adapted(trainable, dataclasses.replace(adapted.frozen, factors=frozen, plan=new))
