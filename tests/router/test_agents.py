"""Conversations of several turns with tools, through OpenAI's and Anthropic's own clients, against a scripted model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pytest
from anthropic import AsyncAnthropic
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel

from tensorweave.router.http.app import build_app
from tests.router.scripted_model import ScriptedLink
from tests.router.serving import MODEL, PATIENCE_S, make_service, model_info, running
from tests.router.small_tokenizers import hermes

T = TypeVar("T")

TASK = """\
THINK First add, then look.
CALL add {"a": 2, "b": 40}
CALL look {"at": "東京"} && add {"a": 1, "b": 1}
SAY It is {result}."""
SCHEMA: dict[str, Any] = {"type": "object", "properties": {"a": {}, "b": {}, "at": {}}}


def run_tool(name: str, arguments: dict[str, Any]) -> str:
    return str(arguments["a"] + arguments["b"]) if name == "add" else f"seen {arguments['at']}"


def with_service(use: Callable[[str], Awaitable[T]]) -> T:
    async def run() -> T:
        link = ScriptedLink(model_info(max_seq_len=8192), hermes())
        async with running(build_app(make_service(link, tokenizer=hermes()))) as url:
            return await use(url)

    return asyncio.run(run())


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_loop_over_chats(is_streamed: bool) -> None:
    tools: list[Any] = [
        {"type": "function", "function": {"name": name, "parameters": SCHEMA}} for name in ("add", "look")
    ]
    seen: list[tuple[str, str]] = []

    async def use(url: str) -> str:
        messages: list[Any] = [{"role": "user", "content": TASK}]
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            while True:
                message = await one(client, messages)
                messages.append(message.model_dump())
                if not message.tool_calls:
                    return str(message.content)
                for call in message.tool_calls:
                    result = run_tool(call.function.name, json.loads(call.function.arguments))
                    seen.append((call.function.name, result))
                    messages.append({"role": "tool", "tool_call_id": call.id, "content": result})

    async def one(client: AsyncOpenAI, messages: list[Any]) -> Any:
        fields: dict[str, Any] = {"model": MODEL, "messages": messages, "tools": tools}
        if not is_streamed:
            choice = (await client.chat.completions.create(**fields)).choices[0]
        else:
            async with client.chat.completions.stream(**fields) as stream:
                async for _ in stream:
                    pass
                choice = (await stream.get_final_completion()).choices[0]
        assert choice.finish_reason == ("tool_calls" if choice.message.tool_calls else "stop")
        assert choice.message.model_extra["reasoning_content"] == "First add, then look."
        return choice.message

    assert with_service(use) == "It is 2."
    assert seen == [("add", "42"), ("look", "seen 東京"), ("add", "2")]


def test_a_loop_over_responses() -> None:
    tools: list[Any] = [{"type": "function", "name": name, "parameters": SCHEMA} for name in ("add", "look")]
    seen: list[str] = []

    async def use(url: str) -> str:
        items: list[Any] = [{"role": "user", "content": TASK}]
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            while True:
                response = await client.responses.create(model=MODEL, input=items, tools=tools, store=False)
                items += [item.model_dump(exclude_none=True) for item in response.output]
                calls = [item for item in response.output if item.type == "function_call"]
                if not calls:
                    return response.output_text
                for call in calls:
                    seen.append(run_tool(call.name, json.loads(call.arguments)))
                    items.append({"type": "function_call_output", "call_id": call.call_id, "output": seen[-1]})

    assert with_service(use) == "It is 2."
    assert seen == ["42", "seen 東京", "2"]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_loop_over_messages(is_streamed: bool) -> None:
    tools: list[Any] = [{"name": name, "input_schema": SCHEMA} for name in ("add", "look")]
    seen: list[str] = []

    async def use(url: str) -> str:
        messages: list[Any] = [{"role": "user", "content": TASK}]
        async with AsyncAnthropic(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            while True:
                message = await one(client, messages)
                messages.append({"role": "assistant", "content": message.content})
                calls = [block for block in message.content if block.type == "tool_use"]
                assert message.stop_reason == ("tool_use" if calls else "end_turn")
                if not calls:
                    return str(message.content[-1].text)
                results = []
                for call in calls:
                    seen.append(run_tool(call.name, call.input))
                    results.append({"type": "tool_result", "tool_use_id": call.id, "content": seen[-1]})
                messages.append({"role": "user", "content": results})

    async def one(client: AsyncAnthropic, messages: list[Any]) -> Any:
        fields: dict[str, Any] = {
            "model": MODEL, "max_tokens": 500, "messages": messages, "tools": tools, "thinking": {"type": "adaptive"},
        }  # fmt: skip
        if not is_streamed:
            return await client.messages.create(**fields)
        async with client.messages.stream(**fields) as stream:
            return await stream.get_final_message()

    assert with_service(use) == "It is 2."
    assert seen == ["42", "seen 東京", "2"]


class Sum(BaseModel):
    a: int
    b: int


def test_parsed_calls() -> None:
    """`parse` makes strict functions of classes, and objects of their calls."""

    async def use(url: str) -> Any:
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            answer = await client.chat.completions.parse(
                model=MODEL,
                messages=[{"role": "user", "content": 'CALL Sum {"a": 1, "b": 2}'}],
                tools=[pydantic_function_tool(Sum)],
            )
            calls = answer.choices[0].message.tool_calls
            assert calls is not None
            return calls[0].function.parsed_arguments

    assert with_service(use) == Sum(a=1, b=2)


def test_parsed_texts() -> None:
    """`parse` asks for a form, and makes objects of the text."""

    async def use(url: str) -> tuple[Any, Any]:
        told = 'SAY {"a": 1, "b": 2}'
        async with AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=PATIENCE_S) as client:
            chat = await client.chat.completions.parse(
                model=MODEL, messages=[{"role": "user", "content": told}], response_format=Sum
            )
            response = await client.responses.parse(model=MODEL, input=told, text_format=Sum)
            return chat.choices[0].message.parsed, response.output_parsed

    assert with_service(use) == (Sum(a=1, b=2), Sum(a=1, b=2))
