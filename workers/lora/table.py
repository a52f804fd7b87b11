"""`AdapterTable`: the adapters that one rank has in memory, by rank 0's orders, read on a thread of its own."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from tensorweave.cluster.adapter import Adapter
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.lora.orders import AdapterOrder
from tensorweave.workers.step.adapter import RankAdapter

logger = logging.getLogger(__name__)

_MAX_PROBLEM: Final = 1000
_EXIT_TIMEOUT_S: Final = 5.0


class Reader(Protocol):
    def read(self, adapter: Adapter) -> RankAdapter:
        """Raises ValueError."""


class AdapterTable:
    """The step loop calls `follow` and `get`; all else happens on the thread, which starts with the first order."""

    def __init__(self, rank: int, reader: Reader, report: Callable[[OrderReport], None]) -> None:
        self._rank = rank
        self._reader = reader
        self._report = report
        self._orders: queue.SimpleQueue[AdapterOrder | None] = queue.SimpleQueue()
        self._adapters: dict[bytes, RankAdapter] = {}
        self._thread: threading.Thread | None = None

    def __len__(self) -> int:
        return len(self._adapters)

    def follow(self, orders: Sequence[AdapterOrder]) -> None:
        if orders and self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"adapter-reader-{self._rank}", daemon=True)
            self._thread.start()
        for order in orders:
            self._orders.put(order)

    def get(self, digest: bytes) -> RankAdapter | None:
        return self._adapters.get(digest)

    def close(self) -> None:
        if self._thread is not None:
            self._orders.put(None)
            self._thread.join(_EXIT_TIMEOUT_S)

    def _run(self) -> None:
        while (order := self._orders.get()) is not None:
            if order.adapter is None:
                self._adapters.pop(order.digest, None)
            else:
                problem = self._load(order.adapter)
                self._report(OrderReport(order.adapter.digest, order.number, self._rank, problem))

    def _load(self, adapter: Adapter) -> str:
        """Return what went wrong."""
        try:
            self._adapters[adapter.digest] = self._reader.read(adapter)
        except ValueError as error:
            return str(error)[:_MAX_PROBLEM] or "it is wrong"
        except Exception as error:  # the request's boundary: whatever reading a stranger's file raises
            logger.exception("rank %d: adapter %r was not loaded", self._rank, adapter.name)
            return f"{type(error).__name__}: {error}"[:_MAX_PROBLEM]
        return ""
