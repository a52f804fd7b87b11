"""`AdapterPlaces`: which adapters are on the device, each at a place of every site's `SiteStack`; `NoAdapterPlaces`
where there are none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from tensorweave.kernels.lora.reference import UpdatePart
from tensorweave.kernels.lora.stack import SiteStack
from tensorweave.kernels.weights import interleave_gate_up
from tensorweave.workers.engine.device.staging import Ints
from tensorweave.workers.models.adapter_sites import Site
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.plan import ScheduledBatch, StepRow

# P parts of a site's outputs, L places, R most rank, K inputs and N outputs of a site

_LEAST_RANK = 16
"""The least that matrix instructions sum over."""


class PlacesAdapters(Protocol):
    stacks: Sequence[SiteStack]

    def prepare(self, batch: ScheduledBatch) -> None:
        """Before a step is described: bring its adapters to the device, in the order of launches."""
        ...

    def are_in(self, batch: ScheduledBatch) -> bool:
        """Whether a request of the step has an adapter."""
        ...

    def places_of(self, rows: Sequence[StepRow]) -> Sequence[int]:
        """-1: a row has no adapter; nothing at all if there are none."""
        ...

    def token_places_of(self, rows: Sequence[StepRow]) -> Sequence[int] | Ints:
        """The same, once for each of their tokens."""
        ...

    def begin_step(self, places_T: Tensor, buffer_T: Tensor) -> None:
        """Where a step's kernels find its tokens' places."""
        ...


class NoAdapterPlaces:
    stacks: Sequence[SiteStack] = ()

    def prepare(self, batch: ScheduledBatch) -> None:
        return None

    def are_in(self, batch: ScheduledBatch) -> bool:
        return False

    def places_of(self, rows: Sequence[StepRow]) -> Sequence[int]:
        return ()

    def token_places_of(self, rows: Sequence[StepRow]) -> Sequence[int]:
        return ()

    def begin_step(self, places_T: Tensor, buffer_T: Tensor) -> None:
        return None


@dataclass(frozen=True, slots=True)
class HostAdapter:
    """Its parts by site, in the host's memory."""

    sites: tuple[tuple[UpdatePart, ...], ...]


@dataclass(frozen=True, slots=True)
class HostAdapters:
    """Keeps adapters where they can be copied to the device from."""

    is_pinned: bool

    def pack(self, sites: Sequence[Sequence[UpdatePart]]) -> HostAdapter:
        return HostAdapter(tuple(tuple(self._kept(part) for part in parts) for parts in sites))

    def _kept(self, part: UpdatePart) -> UpdatePart:
        if not self.is_pinned:
            return part
        return UpdatePart(part.a_RK.contiguous().pin_memory(), part.b_NR.contiguous().pin_memory(), part.first)


class AdapterPlaces:
    """Used by the step loop alone. A place goes to another adapter when no request of a step has the one before; which
    one was used longest ago."""

    def __init__(self, stacks: Sequence[SiteStack]) -> None:
        self.stacks = stacks
        self._places: dict[bytes, int] = {}
        self._free = list(range(len(stacks[0].ranks_L) - 1, -1, -1))

    def prepare(self, batch: ScheduledBatch) -> None:
        rows = (*batch.context, *batch.generation)
        wanted = {row.request.adapter.digest: row.request.adapter for row in rows if row.request.adapter is not None}
        for digest in wanted:
            if digest in self._places:
                self._places[digest] = self._places.pop(digest)  # the newest comes last
        for digest, adapter in wanted.items():
            if digest not in self._places:
                self._places[digest] = self._take_place(wanted)
                self._copy(adapter, self._places[digest])

    def are_in(self, batch: ScheduledBatch) -> bool:
        return any(row.request.adapter is not None for row in (*batch.context, *batch.generation))

    def places_of(self, rows: Sequence[StepRow]) -> list[int]:
        adapters = [row.request.adapter for row in rows]
        return [-1 if adapter is None else self._places[adapter.digest] for adapter in adapters]

    def token_places_of(self, rows: Sequence[StepRow]) -> Ints:
        return np.repeat(np.array(self.places_of(rows), dtype=np.int32), [row.length for row in rows])

    def begin_step(self, places_T: Tensor, buffer_T: Tensor) -> None:
        buffer_T.copy_(places_T)

    def _take_place(self, wanted: dict[bytes, RankAdapter]) -> int:
        if self._free:
            return self._free.pop()
        oldest = next((digest for digest in self._places if digest not in wanted), None)
        assert oldest is not None, "a step has more adapters than max_loras"
        return self._places.pop(oldest)

    def _copy(self, adapter: RankAdapter, place: int) -> None:
        """What steps launched before read there, they have read when this is copied: it is in the order of launches."""
        for stack, parts in zip(self.stacks, adapter.packed.sites, strict=True):
            stack.ranks_L[place].fill_(max((len(part.a_RK) for part in parts), default=0))
            if not parts:
                continue
            a_PRK, b_NR = stack.a_PLRK[:, place], stack.b_NLR[:, place]
            a_PRK.zero_()
            b_NR.zero_()
            for part in parts:
                number, outputs, rows_NR = _place_in(stack, part)
                rank = len(part.a_RK)
                a_PRK[number, :rank].copy_(part.a_RK, non_blocking=True)
                b_NR[outputs, :rank].copy_(rows_NR, non_blocking=True)


def _place_in(stack: SiteStack, part: UpdatePart) -> tuple[int, slice, Tensor]:
    """The number of a part, the outputs of the product that are its, and B in their order."""
    starts = (0, *stack.bounds)
    number = starts.index(part.first)
    if not stack.is_interleaved:
        return number, slice(part.first, part.first + len(part.b_NR)), part.b_NR
    if len(starts) == 1:  # of a fused tensor
        return number, slice(None), interleave_gate_up(*part.b_NR.chunk(2))
    return number, slice(number, None, len(starts)), part.b_NR


def make_stacks(
    sites: Sequence[Site],
    interleaved: set[int],
    num_places: int,
    max_rank: int,
    dtype: torch.dtype,
    device: torch.device,
) -> list[SiteStack]:
    """Room for adapters. `interleaved` are the sites whose gates and ups alternate."""
    rank = max(_LEAST_RANK, 1 << (max_rank - 1).bit_length())
    stacks = []
    for number, site in enumerate(sites):
        num_inputs, num_outputs = len(site[0].columns), sum(len(part.rows) for part in site)
        stacks.append(
            SiteStack(
                torch.zeros(len(site), num_places, rank, num_inputs, dtype=dtype, device=device),
                torch.zeros(num_outputs, num_places, rank, dtype=dtype, device=device),
                torch.zeros(num_places, dtype=torch.int32, device=device),
                tuple(part.first for part in site[1:]),
                number in interleaved,
            )
        )
    return stacks
