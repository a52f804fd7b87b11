"""`Fetches`: the taking side of one rank: which heads come from which rank, what came right, when to give up.

A fetch ends on this rank when every claim has ended, one has failed or its time is over; the rank then reports the
verified prefix, once. Blocks that came wrong or not at all are asked for once more before that.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tensorweave.cluster.protocol import KvEndpoint, Ticket
from tensorweave.workers.step.plan import ContextChunk
from tensorweave.workers.step.request import LlmRequest, TokenExtras
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.transfer.carrier import Carrier, Claim, Ended, Failed
from tensorweave.workers.transfer.receiving.arrivals import Report
from tensorweave.workers.transfer.receiving.block_receiver import Intake, TargetBlocks
from tensorweave.workers.transfer.sending.offers import prompt_digest
from tensorweave.workers.transfer.sending.ticket_table import fingerprint_difference
from tensorweave.workers.transfer.transfer_stats import TransferStats
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Part:
    """One claim's share of a fetch."""

    endpoint: KvEndpoint
    claim: Claim
    intake: Intake
    is_over: bool = False


@dataclass(slots=True)
class _Fetch:
    request_id: str
    ticket: Ticket
    start: int
    context_len: int
    arrival: TargetBlocks
    began_s: float
    deadline_s: float
    parts: dict[str, _Part] = field(default_factory=dict)
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
        report: Callable[[Report], None],
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
        self._of_claim: dict[str, _Fetch] = {}
        self._num_claims = 0
        self._used: set[str] = set()

    @property
    def num_open(self) -> int:
        return len(self._fetches)

    # ---- the step loop

    def begin(self, chunk: ContextChunk) -> None:
        """Pull the chunk's KV into the blocks that the request now holds."""
        request, ticket = chunk.request, chunk.request.fetch
        assert ticket is not None
        P = self._window.tokens_per_block
        first_block, end_block = chunk.start // P, -(-request.context_len // P)
        arrival = TargetBlocks(self._window, first_block, self._kv_cache.block_ids(request)[first_block:end_block])
        now_s = self._clock()
        fetch = _Fetch(
            request.request_id, ticket, chunk.start, request.context_len, arrival, now_s, now_s + self._timeout_s
        )
        wanted = {at: min(P, request.context_len - at * P) for at in range(first_block, end_block)}
        with self._lock:
            self._used.add(request.request_id)
            self._fetches[request.request_id] = fetch
            self._stats.add("fetches", 1)
            reason = fingerprint_difference(ticket.source.fingerprint, self._fingerprint)
            shares = share_heads(ticket.source.endpoints, self._window.heads, self._rank)
            if reason is None and isinstance(shares, str):
                reason = shares
            if reason is not None or isinstance(shares, str):
                self._fail(fetch, Failed("", "refused", reason or ""))
                self._waive(request, ticket)
                return
            for endpoint, heads in shares:
                claim = self._claim(request, ticket, heads, first_block, endpoint is ticket.source.endpoints[0])
                local = range(heads.start - self._window.heads.start, heads.stop - self._window.heads.start)
                self._open(fetch, _Part(endpoint, claim, Intake(arrival, local, wanted if heads else {}, self._stats)))

    def drop(self, request: LlmRequest) -> bool:
        """Close its fetch: nothing writes into its blocks any more. False where it has none."""
        with self._lock:
            fetch = self._fetches.pop(request.request_id, None)
            if fetch is None:
                return False
            for claim_id in fetch.parts:
                self._of_claim.pop(claim_id, None)
        fetch.arrival.close()
        self._carrier.close(fetch.ticket.ticket_id)
        return True

    def waive(self, request: LlmRequest) -> None:
        """Where it has a ticket and turns out not to need it: say so, that the giving gang need not keep the blocks."""
        ticket = request.fetch
        if ticket is not None and request.request_id not in self._used:
            self._used.add(request.request_id)
            self._waive(request, ticket)

    def forget(self, request: LlmRequest) -> None:
        """It has ended."""
        self.waive(request)
        self._used.discard(request.request_id)

    # ---- the transfer thread

    def handle(self, event: Ended | Failed) -> None:
        with self._lock:
            fetch = self._of_claim.get(event.claim_id)
            if fetch is None or fetch.is_reported:
                return
            if isinstance(event, Failed):
                self._fail(fetch, event)
            else:
                self._end(fetch, fetch.parts[event.claim_id], event)

    def tick(self, now_s: float) -> None:
        with self._lock:
            for fetch in self._fetches.values():
                if now_s >= fetch.deadline_s and not fetch.is_reported:
                    self._fail(fetch, Failed("", "timeout", f"not all has come within {self._timeout_s:g} s"))

    # ---- how

    def _waive(self, request: LlmRequest, ticket: Ticket) -> None:
        """A claim on nothing, closed at once, ends the lease."""
        if self._rank > 0 or not ticket.source.endpoints:
            return
        with self._lock:
            claim = self._claim(request, ticket, range(0), 0, is_lead=True)
        nothing = Intake(TargetBlocks(self._window, 0, ()), range(0), {}, self._stats)
        self._carrier.fetch(ticket.source.endpoints[0], ticket.source.secret, claim, nothing)
        self._carrier.close(ticket.ticket_id)

    def _claim(self, request: LlmRequest, ticket: Ticket, heads: range, first_block: int, is_lead: bool) -> Claim:
        self._num_claims += 1
        return Claim(
            claim_id=f"{ticket.ticket_id}/{self._rank}/{self._num_claims}",
            ticket_id=ticket.ticket_id,
            fingerprint=self._fingerprint,
            prompt=prompt_digest(request, request.context_len),
            first_head=heads.start,
            num_heads=len(heads),
            first_block=first_block,
            ends_lease=is_lead and self._rank == 0,
        )

    def _open(self, fetch: _Fetch, part: _Part) -> None:
        fetch.parts[part.claim.claim_id] = part
        self._of_claim[part.claim.claim_id] = fetch
        self._carrier.fetch(part.endpoint, fetch.ticket.source.secret, part.claim, part.intake)

    def _end(self, fetch: _Fetch, part: _Part, event: Ended) -> None:
        part.is_over = True
        if part.claim.ends_lease:
            fetch.first_token, fetch.extras = event.first_token, event.extras
        missing = part.intake.missing()
        if missing and not part.claim.only:
            self._num_claims += 1
            self._stats.add("refetched_blocks", len(missing))
            changes: dict[str, Any] = {"only": tuple(missing), "ends_lease": False}
            again = replace(part.claim, claim_id=f"{part.claim.claim_id}/{self._num_claims}", **changes)
            self._open(fetch, _Part(part.endpoint, again, part.intake))
        elif all(other.is_over for other in fetch.parts.values()):
            self._report(fetch)

    def _fail(self, fetch: _Fetch, failure: Failed) -> None:
        self._stats.fail(failure.kind)
        logger.warning("request %s: KV transfer: %s: %s", fetch.request_id, failure.kind, failure.reason)
        self._report(fetch)

    def _report(self, fetch: _Fetch) -> None:
        fetch.is_reported = True
        self._stats.add("seconds", self._clock() - fetch.began_s)
        filled = [part.intake.num_verified() for part in fetch.parts.values() if part.intake.heads]
        num_tokens = fetch.start + min(filled, default=0) * self._window.tokens_per_block
        is_whole = num_tokens >= fetch.context_len
        num_tokens = min(num_tokens, fetch.context_len)
        first = (fetch.first_token, fetch.extras)
        self._report_to_leader(Report(fetch.request_id, self._rank, num_tokens, is_whole, *first))


def share_heads(endpoints: Sequence[KvEndpoint], heads: range, rank: int) -> list[tuple[KvEndpoint, range]] | str:
    """Which of our heads to ask of which giving rank; or, where nobody holds one, that in words.

    Where several ranks hold a head, takers spread over them. Rank 0 always asks the giving rank 0, if only for the end.
    """
    shares: list[tuple[KvEndpoint, range]] = []
    for head in heads:
        holders = [e for e in endpoints if e.first_head <= head < e.first_head + e.num_heads]
        if not holders:
            return f"heads: no giving rank holds KV head {head}"
        last = shares[-1] if shares else None
        if last is not None and last[0] in holders:
            shares[-1] = (last[0], range(last[1].start, head + 1))
        else:
            shares.append((holders[rank % len(holders)], range(head, head + 1)))
    if rank == 0 and all(endpoint is not endpoints[0] for endpoint, _ in shares):
        shares.insert(0, (endpoints[0], range(0)))
    return shares
