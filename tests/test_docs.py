"""Examples are run: the doctests of the library, and the Python blocks of README and docs.

A Markdown file's ```python blocks run in order in one namespace, in an empty folder. A block that needs what a test
has not (a download, a device) is left out by the line `<!-- not run -->` right before it. What a block comes to is
asserted, by the block itself or in RESULTS.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
import types
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import jlora

ROOT = Path(__file__).parents[1]
MODULES = ["jlora", *(m.name for m in pkgutil.walk_packages(jlora.__path__, "jlora.") if "__main__" not in m.name)]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"(<!-- not run -->\n)?^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)

NEEDS = {"jlora.plot": "matplotlib"}  # the extra without which a room's examples cannot run

PUBLIC = {name: x for name, x in vars(jlora).items() if not name.startswith("_") and not inspect.ismodule(x)}


@pytest.mark.parametrize("name", MODULES)
def test_doctests(name, tmp_path, monkeypatch):
    """Every example in a docstring of the library comes to what is printed below it."""
    monkeypatch.chdir(tmp_path)
    for room, extra in NEEDS.items():
        if name == room or name.startswith(f"{room}."):
            pytest.importorskip(extra, reason=f"{extra} is an extra")
    module = importlib.import_module(name)
    found = doctest.DocTestFinder(exclude_empty=True).find(module, name)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    output = []
    for test in found:
        runner.run(test, out=output.append)
    assert not runner.failures, "".join(output)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_public_name_says_what_it_does_and_shows_it(name):
    """Whoever asks for help on a public name finds a first line and an example; `Frozen`, made by jlora, needs none."""
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.split("\n")[0].strip(), f"{name} has no docstring"
    if name not in ("Frozen",):  # seen by users, made by the library
        assert ">>> " in text, f"{name} shows no example"


def same(one, other):
    jax.tree.map(np.testing.assert_array_equal, one, other)


def trained(n):
    """The loop has trained what is joined and merged: each factor has moved, the loss fell, the base is what it was."""
    start = jlora.adapt(n.params, jlora.LoRA(rank=4, alpha=8, target="kernel$"))
    for moved, old in zip(jax.tree.leaves(n.adapted.trainable), jax.tree.leaves(start.trainable), strict=True):
        assert not np.array_equal(moved, old)
    assert n.value < 0.5 * n.loss(*jlora.split(start), n.x)
    same(n.params, n.model.init(jax.random.key(0), n.x)["params"])
    assert jax.tree.structure(n.merged) == jax.tree.structure(n.params)
    want = n.apply({"params": n.adapted}, n.x)
    np.testing.assert_allclose(n.model.apply({"params": n.merged}, n.x), want, rtol=1e-5, atol=1e-6)


def saved(n):
    """The files hold what was trained: the adapter bit for bit, twice, and the merged parameters."""
    want = jlora.join(n.trainable, n.frozen)
    same(n.adapted.trainable, want.trainable)
    same(n.adapted.frozen.base, n.params)
    same(jlora.load("adapter", n.params).trainable, want.trainable)
    same(ocp.StandardCheckpointer().restore(Path("merged").absolute()), n.merged)


def modules(n):
    """A module computes with its adapter, which starts as nothing; one with state of its own returns it."""
    assert n.y.shape == (8, 4) and set(n.adapted.trainable) == {"layers/0/kernel"}
    again, _ = jlora.lift(n.forward)(n.adapted, n.rest, jnp.ones((8, 16)))
    assert not np.array_equal(again, n.y)  # another mask


def another_method(n):
    """The class is a method: its one trained factor is r, (r, r)."""
    made = jlora.adapt(nn.Dense(6).init(jax.random.key(0), jnp.ones((1, 8)))["params"], n.LoRAXS(rank=2))
    assert {name: a.shape for name, a in made.trainable["kernel"].items()} == {"r": (2, 2)}


# What blocks come to that assert nothing themselves: {(page, first line): check of the namespace after it}.
RESULTS = {
    ("README.md", "import flax.linen as nn, jax, jax.numpy as jnp, optax"): trained,
    ("README.md", 'jlora.save("adapter", adapted)  # the adapter alone'): saved,
    ("README.md", "from flax import nnx"): modules,
    ("adding_a_method.md", "import dataclasses"): another_method,
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_pages(page, tmp_path, monkeypatch):
    """The Python blocks of a page run in order as they stand, and none goes without a check of what it comes to."""
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": page.stem}
    for match in BLOCK.finditer(text):
        if match[1]:
            continue
        line = text[: match.start(2)].count("\n")
        exec(compile("\n" * line + match[2], str(page), "exec"), namespace)  # so that errors name the page's lines
        result = RESULTS.get((page.name, match[2].split("\n")[0]))
        assert result or "assert " in match[2], f"{page.name}:{line + 1}: the block asserts nothing: see RESULTS"
        if result:
            result(types.SimpleNamespace(**namespace))


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_stands_in_the_tables(page):
    """No method is left out of the two tables from which users choose."""
    rows = "\n".join(line.split("|")[1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| `"))
    methods = {x.__name__ for x in vars(jlora.methods).values() if inspect.isclass(x)} - {"Method"}
    assert not [name for name in methods if not re.search(rf"`{name}\b", rows)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages(page):
    """Files that a page points to are there."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
