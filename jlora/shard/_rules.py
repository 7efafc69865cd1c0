"""Where the base lives: PartitionSpecs from a tree, from rules over paths, or from the names transformers use."""

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jlora._trees import _table, _tree
from jlora._types import MeshAxes, PyTree

Entries: TypeAlias = tuple[MeshAxes, ...]
"""A PartitionSpec as long as the array has axes: for each None, a mesh axis, or a tuple of mesh axes."""

Sizes: TypeAlias = "Mapping[str, int] | None"
"""The sizes of the mesh axes; None where no mesh is given."""

# The sides of a transformer's weights are of three kinds: "embed", the width of the model; "wide", all heads together
# or the inside of the perceptron; "vocab", the vocabulary. A preset says over which mesh axis each kind is cut.
PRESETS = {"fsdp": {"embed": "fsdp"}, "tensor": {"wide": "tensor", "vocab": "tensor"}}

_STEP = r"(?:^|[/_.])"
# (pattern, (kind of the input side, kind of the output side)). A pattern is searched in the path with and without its
# last step; the first that is found counts. An empty kind is never cut.
_TABLE = tuple(
    (re.compile(pattern, re.IGNORECASE), sides)
    for pattern, sides in (
        (r"norm|(?:^|[/_])ln(?:_|\d|/|$)", ("", "")),
        (_STEP + r"(?:wpe|position_embeddings?|pos_embed\w*|token_type_embeddings?)$", ("", "embed")),
        (_STEP + r"(?:embed|embedding|embedder|embed_tokens|tok_embeddings|wte|shared|word_embeddings?)$",
         ("vocab", "embed")),
        (_STEP + r"(?:lm_head|output_head|logits\w*)$", ("embed", "vocab")),
        (_STEP + r"(?:o|out|o_proj|out_proj|c_proj|output/dense|attn_vec\w*|down|down_proj|wo|fc2|w2|dense_4h_to_h)$",
         ("wide", "embed")),
        (r"mlp\w*/dense_1$", ("wide", "embed")),
        (_STEP + r"(?:q|k|v|query|key|value|q_proj|k_proj|v_proj|qkv|kv|c_attn|query_key_value|qkv_proj|to_[qkv])$",
         ("embed", "wide")),
        (_STEP + r"(?:(?:up|gate|gate_up)(?:_proj)?|wi(?:_\d)?|fc1|c_fc|w[13]|intermediate/dense|dense_h_to_4h)$",
         ("embed", "wide")),
        (r"mlp\w*/dense_0$", ("embed", "wide")),
    )
)  # fmt: skip


def mesh_axes(entry: MeshAxes) -> tuple[str, ...]:
    """The mesh axes of one entry of a spec."""
    if entry is None:
        return ()
    return (entry,) if isinstance(entry, str) else tuple(entry)


def is_spec(x: object) -> bool:
    """Whether this is a PartitionSpec, which `jax.tree` takes for a tuple of its entries unless it is told."""
    return isinstance(x, PartitionSpec)


def shards(entry: MeshAxes, sizes: Mapping[str, int]) -> int:
    """Into how many parts an entry cuts an axis."""
    return math.prod(sizes[name] for name in mesh_axes(entry))


def to_spec(entries: Entries) -> PartitionSpec:
    """A spec without trailing Nones, so that equal placements are equal specs."""
    entries = tuple(entries)
    while entries and entries[-1] is None:
        entries = entries[:-1]
    return PartitionSpec(*entries)


def without(entries: Iterable[MeshAxes], gone: Collection[str]) -> PartitionSpec:
    """The spec that is left when an array is gathered over the mesh axes `gone`."""
    return PartitionSpec(*(tuple(n for n in mesh_axes(entry) if n not in gone) or None for entry in entries))


def sayable(place: NamedSharding) -> NamedSharding:
    """A place as `reshard` may be told it: without the mesh axes that are not explicit, which JAX refuses there."""
    kinds = zip(place.mesh.axis_names, place.mesh.axis_types, strict=True)
    return NamedSharding(place.mesh, without(place.spec, [n for n, kind in kinds if kind != AxisType.Explicit]))


def fitted(entries: Entries, shape: tuple[int, ...], sizes: Sizes) -> Entries:
    """The entries that JAX takes for this shape: without those that do not divide their axis; each mesh axis once."""
    used: set[str] = set()
    kept = []
    for entry, size in zip(entries, shape, strict=True):
        own = set(mesh_axes(entry))
        whole = sizes is None or size % shards(entry, sizes) == 0
        kept.append(entry if whole and not own & used else None)
        used |= own if kept[-1] is not None else set()
    return tuple(kept)


def bytes_of(leaf: PyTree) -> int:
    """The bytes of an array-like leaf, of a PRNG key too."""
    shape, dtype = _tree.shape_dtype(leaf)
    is_key = jnp.issubdtype(dtype, jax.dtypes.prng_key)
    return math.prod(shape) * (8 if is_key else jnp.dtype(dtype).itemsize)


def entries_of(tree: _tree.Named, roles: Sequence[str], given: PyTree, sizes: Sizes) -> list[Entries]:
    """The entries of every leaf of a base.

    Raises:
      ValueError: an unknown preset, a leaf without a spec, a spec with more entries than its leaf has axes, a mesh
        axis that the mesh has not, or that a spec has twice; for a preset, unknown leaves of over 1 % of the bytes.
    """
    if isinstance(given, str):  # a preset
        found: Sequence[PyTree] = _preset(tree, roles, given)
    elif _is_rules(given):
        found = [next((s for p, s in given if _tree.matches(p, path)), PartitionSpec()) for path in tree.paths]
        idle = [p for p, _ in given if not any(_tree.matches(p, path) for path in tree.paths)]
        if idle:
            near = ", ".join(_tree.nearest(idle[0], tree.paths))
            raise ValueError(f"these rules match no leaf: {idle}; the nearest paths to the first are {near}")
    else:
        found = _from_tree(tree, given)
    entries, bad = [], []
    for path, leaf, spec in zip(tree.paths, tree.leaves, found, strict=True):
        shape, _ = _tree.shape_dtype(leaf)
        if not isinstance(spec, (tuple, PartitionSpec)):
            bad.append(f"{path!r}: {spec!r} is no PartitionSpec")
            continue
        own = tuple(spec)
        strange = [e for e in own if not isinstance(e, (str, tuple, type(None))) or {*map(type, mesh_axes(e))} - {str}]
        every = [n for e in own if not strange for n in mesh_axes(e)]
        unknown = sorted({n for n in every if sizes is not None and n not in sizes})
        twice = sorted({n for n in every if every.count(n) > 1})
        if len(own) > len(shape):
            bad.append(f"{path!r} of shape {shape} has the spec {spec}, with more entries than axes")
        elif strange:
            bad.append(f"{path!r}: {spec} has an entry that is neither a mesh axis nor None")
        elif unknown:
            bad.append(
                f"{path!r}: {spec} names {unknown}, and the mesh has {sorted(sizes or ())}; logical names are turned "
                "into mesh axes first (nn.logical_to_mesh)"
            )
        elif twice:
            bad.append(f"{path!r}: {spec} has {twice} more than once; a mesh axis cuts one axis of an array")
        else:
            entries.append(fitted(own + (None,) * (len(shape) - len(own)), shape, sizes))
    if bad:
        more = f"\n  and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise ValueError("these specs do not fit the base:\n  " + "\n  ".join(bad[:8]) + more)
    return entries


def _is_rules(given: object) -> bool:
    pair = lambda x: isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str)
    return isinstance(given, Sequence) and not isinstance(given, PartitionSpec) and all(map(pair, given))


def _from_tree(tree: _tree.Named, given: PyTree) -> list[PartitionSpec]:
    """Specs matched by path, so that it does not matter which of the two trees has boxes.

    A spec above several leaves is for all of them.
    """
    specs = _tree.flatten(given)
    at = dict(zip(specs.paths, specs.leaves, strict=True))
    strange = [f"{type(spec).__name__} at {path!r}" for path, spec in at.items() if not isinstance(spec, PartitionSpec)]
    if strange:
        more = f" and {len(strange) - 5} more" if len(strange) > 5 else ""
        raise ValueError(
            f"base_specs holds {', '.join(strange[:5])}{more}, not PartitionSpecs; of a tree with boxes, "
            "nn.get_partition_spec(params) or nnx.get_partition_spec(state) makes one; rules are [(pattern, spec), ...]"
        )

    def above(path: str) -> PartitionSpec | None:
        steps = path.split("/")
        tries = ("/".join(steps[:n]) for n in range(len(steps), -1, -1))
        return next((at[p] for p in tries if p in at), None)

    found = [above(path) for path in tree.paths]
    missing = [path for path, spec in zip(tree.paths, found, strict=True) if spec is None]
    if missing:
        raise ValueError(f"base_specs says nothing of {missing[:5]}, {len(missing)} leaves in all; write P() for them")
    return [spec for spec in found if spec is not None]


def _preset(tree: _tree.Named, roles: Sequence[str], preset: str) -> list[PartitionSpec]:
    """Specs by the names of `_TABLE`. Leaves of no known name are replicated, and printed."""
    wanted = preset.split("+")
    if not set(wanted) <= set(PRESETS):
        raise ValueError(f"base_specs={preset!r}: the presets are {', '.join(map(repr, PRESETS))} and 'fsdp+tensor'")
    axis = {kind: name for part in wanted for kind, name in PRESETS[part].items()}
    letters = dict(zip(tree.paths, roles, strict=True))
    specs, unknown = [], []
    for path, leaf in zip(tree.paths, tree.leaves, strict=True):
        owner, _, _ = path.rpartition("/")
        known = [sides for pattern, sides in _TABLE if pattern.search(owner) or pattern.search(path)]
        ndim = len(_tree.shape_dtype(leaf)[0])
        if ndim and not known:
            unknown.append((path, leaf))
        into, out = known[0] if known else ("", "")
        own = _own_roles(path, letters, ndim)
        entries: list[MeshAxes] = [None] * ndim
        is_matrix = bool(set(own) & set("ik"))
        if "i" in own:
            entries[own.index("i")] = axis.get(into)
        # of vectors, only those that are added to or scale a wide output are cut, as that output is; others are small
        if "o" in own and (is_matrix or out == "wide"):
            entries[own.index("o")] = axis.get(out)
        specs.append(to_spec(tuple(entries)))
    _report(tree, unknown, preset)
    return specs


def _own_roles(path: str, letters: Mapping[str, str], ndim: int) -> str:
    """The letters of a leaf; a bias has those of the kernel beside it, its shape cannot tell layers from outputs."""
    owner, _, name = path.rpartition("/")
    beside = letters.get(f"{owner}/kernel", "") if name != "kernel" else ""
    of_bias = "".join(role for role in beside if role in "so")
    return of_bias if len(of_bias) == ndim else letters[path]


def _report(tree: _tree.Named, unknown: Sequence[tuple[str, PyTree]], preset: str) -> None:
    total = sum(map(bytes_of, tree.leaves))
    size = sum(bytes_of(leaf) for _, leaf in unknown)
    if not unknown:
        return
    rows = _table.fold([(path, (_tree.shape_dtype(leaf)[0],)) for path, leaf in unknown])
    listed = [f"{path} {shape}" + (f" (x{n})" if n > 1 else "") for path, n, (shape,) in rows]
    if size > total / 100:
        raise ValueError(
            f"{preset!r} does not know {100 * size / total:.1f} % of the base's bytes, more than 1 %:\n  "
            + "\n  ".join(listed[:8])
            + "\nwrite rules instead, [(pattern, PartitionSpec), ...]; they too leave the rest replicated"
        )
    for line in listed:
        print(f"jlora.shard: {preset!r} does not know {line}: replicated")
