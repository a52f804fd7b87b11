"""The OpenAPI document of the router's routes, from the same pydantic models that check and answer requests."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from tensorweave.router.answers import ChatCompletion, Completion, ErrorAnswer
from tensorweave.router.openai import ChatCompletionRequest, CompletionRequest

_REF = "#/components/schemas/{model}"
_ERRORS = ("400", "404", "408", "413", "415", "429", "500", "502", "503")


def openapi_document(title: str, version: str) -> dict[str, Any]:
    _, schemas = models_json_schema(
        [
            (CompletionRequest, "validation"),
            (ChatCompletionRequest, "validation"),
            (Completion, "serialization"),
            (ChatCompletion, "serialization"),
            (ErrorAnswer, "serialization"),
        ],
        ref_template=_REF,
    )
    paths = {
        "/v1/completions": {"post": _generate("Complete a prompt", "CompletionRequest", "Completion")},
        "/v1/chat/completions": {"post": _generate("Answer a conversation", "ChatCompletionRequest", "ChatCompletion")},
        "/v1/models": {"get": _get("The served model")},
        "/v1/models/{model_id}": {"get": _get("One model", path_parameter="model_id", errors=("404",))},
        "/health": {"get": _get("200 while a gang's step loop steps", also=("503",))},
        "/ready": {"get": _get("200 when requests can be taken", errors=("503",))},
        "/version": {"get": _get("The server's version")},
        "/metrics": {"get": _get("Prometheus metrics", media_type="text/plain")},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": title, "version": version},
        "paths": paths,
        "components": {"schemas": schemas["$defs"]},
    }


def _reference(model: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=model)}


def _errors(statuses: tuple[str, ...]) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference("ErrorAnswer")}}
    return {status: {"description": "OpenAI's error object", "content": content} for status in statuses}


def _generate(summary: str, request: str, answer: str) -> dict[str, Any]:
    content = {"application/json": {"schema": _reference(answer)}, "text/event-stream": {"schema": {"type": "string"}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": _reference(request)}}},
        "responses": {"200": {"description": "The answer, whole or as events", "content": content}, **_errors(_ERRORS)},
    }


def _get(
    summary: str,
    *,
    path_parameter: str | None = None,
    media_type: str = "application/json",
    also: tuple[str, ...] = (),
    errors: tuple[str, ...] = (),
) -> dict[str, Any]:
    schema = {"type": "object"} if media_type == "application/json" else {"type": "string"}
    answer = {"description": summary, "content": {media_type: {"schema": schema}}}
    operation: dict[str, Any] = {
        "summary": summary,
        "responses": dict.fromkeys(("200", *also), answer) | _errors(errors),
    }
    if path_parameter is not None:
        operation["parameters"] = [
            {"name": path_parameter, "in": "path", "required": True, "schema": {"type": "string"}}
        ]
    return operation
