"""Bad input: what goes in, which exception comes out, and the words it must contain."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jlora

PARAMS = {
    "layer_0": {"query": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}},
    "layer_1": {"query": {"kernel": jnp.ones((6, 4)), "bias": jnp.zeros(4)}},
    "head": {"kernel": jnp.ones((4, 3))},
}


def lora(**options):
    return jlora.LoRA(**({"rank": 2, "target": "query/kernel$"} | options))


def adapted(params=PARAMS, spec=None, **options):
    return jlora.adapt(params, lora() if spec is None else spec, **options)


def factors(**changes):
    """Trainable factors of PARAMS, one group changed or (None) left out."""
    trainable = dict(adapted().trainable)
    trainable |= {name.replace("__", "/"): value for name, value in changes.items()}
    return {name: value for name, value in trainable.items() if value is not None}


class Shared(nnx.Module):
    """One layer under two attributes."""

    def __init__(self):
        self.first = nnx.Linear(6, 6, rngs=nnx.Rngs(0))
        self.second = self.first


ONE = jnp.ones((6, 4))
TIED = {"embed": {"embedding": ONE}, "head": {"kernel": ONE}}
HALF = {"layer_0/query/kernel": {"a": jnp.ones((2, 6)), "b": jnp.ones((2, 4))}}

TABLE = {
    # targets
    "nothing matched": (lambda: adapted(spec=lora(target="qeury/kernel")), ValueError,
                        ["matches no leaf", "nearest", "layer_0/query/kernel", "layer_1/query/kernel"]),
    "nothing matched by a callable": (lambda: adapted(spec=lora(target=lambda path, leaf: False)), ValueError,
                                      ["LoRA", "<lambda>", "matches no leaf"]),
    "nothing matched by the default": (lambda: adapted({"dense": {"kernel": ONE}}, jlora.LoRA(rank=2)), ValueError,
                                       ["attention", "matches no leaf", "dense/kernel"]),
    "one of two rules matches nothing": (lambda: adapted(spec=[lora(), jlora.BitFit(target="nowhere")]), ValueError,
                                         ["BitFit", "'nowhere'", "matches no leaf"]),
    "everything excluded": (lambda: adapted(spec=lora(exclude="query")), ValueError, ["matches no leaf"]),
    "no leaves": (lambda: adapted({}), ValueError, ["matches no leaf", "the tree has no leaves"]),
    "no regular expression": (lambda: adapted(spec=lora(target="query(")), ValueError,
                              ["'query('", "not a regular expression"]),
    "no regular expression in a list": (lambda: adapted(spec=lora(target=["query/kernel", "*"])), ValueError,
                                        ["'*'", "not a regular expression"]),
    "a target of the wrong kind": (lambda: adapted(spec=lora(target=3)), TypeError, ["target", "3"]),
    # specs
    "no spec": (lambda: adapted(spec=[]), TypeError, ["a spec is a method"]),
    "a spec in words": (lambda: adapted(spec="lora"), TypeError, ["a spec is a method", "'lora'"]),
    "a class for a spec": (lambda: adapted(spec=jlora.LoRA), TypeError, ["a spec is a method"]),
    "a negative rank": (lambda: lora(rank=-1), ValueError, ["rank=-1"]),
    "half a rank": (lambda: lora(rank=2.5), ValueError, ["rank=2.5", "integer"]),
    "a flag for a rank": (lambda: lora(rank=True), ValueError, ["rank=True"]),
    "dropout of one": (lambda: lora(dropout=1.0), ValueError, ["dropout=1.0", "[0, 1)"]),
    "negative dropout": (lambda: lora(dropout=-0.1), ValueError, ["dropout=-0.1"]),
    "an unknown scaling": (lambda: lora(scaling="r"), ValueError, ["scaling='r'", "'sqrt'"]),
    "an unknown initialiser": (lambda: lora(init="zeros"), ValueError, ["init='zeros'", "'kaiming'"]),
    "rank by position": (lambda: jlora.LoRA(8), TypeError, []),
    "Full on everything": (lambda: jlora.Full(), ValueError, ["every leaf", "target="]),
    "a dtype that is none": (lambda: adapted(spec=lora(dtype="float31")), (TypeError, ValueError), ["float31"]),
    "factors of integers": (lambda: adapted(spec=lora(dtype="int32")), (TypeError, ValueError), ["int32"]),
    # weights
    "a vector for a matrix": (lambda: adapted(spec=lora(target="bias$")), ValueError, ["bias", "input and output"]),
    "integers": (lambda: adapted({"query": {"kernel": jnp.ones((6, 4), jnp.int32)}}), ValueError,
                 ["query/kernel", "int32", "floating"]),
    "complex numbers": (lambda: adapted({"query": {"kernel": jnp.ones((6, 4), jnp.complex64)}}), ValueError,
                        ["query/kernel", "complex64", "floating"]),
    "a key for a weight": (lambda: adapted({"query": {"kernel": jax.random.split(jax.random.key(0), (6, 4))}}),
                           ValueError, ["query/kernel", "floating"]),
    "no elements": (lambda: adapted({"query": {"kernel": jnp.ones((0, 4))}}), ValueError,
                    ["query/kernel", "(0, 4)", "without elements"]),
    "slices that overlap": (lambda: adapted(spec=lora(slices=((0, 3), (2, 4)))), ValueError,
                            ["((0, 3), (2, 4))", "disjoint", "4 output columns"]),
    "slices beyond the end": (lambda: adapted(spec=lora(slices=((0, 2), (2, 5)))), ValueError, ["4 output columns"]),
    "no slices": (lambda: adapted(spec=lora(slices=())), ValueError, ["slices=()"]),
    # axes
    "an unknown letter": (lambda: adapted(axes={"query/kernel": "ix"}), ValueError, ["'ix'", "query/kernel", "i (in)"]),
    "too many letters": (lambda: adapted(axes={"query/kernel": "sio"}), ValueError, ["'sio'", "(6, 4)", "2 letters"]),
    "axes by a glob": (lambda: adapted(axes={"*/kernel": "io"}), ValueError,
                       ["'*/kernel'", "matches no leaf", "reads as a glob", "write '/kernel'"]),
    "axes of nothing, quantised": (lambda: jlora.quantize({"w": jnp.ones((64, 8))}, axes={"q*t/w": "io"}), ValueError,
                                   ["'q*t/w'", "matches no leaf", "nearest"]),
    "axes of nothing": (lambda: adapted(axes={"qeury": "io"}), ValueError, ["'qeury'", "matches no leaf", "nearest"]),
    "all axes in": (lambda: adapted(axes={"query/kernel": "ii"}), ValueError, ["input and output axes"]),
    "axes that are no expression": (lambda: adapted(axes={"query(": "io"}), ValueError, ["query(", "regular"]),
    # ties and trees
    "one array under two paths": (lambda: adapted(TIED, jlora.LoRA(rank=2, target="embedding")), ValueError,
                                  ["embed/embedding", "head/kernel", "tied", "allow_untied"]),
    "one variable under two attributes": (lambda: adapted(Shared(), lora(target="kernel")), ValueError,
                                          ["first/kernel", "second/kernel", "nnx.split"]),
    "keys that print alike": (lambda: adapted({0: {"w": ONE}, "0": {"w": ONE}}, lora(target="w")), TypeError,
                              ["one kind", "str"]),
    "an adapter for a tree": (lambda: adapted(adapted()), TypeError, ["already an Adapted", "frozen.base"]),
    "a key of the wrong kind": (lambda: adapted(key=0), TypeError, ["PRNG key", "jax.random.key(0)"]),
    "a key from NumPy": (lambda: adapted(key=np.zeros(3)), TypeError, ["PRNG key"]),
    "several keys": (lambda: adapted(key=jax.random.split(jax.random.key(0), 3)), TypeError, ["one PRNG key"]),
    "a key for dropout of the wrong kind": (lambda: jlora.with_dropout(adapted(), 7), TypeError, ["PRNG key"]),
    # halves
    "halves in the wrong order": (lambda: jlora.join(*jlora.split(adapted())[::-1]), TypeError,
                                  ["(trainable, frozen)", "Frozen"]),
    "an adapter for a half": (lambda: jlora.join(adapted(), adapted().frozen), TypeError, ["Adapted"]),
    "the base for a half": (lambda: jlora.join(factors(), PARAMS), TypeError, ["(trainable, frozen)", "dict"]),
    "a missing group": (lambda: jlora.join(HALF, adapted().frozen), ValueError,
                        ["missing", "layer_1/query/kernel", "'a'", "'b'"]),
    "an extra group": (lambda: jlora.join(factors(head={"a": ONE}), adapted().frozen), ValueError,
                       ["extra", "'head'", "'a'"]),
    "a missing factor": (lambda: jlora.join(factors(layer_0__query__kernel={"a": jnp.ones((2, 6))}), adapted().frozen),
                         ValueError, ["missing", "layer_0/query/kernel", "'b'"]),
    "a misshapen factor": (lambda: jlora.join(factors(layer_0__query__kernel={"a": jnp.ones((3, 6)), "b": ONE}),
                                              adapted().frozen), ValueError,
                           ["layer_0/query/kernel", "(3, 6)", "(2, 6)", "(6, 4)", "(2, 4)"]),
    "a list for a half": (lambda: jlora.join([1, 2], adapted().frozen), ValueError, ["{group: {factor: array}}"]),
    # what is done with an adapter
    "an argument of another shape": (lambda: jlora.lift(lambda p, x: x @ p["head"]["kernel"])(adapted(), ONE.T),
                                     (TypeError, ValueError), ["dot_general", "(6,)"]),
    "a tree of another structure": (lambda: jlora.lift(lambda p: p["embed"])(adapted()), KeyError, ["embed"]),
    "explain without an adapter": (lambda: jlora.explain(lambda p: p, PARAMS), ValueError, ["Adapted", "arguments"]),
    "scale by an array": (lambda: jlora.scale(adapted(), jnp.ones(3)), ValueError, ["scalar", "(3,)"]),
    "unmerge of another tree": (lambda: jlora.unmerge({"x": ONE}, adapted()), ValueError, ["structure"]),
    "unmerge of other shapes": (lambda: jlora.unmerge(jax.tree.map(lambda x: x[:1], PARAMS), adapted()), ValueError,
                                ["layer_0/query/kernel", "(1, 4)", "(6, 4)"]),
    "whole form over integers": (
        lambda: jlora.masked(optax.sgd(0.1)).init(adapted(PARAMS | {"steps": jnp.array(3)})), TypeError,
        ["steps", "int32", "jlora.split"]),
}  # fmt: skip


@pytest.mark.parametrize("name", TABLE)
def test_refused_in_words(name):
    """A mistake raises the right kind of error, in a short text that names the culprit and what would be right."""
    action, kinds, words = TABLE[name]
    with pytest.raises(kinds) as caught:
        action()
    text = str(caught.value)
    for word in words:
        assert word in text, f"{word!r} is not in: {text}"
    assert len(text) < 2000


def test_all_bad_leaves_are_named_at_once():
    """One error names every leaf that cannot be adapted, with the axes to write where they would help, and no other."""
    params = {
        "a": ONE,
        "b": jnp.ones((6, 4), jnp.int8),
        "c": jnp.ones(4),
        "d": jnp.ones((2, 9, 3)),
        "e": jnp.ones((0, 3)),
    }
    with pytest.raises(ValueError) as caught:
        jlora.adapt(params, jlora.LoRA(rank=3, target="."))
    for word in ("'b'", "int8", "'c'", "'d' of shape (2, 9, 3)", "{r'^d$': 'sio'}", "'e'"):
        assert word in str(caught.value)
    assert "'a'" not in str(caught.value)


def test_the_pattern_to_write_for_a_vector_at_the_top_takes_it():
    """A leaf at the top has no slash before its name."""
    params = {"a": ONE, "c": jnp.ones(4), "x": {"c": jnp.ones(4)}}
    with pytest.raises(ValueError) as caught:
        jlora.adapt(params, jlora.LoRA(rank=1, target="."))
    written = re.search(r"exclude='(.*)'", str(caught.value))[1]
    assert list(jlora.adapt(params, jlora.LoRA(rank=1, target=".", exclude=written)).trainable) == ["a"]


# What is allowed, and said --------------------------------------------------------------------


def test_rank_zero_leaves_the_plan():
    """A rule of rank 0 keeps its weights out of the plan and from later rules, and the table says so."""
    ad = adapted(spec=[lora(target="layer_0/query/kernel", rank=0), lora()])
    assert list(ad.trainable) == ["layer_1/query/kernel"]
    assert "layer_0/query/kernel: rank 0, left as it is" in str(ad)
    assert jlora.count(ad)[0] == 2 * (6 + 4)


def test_rank_zero_everywhere_is_the_base():
    """An adapter of rank 0 alone has no parameters and still lifts, explains and prints, as the base."""
    ad = adapted(spec=lora(rank=0))
    f = lambda p, x: x @ p["layer_0"]["query"]["kernel"]
    x = jnp.ones((2, 6))
    assert ad.trainable == {} and jlora.count(ad)[0] == 0
    np.testing.assert_array_equal(jlora.lift(f)(ad, x), f(PARAMS, x))
    assert not jlora.explain(f, ad, x).rows
    str(ad)


def test_the_first_of_two_rules_wins():
    """A weight is its first matching rule's, and the table names the later rules that would have had it."""
    ad = adapted(spec=[lora(target="layer_0/query/kernel", rank=1), lora(rank=2), jlora.Full(target="query/kernel")])
    assert ad.trainable["layer_0/query/kernel"]["a"].shape == (1, 6)
    assert ad.trainable["layer_1/query/kernel"]["a"].shape == (2, 6)
    assert "rule 1 (LoRA) takes it before LoRA, Full" in str(ad)
    assert "rule 2 (LoRA) takes it before Full" in str(ad)


def test_a_rule_whose_leaves_all_went_to_another_is_no_error():
    """A rule that matches leaves is no mistake, though earlier rules have taken every one of them."""
    ad = adapted(spec=[lora(), jlora.Full(target="layer_1/query/kernel")])
    assert [type(s.method).__name__ for s in ad.frozen.plan.sites] == ["LoRA", "LoRA"]


def test_tied_arrays_may_be_adapted_at_both_ends_or_on_request():
    """A tied array is adapted where both its paths are, or at one of them where `allow_untied` asks for it."""
    both = jlora.adapt(TIED, jlora.LoRA(rank=2, target="embedding|kernel"))
    assert len(both.trainable) == 2
    one = jlora.adapt(TIED, jlora.LoRA(rank=2, target="embedding"), allow_untied=True)
    assert list(one.trainable) == ["embed/embedding"]


def test_a_shared_module_is_fine_beside_what_is_adapted_and_after_a_split():
    """A shared module is refused only where it is itself adapted, and neither beside a target nor once it is split."""
    graphdef, params, rest = nnx.split(Shared(), nnx.Param, ...)
    assert len(jlora.adapt(params, lora(target="kernel")).trainable) == 1
    assert len(jlora.adapt({"m": Shared(), "query": {"kernel": ONE}}, lora()).trainable) == 1


class Stateful(nnx.Module):
    """A layer, and what has state: a generator's count, batch statistics, a cache; NNX transforms set all of it."""

    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.layer = nnx.Linear(6, 4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.cache = nnx.Cache(jnp.zeros((2, 4)))
        self.kind = kind

    def __call__(self, x):
        y = nnx.jit(lambda self, x: self.layer(x))(self, x)  # sets every variable to what it was
        if self.kind == "dropout":
            return nnx.remat(lambda self, y: self.drop(y))(self, y)
        if self.kind == "norm":
            return self.norm(y)
        if self.kind == "cache":
            self.cache[...] = y
        return y


@pytest.mark.parametrize("form", ["lifted", "dense", "jit", "grad"])
@pytest.mark.parametrize("kind,path", [("dropout", "drop/rngs/count"), ("norm", "norm/mean"), ("cache", "cache"),
                                       ("none", None), ("dropout in eval", None), ("norm in eval", None)])  # fmt: skip
def test_a_module_that_changes_itself_when_called_is_refused(kind, path, form):
    """What a copy of the module learns is lost: the path, and the lines to write; in evaluation nothing is."""
    model = Stateful(kind.removesuffix(" in eval"))
    if "eval" in kind:
        model.eval()
    ad, x = jlora.adapt(model, lora(target="layer/kernel$")), jnp.ones((2, 6))
    f = jlora.lift(lambda m, x: m(x), dense=form == "dense")
    call = {
        "jit": jax.jit(f),
        "grad": lambda ad, x: jax.grad(lambda t: f(jlora.join(t, ad.frozen), x).sum())(ad.trainable),
    }.get(form, f)
    if path is None:
        call(ad, x)
        return
    with pytest.raises(ValueError, match=re.escape(repr(path))) as caught:
        call(ad, x)
    assert "nnx.split(module, nnx.Param, ...)" in str(caught.value) and "return" in str(caught.value)


@pytest.mark.parametrize("use", [lambda ad: nnx.Optimizer(ad, optax.adam(1e-3), wrt=nnx.Param),
                                 lambda ad: nnx.Optimizer(ad, optax.sgd(1), wrt=nnx.Param, graph=False).update(ad, ad),
                                 lambda ad: nnx.state({"model": ad}, nnx.Param), nnx.split])  # fmt: skip
def test_nnx_would_find_the_base_in_an_adapted(use):
    """An optimizer of these parameters would move the frozen base and train nothing; `nnx.jit` is fine."""
    ad = jlora.adapt(nnx.Linear(6, 4, rngs=nnx.Rngs(0)), lora(target="kernel"))
    with pytest.raises(TypeError, match=r"no NNX module.*jlora.split.*tx.init\(trainable\)"):
        use(ad)
    f = jlora.lift(lambda m, x: m(x))
    np.testing.assert_array_equal(nnx.jit(f)(ad, jnp.ones((2, 6))), jax.jit(f)(ad, jnp.ones((2, 6))))


def test_odd_names():
    """Slashes and percent signs are escaped, so that no two keys share a path; dots and blanks are themselves."""
    params = {"a/b": {"w": ONE}, "a": {"b": {"w": ONE + 1}}, "a%2Fb": {"w": ONE + 2}, "50%": ONE + 3, "x.y z": ONE + 4}
    ad = jlora.adapt(params, jlora.LoRA(rank=1, target="."))
    assert set(ad.trainable) == {"a%2Fb/w", "a/b/w", "a%252Fb/w", "50%25", "x.y z"}
    f = lambda p, x: x @ p["a/b"]["w"] + x @ p["a"]["b"]["w"] + x @ p["a%2Fb"]["w"] + x @ p["50%"] + x @ p["x.y z"]
    far = jlora.join(jax.tree.map(jnp.ones_like, ad.trainable), ad.frozen)
    x = jnp.ones((2, 6))
    np.testing.assert_allclose(jlora.lift(f)(far, x), jlora.lift(f, dense=True)(far, x), rtol=1e-6)
    assert not jlora.explain(f, far, x).unused


def test_integer_keys():
    """Integer keys and the indices of lists and tuples stand in paths as plain numbers, which targets match."""
    ad = jlora.adapt({0: {"w": ONE}, 1: {"w": ONE + 1}}, jlora.LoRA(rank=1, target="^1/"))
    assert list(ad.trainable) == ["1/w"]
    ad = jlora.adapt([{"w": ONE}, (ONE + 1, ONE + 2)], jlora.LoRA(rank=1, target="."))
    assert list(ad.trainable) == ["0/w", "1/0", "1/1"]


class Both:
    """A node whose keys print alike, which JAX can sort."""

    def __init__(self, children):
        self.children = children


jax.tree_util.register_pytree_with_keys(
    Both,
    lambda b: ([(jax.tree_util.SequenceKey(0), b.children[0]), (jax.tree_util.DictKey("0"), b.children[1])], None),
    lambda _, children: Both(children),
)


def test_two_leaves_with_one_path():
    """Two leaves whose keys print alike are refused with both keys, since a path could not tell them apart."""
    with pytest.raises(ValueError, match=r"share the path \['0'\].*\(0 and '0'\)"):
        jlora.adapt(Both([ONE, ONE + 1]), jlora.LoRA(rank=1, target="0"))


def test_merge_of_an_adapter_scaled_to_zero():
    """An adapter scaled to zero merges to the base exactly, and its report says that nothing was lost."""
    ad = jlora.join(jax.tree.map(jnp.ones_like, adapted().trainable), adapted().frozen)
    off = jlora.scale(ad, 0)
    for a, b in zip(jax.tree.leaves(jlora.merge(off)), jax.tree.leaves(PARAMS), strict=True):
        np.testing.assert_array_equal(a, b)
    assert jlora.merge_report(off).worst == 1.0
    assert "100.0 %" in str(jlora.merge_report(off))


@pytest.mark.parametrize(
    "dtype,size", [("float16", 4e4), ("float8_e4m3fn", 400.0), ("float8_e5m2", 5e4), ("float32", 3e38)]
)
def test_nothing_survives_a_merge_that_overflows(dtype, size, tmp_path):
    """float16 overflows to infinity, some float8 to NaN: 0 survives, and export refuses."""
    ad = jlora.adapt({"q": {"kernel": jnp.full((4, 4), size, dtype)}}, jlora.LoRA(rank=1, target="kernel"))
    ad = jlora.join({"q/kernel": {"a": jnp.full((1, 4), size), "b": jnp.ones((1, 4))}}, ad.frozen)
    report = jlora.merge_report(ad)
    assert report.worst == 0 and report.rows[0].relative_error == np.inf
    with pytest.raises(ValueError, match="lose most of the update"):
        jlora.export(tmp_path / "merged", ad)
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("size,survives", [(1e30, 1.0), (1e-30, 1.0), (np.nan, np.nan), (np.inf, np.nan)])
def test_what_survives_is_a_share_at_every_size(size, survives):
    """Squares neither overflow nor vanish; factors that are not finite have no share; -inf in a base is none of it."""
    base = {"q": {"kernel": jnp.zeros((4, 4)).at[0, 0].set(-jnp.inf)}}
    ad = jlora.adapt(base, jlora.LoRA(rank=1, target="kernel"))
    ad = jlora.join({"q/kernel": {"a": jnp.full((1, 4), size), "b": jnp.ones((1, 4))}}, ad.frozen)
    np.testing.assert_equal(jlora.merge_report(ad).worst, survives)


def test_a_call_without_an_adapter_is_a_call():
    """A lifted function that is given no adapter is the function itself, and passes strings through."""
    f = lambda p, x, flag: (x @ p["head"]["kernel"], flag)
    lifted = jlora.lift(f)
    y, flag = lifted(PARAMS, jnp.ones((2, 4)), "flag")
    np.testing.assert_array_equal(y, f(PARAMS, jnp.ones((2, 4)), "")[0])
    assert flag == "flag"


def test_arguments_that_are_no_pytrees_pass():
    """Mixed keys, which JAX cannot sort, beside an adapter; functions and modules as arguments."""
    lifted = jlora.lift(lambda p, x, table, fn: fn(x @ p["head"]["kernel"]) * table[1])
    y = lifted(adapted(), jnp.ones((2, 4)), {1: 2.0, "one": 3}, jnp.tanh)
    assert y.shape == (2, 3)


def test_without_values():
    """`adapt` reads shapes and dtypes: under `eval_shape`, under `jit`, and on structs."""
    structs = jax.eval_shape(lambda: PARAMS)
    shapes = lambda ad: jax.tree.map(lambda x: (x.shape, x.dtype), ad.trainable)
    want = shapes(adapted())
    assert shapes(adapted(structs)) == want
    assert shapes(jax.eval_shape(adapted, PARAMS)) == want
    assert shapes(jax.jit(adapted)(PARAMS)) == want
    assert jlora.count(adapted(structs)) == jlora.count(adapted())
    assert str(adapted(structs)) == str(adapted())
    assert adapted(structs).frozen.plan is adapted().frozen.plan


def test_keys_of_either_kind():
    """A typed key and a raw one of the same seed draw the same factors."""
    typed, raw = jax.random.key(3), jax.random.PRNGKey(3)
    for a, b in zip(jax.tree.leaves(adapted(key=typed).trainable), jax.tree.leaves(adapted(key=raw).trainable),
                    strict=True):  # fmt: skip
        np.testing.assert_array_equal(a, b)


def test_numpy_leaves():
    """A base of NumPy arrays is kept without a copy, and a model computes with it as with JAX's."""
    params = jax.tree.map(np.asarray, PARAMS)
    f = lambda p, x: x @ p["layer_0"]["query"]["kernel"]
    ad = adapted(params)
    assert all(a is b for a, b in zip(jax.tree.leaves(ad.frozen.base), jax.tree.leaves(params), strict=True))
    np.testing.assert_array_equal(jlora.lift(f)(ad, jnp.ones((2, 6))), f(PARAMS, jnp.ones((2, 6))))


# What is printed ------------------------------------------------------------------------------


@functools.cache
def many(rank=2, count=1000):
    struct = jax.ShapeDtypeStruct((6, 4), jnp.float32)
    params = {f"layer_{n}": {"query": {"kernel": struct}} for n in range(count)}
    return jax.eval_shape(lambda params: adapted(params, lora(rank=rank)), params)


def test_representations_are_short():
    """One line each, whatever is inside: tracers, structs, nothing that is an adapter."""
    ad = adapted()
    seen = []
    jax.jit(lambda ad: seen.extend([repr(ad), str(ad), repr(ad.frozen), repr(ad.frozen.plan)]) or 0)(ad)
    assert seen[1] == str(ad) and all("\n" not in text and len(text) < 100 for text in seen[:1] + seen[2:])
    structure = jax.tree.structure(ad)
    for odd in (jax.tree.map(lambda _: None, ad), structure.unflatten(range(structure.num_leaves))):
        assert len(repr(odd)) < 100
        str(odd)
    big = many()
    for text in (repr(big), repr(big.frozen), repr(big.frozen.plan), repr(jlora.trainable_mask(big))):
        assert "\n" not in text and len(text) < 200
    assert len(str(big)) < 2000
    assert len(repr(jax.tree.structure(big.frozen.plan))) < 2000


def test_structure_errors_of_jax_stay_readable():
    """Two adapters of a thousand weights that differ in rank: what JAX says quotes the plans."""
    one, two = many(), many(rank=1)
    zeros = jax.tree.map(lambda _: 0, one)
    clashes = (
        lambda: jax.tree.map(lambda a, b: a, one, two),
        lambda: jax.tree.map(lambda a, b: a, one.frozen, two.frozen),
        lambda: jax.eval_shape(lambda a, b: jax.lax.cond(True, lambda: a.frozen, lambda: b.frozen), one, two),
        lambda: jax.eval_shape(lambda a, b: jax.lax.scan(lambda c, _: (b.frozen, None), a.frozen, None, 2), one, two),
        lambda: jax.vmap(lambda ad: ad, in_axes=(zeros,))(two),
    )
    for clash in clashes:
        with pytest.raises((ValueError, TypeError)) as caught:
            clash()
        text = str(caught.value)
        assert "Plan(1000 weights, LoRA" in text and len(text) < 2000, text
        assert not re.search(r"Site\(|Recipe\(", text)
    assert repr(one.frozen.plan) != repr(two.frozen.plan)  # "A, but B" is of no use when A and B print alike


def test_adapters_answer_in():
    """Flax's TrainState asks a parameter tree whether it holds a name."""
    assert "layer_0/query/kernel" in adapted()
    assert "OVERWRITE_WITH_GRADIENT" not in adapted()
