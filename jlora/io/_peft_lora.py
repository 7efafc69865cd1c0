"""The tensors of peft's LoRA and DoRA, module by module: factors, biases, rows of tokens, whole leaves."""

from collections.abc import Mapping

import numpy as np

from jlora.io import _peft_layout as layout
from jlora.io import _peft_tokens
from jlora.io._peft_config import BIAS_OF_B, LOW_RANK, WHOLE, Config
from jlora.io._peft_read import Collector, Index
from jlora.methods.bitfit import BitFit
from jlora.methods.dora import DoRA
from jlora.methods.full import Full
from jlora.methods.lora import LoRA


def collect(reader: Collector, config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Takes all tensors of a file."""
    found = reader.modules(tensors, Config.tensors, "a LoRA or DoRA adapter")
    reader.check_saved(config.modules_to_save, found)
    for module, named in _peft_tokens.without_tied(found, config, reader).items():
        try:
            at = reader.book.slot(module)
            if any(kind in named for kind in (*LOW_RANK, BIAS_OF_B)):
                _low_rank(reader, config, module, named, at)
            _peft_tokens.take(reader, config, module, named, at)
            for kind in (kind for kind in WHOLE if kind in named):
                trained = config.saves(module) or kind.endswith("bias") and config.bias != "none"
                reader.whole(module, kind, named[kind], at, trained, config.fan_in_fan_out)
        except ValueError as error:
            reader.bad.append(str(error))
    if all(type(part.method) in (Full, BitFit) for part in reader.parts.values()) and not reader.bad:
        reader.bad.append("it holds no factors of a LoRA or DoRA adapter, and no rows of tokens")


def _low_rank(
    reader: Collector, config: Config, module: str, named: Mapping[str, np.ndarray], at: tuple[str, Index]
) -> None:
    path, index = at
    leaf, one = reader.leaf(path, index)
    names = layout.factor_names(one)
    if not config.use_dora:
        del names["m"]
    with_bias = config.lora_bias and not layout.is_embedding(one)
    want = {*names.values(), *([BIAS_OF_B] if with_bias else [])}
    have = {kind for kind in named if kind not in WHOLE and kind not in config.rows}
    said = lambda kind: repr(f"{reader.prefix}{module}.{kind}")  # noqa: E731
    reader.bad += [f"missing {said(kind)}, for {path!r}" for kind in sorted(want - have)]
    for kind in sorted(have - want):
        reader.bad.append(f"extra {said(kind)} of shape {named[kind].shape}, for {path!r} of {leaf.shape}")
    if not config.targets(module):
        reader.bad.append(f"{module!r} has factors, and target_modules does not name it: peft would not load them")
    if want != have:
        return
    rank = next(iter(named[names["a"]].shape), 0)
    if rank != (wanted := config.rank(module)):
        nor = f"which neither r={config.r} nor rank_pattern says"
        reader.bad.append(f"{module!r} has rank {rank}, {nor}: it is to have {wanted}")
    shapes = layout.factor_shapes(one, rank)
    wrong = [x for x in names if not reader.fits(module, names[x], named[names[x]], leaf, shapes[x])]
    if wrong or not rank:
        return
    s = config.scale(module, rank)
    values = {x: layout.from_torch(one, x, named[kind]) for x, kind in names.items()} | {"s": s}
    lora = LoRA(rank=rank, dropout=config.lora_dropout, dtype=reader.dtype)
    reader.put(module, leaf, DoRA(lora, dtype=reader.dtype) if config.use_dora else lora, index, values)
    if with_bias:  # b0 + s * (bias of B)
        leaf, one = reader.leaf(reader.book.bias(path), index)
        if reader.fits(module, BIAS_OF_B, named[BIAS_OF_B], leaf, layout.weight_shape(one)):
            delta = layout.weight_from_torch(one, named[BIAS_OF_B])
            reader.put(module, leaf, BitFit(), index, {"delta": delta, "s": s})
