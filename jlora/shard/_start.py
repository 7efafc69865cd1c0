"""Base and factors made where they live, so that no host and no device ever holds the whole."""

from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding

from jlora._trees import _tree
from jlora.adapted import Adapted, Frozen, adapt, begun
from jlora.shard._specs import check_mesh, shardings


def init(
    make_params: "Callable[[], Any] | Any",
    spec: Any,
    mesh: Mesh,
    base_specs: Any,
    *,
    key: Any = None,
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
    # a module of NNX can be called too, but is a tree; a function is a leaf
    made = callable(make_params) and jax.tree.structure(make_params) == jax.tree.structure(0)
    options = {"key": key, "axes": axes}
    look = lambda params: adapt(params, spec, allow_untied=allow_untied, **options)
    whole = jax.eval_shape(lambda: look(make_params())) if made else _shapes(look, make_params)
    # an explicit mesh wants every step of an initialiser to say where its result lives: they are made without
    plain = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))
    places = shardings(plain, whole, base_specs)
    at = places.frozen.base
    base = jax.jit(make_params, out_shardings=at)() if made else jax.device_put(make_params, at)

    def factors(base: Any) -> Any:
        adapted = begun(base, spec, allow_untied=True, **options)  # ties were looked at above, where they can be seen
        return adapted.trainable, adapted.frozen.factors

    into = (places.trainable, places.frozen.factors)
    with jax.set_mesh(plain):  # the caller may have set `mesh`, and arrays of `plain` are none of its
        trainable, frozen = jax.jit(factors, out_shardings=into)(base)
    adapted = Adapted(trainable, Frozen(base, frozen, None, whole.frozen.plan))
    return jax.device_put(adapted, jax.tree.map(lambda s: NamedSharding(mesh, s.spec), places))


def _shapes(fn: Callable[[Any], Any], params: Any) -> Any:
    """`eval_shape` for arrays that are on some mesh already: their types do not say so, and a tie stays one."""
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
