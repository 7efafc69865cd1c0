"""LoftQ and QPiSSA: a quantised base, and the LoRA that mends what quantising lost."""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias, cast

import jax
import jax.numpy as jnp

from jlora import _answers
from jlora._plan import _resolve
from jlora._trees import _compound, _tree
from jlora._trees._compound import is_compound
from jlora._trees._leaf import Leaf
from jlora._types import PyTree
from jlora.adapted import is_adapted
from jlora.methods.base import check_low_rank
from jlora.methods.lora import LoRA
from jlora.methods.starts import AB, Given, best
from jlora.quant._leaf import Quantized
from jlora.quant._quantize import codec, not_finite, quantized
from jlora.quant._schemes import Scheme, scheme_of

Best: TypeAlias = Callable[[jax.Array], AB]  # a and b that come nearest to a matrix


def loftq(
    params: PyTree,
    method: LoRA,
    quantise: "Scheme | str | Callable[[jax.Array], jax.Array]",
    *,
    steps: int = 5,
    axes: dict[str, str] | None = None,
) -> tuple[PyTree, LoRA]:
    """LoftQ: a quantised base Q and the a, b that mend it, W0 = Q + s a b as nearly as rank r can.

    Beginning with a b = 0, `steps` times: Q = quantise(W0 - s a b), then s a b = the best approximation of W0 - Q of
    rank r. No step makes it worse where `quantise` gives the nearest of fixed levels. This and `qpissa` are the starts
    that change the base, as quantising it does anyway: `adapt` takes the new one.

    Args:
      params: the plain parameters.
      method: a LoRA; its target says which weights.
      quantise: a scheme or its name, as `jlora.quantize` takes it: the base then holds codes. Or a function of a weight
        in its own axes and at least float32 to what its quantised form stands for, dequantised, in the same shape.
      steps: 1 to 5 in the paper.
      axes: as for `adapt`.

    Returns:
      `(params, method)`: the parameters with Q (in their own dtype) in the weights' places, and the method with
      `Given` as its start.

    Raises:
      ValueError: fewer steps than 1; a `quantise` that changes shapes; weights without values, with NaN or
        infinities; whatever `adapt` refuses.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.linspace(0.0, 1.0, 4096).reshape(64, 64) ** 2}}
      >>> base, method = jlora.init.loftq(params, jlora.LoRA(rank=4), "nf4")
      >>> base["query"]["kernel"]
      Quantized((64, 64), float32, nf4)
      >>> error = lambda w: float(jnp.linalg.norm(w - params["query"]["kernel"]))
      >>> mended = jlora.merge(jlora.adapt(base, method))["query"]["kernel"]
      >>> error(mended) < error(jlora.quantize(params)["query"]["kernel"].dequantize())
      True

    References:
      Li et al, `LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models
      <https://arxiv.org/abs/2310.08659>`_, 2023.
    """

    def pair(w: jax.Array, again: Callable[[jax.Array], jax.Array], best: Best, s: float) -> AB:
        a, b = best(w - again(w))
        for _ in range(steps - 1):
            mended = w - s * jnp.swapaxes(a, -1, -2) @ b
            a, b = best(w - again(mended))
        return a, b

    return _quantised("loftq", params, method, quantise, steps, axes, pair)


def qpissa(
    params: PyTree,
    method: LoRA,
    quantise: "Scheme | str | Callable[[jax.Array], jax.Array]",
    *,
    steps: int = 5,
    axes: dict[str, str] | None = None,
) -> tuple[PyTree, LoRA]:
    """QPiSSA: the principal part of W0 in a, b, and the rest of it quantised: W0 = Q + s a b.

    s a b = the best approximation of W0 of rank r, then `steps` times Q = quantise(W0 - s a b), with s a b the best
    approximation of W0 - Q in between. (`LoRA(init="pissa")` on a quantised base starts from what the codes stand for,
    and changes no base: the large singular values stay among what was quantised.)

    Args:
      params: the plain parameters.
      method: a LoRA; its target says which weights.
      quantise: as for `loftq`.
      steps: 1 is the paper's plain form.
      axes: as for `adapt`.

    Returns:
      `(params, method)`, as `loftq`.

    Raises:
      ValueError: as `loftq`.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (64, 64))}}
      >>> base, method = jlora.init.qpissa(params, jlora.LoRA(rank=8), "nf4")
      >>> jlora.adapt(base, method)
      Adapted(1 weight, 1,024 trainable)

    References:
      Meng et al, `PiSSA <https://arxiv.org/abs/2404.02948>`_, 2024, section 4.
    """

    def pair(w: jax.Array, again: Callable[[jax.Array], jax.Array], best: Best, s: float) -> AB:
        a, b = best(w)
        for step in range(steps):
            q = again(w - s * jnp.swapaxes(a, -1, -2) @ b)
            if step < steps - 1:
                a, b = best(w - q)
        return a, b

    return _quantised("qpissa", params, method, quantise, steps, axes, pair)


def _quantised(
    name: str,
    params: PyTree,
    method: LoRA,
    quantise: "Scheme | str | Callable[[jax.Array], jax.Array]",
    steps: int,
    axes: dict[str, str] | None,
    pair: Callable[..., AB],
) -> tuple[PyTree, LoRA]:
    """Each weight quantised less the pair that it comes with."""
    if not isinstance(method, LoRA):
        hint = ": give the LoRA inside, and wrap the one that comes back" if hasattr(method, "inner") else ""
        raise TypeError(f"{name} takes one LoRA, whose factors mend the codes, not {_answers.kind(method)}{hint}")
    if is_adapted(params):
        raise TypeError(f"{name} takes plain parameters, not an Adapted: adapted.frozen.base")
    _answers.check_params(name, params)
    _answers.check_integer(f"{name}(steps", steps, 1, "at least one step, an integer")
    leaves, treedef = jax.tree.flatten(params, is_leaf=is_compound)
    pairs = {}
    scheme = None if callable(quantise) else scheme_of(quantise)
    sites = _resolve.resolve(_tree.flatten(params), method, axes, True)[0].sites
    plain = [(s.leaf.path, leaves[s.index]) for s in sites if not is_compound(leaves[s.index])]
    bad = [why for path, leaf in plain for why in not_finite(path, leaf)]
    if bad:
        raise ValueError(f"{name} cannot quantise this tree:\n  " + "\n  ".join(bad))
    for site in sites:
        leaf = site.leaf
        if isinstance(leaves[site.index], jax.ShapeDtypeStruct):
            raise ValueError(f"{name} quantises the values of {leaf.path!r} of shape {leaf.shape}, and it has none")
        if is_compound(leaves[site.index]):
            raise ValueError(f"{name} quantises plain weights, and {leaf.path!r} of shape {leaf.shape} is quantised")
        check_low_rank(leaf, method.rank)
        w = leaf.matrix(leaves[site.index])
        make = cast("Callable[[jax.Array], jax.Array | Quantized]", quantise)
        if scheme is not None:
            how = codec(scheme, leaf.path, leaf.shape, leaf.dtype, leaf.roles, False)
            make = lambda x, how=how, roles=leaf.roles: quantized(x, how, roles)
        kept: list[jax.Array | Quantized] = []

        def again(
            mended: jax.Array,
            leaf: Leaf = leaf,
            make: Callable[[jax.Array], jax.Array | Quantized] = make,
            kept: list[jax.Array | Quantized] = kept,
        ) -> jax.Array:
            kept[:] = [make(leaf.kernel(mended))]
            # in the weight's own dtype, as it is stored, so that a b mends the rounding of that cast too
            return leaf.matrix(_compound.dense(kept[0]).astype(leaf.dtype))

        fit = lambda x: best(x, method.rank, method.scale)
        pairs[leaf.path] = pair(w, again, fit, method.scale)
        leaves[site.index] = kept[0] if is_compound(kept[0]) else kept[0].astype(leaf.dtype)
    return jax.tree.unflatten(treedef, leaves), dataclasses.replace(method, init=Given(pairs))
