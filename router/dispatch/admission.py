"""Bounded admission: a limited number of requests and tokens runs, a limited number waits, others get Overloaded.

Claim ──room──▶ Place ──first token, tokens──▶ left
  │               ▲
  ├──no room──▶ waiting, by key ──deadline, too long, or its key gives way──▶ refused
  └──expected too late, or no space to wait──▶ refused
"""

from __future__ import annotations

import asyncio
import collections
import math
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Final, Literal

from tensorweave.cluster.errors import DeadlineExceeded, Overloaded
from tensorweave.router.dispatch.estimates import DrainRate, FirstTokenTime, InflightLimit
from tensorweave.router.dispatch.fair_queue import Claim, FairQueue, Key, Waiting

Refusal = Literal["deadline", "full", "share", "slow", "timeout"]
"""Why a request was refused: expected or come too late for its deadline; no space in the queue; its place in the queue
was given to another key; expected to wait too long; waited too long."""

_MIN_RETRY_S: Final = 1.0
_MAX_RETRY_S: Final = 60.0
_SMOOTHING: Final = 0.1  # weight of the newest request in the mean service time
_WAIT_SHARE: Final = 0.5  # of `max_ttft_s`: the longest wait
_START_SHARE: Final = 0.4  # of `max_ttft_s`: what a first token may take once its request is admitted


@dataclass(frozen=True, slots=True)
class Limits:
    """Limits of one router replica.

    A new request waits `ready_timeout_s` for a gang, one whose gang was lost `recovery_timeout_s` for another. It is
    tried `max_attempts` times, and fails when `max_lost_in_a_row` gangs died while running it without a new token. A
    request with a client-given id keeps running for `reattach_grace_s` after its router is lost. If `waits_for_room`, a
    new request waits when every gang is full, as a request that is being recovered does. `max_held_body_bytes` covers
    the bodies of all requests that are being received and parsed.

    Tokens are those of prompts and expected answers (`max_inflight_tokens`), or of prompts alone (`max_queued_tokens`).
    With `max_ttft_s` fewer requests than `max_inflight` may run, so that first tokens come in time. `key_weights`: the
    shares of API keys, by `router.http.keys.key_name`; others have 1.
    """

    max_inflight: int = 512
    max_inflight_tokens: int | None = None
    max_queued: int = 1024
    max_queued_tokens: int = 4 * 2**20
    max_ttft_s: float | None = None
    key_weights: Mapping[str, float] = field(default_factory=dict)
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
        for name in ("max_inflight_tokens", "max_queued_tokens", "max_ttft_s"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise ValueError(f"{name} is {value}, must be more than 0")
        if wrong := [weight for weight in self.key_weights.values() if not 0 < weight < math.inf]:
            raise ValueError(f"key_weights has {wrong[0]}, must be more than 0")
        if self.max_queued < 0:
            raise ValueError(f"max_queued is {self.max_queued}, must be at least 0")


class Place:
    """An admitted request's place, told of its tokens."""

    def __init__(self, admission: Admission, entry: Waiting, admitted_s: float) -> None:
        self.entry = entry
        self.admitted_s = admitted_s
        self.num_output = 0
        self._admission = admission

    def tell(self, num_tokens: int) -> None:
        """The client gets `num_tokens` more."""
        if num_tokens and not self.num_output:
            self._admission.first_token(self)
        self.num_output += num_tokens


class Admission:
    """Places for requests, by number and by tokens, given to waiting requests fairly among keys (`fair_queue.py`).

    A request is refused at once if the queue is full, or if it is expected to have its first token too late: after its
    deadline, or after `max_ttft_s`. Expectations come from measured rates (`estimates.py`).
    """

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self._limits = limits
        self._clock = clock
        self._queue = FairQueue(limits.key_weights)
        self._drain = DrainRate()
        self._start = FirstTokenTime()
        target_s = None if limits.max_ttft_s is None else limits.max_ttft_s * _START_SHARE
        self._inflight = InflightLimit(limits.max_inflight, target_s)
        self._mean_service_s = 1.0
        self.num_running = 0
        self.running_tokens = 0
        self.refusals: collections.Counter[Refusal] = collections.Counter()

    @property
    def num_waiting(self) -> int:
        return len(self._queue)

    @property
    def waiting_tokens(self) -> int:
        return self._queue.waiting_tokens

    @property
    def inflight_limit(self) -> int:
        return self._inflight.value

    @property
    def expected_wait_s(self) -> float:
        """How long all that waits takes to get its places; 0 if nobody waits, or nothing is known."""
        return (self._drain.seconds(self.waiting_tokens, self._clock()) or 0.0) if len(self._queue) else 0.0

    def accounts(self) -> Sequence[Key]:
        return list(self._queue.accounts())

    @asynccontextmanager
    async def place(self, claim: Claim) -> AsyncIterator[Place]:
        """Hold a place for the duration of the block.

        Raises:
            Overloaded: The queue is full or too slow, or the request would have its first token too late.
            DeadlineExceeded: Its deadline passed while it waited.
        """
        key = self._queue.key(claim.key)
        tokens = key.estimate(claim.num_prompt, claim.max_output)
        entry = Waiting(key, claim.num_prompt, tokens, asyncio.get_running_loop().create_future())
        if len(self._queue) or not self._has_room(tokens):
            self._check_expectation(entry, claim.timeout_s)
            self._make_space(entry)
            await self._wait(entry, claim.timeout_s)
        else:
            self._admit(entry)
        place = Place(self, entry, self._clock())
        try:
            yield place
        finally:
            self._leave(place)

    def first_token(self, place: Place) -> None:
        now_s = self._clock()
        self._start.add(now_s - place.admitted_s)
        self._inflight.first_token(place.admitted_s, now_s, is_reached=self.num_running >= self._inflight.value)
        self._admit_waiting()

    def retry_after_s(self) -> float:
        """Estimate when the queue will have advanced by its present length."""
        by_places_s = self._mean_service_s * (self.num_waiting + 1) / self._inflight.value
        by_tokens_s = self._drain.seconds(self.waiting_tokens, self._clock())
        return min(max(by_places_s if by_tokens_s is None else by_tokens_s, _MIN_RETRY_S), _MAX_RETRY_S)

    # ---- waiting

    def _check_expectation(self, entry: Waiting, timeout_s: float) -> None:
        """Refuse a request that must wait if its first token is expected too late."""
        before = self._queue.tokens_before(entry.key, entry.tokens)
        wait_s = self._drain.seconds(before + entry.tokens, self._clock())
        if wait_s is None:
            return
        if wait_s + self._start.mean_s > timeout_s:
            raise self._refuse(
                entry,
                "deadline",
                f"the first token is expected in {wait_s + self._start.mean_s:.1f} s, after the request's deadline "
                f"({timeout_s:.1f} s)",
            )
        if wait_s > (limit_s := self._longest_wait_s):
            message = f"the request is expected to wait {wait_s:.1f} s, and this server's limit is {limit_s:.1f} s"
            raise self._refuse(entry, "slow", message)

    def _make_space(self, entry: Waiting) -> None:
        """If the queue is full, the key that has most waiting gives way, with its newest request."""
        while self._is_full(entry):
            newest = self._queue.newest_of_longest(entry.key)
            is_own = newest is None
            refusal = self._refuse(
                entry if newest is None else newest,
                "full" if is_own else "share",
                f"{self.num_running} requests are running and {self.num_waiting} waiting, which is this server's limit",
            )
            if newest is None:
                raise refusal
            self._queue.remove(newest)
            newest.place.set_exception(refusal)

    def _is_full(self, entry: Waiting) -> bool:
        is_over = self._queue.waiting_prompt_tokens + entry.num_prompt > self._limits.max_queued_tokens
        return len(self._queue) >= self._limits.max_queued or (is_over and len(self._queue) > 0)

    async def _wait(self, entry: Waiting, timeout_s: float) -> None:
        limit_s = self._longest_wait_s
        self._queue.push(entry)
        self._drain.begin(self._clock())
        try:
            async with asyncio.timeout(min(timeout_s, limit_s)):
                await entry.place
        except TimeoutError:
            if entry.has_place:
                return
            if timeout_s <= limit_s:
                self._count_refusal(entry, "deadline")
                raise DeadlineExceeded("the request's deadline passed while it waited to be admitted") from None
            raise self._refuse(entry, "timeout", f"the request waited {limit_s:.3g} s without being admitted") from None
        except asyncio.CancelledError:
            if entry.has_place:
                self._release(entry)
            raise
        finally:
            self._queue.remove(entry)
            if not len(self._queue):
                self._drain.stop()
            self._admit_waiting()  # the next may fit where this one did not

    @property
    def _longest_wait_s(self) -> float:
        """`queue_timeout_s`, or what `max_ttft_s` leaves for waiting."""
        most_s = self._limits.max_ttft_s
        limit_s = self._limits.queue_timeout_s
        return limit_s if most_s is None else min(limit_s, most_s * _WAIT_SHARE)

    def _refuse(self, entry: Waiting, reason: Refusal, message: str) -> Overloaded:
        self._count_refusal(entry, reason)
        return Overloaded(message, retry_after_s=self.retry_after_s())

    def _count_refusal(self, entry: Waiting, reason: Refusal) -> None:
        entry.key.num_refused += 1
        self.refusals[reason] += 1

    # ---- places

    def _has_room(self, tokens: int) -> bool:
        """A request of more tokens than the limit runs alone."""
        if self.num_running >= self._inflight.value:
            return False
        most = self._limits.max_inflight_tokens
        return most is None or not self.num_running or self.running_tokens + tokens <= most

    def _admit(self, entry: Waiting) -> None:
        self._queue.charge(entry)
        self.num_running += 1
        self.running_tokens += entry.tokens
        entry.key.num_running += 1
        entry.key.num_admitted += 1
        entry.key.admitted_tokens += entry.tokens

    def _admit_waiting(self) -> None:
        while len(self._queue):
            entry = self._queue.head()
            if not self._has_room(entry.tokens):
                return
            self._queue.remove(entry)
            if entry.place.done():  # its task was cancelled, and has not run since
                continue
            self._admit(entry)
            self._drain.add(entry.tokens, self._clock(), is_empty=not len(self._queue))
            entry.place.set_result(None)

    def _leave(self, place: Place) -> None:
        entry = place.entry
        self._mean_service_s += _SMOOTHING * (self._clock() - place.admitted_s - self._mean_service_s)
        if place.num_output:
            entry.key.learn(place.num_output)
        self._queue.correct(entry, entry.num_prompt + place.num_output)
        self._release(entry)

    def _release(self, entry: Waiting) -> None:
        entry.key.num_running -= 1
        self.num_running -= 1
        self.running_tokens -= entry.tokens
        self._admit_waiting()
