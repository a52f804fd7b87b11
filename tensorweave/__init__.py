"""tensorweave: multi-node LLM serving on Ray. The public names of the Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tensorweave.cluster.llm_args import (
        CacheTransceiverConfig,
        KvCacheConfig,
        LlmArgs,
        SchedulerConfig,
        TorchLlmArgs,
    )
    from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
    from tensorweave.llmapi.llm import LLM
    from tensorweave.llmapi.outputs import CompletionOutput, RequestOutput
    from tensorweave.llmapi.sampling_params import SamplingParams

_HOMES = {
    "LLM": "tensorweave.llmapi.llm",
    "LlmArgs": "tensorweave.cluster.llm_args",
    "TorchLlmArgs": "tensorweave.cluster.llm_args",
    "CacheTransceiverConfig": "tensorweave.cluster.llm_args",
    "DisaggregatedParams": "tensorweave.llmapi.disaggregated_params",
    "KvCacheConfig": "tensorweave.cluster.llm_args",
    "SchedulerConfig": "tensorweave.cluster.llm_args",
    "SamplingParams": "tensorweave.llmapi.sampling_params",
    "RequestOutput": "tensorweave.llmapi.outputs",
    "CompletionOutput": "tensorweave.llmapi.outputs",
}

__all__ = [
    "LLM",
    "CacheTransceiverConfig",
    "CompletionOutput",
    "DisaggregatedParams",
    "KvCacheConfig",
    "LlmArgs",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "TorchLlmArgs",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Names are imported when first used: a router replica that needs none of them never loads torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tensorweave' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
