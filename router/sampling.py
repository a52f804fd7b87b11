"""From a request's sampling fields to a fully resolved `SamplingSpec`, with every check in one place.

The HTTP router and the LLM API both end here; each passes its own defaults. A wrong field raises `RequestRejected` (a
ValueError) that names it.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import ModelInfo, SamplingSpec

MAX_STOP_STRINGS: Final = 64
MAX_STOP_STRING_CHARS: Final = 1024
MAX_STOP_TOKEN_IDS: Final = 1024
_SEED_BITS: Final = 63


class ContextTooLong(RequestRejected):
    """Prompt and answer do not fit in the model's context; the code is the one that OpenAI's clients know."""

    code = "context_length_exceeded"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFields:
    """What a request says about sampling; None is "not said". Checked on construction, so far as no model is needed.

    Greedy is asked for by temperature 0, top_p 0, top_k 1 or min_p 1. `top_k` 0 or -1 is off.
    """

    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _check_int("max_tokens", self.max_tokens, low=1)
        _check_int("min_tokens", self.min_tokens, low=0)
        _check_int("top_k", self.top_k, low=-1)
        _check_int("seed", self.seed, low=-(2**63), high=2**64 - 1)
        _check_number("temperature", self.temperature, high=math.inf)
        _check_number("top_p", self.top_p, high=1.0)
        _check_number("min_p", self.min_p, high=1.0)
        if not isinstance(self.ignore_eos, bool):
            raise RequestRejected("ignore_eos must be a boolean", param="ignore_eos")
        check_stop_strings(self.stop)
        self._check_stop_token_ids()
        if self.max_tokens is not None and (self.min_tokens or 0) > self.max_tokens:
            raise RequestRejected(
                f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}", param="min_tokens"
            )

    def _check_stop_token_ids(self) -> None:
        if isinstance(self.stop_token_ids, str) or not isinstance(self.stop_token_ids, Sequence):
            raise RequestRejected("stop_token_ids must be a list of integers", param="stop_token_ids")
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise RequestRejected(f"stop_token_ids has more than {MAX_STOP_TOKEN_IDS} entries", param="stop_token_ids")
        for token_id in self.stop_token_ids:
            _check_int("stop_token_ids", token_id, low=0)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0 or self.top_p == 0 or self.top_k == 1 or self.min_p == 1


def resolve_sampling(
    fields: SamplingFields,
    *,
    prompt_len: int,
    info: ModelInfo,
    default_temperature: float = 1.0,
    default_max_tokens: int | None = None,
    prompt_param: str = "prompt",
    draw_seed: Callable[[int], int] = secrets.randbits,
) -> SamplingSpec:
    """The spec that an executor runs.

    Args:
        fields: What the request said.
        prompt_len: Tokens of the prompt.
        info: The model's limits and end-of-sequence ids.
        default_temperature: Where the request gives none: 1 over HTTP; the LLM API passes 0 if nothing asks to sample.
        default_max_tokens: Where the request gives none. None, or more than there is room for: all the room left.
        prompt_param: The field that an error about the prompt's length names.
        draw_seed: Random bits for a request without a seed, so that two such requests differ.

    Raises:
        RequestRejected: The prompt leaves no room, or a field does not fit the model.
    """
    for token_id in fields.stop_token_ids:
        if token_id >= info.vocab_size:
            raise RequestRejected(
                f"stop_token_ids has {token_id}, the vocabulary ends at {info.vocab_size - 1}", param="stop_token_ids"
            )
    max_tokens = _max_tokens(fields, prompt_len, info, default_max_tokens, prompt_param)
    stop_token_ids = tuple(dict.fromkeys([*fields.stop_token_ids, *(() if fields.ignore_eos else info.end_ids)]))
    min_tokens = min(fields.min_tokens or 0, max_tokens)
    temperature = default_temperature if fields.temperature is None else float(fields.temperature)
    if fields.is_greedy or temperature == 0:
        return SamplingSpec(max_tokens=max_tokens, min_tokens=min_tokens, stop_token_ids=stop_token_ids)
    return SamplingSpec(
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=min(max(fields.top_k or 0, 0), info.vocab_size),
        top_p=1.0 if fields.top_p is None else float(fields.top_p),
        min_p=float(fields.min_p or 0.0),
        seed=nth_seed(draw_seed(_SEED_BITS) if fields.seed is None else fields.seed, 0),
        stop_token_ids=stop_token_ids,
    )


def nth_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th of n sequences of one request."""
    return (seed + index) % (1 << _SEED_BITS)


def _max_tokens(
    fields: SamplingFields, prompt_len: int, info: ModelInfo, default: int | None, prompt_param: str
) -> int:
    room = info.max_seq_len - prompt_len
    if room < 1:
        raise ContextTooLong(
            f"the prompt has {prompt_len} tokens; this model's context is {info.max_seq_len} tokens, "
            "and at least 1 must be left for the answer",
            param=prompt_param,
        )
    if fields.max_tokens is None:
        wanted = room if default is None else max(default, fields.min_tokens or 0)
        return min(wanted, room)
    if fields.max_tokens > room:
        raise ContextTooLong(
            f"this model's context is {info.max_seq_len} tokens; the prompt has {prompt_len} and max_tokens asks for "
            f"{fields.max_tokens}, {prompt_len + fields.max_tokens} together",
            param="max_tokens",
        )
    return fields.max_tokens


def check_prompt(token_ids: Sequence[int], info: ModelInfo, *, param: str = "prompt") -> None:
    """Refuse an empty prompt and ids outside the model's vocabulary."""
    if not token_ids:
        raise RequestRejected(f"{param} has no tokens", param=param)
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= info.vocab_size:
        wrong = low if low < 0 else high
        raise RequestRejected(f"{param} has the token id {wrong}, outside 0 to {info.vocab_size - 1}", param=param)


def check_stop_strings(stop: Sequence[Any]) -> None:
    if isinstance(stop, str) or not isinstance(stop, Sequence) or not all(isinstance(s, str) for s in stop):
        raise RequestRejected("stop must be a string or a list of strings", param="stop")
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestRejected(f"stop has {len(stop)} strings, at most {MAX_STOP_STRINGS} are supported", param="stop")
    for text in stop:
        if not 1 <= len(text) <= MAX_STOP_STRING_CHARS:
            raise RequestRejected(f"a stop string must have 1 to {MAX_STOP_STRING_CHARS} characters", param="stop")


def _check_int(name: str, value: object, *, low: int, high: int = 2**31 - 1) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise RequestRejected(f"{name} must be an integer", param=name)
    if not low <= value <= high:
        raise RequestRejected(f"{name} is {value}, must be between {low} and {high}", param=name)


def _check_number(name: str, value: object, *, high: float) -> None:
    if value is None:
        return
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise RequestRejected(f"{name} must be a number", param=name)
    if math.isnan(value) or not 0 <= value <= high or math.isinf(value):
        limit = "at least 0 and finite" if math.isinf(high) else f"between 0 and {high:g}"
        raise RequestRejected(f"{name} is {value}, must be {limit}", param=name)
