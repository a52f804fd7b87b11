"""Whatever a model writes: nothing fails, nothing is lost, and the cut of the text does not matter."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tensorweave.router.chat_formats.chat_format import ChatFormat
from tensorweave.router.chat_formats.deltas import CallArguments, CallStart, Content
from tensorweave.router.chat_formats.families import HERMES, LLAMA3, MISTRAL, PLAIN, TOOL_PARSERS
from tensorweave.router.chat_formats.tools import FunctionTool
from tests.router.chat_formats.splits import parse, pieces

FAMILIES = list({id(family): family for family in TOOL_PARSERS.values()}.values())
TOOLS = [FunctionTool("f", {"properties": {"a": {"type": "string"}, "n": {"type": "integer"}}}), FunctionTool("g.h")]
COMMON = (
    *(
        "f",
        "g.h",
        "(",
        ")",
        "[",
        "]",
        "{",
        "}",
        '"',
        "'",
        "\\",
        "\\u12",
        ",",
        ";",
        ":",
        "=",
        ".",
        "<",
        ">",
        "\n",
        " ",
        "\t",
    ),
    *(
        '"name"',
        '"arguments"',
        '"parameters"',
        '{"name": "f", "arguments": {',
        "a=",
        "n",
        "1",
        "None",
        "```json",
        "é😀",
    ),
    *("\x00", "\u2028", "to=functions.f", "functions.f:0", "x"),
)


def named(family: ChatFormat) -> str:
    return family.name


@pytest.mark.parametrize("family", FAMILIES, ids=named)
@settings(max_examples=120)
@given(data=st.data())
def test_any_text_parses_alike_in_all_cuts(family: ChatFormat, data: st.DataObject) -> None:
    fragments = st.sampled_from([*sorted(family.markers), *COMMON])
    text = "".join(data.draw(st.lists(fragments, max_size=30)))
    tail = data.draw(st.sampled_from(["", family.thinking.begin if family.thinking else ""]))
    whole = parse(family, [text], TOOLS, tail)
    for size in (1, 2, 5):
        assert parse(family, pieces(text, size), TOOLS, tail) == whole
    cut = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=6)))
    bounds = [0, *cut, len(text)]
    parts = [text[start:end] for start, end in itertools.pairwise(bounds)]
    assert parse(family, parts, TOOLS, tail) == whole
    if not whole.calls and not whole.reasoning and not tail and family.channels is None:
        begin = family.thinking.begin if family.thinking else "\0none"
        assert whole.content == text or text.lstrip().startswith(begin), "content is passed on as it is"
    for call in whole.calls:
        if call.is_complete:
            assert isinstance(json.loads(call.arguments), dict)


def test_text_without_markers_is_not_held_back() -> None:
    for family in (HERMES, LLAMA3, MISTRAL, PLAIN):
        parser = family.parser("", TOOLS)
        for word in ("Hello", ",", "wor", "ld", "!"):
            assert parser.feed(word) == [Content(word)]
        assert parser.finish() == []


def test_a_marker_is_held_back_only_as_long_as_it_may_be_one() -> None:
    parser = HERMES.parser("", TOOLS)
    assert parser.feed("a <") == [Content("a")]
    assert parser.feed("tool") == []
    assert parser.feed("box>") == [Content(" <toolbox>")]
    assert parser.feed(" ") == []
    assert parser.finish() == [Content(" ")]


def test_arguments_are_passed_on_as_they_come() -> None:
    parser = HERMES.parser("", TOOLS)
    assert parser.feed('<tool_call>\n{"name": "f", "arguments": ') == []
    start, *pieces_of_first = parser.feed("{")
    assert isinstance(start, CallStart)
    assert pieces_of_first == [CallArguments(0, "{")]
    assert [parser.feed(text) for text in ('"a": "b', "cd", 'e"', ', "n": 1}')] == [
        [CallArguments(0, '"a": "b')],
        [CallArguments(0, "cd")],
        [CallArguments(0, 'e"')],
        [CallArguments(0, ', "n": 1}')],
    ]


def test_plain_text_is_passed_on_at_once_with_its_white_space() -> None:
    parser = PLAIN.parser("")
    assert parser.feed(" a \n") == [Content(" a \n")]
    assert parser.feed(" ") == [Content(" ")]


def test_very_long_and_deep_texts() -> None:
    """No recursion with the text, and what may be a call is not read without end; all cuts give the same."""
    deep, spaces = "[" * 20_000, " " * 20_000
    for text in (
        f'<tool_call>{{"name": "f", "arguments": {{"a": {deep}',
        f'<tool_call>{{"arguments": {{"a": {deep}',
        f'<tool_call>{{"arguments": {{"a": "{spaces}"}}, "name": "f"}}</tool_call>',
        f'<tool_call>{{"name": "{"f" * 20_000}", "arguments": {{}}}}</tool_call>',
        f'<tool_call>{spaces}{{"name": "f", "arguments": {{}}}}</tool_call>',
        f'<tool_call>{{"name": "f", "arguments": {{}}}}{spaces}}}{spaces}</tool_call>{spaces}x',
        f'<tool_call>[{{"name": "f"}}{spaces},{spaces}{{"name": "f"}}{spaces}]{spaces}</tool_call>',
        f"{spaces}<think>{spaces}x{spaces}</think>{spaces}y",
        spaces,
    ):
        whole = parse(HERMES, [text], TOOLS)
        assert parse(HERMES, pieces(text, 7), TOOLS) == whole
        assert parse(HERMES, pieces(text, 4093), TOOLS) == whole
    for family, text in (
        (TOOL_PARSERS["llama4_pythonic"], f"[f(a=1{spaces}){spaces},{spaces}f(){spaces}]{spaces}x"),
        (TOOL_PARSERS["qwen3_coder"], f"<tool_call>{spaces}<function=f>{spaces}</function>{spaces}</tool_call>"),
        (
            TOOL_PARSERS["qwen3_coder"],
            f"<function=f>\n<parameter=a>x</parameter>{spaces}<parameter=n>1</parameter>\n</function>{spaces}x",
        ),
        (TOOL_PARSERS["gpt_oss"], f"<|channel|>{spaces}<|message|>x{spaces}<|end|>{spaces}y"),
    ):
        whole = parse(family, [text], TOOLS)
        assert parse(family, pieces(text, 7), TOOLS) == whole
    whole = parse(TOOL_PARSERS["llama4_pythonic"], [f"[f(a={deep}"], TOOLS)
    assert whole.calls
    assert whole.content.startswith("[[")


@pytest.mark.no_cover
def test_the_time_of_a_text_is_linear() -> None:
    """Whatever a text repeats, the beginning of a call is given up soon. Quadratic time would take minutes here."""
    long = '<tool_call>{"name": "f", "arguments": {"a": "' + "word " * 50_000
    assert parse(HERMES, pieces(long, 5), TOOLS).calls[0].arguments == '{"a": "' + "word " * 50_000
    for text in ('<tool_call>{"arguments": [' * 700, '{"type": ' * 2_000, "[f(" * 2_000, "</parameter>" * 2_000):
        for family in (HERMES, LLAMA3, TOOL_PARSERS["llama4_pythonic"], TOOL_PARSERS["qwen3_coder"]):
            assert parse(family, pieces(text, 9), TOOLS).content == text


HALF_A_PAIR = [
    (HERMES, '<tool_call>{"name": "f\\ud800", "arguments": {"a": "\\ud800"}}</tool_call>'),
    (HERMES, '<tool_call>{"id": "\\ud800", "name": "f", "arguments": "{\\"a\\": \\"\\ud800\\"}"}</tool_call>'),
    (
        TOOL_PARSERS["qwen3_coder"],
        "<tool_call><function=f><parameter=l>['\\ud800',]</parameter></function></tool_call>",
    ),
    (TOOL_PARSERS["llama4_pythonic"], '[f(a="\\ud800", b="\\U0000d800")]'),
]


@pytest.mark.parametrize(("family", "text"), HALF_A_PAIR)
def test_half_a_surrogate_pair_stays_an_escape(family: ChatFormat, text: str) -> None:
    """UTF-8 has no such character, so that an answer with one could not be sent."""
    tools = [FunctionTool("f", {"properties": {"l": {"type": "array"}}})]
    parser = family.parser("", tools)
    deltas = [*parser.feed(text), *parser.finish()]
    written = "".join(str(getattr(delta, key, "")) for delta in deltas for key in ("text", "name", "call_id"))
    assert "ud800" in written
    assert written.encode().decode() == written
    assert json.loads("".join(delta.text for delta in deltas if isinstance(delta, CallArguments)))


def test_digits_of_other_scripts_are_no_json() -> None:
    tools = [FunctionTool("f", {"properties": {"n": {"type": "integer"}, "x": {"type": "number"}}})]
    text = "<tool_call><function=f><parameter=n>1١</parameter><parameter=x>٢.٥</parameter></function></tool_call>"
    (call,) = parse(TOOL_PARSERS["qwen3_coder"], [text], tools).calls
    assert json.loads(call.arguments) == {"n": "1١", "x": "٢.٥"}
    (call,) = parse(TOOL_PARSERS["llama4_pythonic"], ["[f(n=١٢)]"], tools).calls
    assert json.loads(call.arguments) == {"n": 12}


def test_ids() -> None:
    def ids(family: ChatFormat, text: str, seed: int | None = None) -> list[str]:
        parser = family.parser("", TOOLS, rng=None if seed is None else random.Random(seed))
        deltas = [*parser.feed(text), *parser.finish()]
        return [delta.call_id for delta in deltas if hasattr(delta, "call_id")]

    call = '<tool_call>{"name": "f"}</tool_call>'
    assert len(set(ids(HERMES, call) + ids(HERMES, call))) == 2
    assert ids(HERMES, call, 1) == ids(HERMES, call, 1)
    (call_id,) = ids(MISTRAL, "[TOOL_CALLS]f[ARGS]{}")
    assert len(call_id) == 9
    assert call_id.isalnum()
    assert call_id.isascii()
