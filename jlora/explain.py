"""What a lifted call does with each adapted weight, and what a plain call says of a weight's axes."""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence

import jax

from jlora import _answers, _interpret
from jlora._interpret import Row
from jlora._interpret import trace as _trace
from jlora._trees import _axes, _table
from jlora._types import PyTree
from jlora.adapted import is_adapted
from jlora.lift import as_adapters, find, is_ours


@dataclasses.dataclass(frozen=True)
class Report:
    """What `explain` found; prints as a table.

    Attributes:
      rows: one record a use: `path`, `use` (the operation), `plan`, `flops` of the delta, `dense_flops` of the dense
        operation beside it, `reason` (why it was made dense, with the source line; empty where it was not).
      dense: the rows that were made dense for want of a rule; a vector, or a dense matrix that the planner chose, is
        not among them.
      unused: paths of adapted weights that no use was found for.
      roles: `(path, shape, taken, read)` of weights whose axes the function uses otherwise than `adapt` took them,
        one letter an axis.
    """

    rows: tuple[Row, ...]
    unused: tuple[str, ...]
    roles: tuple[tuple[str, tuple[int, ...], str, str], ...] = ()

    @property
    def dense(self) -> tuple[Row, ...]:
        return tuple(r for r in self.rows if r.reason)

    def __repr__(self) -> str:
        other = f", {len(self.roles)} with other axes" if self.roles else ""
        return f"Report({len(self.rows)} uses, {len(self.dense)} dense, {len(self.unused)} unused{other})"

    def __str__(self) -> str:
        lines = []
        for path, n, (use, plan, flops, dense, _) in _table.fold(
            [(r.path, (r.use, r.plan, r.flops, r.dense_flops, r.reason)) for r in self.rows]
        ):
            share = f"{100 * flops / dense:.1f} %" if dense else "-"
            lines.append((path, str(n), use, plan, f"{flops:.3g}" if flops else "-", share))
        header = ("path", "uses", "operation", "plan", "FLOPs", "of dense")
        text = [_table.render(header, lines, right=(1, 4, 5))]
        for path, n, (reason,) in _table.fold([(r.path, (r.reason,)) for r in self.dense]):
            times = f" (x{n})" if n > 1 else ""
            text.append(_table.shorten(f"dense: {path}{times}: {reason}", _table.WIDTH))
        for path, n, _ in _table.fold([(p, ()) for p in self.unused]):
            times = f" (x{n})" if n > 1 else ""
            text.append(_table.shorten(f"unused: {path}{times}", _table.WIDTH))
        if self.roles:
            text.append(_axes.contradiction(self.roles))
        return "\n".join(text)


def explain(fn: Callable[..., PyTree], *args: PyTree, **kwargs: PyTree) -> Report:
    """Where each adapted weight is used, which contraction was planned, and why any was made dense.

    Called like the lifted function, with `fn` as it was before lifting. Nothing is computed; arrays may be
    `ShapeDtypeStruct`s.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> report = jlora.explain(lambda p, x: x @ p["query"]["kernel"], adapted, jnp.ones((3, 6)))
      >>> report.rows[0].path, report.rows[0].use, report.dense, report.unused
      ('query/kernel', 'dot_general', (), ())
    """
    _answers.check_function("explain", fn)
    found, where, _ = find(args, kwargs)
    if not found:
        raise ValueError("explain is called like the lifted function, with an Adapted among its arguments")
    found = as_adapters(found, where)
    me = _interpret.Interpreter(rows=[])
    _abstractly(fn, args, kwargs, me)
    assert me.rows is not None
    paths = [path for each in _interpret.names(found) for path in each]
    used = {r.path for r in me.rows}
    return Report(tuple(me.rows), tuple(p for p in paths if p not in used), tuple(me.contradicted))


def infer_axes(fn: Callable[..., PyTree], params: PyTree, *args: PyTree, **kwargs: PyTree) -> dict[str, str]:
    """The letters of each weight's axes, read off a trace of `fn(params, *args, **kwargs)`.

    Contracted axes are i, scanned, indexed and batch axes s, a convolution's window k, the rest o; a weight that no
    contraction was found for is left out. Give it to `adapt(..., axes=...)`.

    Args:
      fn: the plain function.
      params: its parameters, plain: the tree that `adapt` will take.

    Returns:
      `{pattern: letters}` with one pattern a weight, anchored at both ends.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"out": {"kernel": jnp.ones((2, 3, 4))}}
      >>> f = lambda p, x: jnp.einsum("thk,hkd->td", x, p["out"]["kernel"])
      >>> jlora.infer_axes(f, params, jnp.ones((5, 2, 3)))
      {'^out/kernel$': 'iio'}
    """
    _answers.check_function("infer_axes", fn)
    if is_adapted(params):
        raise TypeError("infer_axes takes plain parameters, not an Adapted: infer_axes(fn, adapted.frozen.base, x)")
    _answers.check_params("infer_axes", params)
    return {
        f"^{re.escape(path)}$": letters
        for path, letters in _trace.axes(fn, params, args, kwargs).items()
        if len(letters) >= 2
    }


def _is_abstract(x: object) -> bool:
    return is_ours(x) or isinstance(x, jax.ShapeDtypeStruct)


def _abstractly(
    fn: Callable[..., PyTree], args: Sequence[PyTree], kwargs: Mapping[str, PyTree], me: _interpret.Interpreter
) -> None:
    """Traces a lifted call without computing; outputs that are no arrays are dropped."""
    inputs, _, fill = find(args, kwargs, _is_abstract)

    def arrays(inputs: list[PyTree]) -> list[jax.Array]:
        found, where, refill = find(*fill(inputs))
        out = _interpret.call(fn, as_adapters(found, where), refill, me=me)
        return [x for x in jax.tree.leaves(out) if isinstance(x, jax.Array)]

    jax.eval_shape(arrays, inputs)
