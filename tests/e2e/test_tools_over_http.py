"""Tools and forms over HTTP with a random model, whose calls are right only because the engine holds it to them."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from tensorweave.cluster.fleet import StaticFleet
from tensorweave.cluster.kv_cache_config import KvCacheConfig
from tensorweave.cluster.llm_args import TorchLlmArgs
from tensorweave.router.dispatch.dispatch import Dispatcher
from tensorweave.router.http.app import build_app
from tensorweave.router.service import RouterService
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.build import build_executor
from tensorweave.workers.executor.executor import PyExecutor
from tensorweave.workers.executor.local import LocalLink
from tensorweave.workers.gang.comm import SoloComm
from tensorweave.workers.start_log import StartLog
from tests.router.serving import client_of, events_of, quick_bodies
from tests.router.small_tokenizers import hermes
from tests.workers.tiny_models import make_model

CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
NAME = "tiny"
LOOK: dict[str, Any] = {
    "type": "object",
    "properties": {"at": {"enum": ["Köln", "東京"]}, "times": {"type": "integer", "minimum": 0, "maximum": 9}},
    "required": ["at", "times"],
    "additionalProperties": False,
}
ADD: dict[str, Any] = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
SCHEMAS = {"look": LOOK, "add": ADD}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
SEEDS = range(4)


class Service:
    """The HTTP application over an executor in this process; all requests are of one event loop."""

    def __init__(self, runner: asyncio.Runner, executor: PyExecutor, tokenizer: Tokenizer) -> None:
        self._runner = runner
        self._link = runner.run(self._open(executor))
        fleet = StaticFleet({"both": [self._link]})
        self._service = RouterService(NAME, tokenizer, Dispatcher(fleet), fleet, "1.2.3")
        self._service.bodies = quick_bodies(self._service)
        self._app = build_app(self._service)

    def ask(self, path: str, *bodies: dict[str, Any]) -> list[httpx.Response]:
        """At once."""
        return self._runner.run(self._ask(path, bodies))

    def close(self) -> None:
        self._runner.run(self._service.bodies.close())
        self._link.close()

    async def _open(self, executor: PyExecutor) -> LocalLink:
        return LocalLink(executor, None)

    async def _ask(self, path: str, bodies: Sequence[dict[str, Any]]) -> list[httpx.Response]:
        async with client_of(self._app) as client:
            answers = await asyncio.gather(*[client.post(path, json={"model": NAME, **body}) for body in bodies])
        assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers]
        return list(answers)


@contextmanager
def random_service(path: Path, tokenizer: Tokenizer) -> Iterator[Service]:
    """A random model in `path` with this tokenizer."""
    make_model("llama", path, vocab_size=tokenizer.vocab_size, eos_token_id=tokenizer.eos_id)
    tokenizer.backend.save_pretrained(path)
    executor = build_executor(
        TorchLlmArgs(model=path, kv_cache_config=KvCacheConfig(max_tokens=8192)),
        SoloComm(),
        transfer_secret=secrets.token_hex(16),
        event_buffer_size=0,
        log=StartLog(shows_bars=False),
    )
    executor.start()
    with asyncio.Runner() as runner:
        service = Service(runner, executor, tokenizer)
        yield service
        service.close()
        executor.shutdown()


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with random_service(tmp_path_factory.mktemp("model"), hermes()) as service:
        yield service


def chat(**fields: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 300, **fields}


def calls_of(answer: httpx.Response) -> list[tuple[str, str]]:
    [choice] = answer.json()["choices"]
    assert choice["finish_reason"] == "tool_calls", choice
    assert choice["message"]["content"] is None
    return [(call["function"]["name"], call["function"]["arguments"]) for call in choice["message"]["tool_calls"]]


def streamed_calls_of(answer: httpx.Response) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    *chunks, done = events_of(answer.text)
    assert done == "[DONE]"
    for chunk in chunks:
        for delta in chunk["choices"][0]["delta"].get("tool_calls", ()):
            function = delta["function"]
            if "name" in function:
                calls.append((function["name"], ""))
            name, arguments = calls[-1]
            calls[-1] = name, arguments + function["arguments"]
    return calls


def check_valid(calls: list[tuple[str, str]]) -> None:
    assert calls
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"tool_choice": "required", "parallel_tool_calls": False}, {"look", "add"}),
        ({"tool_choice": {"type": "function", "function": {"name": "look"}}}, {"look"}),
    ],
    ids=["required", "named"],
)
def test_calls_that_must_be_made_are_right(service: Service, fields: dict[str, Any], names: set[str]) -> None:
    """With and without streaming, they are the same."""
    bodies = [chat(tools=TOOLS, seed=seed, reasoning_effort="none", **fields) for seed in SEEDS]
    whole = [calls_of(answer) for answer in service.ask(CHAT, *bodies)]
    streamed = [streamed_calls_of(a) for a in service.ask(CHAT, *[{**body, "stream": True} for body in bodies])]
    assert streamed == whole
    for calls in whole:
        check_valid(calls)
        assert len(calls) == 1
        assert calls[0][0] in names


def test_several_calls(service: Service) -> None:
    """A random model goes on calling until it has no room; what is whole is right."""
    bodies = [chat(tools=TOOLS, seed=seed, reasoning_effort="none", tool_choice="required") for seed in SEEDS]
    for answer in service.ask(CHAT, *bodies):
        [choice] = answer.json()["choices"]
        calls = [call["function"] for call in choice["message"]["tool_calls"]]
        whole = calls if choice["finish_reason"] == "tool_calls" else calls[:-1]
        for call in whole:
            jsonschema.validate(json.loads(call["arguments"]), SCHEMAS[call["name"]])


def test_reasoning_has_its_budget(service: Service) -> None:
    bodies = [chat(thinking_token_budget=10, seed=seed, max_tokens=60) for seed in SEEDS]
    for answer in service.ask(CHAT, *bodies):
        thought = answer.json()["usage"]["completion_tokens_details"]["reasoning_tokens"]
        assert thought <= 10 + len(hermes().encode("<think></think>\n\n"))


def test_responses_and_messages_are_held_to_the_same(service: Service) -> None:
    tools = [{"type": "function", "name": name, "parameters": schema} for name, schema in SCHEMAS.items()]
    fields: dict[str, Any] = {"tool_choice": "required", "parallel_tool_calls": False, "reasoning": {"effort": "none"}}
    bodies = [{"input": "Hi", "max_output_tokens": 300, "tools": tools, "seed": seed, **fields} for seed in SEEDS]
    for answer in service.ask(RESPONSES, *bodies):
        [call] = answer.json()["output"]
        check_valid([(call["name"], call["arguments"])])
    tools = [{"name": name, "input_schema": schema} for name, schema in SCHEMAS.items()]
    choice = {"type": "any", "disable_parallel_tool_use": True}
    for answer in service.ask(MESSAGES, *[chat(tools=tools, seed=seed, tool_choice=choice) for seed in SEEDS]):
        [call] = answer.json()["content"]
        jsonschema.validate(call["input"], SCHEMAS[call["name"]])


def test_the_form_of_a_text(service: Service) -> None:
    spelled: dict[str, list[dict[str, Any]]] = {
        CHAT: [
            chat(
                response_format={"type": "json_schema", "json_schema": {"name": "f", "schema": LOOK}},
                reasoning_effort="none",
                seed=seed,
            )
            for seed in SEEDS
        ],
        RESPONSES: [
            {
                "input": "Hi",
                "text": {"format": {"type": "json_schema", "name": "f", "schema": LOOK}},
                "reasoning": {"effort": "none"},
                "seed": seed,
            }
            for seed in SEEDS
        ],
        MESSAGES: [
            chat(output_config={"format": {"type": "json_schema", "schema": LOOK}}, seed=seed) for seed in SEEDS
        ],
    }
    for path, bodies in spelled.items():
        for answer in service.ask(path, *bodies):
            jsonschema.validate(json.loads(text_of(path, answer.json())), LOOK)


def text_of(path: str, answer: dict[str, Any]) -> str:
    if path == CHAT:
        return str(answer["choices"][0]["message"]["content"])
    [item] = answer["output"] if path == RESPONSES else [answer]
    return str(item["content"][0]["text"])
