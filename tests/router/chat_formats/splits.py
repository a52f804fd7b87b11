"""Answers of a parser, for any cut of the text into pieces."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.deltas import CallArguments, CallEnd, CallStart, Content, Delta, Reasoning
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice

SIZES = (1, 2, 3, 4, 5)


@dataclass(slots=True)
class Call:
    call_id: str
    name: str
    arguments: str = ""
    is_complete: bool | None = None


@dataclass(slots=True)
class Whole:
    """The joined deltas, and the order of their kinds."""

    reasoning: str = ""
    content: str = ""
    calls: list[Call] = field(default_factory=list)
    kinds: list[str] = field(default_factory=list)

    def add(self, delta: Delta) -> None:
        kind = type(delta).__name__
        if not self.kinds or self.kinds[-1] != kind:
            self.kinds.append(kind)
        match delta:
            case Content(text):
                assert text
                self.content += text
            case Reasoning(text):
                assert text
                self.reasoning += text
            case CallStart(index, call_id, name):
                assert index == len(self.calls)
                assert not self.calls or self.calls[-1].is_complete is not None
                self.calls.append(Call(call_id, name))
            case CallArguments(index, text):
                assert text
                assert index == len(self.calls) - 1
                assert self.calls[index].is_complete is None
                self.calls[index].arguments += text
            case CallEnd(index, is_complete):
                assert index == len(self.calls) - 1
                self.calls[index].is_complete = is_complete

    def parsed_calls(self) -> list[dict[str, Any]]:
        return [{"name": call.name, "arguments": json.loads(call.arguments)} for call in self.calls]


def pieces(text: str, size: int) -> list[str]:
    return [text[start : start + size] for start in range(0, len(text), size)]


def parse(
    chat_format: ChatFormat,
    parts: Sequence[str],
    tools: Sequence[FunctionTool] = (),
    prompt_tail: str = "",
    choice: ToolChoice = ToolChoice.AUTO,
    *,
    is_parallel: bool = True,
) -> Whole:
    whole = Whole()
    parser = chat_format.parser(prompt_tail, tools, choice, is_parallel=is_parallel, rng=random.Random(0))
    for part in parts:
        for delta in parser.feed(part):
            whole.add(delta)
    for delta in parser.finish():
        whole.add(delta)
    assert all(call.is_complete is not None for call in whole.calls)
    return whole
