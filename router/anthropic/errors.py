"""Errors in Anthropic's form."""

from __future__ import annotations

from typing import Any, Final

import orjson

from tensorweave.cluster.errors import TensorweaveError

_KINDS: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""Per status; others are 'api_error'."""


def error_fields(error: TensorweaveError) -> dict[str, Any]:
    """The error, and the field of the request that it is about, if one is."""
    kind = _KINDS.get(error.http_status, "api_error")
    param = error.param
    is_named = param is None or param in error.message
    message = error.message if is_named else f"{param}: {error.message}"
    return {"type": "error", "error": {"type": kind, "message": message}}


def error_body(error: TensorweaveError) -> bytes:
    return orjson.dumps(error_fields(error))
