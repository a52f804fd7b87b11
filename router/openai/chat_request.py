"""The request body of /v1/chat/completions. It is also the internal form of a chat: what /v1/messages and /v1/responses
take is translated to it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, ClassVar, Final, Self

import orjson
from pydantic import Field, field_validator, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.openai.field_types import AtLeast1, Integers, NumLogprobs
from tensorweave.router.openai.generate_body import GenerateBody
from tensorweave.router.openai.messages import ChatMessage, check_messages, for_template
from tensorweave.router.openai.not_built import IN_CHATS, NotBuilt
from tensorweave.router.openai.service_fields import NO_CHANGE, ServiceName
from tensorweave.router.openai.tools import (
    MAX_TOOLS,
    FunctionCallField,
    FunctionDefinition,
    ToolChoiceField,
    ToolDefinition,
    ToolUse,
    legacy_tool_use,
    tool_use,
)
from tensorweave.router.text.chat_template import ChatPrompt
from tensorweave.router.text.choices import Telling

_MAX_TOOLS_BYTES: Final = 1 << 20
_MAX_TEMPLATE_CHARS: Final = 64 << 10


class ChatCompletionRequest(GenerateBody):
    """POST /v1/chat/completions."""

    OFF: ClassVar[NotBuilt] = IN_CHATS

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: AtLeast1 | None = Field(None, description="As `max_tokens`, which it overrides.")
    logprobs: bool | None = Field(None, description="Return each token's log-probability.")
    top_logprobs: NumLogprobs | None = Field(None, description="Return those of so many of the likeliest tokens, too.")
    tools: list[ToolDefinition] | None = Field(None, max_length=MAX_TOOLS, description="Functions to call.")
    tool_choice: ToolChoiceField = Field(None, description="Default: 'auto' if there are tools.")
    parallel_tool_calls: bool | None = Field(None, description="Default true: an answer may have several calls.")
    functions: list[FunctionDefinition] | None = Field(None, max_length=MAX_TOOLS, description="Deprecated: `tools`.")
    function_call: FunctionCallField = Field(None, description="Deprecated: `tool_choice`.")
    reasoning_effort: ServiceName | None = Field(
        None, description="Passed to the chat template; 'none' switches reasoning off."
    )
    include_reasoning: bool | None = Field(None, description="Extension. False: the answer has no reasoning.")
    separate_reasoning: bool | None = Field(
        None, description="Extension. False: the reasoning is in the content, as the model wrote it."
    )
    thinking_token_budget: AtLeast1 | None = Field(
        None, description="Extension. At most so many tokens of reasoning; then its end is forced."
    )
    add_generation_prompt: bool | None = Field(None, description="Extension. Default true.")
    continue_final_message: bool | None = Field(
        None, description="Extension. The answer continues the last message, an assistant's."
    )
    prompt_token_ids: Integers | None = Field(
        None, min_length=1, description="Extension. Instead of the rendered messages."
    )
    chat_template: str | None = Field(
        None,
        min_length=1,
        max_length=_MAX_TEMPLATE_CHARS,
        description="Extension. Instead of the model's own, where security.enable_request_chat_template is on.",
    )
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="Extension. Passed to the chat template.")
    prediction: dict[str, Any] | None = Field(None, description=NO_CHANGE)
    verbosity: ServiceName | None = Field(None, description=NO_CHANGE)

    @field_validator("messages")
    @classmethod
    def _check_messages(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        return check_messages(messages)

    @model_validator(mode="after")
    def _check_top_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise RequestRejected("top_logprobs needs logprobs: true", param="top_logprobs")
        return self

    @model_validator(mode="after")
    def _check_continuation(self) -> ChatCompletionRequest:
        if self.continue_final_message:
            if self.add_generation_prompt:
                raise RequestRejected(
                    "continue_final_message and add_generation_prompt exclude each other",
                    param="continue_final_message",
                )
            if self.messages[-1].role != "assistant" and self.prompt_token_ids is None:
                raise RequestRejected(
                    "continue_final_message needs a last message of role 'assistant'", param="continue_final_message"
                )
        return self

    @model_validator(mode="after")
    def _check_tools(self) -> ChatCompletionRequest:
        if (self.functions or self.function_call) and (self.tools or self.tool_choice):
            raise RequestRejected("functions are deprecated names of tools: give one of both", param="functions")
        _ = self.tool_use
        return self

    def check_size_of_tools(self) -> None:
        """They are read a second time, by the event loop. Raises RequestRejected."""
        for name, given in (("tools", self.tools), ("functions", self.functions)):
            size = len(orjson.dumps([one.model_dump() for one in given or ()]))
            if size > _MAX_TOOLS_BYTES:
                raise RequestRejected(f"{name} have {size} bytes; the limit is {_MAX_TOOLS_BYTES}", param=name)

    @cached_property
    def tool_use(self) -> ToolUse:
        if self.functions or self.function_call:
            return legacy_tool_use(self.functions, self.function_call)
        return tool_use(self.tools, self.tool_choice, is_parallel=self.parallel_tool_calls is not False)

    @property
    def chat_prompt(self) -> ChatPrompt:
        continues = bool(self.continue_final_message)
        return ChatPrompt(
            for_template(self.messages),
            tools=self.tool_use.for_template(),
            adds_generation_prompt=self.add_generation_prompt is not False and not continues,
            continues_last=continues,
            template=self.chat_template,
            arguments=self.template_kwargs,
        )

    @property
    def template_kwargs(self) -> dict[str, Any]:
        """What the template gets beside the messages. `reasoning_effort` speaks to templates in the names under which
        they know it; `chat_template_kwargs` has precedence."""
        effort = self.reasoning_effort
        known: dict[str, Any] = {}
        if effort is not None:
            known = dict.fromkeys(("enable_thinking", "thinking"), effort != "none")
            if effort != "none":
                known["reasoning_effort"] = effort
        return {**known, **(self.chat_template_kwargs or {})}

    @property
    def asked_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def field_names(self) -> Mapping[str, str]:
        max_tokens = "max_tokens" if self.max_completion_tokens is None else "max_completion_tokens"
        return {**super().field_names, "logprobs": "top_logprobs", "max_tokens": max_tokens}

    @property
    def prompt_param(self) -> str:
        return "messages" if self.prompt_token_ids is None else "prompt_token_ids"

    def without_bulk(self) -> Self:
        token_ids = None if self.prompt_token_ids is None else [0]
        short: dict[str, Any] = {
            "messages": [ChatMessage(role="assistant", content="")],
            "prompt_token_ids": token_ids,
            "chat_template": None,
            "chat_template_kwargs": None,
            "prediction": None,
        }
        if self.tools:
            short["tools"] = [tool.without_bulk() for tool in self.tools]
        if self.functions:
            short["functions"] = [function.without_bulk() for function in self.functions]
        return super().without_bulk().model_copy(update=short)

    @property
    def given_token_ids(self) -> tuple[str, bool]:
        return "prompt_token_ids", self.prompt_token_ids is not None

    @property
    def telling(self) -> Telling:
        return Telling(
            num_logprobs=(self.top_logprobs or 0) if self.logprobs else None,
            num_prompt_logprobs=self.prompt_logprobs,
            has_token_ids=bool(self.return_token_ids),
        )
