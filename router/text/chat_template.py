"""`ChatPrompt`: what a chat template gets, and `render`, which applies a tokenizer's template to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from jinja2.exceptions import TemplateError

from tensorweave.cluster.errors import RequestRejected

ChatMessage = Mapping[str, Any]

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


def render(backend: Any, prompt: ChatPrompt, own_arguments: frozenset[str]) -> str:
    """The template's text. `own_arguments`: the parameters of `backend.apply_chat_template`, which no request may set.

    Raises:
        RequestRejected: The template refuses the conversation, or there is no template.
    """
    if prompt.template is None and not backend.chat_template:
        raise RequestRejected("this model's tokenizer has no chat template; use /v1/completions", param="messages")
    if own := (own_arguments | {"messages"}) & prompt.arguments.keys():
        raise RequestRejected(f"chat_template_kwargs may not set {sorted(own)[0]!r}", param="chat_template_kwargs")
    extra: dict[str, Any] = dict(prompt.arguments)
    if prompt.template is not None:
        extra["chat_template"] = prompt.template
    if prompt.tools:
        extra["tools"] = list(prompt.tools)
    if prompt.continues_last:
        extra["continue_final_message"] = True
    try:
        text: str = backend.apply_chat_template(
            [_flat(message) for message in prompt.messages],
            tokenize=False,
            add_generation_prompt=prompt.adds_generation_prompt,
            **extra,
        )
    except _FAILURES as error:
        param = "messages" if prompt.template is None else "chat_template"
        raise RequestRejected(f"the chat template refused the messages: {error}", param=param) from error
    return text


def _flat(message: ChatMessage) -> dict[str, Any]:
    """Where an assistant only calls tools, its content stays null: some templates know it by that."""
    content = message.get("content")
    is_call = content is None and bool(message.get("tool_calls"))
    return {**message, "content": None if is_call else flatten_content(content)}


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
