"""LlamaIndex against the scripted service: python llama_index_check.py URL MODEL."""

from __future__ import annotations

import asyncio
import sys
from importlib.metadata import version

from llama_index.core.agent.workflow import FunctionAgent
from llama_index.llms.openai_like import OpenAILike

TASK = 'CALL add {"a": 2, "b": 40}\nCALL look {"at": "Köln"}\nSAY It is {result}.'
seen: list[str] = []


def add(a: int, b: int) -> int:
    """Adds."""
    seen.append(f"add {a} {b}")
    return a + b


def look(at: str) -> str:
    """Looks."""
    seen.append(f"look {at}")
    return f"seen {at}"


async def main() -> None:
    url, name = sys.argv[1:]
    model = OpenAILike(
        model=name,
        api_base=f"{url}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        context_window=8192,
        max_retries=0,
    )
    for is_streamed in (False, True):
        seen.clear()
        agent = FunctionAgent(tools=[add, look], llm=model, system_prompt="Do as you are told.", streaming=is_streamed)
        answer = await agent.run(TASK)
        assert str(answer) == "It is seen Köln.", str(answer)
        assert seen == ["add 2 40", "look Köln"]
    print(f"llama-index {version('llama-index-core')}: ok")


if __name__ == "__main__":
    asyncio.run(main())
