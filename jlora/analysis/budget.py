"""What a spec costs on a model, before anything is trained or even drawn."""

import dataclasses
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jlora import _answers, _read
from jlora._algebra import _contract
from jlora._algebra._weight import Weight
from jlora._algebra._words import Array
from jlora._forward import _ops
from jlora._gates import opened
from jlora._plan import _resolve, _sites
from jlora._plan._sites import Plan, Site, Spec
from jlora._trees import _table, _tree
from jlora._trees._table import in_bytes
from jlora._types import Place, PyTree, Shaped, Value
from jlora.adapted import Adapted, Frozen, is_adapted
from jlora.analysis.adapters import side_labels


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight: `path`, `method`, `rank`, `trainable` parameters (a shared factor counts where it is first met)
    and the `flops` of its update, forward, for one token."""

    path: str
    method: str
    rank: str
    trainable: int
    flops: float


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a spec costs on a model; prints as a table.

    Attributes:
      rows: one a weight.
      base: parameters of the model.
      trainable: those trained.
      disk_bytes: the arrays of a saved adapter: all factors but those that are drawn again from a seed.
      memory_bytes: the arrays of the adapter at hand, with these.
      gradient_bytes: of the trained factors.
      optimizer_bytes: the state of the optimizer over the trained factors.
      base_flops: the model's own weights, forward, for one token.
      delta_flops: the updates, forward, for one token.
      delta_backward_flops: the updates, backward, for one token.
    """

    rows: tuple[Row, ...]
    base: int
    trainable: int
    disk_bytes: int
    memory_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    base_flops: float
    delta_flops: float
    delta_backward_flops: float

    @property
    def share(self) -> float:
        """Trainable parameters over those of the model."""
        return self.trainable / max(self.base, 1)

    @property
    def step_flops(self) -> float:
        """A training step for one token: the base forward and backward for activations, and the updates in both."""
        return 2 * self.base_flops + self.delta_flops + self.delta_backward_flops

    @property
    def full_step_flops(self) -> float:
        """The same for full fine-tuning."""
        return 3 * self.base_flops

    def __str__(self) -> str:
        rows = [(r.path, (r.method, r.rank, r.trainable, r.flops)) for r in self.rows]
        lines = [
            (path, str(n), method, rank, f"{n * trainable:,}", f"{n * flops:,.0f}")
            for path, n, (method, rank, trainable, flops) in _table.fold(rows)
        ]
        header = ("path", "weights", "method", "rank", "trainable", "FLOPs a token")
        saved = 100 * (1 - self.step_flops / self.full_step_flops) if self.base_flops else 0.0
        return "\n".join(
            (
                _table.render(header, lines, right=(1, 4, 5)),
                "",
                f"{self.trainable:,} trainable beside {self.base:,} parameters ({100 * self.share:.4f} %)",
                f"{in_bytes(self.disk_bytes)} on disk, {in_bytes(self.memory_bytes)} of factors, "
                f"{in_bytes(self.gradient_bytes)} of gradients, {in_bytes(self.optimizer_bytes)} of optimizer state",
                f"FLOPs a token: {self.base_flops:.3g} base + {self.delta_flops:.3g} updates forward; "
                f"{self.step_flops:.3g} a step, {saved:.0f} % below full fine-tuning",
            )
        )


def cost(
    params: PyTree,
    spec: Spec,
    *,
    optimizer: optax.GradientTransformation | None = None,
    tokens: int = 512,
    axes: dict[str, str] | None = None,
) -> Cost:
    """Parameters, bytes and FLOPs of a spec on a model, from shapes alone.

    FLOPs suppose that every matrix meets every token once, in a dot, an embedding by looking rows up (free) and all
    experts of a stack alike; attention scores, norms and activations are left out, and so is what functions of factors
    compute (a norm, a projection drawn anew). Where that is not the model, `jlora.explain` counts from its trace.

    Args:
      params: as for `adapt`; `ShapeDtypeStruct`s do, and no value is read.
      spec: as for `adapt`.
      optimizer: whose state is counted; AdamW, two arrays a trained one, by default.
      tokens: how many a batch has. A float32 weight's dW is made, as `lift` does, where that is cheaper for so many
        than meeting its factors; the cost is spread over them.
      axes: as for `adapt`.

    Returns:
      A `Cost`; `print` it.

    Raises:
      ValueError: what `adapt` refuses; fewer tokens than 1.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jax.ShapeDtypeStruct((768, 768), jnp.float32)}}
      >>> found = jlora.analysis.cost(params, jlora.LoRA(rank=8))
      >>> found.trainable, found.disk_bytes, found.optimizer_bytes, found.delta_flops / found.base_flops
      (12288, 49156, 98308, 0.016...)

    References:
      Kaplan et al, `Scaling Laws for Neural Language Models <https://arxiv.org/abs/2001.08361>`_, 2020, section 2.1,
      for two FLOPs a parameter and token.
    """
    if is_adapted(params):
        raise TypeError("cost takes plain parameters, not an Adapted: cost(adapted.frozen.base, spec)")
    _answers.check_params("cost", params)
    if optimizer is not None:
        _answers.check_optimizer("cost(optimizer=)", optimizer)
    _answers.check_integer("cost(tokens", tokens, 1, "a batch has at least one token")
    tree = _tree.flatten(params)
    plan, given = _resolve.resolve(tree, spec, axes, True)
    arrays: dict[Place, tuple[Array, jax.ShapeDtypeStruct]] = {}
    rows, stored = [], 0
    flops = _delta_flops(params, plan, tokens)
    for site, (method, recipe), (delta, _) in zip(plan.sites, given, flops, strict=True):
        new = {place: found for place, found in recipe.arrays(site.leaf).items() if place not in arrays}
        for place, (array, shape) in new.items():
            arrays[place] = (array, jax.ShapeDtypeStruct(shape, method.dtype_of(array)))
            stored += 0 if array.derived else _size(arrays[place][1])
        trainable = sum(math.prod(shape) for array, shape in new.values() if array.trained)
        rows.append(Row(site.leaf.path, site.method.describe(), _sites.describe_rank(site), trainable, delta))
    trained = {place: struct for place, (array, struct) in arrays.items() if array.trained}
    state = jax.eval_shape((optimizer or optax.adamw(1e-3)).init, _grouped(trained))
    shapes = [_tree.shape_dtype(leaf)[0] for leaf in tree.leaves]
    return Cost(
        rows=tuple(rows),
        base=sum(map(math.prod, shapes)),
        trainable=sum(math.prod(struct.shape) for struct in trained.values()),
        disk_bytes=stored,
        memory_bytes=sum(_size(struct) for _, struct in arrays.values()),
        gradient_bytes=sum(map(_size, trained.values())),
        optimizer_bytes=sum(map(_size, jax.tree.leaves(state))),
        base_flops=sum(_dot_flops(path, shape) for path, shape in zip(tree.paths, shapes, strict=True)),
        delta_flops=sum(forward for forward, _ in flops),
        delta_backward_flops=sum(backward for _, backward in flops),
    )


def _size(struct: Shaped) -> int:
    return math.prod(struct.shape) * jnp.dtype(struct.dtype).itemsize


def _grouped(trained: Mapping[Place, Value]) -> dict[str, dict[str, Value]]:
    grouped: dict[str, dict[str, Value]] = {}
    for (group, name), struct in trained.items():
        grouped.setdefault(group, {})[name] = struct
    return grouped


def _dot_flops(path: str, shape: tuple[int, ...]) -> float:
    """Two a parameter of what a token meets in a dot; nothing for vectors and row lookups."""
    looked_up = path.rsplit("/", 1)[-1] == "embedding"
    return 0.0 if len(shape) < 2 or looked_up else 2.0 * math.prod(shape)


def _delta_flops(params: PyTree, plan: Plan, tokens: int) -> list[tuple[float, float]]:
    """For each weight, what its update adds to the forward and to the backward pass of one token."""
    leaves = _tree.leaves(params)
    structs = {s.index: jax.ShapeDtypeStruct(s.leaf.shape, s.leaf.dtype) for s in plan.sites}
    base = [structs.get(n) for n in range(len(leaves))]
    made: dict[Place, jax.ShapeDtypeStruct] = {}
    for site in plan.sites:
        for place, (array, shape) in site.recipe.arrays(site.leaf).items():
            made[place] = jax.ShapeDtypeStruct(shape, site.method.dtype_of(array))
    found: list[tuple[float, float]] = []

    def look(base: list[PyTree], factors: dict[str, dict[str, jax.Array]]) -> None:
        adapted = Adapted({}, Frozen(params, factors, None, plan, opened(plan)))
        for site, weight in zip(plan.sites, _read.expressions(adapted, base), strict=True):
            forward, backward = _weight_flops(site, weight, tokens)
            found.append((forward / tokens, backward / tokens))

    jax.eval_shape(look, base, _grouped(made))
    return found


def _weight_flops(site: Site, weight: Weight, tokens: int) -> tuple[float, float]:
    """What the products of one weight add for a batch: met as factors, or made to a matrix once where that may be.

    Backward, factors are met twice, for their own gradients and for the activation's; of a matrix in the weight's own
    axes there is one gradient, a dot as large as the weight's.
    """
    factored, dense = 0.0, 0.0
    stack = tuple(a for a in weight.atoms if a[0] == "s")
    for term in weight.terms:
        values, labels = weight.operands(term)
        sizes = dict(weight.size) | {"token": tokens}
        sizes |= {x: n for v, ls in zip(values, labels, strict=True) for x, n in zip(ls, v.shape, strict=True)}
        ins, outs = side_labels(term.blocks, "ik") or (), side_labels(term.blocks, "o") or ()
        run = lambda parts, out, sizes=sizes: _contract.plan(
            tuple(map(tuple, parts)), tuple(tuple(sizes[x] for x in ls) for ls in parts), out
        )[1]
        dense += run(labels, (*stack, *ins, *outs)) + math.prod(weight.shape)
        if site.leaf.name == "embedding":  # the rows of what carries the input side are looked up first
            read = lambda ls, ins=ins: tuple(x for x in ls if x not in ins)
            met = [("token", *read(ls)) if set(ls) & set(ins) else tuple(ls) for ls in labels]
        else:
            met = [(*stack, "token", *ins), *labels]
        factored += run(met, (*stack, "token", *outs))
    stepping = tokens * sum(2.0 * math.prod(a.shape) for o in weight.steps for a in o.arrays)
    if stepping:
        forward, backward = _weight_flops(site, weight.replace(steps=()), tokens) if weight.terms else (0.0, 0.0)
        return forward + stepping, backward + 2 * stepping
    dot = tokens * _dot_flops(site.leaf.path, site.leaf.shape)
    if _ops.is_vector(weight):
        return dense, dense
    if _ops.is_dense_delta(weight):
        return dense, dot
    if not weight.plain:  # W0 stands inside a product: its own dot is not the update's
        factored = max(factored - dot, 0.0)
    return min(factored, dense) if weight.dtype == jnp.float32 else factored, 2 * factored
