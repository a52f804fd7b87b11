"""Reports log-probabilities and logits: those of the model, before anything edits them.

`CopiedRows` copies the rows of output tokens before they are edited; `read_prompts` reports on the prompts' tokens.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite
from tensorweave.cluster.protocol import Logprob, TokenLogprobs
from tensorweave.kernels.argmax.chosen import NO_PLACE, argmax
from tensorweave.workers.step.plan import PromptRead
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.result import PromptResult

# N rows that are reported, V vocabulary, k likeliest tokens

MAX_CHUNK_BYTES: Final = 4 << 20
"""The most bytes of logits in one chunk, which has at least one row."""


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """For each row, the natural log-probability of its token in `tokens`, then of the `num_top` likeliest tokens. The
    rank of the row's token is one more than the number of tokens with larger logits."""
    logits_NV = logits_NV.double()
    norm_N1 = logits_NV.logsumexp(dim=-1, keepdim=True)
    tokens_N1 = torch.tensor(tokens, dtype=torch.int64, device=logits_NV.device).unsqueeze(1)
    own_N1 = logits_NV.gather(1, tokens_N1)
    ranks = ((logits_NV > own_N1).sum(dim=-1) + 1).tolist()
    own = (own_N1 - norm_N1).squeeze(1).tolist()
    top_Nk, ids_Nk = logits_NV.topk(min(num_top, logits_NV.shape[1]), dim=-1)
    places = range(1, top_Nk.shape[1] + 1)
    tops = [
        [*map(Logprob, ids, logprobs, places)]
        for ids, logprobs in zip(ids_Nk.tolist(), (top_Nk - norm_N1).tolist(), strict=True)
    ]
    return [(Logprob(*first), *top) for *first, top in zip(tokens, own, ranks, tops, strict=True)]


def pack_logits(logits_NV: Tensor) -> bytes:
    """Little-endian float32, row after row."""
    packed: bytes = logits_NV.to(torch.float32).cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
    return packed


class CopiedRows:
    """The model's logits for requests that asked for log-probabilities or logits."""

    def __init__(self, logits_RV: Tensor, reported: Sequence[tuple[int, LlmRequest]]) -> None:
        self._reported = reported
        self._logits_NV = logits_RV[[row for row, _ in reported]] if reported else logits_RV[:0]

    def extras(self, tokens: Sequence[int]) -> dict[int, TokenExtras]:
        """What is reported beside the tokens, by row. `tokens` has one for each row of the batch."""
        logprobs = self._logprobs(tokens)
        return {
            row: TokenExtras(
                logprobs.get(place),
                pack_logits(self._logits_NV[place]) if request.sampling.wants_generation_logits else b"",
            )
            for place, (row, request) in enumerate(self._reported)
        }

    def _logprobs(self, tokens: Sequence[int]) -> dict[int, TokenLogprobs]:
        """Requests are grouped by the number of tokens that they ask for: which of several equal logits is among the
        likeliest must not depend on the rest of the batch."""
        wanted: dict[int, list[int]] = {}
        for place, (_, request) in enumerate(self._reported):
            if request.sampling.num_logprobs is not None:
                wanted.setdefault(request.sampling.num_logprobs, []).append(place)
        found: dict[int, TokenLogprobs] = {}
        for num_top, places in wanted.items():
            own = [tokens[self._reported[place][0]] for place in places]
            found |= zip(places, logprobs_of(self._logits_NV[places], own, num_top), strict=True)
        return found


def read_prompts(prompts: Iterable[tuple[PromptRead, Tensor]]) -> list[PromptResult]:
    """What is reported of a step's prompt tokens, given the logits [N, V] float32 at each read's tokens."""
    return [_read_prompt(read, logits_NV) for read, logits_NV in prompts]


def _read_prompt(read: PromptRead, logits_NV: Tensor) -> PromptResult:
    if NO_PLACE in argmax(logits_NV).tolist():
        failure = LogitsNotFinite("the model's logits at the prompt are not finite (NaN or infinity)")
        return PromptResult(read, failure=failure)
    request, spec = read.request, read.request.sampling
    logprobs: list[TokenLogprobs] = []
    next_tokens = request.tokens[read.start + 1 : min(read.stop + 1, request.prompt_len)]
    if spec.num_prompt_logprobs is not None and next_tokens:
        logprobs = logprobs_of(logits_NV[: len(next_tokens)], next_tokens, spec.num_prompt_logprobs)
    logits: list[bytes] = []
    if spec.wants_context_logits:
        step = max(1, MAX_CHUNK_BYTES // (4 * logits_NV.shape[1]))
        logits = [pack_logits(logits_NV[at : at + step]) for at in range(0, len(logits_NV), step)]
    return PromptResult(read, logprobs, logits)
