"""The recorded trees of real models are well formed; what jlora says of them is held against them elsewhere."""

import json

import pytest

from trees import FOLDER, KINDS, models

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
