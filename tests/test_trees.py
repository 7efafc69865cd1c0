"""The recorded trees of real models are well formed; what jlora says of them is held against them elsewhere."""

import json

import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax import nnx

import jlora
from jlora._trees import _axis_names, _layouts
from trees import FOLDER, KINDS, models

pytestmark = pytest.mark.settled

MODELS = models()
# What a kind says of the roles: matrices have both sides, what is added or multiplied elementwise has none to contract.
MATRICES = {"query", "key", "value", "qkv", "attn_out", "mlp", "other_linear", "router", "head", "embedding"}
ELEMENTWISE = {"norm", "bias", "token", "state"}


@pytest.mark.parametrize("model", MODELS)
def test_every_leaf_has_one_role_an_axis_and_a_known_kind(model):
    """Roles are letters out of i, o, k, s, one an axis; kinds are of the list; paths are unique."""
    leaves = MODELS[model]
    assert len({leaf.path for leaf in leaves}) == len(leaves) > 0
    for leaf in leaves:
        assert len(leaf.roles) == len(leaf.shape) and set(leaf.roles) <= set("ioks"), leaf
        assert leaf.kind in KINDS, leaf
        assert all(n > 0 for n in leaf.shape), leaf
        assert leaf.names is None or len(leaf.names) == len(leaf.shape), leaf


@pytest.mark.parametrize("model", MODELS)
def test_roles_fit_the_kind(model):
    """A matrix has an input and an output axis, a convolution a window too, and what acts elementwise no input."""
    for leaf in MODELS[model]:
        if leaf.kind in MATRICES:
            assert {"i", "o"} <= set(leaf.roles) <= set("ios"), leaf
        if leaf.kind == "conv":
            assert {"i", "o", "k"} == set(leaf.roles) - {"s"}, leaf
        if leaf.kind in ELEMENTWISE:
            assert set(leaf.roles) <= set("os"), leaf


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.json")), ids=lambda file: file.stem)
def test_every_file_names_its_source(file):
    """Each file says which repository and release it was read from, and why each leaf has its roles."""
    library = json.loads(file.read_text())
    assert library["library"] == file.stem and library["repository"] and library["release"]
    used = {leaf[4] for model in library["models"] for leaf in model["leaves"]}
    assert used == set(library["cites"]) and all(library["cites"].values())


@pytest.mark.parametrize("model", MODELS)
def test_axes_are_right_or_not_said(model):
    """What a tree decides of its axes is the truth; nearly all is decided, and logical names decide the rest."""
    leaves = MODELS[model]
    shapes = {leaf.path: leaf.shape for leaf in leaves}
    found = _layouts.decide(shapes)
    assert {p: x for p, x in found.items() if x is not None} == {x.path: x.roles for x in leaves if found[x.path]}
    matrices = [leaf for leaf in leaves if leaf.kind in MATRICES]
    assert sum(found[leaf.path] is None for leaf in matrices) <= 0.15 * len(matrices)
    for leaf in leaves:
        if leaf.names is not None and "?" not in (said := _axis_names.letters(leaf.names, leaf.shape)):
            assert said == leaf.roles, leaf


@pytest.mark.parametrize("model", MODELS)
def test_one_matrix_of_a_tree_alone_is_right_or_not_said(model):
    """With nothing beside it a matrix in heads has its own axes or none."""
    for leaf in MODELS[model]:
        if leaf.kind in MATRICES and len(leaf.shape) > 2:
            assert _layouts.decide({leaf.path: leaf.shape})[leaf.path] in (None, leaf.roles), leaf


def test_names_that_decide_are_read_from_boxes_and_variables():
    """A box of Linen and a variable of NNX say their axes, the stack where it stands."""
    tree = {
        "q": nn.LogicallyPartitioned(jnp.ones((8, 3, 2, 4)), names=("embed", "layers", "heads", "kv")),
        "wo": nn.Partitioned(jnp.ones((6, 3, 8)), names=("mlp", "layers", "embed")),
        "v": nnx.Param(jnp.ones((2, 6, 4)), out_sharding=("heads", "embed", "kv"), eager_sharding=False),
    }
    sites = jlora.adapt(tree, jlora.LoRA(rank=1, target=".")).frozen.plan.sites
    assert {s.leaf.path: s.leaf.roles for s in sites} == {"q": "isoo", "wo": "iso", "v": "oio"}
