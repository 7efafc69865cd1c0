"""`quantize`: a tree whose weights are held as codes."""

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from jlora import _answers, targets
from jlora._algebra._mesh import explicit_mesh
from jlora._trees import _tree
from jlora._trees._choice import Choice, Wanted
from jlora._trees._compound import is_compound
from jlora._trees._tree import Target
from jlora._types import W0, MeshAxes, PyTree
from jlora.adapted import Adapted, is_adapted, letters_of_call
from jlora.quant._layout import layout
from jlora.quant._leaf import Codec, Quantized
from jlora.quant._report import say
from jlora.quant._schemes import Scheme, scheme_of


def codec(scheme: Scheme, path: str, shape: tuple[int, ...], dtype: DTypeLike, roles: str, torch: bool) -> Codec:
    """How one weight is quantised, whatever its values."""
    own = [n for n, role in enumerate(roles) if role != "s"]
    letters = "".join(roles[n] for n in own)
    if path.rsplit("/", 1)[-1] == "embedding":  # blocks run along its rows, which are what a lookup reads
        letters = letters.translate(str.maketrans("io", "oi"))
    ins = tuple(n for n, letter in enumerate(letters) if letter in "ik") or tuple(range(len(own)))
    return Codec(scheme, layout(scheme, tuple(shape[n] for n in own), ins, torch), jnp.dtype(dtype).name)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _encoded(w: jax.Array, codec: Codec, roles: str) -> tuple[jax.Array, ...]:
    stacks = [n for n, role in enumerate(roles) if role == "s"]
    own = [n for n, role in enumerate(roles) if role != "s"]
    encode = codec.encode
    for _ in stacks:
        encode = jax.vmap(encode)
    return encode(jnp.transpose(w, (*stacks, *own)))


def quantized(w: W0, codec: Codec, roles: str) -> Quantized:
    """One weight, in its own axes; of one on a mesh with explicit axes, codes and scales lie where it does."""
    encode: Callable[..., tuple[jax.Array, ...]] = functools.partial(_encoded, codec=codec, roles=roles)
    shapes = Quantized(jax.eval_shape(encode, jax.ShapeDtypeStruct(w.shape, w.dtype)), codec, roles)
    if isinstance(w, jax.ShapeDtypeStruct):
        return shapes
    w = jnp.asarray(w)
    if explicit_mesh([w]) is not None:
        places = _places(shapes, jax.typeof(w).sharding)
        encode = cast(Callable[..., tuple[jax.Array, ...]], jax.sharding.auto_axes(encode, out_sharding=places))
    return Quantized(tuple(encode(w)), codec, roles)


def _places(leaf: Quantized, at: NamedSharding) -> tuple[NamedSharding, ...]:
    """Where the arrays of a leaf are, along the axes of a weight that lies at `at` and that the mesh divides."""
    spec = (*at.spec, *[None] * len(leaf.shape))

    def cut(n: int | None, size: int) -> MeshAxes:
        names: MeshAxes = None if n is None else spec[n]
        ways = math.prod(at.mesh.shape[x] for x in (names if isinstance(names, tuple) else (names,)) if x)
        return names if size % ways == 0 else None

    return tuple(
        NamedSharding(at.mesh, PartitionSpec(*map(cut, axes, a.shape)))
        for axes, a in zip(leaf.axes(), jax.tree.leaves(leaf), strict=True)
    )


_finite = jax.jit(lambda w: jnp.all(jnp.isfinite(w)))


def not_finite(path: str, w: PyTree) -> list[str]:
    """What is wrong with the values of a weight, if it has any that can be read."""
    if why := _answers.gone(path, w):
        return [why]
    if isinstance(w, (jax.ShapeDtypeStruct, Tracer)) or bool(_finite(w)):
        return []
    values = np.asarray(jnp.asarray(w), np.float32)
    what = f"{int(np.isnan(values).sum())} NaN and {int(np.isinf(values).sum())} infinite values"
    return [f"{path!r} of shape {values.shape} has {what}; exclude it, or mend it first"]


def quantize(
    params: PyTree,
    scheme: "Scheme | str" = "nf4",
    *,
    target: Target = targets.linear,
    exclude: Target = (),
    axes: dict[str, str] | None = None,
    fn: Callable[..., PyTree] | None = None,
    args: Sequence[PyTree] = (),
    kwargs: Mapping[str, PyTree] | None = None,
    parity: str | None = None,
    donate: bool = False,
) -> PyTree:
    """The same tree with the weights that `target` takes held as codes of a few bits and scales.

    A quantised leaf keeps its shape and dtype, and is one leaf to `adapt` and the rest of the library. `lift` computes
    with it, adapted or not: each use makes the weight from its codes, in the activation's dtype, and the backward
    pass makes it again, so no dense copy is kept.

    Weights are quantised one after another; with `donate` each is freed before the next, so that the peak is the tree
    and one leaf. Under `jit` shapes alone are looked at. Outside of it a line on standard error says what became codes
    and what stayed; `print(jlora.quant.table(params))` shows all leaves.

    Args:
      params: any pytree of arrays, or an `Adapted`, whose base is quantised and whose adapter stays.
      scheme: `"nf4"`, `"nf4+double"` (QLoRA's), `"nf2"`, `"nf3"`, `"nf8"`, `"int8"`, `"int4"`, or a value such as
        `jlora.quant.NF(4, block=128)`.
      target: which weights: a pattern, a list, a callable `(path, leaf) -> bool`; all linear layers by default, which
        leaves embeddings, norms, biases and the output head alone.
      exclude: which of those not.
      axes: as for `adapt`, where nothing in the tree tells. Blocks run along the input axes; along its rows in
        an `embedding`.
      fn, args, kwargs: a call of the model, traced as by `adapt`; nothing is computed.
      parity: `"torch"` lays every weight out as bitsandbytes does: one run, outputs first, whose blocks, codes and
        scales are its own bit for bit. Such a weight cannot be sharded along its own axes. By default that is done
        where the block does not divide the input side; elsewhere the blocks are the same, but keep the weight's axes.
      donate: frees each plain weight as soon as it is quantised; `params` is then no longer usable. Where something is
        refused, nothing was freed.

    Returns:
      The tree, or the `Adapted`. Leaves that are quantised already (by `jlora.init.loftq`, say), without elements or
      without axes stay as they are. What is tied (one array under two paths) stays tied where both ends are taken.

    Raises:
      ValueError: an unknown scheme; a pattern that matches nothing; weights with NaN or infinities, without values,
        that are no real floating point arrays, or whose axes nothing tells; all at once.
      TypeError: quantised leaves that were cast.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jax.random.normal(jax.random.key(0), (128, 64))}}
      >>> small = jlora.quantize(params, "nf4+double")
      >>> apply = jlora.lift(lambda params, x: x @ params["query"]["kernel"])
      >>> adapted = jlora.adapt(small, jlora.LoRA(rank=2))
      >>> apply(adapted, jnp.ones((3, 128))).shape, apply(small, jnp.ones((3, 128))).shape
      ((3, 64), (3, 64))
      >>> round(8 * small["query"]["kernel"].nbytes / (128 * 64), 3)
      4.133

    References:
      Dettmers et al, `QLoRA <https://arxiv.org/abs/2305.14314>`_, 2023.
    """
    scheme = scheme_of(scheme)
    _answers.check_params("quantize", params)
    _answers.check_axes(axes)
    if not isinstance(donate, bool):
        raise ValueError(f"quantize(donate={donate!r}): True frees each plain weight as soon as it is quantised")
    if parity not in (None, "torch"):
        raise ValueError(f"quantize(parity={parity!r}): 'torch', or None")
    if is_adapted(params):
        base = quantize(
            params.frozen.base, scheme, target=target, exclude=exclude, axes=_letters(params, axes), fn=fn, args=args,
            kwargs=kwargs, parity=parity, donate=donate,
        )  # fmt: skip
        return Adapted(params.trainable, dataclasses.replace(params.frozen, base=base))
    traced = letters_of_call("quantize", fn, params, args, kwargs)
    tree = _tree.flatten(params)
    choice = Choice(tree, [Wanted("quantize", target, exclude)], axes, traced)
    leaves = _leaf_by_leaf(tree.leaves, _codecs(choice, scheme, parity == "torch"), donate)
    if not any(isinstance(x, (Tracer, jax.ShapeDtypeStruct)) for x in jax.tree.leaves(leaves)):
        say(tree.paths, list(tree.leaves), leaves)
    return jax.tree.unflatten(tree.treedef, leaves)


def _codecs(choice: Choice, scheme: Scheme, torch: bool) -> dict[int, tuple[Codec, str]]:
    """How each leaf that is taken is laid out, and its letters; ValueError before any weight is freed."""
    todo: dict[int, tuple[Codec, str]] = {}
    for n in filter(choice.takers, range(len(choice.tree.leaves))):
        array = choice.tree.leaves[n]
        if _stays(array):
            continue
        weight = choice.weight(n)
        if weight is None:
            continue
        leaf, told = weight
        if told is None:
            choice.unclear.append((leaf, "quantize, whose blocks run along the input,"))
        elif set(told) == {"s"}:
            choice.bad.append(f"{leaf.path!r} of shape {leaf.shape} has stack axes alone; write its letters in axes=")
        else:
            todo[n] = codec(scheme, leaf.path, leaf.shape, leaf.dtype, told, torch), told
    choice.bad += [why for n in todo for why in not_finite(choice.tree.paths[n], choice.tree.leaves[n])]
    choice.check("quantise")
    return todo


def _stays(array: PyTree) -> bool:
    """Whether there is nothing to quantise: codes already, no elements, or one number."""
    if is_compound(array) or _answers.no_array(array):
        return is_compound(array)
    shape, _ = _tree.shape_dtype(array)
    return not shape or 0 in shape


def _leaf_by_leaf(plain: Sequence[PyTree], todo: Mapping[int, tuple[Codec, str]], donate: bool) -> list[PyTree]:
    """The leaves with those of `todo` quantised, one after another; what is tied stays tied."""
    leaves = list(plain)
    made: dict[tuple[int, Codec, str], Quantized] = {}
    for n, (how, letters) in todo.items():
        leaf = leaves[n]
        known = (id(leaf), how, letters)
        if known not in made:
            made[known] = quantized(leaf, how, letters)
        leaves[n] = made[known]
        elsewhere = any(x is leaf for x in leaves)  # a tied array, whose other path stays plain or is still to come
        if donate and isinstance(leaf, jax.Array) and not isinstance(leaf, Tracer) and not elsewhere:
            jax.block_until_ready(leaves[n])
            leaf.delete()
    return leaves


def _letters(adapted: Adapted, axes: dict[str, str] | None) -> dict[str, str]:
    """The letters that the adapter knows its weights by, behind those that are given."""
    known = {f"^{re.escape(s.leaf.path)}$": s.leaf.roles for s in adapted.frozen.plan.sites}
    return {**(axes or {}), **known}


def dequantize(params: PyTree) -> PyTree:
    """A tree with every quantised weight as the array that it stands for.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"query": {"kernel": jnp.ones((128, 4))}}
      >>> bool((jlora.quant.dequantize(jlora.quantize(params))["query"]["kernel"] == 1).all())
      True
    """
    return jax.tree.map(lambda x: x.dequantize() if is_compound(x) else x, params, is_leaf=is_compound)
