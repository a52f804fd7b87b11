"""The messages of a chat: their roles and parts, and their form for chat templates."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from tensorweave.cluster.errors import RequestRejected

# Marks for prompt caches, which our cache does not need.
_CACHE_MARKS: Final = ("cache_control", "prompt_cache_breakpoint")
_MARK: Final = {"anyOf": [{"type": "object"}, {"type": "null"}]}
_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}, **dict.fromkeys(_CACHE_MARKS, _MARK)},
    "required": ["type", "text"],
    "additionalProperties": False,
}
_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}


class ChatMessage(BaseModel):
    """One message. Other keys are accepted if they are null or empty: answers that are sent back as history have many
    of them."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, WithJsonSchema(_CONTENT)] = Field(
        None, description="A string, or a list of parts of type 'text'. Only an assistant's content may be null."
    )
    name: str | None = None
    reasoning_content: str | None = Field(
        None, description="Extension. Only in an assistant's message, for templates that use it."
    )
    reasoning: str | None = Field(
        None, description="Extension. Another name of `reasoning_content`; it has precedence."
    )

    def for_template(self) -> dict[str, Any]:
        """The message for a template. Templates do not know 'developer', OpenAI's newer name for 'system'."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        if self.name:
            message["name"] = self.name
        if reasoning := self.reasoning or self.reasoning_content:
            message |= {"reasoning": reasoning, "reasoning_content": reasoning}
        return message


def check_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    for index, message in enumerate(messages):
        _check_message(f"messages[{index}]", message)
    return messages


def says_nothing(value: Any) -> bool:
    """Whether it is null, empty, or an object of such values. It may be nested deeply, so there is no recursion."""
    values = [value]
    while values:
        value = values.pop()
        if isinstance(value, dict):
            values.extend(value.values())
        elif value is not None and value != "" and value != []:
            return False
    return True


def _check_message(param: str, message: ChatMessage) -> None:
    for key, value in (message.model_extra or {}).items():
        if not says_nothing(value):
            raise _refusal(f"{param}.{key[:64]}", "is not supported")
    for key, text in (("reasoning", message.reasoning), ("reasoning_content", message.reasoning_content)):
        if text and message.role != "assistant":
            raise _refusal(f"{param}.{key}", "is only for an assistant's message")
    content = message.content
    if content is None and message.role != "assistant":
        raise _refusal(f"{param}.content", "is missing")
    if not isinstance(content, str | list | None):
        raise _refusal(f"{param}.content", "must be a string or a list of parts")
    for index, part in enumerate(content if isinstance(content, list) else ()):
        _check_part(f"{param}.content", index, part)


def _check_part(param: str, index: int, part: Any) -> None:
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        raise _refusal(param, "has a part without a type")
    if part["type"] != "text":
        raise _refusal(param, f"has a part of type {part['type'][:32]!r}; only 'text' is supported")
    if not isinstance(part.get("text"), str):
        raise _refusal(param, "has a part whose text is not a string")
    for key, value in part.items():
        is_known = key in ("type", "text") or (key in _CACHE_MARKS and isinstance(value, dict))
        if not is_known and not says_nothing(value):
            raise _refusal(f"{param}[{index}].{key[:64]}", "is not supported")


def _refusal(param: str, problem: str) -> RequestRejected:
    return RequestRejected(f"{param} {problem}", param=param)
