"""One attempt at a request: a gang alone, or a prefill and a decode gang together. `Dispatcher` calls; it replays.

A pair is asked at the same time. Whichever says the first token first is heard; from then on the decode gang's stream
counts. Loss of the prefill gang is no loss of the attempt: the decode gang computes the prompt itself. Leaving early
ends both sides, and the lease on the prompt's KV ends with the attempt at the latest.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
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
from tensorweave.router.dispatch.loads import Booking
from tensorweave.router.dispatch.policy import Plan

Chunks = AsyncGenerator[TokenChunk, None]

# Longer than a decode gang takes to notice that its prefill gang has died (3 s), and to compute a usual prompt itself.
ORPHAN_WAIT_S: Final = 10.0


# The two gangs of a pair have the first token within a step or two of each other.
TWIN_WAIT_S: Final = 0.05


class PrefillRefused(TensorweaveError):
    """The prefill gang did not take the request, or its logits were not finite: there is no KV to wait for."""

    code = "prefill_refused"


@dataclass(frozen=True, slots=True)
class AttemptNotes:
    """Whom an attempt tells what it sees. `count` takes the reason of a fault that costs no replay."""

    booking: Booking
    now_s: Callable[[], float]
    count: Callable[[str], None]


def run_attempt(plan: Plan, request: GenerateRequest, number: int, notes: AttemptNotes) -> Chunks:
    """Chunks until the last, from the first token on that the request does not hold yet."""
    if plan.prefill is None:
        return _run_alone(plan.decode, dataclasses.replace(request, request_id=decode_id(request, number)), notes)
    return _Pair(plan.prefill, plan.decode, request, number, notes).run()


def decode_id(request: GenerateRequest, number: int) -> str:
    """An attempt's id at the gang that answers; `GangLink.find` knows it by what stands before the slash. A client may
    give several requests one name, at this router and at others: their attempts differ all the same."""
    name = f"{request.request_id}/d{number}"
    return f"{name}-{secrets.token_hex(8)}" if request.grace_s else name


def prefill_id(request: GenerateRequest, number: int, ticket_id: str) -> str:
    """Of an attempt's first half at its gang. Never the same twice: a client may use its request id again while the
    lease of the last time is still open there."""
    return f"{request.request_id}/p{number}-{ticket_id[:12]}"


def run_offer(plan: Plan, request: GenerateRequest, number: int, notes: AttemptNotes) -> Chunks:
    """The prompt and its first token alone. `request.offer` names the ticket, whose lease outlives the attempt."""
    assert request.offer is not None
    name = prefill_id(request, number, request.offer)
    return _run_alone(plan.decode, dataclasses.replace(request, request_id=name), notes)


async def _run_alone(link: GangLink, request: GenerateRequest, notes: AttemptNotes) -> Chunks:
    is_first = True
    async with aclosing(_until_last(link, link.generate(request))) as chunks:
        async for chunk in chunks:
            if is_first and chunk.token_ids:
                is_first = False
                notes.booking.prefilled(chunk.num_cached_tokens, notes.now_s())
            yield chunk


async def run_attached(link: GangLink, found: FoundAttempt) -> Chunks:
    """An attempt that a lost router began. It ends at the deadline that its first request had, which may be before the
    one of the request that goes on with it."""
    async with aclosing(_until_last(link, link.attach(found.request_id))) as chunks:
        async for chunk in chunks:
            if chunk.finish_reason == "timeout":
                raise WorkerLost(f"gang {link.gang_id}: the deadline of the request's first time has passed")
            yield chunk


async def _until_last(link: GangLink, stream: Chunks) -> Chunks:
    async with aclosing(stream) as chunks:
        async for chunk in chunks:
            yield chunk
            if chunk.is_last:
                return
    raise WorkerLost(f"gang {link.gang_id}: its answer ended before the last token")


class _Pair:
    def __init__(
        self, prefill: GangLink, decode: GangLink, request: GenerateRequest, number: int, notes: AttemptNotes
    ) -> None:
        assert prefill.kv_source is not None, "a gang that gives no KV away was asked to"
        ticket = Ticket(secrets.token_hex(16), prefill.kv_source)
        self._prefill = prefill
        self._notes = notes
        self._is_released = False
        name = prefill_id(request, number, ticket.ticket_id)
        self._there = dataclasses.replace(request, request_id=name, offer=ticket.ticket_id, grace_s=0.0)
        here = dataclasses.replace(request, request_id=decode_id(request, number), fetch=ticket)
        self._own = _until_last(decode, decode.generate(here))

    async def run(self) -> Chunks:
        own_first = asyncio.create_task(_next(self._own))
        handed = asyncio.create_task(self._prefill_side())
        try:
            await asyncio.wait((own_first, handed), return_when=asyncio.FIRST_COMPLETED)
            is_refusal_late = own_first.done() and handed.done() and handed.exception() is not None
            first = handed.result() if handed.done() and not is_refusal_late else None
            if first is not None:
                self._notes.booking.prefilled(first.num_cached_tokens, self._notes.now_s())
                yield first
                if first.is_last:
                    return
            chunk = await self._own_first(own_first, is_orphan=handed.done() and not is_refusal_late and first is None)
            if first is None:
                chunk = await self._with_cached(chunk, handed)
            self._notes.booking.handed_over(self._notes.now_s())
            await self._release(handed)
            yield chunk
            async for chunk in self._own:
                yield chunk
        finally:
            await _end(own_first)
            await self._release(handed)
            await self._own.aclose()

    async def _own_first(self, own_first: asyncio.Task[TokenChunk], *, is_orphan: bool) -> TokenChunk:
        """The decode gang's first chunk. An orphan's prefill gang is out of our reach: it may live on without the
        request, and the decode gang wait in vain for KV that nobody computes; so the wait is short."""
        if is_orphan:
            await asyncio.wait((own_first,), timeout=ORPHAN_WAIT_S)
            if not own_first.done():
                raise WorkerLost(f"gang {self._prefill.gang_id} was lost, and no KV came of the request it had")
        return await own_first

    async def _with_cached(self, chunk: TokenChunk, handed: asyncio.Task[TokenChunk | None]) -> TokenChunk:
        """The decode gang was heard first. What the prefill gang found in its cache counts too, and it says so at about
        the same time, if it says anything."""
        await asyncio.wait((handed,), timeout=TWIN_WAIT_S)
        twin = handed.result() if handed.done() and handed.exception() is None else None
        if twin is None or twin.num_cached_tokens <= chunk.num_cached_tokens:
            return chunk
        return dataclasses.replace(chunk, num_cached_tokens=twin.num_cached_tokens)

    async def _prefill_side(self) -> TokenChunk | None:
        """The first token, with a finish reason only where it ends the request; None where the gang was lost."""
        try:
            async with aclosing(self._prefill.generate(self._there)) as chunks:
                async for chunk in chunks:
                    if chunk.finish_reason in ("stop", "length"):
                        return chunk
                    if chunk.token_ids:
                        return dataclasses.replace(chunk, finish_reason=None)
                    break
        except (RequestRejected, Overloaded, NotReady, LogitsNotFinite) as error:
            raise PrefillRefused(f"gang {self._prefill.gang_id}: {error.message}") from error
        except TensorweaveError as error:
            self._notes.count(f"prefill_{error.code}")
            return None
        self._notes.count("prefill_ended")
        return None

    async def _release(self, handed: asyncio.Task[TokenChunk | None]) -> None:
        """End what the prefill gang still does (closing its stream does), or else the lease on what it has done."""
        if self._is_released:
            return
        self._is_released = True
        if not handed.done():
            await _end(handed)
        elif handed.exception() is None:
            self._prefill.cancel(self._there.request_id)


async def _next(chunks: Chunks) -> TokenChunk:
    return await anext(chunks)


async def _end(task: asyncio.Task[TokenChunk] | asyncio.Task[TokenChunk | None]) -> None:
    """Cancel a task and wait for it; what it had to say is heard no more."""
    task.cancel()
    await asyncio.wait((task,))
    if not task.cancelled():
        task.exception()
