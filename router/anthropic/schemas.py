"""The forms of the answers of /v1/messages, for the OpenAPI document. Tests check the route's answers against them."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field

from tensorweave.router.openai.schemas import Shape

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]


class MessagesUsage(Shape):
    input_tokens: int = Field(description="Those of the prompt whose KV was computed.")
    cache_creation_input_tokens: Literal[0]
    cache_read_input_tokens: int = Field(description="Those whose KV was found in the prefix cache.")
    output_tokens: int


class AnswerText(Shape):
    type: Literal["text"]
    text: str


class AnswerThinking(Shape):
    type: Literal["thinking"]
    thinking: str
    signature: Literal[""]


class AnswerToolUse(Shape):
    type: Literal["tool_use"]
    id: str
    name: str
    input: dict[str, Any] = Field(description="If the answer was cut short, as much of it as there is.")


AnswerBlock = Annotated[AnswerText | AnswerThinking | AnswerToolUse, Field(discriminator="type")]


class AnswerMessage(Shape):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: StopReason | None = Field(description="null in message_start alone.")
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(Shape):
    input_tokens: int


class MessageStart(Shape):
    type: Literal["message_start"]
    message: AnswerMessage


class Ping(Shape):
    type: Literal["ping"]


class ContentBlockStart(Shape):
    type: Literal["content_block_start"]
    index: int
    content_block: AnswerBlock


class TextPiece(Shape):
    type: Literal["text_delta"]
    text: str


class ThinkingPiece(Shape):
    type: Literal["thinking_delta"]
    thinking: str


class InputJsonPiece(Shape):
    type: Literal["input_json_delta"]
    partial_json: str


class ContentBlockDelta(Shape):
    type: Literal["content_block_delta"]
    index: int
    delta: Annotated[TextPiece | ThinkingPiece | InputJsonPiece, Field(discriminator="type")]


class ContentBlockStop(Shape):
    type: Literal["content_block_stop"]
    index: int


class MessageEnding(Shape):
    stop_reason: StopReason
    stop_sequence: str | None


class MessageDelta(Shape):
    type: Literal["message_delta"]
    delta: MessageEnding
    usage: MessagesUsage


class MessageStop(Shape):
    type: Literal["message_stop"]


class MessagesErrorBody(Shape):
    type: str
    message: str


class MessagesError(Shape):
    """As an answer, or as the event that ends a stream."""

    type: Literal["error"]
    error: MessagesErrorBody


EVENTS: Final = (MessageStart, Ping, ContentBlockStart, ContentBlockDelta, ContentBlockStop, MessageDelta, MessageStop)
