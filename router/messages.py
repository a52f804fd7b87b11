"""The messages of a chat: which roles and parts there are, and what a template is given of them."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema

from tensorweave.cluster.errors import RequestRejected

_TEXT_PART: Final = {
    "type": "object",
    "properties": {"type": {"const": "text"}, "text": {"type": "string"}},
    "required": ["type", "text"],
}
_CONTENT: Final = {"anyOf": [{"type": "string"}, {"type": "array", "items": _TEXT_PART}, {"type": "null"}]}


class ChatMessage(BaseModel):
    """One message. Keys beyond these are those that OpenAI's own answers carry, at null or empty."""

    model_config = ConfigDict(strict=True, extra="allow", hide_input_in_errors=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[Any, WithJsonSchema(_CONTENT)] = Field(
        None, description="A string, or a list of parts of type 'text'. Only an assistant's may be null."
    )
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """Templates know no 'developer': it is OpenAI's newer name for 'system'."""
        message = {"role": "system" if self.role == "developer" else self.role, "content": self.content}
        return message if self.name is None else {**message, "name": self.name}


def check_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    for index, message in enumerate(messages):
        _check_message(index, message)
    return messages


def _check_message(index: int, message: ChatMessage) -> None:
    param = f"messages[{index}]"
    for key, value in (message.model_extra or {}).items():
        if value not in (None, [], {}):
            raise RequestRejected(f"{param}.{key[:64]} is not supported", param=f"{param}.{key[:64]}")
    content = message.content
    if content is None and message.role != "assistant":
        raise RequestRejected(f"{param}.content is missing", param=f"{param}.content")
    if not isinstance(content, str | list | None):
        raise RequestRejected(f"{param}.content must be a string or a list of parts", param=f"{param}.content")
    for part in content if isinstance(content, list) else ():
        if not isinstance(part, dict) or not isinstance(part.get("type"), str):
            raise RequestRejected(f"{param}.content has a part without a type", param=f"{param}.content")
        if part["type"] != "text":
            raise RequestRejected(
                f"{param}.content has a part of type {part['type'][:32]!r}; only 'text' is supported",
                param=f"{param}.content",
            )
        if not isinstance(part.get("text"), str):
            raise RequestRejected(f"{param}.content has a part whose text is not a string", param=f"{param}.content")
