"""An adapter out of two checkpoints: tuned - base as low-rank products and whole deltas."""

import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np

from jlora._dtypes import widened
from jlora._plan import _pairs
from jlora._plan._sites import Site
from jlora._trees import _compound, _tree
from jlora._types import PyTree
from jlora.adapted import Adapted, Spec, adapt
from jlora.analysis.decompositions import SVD, matmul, svd
from jlora.combine._parts import Values, adapter, full, lora
from jlora.optim._checks import number
from jlora.rank.compact import simple
from jlora.rank.resize import Resized, needed

LARGE = 1024  # from this side on, the leading singular vectors are found by random projections


def extract(
    base: PyTree, tuned: PyTree, spec: Spec, *, energy: float | None = None, axes: dict[str, str] | None = None
) -> Resized:
    """The adapter of `base` that comes nearest to `tuned`, a full fine-tune of it.

    Where the spec has a LoRA, D = tuned - base is cut to its first singular triplets, the best of that rank (Eckart and
    Young); where it has `Full` or `BitFit`, D is kept whole. Of matrices whose sides are both above 1,024, and of
    which less than an eighth of the ranks are asked for, the triplets are found by random projections with four power
    iterations (Halko et al, 2011), which need no decomposition of D.

    Args:
      base: plain parameters.
      tuned: parameters of the same form, trained from them.
      spec: as `jlora.adapt` takes it, of LoRA and methods that train leaves whole:
        `[LoRA(rank=8), Full(target=targets.norms)]`.
      energy: in (0, 1]: in place of the spec's rank, the smallest that keeps this share of ||D||_F^2.
      axes: as `jlora.adapt` takes it.

    Returns:
      `jlora.rank.Resized`: the adapter, and `{path: ||D - dW||_F / ||D||_F}` of every leaf that changed: 1 where no
      rule takes it.

    Raises:
      TypeError, ValueError: as `jlora.adapt`; trees that differ in form; a method that is neither; a fine-tune that
        changed nothing, or that holds NaN.

    Warns:
      UserWarning: leaves that changed and that no rule takes.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> base = {"query": {"kernel": jnp.zeros((3, 3)), "bias": jnp.zeros(3)}}
      >>> tuned = {"query": {"kernel": jnp.diag(jnp.array([4.0, 3.0, 0.0])), "bias": jnp.ones(3)}}
      >>> small, error = jlora.combine.extract(base, tuned, [jlora.LoRA(rank=1), jlora.BitFit()])
      >>> {path: round(x, 3) for path, x in error.items()}
      {'query/bias': 0.0, 'query/kernel': 0.6}

    References:
      Halko, Martinsson and Tropp, `Finding structure with randomness <https://arxiv.org/abs/0909.4061>`_, 2011.
    """
    if energy is not None:
        number("combine.extract", "energy", energy, "a share in (0, 1]", lambda x: 0 < x <= 1)
    started = adapt(base, spec, axes=axes)
    changes = _changes(base, tuned)
    by_path: dict[str, list[_pairs.Pair]] = {}
    for pair in _pairs.pairs(started.frozen.plan):
        by_path.setdefault(pair.path, []).append(pair)
    made: list[tuple[Site, Values]] = []
    error: dict[str, float] = {path: 1.0 for path in changes}
    bad = []
    for site in (site for site in started.frozen.plan.sites if site.leaf.path in changes):
        path, ours = site.leaf.path, by_path.get(site.leaf.path, [])
        d = site.leaf.matrix(changes[path])
        if len(ours) == 1 and not ours[0].others and site.recipe.additive and simple(site, ours):
            whole = _leading(d, ours[0].rank) if energy is None else svd(d)
            k = min(ours[0].rank, whole.s.shape[-1]) if energy is None else needed(np.asarray(whole.s), energy)
            cut = SVD(whole.u[..., :k], whole.s[..., :k], whole.v[..., :k])
            root = jnp.sqrt(cut.s)[..., None]
            made.append(lora(site.leaf, site.index, root * cut.u.mT, root * cut.v.mT, site.method.dtype))
            error[path] = float(jnp.linalg.norm(d - cut.matrix) / jnp.linalg.norm(d))
        elif not ours and site.recipe.additive and _is_whole(site):
            made.append(full(site.leaf, site.index, d, site.method.dtype))
            error[path] = 0.0
        else:
            bad.append(f"{site.method.describe()} on {path!r}")
    if bad:
        raise ValueError(
            f"combine.extract makes LoRA and Full (BitFit, LNTuning), not {', '.join(bad[:4])}"
            f"{f' and {len(bad) - 4} more' if len(bad) > 4 else ''}"
        )
    if not made:
        raise ValueError(f"combine.extract: no rule of the spec takes a leaf that changed, of {list(changes)[:4]}")
    if left := [path for path in changes if error[path] == 1.0]:
        warnings.warn(
            f"combine.extract: {len(left)} leaves changed that no rule of the spec takes, and are as in the base: "
            f"{left[:4]}; jlora.Full(target=[...]) keeps them whole",
            stacklevel=2,
        )
    return Resized(adapter(started.frozen, made), error)


def _changes(base: PyTree, tuned: PyTree) -> dict[str, jax.Array]:
    """tuned - base of every leaf that changed, in at least float32."""
    if isinstance(tuned, Adapted):
        raise TypeError("combine.extract(base, tuned): tuned is plain parameters, such as jlora.merge(adapted)")
    ours, theirs = _tree.flatten(base), _tree.flatten(tuned)
    if ours.paths != theirs.paths:
        odd = sorted(set(ours.paths) ^ set(theirs.paths))
        raise ValueError(f"combine.extract: base and tuned are of unlike form; only one of them has {odd[:4]}")
    found: dict[str, jax.Array] = {}
    for path, a, b in zip(ours.paths, ours.leaves, theirs.leaves, strict=True):
        a, b = (jnp.asarray(_compound.dense(x)) for x in (a, b))
        if a.shape != b.shape:
            raise ValueError(f"combine.extract: {path!r} of shape {a.shape} is {b.shape} in tuned")
        if not jnp.issubdtype(a.dtype, jnp.floating) or bool(jnp.array_equal(a, b)):
            continue
        d = widened(b) - widened(a)
        if not bool(jnp.isfinite(d).all()):
            raise ValueError(f"combine.extract: {path!r} holds NaN or infinities")
        found[path] = d
    if not found:
        raise ValueError("combine.extract: tuned is base, in every leaf")
    return found


def _is_whole(site: Site) -> bool:
    """Whether one trained array has as many numbers as the leaf."""
    trained = [shape for array, shape in site.recipe.arrays(site.leaf).values() if array.trained]
    return [math.prod(shape) for shape in trained] == [math.prod(site.leaf.shape)]


def _leading(d: jax.Array, rank: int) -> SVD:
    """The first triplets of `(stack..., in, out)`."""
    small = min(d.shape[-2:])
    if small <= LARGE or 8 * rank > small:
        return svd(d)
    width = rank + 8  # a few columns more than are wanted, as the paper has it
    q = matmul(d, jax.random.normal(jax.random.key(0), (*d.shape[:-2], d.shape[-1], width), d.dtype))
    for _ in range(4):
        q = jnp.linalg.qr(matmul(d.mT, jnp.linalg.qr(q)[0]))[0]
        q = matmul(d, q)
    q = jnp.linalg.qr(q)[0]
    core = svd(matmul(q.mT, d))
    return SVD(matmul(q, core.u), core.s, core.v)
