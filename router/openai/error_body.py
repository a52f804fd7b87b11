"""Errors in OpenAI's form."""

from __future__ import annotations

from typing import Any

import orjson

from tensorweave.cluster.errors import TensorweaveError


def error_body(error: TensorweaveError) -> bytes:
    fields: dict[str, Any] = {
        "message": error.message,
        "type": error.openai_type,
        "param": error.param,
        "code": error.code,
    }
    return orjson.dumps({"error": fields})
