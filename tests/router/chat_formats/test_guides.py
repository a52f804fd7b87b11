"""Guides: what they let a model write, and that all of it is what the request asks for."""

from __future__ import annotations

import itertools
import json
import random
from typing import Any

import jsonschema
import numpy as np
import pytest
import xgrammar
from xgrammar.testing import _is_grammar_accept_string

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.families import (
    GPT_OSS,
    HERMES,
    LLAMA3,
    LLAMA4,
    PLAIN,
    QWEN3_CODER,
    TOOL_PARSERS,
)
from tensorweave.router.chat_formats.tools import FunctionTool, ToolChoice
from tensorweave.router.guided.guide import guide_for
from tensorweave.router.guided.params import GuideParams
from tests.router.chat_formats.grammar_samples import small_vocabulary
from tests.router.chat_formats.splits import parse, pieces

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer", "minimum": 1, "maximum": 14},
        "unit": {"enum": ["c", "f", 3]},
        "sky": {"enum": ["clear", "half clear"]},
        "kind": {"type": "string", "const": "weather"},
        "zone": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        "exact": {"type": "boolean"},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
NESTED = {
    "type": "object",
    "properties": {"node": {"$ref": "#/$defs/Node"}, "when": {"type": "string"}},
    "required": ["node"],
    "$defs": {
        "Node": {
            "type": "object",
            "properties": {"id": {"type": "integer"}, "next": {"anyOf": [{"$ref": "#/$defs/Node"}, {"type": "null"}]}},
            "required": ["id"],
        }
    },
}
OPTIONAL = {"type": "object", "properties": {"a": {"type": "boolean"}, "b": {"type": "number"}}}
NOTHING = {"type": "object", "properties": {}, "additionalProperties": False}
TOOLS = [
    FunctionTool("get_weather", WEATHER, is_strict=True),
    FunctionTool("walk.tree-1", NESTED),
    FunctionTool("optional", OPTIONAL),
    FunctionTool("now", NOTHING),
    FunctionTool("free", {"type": "object"}),
]
SCHEMAS = {tool.name: tool.parameters or {"type": "object"} for tool in TOOLS}
FAMILIES = list({id(family): family for family in TOOL_PARSERS.values()}.values())
HARD = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
PERSON = Guide("json_schema", json.dumps({"type": "object", "properties": {"age": {"type": "integer"}}}))


SAMPLER = small_vocabulary()


def named(family: ChatFormat) -> str:
    return family.name


def closed(family: ChatFormat) -> str:
    """What a template writes that has closed the reasoning."""
    return f"{family.thinking.begin}{family.thinking.end}" if family.thinking else ""


def guide_text(guide: Guide | None) -> str:
    assert guide is not None
    return guide.text


def accepts(guide: Guide | None, text: str) -> bool:
    return bool(_is_grammar_accept_string(xgrammar.Grammar.from_structural_tag(guide_text(guide)), text))


@pytest.mark.parametrize("family", FAMILIES, ids=named)
@pytest.mark.parametrize("choice", [ToolChoice.REQUIRED, ToolChoice.named("get_weather")], ids=["required", "named"])
def test_whatever_the_grammar_allows_is_a_valid_call(family: ChatFormat, choice: ToolChoice) -> None:
    guide = family.guide(TOOLS, choice, prompt_tail=closed(family))
    assert guide is not None
    num_ended = 0
    for seed in range(15):
        if (text := SAMPLER.draw(guide, random.Random(seed))) is None:
            continue
        num_ended += 1
        whole = parse(family, [text], TOOLS, closed(family))
        assert parse(family, pieces(text, 3), TOOLS, closed(family)) == whole
        assert whole.content == whole.reasoning == "", text
        assert whole.calls, text
        assert choice.mode == "required" or [call.name for call in whole.calls] == ["get_weather"]
        for call in whole.calls:
            assert call.is_complete, text
            jsonschema.validate(json.loads(call.arguments), SCHEMAS[call.name])
    assert num_ended >= 5


@pytest.mark.parametrize("family", FAMILIES, ids=named)
def test_a_strict_function_is_called_as_its_schema_says_or_not_at_all(family: ChatFormat) -> None:
    tail = closed(family)
    text = next(
        text
        for seed in range(50)
        if (
            text := SAMPLER.draw(
                family.guide(TOOLS, ToolChoice.named("get_weather"), prompt_tail=tail), random.Random(seed)
            )
        )
    )
    guide = family.guide(TOOLS, prompt_tail=tail)
    assert accepts(guide, text)
    if family.channels is None:
        assert accepts(guide, f"Some text, 1 < 2 and {{braces}} [too].\n{text}")
    assert not accepts(guide, text.replace("days", "dayz"))
    unknown = text.replace("get_weather", "get_wheather")
    assert not accepts(guide, unknown) or not parse(family, [unknown], TOOLS, tail).calls
    free = [FunctionTool(tool.name, tool.parameters) for tool in TOOLS]
    assert family.guide(free, prompt_tail=tail) is None, "nothing is to be enforced"


@pytest.mark.parametrize("family", FAMILIES, ids=named)
def test_special_tokens_stand_in_the_guide_as_they_are(family: ChatFormat) -> None:
    """The workers let a model use those special tokens whose text the guide has."""
    guide = family.guide(TOOLS, ToolChoice.REQUIRED, prompt_tail="")
    assert guide is not None
    assert [marker for marker in family.markers if '"' not in marker and marker not in guide.text] == []


def test_a_function_without_parameters_gets_none() -> None:
    call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    for parameters in (None, {}, {"type": "object", "properties": {}}):
        guide = HERMES.guide([FunctionTool("f", parameters)], ToolChoice.REQUIRED, prompt_tail="<think></think>")
        assert accepts(guide, call % "{}")
        assert not accepts(guide, call % '{"a": 1}')
    anything = HERMES.guide([FunctionTool("f", {"type": "object"})], ToolChoice.REQUIRED, prompt_tail="<think></think>")
    assert accepts(anything, call % '{"a": 1}')


def test_one_call_or_several() -> None:
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
    for choice in (ToolChoice.AUTO, ToolChoice.REQUIRED):
        one = HERMES.guide(TOOLS, choice, is_parallel=False, prompt_tail="<think></think>")
        several = HERMES.guide(TOOLS, choice, prompt_tail="<think></think>")
        assert accepts(one, call)
        assert not accepts(one, f"{call}\n{call}")
        assert accepts(several, f"{call}\n{call}")
    assert not accepts(HERMES.guide(TOOLS, ToolChoice.named("now"), prompt_tail="<think></think>"), f"{call}\n{call}")


def test_only_allowed_tools_are_called() -> None:
    for mode in ("auto", "required"):
        guide = HERMES.guide(TOOLS, ToolChoice(mode, frozenset({"now"})), prompt_tail="<think></think>")
        assert accepts(guide, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
        assert not accepts(guide, '<tool_call>\n{"name": "free", "arguments": {}}\n</tool_call>')
        assert accepts(guide, "No.") == (mode == "auto")


@pytest.mark.parametrize(
    ("tail", "text", "is_allowed"),
    [
        ("<think>\n", 'Hm {"age": 1}</think>\n\n{"age": 5}', True),
        ("<think>\n", '{"age": 5}', False),
        ("", '<think>Hm</think>{"age": 5}', True),
        ("", '{"age": 5}', True),
        ("", '<think>Hm</think>{"age": "5"}', False),
    ],
)
def test_reasoning_is_a_part_of_the_guide(tail: str, text: str, is_allowed: bool) -> None:
    assert accepts(HERMES.guide(answer_guide=PERSON, prompt_tail=tail), text) == is_allowed


def test_without_reasoning_and_tools_the_guide_is_that_of_the_answer() -> None:
    assert HERMES.guide(answer_guide=PERSON, prompt_tail="<think>\n\n</think>\n\n") is PERSON
    assert PLAIN.guide(answer_guide=PERSON) is PERSON
    assert PLAIN.guide(TOOLS, ToolChoice.NONE, answer_guide=PERSON) is PERSON
    assert PLAIN.guide() is None


def test_an_answer_in_a_form_or_a_call() -> None:
    guide = HERMES.guide(TOOLS, answer_guide=PERSON, prompt_tail="<think></think>")
    assert accepts(guide, '{"age": 5}')
    assert accepts(guide, '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>')
    assert not accepts(guide, "Five.")
    assert not accepts(guide, '<tool_call>\n{"name": "walk.tree-1", "arguments": {}}\n</tool_call>')


@pytest.mark.parametrize(
    "guide", [Guide("regex", "[0-9]+"), Guide("ebnf", "root ::= [0-9]+")], ids=lambda guide: guide.kind
)
def test_other_forms_after_the_reasoning(guide: Guide) -> None:
    whole = HERMES.guide(answer_guide=guide, prompt_tail="<think>")
    assert accepts(whole, "Hm</think>12")
    assert not accepts(whole, "Hm</think>x")
    again = HERMES.guide(answer_guide=whole, prompt_tail="<think>")
    assert accepts(again, "Oh</think>Hm</think>12")


def test_a_thinking_budget_forces_the_end_of_the_reasoning() -> None:
    for family, begin in ((HERMES, b""), (GPT_OSS, b"<|channel|>analysis<|message|>")):
        guide = family.guide(prompt_tail="<think>", max_thinking_tokens=5)
        assert guide is not None
        matcher = SAMPLER.matcher(guide)
        for byte in begin + b"12345":
            assert matcher.accept_token(byte)
        allowed = np.flatnonzero(SAMPLER.allowed(matcher)).tolist()
        assert {SAMPLER.tokens[token][:1] for token in allowed} == {b"<"}
        assert not matcher.accept_token(ord("6"))
    assert HERMES.guide(prompt_tail="<think></think>", max_thinking_tokens=5) is None, "there is no reasoning"
    assert PLAIN.guide(max_thinking_tokens=5) is None


def test_free_text_does_not_begin_another_reasoning() -> None:
    guide = HERMES.guide(prompt_tail="", max_thinking_tokens=5)
    assert accepts(guide, "No reasoning.")
    assert not accepts(guide, "x <think>")


def test_gpt_oss_reasons_and_answers_in_channels() -> None:
    thought, start = "<|channel|>analysis<|message|>Hm<|end|>", "<|start|>assistant"
    guide = GPT_OSS.guide(answer_guide=PERSON)
    for before in ("", thought + start):
        assert accepts(guide, before + '<|channel|>final<|message|>{"age": 5}')
        assert not accepts(guide, before + "<|channel|>final<|message|>Five.")
    guide = GPT_OSS.guide(TOOLS)
    call = "<|channel|>commentary to=functions.now <|constrain|>json<|message|>{}"
    assert accepts(guide, thought + start + call)
    assert accepts(guide, thought + start + "<|channel|>commentary<|message|>I look.<|end|>" + start + call)
    assert accepts(guide, thought + start + "<|channel|>final<|message|>Five.")
    assert not accepts(
        guide, thought + start + call.replace("{}", '{"a": 1}'.replace("a", "days")).replace("now", "get_weather")
    )


def test_a_strict_schema_that_nobody_enforces_is_refused_by_name() -> None:
    tools = [TOOLS[0], FunctionTool("hard", HARD, is_strict=True)]
    for choice in (ToolChoice.AUTO, ToolChoice.REQUIRED, ToolChoice.named("hard")):
        with pytest.raises(RequestRejected, match=r"uniqueItems.*/properties/a") as caught:
            HERMES.guide(tools, choice)
        assert caught.value.param == "tools[1].function.parameters"
    HERMES.guide(tools, ToolChoice.named("get_weather"))
    alternatives = {"anyOf": [{"type": "object", "properties": {name: {}}} for name in "ab"]}
    with pytest.raises(RequestRejected, match="one object with properties"):
        QWEN3_CODER.guide([FunctionTool("f", alternatives, is_strict=True)])


@pytest.mark.parametrize("family", [HERMES, LLAMA3, GPT_OSS], ids=named)
def test_expressions_are_enforced_where_arguments_are_json(family: ChatFormat) -> None:
    schema = {
        "type": "object",
        "properties": {
            "code": {"type": "string", "pattern": "^[A-Z]{2}[0-9]$"},
            "day": {"type": "string", "format": "date"},
        },
        "required": ["code"],
    }
    tools = [FunctionTool("f", schema, is_strict=True), FunctionTool("g", schema, is_strict=True), TOOLS[0]]
    guide = family.guide(tools, ToolChoice.REQUIRED, prompt_tail=closed(family))
    assert guide is not None
    texts = list(filter(None, (SAMPLER.draw(guide, random.Random(seed)) for seed in range(12))))
    assert texts
    for text in texts:
        for call in parse(family, [text], tools, closed(family)).calls:
            jsonschema.validate(json.loads(call.arguments), WEATHER if call.name == "get_weather" else schema)
    with pytest.raises(RequestRejected, match="pattern"):
        QWEN3_CODER.guide(tools)


def test_other_functions_follow_what_can_be_enforced() -> None:
    schema = {
        "type": "object",
        "properties": {
            "pattern": {"type": "string", "pattern": "^a", "maxLength": 2},
            "list": {"type": "array", "items": {"type": "integer"}, "uniqueItems": True},
        },
        "required": ["pattern"],
        "additionalProperties": {"type": "string"},
        "if": {"required": ["list"]},
    }
    guide = HERMES.guide([FunctionTool("f", schema)], ToolChoice.REQUIRED, prompt_tail="<think></think>")
    call = '<tool_call>\n{"name": "f", "arguments": %s}\n</tool_call>'
    assert accepts(guide, call % '{"pattern": "bcd", "list": [1, 1]}')
    for wrong in ('{"list": [1]}', '{"pattern": 1}', '{"pattern": "a", "list": ["1"]}', '{"pattern": "a", "b": ""}'):
        assert not accepts(guide, call % wrong)


def form_of(schema: dict[str, Any]) -> Guide:
    return guide_for(GuideParams(json={"type": "object", "properties": {"a": schema}, "required": ["a"]}))


def test_a_form_for_llguidance_is_written_for_xgrammar_where_that_enforces_it() -> None:
    date = form_of({"type": "string", "format": "date"})
    assert date.backend == "llguidance"
    assert HERMES.guide(answer_guide=date, prompt_tail="<think></think>") is date
    guide = HERMES.guide(answer_guide=date, prompt_tail="<think>")
    assert accepts(guide, 'Hm</think>{"a": "2026-11-27"}')
    assert not accepts(guide, 'Hm</think>{"a": "today"}')
    length = form_of({"type": "string", "maxLength": 3})
    assert HERMES.guide(answer_guide=length, prompt_tail="<think></think>") is length
    with pytest.raises(
        RequestRejected, match=r"'maxLength' at '/properties/a'.*cannot be combined with tools or reason"
    ):
        HERMES.guide(answer_guide=length, prompt_tail="<think>")


def test_what_cannot_be_part_of_another_guide_is_refused() -> None:
    lark = Guide("lark", "start: /a/", "llguidance")
    with pytest.raises(RequestRejected, match="llguidance cannot be combined"):
        HERMES.guide(answer_guide=lark, prompt_tail="<think>")
    assert HERMES.guide(answer_guide=lark, prompt_tail="<think></think>") is lark
    with pytest.raises(RequestRejected, match="tool_parser"):
        PLAIN.guide(TOOLS, ToolChoice.REQUIRED)


def test_very_large_tools_are_refused() -> None:
    large = {"type": "object", "properties": {f"property_{n}" * 4: {"type": "string"} for n in range(500)}}
    tools = [FunctionTool(f"f{n}", large, is_strict=True) for n in range(64)]
    with pytest.raises(RequestRejected, match="bytes together"):
        HERMES.guide(tools)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (LLAMA3, '{ "name": "now", "parameters": {"x": 1}}'),
        (LLAMA3, '{"type": "function", "name": "now", "parameters": {"x": 1}}'),
        (LLAMA4, "[ now(x=1)]"),
        (LLAMA4, "[now (x=1)]"),
    ],
)
def test_without_a_marker_only_the_guided_spelling_is_a_call(family: ChatFormat, text: str) -> None:
    """The guide cannot see that other text becomes a call; so it is none."""
    strict, free, other = FunctionTool("now", NOTHING, is_strict=True), FunctionTool("now", NOTHING), FunctionTool("x")
    assert parse(family, [text], [free]).calls
    assert parse(family, [text], [strict]).content == text
    assert accepts(family.guide([strict]), text)
    assert parse(family, [text], [free], is_parallel=False).content == text
    assert parse(family, [text], [free, other], choice=ToolChoice("auto", frozenset({"x"}))).content == text


@pytest.mark.parametrize("family", FAMILIES, ids=named)
def test_there_is_no_way_around_a_guide(family: ChatFormat) -> None:
    """Whatever the parser takes for a call of a strict function, with other arguments than its schema's, the guide has
    forbidden."""
    tools = [FunctionTool("now", NOTHING, is_strict=True)]
    tails = (closed(family), family.thinking.begin) if family.thinking else ("",)
    forms = (
        "now(x=1)",
        "[now(x=1)]",
        " [ now( x=1)]",
        '{"name": "now", "arguments": {"x": 1}}',
        '[{"name": "now", "parameters": {"x": 1}}]',
        ' { "name":"now", "parameters": {"x": 1}}',
        '{"arguments": {"x": 1}, "name": "now"}',
        'now[ARGS]{"x": 1}',
        'function<｜tool▁sep｜>now\n```json\n{"x": 1}\n```',
        'now<｜tool▁sep｜>{"x": 1}',
        'now:0<|tool_call_argument_begin|>{"x": 1}',
        "now>\n<parameter=x>\n1\n</parameter>\n",
        'now">\n<parameter name="x">1</parameter>\n',
        'now">\n<｜DSML｜parameter name="x" string="false">1</｜DSML｜parameter>\n',
        "now\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n",
        'commentary to=now<|message|>{"x": 1}',
    )
    num_calls = 0
    for tail in tails:
        grammar = xgrammar.Grammar.from_structural_tag(guide_text(family.guide(tools, prompt_tail=tail)))
        for begin, form, end in itertools.product(("", *family.markers), forms, ("", *family.markers)):
            text = f"{begin}{form}{end}"
            if parse(family, [text], tools, tail).calls:
                num_calls += 1
                for rest in ("", family.thinking.end if family.thinking else ""):
                    assert not _is_grammar_accept_string(grammar, text + rest), text
    assert num_calls
