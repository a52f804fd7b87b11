"""instructor against the scripted service: python instructor_check.py URL MODEL."""

from __future__ import annotations

import sys
from importlib.metadata import version

import instructor
import openai
from pydantic import BaseModel


class Person(BaseModel):
    name: str
    age: int


def main() -> None:
    url, model = sys.argv[1:]
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    for mode, told in (
        (instructor.Mode.TOOLS, 'CALL Person {"name": "Ada", "age": 36}'),
        (instructor.Mode.JSON_SCHEMA, 'SAY {"name": "Ada", "age": 36}'),
        (instructor.Mode.JSON, 'SAY {"name": "Ada", "age": 36}'),
    ):
        asking = instructor.from_openai(client, mode=mode)
        person = asking.chat.completions.create(
            model=model, response_model=Person, messages=[{"role": "user", "content": told}], max_retries=0
        )
        assert (person.name, person.age) == ("Ada", 36), mode
    print(f"instructor {version('instructor')}: ok")


if __name__ == "__main__":
    main()
