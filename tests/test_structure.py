"""The house rules: imports point downwards, one room knows jaxprs, extras are imported late, files stay readable."""

import ast
import datetime
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.settled

ROOT = Path(__file__).parents[1] / "jlora"

# From the ground up: a room imports from those before it. What is no floor, but a package, counts as one room.
FLOORS = {
    "_trees": (
        "_compound", "_table", "_conventions", "_axis_names", "_tree", "_select", "_leaf", "_layouts", "_axes",
        "_choice", "_names", "_kinds", "_blocks", "_layers",
    ),
    "_algebra": (
        "_words", "_recipe", "_wellformed", "_small_inverse", "_mesh", "_contract", "_term", "_rows", "_unmade",
        "_weight", "_reshape", "_express",
    ),
    "_plan": ("_sites", "_resolve", "_fits", "_pairs"),
    "_forward": ("_anew", "_dropout", "_gates", "_step", "_rule", "_ops", "_dot", "_rows", "_table", "_conv"),
}  # fmt: skip
ROOMS = (
    "_version", "_types", "_answers", "_keys", "_dtypes",  # what everybody says
    *(f"_trees.{room}" for room in FLOORS["_trees"]),
    *(f"_algebra.{room}" for room in FLOORS["_algebra"]),
    "targets", "network", "methods",
    *(f"_plan.{room}" for room in FLOORS["_plan"]),
    "adapted", "_gates", "_stack", "_read", "_merge", "quant",  # methods know no jaxpr
    *(f"_forward.{room}" for room in FLOORS["_forward"]),
    "_interpret", "_modules", "lift", "explain", "init",
    "optim",  # one room knows jaxprs
    "rank", "shard", "serve", "prompts", "bottleneck",
    "io", "analysis", "combine", "plot", "__main__",  # nobody below io knows a file format
)  # fmt: skip

# Imports that look upwards and have a reason: {(room, imported): why}.
UPWARDS = {
    ("lift", "_interpret"): "late, so that `lift(fn, dense=True)`, the oracle of the tests, does without it",
    ("adapted", "_interpret"): "late, and only where a function is given to be traced",
}

LIMIT = 400
LONGER: dict[str, tuple[str, str]] = {}  # {file: (until when, why)}

ANY = 2.0  # in 1,000 lines, most of them where a name of the types says why

EXTRAS = ("safetensors", "matplotlib", "rich", "tyro", "tokenizers", "transformers", "torch", "peft", "qwix")

FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py"))


def room(module: str) -> str:
    _, *steps = module.split(".")
    return ".".join(steps[:2] if steps and steps[0] in FLOORS else steps[:1])


def imports(file: str):
    """(module, whether it is imported late) for every import but those for type checkers."""
    tree = ast.parse((ROOT / file).read_text())
    hidden = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in hidden:
            continue
        late = node not in tree.body
        if isinstance(node, ast.Import):
            yield from ((alias.name, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write absolute imports"
            if node.module == "jlora" or node.module in {f"jlora.{floor}" for floor in FLOORS}:
                yield from ((f"{node.module}.{alias.name}", late) for alias in node.names)
            else:
                yield node.module, late


def own_room(file: str) -> str:
    return room(".".join(("jlora", *Path(file).with_suffix("").parts)))


def test_every_room_has_its_place():
    """No room is outside of the order: a new one says what it stands on."""
    doors = {"__init__", *(f"{floor}.__init__" for floor in FLOORS)}
    assert {own_room(file) for file in FILES} - doors <= set(ROOMS)


@pytest.mark.parametrize("floor", FLOORS)
def test_the_door_of_a_floor_says_what_it_is_and_nothing_else(floor):
    """So that a room is found by its file, and no import of one brings in its neighbours."""
    body = ast.parse((ROOT / floor / "__init__.py").read_text()).body
    assert len(body) == 1 and ast.get_docstring(ast.Module(body, []))


@pytest.mark.parametrize("file", [f for f in FILES if own_room(f) in ROOMS])
def test_imports_point_downwards(file):
    """A room imports rooms below it alone, so that there are no cycles, and each can be read without those above."""
    mine = own_room(file)
    for module, _ in imports(file):
        if module.split(".")[0] != "jlora":
            continue
        theirs = room(module)
        assert theirs, f"{file}: import from a room, not from the public face"
        if theirs != mine and (mine, theirs) not in UPWARDS:
            assert ROOMS.index(theirs) < ROOMS.index(mine), f"{file} imports {module}, which stands above it"


def test_lift_imports_the_interpreter_late():
    """The dense oracle of the tests runs without the code that it judges."""
    assert ("jlora._interpret", True) in set(imports("lift.py"))
    assert ("jlora._interpret", False) not in set(imports("lift.py"))


@pytest.mark.parametrize("file", FILES)
def test_one_room_knows_jaxprs_and_nobody_knows_the_inside_of_jax(file):
    """What changes with JAX's versions is met in one room, and what is private to JAX in none."""
    for module, _ in imports(file):
        assert not module.startswith(("jax._src", "jax.interpreters")), f"{file} imports {module}"
        assert own_room(file) == "_interpret" or not module.startswith("jax.extend"), f"{file} imports {module}"
    text = (ROOT / file).read_text()
    if own_room(file) != "_interpret":
        assert "make_jaxpr" not in text and not re.search(r"\beqns?\b", text), f"{file} knows jaxprs"


@pytest.mark.parametrize("file", [f for f in FILES if f != "_dtypes.py"])
def test_one_room_asks_jax_to_promote(file):
    """JAX refuses it under strict promotion; `_dtypes` says how things meet there."""
    assert "jnp.promote_types" not in (ROOT / file).read_text(), f"{file}: ask jlora._dtypes"


@pytest.mark.parametrize("file", FILES)
def test_extras_are_imported_late(file):
    """The library imports without any extra, and only `io` knows checkpoints."""
    for module, late in imports(file):
        if module.split(".")[0] in EXTRAS:
            assert late, f"{file} imports {module} for everybody"
        if module.split(".")[0] == "orbax":
            assert own_room(file) == "io", f"{file} knows a file format"


@pytest.mark.parametrize("file", FILES)
def test_files_stay_readable(file):
    """A file is as short as can be read at one go, or has a date by which it is cut, and a reason."""
    lines = (ROOT / file).read_text().splitlines()
    until, why = LONGER.get(file, ("", ""))
    if len(lines) <= LIMIT:
        assert not until, f"{file} is short again: take it off the list"
        return
    assert until, f"{file} has {len(lines)} lines: cut it in two, or say in LONGER until when and why"
    assert datetime.date.today() <= datetime.date.fromisoformat(until), f"{file} was to be shorter by {until}: {why}"


def test_signatures_say_what_passes():
    """`Any` says nothing to a reader, and no checker looks behind it: `_types` has the names. The share only falls."""
    text = [(ROOT / file).read_text() for file in FILES]
    share = 1000 * sum(len(re.findall(r"\bAny\b", t)) for t in text) / sum(len(t.splitlines()) for t in text)
    assert share <= ANY, f"{share:.1f} Any in 1,000 lines: say the type, or a name of jlora._types"


def test_importing_brings_in_no_extra_and_starts_no_device():
    """In a fresh process: no extra that the core's own dependencies do not load, and no backend of JAX."""
    code = (
        "import sys, chex, flax.linen, flax.nnx, optax, orbax.checkpoint; before = set(sys.modules); import jlora; "
        "from jax._src import xla_bridge as b; "
        f"print([m for m in {EXTRAS} if m in sys.modules and m not in before], b.backends_are_initialized())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT.parent, check=True)
    assert done.stdout.split() == ["[]", "False"]


def test_the_face_is_named_and_has_a_version():
    """`from jlora import *` brings all that is public and nothing else; one file holds the version."""
    import jlora

    face: dict = {}
    exec("from jlora import *", face)
    assert set(jlora.__all__) == {"__version__"} | {n for n in vars(jlora) if n[0] != "_"} - {"adapted"}
    assert set(jlora.__all__) <= set(face) and {"LoRA", "adapt", "io", "rank"} < set(jlora.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\w*", jlora.__version__)
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())["project"]
    assert project["dynamic"] == ["version"] and all(url.startswith("https://") for url in project["urls"].values())
