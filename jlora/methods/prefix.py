"""Prefix tuning: attention sees p more keys and values in front, K = [P_K; x W_K], V = [P_V; x W_V], all P trained.

Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021.
Liu et al, `P-Tuning v2 <https://arxiv.org/abs/2110.07602>`_, 2021: the same without the encoder.
"""

import dataclasses
import re
from collections.abc import Collection
from typing import Annotated

from jlora import targets
from jlora._algebra._recipe import Recipe
from jlora._algebra._rows import Rows
from jlora._algebra._words import Array
from jlora._trees import _blocks, _kinds, _select, _tree
from jlora._trees._leaf import Leaf
from jlora._trees._tree import Target
from jlora._types import Traced
from jlora.methods._fields import nonzero
from jlora.methods.base import Method, zeros
from jlora.methods.deep_prompts import Count, DeepPrompts


@dataclasses.dataclass(frozen=True, kw_only=True)
class VirtualTokens(Method):
    """Rows of zeros behind the end of a table, which are not trained: ids that say where virtual positions are.

    `PrefixTuning` writes it where its table is.

    Attributes:
      count: how many.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}}
      >>> adapted = jlora.adapt(params, jlora.VirtualTokens(count=2, target="embed"))
      >>> jlora.prompts.virtual_ids(adapted), jlora.count(adapted)[0]
      (range(10, 12), 0)

    References:
      Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021.
    """

    count: Count

    def recipe(self, leaf: Leaf) -> Recipe:
        size = leaf.size("ik")
        rows = Array("virtual", zeros, trained=False, derived=True)
        return Recipe(rows=(Rows(rows, range(size, size + self.count)),))

    @property
    def yields(self) -> bool:
        return False


@dataclasses.dataclass(frozen=True, kw_only=True)
class PrefixTuning(Method):
    """Trained keys and values at p virtual positions of every attention.

    The ids V to V + p - 1, behind the end of the table of V tokens, are the virtual positions: put them in front
    (`jlora.prompts.prepend`) and take what stands there off the output (`jlora.prompts.remove`). So positions, masks
    and lengths follow from longer ids by the model's own rules, as they do for a cache with the prefix in it: the
    first real token has position p, keys of a rotary model are turned after they are written, each by its own place,
    and what decodes with a cache gives the prefix once. What virtual positions compute, no other of their stack sees.

    An encoder and its decoder each read their own ids, and a prefix stands where virtual ids are given. Cross-attention
    has none by default: it sees what the encoder made at virtual positions, unless a mask of its own leaves them out.
    Where `target` names its projections too, as the authors do for BART, it has trained keys and values of its own in
    the first p places of what it attends to.

    It is several rules: `VirtualTokens` on the table, `DeepPrompts` on the keys and values. It stands alone or beside
    rules for weights, `[PrefixTuning(count=10), LoRA(rank=8)]`. It cannot be merged.

    Attributes:
      count: p.
      target: the projections of keys and values; by default those of self-attention. Those of cross-attention are
        named beside, `[jlora.targets.keys_and_values, "EncDecAttention/[kv]/"]`.
      table: the table of tokens by its path; by default the only one that there is.
      features: of a projection that makes queries, keys and values in one, where its keys and values are: from and to.
        Of `c_attn` (GPT-2) the second and third part by default.
      encoder: widths (e, h) of the network that makes the prefix while it is trained (the paper's (d, 512) or (d,
        800)): P = tanh(E w1 + b1) w2 + b2; () for none. `jlora.prompts.encoded` drops it after training.
      std: of N(0, std^2), of which P is drawn without an encoder.

    Example:
      >>> import jax.numpy as jnp, jlora
      >>> attention = {name: {"kernel": jnp.ones((4, 4))} for name in ("query", "key", "value", "out")}
      >>> params = {"embed": {"embedding": jnp.ones((10, 4))}, "layer_0": {"attention": attention}}
      >>> jlora.count(jlora.adapt(params, jlora.PrefixTuning(count=5), axes={"kernel": "io"}))[0]
      40

    References:
      Li and Liang, `Prefix-Tuning <https://arxiv.org/abs/2101.00190>`_, 2021;
      Liu et al, `P-Tuning v2 <https://arxiv.org/abs/2110.07602>`_, 2021.
    """

    count: Count
    table: str = ""
    features: tuple[int, ...] = ()
    encoder: tuple[int, ...] = ()
    std: Annotated[float, nonzero("std")] = 0.02
    target: Target = targets.keys_and_values

    def rules(self, tree: _tree.Named, traced: Traced | None = None) -> tuple[Method, ...]:
        table, first = self._table(tree, traced)
        deep = list[Method]()
        for features, paths in self.projections(tree, traced).items():
            across = [path for path in paths if _blocks.is_cross_attention(path)]
            within = [path for path in paths if path not in across]
            # what cross-attention projects is made of another sequence than the ids that were looked up last
            for those, of, start in ((within, table, first), (across, "", 0)):
                if those:
                    deep.append(DeepPrompts(
                        count=self.count, table=of, first=start, features=features, encoder=self.encoder, std=self.std,
                        dtype=self.dtype, target=exactly(those), group="prefix",
                    ))  # fmt: skip
        return (VirtualTokens(count=self.count, dtype=self.dtype, target=exactly([table])), *deep)

    def _table(self, tree: _tree.Named, traced: Traced | None) -> tuple[str, int]:
        """The path of the table of tokens, and how many it has."""
        if self.table and self.table not in tree.paths:
            raise ValueError(f"PrefixTuning(table={self.table!r}): the tree has no leaf of that path")
        takes = _select.taken(targets.tokens, tree, traced)
        found = [self.table] if self.table else [p for p, it in zip(tree.paths, takes, strict=True) if it]
        if not found:
            raise ValueError(
                "PrefixTuning() needs the table of tokens, whose ids say which positions are virtual, and this tree "
                "has none. Where inputs are no ids, as in images, write jlora.DeepPrompts(first=..., target=...), "
                "positions from first on, and give the model so many more (jlora.prompts.insert)"
            )
        if len(found) > 1:
            raise ValueError(f"PrefixTuning() needs one table of tokens, and there are {found}: write table=...")
        return found[0], _tree.shape_dtype(tree.leaves[tree.paths.index(found[0])])[0][0]

    def projections(self, tree: _tree.Named, traced: Traced | None = None) -> dict[tuple[int, ...], list[str]]:
        """`{features: paths}` of the projections that make keys and values."""
        takes = _select.taken(self.target, tree, traced)
        spared = _select.taken(self.exclude, tree, traced)
        found: dict[tuple[int, ...], list[str]] = {}
        unclear = []
        for path, leaf, it, no in zip(tree.paths, tree.leaves, takes, spared, strict=True):
            if not it or no:
                continue
            shape = sorted(_tree.shape_dtype(leaf)[0])
            fused = re.match("q.|.+q", _kinds.letters(path)) is not None and not _blocks.is_cross_attention(path)
            features = self.features if fused else ()
            if fused and not features:
                # transformers/models/gpt2/modeling_flax_gpt2.py: c_attn, split into three parts
                if not re.search(r"c_attn[/.]\w+$", path) or len(shape) != 2 or shape[1] != 3 * shape[0]:
                    unclear.append(path)
                features = (shape[0], shape[-1])
            found.setdefault(features, []).append(path)
        if unclear:
            raise ValueError(
                f"PrefixTuning(): {unclear[:3]} make queries, keys and values in one; write which features of the "
                "output are keys and values, from and to, such as features=(768, 2304); where each head has its three "
                "together, as in Bloom, there is no such range, and no prefix"
            )
        if not found:
            raise ValueError(
                "PrefixTuning() finds no projections of keys and values in this tree: name them, "
                "target=r'(key|value)/kernel$'"
            )
        return found


def exactly(paths: Collection[str]) -> tuple[str, ...]:
    """A target that takes these paths and no others."""
    return tuple(f"^{re.escape(path)}$" for path in paths)
