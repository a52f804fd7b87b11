"""`MessagesAnswer`: the answers of /v1/messages. `router/anthropic/schemas.py` describes them for clients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

import orjson
from pydantic_core import from_json, to_json

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.router.anthropic.errors import error_fields
from tensorweave.router.chat.blocks import Block, Blocks, BlockStep
from tensorweave.router.chat.parsed_choice import AnswerEnd, ParsedChunk
from tensorweave.router.openai.disaggregated import ContextPhase
from tensorweave.router.openai.schemas import Usage
from tensorweave.router.openai.token_shapes import TokenShapes
from tensorweave.router.openai.whole_choice import WholeChoice
from tensorweave.router.text.choices import Telling

_STOP_REASONS: Final[dict[AnswerEnd, str]] = {
    "stop": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}
_DELTAS: Final = {
    "content": ("text_delta", "text"),
    "reasoning": ("thinking_delta", "thinking"),
    "call": ("input_json_delta", "partial_json"),
}
"""Per kind of block, the type of its deltas and the key of their text."""


class MessagesAnswer:
    """The answer to one request, which has one choice."""

    def __init__(self, tokens: TokenShapes, *, answer_id: str, model_name: str) -> None:
        self._tokens = tokens
        self._blocks = Blocks()
        self._head = {"id": answer_id, "type": "message", "role": "assistant", "model": model_name}

    def new_choice(self) -> WholeChoice:
        return WholeChoice(Telling(), self._tokens, None)

    def whole(self, choices: Sequence[WholeChoice], usage: Usage, phase: ContextPhase | None = None) -> bytes:
        [choice] = choices
        content = [_whole_block(block) for block in choice.blocks.blocks]
        return orjson.dumps({**self._head, "content": content, **_ending(choice.last), "usage": _usage(usage)})

    def opening(self, num_choices: int, prompt: Sequence[int], usage: Usage) -> bytes:
        nothing: dict[str, Any] = {"content": [], "stop_reason": None, "stop_sequence": None}
        message = {**self._head, **nothing, "usage": _usage(usage)}
        return _event({"type": "message_start", "message": message}) + _event({"type": "ping"})

    async def event(self, chunk: ParsedChunk, usage: Callable[[], Usage]) -> bytes:
        written = b"".join([_step(step) for step in self._steps(chunk)])
        if chunk.finish_reason is None:
            return written
        return written + _event({"type": "message_delta", "delta": _ending(chunk), "usage": _usage(usage())})

    def closing(self, usage: Usage) -> bytes:
        return _event({"type": "message_stop"})

    def failure(self, error: TensorweaveError) -> bytes:
        return _event(error_fields(error))

    def _steps(self, chunk: ParsedChunk) -> Iterator[BlockStep]:
        yield from self._blocks.add(chunk.deltas)
        if chunk.finish_reason is not None:
            yield from self._blocks.end()


def _whole_block(block: Block) -> dict[str, Any]:
    match block.kind:
        case "content":
            return {"type": "text", "text": block.text}
        case "reasoning":
            return {"type": "thinking", "thinking": block.text, "signature": ""}
        case "call":
            return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": _input(block.text)}


def _input(arguments: str) -> dict[str, Any]:
    """The object that the arguments are. Of an answer that was cut short, as much of it as there is. An integer of more
    than 64 bits becomes a float, as in all JSON that is read here."""
    try:
        read = orjson.loads(
            to_json(from_json(arguments or "{}", allow_partial="trailing-strings"), inf_nan_mode="null")
        )
    except ValueError:
        read = None
    return read if isinstance(read, dict) else {}


def _ending(chunk: ParsedChunk) -> dict[str, Any]:
    """`stop_reason` and `stop_sequence`."""
    assert chunk.finish_reason is not None, "not the last chunk"
    stop = chunk.piece.stop_reason
    if isinstance(stop, str) and chunk.finish_reason == "stop":
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}
    return {"stop_reason": _STOP_REASONS[chunk.finish_reason], "stop_sequence": None}


def _usage(usage: Usage) -> dict[str, Any]:
    """Cached tokens are not among the input tokens, and nobody pays for writing them."""
    cached = usage.prompt_tokens_details.cached_tokens
    return {
        "input_tokens": usage.prompt_tokens - cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": cached,
        "output_tokens": usage.completion_tokens,
    }


def _step(step: BlockStep) -> bytes:
    index, kind = step.block.index, step.block.kind
    match step.kind:
        case "start":
            return _event({"type": "content_block_start", "index": index, "content_block": _empty(step.block)})
        case "piece":
            delta_type, key = _DELTAS[kind]
            delta = {"type": delta_type, key: step.text}
            return _event({"type": "content_block_delta", "index": index, "delta": delta})
        case "end":
            return _event({"type": "content_block_stop", "index": index})


def _empty(block: Block) -> dict[str, Any]:
    """The block as it begins."""
    if block.kind == "call":
        return {"type": "tool_use", "id": block.call_id, "name": block.name, "input": {}}
    return _whole_block(Block(block.index, block.kind))


def _event(data: dict[str, Any]) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (data["type"].encode(), orjson.dumps(data))
