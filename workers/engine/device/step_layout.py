"""`StepLayout`: where the tokens of a step with chunks lie: decodes of one token first, then the contexts' chunks, then
the decodes with drafts, which are computed as chunks are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from tensorweave.workers.step.plan import ScheduledBatch, StepRow


@dataclass(frozen=True, slots=True)
class StepLayout:
    """`samples` has a row for each sample, in the order of `StepLogits.sampled_RV`; `decodes` says which of them are
    decodes of one token."""

    batch: ScheduledBatch
    chunks: Sequence[StepRow]
    samples: Sequence[StepRow]
    decodes: slice

    @classmethod
    def of(cls, batch: ScheduledBatch) -> Self:
        first = len(batch.sampled) - len(batch.generation)
        if not batch.drafts:
            return cls(batch, batch.context, batch.sampled, slice(first, None))
        drafted = batch.generation[-len(batch.drafts) :]
        waves = sorted((wave, place) for place, row in enumerate(drafted) for wave in range(row.length))
        samples = [StepRow(drafted[place].request, drafted[place].start + wave, 1, 1) for wave, place in waves]
        single = slice(first, len(batch.sampled) - len(drafted))
        return cls(batch, (*batch.context, *drafted), (*batch.sampled[: single.stop], *samples), single)

    def token_ids(self) -> list[int]:
        """The token ids of the chunks."""
        ids: list[int] = []
        for request, start, length, _ in self.chunks:
            ids += request.tokens[start : start + length]
            ids += self.batch.drafts.get(request.order, ())
        return ids

    def places(self, num_decodes: int) -> list[int]:
        """Which of the step's tokens give the samples, where the chunks come behind so many decodes."""
        places: list[int] = []
        later: list[tuple[int, int]] = []
        at = num_decodes
        for request, _, length, num_samples in self.chunks:
            if request.order in self.batch.drafts:
                later += [(wave, at + wave) for wave in range(length)]
            elif num_samples:
                places.append(at + length - 1)
            at += length
        places += range(len(self.samples[self.decodes]))
        return places + [place for _, place in sorted(later)]
