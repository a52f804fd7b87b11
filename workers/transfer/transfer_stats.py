"""`TransferStats`: counters of a rank's KV transfers, written by any thread and published as gauges."""

from __future__ import annotations

import collections
import threading

from tensorweave.workers.transfer.carrier import FAILURE_KINDS, FailureKind


class TransferStats:
    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._failures: collections.Counter[FailureKind] = collections.Counter()
        self._totals = dict.fromkeys(
            ("bytes", "blocks", "seconds", "fetches", "refetched_blocks", "recomputed_tokens"), 0.0
        )

    def add_failures(self, kind: FailureKind, count: int = 1) -> None:
        if count:
            with self._lock:
                self._failures[kind] += count

    def add(self, name: str, amount: float) -> None:
        with self._lock:
            self._totals[name] += amount

    def add_verified(self, num_blocks: int, num_bytes: int) -> None:
        with self._lock:
            self._totals["blocks"] += num_blocks
            self._totals["bytes"] += num_bytes

    def failures(self) -> dict[FailureKind, int]:
        with self._lock:
            return dict(self._failures)

    def gauges(self) -> dict[str, float]:
        with self._lock:
            totals = {f"kv_transfer_{name}_total": amount for name, amount in self._totals.items()}
            failures = {f"kv_transfer_failures_{kind}_total": float(self._failures[kind]) for kind in FAILURE_KINDS}
        return totals | failures
