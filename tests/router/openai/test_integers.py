"""Every integer field of every body: JSON's 3.0 is an integer; 3.5, true and "3" are not."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from tensorweave.router.http.app import build_app
from tests.router.calls import CHAT, COMPLETIONS, check_error, post, scripted
from tests.router.fake_fleet import FakeLink
from tests.router.serving import chat, completion, make_service, model_info
from tests.router.small_tokenizers import hermes

BODIES: dict[str, dict[str, Any]] = {
    CHAT: chat(max_tokens=3, seed=1), COMPLETIONS: completion(max_tokens=3, seed=1), "/detokenize": {"tokens": [5]},
}  # fmt: skip
BOTH: dict[str, Any] = {
    "max_tokens": 3, "n": 2, "seed": -5, "top_k": -1, "no_repeat_ngram_size": 3, "top_p_reset_ids": 7, "min_tokens": 2,
    "stop_token_ids": [8, 9], "prompt_logprobs": 0, "truncate_prompt_tokens": 2, "priority": -4,
}  # fmt: skip
VALUES: dict[str, dict[str, Any]] = {
    CHAT: {
        **BOTH, "max_completion_tokens": 2, "thinking_token_budget": 3, "top_logprobs": 0, "prompt_token_ids": [5, 6],
    },
    COMPLETIONS: {**BOTH, "best_of": 2, "logprobs": 1, "prompt": [5, 6]},
    "/detokenize": {"tokens": [5, 6]},
}  # fmt: skip
FIELDS = [(path, name, value) for path, values in VALUES.items() for name, value in values.items()]


def has_integers(schema: dict[str, Any]) -> bool:
    if "$ref" in schema:
        return False
    kinds = [schema, *schema.get("anyOf", ())]
    return any(
        kind.get("type") == "integer" or (kind.get("type") == "array" and has_integers(kind["items"])) for kind in kinds
    )


def integer_fields(path: str) -> Iterator[str]:
    document = build_app(make_service(scripted())).openapi()
    content = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
    model = document["components"]["schemas"][content["$ref"].rpartition("/")[2]]
    return (name for name, schema in model["properties"].items() if has_integers(schema))


def as_floats(value: Any) -> Any:
    return [float(item) for item in value] if isinstance(value, list) else float(value)


def asked(path: str, name: str, value: Any) -> Any:
    """What the gang is asked for, or what is answered."""
    link = FakeLink(model_info())
    answer = post(path, BODIES[path] | {name: value}, link, tokenizer=hermes())
    assert answer.status_code == 200, answer.text
    return [(list(r.prompt_token_ids), r.sampling, r.priority) for r in link.requests] or answer.json()


@pytest.mark.parametrize("path", list(VALUES))
def test_none_is_missing_here(path: str) -> None:
    assert set(integer_fields(path)) == set(VALUES[path])


@pytest.mark.parametrize(("path", "name", "value"), FIELDS)
def test_integral_floats_are_integers_and_nothing_else_is(path: str, name: str, value: Any) -> None:
    assert asked(path, name, as_floats(value)) == asked(path, name, value)
    for wrong in (3.5, True, "3"):
        body = BODIES[path] | {name: [5, wrong] if isinstance(value, list) else wrong}
        param = f"{name}[1]" if isinstance(value, list) and name != "prompt" else name
        check_error(post(path, body, FakeLink(model_info())), 400, param)


def test_integers_within_objects() -> None:
    params = {"request_type": "context_and_generation", "ctx_request_id": 3.0, "first_gen_tokens": [4.0]}
    assert post(CHAT, chat(disaggregated_params=params), scripted()).status_code == 200
    wrong = {"request_type": "context_and_generation", "ctx_request_id": 3.5}
    check_error(post(CHAT, chat(disaggregated_params=wrong), scripted()), 400, "disaggregated_params.ctx_request_id")
    assert asked(COMPLETIONS, "prompt", [[5.0, 6], [7]]) == asked(COMPLETIONS, "prompt", [[5, 6], [7]])


@pytest.mark.parametrize("seed", [2**64, 2**70, -(2**63) - 2048, 1e30])
def test_a_seed_of_too_many_bits_is_told_the_range(seed: float) -> None:
    error = check_error(post(CHAT, chat(seed=seed), scripted()), 400, "seed")
    assert error["message"] == "seed: must be between -9223372036854775808 and 18446744073709551615"


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), 0, 5.0])
def test_any_seed_of_64_bits_will_do(seed: float) -> None:
    assert post(CHAT, chat(seed=seed), scripted()).status_code == 200
