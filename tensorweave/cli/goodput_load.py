"""The load of `tensorweave bench goodput`: steady chats and bursts of long prompts, sent when they are due, whatever
the service does; and which of the answers kept the limits."""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field

from tensorweave.cli.figures import distribution, percentile
from tensorweave.cli.http_stream import RequestFailed, Timeline


@dataclass(frozen=True, slots=True)
class Mix:
    """`long_share` of the requests have long prompts, which come `burst` at a time."""

    chat_input: int
    chat_output: int
    long_input: int
    long_output: int
    long_share: float
    burst: int


@dataclass(frozen=True, slots=True)
class Due:
    """A request that is sent `at_s` seconds after the start."""

    at_s: float
    num_input: int
    num_output: int
    is_long: bool


@dataclass(frozen=True, slots=True)
class LatencyLimits:
    """What a good request keeps."""

    ttft_s: float
    itl_s: float


@dataclass(frozen=True, slots=True)
class Outcome:
    """`first_s` counts from when the request was due. `gaps_s` are the times between its pieces. `failure` is what kind
    of failure it met, if it met one."""

    due: Due
    first_s: float = 0.0
    gaps_s: Sequence[float] = field(default_factory=tuple)
    failure: str | None = None

    def is_good(self, limits: LatencyLimits) -> bool:
        """The first token in time, and 99 % of the others."""
        gaps = sorted(self.gaps_s)
        return (
            self.failure is None
            and self.first_s <= limits.ttft_s
            and (not gaps or percentile(gaps, 99) <= limits.itl_s)
        )


def arrivals(mix: Mix, rate: float, duration_s: float, seed: int) -> list[Due]:
    """A Poisson process of chats, and bursts, with `rate` requests per second together; the same for the same seed.

    There are as many bursts as the rate asks for, each somewhere in its own part of the time: a Poisson process of a
    few would have none at one rate and twice as many at the next.
    """
    draw, due = random.Random(seed), list[Due]()
    chats_per_s = rate * (1 - mix.long_share)
    at_s = draw.expovariate(chats_per_s)
    while at_s < duration_s:
        due.append(Due(at_s, mix.chat_input, mix.chat_output, False))
        at_s += draw.expovariate(chats_per_s)
    num_bursts = round(rate * mix.long_share * duration_s / mix.burst)
    for number in range(num_bursts):
        burst_s = duration_s * (number + draw.random()) / num_bursts
        due += [Due(burst_s, mix.long_input, mix.long_output, True)] * mix.burst
    return sorted(due, key=lambda request: request.at_s)


Row = Mapping[str, float]
Send = Callable[[], Awaitable[Timeline]]


async def run_load(due: Sequence[tuple[Due, Send]]) -> list[Outcome]:
    """Send each request when it is due, and wait for all answers."""
    began_s = time.perf_counter()

    async def one(request: Due, send: Send) -> Outcome:
        await asyncio.sleep(max(0.0, began_s + request.at_s - time.perf_counter()))
        try:
            answer = await send()
        except RequestFailed as failure:
            return Outcome(request, failure=failure.kind)
        gaps_s = tuple(b - a for a, b in itertools.pairwise(answer.piece_s))
        return Outcome(request, answer.piece_s[0] - began_s - request.at_s, gaps_s)

    return await asyncio.gather(*itertools.starmap(one, due))


def figures(
    outcomes: Sequence[Outcome], rate: float, duration_s: float, num_ranks: int, limits: LatencyLimits
) -> dict[str, float]:
    """One row of the table: what share kept the limits, and how many per second and rank."""
    answered = [outcome for outcome in outcomes if outcome.failure is None]
    num_good = sum(outcome.is_good(limits) for outcome in outcomes)
    first_ms = distribution([outcome.first_s for outcome in answered], 1e3)
    gap_ms = distribution([gap for outcome in answered for gap in outcome.gaps_s], 1e3)
    return {
        "rate": rate,
        "requests": len(outcomes),
        "failed": len(outcomes) - len(answered),
        "good share": num_good / max(1, len(outcomes)),
        "good per s and rank": num_good / duration_s / num_ranks,
        "ttft ms p50": first_ms.get("median", 0.0),
        "ttft ms p99": first_ms.get("p99", 0.0),
        "itl ms p50": gap_ms.get("median", 0.0),
        "itl ms p99": gap_ms.get("p99", 0.0),
    }


def best_row(rows: Sequence[Row], share: float) -> Row | None:
    """The row with the highest rate at which at least this share of the requests kept the limits."""
    kept = [row for row in rows if row["good share"] >= share]
    return max(kept, key=lambda row: row["rate"], default=None)
