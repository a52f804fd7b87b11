"""From `SamplingParams` to the router's `SamplingFields`: words become token ids and tensors bytes, and what is not
supported is refused by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from numbers import Integral, Real
from typing import Any, Final

from tensorweave.cluster.protocol import ModelInfo
from tensorweave.cluster.sampling_spec import KNOBS
from tensorweave.llmapi.sampling_params import SamplingParams
from tensorweave.router.dispatch.admission import Limits
from tensorweave.router.sampling.checks import check_bool, check_stop_strings
from tensorweave.router.sampling.fields import SamplingFields
from tensorweave.router.text.tokens import Tokenizer
from tensorweave.workers.sampling.logits import pack_bias

LogitsProcessor = Callable[..., Any]

MAX_SEQUENCES: Final = Limits().max_sequences
"""The limit for one request, as over HTTP."""
_FLAGS: Final = (
    "include_stop_str_in_output",
    "detokenize",
    "add_special_tokens",
    "skip_special_tokens",
    "spaces_between_special_tokens",
    "exclude_input_from_output",
    "return_perf_metrics",
)
"""Flags that `SamplingFields` does not have, and so does not check."""
_BEAM_SEARCH: Final = "it belongs to beam search; use n and best_of with a temperature"
_REFUSED: Final = {
    "use_beam_search": "use n and best_of with a temperature",
    "beam_search_diversity_rate": _BEAM_SEARCH,
    "early_stopping": _BEAM_SEARCH,
    "beam_width_array": _BEAM_SEARCH,
    "length_penalty": _BEAM_SEARCH,
    "lookahead_config": "decoding is one token at a time",
    "return_encoder_output": "there are no encoder models here",
    "additional_model_outputs": "return_context_logits and return_generation_logits are what a model gives",
}


def to_fields(params: SamplingParams, tokenizer: Tokenizer | None, processors: Sequence[str]) -> SamplingFields:
    """Raises ValueError for wrong and unsupported fields, and for words and tensors that cannot be read.

    Args:
        params: What the caller asks for.
        tokenizer: None with skip_tokenizer_init.
        processors: The names under which the executor holds this request's logits processors.
    """
    check_supported(params)
    return SamplingFields(
        **{name: getattr(params, name) for name in KNOBS},
        max_tokens=params.max_tokens,
        stop=stop_strings(params, tokenizer),
        stop_token_ids=() if params.stop_token_ids is None else _sequence("stop_token_ids", params.stop_token_ids),
        ignore_eos=params.ignore_eos,
        bad_token_ids=_bad_words(params, tokenizer),
        embedding_bias=b"" if params.embedding_bias is None else pack_bias(params.embedding_bias),
        logprobs=0 if params.logprobs is None and ranks_sequences(params) else params.logprobs,
        prompt_logprobs=params.prompt_logprobs,
        wants_context_logits=params.return_context_logits,
        wants_generation_logits=params.return_generation_logits,
        logits_processors=tuple(processors),
        uses_batched_processor=params.apply_batched_logits_processor,
    )


def as_python_numbers(params: SamplingParams) -> SamplingParams:
    """The same parameters with numpy's numbers, which are neither `int` nor `float`, as Python's."""
    changed = {}
    for field in dataclasses.fields(params):
        value = getattr(params, field.name)
        if value is not None and (new := _as_python(value)) is not value:
            changed[field.name] = new
    return dataclasses.replace(params, **changed) if changed else params


def _as_python(value: Any) -> Any:
    if isinstance(value, int | float | str | bytes):
        return value
    if isinstance(value, list | tuple):
        items = [_as_python(item) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else items
    if isinstance(value, Integral):
        return int(value)
    return float(value) if isinstance(value, Real) else value


def check_supported(params: SamplingParams) -> None:
    for name, advice in _REFUSED.items():
        value = getattr(params, name)
        if value is not None and value is not False:
            raise ValueError(f"SamplingParams.{name} is not supported yet: {advice}")
    for name in _FLAGS:
        check_bool(name, getattr(params, name))
    for name in ("n", "best_of"):
        value = getattr(params, name)
        if name == "best_of" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_SEQUENCES:
            raise ValueError(f"{name} is {value!r}, must be an integer between 1 and {MAX_SEQUENCES}")
    if num_sequences(params) < params.n:
        raise ValueError(f"best_of is {params.best_of}, less than n, {params.n}")


def ranks_sequences(params: SamplingParams) -> bool:
    """More sequences are generated than returned."""
    return num_sequences(params) > params.n


def num_sequences(params: SamplingParams) -> int:
    """Sequences to generate."""
    return params.n if params.best_of is None else params.best_of


def logits_processors(params: SamplingParams) -> list[LogitsProcessor]:
    given = params.logits_processor
    if given is None:
        return []
    processors = list(given) if isinstance(given, Sequence) else [given]
    for processor in processors:
        if not callable(processor):
            raise ValueError(f"logits_processor holds a {type(processor).__name__}, which cannot be called")
    return processors


def stop_strings(params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[str, ...]:
    if params.stop is None:
        return ()
    stop = (params.stop,) if isinstance(params.stop, str) else tuple(_sequence("stop", params.stop))
    check_stop_strings(stop)
    if stop and (tokenizer is None or not params.detokenize):
        raise ValueError("stop strings need a tokenizer and detokenize=True; use stop_token_ids")
    return stop


def end_ids(params: SamplingParams, tokenizer: Tokenizer | None, info: ModelInfo) -> tuple[int, ...]:
    """The ids that end a sequence without being its stop reason: those of the model's files and of the tokenizer, or
    `end_id` instead."""
    for name, value in (("end_id", params.end_id), ("pad_id", params.pad_id)):
        if value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < info.vocab_size:
            raise ValueError(f"{name} is {value!r}, must be an integer between 0 and {info.vocab_size - 1}")
    if params.end_id is not None:
        return (params.end_id,)
    return info.with_end_id(None if tokenizer is None else tokenizer.eos_id).end_ids


def _bad_words(params: SamplingParams, tokenizer: Tokenizer | None) -> tuple[tuple[int, ...], ...]:
    words = [tuple(item) if _is_list(item) else (item,) for item in _sequence("bad_token_ids", params.bad_token_ids)]
    strings = (params.bad,) if isinstance(params.bad, str) else tuple(_sequence("bad", params.bad))
    if strings and tokenizer is None:
        raise ValueError("bad strings need a tokenizer, and skip_tokenizer_init is set: use bad_token_ids")
    for string in strings:
        if not isinstance(string, str) or not string:
            raise ValueError(f"bad holds {string!r}, must hold strings of at least one character")
        assert tokenizer is not None
        try:
            words += [tuple(ids) for ids in tokenizer.word_ids(string)]
        except (TypeError, UnicodeEncodeError):
            raise ValueError("bad holds a lone surrogate, which is not valid Unicode text") from None
    return tuple(words)


def _is_list(item: object) -> bool:
    return isinstance(item, Sequence) and not isinstance(item, str | bytes)


def _sequence(name: str, value: Any) -> Sequence[Any]:
    if value is None:
        return ()
    if not _is_list(value):
        raise ValueError(f"{name} is a {type(value).__name__}, must be a list")
    result: Sequence[Any] = value
    return result
