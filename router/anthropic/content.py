"""The messages of Anthropic's API: their content blocks, and their translation to messages of a chat."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Final, Literal

import orjson
from pydantic import BeforeValidator, ConfigDict, Field

from tensorweave.router.openai.history import HistoryModel

_ERROR_MARK: Final = "Error: "


def _as_blocks(content: Any) -> Any:
    """A text stands for one block."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


class Block(HistoryModel):
    """A content block. Marks for prompt caches are accepted, and our cache does not need them."""

    cache_control: dict[str, Any] | None = None


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = Field(None, max_length=0)


Texts = Annotated[list[TextBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[TextBlock])]


class ThinkingBlock(Block):
    """Reasoning of an earlier answer. Its signature is not checked."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class ToolUseBlock(Block):
    type: Literal["tool_use"]
    id: str = Field(min_length=1)
    name: str = Field(min_length=1)
    input: dict[str, Any]
    caller: dict[str, Any] | None = None

    def as_call(self) -> dict[str, Any]:
        function = {"name": self.name, "arguments": orjson.dumps(self.input).decode()}
        return {"id": self.id, "type": "function", "function": function}


class ToolResultBlock(Block):
    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1)
    content: Texts | None = None
    is_error: bool | None = Field(None, description="True: the result is given to the model after 'Error: '.")

    def as_message(self) -> dict[str, Any]:
        text = joined(self.content or ())
        return {
            "role": "tool",
            "tool_call_id": self.tool_use_id,
            "content": _ERROR_MARK + text if self.is_error else text,
        }


UserBlock = Annotated[TextBlock | ToolResultBlock, Field(discriminator="type")]
UserBlocks = Annotated[list[UserBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[UserBlock])]
AssistantBlock = Annotated[TextBlock | ThinkingBlock | ToolUseBlock, Field(discriminator="type")]
AssistantBlocks = Annotated[
    list[AssistantBlock], BeforeValidator(_as_blocks, json_schema_input_type=str | list[AssistantBlock])
]


class SystemMessage(HistoryModel):
    model_config = ConfigDict(title="AnthropicSystemMessage")

    role: Literal["system"]
    content: Texts

    def translated(self) -> Iterator[dict[str, Any]]:
        yield {"role": "system", "content": joined(self.content)}


class UserMessage(HistoryModel):
    model_config = ConfigDict(title="AnthropicUserMessage")

    role: Literal["user"]
    content: UserBlocks

    def translated(self) -> Iterator[dict[str, Any]]:
        """Results of tools are messages of their own, in the order in which they stand."""
        texts: list[str] = []
        for block in self.content:
            if isinstance(block, TextBlock):
                texts.append(block.text)
                continue
            yield from _user(texts)
            texts = []
            yield block.as_message()
        yield from _user(texts)


class AssistantMessage(HistoryModel):
    model_config = ConfigDict(title="AnthropicAssistantMessage")

    role: Literal["assistant"]
    content: AssistantBlocks

    def translated(self) -> Iterator[dict[str, Any]]:
        texts = [block.text for block in self.content if isinstance(block, TextBlock)]
        message: dict[str, Any] = {"role": "assistant", "content": "\n".join(texts) if texts else None}
        if calls := [block.as_call() for block in self.content if isinstance(block, ToolUseBlock)]:
            message["tool_calls"] = calls
        if thoughts := [block.thinking for block in self.content if isinstance(block, ThinkingBlock)]:
            message["reasoning"] = "\n".join(thoughts)
        yield message


Message = Annotated[UserMessage | AssistantMessage | SystemMessage, Field(discriminator="role")]


def joined(blocks: Sequence[TextBlock]) -> str:
    return "\n".join([block.text for block in blocks])


def _user(texts: Sequence[str]) -> Iterator[dict[str, Any]]:
    if texts:
        yield {"role": "user", "content": "\n".join(texts)}
