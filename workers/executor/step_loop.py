"""`StepLoop`: the steps that every rank of a gang takes: agree, admit, schedule, launch, settle, answer.

One loop serves every feature; each line of a step is a verb that something else owns. Up to `depth` steps are launched
and not settled when the next one is planned: 0 settles each step at once, 1 launches step N + 1 before step N settles,
and with pipeline stages as many are open as keep all stages busy.
All decisions follow from what the ranks agreed on and from the tokens, never from timing.

    step N      schedule ─▶ launch ─────▶ computed on the device ─────▶ settle ─▶ answer
    step N + 1                            schedule ─▶ launch ────────────▶ …
"""

from __future__ import annotations

import collections
from collections.abc import Sequence
from typing import Final

from tensorweave.cluster.errors import LogitsNotFinite, TensorweaveError, WorkerLost
from tensorweave.cluster.protocol import FinishReason, GenerateRequest, TokenChunk
from tensorweave.workers.engine.engine import ModelEngine
from tensorweave.workers.executor.bookkeeping import book_launch, book_result, checksum
from tensorweave.workers.executor.flight import Flight
from tensorweave.workers.executor.inbox import FollowerInbox, Inbox, StepInput
from tensorweave.workers.executor.iteration_stats import IterationStats, StepTimer
from tensorweave.workers.executor.logits_watch import LogitsWatch
from tensorweave.workers.executor.outbox import FollowerOutbox, Outbox
from tensorweave.workers.executor.request_table import RequestTable
from tensorweave.workers.executor.scheduler import RequestScheduler
from tensorweave.workers.gang.comm import Comm
from tensorweave.workers.guided.guides import Guides
from tensorweave.workers.lora.adapters import Adapters
from tensorweave.workers.sampling.decoder import Decoder
from tensorweave.workers.step.kv_exchange import KvArrived, Transfers
from tensorweave.workers.step.pending import NothingPending, PendingTokens
from tensorweave.workers.step.plan import ScheduledBatch, StepRow
from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import ResourceManager
from tensorweave.workers.step.speculation import Speculation

IDLE_AGREEMENT_S: Final = 0.5
"""How often an idle rank 0 agrees on nothing new, so that the other ranks know that it is alive."""


class StepLoop:
    """Used by one thread; `requests` may be read by others."""

    def __init__(
        self,
        *,
        engine: ModelEngine,
        scheduler: RequestScheduler,
        resources: ResourceManager,
        decoder: Decoder,
        comm: Comm,
        transfers: Transfers,
        guides: Guides,
        adapters: Adapters,
        speculation: Speculation,
        inbox: Inbox | FollowerInbox,
        outbox: Outbox | FollowerOutbox,
        watch: LogitsWatch,
        stats: IterationStats,
        depth: int,
    ) -> None:
        self.requests = RequestTable()
        self._engine = engine
        self._scheduler = scheduler
        self._resources = resources
        self._decoder = decoder
        self._comm = comm
        self._transfers = transfers
        self._guides = guides
        self._adapters = adapters
        self._speculation = speculation
        self._inbox = inbox
        self._outbox = outbox
        self._watch = watch
        self._stats = stats
        self._depth = depth
        self._flights: collections.deque[Flight] = collections.deque()
        self._nothing_pending = NothingPending()
        self._sampled: list[LlmRequest] = []
        self._readers: frozenset[LlmRequest] = frozenset()
        self._ended: list[LlmRequest] = []
        self._answers: list[TokenChunk] = []
        self._token_check = 0
        self._is_stuck = False

    def step(self) -> bool:
        """One iteration; False when the ranks have agreed to end."""
        timer = StepTimer()
        agreed = self._agree(timer)
        self._admit(agreed)
        if agreed.is_shutdown:
            self._settle(0, timer)
            return False
        batch = self._schedule(timer)
        self._pause(batch.paused)
        self._resources.prepare_resources(batch)
        self._fetch(batch.fetching)
        self._launch(batch, timer)
        self.answer()
        self._settle(max(0, len(self._flights) - 1) if batch.is_empty else self._depth, timer)
        self._is_stuck = batch.is_empty and not timer.num_settled and bool(self.requests.active)
        if not self._flights:
            self.answer()
        return True

    def end(self, refusal: TensorweaveError) -> None:
        """After the last step: end all requests as cancelled, those that never entered too, and refuse what comes."""
        for request in self.requests:
            self._end_early(request.request_id, "cancelled")
        self._free_ended()
        late = self._inbox.close(refusal)
        self._answers += [TokenChunk(request_id, finish_reason="cancelled") for request_id in late]
        self.answer()

    def answer(self) -> None:
        """Hand over what is to be told. Other threads work on it, and share the interpreter with this one: so while
        steps overlap, it waits for the next launch, after which this thread waits for a device. Launching prompts takes
        as long as many decodes, so what is to be told goes first."""
        if self._answers:
            self._outbox.put(self._watch.without_probes(self._answers))
            self._answers = []

    # ---- what is new

    def _agree(self, timer: StepTimer) -> StepInput:
        is_idle = not self._flights and (self._is_stuck or not self.requests.active)
        mine = self._inbox.gather(self._token_check, IDLE_AGREEMENT_S if is_idle else 0.0)
        if is_idle:
            timer.begin()
        if mine is not None and self._comm.size == 1:
            return mine
        agreed = StepInput.unpack(self._comm.agree(None if mine is None else mine.pack()))
        if agreed.token_check != self._token_check:
            raise WorkerLost(f"rank {self._comm.rank} has sampled other tokens than rank 0: the gang has diverged")
        return agreed

    def _admit(self, agreed: StepInput) -> None:
        self._resources.kv_cache.now_s = agreed.now_s
        for probe in self._watch.start_probes(self.requests.num_arrived, agreed.now_s):
            self.requests.add(probe)
        for arrival in agreed.arrivals:
            self.requests.add(self._new_request(arrival, agreed.now_s))
        if agreed.arrivals:
            self.requests.sort()
        if agreed.guide_orders:
            self._guides.follow(agreed.guide_orders)
        if agreed.adapter_orders:
            self._adapters.follow(agreed.adapter_orders)
        for request_id in agreed.cancelled:
            self._end_early(request_id, "cancelled")
        for request_id in agreed.expired:
            self._end_early(request_id, "timeout")
        for arrived in agreed.arrived:
            self._resume(arrived)
        for request_id in agreed.released:
            if (request := self._transfers.release(request_id)) is not None:
                self._resources.free_resources(request)
        if agreed.cancelled or agreed.expired or agreed.arrived:
            self._free_ended()
            self.answer()

    def _new_request(self, arrival: GenerateRequest, now_s: float) -> LlmRequest:
        order, can_fetch, guide = self.requests.num_arrived + 1, self._transfers.can_fetch, arrival.sampling.guide
        grammar = None if guide is None else self._guides.grammar_of(guide)
        adapter = None if arrival.adapter is None else self._adapters.adapter_of(arrival.adapter)
        return LlmRequest.of(arrival, order, now_s, can_fetch=can_fetch, grammar=grammar, adapter=adapter)

    def _resume(self, arrived: KvArrived) -> None:
        """A request's KV has come from another gang: go on as if it had been computed here, as far as it is right."""
        request = self.requests.get(arrived.request_id)
        if request is None or request.state is not RequestState.FETCHING:
            return
        self._transfers.drop(request)
        chunk = request.resume(arrived.num_tokens, arrived.first_token, arrived.extras)
        self._resources.store_computed(request)
        if chunk is not None:
            self._answers.append(chunk)
        if request.finish_reason is not None:
            self._end(request)

    # ---- launch

    def _schedule(self, timer: StepTimer) -> ScheduledBatch:
        batch = self._scheduler.schedule_request(self.requests.active)
        if self._flights and batch.paused:  # launched steps still use the blocks and tokens of those
            self._settle(0, timer)
            batch = self._scheduler.schedule_request(self.requests.active)
        return self._speculation.add_drafts(batch)

    def _reads_pending(self, batch: ScheduledBatch) -> bool:
        """Whether the step samples with rules or processors of a user that read a token which is pending."""
        sampled = [row[0] for row in batch.sampled]
        if sampled != self._sampled:  # else the same requests decode as in the step before
            self._sampled = sampled
            self._readers = frozenset(request for request in sampled if self._decoder.reads_tokens(request))
        if not self._readers:
            return False
        return any(row.request in self._readers and row.start >= len(row.request.tokens) for row in batch.sampled)

    def _pause(self, paused: Sequence[LlmRequest]) -> None:
        for request in paused:
            self._transfers.drop(request)
            self._resources.free_resources(request)
            request.pause()

    def _fetch(self, rows: Sequence[StepRow]) -> None:
        for request, start, _, _ in rows:
            request.state = RequestState.FETCHING
            request.num_computed = request.num_launched = start
        self._transfers.fetch(rows)

    def _launch(self, batch: ScheduledBatch, timer: StepTimer) -> None:
        if batch.is_empty:
            return
        if batch.context:
            self.answer()
        before: PendingTokens = self._flights[-1] if self._flights else self._nothing_pending
        timer.begin_forward()
        logits = self._engine.launch(batch, self._resources, before)
        timer.end_forward()
        if batch.context:
            self._transfers.follow(batch.context)
        reads_pending = bool(self._flights) and self._reads_pending(batch)
        flight = Flight(batch, launched_s=self._resources.kv_cache.now_s)
        self._flights.append(flight)
        if book_launch(batch):
            self.requests.prune()
        if reads_pending:
            self._settle_before(flight, timer)
        flight.pending = self._decoder.launch(logits, batch)

    # ---- settle

    def _settle(self, num_left: int, timer: StepTimer) -> None:
        """Settle launched steps, oldest first, until `num_left` are open. What a request has computed whose logits were
        not finite is wiped before anything else is planned, so then none is left open."""
        while len(self._flights) > num_left or (self._flights and self._is_wiping()):
            self._settle_flight(self._flights.popleft(), timer)
            timer.num_settled += 1

    def _settle_before(self, flight: Flight, timer: StepTimer) -> None:
        """Settle the steps before this one, while it is computed: to choose its tokens, theirs must be known."""
        while self._flights[0] is not flight:
            self._settle_flight(self._flights.popleft(), timer)
            timer.num_settled += 1

    def _settle_flight(self, flight: Flight, timer: StepTimer) -> None:
        timer.begin_forward()
        result = flight.result()
        timer.end_wait()
        drafts = self._speculation.settle(flight.batch, result)
        settled = book_result(flight.batch, result)
        self._answers += settled.chunks
        self._resources.update_resources(flight.batch)
        for request in settled.truncated:
            self._resources.truncate(request, request.num_computed)
        self._transfers.offer(settled.context)
        self._watch.note(settled.num_sampled, settled.ended)
        if self._comm.size > 1:
            self._token_check = checksum(result, self._token_check)
        for request in settled.ended:
            self._end(request)
        if self._ended or settled.ended:
            self._free_ended()
        num_active, num_inside, num_ended = len(self.requests.active), self._inbox.num_inside, len(settled.ended)
        self._stats.add(timer, flight, self._resources.kv_cache, drafts, num_active, num_inside, num_ended)

    def _is_wiping(self) -> bool:
        return any(isinstance(request.failure, LogitsNotFinite) for request in self._ended)

    # ---- ends

    def _end_early(self, request_id: str, reason: FinishReason) -> None:
        """Answer at once; what launched steps still compute for the request is dropped."""
        request = self.requests.get(request_id)
        if request is None:
            return
        request.finish_reason = reason
        self._end(request)
        self._answers.append(request.tell())

    def _end(self, request: LlmRequest) -> None:
        request.state = RequestState.DONE
        self.requests.forget(request)
        self._inbox.forget(request.request_id)
        if not self._transfers.keeps(request):
            self._ended.append(request)

    def _free_ended(self) -> None:
        """Give back the blocks of requests that have ended and that no launched step holds."""
        self.requests.prune()
        held = [request for request in self._ended if any(flight.holds(request) for flight in self._flights)]
        for request in self._ended:
            if request in held:
                continue
            if isinstance(request.failure, LogitsNotFinite):
                self._engine.wipe_blocks(self._resources.discard_resources(request))
            else:
                self._resources.free_resources(request)
        self._ended = held
