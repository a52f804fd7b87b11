"""The OpenAI answers, whole and streamed, as bytes. `router/openai/schemas.py` describes them for the OpenAPI document.

A streamed chunk costs one JSON string and one concatenation; nothing is validated on the way out.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Final, Protocol

import orjson

from tensorweave.router.openai.disaggregated import ContextPhase
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.openai.whole_choice import LogprobsJson, WholeChoice, ending, prompt_fields
from tensorweave.router.pace import Pace
from tensorweave.router.text.choices import Piece, Telling

DONE: Final = b"data: [DONE]\n\n"


class Answer(Protocol):
    """How one request is answered: as one body, from whole choices, or as events."""

    def choice(self) -> WholeChoice:
        """One choice of a body, still empty."""

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        """The body; `phase` where the request is the first phase of two, with one choice."""

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        """What comes before all text; `usage` is that of the prompt alone."""

    async def event(self, piece: Piece, usage: Usage | None) -> bytes: ...

    def usage_event(self, usage: Usage) -> bytes: ...


class AnswerHead:
    """What all parts of one answer have in common: its fields, and the bytes around each chunk's choice."""

    def __init__(self, kind: str, answer_id: str, created: int, model: str, *, includes_usage: bool) -> None:
        fields = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._before_whole = orjson.dumps(fields)[:-1] + b',"choices":['
        self._before = b"data: " + orjson.dumps({**fields, "object": chunk_kind(kind)})[:-1] + b',"choices":['
        self._after = b',"usage":null}\n\n' if includes_usage else b"}\n\n"

    def whole(self, choices: Sequence[bytes], usage: Usage, more: bytes) -> bytes:
        return b"".join([self._before_whole, b",".join(choices), b'],"usage":', _json_of(usage), more, b"}"])

    def event(self, choice: bytes, usage: Usage | None, more: bytes = b"") -> bytes:
        if usage is None:
            return self._before + choice + b"]" + more + self._after
        return self._before + choice + b"]" + more + b',"usage":' + _json_of(usage) + b"}\n\n"


def chunk_kind(kind: str) -> str:
    return "chat.completion.chunk" if kind == "chat.completion" else kind


class CompletionAnswer:
    def __init__(self, head: AnswerHead, telling: Telling, shapes: TokenShapes) -> None:
        self._head = head
        self._telling = telling
        self._shapes = shapes

    def choice(self) -> WholeChoice:
        return WholeChoice(self._telling, self._shapes, self._logprobs())

    def _logprobs(self) -> LogprobsJson | None:
        if (num_top := self._telling.num_logprobs) is None:
            return None
        return LogprobsJson(functools.partial(self._shapes.completion_logprobs, num_top=num_top))

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        told = [
            b'{"index":%d,"text":%b,"logprobs":%b%b%b%b%b}'
            % (
                index,
                choice.text,
                choice.logprobs,
                choice.ending,
                choice.prompt_fields,
                choice.token_fields,
                _phase_fields(phase),
            )
            for index, choice in enumerate(choices)
        ]
        return self._head.whole(told, usage, b"" if phase is None else _prompt_ids(phase.prompt))

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        return b""

    async def event(self, piece: Piece, usage: Usage | None) -> bytes:
        beside = await _written(self._logprobs(), piece)
        more = _rest(token_fields(piece, self._telling))
        if piece.prompt is not None:
            more = await prompt_fields(piece.prompt, self._telling, self._shapes, Pace()) + more
        text = orjson.dumps(piece.text)
        choice = b'{"index":%d,"text":%b,"logprobs":%b%b%b}' % (piece.index, text, beside, ending(piece), more)
        return self._head.event(choice, usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._head.event(b"", usage)


class ChatAnswer:
    """Chunks: the role, with the prompt's ids where they are asked for; then the text; then a chunk with the finish
    reason and the tokens that leave no text."""

    def __init__(self, head: AnswerHead, telling: Telling, shapes: TokenShapes) -> None:
        self._head = head
        self._telling = telling
        self._shapes = shapes

    def choice(self) -> WholeChoice:
        return WholeChoice(self._telling, self._shapes, self._logprobs())

    def _logprobs(self) -> LogprobsJson | None:
        if (num_top := self._telling.num_logprobs) is None:
            return None
        return LogprobsJson(functools.partial(self._shapes.chat_logprobs, num_top=num_top), b',"refusal":null')

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        told = [
            b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":null},"logprobs":%b%b%b%b}'
            % (index, choice.text, choice.logprobs, choice.ending, choice.token_fields, _phase_fields(phase))
            for index, choice in enumerate(choices)
        ]
        about_prompt = choices[0].prompt_fields
        if phase is not None and not self._telling.has_token_ids:
            about_prompt += _prompt_ids(phase.prompt)
        return self._head.whole(told, usage, about_prompt)

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        delta = b'{"role":"assistant","content":"","refusal":null}'
        role = b'{"index":%d,"delta":' + delta + b',"logprobs":null,"finish_reason":null}'
        ids = _prompt_ids(prompt) if self._telling.has_token_ids else b""
        first, *others = [role % index for index in range(num_choices)]
        return b"".join([self._head.event(first, usage, ids), *(self._head.event(role, usage) for role in others)])

    async def event(self, piece: Piece, usage: Usage | None) -> bytes:
        beside = await _written(self._logprobs(), piece)
        ids = _rest(token_fields(piece, self._telling))
        text = b""
        if piece.text:
            choice = b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null%b}'
            text = self._head.event(choice % (piece.index, orjson.dumps(piece.text), beside, ids), usage)
            beside, ids = b"null", b""
        if piece.finish_reason is None:
            return text
        choice = b'{"index":%d,"delta":{},"logprobs":%b%b%b}' % (piece.index, beside, ending(piece), ids)
        return text + self._head.event(choice, usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._head.event(b"", usage)


async def _written(logprobs: LogprobsJson | None, piece: Piece) -> bytes:
    if logprobs is None:
        return b"null"
    await logprobs.add(piece, Pace())
    return logprobs.json()


def token_fields(piece: Piece, telling: Telling) -> dict[str, Any]:
    return {"token_ids": [token.token_id for token in piece.tokens]} if telling.has_token_ids else {}


def _phase_fields(phase: ContextPhase | None) -> bytes:
    return b"" if phase is None else _rest(phase.choice_fields)


def _prompt_ids(prompt: Sequence[int]) -> bytes:
    return _rest({"prompt_token_ids": list(prompt)})


def _json_of(usage: Usage) -> bytes:
    return usage.model_dump_json().encode()


def _rest(fields: dict[str, Any]) -> bytes:
    """To be put behind other fields."""
    return b"," + orjson.dumps(fields)[1:-1] if fields else b""
