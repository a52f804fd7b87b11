"""From logits to tokens: greedy, or sampled with temperature, min-p, top-k and top-p.

Randomness is counter-based: the random number of a token is a hash of the request's seed and the token's position in
its sequence, so the same request gives the same tokens on any gang, in any batch, and after a recovery. Sampling
inverts the cumulative distribution in vocabulary order, so rounding differences of the logits move a token only where
the number falls on a boundary.
"""

from __future__ import annotations

from typing import Protocol

import torch

from tensorweave.workers.plan import ScheduledBatch
from tensorweave.workers.request import LlmRequest

# R rows of logits, V vocabulary

_MASK = (1 << 64) - 1


class Decoder(Protocol):
    """Turns logits [R, V] float32, one row a request of `batch.sampled`, into one token id each."""

    def decode(self, logits_RV: torch.Tensor, batch: ScheduledBatch) -> list[int]: ...


class SamplingDecoder:
    """Greedy and sampled rows together; every rank decodes the same logits to the same tokens."""

    def decode(self, logits_RV: torch.Tensor, batch: ScheduledBatch) -> list[int]:
        requests = batch.sampled
        if not requests:
            return []
        _suppress_early_stops(logits_RV, requests)
        rows = [row for row, request in enumerate(requests) if not request.sampling.is_greedy]
        if not rows:
            return _to_list(logits_RV.argmax(dim=-1))
        if len(rows) == len(requests):
            return _to_list(_sample(logits_RV, requests))
        tokens = logits_RV.argmax(dim=-1)
        index = torch.tensor(rows, device=logits_RV.device)
        tokens[index] = _sample(logits_RV[index], [requests[row] for row in rows])
        return _to_list(tokens)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) from (seed, position): two rounds of splitmix64's finaliser (Steele, Lea, Flood 2014)."""
    mixed = _mix((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) & _MASK)
    mixed = _mix((mixed + (position + 1) * 0x9E3779B97F4A7C15) & _MASK)
    return float(mixed >> 11) * 2.0**-53


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _to_list(tokens_R: torch.Tensor) -> list[int]:
    ids: list[int] = tokens_R.tolist()
    return ids


def _suppress_early_stops(logits_RV: torch.Tensor, requests: tuple[LlmRequest, ...]) -> None:
    for row, request in enumerate(requests):
        sampling = request.sampling
        if sampling.min_tokens > request.num_output and sampling.stop_token_ids:
            logits_RV[row, list(sampling.stop_token_ids)] = -torch.inf


def _sample(logits_RV: torch.Tensor, requests: tuple[LlmRequest, ...] | list[LlmRequest]) -> torch.Tensor:
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    specs = [request.sampling for request in requests]
    # Float64 so that a huge or tiny temperature neither overflows nor divides by zero.
    temperature_R1 = torch.tensor([[spec.temperature] for spec in specs], dtype=torch.float64, device=device)
    probs_RV = torch.softmax(logits_RV.double() / temperature_R1.clamp_min(1e-6), dim=-1)
    if any(spec.min_p > 0 for spec in specs):
        min_p_R1 = torch.tensor([[spec.min_p] for spec in specs], dtype=torch.float64, device=device)
        probs_RV = probs_RV.masked_fill(probs_RV < min_p_R1 * probs_RV.amax(dim=-1, keepdim=True), 0.0)
    if any(0 < spec.top_k < vocab_size or spec.top_p < 1 for spec in specs):
        probs_RV = _keep_top(probs_RV, [spec.top_k or vocab_size for spec in specs], [spec.top_p for spec in specs])
    cumulative_RV = probs_RV.cumsum(dim=-1)
    numbers_R1 = torch.tensor(
        [[uniform(request.sampling.seed, len(request.tokens))] for request in requests],
        dtype=torch.float64,
        device=device,
    )
    threshold_R1 = numbers_R1 * cumulative_RV[:, -1:]
    # The first token whose cumulative probability passes the threshold; it has probability above 0 by construction.
    tokens_R: torch.Tensor = (cumulative_RV <= threshold_R1).sum(dim=-1)
    last_R = vocab_size - 1 - (probs_RV > 0).flip(-1).int().argmax(dim=-1)
    return torch.minimum(tokens_R, last_R)


def _keep_top(probs_RV: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Zero all but the k likeliest, and of those (renormalised) all but the smallest set that reaches top_p."""
    device = probs_RV.device
    sorted_RV, order_RV = probs_RV.sort(dim=-1, descending=True, stable=True)
    rank_V = torch.arange(probs_RV.shape[1], device=device)
    sorted_RV = sorted_RV.masked_fill(rank_V >= torch.tensor(top_k, device=device).unsqueeze(1), 0.0)
    share_RV = sorted_RV / sorted_RV.sum(dim=-1, keepdim=True)
    before_RV = share_RV.cumsum(dim=-1) - share_RV
    limit_R1 = torch.tensor(top_p, dtype=torch.float64, device=device).unsqueeze(1)
    drop_RV = before_RV >= limit_R1
    drop_RV[:, 0] = False  # the likeliest token always stays
    drop_RV &= limit_R1 < 1
    sorted_RV = sorted_RV.masked_fill(drop_RV, 0.0)
    return torch.zeros_like(probs_RV).scatter_(1, order_RV, sorted_RV)
