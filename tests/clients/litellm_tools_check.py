"""litellm's calls of tools against the scripted service: python litellm_tools_check.py URL MODEL."""

from __future__ import annotations

import json
import os
import sys
from importlib.metadata import version
from typing import Any

os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else it asks the network on import

import litellm

TASK = 'THINK Hm.\nCALL add {"a": 2, "b": 40}\nSAY It is {result}.'
ADD: Any = {
    "type": "function",
    "function": {
        "name": "add",
        "parameters": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}},
    },
}


def check_loop(fields: dict[str, Any], *, is_streamed: bool) -> None:
    messages: list[Any] = [{"role": "user", "content": TASK}]
    for _ in range(2):
        asked = {**fields, "messages": messages, "tools": [ADD]}
        answer = litellm.completion(**asked, stream=is_streamed)
        if is_streamed:
            answer = litellm.stream_chunk_builder(list(answer), messages=messages)
        message = answer.choices[0].message
        messages.append(message.model_dump())
        for call in message.tool_calls or ():
            arguments = json.loads(call.function.arguments)
            result = str(arguments["a"] + arguments["b"])
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
    assert message.content == "It is 42.", message


def main() -> None:
    url, model = sys.argv[1:]
    shared = {"api_key": "none", "num_retries": 0, "timeout": 120}
    for fields in (
        {**shared, "model": f"openai/{model}", "api_base": f"{url}/v1"},
        {**shared, "model": f"hosted_vllm/{model}", "api_base": f"{url}/v1"},
        {**shared, "model": f"anthropic/{model}", "api_base": url, "max_tokens": 2000},
    ):
        for is_streamed in (False, True):
            check_loop(fields, is_streamed=is_streamed)
    print(f"litellm {version('litellm')}: ok")


if __name__ == "__main__":
    main()
