"""`Adapters`: one rank's side of LoRA adapters, as the executor sees it, and `NoAdapters` where they are off."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from tensorweave.cluster.adapter import ADAPTER_PARAM, Adapter
from tensorweave.cluster.errors import RequestRejected, WorkerLost
from tensorweave.cluster.protocol import GenerateRequest
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.gang.report_channel import ReportChannel
from tensorweave.workers.lora.admission import AdapterAdmission, AdapterInbox, Entrance
from tensorweave.workers.lora.orders import AdapterOrder
from tensorweave.workers.lora.peft_directory import PeftFiles
from tensorweave.workers.lora.rank_adapter import AdapterReader
from tensorweave.workers.lora.table import AdapterTable
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BaseResourceManager


class Adapters(Protocol):
    @property
    def managers(self) -> Sequence[BaseResourceManager]:
        """What must see the ends of requests."""

    def start(self, inbox: AdapterInbox, entrance: Entrance) -> None:
        """Before the first step. Rank 0 alone uses the arguments."""

    def admit(self, request: GenerateRequest) -> None:
        """Rank 0, any thread: put a request with an adapter into the inbox, where it arrives once that is in memory on
        all ranks. Raises RequestRejected."""

    def load(self, name: str, path: str) -> Adapter:
        """Rank 0, any thread but the step loop's: read a directory, and return once all ranks have it in memory. Raises
        TensorweaveError."""

    def adapter_of(self, adapter: Adapter) -> RankAdapter | None:
        """The step loop, for a request that has arrived. None for one that was held and has ended: it was cancelled."""

    def follow(self, orders: Sequence[AdapterOrder]) -> None:
        """The step loop, on every rank alike, after the step's arrivals."""

    def let_go(self, request: GenerateRequest) -> None:
        """Rank 0, any thread: a request that waited has ended without arriving."""

    def gauges(self) -> dict[str, float]:
        """From any thread: counters for metrics."""

    def close(self) -> None: ...


class NoAdapters:
    managers: Sequence[BaseResourceManager] = ()

    def start(self, inbox: AdapterInbox, entrance: Entrance) -> None:
        return None

    def admit(self, request: GenerateRequest) -> None:
        raise _off()

    def load(self, name: str, path: str) -> Adapter:
        raise _off()

    def adapter_of(self, adapter: Adapter) -> RankAdapter | None:
        return None

    def follow(self, orders: Sequence[AdapterOrder]) -> None:
        assert not orders, "adapters are switched off"

    def let_go(self, request: GenerateRequest) -> None:
        return None

    def gauges(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        return None


class RankAdapters(BaseResourceManager):
    """Reads adapters on a thread of this rank. A resource manager too, to learn of requests' ends.

    Args:
        capacity: Most adapters in memory.
        reader: Makes this rank's share.
        reports: How the other ranks tell rank 0 what they have loaded.
    """

    def __init__(self, rank: int, size: int, capacity: int, reader: AdapterReader, reports: ReportChannel) -> None:
        self._rank = rank
        self._size = size
        self._capacity = capacity
        self._reader = reader
        self._reports = reports
        self._table = AdapterTable(rank, reader, self._report)
        self._admission: AdapterAdmission | None = None

    @property
    def managers(self) -> Sequence[BaseResourceManager]:
        return (self,)

    def start(self, inbox: AdapterInbox, entrance: Entrance) -> None:
        if self._rank == 0:
            self._admission = AdapterAdmission(self._size, self._capacity, inbox, entrance)
        self._reports.start(self._take_report)

    def admit(self, request: GenerateRequest) -> None:
        self._leader.admit(request)

    def load(self, name: str, path: str) -> Adapter:
        try:
            files = PeftFiles.read(Path(path))
            self._reader.check(files)
        except ValueError as error:
            raise RequestRejected(f"adapter {name!r} was refused: {error}", param="lora_path") from None
        adapter = Adapter(name, files.digest, path)
        self._leader.load(adapter)
        return adapter

    def adapter_of(self, adapter: Adapter) -> RankAdapter | None:
        return self._table.get(adapter.digest)

    def follow(self, orders: Sequence[AdapterOrder]) -> None:
        self._table.follow(orders)

    def let_go(self, request: GenerateRequest) -> None:
        if request.adapter is not None:
            self._leader.let_go(request.request_id, request.adapter.digest)

    def free_resources(self, request: LlmRequest) -> None:
        """A paused request comes again."""
        digest = request.adapter_digest
        if digest is not None and request.state is RequestState.DONE and self._admission is not None:
            self._admission.let_go(request.request_id, digest)

    def gauges(self) -> dict[str, float]:
        admission = self._admission
        if admission is None:
            return {}
        return {
            "adapters_in_memory": admission.num_ready,
            "adapters_waiting": admission.num_waiting,
            "adapter_loads_total": admission.num_loads,
            "adapter_loads_failed_total": admission.num_failed,
        }

    def close(self) -> None:
        if self._admission is not None:
            self._admission.close()
        self._table.close()
        self._reports.close()

    @property
    def _leader(self) -> AdapterAdmission:
        assert self._admission is not None, "only rank 0 takes requests, once it has started"
        return self._admission

    def _report(self, report: OrderReport) -> None:
        try:
            self._reports.send(report.to_wire())
        except WorkerLost:
            return  # rank 0 is gone, and this rank's step loop will notice

    def _take_report(self, message: object) -> None:
        self._leader.take_report(OrderReport.from_wire(message))


def _off() -> RequestRejected:
    return RequestRejected("adapters are switched off here (enable_lora)", param=ADAPTER_PARAM)
