"""`Offers`: the sending side of one rank: the offers that the step loop fills, and the leases on them.

A lease keeps the blocks of a finished prompt until the holder of the ticket has finished, the ticket is given up, or
its time has passed. Rank 0 decides; the end of the lease reaches every rank through the step loop's inbox, and only
then are the blocks freed.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.cluster.errors import WorkerLost
from tensorweave.workers.step.kv_exchange import TransferInbox
from tensorweave.workers.step.layer_marks import LayersDone
from tensorweave.workers.step.plan import StepRow
from tensorweave.workers.step.request import LlmRequest
from tensorweave.workers.step.resources import KVCache
from tensorweave.workers.transfer.carrier import Carrier
from tensorweave.workers.transfer.read_request import prompt_digest
from tensorweave.workers.transfer.sending.layer_follower import FollowedChunk, LayerFollower
from tensorweave.workers.transfer.sending.offered_blocks import BlockGenerations, OfferedBlocks
from tensorweave.workers.transfer.window import PoolWindow

_LEASED_REASONS: Final = ("stop", "length", "not_finished")
_MAX_REMEMBERED_TICKETS: Final = 65_536


@dataclass(slots=True)
class _Lease:
    request: LlmRequest
    ticket_id: str
    offered: OfferedBlocks
    deadline_s: float
    is_ending: bool = False


class Offers:
    def __init__(
        self, carrier: Carrier, window: PoolWindow, kv_cache: KVCache, lease_s: float, clock: Callable[[], float]
    ) -> None:
        self._carrier = carrier
        self._window = window
        self._kv_cache = kv_cache
        self._lease_s = lease_s
        self._clock = clock
        self._generations = BlockGenerations()
        self._follower = LayerFollower(window, carrier.offer)
        self._offers: dict[str, OfferedBlocks] = {}
        self._lock = threading.Condition()
        self._leases: dict[str, _Lease] = {}
        self._released_early: collections.OrderedDict[str, None] = collections.OrderedDict()
        self._inbox: TransferInbox | None = None

    def start(self, inbox: TransferInbox) -> None:
        self._inbox = inbox

    # ---- called by the step loop

    def offer(self, rows: Sequence[StepRow]) -> None:
        for row in rows:
            if row.request.offer is not None:
                self._offer_chunk(row.request.offer, row)

    def follow(self, rows: Sequence[StepRow], done: Sequence[LayersDone]) -> None:
        """Begin to offer what a launched step is going to compute of these chunks, layer by layer."""
        if self._follower.failure is not None:
            raise WorkerLost(f"the thread that offers layers has failed: {self._follower.failure}")
        chunks = []
        for row in rows:
            ticket_id = row.request.offer
            if done and ticket_id is not None:
                offered, block_ids, num_tokens = self._new_blocks(row, row.stop)
                first = len(offered)
                if block_ids:
                    epoch = offered.begin(block_ids, num_tokens)
                    chunks.append(FollowedChunk(ticket_id, offered, epoch, first, block_ids, num_tokens))
        if chunks:
            self._follower.follow(chunks, done)

    def shutdown(self) -> None:
        self._follower.close()

    def _new_blocks(self, row: StepRow, num_computed: int) -> tuple[OfferedBlocks, Sequence[int], list[int]]:
        """The request's offer, and the blocks, with their numbers of tokens, that this chunk fills and that are not on
        it; with the last chunk, also the one that it begins."""
        request, P = row.request, self._window.tokens_per_block
        offered = self._offers.get(request.request_id)
        if offered is None:
            offered = OfferedBlocks(self._window, self._generations, prompt_digest(request))
            self._offers[request.request_id] = offered
        num_blocks = -(-num_computed // P) if row.num_samples else num_computed // P
        block_ids = self._kv_cache.block_ids(request)[len(offered) : num_blocks]
        return offered, block_ids, [min(P, num_computed - index * P) for index in range(len(offered), num_blocks)]

    def _offer_chunk(self, ticket_id: str, row: StepRow) -> None:
        request = row.request
        offered, block_ids, num_tokens = self._new_blocks(row, request.num_computed)
        if block_ids:
            offered.add(block_ids, num_tokens)
        if row.num_samples and request.finish_reason in _LEASED_REASONS:
            offered.complete(request.tokens[request.context_len], request.extras)
        self._carrier.offer(ticket_id, offered)

    def keeps(self, request: LlmRequest) -> bool:
        """Begin the lease of a request that has ended. A second request of the same id gets no lease while the first
        one's is open, because leases are named by request ids."""
        if request.offer is None:
            return False
        offered = self._offers.pop(request.request_id, None)
        is_leased = request.request_id in self._leases
        if offered is None or is_leased or not offered.has_token or request.finish_reason not in _LEASED_REASONS:
            if offered is not None:
                offered.withdraw()
            self._carrier.close(request.offer)
            return False
        with self._lock:
            lease = _Lease(request, request.offer, offered, self._clock() + self._lease_s)
            self._leases[request.request_id] = lease
            if request.offer in self._released_early:
                self._end(lease)
        return True

    def drop(self, request: LlmRequest) -> None:
        """Withdraw its blocks, which are about to be freed. They are computed again and offered under the same
        ticket."""
        offered = self._offers.get(request.request_id)
        if offered is not None:
            offered.withdraw()

    def release(self, request_id: str) -> LlmRequest | None:
        with self._lock:
            lease = self._leases.pop(request_id, None)
            self._lock.notify_all()
        if lease is None:
            return None
        lease.offered.withdraw()
        self._carrier.close(lease.ticket_id)
        return lease.request

    # ---- called on other threads

    def give_up(self, request_id: str) -> bool:
        with self._lock:
            lease = self._leases.get(request_id)
            if lease is not None:
                self._end(lease)
            return lease is not None

    def end_lease(self, ticket_id: str) -> None:
        """The holder of the ticket has finished. If the prompt is still being computed, its lease ends as it begins."""
        with self._lock:
            lease = next((lease for lease in self._leases.values() if lease.ticket_id == ticket_id), None)
            if lease is not None:
                self._end(lease)
                return
            self._released_early[ticket_id] = None
            if len(self._released_early) > _MAX_REMEMBERED_TICKETS:
                self._released_early.popitem(last=False)

    def wait_released(self, timeout_s: float) -> bool:
        """Wait until no lease is open. Return whether that happened within `timeout_s`."""
        with self._lock:
            return self._lock.wait_for(lambda: not self._leases, timeout_s)

    def expire(self, now_s: float) -> None:
        """End the leases whose deadline has passed."""
        with self._lock:
            for lease in self._leases.values():
                if now_s >= lease.deadline_s:
                    self._end(lease)

    @property
    def num_leases(self) -> int:
        return len(self._leases)

    @property
    def num_held_blocks(self) -> int:
        """Pool blocks that are on offer."""
        return self._generations.num_held

    def _end(self, lease: _Lease) -> None:
        assert self._inbox is not None
        if not lease.is_ending:
            lease.is_ending = True
            self._inbox.put_released(lease.request.request_id)
