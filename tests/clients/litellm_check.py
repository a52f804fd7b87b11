"""litellm against a running service: python litellm_check.py URL MODEL.

Needs nothing but `litellm`, and OPENAI_API_KEY where the service asks for a key. What is too long must come out as
litellm's ContextWindowExceededError, by which its proxy falls back and aider shortens; its own messages must be taken
back as history.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network on import

import httpx
import litellm

litellm.suppress_debug_info = True


def check_too_long(shared: dict[str, Any], max_model_len: int) -> None:
    long = "no " * (3 * max_model_len)
    chat, text = {"messages": [{"role": "user", "content": long}]}, {"prompt": long}
    several = {"prompt": ["short", long]}
    for limit in ({}, {"max_tokens": 5}, {"stream": True}):
        expect_context_error(lambda fields: list(litellm.completion(**fields)), {**shared, **chat, **limit})
        expect_context_error(lambda fields: list(litellm.text_completion(**fields)), {**shared, **text, **limit})
    expect_context_error(lambda fields: litellm.text_completion(**fields), {**shared, **several})
    expect_context_error(lambda fields: asyncio.run(litellm.acompletion(**fields)), {**shared, **chat})
    router_falls_back(shared, chat)


def expect_context_error(ask: Callable[[dict[str, Any]], Any], fields: dict[str, Any]) -> None:
    try:
        ask(fields)
    except litellm.ContextWindowExceededError:
        return
    raise AssertionError("what is too long was answered")


def router_falls_back(shared: dict[str, Any], chat: dict[str, Any]) -> None:
    """litellm's router, and its proxy, goes on with another model where, and only where, the context was too short."""
    ours = {**shared, "mock_response": None}
    other = {"model": "openai/other", "api_key": "none", "mock_response": "from a model of a longer context"}
    models = [{"model_name": "ours", "litellm_params": ours}, {"model_name": "other", "litellm_params": other}]
    router = litellm.Router(model_list=models, context_window_fallbacks=[{"ours": ["other"]}], num_retries=0)
    answer = router.completion(model="ours", **chat)
    assert answer.choices[0].message.content == "from a model of a longer context"


def check_history(shared: dict[str, Any]) -> None:
    messages: list[Any] = [{"role": "user", "content": "Name a color."}]
    for _ in range(2):
        answer = litellm.completion(**shared, messages=messages, max_tokens=8, temperature=0)
        own = answer.choices[0].message
        messages = [*messages, own.model_dump(), {"role": "user", "content": "And another."}]
    answer = litellm.completion(**shared, messages=messages, max_tokens=10**6, stop=["."])
    assert answer.choices[0].finish_reason in ("stop", "length")


def main() -> None:
    url, model = sys.argv[1:]
    key = os.environ.get("OPENAI_API_KEY", "none")
    cards = httpx.get(f"{url}/v1/models", headers={"authorization": f"Bearer {key}"}, timeout=120).json()["data"]
    shared = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": key, "num_retries": 0, "timeout": 120}
    check_too_long(shared, cards[0]["max_model_len"])
    check_history(shared)
    print(f"litellm {version('litellm')}: ok")


if __name__ == "__main__":
    main()
