"""adapter_config.json, of a LoRA adapter above all, as Hugging Face peft writes it: read strictly, written plainly.

It may come from anywhere: nothing in it is imported or evaluated, and every field that could change a number is
either understood or refused by name.
"""

import collections
import dataclasses
import functools
import json
import math
import os
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import ClassVar, Protocol, TypeVar

import numpy as np

from jlora._types import AnyPath, PyTree
from jlora.io import _pattern
from jlora.io import _peft_fields as fields
from jlora.io._pattern import Patterns
from jlora.io._peft_fields import Fields
from jlora.io._record import several

Number = TypeVar("Number", int, float)
T = TypeVar("T")

CONFIG_FILE = "adapter_config.json"
#: In front of a module's name in the keys of tensors; and what peft's own modules are called.
PREFIX = "base_model.model."
_ROUND = ("base_model", "base_model.model")
#: Its modules inside one with factors, of any kind of layer.
_PARTS = """base_layer lora_A lora_A.default lora_B lora_B.default lora_dropout lora_dropout.default lora_embedding_A
    lora_embedding_B lora_magnitude_vector lora_magnitude_vector.default""".split()
#: What a `task_type` may be: each has an `AutoPeftModelFor...`.
TASKS = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")

#: What peft calls the tensors of a module: factors, rows of tokens, whole leaves.
LOW_RANK = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")
BIAS_OF_B = "lora_B.bias"
WHOLE = ("base_layer.weight", "base_layer.bias", "weight", "bias")

#: Fields that say how an adapter was made or found its modules, and do not change what its tensors compute.
HISTORY = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode layers_pattern "
    "layers_to_transform loftq_config lora_ga_config megatron_core peft_type peft_version qalora_group_size revision "
    "runtime_config task_type velora_config".split()
)

#: Initialisers that leave the base as it is. The others (pissa, olora, corda, lora_ga, loftq) change it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


class AnyConfig(Protocol):
    """What a configuration says of the numbers, of any kind of adapter; a frozen dataclass of peft's own fields.

    Attributes:
      said: what peft's file has beside these, the kind first.
    """

    said: ClassVar[Fields]
    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[object]]]


@dataclasses.dataclass(frozen=True)
class Config:
    """What a configuration of LoRA and DoRA says of the numbers, under peft's own names.

    Attributes:
      target_modules: names of modules or their last parts; a pattern or a keyword, for peft alone; None.
      trainable_token_indices: ids of tokens whose rows are trained, of the one table that has such, or by module.
      tensors: what peft calls the tensors of a module, of two that end alike the longer one first.
      rows: of these, the trained rows of a table, and the table that they were trained in.
    """

    said: ClassVar[Fields] = {"peft_type": "LORA", "init_lora_weights": True}
    rows: ClassVar[tuple[str, str]] = ("token_adapter.trainable_tokens_delta", "token_adapter.base_layer.weight")
    tensors: ClassVar[tuple[str, ...]] = (*LOW_RANK, BIAS_OF_B, *rows, *WHOLE)

    r: int = 8
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    bias: str = "none"
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = dataclasses.field(default_factory=dict)
    target_modules: tuple[str, ...] | str | None = None
    modules_to_save: tuple[str, ...] = ()
    trainable_token_indices: Mapping[str, tuple[int, ...]] | tuple[int, ...] | None = None

    @functools.cached_property
    def _ranks(self) -> Patterns[int]:
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> Patterns[float]:
        return Patterns(self.alpha_pattern)

    @functools.cached_property
    def _saved(self) -> frozenset[str]:
        return frozenset(self.modules_to_save)

    @functools.cached_property
    def _targets(self) -> frozenset[str]:
        return frozenset(self.target_modules if isinstance(self.target_modules, tuple) else ())

    def rank(self, module: str) -> int:
        """r of one module."""
        return self._ranks.value(module, self.r)

    def scale(self, module: str, rank: int) -> np.float32:
        """s: alpha / r, or alpha / sqrt(r), of one module."""
        alpha = self._alphas.value(module, self.lora_alpha)
        return np.float32(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def token_ids(self, module: str) -> tuple[int, ...]:
        """The ids of the rows that are trained in one module; ValueError where nothing says."""
        said = self.token_names()
        ids = {of for name, of in said.items() if module.endswith(name)}
        if len(ids) != 1:
            raise ValueError(f"{module!r} has rows of tokens; trainable_token_indices={said!r:.60} does not say which")
        return ids.pop()

    def token_names(self) -> Mapping[str, tuple[int, ...]]:
        """The ids of the rows that are trained, by what the names of their modules end in."""
        said = self.trainable_token_indices
        return said if isinstance(said, Mapping) else {"": said} if said else {}

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names this module, where it is a list of names."""
        return not isinstance(self.target_modules, tuple) or any(n in self._targets for n in endings(module))

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module, or one that it is a part of."""
        return names_one_of(self._saved, PREFIX, module)

    def misread(self) -> list[str]:
        """What of its patterns cannot be read, in words."""
        bad = []
        for name, patterns in (("rank_pattern", "_ranks"), ("alpha_pattern", "_alphas")):
            try:
                bad += [f"{name} has {line}" for line in getattr(self, patterns).bad]
            except ValueError as error:
                bad.append(f"{name} has {len(getattr(self, name)):,} keys: {error}")
        return bad


def names_one_of(saved: Collection[str], prefix: str, module: str) -> bool:
    """Whether names of `modules_to_save` name a module, or one that it is a part of: peft looks at the last letters."""
    names, lengths = frozenset(saved), set(map(len, saved))
    return any(parent[-n:] in names for parent in parents(prefix, module) for n in lengths)


def parents(prefix: str, module: str) -> list[str]:
    """What a module is a part of, and itself, by full names."""
    steps = module.split(".")
    return [prefix + ".".join(steps[:n]) for n in range(1, len(steps) + 1)]


def endings(module: str) -> list[str]:
    """A module's name, and what is behind each of its dots."""
    return [module, *(module[n + 1 :] for n, letter in enumerate(module) if letter == ".")]


# --- read ---------------------------------------------------------------------------------------------------------


def read(path: Path, content: Fields) -> Config:
    """The configuration that a file holds, whose fields are these.

    Raises:
      ValueError: fields of the wrong type, and fields that change the maths in a way that is not built; all at once.
    """
    known = {field.name for field in dataclasses.fields(Config)}
    bad = fields.unknown(content, known | HISTORY | {"init_lora_weights"})
    if (init := content.get("init_lora_weights")) not in _INITS:
        bad.append(
            f"init_lora_weights is {init!r:.60}: its base is not the model's own weights; let peft convert it "
            "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
        )

    def field(name: str, check: Callable[[str, object, list[str]], T], default: T) -> T:
        return check(name, content[name], bad) if name in content else default

    left_out = Config()
    config = Config(
        r=field("r", fields.whole, left_out.r),
        lora_alpha=field("lora_alpha", fields.number, left_out.lora_alpha),
        lora_dropout=field("lora_dropout", fields.rate, left_out.lora_dropout),
        use_rslora=field("use_rslora", fields.flag, left_out.use_rslora),
        use_dora=field("use_dora", fields.flag, left_out.use_dora),
        bias=field("bias", fields.bias, left_out.bias),
        lora_bias=field("lora_bias", fields.flag, left_out.lora_bias),
        fan_in_fan_out=field("fan_in_fan_out", fields.flag, left_out.fan_in_fan_out),
        rank_pattern=field("rank_pattern", fields.ranks, left_out.rank_pattern),
        alpha_pattern=field("alpha_pattern", fields.alphas, left_out.alpha_pattern),
        target_modules=field("target_modules", fields.target_modules, left_out.target_modules),
        modules_to_save=field("modules_to_save", fields.modules, left_out.modules_to_save),
        trainable_token_indices=field("trainable_token_indices", fields.tokens, left_out.trainable_token_indices),
    )
    bad += config.misread()
    if bad:
        raise ValueError(f"{path} cannot be loaded:" + several(bad))
    return config


# --- write --------------------------------------------------------------------------------------------------------


def describe(scales: Mapping[str, tuple[int, np.float32]], known: Collection[str] = (), **rest: PyTree) -> Config:
    """The configuration of some modules, `{module: (rank, s)}`, of a model of which these names are known.

    An adapter keeps s alone. rsLoRA is said where every alpha is then a whole number, and not otherwise.
    """
    ranks = {module: rank for module, (rank, _) in scales.items()}
    plain = {module: _alpha(s, rank) for module, (rank, s) in scales.items()}
    roots = {module: _alpha(s, math.sqrt(rank)) for module, (rank, s) in scales.items()}
    whole = lambda alphas: all(isinstance(a, int) for a in alphas.values())  # noqa: E731
    sqrt = whole(roots) and not whole(plain)
    alphas = roots if sqrt else plain
    r, lora_alpha = _usual(ranks.values()), _usual(alphas.values())
    return Config(
        r=r,
        lora_alpha=lora_alpha,
        use_rslora=sqrt,
        rank_pattern=_exceptions(ranks, r),
        alpha_pattern=_exceptions(alphas, lora_alpha),
        target_modules=named(scales, known),
        **rest,
    )


def named(scales: Collection[str], known: Collection[str]) -> tuple[str, ...] | str:
    """The modules with factors as `target_modules` has them.

    A list, or a pattern where another module of the model ends in one of the names.
    """
    numbered = lambda name: ".".join("0" if step.isdecimal() else step for step in name.split("."))  # noqa: E731
    names = set(map(numbered, scales))
    if any(end in names for other in known if other not in scales for end in endings(numbered(other))[1:]):
        return "|".join(map(re.escape, sorted(scales)))
    return tuple(sorted(scales))


def taken_too(saved: Collection[str], known: Collection[str], adapted: Collection[str]) -> dict[str, list[str]]:
    """The other modules that peft would take for those that are saved whole, `{saved: others}`.

    It looks at the last letters of every name alone: of its own modules round the model and inside those with factors,
    too. What is inside one that is saved goes with it, and gets no factors; for that, a dot is any letter.
    """
    own = [*_ROUND, *(f"{PREFIX}{module}.{part}" for module in adapted for part in _PARTS)]
    names = [*own, *(PREFIX + name for name in known)]
    found = {}
    for one in saved:
        inside = re.compile(rf"(.*\.)?{re.escape(one)}(\..*)?".replace(r"\.", "."), re.DOTALL)
        others = {name for name in names if name.endswith(one) or name.startswith(f"{PREFIX}{one}.")}
        others |= {PREFIX + name for name in adapted if inside.fullmatch(name)}
        found[one] = sorted(name.removeprefix(PREFIX) for name in others - {PREFIX + one})
    return found


def _alpha(s: np.float32, divisor: float) -> float:
    """The shortest alpha that gives this s again, bit for bit."""
    product = float(s) * divisor
    alpha = product  # as its seventeen digits are
    for digits in range(17):
        alpha = float(f"{product:.{digits}e}")
        if np.float32(alpha / divisor) == s:
            break
    return int(alpha) if alpha.is_integer() else alpha


def _usual(values: Collection[Number]) -> Number:
    counts = collections.Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _exceptions(values: Mapping[str, Number], usual: Number) -> dict[str, Number]:
    """The patterns of the modules whose value is not the usual one.

    A pattern takes every module that ends in it, and the first one wins. Where it would take another module too, it
    says that the name begins there: so no module has two, and no order is wrong (peft, where it saves, sorts them).
    """
    odd = {module: value for module, value in sorted(values.items()) if value != usual}
    common = collections.Counter(end for module in values for end in endings(module))
    exact = {module: "^" + re.escape(module) for module in odd}
    names = {m: m if re.fullmatch(r"[\w.-]+", m) and common[m] == 1 else exact[m] for m in odd}
    many = len(odd) * len(values) > 10**6
    keys = [] if many else [(module, _pattern.parsed(key)) for module, key in names.items()]
    if many or any(key.matches(other) for module, key in keys for other in values if other != module):
        names = exact  # else a name is taken for a pattern, in which a dot is any letter
    return {names[module]: value for module, value in odd.items()}


def in_one_spelling(config: AnyConfig) -> str:
    """What a configuration says of the numbers, in one spelling.

    Digests in files rest on it, so a field that came later is left out where it says nothing.
    """
    said = dataclasses.asdict(config)
    return json.dumps({k: v for k, v in said.items() if (k, v) != ("trainable_token_indices", None)}, sort_keys=True)


def write(config: AnyConfig, task_type: str | None = None, base_model: AnyPath | None = None) -> bytes:
    """A configuration as the bytes of its file.

    Raises:
      TypeError: a base model that is no name.
      ValueError: a task that peft has not.
    """
    if task_type is not None and task_type not in TASKS:
        raise ValueError(f"task_type={task_type!r:.60}: peft has {', '.join(TASKS)}")
    if base_model is not None and not (isinstance(base_model, (str, os.PathLike)) and str(base_model)):
        raise TypeError(f"base_model={base_model!r:.60}: write the model's name on the hub, or its folder")
    said = dataclasses.asdict(config)
    content = {
        "base_model_name_or_path": base_model if base_model is None else os.fspath(base_model),
        "inference_mode": True,
        "task_type": task_type,
        **config.said,
        **{name: None if value == () else value for name, value in said.items()},
    }
    return (json.dumps(dict(sorted(content.items())), indent=2, allow_nan=False) + "\n").encode()
