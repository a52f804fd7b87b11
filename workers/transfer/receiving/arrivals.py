"""`Arrivals`: rank 0's account of fetches: when each rank's part has come, the step loop gets one `KvArrived`.

Ranks report through the uplink, in any order, also before this rank's own step loop has begun the fetch.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Final

from tensorweave.cluster.errors import WireError
from tensorweave.workers.step.kv_exchange import KvArrived, TransferInbox
from tensorweave.workers.step.request import TokenExtras
from tensorweave.workers.transfer.transfer_stats import TransferStats

GRACE_S: Final = 1.0
"""How long the other ranks may still take once one has failed, or the fetch's time is over."""
_ORPHAN_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Report:
    """One rank's part of a fetch is over: KV of the first `num_tokens` tokens is verified there. Rank 0's has the
    `first_token` too, and what is told with it."""

    request_id: str
    rank: int
    num_tokens: int
    is_whole: bool
    first_token: int | None = None
    extras: TokenExtras | None = None

    def to_wire(self) -> list[Any]:
        extras = None if self.extras is None else self.extras.to_wire()
        return [self.request_id, self.rank, self.num_tokens, self.is_whole, self.first_token, extras]

    @classmethod
    def from_wire(cls, fields: Any) -> Report:
        match fields:
            case [str(request_id), int(rank), int(num_tokens), bool(is_whole), int() | None as first_token, extras]:
                told = None if extras is None else TokenExtras.from_wire(extras)
                return cls(request_id, rank, num_tokens, is_whole, first_token, told)
        raise WireError("malformed transfer report")


@dataclass(slots=True)
class _Account:
    deadline_s: float
    start: int | None = None
    context_len: int = 0
    is_settled: bool = False
    reports: dict[int, Report] = field(default_factory=dict)


class Arrivals:
    def __init__(self, num_ranks: int, stats: TransferStats, clock: Callable[[], float]) -> None:
        self._num_ranks = num_ranks
        self._stats = stats
        self._clock = clock
        self._lock = threading.Lock()
        self._accounts: dict[str, _Account] = {}
        self._inbox: TransferInbox | None = None

    def start(self, inbox: TransferInbox) -> None:
        self._inbox = inbox

    def expect(self, request_id: str, start: int, context_len: int, timeout_s: float) -> None:
        """The step loop has begun this fetch; tokens before `start` are here already."""
        with self._lock:
            account = self._accounts.setdefault(request_id, _Account(0.0))
            account.start, account.context_len = start, context_len
            account.deadline_s = self._clock() + timeout_s + GRACE_S
            self._settle_if_over(request_id, account)

    def report(self, report: Report) -> None:
        with self._lock:
            account = self._accounts.setdefault(report.request_id, _Account(self._clock() + _ORPHAN_S))
            account.reports[report.rank] = report
            if not report.is_whole:
                account.deadline_s = min(account.deadline_s, self._clock() + GRACE_S)
            self._settle_if_over(report.request_id, account)

    def forget(self, request_id: str) -> None:
        with self._lock:
            self._accounts.pop(request_id, None)

    def tick(self, now_s: float) -> None:
        with self._lock:
            for request_id, account in list(self._accounts.items()):
                if now_s < account.deadline_s:
                    continue
                if account.start is None:
                    del self._accounts[request_id]
                elif not account.is_settled:
                    self._settle(request_id, account)

    def _settle_if_over(self, request_id: str, account: _Account) -> None:
        if account.start is None or account.is_settled:
            return
        is_futile = any(report.num_tokens <= account.start for report in account.reports.values())
        if is_futile or len(account.reports) == self._num_ranks:
            self._settle(request_id, account)

    def _settle(self, request_id: str, account: _Account) -> None:
        """Ranks that have not said anything have nothing."""
        assert self._inbox is not None
        assert account.start is not None
        reports = account.reports.values()
        is_complete = len(reports) == self._num_ranks
        num_tokens = min(report.num_tokens for report in reports) if is_complete else account.start
        first = next((r for r in reports if r.first_token is not None), None)
        first_token, extras = (None, None) if first is None else (first.first_token, first.extras)
        account.is_settled = True
        self._stats.add("recomputed_tokens", account.context_len - num_tokens)
        self._inbox.put_arrived(KvArrived(request_id, max(num_tokens, account.start), first_token, extras))
