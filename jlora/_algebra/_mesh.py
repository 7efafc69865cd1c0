"""Arrays on meshes: where they live, and how one is put where another is."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
from jax import lax
from jax.sharding import AbstractMesh, AxisType, NamedSharding, PartitionSpec

from jlora._algebra._words import Labels
from jlora._trees._compound import is_compound
from jlora._types import AnyMesh, MeshAxes, Shaped, Value


def varying(array: Shaped) -> frozenset[str]:
    """The manual mesh axes that an array varies over inside shard_map."""
    kind = jax.typeof(array)
    manual = getattr(kind, "manual_axis_type", None)
    return getattr(kind, "vma", frozenset()) if manual is None else manual.varying


def explicit_mesh(arrays: Sequence[Shaped]) -> AbstractMesh | None:
    """The mesh with explicit axes that some array lives on, or None."""
    for a in arrays:
        mesh = jax.typeof(a).sharding.mesh
        if not mesh.empty and AxisType.Explicit in mesh.axis_types:
            return mesh
    return None


def typed(base: Value) -> Value | jax.ShapeDtypeStruct:
    """What a trace is to see of a weight: of one that is several arrays its shape, dtype and, where their mesh has
    explicit axes, how it is cut.
    """
    if not is_compound(base):
        return base
    mesh = explicit_mesh(jax.tree.leaves(base))
    at = None if mesh is None else NamedSharding(mesh, PartitionSpec(*base.spec()))
    return jax.ShapeDtypeStruct(base.shape, base.dtype, sharding=at)


def on_several_devices(arrays: Sequence[Shaped]) -> bool:
    """Whether some array is known to live on a mesh of several devices, cut or not."""
    meshes = [jax.typeof(a).sharding.mesh for a in arrays]
    return any(mesh.shape[name] > 1 for mesh in meshes for name in mesh.axis_names if name not in mesh.manual_axes)


def specs_of(arrays: Sequence[Shaped], labels: Sequence[Labels]) -> dict[str, MeshAxes]:
    """The mesh axes of each label, the first operand that shards it counting."""
    specs: dict[str, MeshAxes] = {}
    for a, ls in zip(arrays, labels, strict=True):
        spec = jax.typeof(a).sharding.spec
        for x, axis in zip(ls, spec, strict=False):
            if axis is not None:
                specs.setdefault(x, axis)
    return specs


def sharding_of(mesh: AnyMesh, specs: Mapping[str, MeshAxes], labels: Labels) -> NamedSharding:
    used: set[str | None] = set()
    axes = []
    for x in labels:
        axis = specs.get(x)
        names = set(axis) if isinstance(axis, tuple) else {axis} - {None}
        axes.append(None if names & used else axis)
        used |= names
    return NamedSharding(mesh, PartitionSpec(*axes))


def settled(a: jax.Array, sharding: NamedSharding) -> jax.Array:
    """An array of an explicit mesh, moved where it does not live there yet; one of no mesh stays."""
    at = jax.typeof(a).sharding
    return a if at == sharding or at.mesh.empty else jax.sharding.reshard(a, sharding)


def placed(a: jax.Array, labels: Labels, entry: Mapping[str, MeshAxes], mesh: AnyMesh) -> jax.Array:
    """An array of an explicit mesh, its axes of these labels moved where `entry` says; others stay, where they can."""
    own = (*labels, *(f" {n}" for n in range(len(labels), a.ndim)))
    known = dict(zip(own, (*jax.typeof(a).sharding.spec, *[None] * a.ndim), strict=False))
    return settled(a, sharding_of(mesh, known | {x: entry[x] for x in labels if x in entry}, own))


def automatic(f: Callable[..., jax.Array], arrays: Sequence[jax.Array], spec: PartitionSpec | None = None) -> jax.Array:
    """`f(*arrays)`; of a mesh with explicit axes, whose rules know no gather from a table, XLA places what `f` does.

    The result lives where `spec` says; by default where the first array does.
    """
    mesh = explicit_mesh(arrays)
    if mesh is None:
        return f(*arrays)
    at: NamedSharding = jax.typeof(arrays[0]).sharding if spec is None else NamedSharding(mesh, spec)
    inside = cast(Callable[..., jax.Array], jax.sharding.auto_axes(f, out_sharding=at))
    return inside(*arrays)


def reshaped(a: jax.Array, shape: Sequence[int]) -> jax.Array:
    """`a` in another shape; of an explicit mesh, cut afterwards where it can be, for JAX asks where it is to live.

    Axes that stay keep their cut. Of axes that become others together, the first one's cut, which is into runs of what
    they hold, becomes that of the first of the others where the size divides; any other is gathered.
    """
    shape = tuple(shape)
    mesh = explicit_mesh([a])
    if a.shape == shape or mesh is None:
        return a if a.shape == shape else a.reshape(shape)
    old: list[MeshAxes] = [None] * a.ndim
    new: list[MeshAxes] = [None] * len(shape)
    entries: tuple[MeshAxes, ...] = (*jax.typeof(a).sharding.spec, *old)
    for before, after in _together(a.shape, shape) if 0 not in shape else ():
        entry = entries[before[0]]
        names = entry if isinstance(entry, tuple) else (entry,) if entry is not None else ()
        if shape[after[0]] % math.prod(mesh.shape[name] for name in names) == 0:
            old[before[0]] = new[after[0]] = entry
    a = settled(a, NamedSharding(mesh, PartitionSpec(*old)))
    return lax.reshape(a, shape, out_sharding=NamedSharding(mesh, PartitionSpec(*new)))


def _together(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The axes of a reshape in the shortest runs that hold equally much before and after; axes of size one are none."""
    rest, todo = ([n for n, size in enumerate(shape) if size != 1] for shape in (old, new))
    runs = list[tuple[list[int], list[int]]]()
    while rest:
        before, after = [rest.pop(0)], [todo.pop(0)]
        held, made = old[before[0]], new[after[0]]
        while held != made:
            if held < made:
                before.append(rest.pop(0))
                held *= old[before[-1]]
            else:
                after.append(todo.pop(0))
                made *= new[after[-1]]
        runs.append((before, after))
    return runs
