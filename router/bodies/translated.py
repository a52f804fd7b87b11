"""Bodies of other APIs, read as the chats that they are translated to."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Final

import orjson

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.anthropic import request as anthropic
from tensorweave.router.anthropic.request import CountTokensRequest, MessagesRequest
from tensorweave.router.bodies.request_body import RequestBody, chat_token_ids, read_chat_request
from tensorweave.router.bodies.served import ServedModel, check_name
from tensorweave.router.openai.chat_form import chat_format
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.parsing import check_fields, parse_request
from tensorweave.router.responses import request as responses
from tensorweave.router.responses.request import ResponsesRequest
from tensorweave.router.text.tokens import Tokenizer

_FIELD_OF_TOOL: Final = re.compile(r"(tools\[\d+\])\.function\.(\w+)(.*)", re.DOTALL)


def read_messages(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> RequestBody:
    """The body of /v1/messages. Raises RequestRejected."""
    asked = parse_request(MessagesRequest, body)
    fields = asked.translated()
    if asked.thinking_budget is not None and chat_format(tokenizer, served.chat).has_reasoning:
        fields["thinking_token_budget"] = asked.thinking_budget
    with _named_as(anthropic.FIELD_NAMES):
        request = check_fields(ChatCompletionRequest, fields)
        return read_chat_request(request, tokenizer, served, "messages")


def count_tokens(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> bytes:
    """The answer of /v1/messages/count_tokens. Raises RequestRejected."""
    asked = parse_request(CountTokensRequest, body)
    check_name(served.model_names, asked.model)
    with _named_as(anthropic.FIELD_NAMES):
        request = check_fields(ChatCompletionRequest, asked.translated())
        return orjson.dumps({"input_tokens": len(chat_token_ids(request, tokenizer, served))})


def read_response(body: bytes, tokenizer: Tokenizer, served: ServedModel) -> RequestBody:
    """The body of /v1/responses. Raises RequestRejected."""
    asked = parse_request(ResponsesRequest, body)
    with _named_as(responses.FIELD_NAMES):
        request = check_fields(ChatCompletionRequest, asked.translated())
        read = read_chat_request(request, tokenizer, served, "responses")
    return replace(read, repeated=orjson.dumps(asked.repeated(read.specs[0])))


@contextmanager
def _named_as(names: Mapping[str, str]) -> Iterator[None]:
    """Errors name the body's own fields."""
    try:
        yield
    except RequestRejected as error:
        if error.param is None or (name := _own_name(error.param, names)) is None:
            raise
        raise type(error)(error.message.replace(error.param, name), param=name) from None


def _own_name(param: str, names: Mapping[str, str]) -> str | None:
    """The body's own name for a field of a chat; None: it is the same. Its tools have the fields of their functions."""
    if (tool := _FIELD_OF_TOOL.fullmatch(param)) is not None:
        place, field, rest = tool.groups()
        return f"{place}.{names.get(f'function.{field}', field)}{rest}"
    return names.get(re.split(r"[.\[]", param, maxsplit=1)[0])
