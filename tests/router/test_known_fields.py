"""Fields of the field's other servers that are not built: taken where they ask for nothing, else refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from tensorweave.router.openai import ChatCompletionRequest, CompletionRequest
from tests.router.calls import CHAT, COMPLETIONS, check_error, post, scripted
from tests.router.fake_fleet import FakeLink
from tests.router.serving import chat, completion, model_info

BODIES = {CHAT: chat(max_tokens=1), COMPLETIONS: completion(max_tokens=1)}
MODELS = {CHAT: ChatCompletionRequest, COMPLETIONS: CompletionRequest}
NOT_BUILT = [(path, name, values) for path, model in MODELS.items() for name, values in model.OFF.items()]
KNOWN_ELSEWHERE = [
    "allowed_token_ids",
    "detokenize",
    "guided_json",
    "kv_transfer_params",
    "logits_processors",
    "return_context_logits",
    "return_tokens_as_token_ids",
    "structured_outputs",
    "thinking_token_budget",
    "vllm_xargs",
]


@pytest.mark.parametrize(("path", "name", "values"), NOT_BUILT, ids=lambda value: str(value)[-20:])
def test_what_asks_for_nothing_is_taken(path: str, name: str, values: tuple[Any, ...]) -> None:
    for value in (None, *values):
        answer = post(path, BODIES[path] | {name: value}, scripted())
        assert answer.status_code == 200, answer.text
    error = check_error(post(path, BODIES[path] | {name: {"something": ["else"]}}, FakeLink(model_info())), 400, name)
    assert f"{name} is not supported yet" in error["message"]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@pytest.mark.parametrize("name", KNOWN_ELSEWHERE)
def test_names_of_other_servers_are_known(path: str, name: str) -> None:
    assert name in MODELS[path].OFF


def test_a_template_gets_its_messages_from_the_messages() -> None:
    error = check_error(
        post(CHAT, chat(chat_template_kwargs={"messages": []}), FakeLink(model_info())), 400, "chat_template_kwargs"
    )
    assert "messages" in error["message"]
