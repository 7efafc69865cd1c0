"""Adapters in peft's files: numbers against files that peft wrote and float64 NumPy; round trips; bad input."""

import json
import os
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jlora
from jlora.io import _peft_config, _peft_fields, _peft_layout, peft

pytestmark = pytest.mark.settled

FILES = Path(__file__).parent / "fixtures" / "peft"
GOLDEN = "lora_linear lora_embedding lora_conv2d lora_bias lora_pattern lora_mts dora_linear".split()
BASE = load_file(FILES / "base.safetensors")
RNG = np.random.default_rng(0)


def to_flax(weight):
    return weight.T if weight.ndim == 2 else weight.transpose(2, 3, 1, 0)


PARAMS = {"emb": {"embedding": jnp.asarray(BASE["emb.weight"])}} | {
    n: {"kernel": jnp.asarray(to_flax(BASE[f"{n}.weight"])), "bias": jnp.asarray(BASE[f"{n}.bias"])}
    for n in ("lin0", "lin1", "conv", "conv1")
}


def normal(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def write(folder, tensors, **config):
    """A folder as peft writes it; keys without the prefix."""
    folder.mkdir(exist_ok=True)
    save_file({"base_model.model." + k: np.ascontiguousarray(v) for k, v in tensors.items()}, folder / TENSORS)
    (folder / CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 3, **config}))
    return folder


CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


def read(path):
    return _peft_config.read(path, _peft_fields.parse(path))


def linear(module="q", d_in=6, d_out=4, r=2):
    return {f"{module}.lora_A.weight": normal(r, d_in), f"{module}.lora_B.weight": normal(d_out, r)}


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)
        assert x.dtype == y.dtype


def test_a_rank_above_the_matrix_rank_loads_without_a_word(tmp_path):
    """A file says what it says: rank 5 on (6, 4), as peft allows; W = W0 + s B A."""
    tensors = linear(r=5)
    params = {"q": {"kernel": jnp.asarray(normal(6, 4))}}
    adapted = jlora.io.peft.load(write(tmp_path / "x", tensors, r=5, target_modules=["q"]), params)
    a, b = (np.float64(x) for x in tensors.values())
    want = np.float64(params["q"]["kernel"]) + 3 / 5 * (b @ a).T
    np.testing.assert_allclose(jlora.merge(adapted)["q"]["kernel"], want, atol=1e-5)


# --- against peft's files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", GOLDEN)
def test_numbers_of_peft(name):
    """peft's own files give the weights and outputs that peft computed with them, and at a scale of zero the base."""
    adapted = peft.load(FILES / name, PARAMS)
    want, merged = load_file(FILES / name / "expected.safetensors"), jlora.merge(adapted)
    for module, leaves in merged.items():
        for leaf, value in leaves.items():
            expected = want[f"merged.{module}.{'bias' if leaf == 'bias' else 'weight'}"]
            expected = to_flax(expected) if leaf == "kernel" else expected
            np.testing.assert_allclose(value, expected, rtol=1e-6, atol=1e-6)
    p = {n: {k: np.float64(v) for k, v in leaves.items()} for n, leaves in merged.items()}
    hidden = np.maximum(p["emb"]["embedding"][BASE["in.ids"]] @ p["lin0"]["kernel"] + p["lin0"]["bias"], 0)
    np.testing.assert_allclose(hidden @ p["lin1"]["kernel"] + p["lin1"]["bias"], want["out.0"], rtol=1e-5, atol=1e-5)
    assert "dense" not in str(adapted) and jlora.count(adapted)[0] > 0
    np.testing.assert_array_equal(
        jlora.merge(jlora.scale(adapted, 0.0))["lin0"]["kernel"], PARAMS["lin0"]["kernel"], err_msg="scaled to nothing"
    )


@pytest.mark.parametrize("name", GOLDEN)
def test_round_trip_of_peft(name, tmp_path):
    """Saved again, peft's file has the tensors, scales and modules that it had, and loads to the same adapter."""
    adapted = peft.load(FILES / name, PARAMS)
    peft.save(tmp_path / "x", adapted)
    assert_same(peft.load(tmp_path / "x", PARAMS), adapted)
    mine, theirs = (load_file(f / TENSORS) for f in (tmp_path / "x", FILES / name))
    assert set(mine) == set(theirs)
    for key, tensor in theirs.items():
        if key.split(".")[-2:][0] == "lin1" and name == "lora_mts":  # a float32 change has no more bits than the base
            np.testing.assert_allclose(mine[key], tensor, atol=2e-8)
        else:
            np.testing.assert_array_equal(mine[key], tensor)
    mine, theirs = (read(f / CONFIG) for f in (tmp_path / "x", FILES / name))
    for module in theirs.target_modules:
        assert mine.scale(module, 4) == theirs.scale(module, 4) and module in mine.target_modules
    assert (mine.use_dora, mine.bias, mine.lora_bias) == (theirs.use_dora, theirs.bias, theirs.lora_bias)
    assert set(mine.modules_to_save) == set(theirs.modules_to_save)


def test_a_loaded_adapter_is_an_ordinary_one(tmp_path):
    """An adapter of peft's has the plan that `adapt` makes, so it lifts, merges and saves in either format."""
    adapted = peft.load(FILES / "dora_linear", {"params": PARAMS})  # below Linen's name of the collection
    spec = jlora.DoRA(jlora.LoRA(rank=4, target=r"lin\d/kernel$"))
    assert adapted.frozen.plan is jlora.adapt({"params": PARAMS}, spec).frozen.plan
    jlora.save(tmp_path / "x", adapted)
    assert_same(jlora.load(tmp_path / "x", {"params": PARAMS}), adapted)
    x = jnp.asarray(normal(3, 12))
    f = lambda p, x: x @ p["params"]["lin0"]["kernel"]
    np.testing.assert_allclose(jlora.lift(f)(adapted, x), f(jlora.merge(adapted), x), rtol=1e-4, atol=1e-5)
    peft.save(tmp_path / "y", adapted)
    assert set(load_file(tmp_path / "y" / TENSORS)) == set(load_file(FILES / "dora_linear" / TENSORS))


# --- layouts, against float64 -------------------------------------------------------------------------------------


def dora(weight, m):
    """m W / ||W||, the norm over all but the last axis."""
    return m * weight / np.sqrt((weight**2).sum(tuple(range(weight.ndim - 1))))


@pytest.mark.parametrize("use_dora", [False, True])
def test_shapes_of_kernels(tmp_path, use_dora):
    """Heads, (heads, size) -> out, a convolution of one axis with strides of its own roles, an embedding; rsLoRA."""
    shapes = {"q": (6, 2, 4), "o": (2, 4, 6), "c": (3, 5, 4), "e": (7, 6)}
    params = {n: {"embedding" if n == "e" else "kernel": jnp.asarray(normal(*shape))} for n, shape in shapes.items()}
    axes = {"q/": "ioo", "o/": "iio", "c/": "kio"}
    tensors = linear("q", 6, 8) | linear("o", 8, 6)
    tensors |= {"c.lora_A.weight": normal(2, 5, 3), "c.lora_B.weight": normal(4, 2, 1)}
    tensors |= {"e.lora_embedding_A": normal(2, 7), "e.lora_embedding_B": normal(6, 2)}
    m = {"q": normal(8), "o": normal(6), "c": normal(1, 4, 1), "e": normal(6)}
    tensors |= {f"{n}.lora_magnitude_vector": v for n, v in m.items() if use_dora}
    adapted = peft.load(write(tmp_path / "x", tensors, use_dora=use_dora, use_rslora=True), params, axes=axes)
    t = {k: np.float64(v) for k, v in tensors.items()}
    delta = {n: t[f"{n}.lora_A.weight"].T @ t[f"{n}.lora_B.weight"].T for n in "qo"}
    delta["c"] = np.einsum("rik,or->kio", t["c.lora_A.weight"], t["c.lora_B.weight"][..., 0])
    delta["e"] = t["e.lora_embedding_A"].T @ t["e.lora_embedding_B"].T
    for n, leaves in jlora.merge(adapted).items():
        base = np.float64(next(iter(params[n].values())))
        want = base + 3 / np.sqrt(2) * delta[n].reshape(base.shape)
        flat = want.reshape(6, 8) if n == "q" else want.reshape(8, 6) if n == "o" else want
        want = dora(flat, m[n].ravel()).reshape(want.shape) if use_dora else want
        np.testing.assert_allclose(next(iter(leaves.values())), want, rtol=2e-5, atol=2e-5)
    peft.save(tmp_path / "y", adapted)
    back = load_file(tmp_path / "y" / TENSORS)
    assert set(back) == {"base_model.model." + k for k in tensors}
    for k, v in tensors.items():
        np.testing.assert_array_equal(back["base_model.model." + k], v)
    assert read(tmp_path / "y" / CONFIG).use_rslora
    assert_same(peft.load(tmp_path / "y", params, axes=axes), adapted)


@pytest.mark.parametrize("use_dora", [False, True])
def test_layers_become_slices(tmp_path, use_dora):
    """One module a layer there, one stacked kernel here: alphas of their own, biases, norms saved whole."""
    layers = {str(n): {"q": {"kernel": normal(6, 4), "bias": normal(4)}, "ln": {"scale": normal(6)}} for n in range(3)}
    one = {"layers": jax.tree.map(jnp.asarray, layers)}
    many = {"layers": jax.tree.map(lambda *x: jnp.stack(x), *layers.values())}
    names = {"layers.{n}.q": "layers/q/kernel", "layers.{n}.ln": "layers/ln/scale"}
    tensors = {}
    for n in range(3):
        tensors |= linear(f"layers.{n}.q") | {f"layers.{n}.q.base_layer.bias": normal(4)}
        tensors |= {f"layers.{n}.ln.weight": normal(6)}
        tensors |= {f"layers.{n}.q.lora_magnitude_vector": normal(4)} if use_dora else {}
    config = {"alpha_pattern": {"1.q": 8, "layers.[0-9].q": 5}, "bias": "lora_only", "modules_to_save": ["ln"]}
    folder = write(tmp_path / "x", tensors, use_dora=use_dora, target_modules=["q"], **config)
    unrolled, stacked = peft.load(folder, one), peft.load(folder, many, names)
    np.testing.assert_array_equal(stacked.frozen.factors["layers/q/kernel"]["s"], [2.5, 4, 2.5])
    merged = jlora.merge(unrolled)["layers"]
    want = jax.tree.map(lambda *x: np.stack(x), *merged.values())
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jlora.merge(stacked)["layers"], want
    )
    for n in range(3):
        np.testing.assert_allclose(merged[str(n)]["q"]["bias"], tensors[f"layers.{n}.q.base_layer.bias"], atol=3e-7)
        np.testing.assert_allclose(merged[str(n)]["ln"]["scale"], tensors[f"layers.{n}.ln.weight"], atol=3e-7)
    for k, (adapted, params, book) in enumerate([(unrolled, one, None), (stacked, many, names)]):
        peft.save(tmp_path / f"y{k}", adapted, book)
        assert_same(peft.load(tmp_path / f"y{k}", params, book), adapted)
    a, b = (load_file(tmp_path / f"y{k}" / TENSORS) for k in range(2))
    assert set(a) == set(b) == {"base_model.model." + k for k in tensors}
    for key in a:
        np.testing.assert_array_equal(a[key], b[key])
    assert (tmp_path / "y0" / CONFIG).read_bytes() == (tmp_path / "y1" / CONFIG).read_bytes()


def test_dtypes(tmp_path):
    """Factors of any of the three float dtypes come back float32, bit for bit, over a base of another."""
    params = {"q": {"kernel": jnp.ones((6, 4), jnp.bfloat16)}}
    for dtype in ("float16", jnp.bfloat16, "float32"):
        tensors = {k: v.astype(dtype) for k, v in linear().items()}
        adapted = peft.load(write(tmp_path / "x", tensors), params)
        factors = adapted.trainable["q/kernel"]
        assert factors["a"].dtype == factors["b"].dtype == jnp.float32
        np.testing.assert_array_equal(factors["a"], tensors["q.lora_A.weight"].astype(np.float32))
        small = peft.load(tmp_path / "x", params, dtype=jnp.bfloat16)
        assert small.trainable["q/kernel"]["b"].dtype == jnp.bfloat16
        peft.save(tmp_path / "y", small, overwrite=True)
        assert_same(peft.load(tmp_path / "y", params, dtype="bfloat16"), small)


def test_what_changes_nothing_may_be_there(tmp_path):
    """peft adds the embedding it found to a file: equal to params it is no matter; Conv1D's layout; old bias names."""
    params = {"q": {"kernel": jnp.asarray(normal(6, 4)), "bias": jnp.ones(4)}, "e": {"embedding": jnp.ones((5, 6))}}
    tensors = linear() | {"e.weight": np.ones((5, 6)), "q.base_layer.weight": np.asarray(params["q"]["kernel"]).T}
    tensors = {k: np.float32(v) for k, v in tensors.items()}
    assert set(peft.load(write(tmp_path / "x", tensors), params).trainable) == {"q/kernel"}
    tensors = linear() | {"q.bias": normal(4), "h.weight": normal(6, 3)}
    folder = write(tmp_path / "y", tensors, bias="all", fan_in_fan_out=True, modules_to_save=["h"], future_field=None)
    merged = jlora.merge(peft.load(folder, params | {"h": {"kernel": jnp.zeros((6, 3))}}))
    np.testing.assert_array_equal(merged["h"]["kernel"], tensors["h.weight"])
    np.testing.assert_allclose(merged["q"]["bias"], tensors["q.bias"], atol=2e-7)


# --- names --------------------------------------------------------------------------------------------------------


def test_names(tmp_path):
    """A dictionary with {n} and a function name a stack's slices alike, experts in layers too, in both directions."""
    params = {"block": {"query": {"kernel": jnp.ones((3, 2, 6, 4))}}, "head_1": {"w": jnp.ones((6, 4))}}
    tensors = {}
    for n in range(3):
        for e in range(2):
            tensors |= linear(f"layers.{n}.experts.{e}.q")
    tensors |= linear("head.1")
    folder = write(tmp_path / "x", tensors)
    axes = {"query": "ssio", "head": "io"}
    names = {"layers.{n}.experts.{e}.q": "block/query/kernel", "head.{n}": "head_{n}/w"}
    adapted = peft.load(folder, params, names, axes=axes)
    a = adapted.trainable["block/query/kernel"]["a"]
    np.testing.assert_array_equal(a[2, 1], tensors["layers.2.experts.1.q.lora_A.weight"])

    def there(module):
        *_, n, _, e, _ = module.split(".") if "." in module[5:] else [""] * 5
        return ("block/query/kernel", [int(n), int(e)]) if n else "head_1/w"

    def back(path, index):
        return "layers.{}.experts.{}.q".format(*index) if index else "head.1"

    assert_same(peft.load(folder, params, there, axes=axes), adapted)
    for k, book in enumerate((names, back)):
        peft.save(tmp_path / f"y{k}", adapted, book)
        assert set(load_file(tmp_path / f"y{k}" / TENSORS)) == {"base_model.model." + k for k in tensors}


def test_patterns_say_what_they_said():
    """A name that another one ends in, alphas that are no whole numbers, and the first pattern that wins."""
    s = np.float32
    scales = {"q": (2, s(1)), "x.q": (4, s(1)), "x.y.q": (2, s(1.7)), "z.q": (2, s(1))}
    config = _peft_config.describe(scales)
    for module, (rank, scale) in scales.items():
        assert config.rank(module) == rank
        assert config.scale(module, rank) == scale
    assert _peft_config.describe({"q": (8, s(16 / np.sqrt(8)))}).use_rslora
    plain = _peft_config.describe({"q": (3, s(0.1)), "v": (3, s(0))})
    assert plain.alpha_pattern in ({"q": 0.3}, {"v": 0}) and not plain.use_rslora
    for scale in RNG.standard_normal(200).astype(np.float32):
        assert _peft_config.describe({"q": (7, scale)}).scale("q", 7) == scale


def taken(config, module):
    """The alpha of a module as peft looks for it, whichever way its patterns are sorted: the answers."""
    keys = config["alpha_pattern"]
    for order in (sorted(keys), sorted(keys, reverse=True)):
        found = [k for k in order if re.match(rf"(.*\.)?({k})$", module)]
        yield keys[found[0]] if found else config["lora_alpha"]


@pytest.mark.parametrize(
    "names",
    [
        ["conv1", "layer1.conv1", "x.layer1.conv1"],
        ["q", "a.q", "a.b.q", "b.q"],
        ["a.b", "aXb.c", "c", "a.c"],
        ["a+b", "x.a+b", "aab"],
        ["layers.0.q", "layers.10.q", "decoder.layers.0.q"],
    ],
)
def test_no_order_of_patterns_is_wrong(names, tmp_path):
    """Whatever ends in whatever: peft takes the first pattern that matches, and sorts them where it saves again."""
    params = {}
    for name in names:
        node = params
        for step in name.split("."):
            node = node.setdefault(step, {})
        node["kernel"] = jnp.eye(4)
    path = lambda name: name.replace(".", "/") + "/kernel"
    only = lambda name: lambda p, leaf: p == path(name)
    spec = [jlora.LoRA(rank=1 + n % 3, alpha=5 * n + 1, target=only(m)) for n, m in enumerate(names)]
    adapted = jlora.adapt(params, spec)
    peft.save(tmp_path / "x", adapted)
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    for n, name in enumerate(names):
        assert {*taken(config, name)} == {5 * n + 1}
    for _ in range(2):
        back = peft.load(tmp_path / "x", params)
        assert_same((back.trainable, back.frozen.factors), (adapted.trainable, adapted.frozen.factors))
        (tmp_path / "x" / CONFIG).write_text(json.dumps(config, sort_keys=True))


def layer():
    return {"kernel": jnp.eye(4), "bias": jnp.zeros(4)}


COLLIDE = [
    # names of the tree, what has factors, and what peft would give factors to
    (
        {"conv": layer(), "block": {"conv": {"dw": layer()}}},
        "^conv/kernel",
        ["conv", "block.conv", "block.conv.dw", "block"],
    ),
    ({"conv": layer(), "block": {"conv": layer()}}, "^conv/kernel", ["conv", "block.conv", "block"]),
    ({"params": {"q": layer(), "x": {"0": {"q": layer()}}}}, "^params/q/kernel", ["q", "x.0.q", "x.0", "x"]),
]


@pytest.mark.parametrize("params,target,modules", COLLIDE)
def test_names_that_others_end_in(params, target, modules, tmp_path):
    """peft takes the modules with factors for targets, and no others: a list where it serves, or else a pattern."""
    peft.save(tmp_path / "x", jlora.adapt(params, jlora.LoRA(rank=1, target=target)))
    wanted = json.loads((tmp_path / "x" / CONFIG).read_text())["target_modules"]
    if isinstance(wanted, str):
        found = [m for m in modules if re.fullmatch(wanted, m)]
    else:
        found = [m for m in modules if m in wanted or m.endswith(tuple("." + w for w in wanted))]
    assert found == modules[:1]
    peft.load(tmp_path / "x", params)


@pytest.mark.parametrize("other", [{"lm_head": layer()}, {"block": {"head": layer()}}, {"ahead": {"z": layer()}}])
def test_names_whose_letters_others_end_in(other, tmp_path):
    """peft saves a module whole whose name ends in the letters of one that is to be: no folder can say otherwise."""
    spec = [jlora.LoRA(rank=1, target="^q/kernel"), jlora.Full(target="^head/")]
    with pytest.raises(ValueError, match=rf"'head' is saved whole.*'{next(iter(other))}.*names="):
        peft.save(tmp_path / "x", jlora.adapt({"q": layer(), "head": layer(), **other}, spec))
    peft.save(tmp_path / "x", jlora.adapt({"q": layer(), "head": layer()}, spec))


#: Names at the top that end names of peft's own: round the model, and of each part of a module with factors.
PARTS = """layer A B vector embedding_A base_layer default dropout lora_A r model base_model base_model.model
    el.model""".split()


@pytest.mark.parametrize("saved", PARTS)
def test_names_that_peft_has_itself(saved, tmp_path):
    """peft would save its own parts whole, and not open the folder: refused, and below another module no clash."""
    path = saved.replace(".", "/")
    tree = lambda *steps: {steps[0]: tree(*steps[1:])} if steps else layer()
    rule = lambda path: [jlora.LoRA(rank=1, target="^q/kernel"), jlora.Full(target=f"^{path}/")]
    with pytest.raises(ValueError, match=rf"'{saved}' is saved whole.* so also '(q\.(base|lora)_|base_model)"):
        peft.save(tmp_path / "x", jlora.adapt({"q": layer(), **tree(*saved.split("."))}, rule(path)))
    peft.save(tmp_path / "x", jlora.adapt({"q": layer(), **tree("x", *saved.split("."))}, rule("x/" + path)))


@pytest.mark.parametrize(
    "saved,params",
    [
        ("head", {"q": layer(), "head": layer() | {"q": layer()}}),
        ("model.head", {"q": layer(), "model": {"head": layer()}, "head": layer()}),
        ("block.1", {"q": layer(), "block": {"1": layer()}, "block_1": {"q": layer()}}),
    ],
)
def test_names_that_peft_reads_otherwise(saved, params, tmp_path):
    """What is in a saved module goes with it, the prefix counts as letters, and a dot is any letter: all refused."""
    spec = [jlora.LoRA(rank=1, target="q/kernel"), jlora.Full(target=f"^{saved.replace('.', '/')}/(kernel|bias)")]
    with pytest.raises(ValueError, match=f"'{saved}' is saved whole"):
        peft.save(tmp_path / "x", jlora.adapt(params, spec))


def test_a_module_is_saved_whole(tmp_path):
    """peft asks for every tensor of it: the bias that no rule took comes along as it is, of each layer its own."""
    base = {
        "q": {"kernel": jnp.ones((2, 6, 4))},
        "norm": {"scale": jnp.ones((2, 4)), "bias": jnp.asarray(normal(2, 4))},
    }
    names = {"layers.{n}.q": "q/kernel", "layers.{n}.norm": "norm/scale"}
    adapted = jlora.adapt(base, [jlora.LoRA(rank=2, target="q/"), jlora.Full(target="scale")], axes={"q": "sio"})
    peft.save(tmp_path / "x", adapted, names)
    written = load_file(tmp_path / "x" / TENSORS)
    for n in range(2):
        np.testing.assert_array_equal(written[f"base_model.model.layers.{n}.norm.bias"], base["norm"]["bias"][n])
    back = peft.load(tmp_path / "x", base, names, axes={"q": "sio"})
    jax.tree.map(np.testing.assert_array_equal, jlora.merge(back), jlora.merge(adapted))


def test_what_autopeft_asks_for(tmp_path):
    """The task, in peft's words, and the base model's name; both change nothing for `load`."""
    adapted = jlora.adapt(Q, jlora.LoRA(rank=2, target="q/kernel"))
    peft.save(tmp_path / "x", adapted, task_type="CAUSAL_LM", base_model=tmp_path / "model")
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert (config["task_type"], config["base_model_name_or_path"]) == ("CAUSAL_LM", str(tmp_path / "model"))
    assert_same(peft.load(tmp_path / "x", Q), adapted)
    for options, error, words in [
        ({"task_type": "causal_lm"}, ValueError, "task_type='causal_lm': peft has CAUSAL_LM, "),
        ({"base_model": 3}, TypeError, "base_model=3"),
        ({"base_model": ""}, TypeError, "base_model=''"),
    ]:
        with pytest.raises(error, match=words):
            peft.save(tmp_path / "y", adapted, **options)
    assert os.listdir(tmp_path) == ["x"]


def test_numbers_that_were_edited(tmp_path):
    """A digest in the file of tensors is of both files; files of others have none."""
    adapted = jlora.adapt(Q, jlora.LoRA(rank=2, target="q/kernel"))
    folder = tmp_path / "x"
    peft.save(folder, adapted)
    config = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**config, "task_type": "CAUSAL_LM", "revision": "main"}))
    assert_same(peft.load(folder, Q), adapted)  # what is no number may be said
    (folder / CONFIG).write_text(json.dumps({**config, "lora_alpha": 3}))
    with pytest.raises(ValueError, match="edited.*digest.*save_file"):
        peft.load(folder, Q)
    save_file(load_file(folder / TENSORS), folder / TENSORS)
    assert peft.load(folder, Q).frozen.factors["q/kernel"]["s"] == 1.5


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_diverged(value, tmp_path):
    """NaN and infinity are refused, with the path."""
    adapted = jlora.adapt(Q, jlora.LoRA(rank=2, target="q/kernel"))
    adapted = jlora.join(jax.tree.map(lambda x: x * value, adapted.trainable), adapted.frozen)
    with pytest.raises(ValueError, match="'q/kernel': a holds NaN or infinity"):
        peft.save(tmp_path / "x", adapted)


def test_a_change_comes_back_bit_for_bit():
    """A value that went through base + change has the same change, though not always the value's last bit."""
    base, value = (normal(20000) * np.float32(10) ** RNG.integers(-6, 6, 20000).astype(np.float32) for _ in range(2))
    change = _peft_layout.change(value, base)
    np.testing.assert_array_equal(_peft_layout.change(base + change, base), change)
    assert np.all(np.abs(base + change - value) <= np.spacing(np.abs(change)))


# --- what a user makes --------------------------------------------------------------------------------------------

MINE = {
    "q": {"kernel": jnp.asarray(normal(6, 4)), "bias": jnp.ones(4)},
    "ln": {"scale": jnp.ones(6), "bias": jnp.ones(6)},
}
LORA = jlora.LoRA(rank=2, alpha=3, target="q/kernel", dropout=0.1)


@pytest.mark.parametrize(
    "spec,keys,said",
    [
        ([LORA], {"q.lora_A.weight", "q.lora_B.weight"}, {"bias": "none", "lora_dropout": 0.1}),
        ([jlora.LoRAFA(rank=2, target="q/kernel")], {"q.lora_A.weight", "q.lora_B.weight"}, {"lora_alpha": 2}),
        ([LORA, jlora.BitFit(target="q/bias")], {"q.base_layer.bias"}, {"bias": "lora_only"}),
        ([LORA, jlora.BitFit()], {"q.base_layer.bias", "ln.bias"}, {"bias": "all"}),
        ([LORA, jlora.Full(target="ln/")], {"ln.weight", "ln.bias"}, {"modules_to_save": ["ln"], "bias": "none"}),
        ([LORA, jlora.LNTuning()], {"ln.weight", "ln.bias"}, {"modules_to_save": ["ln"], "bias": "none"}),
        ([LORA, jlora.Full(target="ln/scale")], {"ln.weight", "ln.bias"}, {"modules_to_save": ["ln"]}),
        (
            [jlora.LoRA(rank=2, target="q/kernel"), jlora.BitFit(target="q/bias")],
            {"q.lora_B.bias"},
            {"lora_bias": True, "bias": "none"},
        ),
    ],
)
def test_saved_by_jlora(spec, keys, said, tmp_path):
    """Each adapter is written as the tensors and settings that peft has for it, and read back as the same model."""
    adapted = jlora.adapt(MINE, spec)
    move = lambda x: x + jnp.asarray(normal(*x.shape))
    adapted = jlora.join(jax.tree.map(move, adapted.trainable), adapted.frozen)
    peft.save(tmp_path / "x", adapted)
    written = {k.removeprefix("base_model.model.") for k in load_file(tmp_path / "x" / TENSORS)}
    assert written == keys | {"q.lora_A.weight", "q.lora_B.weight"}
    config = json.loads((tmp_path / "x" / CONFIG).read_text())
    assert {k: config[k] for k in said} == said and config["target_modules"] == ["q"]
    merged, back = jlora.merge(adapted), jlora.merge(peft.load(tmp_path / "x", MINE))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), back, merged)


@pytest.mark.parametrize(
    "spec,names,words",
    [
        (jlora.IA3(target="q/"), None, "'q/kernel': IA3 is neither"),
        ([LORA, jlora.LoHa(rank=1, target="ln")], None, "needs input and output axes, and a vector has one"),
        (jlora.LoRA(rank=1, target="q/kernel", slices=((0, 2),)), None, "slices"),
        (jlora.DoRA(jlora.LoHa(rank=1, target="q/kernel")), None, r"DoRA\(LoHa\) is neither"),
        (jlora.Full(target="ln"), None, "no LoRA or DoRA"),
        (
            [LORA, jlora.Full(target="q/bias")],
            {"x": "ln/scale", "y": "q/kernel", "z": "q/kernel"},
            r"any of \['y', 'z'\]",
        ),
    ],
)
def test_peft_has_no_name_for(spec, names, words, tmp_path):
    """An adapter that peft's format cannot say is refused by weight and reason, and nothing is written."""
    with pytest.raises(ValueError, match=words):
        peft.save(tmp_path / "x", jlora.adapt(MINE, spec), names)
    assert not (tmp_path / "x").exists()


def test_no_name_for_numbers(tmp_path):
    """A scaled DoRA, an unnamed stack, LoRA beside DoRA or two weights of one name are refused, nothing written."""
    adapted = jlora.scale(jlora.adapt(MINE, jlora.DoRA(LORA)), 0.5)
    with pytest.raises(ValueError, match="DoRA's gain is weakened"):
        peft.save(tmp_path / "x", adapted)
    stacked = {"q": {"kernel": jnp.ones((3, 6, 4))}}
    with pytest.raises(ValueError, match=r"'q/kernel'\[0\] has no name there"):
        peft.save(tmp_path / "x", jlora.adapt(stacked, LORA, axes={"kernel": "sio"}))
    two = {"a": {"kernel": jnp.ones((6, 4))}, "b": {"kernel": jnp.ones((6, 4))}}
    both = jlora.adapt(two, [jlora.LoRA(rank=2, target="a/"), jlora.DoRA(jlora.LoRA(rank=2, target="b/"))])
    with pytest.raises(ValueError, match="some DoRA's"):
        peft.save(tmp_path / "x", both)
    with pytest.raises(ValueError, match="would both be 'base_model.model.same.lora_A.weight'"):
        peft.save(tmp_path / "x", jlora.adapt(two, jlora.LoRA(rank=2, target="kernel")), lambda path, index: "same")
    with pytest.raises(TypeError, match="takes an Adapted"):
        peft.save(tmp_path / "x", two)  # type: ignore
    assert not list(tmp_path.iterdir())


# --- bad input ----------------------------------------------------------------------------------------------------

Q = {"q": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(4)}}
STACK = {"q": {"kernel": jnp.ones((2, 6, 4))}}
A, B = {"q.lora_A.weight": normal(2, 6)}, {"q.lora_B.weight": normal(4, 2)}


@pytest.mark.parametrize(
    "tensors,config,words",
    [
        (A, {}, r"missing 'base_model.model.q.lora_B.weight', for 'q/kernel'"),
        (
            A | {"q.lora_B.weight": normal(5, 2)},
            {},
            r"has shape \(5, 2\), not \(4, 2\), for 'q/kernel' of shape \(6, 4\)",
        ),
        (linear() | linear("v"), {}, r"'v' is not in params: no 'v/kernel'; the nearest paths are q/kernel"),
        (linear() | {"q.lora_C": normal(2)}, {}, r"'base_model.model.q.lora_C' of shape \(2,\) is no tensor of"),
        (linear(r=3), {}, "rank 3, which neither r=2"),
        (linear(), {"use_dora": True}, "missing .*lora_magnitude_vector"),
        (linear() | {"q.lora_magnitude_vector": normal(4)}, {}, "extra .*lora_magnitude_vector"),
        (linear() | {"q.lora_B.bias": normal(4)}, {}, "extra .*lora_B.bias"),
        (linear(), {"lora_bias": True}, "missing .*lora_B.bias"),
        (linear(), {"target_modules": ["v", "xq"]}, "target_modules does not name it"),
        ({"q.lora_embedding_A": normal(2, 6), "q.lora_embedding_B": normal(4, 2)}, {}, "missing .*q.lora_A.weight"),
        (linear() | {"q.bias": normal(4)}, {}, "modules_to_save, bias.*put its value into params first"),
        (linear() | {"q.weight": normal(4, 6)}, {"modules_to_save": ["q"]}, "adapted twice"),
        ({"q.weight": normal(4, 6)}, {"modules_to_save": ["q"]}, "no factors of a LoRA"),
        ({}, {}, "no factors"),
        (linear(), {"peft_type": "VERA"}, "peft_type is 'VERA'"),
        (linear(), {"layer_replication": [[0, 2]]}, "layer_replication is"),
        (linear(), {"alora_invocation_tokens": [1]}, "alora_invocation_tokens"),
        (linear(), {"megatron_config": {"a": 1}}, "megatron_config"),
        (linear(), {"of_next_year": 0.5, "use_qalora": True}, "(?s)of_next_year.*use_qalora|use_qalora.*of_next_year"),
        (linear(), {"init_lora_weights": "pissa_niter_4"}, "init_lora_weights is 'pissa_niter_4'"),
        (linear(), {"r": True}, "r is True"),
        (linear(), {"r": 0}, "r is 0"),
        (linear(), {"lora_alpha": "3"}, "lora_alpha is '3'"),
        (linear(), {"lora_alpha": 10**400}, "lora_alpha is 1000"),
        (linear(), {"lora_alpha": float("nan")}, "NaN is no number"),
        (linear(), {"bias": "some"}, "bias is 'some'"),
        (linear(), {"rank_pattern": {"q": 1.5}}, r"rank_pattern\['q'\] is 1.5"),
        (linear(), {"alpha_pattern": {"(": 1}}, "no regular expression"),
        (linear(), {"alpha_pattern": {"(?=q)q": 1}}, r"'\(\?=q\)q' in it is not read here"),
        (linear(), {"alpha_pattern": {"q(a{99}){99}": 1}}, "repeats too much"),
        (linear(), {"alpha_pattern": {"q" * 1001: 1}}, "longer than 1000"),
        (linear("q" * 1001), {}, "1,03. letters, which is no name"),
        (linear(), {"alpha_pattern": ["q"]}, "not a dictionary"),
        (linear(), {"rank_pattern": {"q": 2**30}}, "rank 2, which .*: it is to have 1073741824"),
        (linear(), {"rank_pattern": {"x": 2}, "r": 3}, "rank 2, which .*: it is to have 3"),
        (linear(), {"rank_pattern": {"q|x": 3, "q": 2}}, "rank 2, which .*: it is to have 3"),
        (linear(), {"rank_pattern": {"(": 2}, "alpha_pattern": {")": 1}}, r"rank_pattern has .*\n.*alpha_pattern has"),
        (linear(), {"alpha_pattern": {f"(x{i}|y)*q": 1 for i in range(3000)}}, "alpha_pattern has 3,000 keys"),
        (linear(), {"target_modules": [1]}, "target_modules"),
        (linear(), {"lora_dropout": 2}, "lora_dropout is 2"),
        ({k: v.astype(np.float64) for k, v in linear().items()}, {}, r"F32, F16 and BF16, not .*\(F64\)"),
    ],
)
def test_bad_adapters(tensors, config, words, tmp_path):
    """A folder that contradicts params, itself or peft's format is refused by what is wrong, and no pattern hangs."""
    with pytest.raises(ValueError, match=words):
        peft.load(write(tmp_path / "x", tensors, **config), Q)


@pytest.mark.parametrize(
    "tensors,params,names,words",
    [
        (linear("q"), STACK, None, r"is stacked \(2,\)"),
        (linear("l.0.q"), STACK, {"l.{n}.q": "q/kernel"}, r"no module for \(1,\)"),
        (linear("l.0.q") | linear("l.2.q"), STACK, {"l.{n}.q": "q/kernel"}, r"no slice \(2,\)"),
        (
            linear("l.0.q") | linear("l.1.q", r=1),
            STACK,
            {"l.{n}.q": "q/kernel"},
            "LoRA of rank [12], and other slices",
        ),
        (linear("a") | linear("b"), Q, {"a": "q/kernel", "b": "q/kernel"}, "adapted twice, by 'a' and 'b'"),
        (linear("a.1"), Q, {"a.{n}": "q/kernel", "a.1": "q/kernel"}, "could be any of"),
        (linear("q"), {"q": {"kernel": jnp.ones((6, 4)), "scale": jnp.ones(4)}}, None, "could be any of"),
        (linear("q"), {"params": Q, **Q}, None, "could be any of"),
        (linear("q"), Q, {"q": "v/kernel"}, "no 'v/kernel'"),
        (linear("q"), Q, {"q{": "q/kernel"}, "a number is written {n}"),
        (linear("q"), Q, {"q": "q/{n}/kernel"}, "a number is written {n}"),
        (linear("q"), Q, {"q": 1}, "path of its weight"),
        (linear("q"), Q, "q", "names is a dictionary"),
    ],
)
def test_bad_names(tensors, params, names, words, tmp_path):
    """Names that leave a slice out, take a weight twice or could mean several are refused and never guessed."""
    with pytest.raises((ValueError, TypeError), match=words):
        axes = {"kernel": "sio"} if params is STACK else None
        peft.load(write(tmp_path / "x", tensors, rank_pattern={"z": 1}), params, names, axes=axes)


def test_everything_bad_is_named_at_once(tmp_path):
    """One error names all that is wrong with a folder's tensors, module by module."""
    tensors = A | linear("v") | {"lora_x": normal(2)} | linear("b", d_in=7)
    with pytest.raises(ValueError) as error:
        peft.load(write(tmp_path / "x", tensors), Q | {"b": {"kernel": jnp.ones((6, 4))}})
    for words in ("missing", "'v' is not in params", "lora_x", "(2, 7)"):
        assert words in str(error.value)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b'{"r": 1, "r": 2}', b'{"r": ' + b"9" * 9999]
)
def test_damaged_configurations(raw, tmp_path):
    """A configuration that is not one sound JSON object is refused by its name, and a deep or long one too."""
    folder = write(tmp_path / "x", linear())
    (folder / CONFIG).write_bytes(raw)
    with pytest.raises(ValueError, match="adapter_config.json"):
        peft.load(folder, Q)


def test_damaged_tensors(tmp_path):
    """A tensor file that lost or gained a byte, or whose header is wrong, is refused and never read as numbers."""
    folder = write(tmp_path / "x", linear())
    raw = (folder / TENSORS).read_bytes()
    for damaged in (b"", raw[:5], raw[:60], raw[:-1], raw + b"x", b"\xff" * 8 + raw[8:], raw.replace(b"F32", b"F99")):
        (folder / TENSORS).write_bytes(damaged)
        with pytest.raises(ValueError, match="adapter_model.safetensors is cut short or damaged"):
            peft.load(folder, Q)


def test_what_is_not_there(tmp_path, monkeypatch):
    """What is missing is named, file, package or base; a pickle in its place is never opened."""
    with pytest.raises(FileNotFoundError, match="adapter_config.json and adapter_model.safetensors not found"):
        peft.load(tmp_path, Q)
    folder = write(tmp_path / "x", linear())
    (folder / TENSORS).rename(folder / "adapter_model.bin")
    with pytest.raises(FileNotFoundError, match="a pickle, which runs code"):
        peft.load(folder, Q)
    folder = write(tmp_path / "x", linear())
    adapted = peft.load(folder, Q)
    with pytest.raises(TypeError, match="load takes the base"):
        peft.load(folder, adapted)
    with pytest.raises(ValueError, match="real floating point"):
        peft.load(folder, Q, dtype="int32")
    monkeypatch.setitem(sys.modules, "safetensors", None)
    for call in (lambda: peft.load(folder, Q), lambda: peft.save(tmp_path / "y", adapted)):
        with pytest.raises(ImportError, match=r"pip install 'jlora\[peft\]'"):
            call()
    assert not (tmp_path / "y").exists()


def test_abstract_params(tmp_path):
    """Factors load onto structs; a value saved whole does not, as its change needs the base's numbers."""
    folder = write(tmp_path / "x", linear())
    abstract = jax.eval_shape(lambda: Q)
    assert jlora.count(peft.load(folder, abstract)) == (20, 48)
    folder = write(tmp_path / "x", linear() | {"q.bias": normal(4)}, bias="all")
    with pytest.raises(ValueError, match="'q/bias' is abstract"):
        peft.load(folder, abstract)


# --- interrupted saves --------------------------------------------------------------------------------------------


def test_nothing_else_is_replaced(tmp_path):
    """Nothing is replaced unasked, and with overwrite=True only an adapter of peft's."""
    adapted = jlora.adapt(Q, jlora.LoRA(rank=2, target="q/kernel"))
    peft.save(tmp_path / "x", adapted)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        peft.save(tmp_path / "x", adapted)
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "file").write_text("mine")
    with pytest.raises(FileExistsError, match="holds no adapter of peft"):
        peft.save(tmp_path / "y", adapted, overwrite=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x", "y"]


def test_links_and_other_files(tmp_path, monkeypatch):
    """A link to a folder stays one; a file system without hard links; what a link in the folder points to is gone."""
    adapted = jlora.adapt(Q, jlora.LoRA(rank=2, target="q/kernel"))
    peft.save(tmp_path / "x", adapted)
    (tmp_path / "x" / "gone").symlink_to("nowhere")
    (tmp_path / "x" / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "x")

    def refused(*args, **kwargs):
        raise OSError

    for link in (None, refused):
        with monkeypatch.context() as patch:
            if link:
                patch.setattr("os.link", link)
            peft.save(tmp_path / "link", adapted, overwrite=True)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "x" / "gone").is_symlink()
        assert (tmp_path / "x" / "mine").read_text() == "mine"
        assert_same(peft.load(tmp_path / "link", Q), adapted)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["link", "x"]


def test_loading_while_another_saves(tmp_path, monkeypatch):
    """The configuration of one adapter and the tensors of another are never taken together."""
    first, second = (jlora.adapt(Q, jlora.LoRA(rank=2, alpha=a, target="q/kernel")) for a in (2, 8))
    second = jlora.join(jax.tree.map(lambda x: x + 1, second.trainable), second.frozen)
    peft.save(tmp_path / "x", first)
    read, late = _peft_layout.read, iter([second])

    def between(path):
        for adapted in late:
            peft.save(tmp_path / "x", adapted, overwrite=True)
        return read(path)

    monkeypatch.setattr(_peft_layout, "read", between)
    assert_same(peft.load(tmp_path / "x", Q), second)
