"""`PeftConfig`: the `adapter_config.json` of a PEFT directory: which linear layers an adapter changes, and by how much.

Every key is read, known to change nothing, or refused by name. How names match follows PEFT's documentation of
`LoraConfig` (peft 0.21).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

ALL_LINEAR: Final = "all-linear"
_CHANGE_NOTHING: Final = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "ensure_weight_tying",
        "eva_config",
        "fan_in_fan_out",
        "inference_mode",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "runtime_config",
    }
)
"""Of training, of saving, or without a meaning for linear layers."""
_READ: Final = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "init_lora_weights",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "peft_type",
        "r",
        "rank_pattern",
        "target_modules",
        "task_type",
        "use_rslora",
    }
)
_KEEP_BASE: Final = ("gaussian", "eva", "orthogonal")
"""Ways to begin a training that leave the base model's weights as they are."""


@dataclass(frozen=True, slots=True)
class PeftConfig:
    rank: int
    alpha: float
    use_rslora: bool
    targets: str | tuple[str, ...]
    excluded: str | tuple[str, ...]
    layers: tuple[int, ...]
    layers_patterns: tuple[str, ...]
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]

    @classmethod
    def parse(cls, text: bytes) -> PeftConfig:
        """Raises ValueError, which names the key, for what is wrong or not computed here."""
        try:
            fields = json.loads(text)
        except ValueError as error:
            raise ValueError(f"adapter_config.json is not JSON: {error}") from None
        if not isinstance(fields, dict):
            raise ValueError("adapter_config.json is not a JSON object")
        _refuse_unsupported(fields)
        layers = fields.get("layers_to_transform")
        if layers is not None and isinstance(fields.get("target_modules"), str):
            raise ValueError("layers_to_transform is for target_modules that are a list")
        return cls(
            rank=_count("r", fields.get("r", 8)),
            alpha=_number("lora_alpha", fields.get("lora_alpha", 8)),
            use_rslora=_flag("use_rslora", fields.get("use_rslora", False)),
            targets=_names("target_modules", fields.get("target_modules")),
            excluded=_names("exclude_modules", fields.get("exclude_modules") or []),
            layers=tuple(_index(n) for n in ([layers] if isinstance(layers, int) else layers or ())),
            layers_patterns=_patterns(fields.get("layers_pattern")),
            rank_pattern={name: _count("rank_pattern", n) for name, n in _table("rank_pattern", fields).items()},
            alpha_pattern={name: _number("alpha_pattern", n) for name, n in _table("alpha_pattern", fields).items()},
        )

    def changes(self, module: str) -> bool:
        """Whether this linear layer, named as in 'model.layers.3.self_attn.q_proj', is a target."""
        if _matches(self.excluded, module):
            return False
        if self.targets == ALL_LINEAR:
            return True
        is_exempt = isinstance(self.targets, str) or module in self.targets or not self.layers
        return _matches(self.targets, module) and (is_exempt or self._layer(module) in self.layers)

    def rank_of(self, module: str) -> int:
        return int(_by_pattern(self.rank_pattern, module, self.rank))

    def scale_of(self, module: str) -> float:
        """What B A is multiplied by."""
        rank, alpha = self.rank_of(module), float(_by_pattern(self.alpha_pattern, module, self.alpha))
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def _layer(self, module: str) -> int | None:
        patterns = [rf"(?:^|.*?\.){pattern}" for pattern in self.layers_patterns] or [r".*?\.[^.]*"]
        for pattern in patterns:
            if (found := re.match(rf"{pattern}\.(?P<layer>\d+)\.", module)) is not None:
                return int(found["layer"])
        return None


def _refuse_unsupported(fields: Mapping[str, Any]) -> None:
    if str(fields.get("peft_type", "LORA")).upper() != "LORA":
        raise ValueError(f"peft_type is {fields['peft_type']!r}: only LORA is computed here")
    if fields.get("task_type") not in (None, "CAUSAL_LM"):
        raise ValueError(f"task_type is {fields['task_type']!r}: only CAUSAL_LM is computed here")
    if fields.get("bias", "none") != "none":
        raise ValueError(f"bias is {fields['bias']!r}: adapters of biases are not computed here")
    begun = fields.get("init_lora_weights", True)
    if isinstance(begun, str) and begun not in _KEEP_BASE:
        raise ValueError(
            f"init_lora_weights is {begun!r}, which changes the base model's weights: save the adapter converted "
            "(PEFT: path_initial_model_for_weight_conversion)"
        )
    for key, value in fields.items():
        if key not in _READ and key not in _CHANGE_NOTHING and value:
            raise ValueError(f"{key} is {_short(value)}: it is not computed here")


def _matches(names: str | Sequence[str], module: str) -> bool:
    """A string is an expression for the whole name; a list has names or their ends."""
    if isinstance(names, str):
        return re.fullmatch(names, module) is not None
    return any(module == name or module.endswith(f".{name}") for name in names)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def _names(key: str, value: object) -> str | tuple[str, ...]:
    if isinstance(value, str):
        if value.lower() == ALL_LINEAR:
            return ALL_LINEAR
        _check_expression(key, value)
        return value
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise ValueError(f"{key} is {_short(value)}, must be a list of names or a regular expression")
    return tuple(value)


def _patterns(value: object) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(pattern, str) for pattern in listed):
        raise ValueError(f"layers_pattern is {_short(value)}, must be a name or a list of names")
    for pattern in listed:
        _check_expression("layers_pattern", pattern)
    return tuple(pattern for pattern in listed if pattern)


def _table(key: str, fields: Mapping[str, Any]) -> Mapping[str, Any]:
    table = fields.get(key) or {}
    if not isinstance(table, dict):
        raise ValueError(f"{key} is {_short(table)}, must be an object")
    for pattern in table:
        _check_expression(key, pattern)
    return table


def _check_expression(key: str, expression: str) -> None:
    try:
        re.compile(expression)
    except re.error as error:
        raise ValueError(f"{key} has {expression!r}, which is no regular expression: {error}") from None


def _count(key: str, value: object) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"{key} is {_short(value)}, must be an integer from 1")
    return value


def _index(value: object) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"layers_to_transform has {_short(value)}, must have the numbers of layers")
    return value


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} is {_short(value)}, must be a number")
    return float(value)


def _flag(key: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{key} is {_short(value)}, must be true or false")
    return value


def _short(value: object) -> str:
    return repr(value)[:200]
