"""The request body of /v1/responses, and its translation to a chat. Nothing is stored: a conversation is sent whole."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.router.openai.field_types import AtLeast1, Seed
from tensorweave.router.openai.not_built import NotBuilt
from tensorweave.router.openai.parsing import Strict
from tensorweave.router.openai.service_fields import NO_CHANGE, ServiceFields, ServiceName
from tensorweave.router.openai.tools import FUNCTION_NAME, MAX_TOOLS, FunctionName, Schema
from tensorweave.router.responses.items import InputItem, messages_of

NOT_BUILT: Final[NotBuilt] = {
    "access_programs": ([],),
    "background": (False,),
    "background_options": (),
    "context_management": ([],),
    "conversation": (),
    "image": (),
    "moderation": (),
    "previous_response_id": (),
    "prompt": (),
    "top_logprobs": (0,),
    "truncation": ("disabled",),
}

Fields = dict[str, Any]

_FUNCTION: Final = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "name": {"type": "string", "pattern": FUNCTION_NAME}},
    "required": ["type", "name"],
    "additionalProperties": False,
}
_ALLOWED: Final = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "mode": {"enum": ["auto", "required"]},
        "tools": {"type": "array", "items": _FUNCTION, "minItems": 1},
    },
    "required": ["type", "mode", "tools"],
    "additionalProperties": False,
}
ToolChoiceField = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _FUNCTION, _ALLOWED]})
]


def _as_items(given: Any) -> Any:
    """A text stands for one message of the user."""
    return [{"role": "user", "content": given}] if isinstance(given, str) else given


class ResponseTool(Strict):
    """A function. OpenAI's own tools are refused."""

    type: Literal["function"]
    name: FunctionName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = Field(None, description="Calls follow `parameters`, also if the model may choose to call.")

    def translated(self) -> Fields:
        return {"type": "function", "function": self.model_dump(exclude={"type"}, exclude_none=True)}


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    description: str | None = None
    schema_: Schema | None = Field(None, alias="schema")
    strict: bool | None = None

    def translated(self) -> Fields:
        if self.type != "json_schema":
            return {"type": self.type}
        if self.schema_ is None or self.name is None:
            raise RequestRejected("text.format: a json_schema has a name and a schema", param="text.format")
        schema = {"name": self.name, "schema": self.schema_, "description": self.description, "strict": self.strict}
        return {
            "type": "json_schema",
            "json_schema": {key: value for key, value in schema.items() if value is not None},
        }


class TextConfig(Strict):
    format: TextFormat | None = None
    verbosity: ServiceName | None = Field(None, description=NO_CHANGE)


class ReasoningConfig(Strict):
    effort: ServiceName | None = Field(None, description="Passed to the chat template; 'none' switches reasoning off.")
    summary: Literal["auto", "concise", "detailed"] | None = Field(
        None, description="The reasoning comes as the summary, whole, instead of as content."
    )
    generate_summary: Literal["auto", "concise", "detailed"] | None = Field(None, description="Deprecated: `summary`.")
    context: ServiceName | None = Field(None, description=NO_CHANGE)


class ResponseStreamOptions(Strict):
    include_obfuscation: bool | None = Field(None, description="Accepted; events are never padded.")


class ResponsesRequest(ServiceFields):
    """POST /v1/responses. `store` has no effect: nothing is stored, and answers say so."""

    OFF: ClassVar[NotBuilt] = NOT_BUILT

    model: str
    input: Annotated[
        list[InputItem], Field(min_length=1), BeforeValidator(_as_items, json_schema_input_type=str | list[InputItem])
    ]
    instructions: str | None = Field(None, description="The system message.")
    max_output_tokens: AtLeast1 | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)] | None = None
    seed: Seed | None = Field(None, description="Extension.")
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    tools: list[ResponseTool] | None = Field(None, max_length=MAX_TOOLS)
    tool_choice: ToolChoiceField = Field(None, description="Default: 'auto' if there are tools.")
    parallel_tool_calls: bool | None = None
    max_tool_calls: AtLeast1 | None = Field(None, description="Accepted; it bounds OpenAI's own tools.")
    text: TextConfig | None = None
    reasoning: ReasoningConfig | None = None
    include: list[Literal["reasoning.encrypted_content"]] | None = Field(
        None, description="Accepted; reasoning is not encrypted."
    )
    user: str | None = Field(None, description="Requests of one user go to one gang where that costs nothing.")
    prompt_cache_key: str | None = Field(None, description="As `user`, which it overrides.")

    @property
    def has_summary(self) -> bool:
        return self.reasoning is not None and bool(self.reasoning.summary or self.reasoning.generate_summary)

    def translated(self) -> Fields:
        """The fields of a `ChatCompletionRequest`."""
        fields: Fields = {
            "model": self.model,
            "messages": messages_of(self.instructions, self.input),
            "max_completion_tokens": self.max_output_tokens,
            "tools": [tool.translated() for tool in self.tools] if self.tools else None,
            "tool_choice": _translated_choice(self.tool_choice),
            "reasoning_effort": self.reasoning and self.reasoning.effort,
        }
        for name in ("temperature", "top_p", "seed", "stream", "parallel_tool_calls", "user", "prompt_cache_key"):
            fields[name] = getattr(self, name)
        if self.text is not None and self.text.format is not None and self.text.format.type != "text":
            fields["response_format"] = self.text.format.translated()
        return {name: value for name, value in fields.items() if value is not None}

    def repeated(self, spec: SamplingSpec) -> Fields:
        """What the answer repeats of the request, as it was understood. `spec`: how it is sampled."""
        text = self.text or TextConfig()
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "max_tool_calls": self.max_tool_calls,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "prompt_cache_key": self.prompt_cache_key,
            "reasoning": {
                "effort": self.reasoning and self.reasoning.effort,
                "summary": self.reasoning and (self.reasoning.summary or self.reasoning.generate_summary),
            },
            "safety_identifier": self.safety_identifier,
            "temperature": spec.temperature,
            "text": {
                "format": {"type": "text"}
                if text.format is None
                else text.format.model_dump(by_alias=True, exclude_none=True),
                **({"verbosity": text.verbosity} if text.verbosity else {}),
            },
            "tool_choice": self.tool_choice or "auto",
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "top_p": spec.top_p,
            "user": self.user,
        }


def _translated_choice(choice: Any) -> Any:
    match choice:
        case {"type": "function", "name": str(name), **others} if not others:
            return {"type": "function", "function": {"name": name}}
        case {"type": "allowed_tools", "mode": mode, "tools": list(allowed), **others} if not others:
            tools = [_translated_choice(one) for one in allowed]
            return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": tools}}
    return choice


FIELD_NAMES: Final[Mapping[str, str]] = {
    "max_completion_tokens": "max_output_tokens",
    "messages": "input",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""The names of this API for fields of a chat, in errors."""
