"""Bounded admission: a limited number of requests runs, a limited number waits in order, others get Overloaded."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from tensorweave.cluster.errors import DeadlineExceeded, Overloaded

_MIN_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 60.0
_SMOOTHING: Final = 0.1  # weight of the newest request in the mean service time


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one router replica.

    A new request waits `ready_timeout_s` for a gang, one whose gang was lost `recovery_timeout_s` for another. It is
    tried `max_attempts` times, and fails when `max_lost_in_a_row` gangs died while running it without a new token. A
    request with a client-given id keeps running for `reattach_grace_s` after its router is lost. If `waits_for_room`, a
    new request waits when every gang is full, as a request that is being recovered does. `max_held_body_bytes` covers
    the bodies of all requests that are being received and parsed.
    """

    max_inflight: int = 512
    max_queued: int = 1024
    queue_timeout_s: float = 60.0
    default_deadline_s: float | None = 600.0
    max_deadline_s: float = 3600.0
    ready_timeout_s: float = 10.0
    recovery_timeout_s: float = 300.0
    max_attempts: int = 8
    max_lost_in_a_row: int = 4
    reattach_grace_s: float = 10.0
    heartbeat_limit_s: float = 10.0
    max_body_bytes: int = 8 * 2**20
    max_held_body_bytes: int = 256 * 2**20
    body_timeout_s: float = 60.0
    max_sequences: int = 256
    waits_for_room: bool = False

    def __post_init__(self) -> None:
        for name in ("max_inflight", "max_body_bytes", "max_sequences", "max_attempts", "max_lost_in_a_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least 1")
        if self.max_held_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_held_body_bytes is {self.max_held_body_bytes}, less than max_body_bytes, {self.max_body_bytes}"
            )
        if self.max_queued < 0:
            raise ValueError(f"max_queued is {self.max_queued}, must be at least 0")


class Admission:
    """A first-come-first-served semaphore of `max_inflight` places with a queue of `max_queued`."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._places = asyncio.Semaphore(limits.max_inflight)
        self._mean_service_s = 1.0
        self.num_running = 0
        self.num_waiting = 0

    @asynccontextmanager
    async def place(self, timeout_s: float) -> AsyncIterator[None]:
        """Hold a place for the duration of the block. Raises Overloaded if the queue is full or too slow, and
        DeadlineExceeded if `timeout_s` passes first."""
        await self._enter(timeout_s)
        started_s = self._clock()
        self.num_running += 1
        try:
            yield
        finally:
            self.num_running -= 1
            self._mean_service_s += _SMOOTHING * (self._clock() - started_s - self._mean_service_s)
            self._places.release()

    async def _enter(self, timeout_s: float) -> None:
        if not self._places.locked():
            await self._places.acquire()
            return
        if self.num_waiting >= self._limits.max_queued:
            raise Overloaded(
                f"{self.num_running} requests are running and {self.num_waiting} waiting, which is this server's limit",
                retry_after_s=self.retry_after_s(),
            )
        self.num_waiting += 1
        try:
            async with asyncio.timeout(min(timeout_s, self._limits.queue_timeout_s)):
                await self._places.acquire()
        except TimeoutError:
            if timeout_s <= self._limits.queue_timeout_s:
                raise DeadlineExceeded("the request's deadline passed while it waited to be admitted") from None
            raise Overloaded(
                f"the request waited {self._limits.queue_timeout_s:g} s without being admitted",
                retry_after_s=self.retry_after_s(),
            ) from None
        finally:
            self.num_waiting -= 1

    def retry_after_s(self) -> float:
        """Estimate when the queue will have advanced by its present length."""
        estimate_s = self._mean_service_s * (self.num_waiting + 1) / self._limits.max_inflight
        return min(max(estimate_s, _MIN_RETRY_S), _MAX_RETRY_S)
