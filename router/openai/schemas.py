"""The forms of all answers, for the OpenAPI document. Tests check the routes' answers against them."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from tensorweave.cluster.protocol import FinishReason
from tensorweave.router.openai.disaggregated import DisaggregatedParams


class Shape(BaseModel):
    """Has no other fields. Fields with a default are left out unless they were requested."""

    model_config = ConfigDict(extra="forbid")


ChatFinishReason = FinishReason | Literal["tool_calls", "function_call"]


class PromptTokensDetails(Shape):
    cached_tokens: int = Field(description="Prompt tokens whose KV was found in the prefix cache.")


class CompletionTokensDetails(Shape):
    reasoning_tokens: int = Field(description="Tokens of the reasoning, with the mark that opens it.")


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails

    @classmethod
    def of(cls, *, prompt: int, completion: int, cached: int, reasoning: int) -> Usage:
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached),
            completion_tokens_details=CompletionTokensDetails(reasoning_tokens=reasoning),
        )


class RankedToken(Shape):
    logprob: float
    rank: int = Field(description="Its rank among all tokens; the likeliest has 1.")
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]


class CompletionLogprobs(Shape):
    """One entry per token: the prompt's if it is echoed, then those of `usage.completion_tokens`."""

    text_offset: list[int]
    token_logprobs: list[float | None] = Field(description="null for a prompt's first token.")
    tokens: list[str] = Field(description="'bytes:\\xe2\\x80' if its bytes are not complete characters.")
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(description="The stop string or the requested stop token that ended it.")
    prompt_token_ids: list[int] | SkipJsonSchema[None] = None
    prompt_logprobs: PromptLogprobs | SkipJsonSchema[None] = None
    token_ids: list[int] | SkipJsonSchema[None] = None
    disaggregated_params: DisaggregatedParams | None = None


class Embedding(Shape):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str


class EmbeddingUsage(Shape):
    prompt_tokens: int
    total_tokens: int


class EmbeddingList(Shape):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    prompt_token_ids: list[int] | SkipJsonSchema[None] = Field(None, description="Of a context_only request.")


class FunctionCall(Shape):
    name: str
    arguments: str = Field(description="JSON, as the model wrote it; incomplete if the answer was cut short.")


class ToolCall(Shape):
    id: str
    type: Literal["function"]
    function: FunctionCall


class AssistantMessage(Shape):
    role: Literal["assistant"]
    content: str | None = Field(description="null if there are only calls.")
    refusal: None
    tool_calls: list[ToolCall] | SkipJsonSchema[None] = None
    function_call: FunctionCall | SkipJsonSchema[None] = Field(None, description="Where `functions` were given.")
    reasoning: str | SkipJsonSchema[None] = None
    reasoning_content: str | SkipJsonSchema[None] = Field(None, description="The same as `reasoning`.")


class ChatToken(Shape):
    token: str = Field(description="'\\xe2\\x80' if its bytes are not complete characters.")
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(Shape):
    content: list[ChatTokenLogprobs] = Field(description="One entry per token of `usage.completion_tokens`.")
    refusal: None


class ChatChoice(Shape):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason
    stop_reason: int | str | None
    token_ids: list[int] | SkipJsonSchema[None] = None
    disaggregated_params: DisaggregatedParams | None = None


class ChatCompletion(Shape):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_token_ids: list[int] | SkipJsonSchema[None] = None
    prompt_logprobs: PromptLogprobs | SkipJsonSchema[None] = None


class CompletionChunkChoice(Shape):
    """`finish_reason` and `stop_reason` are in a choice's last chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | SkipJsonSchema[None] = None
    token_ids: list[int] | SkipJsonSchema[None] = None


class CompletionChunk(Shape):
    """With `include_usage` the last one has no choices; `usage` of the others is null unless it is continuous."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class FunctionCallDelta(Shape):
    name: str | SkipJsonSchema[None] = None
    arguments: str


class ToolCallDelta(Shape):
    """The first of a call has its id, type and name."""

    index: int
    id: str | SkipJsonSchema[None] = None
    type: Literal["function"] | SkipJsonSchema[None] = None
    function: FunctionCallDelta


class ChatDelta(Shape):
    role: Literal["assistant"] | SkipJsonSchema[None] = None
    content: str | SkipJsonSchema[None] = None
    refusal: None = None
    tool_calls: list[ToolCallDelta] | SkipJsonSchema[None] = None
    function_call: FunctionCallDelta | SkipJsonSchema[None] = None
    reasoning: str | SkipJsonSchema[None] = None
    reasoning_content: str | SkipJsonSchema[None] = None


class ChatChunkChoice(Shape):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: ChatFinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | SkipJsonSchema[None] = None


class ChatChunk(Shape):
    """As `CompletionChunk`. The first one has `prompt_token_ids`, if token ids are requested."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | SkipJsonSchema[None] = None


class TokenizeAnswer(Shape):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = Field(description="The vocabulary's entries, if requested.")


class DetokenizeAnswer(Shape):
    prompt: str


class ModelCard(Shape):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | SkipJsonSchema[None] = None


class ModelList(Shape):
    object: Literal["list"]
    data: list[ModelCard]


class Health(Shape):
    """Why, and what each pool lacks, is told at the admin port."""

    status: Literal["ok", "unavailable"]


class Ready(Shape):
    status: Literal["ready"]


class Load(Shape):
    server_load: int


class Version(Shape):
    version: str


class ErrorBody(Shape):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Shape):
    error: ErrorBody
