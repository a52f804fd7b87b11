"""`SchedulerConfig`: the part of `TorchLlmArgs` that says which requests run in a step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

from tensorweave.cluster.llm_args_refused import SCHEDULER, Refusal
from tensorweave.cluster.strict_model import Field, StrictBaseModel


class SchedulerConfig(StrictBaseModel):
    """Which requests run in a step."""

    refused: ClassVar[Mapping[str, Refusal]] = SCHEDULER

    capacity_scheduler_policy: Literal["GUARANTEED_NO_EVICT", "MAX_UTILIZATION", "STATIC_BATCH"] = Field(
        "GUARANTEED_NO_EVICT",
        status="prototype",
        description=(
            "GUARANTEED_NO_EVICT reserves KV blocks to each request's last token; MAX_UTILIZATION admits what the next "
            "step needs and preempts by recompute; STATIC_BATCH admits only when nothing runs."
        ),
    )
    context_chunking_policy: Literal["FIRST_COME_FIRST_SERVED", "EQUAL_PROGRESS"] = Field(
        "FIRST_COME_FIRST_SERVED",
        status="prototype",
        description="Shares a token budget among prompts that do not all fit.",
    )
    max_prompt_tokens_beside_decodes: int | None = Field(
        None,
        status="prototype",
        ge=1,
        description="Most prompt tokens of a step in which answers go on: fewer keep the gaps between their tokens "
        "short. Default: on a GPU by what waits and what runs (docs/scheduler.md), on a CPU max_num_tokens.",
    )
