"""The messages of a chat: their roles, parts and tool calls, and their form for chat templates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BeforeValidator, Field, WithJsonSchema

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.openai.history import HistoryModel, says_nothing

# Marks for prompt caches, which our cache does not need.
_CACHE_MARKS: Final = ("cache_control", "prompt_cache_breakpoint")
_MARK: Final = {"anyOf": [{"type": "object"}, {"type": "null"}]}
_TEXT_KEYS: Final = {"text": "text", "refusal": "refusal"}
"""Per type of part, the key of its text. Assistants' messages alone have refusals."""
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}, **dict.fromkeys(_CACHE_MARKS, _MARK)},
    "required": ["type", "text"],
    "additionalProperties": False,
}
NOTES: Final = "Accepted: litellm notes here what else an answer had."
_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}


def _absent(value: Any) -> Any:
    return None if says_nothing(value) else value


class CalledFunction(HistoryModel):
    """What an assistant called. `arguments` are JSON, as the model wrote them."""

    name: str = Field(min_length=1)
    arguments: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates write the arguments as JSON themselves, from an object."""
        try:
            arguments = orjson.loads(self.arguments) if self.arguments else {}
        except orjson.JSONDecodeError:
            arguments = self.arguments
        return {"name": self.name, "arguments": arguments if isinstance(arguments, dict) else self.arguments}


class MessageToolCall(HistoryModel):
    """One call of an assistant's message."""

    id: str | None = None
    type: Literal["function"] | None = None
    index: int | None = Field(None, description="Accepted, since streamed calls have it.")
    provider_specific_fields: Any = Field(None, description=NOTES)
    function: CalledFunction

    def for_template(self) -> dict[str, Any]:
        call: dict[str, Any] = {"type": "function", "function": self.function.for_template()}
        return {"id": self.id, **call} if self.id else call


class ChatMessage(HistoryModel):
    """One message."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Any, WithJsonSchema(_CONTENT)] = Field(
        None, description="A string, or a list of parts of type 'text'. Only an assistant's content may be null."
    )
    name: str | None = None
    tool_calls: Annotated[list[MessageToolCall] | None, BeforeValidator(_absent)] = Field(
        None, description="Only in an assistant's message."
    )
    tool_call_id: str | None = Field(None, description="Only in a tool's message: the call that it answers.")
    function_call: Annotated[CalledFunction | None, BeforeValidator(_absent)] = Field(
        None, description="Deprecated: one of `tool_calls`."
    )
    refusal: Annotated[str | None, BeforeValidator(_absent)] = Field(
        None, description="Only in an assistant's message: its text where it has no content."
    )
    reasoning_content: str | None = Field(
        None, description="Extension. Only in an assistant's message, for templates that use it."
    )
    provider_specific_fields: Any = Field(None, description=NOTES)
    reasoning: str | None = Field(
        None, description="Extension. Another name of `reasoning_content`; it has precedence."
    )

    @property
    def calls(self) -> list[dict[str, Any]]:
        """The calls, in templates' form."""
        calls = [call.for_template() for call in self.tool_calls or ()]
        if self.function_call is not None:
            calls.append({"type": "function", "function": self.function_call.for_template()})
        return calls

    def for_template(self) -> dict[str, Any]:
        """The message for a template, in the names that templates know: they have no 'developer', OpenAI's newer name
        for 'system', and no 'function', its older one for 'tool'."""
        role = {"developer": "system", "function": "tool"}.get(self.role, self.role)
        message: dict[str, Any] = {"role": role, "content": self.refusal if self.content is None else self.content}
        if self.name:
            message["name"] = self.name
        if calls := self.calls:
            message["tool_calls"] = calls
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if reasoning := self.reasoning or self.reasoning_content:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return message


def for_template(messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """All messages for a template. A tool's message without a name gets that of the function which it answers, for the
    templates that write it."""
    names: dict[str, str] = {}
    written = []
    for message in messages:
        names |= {call.id: call.function.name for call in message.tool_calls or () if call.id}
        fields = message.for_template()
        if message.tool_call_id in names:
            fields.setdefault("name", names[message.tool_call_id])
        written.append(fields)
    return written


def check_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    return messages


def _check_message(param: str, message: ChatMessage) -> None:
    if message.role != "assistant":
        for key in ("reasoning", "reasoning_content", "refusal", "tool_calls", "function_call"):
            if getattr(message, key):
                raise _refusal(f"{param}.{key}", "is only for an assistant's message")
    if message.tool_call_id and message.role != "tool":
        raise _refusal(f"{param}.tool_call_id", "is only for a tool's message")
    if message.role == "tool" and message.tool_call_id is None:
        raise _refusal(f"{param}.tool_call_id", "is missing")
    _check_content(f"{param}.content", message)


def _check_content(param: str, message: ChatMessage) -> None:
    content = message.content
    if content is None and message.role != "assistant":
        raise _refusal(param, "is missing")
    if not isinstance(content, str | list | None):
        raise _refusal(param, "must be a string or a list of parts")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        _check_part(param, index, part, has_refusals=message.role == "assistant")


def _check_part(param: str, index: int, part: Any, *, has_refusals: bool) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _refusal(param, "has a part without a type")
    kind = part["type"]
    if kind not in _TEXT_KEYS or (kind == "refusal" and not has_refusals):
        raise _refusal(param, f"has a part of type {kind[:32]!r}; only 'text' is supported")
    if not isinstance(part.get(_TEXT_KEYS[kind]), str):
        raise _refusal(param, "has a part whose text is not a string")
    for key, value in part.items():
        is_known = key in ("type", _TEXT_KEYS[kind]) or (key in _CACHE_MARKS and isinstance(value, dict))
        if not is_known and not says_nothing(value):
            raise _refusal(f"{param}[{index}].{key[:64]}", "is not supported")


def _refusal(param: str, problem: str) -> RequestRejected:
    return RequestRejected(f"{param} {problem}", param=param)
