"""`CacheTransceiverConfig`: the part of `TorchLlmArgs` that says how KV blocks move between gangs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final, Literal, Self

from pydantic import model_validator

from tensorweave.cluster.llm_args_refused import CACHE_TRANSCEIVER, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel

DEFAULT_COPY_SMS: Final = 12


class CacheTransceiverConfig(StrictBaseModel):
    """How KV blocks move between gangs, for prefill and decode in different ones."""

    refused: ClassVar[Mapping[str, Refusal]] = CACHE_TRANSCEIVER

    backend: Literal["DEFAULT", "IPC", "NCCL", "TCP", "IPC_DIRECT"] | None = Field(
        None,
        status="prototype",
        description="What carries the bytes. None exchanges no KV; 'IPC' copies from GPU to GPU of one node, 'NCCL' "
        "sends between GPUs, 'TCP' takes any pool; 'DEFAULT' takes the first of these that a pair of ranks can. "
        "'IPC_DIRECT' is 'IPC' without a buffer in between, layer by layer while a prompt is computed; it has not been "
        "measured on GPUs yet.",
    )
    kv_transfer_timeout_ms: int = Field(
        60_000,
        status="prototype",
        ge=1,
        description="Longest time that a request waits for its KV, the prefill itself included; what has not come then "
        "is computed where it is missing.",
    )
    kv_lease_timeout_ms: int = Field(
        60_000,
        status="prototype",
        ge=1,
        description="Longest time that a finished prompt's blocks are kept for the gang that is to fetch them.",
    )
    max_copy_sms: int = Field(
        DEFAULT_COPY_SMS,
        status="prototype",
        ge=1,
        description="Of 'IPC_DIRECT': most multiprocessors of a GPU that copies from another GPU of the node take. "
        "Fewer slow the steps beside them less.",
    )

    @model_validator(mode="after")
    def _check_copy_sms(self) -> Self:
        if self.backend != "IPC_DIRECT" and self.max_copy_sms != DEFAULT_COPY_SMS:
            raise ValueError(f"max_copy_sms is for backend 'IPC_DIRECT'; backend is {self.backend!r}")
        return self
