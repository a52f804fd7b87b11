"""From logits to tokens: greedy, or sampled with temperature, min-p, top-k and top-p, after the logits were edited.

Order: users' processors, biases, bans, penalties, temperature, min-p, top-k, top-p. Tokens are drawn by the rule of
`kernels.sample.rule`: its random numbers are a hash of the request's seed, the token's position in its sequence and the
token, so the same request gives the same tokens on any gang, in any batch, and after a recovery.

Nothing waits for the device before the result is read, unless a user's processor edits logits or logits at a prompt are
told. So a row that gives no token shows in the result: the operations that choose tokens find such rows without an
extra pass over the logits. Only if rows are edited, all rows are looked at before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tensorweave.cluster.errors import LogitsNotFinite, RequestRejected, TensorweaveError
from tensorweave.cluster.guide import GUIDE_PARAM
from tensorweave.kernels.argmax.reference import NOTHING_LEFT
from tensorweave.kernels.penalties.chosen import choose_penalties
from tensorweave.kernels.sample.chosen import Sampler, choose_sampler
from tensorweave.workers.sampling.choices import TokenChoices
from tensorweave.workers.sampling.device_counts import CountedRows, DeviceCounts
from tensorweave.workers.sampling.grammar_masks import GrammarMasks
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.sampling.logit_edits import LogitEdits
from tensorweave.workers.sampling.logits_processors import LogitsProcessors
from tensorweave.workers.sampling.logprobs import ReportedRows, read_prompts
from tensorweave.workers.sampling.rules import make_rules
from tensorweave.workers.sampling.state import MakeRules, SamplingState
from tensorweave.workers.sampling.states import SamplingStates
from tensorweave.workers.step.pending import Later, Pending, Ready, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.result import PromptResult, RowResult, StepResult
from tensorweave.workers.step.vocabulary import Vocabulary, WholeVocabulary

# R rows of logits, V vocabulary

_CPU = torch.device("cpu")


class Decoder(Protocol):
    """Turns the logits of a step into tokens, and into what is told beside them."""

    processors: LogitsProcessors

    def reads_tokens(self, request: LlmRequest) -> bool:
        """Whether all tokens before a request's next one must be known to choose it."""

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        """Begin to decode a step whose logits are computed meanwhile. Changes no request."""


@dataclass(frozen=True, slots=True)
class _Rows:
    """Rows of a batch by what is done with their logits. Computed again when other requests decode.

    `only_bans`: the edited rows lose tokens and are otherwise the model's.
    """

    requests: tuple[LlmRequest, ...]
    reported: ReportedRows
    edited: Sequence[tuple[int, LlmRequest, SamplingState]]
    counted: CountedRows | None
    has_random: bool
    only_bans: bool


@dataclass(slots=True)
class _Edited:
    """What became of the edited rows: `largest_R` are the places of the model's own largest logits, on the way to the
    host, None if tokens were forbidden and no more; `failures` by row are those of users' processors and of grammars.
    """

    largest_R: Tensor | None
    failures: dict[int, TensorweaveError] = field(default_factory=dict)


class SamplingDecoder:
    """Greedy and sampled rows together; every rank decodes the same logits to the same tokens.

    Args:
        make_rules: Makes the rules that a request's tokens follow.
        device: Where the logits are.
        sampler: Chooses the tokens; by default the fastest form for the device.
        keeps_tokens: The engine's steps have `DeviceRows`, so that a penalised request's tokens are counted on the
            device and the host need not know them.
        vocabulary: Which logits a step has.
    """

    def __init__(
        self,
        make_rules: MakeRules = make_rules,
        *,
        device: torch.device = _CPU,
        sampler: Sampler | None = None,
        keeps_tokens: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        self.processors = LogitsProcessors()
        self._copies = HostCopies(device)
        self._masks = GrammarMasks(self._copies)
        self._counts = DeviceCounts(self._copies, choose_penalties(device))
        self.states = SamplingStates(make_rules, self._counts, counts_on_device=keeps_tokens)
        self._vocabulary = vocabulary or WholeVocabulary()
        self._choices = TokenChoices(sampler or choose_sampler(device), self._copies, self._vocabulary)
        self._rows = self._sort(())

    def warm_up(self, steps: Iterable[StepLogits]) -> None:
        """Compile the kernels that choose tokens for steps with these numbers of rows, in these buffers, and capture
        them in CUDA graphs. Logits may be any numbers; the steps' newest tokens are overwritten."""
        self._choices.warm_up(steps)

    def reads_tokens(self, request: LlmRequest) -> bool:
        return self.states.state_of(request).reads_tokens

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        launched = logits.then(lambda step: self._launch_step(step, batch))
        return Later(lambda: launched.result().result())

    def decode(self, logits_RV: Tensor, batch: ScheduledBatch) -> StepResult:
        """`logits_RV` has one row for each of `batch.sampled`; each gets one token or an error."""
        return self._launch_step(StepLogits(logits_RV), batch).result()

    def _launch_step(self, step: StepLogits, batch: ScheduledBatch) -> Pending[StepResult]:
        """On a CPU, all is done when this returns."""
        prompts = read_prompts(step.prompts)
        requests = tuple([row[0] for row in batch.sampled])
        if not requests:
            result = StepResult(prompts=prompts)
            return Ready(result) if step.check is None else self._when_done(step, lambda: result)
        if requests != self._rows.requests:
            self._rows = self._sort(requests)
            if self._rows.has_random:
                self._choices.parameters.set([request.sampling for request in requests], {})
        rows = self._rows
        is_share = self._needs_share_alone(rows)
        logits_RV = step.sampled_RV if is_share else self._vocabulary.whole(step.sampled_RV)
        kept_NV = rows.reported.copy(logits_RV) if rows.reported else None
        edited = self._edit(logits_RV, rows, batch) if rows.edited else None
        tokens_R = self._choices.choose(logits_RV, self._positions(step, batch), step.rows, is_share=is_share)
        if rows.counted is not None:
            self._counts.count(tokens_R, rows.counted)
        extras = rows.reported.measure(kept_NV, tokens_R) if kept_NV is not None else dict
        launched = _Launched(rows, self._copies.to_host(tokens_R), edited, extras, prompts)
        return self._when_done(step, launched.read)

    def _when_done(self, step: StepLogits, read: Callable[[], StepResult]) -> Pending[StepResult]:
        """What `read` gives when the device has done all that was launched until now."""
        if self._copies.device.type == "cpu" and step.check is None:
            return Ready(read())
        mark = self._copies.mark()

        def wait_and_read() -> StepResult:
            mark.wait()
            if step.check is not None:
                step.check()
            return read()

        return Later(wait_and_read)

    def _needs_share_alone(self, rows: _Rows) -> bool:
        """Whether the rows' tokens follow from what each rank finds among its own, where the vocabulary is split."""
        if self._vocabulary.sampler is None:
            return False
        is_plain = not rows.reported and not rows.edited and rows.counted is None
        return is_plain and not (rows.has_random and self._choices.parameters.has_limits)

    def _positions(self, step: StepLogits, batch: ScheduledBatch) -> Tensor | None:
        """The places of the tokens in their sequences; None where all rows are greedy."""
        if not self._rows.has_random:
            return None
        if step.rows is not None:
            return step.rows.positions_R
        return self._copies.to_device(np.array([row.stop for row in batch.sampled], dtype=np.int32))

    def _sort(self, requests: tuple[LlmRequest, ...]) -> _Rows:
        states = [self.states.state_of(request) for request in requests]
        reported = [(row, request) for row, request in enumerate(requests) if request.sampling.wants_extras]
        return _Rows(
            requests,
            reported=ReportedRows(reported, self._copies),
            edited=[(row, requests[row], state) for row, state in enumerate(states) if state.edits_logits],
            counted=self._counts.rows_of(
                [(row, requests[row]) for row, state in enumerate(states) if state.is_counted]
            ),
            has_random=not all(request.sampling.is_greedy for request in requests),
            only_bans=all(state.only_bans for state in states),
        )

    def _edit(self, logits_RV: Tensor, rows: _Rows, batch: ScheduledBatch) -> _Edited:
        """Edit rows in place."""
        edited = _Edited(None) if rows.only_bans else self._look_and_process(logits_RV, rows)
        edits = LogitEdits()
        for row, request, state in rows.edited:
            if state.rules:
                state.follow(request.tokens)
                state.history.position = batch.sampled[row].stop
                state.edit(row, edits)
        edits.apply(logits_RV, self._copies, self._masks)
        edited.failures |= edits.failures
        if rows.counted is not None:
            self._counts.penalise(logits_RV, rows.counted, batch.sampled)
        if edits.top_p:
            self._choices.parameters.set([request.sampling for request in rows.requests], edits.top_p)
        return edited

    def _look_and_process(self, logits_RV: Tensor, rows: _Rows) -> _Edited:
        """Look at the logits before they are changed, and run users' processors. These see no logits that are not
        finite, so that they are not blamed for them."""
        largest_R = self._choices.largest(logits_RV)
        edited = _Edited(self._copies.to_host(largest_R))
        asking = [(row, request) for row, request, state in rows.edited if state.has_processor]
        if asking:
            largest = largest_R.tolist()
            asking = [(row, request) for row, request in asking if largest[row] >= 0]
            edited.failures |= self.processors.run(logits_RV, asking)
            for row, _ in asking:
                logits_RV[row].clamp_max_(torch.finfo(logits_RV.dtype).max)
        return edited


@dataclass(slots=True)
class _Launched:
    """What is read when the device is done. Not frozen, which would take three times as long to make."""

    rows: _Rows
    tokens_R: Tensor
    edited: _Edited | None
    extras: Callable[[], Mapping[int, TokenExtras]]
    prompts: Sequence[PromptResult]

    def read(self) -> StepResult:
        tokens: list[int] = self.tokens_R.tolist()[: len(self.rows.requests)]
        result: list[RowResult] = [[token] for token in tokens]
        if min(tokens) < 0 or self.edited is not None:
            for row, failure in self._failures(tokens):
                result[row] = failure
        return StepResult(result, {row: (each,) for row, each in self.extras().items()}, self.prompts)

    def _failures(self, tokens: Sequence[int]) -> Iterable[tuple[int, TensorweaveError]]:
        """A row that only lost tokens, and has none left, is not looked at: its model's logits were numbers, unless all
        of them were minus infinity."""
        failures: dict[int, TensorweaveError] = {}
        largest: list[int] = []
        if self.edited is not None:
            largest = [] if self.edited.largest_R is None else self.edited.largest_R.tolist()
            failures |= self.edited.failures
            for row, _, state in self.rows.edited:
                is_its_own = largest[row] >= 0 if largest else tokens[row] == NOTHING_LEFT
                if tokens[row] < 0 and is_its_own and row not in failures:
                    failures[row] = _blame(state, tokens[row])
        wrong = [row for row, token in enumerate(tokens) if token < 0 or (largest and largest[row] < 0)]
        return (dict.fromkeys(wrong, LogitsNotFinite.of_model()) | failures).items()


def _blame(state: SamplingState, code: int) -> RequestRejected:
    """The request's fault that its edited row gives no token, where the model's had one."""
    if code == NOTHING_LEFT and state.spec.guide is not None:
        return RequestRejected(
            "no token is left that the grammar allows: bans and biases forbid them, or the answer is complete and"
            " must not end yet (min_tokens, ignore_eos)",
            param=GUIDE_PARAM,
        )
    if code == NOTHING_LEFT:
        return RequestRejected("bans and biases leave no token to choose", param="bad_token_ids")
    if state.has_processor:
        return RequestRejected("a logits processor has left NaN", param="logits_processor")
    return RequestRejected("the penalties leave no numbers to choose by", param="repetition_penalty")
