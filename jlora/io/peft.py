"""Adapters in the files of Hugging Face peft, `adapter_config.json` and `adapter_model.safetensors`.

LoRA and DoRA, trained tokens, prompts and prefixes.

The format as peft 0.21 writes it: https://huggingface.co/docs/peft/developer_guides/checkpoint. Needs safetensors
(`pip install 'jlora[peft]'`), not peft and not torch.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from jax.typing import DTypeLike

from jlora._trees import _tree
from jlora._types import AnyPath, PyTree
from jlora.adapted import Adapted, begun, is_adapted, join, split
from jlora.io import (
    _arrays,
    _folder,
    _peft_config,
    _peft_fields,
    _peft_layout,
    _peft_lora,
    _peft_prefix,
    _peft_prompts,
    _peft_read,
    _peft_tokens,
    _peft_virtual,
    _untrained,
)
from jlora.io._peft_config import AnyConfig
from jlora.io._peft_fields import Fields
from jlora.io._peft_names import Book, ModuleNames
from jlora.io._peft_read import Collector, Rotate
from jlora.io._peft_write import Writer
from jlora.io._record import several

Tensors: TypeAlias = Mapping[str, np.ndarray]

_FILES = (_peft_config.CONFIG_FILE, _peft_layout.TENSORS_FILE, "adapter_model.bin")

#: How the configuration of each kind of file is read, and how its tensors are.
_KINDS: dict[str, tuple[Callable[[Path, Fields], AnyConfig], Callable[[Collector, Any, Tensors], None]]] = {
    "LORA": (_peft_config.read, _peft_lora.collect),
    _peft_tokens.KIND: (_peft_tokens.read, _peft_tokens.collect),
    "PROMPT_TUNING": (_peft_prompts.read, _peft_prompts.collect),
    "P_TUNING": (_peft_prompts.read, _peft_prompts.collect),
    _peft_prefix.KIND: (_peft_prefix.read, _peft_prefix.collect),
}


def load(
    folder: AnyPath,
    params: PyTree,
    names: ModuleNames = None,
    *,
    axes: dict[str, str] | None = None,
    dtype: DTypeLike = "float32",
    rotate: Rotate | None = None,
) -> Adapted:
    """Opens an adapter that peft saved, over the same model's parameters in JAX.

    What comes back is what `jlora.adapt` makes, with the arrays of the file: it can be trained on, merged, saved.
    Factors of Linear, Embedding and convolution modules; rank and alpha patterns; rsLoRA; `modules_to_save` and
    `bias` (as `Full`, the change from params in float32); `lora_bias` (as `BitFit` under the factors' scale); rows of
    tokens, `TRAINABLE_TOKENS` and `trainable_token_indices` (as `TrainedTokens`, the change from params in float32, and
    `NewTokens` of ids from the end of the table on, for which the model was resized). A head that is tied to its table
    in both worlds has the table's rows. A tensor or a field of the configuration that is not understood is refused:
    nothing is left out in silence.

    Virtual tokens: `PROMPT_TUNING` and `P_TUNING` (as `PromptTuning`; the file of the latter holds finished prompts)
    and `PREFIX_TUNING` (as `PrefixTuning`), with `modules_to_save` as `Full`. `jlora.prompts.prepend` puts their ids in
    front, and positions are those that peft gives: the first real token has position p. A model that pools its first
    position (BERT) pools a prompt in both worlds, but with a prefix a token in peft's alone: there put the virtual ids
    behind the others, `jnp.roll(given.ids, -p, 1)`, mask and positions with them. Of a prompt for an encoder-decoder
    peft uses the first half, the encoder's, and that is what is read. peft puts prompts behind what the module of the
    table makes: where that scales its rows (Gemma 3), a file's rows are to be divided by that first. A prefix is of
    every layer's keys and values, in the order of the numbers in their paths or of a stack.

    torch's layouts become the kernel's, `(out, in)` to `(in, out)`, `(out, in, *window)` to `(*window, in, out)`,
    by the same letters an axis that `adapt` uses: a kernel with several input or output axes is reshaped, and the
    modules of all layers become slices of a stacked kernel. So `a` is `(stack..., r, in...)`, `b` `(stack..., r,
    out...)`, DoRA's `m` `(stack..., out...)`.

    Args:
      folder: holds the two files.
      params: the base, as `adapt` takes it.
      names: which weight a module of the file is. By default the one with the same steps: `layers.0.q_proj` is
        `layers/0/q_proj/kernel` (or `/embedding`, or `/scale`), below `params/` or not. Others are named by a
        dictionary, `{"layers.{n}.q_proj": "layers_{n}/query/kernel"}`; `{n}` is a number, and one that the path has
        not is an index into the kernel's stack axes: `{"layers.{n}.q_proj": "layers/query/kernel"}`. Modules that
        it has not go by the default. Or by a function: module to path, or to `(path, (index, ...))`, or None for
        the default. A path names a weight; its bias is the leaf `bias` beside it. The table of virtual tokens is
        "word_embeddings" and a prefix is "layers.{n}.key" and "layers.{n}.value", where the tree does not say which.
      axes: `{pattern: letters}`, as in `adapt`. Where a square kernel is not `(in, out)`, nothing but this tells.
      dtype: of the factors a, b and m and of virtual tokens, whatever the file's. Changes of whole leaves are float32.
      rotate: of a prefix, what the model does to its keys by their positions: `rotate(keys, positions)` of keys
        `(positions, heads, size)` and positions `(positions,)`. peft stores keys as they are in a cache, those of a
        rotary model turned, R(j) k; `PrefixTuning` has k, and the model turns it. So the inverse of R(j) is applied,
        and the file's bits come back to rounding alone. It is asked for where the tree has no table of positions; for
        a model that turns nothing (ALiBi) it is `lambda keys, positions: keys`.

    Raises:
      FileNotFoundError: one of the files is not there.
      ImportError: safetensors is not installed.
      ValueError: a file that is cut short or damaged; another `peft_type`; fields that change the maths in a way
        that is not built; tensors without a weight, with half of a pair missing, or of a shape that does not fit;
        two modules for one weight, layers of a stack without a module. A prefix whose rotation nothing says, of a
        model that norms its keys, or of an encoder-decoder. All of a kind are named at once.

    Example:
      >>> import tempfile, jax.numpy as jnp, jlora
      >>> params = {"layers": {"0": {"q_proj": {"kernel": jnp.ones((6, 4))}}}}
      >>> adapted = jlora.adapt(params, jlora.LoRA(rank=2, target="q_proj"))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.io.peft.save(folder + "/adapter", adapted)
      ...     jlora.io.peft.load(folder + "/adapter", params)
      ...     stacked = {"layers": {"query": {"kernel": jnp.ones((1, 6, 4))}}}
      ...     names = {"layers.{n}.q_proj": "layers/query/kernel"}
      ...     jlora.io.peft.load(folder + "/adapter", stacked, names).trainable["layers/query/kernel"]["a"].shape
      Adapted(1 weight, 20 trainable)
      (1, 2, 6)

      A prefix of a rotary model, whose pairs of features (i, i + size / 2) turn by j 10000^(-2i / size):

      >>> def rotate(keys, positions):
      ...     half = keys.shape[-1] // 2
      ...     angle = positions[:, None, None] * 10000.0 ** (-jnp.arange(half) / half)
      ...     x, y = jnp.split(keys, 2, axis=-1)
      ...     cos, sin = jnp.cos(angle), jnp.sin(angle)
      ...     return jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1)
      >>> attention = {"k_proj": {"kernel": jnp.ones((6, 4))}, "v_proj": {"kernel": jnp.ones((6, 4))}}
      >>> params = {"embed_tokens": {"embedding": jnp.ones((9, 6))}, "layers": {"0": {"self_attn": attention}}}
      >>> adapted = jlora.adapt(params, jlora.PrefixTuning(count=3))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.io.peft.save(folder + "/prefix", adapted, task_type="CAUSAL_LM", heads=1, rotate=rotate)
      ...     jlora.io.peft.load(folder + "/prefix", params, rotate=rotate)
      Adapted(3 weights, 24 trainable)

    References:
      `Hugging Face peft, checkpoint format <https://huggingface.co/docs/peft/developer_guides/checkpoint>`_.
    """
    if is_adapted(params):
        raise TypeError("params is an Adapted; load takes the base: load(folder, adapted.frozen.base)")
    tree = _tree.flatten(params)
    book = Book(names, tree.paths)
    where, config, tensors = _read(folder)
    reader = Collector(tree, book, axes, dtype, rotate)
    _, collect = _KINDS[str(config.said["peft_type"])]
    collect(reader, config, tensors)
    parts = reader.finish()
    if reader.bad:
        raise ValueError(f"{where} does not fit:" + several(reader.bad))
    adapted = begun(params, _peft_read.spec(parts), axes=axes)
    return join(*split(_peft_read.fill(adapted, parts)))


def _read(folder: AnyPath) -> tuple[Path, AnyConfig, dict[str, np.ndarray]]:
    """Both files of one adapter: if another process saved over it in the meantime, both of the new one."""
    while True:
        where = _find(_folder.local(folder))
        was = _inode(where)
        try:
            tensors, config = where / _peft_layout.TENSORS_FILE, where / _peft_config.CONFIG_FILE
            found = _configuration(config), _peft_layout.read(tensors)
            _check_digest(where, *found)
        except (ValueError, OSError):
            if _inode(where) == was:
                raise
        else:
            if _inode(where) == was:
                return where, *found


def _configuration(path: Path) -> AnyConfig:
    content = _peft_fields.parse(path)
    kind = content.get("peft_type")
    if not isinstance(kind, str) or kind not in _KINDS:
        raise ValueError(
            f"{path}: peft_type is {kind!r:.60}; jlora reads {', '.join(_KINDS)} (DoRA is LORA's use_dora)"
        )
    return _KINDS[kind][0](path, content)


def _check_digest(where: Path, config: AnyConfig, tensors: Mapping[str, np.ndarray]) -> None:
    """ValueError where jlora wrote a digest of both files, and it is not theirs."""
    stated = _peft_layout.stated(where / _peft_layout.TENSORS_FILE)
    if stated not in (None, _peft_layout.digest(tensors, _peft_config.in_one_spelling(config))):
        raise ValueError(
            f"{where} is damaged, or was edited: its numbers do not have the digest that jlora.io.peft.save wrote into "
            f"{_peft_layout.TENSORS_FILE}. If it was you, write that file again (safetensors.numpy.save_file), without "
            "one"
        )


def _inode(folder: Path) -> int | None:
    return folder.stat().st_ino if folder.is_dir() else None


def _find(where: Path) -> Path:
    """The folder with both files; where a save was killed between two renames, the one that it was to replace."""
    if not os.path.lexists(where) and _folder.old(where).is_dir():
        where = _folder.old(where)
    _folder.check_kind(where, _peft_config.CONFIG_FILE)
    missing = [name for name in _FILES[:2] if not (where / name).is_file()]
    if missing:
        pickled = " (adapter_model.bin is a pickle, which runs code: save it again with a newer peft)"
        raise FileNotFoundError(
            f"{where} holds no adapter of peft: {' and '.join(missing)} not found"
            + pickled * (where / "adapter_model.bin").is_file()
        )
    return where


def save(
    folder: AnyPath,
    adapted: Adapted,
    names: ModuleNames = None,
    *,
    task_type: str | None = None,
    base_model: AnyPath | None = None,
    heads: int | None = None,
    rotate: Rotate | None = None,
    overwrite: bool = False,
) -> None:
    """Saves an adapter as peft would: `PeftModel.from_pretrained(model, folder)` reads it.

    Factors keep their dtype and their bits. `Full` and `BitFit` are written as values, base plus change, rounded to
    float32 (`modules_to_save`, `bias`), or as changes where peft has a name for one (`lora_bias`); beside a weight
    that is saved whole stands its bias, trained or not. s is written as `lora_alpha`, which peft divides by r again.
    Not written, for peft has no place for it: which factors are frozen (LoRA-FA), a dropout rate a module (the
    largest is written), rank and module dropout, a dropout key. The folder changes at once: a save that is
    interrupted leaves the former adapter readable, by `load` at any moment.

    Args:
      folder: a local folder; its parents are made.
      adapted: LoRA, LoRA-FA, DoRA of these, `Full` and `BitFit`; `TrainedTokens`, `NewTokens` or a `Sum` of such,
        beside them, or alone (a file of the kind `TRAINABLE_TOKENS`). peft takes the rows of `NewTokens` into a model
        whose table has them: `model.resize_token_embeddings(V + n)` comes before `PeftModel.from_pretrained` there. Of
        a head that is tied it warns that there are no rows: they are those of the table. Or `PromptTuning`, or
        `PrefixTuning`, without a network (`jlora.prompts.encoded`), alone or beside `Full`.
      names: as in `load`, read from right to left. A function gets `(path, index)` and returns a module; layers of a
        prefix are named by a dictionary.
      task_type: of the model, as peft has it ("CAUSAL_LM", "SEQ_CLS", ...), which `AutoPeftModelForCausalLM` asks for.
        Without one peft does nothing with virtual tokens, so they are not written without it.
      base_model: its name on the hub or its folder, from which `AutoPeftModelFor...` makes it.
      heads: of a prefix, how many heads its keys have (grouped heads: `num_key_value_heads`), where kernels do not
        have them on an axis of their own.
      rotate: of a prefix, as in `load`.
      overwrite: replace an adapter of peft that is there. Other files of the folder stay.

    Warns:
      UntrainedWarning: all factors are where they began.

    Raises:
      FileExistsError: the path exists (with `overwrite`: and holds no adapter of peft).
      NotImplementedError: in one of several processes; the message says how they save together.
      ImportError: safetensors is not installed.
      TypeError: no `Adapted`, or one that is being traced.
      ValueError: factors with NaN or infinity; a method that peft's file has no name for, `slices`, LoRA beside DoRA,
        a stacked kernel or another weight without a name; all of them at once. A task that peft has not.

    Example:
      >>> import os, tempfile, jax.numpy as jnp, jlora
      >>> adapted = jlora.adapt({"query": {"kernel": jnp.ones((6, 4))}}, jlora.LoRA(rank=2, alpha=4))
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     jlora.io.peft.save(folder + "/adapter", adapted)
      ...     sorted(os.listdir(folder + "/adapter"))
      ['adapter_config.json', 'adapter_model.safetensors']

    References:
      `Hugging Face peft, checkpoint format <https://huggingface.co/docs/peft/developer_guides/checkpoint>`_.
    """
    target = _folder.local(folder)
    _folder.recover(target)
    replaces = _folder.check_free(target, overwrite, _peft_config.CONFIG_FILE, "adapter of peft")
    _arrays.check_concrete(adapted, lambda x: x, "jlora.io.peft.save")
    paths = _tree.flatten(adapted.frozen.base).paths
    book = Book(names, paths)
    if _peft_virtual.has_some(adapted):
        tensors, config = _peft_virtual.write(adapted, book, task_type, heads, rotate)
    else:
        tensors, config = Writer(adapted, book).write()
    said = _peft_config.write(config, task_type, base_model)
    _untrained.warn("jlora.io.peft.save(path", adapted)
    with _folder.new_folder(target) as temporary:
        new = temporary / "adapter"
        new.mkdir()
        (new / _peft_layout.TENSORS_FILE).write_bytes(_peft_layout.write(tensors, _peft_config.in_one_spelling(config)))
        (new / _peft_config.CONFIG_FILE).write_bytes(said)
        _read_back(new, tensors, config)
        _folder.sync(new / _peft_layout.TENSORS_FILE, new / _peft_config.CONFIG_FILE, new)
        _folder.appear(new, target, replaces, lambda entry: entry.name in _FILES)


def _read_back(folder: Path, tensors: Mapping[str, np.ndarray], config: AnyConfig) -> None:
    """Raises OSError unless both files hold what was to be written."""
    found = _peft_layout.read(folder / _peft_layout.TENSORS_FILE)
    same = found.keys() == tensors.keys() and all(
        found[name].dtype == a.dtype and found[name].shape == a.shape and found[name].tobytes() == a.tobytes()
        for name, a in tensors.items()
    )
    if not same or _configuration(folder / _peft_config.CONFIG_FILE) != config:
        raise OSError(f"{folder} does not hold what was written to it: the disk, or what is between, lost it")
