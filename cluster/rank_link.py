"""`RankLinkMonitor`: detects a slow link between a gang's ranks, from its rate at the start and from later waits.

`cluster.gang` passes it each report of rank 0; the admin port and the log show the result. Waits are those of
collectives on CPUs, which return when they are done. On GPUs the link is measured at the start only.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Final

from tensorweave.cluster.ranks import LinkRate, Traffic

logger = logging.getLogger(__name__)

SLOW_BYTES_PER_S: Final = 100e6
"""At the start: a step with a prompt's tokens moves megabytes between the ranks, 10 ms each at this rate."""
SLOW_LATENCY_S: Final = 2e-3
"""At the start: a step makes two collectives a layer."""
SLOW_FACTOR: Final = 10.0
SLOW_WAIT_S: Final = 2e-3
"""Later: a collective takes this many times as long as at the measured rate, and at least this long."""
_WINDOW_S: Final = 5.0
_WINDOW_CALLS: Final = 100


class RankLinkMonitor:
    """Used for one gang of several ranks."""

    def __init__(self, gang_id: str, rate: LinkRate, clock: Callable[[], float] = time.monotonic) -> None:
        self._gang_id = gang_id
        self._rate = rate
        self._clock = clock
        self._began = (clock(), Traffic())
        self._wait_s: float | None = None
        self._num_slow = 0
        self._slow = self._slow_at_start = self._judge_rate()
        self._log()

    def note(self, traffic: Traffic) -> None:
        """Add the totals of all collectives so far. The link is slow if two successive windows are."""
        now_s = self._clock()
        since_s, before = self._began
        new = traffic.since(before)
        if new.calls < _WINDOW_CALLS or now_s - since_s < _WINDOW_S:
            return
        self._began = now_s, traffic
        self._wait_s = wait_s = new.seconds / new.calls
        due_s = self._rate.latency_s + new.num_bytes / new.calls / self._rate.bytes_per_s
        is_slow = wait_s > SLOW_WAIT_S and wait_s > SLOW_FACTOR * due_s
        self._num_slow = self._num_slow + 1 if is_slow else 0
        found = self._slow_at_start
        if self._num_slow > 1:
            found = (
                f"a collective of its ranks takes {wait_s * 1e3:.1f} ms, and {due_s * 1e3:.2f} ms by what was measured "
                f"at the start: the link between them, or a rank, has become slow"
            )
        before_slow, self._slow = self._slow, found
        if (before_slow is None) != (found is None):
            self._log()

    def describe(self) -> dict[str, Any]:
        """For health pages. `wait_ms` is the mean time of a collective in the last window; None before the first."""
        return {
            "megabytes_per_s": round(self._rate.bytes_per_s / 1e6, 1),
            "latency_ms": round(self._rate.latency_s * 1e3, 3),
            "wait_ms": None if self._wait_s is None else round(self._wait_s * 1e3, 3),
            "slow": self._slow,
        }

    def _judge_rate(self) -> str | None:
        rate = self._rate
        if rate.bytes_per_s >= SLOW_BYTES_PER_S and rate.latency_s <= SLOW_LATENCY_S:
            return None
        return (
            f"the link between its ranks carries {rate.bytes_per_s / 1e6:.1f} MB/s and takes "
            f"{rate.latency_s * 1e3:.2f} ms a collective: slow for tensor parallelism, which wants at least "
            f"{SLOW_BYTES_PER_S / 1e6:.0f} MB/s and at most {SLOW_LATENCY_S * 1e3:.0f} ms"
        )

    def _log(self) -> None:
        if self._slow is not None:
            logger.warning("gang %s: %s", self._gang_id, self._slow)
        else:
            rate = self._rate.bytes_per_s / 1e6, self._rate.latency_s * 1e3
            logger.info("gang %s: the link between its ranks carries %.0f MB/s, %.2f ms", self._gang_id, *rate)
