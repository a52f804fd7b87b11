"""`Dispatcher`: the whole conversation of one request with the gangs, in one async function.

Bounded admission, choice of a gang, the stream of tokens, the deadline. The HTTP app and the LLM API both call
`generate`; closing its generator early cancels the request at the gang.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Final

from tensorweave.cluster.errors import DeadlineExceeded, NotReady, RequestRejected, WorkerLost
from tensorweave.cluster.fleet import Fleet
from tensorweave.cluster.link import GangLink
from tensorweave.cluster.protocol import GenerateRequest, TokenChunk
from tensorweave.router.admission import Admission, Limits
from tensorweave.router.policy import LeastLoaded, RoutingPolicy

_NO_DEADLINE_S: Final = 1e9
_NOT_READY_RETRY_S: Final = 5.0


class Dispatcher:
    """Lives on one event loop."""

    def __init__(self, fleet: Fleet, policy: RoutingPolicy | None = None, limits: Limits | None = None) -> None:
        self._fleet = fleet
        self._policy = policy or LeastLoaded()
        self.limits = limits or Limits()
        self._admission = Admission(self.limits)
        self._open_ids: set[str] = set()

    @property
    def num_running(self) -> int:
        return self._admission.num_running

    @property
    def num_waiting(self) -> int:
        return self._admission.num_waiting

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[TokenChunk, None]:
        """Chunks until the last one.

        A deadline that passes after the first token ends the stream with finish_reason "timeout".

        Raises:
            Overloaded: The waiting line is full.
            NotReady: No gang is there to take it.
            DeadlineExceeded: The deadline passed before the first token.
            RequestRejected: The id is already in use, or the gang refused the request.
            WorkerLost: The gang died.
        """
        if request.request_id in self._open_ids:
            raise RequestRejected(f"request id {request.request_id!r} is already in use", param="request_id")
        now_s = asyncio.get_running_loop().time
        deadline_s = now_s() + self._time_allowed_s(request)
        self._open_ids.add(request.request_id)
        try:
            async with self._admission.place(deadline_s - now_s()):
                link = await self._choose(request, deadline_s - now_s())
                left_s = max(deadline_s - now_s(), 0.0)
                attempt = dataclasses.replace(request, deadline_s=left_s if left_s < _NO_DEADLINE_S / 2 else None)
                async with aclosing(self._until_deadline(link, attempt, deadline_s)) as chunks:
                    async for chunk in chunks:
                        yield chunk
        finally:
            self._open_ids.discard(request.request_id)

    def _time_allowed_s(self, request: GenerateRequest) -> float:
        if request.deadline_s is not None:
            return request.deadline_s
        return _NO_DEADLINE_S if self.limits.default_deadline_s is None else self.limits.default_deadline_s

    async def _choose(self, request: GenerateRequest, time_left_s: float) -> GangLink:
        links = self._fleet.links("both")
        if not links:
            await self._fleet.wait_ready(min(self.limits.ready_timeout_s, max(time_left_s, 0.0)))
            links = self._fleet.links("both")
        if not links:
            raise NotReady("no gang is ready to take requests", retry_after_s=_NOT_READY_RETRY_S)
        return self._policy.choose(links, request)

    async def _until_deadline(
        self, link: GangLink, request: GenerateRequest, deadline_s: float
    ) -> AsyncGenerator[TokenChunk, None]:
        """One gang's stream. `deadline_s` is on the event loop's clock; the gang knows the same deadline."""
        last: TokenChunk | None = None
        async with aclosing(link.generate(request)) as chunks:
            while last is None or not last.is_last:
                try:
                    async with asyncio.timeout_at(deadline_s):
                        last = await anext(chunks)
                except StopAsyncIteration:
                    raise WorkerLost(f"gang {link.gang_id}: its answer ended before the last token") from None
                except TimeoutError:
                    if last is None:
                        raise DeadlineExceeded("the request's deadline passed before its first token") from None
                    last = dataclasses.replace(last, token_ids=(), finish_reason="timeout")
                if last.error is not None:
                    raise last.error
                yield last
