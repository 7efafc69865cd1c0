"""One training step on a mesh."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jlora import _answers
from jlora._types import PyTree
from jlora.adapted import Adapted, Frozen, check_adapted, is_adapted, join
from jlora.optim._halves import check_masked
from jlora.shard._gather import gathered
from jlora.shard._rules import is_spec, sayable
from jlora.shard._specs import check_mesh, mesh_of, named_shardings, state_shardings

Stepped: TypeAlias = tuple[PyTree, PyTree, dict[str, jax.Array]]
"""The trainable half, the optimizer's state, and the metrics."""


def train_step(
    loss: Callable[[Adapted, PyTree], jax.Array],
    tx: optax.GradientTransformation,
    mesh: Mesh,
    adapted: Adapted,
    *,
    batch: PyTree,
    accumulate: int = 1,
    clip: float | None = None,
) -> Callable[[PyTree, PyTree, Frozen, PyTree], Stepped]:
    """A jitted `step(trainable, state, frozen, batch) -> (trainable, state, metrics)`.

    Everything stays where it is: in and out shardings are those of `adapted` and `state_shardings`. `trainable` and
    `state` are donated. `metrics` holds `"loss"` and `"grad_norm"`, the global norm before clipping. Quantised weights
    that the batch's mesh axes cut are gathered as codes (`gathered`). There is nothing in it that a loop of one's own
    could not do: copy it where it does not fit.

    Args:
      loss: `loss(adapted, batch) -> scalar`, a mean over the batch; it calls the lifted model, and `with_dropout`
        where there is dropout.
      tx: an optax transformation; it gets the frozen half as the extra argument `frozen`.
      mesh: the mesh.
      adapted: an `Adapted` on it: arrays, or what `abstract` makes.
      batch: a PartitionSpec for all arrays of a batch, or a tree of them.
      accumulate: how many microbatches a step sums over; above 1, each array of a batch has them as a leading axis,
        `(accumulate, rows, ...)`, so that no row has to move between devices.
      clip: the largest global norm of the gradient; None for any.

    Returns:
      The step.

    Raises:
      ValueError: arrays that are on no mesh, or on another; fewer microbatches than one; a clip that is no norm; a
        batch that is no spec.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("data",))
      >>> make = lambda: {"query": {"kernel": jnp.eye(4)}}
      >>> adapted = jlora.shard.init(make, jlora.LoRA(rank=2), mesh, P())
      >>> apply = jlora.lift(lambda params, x: x @ params["query"]["kernel"])
      >>> loss = lambda adapted, x: jnp.mean((apply(adapted, x) - 1) ** 2)
      >>> tx = optax.adam(1e-2)
      >>> step = jlora.shard.train_step(loss, tx, mesh, adapted, batch=P("data"))
      >>> trainable, frozen = jlora.split(adapted)
      >>> state = jax.jit(tx.init, out_shardings=jlora.shard.state_shardings(tx, adapted))(trainable)
      >>> trainable, state, metrics = step(trainable, state, frozen, jnp.ones((3, 4)))
      >>> sorted(metrics)
      ['grad_norm', 'loss']
    """
    if not callable(loss) or is_adapted(loss):
        raise TypeError(f"train_step takes loss(adapted, batch) -> scalar first, not {_answers.kind(loss)}")
    _answers.check_optimizer("train_step", tx)
    check_mesh("train_step", mesh)
    check_adapted("train_step", adapted)
    _answers.check_integer("train_step(accumulate", accumulate, 1, "at least one microbatch")
    if clip is not None:
        _answers.check_number("train_step(clip", clip, lambda x: x > 0, "a norm above 0, or None for any")
    strange = [s for s in jax.tree.leaves(batch, is_leaf=is_spec) if not is_spec(s)]
    if strange or batch is None:
        raise ValueError(f"train_step(batch={batch!r}): a PartitionSpec for all arrays of a batch, or a tree of them")
    update = optax.with_extra_args_support(tx).update

    def step(trainable: PyTree, state: PyTree, frozen: Frozen, batch: PyTree) -> Stepped:
        if (
            AxisType.Explicit in mesh.axis_types
        ):  # there a type says where its array lives; of one from the host it does not
            batch = jax.tree.map(lambda place, part: jax.sharding.reshard(part, sayable(place)), batches, batch)

        here = near(frozen)

        def gradient(rows: PyTree) -> tuple[jax.Array, PyTree]:
            value, grads = jax.value_and_grad(lambda t: loss(join(t, here), rows))(trainable)
            return value.astype(jnp.float32), grads

        if accumulate == 1:
            value, grads = gradient(batch)
        else:
            nothing = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, trainable))
            add = lambda total, rows: (jax.tree.map(jnp.add, total, gradient(rows)), None)
            total, _ = lax.scan(add, nothing, batch, length=accumulate)
            value, grads = jax.tree.map(lambda x: x / accumulate, total)
        norm = optax.global_norm(grads)
        if clip is not None:
            less = clip / jnp.maximum(norm, clip)
            grads = jax.tree.map(lambda g: g * less.astype(g.dtype), grads)
        updates, state = update(grads, state, trainable, frozen=frozen)
        return optax.apply_updates(trainable, updates), state, {"loss": value, "grad_norm": norm}

    place = lambda spec: NamedSharding(mesh, PartitionSpec(None, *spec) if accumulate > 1 else spec)
    batches = jax.tree.map(place, batch, is_leaf=is_spec)
    places, state = named_shardings(adapted), state_shardings(tx, adapted)
    if isinstance(own := mesh_of(adapted), Mesh) and own != mesh:
        raise ValueError(f"train_step: the adapter lives on {own}, not on the mesh that was given, {mesh}")
    near = lambda frozen: gathered(frozen, places.frozen, batch)
    everywhere = NamedSharding(mesh, PartitionSpec())
    compiled = jax.jit(
        step,
        in_shardings=(places.trainable, state, places.frozen, batches),
        out_shardings=(places.trainable, state, everywhere),
        donate_argnums=(0, 1),
    )

    @functools.wraps(step)
    def checked(trainable: PyTree, state: PyTree, frozen: Frozen, batch: PyTree) -> Stepped:
        try:
            return compiled(trainable, state, frozen, batch)
        except (ValueError, TypeError):  # of a state made without `masked`, JAX says only that two structures differ
            check_masked("train_step", state)
            raise

    checked.lower = compiled.lower  # type: ignore[attr-defined]
    return checked
