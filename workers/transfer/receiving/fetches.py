"""`Fetches`: the receiving side of one rank: which heads it reads from which rank, what was verified, when to give up.

A fetch ends on this rank when every read has ended, one has failed, or its deadline has passed; the rank then reports
the verified prefix to rank 0, once. Before that, blocks that were missing or wrong are read once more.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from tensorweave.cluster.protocol import KvEndpoint, Ticket
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.transfer.carrier import Carrier, ReadDone, ReadFailed
from tensorweave.workers.transfer.fingerprint import fingerprint_difference
from tensorweave.workers.transfer.read_request import ReadRequest, prompt_digest
from tensorweave.workers.transfer.receiving.arrivals import FetchResult
from tensorweave.workers.transfer.receiving.block_receiver import BlockReceiver, TargetBlocks
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

HeadShare = tuple[KvEndpoint, range]
"""KV heads that this rank reads from one sending rank."""


@dataclass(slots=True)
class _Read:
    """A read request of a fetch. A read that repeats another for its missing blocks has the same receiver."""

    endpoint: KvEndpoint
    request: ReadRequest
    receiver: BlockReceiver
    is_over: bool = False


@dataclass(slots=True)
class _Fetch:
    request_id: str
    ticket: Ticket
    start: int
    context_len: int
    target: TargetBlocks
    began_s: float
    reads: dict[str, _Read] = field(default_factory=dict)
    first_token: int | None = None
    extras: TokenExtras | None = None
    is_reported: bool = False


class Fetches:
    def __init__(
        self,
        carrier: Carrier,
        window: PoolWindow,
        kv_cache: KVCache,
        fingerprint: dict[str, str],
        rank: int,
        timeout_s: float,
        stats: TransferStats,
        report: Callable[[FetchResult], None],
        clock: Callable[[], float],
    ) -> None:
        self._carrier = carrier
        self._window = window
        self._kv_cache = kv_cache
        self._fingerprint = fingerprint
        self._rank = rank
        self._timeout_s = timeout_s
        self._stats = stats
        self._report_to_leader = report
        self._clock = clock
        self._lock = threading.RLock()
        self._fetches: dict[str, _Fetch] = {}
        self._fetch_by_read: dict[str, _Fetch] = {}
        self._num_reads = 0
        self._used_tickets: set[str] = set()
        """Requests whose ticket was used or released."""

    @property
    def num_open(self) -> int:
        return len(self._fetches)

    # ---- called by the step loop

    def begin(self, row: StepRow) -> None:
        """Fetch the row's KV into the blocks that the request now holds."""
        request, ticket = row.request, row.request.fetch
        assert ticket is not None
        first_block, end_block = row.start // self._window.tokens_per_block, self._num_blocks(request.context_len)
        target = TargetBlocks(self._window, first_block, self._kv_cache.block_ids(request)[first_block:end_block])
        fetch = _Fetch(request.request_id, ticket, row.start, request.context_len, target, self._clock())
        with self._lock:
            self._used_tickets.add(request.request_id)
            self._fetches[request.request_id] = fetch
            self._stats.add("fetches", 1)
            shares = self._share_heads(ticket)
            if isinstance(shares, str):
                self._fail(fetch, ReadFailed("", "refused", shares))
                self._release_ticket(request, ticket)
                return
            for endpoint, heads in shares:
                self._open(fetch, self._make_read(fetch, request, endpoint, heads, range(first_block, end_block)))

    def drop(self, request: LlmRequest) -> bool:
        """Close the request's fetch: nothing writes into its blocks any more. Return whether there was one."""
        with self._lock:
            fetch = self._fetches.pop(request.request_id, None)
            if fetch is None:
                return False
            for read_id in fetch.reads:
                self._fetch_by_read.pop(read_id, None)
        fetch.target.close()
        self._carrier.close(fetch.ticket.ticket_id)
        return True

    def release_unused_ticket(self, request: LlmRequest) -> None:
        """If the request has a ticket that it did not need, let the sending gang free the blocks."""
        ticket = request.fetch
        if ticket is not None and request.request_id not in self._used_tickets:
            self._used_tickets.add(request.request_id)
            self._release_ticket(request, ticket)

    def forget(self, request: LlmRequest) -> None:
        """The request has ended."""
        self.release_unused_ticket(request)
        self._used_tickets.discard(request.request_id)

    # ---- called by the transfer thread

    def handle(self, event: ReadDone | ReadFailed) -> None:
        with self._lock:
            fetch = self._fetch_by_read.get(event.read_id)
            if fetch is None or fetch.is_reported:
                return
            if isinstance(event, ReadFailed):
                self._fail(fetch, event)
            else:
                self._end_read(fetch, fetch.reads[event.read_id], event)

    def expire(self, now_s: float) -> None:
        """Fail the fetches whose deadline has passed."""
        with self._lock:
            for fetch in self._fetches.values():
                if now_s >= fetch.began_s + self._timeout_s and not fetch.is_reported:
                    reason = f"not all blocks arrived within {self._timeout_s:g} s"
                    self._fail(fetch, ReadFailed("", "timeout", reason))

    # ---- called with the lock held

    def _share_heads(self, ticket: Ticket) -> list[HeadShare] | str:
        reason = fingerprint_difference(ticket.source.fingerprint, self._fingerprint)
        return reason or share_heads(ticket.source.endpoints, self._window.heads, self._rank)

    def _make_read(
        self, fetch: _Fetch, request: LlmRequest, endpoint: KvEndpoint, heads: range, blocks: range
    ) -> _Read:
        is_lead = endpoint is fetch.ticket.source.endpoints[0]
        read_request = self._make_request(request, fetch.ticket, heads, blocks.start, is_lead=is_lead)
        local_heads = range(heads.start - self._window.heads.start, heads.stop - self._window.heads.start)
        P = self._window.tokens_per_block
        wanted = {index: min(P, fetch.context_len - index * P) for index in blocks} if heads else {}
        return _Read(endpoint, read_request, BlockReceiver(fetch.target, local_heads, wanted, self._stats))

    def _make_request(
        self, request: LlmRequest, ticket: Ticket, heads: range, first_block: int, *, is_lead: bool
    ) -> ReadRequest:
        self._num_reads += 1
        return ReadRequest(
            read_id=f"{ticket.ticket_id}/{self._rank}/{self._num_reads}",
            ticket_id=ticket.ticket_id,
            fingerprint=self._fingerprint,
            prompt_digest=prompt_digest(request),
            first_head=heads.start,
            num_heads=len(heads),
            first_block=first_block,
            ends_lease=is_lead and self._rank == 0,
        )

    def _open(self, fetch: _Fetch, read: _Read) -> None:
        fetch.reads[read.request.read_id] = read
        self._fetch_by_read[read.request.read_id] = fetch
        self._carrier.fetch(read.endpoint, fetch.ticket.source.secret, read.request, read.receiver)

    def _end_read(self, fetch: _Fetch, read: _Read, event: ReadDone) -> None:
        read.is_over = True
        if read.request.ends_lease:
            fetch.first_token, fetch.extras = event.first_token, event.extras
        missing = read.receiver.take_missing()
        if missing and not read.request.only:
            self._num_reads += 1
            self._stats.add("refetched_blocks", len(missing))
            read_id = f"{read.request.read_id}/{self._num_reads}"
            again = replace(read.request, read_id=read_id, only=tuple(missing), ends_lease=False)
            self._open(fetch, _Read(read.endpoint, again, read.receiver))
        elif all(other.is_over for other in fetch.reads.values()):
            self._report(fetch)

    def _fail(self, fetch: _Fetch, failure: ReadFailed) -> None:
        self._stats.add_failures(failure.kind)
        logger.warning("request %s: KV transfer: %s: %s", fetch.request_id, failure.kind, failure.reason)
        self._report(fetch)

    def _report(self, fetch: _Fetch) -> None:
        fetch.is_reported = True
        self._stats.add("seconds", self._clock() - fetch.began_s)
        num_blocks = [read.receiver.num_leading_verified() for read in fetch.reads.values() if read.receiver.heads]
        num_tokens = fetch.start + min(num_blocks, default=0) * self._window.tokens_per_block
        is_whole = num_tokens >= fetch.context_len
        num_tokens = min(num_tokens, fetch.context_len)
        first = (fetch.first_token, fetch.extras)
        self._report_to_leader(FetchResult(fetch.request_id, self._rank, num_tokens, is_whole, *first))

    def _release_ticket(self, request: LlmRequest, ticket: Ticket) -> None:
        """A read of nothing, closed at once, ends the lease."""
        if self._rank > 0 or not ticket.source.endpoints:
            return
        with self._lock:
            read_request = self._make_request(request, ticket, range(0), 0, is_lead=True)
        nothing = BlockReceiver(TargetBlocks(self._window, 0, ()), range(0), {}, self._stats)
        self._carrier.fetch(ticket.source.endpoints[0], ticket.source.secret, read_request, nothing)
        self._carrier.close(ticket.ticket_id)

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._window.tokens_per_block)


def share_heads(endpoints: Sequence[KvEndpoint], heads: range, rank: int) -> list[HeadShare] | str:
    """Which of our heads to read from which sending rank; a message if no rank holds one of them.

    If several ranks hold a head, receivers spread over them. Rank 0 always reads from the sending rank 0, if only for
    the first token.
    """
    shares: list[HeadShare] = []
    for head in heads:
        holders = [e for e in endpoints if e.first_head <= head < e.first_head + e.num_heads]
        if not holders:
            return f"heads: no sending rank holds KV head {head}"
        last = shares[-1] if shares else None
        if last is not None and last[0] in holders:
            shares[-1] = (last[0], range(last[1].start, head + 1))
        else:
            shares.append((holders[rank % len(holders)], range(head, head + 1)))
    if rank == 0 and all(endpoint is not endpoints[0] for endpoint, _ in shares):
        shares.insert(0, (endpoints[0], range(0)))
    return shares
