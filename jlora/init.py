"""Where a and b of a LoRA begin: `LoRA(rank=8, init=jlora.init.PiSSA())`.

| start | a, b | reads | pair |
|---|---|---|---|
| `PiSSA` | the weight's first r singular vectors | the weight | yes |
| `OLoRA` | its QR decomposition | the weight | yes |
| `Orthogonal` | random, with a b = 0 | | yes |
| `GA` | singular vectors of the gradient | `gradients(loss, ...)` | yes |
| `EVA` | singular vectors of the inputs; b = 0 | `activations(fn, ...)` | no |
| `CorDA` | singular vectors of the weight as its inputs see it | `activations(fn, ...)` | yes |
| `Given` | as given | | no |

A pair keeps a0 and b0 and subtracts their product, so that no start changes the base or the first output. `loftq` and
`qpissa` go the other way: they make a quantised base and the LoRA that mends it.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _answers, _interpret, _read
from jlora._algebra import _express, _recipe
from jlora._dtypes import widened
from jlora._interpret import moments as _moments
from jlora._plan import _pairs, _resolve, _sites
from jlora._plan._sites import Plan, Site, Spec
from jlora._trees import _tree
from jlora._types import PyTree
from jlora.adapted import Adapted, Frozen, check_any
from jlora.methods.lora import LoRA
from jlora.methods.starts import EVA as EVA
from jlora.methods.starts import GA as GA
from jlora.methods.starts import CorDA as CorDA
from jlora.methods.starts import Given as Given
from jlora.methods.starts import OLoRA as OLoRA
from jlora.methods.starts import Orthogonal as Orthogonal
from jlora.methods.starts import PiSSA as PiSSA
from jlora.methods.starts import Start as Start
from jlora.quant._mended import loftq as loftq
from jlora.quant._mended import qpissa as qpissa


def _taken(params: PyTree, spec: Spec, axes: dict[str, str] | None) -> tuple[Site, ...]:
    """The weights that a spec takes, with nothing added to them."""
    _answers.check_params("jlora.init", params)
    plan, _ = _resolve.resolve(_tree.flatten(params), spec, axes, True)
    return tuple(dataclasses.replace(s, recipe=_recipe.Recipe()) for s in plan.sites)


def _bare(params: PyTree, sites: tuple[Site, ...]) -> Adapted:
    return Adapted({}, Frozen(params, {}, None, _sites.intern(sites, (), ())))


def _summed(
    batches: Iterable[PyTree], f: Callable[[PyTree], dict[str, jax.Array]], name: str
) -> tuple[dict[str, jax.Array], int]:
    total: dict[str, jax.Array] = {}
    count = 0
    if not isinstance(batches, Iterable):
        raise TypeError(f"jlora.init.{name} takes an iterable of batches, such as a list, not {_answers.kind(batches)}")
    for batch in batches:
        part = f(batch)
        total = {path: total[path] + x for path, x in part.items()} if total else part
        count += 1
    if not count:
        raise ValueError(f"jlora.init.{name} was given no batch")
    return total, count


def gradients(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    batches: Iterable[PyTree],
    spec: Spec,
    *,
    axes: dict[str, str] | None = None,
) -> dict[str, jax.Array]:
    """The mean of dL/dW over batches, for each weight that `spec` takes: what `GA` starts from.

    Args:
      loss: `loss(params, batch) -> scalar`.
      params: the plain parameters, as `adapt` will take them.
      batches: an iterable of pytrees of arrays; equal shapes compile once.
      spec: the method, or the sequence of methods, that will adapt `params`.
      axes: as for `adapt`.

    Returns:
      `{path: gradient}`, in the weights' own axes, float32 (float64 for a float64 weight).

    Raises:
      ValueError: no batch; whatever `adapt` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.eye(4)}, "head": {"kernel": jnp.eye(4)}}
      >>> loss = lambda params, x: jnp.sum(x @ params["query"]["kernel"])
      >>> grads = jlora.init.gradients(loss, params, [jnp.ones((3, 4))], jlora.LoRA(rank=2))
      >>> {path: float(g[0, 0]) for path, g in grads.items()}
      {'query/kernel': 3.0}

    References:
      Wang, Yu and Li, `LoRA-GA <https://arxiv.org/abs/2407.05000>`_, 2024.
    """
    _answers.check_function("jlora.init.gradients", loss)
    sites = _taken(params, spec, axes)
    bare = _bare(params, sites)

    @jax.jit
    def one(bare: Adapted, batch: PyTree) -> dict[str, jax.Array]:
        leaves = _tree.leaves(bare.frozen.base)
        at = lambda values: loss(_read.replaced(bare, values), batch)
        found = jax.grad(at)([jnp.asarray(leaves[s.index]) for s in sites])
        return {s.leaf.path: widened(g) for s, g in zip(sites, found, strict=True)}

    total, count = _summed(batches, lambda batch: one(bare, batch), "gradients")
    return {path: g / count for path, g in total.items()}


def activations(
    fn: Callable[[PyTree, PyTree], PyTree],
    params: PyTree,
    batches: Iterable[PyTree],
    spec: Spec,
    *,
    axes: dict[str, str] | None = None,
) -> dict[str, jax.Array]:
    """X^T X of the inputs of each weight that `spec` takes, summed over batches: what `EVA` and `CorDA` start from.

    X are all rows that meet the weight in dots, padding included, not centred; a weight's other uses are not counted.
    The forward pass is walked as `lift` walks it, through `jit`, remat and scans: a scanned stack has one matrix a
    layer. All batches given count, as sums are exact; the paper stops early where the singular vectors have settled.

    Args:
      fn: `fn(params, batch)`; its outputs are dropped.
      params: the plain parameters, as `adapt` will take them.
      batches: an iterable of pytrees of arrays; equal shapes compile once.
      spec: the method, or the sequence of methods, that will adapt `params`.
      axes: as for `adapt`.

    Returns:
      `{path: X^T X}`, `(stack..., in, in)`, in at least float32.

    Raises:
      ValueError: no batch; weights whose inputs could not be seen, all at once: lookups, convolutions, ragged dots,
        stacks indexed by hand, uses inside branches and while loops, letters that are not those of the contraction;
        whatever `adapt` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.eye(2)}}
      >>> fn = lambda params, x: x @ params["query"]["kernel"]
      >>> jlora.init.activations(fn, params, [jnp.ones((3, 2))], jlora.LoRA(rank=1))
      {'query/kernel': Array([[3., 3.],
             [3., 3.]], dtype=float32)}

    References:
      Paischer et al, `EVA <https://arxiv.org/abs/2410.07170>`_, 2024.
    """
    _answers.check_function("jlora.init.activations", fn)
    sites = _taken(params, spec, axes)
    bare = _bare(params, sites)

    @jax.jit
    def one(bare: Adapted, batch: PyTree) -> dict[str, jax.Array]:
        me = _interpret.Interpreter(moments={})
        _interpret.call(lambda p: fn(p, batch), [bare], lambda trees: ((trees[0],), {}), me=me)
        return {path: _moments.in_order(made) for path, made in (me.moments or {}).items()}

    total, _ = _summed(batches, lambda batch: one(bare, batch), "activations")
    want = {s.leaf.path: (*s.leaf.stack, s.leaf.size("ik"), s.leaf.size("ik")) for s in sites}
    unseen = [path for path, shape in want.items() if path not in total or total[path].shape != shape]
    if unseen:
        raise ValueError(
            f"the inputs of {unseen[:5]}{f' and {len(unseen) - 5} more' if len(unseen) > 5 else ''} could not be seen: "
            "they are read in dots alone (no lookup, convolution, ragged dot or stack indexed by hand), outside of "
            "branches and while loops, and along the axes that are their input (axes=); exclude them from the spec"
        )
    return total


def redistributed(method: LoRA, moments: Mapping[str, jax.Array], *, rho: float = 2.0) -> tuple[LoRA, ...]:
    """EVA's ranks: the budget of `method.rank` for each weight goes where the inputs' variance is.

    All components of all weights are sorted by the share of their weight's variance that they explain,
    S_i^2 / sum S^2, and the first ones are taken until the budget is spent. A weight gets rho * rank at most, and is
    left alone at rank 0. The layers of a stack have one rank, by their mean share, and each costs. s stays what it
    is in `method`, whatever the rank.

    Args:
      method: the LoRA that would be used for all; its target is not looked at again.
      moments: what `activations` returned; read as values, so not under `jit`.
      rho: how many times its rank a weight may get, at least 1. An input of n axes has n components.

    Returns:
      Rules for `adapt`, one for each rank that occurs, with `EVA(moments)` as their start.

    Raises:
      ValueError: rho below 1.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"q": jnp.eye(4), "v": jnp.eye(4)}
      >>> moments = {"q": jnp.diag(jnp.array([8.0, 1.0, 1.0, 1.0])), "v": jnp.diag(jnp.array([4.0, 3.0, 3.0, 0.0]))}
      >>> rules = jlora.init.redistributed(jlora.LoRA(rank=2, target="."), moments)
      >>> {path: rule.rank for rule in rules for path in rule.target}
      {'^q$': 1, '^v$': 3}

    References:
      Paischer et al, `EVA <https://arxiv.org/abs/2410.07170>`_, 2024.
    """
    if not isinstance(method, LoRA) or not isinstance(moments, Mapping):
        given = f"({_answers.kind(method)}, {_answers.kind(moments)})"
        raise TypeError(
            f"redistributed(method, moments) takes a LoRA and what jlora.init.activations returned, not {given}"
        )
    words = "a weight gets at most rho * rank, with rho of at least 1"
    _answers.check_number("redistributed(rho", rho, lambda x: 1 <= x < math.inf, words)
    shares: list[tuple[float, str]] = []
    layers: dict[str, int] = {}
    for path, moment in moments.items():
        spectrum = np.maximum(np.linalg.eigvalsh(np.asarray(moment, np.float64))[..., ::-1], 0)
        share = spectrum / np.maximum(spectrum.sum(-1, keepdims=True), np.finfo(np.float64).tiny)
        share = share.reshape(-1, share.shape[-1])
        layers[path] = len(share)
        shares += [(float(x), path) for x in share.mean(0)[: int(rho * method.rank)]]
    left = method.rank * sum(layers.values())
    ranks = dict.fromkeys(moments, 0)
    for _, path in sorted(shares, key=lambda pair: -pair[0]):
        if layers[path] <= left:
            ranks[path] += 1
            left -= layers[path]
    start = EVA(moments)
    rules = []
    for rank in sorted(set(ranks.values())):
        paths = [f"^{re.escape(path)}$" for path, r in ranks.items() if r == rank]
        alpha = method.scale * (rank if method.scaling == "rank" else math.sqrt(rank)) if rank else None
        rules.append(dataclasses.replace(method, rank=rank, alpha=alpha, init=start, target=paths, exclude=()))
    return tuple(rules)


def plain(adapted: Adapted) -> Adapted:
    """Every pair as a plain LoRA of rank 2r with the same update, bit for bit: for programs that know no pairs.

    a becomes [a - a0, a0] and b [b; b - b0], the very operands of the pair; s stays. Other methods stay as they
    are, a DoRA over a pair too. A rank 2r above min(in, out) is a waste, of which it warns; `jlora.rank.resize` makes a
    plain LoRA of fewer ranks.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.eye(4)}}, jlora.LoRA(rank=2, init="pissa"))
      >>> {name: x.shape for name, x in jlora.init.plain(adapted).trainable["query/kernel"].items()}
      {'a': (4, 4), 'b': (4, 4)}

    References:
      Meng et al, `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024, appendix on converting it to LoRA.
    """
    base = _tree.leaves(check_any("init.plain", adapted).frozen.base)
    get = _read.factors_of(adapted)
    trainable, factors = dict(adapted.trainable), dict(adapted.frozen.factors)
    sites = []
    for site in adapted.frozen.plan.sites:
        path, method = site.leaf.path, site.method
        if not (isinstance(method, LoRA) and method.paired):
            sites.append(site)
            continue
        (w0,) = _read.held([(path, base[site.index])])
        (term,) = _express.express(site.leaf, site.recipe, w0, get).terms
        made = {"a": term.operands[0].value(), "b": term.operands[1].value()}
        rank = dict(site.recipe.deltas[0].sizes)["r"]
        method = dataclasses.replace(method, rank=rank, init="kaiming")
        recipe = method.recipe(site.leaf)
        assert recipe is not None
        sites.append(dataclasses.replace(site, method=method, recipe=recipe))
        halves = {True: {}, False: {"s": factors[path]["s"]}}
        for (_, name), (array, _) in recipe.arrays(site.leaf).items():
            if name in made:
                halves[array.trained][name] = made[name]
        trainable[path], factors[path] = halves[True], halves[False]
    plan = _replanned(adapted, sites)
    if waste := _pairs.wasted(plan):
        warnings.warn(waste, stacklevel=2)
    return Adapted(trainable, dataclasses.replace(adapted.frozen, factors=factors, plan=plan))


def _replanned(adapted: Adapted, sites: list[Site]) -> Plan:
    methods = dict.fromkeys(s.method for s in sites)
    return _sites.intern(tuple(sites), tuple(methods), adapted.frozen.plan.notes)
