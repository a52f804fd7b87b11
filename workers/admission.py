"""What an executor refuses before it enters: requests that no scheduler could ever serve with this model."""

from __future__ import annotations

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, ModelInfo


def check_fits(request: GenerateRequest, info: ModelInfo) -> None:
    """Raises RequestRejected, with `param` naming the field, for a prompt or a length that the model cannot take."""
    num_prompt = len(request.prompt_token_ids)
    sampling = request.sampling
    if num_prompt == 0:
        raise RequestRejected("the prompt is empty", param="prompt")
    if sampling.max_tokens < 1:
        raise RequestRejected(f"max_tokens is {sampling.max_tokens}, must be at least 1", param="max_tokens")
    total = num_prompt + sampling.max_tokens
    if total > info.max_seq_len:
        raise RequestRejected(
            f"prompt of {num_prompt} tokens + max_tokens {sampling.max_tokens} = {total}, "
            f"over the limit of {info.max_seq_len} (max_seq_len)",
            param="max_tokens" if num_prompt < info.max_seq_len else "prompt",
        )
    low, high = min(request.prompt_token_ids), max(request.prompt_token_ids)
    if low < 0 or high >= info.vocab_size:
        bad = low if low < 0 else high
        raise RequestRejected(f"token id {bad} is outside the vocabulary of {info.vocab_size}", param="prompt")
