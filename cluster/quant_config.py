"""`QuantConfig`: the part of `TorchLlmArgs` that says which weights are quantized."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import ClassVar, Literal

from tensorweave.cluster.llm_args_refused import QUANT, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel


class QuantAlgo(StrEnum):
    """The names that `QuantConfig` takes."""

    FP8 = "FP8"
    FP8_PER_CHANNEL_PER_TOKEN = "FP8_PER_CHANNEL_PER_TOKEN"


class QuantConfig(StrictBaseModel):
    """How weights are quantized while they are loaded, and the KV cache."""

    refused: ClassVar[Mapping[str, Refusal]] = QUANT

    quant_algo: Literal["FP8", "FP8_PER_CHANNEL_PER_TOKEN"] | None = Field(
        None,
        status="prototype",
        description="Both names: weights of the layers' products in 8-bit floats (e4m3) with a scale per output "
        "channel, their inputs with a scale per token. The embedding and the output head stay as they are. None: "
        "nothing is quantized.",
    )
    kv_cache_quant_algo: Literal["FP8"] | None = Field(
        None, status="prototype", description="'FP8': the same as kv_cache_config.dtype 'fp8'."
    )


def weight_quantization(config: QuantConfig | None) -> Literal["fp8"] | None:
    """How weights are quantized while they are loaded, as an engine directory records it."""
    return None if config is None or config.quant_algo is None else "fp8"
