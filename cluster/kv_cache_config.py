"""`KvCacheConfig`: the part of `TorchLlmArgs` that says how large the KV cache is and what is reused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from tensorweave.cluster.llm_args_refused import KV_CACHE, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel


class KvCacheConfig(StrictBaseModel):
    """Paged KV cache: how large it is and how its blocks are reused."""

    refused: ClassVar[Mapping[str, Refusal]] = KV_CACHE

    enable_block_reuse: bool = Field(
        True,
        status="beta",
        description="Keep the KV of finished prompts in a prefix tree and reuse it for requests that start alike.",
    )
    enable_partial_reuse: bool = Field(
        True, status="beta", description="Also reuse the matching first part of a block, by copying it."
    )
    max_tokens: int | None = Field(
        None,
        status="beta",
        ge=1,
        description="Tokens that the cache holds. Default: what the memory fractions below give.",
    )
    free_gpu_memory_fraction: float = Field(
        0.9,
        status="beta",
        gt=0,
        le=1,
        description="Share that the KV cache takes of the GPU memory left after weights, the largest step and CUDA "
        "graphs.",
    )
    cpu_memory_fraction: float = Field(
        0.1,
        status="prototype",
        gt=0,
        le=1,
        description="On a CPU: share of available memory that one rank's KV cache takes.",
    )
    dtype: Literal["auto", "fp8"] = Field(
        "auto",
        status="prototype",
        description="'auto': the model's. 'fp8': 8-bit floats (e4m3) without a scale, half the memory of 16 bits; "
        "magnitudes beyond 448 become 448.",
    )
    tokens_per_block: int = Field(32, status="beta", ge=1, description="Tokens per KV block, a power of two.")
    event_buffer_max_size: int = Field(
        0,
        status="prototype",
        ge=0,
        description="Events kept for LLM.get_kv_cache_events until they are taken; 0: none.",
    )

    @model_validator(mode="after")
    def _check_power_of_two(self) -> Self:
        if self.tokens_per_block & (self.tokens_per_block - 1):
            raise ValueError(f"tokens_per_block is {self.tokens_per_block}, must be a power of two")
        return self
