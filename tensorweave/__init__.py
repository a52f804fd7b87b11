"""tensorweave: multi-node LLM serving on Ray. The public names of the Python API."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from tensorweave.cluster.cache_transceiver_config import CacheTransceiverConfig
    from tensorweave.cluster.cuda_graph_config import CudaGraphConfig
    from tensorweave.cluster.kv_cache_config import KvCacheConfig
    from tensorweave.cluster.llm_args import LlmArgs, TorchLlmArgs
    from tensorweave.cluster.lora_config import LoraConfig
    from tensorweave.cluster.moe_config import MoeConfig
    from tensorweave.cluster.quant_config import QuantAlgo, QuantConfig
    from tensorweave.cluster.scheduler_config import SchedulerConfig
    from tensorweave.cluster.speculation_config import NGramDecodingConfig, UserProvidedDecodingConfig
    from tensorweave.llmapi.completion_output import CompletionOutput, Logprob
    from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
    from tensorweave.llmapi.guided_decoding import GuidedDecodingParams
    from tensorweave.llmapi.inputs import PreprocessedInputs
    from tensorweave.llmapi.iteration_result import IterationResult
    from tensorweave.llmapi.llm import LLM
    from tensorweave.llmapi.outputs import RequestOutput
    from tensorweave.llmapi.request_types import (
        KvCacheRetentionConfig,
        LoRARequest,
        PromptAdapterRequest,
        SchedulingParams,
        TokenRangeRetentionConfig,
    )
    from tensorweave.llmapi.sampling_params import SamplingParams

_HOMES = {
    "CudaGraphConfig": "tensorweave.cluster.cuda_graph_config",
    "CacheTransceiverConfig": "tensorweave.cluster.cache_transceiver_config",
    "KvCacheConfig": "tensorweave.cluster.kv_cache_config",
    "LlmArgs": "tensorweave.cluster.llm_args",
    "LoraConfig": "tensorweave.cluster.lora_config",
    "SchedulerConfig": "tensorweave.cluster.scheduler_config",
    "TorchLlmArgs": "tensorweave.cluster.llm_args",
    "MoeConfig": "tensorweave.cluster.moe_config",
    "QuantAlgo": "tensorweave.cluster.quant_config",
    "QuantConfig": "tensorweave.cluster.quant_config",
    "NGramDecodingConfig": "tensorweave.cluster.speculation_config",
    "UserProvidedDecodingConfig": "tensorweave.cluster.speculation_config",
    "CompletionOutput": "tensorweave.llmapi.completion_output",
    "Logprob": "tensorweave.llmapi.completion_output",
    "DisaggregatedParams": "tensorweave.llmapi.disaggregated_params",
    "GuidedDecodingParams": "tensorweave.llmapi.guided_decoding",
    "PreprocessedInputs": "tensorweave.llmapi.inputs",
    "IterationResult": "tensorweave.llmapi.iteration_result",
    "LLM": "tensorweave.llmapi.llm",
    "RequestOutput": "tensorweave.llmapi.outputs",
    "KvCacheRetentionConfig": "tensorweave.llmapi.request_types",
    "LoRARequest": "tensorweave.llmapi.request_types",
    "PromptAdapterRequest": "tensorweave.llmapi.request_types",
    "SchedulingParams": "tensorweave.llmapi.request_types",
    "TokenRangeRetentionConfig": "tensorweave.llmapi.request_types",
    "SamplingParams": "tensorweave.llmapi.sampling_params",
}

__all__ = [
    "LLM",
    "CacheTransceiverConfig",
    "CompletionOutput",
    "CudaGraphConfig",
    "DisaggregatedParams",
    "GuidedDecodingParams",
    "IterationResult",
    "KvCacheConfig",
    "KvCacheRetentionConfig",
    "LlmArgs",
    "LoRARequest",
    "Logprob",
    "LoraConfig",
    "MoeConfig",
    "NGramDecodingConfig",
    "PreprocessedInputs",
    "PromptAdapterRequest",
    "QuantAlgo",
    "QuantConfig",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "SchedulingParams",
    "TokenRangeRetentionConfig",
    "TorchLlmArgs",
    "UserProvidedDecodingConfig",
    "__version__",
]


def __getattr__(name: str) -> Any:
    """Names are imported when first used: a router replica that needs none of them never loads torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'tensorweave' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)
