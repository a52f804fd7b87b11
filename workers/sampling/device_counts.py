"""`DeviceCounts`: how often each token is in the sequences of penalised requests, counted where the tokens are drawn.

So a penalised request needs none of its tokens on the host: its next step may be launched before they are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from torch import Tensor

from tensorweave.kernels.penalties.chosen import PenaltyOperations
from tensorweave.kernels.penalties.reference import PROMPT, PenalisedRows
from tensorweave.workers.sampling.host_copies import HostCopies
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest

# R rows of logits, N of them penalised, C rows of counts, V vocabulary

_FIRST_ROOM: Final = 32


@dataclass(slots=True)
class _Place:
    """`num_counted` tokens of the sequence are in this row of counts when what was launched is done."""

    index: int
    num_counted: int = 0


class CountedRows:
    """The penalised rows of a batch. The steps of the same requests use it again."""

    def __init__(self, counted: Sequence[tuple[int, LlmRequest]], places: Sequence[_Place], copies: HostCopies) -> None:
        self.counted = tuple(zip(counted, places, strict=True))
        specs = [request.sampling for _, request in counted]
        numbers = np.empty((5, len(counted)), dtype=np.int32)
        numbers[0], numbers[1] = [row for row, _ in counted], [place.index for place in places]
        floats = numbers.view(np.float32)
        floats[2] = [spec.repetition_penalty for spec in specs]
        floats[3] = [spec.presence_penalty for spec in specs]
        floats[4] = [spec.frequency_penalty for spec in specs]
        rows, counts, *penalties = copies.to_device(numbers)
        self.on_device = PenalisedRows(rows, counts, *(each.view(torch.float32) for each in penalties))


class DeviceCounts:
    """2 bytes per token of the vocabulary for each penalised request; allocated when the first one comes."""

    def __init__(self, copies: HostCopies, operations: PenaltyOperations) -> None:
        self._copies = copies
        self._operations = operations
        self._counts_CV = torch.zeros(0, 0, dtype=torch.int16, device=copies.device)
        self._places: dict[LlmRequest, _Place] = {}
        self._free: list[int] = []

    def rows_of(self, counted: Sequence[tuple[int, LlmRequest]]) -> CountedRows | None:
        """These rows of a batch, which are penalised; None if there are none."""
        if not counted:
            return None
        return CountedRows(counted, [self._place_of(request) for _, request in counted], self._copies)

    def _place_of(self, request: LlmRequest) -> _Place:
        place = self._places.get(request)
        if place is None:
            index = self._free.pop() if self._free else len(self._places)
            place = self._places[request] = _Place(index)
        return place

    def release(self, request: LlmRequest) -> None:
        place = self._places.pop(request, None)
        if place is not None:
            self._free.append(place.index)

    def penalise(self, logits_RV: Tensor, rows: CountedRows, sampled: Sequence[StepRow]) -> None:
        """Apply the penalties. The tokens before those that are drawn next are counted first, where they are not."""
        self._make_room(max(place.index for _, place in rows.counted) + 1, logits_RV.shape[1])
        for (row, request), place in rows.counted:
            stop = sampled[row].stop
            if place.num_counted != stop:
                self._count_anew(place, request, stop)
            place.num_counted = stop + 1
        self._operations.penalise(logits_RV, self._counts_CV, rows.on_device)

    def count(self, tokens_R: Tensor, rows: CountedRows) -> None:
        """Count what the rows have drawn."""
        self._operations.count(tokens_R, self._counts_CV, rows.on_device)

    def _make_room(self, num_places: int, vocab_size: int) -> None:
        room, old_CV = len(self._counts_CV), self._counts_CV
        if num_places <= room:
            return
        room = max(_FIRST_ROOM, 1 << (num_places - 1).bit_length())
        self._counts_CV = torch.zeros(room, vocab_size, dtype=torch.int16, device=self._copies.device)
        if len(old_CV):
            self._counts_CV[: len(old_CV)] = old_CV

    def _count_anew(self, place: _Place, request: LlmRequest, num_tokens: int) -> None:
        """A request that is new here, or that was away. Its tokens are known then."""
        tokens = request.tokens[:num_tokens]
        assert len(tokens) == num_tokens, "a token is counted neither here nor known to the host"
        counts_V = self._counts_CV[place.index].zero_()
        if request.sampling.repetition_penalty != 1.0:
            counts_V.index_fill_(0, self._ids(tokens[: request.prompt_len]), PROMPT)
        if num_tokens > request.prompt_len:
            ids_N = self._ids(tokens[request.prompt_len :])
            counts_V.index_add_(0, ids_N, torch.full_like(ids_N, 2, dtype=torch.int16))

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return self._copies.to_device(np.array(tokens, dtype=np.int64))
