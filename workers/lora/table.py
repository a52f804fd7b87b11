"""`AdapterTable`: the adapters that one rank has in memory, by rank 0's orders, read on a thread of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Protocol

from tensorweave.cluster.adapter import Adapter
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.gang.order_thread import OrderThread, problem_of
from tensorweave.workers.lora.orders import AdapterOrder
from tensorweave.workers.step.adapter import RankAdapter


class Reader(Protocol):
    def read(self, adapter: Adapter) -> RankAdapter:
        """Raises ValueError."""


class AdapterTable:
    """The step loop calls `follow` and `get`; all else happens on the thread, which starts with the first order."""

    def __init__(self, rank: int, reader: Reader, report: Callable[[OrderReport], None]) -> None:
        self._rank = rank
        self._reader = reader
        self._report = report
        self._adapters: dict[bytes, RankAdapter] = {}
        self._thread = OrderThread(f"adapter-reader-{rank}", self._carry_out)

    def __len__(self) -> int:
        return len(self._adapters)

    def follow(self, orders: Sequence[AdapterOrder]) -> None:
        self._thread.put(orders)

    def get(self, digest: bytes) -> RankAdapter | None:
        return self._adapters.get(digest)

    def close(self) -> None:
        self._thread.close()

    def _carry_out(self, order: AdapterOrder) -> None:
        if order.adapter is None:
            self._adapters.pop(order.digest, None)
        else:
            what = f"rank {self._rank}: reading adapter {order.adapter.name!r}"
            problem = problem_of(partial(self._load, order.adapter), what)
            self._report(OrderReport(order.adapter.digest, order.number, self._rank, problem))

    def _load(self, adapter: Adapter) -> None:
        self._adapters[adapter.digest] = self._reader.read(adapter)
