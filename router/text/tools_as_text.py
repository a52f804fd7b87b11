"""Conversations with tools for a chat template that knows none: all that it would leave out, as text of the messages.

The text has the form of Nous Research's Hermes models, which many others were trained on as well.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Final

import orjson

from tensorweave.router.text.chat_template import ChatMessage, ChatPrompt, flatten_content

_BEFORE: Final = "You may call functions. These are their signatures:\n<tools>\n"
_AFTER: Final = (
    "\n</tools>\nTo call one, write its name and its arguments as JSON, like this:\n<tool_call>\n"
    '{"name": "the name", "arguments": {"the parameter": "the value"}}\n</tool_call>'
)


def with_tools_as_text(prompt: ChatPrompt) -> ChatPrompt:
    """The conversation without `tools`, calls and tools' messages: the functions stand in the system's message, calls
    in the assistant's text, and what functions answered in the user's."""
    messages: list[ChatMessage] = []
    for message in prompt.messages:
        if message["role"] != "tool":
            messages.append(_with_calls_as_text(message))
            continue
        text = f"<tool_response>\n{flatten_content(message.get('content'))}\n</tool_response>"
        if messages and messages[-1].get("answers_calls"):
            text = f"{messages.pop()['content']}\n{text}"
        messages.append({"role": "user", "content": text, "answers_calls": True})
    if prompt.tools:
        messages = _with_system_text(messages, _signatures(prompt.tools))
    return dataclasses.replace(prompt, messages=messages, tools=())


def _signatures(tools: Sequence[Mapping[str, Any]]) -> str:
    return _BEFORE + "\n".join([orjson.dumps(tool).decode() for tool in tools]) + _AFTER


def _with_calls_as_text(message: ChatMessage) -> ChatMessage:
    if not (calls := message.get("tool_calls")):
        return message
    texts = [flatten_content(message.get("content"))]
    texts += [f"<tool_call>\n{orjson.dumps(call['function']).decode()}\n</tool_call>" for call in calls]
    kept = {key: value for key, value in message.items() if key != "tool_calls"}
    return {**kept, "content": "\n".join(filter(None, texts))}


def _with_system_text(messages: list[ChatMessage], text: str) -> list[ChatMessage]:
    if not messages or messages[0]["role"] != "system":
        return [{"role": "system", "content": text}, *messages]
    first = messages[0]
    return [{**first, "content": f"{flatten_content(first.get('content'))}\n\n{text}"}, *messages[1:]]
