"""Mistakes that people make: each is refused in words that name what was given, and the line to write instead.

(What `adapt` refuses stands in `test_bad_input.py`.)
"""

import copy
import dataclasses
import functools
import inspect
import pickle

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import PartitionSpec as P

import jlora

pytestmark = pytest.mark.settled

PARAMS = {
    "layer_0": {"query": {"kernel": jax.random.normal(jax.random.key(1), (64, 4))}},
    "head": {"kernel": jnp.ones((4, 3))},
}
PATH = "layer_0/query/kernel"
LORA = jlora.LoRA(rank=2, target="query/kernel$")
ADAPTED = jlora.adapt(PARAMS, LORA)
TRAINABLE, FROZEN = jlora.split(ADAPTED)
X = jnp.ones((5, 64))
TX = optax.adam(0.01)
MESH = jax.make_mesh((1,), ("data",))
AN, RANK, QUANT, PLOT, SHARD, INIT = jlora.analysis, jlora.rank, jlora.quant, jlora.plot, jlora.shard, jlora.init


def model(params, x):
    return jnp.tanh(x @ params["layer_0"]["query"]["kernel"]) @ params["head"]["kernel"]


def tensor():
    """A leaf of another library: it has a shape, and a dtype that NumPy does not know."""
    dtype = type("dtype", (), {"__repr__": lambda _: "torch.float32"})()
    return type("Tensor", (), {"shape": (6, 4), "dtype": dtype, "__module__": "torch"})()


def adapt(**options):
    return lambda: jlora.adapt(PARAMS, dataclasses.replace(LORA, **options))


def donated():
    params = {"query": {"kernel": 2 * jnp.ones((6, 4))}}
    params["query"]["kernel"].delete()
    return params


# --- an Adapted is wanted -----------------------------------------------------------------------------------------

TAKES_AN_ADAPTED = {
    "merge": jlora.merge, "merge_report": jlora.merge_report, "count": jlora.count, "table": jlora.table,
    "split": jlora.split, "scale": lambda x: jlora.scale(x, 0.5), "unmerge": lambda x: jlora.unmerge(PARAMS, x),
    "with_dropout": lambda x: jlora.with_dropout(x, jax.random.key(0)), "plain": INIT.plain,
    "requantize": QUANT.requantize, "weights": AN.weights, "factors": AN.factors, "updates": AN.updates,
    "lora_plus": jlora.optim.lora_plus, "riemannian": jlora.optim.riemannian, "lora_fa": jlora.optim.lora_fa,
    "orthogonality": RANK.orthogonality, "magnitude": RANK.magnitude, "ranks": RANK.ranks, "compact": RANK.compact,
    "prune": lambda x: RANK.prune(x, {}, 1), "at_rank": lambda x: RANK.at_rank(x, 1), "unstack": jlora.unstack,
    "resize": lambda x: RANK.resize(x, rank=1), "onto layers": lambda x: RANK.unstack(x, PARAMS, lambda p, n: p),
    "save": lambda x: jlora.save("x", x), "export": lambda x: jlora.export("x", x),
    "peft": lambda x: jlora.io.peft.save("x", x),
    "state_shardings": lambda x: SHARD.state_shardings(TX, x),
    "train_step": lambda x: SHARD.train_step(lambda a, b: 0.0, TX, MESH, x, batch=P()),
}  # fmt: skip

WRONG = {
    "parameters": (PARAMS, ["jlora.adapt(params, spec)"]),
    "an adapter inside": ({"params": ADAPTED}, ["inside", "['params']"]),
    "the trainable half": (TRAINABLE, ["trainable half", "jlora.join(trainable, frozen)"]),
    "the frozen half": (FROZEN, ["frozen half", "jlora.join(trainable, frozen)"]),
    "both halves": ((TRAINABLE, FROZEN), ["the two halves", "jlora.join(*halves)"]),
    "a mask": (jlora.trainable_mask(ADAPTED).trainable, ["jlora.adapt"]),
    "None": (None, ["None"]),
    "a number": (0.5, ["0.5"]),
    "unsortable keys": ({0: 1, "a": 2}, ["a dict of 2"]),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("name", TAKES_AN_ADAPTED)
def test_what_is_no_adapter_is_refused_with_the_line_to_write(name, what, tmp_path, monkeypatch):
    """Every function of an adapter says what it was given in place of one."""
    monkeypatch.chdir(tmp_path)
    given, words = WRONG[what]
    with pytest.raises(TypeError) as caught:
        TAKES_AN_ADAPTED[name](given)
    for word in ["Adapted", *words]:
        assert word in str(caught.value), f"{word!r} is not in: {caught.value}"


# What says the same of one adapter and of several, or acts on each.
TAKES_A_STACK = {"count", "table", "split", "scale", "with_dropout", "plain", "unstack"}


@pytest.mark.parametrize("name", [name for name in TAKES_AN_ADAPTED if name not in TAKES_A_STACK])
def test_a_stack_where_one_adapter_is_wanted_is_refused(name, tmp_path, monkeypatch):
    """The axis of the adapters is none of their ranks: the way through `jax.vmap` or `unstack` is named."""
    monkeypatch.chdir(tmp_path)
    stacked = jlora.stack([ADAPTED, jlora.adapt(PARAMS, dataclasses.replace(LORA, alpha=8))]).adapted
    with pytest.raises(ValueError, match="stack of 2 adapters"):
        TAKES_AN_ADAPTED[name](stacked)


@pytest.mark.parametrize(
    "call", [jlora.lift(model), jlora.lift(model, dense=True), functools.partial(jlora.explain, model)]
)
def test_a_stack_is_lifted_under_vmap_alone(call):
    """Called as it stands, each of a, b and s has an axis too many."""
    with pytest.raises(ValueError, match=r"stack of 2 adapters.*jax.vmap\(..., in_axes=\(axes, ...\)\)"):
        call(jlora.stack([ADAPTED, ADAPTED]).adapted, X)


# --- an Adapted is taken for something else -----------------------------------------------------------------------

TAKEN_FOR = {
    "a function": (lambda: ADAPTED(X), TypeError, ["jlora.lift(model.apply)({'params': adapted}, x)", "NNX"]),
    "a dictionary": (lambda: ADAPTED["layer_0"], TypeError,
                     ["adapted['layer_0']", "jlora.lift", "adapted.frozen.base", "jlora.merge"]),
    "what is iterated": (lambda: list(ADAPTED), TypeError, ["trainable, frozen = jlora.split(adapted)"]),
    "what is unpacked": (lambda: dict(**ADAPTED), TypeError, []),
    "a mapping": (lambda: ADAPTED.items(), AttributeError, ["'items'", "jlora.lift", "adapted.frozen.base"]),
    "variables of Linen": (lambda: nn.Dense(3).apply(ADAPTED, X), AttributeError, ["'items'", "jlora.lift"]),
    "an array": (lambda: X @ ADAPTED, TypeError, ["no array", "jlora.lift"]),
    "a number, scaled": (lambda: 0.5 * ADAPTED, TypeError, ["jlora.scale(adapted, x)"]),
    "a number, averaged": (lambda: ADAPTED + ADAPTED, TypeError, ["jax.tree.map over adapted.trainable"]),
    "a module": (lambda: ADAPTED.apply({}, X), AttributeError, ["'apply'", "jlora.lift"]),
}  # fmt: skip


def refused(action, kinds, words):
    with pytest.raises(kinds) as caught:
        action()
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert len(text) < 2000


@pytest.mark.parametrize("name", TAKEN_FOR)
def test_an_adapter_says_that_it_is_none_of_that(name):
    """An Adapted called, indexed, iterated or multiplied names the function to write in place of that."""
    refused(*TAKEN_FOR[name])


def test_an_adapter_is_still_a_value():
    """Copied, pickled, probed and mapped over as before: the answers are no part of it."""
    for other in (copy.copy(ADAPTED), copy.deepcopy(ADAPTED), pickle.loads(pickle.dumps(ADAPTED))):
        assert jax.tree.structure(other) == jax.tree.structure(ADAPTED)
        for a, b in zip(jax.tree.leaves(other), jax.tree.leaves(ADAPTED), strict=True):
            np.testing.assert_array_equal(a, b)
    for name in ("shape", "dtype", "items", "__array__", "__jax_array__", "__len__", "_fields", "aval"):
        assert not hasattr(ADAPTED, name), name
    doubled = jax.tree.map(lambda x: 2 * x, ADAPTED)
    np.testing.assert_array_equal(doubled.trainable[PATH]["a"], 2 * TRAINABLE[PATH]["a"])
    state = TrainState.create(apply_fn=jlora.lift(model), params=ADAPTED, tx=jlora.masked(TX))
    assert state.apply_gradients(grads=jax.tree.map(jnp.zeros_like, ADAPTED)).step == 1


@pytest.mark.parametrize("form", ["split", "whole"])
def test_trees_of_masks_and_labels_go_into_optax(form):
    """optax calls what can be called: a mask and labels in the form of an Adapted are themselves when called."""
    params = TRAINABLE if form == "split" else ADAPTED
    labels = jlora.optim.factor_labels(params)
    tx = optax.partition({"a": TX, "b": TX, "frozen": optax.set_to_zero()}, labels)
    tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)
    tx = optax.masked(TX, jlora.trainable_mask(params))
    tx.update(jax.tree.map(jnp.ones_like, params), tx.init(params), params)


# --- every room ---------------------------------------------------------------------------------------------------

QUANTISED = jlora.quantize(PARAMS, target="query")
SVD = AN.svd(jnp.eye(3))
NAN = jnp.full((64, 4), jnp.nan)
spec_of = lambda **options: jlora.LoRA(rank=2, target="query/kernel$", **options)

TABLE = {
    # lift, explain, infer_axes
    "lift of an adapter": (lambda: jlora.lift(ADAPTED), TypeError, ["function first", "model.apply"]),
    "lift of a Linen module": (lambda: jlora.lift(nn.Dense(3)), TypeError, ["Linen", "model.apply"]),
    "lift of an NNX module": (lambda: jlora.lift(nnx.Linear(2, 2, rngs=nnx.Rngs(0))), TypeError,
                              ["NNX", "lambda model, x: model(x)"]),
    "lift of parameters": (lambda: jlora.lift(PARAMS), TypeError, ["function", "a dict of 2"]),
    "a call with the trainable half": (lambda: jlora.lift(model)(TRAINABLE, X), TypeError,
                                       ["jlora.join(trainable, frozen)", "KeyError"]),
    "a Linen call with the trainable half": (
        lambda: jlora.lift(nn.Dense(4).apply)({"params": {"kernel": TRAINABLE[PATH]}}, X), TypeError,
        ["jlora.join(trainable, frozen)", "without an Adapted"]),
    "jvp": (lambda: jax.jvp(lambda t: jlora.lift(model)(jlora.join(t, FROZEN), X), (TRAINABLE,), (TRAINABLE,)),
            TypeError, ["forward_mode=True"]),
    "jacfwd": (lambda: jax.jacfwd(lambda t: jlora.lift(model)(jlora.join(t, FROZEN), X))(TRAINABLE), TypeError,
               ["forward_mode=True"]),
    "explain swapped": (lambda: jlora.explain(ADAPTED, model, X), TypeError, ["explain", "function"]),
    "infer_axes swapped": (lambda: jlora.infer_axes(PARAMS, model, X), TypeError, ["infer_axes", "function"]),
    "infer_axes of an adapter": (lambda: jlora.infer_axes(model, ADAPTED, X), TypeError, ["Adapted", "frozen.base"]),
    # adapt
    "a Linen module for parameters": (lambda: jlora.adapt(nn.Dense(3), LORA), TypeError, ["Dense", "model.init"]),
    "None for parameters": (lambda: jlora.adapt(None, LORA), TypeError, ["None", "tree of parameters"]),
    "a function for parameters": (lambda: jlora.adapt(model, LORA), TypeError, ["model", "tree of parameters"]),
    "a path for parameters": (lambda: jlora.adapt("model.safetensors", LORA), TypeError, ["model.safetensors"]),
    "a tensor": (lambda: jlora.adapt({"query": {"kernel": tensor()}}, LORA), ValueError,
                 ["query/kernel", "torch", "jnp.asarray"]),
    "a donated base": (lambda: jlora.adapt(donated(), LORA), ValueError, ["query/kernel", "donated"]),
    "axes in one string": (lambda: jlora.adapt(PARAMS, LORA, axes="io"), TypeError,
                           ["axes='io'", "{pattern: letters}"]),
    "axes of lists": (lambda: jlora.adapt(PARAMS, LORA, axes={PATH: ["i", "o"]}), TypeError, ["axes=", "'io'"]),
    "axes of a number": (lambda: jlora.adapt(PARAMS, LORA, axes={PATH: 0}), TypeError, ["axes=", "'io'"]),
    # halves and merging
    "halves of None": (lambda: jlora.join({PATH: {"a": None, "b": None}}, FROZEN), ValueError, [PATH, "None"]),
    "halves of lists": (lambda: jlora.join(jax.tree.map(lambda a: np.asarray(a).tolist(), TRAINABLE), FROZEN),
                        ValueError, [PATH, "a list"]),
    "scale by None": (lambda: jlora.scale(ADAPTED, None), TypeError, ["scalar", "None"]),
    "scale by a dict": (lambda: jlora.scale(ADAPTED, {"layer_0": 0.5}), TypeError, ["scalar", "dict"]),
    "scale by a text": (lambda: jlora.scale(ADAPTED, "0.5"), TypeError, ["scalar", "'0.5'"]),
    "a half that is none": (lambda: jlora.merge(jlora.Adapted(None, FROZEN)), ValueError, ["trainable is {group"]),
    "a lifted half that is none": (
        lambda: jlora.lift(model)(jlora.Adapted({PATH: None}, FROZEN), X), ValueError, ["trainable is {group"],
    ),
    "a factor that is none": (
        lambda: jlora.merge(jlora.Adapted({PATH: {"a": None, "b": None}}, FROZEN)), ValueError, ["'a' is None"],
    ),
    "scale by a complex number": (lambda: jlora.scale(ADAPTED, np.complex64(1j)), TypeError, ["scalar"]),
    "scale by NaN": (lambda: jlora.scale(ADAPTED, float("nan")), ValueError, ["finite", "nan"]),
    "scale by too much": (lambda: jlora.scale(ADAPTED, 10**400), ValueError, ["float32's range"]),
    "scale by a NumPy text": (lambda: jlora.scale(ADAPTED, np.str_("3")), TypeError, ["scalar"]),
    "scale by a key": (lambda: jlora.scale(ADAPTED, jax.random.key(0)), TypeError, ["scalar"]),
    "dropout without a key": (lambda: jlora.with_dropout(ADAPTED, None), TypeError, ["takes a key", "no dropout"]),
    "a scale that is zero": (adapt(rank=6, alpha=3e-45), ValueError, ["LoRA on", "'s' of 5e-46 is 0 in float32"]),
    "a scale that is zero in float16": (adapt(alpha=1e-9, dtype="float16"), ValueError, ["is 0 in float16"]),
    "a scale that is infinite": (adapt(alpha=1e6, dtype="float16"), ValueError, ["is inf in float16", "wider dtype="]),
    "a start that is zero": (
        lambda: jlora.adapt(PARAMS, jlora.VeRA(d_initial=1e-9, dtype="float16", target=LORA.target)),
        ValueError, ["VeRA on", "'d' of 1e-09 is 0 in float16"],
    ),
    "a rank beyond all sizes": (adapt(rank=2**80), ValueError, ["rank", "31 bits"]),
    "scale swapped": (lambda: jlora.scale(0.5, ADAPTED), TypeError, ["Adapted", "0.5"]),
    "unmerge swapped": (lambda: jlora.unmerge(ADAPTED, PARAMS), TypeError, ["Adapted"]),
    "unmerge of an adapter": (lambda: jlora.unmerge(ADAPTED, ADAPTED), TypeError, ["merged parameters first"]),
    "merge_report in jit": (lambda: jax.jit(lambda a: jlora.merge_report(a).worst)(ADAPTED), TypeError,
                            ["merge_report", "outside of jit"]),
    "unmerge in jit": (lambda: jax.jit(lambda a: jlora.unmerge(jlora.merge(a), a).params)(ADAPTED), TypeError,
                       ["unmerge", "outside of jit"]),
    # starts
    "PiSSA of NaN": (lambda: jlora.adapt({"query": {"kernel": NAN}}, spec_of(init="pissa")), ValueError,
                     ["query/kernel", "NaN"]),
    "GA of NaN": (lambda: jlora.adapt(PARAMS, spec_of(init=INIT.GA({PATH: NAN}))), ValueError, [PATH, "NaN"]),
    "GA of a list": (lambda: jlora.adapt(PARAMS, spec_of(init=INIT.GA([NAN]))), ValueError, ["{path: gradient}"]),
    "Given of no pair": (lambda: jlora.adapt(PARAMS, spec_of(init=INIT.Given({PATH: jnp.ones(3)}))), ValueError,
                         [PATH, "a pair (a, b)"]),
    "gradients of no function": (lambda: INIT.gradients(PARAMS, model, [X], LORA), TypeError,
                                ["gradients", "function"]),
    "one batch for batches": (lambda: INIT.activations(model, PARAMS, 3, LORA), TypeError, ["iterable of batches"]),
    "redistributed swapped": (lambda: INIT.redistributed({}, LORA), TypeError, ["moments", "a LoRA"]),
    "redistributed rho of NaN": (lambda: INIT.redistributed(LORA, {PATH: jnp.eye(64)}, rho=float("nan")), ValueError,
                                 ["rho=nan"]),
    "loftq of DoRA": (lambda: INIT.loftq(PARAMS, jlora.DoRA(LORA), "nf4"), TypeError, ["one LoRA", "DoRA"]),
    "loftq of a list": (lambda: INIT.loftq(PARAMS, [LORA], "nf4"), TypeError, ["one LoRA", "a list of 1"]),
    "half a step of loftq": (lambda: INIT.loftq(PARAMS, LORA, "nf4", steps=1.5), ValueError, ["steps=1.5"]),
    # quantising
    "quantize swapped": (lambda: jlora.quantize("nf4", PARAMS), TypeError, ["scheme", "a dict of 2"]),
    "a class for a scheme": (lambda: jlora.quantize(PARAMS, QUANT.NF), TypeError, ["write NF()"]),
    "bits of a float": (lambda: QUANT.NF(4.0), ValueError, ["bits=4.0"]),
    "bits of a flag": (lambda: QUANT.Int(True), ValueError, ["bits=True"]),
    "a flag for a block": (lambda: QUANT.NF(4, True), ValueError, ["block=True"]),
    "double in words": (lambda: QUANT.NF(4, double="yes"), ValueError, ["double='yes'"]),
    "quantize of None": (lambda: jlora.quantize(None), TypeError, ["None"]),
    "quantize with axes in one string": (lambda: jlora.quantize(PARAMS, axes="io"), TypeError, ["{pattern: letters}"]),
    "donate in words": (lambda: jlora.quantize(PARAMS, donate="no"), ValueError, ["donate='no'"]),
    # analysis
    "cost of an adapter": (lambda: AN.cost(ADAPTED, LORA), TypeError, ["plain parameters", "Adapted"]),
    "cost of tokens in words": (lambda: AN.cost(PARAMS, LORA, tokens="512"), ValueError, ["tokens='512'"]),
    "cost of a rate": (lambda: AN.cost(PARAMS, LORA, optimizer=1e-3), TypeError, ["optax.adamw(0.001)"]),
    "effective rank of an SVD": (lambda: AN.effective_rank(SVD), TypeError, ["SVD", "x.s"]),
    "stable rank of an SVD": (lambda: AN.stable_rank(SVD), TypeError, ["SVD", "x.s"]),
    "svd of an SVD": (lambda: AN.svd(SVD), TypeError, ["SVD", "x.matrix"]),
    "svd of an adapter": (lambda: AN.svd(ADAPTED), TypeError, ["an Adapted, not an array"]),
    "angles of SVDs": (lambda: AN.principal_angles(SVD, SVD), TypeError, ["SVD", "x.matrix"]),
    "intruders of SVDs": (lambda: AN.intruders(SVD, SVD, k=2), TypeError, ["weights", "SVD"]),
    "intruders of NaN": (lambda: AN.intruders(jnp.eye(3), jnp.eye(3), k=2, epsilon=float("nan")), ValueError,
                         ["epsilon=nan"]),
    "half an intruder": (lambda: AN.intruders(jnp.eye(3), jnp.eye(3), k=1.5), ValueError, ["k=1.5"]),
    "half a rank of an amplification": (lambda: AN.amplification(SVD, jnp.eye(3), rank=1.5), ValueError, ["rank=1.5"]),
    "half a truncation": (lambda: AN.truncate(SVD, 1.5), ValueError, ["rank=1.5"]),
    "a random subspace of half a dimension": (lambda: AN.random_similarity(4, 1.5, 2), ValueError, ["i=1.5"]),
    "d90 without training": (lambda: AN.intrinsic_dimension(None, PARAMS, [4], baseline=1.0), TypeError, ["function"]),
    "d90 of one dimension": (lambda: AN.intrinsic_dimension(model, PARAMS, 4, baseline=1.0), ValueError, ["[10, 100"]),
    "d90 against NaN": (lambda: AN.intrinsic_dimension(model, PARAMS, [4], baseline=float("nan")), ValueError,
                        ["baseline=nan"]),
    "d90 of LoRA": (lambda: AN.intrinsic_dimension(model, PARAMS, [4], baseline=1.0, method=LORA), TypeError,
                    ["IntrinsicDimension"]),
    "names of a dict": (lambda: RANK.unstack(ADAPTED, PARAMS, {}), TypeError, ["names(path, index)", "a dict"]),
    # plots
    "spectra of updates": (lambda: PLOT.spectra(AN.updates(ADAPTED)), TypeError, ["SVD", "x.s for path, x in"]),
    "spectra of an adapter": (lambda: PLOT.spectra(ADAPTED), TypeError, ["{label: s (k,)}", "an Adapted"]),
    "spectra of texts": (lambda: PLOT.spectra({"a": ["x"]}), ValueError, ["'a'", "singular values are numbers"]),
    "allocation of an adapter": (lambda: PLOT.allocation(ADAPTED), TypeError, ["jlora.rank.ranks(adapted)"]),
    "allocation of texts": (lambda: PLOT.allocation({"a": "four"}), ValueError, ["'a'", "ranks are numbers"]),
    "ranks of a list": (lambda: PLOT.ranks([1]), TypeError, ["history", "jlora.rank.ranks"]),
    "ranks of ranks": (lambda: PLOT.ranks({"layer_0": 4}), TypeError, ["history", "the int 4"]),
    "ranks with a budget of a number": (lambda: PLOT.ranks({0: {"a": 1}}, budget=8), TypeError, ["budget", "b(t)"]),
    "pareto of scores": (lambda: PLOT.pareto({"a": 0.5}), ValueError, ["pareto", "(parameters, score)"]),
    "pareto of texts": (lambda: PLOT.pareto({"a": (10, "0.5")}), ValueError, ["pareto", "'a'", "numbers"]),
    "curves of a list": (lambda: PLOT.curves([1, 2]), TypeError, ["curves", "(steps, values)"]),
    "curves of losses": (lambda: PLOT.curves({"a": [0.5, 0.4, 0.3]}), ValueError, ["curves", "(steps, values)"]),
    "a sweep of scores": (lambda: PLOT.sweep({"a": 0.5}), ValueError, ["sweep", "(sizes, scores)"]),
    "levels of a number": (lambda: PLOT.scores({"a": 0.5}, levels=0.4), TypeError, ["levels", "{label: score}"]),
    "levels of texts": (lambda: PLOT.scores({"a": 0.5}, levels={"b": "x"}), ValueError, ["levels", "'b'"]),
    "scores of texts": (lambda: PLOT.scores({"a": "0.9"}), ValueError, ["scores", "'a'", "'0.9'"]),
    "scores of None": (lambda: PLOT.scores({"a": None}), ValueError, ["scores", "'a'", "None"]),
    "similarity of an SVD": (lambda: PLOT.similarity(SVD), TypeError, ["grid", "analysis.similarity"]),
    "amplification of updates": (lambda: PLOT.amplification(AN.updates(ADAPTED)), TypeError,
                                 ["analysis.amplification(update, weight)"]),
    "a figure on a figure": (lambda: PLOT.scores({"a": 0.5}, ax=3), TypeError, ["ax=", "panels"]),
    "a saved path": (lambda: PLOT.save("f.png", PLOT.scores({"a": 0.5})), TypeError, ["figure", "'f.png'"]),
    "half a panel": (lambda: PLOT.panels(1.5), ValueError, ["rows=1.5"]),
    # meshes
    "init without a mesh": (lambda: SHARD.init(PARAMS, LORA, None, []), TypeError, ["mesh", "None"]),
    "shardings swapped": (lambda: SHARD.shardings(ADAPTED, MESH, []), TypeError, ["mesh", "Adapted"]),
    "specs of a mesh of a number": (lambda: SHARD.partition_specs(ADAPTED, [], 8), TypeError, ["mesh", "8"]),
    "an estimate of a batch in words": (lambda: SHARD.estimate(PARAMS, LORA, MESH, [("k", P())], batch="data"),
                                        TypeError, ["batch='data'", "PartitionSpec"]),
    "an estimate over no axis": (lambda: SHARD.estimate(PARAMS, LORA, MESH, [("k", P())], batch=P("fsdp")), ValueError,
                                 ["fsdp", "data"]),
    "an estimate of a rate": (lambda: SHARD.estimate(PARAMS, LORA, MESH, [("k", P())], batch=P(), tx=1e-3), TypeError,
                              ["optax.adamw(0.001)"]),
    "a step without a loss": (lambda: SHARD.train_step(ADAPTED, TX, MESH, ADAPTED, batch=P()), TypeError, ["loss"]),
    "a step with a rate": (lambda: SHARD.train_step(lambda a, b: 0.0, 1e-3, MESH, ADAPTED, batch=P()), TypeError,
                           ["optax.adamw(0.001)"]),
    "a step of half a microbatch": (
        lambda: SHARD.train_step(lambda a, b: 0.0, TX, MESH, ADAPTED, batch=P(), accumulate=1.5), ValueError,
        ["accumulate=1.5"]),
    "a step with a clip of NaN": (
        lambda: SHARD.train_step(lambda a, b: 0.0, TX, MESH, ADAPTED, batch=P(), clip=float("nan")), ValueError,
        ["clip=nan"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_refused_in_words(name):
    """In every room a wrong argument is refused where it is given, in words that name it, and at no great length."""
    if name in PLOTS:
        pytest.importorskip("matplotlib", reason="matplotlib is an extra")
    refused(*TABLE[name])


PLOTS = {name for name, (action, *_) in TABLE.items() if "PLOT" in inspect.getsource(action)}


def test_a_failing_call_on_plain_parameters_says_what_it_always_said():
    """Only what looks like a trainable half is taken for one: other errors pass as they are."""
    with pytest.raises(KeyError, match="missing"):
        jlora.lift(lambda params, x: params["missing"])(PARAMS, X)
    with pytest.raises(ZeroDivisionError):
        jlora.lift(lambda params: 1 / 0)(nn.Dense(3).init(jax.random.key(0), X)["params"])
