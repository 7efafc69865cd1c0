"""A quantised base through Orbax, so that it is quantised once.

A folder with an Orbax checkpoint of the arrays and `jlora_base.json`, which says how each leaf reads them.
"""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import jax
import numpy as np

from jlora._trees import _tree
from jlora._trees._compound import is_compound, sound
from jlora._types import AnyPath, PyTree, Shaped
from jlora.adapted import is_adapted
from jlora.io import _arrays, _folder, _record, _store
from jlora.io._manifest import FACTOR
from jlora.io._record import Content, Schema, several
from jlora.quant import NF, Int
from jlora.quant._layout import Layout
from jlora.quant._leaf import Codec, Quantized

_SCHEMES = {"NF": NF, "Int": Int}

#: What the manifest says of a leaf, of how it is quantised, and of the scheme and layout in there.
_LEAF: Schema = {"quantised": Content | None, "arrays": dict[str, Content]}
_HOW: Schema = {"scheme": Content, "layout": Content, "dtype": str, "kernel": str}
_SCHEME: Schema = {"kind": str, "bits": int, "block": int | None, "double": bool}
_LAYOUT: Schema = {
    "shape": tuple[int, ...],
    "order": tuple[int, ...],
    "block": tuple[int, ...],
    "pack": int,
    "flat": bool,
}


@dataclasses.dataclass(frozen=True)
class _Described:
    """A leaf before its arrays are read: what the manifest says of each, and how they are a weight."""

    records: Mapping[str, Content]
    codec: Codec | None
    kernel: str

    def leaf(self, arrays: Mapping[str, PyTree]) -> PyTree:
        if self.codec is None:
            return arrays[""]
        return Quantized(tuple(arrays[name] for name in self.codec.arrays), self.codec, self.kernel)

    def abstract(self) -> Shaped:
        """The leaf without values."""
        of = lambda r: (
            r["shape"] if r["key"] is None else r["shape"][:-1]
        )  # of a PRNG key the data is stored, which has one axis more
        return self.leaf({n: jax.ShapeDtypeStruct(of(r), np.uint8) for n, r in self.records.items()})


def _check(content: Content) -> Content:
    described = {path: _read_leaf(leaf, f"{path!r:.200}") for path, leaf in content["leaves"].items()}
    return {**content, "leaves": described}


_FIELDS: Schema = {"format": int, "leaves": dict[str, Content]}
_FORM = _record.Form(
    "jlora_base.json",
    1,
    {**_FIELDS, "data": str | None, "files": dict[str, tuple[int, str]]},
    _record.line,
    _check,
    older=_FIELDS,
)
_STORE = _store.Store(_FORM, "base", "quantised base", "jlora.io.quantised.load", before="arrays")


# --- save ---------------------------------------------------------------------------------------------------------


def save(path: AnyPath, params: PyTree, *, overwrite: bool = False) -> None:
    """Saves a tree with quantised leaves: codes and scales as they are, other leaves as arrays.

    The folder appears, or changes, in one step: a save that is interrupted leaves what was there before readable.

    Args:
      path: a local folder; its parents are made.
      params: a pytree of arrays and quantised leaves; an adapter's is `adapted.frozen.base`.
      overwrite: replace a base that this function wrote. Other files of the folder stay.

    Raises:
      FileExistsError: the path exists (with `overwrite`: and holds no quantised base).
      TypeError: an `Adapted`, whose adapter would be lost; quantised leaves that were cast.
      ValueError: leaves that Orbax cannot store, or none.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> small = jlora.quantize({"query": {"kernel": jnp.ones((128, 4))}})
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.io.quantised.save(folder + "/base", small)
      ...     jlora.io.quantised.load(folder + "/base")
      {'query': {'kernel': Quantized((128, 4), float32, nf4)}}
    """
    if is_adapted(params):
        raise TypeError("save the base, adapted.frozen.base, here, and the adapter with jlora.save")
    target = _STORE.place(path, overwrite)
    tree = _tree.flatten(params)
    if not tree.leaves:
        raise ValueError("this tree has no leaves to save")
    sound(zip(tree.paths, tree.leaves, strict=True))
    arrays, leaves = {}, {}
    for leaf_path, leaf in zip(tree.paths, tree.leaves, strict=True):
        packed = cast(Quantized, leaf) if is_compound(leaf) else None
        how = described(packed.codec, packed.kernel) if packed is not None else None
        parts = packed.arrays if packed is not None else {"": leaf}
        records = {}
        for name, part in parts.items():
            place = _arrays.stored_name("base", leaf_path, name)
            array, records[name] = _arrays.as_stored(part, f"{leaf_path!r} {name}".strip())
            if array.size:
                arrays[place] = array
        leaves[leaf_path] = {"quantised": how, "arrays": records}
    _STORE.save(target, arrays, {"leaves": leaves})


def described(codec: Codec, kernel: str) -> Content:
    """The static part of a quantised leaf, for JSON."""
    scheme = {"kind": type(codec.scheme).__name__, **dataclasses.asdict(codec.scheme)}
    return {"scheme": scheme, "layout": dataclasses.asdict(codec.layout), "dtype": codec.dtype, "kernel": kernel}


# --- load ---------------------------------------------------------------------------------------------------------


def load(path: AnyPath, like: PyTree = None) -> PyTree:
    """What `save` saved, bit for bit.

    Args:
      path: the folder.
      like: a tree of the structure to give back, arrays or `ShapeDtypeStruct`s in the place of leaves, or leaves
        quantised alike; nested dictionaries under the paths' names by default.

    Raises:
      FileNotFoundError: nothing at the path.
      ValueError: a folder that is none of these, is damaged, is of a newer format, or has other leaves than `like`.
    """
    folder = _STORE.find(path)
    if not _STORE.is_here(folder):
        _folder.check_kind(folder, _FORM.name)
        raise ValueError(f"{folder} holds no {_FORM.name}, so jlora.io.quantised.save did not make it")
    return _STORE.open(folder, lambda content, size: _open(folder, content, size, like))


def _open(folder: Path, content: Content, size: int, like: PyTree) -> PyTree:
    """The tree of a manifest, whose files have so many bytes."""
    leaves: dict[str, _Described] = content["leaves"]
    tree = None if like is None else _tree.flatten(like)
    if tree is not None:
        _check_like({path: leaf.abstract() for path, leaf in leaves.items()}, tree, folder)
    records = {
        _arrays.stored_name("base", where, name): record
        for where, leaf in leaves.items()
        for name, record in leaf.records.items()
    }
    elements = sum(math.prod(_tree.shape_dtype(leaf)[0]) for leaf in tree.leaves) if tree is not None else 0
    _store.check_size([r["shape"] for r in records.values()], elements, size, str(folder))
    want = {name: record for name, record in records.items() if 0 not in record["shape"]}
    if content["data"] is None and want:
        raise ValueError(f"{folder} is cut short: the arrays {next(iter(want))!r:.200} and more are missing")
    stored = _arrays.restore(folder / content["data"], want) if content["data"] is not None else {}
    made = {}
    for where, leaf in leaves.items():
        arrays = {}
        for name, record in leaf.records.items():
            place = _arrays.stored_name("base", where, name)
            arrays[name] = _arrays.rebuild(stored.get(place), record, f"{folder}: {where!r} {name}".rstrip())
        made[where] = leaf.leaf(arrays)
    if tree is None:
        return _nested(made, folder)
    return jax.tree.unflatten(tree.treedef, [made[p] for p in tree.paths])


def _check_like(made: Mapping[str, Shaped], tree: _tree.Named, folder: Path) -> None:
    paths = set(tree.paths)
    bad = [f"{p!r} is not in the file" for p in tree.paths if p not in made]
    bad += [f"{p!r} is in the file alone" for p in made if p not in paths]
    for p, leaf in zip(tree.paths, tree.leaves, strict=True):
        if p in made and _tree.shape_dtype(leaf)[0] != tuple(made[p].shape):
            bad.append(f"{p!r} has shape {tuple(made[p].shape)} in the file, {_tree.shape_dtype(leaf)[0]} here")
        elif p in made and is_compound(leaf) and _named(leaf) != _named(made[p]):
            bad.append(f"{p!r} is {_named(made[p])} in the file, {_named(leaf)} here")
    if bad:
        raise ValueError(f"{folder} is not a base of this structure:" + several(bad))


def _named(leaf: object) -> str:
    """How a leaf is held, in a word."""
    return leaf.describe() if is_compound(leaf) else "an array"


def _read_leaf(leaf: Content, where: str) -> _Described:
    """What a manifest says of a leaf, held against what quantising gives; TypeError in words."""
    leaf = _record.record(leaf, _LEAF, where)
    records = {n: _record.record(r, FACTOR, f"{n!r:.60} of {where}") for n, r in leaf["arrays"].items()}
    how = leaf["quantised"]
    for name, record in records.items():
        if not all(0 <= n < 2**63 for n in record["shape"]) or how is not None and record["key"] is not None:
            raise TypeError(f"{name!r:.60} of {where} is no array of shape {str(record['shape']):.60}")
    if how is None:
        if set(records) != {""}:
            raise TypeError(f"{where} is no one array")
        return _Described(records, None, "")
    codec, kernel = static(how, where)
    if set(codec.arrays) != set(records):
        raise TypeError(f"{where} is not described as quantising describes it")
    stacks = set()
    for name, (shape, dtype) in codec.arrays.items():
        has = records[name]["shape"]
        stacks.add(has[: len(has) - len(shape)])
        if has[len(has) - len(shape) :] != shape or records[name]["dtype"] != dtype.name:
            raise TypeError(f"{name} of {where} is not of the shape and dtype that its codes have")
    if len(stacks) > 1:
        raise TypeError(f"the arrays of {where} are stacked in unlike ways")
    return _Described(records, codec, kernel)


def static(how: Content, where: str) -> tuple[Codec, str]:
    """What `described` wrote, held against what quantising gives; TypeError in words."""
    how = _record.record(how, _HOW, where)
    scheme, fields = _record.record(how["scheme"], _SCHEME, where), _record.record(how["layout"], _LAYOUT, where)
    layout, kind = Layout(**fields), scheme.pop("kind")
    sizes, flat = layout.axes, layout.flat
    fits = (
        kind in _SCHEMES
        and all(0 <= n < 2**63 for n in layout.shape)
        and sorted(layout.order) == list(range(len(layout.shape)))
        and len(layout.block) == len(sizes)
        and 0 <= layout.pack < len(sizes)
        # only a weight that is one run may end in a partial block; the elements that fill it are made as well
        and all(b > 0 and (b < n + 2**20 if flat else n % b == 0) for n, b in zip(sizes, layout.block, strict=True))
        and set(how["kernel"]) <= set("iosk")
        and len(how["kernel"].replace("s", "")) == len(layout.shape)
    )
    try:
        codec = Codec(_SCHEMES[kind](**scheme), layout, _arrays.floating(how["dtype"], where)) if fits else None
    except (TypeError, ValueError) as error:
        raise TypeError(f"{where}: {str(error)[:200]}") from None
    if codec is None:
        raise TypeError(f"{where} is not described as quantising describes it")
    return codec, how["kernel"]


def _nested(made: dict[str, PyTree], folder: Path) -> PyTree:
    plain: dict[str, PyTree] = {}
    for path, leaf in made.items():
        *parents, last = (s.replace("%2F", "/").replace("%25", "%") for s in path.split("/"))
        node = plain
        for step in parents:
            node = node.setdefault(step, {}) if isinstance(node, dict) else None
        if not isinstance(node, dict) or last in node:
            raise ValueError(f"{folder}: {path!r} is below another leaf; nested dictionaries cannot hold both")
        node[last] = leaf
    return plain
