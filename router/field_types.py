"""Types of request fields: what pydantic checks of them, and, where a validator does more, what the document says."""

from __future__ import annotations

import re
from typing import Annotated, Any, Final

from pydantic import Field, WithJsonSchema

from tensorweave.router.sampling_checks import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS

MAX_LOGPROBS: Final = 20
TOKEN_ID: Final = re.compile(r"[0-9]{1,10}")

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Penalty = Annotated[float, Field(ge=-2, le=2, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]

_STRINGS: Final = {"type": "array", "items": {"type": "string"}}
_STOP: Final = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_STRING_CHARS}
_TOKENS: Final = {"type": "array", "items": {"type": "integer", "minimum": 0}, "minItems": 1}
_STOPS: Final = {"type": "array", "items": _STOP, "maxItems": MAX_STOP_STRINGS}
Stop = Annotated[Any, WithJsonSchema({"anyOf": [_STOP, _STOPS, {"type": "null"}]})]
TokenKey = Annotated[str, WithJsonSchema({"type": "string", "pattern": f"^{TOKEN_ID.pattern}$"})]
Prompt = Annotated[
    Any,
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "string", "minLength": 1},
                {**_STRINGS, "minItems": 1},
                _TOKENS,
                {"type": "array", "items": _TOKENS, "minItems": 1},
            ]
        }
    ),
]
