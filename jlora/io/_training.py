"""Training checkpoints: plain trees that a user's own Orbax manager saved."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jlora import _tree
from jlora.adapted import Adapted, Frozen, begun, derived, is_adapted, shapes
from jlora.io import _arrays, _checkpoint, _manifest
from jlora.io._record import several


def load(folder: Path, params: Any, spec: Any) -> Adapted:
    """The adapter in a training checkpoint, its plan and frozen factors made from a spec."""
    if spec is None:
        raise ValueError(
            f"{folder} holds no {_manifest.FORM.name}, so jlora.save did not make it. If it is a training checkpoint, "
            "say what was trained: load(path, params, spec=jlora.LoRA(...))"
        )
    adapted = _fresh(params, spec, folder)
    item, within, found = _find_trainable(folder)
    leaves = jax.tree_util.tree_flatten_with_path(found, is_leaf=lambda x: hasattr(x, "shape"))[0]
    names: dict[str, Any] = {}
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
    frozen = {p: v for p, v in shapes(plan).items() if not v[1]}
    bad = _manifest.misfits(have | frozen, plan)
    if bad:
        raise ValueError(f"the factors in {item} do not fit the spec:" + several(bad))
    part: Any = node
    for step in reversed(within):
        part = {step: part}
    value = _checkpoint.restore_part(item, part) if have else part
    for step in within:
        value = value[step]
    for group, named in value.items():
        for name, array in named.items():
            _arrays.check_dtype(np.asarray(array).dtype, f"{item}: factor {group!r}: {name!r}")
    return Adapted(jax.tree.map(jnp.array, value), adapted.frozen)


def _fresh(params: Any, spec: Any, folder: Path) -> Adapted:
    """The adapter before training, for its plan and its frozen factors."""
    if not is_adapted(spec):
        adapted = begun(params, spec)
        known = derived(adapted.frozen.plan)
        random = [n for g, named in adapted.frozen.factors.items() for n in named if n != "s" and (g, n) not in known]
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


def _find_trainable(folder: Path) -> tuple[Path, tuple[str, ...], dict[str, Any]]:
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
    found: list[tuple[Path, tuple[str, ...], dict[str, Any]]] = []
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
