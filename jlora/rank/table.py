"""How many ranks each weight has, as numbers and as text."""

import numpy as np

from jlora import _read
from jlora._plan import _pairs
from jlora._trees import _table
from jlora.adapted import Adapted
from jlora.rank.compact import alive, concrete
from jlora.rank.prune import plan_of


def ranks(adapted: Adapted) -> dict[str, np.ndarray]:
    """How many ranks of each weight add something: `{path: (stack...,)}`, one number for each layer of a stack.

    A rank adds something where none of its factors is zero. For use outside of `jit`. A weight with several products
    of low rank (LoHa, slices) has the sum of theirs. Kept by step, it is the history that `jlora.plot.ranks` draws.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: factors without values (inside `jit`); an adapter without ranks.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.SoRA(rank=3))
      >>> adapted.trainable["query/kernel"] |= {"g": jnp.array([0.5, 0.0, 0.0]), "b": jnp.ones((3, 4))}
      >>> jlora.rank.ranks(adapted)
      {'query/kernel': array(1)}
    """
    found: dict[str, np.ndarray] = {}
    for path, _, counts in _counted("ranks", adapted):
        found[path] = np.asarray(found.get(path, 0) + counts)
    return found


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
    rows: dict[str, tuple[list[str], list[str]]] = {}
    living = stored = 0
    for path, rank, counts in _counted("rank_table", adapted):
        sizes, texts = rows.setdefault(path, ([], []))
        sizes.append(str(rank))
        texts.append(" ".join(map(str, np.ravel(counts).tolist())))
        living += int(counts.sum())
        stored += rank * counts.size
    joined = [(path, ("+".join(sizes), " + ".join(texts))) for path, (sizes, texts) in rows.items()]
    folded = [(path, str(n), *rest) for path, n, rest in _table.fold(joined)]
    table = _table.render(("path", "weights", "of rank", "alive"), folded, right=(1, 2, 3))
    return f"{table}\n\n{living:,} of {stored:,} ranks alive"


def _counted(caller: str, adapted: Adapted) -> list[tuple[str, int, np.ndarray]]:
    """Path, stored rank and living ranks (stack...,) of every product of low rank."""
    plan = plan_of(caller, adapted)
    concrete(caller, adapted)
    get = _read.factors_of(adapted)
    found = [(pair.path, pair.rank, np.asarray(alive(pair, get).sum(-1))) for pair in _pairs.pairs(plan)]
    if not found:
        methods = ", ".join(dict.fromkeys(m.describe() for m in plan.methods))
        raise ValueError(f"{caller} finds no ranks of a weight's own under {methods}")
    return found
