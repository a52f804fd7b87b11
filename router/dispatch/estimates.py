"""What admission learns of the service from its own requests: how fast places come free, how long a first token takes,
and how many requests may be at the gangs."""

from __future__ import annotations

from typing import Final

_FADE: Final = 0.98  # factor on older samples per new one: about the last 50 count
_MIN_SAMPLES: Final = 8
_MEAN_WEIGHT: Final = 0.1

_FIRST_INFLIGHT: Final = 4.0
_DECREASE: Final = 0.85


class DrainRate:
    """Tokens per second that get a place while requests wait. Time in which nobody waits does not count."""

    def __init__(self) -> None:
        self._tokens = 0.0
        self._seconds = 0.0
        self._num_samples = 0
        self._since_s: float | None = None

    def begin(self, now_s: float) -> None:
        """Somebody waits."""
        if self._since_s is None:
            self._since_s = now_s

    def add(self, tokens: float, now_s: float, *, is_empty: bool) -> None:
        """A request that waited got its place; `is_empty`: nobody waits any more."""
        if self._since_s is None:
            return
        self._tokens = _FADE * self._tokens + tokens
        self._seconds = _FADE * self._seconds + now_s - self._since_s
        self._num_samples += 1
        self._since_s = None if is_empty else now_s

    def stop(self) -> None:
        """Nobody waits any more: the last one left without a place."""
        self._since_s = None

    def seconds(self, tokens: float, now_s: float) -> float | None:
        """How long `tokens` take; None until enough has been seen. A place that is overdue slows the rate at once."""
        if self._num_samples < _MIN_SAMPLES or not self._tokens:
            return None
        open_s = 0.0 if self._since_s is None else max(0.0, now_s - self._since_s - self._seconds / self._num_kept)
        return tokens * (self._seconds + open_s) / self._tokens

    @property
    def _num_kept(self) -> float:
        return min(self._num_samples, 1 / (1 - _FADE))


class FirstTokenTime:
    """Mean seconds from a place to the first token."""

    def __init__(self) -> None:
        self._num_samples = 0
        self._mean_s = 0.0

    def add(self, seconds: float) -> None:
        self._num_samples += 1
        self._mean_s += max(_MEAN_WEIGHT, 1 / self._num_samples) * (seconds - self._mean_s)

    @property
    def mean_s(self) -> float:
        """0 until enough has been seen."""
        return self._mean_s if self._num_samples >= _MIN_SAMPLES else 0.0


class InflightLimit:
    """How many requests may be at the gangs: `most`, or fewer if their first tokens then take longer than `target_s`.

    Additive increase and multiplicative decrease: it grows while it is reached and first tokens take less than half of
    `target_s`, by one per request at first and by one per limit's worth of requests once they took longer. What it has
    grown by until it sees that takes the other half. It falls once per round: what was admitted before a decrease tells
    nothing about it.
    """

    def __init__(self, most: int, target_s: float | None) -> None:
        self._most = float(most)
        self._target_s = target_s
        self._value = self._most if target_s is None else min(self._most, _FIRST_INFLIGHT)
        self._is_probing = True
        self._fallen_s = float("-inf")

    @property
    def value(self) -> int:
        return int(self._value)

    def first_token(self, admitted_s: float, now_s: float, *, is_reached: bool) -> None:
        """A request that was admitted at `admitted_s` has its first token now."""
        if self._target_s is None:
            return
        took_s = now_s - admitted_s
        if took_s > self._target_s / 2:
            self._is_probing = False
        elif is_reached:
            self._value = min(self._most, self._value + (1.0 if self._is_probing else 1 / self._value))
        if took_s > self._target_s and admitted_s >= self._fallen_s:
            self._value = max(1.0, self._value * _DECREASE)
            self._fallen_s = now_s
