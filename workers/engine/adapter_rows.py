"""Which rows of a step have which adapter: `AdapterRows`, and `NoAdapterRows` for models without adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

from tensorweave.kernels.lora.reference import NO_UPDATES, AdapterKernels, Updates
from tensorweave.workers.step.plan import ScheduledBatch


class PlansUpdates(Protocol):
    def plan(self, batch: ScheduledBatch) -> Updates:
        """What adapters add to the products of this step's rows."""


class NoAdapterRows:
    def plan(self, batch: ScheduledBatch) -> Updates:
        return NO_UPDATES


@dataclass(frozen=True, slots=True)
class AdapterRows:
    kernels: AdapterKernels

    def plan(self, batch: ScheduledBatch) -> Updates:
        row, rows = 0, dict[bytes, tuple[Any, list[int]]]()
        for request, _, length, _ in (*batch.context, *batch.generation):
            adapter = request.adapter
            if adapter is not None:
                rows.setdefault(adapter.digest, (adapter.packed, []))[1].extend(range(row, row + length))
            row += length
        return self.kernels.plan(list(rows.values()), row)
