"""The tools of a chat as OpenAI writes them: `tools`, `tool_choice`, and the deprecated `functions` and
`function_call`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import Field, WithJsonSchema

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice
from tensorweave.router.openai.parsing import Strict

MAX_TOOLS: Final = 512
FUNCTION_NAME: Final = r"^[A-Za-z0-9_.-]{1,128}$"

FunctionName = Annotated[str, Field(pattern=FUNCTION_NAME)]
Schema = dict[str, Any]

_NAMED: Final = {
    "type": "object",
    "properties": {"name": {"type": "string", "pattern": FUNCTION_NAME}},
    "required": ["name"],
    "additionalProperties": False,
}
_FUNCTION: Final = {
    "type": "object",
    "properties": {"type": {"const": "function"}, "function": _NAMED},
    "required": ["type", "function"],
    "additionalProperties": False,
}
_ALLOWED: Final = {
    "type": "object",
    "properties": {
        "type": {"const": "allowed_tools"},
        "allowed_tools": {
            "type": "object",
            "properties": {
                "mode": {"enum": ["auto", "required"]},
                "tools": {"type": "array", "items": _FUNCTION, "minItems": 1},
            },
            "required": ["mode", "tools"],
            "additionalProperties": False,
        },
    },
    "required": ["type", "allowed_tools"],
    "additionalProperties": False,
}
ToolChoiceField = Annotated[
    Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", "required", None]}, _FUNCTION, _ALLOWED]})
]
FunctionCallField = Annotated[Any, WithJsonSchema({"anyOf": [{"enum": ["none", "auto", None]}, _NAMED]})]


class FunctionDefinition(Strict):
    """A function that the model may call."""

    name: FunctionName
    description: str | None = None
    parameters: Schema | None = Field(None, description="The JSON schema of its arguments; without one, any object.")
    strict: bool | None = Field(None, description="Calls follow `parameters`, also if the model may choose to call.")

    def without_bulk(self) -> FunctionDefinition:
        """What the answer's parser needs."""
        return FunctionDefinition(name=self.name, parameters=self.parameters)


class ToolDefinition(Strict):
    """A tool. Only functions are supported."""

    type: Literal["function"]
    function: FunctionDefinition
    cache_control: dict[str, Any] | None = Field(None, description="Accepted, as in messages.")

    @property
    def name(self) -> str:
        return self.function.name

    def without_bulk(self) -> ToolDefinition:
        return ToolDefinition(type="function", function=self.function.without_bulk())

    def for_template(self) -> dict[str, Any]:
        return {"type": "function", "function": self.function.model_dump(exclude_none=True)}

    def as_function(self) -> FunctionTool:
        function = self.function
        return FunctionTool(function.name, function.parameters, bool(function.strict))


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What a request says about tools.

    Attributes:
        tools: What the prompt lists.
        choice: Which of them the answer may or must call.
        is_parallel: Whether it may have several calls.
        is_legacy: The request has `functions`, and the answer `function_call`.
    """

    tools: Sequence[ToolDefinition] = ()
    choice: ToolChoice = ToolChoice.NONE
    is_parallel: bool = True
    is_legacy: bool = False

    def for_template(self) -> list[dict[str, Any]]:
        return [tool.for_template() for tool in self.tools]

    def functions(self) -> list[FunctionTool]:
        return [tool.as_function() for tool in self.tools]


NO_TOOLS: Final = ToolUse()


def tool_use(tools: Sequence[ToolDefinition] | None, choice: Any, *, is_parallel: bool) -> ToolUse:
    """Raises RequestRejected for a choice that is malformed or names no tool of the request."""
    tools = tools or ()
    names = _names(tools, "tools")
    read = _read_choice(choice)
    if read.mode == "none" or (read.mode == "auto" and not tools):
        return NO_TOOLS  # the prompt lists no tools, and what it does not list is not called
    if not tools:
        raise _wrong_choice("there are no tools")
    for name in read.names or ():
        if name not in names:
            raise _wrong_choice(f"there is no tool {name[:64]!r}")
    return ToolUse(tools, read, is_parallel and read.mode != "named")


def legacy_tool_use(functions: Sequence[FunctionDefinition] | None, call: Any) -> ToolUse:
    """The use of tools that the deprecated fields ask for. They know one call per answer."""
    tools = [ToolDefinition(type="function", function=function) for function in functions or ()]
    names = _names(tools, "functions")
    match call:
        case "none":
            return NO_TOOLS
        case None | "auto":
            choice = ToolChoice.AUTO
        case {"name": str(name), **others} if not others and name in names:
            choice = ToolChoice.named(name)
        case _:
            raise RequestRejected(
                "function_call: must be 'none', 'auto' or the name of a function of the request", param="function_call"
            )
    return ToolUse(tools, choice, is_parallel=False, is_legacy=True) if tools else NO_TOOLS


def _read_choice(choice: Any) -> ToolChoice:
    match choice:
        case None | "auto":
            return ToolChoice.AUTO
        case "none":
            return ToolChoice.NONE
        case "required":
            return ToolChoice.REQUIRED
        case {"type": "function", "function": {"name": str(name), **others}, **more} if not others | more:
            return ToolChoice.named(name)
        case {
            "type": "allowed_tools",
            "allowed_tools": {"mode": "auto" | "required" as mode, "tools": [_, *_] as allowed, **others},
            **more,
        } if not others | more:
            return ToolChoice(mode, frozenset(map(_name_in, allowed)))
        case {"type": "custom"}:
            raise _wrong_choice("custom tools are not supported")
    raise _wrong_choice("must be 'none', 'auto', 'required', a function of the request, or its allowed_tools")


def _name_in(one: Any) -> str:
    match one:
        case {"type": "function", "function": {"name": str(name), **others}, **more} if not others | more:
            return name
    raise _wrong_choice("allowed_tools has a tool that is no function with a name")


def _names(tools: Sequence[ToolDefinition], param: str) -> frozenset[str]:
    names = [tool.name for tool in tools]
    if twice := [name for place, name in enumerate(names) if name in names[:place]]:
        raise RequestRejected(f"{param}: the name {twice[0]!r} is there twice", param=param)
    return frozenset(names)


def _wrong_choice(problem: str) -> RequestRejected:
    return RequestRejected(f"tool_choice: {problem}", param="tool_choice")
