"""`Answer`: one request's answer, whole or streamed, as bytes. `router/openai/schemas.py` describes it for clients.

A completion and a chat differ in `AnswerShape`, which is data. A streamed chunk costs one JSON string and one
concatenation; nothing is validated on the way out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import orjson

from tensorweave.router.openai.disaggregated import ContextPhase
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.openai.whole_choice import LogprobsJson, WholeChoice, ending, prompt_fields
from tensorweave.router.text.choices import ChoiceChunk, Telling
from tensorweave.router.text.token_offsets import PlacedToken
from tensorweave.router.time_slice import TimeSlice

DONE: Final = b"data: [DONE]\n\n"

LogprobColumns = Callable[[TokenShapes, Sequence[PlacedToken], int], dict[str, list[Any]]]


@dataclass(frozen=True, slots=True)
class AnswerShape:
    """How a completion or a chat is written. `%b` in a template stands for the text as JSON.

    Attributes:
        id_prefix: Start of the answer's id.
        kind: `object` of a whole answer.
        chunk_kind: `object` of a streamed chunk.
        whole: A whole choice's text.
        delta: A streamed chunk's text.
        first_delta: What each choice's stream starts with, in a chunk of its own; empty: there is none.
        last_delta: What a chunk with the finish reason has for text; empty: the reason is beside the last text.
        logprobs: The lists of a choice's `logprobs`.
        logprobs_end: Its other fields.
        has_prompt_in_choice: The prompt's fields are in each choice, else in the answer.
    """

    id_prefix: str
    kind: str
    chunk_kind: str
    whole: bytes
    delta: bytes
    first_delta: bytes
    last_delta: bytes
    logprobs: LogprobColumns
    logprobs_end: bytes
    has_prompt_in_choice: bool


COMPLETION_SHAPE: Final = AnswerShape(
    id_prefix="cmpl",
    kind="text_completion",
    chunk_kind="text_completion",
    whole=b'"text":%b',
    delta=b'"text":%b',
    first_delta=b"",
    last_delta=b"",
    logprobs=TokenShapes.completion_logprobs,
    logprobs_end=b"",
    has_prompt_in_choice=True,
)
CHAT_SHAPE: Final = AnswerShape(
    id_prefix="chatcmpl",
    kind="chat.completion",
    chunk_kind="chat.completion.chunk",
    whole=b'"message":{"role":"assistant","content":%b,"refusal":null}',
    delta=b'"delta":{"content":%b}',
    first_delta=b'"delta":{"role":"assistant","content":"","refusal":null}',
    last_delta=b'"delta":{}',
    logprobs=TokenShapes.chat_logprobs,
    logprobs_end=b',"refusal":null',
    has_prompt_in_choice=False,
)


class Answer:
    """Used by one request. `includes_usage`: every chunk of a stream has `usage`, which may be null."""

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
    ) -> None:
        self._shape = shape
        self._telling = telling
        self._tokens = tokens
        fields = {"id": answer_id, "object": shape.kind, "created": created_s, "model": model_name}
        self._before_whole = orjson.dumps(fields)[:-1] + b',"choices":['
        self._before = b"data: " + orjson.dumps({**fields, "object": shape.chunk_kind})[:-1] + b',"choices":['
        self._after = b',"usage":null}\n\n' if includes_usage else b"}\n\n"

    def new_choice(self) -> WholeChoice:
        """One choice of a whole answer, still empty."""
        return WholeChoice(self._telling, self._tokens, self._new_logprobs())

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        """The whole answer; with `phase`, that of a context phase, which has one choice."""
        is_in_choice = self._shape.has_prompt_in_choice
        phase_fields = b"" if phase is None else _rest(phase.choice_fields)
        written = []
        for index, choice in enumerate(choices):
            fields = (choice.prompt_fields if is_in_choice else b"") + choice.token_fields + phase_fields
            text = self._shape.whole % choice.text
            written.append(_choice(index, text, choice.logprobs, choice.ending + fields))
        about_prompt = b"" if is_in_choice else choices[0].prompt_fields
        if phase is not None and (is_in_choice or not self._telling.has_token_ids):
            about_prompt += _prompt_ids(phase.prompt)
        usage_json = usage.model_dump_json().encode()
        return b"".join([self._before_whole, b",".join(written), b'],"usage":', usage_json, about_prompt, b"}"])

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage | None) -> bytes:
        """The chunks before all text; `usage` is the prompt's alone."""
        if not (delta := self._shape.first_delta):
            return b""
        ids = _prompt_ids(prompt) if self._telling.has_token_ids else b""
        chunks = []
        for index in range(num_choices):
            choice = _choice(index, delta, b"null", ending(None))
            chunks.append(self._chunk(choice, usage, b"" if index else ids))
        return b"".join(chunks)

    async def event(self, chunk: ChoiceChunk, usage: Usage | None) -> bytes:
        """The chunks for one chunk: one, or its text and its finish reason apart."""
        shape = self._shape
        logprobs, fields = await self._written_logprobs(chunk), self._token_fields(chunk)
        if chunk.prompt is not None and shape.has_prompt_in_choice:
            fields = await prompt_fields(chunk.prompt, self._telling, self._tokens, TimeSlice()) + fields
        text = shape.delta % orjson.dumps(chunk.text)
        if not shape.last_delta:
            return self._chunk(_choice(chunk.index, text, logprobs, ending(chunk) + fields), usage)
        chunks = b""
        if chunk.text:
            chunks = self._chunk(_choice(chunk.index, text, logprobs, ending(None) + fields), usage)
            logprobs, fields = b"null", b""
        if chunk.finish_reason is None:
            return chunks
        return chunks + self._chunk(_choice(chunk.index, shape.last_delta, logprobs, ending(chunk) + fields), usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._chunk(b"", usage)

    def _chunk(self, choice: bytes, usage: Usage | None, more: bytes = b"") -> bytes:
        if usage is None:
            return self._before + choice + b"]" + more + self._after
        return self._before + choice + b"]" + more + b',"usage":' + usage.model_dump_json().encode() + b"}\n\n"

    def _new_logprobs(self) -> LogprobsJson | None:
        if (num_top := self._telling.num_logprobs) is None:
            return None
        shape = self._shape
        return LogprobsJson(lambda tokens: shape.logprobs(self._tokens, tokens, num_top), shape.logprobs_end)

    async def _written_logprobs(self, chunk: ChoiceChunk) -> bytes:
        if (logprobs := self._new_logprobs()) is None:
            return b"null"
        await logprobs.add(chunk, TimeSlice())
        return logprobs.json()

    def _token_fields(self, chunk: ChoiceChunk) -> bytes:
        if not self._telling.has_token_ids:
            return b""
        return _rest({"token_ids": [token.token_id for token in chunk.tokens]})


def _choice(index: int, text: bytes, logprobs: bytes, fields: bytes) -> bytes:
    return b'{"index":%d,%b,"logprobs":%b%b}' % (index, text, logprobs, fields)


def _prompt_ids(prompt: Sequence[int]) -> bytes:
    return _rest({"prompt_token_ids": list(prompt)})


def _rest(fields: dict[str, Any]) -> bytes:
    """As JSON, to follow other fields."""
    return b"," + orjson.dumps(fields)[1:-1]
