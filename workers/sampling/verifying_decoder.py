"""`VerifyingDecoder`: decodes steps with drafts so that every token is the one that a step without drafts would give.

A row is decoded in waves. The first wave decodes the first sample of every row. A row whose token equals its first
draft takes it, and goes on to the second wave, whose logits were computed after that draft; and so on. So each token is
chosen when all tokens before it are known, and penalties, bans, grammars, users' processors, seeds and
log-probabilities are what they are without drafts.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from tensorweave.workers.sampling.decoder import Decoder
from tensorweave.workers.step.pending import Pending, Ready, StepLogits
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.result import PromptResult, RowResult, StepResult

# R rows of logits, V vocabulary


class VerifyingDecoder(Decoder):
    """Decodes each wave by `decoder`, and steps without drafts by it alone. The step loop must wait for each step."""

    def __init__(self, decoder: Decoder) -> None:
        self.processors = decoder.processors
        self._decoder = decoder

    def reads_tokens(self, request: LlmRequest) -> bool:
        return self._decoder.reads_tokens(request)

    def launch(self, logits: Pending[StepLogits], batch: ScheduledBatch) -> Pending[StepResult]:
        if not batch.drafts:
            return self._decoder.launch(logits, batch)
        return logits.then(lambda step: self._verify(step, batch))

    def _verify(self, step: StepLogits, batch: ScheduledBatch) -> StepResult:
        """Requests have their accepted drafts as tokens while a step is verified, and not after it."""
        lengths = [len(row.request.tokens) for row in batch.sampled]
        waves = _Waves(batch)
        try:
            while waves.places:
                logits_RV = waves.logits(step.sampled_RV)
                prompts = () if waves.number else step.prompts
                decoded = self._decoder.launch(Ready(StepLogits(logits_RV, prompts)), waves.rows())
                waves.take(decoded.result())
        finally:
            for row, length in zip(batch.sampled, lengths, strict=True):
                del row.request.tokens[length:]
        return StepResult(waves.outcomes, waves.extras, waves.prompts)


class _Waves:
    """`places` are those of the current wave's rows in `ScheduledBatch.sampled`."""

    def __init__(self, batch: ScheduledBatch) -> None:
        self.number = 0
        self.places = list(range(len(batch.sampled)))
        self.outcomes: list[RowResult] = [[] for _ in batch.sampled]
        self.extras: dict[int, list[TokenExtras]] = {}
        self.prompts: Sequence[PromptResult] = ()
        self._sampled = batch.sampled
        self._drafts = [batch.drafts.get(row.request.order, ()) for row in batch.sampled]
        self._computed = self.places
        self._first = 0

    def logits(self, sampled_RV: Tensor) -> Tensor:
        """The logits of this wave's rows; the same memory if all rows that have logits here are in the wave."""
        logits_RV = sampled_RV[self._first : self._first + len(self._computed)]
        if len(self.places) == len(self._computed):
            return logits_RV
        row_of = {place: row for row, place in enumerate(self._computed)}
        return logits_RV[[row_of[place] for place in self.places]]

    def rows(self) -> ScheduledBatch:
        """This wave's samples, as decodes of one token."""
        rows = [self._sampled[place] for place in self.places]
        starts = [row.stop - row.num_samples + self.number for row in rows]
        return ScheduledBatch(
            generation=tuple(StepRow(row.request, start, 1, 1) for row, start in zip(rows, starts, strict=True))
        )

    def take(self, result: StepResult) -> None:
        """Note this wave's tokens, and go on to the next. A row that has an error behind tokens ends with these: the
        next step comes to the same error."""
        following = []
        for row, (place, outcome) in enumerate(zip(self.places, result.rows, strict=True)):
            tokens = self.outcomes[place]
            if not isinstance(outcome, list):
                if not self.number:
                    self.outcomes[place] = outcome
                continue
            assert isinstance(tokens, list)
            tokens += outcome
            if row in result.extras:
                self.extras.setdefault(place, []).extend(result.extras[row])
            drafts = self._drafts[place]
            if self.number < len(drafts) and drafts[self.number] == tokens[-1]:
                self._sampled[place].request.tokens.append(tokens[-1])
                following.append(place)
        if not self.number:
            self.prompts = result.prompts
        self._first += len(self._computed)
        self.number += 1
        self._computed = [place for place in self._computed if len(self._drafts[place]) >= self.number]
        self.places = following
