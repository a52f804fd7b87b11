"""What is too long for the model: OpenAI's error where the prompt leaves no room, and a capped answer where it does."""

from __future__ import annotations

from typing import Any

import pytest

from tests.router.calls import CHAT, COMPLETIONS, check_error, get, post, scripted
from tests.router.fake_fleet import FakeLink
from tests.router.serving import MODEL, chat, completion, model_info, script_of

LIMIT = 512
STARTS = f"This model's maximum context length is {LIMIT} tokens. However, "
ASKS_FOR_100 = "you requested 700 tokens (600 in the {noun}, 100 in the completion)."
CONTEXT_ONLY = {"disaggregated_params": {"request_type": "context_only"}}
GENERATION_ONLY = {"disaggregated_params": {"request_type": "generation_only"}}
TOO_LONG: list[tuple[str, dict[str, Any], str, str]] = [
    (COMPLETIONS, completion([5] * 600), "prompt", "your prompt resulted in 600 tokens."),
    (COMPLETIONS, completion([5] * 600, max_tokens=100), "prompt", ASKS_FOR_100.format(noun="prompt")),
    (COMPLETIONS, completion([[5], [5] * 600], max_tokens=100), "prompt", ASKS_FOR_100.format(noun="prompt")),
    (COMPLETIONS, completion("x " * 3000), "prompt", "your prompt resulted in "),
    (COMPLETIONS, completion(["x", "x " * 3000]), "prompt", "your prompt resulted in "),
    (
        COMPLETIONS,
        completion([5] * LIMIT, max_tokens=1),
        "prompt",
        "you requested 513 tokens (512 in the prompt, 1 in the completion).",
    ),
    (COMPLETIONS, completion([5] * 600, **CONTEXT_ONLY), "prompt", "your prompt resulted in 600 tokens."),
    (COMPLETIONS, completion([5] * 600, **GENERATION_ONLY), "prompt", "your prompt resulted in 600 tokens."),
    (CHAT, chat("x " * 3000), "messages", "your messages resulted in "),
    (CHAT, chat("x " * 3000, max_completion_tokens=100), "messages", "you requested "),
    (
        CHAT,
        chat(prompt_token_ids=[5] * 600, max_tokens=100),
        "prompt_token_ids",
        ASKS_FOR_100.format(noun="messages"),
    ),
    (CHAT, chat(prompt_token_ids=[5] * 600, **CONTEXT_ONLY), "prompt_token_ids", "your messages resulted in 600"),
]


@pytest.mark.parametrize("is_streamed", [False, True], ids=["whole", "streamed"])
@pytest.mark.parametrize(("path", "body", "param", "words"), TOO_LONG)
def test_too_long_is_told_in_openais_words(
    path: str, body: dict[str, Any], param: str, words: str, is_streamed: bool
) -> None:
    link = FakeLink(model_info())
    if is_streamed and "disaggregated_params" not in body:  # a context_only answer is never streamed
        body = body | {"stream": True}
    error = check_error(post(path, body, link), 400, param, "context_length_exceeded")
    assert error["message"].startswith(STARTS + words)
    assert error["type"] == "invalid_request_error"
    assert link.requests == []


@pytest.mark.parametrize("wanted", [13, 513, 10_000, 2**31, 2**53 - 1])
@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        (COMPLETIONS, completion([5] * 500), "max_tokens"),
        (COMPLETIONS, completion([[5] * 500, [5]], stream=True), "max_tokens"),
        (CHAT, chat(prompt_token_ids=[5] * 500), "max_tokens"),
        (CHAT, chat(prompt_token_ids=[5] * 500, stream=True), "max_completion_tokens"),
        (CHAT, chat(prompt_token_ids=[5] * 500, max_tokens=1), "max_completion_tokens"),
    ],
)
def test_max_tokens_is_capped_where_the_prompt_fits(path: str, body: dict[str, Any], field: str, wanted: int) -> None:
    link = FakeLink(model_info(), script=script_of("abc"))
    assert post(path, body | {field: wanted}, link).status_code == 200
    longest = max(link.requests, key=lambda request: len(request.prompt_token_ids))
    assert len(longest.prompt_token_ids) == 500
    assert longest.sampling.max_tokens == 12


def test_a_capped_answer_ends_for_its_length() -> None:
    answer = post(CHAT, chat(prompt_token_ids=[5] * 509, max_tokens=100), scripted("abcdefgh")).json()
    assert answer["choices"][0]["finish_reason"] == "length"
    assert answer["usage"]["completion_tokens"] == 3


def test_clients_learn_the_limit_beforehand() -> None:
    assert get(f"/v1/models/{MODEL}", scripted()).json()["max_model_len"] == LIMIT
