"""The halves of an adapter, `{group: {factor: array}}`, held against its plan."""

from collections.abc import Iterator, Mapping

from jlora import _answers
from jlora._plan._sites import Plan
from jlora._types import Half


def check_half(name: str, half: object) -> None:
    """Raises ValueError unless a half is `{group: {factor: array}}`."""
    if not isinstance(half, Mapping) or not all(isinstance(named, Mapping) for named in half.values()):
        raise ValueError(f"{name} is {{group: {{factor: array}}}}, not {_answers.kind(half)}")
    if gone := [(group, n) for group, named in half.items() for n, x in named.items() if x is None]:
        raise ValueError(f"{name}: {gone[0][0]!r}: {gone[0][1]!r} is None, not an array")


def check_one(caller: str, plan: Plan, trainable: Half, factors: Half) -> None:
    """Raises ValueError where the factors have other shapes than the plan's: with one axis more they are a stack."""
    check_half(f"{caller}: trainable", trainable)
    check_half(f"{caller}: frozen.factors", factors)
    for half, trained in ((trainable, True), (factors, False)):
        for said, have, shape in _misshapen(plan, half, trained):
            if have[1:] == shape:
                raise ValueError(
                    f"{caller}: {said}, and the plan {shape}: this is a stack of {have[0]} adapters, and {caller} "
                    "takes one. With `stacked, axes = jlora.stack(adapters)`, call it inside jax.vmap(..., "
                    "in_axes=(axes, ...)) or on each of jlora.unstack(stacked); an optimizer is made of one of them"
                )
            ranks = "jlora.rank.resize and prune change ranks with their plan"
            raise ValueError(f"{caller}: {said}, and the plan {shape}; {ranks}")


def check_trainable(trainable: Half, plan: Plan) -> None:
    """Raises if groups, names or shapes are not the plan's; all of them are named at once."""
    want = {place for place, (_, trained) in plan.shapes.items() if trained}
    check_half("trainable", trainable)
    have = {(g, n): a for g, fs in trainable.items() for n, a in fs.items()}
    bad = [f"missing {g!r}: {n!r}" for g, n in plan.shapes if (g, n) in want - have.keys()]
    bad += [f"extra {g!r}: {n!r}" for g, n in have if (g, n) not in want]
    for (g, n), a in have.items():
        if isinstance(a, (list, tuple, dict, str)):
            bad.append(f"{g!r}: {n!r} is {_answers.kind(a)}, not an array")
    bad += [f"{said}, not {shape}" for said, _, shape in _misshapen(plan, trainable, True)]
    if bad:
        more = f"\n  and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError("these trainable factors do not fit the plan:\n  " + "\n  ".join(bad[:8]) + more)


def _misshapen(plan: Plan, half: Half, trained: bool) -> Iterator[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    """Of each array of another shape than the plan's: that in words, the shape it has, and the plan's.

    What has no shape, such as the mark of a masked optimizer, is passed over.
    """
    for (group, name), (shape, kind) in plan.shapes.items():
        have = getattr(half.get(group, {}).get(name), "shape", None) if kind == trained else None
        if have is not None and tuple(have) != shape:
            yield f"{group!r}: {name!r} has shape {tuple(have)}", tuple(have), shape
