"""What speeds are learnt as: straight lines fitted to fading samples, means, and rates of events."""

from __future__ import annotations

import math
from typing import Final

_FADE: Final = 0.95  # factor on all weights per new sample: about the last 20 count
_PRIOR_AT_TOKENS: Final = 1024.0
_RATE_S: Final = 30.0


class SpeedLine:
    """seconds = fixed + per_token x tokens: least squares over fading samples and two assumed ones."""

    def __init__(self, fixed_s: float, per_token_s: float, prior_at: float = _PRIOR_AT_TOKENS) -> None:
        self.fixed_s, self.per_token_s = fixed_s, per_token_s
        self.num_samples = 0
        far_s = fixed_s + per_token_s * prior_at
        # Two assumed samples, of weight 1 each: at 0 and at `prior_at`.
        self._prior = (2.0, prior_at, prior_at**2, fixed_s + far_s, prior_at * far_s)
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def seconds(self, num_tokens: float) -> float:
        return self.fixed_s + self.per_token_s * num_tokens

    def add(self, num_tokens: float, seconds: float) -> None:
        self.num_samples += 1
        sample = (1.0, num_tokens, num_tokens**2, seconds, num_tokens * seconds)
        self._sums = _summed(self._sums, sample, _FADE)
        n, x, xx, y, xy = _summed(self._prior, self._sums, 1.0)
        slope = (n * xy - x * y) / (n * xx - x * x)  # the two assumed samples keep the spread above 0
        self.per_token_s = max(slope, 0.0)
        self.fixed_s = max((y - self.per_token_s * x) / n, 0.0)


Sums = tuple[float, float, float, float, float]


def _summed(older: Sums, newer: Sums, weight: float) -> Sums:
    (n, x, xx, y, xy), (dn, dx, dxx, dy, dxy) = older, newer
    return (weight * n + dn, weight * x + dx, weight * xx + dxx, weight * y + dy, weight * xy + dxy)


class Mean:
    """The mean of fading samples, beginning with an assumed one."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.num_samples = 0

    def add(self, sample: float) -> None:
        self.num_samples += 1
        self.value += (sample - self.value) * (1 - _FADE)


class Rate:
    """Events per second, over about the last half minute."""

    def __init__(self) -> None:
        self._count = 0.0
        self._at_s = 0.0

    def add(self, now_s: float) -> None:
        self._count = self._count * self._fade(now_s) + 1
        self._at_s = now_s

    def per_s(self, now_s: float) -> float:
        return self._count * self._fade(now_s) / _RATE_S

    def _fade(self, now_s: float) -> float:
        return math.exp(min(self._at_s - now_s, 0.0) / _RATE_S)
