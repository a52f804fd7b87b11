"""Requests that an executor refuses before they enter, because no scheduler could ever serve them with this model."""

from __future__ import annotations

from typing import Final

from tensorweave.cluster.context_length import context_exceeded
from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo, SamplingSpec
from tensorweave.cluster.sampling_spec import KNOBS, SPEC_OFF

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
    if sampling.wants_embedding and not info.embedding_size:
        raise RequestRejected("this engine gives no embeddings: they need one that computes layer by layer, on a CPU")
    _check_sampling(sampling, info.vocab_size)
    _check_what_is_told(sampling, num_prompt, info.vocab_size)


def _check_sampling(sampling: SamplingSpec, vocab_size: int) -> None:
    """What a step cannot compute with must not get there; what makes sense is for the caller to say."""
    for name, knob in KNOBS.items():
        value = getattr(sampling, name)
        if value != SPEC_OFF[name]:
            _check_between(name, value, knob.low, knob.high)
    _check_between("logprobs", sampling.num_logprobs or 0, 0, vocab_size)
    _check_between("prompt_logprobs", sampling.num_prompt_logprobs or 0, 0, vocab_size)
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


def _check_between(param: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise RequestRejected(f"{param} is {value}, must be between {low:g} and {high:g}", param=param)


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
