"""`OpenAIAnswer`: the answers of completions and chats. `router/openai/schemas.py` describes them for clients.

They differ in `AnswerShape`, which is data. A streamed chunk costs one JSON string and one concatenation; nothing is
validated on the way out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.router.chat.blocks import Blocks
from tensorweave.router.chat.parsed_choice import ParsedChunk
from tensorweave.router.chat_formats.deltas import Delta
from tensorweave.router.openai.answer_parts import (
    FIRST_CHAT_DELTA,
    chat_deltas,
    chat_message,
    completion_deltas,
    completion_text,
    ending,
    legacy_deltas,
    legacy_message,
)
from tensorweave.router.openai.disaggregated import ContextPhase
from tensorweave.router.openai.error_body import error_body
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.openai.whole_choice import LogprobsJson, WholeChoice, prompt_fields
from tensorweave.router.text.choices import ChoiceChunk, Telling
from tensorweave.router.text.token_offsets import PlacedToken
from tensorweave.router.time_slice import TimeSlice

_DONE: Final = b"data: [DONE]\n\n"

LogprobColumns = Callable[[TokenShapes, Sequence[PlacedToken], int], dict[str, list[Any]]]


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How a completion or a chat is written.

    Attributes:
        kind: `object` of a whole answer.
        chunk_kind: `object` of a streamed chunk.
        whole: A whole choice's text or message.
        deltas: Those of streamed chunks, one for each chunk to send.
        first_delta: What each choice's stream starts with, in a chunk of its own; empty: there is none.
        last_delta: What a chunk with the finish reason has for text; empty: the reason is beside the last text.
        logprobs: The lists of a choice's `logprobs`.
        logprobs_end: Its other fields.
        has_prompt_in_choice: The prompt's fields are in each choice, else in the answer.
        call_reason: The finish reason of an answer that calls tools.
    """

    kind: str
    chunk_kind: str
    whole: Callable[[Blocks], bytes]
    deltas: Callable[[Sequence[Delta]], list[bytes]]
    first_delta: bytes
    last_delta: bytes
    logprobs: LogprobColumns
    logprobs_end: bytes
    has_prompt_in_choice: bool
    call_reason: bytes = b"tool_calls"


COMPLETION_SHAPE: Final = AnswerShape(
    kind="text_completion",
    chunk_kind="text_completion",
    whole=completion_text,
    deltas=completion_deltas,
    first_delta=b"",
    last_delta=b"",
    logprobs=TokenShapes.completion_logprobs,
    logprobs_end=b"",
    has_prompt_in_choice=True,
)
CHAT_SHAPE: Final = AnswerShape(
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    whole=chat_message,
    deltas=chat_deltas,
    first_delta=FIRST_CHAT_DELTA,
    last_delta=b'"delta":{}',
    logprobs=TokenShapes.chat_logprobs,
    logprobs_end=b',"refusal":null',
    has_prompt_in_choice=False,
)
LEGACY_CHAT_SHAPE: Final = dataclasses.replace(
    CHAT_SHAPE, whole=legacy_message, deltas=legacy_deltas, call_reason=b"function_call"
)


class OpenAIAnswer:
    """`includes_usage`: every chunk of a stream has `usage`, which is null unless it `has_running_usage`."""

    def __init__(
        self,
        shape: AnswerShape,
        telling: Telling,
        tokens: TokenShapes,
        *,
        answer_id: str,
        created_s: int,
        model_name: str,
        includes_usage: bool,
        has_running_usage: bool,
    ) -> None:
        self._shape = shape
        self._telling = telling
        self._tokens = tokens
        self._includes_usage = includes_usage
        self._has_running_usage = has_running_usage
        fields = {"id": answer_id, "object": shape.kind, "created": created_s, "model": model_name}
        self._before_whole = orjson.dumps(fields)[:-1] + b',"choices":['
        self._before = b"data: " + orjson.dumps({**fields, "object": shape.chunk_kind})[:-1] + b',"choices":['
        self._after = b',"usage":null}\n\n' if includes_usage else b"}\n\n"

    def new_choice(self) -> WholeChoice:
        return WholeChoice(self._telling, self._tokens, self._new_logprobs())

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        shape, is_in_choice = self._shape, self._shape.has_prompt_in_choice
        phase_fields = b"" if phase is None else _rest(phase.choice_fields)
        written = []
        for index, choice in enumerate(choices):
            fields = (choice.prompt_fields if is_in_choice else b"") + choice.token_fields + phase_fields
            end = ending(choice.last, shape.call_reason)
            written.append(_choice(index, shape.whole(choice.blocks), choice.logprobs, end + fields))
        about_prompt = b"" if is_in_choice else choices[0].prompt_fields
        if phase is not None and (is_in_choice or not self._telling.has_token_ids):
            about_prompt += _prompt_ids(phase.prompt)
        usage_json = usage.model_dump_json().encode()
        return b"".join([self._before_whole, b",".join(written), b'],"usage":', usage_json, about_prompt, b"}"])

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage) -> bytes:
        if not (delta := self._shape.first_delta):
            return b""
        ids = _prompt_ids(prompt) if self._telling.has_token_ids else b""
        running = usage if self._has_running_usage else None
        chunks = []
        for index in range(num_choices):
            choice = _choice(index, delta, b"null", ending(None))
            chunks.append(self._chunk(choice, running, b"" if index else ids))
        return b"".join(chunks)

    async def event(self, chunk: ParsedChunk, usage: Callable[[], Usage]) -> bytes:
        """A chunk for each delta, and one for the finish reason unless it is beside the last text."""
        shape, piece = self._shape, chunk.piece
        running = usage() if self._has_running_usage else None
        logprobs, fields = await self._written_logprobs(piece), self._token_fields(piece)
        if piece.prompt is not None and shape.has_prompt_in_choice:
            fields = await prompt_fields(piece.prompt, self._telling, self._tokens, TimeSlice()) + fields
        deltas = shape.deltas(chunk.deltas)
        if shape.last_delta and (chunk.finish_reason is not None or (piece.tokens and not deltas)):
            deltas.append(shape.last_delta)
        written = b""
        for place, delta in enumerate(deltas, start=1):
            end = ending(chunk, shape.call_reason) if place == len(deltas) else ending(None)
            written += self._chunk(_choice(piece.index, delta, logprobs, end + fields), running)
            logprobs, fields = b"null", b""
        return written

    def closing(self, usage: Usage) -> bytes:
        return (self._chunk(b"", usage) if self._includes_usage else b"") + _DONE

    def failure(self, error: TensorweaveError) -> bytes:
        return b"data: " + error_body(error) + b"\n\n"

    def _chunk(self, choice: bytes, usage: Usage | None, more: bytes = b"") -> bytes:
        if usage is None:
            return self._before + choice + b"]" + more + self._after
        return self._before + choice + b"]" + more + b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"

    def _new_logprobs(self) -> LogprobsJson | None:
        if (num_top := self._telling.num_logprobs) is None:
            return None
        shape = self._shape
        return LogprobsJson(lambda tokens: shape.logprobs(self._tokens, tokens, num_top), shape.logprobs_end)

    async def _written_logprobs(self, piece: ChoiceChunk) -> bytes:
        if (logprobs := self._new_logprobs()) is None:
            return b"null"
        await logprobs.add(piece, TimeSlice())
        return logprobs.json()

    def _token_fields(self, piece: ChoiceChunk) -> bytes:
        if not self._telling.has_token_ids:
            return b""
        return _rest({"token_ids": [token.token_id for token in piece.tokens]})


def _choice(index: int, text: bytes, logprobs: bytes, fields: bytes) -> bytes:
    return b'{"index":%d,%b,"logprobs":%b%b}' % (index, text, logprobs, fields)


def _prompt_ids(prompt: Sequence[int]) -> bytes:
    return _rest({"prompt_token_ids": list(prompt)})


def _rest(fields: dict[str, Any]) -> bytes:
    """The rest as JSON, to follow other fields."""
    return b"," + orjson.dumps(fields)[1:-1]
