"""What a streamed answer consists of: pieces of content and reasoning, and calls of tools."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Content:
    """A piece of the text for the user; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class Reasoning:
    """A piece of the model's reasoning; never empty."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """A call begins. `index` counts the answer's calls from 0; `name` is the function's, as the model wrote it."""

    index: int
    call_id: str
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """A piece of the JSON text of the arguments of call `index`; never empty. A call without arguments has `{}`."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """Call `index` is over. `is_complete`: its arguments are a JSON object; otherwise the answer was cut short, or the
    model did not write JSON, and the arguments are what it wrote."""

    index: int
    is_complete: bool


Delta = Content | Reasoning | CallStart | CallArguments | CallEnd
