"""Regular expressions: what is written for the backends has the language of what was read."""

from __future__ import annotations

import itertools
import random
import re
from typing import Any, Final

import jsonschema
import pytest

from tensorweave.cluster.guide import Guide
from tensorweave.router.guided import code_points, expressions
from tensorweave.router.guided.document import read_document
from tensorweave.router.guided.ebnf import write_grammar
from tensorweave.router.guided.expressions import PatternError, size, write
from tensorweave.router.guided.formats import FORMATS, KNOWN_PATTERNS
from tensorweave.router.guided.guide import guide_for, read_settled
from tensorweave.router.guided.limits import GuidedLimits
from tensorweave.router.guided.params import GuideParams
from tensorweave.router.guided.pattern import parse_match, parse_search
from tensorweave.router.guided.settle import SettledSchema
from tests.router.guided.matchers import accepts, answers, compact

TEXTS: Final = ["".join(letters) for length in range(6) for letters in itertools.product("abc", repeat=length)]
COUNTS: Final = ["*", "+", "?", "{0,2}", "{1,2}", "{2}", "{2,}", "{0,1}", "{1,3}", "{2,3}", "*?", "{0}"]


def random_expression(draw: random.Random, depth: int) -> str:
    kind = draw.random()
    if depth <= 0 or kind < 0.3:
        return draw.choice(["a", "b", "[ab]", "c", "[^a]", "."])
    if kind < 0.55:
        return "".join(random_expression(draw, depth - 1) for _ in range(draw.randint(1, 3)))
    if kind < 0.7:
        branches = [
            random_expression(draw, depth - 1) if draw.random() < 0.9 else "" for _ in range(draw.randint(2, 3))
        ]
        return f"(?:{'|'.join(branches)})"
    return f"({random_expression(draw, depth - 1)}){draw.choice(COUNTS)}"


def settled(schema: Any) -> SettledSchema:
    return read_settled(read_document(schema, GuidedLimits()), GuidedLimits())


@pytest.mark.no_cover
def test_both_backends_read_what_was_meant() -> None:
    """As the whole answer, and within a JSON string: as llguidance reads it, and as a grammar for xgrammar."""
    num_compared = 0
    for seed in range(150):
        draw = random.Random(seed)
        text = random_expression(draw, 4)
        if size(parse_match(text)) > 300:
            continue
        expected = re.compile(text)
        guides = [
            Guide("regex", write(parse_match(text)), "xgrammar"),
            Guide("regex", write(parse_match(text)), "llguidance"),
        ]
        params = GuideParams(json={"type": "string", "pattern": f"^(?:{text})$"})
        in_json = [guide_for(params), Guide("ebnf", write_grammar(settled(params.json), 8))]
        for sample in draw.sample(TEXTS, 40):
            is_match = bool(expected.fullmatch(sample))
            found = [*(accepts(guide, sample) for guide in guides), *(accepts(g, compact(sample)) for g in in_json)]
            assert found == [is_match] * 4, f"{text!r} and {sample!r}"
            num_compared += 1
    assert num_compared > 4000


@pytest.mark.parametrize(
    ("text", "yes", "no"),
    [
        ("^a|b$", ["a", "ax", "b", "xb"], ["xa", "bx", ""]),
        ("b", ["b", "abc"], ["", "a"]),
        ("", ["", "x"], []),
        ("^$", [""], ["a"]),
        ("^(a$|b$)", ["a", "b"], ["ab", "xa"]),
        ("^[\\w.-]+@x$", ["a.b-c@x"], ["@x", "a b@x"]),
        ("^[^\\d\\s]$", ["a", "é", '"'], ["1", " ", "٣"]),
        ("^\\u00e9\\x41\\cJ$", ["éA\n"], ["eA\n"]),
        ("^\\ud83d\\ude00$", ["😀"], ["x"]),
        ("^\\u{1f600}$", ["😀"], ["x"]),
        ('^"\\\\/$', ['"\\/'], ['"/']),
        ("^[\\]\\-^]$", ["]", "-", "^"], ["\\"]),
        ("^[a-]$", ["a", "-"], ["b"]),
        ("^a{2$", ["a{2"], ["aa"]),
        ("^(?<name>a)(?:b)$", ["ab"], ["a"]),
        ("^.$", ["a", '"', "é"], ["\n", "ab"]),
        ("^[\\s\\S]$", ["\n", "a"], ["ab"]),
    ],
)
def test_single_expressions(text: str, yes: list[str], no: list[str]) -> None:
    guide = guide_for(GuideParams(json={"type": "string", "pattern": text}))
    assert [sample for sample in yes if not accepts(guide, compact(sample))] == []
    assert [sample for sample in no if accepts(guide, compact(sample))] == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("(?=a)a", "lookahead"),
        ("(?!a)b", "lookahead"),
        ("(?<=a)b", "lookbehind"),
        ("(?<!a)b", "lookbehind"),
        ("(a)\\1", "backreference"),
        ("\\bword\\b", "word boundary"),
        ("\\p{L}+", "class of Unicode"),
        ("(?i)a", "kind '(?i)'"),
        ("(?P=x)a", "kind"),
        ("a{,3}", "different things"),
        ("[]", "empty class"),
        ("[^]", "empty class"),
        ("[z-a]", "wrong way round"),
        ("a{3,1}", "wrong way round"),
        ("(a", "not closed"),
        ("a)", "unmatched"),
        ("[a", "not closed"),
        ("*a", "nothing to repeat"),
        ("a**", "repetition of a repetition"),
        ("^*", "nothing to repeat"),
        ("a\\", "ends with a backslash"),
        ("\\A", "no escape"),
        ("a^b", "at the ends"),
        ("(^a)*", "at the ends"),
        ("\\ud83d", "no character"),
        ("a{100001}", "at most"),
        ("(" * 60 + ")" * 60, "deep"),
        ("(|$)" * 700, "too many groups"),
    ],
)
def test_what_is_not_supported_is_named(text: str, reason: str) -> None:
    with pytest.raises(PatternError, match=re.escape(reason)):
        parse_search(text)


def test_size_counts_repetitions() -> None:
    assert size(parse_match("a{1000}")) == 1000
    assert size(parse_match("((a{100}){100}){100}")) == 1_000_000
    assert size(parse_match("(a+|bc){2,3}")) == 3 * 4


@pytest.mark.parametrize("name", FORMATS)
def test_formats_generate_what_validates(name: str) -> None:
    schema = {"type": "string", "format": name}
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    is_known = name in checker.checkers
    assert is_known or name in ("base64", "base64url", "byte", "guid", "ipvanyaddress") or name.startswith("uuid")
    done = list(answers(guide_for(GuideParams(json=schema)), range(40)))
    assert len(done) > 10
    for answer in done:
        text = answer.decode()[1:-1]
        assert re.fullmatch(FORMATS[name], text)
        assert not is_known or checker.conforms(text, name), text


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("date", "2024-02-29"),
        ("date", "1999-12-31"),
        ("time", "23:59:59.123+05:30"),
        ("date-time", "2026-11-27T04:05:06Z"),
        ("duration", "P3Y6M4DT12H30M5S"),
        ("duration", "P2W"),
        ("email", "ada.lovelace+x@mail.example.co.uk"),
        ("hostname", "a-b.example.org"),
        ("ipv4", "255.0.10.1"),
        ("ipv6", "2001:db8::ff00:42:8329"),
        ("ipv6", "::"),
        ("uri", "mailto:x@example.org"),
        ("uri", "https://example.org:8080/a/b?x=1&y=%20#top"),
        ("uri-reference", "../a/b"),
        ("uuid", "123E4567-e89b-12d3-a456-426614174000"),
        ("json-pointer", "/a~1b/0"),
        ("base64", "aGVsbG8="),
    ],
)
def test_formats_have_what_people_write(name: str, text: str) -> None:
    assert accepts(guide_for(GuideParams(json={"type": "string", "format": name})), compact(text))


@pytest.mark.parametrize("text", ["2023-02-29", "2100-02-29", "2024-04-31", "0000-01-01", "2024-13-01"])
def test_no_day_that_does_not_exist(text: str) -> None:
    assert not accepts(guide_for(GuideParams(json={"type": "string", "format": "date"})), compact(text))


@pytest.mark.parametrize(("theirs", "ours"), KNOWN_PATTERNS.items())
def test_known_expressions_have_equal_ones(theirs: str, ours: str) -> None:
    draw = random.Random(0)
    letters = ["a", "b.", "..", ".", "@", "-", "x", "com", ".de", "'", "+", "@e.org", "1"]
    samples = ["".join(draw.choices(letters, k=draw.randint(1, 7))) for _ in range(20_000)]
    found = [bool(re.search(theirs, sample)) for sample in samples]
    assert found == [bool(re.search(ours, sample)) for sample in samples]
    assert sum(found) > 50


def test_complements_agree_with_pythons_unicode() -> None:
    for ranges, escape in (
        (code_points.not_word(), r"\W"),
        (code_points.not_digit(), r"\D"),
        (code_points.not_space(), r"\S"),
    ):
        for low, high in ranges:
            for point in range(low, min(high, low + 2000) + 1):
                assert re.fullmatch(escape, chr(point)), hex(point)


def test_ranges() -> None:
    assert code_points.union(((1, 3),), ((4, 5), (9, 9))) == ((1, 5), (9, 9))
    assert code_points.without(((0, 9),), ((2, 3), (5, 5))) == ((0, 1), (4, 4), (6, 9))
    assert code_points.complement(code_points.ANY) == ()
    assert expressions.write(expressions.literal("a.b")) == "a\\u{2e}b"
