"""The OpenAI answers, whole and streamed, as bytes. `router/schemas.py` describes them for the OpenAPI document.

A streamed chunk costs one JSON string and one concatenation; nothing is validated on the way out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Protocol

import orjson

from tensorweave.router.choices import Piece, Telling
from tensorweave.router.schemas import Usage
from tensorweave.router.token_shapes import TokenShapes

DONE: Final = b"data: [DONE]\n\n"


class Answer(Protocol):
    """How one request is answered: as one body, from one joined piece a choice, or as events."""

    def whole(self, choices: Sequence[Piece], usage: Usage) -> bytes: ...

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        """What comes before all text; `usage` is that of the prompt alone."""

    def event(self, piece: Piece, usage: Usage | None) -> bytes: ...

    def usage_event(self, usage: Usage) -> bytes: ...


class AnswerHead:
    """What all parts of one answer have in common: its fields, and the bytes around each chunk's choice."""

    def __init__(self, kind: str, answer_id: str, created: int, model: str, *, includes_usage: bool) -> None:
        self._fields: dict[str, Any] = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._before = b"data: " + orjson.dumps({**self._fields, "object": chunk_kind(kind)})[:-1] + b',"choices":['
        self._after = b',"usage":null}\n\n' if includes_usage else b"}\n\n"

    def whole(self, choices: Sequence[dict[str, Any]], usage: Usage, more: dict[str, Any]) -> bytes:
        return orjson.dumps({**self._fields, "choices": choices, "usage": usage.model_dump(), **more})

    def event(self, choice: bytes, usage: Usage | None, more: bytes = b"") -> bytes:
        if usage is None:
            return self._before + choice + b"]" + more + self._after
        return self._before + choice + b"]" + more + b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"


def chunk_kind(kind: str) -> str:
    return "chat.completion.chunk" if kind == "chat.completion" else kind


class CompletionAnswer:
    def __init__(self, head: AnswerHead, telling: Telling, shapes: TokenShapes) -> None:
        self._head = head
        self._telling = telling
        self._shapes = shapes

    def whole(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        return self._head.whole([self._whole_choice(piece) for piece in choices], usage, {})

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "text": piece.text,
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **prompt_fields(piece, self._telling, self._shapes),
            **token_fields(piece, self._telling),
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._telling.num_logprobs is None:
            return None
        return self._shapes.completion_logprobs([*piece.echoed, *piece.tokens], self._telling.num_logprobs)

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        return b""

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        logprobs = b"null" if self._telling.num_logprobs is None else orjson.dumps(self._logprobs(piece))
        more = {**prompt_fields(piece, self._telling, self._shapes), **token_fields(piece, self._telling)}
        choice = b'{"index":%d,"text":%b,"logprobs":%b%b%b}' % (
            piece.index,
            orjson.dumps(piece.text),
            logprobs,
            _ending(piece),
            _rest(more),
        )
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

    def whole(self, choices: Sequence[Piece], usage: Usage) -> bytes:
        about_prompt = prompt_fields(choices[0], self._telling, self._shapes)
        return self._head.whole([self._whole_choice(piece) for piece in choices], usage, about_prompt)

    def _whole_choice(self, piece: Piece) -> dict[str, Any]:
        return {
            "index": piece.index,
            "message": {"role": "assistant", "content": piece.text, "refusal": None},
            "logprobs": self._logprobs(piece),
            "finish_reason": piece.finish_reason,
            "stop_reason": piece.stop_reason,
            **token_fields(piece, self._telling),
        }

    def _logprobs(self, piece: Piece) -> dict[str, Any] | None:
        if self._telling.num_logprobs is None:
            return None
        return self._shapes.chat_logprobs(piece.tokens, self._telling.num_logprobs)

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        delta = b'{"role":"assistant","content":"","refusal":null}'
        role = b'{"index":%d,"delta":' + delta + b',"logprobs":null,"finish_reason":null}'
        ids = _rest({"prompt_token_ids": list(prompt)}) if self._telling.has_token_ids else b""
        first, *others = [role % index for index in range(num_choices)]
        return b"".join([self._head.event(first, usage, ids), *(self._head.event(role, usage) for role in others)])

    def event(self, piece: Piece, usage: Usage | None) -> bytes:
        beside = b"null" if self._telling.num_logprobs is None else orjson.dumps(self._logprobs(piece))
        ids = _rest(token_fields(piece, self._telling))
        text = b""
        if piece.text:
            choice = b'{"index":%d,"delta":{"content":%b},"logprobs":%b,"finish_reason":null%b}'
            text = self._head.event(choice % (piece.index, orjson.dumps(piece.text), beside, ids), usage)
            beside, ids = b"null", b""
        if piece.finish_reason is None:
            return text
        choice = b'{"index":%d,"delta":{},"logprobs":%b%b%b}' % (piece.index, beside, _ending(piece), ids)
        return text + self._head.event(choice, usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._head.event(b"", usage)


def token_fields(piece: Piece, telling: Telling) -> dict[str, Any]:
    return {"token_ids": [token.token_id for token in piece.tokens]} if telling.has_token_ids else {}


def prompt_fields(piece: Piece, telling: Telling, shapes: TokenShapes) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    if piece.prompt is not None and telling.has_token_ids:
        fields["prompt_token_ids"] = list(piece.prompt.token_ids)
    if piece.prompt is not None and telling.num_prompt_logprobs is not None:
        assert piece.prompt.logprobs is not None, "the first token came without the prompt's log-probabilities"
        fields["prompt_logprobs"] = shapes.prompt_logprobs(piece.prompt.logprobs, telling.num_prompt_logprobs)
    return fields


def _ending(piece: Piece) -> bytes:
    if piece.finish_reason is None:
        return b',"finish_reason":null'
    return b',"finish_reason":"%b","stop_reason":%b' % (piece.finish_reason.encode(), orjson.dumps(piece.stop_reason))


def _rest(fields: dict[str, Any]) -> bytes:
    """To be put behind other fields."""
    return b"," + orjson.dumps(fields)[1:-1] if fields else b""
