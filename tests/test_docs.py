"""Examples are run: the doctests of the library, and the Python blocks of README and docs.

A Markdown file's ```python blocks run in order in one namespace, in an empty folder. A block that needs what a test
has not (a download, a device) is left out by the line `<!-- not run -->` right before it.
"""

import doctest
import importlib
import inspect
import pkgutil
import re
from pathlib import Path

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
    text = inspect.getdoc(PUBLIC[name]) or ""
    assert text.split("\n")[0].strip(), f"{name} has no docstring"
    if name not in ("Frozen",):  # seen by users, made by the library
        assert ">>> " in text, f"{name} shows no example"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_pages(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = page.read_text()
    namespace = {"__name__": page.stem}
    for match in BLOCK.finditer(text):
        if match[1]:
            continue
        line = text[: match.start(2)].count("\n")
        exec(compile("\n" * line + match[2], str(page), "exec"), namespace)  # so that errors name the page's lines


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_stands_in_the_tables(page):
    rows = "\n".join(line.split("|")[1] for line in (ROOT / page).read_text().splitlines() if line.startswith("| `"))
    methods = {x.__name__ for x in vars(jlora.methods).values() if inspect.isclass(x)} - {"Method"}
    assert not [name for name in methods if not re.search(rf"`{name}\b", rows)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_of_pages(page):
    """Files that a page points to are there."""
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target).exists(), f"{page.name} points to {target}, which is not there"
