"""Optimizer state in the host's memory."""

import jax
import jax.numpy as jnp
import optax

from jlora._types import PyTree
from jlora.optim._checks import number, transformation_of


def offload(tx: optax.GradientTransformation, *, size: int = 100_000) -> optax.GradientTransformationExtraArgs:
    """`tx`, its large arrays of state kept in pinned host memory: they visit the device during the update.

    The role of QLoRA's paged optimizer. That one pages on demand, by the driver; here every array of at least `size`
    numbers is copied in and out at each step, which is slower where the state would have fitted, and always frees
    the room. The numbers are those of `tx`, bit for bit. Every transformation can stand inside, also one that holds
    more than moments, and `offload` inside `jlora.masked`, in `optax.chain`, under `optax.partition`. Under `jit` the
    arrays of state that come out are on the host, where `donate_argnums` lets them take the place of those that went
    in; `jlora.shard.state_shardings` says so too. On a backend without `pinned_host` memory it changes nothing.

    When the arrays come is XLA's choice. It may fetch them early, to hide the way, and then the step's peak holds them
    all the same: on a v5e each step's arguments are smaller by their bytes, its temporary memory larger by nearly as
    much. What is sure is the room between steps, for evaluation, generation, or another adapter's turn.

    An array on the host has been placed, so what a step computes from it is placed as well. Place the trainable half
    too before the first step, with `jax.device_put(trainable, jax.memory.Space.Device)`, or the second step compiles
    again.

    Args:
      tx: an optax transformation.
      size: the least number of elements of an array that is worth the way; that of QLoRA by default.

    Returns:
      A transformation with the state of `tx`.

    Raises:
      TypeError: no optax transformation.
      ValueError: a size that is no number or negative.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((600, 400))}}, jlora.LoRA(rank=2))
      >>> tx = jlora.optim.offload(optax.adam(1e-3), size=1000)
      >>> state = tx.init(adapted.trainable)
      >>> moments = state[0].mu["query/kernel"]
      >>> moments["a"].sharding.memory_kind, moments["b"].sharding.memory_kind  # (2, 600) and (2, 400)
      ('pinned_host', 'device')

    References:
      Dettmers et al, `QLoRA: Efficient Finetuning of Quantized LLMs <https://arxiv.org/abs/2305.14314>`_, 2023.
    """
    number("offload", "size", size, "a number of elements is not negative", lambda n: n >= 0)
    inner = transformation_of("offload", tx)
    large = lambda x: jnp.size(x) >= size

    def init(params: PyTree) -> PyTree:
        # Small arrays are placed too, on the device. What a step returns is placed, and of a state that is not the step
        # would be compiled twice.
        state = inner.init(params)
        return jax.tree.map(
            lambda x: jax.device_put(x, jax.memory.Space.Host if large(x) else jax.memory.Space.Device), state
        )

    def update(updates: PyTree, state: PyTree, params: PyTree = None, **extra: PyTree) -> PyTree:
        move = lambda state, space: jax.tree.map(lambda x: jax.device_put(x, space) if large(x) else x, state)
        updates, state = inner.update(updates, move(state, jax.memory.Space.Device), params, **extra)
        return updates, move(state, jax.memory.Space.Host)

    kinds = {memory.kind for memory in jax.local_devices()[0].addressable_memories()}
    return optax.GradientTransformationExtraArgs(init, update) if "pinned_host" in kinds else inner
