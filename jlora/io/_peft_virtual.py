"""From an `Adapted` with virtual tokens to the tensors of peft's file and its configuration: prompts, or a prefix."""

from collections.abc import Mapping, Sequence

import numpy as np

from jlora._plan._sites import Site
from jlora.adapted import Adapted
from jlora.io import _peft_prefix, _peft_prompts
from jlora.io._peft_names import Book, Slot
from jlora.io._peft_prompts import PREFIX, TENSOR
from jlora.io._peft_read import Rotate
from jlora.io._peft_write import WHOLES, Writer, slots
from jlora.methods.deep_prompts import DeepPrompts
from jlora.methods.prefix import VirtualTokens
from jlora.methods.prompt_tuning import PromptTuning, PTuning

_VIRTUAL = (PromptTuning, PTuning, VirtualTokens, DeepPrompts)


def has_some(adapted: Adapted) -> bool:
    """Whether an adapter is one of virtual tokens."""
    return any(type(site.method) in _VIRTUAL for site in adapted.frozen.plan.sites)


def write(
    adapted: Adapted, book: Book, task_type: str | None, heads: int | None, rotate: Rotate | None
) -> tuple[dict[str, np.ndarray], _peft_prompts.Config]:
    """The tensors and the configuration.

    Raises:
      ValueError: what peft has no name for; all of it at once.
    """
    writer = Writer(adapted, book)
    writer.prefix = PREFIX
    virtual = [site for site in writer.plan.sites if type(site.method) in _VIRTUAL]
    wholes = [site for site in writer.plan.sites if type(site.method) in WHOLES and not writer.is_bias(site)]
    for site in writer.plan.sites:
        if site not in virtual and site not in wholes:
            writer.bad.append(
                f"{site.leaf.path!r}: {site.method.describe()} beside virtual tokens; peft trains whole modules beside "
                "them (Full), and nothing else"
            )
    if task_type is None:
        writer.bad.append("task_type is None, with which peft's models know of no virtual tokens: say it")
    named = [writer.attempt(writer.save_module, *slot) for slot in slots(writer, wholes, [])]
    saved = {name for name in named if name is not None}
    writer.check_saved(saved, book.known())
    made = writer.attempt(_Virtual(writer, virtual, heads, rotate).tensor, tuple(sorted(saved)))
    if writer.bad or made is None:
        raise writer.refused()
    return {TENSOR: made[0], **writer.tensors}, made[1]


class _Virtual:
    """The virtual tokens of an adapter."""

    def __init__(self, writer: Writer, sites: Sequence[Site], heads: int | None, rotate: Rotate | None) -> None:
        self.writer, self.sites, self.heads, self.rotate = writer, sites, heads, rotate

    def tensor(self, modules: tuple[str, ...]) -> tuple[np.ndarray, _peft_prompts.Config]:
        """The one tensor, and the configuration; ValueError where peft has no name for them."""
        networks = (s for s in self.sites if type(s.method) is PTuning or getattr(s.method, "encoder", ()))
        if (made := next(networks, None)) is not None:
            raise ValueError(
                f"{made.leaf.path!r}: {made.method.describe()} makes its prompts by a network, of which peft has "
                "another; drop it: jlora.prompts.encoded(adapted)"
            )
        prompts = [site for site in self.sites if type(site.method) is PromptTuning]
        if not prompts:
            return self._prefix(modules)
        if len(self.sites) > 1:
            raise ValueError(
                f"{[s.leaf.path for s in self.sites][:4]} have virtual tokens; peft has those of one table"
            )
        (site,) = prompts
        if site.leaf.stack:
            raise ValueError(f"{site.leaf.path!r} is a stack of tables, and peft has virtual tokens of one")
        rows = self.writer.factors(site.leaf.path)["rows"]
        flat = rows.reshape(len(rows), -1)
        return flat, _peft_prompts.Config(*flat.shape, modules_to_save=modules)

    def _prefix(self, modules: tuple[str, ...]) -> tuple[np.ndarray, _peft_prompts.Config]:
        tables = [site for site in self.sites if type(site.method) is VirtualTokens]
        deep = {site.leaf.path: site for site in self.sites if type(site.method) is DeepPrompts}
        if len(tables) != 1 or not deep:
            raise ValueError("virtual tokens are those of one table, with keys and values at each: PrefixTuning(...)")
        (table,) = tables
        count, first = len(table.recipe.rows[0].at), table.leaf.size("ik")
        for path, site in deep.items():
            method = site.method
            assert isinstance(method, DeepPrompts)
            if (method.table, method.first, method.count) != (table.leaf.path, first, count):
                raise ValueError(f"{path!r}: {method} is none of the {count} virtual tokens of {table.leaf.path!r}")
        tree = self.writer.tree
        where = _peft_prefix.layers(tree, self.writer.book.of_modules(), lambda path: self._stack(deep, path), None)
        _peft_prefix.check_keys(tree, where)
        _peft_prefix.check_rotation(tree, self.rotate)
        pairs = []
        for n, layer in enumerate(where):
            keys, values = (self._rows(deep, n, slot, layer.features) for slot in (layer.key, layer.value))
            width = keys.shape[1] // 2
            pairs.append((keys[:, :width], keys[:, width:]) if layer.features else (keys, values))
        used = {self._site(deep, path) for layer in where for path, _ in (layer.key, layer.value)}
        if left := [path for path, site in deep.items() if site not in used]:
            raise ValueError(f"{left[:4]} have a prefix, and are keys and values of no layer: {_peft_prefix.HINT}")
        widths = {x.shape[1] for pair in pairs for x in pair}
        if len(widths) > 1:
            raise ValueError(
                f"token_dim: layers have keys and values of {sorted(widths)} features, and peft of one number"
            )
        heads = _peft_prefix.heads_of([site.leaf for site in deep.values()], self.heads)
        width = widths.pop()
        if width % heads:
            raise ValueError(f"token_dim is {width}, which heads={heads} does not divide")
        found = _peft_prefix.to_torch(pairs, heads, self.rotate)
        return found, _peft_prefix.Config(count, width, 1, modules, len(where), heads)

    def _site(self, deep: Mapping[str, Site], path: str) -> Site | None:
        """What stands at a projection, or at its bias."""
        return deep.get(path) or deep.get("/".join([*path.split("/")[:-1], "bias"]))

    def _stack(self, deep: Mapping[str, Site], path: str) -> tuple[int, ...]:
        site = self._site(deep, path)
        return site.leaf.stack if site else ()

    def _rows(self, deep: Mapping[str, Site], n: int, slot: Slot, features: tuple[int, ...]) -> np.ndarray:
        path, index = slot
        site = self._site(deep, path)
        if site is None:
            raise ValueError(f"{path!r}, of layer {n}, has no prefix; peft has one of all layers")
        if getattr(site.method, "features", ()) != features:
            raise ValueError(f"{path!r}: {site.method}; its keys and values are the features {features or 'all'}")
        return self.writer.factors(site.leaf.path)["prompts"][index]
