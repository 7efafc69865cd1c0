"""adapter_config.json of a LoRA adapter, as Hugging Face peft writes it: read strictly, written plainly.

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
from typing import NoReturn, TypeAlias, TypeGuard, TypeVar

import numpy as np

from jlora._types import AnyPath, PyTree
from jlora.io import _pattern
from jlora.io._pattern import Patterns
from jlora.io._record import several

Fields: TypeAlias = dict[str, object]
"""Of a JSON object, whatever they are."""

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
_LARGEST = 2**24

#: Fields that say how an adapter was made or found its modules, and do not change what its tensors compute.
_HISTORY = frozenset(
    "auto_mapping base_model_name_or_path corda_config eva_config exclude_modules inference_mode layers_pattern "
    "layers_to_transform loftq_config lora_ga_config megatron_core peft_type peft_version qalora_group_size revision "
    "runtime_config task_type velora_config".split()
)

#: Initialisers that leave the base as it is. The others (pissa, olora, corda, lora_ga, loftq) change it.
_INITS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclasses.dataclass(frozen=True)
class Config:
    """What a configuration says of the numbers, under peft's own names.

    Attributes:
      target_modules: names of modules or their last parts; a pattern or a keyword, for peft alone; None.
    """

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

    @functools.cached_property
    def _ranks(self) -> Patterns[int]:
        return Patterns(self.rank_pattern)

    @functools.cached_property
    def _alphas(self) -> Patterns[float]:
        return Patterns(self.alpha_pattern)

    @functools.cached_property
    def _saved(self) -> tuple[frozenset[str], frozenset[int]]:
        return frozenset(self.modules_to_save), frozenset(map(len, self.modules_to_save))

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

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names this module, where it is a list of names."""
        return not isinstance(self.target_modules, tuple) or any(n in self._targets for n in endings(module))

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module, or one that it is a part of."""
        steps, (names, lengths) = module.split("."), self._saved
        parents = [PREFIX + ".".join(steps[:n]) for n in range(1, len(steps) + 1)]
        return any(parent[-n:] in names for parent in parents for n in lengths)

    def misread(self) -> list[str]:
        """What of its patterns cannot be read, in words."""
        bad = []
        for name, patterns in (("rank_pattern", "_ranks"), ("alpha_pattern", "_alphas")):
            try:
                bad += [f"{name} has {line}" for line in getattr(self, patterns).bad]
            except ValueError as error:
                bad.append(f"{name} has {len(getattr(self, name)):,} keys: {error}")
        return bad


def endings(module: str) -> list[str]:
    """A module's name, and what is behind each of its dots."""
    return [module, *(module[n + 1 :] for n, letter in enumerate(module) if letter == ".")]


# --- read ---------------------------------------------------------------------------------------------------------


def read(path: Path) -> Config:
    """The configuration at a path.

    Raises:
      ValueError: no JSON object, fields of the wrong type, and fields that change the maths in a way that is not
        built; all of them at once.
    """
    content = _parse(path)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise ValueError(f"{path}: peft_type is {kind!r:.60}; jlora reads 'LORA' (DoRA is its use_dora)")
    known = {field.name for field in dataclasses.fields(Config)}
    bad: list[str] = []
    for name, value in content.items():
        if name == "init_lora_weights":
            if value not in _INITS:
                bad.append(
                    f"init_lora_weights is {value!r:.60}: its base is not the model's own weights; let peft convert it "
                    "(save_pretrained(..., path_initial_model_for_weight_conversion=...))"
                )
        elif name not in known | _HISTORY and value not in (None, False, "") and value != [] and value != {}:
            bad.append(f"{name} is {value!r:.60}, which jlora has no maths for")

    def field(name: str, check: Callable[[str, object, list[str]], T], default: T) -> T:
        return check(name, content[name], bad) if name in content else default

    left_out = Config()
    config = Config(
        r=field("r", _whole, left_out.r),
        lora_alpha=field("lora_alpha", _number, left_out.lora_alpha),
        lora_dropout=field("lora_dropout", _rate, left_out.lora_dropout),
        use_rslora=field("use_rslora", _flag, left_out.use_rslora),
        use_dora=field("use_dora", _flag, left_out.use_dora),
        bias=field("bias", _bias, left_out.bias),
        lora_bias=field("lora_bias", _flag, left_out.lora_bias),
        fan_in_fan_out=field("fan_in_fan_out", _flag, left_out.fan_in_fan_out),
        rank_pattern=field("rank_pattern", _ranks, left_out.rank_pattern),
        alpha_pattern=field("alpha_pattern", _alphas, left_out.alpha_pattern),
        target_modules=field("target_modules", _target_modules, left_out.target_modules),
        modules_to_save=field("modules_to_save", _modules, left_out.modules_to_save),
    )
    bad += config.misread()
    if bad:
        raise ValueError(f"{path} cannot be loaded:" + several(bad))
    return config


def _parse(path: Path) -> Fields:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is too large to be a configuration")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or damaged: it is not JSON ({str(error)[:200]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not the fields of a configuration")
    return content


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number")


def _no_twins(pairs: list[tuple[str, object]]) -> Fields:
    twice = [name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]!r:.60} stands there twice")
    return dict(pairs)


def _whole(name: str, value: object, bad: list[str]) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        bad.append(f"{name} is {value!r:.60}, not a whole number above 0")
        return 1
    return value


def _is_number(value: object) -> TypeGuard[int | float]:
    return type(value) in (int, float)


def _number(name: str, value: object, bad: list[str]) -> float:
    if not _is_number(value) or not abs(value) < 1e30:  # beyond float32's range it is no scale
        bad.append(f"{name} is {value!r:.60}, not a number")
        return 0.0
    return value


def _rate(name: str, value: object, bad: list[str]) -> float:
    if not _is_number(value) or not 0 <= value < 1:
        bad.append(f"{name} is {value!r:.60}, not a rate in [0, 1)")
        return 0.0
    return float(value)


def _flag(name: str, value: object, bad: list[str]) -> bool:
    if value is not None and type(value) is not bool:
        bad.append(f"{name} is {value!r:.60}, neither true nor false")
    return bool(value)


def _bias(name: str, value: object, bad: list[str]) -> str:
    if value not in ("none", "all", "lora_only"):
        bad.append(f"{name} is {value!r:.60}, not 'none', 'all' or 'lora_only'")
    return str(value)


def _modules(name: str, value: object, bad: list[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        bad.append(f"{name} is {value!r:.60}, not a list of names")
        return ()
    return tuple(value)


def _target_modules(name: str, value: object, bad: list[str]) -> tuple[str, ...] | str | None:
    if value is None or isinstance(value, str):  # a pattern over the torch model's modules: the tensors say the rest
        return value
    return _modules(name, value, bad)


def _ranks(name: str, value: object, bad: list[str]) -> dict[str, int]:
    return {k: _whole(f"{name}[{k!r:.60}]", v, bad) for k, v in _patterns(name, value, bad).items()}


def _alphas(name: str, value: object, bad: list[str]) -> dict[str, float]:
    return {k: _number(f"{name}[{k!r:.60}]", v, bad) for k, v in _patterns(name, value, bad).items()}


def _patterns(name: str, value: object, bad: list[str]) -> Fields:
    """A dictionary; its keys are regular expressions, which `Config.misread` reads."""
    if value is not None and not isinstance(value, dict):
        bad.append(f"{name} is {value!r:.60}, not a dictionary")
    return value if isinstance(value, dict) else {}


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
        target_modules=_targets(scales, known),
        **rest,
    )


def _targets(scales: Collection[str], known: Collection[str]) -> tuple[str, ...] | str:
    """The modules with factors: a list, or a pattern where another module of the model ends in one of the names."""
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


def in_one_spelling(config: Config) -> str:
    """What a configuration says of the numbers, in one spelling."""
    return json.dumps(dataclasses.asdict(config), sort_keys=True)


def write(config: Config, task_type: str | None = None, base_model: AnyPath | None = None) -> bytes:
    """A configuration as the bytes of its file.

    Raises:
      TypeError: a base model that is no name.
      ValueError: a task that peft has not.
    """
    if task_type is not None and task_type not in TASKS:
        raise ValueError(f"task_type={task_type!r:.60}: peft has {', '.join(TASKS)}")
    if base_model is not None and not (isinstance(base_model, (str, os.PathLike)) and str(base_model)):
        raise TypeError(f"base_model={base_model!r:.60}: write the model's name on the hub, or its folder")
    fields = dataclasses.asdict(config)
    content = {
        "base_model_name_or_path": base_model if base_model is None else os.fspath(base_model),
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "task_type": task_type,
        **fields,
        "modules_to_save": fields["modules_to_save"] or None,
    }
    return (json.dumps(dict(sorted(content.items())), indent=2, allow_nan=False) + "\n").encode()
