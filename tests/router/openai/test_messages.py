"""Messages that are answers come back as history, with all that other servers and clients put into them."""

from __future__ import annotations

import asyncio
import dataclasses
from typing import Any

import pytest

from tensorweave.router.http.app import build_app
from tests.router.calls import CHAT, check_error, post
from tests.router.fake_fleet import FakeLink
from tests.router.serving import MODEL, client_of, make_service, model_info
from tests.router.small_tokenizers import byte_level_with, hermes

KEYS = [
    "annotations", "audio", "function_call", "images", "name", "provider_specific_fields", "reasoning",
    "reasoning_content", "reasoning_details", "refusal", "thinking_blocks", "tool_calls",
]  # fmt: skip
DEEP: Any = {}
for _ in range(190):  # bodies may have 200 levels
    DEEP = {"a": DEEP}
NOTHING: list[Any] = [None, "", [], {}, {"refusal": None}, {"a": {"b": "", "c": []}}, DEEP]
SOMETHING: list[Any] = ["x", [{}], [None], {"a": 0}, {"a": {"b": False}}, 0, False, 1.5]
TEXTS = ("name", "reasoning", "reasoning_content")
READ = (*TEXTS, "refusal", "tool_calls", "function_call", "provider_specific_fields")


def with_history(**keys: Any) -> dict[str, Any]:
    history = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", **keys},
        {"role": "user", "content": "c"},
    ]
    return {"model": MODEL, "messages": history}


def prompt_of(body: dict[str, Any], path: str = CHAT) -> list[int]:
    link = FakeLink(model_info())
    answer = post(path, body, link)
    assert answer.status_code == 200, answer.text
    return list(link.requests[0].prompt_token_ids)


@pytest.mark.parametrize("key", KEYS)
def test_what_says_nothing_changes_nothing(key: str) -> None:
    plain = prompt_of(with_history())
    for value in NOTHING if key not in TEXTS else (None, ""):
        assert prompt_of(with_history(**{key: value})) == plain


@pytest.mark.parametrize("key", sorted({*KEYS, "unheard_of"} - {*READ}))
def test_what_says_something_is_refused_by_name(key: str) -> None:
    for value in SOMETHING:
        answer = post(CHAT, with_history(**{key: value}), FakeLink(model_info()))
        check_error(answer, 400, f"messages[1].{key}")


@pytest.mark.parametrize("key", ["reasoning", "reasoning_content"])
def test_reasoning_is_for_the_template_to_read(key: str) -> None:
    """One that does not read it leaves it out, as it does everywhere."""
    assert prompt_of(with_history(**{key: "hm"})) == prompt_of(with_history())
    tokenizer = byte_level_with(
        "{% for m in messages %}{{ m.reasoning_content | default('-') }}|{{ m.content }};{% endfor %}"
    )
    service = dataclasses.replace(make_service(link := FakeLink(model_info())), tokenizer=tokenizer)
    run(service, with_history(**{key: "hm"}))
    assert tokenizer.decode(link.requests[0].prompt_token_ids) == "-|a;hm|b;-|c;"
    check_error(post(CHAT, with_history(**{key: 5}), FakeLink(model_info())), 400, f"messages[1].{key}")
    body = {"model": MODEL, "messages": [{"role": "user", "content": "a", key: "hm"}]}
    check_error(post(CHAT, body, FakeLink(model_info())), 400, f"messages[0].{key}")


CALL = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": [1, "ü"]}'}}


def with_calls(*more: dict[str, Any], **keys: Any) -> dict[str, Any]:
    assistant = {"role": "assistant", "content": None, "tool_calls": [CALL], **keys}
    return {"model": MODEL, "messages": [{"role": "user", "content": "a"}, assistant, *more]}


def rendered(body: dict[str, Any]) -> str:
    link = FakeLink(model_info())
    answer = post(CHAT, body, link, tokenizer=hermes())
    assert answer.status_code == 200, answer.text
    return hermes().decode(link.requests[0].prompt_token_ids, skip_special_tokens=False)


def test_calls_and_their_results_are_for_the_template() -> None:
    result = {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "42"}]}
    text = rendered(with_calls(result, reasoning="hm"))
    assert '<think>hm</think><tool_call>{"name": "look", "arguments": {"at": [1, "ü"]}}</tool_call><|im_end|>' in text
    assert text.endswith("<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")


def test_what_other_clients_put_beside_calls_is_taken() -> None:
    plain = rendered(with_calls())
    for keys in (
        {"function_call": None},
        {"annotations": []},
        {"refusal": None},
        {"audio": None},
        {"provider_specific_fields": {"reasoning": "hm"}},
    ):
        assert rendered(with_calls(**keys)) == plain
    assert rendered(with_calls(tool_calls=[{**CALL, "index": 0, "provider_specific_fields": None}])) == plain
    legacy = with_calls(tool_calls=None, function_call=CALL["function"])
    assert rendered(legacy) == plain
    function = {"role": "function", "name": "look", "content": "42"}
    tool = {"role": "tool", "tool_call_id": "c1", "content": "42"}
    assert rendered(with_calls(function)) == rendered(with_calls(tool))


def test_arguments_that_are_no_object_are_passed_on_as_they_are() -> None:
    for arguments, expected in (("", "null"), ("{", '"{"'), ("[1]", '"[1]"')):
        call = {**CALL, "function": {"name": "look", "arguments": arguments}}
        text = rendered(with_calls(tool_calls=[call]))
        assert f'"arguments": {expected if arguments else {}}' in text


def test_a_template_may_take_arguments_as_text() -> None:
    tokenizer = byte_level_with(
        "{% for m in messages %}{{ m.content }}{% for call in m.tool_calls or [] %}"
        "{{ call.function.name + call.function.arguments }}{% endfor %}{% endfor %}"
    )
    link = FakeLink(model_info())
    assert post(CHAT, with_calls(), link, tokenizer=tokenizer).status_code == 200
    assert tokenizer.decode(link.requests[0].prompt_token_ids) == 'alook{"at":[1,"ü"]}'


def test_a_template_that_leaves_calls_out_is_not_asked_to() -> None:
    tokenizer = byte_level_with("{{ tools }}{% for m in messages %}{{ m.content }}{% endfor %}")
    answer = post(CHAT, with_calls(), FakeLink(model_info()), tokenizer=tokenizer)
    error = check_error(answer, 400, "messages[1].tool_calls")
    assert "does not write calls" in error["message"]


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "user", "content": "a", "tool_calls": [CALL]}, "messages[0].tool_calls"),
        ({"role": "user", "content": "a", "refusal": "no"}, "messages[0].refusal"),
        ({"role": "user", "content": "a", "tool_call_id": "c1"}, "messages[0].tool_call_id"),
        ({"role": "tool", "content": "a"}, "messages[0].tool_call_id"),
        ({"role": "tool", "tool_call_id": "c1"}, "messages[0].content"),
        ({"role": "assistant", "tool_calls": [{**CALL, "x": 1}]}, "messages[0].tool_calls[0].x"),
        ({"role": "assistant", "tool_calls": [{**CALL, "type": "custom"}]}, "messages[0].tool_calls[0].type"),
        ({"role": "user", "content": [{"type": "refusal", "refusal": "no"}]}, "messages[0].content"),
    ],
)
def test_what_is_out_of_place_is_refused(message: dict[str, Any], param: str) -> None:
    body = {"model": MODEL, "messages": [message]}
    check_error(post(CHAT, body, FakeLink(model_info()), tokenizer=hermes()), 400, param)


def test_a_refusal_is_an_assistants_text() -> None:
    for keys in ({"content": None, "refusal": "no"}, {"content": [{"type": "refusal", "refusal": "no"}]}):
        body = {"model": MODEL, "messages": [{"role": "assistant", **keys}, {"role": "user", "content": "a"}]}
        assert rendered(body).startswith("<|im_start|>assistant\nno<|im_end|>")


def run(service: Any, body: dict[str, Any]) -> None:
    async def call() -> None:
        async with client_of(build_app(service)) as client:
            assert (await client.post(CHAT, json=body)).status_code == 200

    asyncio.run(call())


# ---- parts


def with_part(**keys: Any) -> dict[str, Any]:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", **keys}]
    return {"model": MODEL, "messages": [{"role": "user", "content": parts}]}


def test_marks_for_caches_change_nothing() -> None:
    plain = prompt_of(with_part())
    for keys in (
        {"cache_control": {"type": "ephemeral"}},
        {"prompt_cache_breakpoint": {"mode": "explicit"}},
        {"x": None},
    ):
        assert prompt_of(with_part(**keys)) == plain


@pytest.mark.parametrize("path", [CHAT, "/tokenize"])
@pytest.mark.parametrize(("key", "value"), [("txt", "x"), ("image_url", {"url": "x"}), ("cache_control", "ephemeral")])
def test_an_unknown_key_in_a_part_is_refused_by_name(path: str, key: str, value: Any) -> None:
    check_error(post(path, with_part(**{key: value}), FakeLink(model_info())), 400, f"messages[0].content[1].{key}")


def test_an_unknown_key_in_a_message_is_refused_at_tokenize_too() -> None:
    answer = post("/tokenize", with_history(unheard_of=[{"id": "1"}]), FakeLink(model_info()))
    check_error(answer, 400, "messages[1].unheard_of")
