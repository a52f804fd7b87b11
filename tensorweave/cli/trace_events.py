"""The events of a profiler's Chrome trace that `tensorweave bench trace` looks at."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

KERNEL: Final = "kernel"
COPIES: Final = ("gpu_memcpy", "gpu_memset")
OPERATOR: Final = "cpu_op"
CALLS: Final = ("cuda_runtime", "cuda_driver")
_KINDS: Final = (KERNEL, *COPIES, OPERATOR, *CALLS)


@dataclass(frozen=True, slots=True)
class Event:
    """One kernel, copy, operator or call of the CUDA runtime; times in microseconds.

    `correlation` is the same for a call and for everything on the device that it launched: all kernels of a CUDA
    graph have that of the graph's launch.
    """

    kind: str
    name: str
    start_us: float
    end_us: float
    correlation: int
    thread: str


@dataclass(slots=True)
class Trace:
    """`base_ns` is the time since 1970 from which the events count: their own times would be too large for a float."""

    base_ns: int = 0
    events: list[Event] = field(default_factory=list)

    def read(self, path: Path) -> None:
        document = json.loads(path.read_text(encoding="utf-8"))
        self.base_ns, self.events = int(document["baseTimeNanoseconds"]), events_of(document["traceEvents"])

    def at_us(self, time_ns: int) -> float:
        """A time of `time.time_ns` on the events' axis."""
        return (time_ns - self.base_ns) / 1e3


def events_of(entries: Iterable[dict[str, Any]]) -> list[Event]:
    """The events in the order of their starts."""
    events = [
        Event(
            kind=entry["cat"],
            name=entry["name"],
            start_us=float(entry["ts"]),
            end_us=float(entry["ts"]) + float(entry["dur"]),
            correlation=int(entry.get("args", {}).get("correlation", 0)),
            thread=str(entry["tid"]),
        )
        for entry in entries
        if entry.get("ph") == "X" and entry.get("cat") in _KINDS
    ]
    return sorted(events, key=lambda event: (event.start_us, -event.end_us))


def last_part(events: Sequence[Event], length_s: float) -> list[Event]:
    """The events that start in the last `length_s` seconds of a trace."""
    began_us = max((event.end_us for event in events), default=0.0) - length_s * 1e6
    return [event for event in events if event.start_us >= began_us]


def of_kind(events: Sequence[Event], *kinds: str) -> list[Event]:
    return [event for event in events if event.kind in kinds]
