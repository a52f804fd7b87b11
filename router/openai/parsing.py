"""From a body's bytes to a checked request model, or to a RequestRejected that names the first wrong field.

A field is honoured or refused; none is silently ignored. Subclasses of `ParsedRequest` list valid fields that are not
built: they are accepted with values that ask for nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any, ClassVar, Final, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from tensorweave.cluster.errors import RequestRejected
from tensorweave.router.guided.document import depth_of
from tensorweave.router.openai.not_built import NotBuilt

_MAX_DEPTH: Final = 200
"""Levels of nesting of a body. orjson writes 254, and bodies are written in other forms."""


def describe_unbuilt_fields(schema: dict[str, Any], model: type[BaseModel]) -> None:
    """Add the fields of `OFF` to the body's schema."""
    assert issubclass(model, ParsedRequest)
    for name, values in sorted(model.OFF.items()):
        description = "Not supported yet: accepted only with a value that asks for nothing."
        schema["properties"][name] = {"description": description, "enum": [*values, None]}


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", hide_input_in_errors=True)


class ParsedRequest(Strict):
    """A body. `OFF`: for each field that is not built, the values that are accepted beside null."""

    model_config = ConfigDict(json_schema_extra=describe_unbuilt_fields)

    OFF: ClassVar[NotBuilt] = {}


RequestT = TypeVar("RequestT", bound=ParsedRequest)


def parse_request(model: type[RequestT], body: bytes) -> RequestT:
    """Raises a RequestRejected that names the first wrong field."""
    return check_fields(model, known_fields(model, body))


def check_fields(model: type[RequestT], fields: dict[str, Any]) -> RequestT:
    """Raises a RequestRejected that names the first wrong field."""
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise _rejection(error) from None


def known_fields(model: type[ParsedRequest], body: bytes) -> dict[str, Any]:
    """The fields of a body that a model checks. Raises RequestRejected for a body that is not a JSON object, and for
    fields that are unknown or not built."""
    try:
        fields = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestRejected(f"the body is not valid JSON: {error.msg} at byte {error.pos}") from None
    if not isinstance(fields, dict):
        raise RequestRejected("the body must be a JSON object")
    if (depth := depth_of(fields)) > _MAX_DEPTH:
        raise RequestRejected(f"the body is nested {depth} levels deep; the limit is {_MAX_DEPTH}")
    known: dict[str, Any] = {}
    for name, value in fields.items():
        if name in model.model_fields:
            known[name] = value
        elif name in model.OFF:
            if value is not None and not _is_off(value, model.OFF[name]):
                raise RequestRejected(f"{name} is not supported yet, except at its default", param=name)
        else:
            near = difflib.get_close_matches(name[:64], [*model.model_fields, *model.OFF], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise RequestRejected(f"unknown field {name[:64]!r}{hint}", param=name[:64])
    return known


def _is_off(value: Any, accepted: Sequence[Any]) -> bool:
    """Equal as in JSON, where false is not 0."""
    return any(value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in accepted)


def _rejection(error: ValidationError) -> RequestRejected:
    first = error.errors(include_url=False, include_input=False)[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, RequestRejected):
        return cause
    path = [part for part in first["loc"] if part != "[key]"]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{str(part)[:64]}" for part in path).lstrip(".")
    message = str(cause) if cause is not None else first["msg"][0].lower() + first["msg"][1:]
    return RequestRejected(f"{param}: {message}" if param else message, param=param or None)
