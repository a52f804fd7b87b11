"""The parts of completions and chats that depend on what an answer says: whole texts and messages, and their deltas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from tensorweave.router.chat.blocks import Blocks
from tensorweave.router.chat.parsed_choice import ParsedChunk
from tensorweave.router.chat_formats.deltas import CallArguments, CallEnd, CallStart, Content, Delta, Reasoning

FIRST_CHAT_DELTA = b'"delta":{"role":"assistant","content":"","refusal":null}'


def completion_text(blocks: Blocks) -> bytes:
    return b'"text":%b' % orjson.dumps(blocks.text_of("content"))


def completion_deltas(deltas: Sequence[Delta]) -> list[bytes]:
    """All in one."""
    text = "".join([delta.text for delta in deltas if isinstance(delta, Content)])
    return [b'"text":%b' % orjson.dumps(text)]


def chat_message(blocks: Blocks) -> bytes:
    """The message of a chat. `content` is null if there are only calls."""
    message = _message(blocks)
    if calls := blocks.of("call"):
        message["tool_calls"] = [
            {"id": call.call_id, "type": "function", "function": {"name": call.name, "arguments": call.text}}
            for call in calls
        ]
    return b'"message":%b' % orjson.dumps(message)


def legacy_message(blocks: Blocks) -> bytes:
    """The message where the request has the deprecated `functions`: they know one call."""
    message = _message(blocks)
    for call in blocks.of("call")[:1]:
        message["function_call"] = {"name": call.name, "arguments": call.text}
    return b'"message":%b' % orjson.dumps(message)


def _message(blocks: Blocks) -> dict[str, Any]:
    text = blocks.text_of("content")
    message: dict[str, Any] = {
        "role": "assistant",
        "content": text if text or not blocks.of("call") else None,
        "refusal": None,
    }
    if reasoning := blocks.text_of("reasoning"):
        message |= {"reasoning": reasoning, "reasoning_content": reasoning}
    return message


def chat_deltas(deltas: Sequence[Delta]) -> list[bytes]:
    """One each, so that a client sees the parts in their order."""
    return [b'"delta":%b' % written for delta in deltas if (written := _chat_delta(delta))]


def _chat_delta(delta: Delta) -> bytes:
    match delta:
        case Content(text):
            return b'{"content":%b}' % orjson.dumps(text)
        case Reasoning(text):
            return orjson.dumps({"reasoning": text, "reasoning_content": text})
        case CallStart(index, call_id, name):
            function = {"name": name, "arguments": ""}
            return orjson.dumps(
                {"tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}]}
            )
        case CallArguments(index, text):
            return orjson.dumps({"tool_calls": [{"index": index, "function": {"arguments": text}}]})
        case CallEnd():
            return b""


def legacy_deltas(deltas: Sequence[Delta]) -> list[bytes]:
    written = []
    for delta in deltas:
        match delta:
            case CallStart(0, _, name):
                written.append(orjson.dumps({"function_call": {"name": name, "arguments": ""}}))
            case CallArguments(0, text):
                written.append(orjson.dumps({"function_call": {"arguments": text}}))
            case Content() | Reasoning():
                written.append(_chat_delta(delta))
    return [b'"delta":%b' % one for one in written]


def ending(chunk: ParsedChunk | None, call_reason: bytes = b"tool_calls") -> bytes:
    """The chunk's `finish_reason` and `stop_reason` as JSON fields, each after a comma; None: the choice goes on."""
    if chunk is None or chunk.finish_reason is None:
        return b',"finish_reason":null'
    reason = call_reason if chunk.finish_reason == "tool_calls" else chunk.finish_reason.encode()
    return b',"finish_reason":"%b","stop_reason":%b' % (reason, orjson.dumps(chunk.piece.stop_reason))
