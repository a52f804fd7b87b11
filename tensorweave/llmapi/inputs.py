"""From what a user passes to `generate` to token ids, sampling parameters and a resolved `SamplingSpec`. What is wrong
is a ValueError that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

from tensorweave.cluster.protocol import ModelInfo, SamplingSpec
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.guided_decoding import read_guide
from tensorweave.llmapi.sampling_fields import as_python_numbers, end_ids, to_fields
from tensorweave.llmapi.sampling_params import SamplingParams
from tensorweave.llmapi.status import set_api_status
from tensorweave.router.sampling.fields import SamplingFields
from tensorweave.router.sampling.resolution import (
    check_prompt,
    fit_to_prompt,
    resolve_sampling,
    with_defaults,
    with_new_seed,
)
from tensorweave.router.text.tokens import Tokenizer

PromptInputs = str | Sequence[int] | Mapping[str, Any]


@set_api_status("prototype")
@dataclass(frozen=True, slots=True)
class PreprocessedInputs:
    """A prompt as `LLM.preprocess` returns it, for `LLM.generate_async`.

    Args:
        prompt: Its text, if it was given as text.
        prompt_token_ids: Its ids, truncated if that was asked for.
        sampling_params: What `preprocess` was given; used if `generate_async` is given none.
        disaggregated_params: The same.
    """

    prompt: str | None
    prompt_token_ids: Sequence[int]
    sampling_params: SamplingParams | None = None
    disaggregated_params: DisaggregatedParams | None = None


@dataclass(frozen=True, slots=True)
class ReadParams:
    """Parameters, checked and resolved: the same for each prompt that they are given with, but for the seed."""

    params: SamplingParams
    fields: SamplingFields
    info: ModelInfo
    spec: SamplingSpec


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt that is ready to run. `end_ids` end a sequence without being its stop reason."""

    text: str | None
    token_ids: Sequence[int]
    sampling: SamplingSpec
    stop: Sequence[str]
    end_ids: tuple[int, ...]


def as_batch(inputs: PromptInputs | Sequence[PromptInputs]) -> tuple[list[PromptInputs | PreprocessedInputs], bool]:
    """The prompts as a list, and whether a single prompt was given. An empty list means no prompts."""
    if isinstance(inputs, str | Mapping | PreprocessedInputs):
        return [inputs], True
    if isinstance(inputs, bytes | bytearray) or not isinstance(inputs, Sequence):
        advice = _how_to_list(inputs)
        raise ValueError(
            f"inputs must be text, token ids, a dict or a list of these, not {type(inputs).__name__}{advice}"
        )
    numbers_given = [isinstance(item, Integral) for item in inputs]
    if inputs and all(numbers_given):
        return [cast(PromptInputs, inputs)], True
    if any(numbers_given):
        other = inputs[numbers_given.index(False)]
        raise ValueError(f"inputs holds numbers, as token ids of one prompt, beside a {type(other).__name__}")
    return list(cast(Sequence[PromptInputs], inputs)), False


def _how_to_list(inputs: object) -> str:
    if hasattr(inputs, "tolist"):
        return ": pass its tolist()"
    return ": make a list of it" if isinstance(inputs, Iterable) and not isinstance(inputs, bytes | bytearray) else ""


def phases_of(batch: Sequence[PromptInputs | PreprocessedInputs]) -> list[DisaggregatedParams | None] | None:
    """The phases that `preprocess` was given; None if it was given none."""
    phases = [item.disaggregated_params if isinstance(item, PreprocessedInputs) else None for item in batch]
    return phases if any(phase is not None for phase in phases) else None


def resolve_params(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None,
    batch: Sequence[PromptInputs | PreprocessedInputs],
) -> list[SamplingParams]:
    """One per prompt."""
    num_prompts = len(batch)
    if sampling_params is None:
        own = [item.sampling_params if isinstance(item, PreprocessedInputs) else None for item in batch]
        return [params or SamplingParams() for params in own]
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    if not isinstance(sampling_params, Sequence):
        raise ValueError(f"sampling_params is a {type(sampling_params).__name__}, must be SamplingParams or a list")
    params = list(sampling_params)
    if len(params) != num_prompts:
        raise ValueError(f"{len(params)} sampling_params for {num_prompts} prompts")
    for param in params:
        _check_params(param)
    return params


def read_params(
    params: SamplingParams, tokenizer: Tokenizer | None, info: ModelInfo, processors: Sequence[str] = ()
) -> ReadParams:
    """Check parameters, and resolve them against the model.

    Args:
        params: What the caller asks for; numpy's numbers are read as Python's.
        tokenizer: None with skip_tokenizer_init.
        info: The model.
        processors: The names under which the executor holds the logits processors.
    """
    _check_params(params)
    params = as_python_numbers(params)
    fields = to_fields(params, tokenizer, processors)
    info = dataclasses.replace(info, end_ids=end_ids(params, tokenizer, info))
    asked = with_defaults(fields, info.sampling_defaults)
    is_greedy = asked.temperature is None and asked.top_p is None and asked.top_k is None
    spec = resolve_sampling(fields, info, default_temperature=0.0 if is_greedy else 1.0)
    if params.guided_decoding is not None:
        spec = dataclasses.replace(spec, guide=read_guide(params.guided_decoding, info.guided_decoding_backend))
    return ReadParams(params, fields, info, spec)


def read_prompt(inputs: PromptInputs | PreprocessedInputs, read: ReadParams, tokenizer: Tokenizer | None) -> ReadPrompt:
    fields, info = read.fields, read.info
    text, token_ids = tokens_of(inputs, read.params, tokenizer)
    check_prompt(token_ids, info)
    spec = with_new_seed(read.spec, fields)
    sampling = fit_to_prompt(spec, len(token_ids), info, asked_tokens=fields.max_tokens, caps_max_tokens=False)
    return ReadPrompt(text, token_ids, sampling, fields.stop, info.end_ids)


def tokens_of(
    inputs: PromptInputs | PreprocessedInputs, params: SamplingParams, tokenizer: Tokenizer | None
) -> tuple[str | None, Sequence[int]]:
    """The prompt's text, if it was given as text, and its token ids."""
    if isinstance(inputs, PreprocessedInputs):
        return inputs.prompt, _checked_ids(inputs.prompt_token_ids, params)
    if isinstance(inputs, Mapping):
        if unknown := inputs.keys() - {"prompt", "prompt_token_ids"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r} in a prompt; known: 'prompt', 'prompt_token_ids'")
        text = inputs.get("prompt")
        if text is not None and not isinstance(text, str):
            raise ValueError(f"a prompt's 'prompt' is a {type(text).__name__}, must be text")
        if (token_ids := inputs.get("prompt_token_ids")) is not None:
            return text, _checked_ids(token_ids, params)
        if text is None:
            raise ValueError("a prompt given as a dict needs 'prompt' or 'prompt_token_ids'")
        inputs = text
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and skip_tokenizer_init is set: pass token ids")
        keep = _truncation(params.truncate_prompt_tokens)
        try:
            ids = tokenizer.encode(inputs, add_special_tokens=params.add_special_tokens, truncate=keep)
        except (TypeError, UnicodeEncodeError):
            raise ValueError("the prompt has a lone surrogate: it is not valid Unicode text") from None
        return inputs, ids
    return None, _checked_ids(inputs, params)


def _check_params(params: object) -> None:
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params is a {type(params).__name__}, must be SamplingParams")


def _checked_ids(token_ids: Any, params: SamplingParams) -> list[int]:
    if isinstance(token_ids, str | bytes | bytearray) or not isinstance(token_ids, Sequence):
        advice = _how_to_list(token_ids)
        raise ValueError(f"token ids must be a list of integers, not {type(token_ids).__name__}{advice}")
    if set(map(type, token_ids)) <= {int}:  # 100 times faster to see than by abstract classes
        ids = list(token_ids)
    else:
        for token in token_ids:
            if not isinstance(token, Integral) or isinstance(token, bool):
                raise ValueError(f"token ids must be integers, {token!r} is not")
        ids = [int(token) for token in token_ids]  # numpy's integers too
    keep = _truncation(params.truncate_prompt_tokens)
    return ids if keep is None else ids[-keep:]


def _truncation(value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise ValueError(f"truncate_prompt_tokens is {value!r}, must be at least 1")
    return value
