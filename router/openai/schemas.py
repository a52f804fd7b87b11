"""The shapes of all answers, for the OpenAPI document; what the routes write must fit them (tests see to it)."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.json_schema import SkipJsonSchema

from tensorweave.cluster.protocol import FinishReason
from tensorweave.router.openai.disaggregated import DisaggregatedParams


class Shape(BaseModel):
    """Nothing more than these fields. Those that default to nothing are left out unless asked for."""

    model_config = ConfigDict(extra="forbid")


class PromptTokensDetails(Shape):
    cached_tokens: int = Field(description="Prompt tokens whose KV was found in the prefix cache.")


class Usage(Shape):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails

    @classmethod
    def of(cls, *, prompt: int, completion: int, cached: int) -> Usage:
        details = PromptTokensDetails(cached_tokens=cached)
        return cls(
            prompt_tokens=prompt,
            completion_tokens=completion,
            total_tokens=prompt + completion,
            prompt_tokens_details=details,
        )


class RankedToken(Shape):
    logprob: float
    rank: int = Field(description="Its place among all tokens, the likeliest being 1.")
    decoded_token: str


PromptLogprobs = list[dict[str, RankedToken] | None]


class CompletionLogprobs(Shape):
    """One entry a token: the prompt's where it is echoed, then those of `usage.completion_tokens`."""

    text_offset: list[int]
    token_logprobs: list[float | None] = Field(description="null for a prompt's first token.")
    tokens: list[str] = Field(description="'bytes:\\xe2\\x80' where its bytes are no whole character.")
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Shape):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason
    stop_reason: int | str | None = Field(description="The stop string or the asked-for stop token that ended it.")
    prompt_token_ids: list[int] | SkipJsonSchema[None] = None
    prompt_logprobs: PromptLogprobs | SkipJsonSchema[None] = None
    token_ids: list[int] | SkipJsonSchema[None] = None
    disaggregated_params: DisaggregatedParams | None = None


class Completion(Shape):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage
    prompt_token_ids: list[int] | SkipJsonSchema[None] = Field(None, description="Of a context_only request.")


class AssistantMessage(Shape):
    role: Literal["assistant"]
    content: str
    refusal: None


class ChatToken(Shape):
    token: str = Field(description="'\\xe2\\x80' where its bytes are no whole character.")
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(ChatToken):
    top_logprobs: list[ChatToken]


class ChatLogprobs(Shape):
    content: list[ChatTokenLogprobs] = Field(description="One entry a token of `usage.completion_tokens`.")
    refusal: None


class ChatChoice(Shape):
    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
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
    """`finish_reason` and `stop_reason` come with a choice's last chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    prompt_token_ids: list[int] | SkipJsonSchema[None] = None
    token_ids: list[int] | SkipJsonSchema[None] = None


class CompletionChunk(Shape):
    """With `include_usage` the last one has no choices, and the others `usage` at null unless it runs."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChunkChoice]
    usage: Usage | None = None


class ChatDelta(Shape):
    role: Literal["assistant"] | SkipJsonSchema[None] = None
    content: str | SkipJsonSchema[None] = None
    refusal: None = None


class ChatChunkChoice(Shape):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    stop_reason: int | str | None = None
    token_ids: list[int] | SkipJsonSchema[None] = None


class ChatChunk(Shape):
    """As `CompletionChunk`. The first one has `prompt_token_ids`, where token ids are asked for."""

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
    token_strs: list[str] | None = Field(description="As the vocabulary spells them, where asked for.")


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
    """Strangers are told `status` alone."""

    status: Literal["ok", "unavailable"]
    reason: str | SkipJsonSchema[None] = Field(None, description="Why it is unavailable, or what it must do without.")
    pools: list[dict[str, Any]] | SkipJsonSchema[None] = None


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
