"""`FairQueue`: requests that wait for admission, in order within a key, and by weighted tokens among keys.

Each key has a counter of tokens that it was given, divided by its weight; the waiting key with the least is next
(virtual token counters, Sheng et al., OSDI 2024). A key that was idle starts at the counter of the key served last, so
idle time saves up nothing. Tokens are estimated at first and corrected when a request has ended.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

NO_KEY: Final = "none"
"""The key of requests where the service has no API keys."""
_FIRST_OUTPUT: Final = 128.0
_SMOOTHING: Final = 0.1  # weight of the newest answer in the mean length
_MAX_IDLE_KEYS: Final = 1024


@dataclass(frozen=True, slots=True)
class Claim:
    """What a request asks for: `key` is whose it is (`NO_KEY` without API keys); `timeout_s` is its deadline."""

    key: str
    num_prompt: int
    max_output: int
    timeout_s: float


@dataclass(slots=True, eq=False)
class Key:
    """One API key's account. `given` are tokens divided by `weight`; `num_admitted` and `num_refused` only grow."""

    name: str
    weight: float = 1.0
    given: float = 0.0
    mean_output: float = _FIRST_OUTPUT
    num_running: int = 0
    waiting_tokens: int = 0
    num_admitted: int = 0
    num_refused: int = 0
    admitted_tokens: int = 0
    waiting: collections.OrderedDict[int, Waiting] = field(default_factory=collections.OrderedDict)

    def estimate(self, num_prompt: int, max_output: int) -> int:
        """Tokens that a request is counted as until it has ended."""
        return num_prompt + min(max_output, round(self.mean_output))

    def learn(self, num_output: int) -> None:
        self.mean_output += _SMOOTHING * (num_output - self.mean_output)

    @property
    def is_idle(self) -> bool:
        return not (self.waiting or self.num_running)


@dataclass(slots=True, eq=False)
class Waiting:
    """A request that waits, or has a place. `place` is done when it is admitted or refused."""

    key: Key
    num_prompt: int
    tokens: int
    place: asyncio.Future[None]
    number: int = 0

    @property
    def has_place(self) -> bool:
        return self.place.done() and not self.place.cancelled() and self.place.exception() is None


class FairQueue:
    """`weights` by key; a key that is not in it has weight 1."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._keys: dict[str, Key] = {}
        self._active: dict[str, Key] = {}
        """Keys with requests that wait."""
        self._floor = 0.0
        self._num_pushed = 0
        self._num_waiting = 0
        self.waiting_tokens = 0
        self.waiting_prompt_tokens = 0

    def __len__(self) -> int:
        return self._num_waiting

    def accounts(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def key(self, name: str) -> Key:
        key = self._keys.get(name)
        if key is None:
            if len(self._keys) >= _MAX_IDLE_KEYS:
                self._keys = {each.name: each for each in self._keys.values() if not each.is_idle}
            key = self._keys[name] = Key(name, self._weights.get(name, 1.0))
        return key

    def push(self, entry: Waiting) -> None:
        key = entry.key
        self._wake(key)
        self._num_pushed += 1
        entry.number = self._num_pushed
        key.waiting[entry.number] = entry
        self._active[key.name] = key
        self._count(entry, 1)

    def charge(self, entry: Waiting) -> None:
        """The request is admitted, and does not wait (any more)."""
        key = entry.key
        self._wake(key)
        self._floor = max(self._floor, key.given)
        key.given += entry.tokens / key.weight

    def correct(self, entry: Waiting, num_tokens: int) -> None:
        """An admitted request has ended after `num_tokens`, prompt and output."""
        entry.key.given += (num_tokens - entry.tokens) / entry.key.weight

    def head(self) -> Waiting:
        """Who is next; the queue is not empty."""
        key = min(self._active.values(), key=lambda key: key.given)
        return next(iter(key.waiting.values()))

    def newest_of_longest(self, arriving: Key) -> Waiting | None:
        """The newest request of the key with most waiting per weight; None if `arriving` would then have as many."""
        if not self._active:
            return None
        longest = max(self._active.values(), key=lambda key: len(key.waiting) / key.weight)
        if (
            longest is arriving
            or len(longest.waiting) / longest.weight <= (len(arriving.waiting) + 1) / arriving.weight
        ):
            return None
        return next(reversed(longest.waiting.values()))

    def remove(self, entry: Waiting) -> None:
        key = entry.key
        if key.waiting.pop(entry.number, None) is None:
            return
        self._count(entry, -1)
        if not key.waiting:
            del self._active[key.name]

    def tokens_before(self, key: Key, tokens: int) -> float:
        """Tokens that are served before a new request of `tokens` of this key has its place: its own that wait, and of
        each other key at most as many per weight, while it has them waiting."""
        own = (key.waiting_tokens + tokens) / key.weight
        others = [each for each in self._active.values() if each is not key]
        return key.waiting_tokens + sum([min(each.waiting_tokens, own * each.weight) for each in others])

    def _wake(self, key: Key) -> None:
        if not key.waiting:
            key.given = max(key.given, self._floor)

    def _count(self, entry: Waiting, sign: int) -> None:
        entry.key.waiting_tokens += sign * entry.tokens
        self._num_waiting += sign
        self.waiting_tokens += sign * entry.tokens
        self.waiting_prompt_tokens += sign * entry.num_prompt
