"""response_format, structured_outputs and guided_*: each gives the guide that it stands for, or an error with its
name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from tensorweave.cluster.guide import Guide
from tests.router.calls import CHAT, COMPLETIONS, check_error, post
from tests.router.fake_fleet import FakeLink
from tests.router.serving import chat, completion, model_info, script_of
from tests.router.small_tokenizers import hermes

BODIES = {CHAT: chat(max_tokens=9), COMPLETIONS: completion(max_tokens=9)}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
WRITTEN = {**SCHEMA, "additionalProperties": False}
TAG = {"type": "tag", "begin": "<a>", "content": {"type": "json_schema", "json_schema": SCHEMA}, "end": "</a>"}
SPEC = {"name": "Thing-1_x", "schema": SCHEMA, "strict": True, "description": "A thing."}

JSON_FORMS: list[dict[str, Any]] = [
    {"response_format": {"type": "json_schema", "json_schema": SPEC}},
    {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA, "strict": False}}},
    {"response_format": {"type": "json", "schema": SCHEMA}},
    {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"structured_outputs": {"json": SCHEMA}},
    {"structured_outputs": {"json": json.dumps(SCHEMA)}},
    {"guided_json": SCHEMA},
    {"guided_json": json.dumps(SCHEMA)},
]


def guide_of(path: str, fields: dict[str, Any]) -> Guide | None:
    link = FakeLink(model_info(), script=script_of("x"))
    answer = post(path, BODIES[path] | fields, link)
    assert answer.status_code == 200, answer.text
    [request] = link.requests
    guide: Guide | None = request.sampling.guide
    return guide


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("fields", JSON_FORMS, ids=lambda fields: json.dumps(fields)[2:60])
def test_a_schema(path: str, fields: dict[str, Any]) -> None:
    guide = guide_of(path, fields)
    assert guide is not None
    assert (guide.kind, guide.backend, guide.max_whitespace) == ("json_schema", "xgrammar", 8)
    assert json.loads(guide.text) == WRITTEN


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        ({"response_format": {"type": "regex", "regex": "^a|b+$"}}, "regex", "(?:a|b+)"),
        ({"structured_outputs": {"regex": "[ab]"}}, "regex", "[a-b]"),
        ({"guided_regex": "[ab]"}, "regex", "[a-b]"),
        ({"response_format": {"type": "ebnf", "ebnf": 'root ::= "a"'}}, "ebnf", 'root ::= "a"'),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "ebnf", 'root ::= "a"'),
        ({"guided_grammar": 'root ::= "a"'}, "ebnf", 'root ::= "a"'),
        ({"structured_outputs": {"choice": ["yes", "no"]}}, "regex", "yes|no"),
        ({"guided_choice": ["a.b", "a.b", "c"]}, "regex", "a\\u{2e}b|c"),
    ],
)
def test_expressions_grammars_and_choices(path: str, fields: dict[str, Any], kind: str, text: str) -> None:
    guide = guide_of(path, fields)
    assert guide is not None
    assert (guide.kind, guide.backend) == (kind, "xgrammar")
    assert guide.text.replace("(?:(?:", "(?:").strip("()?:") == text.strip("()?:")


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "structural_tag", "format": TAG}},
        {"structured_outputs": {"structural_tag": {"type": "structural_tag", "format": TAG}}},
        {"structured_outputs": {"structural_tag": json.dumps({"type": "structural_tag", "format": TAG})}},
    ],
)
def test_a_structural_tag(fields: dict[str, Any]) -> None:
    guide = guide_of(CHAT, fields)
    assert guide is not None
    assert guide.kind == "structural_tag"
    content = json.loads(guide.text)["format"]["content"]
    assert content == {"type": "json_schema", "json_schema": WRITTEN, "max_whitespace_cnt": 8}


def test_the_older_form_of_structural_tags() -> None:
    structures = [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]
    form = {"type": "structural_tag", "structures": structures, "triggers": ["<f"]}
    guide = guide_of(CHAT, {"response_format": form})
    assert guide is not None
    written = json.loads(guide.text)["format"]
    assert written["type"] == "triggered_tags"
    assert written["tags"][0]["content"]["json_schema"] == WRITTEN


def test_any_object() -> None:
    for fields in ({"response_format": {"type": "json_object"}}, {"structured_outputs": {"json_object": True}}):
        guide = guide_of(CHAT, fields)
        assert guide is not None
        assert json.loads(guide.text) == {"type": "object", "additionalProperties": {}}


@pytest.mark.parametrize("fields", [{"response_format": {"type": "text"}}, {"response_format": None}, {}])
def test_free_text(fields: dict[str, Any]) -> None:
    assert guide_of(CHAT, fields) is None
    assert guide_of(CHAT, fields | {"guided_regex": "a"}) is not None


def test_options_of_structured_outputs() -> None:
    open_schema = {**SCHEMA, "additionalProperties": True}
    options = {"disable_any_whitespace": True, "disable_additional_properties": True}
    guide = guide_of(CHAT, {"structured_outputs": {"json": open_schema, **options}})
    assert guide is not None
    assert guide.max_whitespace == 0
    assert json.loads(guide.text) == WRITTEN


def format_of(name: str, value: Any) -> dict[str, Any]:
    schema = {"type": "object", "properties": {"x": {"type": "string", name: value}}, "required": ["x"]}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}


@pytest.mark.parametrize(("name", "value"), [("format", "date"), ("pattern", "^[a-z]+$"), ("minLength", 1)])
def test_a_form_that_llguidance_enforces_beside_reasoning(name: str, value: Any) -> None:
    """There it is a grammar for xgrammar, within the tag."""
    alone = guide_of(CHAT, format_of(name, value))
    assert alone is not None
    assert alone.backend == "llguidance"
    link = FakeLink(model_info(max_seq_len=4096), script=script_of("x"))
    answer = post(CHAT, BODIES[CHAT] | format_of(name, value), link, tokenizer=hermes())
    assert answer.status_code == 200, answer.text
    [request] = link.requests
    guide = request.sampling.guide
    assert (guide.kind, guide.backend) == ("structural_tag", "xgrammar")
    assert '"grammar"' in guide.text


def test_a_form_that_only_llguidance_enforces_is_refused_beside_reasoning() -> None:
    fields = BODIES[CHAT] | format_of("maxLength", 5)
    answer = post(CHAT, fields, FakeLink(model_info(max_seq_len=4096)), tokenizer=hermes())
    error = check_error(answer, 400, "response_format.json_schema.schema")
    assert "'maxLength' at '/properties/x' is not enforced by xgrammar, which reasoning" in error["message"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needs"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
        "response_format.json_schema.schema",
        "",
    ),
    ({"response_format": {"type": "json"}}, "response_format.schema", "needs"),
    ({"response_format": {"type": "text", "schema": {}}}, "response_format.schema", "no field of the type text"),
    ({"response_format": {"type": "regex", "regex": ""}}, "response_format.regex", "empty"),
    ({"response_format": {"type": "ebnf", "ebnf": " "}}, "response_format.ebnf", "empty"),
    ({"response_format": {"type": "structural_tag"}}, "response_format", "has a format"),
    ({"response_format": {"type": "json_object", "strict": True}}, "response_format.strict", ""),
    ({"structured_outputs": {}}, "structured_outputs", "exactly one of json, regex"),
    ({"structured_outputs": {"json": {}, "regex": "a"}}, "structured_outputs", "json and regex"),
    ({"structured_outputs": {"json": {}, "whitespace_pattern": " "}}, "structured_outputs.whitespace_pattern", ""),
    ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", ""),
    ({"guided_choice": [""]}, "guided_choice", "none of them empty"),
    ({"guided_regex": "(?=a)b"}, "guided_regex", "lookahead"),
    ({"guided_regex": "a", "guided_json": {}}, "guided_regex", "guided_json and guided_regex exclude each other"),
    (
        {"response_format": {"type": "json_object"}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "response_format and structured_outputs exclude each other",
    ),
    ({"guided_regex": "a", "ignore_eos": True}, "ignore_eos", "exclude each other"),
    ({"guided_json": {"properties": {"x": {"uniqueItems": True}}}}, "guided_json", "'uniqueItems' at '/properties/x'"),
    ({"guided_json": "{"}, "guided_json", "no JSON"),
    ({"guided_json": {"type": "strin"}}, "guided_json", "'type' is 'strin'"),
    ({"guided_json": {"maxLenght": 3}}, "guided_json", "did you mean 'maxLength'"),
]


@pytest.mark.parametrize(("fields", "param", "message"), BAD, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_named(fields: dict[str, Any], param: str, message: str) -> None:
    error = check_error(post(CHAT, BODIES[CHAT] | fields, FakeLink(model_info())), 400, param)
    assert message in error["message"]


@pytest.mark.parametrize("name", ["", "a b", "é", "a.b", "x" * 65])
def test_a_name_of_a_schema_is_checked(name: str) -> None:
    form = {"type": "json_schema", "json_schema": {"name": name, "schema": SCHEMA}}
    answer = post(CHAT, BODIES[CHAT] | {"response_format": form}, FakeLink(model_info()))
    check_error(answer, 400, "response_format.json_schema.name")


def test_a_service_without_a_backend_refuses() -> None:
    link = FakeLink(replace(model_info(), guided_decoding_backend=None))
    error = check_error(post(CHAT, BODIES[CHAT] | {"guided_regex": "a"}, link), 400, "guided_regex")
    assert "guided_decoding_backend" in error["message"]


def test_a_large_schema_is_refused() -> None:
    schema = {"enum": ["x" * 100 for _ in range(700)]}
    error = check_error(post(CHAT, BODIES[CHAT] | {"guided_json": schema}, FakeLink(model_info())), 400, "guided_json")
    assert "the limit is 65536" in error["message"]
