"""`RequestOptions`: what a request says besides prompt and sampling, for each prompt of a batch.

`disaggregated_params` have rules of their own in `llmapi.phases`.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.phases import resolve_phases
from tensorweave.llmapi.request_types import KvCacheRetentionConfig, LoRARequest, SchedulingParams, retention_of

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class RequestOptions:
    """The options of one request; None: not given."""

    kv_cache_retention_config: KvCacheRetentionConfig | None = None
    disaggregated_params: DisaggregatedParams | None = None
    scheduling_params: SchedulingParams | None = None
    cache_salt: str | None = None
    lora_request: LoRARequest | None = None

    def apply_to(self, request: GenerateRequest) -> GenerateRequest:
        if self.kv_cache_retention_config is not None:
            request = dataclasses.replace(request, retention=retention_of(self.kv_cache_retention_config))
        if (scheduling := self.scheduling_params) is not None:
            request = dataclasses.replace(request, priority=scheduling.priority, deadline_s=scheduling.timeout_s)
        return dataclasses.replace(request, cache_salt=self.cache_salt)


def options_per_prompt(
    num_prompts: int,
    *,
    kv_cache_retention_config: KvCacheRetentionConfig | Sequence[KvCacheRetentionConfig] | None = None,
    disaggregated_params: DisaggregatedParams | Sequence[DisaggregatedParams | None] | None = None,
    scheduling_params: SchedulingParams | Sequence[SchedulingParams] | None = None,
    cache_salt: str | Sequence[str] | None = None,
    lora_request: LoRARequest | Sequence[LoRARequest] | None = None,
) -> list[RequestOptions]:
    """One `RequestOptions` per prompt, from values for all prompts or lists with one value each. Raises ValueError."""
    retention = _per_prompt("kv_cache_retention_config", kv_cache_retention_config, KvCacheRetentionConfig, num_prompts)
    phases = resolve_phases(disaggregated_params, num_prompts)
    scheduling = _per_prompt("scheduling_params", scheduling_params, SchedulingParams, num_prompts)
    salts = _per_prompt("cache_salt", cache_salt, str, num_prompts)
    if "" in salts:
        raise ValueError("cache_salt is an empty string: leave it out, or give one that nobody can guess")
    adapters = _per_prompt("lora_request", lora_request, LoRARequest, num_prompts)
    return [RequestOptions(*each) for each in zip(retention, phases, scheduling, salts, adapters, strict=True)]


def refuse_prompt_adapter(prompt_adapter_request: object) -> None:
    """Raises ValueError if one is given, after a DeprecationWarning."""
    if prompt_adapter_request is not None:
        warnings.warn(
            "prompt_adapter_request is deprecated and will be removed; put the prompt's text or token ids into inputs.",
            DeprecationWarning,
            stacklevel=3,
        )
        raise ValueError("prompt_adapter_request is not supported: put the prompt's text or token ids into inputs")


def _per_prompt(name: str, given: Any, kind: type[_T], num_prompts: int) -> list[_T | None]:
    if given is None or isinstance(given, kind):
        return [given] * num_prompts
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ValueError(f"{name} is a {type(given).__name__}, must be {kind.__name__} or a list of them")
    if len(given) != num_prompts:
        raise ValueError(f"{len(given)} of {name} for {num_prompts} prompts")
    for item in given:
        if item is not None and not isinstance(item, kind):
            raise ValueError(f"{name} holds a {type(item).__name__}, must be {kind.__name__}")
    return list(given)
