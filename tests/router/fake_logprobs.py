"""Log-probabilities by a rule that a test can state: rank r has -r / 2, and token t has rank 1 + t % 3."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tensorweave.cluster.protocol import Logprob, SamplingSpec, TokenChunk, TokenLogprobs


def fake_logprobs(token_id: int, num_top: int, vocab_size: int) -> TokenLogprobs:
    first = token_id - token_id % 3
    top = [Logprob((first + place) % vocab_size, -(place + 1) / 2, place + 1) for place in range(num_top)]
    rank = 1 + token_id % 3
    return (Logprob(token_id, -rank / 2, rank), *top)


def with_logprobs(
    chunk: TokenChunk, sampling: SamplingSpec, prompt: Sequence[int], *, is_first: bool, vocab_size: int
) -> TokenChunk:
    """The chunk as a gang would tell it to a request with these wishes."""
    if (num_top := sampling.num_logprobs) is not None:
        told = [fake_logprobs(token, num_top, vocab_size) for token in chunk.token_ids]
        chunk = replace(chunk, logprobs=told)
    if (num_top := sampling.num_prompt_logprobs) is not None and is_first:
        told = [fake_logprobs(token, num_top, vocab_size) for token in prompt[1:]]
        chunk = replace(chunk, prompt_logprobs=told)
    return chunk
