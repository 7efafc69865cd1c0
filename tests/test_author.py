"""What the author of a method does wrong is answered with the method, the equation and the letter."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jlora
import test_laws
from jlora import methods, network
from jlora.network import Array, Base, Delta, Function, Recipe, Step
from methods import CASES, FEW, METHODS

pytestmark = pytest.mark.settled

ZEROS = methods.base.zeros
A, B = Array("a", ZEROS), Array("b", ZEROS)
R = (("r", 2),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mine(methods.Method):
    """A method with any recipe, and a start that is changed after it was made."""

    made: Callable[[Any], Recipe]
    spoilt: Callable[[Any, dict], dict] | None = None
    target: Any = "kernel$"

    def recipe(self, leaf):
        return self.made(leaf)

    def initial(self, leaf, recipe, keys, weight):
        arrays = super().initial(leaf, recipe, keys, weight)
        return arrays if self.spoilt is None else self.spoilt(leaf, arrays)


def delta(equation, *words, sizes=R, **more):
    return lambda leaf: Recipe((Delta(equation, words, sizes, **more),))


def shaped(fn, *shapes, base=False):
    return Function(fn, tuple(Array(f"x{n}", ZEROS, shape) for n, shape in enumerate(shapes)), base)


RECIPES = {
    "a letter without a size": (delta("r I, r t, t O -> I O", A, Array("m", ZEROS), B), "letter 't' has no size"),
    "a blank forgotten": (delta("rI, r O -> I O", A, B), "letter 'rI' has no size.*separated by blanks"),
    "a comma forgotten": (delta("r I r O -> I O", A, B), r"1 operands between its commas, and 2 words \(a, b\)"),
    "an operand too many": (delta("r I, r O, r -> I O", A, B), "3 operands between its commas, and 2 words"),
    "a word too many": (delta("r I -> I O", A, B), "1 operands between its commas, and 2 words"),
    "no arrow": (delta("r I, r O", A, B), "no one '->'"),
    "a side forgotten": (delta("r I, r -> I", A, B), "does not make every axis.*there is no O"),
    "a letter where a side is made": (delta("r I, r o -> I o", A, B, sizes=(*R, ("o", 4))), "'o' on its right is no"),
    "a group of a letter that nobody carries": (
        delta("r I, r p -> I (p q)", A, B, sizes=(*R, ("p", 2))), "no operand carries the letter 'q'.*if it repeats",
    ),
    "a group of another size": (
        delta("r I, r p -> I (p)", A, B, sizes=(*R, ("p", 3))), r"\(p\) of .* does not fit it",
    ),
    "three groups": (delta("r I -> (I) (r) (r)", A), "3 groups in parentheses"),
    "a rank that is none": (delta("r I, r O -> I O", A, B, ranks=("q",)), "no operand carries 'q'.*a rank"),
    "an array of another shape": (
        delta("r I, r O -> I O", Array("a", ZEROS, (3, 6)), B), r"'a' has the shape \(3, 6\), and its letters r i0 are",
    ),
    "a function of another shape": (
        delta("r I, r O -> I O", shaped(lambda x: x.T, (2, 6)), B),
        r"returns \(6, 2\), and its letters r i0 are \(2, 6\)",
    ),
    "a function that fails": (
        delta("r I, r O -> I O", shaped(lambda x, y: x @ y, (2, 6), (2, 6)), B),
        "a Function of arrays .* fails: TypeError",
    ),
    "a function of several results": (
        delta("r I, r O -> I O", shaped(lambda x: (x, x), (2, 6)), B), "returns tuple, not one array",
    ),
    "a function without W0": (
        delta("I O -> I O", shaped(lambda x: x, (6, 4), base=True)), "takes 1 positional argument but 2 were given",
    ),
    "a letter twice in an operand": (delta("r r I, r O -> I O", A, B), "'r r I' of a has the letter 'r' twice"),
    "a side twice": (delta("r I, r O -> I I O", A, B), "right side has 'I' twice"),
    "a size below zero": (delta("r I, r O -> I O", A, B, sizes=(("r", -2),)), "letter 'r' has the size -2"),
    "a broken size": (delta("r I, r O -> I O", A, B, sizes=(("r", 2.0),)), "letter 'r' has the size 2.0"),
    "a base in other axes": (delta("j O -> (j) O", Base(), sizes=(("j", 6),)), "Base is W0 in its own axes.*'j o1'"),
    "a function's array without a shape": (
        delta("r I, r O -> I O", Function(lambda x: x, (A,)), B), r"'a' stands in a Function.*shape=",
    ),
}  # fmt: skip

PLACE = ("dense/kernel", "a")
STARTS = {
    "misshapen": (
        lambda leaf, made: made | {PLACE: made[PLACE].T}, r"'a'\) of shape \(6, 2\), where .* \(2, 6\)",
    ),
    "lost": (lambda leaf, made: {k: v for k, v in made.items() if k != PLACE}, r"without \('dense/kernel', 'a'\)"),
    "one too many": (lambda leaf, made: made | {("dense/kernel", "c"): made[PLACE]}, "'c'.*which the recipe has not"),
    "whole numbers": (lambda leaf, made: made | {PLACE: made[PLACE].astype(int)}, r"'a'\) in int32, where"),
    "no dictionary": (lambda leaf, made: list(made.values()), "initial returns .*not list"),
}  # fmt: skip


def adapted(method, shape=(6, 4)):
    return jlora.adapt({"dense": {"kernel": jnp.ones(shape)}}, method)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_that_does_not_fit_is_refused_in_words(name):
    """The message has the method, the weight, the equation and the letter."""
    made, words = RECIPES[name]
    with pytest.raises(ValueError, match=words) as error:
        adapted(Mine(made=made))
    equation = made(None).deltas[0].equation
    assert "Mine on 'dense/kernel' of shape (6, 4)" in str(error.value) and repr(equation) in str(error.value)


@pytest.mark.parametrize("name", STARTS)
def test_a_start_that_does_not_fit_is_refused_in_words(name):
    """Where a factor has another shape, or is not there, `adapt` says so, and not the first call."""
    spoilt, words = STARTS[name]
    with pytest.raises(ValueError, match=words) as error:
        adapted(Mine(made=delta("r I, r O -> I O", A, B), spoilt=spoilt))
    assert "Mine on 'dense/kernel' of shape (6, 4)" in str(error.value)
    if name == "misshapen":
        assert "its letters are r i0 in the equation 'r I, r O -> I O'" in str(error.value)


WRONG = {
    "operands in a list": (lambda leaf: Recipe((Delta("r I, r O -> I O", [A, B], R),)), "r O -> I O' has operands"),
    "an array for a word": (lambda leaf: delta("r I, r O -> I O", jnp.ones((2, 6)), B)(leaf), "has operands, a tuple"),
    "sizes in a dictionary": (delta("r I, r O -> I O", A, B, sizes={"r": 2}), "'r I, r O -> I O' has sizes, a tuple"),
    "one array of a function": (
        lambda leaf: Recipe((Delta("r I, r O -> I O", (Function(jnp.tanh, A), B), R),)), "a Function has arrays",
    ),
    "one delta for several": (lambda leaf: Recipe(Delta("r I, r O -> I O", (A, B), R)), "a Recipe has deltas, a tuple"),
    "no recipe": (lambda leaf: Delta("r I, r O -> I O", (A, B), R), "Mine on 'dense/kernel' .*a Delta, not a Recipe"),
    "an L without groups": (
        lambda leaf: Recipe(left=Delta("m n -> I I", (A,), (("m", 6), ("n", 6)))), "'I' twice.*'m n -> I I'",
    ),
    "an L of one side": (
        lambda leaf: Recipe(left=Delta("I n -> I (n)", (A,), (("n", 6),))), "two groups, its rows and its columns",
    ),
    "a Difference of one array": (
        lambda leaf: network.Difference(jnp.subtract, (A,)), "two arrays, one trained and .*not \\(a trained\\)",
    ),
    "an array without a name": (lambda leaf: Array("", ZEROS), "an Array has a name"),
    "a name with a slash": (lambda leaf: Array("a/x", ZEROS), "a name without '/'.*'a/x'"),
    "an array without a start": (lambda leaf: Array("a", None), "'a', init.*None is not called"),
    "a dtype that there is not": (lambda leaf: Array("a", ZEROS, dtype="float33"), "'a', dtype='float33'"),
    "ranks in one string": (delta("r I, r O -> I O", A, B, ranks="r"), "'r I, r O -> I O' has ranks, a tuple of str"),
    "rates in a dictionary": (delta("r I, r O -> I O", A, B, rank_dropout={"r": 0.1}), "has rates .*a tuple of tuple"),
    "a rate of one": (delta("r I, r O -> I O", A, B, dropout=1.0), "rate of dropout 1.0, which is not in"),
    "a scale that is no number": (delta("r I, r O -> I O", A, B, scale=float("nan")), "has the scale nan"),
    "a size of zero": (delta("r I, r O -> I O", A, B, sizes=(("r", 0),)), "letter 'r' has the size 0"),
    "a letter of two sizes": (
        delta("q I, q O -> I O", Array("a", ZEROS, (2, 6)), Array("b", ZEROS, (3, 4)), sizes=()),
        "the letter 'q' is 2 in one shape and 3 in another",
    ),
    "a letter that an axis has": (delta("x0 I, x0 O -> I O", A, B, sizes=(("x0", 2),)), "'x0' is the name of an axis"),
    "a letter of one operand": (delta("r I, s r, O -> I O", A, Array("m", ZEROS), B, sizes=(*R, ("s", 3))),
                                "the letter 's' is carried by one operand"),
    "the scale of a gain": (lambda leaf: Recipe(gain=Delta("O -> O", (A,), scale=3.0)), "'O -> O' is a gain.*no scale"),
    "dropout of an L": (lambda leaf: Recipe(left=Delta("m n -> (m) (n)", (A,), (("m", 6), ("n", 6)), dropout=0.1)),
                        "is a left, which multiplies"),
    "a gain in groups": (lambda leaf: Recipe(gain=Delta("j -> (j q)", (A,), (("j", 2), ("q", 2)))), "has no groups"),
    "two arrays of one name": (delta("r I, r, r O -> I O", A, Array("q", ZEROS, trained=False), Array("q", ZEROS)),
                               "would hold 'q'"),
    "a factor called as the scale": (delta("r I, r O, -> I O", A, B, Array("s", ZEROS)), "'s' is the scale of a delta"),
    "a matrix in blocks": (
        delta("i j p -> (i j) (i p)", A, sizes=(("i", 2), ("j", 3), ("p", 2))), "'i' makes two axes",
    ),
    "W0 twice": (delta("I O, I O -> I O", Base(), Base()), "Base stands in it twice"),
    "W0 in an L": (
        lambda leaf: Recipe(left=Delta("I O, O n -> (I) (n)", (Base(), A), (("n", 6),))), "turns W0, and Base",
    ),
    "no equation": (delta(None, A, B), "an equation in words"),
    "a scale in words": (delta("r I, r O -> I O", A, B, scale="2"), "has the scale '2'"),
    "a letter sized twice": (delta("r I, r O -> I O", A, B, sizes=(*R, ("r", 3))), "each once"),
    "a side sized": (delta("r I, r O -> I O", A, B, sizes=(*R, ("I", 3))), "a letter of its own"),
    "a shape in a list": (lambda leaf: Array("a", ZEROS, [2, 6]), "a tuple of whole numbers"),
    "a complex dtype": (lambda leaf: Array("a", ZEROS, dtype="complex64"), "a floating point dtype"),
    "a gain that is none": (lambda leaf: Recipe(gain="O -> O"), "as its gain a Delta"),
    "no function": (lambda leaf: Function(3, ()), "has a function first"),
    "a complex function": (
        delta("r I, r O -> I O", shaped(lambda x: x + 1j, (2, 6)), B), "complex64, and weights are real",
    ),
    "a step that is not said": (
        lambda leaf: Recipe(steps=(Step(jnp.tanh, ()),)), "Mine on 'dense/kernel' .*`on_outputs = True`",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_words_that_say_nothing_here_are_refused(name):
    """What is no tuple of words, no recipe, or a word in another place, is told when the method meets a weight."""
    made, words = WRONG[name]
    with pytest.raises((TypeError, ValueError), match=words):
        adapted(Mine(made=made))


@pytest.mark.parametrize("where", ["init", "initial"])
def test_what_a_start_raises_is_noted_with_its_weight(where):
    """A mistake in an author's own code keeps its kind and its place, and says on which weight it was made."""

    def broken(*anything):
        return {}["a"]

    equation = delta("r I, r O -> I O", Array("a", broken if where == "init" else ZEROS), B)
    with pytest.raises(KeyError) as error:
        adapted(Mine(made=equation, spoilt=broken if where == "initial" else None))
    assert "Mine on 'dense/kernel' of (6, 4)" in error.value.__notes__[0]


def test_a_start_that_forgets_the_stack_is_told_of_it():
    """`initial` makes every layer's factors."""
    params = {"layers": {"kernel": jnp.ones((3, 6, 4))}}
    lost = lambda leaf, arrays: {k: v[0] if k[1] == "a" else v for k, v in arrays.items()}
    with pytest.raises(ValueError, match=re.escape("the recipe has (3, 2, 6), the stack (3,) in front")):
        jlora.adapt(params, Mine(made=delta("r I, r O -> I O", A, B), spoilt=lost), axes={"layers": "sio"})


def signs(shape):
    return jnp.asarray(np.where(np.indices(shape).sum(0) % 2, -1, 1))


@pytest.mark.parametrize("roles,shape", [("io", (6, 4)), ("sio", (3, 6, 4))])
def test_a_function_without_arrays_is_a_constant(roles, shape):
    """dW = sum_r M * (a b) with a fixed mask M: never W0, merged and lifted, values and gradients."""
    mask = Function(functools.partial(signs, (6, 4)), ())
    params = {"layers": {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal(shape), jnp.float32)}}
    method = Mine(made=delta("I O, r I, r O -> I O", mask, A, B))
    start = jlora.adapt(params, method, axes={"layers": roles})
    draw = lambda n, x: jnp.asarray(np.random.default_rng(n).standard_normal(x.shape), jnp.float32)
    leaves, form = jax.tree.flatten(start.trainable)
    trainable = form.unflatten([draw(n + 1, x) for n, x in enumerate(leaves)])
    a, b = (np.asarray(trainable["layers/kernel"][n], np.float64) for n in "ab")
    w = np.asarray(params["layers"]["kernel"], np.float64) + np.asarray(signs((6, 4))) * (np.swapaxes(a, -1, -2) @ b)
    np.testing.assert_allclose(jlora.merge(jlora.join(trainable, start.frozen))["layers"]["kernel"], w, atol=1e-5)

    def model(params, x):
        w = params["layers"]["kernel"]
        return jax.lax.scan(lambda x, w: (x, x @ w), x, w)[1] if w.ndim == 3 else x @ w

    x = draw(9, jnp.ones((5, 6)))
    loss = lambda t, **how: jnp.sin(jlora.lift(model, **how)(jlora.join(t, start.frozen), x)).sum()
    np.testing.assert_allclose(jlora.lift(model)(jlora.join(trainable, start.frozen), x), np.asarray(x) @ w, atol=1e-4)
    lifted, dense = jax.grad(loss)(trainable), jax.grad(functools.partial(loss, dense=True))(trainable)
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-4), lifted, dense)


def test_the_base_is_said_outright():
    """`Base()` is W0, and nothing else is: dW = W0 * (a b) beside a constant of ones."""
    ones = Function(functools.partial(jnp.ones, (6, 4)), ())
    a, b = Array("a", jax.nn.initializers.ones), Array("b", jax.nn.initializers.ones)
    params = {"dense": {"kernel": jnp.full((6, 4), 3.0)}}
    both = lambda leaf: Recipe((Delta("I O, I O, r I, r O -> I O", (ones, Base(), a, b), R),))
    assert (jlora.merge(jlora.adapt(params, Mine(made=both)))["dense"]["kernel"] == 3 + 2 * 3).all()


# The guide --------------------------------------------------------------------------------


@functools.cache
def of_the_guide():
    """The row of LoRA-XS with the class that the guide shows in the library's place."""
    text = (pathlib.Path(__file__).parents[1] / "docs" / "adding_a_method.md").read_text()
    block = re.search(r"```python\n(.*?class LoRAXS.*?)```", text, re.DOTALL)[1]
    shown = {"__name__": "guide"}
    exec(block, shown)
    row = next(row for row in METHODS if row.name == "lora_xs")
    return dataclasses.replace(row, spec=lambda target: shown["LoRAXS"](rank=2, alpha=3, target=target))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in FEW if not CASES[name].vectors])
def test_what_the_guide_shows_passes_the_laws(name, subtests):
    """On a dense layer, a tied head, convolutions, a scan and experts."""
    test_laws.test_first_laws(of_the_guide(), CASES[name], subtests)
    test_laws.test_start_is_the_base_bit_for_bit(of_the_guide(), CASES[name])
