"""The official Python client (2.x or 3.x) against a running service: python openai_check.py URL MODEL.

Needs nothing but `openai`, which brings pydantic, and OPENAI_API_KEY where the service asks for a key. Whole and
streamed answers must be the same, and every error must name its field.
"""

from __future__ import annotations

import datetime
import os
import sys
from typing import Any, Literal

import openai
import pydantic

PARTS: list[Any] = [{"role": "user", "content": [{"type": "text", "text": "Say hello in Japanese and add an emoji."}]}]
EXTENSIONS = {
    "top_k": 40, "min_p": 0.02, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3, "bad_words": ["hello"],
    "top_p_decay": 0.9, "top_p_min": 0.2, "return_token_ids": True, "prompt_logprobs": 1, "cache_salt": "a",
    "priority": 1,
}  # fmt: skip


def check_completions(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {
        "model": model, "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0, "logprobs": 3,
        "echo": True,
    }  # fmt: skip
    choice = client.completions.create(**fields).choices[0]
    told = choice.logprobs
    assert told is not None
    ends = [*told.text_offset[1:], len(choice.text)]
    for token, start, end in zip(told.tokens, told.text_offset, ends, strict=True):
        assert choice.text[start:end] in (token, ""), (token, choice.text[start:end])
    text, tokens, logprobs = "", [], []
    for chunk in client.completions.create(**fields, stream=True, stream_options={"include_usage": True}):
        for part in chunk.choices:
            text += part.text
            tokens += part.logprobs.tokens
            logprobs += part.logprobs.token_logprobs
    assert text == choice.text
    assert tokens == told.tokens
    assert logprobs[0] is None
    assert all(abs(a - b) < 1e-3 for a, b in zip(logprobs[1:], told.token_logprobs[1:], strict=True))
    several = client.completions.create(model=model, prompt=["a b c", "1 2 3"], n=2, best_of=3, max_tokens=6, seed=5)
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.usage is not None
    assert several.usage.completion_tokens <= 36


def check_chats(client: openai.OpenAI, model: str) -> None:
    fields: dict[str, Any] = {
        "model": model, "messages": PARTS, "max_completion_tokens": 24, "temperature": 0, "logprobs": True,
        "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**fields)
    content = whole.choices[0].logprobs.content
    assert len(content) == whole.usage.completion_tokens
    assert all(len(token.top_logprobs) == 2 for token in content)
    with client.chat.completions.stream(**fields) as stream:
        for _ in stream:
            pass
        streamed = stream.current_completion_snapshot.choices[0]
    assert streamed.message.content == whole.choices[0].message.content
    assert [token.token for token in streamed.logprobs.content] == [token.token for token in content]
    again = client.chat.completions.create(
        model=model, messages=PARTS, max_completion_tokens=16, seed=3, n=2, presence_penalty=1, frequency_penalty=0.5,
        logit_bias={"30": -100}, stop=["no such text"], extra_body=EXTENSIONS,
    )  # fmt: skip
    assert len({choice.message.content for choice in again.choices}) == 2
    assert len(again.model_extra["prompt_logprobs"]) == again.usage.prompt_tokens
    assert sum(len(choice.model_extra["token_ids"]) for choice in again.choices) == again.usage.completion_tokens


class Event(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=30)
    day: datetime.date
    guests: list[str] = pydantic.Field(max_length=3)
    kind: Literal["work", "party"]


def check_forms(client: openai.OpenAI, model: str) -> None:
    """The client's own parsing: what ends validates, and what `max_tokens` cuts off is the client's error."""
    fields: dict[str, Any] = {"model": model, "messages": PARTS, "max_completion_tokens": 300, "seed": 5}
    for _ in range(4):
        try:
            parsed = client.chat.completions.parse(**fields, response_format=Event).choices[0].message.parsed
            assert isinstance(parsed, Event)
        except openai.LengthFinishReasonError:
            fields["seed"] += 1
    choice = client.chat.completions.create(**fields, extra_body={"structured_outputs": {"choice": ["yes", "no"]}})
    assert choice.choices[0].message.content in ("yes", "no")
    assert choice.choices[0].finish_reason == "stop"


def check_responses(client: openai.OpenAI, model: str) -> None:
    """Whole and streamed alike, held to a form."""
    fields: dict[str, Any] = {
        "model": model, "input": "Say hello.", "instructions": "Be brief.", "max_output_tokens": 200, "temperature": 0,
        "text": {"format": {"type": "json_schema", "name": "f", "schema": Event.model_json_schema()}}, "store": False,
    }  # fmt: skip
    whole = client.responses.create(**fields)
    events = list(client.responses.create(**fields, stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert "".join([event.delta for event in events if event.type == "response.output_text.delta"]) == whole.output_text
    assert events[-1].type == f"response.{whole.status}"
    assert events[-1].response.usage.output_tokens == whole.usage.output_tokens
    if whole.status == "completed":
        Event.model_validate_json(whole.output_text)


def check_errors(client: openai.OpenAI, model: str) -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    other = {"type": "function", "function": {"name": "g"}}
    for fields, kind, param in (
        ({"temperature": -1}, openai.BadRequestError, "temperature"),
        ({"model": "no-such-model"}, openai.NotFoundError, "model"),
        ({"tools": [tool], "tool_choice": other}, openai.BadRequestError, "tool_choice"),
        ({"response_format": {"type": "json"}}, openai.BadRequestError, "response_format.schema"),
    ):
        assert refusal(client, {"model": model, "messages": PARTS, **fields}, kind).param == param
    (card,) = [card for card in client.models.list() if card.id == model]
    long = [{"role": "user", "content": "no " * (3 * card.model_extra["max_model_len"])}]
    error = refusal(client, {"model": model, "messages": long}, openai.BadRequestError)
    assert (error.code, error.param) == ("context_length_exceeded", "messages")


def refusal(client: openai.OpenAI, fields: dict[str, Any], kind: type[openai.APIStatusError]) -> openai.APIStatusError:
    try:
        client.chat.completions.create(**{"max_completion_tokens": 1, **fields})
    except kind as error:
        return error
    raise AssertionError(f"{sorted(fields)} was accepted")


def main() -> None:
    url, model = sys.argv[1:]
    client = openai.OpenAI(
        base_url=f"{url}/v1", api_key=os.environ.get("OPENAI_API_KEY", "none"), max_retries=0, timeout=120
    )
    assert model in [card.id for card in client.models.list()]
    check_completions(client, model)
    check_chats(client, model)
    check_forms(client, model)
    check_responses(client, model)
    check_errors(client, model)
    print(f"openai {openai.__version__}: ok")


if __name__ == "__main__":
    main()
