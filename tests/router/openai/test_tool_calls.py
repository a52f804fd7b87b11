"""Tools and reasoning in chats, whole and streamed. The model's text is scripted."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import httpx
import pytest

from tests.router.calls import CHAT, check_error, post
from tests.router.fake_fleet import FakeLink, Fault
from tests.router.serving import ONE_ATTEMPT, chat, events_of, model_info, script_of
from tests.router.small_tokenizers import hermes, hermes_with_special_marks

LOOK = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"at": {"type": "string"}}}},
}
ADD = {"type": "function", "function": {"name": "add", "description": "Adds.", "strict": True}}
TOOLS = [LOOK, ADD]
CALLS = (
    '<tool_call>\n{"name": "look", "arguments": {"at": "Köln"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call>'
)
ALL = f"<think>\nHm, ü.\n</think>\n\nLet me see.\n{CALLS}"


def ask(text: str, link: FakeLink | None = None, **fields: Any) -> httpx.Response:
    link = link or FakeLink(model_info(max_seq_len=4096), script=script_of(text))
    return post(CHAT, chat(**fields), link, tokenizer=hermes(), limits=ONE_ATTEMPT)


def message_of(text: str, **fields: Any) -> tuple[dict[str, Any], str]:
    answer = ask(text, **fields)
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    return choice["message"], choice["finish_reason"]


def summed(answer: httpx.Response) -> dict[str, Any]:
    """What a client makes of a streamed choice."""
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert all(choice["delta"] or choice["finish_reason"] or choice["logprobs"] for choice in choices)
    message: dict[str, Any] = {}
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = dict(choice["delta"])
            for call in delta.pop("tool_calls", ()):
                add_call(message.setdefault("tool_calls", []), call)
            for key, text in delta.items():
                message[key] = text if message.get(key) is None or key == "role" else message[key] + text
    message["finish_reason"] = chunks[-1]["choices"][0]["finish_reason"]
    return message


def add_call(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """The first delta of a call has all but the arguments; the others have nothing else."""
    if delta["index"] == len(calls):
        assert set(delta) == {"index", "id", "type", "function"}
        assert delta["function"]["arguments"] == ""
        calls.append({"id": delta["id"], "type": delta["type"], "function": dict(delta["function"])})
        return
    assert set(delta) == {"index", "function"}
    assert set(delta["function"]) == {"arguments"}
    assert delta["index"] == len(calls) - 1
    calls[-1]["function"]["arguments"] += delta["function"]["arguments"]


def test_reasoning_content_and_calls() -> None:
    message, reason = message_of(ALL, tools=TOOLS)
    assert reason == "tool_calls"
    assert message["reasoning"] == message["reasoning_content"] == "Hm, ü."
    assert message["content"] == "Let me see."
    look, add = message["tool_calls"]
    assert look["type"] == "function"
    assert (look["function"]["name"], json.loads(look["function"]["arguments"])) == ("look", {"at": "Köln"})
    assert (add["function"]["name"], json.loads(add["function"]["arguments"])) == ("add", {})
    assert look["id"] != add["id"]


def test_content_is_null_if_there_are_only_calls() -> None:
    message, _ = message_of(CALLS, tools=TOOLS)
    assert message["content"] is None
    assert "reasoning" not in message


@pytest.mark.parametrize("tokens_per_step", [1, 2, 7])
def test_a_stream_says_the_same(tokens_per_step: int) -> None:
    link = FakeLink(model_info(max_seq_len=4096), script=script_of(ALL), tokens_per_step=tokens_per_step)
    streamed = summed(ask("", link, tools=TOOLS, stream=True))
    message, reason = message_of(ALL, tools=TOOLS)
    assert streamed.pop("finish_reason") == reason
    for calls in (streamed["tool_calls"], message["tool_calls"]):
        for call in calls:
            assert call.pop("id")
    assert streamed == message


def test_what_is_no_call_is_content() -> None:
    for text, fields in (
        (CALLS, {}),
        (CALLS, {"tools": TOOLS, "tool_choice": "none"}),
        ("<tool_call>\nnothing of the kind", {"tools": TOOLS}),
    ):
        message, reason = message_of(text, **fields)
        assert (message["content"], reason) == (text, "stop")
        assert "tool_calls" not in message


def test_a_call_that_is_cut_short_keeps_its_text() -> None:
    for max_tokens in range(20, len(script_of(CALLS)), 3):
        whole, reason = message_of(CALLS, tools=TOOLS, max_tokens=max_tokens)
        assert reason == "length"
        streamed = summed(ask(CALLS, tools=TOOLS, max_tokens=max_tokens, stream=True))
        assert streamed["finish_reason"] == "length"
        assert (streamed["content"] or None) == (whole["content"] or None)
        written = [call["function"] for call in whole.get("tool_calls", ())]
        assert [call["function"] for call in streamed.get("tool_calls", ())] == written


def test_reasoning_can_be_left_out_or_left_in() -> None:
    text = "<think>Hm.</think>Yes."
    assert message_of(text)[0]["reasoning"] == "Hm."
    left_out = message_of(text, include_reasoning=False)[0]
    assert (left_out["content"], left_out.get("reasoning")) == ("Yes.", None)
    assert message_of(text, separate_reasoning=False)[0]["content"] == text
    streamed = summed(ask(text, include_reasoning=False, stream=True))
    assert streamed == {"role": "assistant", "content": "Yes.", "refusal": None, "finish_reason": "stop"}


def test_reasoning_tokens_are_counted() -> None:
    thought, text = "Hm, let me think about it.", "Yes."
    answer = ask(f"<think>{thought}</think>{text}", stream=True, stream_options={"include_usage": True})
    *_, last, _ = events_of(answer.text)
    usage = last["usage"]
    exact = len(script_of(f"<think>{thought}")) - 1
    assert usage["completion_tokens_details"]["reasoning_tokens"] == exact
    whole = ask(f"<think>{thought}</think>{text}").json()["usage"]
    assert whole == usage
    assert ask(text).json()["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0


def test_every_token_has_its_log_probability() -> None:
    fields: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = ask(ALL, **fields).json()
    ids = whole["choices"][0]["token_ids"]
    assert ids == script_of(ALL)
    assert len(whole["choices"][0]["logprobs"]["content"]) == whole["usage"]["completion_tokens"] == len(ids)
    chunks = events_of(ask(ALL, **fields, stream=True).text)[:-1]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [token for choice in choices for token in choice.get("token_ids", ())] == ids
    told = [token for choice in choices if choice["logprobs"] for token in choice["logprobs"]["content"]]
    assert told == whole["choices"][0]["logprobs"]["content"]


def test_each_of_several_choices_is_parsed_alone() -> None:
    for fields in ({}, {"stream": True}):
        answer = ask(CALLS, tools=TOOLS, n=3, seed=1, **fields)
        if not fields:
            choices = answer.json()["choices"]
            assert [len(choice["message"]["tool_calls"]) for choice in choices] == [2, 2, 2]
            ids = {call["id"] for choice in choices for call in choice["message"]["tool_calls"]}
            assert len(ids) == 6
            continue
        reasons = [
            (choice["index"], choice["finish_reason"])
            for chunk in events_of(answer.text)[:-1]
            for choice in chunk["choices"]
            if choice["finish_reason"]
        ]
        assert sorted(reasons) == [(0, "tool_calls"), (1, "tool_calls"), (2, "tool_calls")]


def test_a_stop_string_ends_a_text_before_its_call() -> None:
    message, reason = message_of(ALL, tools=TOOLS, stop=["see."])
    assert (message["content"], reason) == ("Let me ", "stop")
    assert "tool_calls" not in message


def test_an_error_within_a_call_is_the_last_event() -> None:
    link = FakeLink(model_info(max_seq_len=4096), script=script_of(CALLS), faults=[Fault("error", after=60)])
    *chunks, last = events_of(ask("", link, tools=TOOLS, stream=True).text)
    assert any(choice["delta"].get("tool_calls") for chunk in chunks for choice in chunk["choices"])
    assert set(last["error"]) == {"message", "type", "param", "code"}


def test_deprecated_functions_are_answered_in_their_form() -> None:
    functions = [LOOK["function"]]
    call = CALLS.partition('\n<tool_call>\n{"name": "add"')[0]
    answer = ask(call, functions=functions).json()["choices"][0]
    assert answer["finish_reason"] == "function_call"
    assert answer["message"]["content"] is None
    assert answer["message"]["function_call"]["name"] == "look"
    assert json.loads(answer["message"]["function_call"]["arguments"]) == {"at": "Köln"}
    chunks = events_of(ask(call, functions=functions, stream=True).text)[:-1]
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    pieces = [delta["function_call"] for delta in deltas if "function_call" in delta]
    assert pieces[0] == {"name": "look", "arguments": ""}
    assert "".join(piece["arguments"] for piece in pieces) == answer["message"]["function_call"]["arguments"]
    assert chunks[-1]["choices"][0]["finish_reason"] == "function_call"


# ---- what reaches the prompt and the gang


def sent(**fields: Any) -> tuple[str, Any]:
    """The prompt's text, and the guide."""
    link = FakeLink(model_info(max_seq_len=4096), script=script_of("Yes."))
    answer = ask("", link, **fields)
    assert answer.status_code == 200, answer.text
    [request] = link.requests
    return hermes().decode(request.prompt_token_ids, skip_special_tokens=False), request.sampling.guide


def test_the_prompt_lists_the_tools_unless_none_is_to_be_called() -> None:
    prompt, guide = sent(tools=[LOOK])
    assert '"name": "look"' in prompt
    assert guide is None
    for choice in ("none", None):
        prompt, guide = sent(**({"tools": [LOOK], "tool_choice": choice} if choice else {}))
        assert "look" not in prompt
        assert guide is None


@pytest.mark.parametrize(
    ("fields", "has_look", "has_add"),
    [
        ({"tool_choice": "required"}, True, True),
        ({"tool_choice": {"type": "function", "function": {"name": "add"}}}, False, True),
        ({"parallel_tool_calls": False}, True, True),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [{"type": "function", "function": {"name": "look"}}]},
                }
            },
            True,
            False,
        ),
    ],
)
def test_the_guide_has_the_functions_that_may_be_called(fields: dict[str, Any], has_look: bool, has_add: bool) -> None:
    prompt, guide = sent(tools=TOOLS, **fields)
    assert '"name": "look"' in prompt
    assert '"name": "add"' in prompt
    assert guide.kind == "structural_tag"
    assert ("look" in guide.text, "add" in guide.text) == (has_look, has_add)


def test_a_budget_of_reasoning_is_part_of_the_guide() -> None:
    _, guide = sent(thinking_token_budget=7)
    assert '"max_tokens": 7' in guide.text
    link = FakeLink(model_info())
    check_error(post(CHAT, chat(thinking_token_budget=7), link), 400, "thinking_token_budget")


def test_effort_switches_reasoning_off() -> None:
    assert sent(reasoning_effort="none")[0].endswith("<think>\n\n</think>\n\n")
    assert sent(reasoning_effort="high")[0].endswith("assistant\n")
    assert sent(chat_template_kwargs={"enable_thinking": False})[0].endswith("<think>\n\n</think>\n\n")
    assert sent(reasoning_effort="none", chat_template_kwargs={"enable_thinking": True})[0].endswith("assistant\n")


def test_an_answer_may_continue_a_message() -> None:
    messages = [{"role": "user", "content": "Count."}, {"role": "assistant", "content": "One, two"}]
    prompt, _ = sent(messages=messages, continue_final_message=True)
    assert prompt.endswith("<|im_start|>assistant\nOne, two")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "fly"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "look"}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look", "x": 1}}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "look"}, "x": 1}}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK, LOOK]}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": "no spaces"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{**LOOK, "x": 1}]}, "tools[0].x"),
        ({"tools": TOOLS, "functions": [LOOK["function"]]}, "functions"),
        ({"functions": [LOOK["function"]], "function_call": {"name": "add"}}, "function_call"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"continue_final_message": True, "add_generation_prompt": True}, "continue_final_message"),
        ({"chat_template": "x"}, "chat_template"),
        ({"stream_reasoning": False}, "stream_reasoning"),
    ],
)
def test_what_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    check_error(ask("", FakeLink(model_info()), **fields), 400, param)


# ---- schemas of functions


def with_schema(schema: dict[str, Any], **function: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "look", "parameters": schema, **function}}


def test_a_strict_schema_is_enforced_whole() -> None:
    """Otherwise it is followed as far as it can be enforced, where a call is required."""
    schema = {"type": "object", "properties": {"at": {"type": "array", "uniqueItems": True, "items": {}}}}
    plain, strict = with_schema(schema), with_schema(schema, strict=True)
    assert sent(tools=[plain])[1] is None
    for choice in ("auto", "required"):
        error = check_error(
            ask("", FakeLink(model_info()), tools=[strict], tool_choice=choice), 400, "tools[0].function.parameters"
        )
        assert "'uniqueItems'" in error["message"]
    guide = sent(tools=[plain], tool_choice="required")[1]
    assert '"at"' in guide.text
    assert "uniqueItems" not in guide.text


def test_calls_and_a_form_of_the_text_go_together() -> None:
    """Either calls or the text."""
    schema = {"type": "object", "properties": {"x": {"type": "integer"}}}
    form = {"type": "json_schema", "json_schema": {"name": "f", "schema": schema}}
    _, guide = sent(tools=[LOOK], response_format=form)
    assert guide.kind == "structural_tag"
    assert '"look"' in guide.text.replace("\\", "")
    assert '"x"' in guide.text
    _, alone = sent(response_format=form, reasoning_effort="none")
    assert alone.kind == "json_schema"
    _, reasoned = sent(response_format=form)
    assert "</think>" in reasoned.text


def test_a_guide_says_where_to_end() -> None:
    fields = {"tools": [LOOK], "tool_choice": "required", "ignore_eos": True}
    check_error(ask("", FakeLink(model_info()), **fields), 400, "ignore_eos")


@pytest.mark.parametrize("backend", [None, "llguidance"])
def test_a_service_without_the_backend_refuses_what_it_cannot_enforce(backend: Any) -> None:
    info = dataclasses.replace(model_info(), guided_decoding_backend=backend)
    for fields, param in (
        ({"tools": [LOOK], "tool_choice": "required"}, "tools"),
        ({"thinking_token_budget": 5}, "thinking_token_budget"),
    ):
        check_error(ask("", FakeLink(info), **fields), 400, param)
    assert ask("Yes.", FakeLink(info, script=script_of("Yes.")), tools=[LOOK]).status_code == 200


@pytest.mark.parametrize("fields", [{}, {"stream": True}])
def test_a_call_goes_on_after_its_gang_is_lost(fields: dict[str, Any]) -> None:
    """The text is parsed once, whichever gangs wrote it."""
    info = model_info(max_seq_len=4096)
    for after in (5, 40, 75):
        links = [
            FakeLink(info, gang_id=gang_id, script=script_of(ALL), faults=[Fault("error", after=after)])
            for gang_id in ("gang-a", "gang-b")
        ]
        answer = post(CHAT, chat(tools=TOOLS, **fields), *links, tokenizer=hermes())
        assert answer.status_code == 200, answer.text
        message = summed(answer) if fields else answer.json()["choices"][0]["message"]
        assert message["reasoning"] == "Hm, ü."
        calls = [call["function"] for call in message["tool_calls"]]
        assert [(call["name"], json.loads(call["arguments"])) for call in calls] == [
            ("look", {"at": "Köln"}),
            ("add", {}),
        ]
        assert sum(len(link.requests) for link in links) >= 2
        assert any(request.num_replayed for link in links for request in link.requests)


def test_marks_that_are_special_tokens_reach_the_parser_and_no_others_do() -> None:
    tokenizer = hermes_with_special_marks()
    text = ALL.replace("see.", "see<other>.")
    script = [*tokenizer.encode(text), tokenizer.encode("<|im_end|>")[0]]
    link = FakeLink(model_info(max_seq_len=4096, vocab_size=tokenizer.vocab_size), script=script)
    fields: dict[str, Any] = {"tools": TOOLS, "logprobs": True, "return_token_ids": True}
    [choice] = post(CHAT, chat(**fields), link, tokenizer=tokenizer).json()["choices"]
    message, _ = message_of(ALL, tools=TOOLS)
    for key in ("reasoning", "content"):
        assert choice["message"][key] == message[key]
    assert [call["function"] for call in choice["message"]["tool_calls"]] == [
        call["function"] for call in message["tool_calls"]
    ]
    assert choice["token_ids"] == script
    assert len(choice["logprobs"]["content"]) == len(script)
    streamed = summed(post(CHAT, chat(**fields, stream=True), link, tokenizer=tokenizer))
    assert streamed["content"] == message["content"]
    plain = post(CHAT, chat(include_reasoning=False, tools=TOOLS), link, tokenizer=tokenizer).json()["choices"][0]
    assert plain["message"]["content"] == "Let me see."
