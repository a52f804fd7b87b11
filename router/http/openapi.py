"""The OpenAPI document of the routes, from the pydantic models that check requests and describe answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from tensorweave.router.anthropic import schemas as anthropic
from tensorweave.router.anthropic.request import CountTokensRequest, MessagesRequest
from tensorweave.router.bodies.tokenize import DetokenizeRequest, TokenizeRequest
from tensorweave.router.http import asgi
from tensorweave.router.http.keys import OPEN_PATHS
from tensorweave.router.openai import schemas
from tensorweave.router.openai.chat_request import ChatCompletionRequest
from tensorweave.router.openai.embedding_request import EmbeddingRequest
from tensorweave.router.openai.parsing import ParsedRequest
from tensorweave.router.openai.requests import CompletionRequest
from tensorweave.router.responses import schemas as responses
from tensorweave.router.responses.request import ResponsesRequest

_HEALTH: Final = "200 while a gang's step loop steps"
_REF: Final = "#/components/schemas/{model}"
_BEARER: Final = "ApiKey"
_ERRORS: Final = {
    "400": "The request is wrong; `param` names the field.",
    "401": "No valid API key.",
    "404": "There is no such model.",
    "408": "The request's deadline passed, or its body did not come in time, or its client went away.",
    "413": "The body is larger than the server's limit.",
    "415": "The content type is not application/json.",
    "429": "The queue is full; `retry-after` says when to come back.",
    "500": "An internal error.",
    "502": "The prompt's KV did not arrive.",
    "503": "No gang can take the request now.",
}
_BODY_ERRORS: Final = ("400", "404", "408", "413", "415", "500", "503")
_REQUESTS: Final = (
    CompletionRequest,
    ChatCompletionRequest,
    EmbeddingRequest,
    ResponsesRequest,
    MessagesRequest,
    CountTokensRequest,
    TokenizeRequest,
    DetokenizeRequest,
)

Operation = dict[str, Any]


def openapi_document(title: str, version: str, *, model_names: Sequence[str], has_keys: bool) -> dict[str, Any]:
    paths: dict[str, dict[str, Operation]] = {
        "/v1/completions": {
            "post": _post("Complete prompts", CompletionRequest, schemas.Completion, _chunks(schemas.CompletionChunk))
        },
        "/v1/chat/completions": {
            "post": _post(
                "Answer a conversation", ChatCompletionRequest, schemas.ChatCompletion, _chunks(schemas.ChatChunk)
            )
        },
        "/v1/responses": {
            "post": _post(
                "Answer a conversation, sent whole",
                ResponsesRequest,
                responses.ResponseObject,
                _named_events(responses.EVENTS),
            )
        },
        asgi.MESSAGES_PATH: {
            "post": _post(
                "Answer a conversation, in Anthropic's form",
                MessagesRequest,
                anthropic.AnswerMessage,
                _named_events([*anthropic.EVENTS, anthropic.MessagesError]),
                error=anthropic.MessagesError,
            )
        },
        f"{asgi.MESSAGES_PATH}/count_tokens": {
            "post": _post(
                "The number of a conversation's tokens",
                CountTokensRequest,
                anthropic.TokenCount,
                error=anthropic.MessagesError,
            )
        },
        "/v1/embeddings": {
            "post": _post("Embeddings of texts, by a pool of role 'embed'", EmbeddingRequest, schemas.EmbeddingList)
        },
        "/v1/models": {"get": _get("The served model, by each of its names", schemas.ModelList)},
        "/v1/models/{model_id}": {"get": _get("One model", schemas.ModelCard, parameter="model_id", errors=("404",))},
        "/tokenize": {"post": _post("Token ids of a prompt or a chat", TokenizeRequest, schemas.TokenizeAnswer)},
        "/detokenize": {"post": _post("The text of token ids", DetokenizeRequest, schemas.DetokenizeAnswer)},
        "/health": {"get": _get(_HEALTH, schemas.Health, also=("503",))},
        "/ping": dict.fromkeys(("get", "post"), _get(_HEALTH, schemas.Health, also=("503",))),
        "/ready": {"get": _get("200 when requests can be taken", schemas.Ready, errors=("503",))},
        "/load": {"get": _get("Sequences that run or wait in this router", schemas.Load)},
        "/version": {"get": _get("The server's version", schemas.Version)},
        "/metrics": {"get": _get("Prometheus metrics", None)},
    }
    document: dict[str, Any] = {
        "openapi": "3.2.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": _schemas()},
    }
    for request in _REQUESTS:
        document["components"]["schemas"][request.__name__]["properties"]["model"]["enum"] = list(model_names)
    if has_keys:
        _require_key(document)
    return document


def _require_key(document: dict[str, Any]) -> None:
    document["components"]["securitySchemes"] = {_BEARER: {"type": "http", "scheme": "bearer"}}
    document["security"] = [{_BEARER: []}]
    for path, operations in document["paths"].items():
        for operation in operations.values():
            if path in OPEN_PATHS:
                operation["security"] = []
            else:
                error = anthropic.MessagesError if path.startswith(asgi.MESSAGES_PATH) else schemas.ErrorAnswer
                operation["responses"] |= _errors(("401",), error)


def _schemas() -> dict[str, Any]:
    answers: Sequence[type[BaseModel]] = (
        schemas.Completion,
        schemas.CompletionChunk,
        schemas.ChatCompletion,
        schemas.ChatChunk,
        schemas.EmbeddingList,
        schemas.ModelList,
        schemas.ModelCard,
        schemas.TokenizeAnswer,
        schemas.DetokenizeAnswer,
        schemas.Health,
        schemas.Ready,
        schemas.Load,
        schemas.Version,
        schemas.ErrorAnswer,
        responses.ResponseObject,
        *responses.EVENTS,
        anthropic.AnswerMessage,
        anthropic.TokenCount,
        anthropic.MessagesError,
        *anthropic.EVENTS,
    )
    _, document = models_json_schema(
        [*((model, "validation") for model in _REQUESTS), *((model, "serialization") for model in answers)],
        ref_template=_REF,
    )
    defined: dict[str, Any] = document["$defs"]
    return defined


def _reference(model: type[BaseModel]) -> dict[str, str]:
    return {"$ref": _REF.format(model=model.__name__)}


def _errors(statuses: Sequence[str], error: type[BaseModel] = schemas.ErrorAnswer) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(error)}}
    return {status: {"description": _ERRORS[status], "content": content} for status in statuses}


def _post(
    summary: str,
    request: type[ParsedRequest],
    answer: type[BaseModel],
    event: dict[str, Any] | None = None,
    error: type[BaseModel] = schemas.ErrorAnswer,
) -> Operation:
    """With `event`, the answer may be streamed."""
    content: dict[str, Any] = {"application/json": {"schema": _reference(answer)}}
    errors = set(_BODY_ERRORS)
    if event is not None:
        content["text/event-stream"] = {"itemSchema": event}
        errors |= {"429", "502"}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(request)}}},
        "responses": {"200": {"description": "The answer", "content": content}, **_errors(sorted(errors), error)},
    }


def _chunks(chunk: type[BaseModel]) -> dict[str, Any]:
    """Server-sent events: chunks, then '[DONE]'; or an error, which ends the stream."""
    data = {"anyOf": [{"const": "[DONE]"}, _json_of([chunk, schemas.ErrorAnswer])]}
    return {"type": "object", "properties": {"data": data}, "required": ["data"]}


def _named_events(events: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Server-sent events with the type of their data as their name."""
    properties = {"event": {"type": "string"}, "data": _json_of(events)}
    return {"type": "object", "properties": properties, "required": ["event", "data"]}


def _json_of(models: Sequence[type[BaseModel]]) -> dict[str, Any]:
    return {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"anyOf": [_reference(model) for model in models]},
    }


def _get(
    summary: str,
    answer: type[BaseModel] | None,
    *,
    parameter: str | None = None,
    also: tuple[str, ...] = (),
    errors: tuple[str, ...] = (),
) -> Operation:
    """`also`: other statuses with the same answer. Without `answer` it is plain text."""
    content: dict[str, Any] = {"text/plain": {"schema": {"type": "string"}}}
    if answer is not None:
        content = {"application/json": {"schema": _reference(answer)}}
    response = {"description": summary, "content": content}
    operation: Operation = {
        "summary": summary,
        "responses": dict.fromkeys(("200", *also), response) | _errors((*errors, "500")),
    }
    if parameter is not None:
        operation["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": {"type": "string"}}]
    return operation
