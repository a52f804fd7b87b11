"""LangChain against the scripted service: python langchain_check.py URL MODEL.

An agent with two tools over several turns, over each of the three APIs, whole and streamed; and structured output.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import Any

from langchain.agents import create_agent
from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

TASK = """\
THINK First add, then look.
CALL add {"a": 2, "b": 40}
CALL look {"at": "Köln"} && add {"a": 1, "b": 1}
SAY It is {result}."""
seen: list[str] = []


@tool
def add(a: int, b: int) -> int:
    """Adds."""
    seen.append(f"add {a} {b}")
    return a + b


@tool
def look(at: str) -> str:
    """Looks."""
    seen.append(f"look {at}")
    return f"seen {at}"


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def check_agent(model: Any) -> None:
    agent = create_agent(model, [add, look], system_prompt="Do as you are told.")
    for is_streamed in (False, True):
        seen.clear()
        asked = {"messages": [{"role": "user", "content": TASK}]}
        if is_streamed:
            for state in agent.stream(asked, stream_mode=["values", "messages"]):
                if state[0] == "values":
                    messages = state[1]["messages"]
        else:
            messages = agent.invoke(asked)["messages"]
        assert sorted(seen) == ["add 1 1", "add 2 40", "look Köln"], seen
        assert messages[-1].text.endswith("It is 2."), messages[-1]


def check_structured(model: Any) -> None:
    person = '{"name": "Ada", "age": 36}'
    for method, told in (("function_calling", f"CALL Person {person}"), ("json_schema", f"SAY {person}")):
        assert model.with_structured_output(Person, method=method).invoke(told) == Person(name="Ada", age=36)


def main() -> None:
    url, name = sys.argv[1:]
    openai: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": "none", "model": name, "max_retries": 0}
    for model in (
        ChatOpenAI(**openai),
        ChatOpenAI(**openai, use_responses_api=True),
        ChatAnthropic(base_url=url, api_key="none", model=name, max_tokens=2000, max_retries=0),
    ):
        check_agent(model)
    check_structured(ChatOpenAI(**openai))
    print(f"langchain {version('langchain')}: ok")


if __name__ == "__main__":
    main()
