"""Learning rates of their own for some factors."""

import jax
import optax

from jlora._plan._pairs import Member, Pair
from jlora.adapted import Adapted
from jlora.methods.base import zeros
from jlora.optim._checks import number
from jlora.optim._halves import Places, plan_with, transformation


def lora_plus(adapted: Adapted, ratio: float | jax.Array = 16.0) -> optax.GradientTransformationExtraArgs:
    """LoRA+: the learning rate of B is `ratio` times that of A.

    Stands behind the optimizer, `optax.chain(tx, lora_plus(adapted))`, and multiplies the finished update of B. That
    is what a learning rate of its own does: momentum and schedules keep their meaning, and decoupled weight decay
    grows with the rate, as in the authors' parameter groups. In front, Adam would divide the factor out again.

    A and B are the two trained factors that a rank letter joins. B is the one that starts at zero (b; in an embedding,
    whose rows are looked up, a), or where neither does the one of the output side (AdaLoRA's q). All else learns
    at the optimizer's own rate: gates, magnitudes, biases, whole leaves, and pairs of which one is frozen.

    Args:
      adapted: the `Adapted` that is trained; read for its static plan alone.
      ratio: positive; the paper finds about 16, and 1 changes nothing. May be traced.

    Returns:
      A stateless transformation, for the split form and the whole form, inside `jlora.masked` or behind it.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: a ratio that is not positive; an adapter without such a pair; updates of another adapter.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> tx = optax.chain(optax.sgd(1.0), jlora.optim.lora_plus(adapted, ratio=16))
      >>> grads = jax.tree.map(jnp.ones_like, adapted.trainable)
      >>> updates, _ = tx.update(grads, tx.init(adapted.trainable), adapted.trainable)
      >>> {name: float(u[0, 0]) for name, u in updates["query/kernel"].items()}
      {'a': -1.0, 'b': -16.0}

    References:
      Hayou et al, `LoRA+: Efficient Low Rank Adaptation of Large Models <https://arxiv.org/abs/2402.12354>`_, 2024.
    """
    both = lambda pair: pair.trained == 2
    plan = plan_with("lora_plus", adapted, both, "two trained factors that share a rank")
    number("lora_plus", "ratio", ratio, "a ratio is positive; 1 changes nothing", lambda x: 0 < x < float("inf"))

    def rule(pairs: tuple[Pair, ...], updates: Places, params: Places, frozen: Places) -> Places:
        fast = {_fast(pair).place for pair in pairs} & updates.keys()
        return {place: (updates[place] * ratio).astype(updates[place].dtype) for place in fast}

    return transformation(plan, both, rule)


def _fast(pair: Pair) -> Member:
    return pair.input if pair.input.array.init is zeros and pair.input.start is None else pair.output
