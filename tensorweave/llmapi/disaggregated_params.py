"""`DisaggregatedParams`: the two phases of one request sent to two `LLM`s (or services) by hand.

The first one gets `request_type="context_only"`. The `disaggregated_params` of its output go to the second one, as
"generation_only", together with the same prompt and sampling parameters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from tensorweave.llmapi.status import set_api_status

_REQUEST_TYPES: Final = ("context_only", "generation_only", "context_and_generation")


class DisaggScheduleStyle(IntEnum):
    """Which phase is sent first. Either order works: a generation phase waits for the context phase's KV."""

    CONTEXT_FIRST = 0
    GENERATION_FIRST = 1


@set_api_status("prototype")
@dataclass(kw_only=True, slots=True)
class DisaggregatedParams:
    """Which phase a request is, and what the context phase has handed over.

    Args:
        request_type: 'context_only' computes the prompt and the first token and keeps the KV for the holder of
            `opaque_state`; 'generation_only' fetches that KV and goes on; 'context_and_generation' (and None) is a
            request like any other.
        first_gen_tokens: What the context phase generated.
        first_gen_log_probs: Their log-probabilities, if they were asked for.
        first_gen_logits: Kept for callers of TensorRT-LLM; none are ever given.
        ctx_request_id: Names the context phase in logs.
        opaque_state: The KV's place and the right to fetch it; valid until the KV was fetched or its lease expired.
        draft_tokens: Kept for callers of TensorRT-LLM; must be empty.
        disagg_request_id: Names both phases in logs, instead of an id for each.
        ctx_dp_rank: Kept for callers of TensorRT-LLM; gangs have no data-parallel ranks.
        ctx_info_endpoint: Kept for callers of TensorRT-LLM; `opaque_state` has the endpoints.
        schedule_style: Kept for callers of TensorRT-LLM; either order of the phases works.
    """

    request_type: str | None = None
    first_gen_tokens: Sequence[int] | None = None
    first_gen_log_probs: Sequence[Any] | None = None
    first_gen_logits: Sequence[Any] | None = None
    ctx_request_id: int | None = None
    opaque_state: bytes | None = None
    draft_tokens: Sequence[int] | None = None
    disagg_request_id: int | None = None
    ctx_dp_rank: int | None = None
    ctx_info_endpoint: str | None = None
    schedule_style: DisaggScheduleStyle | None = None

    def __post_init__(self) -> None:
        if self.request_type is None:
            return
        self.request_type = self.request_type.lower()
        if self.request_type not in _REQUEST_TYPES:
            raise ValueError(f"request_type is {self.request_type!r}, must be one of {', '.join(_REQUEST_TYPES)}")

    @property
    def is_context_only(self) -> bool:
        """It is the first phase."""
        return self.request_type == "context_only"

    @property
    def is_generation_only(self) -> bool:
        """It is the second phase."""
        return self.request_type == "generation_only"
