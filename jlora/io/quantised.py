"""A quantised base through Orbax, so that it is quantised once.

A folder with an Orbax checkpoint of the arrays and `jlora_base.json`, which says how each leaf reads them.
"""

import dataclasses
import json
import os
from typing import Any

import jax
import orbax.checkpoint as ocp

from jlora import _tree
from jlora._packed import is_packed, sound
from jlora.adapted import is_adapted
from jlora.io import _arrays, _folder, _manifest
from jlora.quant import NF, Int
from jlora.quant._layout import Layout
from jlora.quant._leaf import Codec, Quantized

NAME, DATA, FORMAT = "jlora_base.json", "arrays", 1
_SCHEMES = {"NF": NF, "Int": Int}


def save(path: "str | os.PathLike[str]", params: Any, *, overwrite: bool = False) -> None:
    """Saves a tree with quantised leaves: codes and scales as they are, other leaves as arrays.

    Args:
      path: a local folder; its parents are made.
      params: a pytree of arrays and quantised leaves; an adapter's is `adapted.frozen.base`.
      overwrite: replace a folder that this function wrote.

    Raises:
      TypeError: an `Adapted`, whose adapter would be lost; quantised leaves that were cast.
      ValueError: leaves that Orbax cannot store; a folder that is there.

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
    target = _folder.local(path)
    replaces = _folder.check_free(target, overwrite, NAME, "quantised base")
    arrays, leaves = {}, {}
    tree = _tree.flatten(params)
    sound(zip(tree.paths, tree.leaves, strict=True))
    for leaf_path, leaf in zip(tree.paths, tree.leaves, strict=True):
        how = _described(leaf) if is_packed(leaf) else None
        parts = leaf.arrays if is_packed(leaf) else {"": leaf}
        records = {}
        for name, part in parts.items():
            place = _arrays.stored_name("base", leaf_path, name)
            array, records[name] = _arrays.record(part, f"{leaf_path!r} {name}".strip())
            if array.size:
                arrays[place] = array
        leaves[leaf_path] = {"quantised": how, "arrays": records}
    with _folder.beside(target) as folder:
        inside = folder / "base"
        inside.mkdir()
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            checkpointer.save(inside / DATA, args=ocp.args.PyTreeSave(arrays))
        (inside / NAME).write_text(json.dumps({"format": FORMAT, "leaves": leaves}))
        _folder.sync_all(inside)
        _folder.appear(inside, target, replaces)


def load(path: "str | os.PathLike[str]", like: Any = None) -> Any:
    """What `save` saved, bit for bit.

    Args:
      path: the folder.
      like: a tree of the structure to give back, arrays or `ShapeDtypeStruct`s in the place of leaves, or leaves
        quantised alike; nested dictionaries under the paths' names by default.

    Raises:
      ValueError: a folder that is none of these, is damaged, is of a newer format, or has other leaves than `like`.
    """
    target = _folder.local(path)
    try:
        content = json.loads((target / NAME).read_text())
        version, leaves = content["format"], content["leaves"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{target} holds no quantised base that can be read: {str(error)[:200]}") from None
    if version != FORMAT:
        raise ValueError(f"{target} is of format {version}, not {FORMAT}; upgrade jlora")
    want = {
        _arrays.stored_name("base", where, name): {**record, "shape": tuple(record["shape"])}
        for where, leaf in leaves.items()
        for name, record in leaf["arrays"].items()
        if 0 not in record["shape"]
    }
    stored = _arrays.restore(target / DATA, want)
    made = {}
    for where, leaf in leaves.items():
        parts = [
            _arrays.rebuild(stored.get(_arrays.stored_name("base", where, name)), record, f"{target}: {where!r} {name}")
            for name, record in leaf["arrays"].items()
        ]
        try:
            made[where] = _leaf(parts, leaf["quantised"]) if leaf["quantised"] else parts[0]
        except (TypeError, ValueError, KeyError) as error:
            raise ValueError(f"{target} is damaged: {where!r} is not described: {str(error)[:200]}") from None
    if like is None:
        return _nested(made)
    tree = _tree.flatten(like)
    bad = [f"{p!r} is not in the file" for p in tree.paths if p not in made]
    bad += [f"{p!r} is in the file alone" for p in made if p not in tree.paths]
    for p, leaf in zip(tree.paths, tree.leaves, strict=True):
        if p in made and _tree.shape_dtype(leaf)[0] != tuple(made[p].shape):
            bad.append(f"{p!r} has shape {tuple(made[p].shape)} in the file, {_tree.shape_dtype(leaf)[0]} here")
        elif p in made and is_packed(leaf) and _named(leaf) != _named(made[p]):
            bad.append(f"{p!r} is {_named(made[p])} in the file, {_named(leaf)} here")
    if bad:
        raise ValueError(f"{target} is not a base of this structure:" + _manifest.several(bad))
    return jax.tree.unflatten(tree.treedef, [made[p] for p in tree.paths])


def _named(leaf: Any) -> str:
    """How a leaf is held, in a word."""
    return leaf.describe() if is_packed(leaf) else "an array"


def _described(leaf: Quantized) -> dict[str, Any]:
    scheme = {"kind": type(leaf.scheme).__name__, **dataclasses.asdict(leaf.scheme)}
    layout = dataclasses.asdict(leaf.codec.layout)
    return {"scheme": scheme, "layout": layout, "dtype": leaf.codec.dtype, "kernel": leaf.kernel}


def _leaf(parts: list[Any], how: dict[str, Any]) -> Quantized:
    scheme = dict(how["scheme"])
    made = _SCHEMES[scheme.pop("kind")](**scheme)
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in how["layout"].items()}
    layout = Layout(**fields)
    leaf = Quantized(tuple(parts), Codec(made, layout, how["dtype"]), how["kernel"])
    sound([("", leaf)])
    return leaf


def _nested(made: dict[str, Any]) -> Any:
    plain: dict[str, Any] = {}
    for path, leaf in made.items():
        *parents, last = (s.replace("%2F", "/").replace("%25", "%") for s in path.split("/"))
        node = plain
        for step in parents:
            node = node.setdefault(step, {})
        node[last] = leaf
    return plain
