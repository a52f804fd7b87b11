"""OpenAI's agents SDK against the scripted service: python openai_agents_check.py URL MODEL."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from typing import Any

import openai
from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)

TASK = 'THINK Hm.\nCALL add {"a": 2, "b": 40}\nCALL look {"at": "Köln"}\nSAY It is {result}.'
seen: list[str] = []


@function_tool
def add(a: int, b: int) -> int:
    """Adds."""
    seen.append(f"add {a} {b}")
    return a + b


@function_tool
def look(at: str) -> str:
    """Looks."""
    seen.append(f"look {at}")
    return f"seen {at}"


async def check(model: Any) -> None:
    agent = Agent(name="a", instructions="Do as you are told.", model=model, tools=[add, look])
    agent.model_settings = ModelSettings(store=False)
    for is_streamed in (False, True):
        seen.clear()
        if is_streamed:
            run = Runner.run_streamed(agent, TASK)
            async for _ in run.stream_events():
                pass
        else:
            run = await Runner.run(agent, TASK)
        assert run.final_output == "It is seen Köln.", run.final_output
        assert seen == ["add 2 40", "look Köln"]


async def main() -> None:
    url, name = sys.argv[1:]
    set_tracing_disabled(True)
    client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    await check(OpenAIChatCompletionsModel(name, client))
    await check(OpenAIResponsesModel(name, client))
    print(f"openai-agents {version('openai-agents')}: ok")


if __name__ == "__main__":
    asyncio.run(main())
