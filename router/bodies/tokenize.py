"""/tokenize and /detokenize, in vLLM's format: from a prompt or a chat to the model's token ids, and back."""

from __future__ import annotations

from typing import Any, ClassVar, Final

import orjson
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.bodies.served import ServedModel, check_name
from tensorweave.router.openai.field_types import Integers
from tensorweave.router.openai.messages import ChatMessage, check_messages, for_template
from tensorweave.router.openai.not_built import NotBuilt
from tensorweave.router.openai.parsing import ParsedRequest, describe_unbuilt_fields, parse_request
from tensorweave.router.openai.tools import MAX_TOOLS, ToolDefinition
from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.tokens import Tokenizer

_MAX_ANSWER_BYTES: Final = 16 << 20


def _describe_either(schema: dict[str, Any], model: type[BaseModel]) -> None:
    describe_unbuilt_fields(schema, model)
    kinds = {"prompt": "string", "messages": "array"}
    schema["oneOf"] = [{"required": [name], "properties": {name: {"type": kind}}} for name, kind in kinds.items()]


class TokenizeRequest(ParsedRequest):
    """POST /tokenize: a prompt, or the messages of a chat."""

    model_config = ConfigDict(json_schema_extra=_describe_either)

    OFF: ClassVar[NotBuilt] = {
        "chat_template": (),
    }

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool | None = Field(None, description="Default: true for a prompt, false for messages.")
    add_generation_prompt: bool | None = Field(None, description="Default true.")
    continue_final_message: bool | None = Field(None, description="The prompt ends within the last message.")
    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS)
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Passed to the chat template.")
    return_token_strs: bool | None = None

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage] | None) -> list[ChatMessage] | None:
        return None if messages is None else check_messages(messages)

    @model_validator(mode="after")
    def _check_either(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise RequestRejected("give either prompt or messages", param="prompt")
        return self


class DetokenizeRequest(ParsedRequest):
    """POST /detokenize."""

    model: str | None = None
    tokens: Integers


def tokenize(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> bytes:
    """The answer of /tokenize. Raises RequestRejected."""
    asked = parse_request(TokenizeRequest, body)
    if asked.model is not None:
        check_name(served.model_names, asked.model)
    if asked.messages is None:
        assert asked.prompt is not None
        ids = tokenizer.encode(asked.prompt, add_special_tokens=asked.add_special_tokens is not False)
    else:
        ids = tokenizer.chat(
            ChatPrompt(
                for_template(asked.messages),
                tools=[tool.for_template() for tool in asked.tools or ()],
                adds_generation_prompt=asked.add_generation_prompt is not False and not asked.continue_final_message,
                continues_last=bool(asked.continue_final_message),
                arguments=asked.chat_template_kwargs or {},
            ),
            add_special_tokens=bool(asked.add_special_tokens),
        )
    names = tokenizer.token_names(ids) if asked.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": served.info.max_seq_len, "tokens": ids, "token_strs": names}
    return _bounded(orjson.dumps(answer))


def detokenize(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> bytes:
    """The answer of /detokenize. Raises RequestRejected."""
    asked = parse_request(DetokenizeRequest, body)
    if asked.model is not None:
        check_name(served.model_names, asked.model)
    vocab_size = served.info.vocab_size
    for token_id in asked.tokens:
        if not 0 <= token_id < vocab_size:
            raise RequestRejected(f"tokens has {token_id}, outside 0 to {vocab_size - 1}", param="tokens")
    return _bounded(orjson.dumps({"prompt": tokenizer.decode(asked.tokens, skip_special_tokens=False)}))


def _bounded(answer: bytes) -> bytes:
    if len(answer) > _MAX_ANSWER_BYTES:
        raise RequestRejected(f"the answer would have {len(answer)} bytes; the limit is {_MAX_ANSWER_BYTES}")
    return answer
