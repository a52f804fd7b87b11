"""Fields of other servers that are not built: accepted if they ask for nothing, else refused by name."""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as completion_params
from openai.types.chat import completion_create_params as chat_params

from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.requests import CompletionRequest
from tests.router.calls import CHAT, COMPLETIONS, check_error, post, scripted
from tests.router.fake_fleet import FakeLink
from tests.router.serving import chat, completion, model_info

BODIES = {CHAT: chat(max_tokens=1), COMPLETIONS: completion(max_tokens=1)}
MODELS = {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest}
NOT_BUILT = [(path, name, values) for path, model in MODELS.items() for name, values in model.OFF.items()]
KNOWN_ELSEWHERE = [
    "allowed_token_ids",
    "detokenize",
    "kv_transfer_params",
    "logits_processors",
    "return_context_logits",
    "return_tokens_as_token_ids",
    "vllm_xargs",
]


@pytest.mark.parametrize(("path", "name", "values"), NOT_BUILT, ids=lambda value: str(value)[-20:])
def test_what_asks_for_nothing_is_taken(path: str, name: str, values: tuple[Any, ...]) -> None:
    for value in (None, *values):
        answer = post(path, BODIES[path] | {name: value}, scripted())
        assert answer.status_code == 200, answer.text
    error = check_error(post(path, BODIES[path] | {name: {"something": ["else"]}}, FakeLink(model_info())), 400, name)
    assert f"{name} is not supported yet" in error["message"]


SERVICES: dict[str, list[Any]] = {
    "metadata": [{}, {"run": "7"}],
    "prompt_cache_options": [{"mode": "explicit", "ttl": "30m"}],
    "prompt_cache_retention": ["in_memory", "24h"],
    "safety_identifier": ["", "hash-of-a-user"],
    "service_tier": ["auto", "default", "flex", "scale", "priority", "fast"],
    "store": [True, False],
}
CHAT_SERVICES: dict[str, list[Any]] = {
    "parallel_tool_calls": [True, False],
    "include_reasoning": [True, False],
    "separate_reasoning": [True, False],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "continue_final_message": [False],
    "prediction": [{"type": "content", "content": "Paris"}],
    "reasoning_effort": ["none", "minimal", "low", "medium", "high", "xhigh", "max"],
    "verbosity": ["low", "medium", "high"],
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_what_chooses_among_openais_services_changes_nothing(path: str) -> None:
    plain = FakeLink(model_info())
    post(path, BODIES[path] | {"seed": 1}, plain)
    [expected] = plain.requests
    for name, values in (SERVICES | (CHAT_SERVICES if path == CHAT else {})).items():
        for value in (None, *values):
            link = FakeLink(model_info())
            answer = post(path, BODIES[path] | {"seed": 1, name: value}, link)
            assert answer.status_code == 200, answer.text
            [request] = link.requests
            assert list(request.prompt_token_ids) == list(expected.prompt_token_ids)
            assert request.sampling == expected.sampling


@pytest.mark.parametrize(
    ("path", "params"),
    [
        (CHAT, chat_params.CompletionCreateParamsBase),
        (COMPLETIONS, completion_params.CompletionCreateParamsBase),
    ],
)
def test_every_field_of_openais_client_is_known(path: str, params: Any) -> None:
    fields = set(params.__annotations__) | {"stream"}
    assert "logit_bias" in fields
    assert fields <= {*MODELS[path].model_fields, *MODELS[path].OFF}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", KNOWN_ELSEWHERE)
def test_names_of_other_servers_are_known(path: str, name: str) -> None:
    assert name in MODELS[path].OFF


def test_a_template_gets_its_messages_from_the_messages() -> None:
    error = check_error(
        post(CHAT, chat(chat_template_kwargs={"messages": []}), FakeLink(model_info())), 400, "chat_template_kwargs"
    )
    assert "messages" in error["message"]
