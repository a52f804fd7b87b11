"""From logits to tokens: greedy, or sampled with temperature, min-p, top-k and top-p, after the logits were edited.

Order: users' processors, biases, bans, penalties, temperature, min-p, top-k, top-p. Randomness is counter-based: the
random number of a token is a hash of the request's seed and the token's position in its sequence, so the same request
gives the same tokens on any gang, in any batch, and after a recovery. Sampling inverts the cumulative distribution in
vocabulary order, so rounding differences of the logits change a token only if the number falls on a boundary.

A row with NaN or infinity gives no token. The operations that choose tokens find such rows without an extra pass over
the logits. Only if rows are edited, all rows are checked before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from tensorweave.cluster.errors import LogitsNotFinite, RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.kernels.argmax.chosen import NO_PLACE, argmax
from tensorweave.workers.sampling.logit_edits import LogitEdits
from tensorweave.workers.sampling.logits_processors import LogitsProcessors
from tensorweave.workers.sampling.logprobs import CopiedRows, read_prompts
from tensorweave.workers.sampling.rules import make_rules
from tensorweave.workers.sampling.state import MakeRules, SamplingState
from tensorweave.workers.sampling.states import SamplingStates
from tensorweave.workers.step.pending import Pending, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.result import RowResult, StepResult

# R rows of logits, V vocabulary

_MASK = (1 << 64) - 1


class Decoder(Protocol):
    """Turns the logits of a step into tokens, and into what is told beside them."""

    processors: LogitsProcessors

    def reads_tokens(self, request: LlmRequest) -> bool:
        """Whether all tokens before a request's next one must be known to choose it."""

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        """Begin to decode a step whose logits are computed meanwhile. Changes no request."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a batch by what is done with their logits. Computed again when other requests decode."""

    requests: tuple[LlmRequest, ...] = ()
    reported: Sequence[tuple[int, LlmRequest]] = ()
    edited: Sequence[tuple[int, LlmRequest, SamplingState]] = ()
    random: Sequence[int] = ()


class SamplingDecoder:
    """Greedy and sampled rows together; every rank decodes the same logits to the same tokens.

    Args:
        make_rules: Makes the rules that a request's tokens follow.
    """

    def __init__(self, make_rules: MakeRules = make_rules) -> None:
        self.processors = LogitsProcessors()
        self.states = SamplingStates(make_rules)
        self._rows = _Rows()

    def reads_tokens(self, request: LlmRequest) -> bool:
        return self.states.state_of(request).edits_logits

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        return logits.then(lambda step: self._decode_step(step, batch))

    def _decode_step(self, logits: StepLogits, batch: ScheduledBatch) -> StepResult:
        prompts = read_prompts(logits.prompts)
        result = self.decode(logits.sampled_RV, batch)
        return replace(result, prompts=prompts) if prompts else result

    def decode(self, logits_RV: torch.Tensor, batch: ScheduledBatch) -> StepResult:
        """`logits_RV` has one row for each of `batch.sampled`; each gets one token or an error."""
        requests = tuple([row[0] for row in batch.sampled])
        if not requests:
            return StepResult()
        if requests != self._rows.requests:
            self._rows = self._sort(requests)
        rows = self._rows
        reported = CopiedRows(logits_RV, rows.reported) if rows.reported else None
        top_p, failures = self._edit(logits_RV, rows.edited) if rows.edited else ({}, {})
        return _result(_choose(logits_RV, rows, top_p, batch), reported, failures)

    def _sort(self, requests: tuple[LlmRequest, ...]) -> _Rows:
        states = [self.states.state_of(request) for request in requests]
        return _Rows(
            requests,
            reported=[(row, request) for row, request in enumerate(requests) if request.sampling.wants_extras],
            edited=[(row, requests[row], state) for row, state in enumerate(states) if state.edits_logits],
            random=[row for row, request in enumerate(requests) if not request.sampling.is_greedy],
        )

    def _edit(
        self, logits_RV: torch.Tensor, edited: Sequence[tuple[int, LlmRequest, SamplingState]]
    ) -> tuple[dict[int, float], dict[int, TensorweaveError]]:
        """Edit these rows in place. Return by row what replaces a request's top_p, and the failures. The model's logits
        are checked first, so that a user's code is not blamed for them."""
        best = _to_list(argmax(logits_RV))
        failures: dict[int, TensorweaveError] = {
            row: LogitsNotFinite.of_model() for row, _, _ in edited if best[row] == NO_PLACE
        }
        edits, rows = LogitEdits(), []
        for row, request, state in edited:
            if row not in failures:
                state.follow(request.tokens)
                state.edit(row, edits)
                rows.append((row, request))
        if rows:
            failures |= self.processors.run(logits_RV, rows)
            edits.apply(logits_RV)
            failures = _check_edited(logits_RV, rows) | failures
        for row in failures:
            logits_RV[row] = 0.0
        return edits.top_p, failures


def _check_edited(logits_RV: torch.Tensor, edited: Sequence[tuple[int, LlmRequest]]) -> dict[int, TensorweaveError]:
    """Return the failures by row. Plus infinity makes a token certain and is replaced by the largest number. A row that
    has no token left, or NaN, is the request's fault."""
    failures: dict[int, TensorweaveError] = {}
    best_E = logits_RV[[row for row, _ in edited]].amax(dim=-1).tolist()
    for (row, request), best in zip(edited, best_E, strict=True):
        if best == torch.inf:
            logits_RV[row].clamp_(max=torch.finfo(logits_RV.dtype).max)
        elif best == -torch.inf:
            failures[row] = RequestRejected("bans and biases leave no token to choose", param="bad_token_ids")
        elif best != best:
            spec = request.sampling
            has_processor = spec.uses_batched_processor or spec.logits_processors
            failures[row] = (
                RequestRejected("a logits processor has left NaN", param="logits_processor")
                if has_processor
                else RequestRejected("the penalties leave no numbers to choose by", param="repetition_penalty")
            )
    return failures


def _result(tokens: list[int], reported: CopiedRows | None, failures: dict[int, TensorweaveError]) -> StepResult:
    if NO_PLACE in tokens:
        failures |= {row: LogitsNotFinite.of_model() for row, token in enumerate(tokens) if token == NO_PLACE}
    rows: list[RowResult] = [[token] for token in tokens]
    if reported is None and not failures:
        return StepResult(rows)
    extras = {} if reported is None else reported.extras([max(token, 0) for token in tokens])
    for row, failure in failures.items():
        rows[row] = failure
    return StepResult(rows, {row: (each,) for row, each in extras.items()})


def _choose(
    logits_RV: torch.Tensor, rows: _Rows, replaced_top_p: Mapping[int, float], batch: ScheduledBatch
) -> list[int]:
    """One token per row; NO_PLACE for a row that is not finite."""
    if not rows.random:
        return _to_list(argmax(logits_RV))
    specs = [rows.requests[row].sampling for row in rows.random]
    positions = [batch.sampled[row].stop for row in rows.random]
    top_p = [replaced_top_p.get(row, spec.top_p) for row, spec in zip(rows.random, specs, strict=True)]
    if len(specs) == len(rows.requests):
        return _to_list(_sample(logits_RV, specs, positions, top_p))
    tokens = argmax(logits_RV)
    index = torch.tensor(rows.random, device=logits_RV.device)
    tokens[index] = _sample(logits_RV[index], specs, positions, top_p)
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


def _sample(
    logits_RV: torch.Tensor, specs: Sequence[SamplingSpec], positions: Sequence[int], top_p: list[float]
) -> torch.Tensor:
    device, vocab_size = logits_RV.device, logits_RV.shape[1]
    # Float64 so that a huge or tiny temperature neither overflows nor divides by zero.
    temperature_R1 = torch.tensor([[spec.temperature] for spec in specs], dtype=torch.float64, device=device)
    probs_RV = torch.softmax(logits_RV.double() / temperature_R1.clamp_min(1e-6), dim=-1)
    if any(spec.min_p > 0 for spec in specs):
        min_p_R1 = torch.tensor([[spec.min_p] for spec in specs], dtype=torch.float64, device=device)
        probs_RV = probs_RV.masked_fill(probs_RV < min_p_R1 * probs_RV.amax(dim=-1, keepdim=True), 0.0)
    if min(top_p) < 1 or any(0 < spec.top_k < vocab_size for spec in specs):
        probs_RV = _keep_top(probs_RV, [spec.top_k or vocab_size for spec in specs], top_p)
    cumulative_RV = probs_RV.cumsum(dim=-1)
    numbers_R1 = torch.tensor(
        [[uniform(spec.seed, position)] for spec, position in zip(specs, positions, strict=True)],
        dtype=torch.float64,
        device=device,
    )
    threshold_R1 = numbers_R1 * cumulative_RV[:, -1:]
    # The first token whose cumulative probability passes the threshold; it has probability above 0 by construction.
    tokens_R: torch.Tensor = (cumulative_RV <= threshold_R1).sum(dim=-1)
    last_R = vocab_size - 1 - (probs_RV > 0).flip(-1).int().argmax(dim=-1)
    # The sum of a row with NaN, or with an infinity for softmax to divide by, is NaN.
    return torch.minimum(tokens_R, last_R).masked_fill_(cumulative_RV[:, -1].isnan(), NO_PLACE)


def _keep_top(probs_RV: torch.Tensor, top_k: list[int], top_p: list[float]) -> torch.Tensor:
    """Keep the k likeliest tokens, and of those (renormalised) the smallest set that reaches top_p. Others become 0."""
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
