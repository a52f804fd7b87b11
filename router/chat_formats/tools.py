"""The functions that a request offers to the model, and which of them the answer may or must call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """A function of the request's `tools`.

    Args:
        name: Letters, digits, `_`, `-` and `.`; checked by the routes.
        parameters: The JSON schema of its arguments; None: it has none.
        is_strict: The arguments must follow the schema, also if the model chooses freely whether to call.
    """

    name: str
    parameters: Mapping[str, Any] | None = None
    is_strict: bool = False


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """The request's `tool_choice`.

    Args:
        mode: `none`: no call is recognized; `auto`: the model chooses; `required`: one call at least; `named`: exactly
            one call, of the one function in `names`.
        names: The functions that may be called (`allowed_tools`); None: all.
    """

    mode: Literal["none", "auto", "required", "named"]
    names: frozenset[str] | None = None

    NONE: ClassVar[ToolChoice]
    AUTO: ClassVar[ToolChoice]
    REQUIRED: ClassVar[ToolChoice]

    @classmethod
    def named(cls, name: str) -> ToolChoice:
        return cls("named", frozenset({name}))

    @property
    def must_call(self) -> bool:
        return self.mode in ("required", "named")

    def allows(self, tool: FunctionTool) -> bool:
        return self.mode != "none" and (self.names is None or tool.name in self.names)


ToolChoice.NONE = ToolChoice("none")
ToolChoice.AUTO = ToolChoice("auto")
ToolChoice.REQUIRED = ToolChoice("required")


def are_calls_guided(tools: Sequence[FunctionTool], choice: ToolChoice, *, is_parallel: bool) -> bool:
    """Whether a guide has to hold the model to what the request says about calls."""
    allowed = [tool for tool in tools if choice.allows(tool)]
    is_restricted = len(allowed) < len(tools) or not is_parallel or choice.must_call
    return bool(allowed) and (is_restricted or any(tool.is_strict for tool in allowed))


GuidedSpelling = Literal["any", "as guided", "none"]
"""How calls may be written in free text where a guide holds the model to what the request says about them. It does so
from its trigger on. `any`: that is the marker; `as guided`: that is the beginning of the call, as the guide writes it;
`none`: the guide does not know this way of calling, so it is none."""


@dataclass(frozen=True, slots=True)
class OfferedTools:
    """What a parser knows of the request's functions, by name. Empty: nothing is a call.

    Args:
        are_guided: See `are_calls_guided`.
    """

    by_name: Mapping[str, FunctionTool]
    are_guided: bool = False

    @classmethod
    def of(cls, tools: Sequence[FunctionTool], choice: ToolChoice, *, is_parallel: bool = True) -> OfferedTools:
        if choice.mode == "none":
            return cls({})
        return cls({tool.name: tool for tool in tools}, are_calls_guided(tools, choice, is_parallel=is_parallel))

    def __contains__(self, name: str) -> bool:
        return name in self.by_name

    def __len__(self) -> int:
        return len(self.by_name)

    def parameters(self, name: str) -> Mapping[str, Any]:
        tool = self.by_name.get(name)
        return (tool.parameters if tool is not None else None) or {}

    def permit(self, spelling: GuidedSpelling, *, is_as_guided: bool) -> bool:
        """Whether this may be a call, which is spelled like the guide's calls or not."""
        return not self.are_guided or spelling == "any" or (spelling == "as guided" and is_as_guided)
