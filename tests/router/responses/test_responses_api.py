"""/v1/responses through OpenAI's own client, whole and streamed, against a scripted model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from functools import reduce
from operator import or_
from typing import Any, TypeVar

import openai
import pytest
from openai import AsyncOpenAI
from openai.types.responses import Response
from openai.types.responses import response_create_params as params
from pydantic import TypeAdapter

from tensorweave.router.http.app import build_app
from tensorweave.router.responses.request import ResponsesRequest
from tensorweave.router.responses.schemas import EVENTS, ResponseObject
from tests.router.calls import check_error, post
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import MODEL, ONE_ATTEMPT, PATIENCE_S, make_service, model_info, running, script_of
from tests.router.small_tokenizers import hermes

T = TypeVar("T")

RESPONSES = "/v1/responses"
LOOK: dict[str, Any] = {
    "type": "function",
    "name": "look",
    "description": "Looks.",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    "strict": False,
}
CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "Köln"}}\n</tool_call>'
ALL = f"<think>\nHm, ü.\n</think>\n\nLet me see.\n{CALL}"
EVENT: TypeAdapter[Any] = TypeAdapter(reduce(or_, EVENTS))


def scripted(text: str, **options: Any) -> FakeLink:
    return FakeLink(model_info(max_seq_len=4096), script=script_of(text), **options)


def with_client(use: Callable[[AsyncOpenAI], Awaitable[T]], link: FakeLink) -> T:
    async def run() -> T:
        app = build_app(make_service(link, tokenizer=hermes(), limits=ONE_ATTEMPT))
        async with (
            running(app) as url,
            AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client,
        ):
            return await use(client)

    return asyncio.run(run())


def create(link: FakeLink, **fields: Any) -> Response:
    async def use(client: AsyncOpenAI) -> Response:
        return await client.responses.create(**{"model": MODEL, "input": "Hi", **fields})

    return with_client(use, link)


def stream(link: FakeLink, **fields: Any) -> tuple[Response, list[Any]]:
    async def use(client: AsyncOpenAI) -> tuple[Response, list[Any]]:
        async with client.responses.stream(**{"model": MODEL, "input": "Hi", **fields}) as events:
            seen = [event async for event in events]
            return await events.get_final_response(), seen

    return with_client(use, link)


def body(**fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "input": "Hi", **fields}


def plain(response: Response) -> dict[str, Any]:
    """Without what is drawn, and without what a client adds."""
    fields = response.model_dump(exclude_none=True, exclude={"id", "created_at", "usage"})
    for item in fields["output"]:
        for key in ("id", "call_id", "parsed_arguments"):
            item.pop(key, None)
    return fields


@pytest.mark.parametrize("tokens_per_step", [1, 5])
@pytest.mark.parametrize("summary", [None, "auto"])
def test_reasoning_text_and_a_call(tokens_per_step: int, summary: str | None) -> None:
    asked: dict[str, Any] = {"tools": [LOOK], "reasoning": {"effort": "high", "summary": summary}}
    whole = create(scripted(ALL, num_cached=2), **asked)
    reasoning, text, call = whole.output
    assert [item.type for item in whole.output] == ["reasoning", "message", "function_call"]
    if summary:
        assert [part.text for part in reasoning.summary] == ["Hm, ü."]
    else:
        assert [part.text for part in reasoning.content] == ["Hm, ü."]
    assert whole.output_text == text.content[0].text == "Let me see."
    assert (call.name, json.loads(call.arguments)) == ("look", {"at": "Köln"})
    assert (whole.status, whole.store, whole.previous_response_id) == ("completed", False, None)
    assert whole.usage.input_tokens_details.cached_tokens == 2
    assert whole.usage.output_tokens_details.reasoning_tokens > 0
    streamed, _ = stream(scripted(ALL, num_cached=2, tokens_per_step=tokens_per_step), **asked)
    assert plain(streamed) == plain(whole)


@pytest.mark.parametrize("summary", [None, "auto"])
def test_events_have_numbers_and_add_up(summary: str | None) -> None:
    asked = body(tools=[LOOK], stream=True, reasoning={"summary": summary})
    answer = post(RESPONSES, asked, scripted(ALL), tokenizer=hermes())
    events = []
    for block in filter(None, answer.text.split("\n\n")):
        name, data = block.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        EVENT.validate_python(fields)
        events.append(fields)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == events[-1]["response"]["output"]
    for place, item in enumerate(done):
        pieces = [event["delta"] for event in events if "delta" in event and event["output_index"] == place]
        text = (
            item["arguments"]
            if item["type"] == "function_call"
            else (item.get("content") or item["summary"])[0]["text"]
        )
        assert "".join(pieces) == text


def test_an_answer_that_is_cut_short_is_incomplete() -> None:
    answer = post(RESPONSES, body(stream=True, max_output_tokens=30), scripted(ALL), tokenizer=hermes())
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    assert last["type"] == "response.incomplete"
    for whole in (create(scripted(ALL), max_output_tokens=30), Response.model_validate(last["response"])):
        assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
        assert whole.output[-1].status == "incomplete"


def test_an_error_in_a_stream_fails_the_response() -> None:
    link = scripted("Yes, I do. I really do.", faults=[Fault("error", after=4)])
    answer = post(RESPONSES, body(stream=True), link, tokenizer=hermes(), limits=ONE_ATTEMPT)
    last = json.loads(answer.text.rstrip().rpartition("data: ")[2])
    EVENT.validate_python(last)
    assert last["type"] == "response.failed"
    assert last["response"]["error"]["code"] == "server_error"
    assert last["response"]["output"][0]["status"] == "incomplete"


def prompt_of(**fields: Any) -> str:
    link = scripted("Yes.")
    create(link, **fields)
    return hermes().decode(link.requests[0].prompt_token_ids, skip_special_tokens=False)


def test_the_items_of_a_conversation_reach_the_template() -> None:
    items: list[Any] = [
        {"role": "developer", "content": [{"type": "input_text", "text": "D"}]},
        {"type": "message", "role": "user", "content": "a"},
        {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {
            "type": "message", "id": "msg_1", "role": "assistant", "status": "completed",
            "content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}],
        },
        {"type": "function_call", "id": "fc_1", "call_id": "c1", "name": "look", "arguments": '{"at": "x"}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": "{}", "status": "completed"},
        {"type": "function_call_output", "call_id": "c1", "output": "42"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "43"}]},
    ]  # fmt: skip
    prompt = prompt_of(input=items, instructions="S")
    assert prompt == (
        "<|im_start|>system\nS\n\nD<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think>hm</think>b"
        '<tool_call>{"name": "look", "arguments": {"at": "x"}}</tool_call>'
        '<tool_call>{"name": "look", "arguments": {}}</tool_call><|im_end|>\n'
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>tool\n43<|im_end|>\n<|im_start|>assistant\n"
    )


def test_what_an_answer_says_can_be_sent_back() -> None:
    first = create(scripted(ALL), tools=[LOOK])
    items = [{"role": "user", "content": "Hi"}, *[item.model_dump() for item in first.output]]
    items.append({"type": "function_call_output", "call_id": first.output[-1].call_id, "output": "42"})
    prompt = prompt_of(input=items, tools=[LOOK])
    assert '<think>Hm, ü.</think>Let me see.<tool_call>{"name": "look", "arguments": {"at": "Köln"}}' in prompt
    assert prompt.endswith("<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n")


def test_choice_of_tools_is_in_the_guide() -> None:
    for choice in (
        "required",
        {"type": "function", "name": "look"},
        {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "look"}]},
    ):
        link = scripted("Yes.")
        create(link, tools=[LOOK], tool_choice=choice)
        guide = link.requests[0].sampling.guide
        assert guide is not None
        assert "look" in guide.text


def test_the_answer_repeats_the_request() -> None:
    asked = body(
        instructions="S", max_output_tokens=5, metadata={"a": "b"}, parallel_tool_calls=False, prompt_cache_key="k",
        reasoning={"effort": "low"}, safety_identifier="s", temperature=0.5, top_p=0.25, tools=[LOOK], user="u",
        text={"verbosity": "low", "format": {"type": "text"}}, store=True, service_tier="auto",
        include=["reasoning.encrypted_content"], truncation="disabled", tool_choice="auto",
    )  # fmt: skip
    answer = post(RESPONSES, asked, scripted("Yes."), tokenizer=hermes())
    assert answer.status_code == 200, answer.text
    response = answer.json()
    ResponseObject.model_validate(response)
    for name in ("instructions", "max_output_tokens", "metadata", "parallel_tool_calls", "prompt_cache_key", "user"):
        assert response[name] == asked[name]
    for name in ("temperature", "top_p", "tools", "tool_choice", "text", "safety_identifier"):
        assert response[name] == asked[name]
    assert response["store"] is False
    padded = json.dumps(asked).encode().ljust(20_000)  # read by another process
    again = post(RESPONSES, padded, scripted("Yes."), tokenizer=hermes()).json()
    drawn = {"id", "created_at", "output"}
    assert {key: again[key] for key in again.keys() - drawn} == {key: response[key] for key in again.keys() - drawn}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "c"}, "conversation"),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [LOOK], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "look", "also": 1}}, "tool_choice"),
        ({"tools": [{**LOOK, "strict": True, "parameters": {"not": {}}}]}, "tools[0].parameters"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "fly"}}, "tool_choice"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0]"),
        ({"input": []}, "input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0]"),
        ({"include": ["web_search_call.results"]}, "include[0]"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"truncation": "auto"}, "truncation"),
        ({"input": "x " * 9000}, "input"),
        ({"temprature": 1}, "temprature"),
    ],
)
def test_what_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    answer = post(RESPONSES, body(**fields), scripted("Yes."), tokenizer=hermes())
    assert answer.status_code == 400
    named = answer.json()["error"]["param"]
    assert named.startswith(param)
    check_error(answer, 400, named)


def test_every_field_of_openais_client_is_known() -> None:
    fields = set(params.ResponseCreateParamsBase.__annotations__) | {"stream"}
    assert "instructions" in fields
    assert fields <= {*ResponsesRequest.model_fields, *ResponsesRequest.OFF}


def test_a_wrong_model_is_not_found() -> None:
    with pytest.raises(openai.NotFoundError):
        create(scripted("Yes."), model="other")
