"""The LLM constructor's arguments, under the name that the API documents. Defined in `cluster.llm_args`, because ranks
receive them too."""

from tensorweave.cluster.llm_args import Field, KvCacheConfig, LlmArgs, SchedulerConfig, StrictBaseModel, TorchLlmArgs

__all__ = ["Field", "KvCacheConfig", "LlmArgs", "SchedulerConfig", "StrictBaseModel", "TorchLlmArgs"]
