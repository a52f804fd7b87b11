"""Reports log-probabilities and logits: those of the model, before anything edits them.

`ReportedRows` copies the rows of output tokens before they are edited; `read_prompts` reports on the prompts' tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite
from tensorweave.cluster.protocol import Logprob, TokenLogprobs
from tensorweave.kernels.argmax.chosen import argmax
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.step.plan import PromptRead
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.result import PromptResult

# N rows that are reported, V vocabulary, k likeliest tokens

MAX_CHUNK_BYTES: Final = 4 << 20
"""The most bytes of logits in one chunk, which has at least one row."""


@dataclass(frozen=True, slots=True)
class TokenMeasures:
    """What log-probabilities are told from, for each row.

    Args:
        numbers_Nk: int64; the token, its rank, the likeliest tokens.
        logprobs_Nk: the log-probabilities of the token and of the likeliest.
    """

    numbers_Nk: Tensor
    logprobs_Nk: Tensor

    @classmethod
    def of(cls, logits_NV: Tensor, tokens_N: Tensor, num_top: int) -> TokenMeasures:
        """On the logits' device; in float64 on a CPU, in float32 on a GPU, which takes a third of the time."""
        logits_NV = logits_NV.to(torch.float32 if logits_NV.is_cuda else torch.float64)
        tokens_N1 = tokens_N.unsqueeze(1)
        own_N1 = logits_NV.gather(1, tokens_N1)
        ranks_N1 = (logits_NV > own_N1).sum(dim=-1, keepdim=True) + 1
        top_Nk, ids_Nk = logits_NV.topk(min(num_top, logits_NV.shape[1]), dim=-1)
        logprobs_Nk = torch.cat([own_N1, top_Nk], dim=1) - logits_NV.logsumexp(dim=-1, keepdim=True)
        return cls(torch.cat([tokens_N1, ranks_N1, ids_Nk], dim=1), logprobs_Nk)

    def to_host(self, copies: HostCopies) -> TokenMeasures:
        return TokenMeasures(copies.to_host(self.numbers_Nk), copies.to_host(self.logprobs_Nk))

    def logprobs(self) -> list[TokenLogprobs]:
        """For each row, the natural log-probability of its token, then of the likeliest tokens. The rank of the row's
        token is one more than the number of tokens with larger logits."""
        places = range(1, self.logprobs_Nk.shape[1])
        return [
            (Logprob(token, own, rank), *map(Logprob, ids, logprobs, places))
            for (token, rank, *ids), (own, *logprobs) in zip(
                self.numbers_Nk.tolist(), self.logprobs_Nk.tolist(), strict=True
            )
        ]


def logprobs_of(logits_NV: Tensor, tokens: Sequence[int], num_top: int) -> list[TokenLogprobs]:
    """The log-probabilities of these tokens, one for each row, and of the `num_top` likeliest."""
    tokens_N = torch.tensor(tokens, dtype=torch.int64, device=logits_NV.device)
    return TokenMeasures.of(logits_NV, tokens_N, num_top).logprobs()


def pack_logits(logits_NV: Tensor) -> bytes:
    """Little-endian float32, row after row."""
    packed: bytes = logits_NV.to(torch.float32).cpu().contiguous().numpy().astype("<f4", copy=False).tobytes()
    return packed


class ReportedRows:
    """The rows of a batch for which log-probabilities or logits were asked.

    Requests are grouped by the number of tokens that they ask for: which of several equal logits is among the likeliest
    must not depend on the rest of the batch.
    """

    def __init__(self, reported: Sequence[tuple[int, LlmRequest]], copies: HostCopies) -> None:
        self._reported = reported
        self._copies = copies
        self._rows_N = copies.to_device(np.array([row for row, _ in reported], dtype=np.int64))
        wanted: dict[int, list[int]] = {}
        for place, (_, request) in enumerate(reported):
            if request.sampling.num_logprobs is not None:
                wanted.setdefault(request.sampling.num_logprobs, []).append(place)
        self._groups = [
            (num_top, places, None if len(places) == len(reported) else copies.to_device(np.array(places)))
            for num_top, places in wanted.items()
        ]

    def __bool__(self) -> bool:
        return bool(self._reported)

    def copy(self, logits_RV: Tensor) -> Tensor:
        """[N, V]: the model's logits, before they are edited."""
        return logits_RV.index_select(0, self._rows_N)

    def measure(self, logits_NV: Tensor, tokens_R: Tensor) -> Callable[[], dict[int, TokenExtras]]:
        """Begin to copy to the host what is told beside the tokens. Returns what reads it, by row, once the copies are
        done."""
        tokens_N = tokens_R.index_select(0, self._rows_N).clamp_min_(0)
        measured = []
        for num_top, places, places_n in self._groups:
            group = (logits_NV, tokens_N) if places_n is None else (logits_NV[places_n], tokens_N[places_n])
            measured.append((places, TokenMeasures.of(*group, num_top).to_host(self._copies)))
        wants_logits = any(request.sampling.wants_generation_logits for _, request in self._reported)
        host_NV = self._copies.to_host(logits_NV) if wants_logits else logits_NV

        def read() -> dict[int, TokenExtras]:
            logprobs: dict[int, TokenLogprobs] = {}
            for places, measures in measured:
                logprobs |= zip(places, measures.logprobs(), strict=True)
            return {
                row: TokenExtras(
                    logprobs.get(place),
                    pack_logits(host_NV[place]) if request.sampling.wants_generation_logits else b"",
                )
                for place, (row, request) in enumerate(self._reported)
            }

        return read


def read_prompts(prompts: Iterable[tuple[PromptRead, Tensor]]) -> list[PromptResult]:
    """What is reported of a step's prompt tokens, given the logits [N, V] float32 at each read's tokens, or the
    embedding [1, D] float32."""
    return [
        PromptResult(read, logits=[pack_logits(told)])
        if read.request.sampling.wants_embedding
        else _read_prompt(read, told)
        for read, told in prompts
    ]


def _read_prompt(read: PromptRead, logits_NV: Tensor) -> PromptResult:
    if argmax(logits_NV).min() < 0:
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
