"""AdaLoRA's budget: how many ranks there are at each step."""

import bisect
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Budget:
    """b(t) from b0 down to bT along a cubic, with T = total_steps, t_i = init_warmup, t_f = final_warmup.

        b(t) = b0                                                           t <= t_i
        b(t) = floor(bT + (b0 - bT) (1 - (t - t_i) / (T - t_f - t_i))^3)    in between
        b(t) = bT                                                           t >= T - t_f

    Steps count from 1. Masks are made anew where t is a multiple of `interval` in between, and at T - t_f, where the
    budget is reached; from then on they are fixed.

    Attributes:
      initial: b0, all ranks of all weights and layers.
      target: bT.
      total_steps: T.
      init_warmup: t_i.
      final_warmup: t_f.
      interval: between two masks.

    Example:
      >>> import jlora
      >>> budget = jlora.rank.Budget(864, 576, total_steps=3000, init_warmup=500, final_warmup=1500, interval=10)
      >>> [budget.at(t) for t in (500, 501, 750, 1000, 1499, 1500)]
      [864, 863, 697, 612, 576, 576]

    References:
      Zhang et al, `AdaLoRA <https://arxiv.org/abs/2303.10512>`_, 2023.
    """

    initial: int
    target: int
    total_steps: int
    init_warmup: int
    final_warmup: int
    interval: int

    def __post_init__(self) -> None:
        for name in ("total_steps", "init_warmup", "final_warmup", "interval"):
            number = getattr(self, name)
            if not isinstance(number, (int, np.integer)) or isinstance(number, bool):
                raise ValueError(f"{name}={number!r}: steps are counted in whole numbers")
        if not 1 <= self.target <= self.initial:
            raise ValueError(
                f"a budget of {self.target} ranks cannot be reached from the {self.initial} that the adapted weights "
                f"have in all: write a target from 1 to {self.initial}, or adapt with a larger rank"
            )
        if self.init_warmup < 0 or self.final_warmup < 0 or self.total_steps <= self.init_warmup + self.final_warmup:
            raise ValueError(
                f"the schedule does not fit: of total_steps={self.total_steps} nothing is left between "
                f"init_warmup={self.init_warmup} and final_warmup={self.final_warmup}"
            )
        if self.interval < 1:
            raise ValueError(f"interval={self.interval}: masks are made every 1, 2, ... steps")

    @property
    def last(self) -> int:
        """T - t_f, the step of the last mask."""
        return self.total_steps - self.final_warmup

    def at(self, step: int) -> int:
        """b(t), in Python's floats as the authors compute it."""
        if step <= self.init_warmup:
            return self.initial
        if step >= self.last:
            return self.target
        left = 1 - (step - self.init_warmup) / (self.last - self.init_warmup)
        return int(self.target + (self.initial - self.target) * left**3)

    def masks(self, step: int | jax.Array) -> bool | jax.Array:
        """Whether a mask is made at a step; traced too."""
        between = (step > self.init_warmup) & (step < self.last) & (step % self.interval == 0)
        return between | (step == self.last)

    def traced(self, step: jax.Array) -> jax.Array:
        """b(t) of a traced step: a count of the levels that it has not left, so that no float32 rounds a budget."""
        levels = range(self.target + 1, self.initial + 1)
        steps = range(self.last + 1)
        # the budget never rises, so the steps of at least this level are the first ones
        ends = [bisect.bisect_right(steps, -level, key=lambda t: -self.at(t)) - 1 for level in levels]
        return self.target + jnp.sum(step <= np.asarray(ends, np.int32), dtype=jnp.int32)
