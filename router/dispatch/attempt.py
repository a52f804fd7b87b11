"""One attempt at a request: one gang alone, or a prefill and a decode gang together. `Dispatcher` calls; it replays.

The two gangs of a pair are asked at the same time, and whichever has the first token first is used; after that the
decode gang's stream counts. Losing the prefill gang does not end the attempt: the decode gang computes the prompt
itself. Closing the generator ends both sides, and the lease on the prompt's KV ends with the attempt at the latest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import secrets
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from typing import Final

from tensorweave.cluster.errors import (
    LogitsNotFinite,
    NotReady,
    Overloaded,
    RequestRejected,
    TensorweaveError,
    WorkerLost,
)
from tensorweave.cluster.link import FoundAttempt, GangLink
from tensorweave.cluster.protocol import GenerateRequest, Ticket, TokenChunk
from tensorweave.router.dispatch.booking import Booking
from tensorweave.router.dispatch.policy import Route
from tensorweave.router.dispatch.timeline import AttemptTimes

Chunks = AsyncGenerator[TokenChunk, None]

ORPHAN_WAIT_S: Final = 10.0
"""Longer than a decode gang takes to notice that its prefill gang has died (3 s), and to compute a usual prompt."""
TWIN_WAIT_S: Final = 0.05
"""The two gangs of a pair have the first token within a step or two of each other."""


class PrefillRefused(TensorweaveError):
    """The prefill gang did not take the request, or its logits were not finite: there is no KV to wait for."""

    code = "prefill_refused"


@dataclass(frozen=True, slots=True)
class AttemptObserver:
    """What an attempt reports to. `count_fault` takes the reason of a fault that causes no replay."""

    booking: Booking
    times: AttemptTimes
    now_s: Callable[[], float]
    count_fault: Callable[[str], None]

    def prefilled(self, num_cached: int) -> None:
        """The gang that computes the prompt has the first token."""
        self.times.first_token_s = time.perf_counter()
        self.booking.prefilled(num_cached, self.now_s())

    def handed_over(self) -> None:
        """The decode gang of a pair has its own first token."""
        self.times.handed_over_s = time.perf_counter()
        self.booking.handed_over(self.now_s())

    def told(self, chunk: TokenChunk) -> None:
        """The gang that answers has told more tokens."""
        self.booking.told(len(chunk.token_ids), self.now_s())


def run_attempt(route: Route, request: GenerateRequest, number: int, observer: AttemptObserver) -> Chunks:
    """Chunks until the last, starting with the first token that the request does not hold yet."""
    if route.prefill is not None:
        return _Pair(route.prefill, route.decode, request, number, observer).run()
    return _run_alone(route.decode, dataclasses.replace(request, request_id=decode_id(request, number)), observer)


def run_offer(link: GangLink, request: GenerateRequest, number: int, observer: AttemptObserver) -> Chunks:
    """The prompt and its first token alone. `request.offer` is the ticket's id; its lease outlives the attempt."""
    assert request.offer is not None
    name = prefill_id(request, number, request.offer)
    return _run_alone(link, dataclasses.replace(request, request_id=name), observer)


def decode_id(request: GenerateRequest, number: int) -> str:
    """An attempt's id at the gang that answers. `GangLink.find` matches the part before the slash. Several requests may
    have the same client-given id, at this router and at others: their attempts have different ids all the same."""
    name = f"{request.request_id}/d{number}"
    return f"{name}-{secrets.token_hex(8)}" if request.grace_s else name


def prefill_id(request: GenerateRequest, number: int, ticket_id: str) -> str:
    """An attempt's id at the prefill gang. It is never reused: a client may use its request id again while the lease of
    the earlier request is still open there."""
    return f"{request.request_id}/p{number}-{ticket_id[:12]}"


def ended_early(link: GangLink) -> WorkerLost:
    """What to raise when a gang's stream ends without a last chunk."""
    return WorkerLost(f"gang {link.gang_id}: its answer ended before the last token")


async def _run_alone(link: GangLink, request: GenerateRequest, observer: AttemptObserver) -> Chunks:
    is_first = True
    async with aclosing(link.generate(request)) as chunks:
        async for chunk in chunks:
            if is_first and chunk.token_ids:
                is_first = False
                observer.prefilled(chunk.num_cached_tokens)
            elif not is_first:
                observer.told(chunk)
            yield chunk


async def run_attached(link: GangLink, found: FoundAttempt) -> Chunks:
    """Continue an attempt that a lost router started. It ends at the deadline of the first request, which may be before
    the deadline of the request that continues it."""
    async with aclosing(link.attach(found.request_id)) as chunks:
        async for chunk in chunks:
            if chunk.finish_reason == "timeout":
                raise WorkerLost(f"gang {link.gang_id}: the deadline of the request's first time has passed")
            yield chunk


class _Start(enum.Enum):
    """How a pair's attempt starts: which gang answered first, and how."""

    PREFILL_FIRST = enum.auto()
    DECODE_FIRST = enum.auto()
    PREFILL_LOST = enum.auto()
    PREFILL_REFUSED = enum.auto()


class _Pair:
    def __init__(
        self, prefill: GangLink, decode: GangLink, request: GenerateRequest, number: int, observer: AttemptObserver
    ) -> None:
        assert prefill.kv_source is not None, "a gang that gives no KV away was asked to"
        ticket = Ticket(secrets.token_hex(16), prefill.kv_source)
        self._prefill = prefill
        self._decode = decode
        self._observer = observer
        self._is_released = False
        name = prefill_id(request, number, ticket.ticket_id)
        self._offer = dataclasses.replace(request, request_id=name, offer=ticket.ticket_id, grace_s=0.0)
        fetch = dataclasses.replace(request, request_id=decode_id(request, number), fetch=ticket)
        self._stream = decode.generate(fetch)

    async def run(self) -> Chunks:
        decoding = asyncio.create_task(self._next())
        prefilling = asyncio.create_task(self._run_prefill())
        try:
            await asyncio.wait((decoding, prefilling), return_when=asyncio.FIRST_COMPLETED)
            match _start_of(decoding, prefilling):
                case _Start.PREFILL_FIRST:
                    first = prefilling.result()
                    assert first is not None
                    self._observer.prefilled(first.num_cached_tokens)
                    yield first
                    if first.is_last:
                        return
                    chunk = await decoding
                case _Start.DECODE_FIRST:
                    chunk = await self._with_cached(await decoding, prefilling)
                case _Start.PREFILL_LOST:
                    chunk = await self._orphan_first(decoding)
                case _Start.PREFILL_REFUSED:
                    refusal = prefilling.exception()
                    assert refusal is not None
                    raise refusal
            self._observer.handed_over()
            await self._release(prefilling)
            yield chunk
            async for chunk in self._stream:
                self._observer.told(chunk)
                yield chunk
        finally:
            await _end(decoding)
            await self._release(prefilling)
            await self._stream.aclose()

    async def _next(self) -> TokenChunk:
        chunk = await anext(self._stream, None)
        if chunk is None:
            raise ended_early(self._decode)
        return chunk

    async def _orphan_first(self, decoding: asyncio.Task[TokenChunk]) -> TokenChunk:
        """The decode gang's first chunk after the prefill gang was lost. That gang may live on without the request, and
        the decode gang then waits for KV that nothing computes; so this wait is short."""
        await asyncio.wait((decoding,), timeout=ORPHAN_WAIT_S)
        if not decoding.done():
            raise WorkerLost(f"gang {self._prefill.gang_id} was lost, and no KV came of the request it had")
        return await decoding

    async def _with_cached(self, chunk: TokenChunk, prefilling: asyncio.Task[TokenChunk | None]) -> TokenChunk:
        """The decode gang's first chunk, with the prefill gang's number of cached tokens if that is larger. The prefill
        gang reports it at about the same time, if at all."""
        await asyncio.wait((prefilling,), timeout=TWIN_WAIT_S)
        twin = prefilling.result() if prefilling.done() and prefilling.exception() is None else None
        if twin is None or twin.num_cached_tokens <= chunk.num_cached_tokens:
            return chunk
        return dataclasses.replace(chunk, num_cached_tokens=twin.num_cached_tokens)

    async def _run_prefill(self) -> TokenChunk | None:
        """The first token, with a finish reason only if it ends the request; None if the gang was lost."""
        try:
            async with aclosing(self._prefill.generate(self._offer)) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason in ("stop", "length"):
                        return chunk
                    if chunk.token_ids:
                        return dataclasses.replace(chunk, finish_reason=None)
                    break
        except (RequestRejected, Overloaded, NotReady, LogitsNotFinite) as error:
            raise PrefillRefused(f"gang {self._prefill.gang_id}: {error.message}") from error
        except TensorweaveError as error:
            self._observer.count_fault(f"prefill_{error.code}")
            return None
        self._observer.count_fault("prefill_ended")
        return None

    async def _release(self, prefilling: asyncio.Task[TokenChunk | None]) -> None:
        """End what the prefill gang is still computing (closing its stream does that), or the lease on its KV."""
        if self._is_released:
            return
        self._is_released = True
        if not prefilling.done():
            await _end(prefilling)
        elif prefilling.exception() is None:
            self._prefill.cancel(self._offer.request_id)


def _start_of(decoding: asyncio.Task[TokenChunk], prefilling: asyncio.Task[TokenChunk | None]) -> _Start:
    """At least one of the two is done. A refusal that comes with the decode gang's answer is too late to matter."""
    if not prefilling.done():
        return _Start.DECODE_FIRST
    if prefilling.exception() is not None:
        return _Start.DECODE_FIRST if decoding.done() else _Start.PREFILL_REFUSED
    return _Start.PREFILL_LOST if prefilling.result() is None else _Start.PREFILL_FIRST


async def _end(task: asyncio.Task[TokenChunk] | asyncio.Task[TokenChunk | None]) -> None:
    """Cancel a task and wait for it; its result or error is dropped."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
