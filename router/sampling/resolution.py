"""From a request's sampling fields to a `SamplingSpec`, with every check that needs the model or the prompt.

The HTTP router and the LLM API both use it, each with its own defaults. A wrong field raises `RequestRejected` (a
ValueError) that names it.
"""

from __future__ import annotations

import dataclasses
import secrets
from collections.abc import Callable, Sequence
from typing import Any, Final

from tensorweave.cluster.context_length import context_exceeded
from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import ModelInfo, SamplingDefaults, SamplingSpec
from tensorweave.cluster.sampling_spec import KNOBS
from tensorweave.router.sampling.checks import check_int
from tensorweave.router.sampling.fields import SamplingFields

SEED_BITS: Final = 63


def resolve_sampling(
    fields: SamplingFields,
    info: ModelInfo,
    *,
    default_temperature: float = 1.0,
    default_max_tokens: int | None = None,
    max_logprobs: int | None = None,
    draw_seed: Callable[[int], int] = secrets.randbits,
) -> SamplingSpec:
    """The spec that an executor runs, once `fit_to_prompt` has bounded it by the room that a prompt leaves.

    Args:
        fields: What the request said.
        info: The model's limits, end-of-sequence ids, and the sampling fields of its generation_config.json, each of
            which applies where the request gives none.
        default_temperature: Where neither gives one: 1 over HTTP; the LLM API passes 0 if nothing asks to sample.
        default_max_tokens: Where the request gives none: this, or what generation_config.json says if that is less.
            None: all the room there is.
        max_logprobs: Most likeliest tokens that may be asked for with each token; None: the whole vocabulary.
        draw_seed: Random bits for a request without a seed, so that two such requests differ.

    Raises:
        RequestRejected: A field does not fit the model.
    """
    _check_vocabulary(fields, info.vocab_size)
    _check_num_logprobs(fields, info.vocab_size if max_logprobs is None else min(max_logprobs, info.vocab_size))
    fields = with_defaults(fields, info.sampling_defaults, temperature=default_temperature)
    return SamplingSpec(
        max_tokens=_max_tokens(fields, info, default_max_tokens),
        stop_token_ids=tuple(dict.fromkeys([*fields.stop_token_ids, *(() if fields.ignore_eos else info.end_ids)])),
        bad_words=tuple(tuple(word) for word in fields.bad_token_ids),
        logit_bias=tuple((token_id, float(bias)) for token_id, bias in fields.logit_bias.items()),
        embedding_bias=bytes(fields.embedding_bias),
        num_logprobs=fields.logprobs,
        num_prompt_logprobs=fields.prompt_logprobs,
        wants_context_logits=fields.wants_context_logits,
        wants_generation_logits=fields.wants_generation_logits,
        logits_processors=tuple(fields.logits_processors),
        uses_batched_processor=fields.uses_batched_processor,
        **_resolve_knobs(fields, draw_seed),
    )


def fit_to_prompt(
    spec: SamplingSpec,
    prompt_len: int,
    info: ModelInfo,
    *,
    asked_tokens: int | None,
    caps_max_tokens: bool,
    prompt_param: str = "prompt",
) -> SamplingSpec:
    """The spec with no more tokens than there is room for after the prompt.

    Args:
        spec: From `resolve_sampling`.
        prompt_len: Tokens of the prompt.
        info: The model's limits.
        asked_tokens: The `max_tokens` that the request gave.
        caps_max_tokens: Whether a request for more than there is room for gets all of that room, as over HTTP, or is
            refused, as the LLM API does.
        prompt_param: The field that an error about the prompt's length names.

    Raises:
        ContextTooLong: There is not enough room.
    """
    room = info.max_seq_len - prompt_len
    if room < 1 or (asked_tokens is not None and asked_tokens > room and not caps_max_tokens):
        raise context_exceeded(info.max_seq_len, prompt_len, asked_tokens, prompt_param=prompt_param)
    max_tokens = min(spec.max_tokens, room)
    if max_tokens == spec.max_tokens and spec.min_tokens <= max_tokens:
        return spec
    return dataclasses.replace(spec, max_tokens=max_tokens, min_tokens=min(spec.min_tokens, max_tokens))


def with_new_seed(spec: SamplingSpec, fields: SamplingFields) -> SamplingSpec:
    """The spec for another request with the same fields: if they have no seed, one of its own."""
    if fields.seed is not None or spec.is_greedy:
        return spec
    return dataclasses.replace(spec, seed=secrets.randbits(SEED_BITS))


def with_defaults(
    fields: SamplingFields, defaults: SamplingDefaults, *, temperature: float | None = None
) -> SamplingFields:
    """The request's knobs, and the model's own where it says nothing. `temperature` applies where neither has one."""
    known = {**defaults.to_wire()} if temperature is None else {"temperature": temperature, **defaults.to_wire()}
    missing = {name: value for name, value in known.items() if name in KNOBS and getattr(fields, name) is None}
    return dataclasses.replace(fields, **missing) if missing else fields


def _resolve_knobs(fields: SamplingFields, draw_seed: Callable[[int], int]) -> dict[str, Any]:
    """The knobs that are not off. A greedy request has none that says how tokens are drawn."""
    values: dict[str, Any] = {}
    for name, knob in KNOBS.items():
        value = getattr(fields, name)
        if value is not None and value != knob.off_alias and not (knob.is_random and fields.is_greedy):
            values[name] = value if knob.is_integer else float(value)
    if not fields.is_greedy:
        values["seed"] = nth_seed(draw_seed(SEED_BITS) if fields.seed is None else fields.seed, 0)
    return values


def nth_seed(seed: int, index: int) -> int:
    """The seed of the `index`-th of n sequences of one request."""
    return (seed + index) % (1 << SEED_BITS)


def _max_tokens(fields: SamplingFields, info: ModelInfo, default: int | None) -> int:
    if fields.max_tokens is not None:
        return fields.max_tokens
    bounds = [bound for bound in (default, info.sampling_defaults.max_tokens) if bound is not None]
    return max(min(bounds, default=info.max_seq_len), fields.min_tokens or 0)


def check_prompt(token_ids: Sequence[int], info: ModelInfo, *, param: str = "prompt") -> None:
    """Refuse an empty prompt and ids outside the model's vocabulary."""
    if not token_ids:
        raise RequestRejected(f"{param} has no tokens", param=param)
    low, high = min(token_ids), max(token_ids)
    if low < 0 or high >= info.vocab_size:
        wrong = low if low < 0 else high
        raise RequestRejected(f"{param} has the token id {wrong}, outside 0 to {info.vocab_size - 1}", param=param)


def _check_vocabulary(fields: SamplingFields, vocab_size: int) -> None:
    """Every token id that a field names must be one."""
    ids = [("stop_token_ids", fields.stop_token_ids), ("logit_bias", fields.logit_bias)]
    ids += [("bad_token_ids", word) for word in fields.bad_token_ids]
    if fields.top_p_reset_ids is not None:
        ids.append(("top_p_reset_ids", (fields.top_p_reset_ids,)))
    for name, tokens in ids:
        for token_id in tokens:
            if token_id >= vocab_size:
                raise RequestRejected(f"{name} has {token_id}, the vocabulary ends at {vocab_size - 1}", param=name)
    if fields.embedding_bias and len(fields.embedding_bias) != 4 * vocab_size:
        raise RequestRejected(
            f"embedding_bias has {len(fields.embedding_bias) // 4} numbers, the vocabulary {vocab_size} tokens",
            param="embedding_bias",
        )


def _check_num_logprobs(fields: SamplingFields, limit: int) -> None:
    for name, number in (("logprobs", fields.logprobs), ("prompt_logprobs", fields.prompt_logprobs)):
        check_int(name, number, low=0, high=limit)
