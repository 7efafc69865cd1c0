"""Prompts in peft's files: `PROMPT_TUNING`, and `P_TUNING`, whose file holds the prompts that its network made.

peft puts the rows behind what the table of tokens makes of ids, jlora has them behind the table's end: the same numbers
at the same positions.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from jlora import targets
from jlora._trees import _select, _tree
from jlora.io import _peft_config
from jlora.io import _peft_fields as fields
from jlora.io._peft_config import WHOLE
from jlora.io._peft_fields import Fields
from jlora.io._peft_names import Book
from jlora.io._peft_read import Collector
from jlora.io._record import several
from jlora.methods.prompt_tuning import PromptTuning

#: The one tensor of all files of prompts and prefixes, and what stands in front of other names there.
TENSOR = "prompt_embeddings"
PREFIX = "base_model."
#: What peft calls the table, and `names=` so where a tree has several.
TABLE = "word_embeddings"

#: Fields that say how prompts were made.
_MADE = frozenset(
    "prompt_tuning_init prompt_tuning_init_text tokenizer_name_or_path tokenizer_kwargs init_weights encoder_dropout "
    "encoder_hidden_size encoder_num_layers encoder_reparameterization_type prefix_projection".split()
)


@dataclasses.dataclass(frozen=True)
class Config:
    """What a configuration of prompts says of the numbers, under peft's own names."""

    said: ClassVar[Fields] = {"peft_type": "PROMPT_TUNING", "prompt_tuning_init": "RANDOM"}

    num_virtual_tokens: int
    token_dim: int
    num_transformer_submodules: int = 1
    modules_to_save: tuple[str, ...] = ()

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module, or one that it is a part of."""
        return _peft_config.names_one_of(self.modules_to_save, PREFIX, module)


def read(path: Path, content: Fields) -> Config:
    """The configuration that a file holds, whose fields are these.

    Raises:
      ValueError: fields of the wrong type, and fields that are not known; all at once.
    """
    bad = unknown(content)
    count, width, parts, modules = common(content, bad)
    if parts not in (1, 2) or parts == 2 and content.get("task_type") != "SEQ_2_SEQ_LM":
        bad.append(
            f"num_transformer_submodules is {parts} and task_type {content.get('task_type')!r:.60}: peft has two "
            "halves of prompts for SEQ_2_SEQ_LM alone"
        )
    if bad:
        raise ValueError(f"{path} cannot be loaded:" + several(bad))
    return Config(count, width, parts, modules)


def unknown(content: Fields) -> list[str]:
    """The fields that neither prompts nor prefixes have, in words."""
    own = {"num_virtual_tokens", "token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"}
    return fields.unknown(content, own | {"modules_to_save"} | _MADE | _peft_config.HISTORY)


def common(content: Fields, bad: list[str]) -> tuple[int, int, int, tuple[str, ...]]:
    """Virtual tokens, their width, parts of the model, and the modules that are saved whole."""
    whole = lambda name: fields.whole(name, content.get(name), bad)  # noqa: E731
    parts = content.get("num_transformer_submodules")
    said = 1 if parts is None else fields.whole("num_transformer_submodules", parts, bad)
    modules = fields.modules("modules_to_save", content.get("modules_to_save"), bad)
    return whole("num_virtual_tokens"), whole("token_dim"), said, tuple(dict.fromkeys(modules))


# --- read ---------------------------------------------------------------------------------------------------------


def collect(reader: Collector, config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Takes all tensors of a file. Of an encoder-decoder's two halves peft reads the first alone, and so does this."""
    count, width = config.num_virtual_tokens, config.token_dim
    found = rows(reader, tensors, (count * config.num_transformer_submodules, width), "num_virtual_tokens, token_dim")
    others(reader, config, tensors)
    try:
        leaf, one = reader.leaf(table(reader.tree, reader.book), ())
        if width != leaf.size("o"):
            raise ValueError(f"token_dim is {width}, and {leaf.path!r} of shape {leaf.shape} has {leaf.size('o')}")
        if found is not None:
            values = {"rows": found[:count].reshape(count, *one.sizes("o"))}
            reader.put(TENSOR, leaf, PromptTuning(count=count, dtype=reader.dtype, target=()), (), values)
    except ValueError as error:
        reader.bad.append(str(error))


def rows(
    reader: Collector, tensors: Mapping[str, np.ndarray], shape: tuple[int, int], said_by: str
) -> np.ndarray | None:
    """The prompts of a file; what is wrong with them is noted."""
    found = tensors.get(TENSOR)
    if found is None:
        reader.bad.append(f"missing {TENSOR!r}, the virtual tokens")
    elif found.shape != shape:
        reader.bad.append(f"{TENSOR!r} has shape {found.shape}, and by {said_by} it is {shape}")
        found = None
    return found


def others(reader: Collector, config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Takes the modules that are saved whole beside prompts."""
    reader.prefix = PREFIX
    left = {key: tensor for key, tensor in tensors.items() if key != TENSOR}
    found = reader.modules(left, WHOLE, "prompts or a prefix")
    reader.check_saved(config.modules_to_save, found)
    for module, named in found.items():
        try:
            at = reader.book.slot(module)
            for kind, tensor in named.items():
                reader.whole(module, kind, tensor, at, config.saves(module), False)
        except ValueError as error:
            reader.bad.append(str(error))


def table(tree: _tree.Named, book: Book) -> str:
    """The path of the table of tokens; ValueError where none, or more than one, could be it."""
    if book.said(TABLE):
        return book.slot(TABLE)[0]
    found = [path for path, it in zip(tree.paths, _select.taken(targets.tokens, tree), strict=True) if it]
    if len(found) != 1:
        raise ValueError(
            f"virtual tokens stand behind one table of tokens, and there are {found}: names={{{TABLE!r}: path}} says it"
        )
    return found[0]
