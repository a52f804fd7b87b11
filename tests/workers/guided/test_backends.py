"""Matchers of both libraries keep one contract: what they allow, how they end, tokens alone as their state."""

from __future__ import annotations

import json

import jsonschema
import pytest
import torch

from tensorweave.cluster.guide import GUIDE_BACKENDS, Guide, GuideBackend
from tests.workers.guided.vocabularies import (
    SIZE,
    allowed,
    compile_guide,
    end_id,
    text_of,
    tokens_of,
    vocabulary,
    write_answer,
)

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z]{1,5}$"},
        "kind": {"enum": ["a", "bc"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
both = pytest.mark.parametrize("backend", GUIDE_BACKENDS)


@both
def test_every_complete_answer_validates(backend: GuideBackend) -> None:
    grammar = compile_guide(Guide("json_schema", json.dumps(SCHEMA), backend))
    answers = [write_answer(grammar, seed) for seed in range(20)]
    texts = [text_of(answer) for answer in answers if answer is not None]
    assert len(set(texts)) > 5
    for text in texts:
        jsonschema.validate(json.loads(text), SCHEMA)


@both
def test_only_stop_tokens_end_a_complete_text(backend: GuideBackend) -> None:
    grammar = compile_guide(Guide("regex", "ab?", backend))
    stops = (end_id(), *tokens_of("?"))
    matcher = grammar.matcher(stops)
    assert not allowed(matcher) & set(stops)
    assert matcher.accept(tokens_of("a"))
    assert allowed(matcher) == {*tokens_of("b"), *stops}
    assert matcher.accept(tokens_of("b"))
    assert allowed(matcher) == set(stops)
    assert matcher.accept([stops[1]])
    assert allowed(matcher) == set(), "it has ended"
    assert not matcher.accept([stops[1]])


@both
def test_a_stop_token_with_a_text_is_no_text_of_the_grammar(backend: GuideBackend) -> None:
    matcher = compile_guide(Guide("regex", "(a|b)+", backend)).matcher((end_id(), *tokens_of("b")))
    assert not allowed(matcher) & {end_id(), *tokens_of("b")}


@both
def test_without_stop_tokens_nothing_comes_after_the_end(backend: GuideBackend) -> None:
    matcher = compile_guide(Guide("regex", "a", backend)).matcher(())
    assert matcher.accept(tokens_of("a"))
    assert allowed(matcher) == set()


@both
def test_tokens_that_the_grammar_does_not_allow_are_not_accepted(backend: GuideBackend) -> None:
    grammar = compile_guide(Guide("regex", "abc", backend))
    assert not grammar.matcher((end_id(),)).accept(tokens_of("b"))
    assert not grammar.matcher((end_id(),)).accept([end_id()])


@both
def test_rolled_back_and_replayed_matchers_are_where_they_were(backend: GuideBackend) -> None:
    grammar = compile_guide(Guide("json_schema", json.dumps(SCHEMA), backend))
    answer = next(answer for answer in (write_answer(grammar, seed) for seed in range(9)) if answer is not None)
    answer = [*answer, end_id()]
    matcher, seen = grammar.matcher((end_id(),)), []
    for token in answer:
        seen.append(allowed(matcher))
        assert matcher.accept([token])
    for back in range(1, len(answer) + 1):
        matcher.roll_back(back)
        assert allowed(matcher) == seen[len(answer) - back]
        assert matcher.accept(answer[len(answer) - back :])
        replayed = grammar.matcher((end_id(),))
        assert replayed.accept(answer[: len(answer) - back])
        assert allowed(replayed) == seen[len(answer) - back]


@both
def test_matchers_of_one_grammar_share_nothing_that_changes(backend: GuideBackend) -> None:
    grammar = compile_guide(Guide("regex", "ab|ba", backend))
    matchers = [grammar.matcher((end_id(),)) for _ in range(3)]
    assert matchers[0].accept(tokens_of("a"))
    assert matchers[1].accept(tokens_of("b"))
    assert [allowed(matcher) for matcher in matchers] == [
        set(tokens_of("b")),
        set(tokens_of("a")),
        {*tokens_of("a"), *tokens_of("b"), *allowed_pairs()},
    ]


def allowed_pairs() -> set[int]:
    """Tokens of the vocabulary that are 'ab' or 'ba'."""
    return {tokens[0] for tokens in (tokens_of("ab"), tokens_of("ba")) if len(tokens) == 1}


@both
def test_a_batch_is_filled_as_its_rows_are(backend: GuideBackend) -> None:
    grammars = [compile_guide(Guide("regex", text, backend)) for text in ("abc", "[0-9]+", "x?")]
    matchers = [grammar.matcher(stops) for grammar in grammars for stops in ((end_id(),), (end_id(), 70), ())]
    for matcher, text in zip(matchers[1:], ("a", "", "1", "", "77", "x", "", ""), strict=True):
        assert matcher.accept(tokens_of(text))
    assert matchers[0].accept(tokens_of("abc"))
    assert matchers[0].accept([end_id()])
    masks = torch.full((len(matchers), (SIZE + 31) // 32), 0x55, dtype=torch.int32)
    assert matchers[0].filler.fill(matchers, masks) == {}
    single = torch.full_like(masks, 0x2A)
    for row, matcher in enumerate(matchers):
        matcher.filler.fill([matcher], single[row : row + 1])
    assert torch.equal(masks, single)


@both
def test_special_tokens_are_no_text(backend: GuideBackend) -> None:
    matcher = compile_guide(Guide("json_schema", '{"type": "string"}', backend)).matcher((end_id(),))
    assert matcher.accept(tokens_of('"'))
    special = {token for token, _ in vocabulary().special}
    assert len(special) == 3
    assert not allowed(matcher) & special
    assert max(allowed(matcher)) < SIZE


def test_a_special_token_that_the_guide_names_is_allowed_where_it_is_named() -> None:
    start, other = (token for token, text in vocabulary().special if text != "<|im_end|>")
    tag = {"type": "structural_tag", "format": {"type": "const_string", "value": "<|endoftext|>"}}
    matcher = compile_guide(Guide("structural_tag", json.dumps(tag))).matcher((end_id(),))
    assert start in allowed(matcher)
    assert other not in allowed(matcher)


@both
@pytest.mark.parametrize(("most", "fits"), [(0, {0}), (1, {0, 1}), (3, {0, 1, 3})])
def test_white_space_is_bounded(most: int, fits: set[int], backend: GuideBackend) -> None:
    grammar = compile_guide(Guide("json_schema", '{"type": "array", "items": {"type": "null"}}', backend, most))
    for num_spaces in (0, 1, 3, 4):
        accepted = grammar.matcher(()).accept(tokens_of("[" + " " * num_spaces + "null"))
        assert accepted == (num_spaces in fits), num_spaces


@both
@pytest.mark.parametrize(
    ("kind", "text", "says"),
    [
        ("json_schema", '{"type": "objekt"}', "objekt"),
        ("json_schema", "{", "JSON|line 1"),
        ("regex", "(a", "paren|unclosed"),
        ("regex", "(?=a)b", "[Ll]ook"),
    ],
)
def test_what_is_wrong_is_a_sentence(kind: str, text: str, says: str, backend: GuideBackend) -> None:
    with pytest.raises(ValueError, match=says) as raised:
        compile_guide(Guide(kind, text, backend))  # type: ignore[arg-type]
    assert "/project/" not in str(raised.value)
    assert "\n" not in str(raised.value)


def test_every_kind_of_guide_is_compiled() -> None:
    tag = {"type": "structural_tag", "format": {"type": "json_schema", "json_schema": {"type": "null"}}}
    for guide in (
        Guide("ebnf", 'root ::= "null"'),
        Guide("lark", 'start: "null"'),
        Guide("lark", 'start: "null"', "llguidance"),
        Guide("structural_tag", json.dumps(tag)),
    ):
        matcher = compile_guide(guide).matcher((end_id(),))
        assert matcher.accept([*tokens_of("null"), end_id()]), guide
    with pytest.raises(ValueError, match="ebnf"):
        compile_guide(Guide("ebnf", 'root ::= "a"', "llguidance"))
