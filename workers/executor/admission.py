"""What an executor refuses before it enters: requests that no scheduler could ever serve with this model."""

from __future__ import annotations

import math
from typing import Final

from tensorweave.cluster.context_length import context_exceeded
from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, SamplingSpec

MAX_LOGITS_BYTES: Final = 256 << 20
"""Of one request's logits in all: they are held, sent and held again."""
MAX_PROMPT_LOGPROBS: Final = 1 << 20


def check_fits(request: GenerateRequest, info: ModelInfo) -> None:
    """Raises RequestRejected, with `param` naming the field, for a prompt or a length that the model cannot take."""
    num_prompt = len(request.prompt_token_ids) - request.num_replayed
    sampling = request.sampling
    if num_prompt < 1 or request.num_replayed < 0:
        raise RequestRejected("the prompt is empty", param="prompt")
    if sampling.max_tokens < 1:
        raise RequestRejected(f"max_tokens is {sampling.max_tokens}, must be at least 1", param="max_tokens")
    if sampling.max_tokens <= request.num_replayed:
        raise RequestRejected(f"all of max_tokens, {sampling.max_tokens}, is generated already", param="max_tokens")
    if num_prompt + sampling.max_tokens > info.max_seq_len:
        raise context_exceeded(info.max_seq_len, num_prompt, sampling.max_tokens)
    low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise RequestRejected(f"token id {bad} is outside the vocabulary of {info.vocab_size}", param="prompt")
    _check_sampling(sampling, info.vocab_size)
    _check_what_is_told(sampling, num_prompt, info.vocab_size)


def _check_sampling(sampling: SamplingSpec, vocab_size: int) -> None:
    """What a step cannot compute with must not get there; what makes sense is for the caller to say."""
    limits = [
        ("temperature", sampling.temperature, math.inf),
        ("top_p", sampling.top_p, 1.0),
        ("min_p", sampling.min_p, 1.0),
        ("top_k", sampling.top_k, math.inf),
        ("top_p_decay", sampling.top_p_decay, 1.0),
        ("repetition_penalty", sampling.repetition_penalty, math.inf),
        ("no_repeat_ngram_size", sampling.no_repeat_ngram_size, math.inf),
        ("logprobs", sampling.num_logprobs or 0, vocab_size),
        ("prompt_logprobs", sampling.num_prompt_logprobs or 0, vocab_size),
    ]
    for param, value, high in limits:
        if not 0 <= value <= high:
            raise RequestRejected(f"{param} is {value}, must be between 0 and {high:g}", param=param)
    ids = [
        ("stop_token_ids", sampling.stop_token_ids if sampling.min_tokens else ()),
        ("logit_bias", tuple(token for token, _ in sampling.logit_bias)),
        *(("bad_token_ids", word or (-1,)) for word in sampling.bad_words),
    ]
    for param, tokens in ids:
        if tokens and not (min(tokens) >= 0 and max(tokens) < vocab_size):
            raise RequestRejected(f"{param} has an id outside the vocabulary of {vocab_size}, or none", param=param)
    if len(sampling.embedding_bias) not in (0, 4 * vocab_size):
        raise RequestRejected(f"embedding_bias is not for a vocabulary of {vocab_size}", param="embedding_bias")


def _check_what_is_told(sampling: SamplingSpec, num_prompt: int, vocab_size: int) -> None:
    wanted = [
        ("return_context_logits", num_prompt * sampling.wants_context_logits),
        ("return_generation_logits", sampling.max_tokens * sampling.wants_generation_logits),
    ]
    for param, num_rows in wanted:
        if num_rows * vocab_size * 4 > MAX_LOGITS_BYTES:
            raise RequestRejected(
                f"{param}: {num_rows} tokens of {vocab_size} logits are over the limit of {MAX_LOGITS_BYTES} bytes",
                param=param,
            )
    top = sampling.num_prompt_logprobs
    if top is not None and num_prompt * (top + 1) > MAX_PROMPT_LOGPROBS:
        raise RequestRejected(
            f"prompt_logprobs {top} for {num_prompt} tokens is over the limit of {MAX_PROMPT_LOGPROBS} in all",
            param="prompt_logprobs",
        )
