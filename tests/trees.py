"""Reader of the written truth about real models' parameter trees (tests/fixtures/trees, described in its README.md)."""

import dataclasses
import json
import pathlib
import re

FOLDER = pathlib.Path(__file__).parent / "fixtures" / "trees"
KINDS = frozenset(
    "query key value qkv attn_out mlp conv other_linear router".split()
    + "head embedding position token norm bias state other".split()
)


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The truth about one parameter: its path, shape, one role letter an axis, its kind, and logical names if any."""

    path: str
    shape: tuple[int, ...]
    roles: str
    kind: str
    cite: str
    names: tuple[str | None, ...] | None = None


def spelled_out(path: str) -> list[str]:
    """`a/{0,1}/b` stands for `a/0/b` and `a/1/b`."""
    found = re.search(r"\{([^{}]*)\}", path)
    if found is None:
        return [path]
    before, after = path[: found.start()], path[found.end() :]
    return [p for choice in found[1].split(",") for p in spelled_out(before + choice + after)]


def models() -> dict[str, tuple[Leaf, ...]]:
    """Every recorded tree under `library: model`."""
    trees = {}
    for file in sorted(FOLDER.glob("*.json")):
        library = json.loads(file.read_text())
        for model in library.get("models", ()):
            trees[f"{library['library']}: {model['model']}"] = tuple(
                Leaf(path, tuple(shape), roles, kind, cite, tuple(names[0]) if names else None)
                for folded, shape, roles, kind, cite, *names in model["leaves"]
                for path in spelled_out(folded)
            )
    return trees


def nested(leaves: tuple[Leaf, ...], make) -> dict:
    """The tree as nested dictionaries of `make(leaf)`; a key of Haiku holds slashes, written `%2F` in a path."""
    tree: dict = {}
    for leaf in leaves:
        *steps, name = (step.replace("%2F", "/").replace("%25", "%") for step in leaf.path.split("/"))
        node = tree
        for step in steps:
            node = node.setdefault(step, {})
        node[name] = make(leaf)
    return tree
