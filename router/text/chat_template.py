"""`ChatPrompt`: what a chat template gets, and `render`, which applies a tokenizer's template to it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

import orjson
from jinja2.exceptions import TemplateError

from tensorweave.cluster.errors import RequestRejected

ChatMessage = Mapping[str, Any]

_PROBE: Final = "probe_of_calls"
_TOOL_PROBE: Final = "function_of_probe"
_PART_TEXTS: Final = {"text": "text", "refusal": "refusal"}
_FAILURES: Final = (TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)
"""What a template raises on purpose, and what one raises that does not fit the messages."""


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """A conversation, and how it becomes a prompt.

    Attributes:
        messages: In templates' form; a content may be a list of parts.
        tools: In OpenAI's form.
        adds_generation_prompt: The prompt ends where an assistant's answer begins.
        continues_last: The prompt ends within the last message, which the answer continues.
        template: A Jinja template to use instead of the tokenizer's.
        arguments: More variables of the template.
    """

    messages: Sequence[ChatMessage]
    tools: Sequence[Mapping[str, Any]] = ()
    adds_generation_prompt: bool = True
    continues_last: bool = False
    template: str | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)


class WrittenOfTools(NamedTuple):
    """Whether a template writes the calls of assistants' messages, and the tools that there are."""

    calls: bool
    tools: bool


def render(backend: Any, prompt: ChatPrompt, own_arguments: frozenset[str]) -> str:
    """The template's text. `own_arguments`: the parameters of `backend.apply_chat_template`, which no request may set.

    Raises:
        RequestRejected: The template refuses the conversation, or there is no template.
    """
    if prompt.template is None and not backend.chat_template:
        raise RequestRejected("this model's tokenizer has no chat template; use /v1/completions", param="messages")
    if own := (own_arguments | {"messages"}) & prompt.arguments.keys():
        raise RequestRejected(f"chat_template_kwargs may not set {sorted(own)[0]!r}", param="chat_template_kwargs")
    messages = [{**message, "content": flatten_content(message.get("content"))} for message in prompt.messages]
    try:
        return _apply(backend, messages, prompt)
    except _FAILURES as error:
        if any(message.get("tool_calls") for message in messages):
            with contextlib.suppress(*_FAILURES):
                return _apply(backend, list(map(_with_arguments_as_text, messages)), prompt)
        param = "messages" if prompt.template is None else "chat_template"
        raise RequestRejected(f"the chat template refused the messages: {error}", param=param) from error


def _apply(backend: Any, messages: list[dict[str, Any]], prompt: ChatPrompt) -> str:
    extra: dict[str, Any] = dict(prompt.arguments)
    if prompt.template is not None:
        extra["chat_template"] = prompt.template
    if prompt.tools:
        extra["tools"] = list(prompt.tools)
    if prompt.continues_last:
        extra["continue_final_message"] = True
    text: str = backend.apply_chat_template(
        messages, tokenize=False, add_generation_prompt=prompt.adds_generation_prompt, **extra
    )
    return text


def _with_arguments_as_text(message: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's templates take the arguments of calls as JSON; all others write an object as JSON themselves."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = call["function"]["arguments"]
        text = arguments if isinstance(arguments, str) else orjson.dumps(arguments).decode()
        calls.append({**call, "function": {**call["function"], "arguments": text}})
    return {**message, "tool_calls": calls}


def written_of_tools(backend: Any) -> WrittenOfTools:
    """What the tokenizer's template writes of a conversation with tools, found out by one."""
    call = {"id": "call00001", "type": "function", "function": {"name": _PROBE, "arguments": {}}}
    messages: list[ChatMessage] = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": call["id"], "name": _PROBE[::-1], "content": "b"},
    ]
    parameters = {"type": "object", "properties": {}}
    tool = {"type": "function", "function": {"name": _TOOL_PROBE, "description": "c", "parameters": parameters}}
    with_calls, without = (_probe(backend, ChatPrompt(each, tools=[tool])) for each in (messages, messages[:1]))
    return WrittenOfTools(_PROBE in with_calls, _TOOL_PROBE in with_calls or _TOOL_PROBE in without)


def _probe(backend: Any, prompt: ChatPrompt) -> str:
    try:
        return render(backend, prompt, frozenset())
    except RequestRejected:
        return ""


def flatten_content(content: str | Sequence[Mapping[str, Any]] | None) -> str:
    """A message's content as one string. Raises RequestRejected for parts that are not text."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    texts: list[str] = []
    for part in content:
        key = _PART_TEXTS.get(str(part.get("type"))) if isinstance(part, Mapping) else None
        text = None if key is None else part.get(key)
        if not isinstance(text, str):
            raise RequestRejected("only parts of type 'text' are supported in a message's content", param="messages")
        texts.append(text)
    return "\n".join(texts)
