"""Anthropic's Python client against the scripted service: python anthropic_check.py URL MODEL."""

from __future__ import annotations

import sys
from typing import Any

import anthropic

TASK = 'THINK Add.\nCALL add {"a": 2, "b": 40}\nSAY It is {result}.'
ADD: Any = {
    "name": "add",
    "description": "Adds.",
    "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
}


def check_loop(client: anthropic.Anthropic, fields: dict[str, Any], *, is_streamed: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": TASK}]
    for _ in range(2):
        asked = {**fields, "messages": messages, "tools": [ADD], "thinking": {"type": "enabled", "budget_tokens": 1024}}
        if is_streamed:
            with client.messages.stream(**asked) as stream:
                message = stream.get_final_message()
        else:
            message = client.messages.create(**asked)
        assert message.content[0].type == "thinking"
        messages.append({"role": "assistant", "content": message.content})
        calls = [block for block in message.content if block.type == "tool_use"]
        results = [
            {"type": "tool_result", "tool_use_id": call.id, "content": str(call.input["a"] + call.input["b"])}
            for call in calls
        ]
        messages.append({"role": "user", "content": results})
    assert (message.content[-1].text, message.stop_reason) == ("It is 42.", "end_turn")


def check_errors(client: anthropic.Anthropic, fields: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "Hi"}]
    for wrong, kind in (
        ({"model": "no-such-model"}, anthropic.NotFoundError),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, anthropic.BadRequestError),
    ):
        assert refusal(client, {**fields, "messages": messages, **wrong}, kind).body["type"] == "error"


def refusal(client: anthropic.Anthropic, fields: dict[str, Any], kind: type[anthropic.APIStatusError]) -> Any:
    try:
        client.messages.create(**fields)
    except kind as error:
        return error
    raise AssertionError(f"{sorted(fields)} was accepted")


def main() -> None:
    url, model = sys.argv[1:]
    client = anthropic.Anthropic(base_url=url, api_key="none", max_retries=0, timeout=120)
    fields = {"model": model, "max_tokens": 2000}
    for is_streamed in (False, True):
        check_loop(client, fields, is_streamed=is_streamed)
    counted = client.messages.count_tokens(model=model, messages=[{"role": "user", "content": "Hi"}]).input_tokens
    used = client.messages.create(**fields, messages=[{"role": "user", "content": "Hi"}]).usage
    assert counted == used.input_tokens + used.cache_read_input_tokens
    check_errors(client, fields)
    print(f"anthropic {anthropic.__version__}: ok")


if __name__ == "__main__":
    main()
