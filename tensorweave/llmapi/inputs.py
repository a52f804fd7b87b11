"""From what a person passes to `generate` to token ids and a resolved `SamplingSpec`. Every mistake is a ValueError
that names it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from tensorweave.cluster.protocol import ModelInfo, SamplingSpec
from tensorweave.llmapi.sampling_params import SamplingParams
from tensorweave.router.sampling import SamplingFields, check_prompt, check_stop_strings, resolve_sampling
from tensorweave.router.tokens import Tokenizer

PromptInputs = str | Sequence[int] | Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ReadPrompt:
    """A prompt ready to run. `end_ids` end a sequence without being its stop reason."""

    text: str | None
    token_ids: Sequence[int]
    sampling: SamplingSpec
    stop: tuple[str, ...]
    end_ids: tuple[int, ...]


def as_batch(inputs: PromptInputs | Sequence[PromptInputs]) -> tuple[list[PromptInputs], bool]:
    """The prompts as a list, and whether a single one was given."""
    if isinstance(inputs, str | Mapping):
        return [inputs], True
    if not isinstance(inputs, Sequence):
        raise ValueError(f"inputs must be text, token ids, a dict or a list of these, not {type(inputs).__name__}")
    if not inputs:
        raise ValueError("inputs is empty: neither a prompt's token ids nor a list of prompts")
    if all(isinstance(item, int) for item in inputs):
        return [cast(PromptInputs, inputs)], True
    return list(cast(Sequence[PromptInputs], inputs)), False


def resolve_params(
    sampling_params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One for each prompt."""
    if sampling_params is None:
        return [SamplingParams()] * num_prompts
    if isinstance(sampling_params, SamplingParams):
        return [sampling_params] * num_prompts
    params = list(sampling_params)
    if len(params) != num_prompts:
        raise ValueError(f"{len(params)} sampling_params for {num_prompts} prompts")
    for param in params:
        if not isinstance(param, SamplingParams):
            raise ValueError(f"sampling_params holds a {type(param).__name__}, must be SamplingParams")
    return params


def read_prompt(
    inputs: PromptInputs, params: SamplingParams, tokenizer: Tokenizer | None, info: ModelInfo
) -> ReadPrompt:
    if not isinstance(params, SamplingParams):
        raise ValueError(f"sampling_params is a {type(params).__name__}, must be SamplingParams")
    text, token_ids = _tokens_of(inputs, params, tokenizer)
    check_prompt(token_ids, info)
    stop = _stop_strings(params, tokenizer)
    info = _with_end_ids(info, params, tokenizer)
    fields = SamplingFields(
        max_tokens=params.max_tokens,
        min_tokens=params.min_tokens,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        min_p=params.min_p,
        seed=params.seed,
        stop=stop,
        stop_token_ids=tuple(params.stop_token_ids or ()),
        ignore_eos=params.ignore_eos,
    )
    is_greedy = params.temperature is None and params.top_p is None and params.top_k is None
    sampling = resolve_sampling(
        fields, prompt_len=len(token_ids), info=info, default_temperature=0.0 if is_greedy else 1.0
    )
    return ReadPrompt(text, token_ids, sampling, stop, info.end_ids)


def _tokens_of(
    inputs: PromptInputs, params: SamplingParams, tokenizer: Tokenizer | None
) -> tuple[str | None, Sequence[int]]:
    if isinstance(inputs, Mapping):
        if unknown := inputs.keys() - {"prompt", "prompt_token_ids"}:
            raise ValueError(f"unknown key {sorted(unknown)[0]!r} in a prompt; known: 'prompt', 'prompt_token_ids'")
        text = inputs.get("prompt")
        if (token_ids := inputs.get("prompt_token_ids")) is not None:
            return text, _checked_ids(token_ids, params)
        if text is None:
            raise ValueError("a prompt given as a dict needs 'prompt' or 'prompt_token_ids'")
        inputs = text
    if isinstance(inputs, str):
        if tokenizer is None:
            raise ValueError("a text prompt needs a tokenizer, and skip_tokenizer_init is set: pass token ids")
        ids = tokenizer.encode(
            inputs, add_special_tokens=params.add_special_tokens, truncate=_truncation(params.truncate_prompt_tokens)
        )
        return inputs, ids
    return None, _checked_ids(inputs, params)


def _checked_ids(token_ids: Any, params: SamplingParams) -> list[int]:
    if isinstance(token_ids, str) or not isinstance(token_ids, Sequence):
        raise ValueError(f"token ids must be a list of integers, not {type(token_ids).__name__}")
    ids = list(token_ids)
    for token in ids:
        if not isinstance(token, int) or isinstance(token, bool):
            raise ValueError(f"token ids must be integers, {token!r} is not")
    keep = _truncation(params.truncate_prompt_tokens)
    return ids if keep is None else ids[-keep:]


def _truncation(value: int | None) -> int | None:
    if value is not None and (not isinstance(value, int) or value < 1):
        raise ValueError(f"truncate_prompt_tokens is {value!r}, must be at least 1")
    return value


def _stop_strings(params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    if params.stop is None:
        return ()
    stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop)
    check_stop_strings(stop)
    if stop and (tokenizer is None or not params.detokenize):
        raise ValueError("stop strings need a tokenizer and detokenize=True; use stop_token_ids")
    return stop


def _with_end_ids(info: ModelInfo, params: SamplingParams, tokenizer: Tokenizer | None) -> ModelInfo:
    if params.end_id is not None:
        if not 0 <= params.end_id < info.vocab_size:
            raise ValueError(f"end_id is {params.end_id}, outside 0 to {info.vocab_size - 1}")
        return dataclasses.replace(info, end_ids=(params.end_id,))
    if not info.end_ids and tokenizer is not None and tokenizer.eos_id is not None:
        return dataclasses.replace(info, end_ids=(tokenizer.eos_id,))
    return info
