"""What a step costs a device, in bytes held and bytes sent, from shapes alone."""

import collections
import dataclasses
import math
from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec
from jax.typing import DTypeLike

from jlora import _answers
from jlora._algebra import _recipe
from jlora._plan._sites import Site, Spec
from jlora._trees import _select, _table, _tree
from jlora._trees._compound import is_compound
from jlora._trees._tree import Target
from jlora._types import AnyMesh, DType, MeshAxes, PyTree, Shaped
from jlora.adapted import Adapted, adapt
from jlora.shard import _rules
from jlora.shard._specs import abstract, check_mesh, operands, roles_of, state_shardings


@dataclasses.dataclass(frozen=True)
class Traffic:
    """One kind of collective.

    Attributes:
      kind: `"all-gather"`, `"all-reduce"` or `"reduce-scatter"` (which a compiler may write as an all-reduce).
      what: what is sent.
      over: the mesh axes that it goes over.
      bytes: of its arrays on one device, in one step: results of gathers, operands of reductions.
    """

    kind: str
    what: str
    over: tuple[str, ...]
    bytes: int


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Bytes on one device; activations are not counted.

    Attributes:
      base: the base's share.
      factors: the frozen factors'.
      trainable: the trainable factors'.
      optimizer: the optimizer state's.
      gradients: the gradients'.
      traffic: what one step sends and receives.
    """

    base: int
    factors: int
    trainable: int
    optimizer: int
    gradients: int
    traffic: tuple[Traffic, ...]

    @property
    def total(self) -> int:
        """All that a device holds."""
        return self.base + self.factors + self.trainable + self.optimizer + self.gradients

    def sent(self, kind: str = "", what: str = "") -> int:
        """The bytes of the collectives of a kind, or of what they send; of all by default."""
        return sum(t.bytes for t in self.traffic if t.kind.startswith(kind) and t.what.startswith(what))

    def __str__(self) -> str:
        held = [(n, f"{getattr(self, n):,}", "") for n in ("base", "factors", "trainable", "optimizer", "gradients")]
        sent = [(f"{t.kind}: {t.what}", f"{t.bytes:,}", " ".join(t.over)) for t in self.traffic]
        return _table.render(
            ("a device", "bytes", "over"), [*held, ("all that is held", f"{self.total:,}", ""), *sent], (1,)
        )


def estimate(
    params: PyTree,
    spec: Spec,
    mesh: AnyMesh,
    base_specs: PyTree,
    *,
    batch: PartitionSpec,
    tx: optax.GradientTransformation | None = None,
    tokens: int = 0,
    activations: DTypeLike = jnp.bfloat16,
    passes: int = 2,
    quantised: "tuple[Target, float] | None" = None,
    axes: dict[str, str] | None = None,
) -> Estimate:
    """Bytes a device holds and sends for a training step, without making an array.

    Held are the shares that `partition_specs` gives: exact. Sent are:

    - Gathers of what is sharded over mesh axes that the batch is sharded over too (fsdp), once in each pass: weights
      as they are stored; factors, and what functions of them make, in the dtype of the activations that they meet, a
      shared one in every layer. A table of embeddings is not gathered: rows of it move instead. Those are not counted,
      nor is its gather where a tied head multiplies by it.
    - The reduction of factor gradients over the batch's axes, in the factors' dtype. Of a factor that is sharded over
      some of these axes a device is left with its share, which is then summed over the others, such as the groups of
      a `("data", "fsdp")` mesh.
    - Where a weight is cut along other axes (tensor parallel), the sums of activations that its dots leave: the
      output where the input side is cut, the input's gradient where the output side is, and the narrow ones of the
      adapter beside them. Activations are counted one by one: where a compiler adds several before it sends them (the
      gradients of query, key and value), it sends less.

    A delta of the weight's own shape (`Full`, `BitFit`) is added to the weight before anything is sent: it is not
    gathered apart, and its gradient is sent in the weight's dtype.

    Args:
      params: the base, abstract or not; a quantised one holds and gathers its codes and scales.
      spec: as for `adapt`.
      mesh: a `Mesh`, or an `AbstractMesh` such as `AbstractMesh((64,), ("fsdp",))` for devices that are not there.
      base_specs: as for `partition_specs`.
      batch: the PartitionSpec of a batch: the mesh axes that tokens are sharded over.
      tx: an optax transformation; None for a state of no size.
      tokens: in a batch, over all devices; 0 leaves activations out.
      activations: their dtype.
      passes: how often a step gathers a weight and its factors: 2, in the forward and in the backward pass, as under a
        scan or remat; 3 where the whole forward pass is done anew; 1 where a compiler keeps what it gathered.
      quantised: `(target, bits)`: which plain leaves would hold that many bits a parameter; NF4 with double
        quantisation is `(jlora.targets.linear, 4.127)`.
      axes: as for `adapt`.

    Returns:
      An `Estimate`; it prints as a table.

    Raises:
      ValueError: what `adapt` and `partition_specs` refuse.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> from jax.sharding import AbstractMesh, PartitionSpec as P
      >>> params = {"query": {"kernel": jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)}}
      >>> mesh = AbstractMesh((8,), ("fsdp",))
      >>> found = jlora.shard.estimate(params, jlora.LoRA(rank=8), mesh, "fsdp", batch=P("fsdp"), tx=optax.adamw(1e-4))
      >>> found.base, found.optimizer, found.sent("all-gather", "base")
      (4194304, 294916, 67108864)

    References:
      Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023: the bits of NF4.
      Rajbhandari et al, `ZeRO <https://arxiv.org/abs/1910.02054>`_, 2020: what is gathered and scattered under fsdp.
      Shoeybi et al, `Megatron-LM <https://arxiv.org/abs/1909.08053>`_, 2019: which activations are summed.
    """
    check_mesh("shard.estimate", mesh)
    _answers.check_params("shard.estimate", params)
    if not isinstance(batch, PartitionSpec):
        raise TypeError(f"shard.estimate(batch={batch!r}): the PartitionSpec of a batch, such as PartitionSpec('data')")
    strange = [n for entry in batch for n in _rules.mesh_axes(entry) if n not in mesh.shape]
    if strange:
        raise ValueError(f"shard.estimate(batch={batch}): the mesh has the axes {tuple(mesh.shape)}, not {strange}")
    if tx is not None:
        _answers.check_optimizer("shard.estimate", tx)
    _answers.check_integer("shard.estimate(tokens", tokens, 0, "how many tokens a batch has; 0 leaves activations out")
    _answers.check_integer("shard.estimate(passes", passes, 1, "how often a step gathers a weight: 1, 2 or 3")
    made = jax.eval_shape(lambda p: adapt(p, spec, axes=axes), params)
    sizes = dict(mesh.shape)
    bare = _tree.flatten(made.frozen.base)
    entries = _rules.entries_of(bare, roles_of(bare, made.frozen.plan), base_specs, sizes)
    placed = abstract(mesh, made, _tree.rebuilt(made.frozen.base, list(map(_rules.to_spec, entries))))
    rows = tuple(n for entry in batch for n in _rules.mesh_axes(entry) if sizes[n] > 1)
    state = 0
    if tx is not None:
        shapes = jax.tree.leaves(jax.eval_shape(tx.init, placed.trainable))
        places = jax.tree.leaves(state_shardings(tx, placed))
        state = sum(_held(a, s.spec, sizes) for a, s in zip(shapes, places, strict=True))
    tree = _tree.flatten(placed.frozen.base)
    held = _select.taken(quantised[0], tree) if quantised else [False] * len(tree.paths)
    bits = [
        quantised[1] if quantised and it and not is_compound(a) else 0 for it, a in zip(held, tree.leaves, strict=True)
    ]
    share = lambda tree: sum(_held(a, a.sharding.spec, sizes) for a in jax.tree.leaves(tree))
    trainable = share(placed.trainable)
    wide = jnp.dtype(activations)
    traffic = [
        *_gathers(tree, bits, entries, placed, rows, sizes, passes, wide),
        *_gradients(placed, rows, sizes, sum(any(sizes[n] > 1 for n in _rules.mesh_axes(entry)) for entry in batch)),
        *_activations(tree, entries, placed, rows, sizes, tokens * wide.itemsize),
    ]
    return Estimate(
        base=sum(
            _held(part, part.sharding.spec, sizes, b)
            for a, b in zip(tree.leaves, bits, strict=True)
            for part in jax.tree.leaves(a)
        ),
        factors=share(placed.frozen.factors),
        trainable=trainable,
        optimizer=state,
        gradients=trainable,
        traffic=tuple(t for t in traffic if t.bytes),
    )


def _named(tree: _tree.Named) -> "zip[tuple[str, PyTree]]":
    return zip(tree.paths, tree.leaves, strict=True)


def _held(leaf: Shaped, spec: PartitionSpec, sizes: Mapping[str, int], bits: float = 0) -> int:
    """The bytes of a device's share."""
    whole = math.prod(leaf.shape) * bits / 8 if bits else _rules.bytes_of(leaf)
    return math.ceil(whole / math.prod(_rules.shards(entry, sizes) for entry in spec))


def _cut(spec: Iterable[MeshAxes], among: tuple[str, ...]) -> tuple[str, ...]:
    """The mesh axes of a spec that are among these."""
    return tuple(n for entry in spec for n in _rules.mesh_axes(entry) if n in among)


def _whole(site: Site) -> bool:
    """Whether W0 + dW is made before it meets anything: a vector, or a delta of the weight's own shape."""
    recipe, leaf = site.recipe, site.leaf
    vector = not leaf.axes("ik") or len(leaf.axes("iok")) < 2
    alone = bool(recipe.deltas) and recipe.gain is recipe.left is recipe.right is None
    return vector or alone and all(sum(map(bool, bound.labels)) == 1 for bound in _bound(site))


def _looked_up(path: str) -> bool:
    """Whether a leaf is a table, by Flax's name for one."""
    return path.endswith("embedding")


def _gathers(
    tree: _tree.Named,
    bits: list[float],
    entries: list[_rules.Entries],
    placed: Adapted,
    rows: tuple[str, ...],
    sizes: Mapping[str, int],
    passes: int,
    wide: DType,
) -> list[Traffic]:
    """What is sharded over the batch's axes is gathered to be used: matrices in every pass, other leaves once."""
    sent: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    for (path, a), roles, b in zip(_named(tree), roles_of(tree, placed.frozen.plan), bits, strict=True):
        again = passes if set("ik") & set(roles) else 1
        for part in jax.tree.leaves(a) if not _looked_up(path) else ():
            if cut := _cut(part.sharding.spec, rows):
                sent["base weights", cut] += again * _held(part, _rules.without(part.sharding.spec, rows), sizes, b)
    for site in placed.frozen.plan.sites if rows else ():
        kernel = entries[site.index]
        layers = tuple(kernel[n] for n in site.leaf.axes("s"))
        stack = math.prod(site.leaf.stack) // math.prod(
            _rules.shards(entry, sizes) for entry in _rules.without(layers, rows)
        )
        for shape, own, stacked in operands(site, kernel, sizes) if not _whole(site) else ():
            if cut := _cut((*(layers if stacked else ()), *own), rows):
                met = jax.ShapeDtypeStruct(shape, wide)
                sent["factors", cut] += passes * stack * _held(met, _rules.without(own, rows), sizes)
    return [Traffic("all-gather", what, over, size) for (what, over), size in sent.items()]


def _gradients(placed: Adapted, rows: tuple[str, ...], sizes: Mapping[str, int], times: int) -> list[Traffic]:
    """Factor gradients: each device has the sum over its own rows, and all devices need the sum over all rows.

    `times` is how many axes of a batch are sharded (batch and sequence): XLA sums over one after the other.
    """
    sent: collections.Counter[tuple[str, tuple[str, ...]]] = collections.Counter()
    # Where dW is added to the weight, the gradient arrives in the weight's dtype. A table is left out: there the rows
    # that are looked up are added.
    made = (site.leaf for site in placed.frozen.plan.sites if _whole(site) and not _looked_up(site.leaf.path))
    dtypes = {leaf.path: leaf.dtype for leaf in made}
    for group, factors in placed.trainable.items():
        for a in factors.values():
            spec, a = a.sharding.spec, a.update(dtype=dtypes.get(group, a.dtype))
            cut = _cut(spec, rows)
            others = tuple(n for n in rows if n not in cut)
            if not cut:
                sent["all-reduce", rows] += times * _held(a, spec, sizes)
                continue
            if not _looked_up(group):  # a table's rows move, and their gradients with them
                sent["reduce-scatter", cut] += _held(a, _rules.without(spec, rows), sizes)
            if others:
                sent["all-reduce", others] += _held(a, spec, sizes)
    return [Traffic(kind, "factor gradients", over, size) for (kind, over), size in sent.items() if over]


def _activations(
    tree: _tree.Named,
    entries: list[_rules.Entries],
    placed: Adapted,
    rows: tuple[str, ...],
    sizes: Mapping[str, int],
    token_bytes: int,
) -> list[Traffic]:
    """The sums over devices that a dot leaves where it contracts an axis that is cut."""
    others = tuple(n for n in sizes if n not in rows and sizes[n] > 1)
    local = token_bytes / math.prod(sizes[n] for n in rows)
    narrow = {site.leaf.path: sum(map(_width, _bound(site))) for site in placed.frozen.plan.sites}
    wide = thin = 0.0
    for (path, a), roles, spec in zip(_named(tree), roles_of(tree, placed.frozen.plan), entries, strict=True):
        if not set("ik") & set(roles):
            continue
        ways = [math.prod(sizes[x] for x in _cut(PartitionSpec(entry), others)) for entry in spec]
        side = _Side(a.shape, roles, ways)
        layers = side.share("s")
        if side.cut("ik"):  # the output
            wide += layers * local * side.share("o")
        if side.cut("o"):  # the input's gradient; ids that are looked up have none
            wide += layers * local * side.share("ik") * (not _looked_up(path))
        if side.cut("iko"):  # once for the output or the input's gradient, once for the factor's gradient
            thin += 2 * layers * local * narrow.get(path, 0)
    return [
        Traffic("all-reduce", "activations of the base", others, math.ceil(wide)),
        Traffic("all-reduce", "activations of the adapter", others, math.ceil(thin)),
    ]


@dataclasses.dataclass(frozen=True)
class _Side:
    """A weight by its letters, and into how many parts the mesh cuts each axis."""

    shape: tuple[int, ...]
    roles: str
    ways: list[int]

    def cut(self, letters: str) -> bool:
        """Whether an axis with one of these letters is cut."""
        return any(ways > 1 for role, ways in zip(self.roles, self.ways, strict=True) if role in letters)

    def share(self, letters: str) -> int:
        """The size of these axes on one device."""
        axes = zip(self.shape, self.roles, self.ways, strict=True)
        return math.prod(n // ways for n, role, ways in axes if role in letters)


def _bound(site: Site) -> list[_recipe.Bound]:
    return [_recipe.bind(delta, site.leaf) for delta in site.recipe.deltas]


def _width(bound: _recipe.Bound) -> int:
    """The size of the letters that stand on no side: what is left of an activation in the middle of a network."""
    sides = {x for side, made in bound.blocks for x in (*side, *made)}
    return sum(bound.sizes[x] for x in {x for labels in bound.labels for x in labels} - sides)
