"""Types of request fields: what pydantic checks of them, and, where a validator does more, what the OpenAPI document
says."""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Final

from pydantic import BeforeValidator, Field, WithJsonSchema

from tensorweave.cluster.sampling_spec import KNOBS, Knob
from tensorweave.router.sampling.checks import MAX_STOP_STRING_CHARS, MAX_STOP_STRINGS

MAX_LOGPROBS: Final = 20
SEED_MIN: Final = -(2**63)
SEED_MAX: Final = 2**64 - 1
TOKEN_ID: Final = re.compile(r"[0-9]{1,10}")


def whole(value: Any) -> Any:
    """In JSON, 3.0 and 1e2 are integers. An integer of more than 64 bits is parsed as a float, too."""
    return int(value) if type(value) is float and value.is_integer() else value


def whole_items(value: Any) -> Any:
    """For a list whose items must be integers. It may be long, so it is scanned by C code."""
    return [whole(item) for item in value] if isinstance(value, list) and float in set(map(type, value)) else value


def _check_seed(value: Any) -> Any:
    if type(value) is int and not SEED_MIN <= value <= SEED_MAX:
        raise ValueError(f"must be between {SEED_MIN} and {SEED_MAX}")
    return value


# A bound stands before the validator: after it, the OpenAPI document would not have it.
Integer = Annotated[int, BeforeValidator(whole)]
AtLeast1 = Annotated[int, Field(ge=1), BeforeValidator(whole)]
NumSequences = Annotated[int, Field(ge=1, le=128), BeforeValidator(whole)]
NumLogprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS), BeforeValidator(whole)]
Priority = Annotated[int, Field(ge=-(2**31), le=2**31 - 1), BeforeValidator(whole)]
Seed = Annotated[int, Field(ge=SEED_MIN, le=SEED_MAX), BeforeValidator(_check_seed), BeforeValidator(whole)]
Integers = Annotated[list[int], BeforeValidator(whole_items)]
TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], BeforeValidator(whole_items)]

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Bias = Annotated[float, Field(ge=-100, le=100, allow_inf_nan=False)]

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


def read_prompts(value: Any) -> list[str | list[int]]:
    """The prompts of a field of type `Prompt`. Raises ValueError."""
    if isinstance(value, str) or _is_token_list(value := whole_items(value)):
        return [value]
    if isinstance(value, list) and value:
        if all(isinstance(prompt, str) for prompt in value):
            return value
        if all(map(_is_token_list, prompts := list(map(whole_items, value)))):
            return prompts
    raise ValueError(
        "must be a string, a list of strings, a list of token ids, or a list of lists of token ids, none empty"
    )


def _is_token_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(type(token) is int for token in value)


def knob_fields() -> dict[str, Any]:
    """The knobs as fields of a body."""
    return {name: (_knob_type(knob) | None, Field(None, description=_describe(knob))) for name, knob in KNOBS.items()}


def _knob_type(knob: Knob) -> Any:
    high = knob.high if knob.http_high is None else knob.http_high
    bounds: dict[str, Any] = {"gt" if knob.is_low_open else "ge": knob.asked_low}
    if math.isfinite(high):
        bounds["le"] = high
    if knob.is_integer:
        return Annotated[int, Field(**bounds), BeforeValidator(whole)]
    return Annotated[float, Field(**bounds, allow_inf_nan=False)]


def _describe(knob: Knob) -> str:
    return f"Extension. {knob.doc}" if knob.is_extension else knob.doc
