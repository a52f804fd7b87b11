"""`Arrivals`: rank 0's record of open fetches. Once every rank's part has ended, the step loop gets one `KvArrived`.

Ranks send their results through the report channel, in any order, and possibly before this rank's step loop begins the
fetch.
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
"""How long the other ranks may still take once one has failed, or the fetch's deadline has passed."""
_UNEXPECTED_S: Final = 60.0
"""How long a result is kept for a fetch that this rank's step loop has not begun."""


@dataclass(frozen=True, slots=True)
class FetchResult:
    """The end of one rank's part of a fetch: KV of the first `num_tokens` tokens is verified there. `is_whole` if that
    is all of the prompt. Only rank 0's result has the `first_token` and its `extras`."""

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
    def from_wire(cls, fields: Any) -> FetchResult:
        match fields:
            case [str(request_id), int(rank), int(num_tokens), bool(is_whole), int() | None as first_token, packed]:
                extras = None if packed is None else TokenExtras.from_wire(packed)
                return cls(request_id, rank, num_tokens, is_whole, first_token, extras)
        raise WireError("malformed fetch result")


@dataclass(slots=True)
class _PendingFetch:
    """`start` is None until the step loop has begun the fetch."""

    deadline_s: float
    start: int | None = None
    context_len: int = 0
    is_settled: bool = False
    results: dict[int, FetchResult] = field(default_factory=dict)


class Arrivals:
    def __init__(self, num_ranks: int, stats: TransferStats, clock: Callable[[], float]) -> None:
        self._num_ranks = num_ranks
        self._stats = stats
        self._clock = clock
        self._lock = threading.Lock()
        self._pending: dict[str, _PendingFetch] = {}
        self._inbox: TransferInbox | None = None

    def start(self, inbox: TransferInbox) -> None:
        self._inbox = inbox

    def expect(self, request_id: str, start: int, context_len: int, timeout_s: float) -> None:
        """The step loop has begun this fetch; the KV of tokens before `start` is present already."""
        with self._lock:
            pending = self._pending.setdefault(request_id, _PendingFetch(0.0))
            pending.start, pending.context_len = start, context_len
            pending.deadline_s = self._clock() + timeout_s + GRACE_S
            self._settle_if_over(request_id, pending)

    def add(self, result: FetchResult) -> None:
        with self._lock:
            unexpected = _PendingFetch(self._clock() + _UNEXPECTED_S)
            pending = self._pending.setdefault(result.request_id, unexpected)
            pending.results[result.rank] = result
            if not result.is_whole:
                pending.deadline_s = min(pending.deadline_s, self._clock() + GRACE_S)
            self._settle_if_over(result.request_id, pending)

    def forget(self, request_id: str) -> None:
        with self._lock:
            self._pending.pop(request_id, None)

    def expire(self, now_s: float) -> None:
        """Settle the fetches whose deadline has passed."""
        with self._lock:
            for request_id, pending in list(self._pending.items()):
                if now_s < pending.deadline_s:
                    continue
                if pending.start is None:
                    del self._pending[request_id]
                elif not pending.is_settled:
                    self._settle(request_id, pending)

    def _settle_if_over(self, request_id: str, pending: _PendingFetch) -> None:
        if pending.start is None or pending.is_settled:
            return
        is_futile = any(result.num_tokens <= pending.start for result in pending.results.values())
        if is_futile or len(pending.results) == self._num_ranks:
            self._settle(request_id, pending)

    def _settle(self, request_id: str, pending: _PendingFetch) -> None:
        """A rank without a result has received nothing."""
        assert self._inbox is not None
        assert pending.start is not None
        results = pending.results.values()
        is_complete = len(results) == self._num_ranks
        num_tokens = min(result.num_tokens for result in results) if is_complete else pending.start
        first = next((result for result in results if result.first_token is not None), None)
        first_token, extras = (None, None) if first is None else (first.first_token, first.extras)
        pending.is_settled = True
        self._stats.add("recomputed_tokens", pending.context_len - num_tokens)
        self._inbox.put_arrived(KvArrived(request_id, max(num_tokens, pending.start), first_token, extras))
