"""From the events of a trace to figures per decode step: how long the GPU is busy, idle inside CUDA graphs and idle
between launches, and which kernels take the time.

Times are the device's own, so that they hold under CUDA graphs and where kernels overlap.
"""

from __future__ import annotations

import collections
import re
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

from tensorweave.cli.figures import percentile
from tensorweave.cli.trace_events import COPIES, KERNEL, OPERATOR, Event, of_kind

_EDGE: Final = 0.1  # share of the steps left out at the start: the profiler itself had to start


@dataclass(frozen=True, slots=True)
class DeviceSteps:
    """Means per step, in microseconds. A step is the sum of the times in which a kernel runs (`busy_us`), none does
    inside a launch of a CUDA graph (`inside_us`), and none does between two launches (`between_us`)."""

    num_steps: int
    step_us: float
    step_p99_us: float
    busy_us: float
    inside_us: float
    between_us: float
    copies_us: float


@dataclass(frozen=True, slots=True)
class Share:
    """One kernel's or operator's part of a step."""

    name: str
    per_step: float
    us_each: float
    us_per_step: float
    share: float


def device_steps(events: Sequence[Event], num_expected: int) -> tuple[DeviceSteps, list[Share]]:
    """Figures of the steady part of a trace in which about `num_expected` steps ran.

    Raises:
        ValueError: The trace has no kernel that runs once per step.
    """
    anchors = _anchors(of_kind(events, KERNEL), num_expected)
    began_us, ended_us = anchors[0], anchors[-1]
    inside = [event for event in events if began_us <= event.start_us < ended_us]
    kernels, num_steps = of_kind(inside, KERNEL), len(anchors) - 1
    next_one = next(event for event in of_kind(events, KERNEL) if event.start_us == ended_us)
    inside_us, between_us = _gaps([*kernels, next_one])
    total_us = ended_us - began_us
    steps = DeviceSteps(
        num_steps=num_steps,
        step_us=total_us / num_steps,
        step_p99_us=percentile(sorted(after - before for before, after in pairwise(anchors)), 99),
        busy_us=(total_us - inside_us - between_us) / num_steps,
        inside_us=inside_us / num_steps,
        between_us=between_us / num_steps,
        copies_us=sum(event.end_us - event.start_us for event in of_kind(inside, *COPIES)) / num_steps,
    )
    durations = ((event.name, event.end_us - event.start_us) for event in kernels)
    return steps, _shares(durations, num_steps)


@dataclass(frozen=True, slots=True)
class DeviceSpan:
    """What the GPU does between two times, in milliseconds. `idle_ms` is without the time before its first kernel and
    that after its last one; `gaps_ms` are its longest parts, as (when, how long)."""

    before_ms: float
    busy_ms: float
    idle_ms: float
    after_ms: float
    gaps_ms: list[tuple[float, float]]


def device_span(
    events: Sequence[Event], began_us: float, ended_us: float, num_gaps: int = 6
) -> tuple[DeviceSpan, list[Share]]:
    """The figures of all that runs between two times. Raises ValueError if no kernel does."""
    kernels = [event for event in of_kind(events, KERNEL) if began_us <= event.start_us <= ended_us]
    if not kernels:
        raise ValueError("no kernel ran on the GPU meanwhile")
    gaps, end_us = [], kernels[0].end_us
    for event in kernels[1:]:
        if event.start_us > end_us:
            gaps.append(((end_us - began_us) / 1e3, (event.start_us - end_us) / 1e3))
        end_us = max(end_us, event.end_us)
    idle_ms = sum(length_ms for _, length_ms in gaps)
    span = DeviceSpan(
        before_ms=(kernels[0].start_us - began_us) / 1e3,
        busy_ms=(end_us - kernels[0].start_us) / 1e3 - idle_ms,
        idle_ms=idle_ms,
        after_ms=(ended_us - end_us) / 1e3,
        gaps_ms=sorted(gaps, key=lambda gap: -gap[1])[:num_gaps],
    )
    return span, _shares(((event.name, event.end_us - event.start_us) for event in kernels), 1)


def operator_shares(events: Sequence[Event], num_steps: int) -> list[Share]:
    """Operators by their own time, without that of operators inside them."""
    own: list[tuple[str, float]] = []
    for thread in {event.thread for event in events}:
        open_ones: list[list[float]] = []  # end and own time of the operators that contain the next one
        names: list[str] = []
        for event in (event for event in of_kind(events, OPERATOR) if event.thread == thread):
            while open_ones and open_ones[-1][0] <= event.start_us:
                own.append((names.pop(), open_ones.pop()[1]))
            if open_ones:
                open_ones[-1][1] -= event.end_us - event.start_us
            open_ones.append([event.end_us, event.end_us - event.start_us])
            names.append(event.name)
        own += [(name, time_us) for name, (_, time_us) in zip(names, open_ones, strict=True)]
    return _shares(own, num_steps)


def short_name(name: str, width: int = 64) -> str:
    """A kernel's name without return type, template arguments and parameters."""
    plain = re.sub(r"\(anonymous namespace\)::", "", name.removeprefix("void "))
    while (shorter := re.sub(r"<[^<>]*>", "", plain)) != plain:
        plain = shorter
    plain = plain.split("(")[0].strip() or name
    return plain if len(plain) <= width else plain[: width - 1] + "…"


def _anchors(kernels: Sequence[Event], num_expected: int) -> list[float]:
    """Starts of the kernel that runs once per step, from one step after the trace's unsteady beginning on."""
    starts: dict[str, list[float]] = collections.defaultdict(list)
    for event in kernels:
        starts[event.name].append(event.start_us)
    near = {
        name: times for name, times in starts.items() if abs(len(times) - num_expected) <= max(2, num_expected // 5)
    }
    if not near:
        raise ValueError(f"no kernel of the trace ran about {num_expected} times, once per step")
    name = min(near, key=lambda name: (abs(len(near[name]) - num_expected), _unevenness(near[name]), name))
    steady = near[name][max(1, int(len(near[name]) * _EDGE)) :]
    if len(steady) < 3:
        raise ValueError(f"only {len(steady)} steps are in the trace's steady part: take more")
    return steady


def _unevenness(times: Sequence[float]) -> float:
    gaps = [after - before for before, after in pairwise(times)]
    return statistics.pstdev(gaps) / (statistics.fmean(gaps) or 1.0)


def _gaps(kernels: Sequence[Event]) -> tuple[float, float]:
    """(idle inside launches, idle between launches): time in which no kernel runs. A gap is inside a launch if the
    kernel that ended last before it and the one that starts after it came from one launch."""
    inside_us = between_us = 0.0
    last = kernels[0]
    for event in kernels[1:]:
        gap_us = event.start_us - last.end_us
        if gap_us > 0 and event.correlation == last.correlation:
            inside_us += gap_us
        elif gap_us > 0:
            between_us += gap_us
        if event.end_us > last.end_us:
            last = event
    return inside_us, between_us


def _shares(durations: Iterable[tuple[str, float]], num_steps: int) -> list[Share]:
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, time_us in durations:
        times[short_name(name)].append(time_us)
    total_us = sum(map(sum, times.values())) or 1.0
    shares = [
        Share(name, len(each) / num_steps, sum(each) / len(each), sum(each) / num_steps, sum(each) / total_us)
        for name, each in times.items()
    ]
    return sorted(shares, key=lambda share: -share.us_per_step)
