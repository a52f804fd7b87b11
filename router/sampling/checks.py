"""Checks of single sampling fields that need no model. `RequestRejected` names the field."""

from __future__ import annotations

import array
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.sampling_spec import MAX_INT, Knob

MAX_STOP_STRINGS: Final = 64
MAX_STOP_STRING_CHARS: Final = 1024
MAX_STOP_TOKEN_IDS: Final = 1024
MAX_BAD_WORDS: Final = 1024
MAX_BAD_WORD_TOKENS: Final = 1024
MAX_LOGIT_BIAS: Final = 1024
MAX_LOGITS_PROCESSORS: Final = 16


def check_stop_strings(stop: Sequence[Any]) -> None:
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(s, str) for s in stop):
        raise RequestRejected("stop must be a string or a list of strings", param="stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestRejected(f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS} are supported", param="stop")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise RequestRejected(f"a stop string must have 1 to {MAX_STOP_STRING_CHARS} characters", param="stop")


def check_ids(name: str, ids: object, max_count: int) -> None:
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise RequestRejected(f"{name} must be a list of integers", param=name)
    if len(ids) > max_count:
        raise RequestRejected(f"{name} has more than {max_count} entries", param=name)
    for token_id in ids:
        check_int(name, token_id, low=0, is_needed=True)


def check_bad_words(words: object) -> None:
    name = "bad_token_ids"
    if isinstance(words, str | bytes) or not isinstance(words, Sequence):
        raise RequestRejected(f"{name} must be a list of lists of integers", param=name)
    if len(words) > MAX_BAD_WORDS:
        raise RequestRejected(f"{name} has more than {MAX_BAD_WORDS} entries", param=name)
    for word in words:
        check_ids(name, word, MAX_BAD_WORD_TOKENS)
        if not word:
            raise RequestRejected(f"{name} has an empty entry", param=name)


def check_logit_bias(biases: object) -> None:
    name = "logit_bias"
    if not isinstance(biases, Mapping):
        raise RequestRejected(f"{name} must map token ids to numbers", param=name)
    if len(biases) > MAX_LOGIT_BIAS:
        raise RequestRejected(f"{name} has more than {MAX_LOGIT_BIAS} entries", param=name)
    for token_id, bias in biases.items():
        check_int(name, token_id, low=0, is_needed=True)
        check_number(name, bias, low=-100.0, high=100.0, is_needed=True)


def check_embedding_bias(packed: object) -> None:
    name = "embedding_bias"
    if not isinstance(packed, bytes) or len(packed) % 4:
        raise RequestRejected(f"{name} must be packed float32 numbers", param=name)
    numbers = array.array("f", packed)
    if sys.byteorder == "big":
        numbers.byteswap()
    if any(number != number or number == math.inf for number in numbers):
        raise RequestRejected(f"{name} has NaN or plus infinity", param=name)


def check_processors(names: object) -> None:
    param = "logits_processor"
    is_list = isinstance(names, Sequence) and not isinstance(names, str | bytes)
    if not is_list or not all(isinstance(name, str) for name in names):  # type: ignore[attr-defined]
        raise RequestRejected(f"{param} must be a list of names", param=param)
    if len(names) > MAX_LOGITS_PROCESSORS:  # type: ignore[arg-type]
        raise RequestRejected(f"{param} has more than {MAX_LOGITS_PROCESSORS} entries", param=param)


def check_knob(name: str, knob: Knob, value: object) -> None:
    if knob.is_integer:
        check_int(name, value, low=knob.asked_low, high=knob.high)
    else:
        check_number(name, value, low=knob.asked_low, high=knob.high, is_low_open=knob.is_low_open)


def check_bool(name: str, value: object) -> None:
    if not isinstance(value, bool):
        raise RequestRejected(f"{name} must be a boolean", param=name)


def check_int(name: str, value: object, *, low: float, high: float = MAX_INT, is_needed: bool = False) -> None:
    if value is None and not is_needed:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestRejected(f"{name} must be an integer", param=name)
    if not low <= value <= high:
        raise RequestRejected(f"{name} is {value}, must be between {low} and {high}", param=name)


def check_number(
    name: str,
    value: object,
    *,
    low: float = 0.0,
    high: float = math.inf,
    is_low_open: bool = False,
    is_needed: bool = False,
) -> None:
    """`is_low_open`: the value must be above `low`, not at it."""
    if value is None and not is_needed:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestRejected(f"{name} must be a number", param=name)
    if math.isnan(value) or math.isinf(value) or not low <= value <= high or (is_low_open and value == low):
        least = f"above {low:g}" if is_low_open else f"at least {low:g}"
        most = "finite" if math.isinf(high) else f"at most {high:g}"
        raise RequestRejected(f"{name} is {value}, must be {least} and {most}", param=name)
