"""Training checkpoints: plain trees that a user's own Orbax manager saved."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jlora._trees import _tree
from jlora._types import Place, PyTree, Shape
from jlora.adapted import Adapted, Frozen, begun, derived, is_adapted
from jlora.io import _arrays, _checkpoint, _manifest
from jlora.io._checkpoint import Tree
from jlora.io._record import several


def load(folder: Path, params: PyTree, spec: object) -> Adapted:
    """The adapter in a training checkpoint, its plan and frozen factors made from a spec."""
    if spec is None:
        raise ValueError(
            f"{folder} holds no {_manifest.FORM.name}, so jlora.save did not make it. If it is a training checkpoint, "
            "say what was trained: load(path, params, spec=jlora.LoRA(...))"
        )
    item, within, found = _find_trainable(folder)
    whole = within[-2:] == ("params", "trainable")  # the checkpoint is of a whole Adapted
    kept = found["params"]["frozen"].get("factors") or {} if whole else {}
    stored: dict[tuple[str, str], tuple[int, ...]] = {
        (g, n): tuple(getattr(a, "shape", ())) for g, named in kept.items() for n, a in named.items()
    }
    adapted = _fresh(params, spec, folder, stored)
    leaves = jax.tree_util.tree_flatten_with_path(found, is_leaf=lambda x: hasattr(x, "shape"))[0]
    names: dict[str, tuple[str, ...]] = {}
    for keys, _ in leaves:
        steps = tuple(str(getattr(k, "key", getattr(k, "idx", k))) for k in keys)
        other = names.setdefault(".".join(steps), steps)
        if other != steps:
            raise ValueError(
                f"{item} cannot be read: Orbax joins names by dots and so gave {other} and {steps} one name; one of "
                "them has the other's values. Save the adapter with jlora.save, which escapes names"
            )
    node = found
    for step in within:
        node = node[step]
    have: dict[tuple[str, str], tuple[tuple[int, ...], bool]] = {}
    for group, named in node.items():
        if not isinstance(named, dict):
            raise ValueError(f"{item}: {'/'.join((*within, group))!r:.200} is no {{factor: array}}")
        have |= {(group, n): (tuple(getattr(a, "shape", ())), True) for n, a in named.items()}
    plan = adapted.frozen.plan
    frozen = {
        p: (stored[p] if p in stored else shape, False) for p, (shape, trained) in plan.shapes.items() if not trained
    }
    bad = _manifest.misfits(have | frozen, plan)
    if bad:
        raise ValueError(f"the factors in {item} do not fit the spec:" + several(bad))
    part: Tree = node
    for step in reversed(within):
        part = {step: part}
    value = _checkpoint.restore_part(item, part) if have else part
    for step in within:
        value = value[step]
    for group, named in value.items():
        for name, array in named.items():
            _arrays.check_dtype(np.asarray(array).dtype, f"{item}: factor {group!r}: {name!r}")
    back = Adapted(jax.tree.map(jnp.array, value), adapted.frozen)
    return _whole(back, item, found["params"]["frozen"], stored) if whole else back


def _whole(adapted: Adapted, item: Path, held: Tree, stored: Mapping[Place, Shape]) -> Adapted:
    """The adapter with the frozen factors of a checkpoint of the whole form, whose base is the one at hand."""
    plan = adapted.frozen.plan
    known = derived(plan)
    wanted: dict[str, Tree] = {}
    for group, name in stored:
        if group in adapted.frozen.factors and name in adapted.frozen.factors[group] and (group, name) not in known:
            wanted.setdefault(group, {})[name] = held["factors"][group][name]
    leaves = _tree.leaves(adapted.frozen.base)
    moved = []
    for site in plan.sites:  # an optimizer without `masked` moves the whole base, these weights among it
        here, there = leaves[site.index], _at(held.get("base"), site.leaf.path)
        if isinstance(here, (jax.Array, np.ndarray)) and there is not None and tuple(there.shape) == here.shape:
            value = np.asarray(_at(_restored(item, "base", _nest(site.leaf.path, there)), site.leaf.path))
            if value.dtype == here.dtype and value.tobytes() != np.asarray(here).tobytes():
                moved.append(f"{site.leaf.path!r} has other values")
    if moved:
        raise ValueError(
            f"{item} was trained on another base, or its optimizer moved the base that it holds: tx.init(adapted) "
            "without jlora.masked(tx) decays the frozen half as well. It opens over the base that it holds, "
            "params.frozen.base:" + several(moved)
        )
    if not wanted:
        return adapted
    factors = {group: dict(named) for group, named in adapted.frozen.factors.items()}
    for group, named in _restored(item, "factors", wanted).items():
        for name, x in named.items():
            _arrays.check_dtype(np.asarray(x).dtype, f"{item}: factor {group!r}: {name!r}")
            factors[group][name] = jnp.array(x)
    return Adapted(adapted.trainable, dataclasses.replace(adapted.frozen, factors=factors))


def _restored(item: Path, name: str, part: PyTree) -> PyTree:
    return _checkpoint.restore_part(item, {"params": {"frozen": {name: part}}})["params"]["frozen"][name]


def _nest(path: str, x: PyTree) -> PyTree:
    for step in reversed(path.split("/")):
        x = {step: x}
    return x


def _at(tree: PyTree, path: str) -> PyTree:
    """The leaf of a nested dictionary at a path, or None."""
    for step in path.split("/"):
        tree = tree.get(step) if isinstance(tree, dict) else None
    return tree if hasattr(tree, "shape") else None


def _fresh(params: PyTree, spec: object, folder: Path, stored: Mapping[Place, Shape]) -> Adapted:
    """The adapter before training, for its plan and the frozen factors that are not stored."""
    if not is_adapted(spec):
        adapted = begun(params, spec)
        known = derived(adapted.frozen.plan)
        random = [
            n
            for g, named in adapted.frozen.factors.items()
            for n in named
            if n != "s" and (g, n) not in known and (g, n) not in stored
        ]
        if random:
            raise ValueError(
                f"{folder} does not hold the frozen factors {sorted(set(random))}, which depend on the key that adapt "
                "was given; pass what it made: load(path, params, spec=jlora.adapt(params, spec, key=...))"
            )
        return adapted
    tree = _tree.flatten(params)
    for site in spec.frozen.plan.sites:
        path = tree.paths[site.index] if site.index < len(tree.paths) else None
        if path != site.leaf.path or _tree.shape_dtype(tree.leaves[site.index])[0] != site.leaf.shape:
            raise ValueError(f"{site.leaf.path!r} of the Adapted given as spec is not so in params")
    return Adapted(spec.trainable, Frozen(params, spec.frozen.factors, None, spec.frozen.plan))


def _find_trainable(folder: Path) -> tuple[Path, tuple[str, ...], Tree]:
    """The folder of the Orbax item that holds the trainable half, where in it, and its tree."""
    step = folder
    if not (folder / "_METADATA").is_file():
        numbered = {
            int(m[1]): entry
            for entry in folder.iterdir()
            if (m := re.fullmatch(r"(?:.*_)?(\d{1,18})", entry.name)) and (entry / "_CHECKPOINT_METADATA").is_file()
        }
        step = numbered[max(numbered)] if numbered else folder
    items = [e for e in (step, *sorted(step.iterdir())) if (e / "_METADATA").is_file()]
    found: list[tuple[Path, tuple[str, ...], Tree]] = []
    seen = []
    for item in items:
        tree = _checkpoint.tree_of(item)
        seen.append(f"{item.name}: {', '.join(sorted(map(str, tree)))[:200]}")
        for name in ("trainable", "params"):
            node = tree.get(name)
            if isinstance(node, dict):
                whole = set(node) == {"trainable", "frozen"}
                found.append((item, (name, "trainable") if whole else (name,), tree))
                break
        else:
            if item.name == "trainable":
                found.append((item, (), tree))
    if len(found) != 1:
        what = "several items with" if found else "no item with"
        raise ValueError(f"{step} has {what} a 'trainable' half; it holds" + several(seen or ["no Orbax checkpoint"]))
    return found[0]
