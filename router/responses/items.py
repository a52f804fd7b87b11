"""The input items of /v1/responses, and their translation to messages of a chat."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag

from tensorweave.router.openai.history import HistoryModel

_ITEM_KINDS: Final = ("message", "function_call", "function_call_output", "reasoning")


def _as_parts(content: Any) -> Any:
    """A text stands for one part."""
    return [{"type": "input_text", "text": content}] if isinstance(content, str) else content


class InputText(HistoryModel):
    type: Literal["input_text"]
    text: str
    prompt_cache_breakpoint: dict[str, Any] | None = None


class OutputText(HistoryModel):
    """A text of an earlier answer."""

    type: Literal["output_text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class RefusalPart(HistoryModel):
    type: Literal["refusal"]
    refusal: str

    @property
    def text(self) -> str:
        return self.refusal


class ReasoningPart(HistoryModel):
    type: Literal["reasoning_text", "summary_text"]
    text: str


Part = Annotated[InputText | OutputText | RefusalPart, Field(discriminator="type")]
Parts = Annotated[list[Part], BeforeValidator(_as_parts, json_schema_input_type=str | list[Part])]
Texts = Annotated[list[InputText], BeforeValidator(_as_parts, json_schema_input_type=str | list[InputText])]


class Item(HistoryModel):
    """What items of earlier answers have: neither is read."""

    id: str | None = None
    status: str | None = None


class MessageItem(Item):
    type: Literal["message"] | None = None
    role: Literal["user", "assistant", "system", "developer"]
    content: Parts
    phase: str | None = None

    @property
    def text(self) -> str:
        return joined(self.content)


class CallItem(Item):
    type: Literal["function_call"]
    call_id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    arguments: str

    def as_call(self) -> dict[str, Any]:
        return {"id": self.call_id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


class CallOutputItem(Item):
    type: Literal["function_call_output"]
    call_id: str = Field(min_length=1)
    output: Texts


class ReasoningItem(Item):
    """Reasoning of an earlier answer; its content is read, or else its summary."""

    type: Literal["reasoning"]
    summary: list[ReasoningPart] | None = None
    content: list[ReasoningPart] | None = None
    encrypted_content: str | None = Field(None, description="Accepted; it is not read.")

    @property
    def text(self) -> str:
        return joined(self.content or self.summary or ())


def _kind(item: Any) -> str:
    """A message needs no type. Other unknown types are named by the error."""
    kind = item.get("type") if isinstance(item, dict) else getattr(item, "type", None)
    return "message" if kind is None else str(kind)[:64]


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[CallItem, Tag("function_call")]
    | Annotated[CallOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(
        _kind,
        custom_error_type="item_type",
        custom_error_message=f"is an item of a type that is not supported; these are: {', '.join(_ITEM_KINDS)}",
    ),
]


def joined(parts: Iterable[InputText | OutputText | RefusalPart | ReasoningPart]) -> str:
    return "\n".join([part.text for part in parts])


def messages_of(instructions: str | None, items: Sequence[InputItem]) -> list[dict[str, Any]]:
    """The messages of a chat. Reasoning, text and calls that follow each other are one assistant's message, and system
    messages at the beginning one system message: some templates know no second one."""
    conversation = _Conversation()
    if instructions:
        conversation.add_system(instructions)
    for item in items:
        conversation.add(item)
    return conversation.messages


class _Conversation:
    def __init__(self) -> None:
        self.messages: list[dict[str, Any]] = []

    def add(self, item: InputItem) -> None:
        match item:
            case MessageItem(role="assistant"):
                self._assistant(lacks=("content", "tool_calls"))["content"] = item.text
            case MessageItem(role="user"):
                self.messages.append({"role": "user", "content": item.text})
            case MessageItem():
                self.add_system(item.text)
            case CallItem():
                self._assistant(lacks=()).setdefault("tool_calls", []).append(item.as_call())
            case CallOutputItem():
                self.messages.append({"role": "tool", "tool_call_id": item.call_id, "content": joined(item.output)})
            case ReasoningItem():
                self._assistant(lacks=("content", "tool_calls", "reasoning"))["reasoning"] = item.text

    def add_system(self, text: str) -> None:
        if self.messages and all(message["role"] == "system" for message in self.messages):
            self.messages[-1]["content"] += f"\n\n{text}"
        else:
            self.messages.append({"role": "system", "content": text})

    def _assistant(self, lacks: Sequence[str]) -> dict[str, Any]:
        """The last message if it is an assistant's and has none of these fields, else a new one."""
        last = self.messages[-1] if self.messages else None
        if last is None or last["role"] != "assistant" or any(name in last for name in lacks):
            last = {"role": "assistant"}
            self.messages.append(last)
        return last
