"""How many ranks each weight has, as text."""

import numpy as np

from jlora import _merge, _ranks, _table
from jlora.adapted import Adapted
from jlora.rank.compact import alive, concrete
from jlora.rank.prune import plan_of


def rank_table(adapted: Adapted) -> str:
    """The ranks that add something, of those stored, for every weight and layer of a stack, and their sum.

    For use outside of `jit`. Paths that differ in numbers and agree in ranks are folded; a weight with several products
    of low rank (LoHa, slices) has a number for each.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: factors without values (inside `jit`); an adapter without ranks.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SoRA(rank=3))
      >>> adapted.trainable["query/kernel"] |= {"g": jnp.array([0.5, 0.0, 0.0]), "b": jnp.ones((3, 4))}
      >>> print(jlora.rank.rank_table(adapted))
      path          weights  of rank  alive
      ------------  -------  -------  -----
      query/kernel        1        3      1
      <BLANKLINE>
      1 of 3 ranks alive
    """
    plan = plan_of("rank_table", adapted)
    concrete("rank_table", adapted)
    get = _merge.lookup(adapted)
    rows: dict[str, tuple[list[str], list[str]]] = {}
    living = stored = 0
    for pair in _ranks.pairs(plan):
        counts = alive(pair, get).sum(-1)
        ranks, texts = rows.setdefault(pair.path, ([], []))
        ranks.append(str(pair.rank))
        texts.append(" ".join(map(str, np.ravel(counts).tolist())))
        living += int(counts.sum())
        stored += pair.rank * counts.size
    if not rows:
        methods = ", ".join(dict.fromkeys(m.describe() for m in plan.methods))
        raise ValueError(f"rank_table finds no ranks of a weight's own under {methods}")
    joined = [(path, ("+".join(ranks), " + ".join(texts))) for path, (ranks, texts) in rows.items()]
    folded = [(path, str(n), *rest) for path, n, rest in _table.fold(joined)]
    table = _table.render(("path", "weights", "of rank", "alive"), folded, right=(1, 2, 3))
    return f"{table}\n\n{living:,} of {stored:,} ranks alive"
