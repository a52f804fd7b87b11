"""`Loads`: what this router has sent each gang, and how fast each gang has turned out to be.

The dispatcher opens a `Booking` per attempt and reports tokens to it; policies read the estimates. Speeds are straight
lines (a fixed cost and a cost per token) fitted to observations, with older samples fading.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Final, Self

from tensorweave.cluster.link import GangLink

_FADE: Final = 0.95  # factor on all weights per new sample: about the last 20 count
_PRIOR_AT_TOKENS: Final = 1024.0
_MAX_GANGS: Final = 4096


class SpeedLine:
    """seconds = fixed + per_token x tokens: least squares over fading samples and two assumed ones."""

    def __init__(self, fixed_s: float, per_token_s: float) -> None:
        self.fixed_s, self.per_token_s = fixed_s, per_token_s
        far_s = fixed_s + per_token_s * _PRIOR_AT_TOKENS
        # Two assumed samples, of weight 1 each: at 0 and at _PRIOR_AT_TOKENS.
        self._prior = (2.0, _PRIOR_AT_TOKENS, _PRIOR_AT_TOKENS**2, fixed_s + far_s, _PRIOR_AT_TOKENS * far_s)
        self._sums = (0.0, 0.0, 0.0, 0.0, 0.0)

    def seconds(self, num_tokens: float) -> float:
        return self.fixed_s + self.per_token_s * num_tokens

    def add(self, num_tokens: float, seconds: float) -> None:
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


@dataclass(frozen=True, slots=True)
class Assumptions:
    """Speeds until some are observed: the prefill of a small GPU, and a hand-over through a network."""

    prefill_fixed_s: float = 0.005
    prefill_per_token_s: float = 1e-4
    handover_fixed_s: float = 0.005
    handover_per_token_s: float = 1e-5


@dataclass(slots=True)
class GangLoad:
    """`queued_tokens` are to be prefilled here; `num_decoding` sequences decode here and hold `kv_tokens`."""

    prefill: SpeedLine
    queued_tokens: int = 0
    num_decoding: int = 0
    kv_tokens: int = 0
    handovers: dict[str, SpeedLine] = field(default_factory=dict)

    @property
    def is_idle(self) -> bool:
        return not (self.queued_tokens or self.num_decoding or self.kv_tokens)


class Loads:
    def __init__(self, assumed: Assumptions | None = None) -> None:
        self._assumed = assumed or Assumptions()
        self._gangs: dict[str, GangLoad] = {}

    def of(self, gang_id: str) -> GangLoad:
        load = self._gangs.get(gang_id)
        if load is None:
            if len(self._gangs) >= _MAX_GANGS:
                self.keep_only(())
            assumed = self._assumed
            load = GangLoad(SpeedLine(assumed.prefill_fixed_s, assumed.prefill_per_token_s))
            self._gangs[gang_id] = load
        return load

    def handover(self, prefill: GangLink, decode: GangLink) -> SpeedLine:
        """Time from the prefill gang's first token to the decode gang's first, by tokens moved. Until one is observed,
        the time that the measured link takes for their bytes."""
        lines = self.of(decode.gang_id).handovers
        line = lines.get(prefill.gang_id)
        if line is None:
            fixed_s, per_token_s = self._assumed.handover_fixed_s, self._assumed.handover_per_token_s
            link, num_bytes = decode.kv_links.get(prefill.gang_id), decode.info.kv_bytes_per_token
            if link is not None and num_bytes:
                fixed_s, per_token_s = fixed_s + link.latency_s, num_bytes / link.bytes_per_s
            line = lines[prefill.gang_id] = SpeedLine(fixed_s, per_token_s)
        return line

    def keep_only(self, gang_ids: Collection[str]) -> None:
        """Forget the other gangs, except those that still have a booking."""
        self._gangs = {
            gang_id: load for gang_id, load in self._gangs.items() if gang_id in gang_ids or not load.is_idle
        }
        for load in self._gangs.values():
            load.handovers = {gang_id: line for gang_id, line in load.handovers.items() if gang_id in self._gangs}


class Booking:
    """One attempt's share of the loads, from construction to `close`. Times are on the caller's clock."""

    def __init__(
        self,
        loads: Loads,
        *,
        prefill: GangLink | None,
        decode: GangLink,
        num_prefill: int,
        num_moved: int,
        num_prompt: int,
        num_reserved: int,
        now_s: float,
    ) -> None:
        self._prefiller = loads.of((prefill or decode).gang_id)
        self._decoder = loads.of(decode.gang_id)
        self._handover = None if prefill is None else loads.handover(prefill, decode)
        self._num_queued = num_prefill
        self._num_before = self._prefiller.queued_tokens
        self._num_prompt = num_prompt
        self._num_moved = num_moved
        self._kv_tokens = num_prompt + num_reserved
        self._started_s = now_s
        self._first_s: float | None = None
        self._prefiller.queued_tokens += num_prefill
        self._decoder.num_decoding += 1
        self._decoder.kv_tokens += self._kv_tokens

    def prefilled(self, num_cached: int, now_s: float) -> None:
        """Record the first token from the gang that computed the prompt."""
        if self._first_s is None:
            self._first_s = now_s
            if self._num_queued:
                num_done = self._num_before + self._num_prompt - num_cached
                self._prefiller.prefill.add(max(num_done, 1), now_s - self._started_s)
        self._unqueue()

    def handed_over(self, now_s: float) -> None:
        """Record the decode gang's own first token."""
        if self._handover is not None and self._first_s is not None:
            self._handover.add(self._num_moved, now_s - self._first_s)
        self._unqueue()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self.close()

    def close(self) -> None:
        self._unqueue()
        self._decoder.num_decoding -= 1
        self._decoder.kv_tokens -= self._kv_tokens

    def _unqueue(self) -> None:
        self._prefiller.queued_tokens -= self._num_queued
        self._num_queued = 0
