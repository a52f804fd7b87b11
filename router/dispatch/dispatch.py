"""`Dispatcher`: the whole conversation of one request with the gangs, in one async function.

Bounded admission, choice of gangs, the stream of tokens, replay when a gang is lost, the deadline. The HTTP app and the
LLM API both call `generate`; closing its generator early cancels the request at every gang.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import secrets
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from typing import Final

from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError
from tensorweave.cluster.fleet import Fleet
from tensorweave.cluster.link import FoundAttempt, GangLink
from tensorweave.cluster.protocol import GenerateRequest, Ticket, TokenChunk
from tensorweave.router.dispatch.admission import Admission, Limits
from tensorweave.router.dispatch.attempt import AttemptNotes, Chunks, run_attached, run_attempt, run_offer
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Booking, Loads
from tensorweave.router.dispatch.policy import Joint, Options, Plan, RoutingPolicy
from tensorweave.router.dispatch.recovery import RECOVERABLE, Recovery
from tensorweave.router.dispatch.transcript import Transcript

logger = logging.getLogger(__name__)

_NO_DEADLINE_S: Final = 1e9
_NOT_READY_RETRY_S: Final = 5.0
_FIND_TIMEOUT_S: Final = 2.0
_RESERVED_TOKENS: Final = 128
"""KV room that a request is reckoned to need for its answer; most ask for more than they use."""


@dataclass(slots=True)
class DispatchCounts:
    """For metrics. `retries` by what was lost; `faults` (by reason) cost no replay; `plans` by kind."""

    retries: collections.Counter[str] = field(default_factory=collections.Counter)
    faults: collections.Counter[str] = field(default_factory=collections.Counter)
    plans: collections.Counter[str] = field(default_factory=collections.Counter)
    num_recovered: int = 0
    num_reattached: int = 0


@dataclass(frozen=True, slots=True)
class Handoff:
    """What the first phase leaves to the second. `ticket` is None where the first token already ended the request."""

    chunk: TokenChunk
    ticket: Ticket | None


class Dispatcher:
    """Lives on one event loop."""

    def __init__(self, fleet: Fleet, policy: RoutingPolicy | None = None, limits: Limits | None = None) -> None:
        self._fleet = fleet
        self._policy = policy or Joint()
        self.limits = limits or Limits()
        self.loads = Loads()
        self.counts = DispatchCounts()
        self._admission = Admission(self.limits)
        self._open_ids: set[str] = set()

    @property
    def num_running(self) -> int:
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    async def generate(
        self, request: GenerateRequest, *, session: str | None = None, first_tokens: Sequence[int] = ()
    ) -> AsyncGenerator[TokenChunk, None]:
        """Chunks until the last one. A gang that is lost on the way costs time and no token.

        A deadline that passes after the first token ends the stream with finish_reason "timeout". With `grace_s` the
        request is first looked for at the gangs: a router that was lost may have begun it. Several such requests may
        have one id: each has an answer of its own.

        Args:
            request: `fetch` is used by the first attempt only.
            session: Requests of one session go to one decode gang where that costs nothing.
            first_tokens: What `prefill` has already generated, here or at another service; told again, at once unless
                more than their ids is asked for, which the gang that goes on from them knows.

        Raises:
            Overloaded: The waiting line, or every gang, is full.
            NotReady: No gang is there to take it, or the service is shutting down.
            DeadlineExceeded: The deadline passed before the first token.
            RequestRejected: The id is already in use, or the gang refused the request.
            WorkerLost: Gangs died under it time and again, or none came back.
        """
        with self._named(request):
            deadline_s = self._deadline_s(request)
            async with self._admission.place(deadline_s - self._now_s()):
                transcript, recovery = Transcript(request), Recovery(self.limits)
                if first_tokens and not request.sampling.wants_extras:
                    yield transcript.tell(first_tokens)
                try:
                    while not transcript.is_over:
                        if (end := transcript.ended()) is not None:
                            yield end
                            return
                        plan: Plan | None = None
                        try:
                            async with asyncio.timeout_at(deadline_s):
                                plan, chunks = await self._begin(request, transcript, recovery, session, deadline_s)
                            async with aclosing(chunks):
                                while not transcript.is_over:
                                    async with asyncio.timeout_at(deadline_s):
                                        chunk = await anext(chunks)
                                    if (news := transcript.take(chunk)) is not None:
                                        yield news
                        except RECOVERABLE as error:
                            recovery.lose(plan, error, num_sent=len(transcript.sent))
                            self._note_retry(request, error)
                except TimeoutError:
                    yield transcript.timed_out()
                finally:
                    self.counts.num_recovered += recovery.error is not None and transcript.is_over

    async def prefill(self, request: GenerateRequest) -> Handoff:
        """The first phase alone, for whoever sends the second himself. The gang keeps the prompt's KV for the ticket's
        holder until its lease runs out. Raises as `generate` does."""
        with self._named(request):
            deadline_s = self._deadline_s(request)
            async with self._admission.place(deadline_s - self._now_s()):
                transcript, recovery = Transcript(request), Recovery(self.limits)
                context_logits: list[bytes] = []
                while True:
                    plan: Plan | None = None
                    try:
                        async with asyncio.timeout_at(deadline_s):
                            plan, ticket, chunks = await self._begin_offer(request, transcript, recovery, deadline_s)
                            async with aclosing(chunks):
                                async for chunk in chunks:
                                    if (news := transcript.take(chunk)) is None:
                                        continue
                                    context_logits.append(news.context_logits)
                                    if transcript.is_over:
                                        is_open = news.finish_reason == "not_finished"
                                        news = dataclasses.replace(news, context_logits=b"".join(context_logits))
                                        return Handoff(news, ticket if is_open else None)
                    except TimeoutError:
                        return Handoff(transcript.timed_out(), None)
                    except RECOVERABLE as error:
                        recovery.lose(plan, error, num_sent=0)
                        self._note_retry(request, error)

    # ---- one attempt

    async def _begin(
        self,
        request: GenerateRequest,
        transcript: Transcript,
        recovery: Recovery,
        session: str | None,
        deadline_s: float,
    ) -> tuple[Plan | None, Chunks]:
        """An attempt that has been planned and booked, not yet asked for."""
        recovery.num_attempts += 1
        if recovery.num_attempts == 1 and request.grace_s and (found := await self._find(request)) is not None:
            link, attempt = found
            self.counts.num_reattached += 1
            transcript.begin_found(attempt.seed)
            return Plan(None, link), run_attached(link, attempt)
        senders, decode = await self._gangs(recovery, has_begun=bool(transcript.sent))
        asked = transcript.begin(self._left_s(deadline_s))
        prompt = PromptView(asked)
        is_alone = asked.fetch is not None or asked.sampling.needs_prompt_rows
        options = Options([] if is_alone else senders, decode, prompt, self.loads, session)
        plan = self._policy.plan(asked, options)
        self.counts.plans[plan.kind] += 1
        return plan, self._booked(plan, prompt, asked, recovery.num_attempts)

    async def _begin_offer(
        self, request: GenerateRequest, transcript: Transcript, recovery: Recovery, deadline_s: float
    ) -> tuple[Plan, Ticket, Chunks]:
        recovery.num_attempts += 1
        await self._gangs(recovery, has_begun=False)
        links = self._fleet.links("prefill")
        senders = [link for link in links if link.kv_source is not None]
        if links and not senders:
            raise RequestRejected("no gang of this service gives KV away", param="disaggregated_params")
        if not senders:
            raise NotReady("no prefill gang is ready to take requests", retry_after_s=_NOT_READY_RETRY_S)
        ticket_id = secrets.token_hex(16)
        asked = dataclasses.replace(transcript.begin(self._left_s(deadline_s)), offer=ticket_id, grace_s=0.0)
        prompt = PromptView(asked)
        senders = recovery.left(senders) or senders
        plan = self._policy.plan(asked, Options([], _awake(senders) or senders, prompt, self.loads))
        source = plan.decode.kv_source
        assert source is not None
        self.counts.plans["offer"] += 1
        return plan, Ticket(ticket_id, source), self._booked(plan, prompt, asked, recovery.num_attempts)

    async def _booked(self, plan: Plan, prompt: PromptView, asked: GenerateRequest, number: int) -> Chunks:
        has_fetch = asked.fetch is not None
        booking = Booking(
            self.loads,
            prefill=plan.prefill,
            decode=plan.decode,
            num_prefill=0 if has_fetch else prompt.uncached_tokens(plan.prefill or plan.decode),
            num_moved=0 if plan.prefill is None else prompt.uncached_tokens(plan.decode),
            num_prompt=prompt.num_tokens,
            num_reserved=min(asked.sampling.max_tokens, _RESERVED_TOKENS),
            now_s=self._now_s(),
        )
        notes = AttemptNotes(booking, self._now_s, self._count_fault)
        run = run_attempt(plan, asked, number, notes) if asked.offer is None else run_offer(plan, asked, number, notes)
        try:
            async with aclosing(run) as chunks:
                async for chunk in chunks:
                    yield chunk
        finally:
            booking.close()

    async def _gangs(self, recovery: Recovery, *, has_begun: bool) -> tuple[list[GangLink], list[GangLink]]:
        """Who may prefill, and who may answer, of which there is at least one; waits for it.

        Where no decode gang is open at all, prefill gangs stand in.
        """
        if recovery.pause_s:
            await asyncio.sleep(recovery.pause_s)
        while True:
            senders, decode = self._fleet.links("prefill"), self._fleet.links("decode")
            if usable := recovery.left(decode):
                return _awake(recovery.senders_left(senders)), _awake(usable) or usable
            if not decode and (usable := recovery.left(senders)):
                return [], _awake(usable) or usable
            if decode or senders:
                await asyncio.sleep(recovery.backoff_s(has_begun=has_begun))
            else:
                await self._fleet.wait_link(recovery.ready_timeout_s)

    async def _find(self, request: GenerateRequest) -> tuple[GangLink, FoundAttempt] | None:
        """Where a router that was lost began this request, if one did."""
        asked = {
            asyncio.create_task(link.find(request.request_id, _FIND_TIMEOUT_S)): link
            for link in _awake(self._fleet.links("decode"))
        }
        waiting = set(asked)
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    if task.exception() is None and (attempt := task.result()) is not None:
                        return asked[task], attempt
            return None
        finally:
            for task in waiting:
                task.cancel()

    # ---- small parts

    @contextmanager
    def _named(self, request: GenerateRequest) -> Iterator[None]:
        """Its id is taken for as long, unless it is its client's: that may give it to many. A service that is shutting
        down begins none."""
        self._fleet.check_open()
        if request.grace_s:
            yield
            return
        if request.request_id in self._open_ids:
            raise RequestRejected(f"request id {request.request_id!r} is already in use", param="request_id")
        self._open_ids.add(request.request_id)
        try:
            yield
        finally:
            self._open_ids.discard(request.request_id)

    def _deadline_s(self, request: GenerateRequest) -> float:
        """On the event loop's clock."""
        allowed_s = self.limits.default_deadline_s if request.deadline_s is None else request.deadline_s
        return self._now_s() + (_NO_DEADLINE_S if allowed_s is None else allowed_s)

    def _left_s(self, deadline_s: float) -> float | None:
        left_s = max(deadline_s - self._now_s(), 0.0)
        return left_s if left_s < _NO_DEADLINE_S / 2 else None

    def _now_s(self) -> float:
        return asyncio.get_running_loop().time()

    def _count_fault(self, reason: str) -> None:
        self.counts.faults[reason] += 1

    def _note_retry(self, request: GenerateRequest, error: TensorweaveError) -> None:
        self.counts.retries[error.code] += 1
        logger.info("request %s: attempt lost (%s): %s", request.request_id, error.code, error.message)


def _awake(links: Sequence[GangLink]) -> list[GangLink]:
    """A gang that has gone silent keeps what it has, for as long as it may yet speak, and gets nothing new."""
    return [link for link in links if not link.is_quiet]
