"""Base and factors made where they live, so that no host and no device ever holds the whole."""

from collections.abc import Callable

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jlora._plan._sites import Spec
from jlora._trees import _tree
from jlora._types import Half, Key, PyTree, Value
from jlora.adapted import Adapted, Frozen, adapt, begun
from jlora.shard._specs import check_mesh, shardings


def init(
    make_params: "Callable[[], PyTree] | PyTree",
    spec: Spec,
    mesh: Mesh,
    base_specs: PyTree,
    *,
    key: Key | None = None,
    axes: dict[str, str] | None = None,
    allow_untied: bool = False,
) -> Adapted:
    """`adapt` on a mesh: base and factors are made under `jit`, straight into their shards.

    The factors' values are those of one device, whatever the mesh: random numbers are drawn for the whole array and
    each device keeps its part (with JAX's default generator; `rbg` draws differ between meshes). Starts that read
    the weight read it where it lives; a decomposition (PiSSA) gathers one weight at a time.

    A base on disk is read shard by shard and handed over as it is::

        shapes = jax.eval_shape(model.init, key, x)
        base = ocp.StandardCheckpointer().restore(path, jlora.shard.abstract(mesh, shapes, "fsdp"))
        adapted = jlora.shard.init(base, spec, mesh, "fsdp")

    Args:
      make_params: a function without arguments that makes the parameters, such as
        `lambda: model.init(key, x)["params"]`; or parameters with values, which move only where they must.
      spec: as for `adapt`.
      mesh: a `Mesh`, with automatic or explicit axes.
      base_specs: as for `partition_specs`.
      key: as for `adapt`.
      axes: as for `adapt`.
      allow_untied: as for `adapt`.

    Returns:
      An `Adapted` on the mesh.

    Raises:
      ValueError: what `adapt` and `partition_specs` refuse; parameters without values.

    Example:
      >>> import jax, jax.numpy as jnp, jlora
      >>> mesh = jax.make_mesh((1,), ("fsdp",))
      >>> make = lambda: {"query": {"kernel": jax.random.normal(jax.random.key(0), (6, 4))}}
      >>> adapted = jlora.shard.init(make, jlora.LoRA(rank=2), mesh, "fsdp")
      >>> adapted.frozen.base["query"]["kernel"].sharding.spec
      P('fsdp',)
    """
    check_mesh("shard.init", mesh)
    # An NNX module can be called as well, but it holds parameters: JAX sees a tree in it, and one leaf in a function.
    made = callable(make_params) and jax.tree.structure(make_params) == jax.tree.structure(0)
    look = lambda params: adapt(params, spec, key=key, axes=axes, allow_untied=allow_untied)
    whole = jax.eval_shape(lambda: look(make_params())) if made else _shapes(look, make_params)
    # On a mesh with explicit axes JAX asks every operation of an initialiser where its result lives. So all is made on
    # the same devices with automatic axes, and gets its explicit sharding at the end, which moves nothing.
    plain = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    places = shardings(plain, whole, base_specs)
    at = places.frozen.base
    base = jax.jit(make_params, out_shardings=at)() if made else jax.device_put(make_params, at)

    def factors(base: PyTree) -> tuple[Half, Half]:
        adapted = begun(
            base, spec, key=key, axes=axes, allow_untied=True
        )  # inside jit tied leaves are two tracers: they were looked at above
        return adapted.trainable, adapted.frozen.factors

    into = (places.trainable, places.frozen.factors)
    with jax.set_mesh(plain):  # the caller may have set `mesh`, under which JAX refuses arrays of another mesh
        trainable, frozen = jax.jit(factors, out_shardings=into)(base)
    adapted = Adapted(trainable, Frozen(base, frozen, None, whole.frozen.plan))
    return jax.device_put(adapted, jax.tree.map(lambda s: NamedSharding(mesh, s.spec), places))


def _shapes(fn: Callable[[PyTree], Value], params: PyTree) -> Value:
    """`eval_shape` of `fn(params)` by shapes and dtypes alone, in which arrays that are tied are one tracer.

    The arrays may be on another mesh, which their types would bring into the trace.
    """
    found, treedef = jax.tree.flatten_with_path(params)
    bare = [jax.tree_util.keystr(path) for path, a in found if isinstance(a, jax.ShapeDtypeStruct)]
    if bare:
        more = f" and {len(bare) - 5} more" if len(bare) > 5 else ""
        raise ValueError(
            f"{', '.join(bare[:5])}{more}: an array that has no values; write a function that makes the parameters, "
            "or restore them"
        )
    kinds = {id(a): jax.ShapeDtypeStruct(*_tree.shape_dtype(a)) for _, a in found}
    return jax.eval_shape(lambda known: fn(treedef.unflatten([known[id(a)] for _, a in found])), kinds)
