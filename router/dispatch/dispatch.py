"""`Dispatcher`: everything that one request does with the gangs.

Bounded admission, choice of gangs, the stream of tokens, replay when a gang is lost, the deadline. The HTTP app and the
LLM API both call `generate`; closing its generator early cancels the request at every gang.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import logging
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, aclosing, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Final

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.cluster.fleet import Fleet
from tensorweave.cluster.link import FoundAttempt, GangLink
from tensorweave.cluster.protocol import GenerateRequest, Ticket, TokenChunk
from tensorweave.router.deadline import Deadline
from tensorweave.router.dispatch.admission import Admission, Limits, Place
from tensorweave.router.dispatch.attempt import (
    AttemptObserver,
    Chunks,
    ended_early,
    run_attached,
    run_attempt,
    run_offer,
)
from tensorweave.router.dispatch.booking import Booking
from tensorweave.router.dispatch.counts import DispatchCounts
from tensorweave.router.dispatch.fair_queue import NO_KEY, Claim
from tensorweave.router.dispatch.kv_view import PromptView
from tensorweave.router.dispatch.loads import Loads
from tensorweave.router.dispatch.policy import Joint, Options, Route, RoutingPolicy
from tensorweave.router.dispatch.recovery import RECOVERABLE, Recovery, responsive
from tensorweave.router.dispatch.timeline import Timeline
from tensorweave.router.dispatch.transcript import Transcript

logger = logging.getLogger(__name__)

_NO_DEADLINE_S: Final = 1e9
_NOT_READY_RETRY_S: Final = 5.0
_FIND_TIMEOUT_S: Final = 10.0
"""Of a gang that stands still; one that is gone has closed its link. Without its answer the request starts anew."""
_RESERVED_TOKENS: Final = 128
"""KV space that a request is assumed to need for its answer; most ask for more than they use."""


@dataclass(frozen=True, slots=True)
class Handoff:
    """Result of the context phase. `ticket` is None if the first token already ended the request."""

    chunk: TokenChunk
    ticket: Ticket | None


@dataclass(slots=True)
class _OpenRequest:
    """An admitted request. `ticket` is the current attempt's, if that attempt is the context phase alone."""

    request: GenerateRequest
    deadline_s: float
    place: Place
    transcript: Transcript
    recovery: Recovery
    timeline: Timeline
    ticket: Ticket | None = None


@dataclass(frozen=True, slots=True)
class _Attempt:
    """Planned, not yet sent to a gang. `booking` is its share of the loads, released at the end."""

    route: Route
    chunks: Chunks
    booking: AbstractContextManager[object]


class Dispatcher:
    """Lives on one event loop. `clock` is for what admission measures; deadlines are the event loop's."""

    def __init__(
        self,
        fleet: Fleet,
        policy: RoutingPolicy | None = None,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet = fleet
        self._policy = policy or Joint()
        self.limits = limits or Limits()
        self.loads = Loads()
        self.counts = DispatchCounts()
        self.admission = Admission(self.limits, clock)
        self._open_ids: set[str] = set()

    @property
    def num_running(self) -> int:
        return self.admission.num_running

    @property
    def num_waiting(self) -> int:
        return self.admission.num_waiting

    async def generate(
        self,
        request: GenerateRequest,
        *,
        key: str = NO_KEY,
        session: str | None = None,
        first_tokens: Sequence[int] = (),
        timeline: Timeline | None = None,
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yield chunks until the last one. Losing a gang on the way costs time and no token.

        A deadline that passes after the first token ends the stream with finish_reason "timeout". With `grace_s` the
        gangs are first asked for the request: a router that was lost may have started it. Several such requests may
        have the same id; each gets an answer of its own.

        Args:
            request: `fetch` is used by the first attempt only.
            key: Whose request it is, for fair shares.
            session: Requests of one session go to the same decode gang if that costs nothing.
            first_tokens: What `prefill` has already generated, here or at another service. They are yielded again: at
                once, unless more than their ids is asked for, which only the gang that continues them knows.
            timeline: Is told when what happened.

        Raises:
            Overloaded: The queue, or every gang, is full, or the first token is expected too late.
            NotReady: No gang is available, or the service is shutting down.
            DeadlineExceeded: The deadline passed before the first token.
            RequestRejected: The id is already in use, or the gang refused the request.
            WorkerLost: Gangs died repeatedly while running it, or none came back.
        """
        async with self._admitted(request, timeline, key) as opened:
            transcript = opened.transcript
            if first_tokens and not request.sampling.wants_extras:
                yield transcript.add_known(first_tokens)
            try:
                attempts = self._run_attempts(opened, functools.partial(self._begin, session=session))
                async with aclosing(attempts) as chunks:
                    async for chunk in chunks:
                        yield chunk
            except TimeoutError:
                yield transcript.timed_out()
            finally:
                self.counts.num_recovered += opened.recovery.error is not None and transcript.is_over

    async def prefill(
        self, request: GenerateRequest, timeline: Timeline | None = None, *, key: str = NO_KEY
    ) -> Handoff:
        """Run the context phase alone, for a client that sends the generation phase itself. The gang keeps the
        prompt's KV for the ticket's holder until its lease expires. Raises what `generate` raises."""
        last, ticket = await self._run_at_once(request, timeline, key, self._begin_offer)
        return Handoff(last, ticket if last.finish_reason == "not_finished" else None)

    async def embed(self, request: GenerateRequest, timeline: Timeline | None = None, *, key: str = NO_KEY) -> bytes:
        """The embedding of a prompt, float32 [D], by a gang of role 'embed'. Raises what `generate` raises."""
        assert request.sampling.wants_embedding
        last, _ = await self._run_at_once(request, timeline, key, self._begin_embedding)
        return last.context_logits

    async def _run_at_once(
        self,
        request: GenerateRequest,
        timeline: Timeline | None,
        key: str,
        begin: Callable[[_OpenRequest], Awaitable[_Attempt]],
    ) -> tuple[TokenChunk, Ticket | None]:
        """A request of one token: its last chunk, with all that was told of the prompt, and the ticket, if it has
        one."""
        async with self._admitted(request, timeline, key) as opened:
            try:
                async with aclosing(self._run_attempts(opened, begin)) as stream:
                    chunks = [chunk async for chunk in stream]
            except TimeoutError:
                return opened.transcript.timed_out(), None
            context_logits = b"".join([chunk.context_logits for chunk in chunks])
            return dataclasses.replace(chunks[-1], context_logits=context_logits), opened.ticket

    @asynccontextmanager
    async def _admitted(
        self, request: GenerateRequest, timeline: Timeline | None, key: str
    ) -> AsyncIterator[_OpenRequest]:
        timeline = timeline or Timeline()
        timeline.ask()
        with self._reserve_id(request):
            deadline_s = self._deadline_s(request)
            sampling, num_prompt = request.sampling, len(request.prompt_token_ids)
            claim = Claim(key, num_prompt, sampling.max_tokens, deadline_s - self._now_s())
            async with self.admission.place(claim) as place:
                timeline.admit()
                yield _OpenRequest(request, deadline_s, place, Transcript(request), Recovery(self.limits), timeline)

    async def _run_attempts(
        self, opened: _OpenRequest, begin: Callable[[_OpenRequest], Awaitable[_Attempt]]
    ) -> AsyncGenerator[TokenChunk, None]:
        """Yield what is new to the client until the last chunk, over as many attempts as that takes. Raises
        TimeoutError at the deadline."""
        transcript, recovery = opened.transcript, opened.recovery
        while not transcript.is_over:
            if (end := transcript.ended()) is not None:
                yield end
                return
            route: Route | None = None
            try:
                async with asyncio.timeout_at(opened.deadline_s):
                    attempt = await begin(opened)
                route = attempt.route
                with attempt.booking, Deadline(opened.deadline_s) as deadline:
                    async with aclosing(attempt.chunks) as chunks:
                        next_chunk = functools.partial(anext, chunks, None)
                        while not transcript.is_over:
                            chunk = await deadline.wait(next_chunk)
                            if chunk is None:
                                raise ended_early(route.decode)
                            if (new := transcript.take(chunk)) is not None:
                                opened.place.tell(len(new.token_ids))
                                yield new
                opened.timeline.end_attempt()
            except RECOVERABLE as error:
                opened.timeline.end_attempt(error.code)
                recovery.lose(route, error, num_sent=len(transcript.sent))
                self.counts.retries[error.code] += 1
                logger.info("request %s: attempt lost (%s): %s", opened.request.request_id, error.code, error.message)

    # ---- one attempt

    async def _begin(self, opened: _OpenRequest, session: str | None) -> _Attempt:
        request, recovery, transcript = opened.request, opened.recovery, opened.transcript
        recovery.num_attempts += 1
        if recovery.num_attempts == 1 and request.grace_s and (found := await self._find(request)) is not None:
            link, attempt = found
            self.counts.num_reattached += 1
            opened.timeline.begin_attempt(None, link.gang_id)
            transcript.begin_found(attempt.seed)
            return _Attempt(Route(None, link), run_attached(link, attempt), nullcontext())
        senders, decode = await recovery.wait_for_gangs(self._fleet, has_begun=bool(transcript.sent))
        asked = transcript.begin(self._left_s(opened.deadline_s))
        prompt = PromptView(asked)
        is_alone = asked.fetch is not None or asked.sampling.needs_prompt_rows
        route = self._policy.route(Options([] if is_alone else senders, decode, prompt, self.loads, session))
        self.counts.routes[route.kind] += 1
        observer = self._observe(opened, route, prompt, asked)
        return _Attempt(route, run_attempt(route, asked, recovery.num_attempts, observer), observer.booking)

    async def _begin_offer(self, opened: _OpenRequest) -> _Attempt:
        recovery = opened.recovery
        recovery.num_attempts += 1
        await recovery.wait_for_gangs(self._fleet, has_begun=False)
        links = self._fleet.links("prefill")
        senders = [link for link in links if link.kv_source is not None]
        if links and not senders:
            raise RequestRejected("no gang of this service gives KV away", param="disaggregated_params")
        if not senders:
            raise NotReady("no prefill gang is ready to take requests", retry_after_s=_NOT_READY_RETRY_S)
        ticket_id = secrets.token_hex(16)
        left_s = self._left_s(opened.deadline_s)
        asked = dataclasses.replace(opened.transcript.begin(left_s), offer=ticket_id, grace_s=0.0)
        prompt = PromptView(asked)
        senders = recovery.left(senders) or senders
        route = self._policy.route(Options([], responsive(senders) or senders, prompt, self.loads))
        source = route.decode.kv_source
        assert source is not None
        self.counts.routes["offer"] += 1
        opened.ticket = Ticket(ticket_id, source)
        observer = self._observe(opened, route, prompt, asked)
        return _Attempt(route, run_offer(route.decode, asked, recovery.num_attempts, observer), observer.booking)

    async def _begin_embedding(self, opened: _OpenRequest) -> _Attempt:
        recovery = opened.recovery
        recovery.num_attempts += 1
        links = await recovery.wait_for_embedders(self._fleet)
        asked = opened.transcript.begin(self._left_s(opened.deadline_s))
        prompt = PromptView(asked)
        route = self._policy.route(Options([], links, prompt, self.loads))
        self.counts.routes["embed"] += 1
        observer = self._observe(opened, route, prompt, asked)
        return _Attempt(route, run_attempt(route, asked, recovery.num_attempts, observer), observer.booking)

    def _observe(
        self, opened: _OpenRequest, route: Route, prompt: PromptView, asked: GenerateRequest
    ) -> AttemptObserver:
        booking = Booking(
            self.loads,
            prefill=route.prefill,
            decode=route.decode,
            num_prefill=0 if asked.fetch is not None else prompt.uncached_tokens(route.prefill or route.decode),
            num_moved=0 if route.prefill is None else prompt.uncached_tokens(route.decode),
            num_prompt=prompt.num_tokens,
            num_reserved=min(asked.sampling.max_tokens, _RESERVED_TOKENS),
            now_s=self._now_s(),
        )
        prefill_gang = None if route.prefill is None else route.prefill.gang_id
        times = opened.timeline.begin_attempt(prefill_gang, route.decode.gang_id)
        return AttemptObserver(booking, times, self._now_s, self._count_fault)

    async def _find(self, request: GenerateRequest) -> tuple[GangLink, FoundAttempt] | None:
        """The gang at which a router that was lost started this request, if there is one."""
        asked = {
            asyncio.create_task(link.find(request.request_id, _FIND_TIMEOUT_S)): link
            for link in responsive(self._fleet.links("decode"))
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
    def _reserve_id(self, request: GenerateRequest) -> Iterator[None]:
        """Reserve the request's id until it ends, unless the client chose it: a client may give one id to many. Raises
        NotReady if the service is shutting down."""
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
