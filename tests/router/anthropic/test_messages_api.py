"""/v1/messages through Anthropic's own client, whole and streamed, against a scripted model."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import anthropic
import pytest
from anthropic import AsyncAnthropic
from pydantic import TypeAdapter

from tensorweave.router.anthropic.schemas import EVENTS, AnswerMessage, MessagesError
from tensorweave.router.http.app import build_app
from tests.router.calls import post
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import MODEL, ONE_ATTEMPT, PATIENCE_S, make_service, model_info, running, script_of
from tests.router.small_tokenizers import hermes

T = TypeVar("T")

MESSAGES = "/v1/messages"
LOOK: dict[str, Any] = {
    "name": "look",
    "description": "Looks.",
    "input_schema": {"type": "object", "properties": {"at": {"type": "string"}}},
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "Köln"}}\n</tool_call>'
ALL = f"<think>\nHm, ü.\n</think>\n\nLet me see.\n{CALL}"
USER: list[Any] = [{"role": "user", "content": "Hi"}]


def scripted(text: str, **options: Any) -> FakeLink:
    return FakeLink(model_info(max_seq_len=4096), script=script_of(text), **options)


def with_client(use: Callable[[AsyncAnthropic], Awaitable[T]], link: FakeLink) -> T:
    async def run() -> T:
        app = build_app(make_service(link, tokenizer=hermes(), limits=ONE_ATTEMPT))
        async with (
            running(app) as url,
            AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def create(link: FakeLink, **fields: Any) -> anthropic.types.Message:
    async def use(client: AsyncAnthropic) -> anthropic.types.Message:
        return await client.messages.create(**{"model": MODEL, "max_tokens": 500, "messages": USER, **fields})

    return with_client(use, link)


def stream(link: FakeLink, **fields: Any) -> tuple[anthropic.types.Message, list[Any]]:
    async def use(client: AsyncAnthropic) -> tuple[anthropic.types.Message, list[Any]]:
        asked = {"model": MODEL, "max_tokens": 500, "messages": USER, **fields}
        async with client.messages.stream(**asked) as events:
            seen = [event async for event in events]
            return await events.get_final_message(), seen

    return with_client(use, link)


def plain(message: anthropic.types.Message) -> dict[str, Any]:
    """Without what is drawn, and without what a client adds."""
    fields = message.model_dump(exclude_none=True, exclude={"id"})
    for block in fields["content"]:
        if block["type"] == "tool_use":
            assert block.pop("id")
        block.pop("parsed_output", None)
    return fields


@pytest.mark.parametrize("tokens_per_step", [1, 5])
def test_thinking_text_and_a_call(tokens_per_step: int) -> None:
    asked = {"tools": [LOOK], "thinking": {"type": "enabled", "budget_tokens": 1024}}
    whole = create(scripted(ALL, num_cached=2), **asked)
    assert [block.type for block in whole.content] == ["thinking", "text", "tool_use"]
    thinking, text, call = whole.content
    assert (thinking.thinking, text.text) == ("Hm, ü.", "Let me see.")
    assert (call.name, call.input) == ("look", {"at": "Köln"})
    assert (whole.stop_reason, whole.stop_sequence) == ("tool_use", None)
    assert whole.usage.cache_read_input_tokens == 2
    assert whole.usage.output_tokens == len(script_of(ALL))
    streamed, _ = stream(scripted(ALL, num_cached=2, tokens_per_step=tokens_per_step), **asked)
    assert plain(streamed) == plain(whole)


def test_events_come_in_anthropics_order_and_form() -> None:
    body = {"model": MODEL, "max_tokens": 500, "messages": USER, "tools": [LOOK], "stream": True}
    answer = post(MESSAGES, body, scripted(ALL), tokenizer=hermes())
    blocks = [block.split("\n") for block in answer.text.split("\n\n") if block]
    event = TypeAdapter(EVENTS[0] | EVENTS[1] | EVENTS[2] | EVENTS[3] | EVENTS[4] | EVENTS[5] | EVENTS[6])
    kinds = []
    for name, data in blocks:
        fields = json.loads(data.removeprefix("data: "))
        event.validate_python(fields)
        assert name == f"event: {fields['type']}"
        kinds.append(fields["type"])
    assert kinds[:2] == ["message_start", "ping"]
    assert kinds[-2:] == ["message_delta", "message_stop"]
    assert kinds.count("content_block_start") == kinds.count("content_block_stop") == 3


def test_why_an_answer_ended() -> None:
    assert create(scripted("Yes.")).stop_reason == "end_turn"
    assert create(scripted("Yes, I do."), max_tokens=2).stop_reason == "max_tokens"
    stopped = create(scripted("Yes, I do."), stop_sequences=["I do"])
    assert (stopped.stop_reason, stopped.stop_sequence, stopped.content[0].text) == ("stop_sequence", "I do", "Yes, ")
    streamed, _ = stream(scripted("Yes, I do."), stop_sequences=["I do"])
    assert (streamed.stop_reason, streamed.stop_sequence) == ("stop_sequence", "I do")


def test_input_of_a_call_that_is_cut_short_is_as_much_as_there_is() -> None:
    call = CALL.replace("Köln", "Bonn")
    for max_tokens in range(20, len(script_of(call)), 3):
        body = {"model": MODEL, "max_tokens": max_tokens, "messages": USER, "tools": [LOOK]}
        message = post(MESSAGES, body, scripted(call), tokenizer=hermes()).json()
        assert message["stop_reason"] == "max_tokens"
        for block in message["content"]:
            if block["type"] == "tool_use":
                assert block["input"] in ({}, *({"at": "Bonn"[:end]} for end in range(5)))


def test_input_of_numbers_that_are_large() -> None:
    """Models write integers of more than 64 bits, and NaN. Neither can be sent."""
    call = CALL.replace('"Köln"', '123456789012345678901234567890, "b": NaN')
    message = post(
        MESSAGES,
        {"model": MODEL, "max_tokens": 500, "messages": USER, "tools": [LOOK]},
        scripted(call),
        tokenizer=hermes(),
    ).json()
    assert message["content"][0]["input"] == {"at": 1.2345678901234568e29, "b": None}


def prompt_of(**fields: Any) -> str:
    link = scripted("Yes.")
    create(link, **fields)
    return hermes().decode(link.requests[0].prompt_token_ids, skip_special_tokens=False)


def test_a_conversation_with_results_reaches_the_template() -> None:
    history: list[Any] = [
        {"role": "user", "content": [{"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": ""},
                {"type": "text", "text": "b"},
                {"type": "tool_use", "id": "t1", "name": "look", "input": {"at": "x"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "42"}]},
                {"type": "tool_result", "tool_use_id": "t1", "content": "oh", "is_error": True},
                {"type": "text", "text": "c"},
            ],
        },
    ]
    prompt = prompt_of(messages=history, system=[{"type": "text", "text": "S"}], tools=[LOOK])
    begin, _, rest = prompt.partition("<|im_start|>system\nS<|im_end|>\n")
    assert '"name": "look"' in begin
    assert rest == (
        "<|im_start|>user\na<|im_end|>\n"
        '<|im_start|>assistant\n<think>hm</think>b<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call>'
        "<|im_end|>\n<|im_start|>tool\n42<|im_end|>\n<|im_start|>tool\nError: oh<|im_end|>\n<|im_start|>user\nc"
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )


def test_thinking_is_off_unless_it_is_asked_for() -> None:
    assert prompt_of().endswith("</think>\n\n")
    assert prompt_of(thinking={"type": "disabled"}).endswith("</think>\n\n")
    assert prompt_of(thinking={"type": "adaptive"}).endswith("assistant\n")


def test_an_answer_continues_a_last_message_of_the_assistant() -> None:
    prompt = prompt_of(messages=[*USER, {"role": "assistant", "content": "One, two"}])
    assert prompt.endswith("<|im_start|>assistant\nOne, two")


def test_budget_and_choice_of_tools_are_in_the_guide() -> None:
    for fields, words in (
        ({"thinking": {"type": "enabled", "budget_tokens": 77}}, ["77"]),
        ({"tools": [LOOK], "tool_choice": {"type": "any"}}, ["look"]),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "look"}}, ["look"]),
        ({"tools": [LOOK], "tool_choice": {"type": "auto", "disable_parallel_tool_use": True}}, ["look"]),
    ):
        link = scripted("Yes.")
        create(link, **fields)
        guide = link.requests[0].sampling.guide
        assert guide is not None
        assert all(word in guide.text for word in words)
    link = scripted("Yes.")
    create(link, tools=[LOOK], tool_choice={"type": "none"})
    assert link.requests[0].sampling.guide is None


def test_tokens_are_counted_as_they_are_used() -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "system": "S", "tools": [LOOK]}

    async def use(client: AsyncAnthropic) -> int:
        return (await client.messages.count_tokens(**asked)).input_tokens

    assert with_client(use, scripted("Yes.")) == create(scripted("Yes."), **asked).usage.input_tokens


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "image"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"tools": [LOOK], "tool_choice": {"type": "tool", "name": "fly"}}, "tool_choice"),
        ({"tools": [{**LOOK, "strict": True, "input_schema": {"not": {}}}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"temperature": 1.5}, "temperature"),
        ({"container": "x"}, "container"),
        ({"context_management": {"edits": [{"type": "clear_tool_uses_20250919"}]}}, "context_management"),
        ({"system": "x " * 9000}, "context length"),
    ],
)
def test_errors_have_anthropics_form(fields: dict[str, Any], words: str) -> None:
    body = {"model": MODEL, "max_tokens": 5, "messages": USER, **fields}
    answer = post(MESSAGES, body, scripted("Yes."), tokenizer=hermes())
    assert answer.status_code == 400
    error = MessagesError.model_validate(answer.json()).error
    assert error.type == "invalid_request_error"
    assert words in error.message


def test_a_budget_that_the_service_cannot_enforce_is_named_as_it_was_sent() -> None:
    link = FakeLink(dataclasses.replace(model_info(max_seq_len=4096), guided_decoding_backend=None))
    thinking = {"type": "enabled", "budget_tokens": 77}
    body = {"model": MODEL, "max_tokens": 5, "messages": USER, "thinking": thinking}
    error = MessagesError.model_validate(post(MESSAGES, body, link, tokenizer=hermes()).json()).error
    assert error.message.startswith("thinking.budget_tokens: ")


def test_a_client_sees_errors_of_their_kind() -> None:
    with pytest.raises(anthropic.NotFoundError) as unknown:
        create(scripted("Yes."), model="other")
    assert unknown.value.body["error"]["type"] == "not_found_error"
    with pytest.raises(anthropic.BadRequestError):
        create(scripted("Yes."), max_tokens=0)
    answer = post("/v1/messages/nothing", {}, scripted("Yes."))
    assert answer.json()["error"]["type"] == "not_found_error"


def test_an_error_in_a_stream_is_its_last_event() -> None:
    link = scripted("Yes, I do. I really do.", faults=[Fault("error", after=4)])
    with pytest.raises(anthropic.APIStatusError) as caught:
        stream(link)
    assert caught.value.body["error"]["type"] == "overloaded_error"


def test_what_clients_send_without_effect_is_taken() -> None:
    body = {
        "model": MODEL, "max_tokens": 5, "messages": USER, "metadata": {"user_id": "u"}, "service_tier": "auto",
        "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
        "thinking": {"type": "adaptive", "display": "summarized"}, "output_config": {"effort": "high"},
        "tools": [{**LOOK, "type": "custom", "cache_control": {"type": "ephemeral"}, "eager_input_streaming": True}],
    }  # fmt: skip
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x", "x-api-key": "none"}
    answer = post(f"{MESSAGES}?beta=true", body, scripted("Yes."), tokenizer=hermes(), headers=headers)
    assert answer.status_code == 200, answer.text
    AnswerMessage.model_validate(answer.json())
