"""The forms of the answers of /v1/responses, for the OpenAPI document. Tests check the route's answers against them."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field
from pydantic.json_schema import SkipJsonSchema

from tensorweave.router.openai.schemas import Shape

ItemStatus = Literal["in_progress", "completed", "incomplete"]


class OutputTextPart(Shape):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class ReasoningTextPart(Shape):
    type: Literal["reasoning_text"]
    text: str


class SummaryTextPart(Shape):
    type: Literal["summary_text"]
    text: str


class OutputMessage(Shape):
    type: Literal["message"]
    id: str
    role: Literal["assistant"]
    status: ItemStatus
    content: list[OutputTextPart]


class OutputReasoning(Shape):
    type: Literal["reasoning"]
    id: str
    status: ItemStatus
    summary: list[SummaryTextPart] = Field(description="The whole reasoning, if a summary was asked for.")
    content: list[ReasoningTextPart] | SkipJsonSchema[None] = Field(None, description="Else it is here.")


class OutputCall(Shape):
    type: Literal["function_call"]
    id: str
    call_id: str
    name: str
    arguments: str
    status: ItemStatus


OutputItem = Annotated[OutputMessage | OutputReasoning | OutputCall, Field(discriminator="type")]


class InputTokensDetails(Shape):
    cached_tokens: int
    cache_write_tokens: Literal[0]


class OutputTokensDetails(Shape):
    reasoning_tokens: int


class ResponseUsage(Shape):
    input_tokens: int
    input_tokens_details: InputTokensDetails
    output_tokens: int
    output_tokens_details: OutputTokensDetails
    total_tokens: int


class IncompleteDetails(Shape):
    reason: Literal["max_output_tokens"]


class ResponseProblem(Shape):
    code: str
    message: str


class ResponseReasoning(Shape):
    effort: str | None
    summary: str | None


class ResponseObject(Shape):
    """The fields of the request are as they were understood."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete", "failed"]
    output: list[OutputItem]
    usage: ResponseUsage | None
    error: ResponseProblem | None
    incomplete_details: IncompleteDetails | None
    background: Literal[False]
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    metadata: dict[str, Any]
    parallel_tool_calls: bool
    previous_response_id: None
    prompt_cache_key: str | None
    reasoning: ResponseReasoning
    safety_identifier: str | None
    service_tier: Literal["default"]
    store: Literal[False] = Field(description="Nothing is stored.")
    temperature: float
    text: dict[str, Any]
    tool_choice: Any
    tools: list[dict[str, Any]]
    top_logprobs: Literal[0]
    top_p: float
    truncation: Literal["disabled"]
    user: str | None


class ResponseEvent(Shape):
    sequence_number: int


class ResponseStateEvent(ResponseEvent):
    type: Literal[
        "response.created", "response.in_progress", "response.completed", "response.incomplete", "response.failed"
    ]
    response: ResponseObject


class ItemEvent(ResponseEvent):
    type: Literal["response.output_item.added", "response.output_item.done"]
    output_index: int
    item: OutputItem


class _BlockEvent(ResponseEvent):
    item_id: str
    output_index: int


class PartEvent(_BlockEvent):
    type: Literal["response.content_part.added", "response.content_part.done"]
    content_index: Literal[0]
    part: Annotated[OutputTextPart | ReasoningTextPart, Field(discriminator="type")]


class SummaryPartEvent(_BlockEvent):
    type: Literal["response.reasoning_summary_part.added", "response.reasoning_summary_part.done"]
    summary_index: Literal[0]
    part: SummaryTextPart


class TextDeltaEvent(_BlockEvent):
    type: Literal["response.output_text.delta"]
    content_index: Literal[0]
    delta: str
    logprobs: list[Any]


class TextDoneEvent(_BlockEvent):
    type: Literal["response.output_text.done"]
    content_index: Literal[0]
    text: str
    logprobs: list[Any]


class ReasoningDeltaEvent(_BlockEvent):
    type: Literal["response.reasoning_text.delta"]
    content_index: Literal[0]
    delta: str


class ReasoningDoneEvent(_BlockEvent):
    type: Literal["response.reasoning_text.done"]
    content_index: Literal[0]
    text: str


class SummaryDeltaEvent(_BlockEvent):
    type: Literal["response.reasoning_summary_text.delta"]
    summary_index: Literal[0]
    delta: str


class SummaryDoneEvent(_BlockEvent):
    type: Literal["response.reasoning_summary_text.done"]
    summary_index: Literal[0]
    text: str


class ArgumentsDeltaEvent(_BlockEvent):
    type: Literal["response.function_call_arguments.delta"]
    delta: str


class ArgumentsDoneEvent(_BlockEvent):
    type: Literal["response.function_call_arguments.done"]
    name: str
    arguments: str


EVENTS: Final = (
    ResponseStateEvent,
    ItemEvent,
    PartEvent,
    SummaryPartEvent,
    TextDeltaEvent,
    TextDoneEvent,
    ReasoningDeltaEvent,
    ReasoningDoneEvent,
    SummaryDeltaEvent,
    SummaryDoneEvent,
    ArgumentsDeltaEvent,
    ArgumentsDoneEvent,
)
