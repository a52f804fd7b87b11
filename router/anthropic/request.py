"""The request bodies of /v1/messages and /v1/messages/count_tokens, and their translation to a chat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import Field, model_validator

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.anthropic.content import AssistantMessage, Message, Texts, joined
from tensorweave.router.openai.field_types import AtLeast1, Seed
from tensorweave.router.openai.not_built import NotBuilt
from tensorweave.router.openai.parsing import ParsedRequest, Strict
from tensorweave.router.openai.service_fields import NO_CHANGE, ServiceName
from tensorweave.router.openai.tools import MAX_TOOLS, FunctionName, Schema
from tensorweave.router.sampling.checks import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS

NOT_BUILT: Final[NotBuilt] = {
    "billing_policy": (),
    "compaction": (),
    "container": (),
    "diagnostics": (),
    "fallback_credit_token": (),
    "fallbacks": ([],),
    "mcp_servers": ([],),
    "thread": (),
    "user_profile_id": (),
    "workspace_id": (),
}

Fields = dict[str, Any]


class Tool(Strict):
    """A tool of the client. Anthropic's own tools are refused."""

    type: Literal["custom"] | None = None
    name: FunctionName
    description: str | None = None
    input_schema: Schema
    strict: bool | None = Field(None, description="Calls follow `input_schema`, also if the model may choose to call.")
    cache_control: dict[str, Any] | None = Field(None, description=NO_CHANGE)
    eager_input_streaming: bool | None = Field(None, description=NO_CHANGE)
    defer_loading: Literal[False] | None = None
    allowed_callers: list[Literal["direct"]] | None = None
    input_examples: list[Schema] | None = Field(None, max_length=0)

    def translated(self) -> Fields:
        function: Fields = {"name": self.name, "parameters": self.input_schema}
        if self.description is not None:
            function["description"] = self.description
        if self.strict is not None:
            function["strict"] = self.strict
        return {"type": "function", "function": function}


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: FunctionName | None = Field(None, description="With type 'tool'.")
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _check_name(self) -> ToolChoice:
        if (self.type == "tool") != (self.name is not None):
            raise RequestRejected("tool_choice: a name belongs to the type 'tool'", param="tool_choice.name")
        return self

    def translated(self) -> Any:
        if self.name is not None:
            return {"type": "function", "function": {"name": self.name}}
        return "required" if self.type == "any" else self.type


class Thinking(Strict):
    """Whether the model reasons first."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: AtLeast1 | None = Field(
        None, description="At most so many tokens of reasoning, if the model's form of reasoning is known."
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="'omitted': there are no thinking blocks. Otherwise they have the whole reasoning."
    )


class OutputFormat(Strict):
    type: Literal["json_schema"]
    schema_: Schema = Field(alias="schema")


class OutputConfig(Strict):
    effort: ServiceName | None = Field(None, description="Passed to the chat template, unless thinking is off.")
    format: OutputFormat | None = Field(None, description="The text of the answer is JSON of this schema.")


class Metadata(Strict):
    user_id: str | None = Field(None, description="Requests of one user go to one gang where that costs nothing.")


class ContextEdits(Strict):
    """Edits of the context that keep all of it."""

    class Edit(Strict):
        type: Literal["clear_thinking_20251015"]
        keep: Literal["all"]

    edits: list[Edit] | None = None


class PromptBody(ParsedRequest):
    """What decides a prompt: the fields of both bodies."""

    OFF: ClassVar[NotBuilt] = NOT_BUILT

    model: str
    messages: list[Message] = Field(min_length=1)
    system: Texts | None = None
    tools: list[Tool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="Default: disabled, for models that can reason or not.")
    output_config: OutputConfig | None = None
    cache_control: dict[str, Any] | None = Field(None, description=NO_CHANGE)
    context_management: ContextEdits | None = Field(None, description="Accepted if it changes nothing.")
    speed: ServiceName | None = Field(None, description=NO_CHANGE)

    @property
    def is_thinking(self) -> bool:
        return self.thinking is not None and self.thinking.type != "disabled"

    def translated(self) -> Fields:
        """The fields of a `ChatCompletionRequest`."""
        messages = [fields for message in self.messages for fields in message.translated()]
        if self.system:
            messages.insert(0, {"role": "system", "content": joined(self.system)})
        fields: Fields = {"model": self.model, "messages": messages, **self._reasoning()}
        if isinstance(self.messages[-1], AssistantMessage):
            fields["continue_final_message"] = True
        if self.tools:
            fields["tools"] = [tool.translated() for tool in self.tools]
        if (choice := self.tool_choice) is not None:
            fields["tool_choice"] = choice.translated()
            fields["parallel_tool_calls"] = not choice.disable_parallel_tool_use
        if self.output_config is not None and self.output_config.format is not None:
            schema = {"name": "output", "schema": self.output_config.format.schema_, "strict": True}
            fields["response_format"] = {"type": "json_schema", "json_schema": schema}
        return fields

    @property
    def thinking_budget(self) -> int | None:
        return self.thinking.budget_tokens if self.thinking is not None and self.is_thinking else None

    def _reasoning(self) -> Fields:
        if self.thinking is None or not self.is_thinking:
            return {"reasoning_effort": "none"}
        fields: Fields = {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}}
        if self.output_config is not None and self.output_config.effort is not None:
            fields["reasoning_effort"] = self.output_config.effort
        if self.thinking.display == "omitted":
            fields["include_reasoning"] = False
        return fields


class CountTokensRequest(PromptBody):
    """POST /v1/messages/count_tokens."""


class MessagesRequest(PromptBody):
    """POST /v1/messages."""

    max_tokens: AtLeast1
    stop_sequences: list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_STRING_CHARS)]] | None = Field(
        None, max_length=MAX_STOP_STRINGS
    )
    stream: bool | None = None
    temperature: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    top_k: Annotated[int, Field(ge=0, le=2**31 - 1)] | None = None
    seed: Seed | None = Field(None, description="Extension.")
    metadata: Metadata | None = None
    service_tier: ServiceName | None = Field(None, description=NO_CHANGE)
    inference_geo: ServiceName | None = Field(None, description=NO_CHANGE)

    def translated(self) -> Fields:
        fields = super().translated()
        fields |= {"max_completion_tokens": self.max_tokens, "stop": self.stop_sequences}
        for name in ("stream", "temperature", "top_p", "top_k", "seed"):
            fields[name] = getattr(self, name)
        if self.metadata is not None:
            fields["user"] = self.metadata.user_id
        return {name: value for name, value in fields.items() if value is not None}


FIELD_NAMES: Final[Mapping[str, str]] = {
    "max_completion_tokens": "max_tokens",
    "stop": "stop_sequences",
    "response_format": "output_config.format",
    "reasoning_effort": "thinking",
    "chat_template_kwargs": "thinking",
    "thinking_token_budget": "thinking.budget_tokens",
    "function.parameters": "input_schema",
}
"""The names of this API for fields of a chat, in errors."""
