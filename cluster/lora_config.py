"""`LoraConfig`: which LoRA adapters are taken, and how many at once. Part of `TorchLlmArgs`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Self

from pydantic import model_validator

from tensorweave.cluster.llm_args_refused import LORA, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel

_MAX_LORAS: Final = 16
_MAX_CPU_LORAS: Final = 64


class LoraConfig(StrictBaseModel):
    """LoRA adapters: their rank, the layers that they change, and how many there may be at once."""

    refused: ClassVar[Mapping[str, Refusal]] = LORA

    max_lora_rank: int = Field(64, status="beta", ge=1, description="Highest rank of an adapter.")
    lora_target_modules: list[str] = Field(
        default_factory=list,
        status="beta",
        description="Linear layers that adapters may change, by the ends of their names, such as 'q_proj'. Default: "
        "all of the decoder layers.",
    )
    max_loras: int | None = Field(
        None,
        status="beta",
        ge=1,
        description="Most adapters in one step; requests with further ones wait. Default: 16, at most max_cpu_loras.",
    )
    max_cpu_loras: int | None = Field(
        None,
        status="beta",
        ge=1,
        description="Most adapters that a rank has in memory. The one that was asked for longest ago gives way, and is "
        "read again when it is asked for. Default: 64, at least max_loras.",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.max_loras is not None and self.max_cpu_loras is not None and self.max_cpu_loras < self.max_loras:
            raise ValueError(
                f"max_cpu_loras is {self.max_cpu_loras}, must be at least max_loras, which is {self.max_loras}"
            )
        return self


def most_in_memory(config: LoraConfig) -> int:
    return config.max_cpu_loras or max(_MAX_CPU_LORAS, config.max_loras or 0)


def most_in_step(config: LoraConfig) -> int:
    return config.max_loras or min(_MAX_LORAS, most_in_memory(config))
