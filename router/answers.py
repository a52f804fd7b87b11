"""The OpenAI answers: whole ones as pydantic models, streamed ones as prebuilt JSON around the text of each chunk.

A streamed chunk costs one JSON string and one concatenation; nothing is validated on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal, Protocol

import orjson
from pydantic import BaseModel, Field

from tensorweave.cluster.protocol import FinishReason
from tensorweave.router.generation import TextDelta

DONE: Final = b"data: [DONE]\n\n"


class PromptTokensDetails(BaseModel):
    cached_tokens: int = Field(description="Prompt tokens whose KV was found in the prefix cache.")


class Usage(BaseModel):
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


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class AssistantMessage(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    index: int
    message: AssistantMessage
    logprobs: None = None
    finish_reason: FinishReason
    stop_reason: int | str | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ErrorBody(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    error: ErrorBody


@dataclass(slots=True)
class Choice:
    """One finished sequence."""

    text: str
    finish_reason: FinishReason
    stop_reason: int | str | None


class Answer(Protocol):
    """How one request is answered: as one body, or as events."""

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes: ...

    def opening(self, num_choices: int, usage: Usage | None) -> bytes: ...

    def event(self, delta: TextDelta, usage: Usage | None) -> bytes: ...

    def usage_event(self, usage: Usage) -> bytes: ...


class _Events:
    """The parts of a chunk that stay the same, as bytes."""

    def __init__(self, kind: str, answer_id: str, created: int, model: str, *, includes_usage: bool) -> None:
        fixed = orjson.dumps({"id": answer_id, "object": kind, "created": created, "model": model})
        self._head = b"data: " + fixed[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if includes_usage else b"]}\n\n"

    def of(self, choice: bytes, usage: Usage | None) -> bytes:
        if usage is None:
            return self._head + choice + self._tail
        return self._head + choice + b'],"usage":' + usage.model_dump_json().encode() + b"}\n\n"


def _ending(delta: TextDelta) -> bytes:
    if delta.finish_reason is None:
        return b',"logprobs":null,"finish_reason":null}'
    return b',"logprobs":null,"finish_reason":"%b","stop_reason":%b}' % (
        delta.finish_reason.encode(),
        orjson.dumps(delta.stop_reason),
    )


class CompletionAnswer:
    def __init__(self, answer_id: str, created: int, model: str, *, includes_usage: bool) -> None:
        self._id, self._created, self._model = answer_id, created, model
        self._events = _Events("text_completion", answer_id, created, model, includes_usage=includes_usage)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answered = [
            CompletionChoice(index=i, text=c.text, finish_reason=c.finish_reason, stop_reason=c.stop_reason)
            for i, c in enumerate(choices)
        ]
        answer = Completion(id=self._id, created=self._created, model=self._model, choices=answered, usage=usage)
        return answer.model_dump_json().encode()

    def opening(self, num_choices: int, usage: Usage | None) -> bytes:
        return b""

    def event(self, delta: TextDelta, usage: Usage | None) -> bytes:
        return self._events.of(
            b'{"index":%d,"text":%b%b' % (delta.index, orjson.dumps(delta.text), _ending(delta)), usage
        )

    def usage_event(self, usage: Usage) -> bytes:
        return self._events.of(b"", usage)


class ChatAnswer:
    """Chunks: the role, then the text, then a chunk with only the finish reason."""

    def __init__(self, answer_id: str, created: int, model: str, *, includes_usage: bool) -> None:
        self._id, self._created, self._model = answer_id, created, model
        self._events = _Events("chat.completion.chunk", answer_id, created, model, includes_usage=includes_usage)

    def whole(self, choices: Sequence[Choice], usage: Usage) -> bytes:
        answered = [
            ChatChoice(
                index=i,
                message=AssistantMessage(content=c.text),
                finish_reason=c.finish_reason,
                stop_reason=c.stop_reason,
            )
            for i, c in enumerate(choices)
        ]
        answer = ChatCompletion(id=self._id, created=self._created, model=self._model, choices=answered, usage=usage)
        return answer.model_dump_json().encode()

    def opening(self, num_choices: int, usage: Usage | None) -> bytes:
        delta = b'{"role":"assistant","content":"","refusal":null}'
        role = b'{"index":%d,"delta":' + delta + b',"logprobs":null,"finish_reason":null}'
        return b"".join(self._events.of(role % index, usage) for index in range(num_choices))

    def event(self, delta: TextDelta, usage: Usage | None) -> bytes:
        text = b""
        if delta.text:
            choice = b'{"index":%d,"delta":{"content":%b},"logprobs":null,"finish_reason":null}'
            text = self._events.of(choice % (delta.index, orjson.dumps(delta.text)), usage)
        if delta.finish_reason is None:
            return text
        return text + self._events.of(b'{"index":%d,"delta":{}%b' % (delta.index, _ending(delta)), usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._events.of(b"", usage)
