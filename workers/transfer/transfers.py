"""`KvTransfers`: one rank's `Transfers`: its offers, its fetches, and the thread that handles events and deadlines.

That thread enforces the deadlines, so that they hold also while the step loop is idle or in a long step.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from tensorweave.cluster.errors import TransferFailed, WorkerLost
from tensorweave.cluster.protocol import KvEndpoint, KvSource, LinkMeasurement
from tensorweave.workers.gang.report_channel import ReportChannel
from tensorweave.workers.step.kv_exchange import TransferInbox
from tensorweave.workers.step.layer_marks import LayerMarks, NoLayerMarks
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.transfer.carrier import Carrier, Event, TicketReleased
from tensorweave.workers.transfer.expected_rate import DIRECT, count_nvlinks, shortfall
from tensorweave.workers.transfer.fingerprint import fingerprint_difference
from tensorweave.workers.transfer.receiving.arrivals import Arrivals, FetchResult
from tensorweave.workers.transfer.receiving.fetches import Fetches
from tensorweave.workers.transfer.sending.offers import Offers
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

TICK_S: Final = 0.1
_JOIN_TIMEOUT_S: Final = 10.0
_NUM_PROBES: Final = 3
_PROBE_BYTES: Final = 16 << 20
_LARGE_PROBE_BYTES: Final = 256 << 20
_SHORT_PROBE_S: Final = 0.002


class KvTransfers:
    """Satisfies `Transfers`.

    Args:
        timeout_s: longest duration of a fetch.
        lease_s: longest time for which blocks are kept for the holder of a ticket.
        marks: of the engine's layers, if it tells of them: what it computes is then offered layer by layer.
    """

    can_fetch = True

    def __init__(
        self,
        carrier: Carrier,
        window: PoolWindow,
        kv_cache: KVCache,
        reports: ReportChannel,
        fingerprint: dict[str, str],
        rank: int = 0,
        size: int = 1,
        timeout_s: float = 60.0,
        lease_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        marks: LayerMarks | None = None,
    ) -> None:
        host, port = carrier.address
        self.endpoint: KvEndpoint | None = KvEndpoint(host, port, window.heads.start, len(window.heads))
        self.fingerprint = fingerprint
        self.stats = TransferStats()
        self._carrier = carrier
        self._reports = reports
        self._window = window
        self._rank = rank
        self._timeout_s = timeout_s
        self._clock = clock
        self._marks = marks or NoLayerMarks()
        self._offers = Offers(carrier, window, kv_cache, lease_s, clock)
        self._arrivals = Arrivals(size, self.stats, clock)
        self._fetches = Fetches(
            carrier, window, kv_cache, fingerprint, rank, timeout_s, self.stats, self._send_result, clock
        )
        self._is_closing = threading.Event()
        self._failure: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"kv-transfers-{rank}", daemon=True)

    def start(self, inbox: TransferInbox) -> None:
        self._offers.start(inbox)
        self._arrivals.start(inbox)
        self._reports.start(self._receive_result)
        self._thread.start()

    # ---- called by the step loop

    def fetch(self, rows: Sequence[StepRow]) -> None:
        if self._failure is not None:
            raise WorkerLost(f"the transfer thread failed: {self._failure}")
        for row in rows:
            if self._rank == 0:
                request = row.request
                self._arrivals.expect(request.request_id, row.start, request.context_len, self._timeout_s)
            self._fetches.begin(row)

    def offer(self, rows: Sequence[StepRow]) -> None:
        for row in rows:
            self._fetches.release_unused_ticket(row.request)
        self._offers.offer(rows)

    def follow(self, rows: Sequence[StepRow]) -> None:
        self._offers.follow(rows, self._marks.take())

    def keeps(self, request: LlmRequest) -> bool:
        self._drop_fetch(request)
        self._fetches.forget(request)
        return self._offers.keeps(request)

    def drop(self, request: LlmRequest) -> None:
        self._drop_fetch(request)
        self._offers.drop(request)

    def release(self, request_id: str) -> LlmRequest | None:
        return self._offers.release(request_id)

    def _drop_fetch(self, request: LlmRequest) -> None:
        if self._fetches.drop(request):
            self._arrivals.forget(request.request_id)

    # ---- called on any thread

    def give_up(self, request_id: str) -> bool:
        return self._offers.give_up(request_id)

    def decline(self, ticket_id: str) -> None:
        self._carrier.close(ticket_id)

    def wait_released(self, timeout_s: float) -> bool:
        return self._offers.wait_released(timeout_s)

    def measure_link(self, source: KvSource, timeout_s: float) -> LinkMeasurement:
        reason = fingerprint_difference(source.fingerprint, self.fingerprint)
        if reason is not None:
            return LinkMeasurement(0.0, 0.0, reason)
        end_s = time.monotonic() + timeout_s
        endpoint, device = source.endpoints[0], self._window.device
        try:
            latency_s, duration_s = self._probe(source, 0, end_s), self._probe(source, _PROBE_BYTES, end_s)
            transport = self._carrier.transport_to(endpoint, source.secret)
            bytes_per_s, num_links = _PROBE_BYTES / duration_s, 0
            if transport == DIRECT:
                bytes_per_s = self._probe_direct(source, duration_s, latency_s, end_s)
                num_links = count_nvlinks(device)
        except TransferFailed as error:
            return LinkMeasurement(0.0, 0.0, error.message)
        is_here = self.endpoint is not None and endpoint.host == self.endpoint.host
        reason = shortfall(bytes_per_s, transport, is_here, device, num_links)
        return LinkMeasurement(bytes_per_s, latency_s, None, transport, reason)

    def _probe_direct(self, source: KvSource, duration_s: float, latency_s: float, end_s: float) -> float:
        """Bytes per second, where a probe took so long; of a larger one if most of that time is not the link's."""
        num_bytes = _PROBE_BYTES
        if duration_s < _SHORT_PROBE_S:
            num_bytes = _LARGE_PROBE_BYTES
            duration_s = self._probe(source, num_bytes, end_s)
        return num_bytes / max(duration_s - latency_s, 1e-9)

    def _probe(self, source: KvSource, num_bytes: int, end_s: float) -> float:
        """The least of a few."""
        return min(
            self._carrier.probe(source.endpoints[0], source.secret, num_bytes, end_s - time.monotonic())
            for _ in range(_NUM_PROBES)
        )

    def gauges(self) -> dict[str, float]:
        return {
            **self.stats.gauges(),
            "kv_transfer_open_fetches": self._fetches.num_open,
            "kv_transfer_open_leases": self._offers.num_leases,
            "kv_transfer_held_blocks": self._offers.num_held_blocks,
        }

    def shutdown(self) -> None:
        self._is_closing.set()
        self._carrier.shutdown()
        self._offers.shutdown()
        self._reports.close()
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(_JOIN_TIMEOUT_S)

    # ---- the transfer thread

    def _run(self) -> None:
        try:
            while not self._is_closing.is_set():
                for event in self._carrier.poll(TICK_S):
                    self._handle(event)
                now_s = self._clock()
                self._offers.expire(now_s)
                self._fetches.expire(now_s)
                self._arrivals.expire(now_s)
        except Exception as error:  # the thread's boundary: the step loop raises it at its next fetch
            logger.exception("the transfer thread failed")
            self._failure = error

    def _handle(self, event: Event) -> None:
        if isinstance(event, TicketReleased):
            self._offers.end_lease(event.ticket_id)
        else:
            self._fetches.handle(event)

    def _send_result(self, result: FetchResult) -> None:
        self._reports.send(result.to_wire())

    def _receive_result(self, message: Any) -> None:
        self._arrivals.add(FetchResult.from_wire(message))
