"""Where factors live, derived from the equations alone."""

from collections.abc import Iterator, Mapping

import jax
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jlora import _answers
from jlora._algebra import _recipe, _words
from jlora._algebra._recipe import Bound
from jlora._plan import _sites
from jlora._plan._sites import Plan, Site
from jlora._trees import _axes, _tree
from jlora._trees._compound import is_compound
from jlora._types import AnyMesh, MeshAxes, Place, PyTree
from jlora.adapted import Adapted, Frozen, check_adapted, is_adapted
from jlora.shard import _rules
from jlora.shard._rules import Entries, Sizes


def partition_specs(adapted: PyTree, base_specs: PyTree, mesh: AnyMesh | None = None) -> PyTree:
    """A PartitionSpec for every array of an `Adapted`, in its structure.

    The base's are given; the factors' follow from the equations. An axis of a factor that stands for an axis of the
    kernel (`I`, `O`, a window, a stack axis) is sharded as that one is. Ranks and other letters of a method's own are
    replicated, and so are scales. Of a side in parentheses, `(i j)`, the slow letter takes the side's sharding where
    it divides. A factor that several weights share is sharded where all of them agree. Gains, L and R follow the
    same rule.

    Args:
      adapted: an `Adapted`, of arrays or abstract; or plain parameters.
      base_specs: where the base lives:
        a tree of PartitionSpecs, matched by path (one above several leaves is for all of them), such as
        `nn.get_partition_spec(params)` or `nnx.get_partition_spec(state)` gives, in the names of the mesh's axes;
        rules, `[(pattern, spec), ...]`, of which the first whose pattern is found in a path counts, and what no
        pattern takes is replicated;
        or a preset for the names that transformers use: `"fsdp"` (the model's width over a mesh axis of that name),
        `"tensor"` (heads, the perceptron's width and the vocabulary), `"fsdp+tensor"`. Leaves of unknown names are
        replicated and printed.
      mesh: a `Mesh` or `AbstractMesh`. With it, an axis that its mesh axes do not divide is replicated; without it
        the sizes are not known, and a slow letter is replicated too.

    Returns:
      PartitionSpecs in the structure of `adapted`.

    Raises:
      ValueError: specs that do not fit the base, all at once; rules that match nothing; a preset that does not know
        more than 1 % of the base's bytes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> specs = jlora.shard.partition_specs(adapted, [("kernel$", P("fsdp", "tensor"))])
      >>> specs.trainable["query/kernel"]
      {'a': P(None, 'fsdp'), 'b': P(None, 'tensor')}
    """
    if mesh is not None:
        check_mesh("shard.partition_specs", mesh)
    if not is_adapted(adapted):
        _answers.check_params("shard.partition_specs", adapted)
        bare = Adapted({}, Frozen(adapted, {}, None, _sites.intern((), (), ())))
        return partition_specs(bare, base_specs, mesh).frozen.base
    frozen = adapted.frozen
    sizes = None if mesh is None else dict(mesh.shape)
    tree = _tree.flatten(frozen.base)
    entries = _rules.entries_of(tree, roles_of(tree, frozen.plan), base_specs, sizes)
    of_factors = {place: _rules.to_spec(own) for place, own in _factors(frozen.plan, entries, sizes).items()}
    at = lambda path, _: of_factors[path[-2].key, path[-1].key]
    held = [_of_leaf(leaf, own, sizes) for leaf, own in zip(tree.leaves, entries, strict=True)]
    base = jax.tree.unflatten(tree.treedef, held)
    factors = jax.tree_util.tree_map_with_path(at, frozen.factors)
    key = None if frozen.key is None else PartitionSpec()
    trainable = jax.tree_util.tree_map_with_path(at, adapted.trainable)
    gates = jax.tree.map(lambda _: PartitionSpec(), frozen.gates)
    return Adapted(trainable, Frozen(base, factors, key, frozen.plan, gates))


def _of_leaf(leaf: PyTree, kernel: Entries, sizes: Sizes) -> PyTree:
    """The spec of a leaf; of a quantised weight one for each array, by the axes of the weight that it stands for."""
    if not is_compound(leaf):
        return _rules.to_spec(kernel)
    arrays, treedef = jax.tree.flatten(leaf)
    own = [tuple(None if n is None else kernel[n] for n in axes) for axes in leaf.axes()]
    fit = [_rules.fitted(entries, tuple(a.shape), sizes) for entries, a in zip(own, arrays, strict=True)]
    return treedef.unflatten([_rules.to_spec(entries) for entries in fit])


def roles_of(tree: _tree.Named, plan: Plan) -> list[str]:
    """The letters of every leaf: the plan's where it is adapted, else what the tree says, else likely ones."""
    known = {site.index: site.leaf.roles for site in plan.sites}
    roles = _axes.Roles(tree)
    return [known.get(n) or roles.likely(n) for n in range(len(tree.leaves))]


def _factors(plan: Plan, base: list[Entries], sizes: Sizes) -> dict[Place, Entries]:
    """The entries of every stored array; of a shared one, those that all its weights give it."""
    found: dict[Place, Entries] = {}
    for site in plan.sites:
        for place, own in _of_site(site, base[site.index], sizes).items():
            agreed = tuple(a if a == b else None for a, b in zip(found.get(place, own), own, strict=True))
            found[place] = agreed
    return found


def _of_site(site: Site, kernel: Entries, sizes: Sizes) -> dict[Place, Entries]:
    leaf, found = site.leaf, {}
    stack = [kernel[n] for n in leaf.axes("s")]
    stored = site.recipe.arrays(leaf)

    def put(array: _words.Array, own: list[MeshAxes]) -> None:
        place = (array.group or leaf.path, array.name)
        entries = (stack if array.stacked else []) + own
        # The first entries stay. Equations come before the functions that read their factors, and say of which axis of
        # the weight each axis of a factor is; a function only says sizes.
        found.setdefault(place, _rules.fitted(tuple(entries), stored[place][1], sizes))

    for bound in site.recipe.bound(leaf):
        entry = _letters(bound, dict(zip(_recipe.atoms(leaf), kernel, strict=True)), sizes)
        for word, labels in bound.words:
            want = bound.shape(labels)
            for array in word.arrays:
                shape = want if array.shape is None else array.shape
                # An array inside a function has no labels of its own. Where it has the shape of what the function
                # makes, it is cut as that is; an axis of another size is replicated.
                like = len(shape) == len(labels)
                own = [entry.get(labels[n]) if like and want[n] == size else None for n, size in enumerate(shape)]
                put(array, own)
        if bound.delta in site.recipe.scaled(leaf):
            put(_words.scale_of(bound.delta), [])
    for array in (array for step in site.recipe.steps for array in step.arrays):
        put(array, [None] * len(array.shape or ()))  # narrow, and met by whole outputs
    return found


def operands(site: Site, kernel: Entries, sizes: Mapping[str, int]) -> Iterator[tuple[tuple[int, ...], Entries, bool]]:
    """For every operand of a weight: its shape in one layer, its entries, and whether it has stack axes too.

    Of a function it is what the function makes, as that meets the weight.
    """
    atoms = dict(zip(_recipe.atoms(site.leaf), kernel, strict=True))
    for bound in site.recipe.bound(site.leaf):
        entry = _letters(bound, atoms, sizes)
        for word, labels in bound.words:
            if not isinstance(word, _words.Base):
                shape, stacked = bound.shape(labels), any(a.stacked for a in word.arrays)
                yield shape, _rules.fitted(tuple(entry.get(x) for x in labels), shape, sizes), stacked


def _letters(bound: Bound, atoms: dict[str, MeshAxes], sizes: Sizes) -> dict[str, MeshAxes]:
    """The entry of every letter of an equation.

    A letter that is an axis of the kernel has that axis's entry. Of a side that the equation writes flat, `(i j)`, the
    first letter is the slow one. Where only the first axis of the side is cut, flattening it leaves each device one
    run of rows, and cutting the slow letter gives the same runs. Then it has that axis's entry; no other letter has.
    """
    entry = dict(atoms)
    for side, made in bound.blocks:
        if side != made and sizes is not None:
            first, *rest = (atoms[a] for a in side)
            entry[made[0]] = first if not any(rest) else None
    return entry


def shardings(mesh: AnyMesh, adapted: PyTree, base_specs: PyTree) -> PyTree:
    """`partition_specs` as NamedShardings of a mesh: for `jax.device_put`, `jit` and Orbax.

    Args:
      mesh: a `Mesh`, with automatic or explicit axes, or an `AbstractMesh`.
      adapted: an `Adapted`, of arrays or abstract; or plain parameters.
      base_specs: as for `partition_specs`.

    Returns:
      NamedShardings in the structure of `adapted`.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> from jax.sharding import PartitionSpec as P
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> adapted = jax.device_put(adapted, jlora.shard.shardings(mesh, adapted, "fsdp"))
      >>> adapted.trainable["query/kernel"]["a"].sharding.spec
      P(None, 'fsdp')
    """
    check_mesh("shard.shardings", mesh)
    specs = partition_specs(adapted, base_specs, mesh)
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs, is_leaf=_rules.is_spec)


def check_mesh(caller: str, mesh: object) -> None:
    """Raises TypeError unless `mesh` has named axes with sizes."""
    if not isinstance(mesh, (Mesh, AbstractMesh)):
        raise TypeError(
            f"{caller} takes a mesh, such as jax.make_mesh((8,), ('fsdp',)), as its mesh, not {_answers.kind(mesh)}"
        )


def abstract(mesh: AnyMesh, adapted: PyTree, base_specs: PyTree) -> PyTree:
    """The same tree as ShapeDtypeStructs with shardings: what Orbax restores into, and `jit(...).lower` compiles for.

    Args:
      mesh: as for `shardings`.
      adapted: an `Adapted`, of arrays or abstract; or plain parameters.
      base_specs: as for `partition_specs`.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> params = {"query": {"kernel": jax.ShapeDtypeStruct((6, 4), jnp.bfloat16)}}
      >>> jlora.shard.abstract(mesh, params, "fsdp")["query"]["kernel"].sharding.spec
      P('fsdp',)
    """
    struct = lambda a, place: jax.ShapeDtypeStruct(*_tree.shape_dtype(a), sharding=place)
    return jax.tree.map(struct, adapted, shardings(mesh, adapted, base_specs))


def state_shardings(tx: optax.GradientTransformation, adapted: Adapted) -> PyTree:
    """The shardings of `tx.init(adapted.trainable)`.

    A leaf that stands at the path of a factor and has its shape (a moment, a running mean) lives where the factor
    lives; all others, counters and factored moments, are replicated. What `optim.offload` keeps on the host is said
    to live there.

    Args:
      tx: an optax transformation.
      adapted: an `Adapted` on a mesh: arrays, or what `abstract` makes.

    Returns:
      NamedShardings in the structure of the state.

    Raises:
      TypeError: `adapted` is no `Adapted`.
      ValueError: a factor that is on no mesh.

    Example:
      >>> import jax, jax.numpy as jnp, jlora, optax
      >>> mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2))
      >>> adapted = jlora.shard.abstract(mesh, adapted, "fsdp")
      >>> places = jlora.shard.state_shardings(optax.adam(1e-3), adapted)
      >>> places[0].mu["query/kernel"]["a"].spec, places[0].count.spec
      (P(None, 'fsdp'), P())
    """
    check_adapted("shard.state_shardings", adapted)
    _answers.check_optimizer("shard.state_shardings", tx)
    everywhere = NamedSharding(mesh_of(adapted), PartitionSpec())
    leaves = jax.tree_util.tree_leaves_with_path(adapted.trainable)
    known = {(path, tuple(a.shape)): a.sharding for path, a in leaves}
    at = lambda path, a: known.get((path[-2:], tuple(a.shape)), everywhere)  # paths end in a group and a factor
    traced = jax.jit(tx.init).trace(adapted.trainable)
    places = jax.tree_util.tree_map_with_path(at, traced.out_info)
    # `out_info` does not say in which memory an array lives. The types of the traced program do.
    host = iter([x.memory_space is jax.memory.Space.Host for x in traced.jaxpr.out_avals])
    return jax.tree.map(lambda place: place.with_memory_kind("pinned_host") if next(host) else place, places)


def named_shardings(tree: PyTree) -> PyTree:
    """The NamedSharding of every array of a tree.

    Raises:
      ValueError: arrays that are on no mesh, all at once.
    """
    bad = [
        f"{jax.tree_util.keystr(path)} of shape {_tree.shape_dtype(leaf)[0]}"
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        if not isinstance(getattr(leaf, "sharding", None), NamedSharding)
    ]
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ValueError(
            f"{', '.join(bad[:5])}{more} are on no mesh; write adapted = jax.device_put(adapted, "
            "jlora.shard.shardings(mesh, adapted, base_specs)), or make it there with jlora.shard.init"
        )
    return jax.tree.map(lambda a: a.sharding, tree)


def mesh_of(tree: PyTree) -> AnyMesh:
    """The one mesh that a tree lives on."""
    meshes = {leaf.mesh for leaf in jax.tree.leaves(named_shardings(tree))}
    if len(meshes) != 1:
        raise ValueError(f"these arrays live on {len(meshes)} meshes, not on one: {list(meshes)[:3]}")
    return meshes.pop()
