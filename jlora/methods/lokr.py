"""LoKr: dW = s C x (A B), a Kronecker product whose larger factor is low-rank.

Yeh et al, `Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation
<https://arxiv.org/abs/2309.14859>`_, 2023.
"""

import dataclasses
import math
from typing import Annotated

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._words import Array, Delta
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora.methods._fields import Alpha, Holds, Rank
from jlora.methods.base import Dropping, uniform, zeros
from jlora.methods.krona import factorize

_FACTOR = "a factor is an integer of at least 1, or -1 for the squarest; what LyCORIS makes of factor=0 is factor=1"
Divisor = Annotated[int, Holds(lambda n: n == -1 or n >= 1, _FACTOR)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoKr(Dropping):
    """dW = s c x (a b) with c (i, o), a (j, r), b (r, p), i j = in and o p = out; a convolution's window is a's.

    Where r is at least half of max(j, p) the second factor is whole; with `decompose_both` the first is low-rank
    too where r is below half of max(i, o). If neither is, s is 1 whatever alpha says, as LyCORIS has it (peft takes
    alpha / r there too). The last factor starts at zero.

    Attributes:
      rank: r of the low-rank factors.
      alpha: s = alpha / r where a factor is low-rank; the rank by default.
      factor: the size of the small half of each side, -1 for as near to square as divisors allow; 1 leaves the
        sides whole.
      decompose_both: whether c may be low-rank too.
      tucker: on a convolution, a b is t (r, r, window) between a and b, which then hold channels alone.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((64, 48))}}, jlora.LoKr(rank=2))
      >>> {name: array.shape for name, array in adapted.trainable["query/kernel"].items()}
      {'c': (8, 6), 'a': (2, 8), 'b': (2, 8)}

    References:
      Yeh et al, `LyCORIS <https://arxiv.org/abs/2309.14859>`_, 2023.
    """

    rank: Rank = 8
    alpha: Alpha = None
    factor: Divisor = -1
    decompose_both: bool = False
    tucker: bool = False
    target: Target = targets.attention

    def recipe(self, leaf: Leaf) -> Recipe | None:
        if self.rank == 0:
            return None
        if not leaf.axes("i") or not leaf.axes("o"):
            raise ValueError("a Kronecker product needs input and output axes")
        r = self.rank
        (i, j), (o, p) = factorize(leaf.size("i"), self.factor), factorize(leaf.size("o"), self.factor)
        window = math.prod(leaf.sizes("k"))
        low_second = r < max(j, p) / 2
        low_first = self.decompose_both and r < max(i, o) / 2
        first = (Array("c1", uniform(1 / math.sqrt(i))), Array("c2", uniform(1 / math.sqrt(r))))
        second = (Array("a", uniform(1 / math.sqrt(j * window))), Array("b", zeros))
        left = "q i, q o" if low_first else "i o"
        # the window is the second factor's
        k = " K" if leaf.axes("k") else ""
        right = f"r j{k}, r p" if low_second else f"j{k} p"
        if self.tucker and k and low_second:
            second = (Array("t", uniform(1 / math.sqrt(r * window))), Array("a", uniform(1 / math.sqrt(j))), second[1])
            right = "u r K, r j, u p"
        words = (first if low_first else (Array("c", first[0].init),)) + (second if low_second else second[1:])
        sizes = (("i", i), ("j", j), ("o", o), ("p", p), ("q", r), ("r", r), ("u", r))
        s = 1.0 if self.alpha is None or not (low_first or low_second) else self.alpha / r
        ranks = ("q",) * low_first + (("r", "u") if len(second) == 3 else ("r",)) * low_second
        return Recipe((self.dropped(Delta(f"{left}, {right} ->{k} (i j) (o p)", words, sizes, s, ranks)),))

    def canonical(self) -> "LoKr":
        return dataclasses.replace(self, alpha=None)
