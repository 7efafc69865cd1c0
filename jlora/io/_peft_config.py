"""adapter_config.json of a LoRA adapter, as Hugging Face peft writes it: read strictly, written plainly.

It may come from anywhere: nothing in it is imported or evaluated, and every field that could change a number is
either understood or refused by name.
"""

import collections
import dataclasses
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jlora.io._manifest import several

NAME = "adapter_config.json"
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
      target_modules: names of modules or their last parts; None where a pattern or a keyword says it.
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
    target_modules: tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()

    def scale(self, module: str, rank: int) -> np.float32:
        """s: alpha / r, or alpha / sqrt(r), of one module."""
        alpha = matched(self.alpha_pattern, module, self.lora_alpha)
        return np.float32(alpha / (math.sqrt(rank) if self.use_rslora else rank))

    def targets(self, module: str) -> bool:
        """Whether `target_modules` names this module, where it is a list of names."""
        names = self.target_modules
        return names is None or any(module == name or module.endswith("." + name) for name in names)

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names this module, or one that it is a part of."""
        steps = module.split(".")
        parents = [".".join(steps[:n]) for n in range(1, len(steps) + 1)]
        return any(parent.endswith(name) for parent in parents for name in self.modules_to_save)


def matched(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    """The value of the first pattern that is the module's name or its last parts."""
    return next((v for k, v in patterns.items() if re.match(rf"(.*\.)?({k})$", module)), default)


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
    fields = {name: _CHECKS[name](name, content[name], bad) for name in known if name in content}
    if bad:
        raise ValueError(f"{path} cannot be loaded:" + several(bad))
    return Config(**fields)


def _parse(path: Path) -> dict[str, Any]:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"{path} is too large to be a configuration")
    try:
        content = json.loads(path.read_bytes(), parse_constant=_no_constant, object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is cut short or damaged: it is not JSON ({str(error)[:200]})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds {type(content).__name__}, not the fields of a configuration")
    return content


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    twice = [name for name, n in collections.Counter(name for name, _ in pairs).items() if n > 1]
    if twice:
        raise ValueError(f"{twice[0]!r:.60} stands there twice")
    return dict(pairs)


def _whole(name: str, value: Any, bad: list[str]) -> int:
    if type(value) is not int or not 0 < value < 2**31:
        bad.append(f"{name} is {value!r:.60}, not a whole number above 0")
        return 1
    return value


def _number(name: str, value: Any, bad: list[str]) -> float:
    if type(value) not in (int, float) or not abs(value) < 1e30:  # beyond float32's range it is no scale
        bad.append(f"{name} is {value!r:.60}, not a number")
        return 0.0
    return value


def _rate(name: str, value: Any, bad: list[str]) -> float:
    if type(value) not in (int, float) or not 0 <= value < 1:
        bad.append(f"{name} is {value!r:.60}, not a rate in [0, 1)")
        return 0.0
    return float(value)


def _flag(name: str, value: Any, bad: list[str]) -> bool:
    if value is not None and type(value) is not bool:
        bad.append(f"{name} is {value!r:.60}, neither true nor false")
    return bool(value)


def _bias(name: str, value: Any, bad: list[str]) -> str:
    if value not in ("none", "all", "lora_only"):
        bad.append(f"{name} is {value!r:.60}, not 'none', 'all' or 'lora_only'")
    return value


def _modules(name: str, value: Any, bad: list[str]) -> tuple[str, ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(x, str) and x for x in value):
        bad.append(f"{name} is {value!r:.60}, not a list of names")
        return ()
    return tuple(value)


def _target_modules(name: str, value: Any, bad: list[str]) -> tuple[str, ...] | None:
    if value is None or isinstance(value, str):  # a pattern over the torch model's modules: the tensors say the rest
        return None
    return _modules(name, value, bad)


def _ranks(name: str, value: Any, bad: list[str]) -> dict[str, int]:
    return {k: _whole(f"{name}[{k!r:.60}]", v, bad) for k, v in _patterns(name, value, bad).items()}


def _alphas(name: str, value: Any, bad: list[str]) -> dict[str, float]:
    return {k: _number(f"{name}[{k!r:.60}]", v, bad) for k, v in _patterns(name, value, bad).items()}


def _patterns(name: str, value: Any, bad: list[str]) -> dict[str, Any]:
    """A dictionary whose keys are regular expressions that end in reasonable time."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        bad.append(f"{name} is {value!r:.60}, not a dictionary")
        return {}
    for key in value:
        try:
            re.compile(rf"(.*\.)?({key})$")
        except (re.error, RecursionError, OverflowError) as error:
            bad.append(f"{name} has the key {key!r:.60}, which is no regular expression: {error}")
        if len(key) > 1000 or len(re.findall(r"[*+{]", key)) > 4 or re.search(r"\)[*+{]", key):
            bad.append(f"{name} has the key {key!r:.60}, a pattern that might not end; write the modules' names")
    return value


_CHECKS = {
    "r": _whole,
    "lora_alpha": _number,
    "lora_dropout": _rate,
    "use_rslora": _flag,
    "use_dora": _flag,
    "bias": _bias,
    "lora_bias": _flag,
    "fan_in_fan_out": _flag,
    "rank_pattern": _ranks,
    "alpha_pattern": _alphas,
    "target_modules": _target_modules,
    "modules_to_save": _modules,
}


# --- write --------------------------------------------------------------------------------------------------------


def describe(scales: Mapping[str, tuple[int, np.float32]], **rest: Any) -> Config:
    """The configuration of some modules, `{module: (rank, s)}`.

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
        target_modules=tuple(sorted(scales)),
        **rest,
    )


def _alpha(s: np.float32, divisor: float) -> float:
    """The shortest alpha that gives this s again, bit for bit."""
    product = float(s) * divisor
    for digits in range(17):
        alpha = float(f"{product:.{digits}e}")
        if np.float32(alpha / divisor) == s:
            break
    return int(alpha) if alpha.is_integer() else alpha


def _usual(values: Any) -> Any:
    counts = collections.Counter(values)
    return max(counts, key=lambda value: (counts[value], value))


def _exceptions(values: Mapping[str, Any], usual: Any) -> dict[str, Any]:
    """The patterns of the modules whose value is not the usual one.

    A pattern takes every module that ends in it, and the first one wins: where that would take a wrong one, every
    module gets a pattern, the longer names first.
    """
    literal = lambda module: module if re.fullmatch(r"[\w.-]+", module) else re.escape(module)  # noqa: E731
    longest = {literal(m): values[m] for m in sorted(values, key=lambda m: (-len(m), m))}
    odd = {name: value for name, value in longest.items() if value != usual}
    return odd if all(matched(odd, m, usual) == v for m, v in values.items()) else longest


def write(config: Config) -> bytes:
    """A configuration as the bytes of its file."""
    fields: dict[str, Sequence[Any] | Any] = dataclasses.asdict(config)
    content = {
        "base_model_name_or_path": None,
        "inference_mode": True,
        "init_lora_weights": True,
        "peft_type": "LORA",
        "task_type": None,
        **fields,
        "modules_to_save": fields["modules_to_save"] or None,
    }
    return (json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n").encode()
