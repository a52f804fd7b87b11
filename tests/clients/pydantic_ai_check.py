"""pydantic-ai against the scripted service: python pydantic_ai_check.py URL MODEL."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version
from typing import Any

from pydantic import BaseModel
from pydantic_ai import Agent
from pydantic_ai.models.anthropic import AnthropicModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.anthropic import AnthropicProvider
from pydantic_ai.providers.openai import OpenAIProvider


class Answer(BaseModel):
    total: int


TASK = 'CALL add {"a": 2, "b": 40}\nCALL final_result {"total": 42}'


async def check(model: Any) -> None:
    seen: list[tuple[int, int]] = []
    agent = Agent(model, output_type=Answer, system_prompt="Do as you are told.")

    @agent.tool_plain
    def add(a: int, b: int) -> int:
        """Adds."""
        seen.append((a, b))
        return a + b

    assert (await agent.run(TASK)).output == Answer(total=42)
    async with agent.run_stream(TASK) as stream:
        assert await stream.get_output() == Answer(total=42)
    assert seen == [(2, 40)] * 2
    text = Agent(model)
    assert (await text.run("THINK Hm.\nSAY Hello.")).output == "Hello."


async def main() -> None:
    url, name = sys.argv[1:]
    openai = OpenAIProvider(base_url=f"{url}/v1", api_key="none")
    await check(OpenAIChatModel(name, provider=openai))
    await check(OpenAIResponsesModel(name, provider=openai))
    await check(AnthropicModel(name, provider=AnthropicProvider(base_url=url, api_key="none")))
    print(f"pydantic-ai {version('pydantic-ai-slim')}: ok")


if __name__ == "__main__":
    asyncio.run(main())
