"""Small types that come with a request: how long its KV is kept, how urgent it is, and adapters.

Each is checked on construction: a wrong value is a ValueError that names its field.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Final

from tensorweave.cluster.protocol import DEFAULT_RETENTION_PRIORITY, Retention, RetentionRange
from tensorweave.llmapi.status import set_api_status

_MAX_PRIORITY: Final = 100
_MAX_URGENCY: Final = 2**31 - 1


@set_api_status("prototype")
@dataclass(frozen=True, slots=True)
class TokenRangeRetentionConfig:
    """The priority of the KV of a range of prompt tokens.

    Args:
        token_start: The index of the first token in the prompt.
        token_end: The index after the last token; None: the prompt's end.
        priority: 0 to 100; blocks of lower priority are evicted first. Tokens outside every range have 35.
        duration_ms: How long the priority holds, in milliseconds or as a timedelta; None: without end.
    """

    token_start: int
    token_end: int | None = None
    priority: int = DEFAULT_RETENTION_PRIORITY
    duration_ms: float | timedelta | None = None

    def __post_init__(self) -> None:
        _check_int("token_start", self.token_start, 0, 2**31 - 1)
        if self.token_end is not None:
            _check_int("token_end", self.token_end, self.token_start + 1, 2**31 - 1)
        _check_int("priority", self.priority, 0, _MAX_PRIORITY)
        _seconds("duration_ms", self.duration_ms)


@set_api_status("prototype")
@dataclass(frozen=True, slots=True)
class KvCacheRetentionConfig:
    """Which blocks of a request's KV are evicted first, after the request has ended, when room is needed.

    Args:
        token_range_retention_configs: Ranges of the prompt; where they overlap, the highest priority counts.
        decode_retention_priority: Priority of the generated tokens.
        decode_duration_ms: How long that holds, in milliseconds or as a timedelta; None: without end.
    """

    token_range_retention_configs: Sequence[TokenRangeRetentionConfig] = ()
    decode_retention_priority: int = DEFAULT_RETENTION_PRIORITY
    decode_duration_ms: float | timedelta | None = None

    def __post_init__(self) -> None:
        for item in self.token_range_retention_configs:
            if not isinstance(item, TokenRangeRetentionConfig):
                raise ValueError(f"token_range_retention_configs holds a {type(item).__name__}")
        _check_int("decode_retention_priority", self.decode_retention_priority, 0, _MAX_PRIORITY)
        _seconds("decode_duration_ms", self.decode_duration_ms)


# Where TensorRT-LLM has it.
KvCacheRetentionConfig.TokenRangeRetentionConfig = TokenRangeRetentionConfig  # type: ignore[attr-defined]


@set_api_status("prototype")
@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulingParams:
    """When a request runs.

    Args:
        priority: Requests with a higher one are scheduled first; equal ones in the order of their arrival.
        timeout_s: The request ends after so many seconds: with finish_reason 'timeout' and what it has generated, or
            with DeadlineExceeded before its first token.
        attention_dp_rank: Not supported yet: gangs have no data-parallel ranks.
        attention_dp_relax: Whether attention_dp_rank is only a preference; no effect without it.
    """

    priority: int = 0
    timeout_s: float | None = None
    attention_dp_rank: int | None = None
    attention_dp_relax: bool = True

    def __post_init__(self) -> None:
        _check_int("priority", self.priority, -_MAX_URGENCY, _MAX_URGENCY)
        if self.timeout_s is not None and not (
            isinstance(self.timeout_s, int | float) and 0 < self.timeout_s < math.inf
        ):
            raise ValueError(f"timeout_s is {self.timeout_s!r}, must be a number above 0")
        if self.attention_dp_rank is not None:
            raise ValueError("attention_dp_rank is not supported yet: gangs have no data-parallel ranks")


@set_api_status("prototype")
@dataclass(frozen=True, slots=True)
class LoRARequest:
    """Names a LoRA adapter, for an `LLM` with `enable_lora`. It is read where it has changed since the last request.

    Args:
        lora_name: The adapter's name, for messages.
        lora_int_id: A number from 1. Adapters are told apart by their contents, whatever their numbers.
        lora_path: Its directory, as PEFT saves it: adapter_config.json and adapter_model.safetensors.
        lora_ckpt_source: 'hf'; 'nemo' is refused.
    """

    lora_name: str
    lora_int_id: int
    lora_path: str = ""
    lora_ckpt_source: str = "hf"

    def __post_init__(self) -> None:
        if not isinstance(self.lora_name, str) or not self.lora_name:
            raise ValueError(f"lora_name is {self.lora_name!r}, must be a name")
        _check_int("lora_int_id", self.lora_int_id, 1, 2**31 - 1)
        if self.lora_ckpt_source != "hf":
            raise ValueError(f"lora_ckpt_source is {self.lora_ckpt_source!r}: only PEFT directories, 'hf', are read")
        if not isinstance(self.lora_path, str | Path) or (self.lora_path and not Path(self.lora_path).is_dir()):
            raise ValueError(f"lora_path is {str(self.lora_path)!r}, which is no directory")


@set_api_status("deprecated")
@dataclass(frozen=True, slots=True)
class PromptAdapterRequest:
    """Names a prompt adapter. Deprecated: `LLM` refuses it.

    Args:
        prompt_adapter_name: The adapter's name.
        prompt_adapter_id: A number of its own, from 1.
        prompt_adapter_local_path: Where it is.
    """

    prompt_adapter_name: str
    prompt_adapter_id: int
    prompt_adapter_local_path: str = ""


def retention_of(config: KvCacheRetentionConfig) -> Retention:
    """The retention as requests carry it."""
    ranges = [
        RetentionRange(r.token_start, r.token_end, r.priority, _seconds("duration_ms", r.duration_ms))
        for r in config.token_range_retention_configs
    ]
    duration_s = _seconds("decode_duration_ms", config.decode_duration_ms)
    return Retention(tuple(ranges), config.decode_retention_priority, duration_s)


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}, must be an integer between {low} and {high}")


def _seconds(name: str, duration_ms: float | timedelta | None) -> float | None:
    if duration_ms is None:
        return None
    if isinstance(duration_ms, timedelta):
        duration_ms = duration_ms.total_seconds() * 1000
    if not isinstance(duration_ms, int | float) or not 0 < duration_ms < math.inf:
        raise ValueError(f"{name} is {duration_ms!r}, must be a number above 0 or a timedelta")
    return duration_ms / 1000
