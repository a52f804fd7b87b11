"""Golden texts of each family: the same deltas for every cut of the text, and something valid for every truncation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.choice import choose_format
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice
from tests.router.chat_formats.splits import SIZES, Whole, parse, pieces

GOLDEN = Path(__file__).parent / "golden"
TOOLS = [FunctionTool(**tool) for tool in yaml.safe_load((GOLDEN / "tools.yaml").read_text(encoding="utf-8"))]


def cases() -> list[Any]:
    found = []
    for path in sorted(GOLDEN.glob("*.yaml")):
        if path.stem != "tools":
            data = yaml.safe_load(path.read_text(encoding="utf-8"))
            found += [pytest.param(data, case, id=f"{path.stem}: {case['name']}") for case in data["cases"]]
    return found


def format_of(data: dict[str, Any]) -> ChatFormat:
    return choose_format(None, tool_parser=data["format"], reasoning_parser=data.get("reasoning", "qwen3"))


def parse_case(data: dict[str, Any], case: dict[str, Any], parts: list[str]) -> Whole:
    return parse(format_of(data), parts, TOOLS, case.get("prompt_tail", ""))


@pytest.mark.parametrize(("data", "case"), cases())
def test_golden_text(data: dict[str, Any], case: dict[str, Any]) -> None:
    text = case["text"]
    whole = parse_case(data, case, [text])
    assert whole.reasoning == case.get("reasoning", "")
    assert whole.content == case.get("content", "")
    expected = case.get("calls", [])
    assert whole.parsed_calls() == [{"name": call["name"], "arguments": call["arguments"]} for call in expected]
    assert [call.is_complete for call in whole.calls] == [True] * len(expected)
    for call, wanted in zip(whole.calls, expected, strict=True):
        assert call.call_id == wanted.get("id", call.call_id)
    for size in SIZES:
        assert parse_case(data, case, pieces(text, size)) == whole, size


@pytest.mark.parametrize(("data", "case"), cases())
def test_truncated_everywhere(data: dict[str, Any], case: dict[str, Any]) -> None:
    text = case["text"]
    complete = parse_case(data, case, [text])
    for end in range(len(text)):
        whole = parse_case(data, case, [text[:end]])
        for size in (1, 4):
            assert parse_case(data, case, pieces(text[:end], size)) == whole, (end, size)
        for call, full in zip(whole.calls, complete.calls, strict=False):
            assert (call.name, call.call_id) == (full.name, full.call_id)
            if call.is_complete:
                assert json.loads(call.arguments) == json.loads(full.arguments)
            else:
                assert full.arguments.startswith(call.arguments)


@pytest.mark.parametrize(("data", "case"), cases())
def test_without_tools_calls_are_content(data: dict[str, Any], case: dict[str, Any]) -> None:
    for tools, choice in (([], ToolChoice.AUTO), (TOOLS, ToolChoice.NONE)):
        whole = parse(format_of(data), [case["text"]], tools, case.get("prompt_tail", ""), choice)
        assert whole.calls == []
        assert whole.reasoning.startswith(case.get("reasoning", ""))
        assert not case.get("calls") or whole.content or whole.reasoning != case.get("reasoning", "")
