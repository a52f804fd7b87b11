"""`KvLinkTable`: the rate of the link from each prefill gang to each decode gang, measured once both are ready.

The supervisor updates it with the gangs that are ready. It measures new pairs one after another, so that they do not
affect each other, tries again those that fail, as one with a gang that stands still for seconds does, and warns of slow
links. Routers estimate the time of a transfer from the measurements. With many prefill gangs, each decode gang is
measured with `MAX_SOURCES` of them, so that the number of pairs grows with that of the gangs and not with its square.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any, Final

from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.protocol import GangAddress, KvSource, LinkMeasurement

logger = logging.getLogger(__name__)

SLOW_BYTES_PER_S: Final = 100e6
MAX_SOURCES: Final = 16
_TOLD_SHARE: Final = 16
"""A change is told after each sixteenth of the pairs: all front ends are sent all of them each time."""
RETRY_AFTER_S: Final = (1.0, 5.0, 25.0)
"""A pair whose measurement fails is measured again after these pauses. What fails then stays so until a gang is new."""

ReadyGang = tuple[PoolGang, GangAddress]
Pair = tuple[str, str]
"""Ids of the decode gang and of the prefill gang."""


class KvLinkTable:
    """`on_change` is called on the event loop after measurements."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._links: dict[str, dict[str, LinkMeasurement]] = {}
        """By decode gang, then by prefill gang."""
        self._receivers: dict[str, PoolGang] = {}
        self._sources: dict[str, KvSource] = {}
        self._waiting: dict[Pair, None] = {}
        self._num_failed: dict[Pair, int] = {}
        self._retries: dict[Pair, asyncio.TimerHandle] = {}
        self._task: asyncio.Task[None] | None = None

    def update(self, gangs: Sequence[ReadyGang]) -> None:
        """Set the gangs that are ready: measure new pairs, and forget pairs of other gangs."""
        receivers = {address.gang_id: gang for gang, address in gangs if address.role == "decode"}
        sources = {
            address.gang_id: address.kv_source
            for _, address in gangs
            if address.role == "prefill" and address.kv_source is not None
        }
        if receivers == self._receivers and sources == self._sources:
            return
        self._receivers, self._sources = receivers, sources
        self._links = {
            decode: {prefill: link for prefill, link in self._links.get(decode, {}).items() if prefill in sources}
            for decode in receivers
        }
        again = [pair for pair in self._waiting if self._is_known(pair)]
        self._waiting = dict.fromkeys([*self._missing(), *again])
        self._num_failed = {pair: count for pair, count in self._num_failed.items() if self._is_known(pair)}
        self._start()

    @property
    def all(self) -> dict[Pair, LinkMeasurement]:
        return {(decode, prefill): link for decode, links in self._links.items() for prefill, link in links.items()}

    def describe(self, gang_id: str) -> dict[str, dict[str, Any]]:
        """The links to one decode gang, for health pages."""
        return {
            prefill: {**describe_link(link), "address": self._sources[prefill].endpoints[0].host}
            for prefill, link in self._links.get(gang_id, {}).items()
        }

    def close(self) -> None:
        for retry in self._retries.values():
            retry.cancel()
        if self._task is not None:
            self._task.cancel()

    def _is_known(self, pair: Pair) -> bool:
        """Whether it was measured, and both gangs are still ready."""
        return pair[1] in self._links.get(pair[0], {})

    def _start(self) -> None:
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._measure(), name="kv-links")

    def _missing(self) -> list[Pair]:
        """The pairs to measure. Decode gangs begin at different prefill gangs, so that not all read from the same."""
        sources = list(self._sources)
        pairs: list[Pair] = []
        for number, (decode, known) in enumerate(self._links.items()):
            start = number * MAX_SOURCES % len(sources) if len(sources) > MAX_SOURCES else 0
            unknown = [prefill for prefill in (*sources[start:], *sources[:start]) if prefill not in known]
            pairs += [(decode, prefill) for prefill in unknown[: max(0, MAX_SOURCES - len(known))]]
        return pairs

    async def _measure(self) -> None:
        num_untold = 0
        while self._waiting:
            pair = decode, prefill = next(iter(self._waiting))
            link = await self._receivers[decode].measure_link(self._sources[prefill])
            if pair not in self._waiting:
                continue
            del self._waiting[pair]
            if self._links[decode].get(prefill) != link:
                _log_measurement(pair, link)
            self._links[decode][prefill] = link
            self._plan_retry(pair, link)
            num_untold += 1
            if not self._waiting or num_untold * _TOLD_SHARE >= sum(map(len, self._links.values())):
                num_untold = 0
                self._on_change()

    def _plan_retry(self, pair: Pair, link: LinkMeasurement) -> None:
        if link.error is None:
            self._num_failed.pop(pair, None)
            return
        self._num_failed[pair] = count = self._num_failed.get(pair, 0) + 1
        if count <= len(RETRY_AFTER_S) and pair not in self._retries:
            pause_s = RETRY_AFTER_S[count - 1]
            self._retries[pair] = asyncio.get_running_loop().call_later(pause_s, self._retry, pair)

    def _retry(self, pair: Pair) -> None:
        del self._retries[pair]
        if self._is_known(pair) and pair in self._num_failed:
            self._waiting[pair] = None
            self._start()


def describe_link(link: LinkMeasurement) -> dict[str, Any]:
    return {
        "megabytes_per_s": round(link.bytes_per_s / 1e6, 1),
        "latency_ms": round(link.latency_s * 1e3, 3),
        "error": link.error,
        "transport": link.transport,
        "shortfall": link.shortfall,
    }


def _log_measurement(pair: Pair, link: LinkMeasurement) -> None:
    decode, prefill = pair
    if link.error is not None:
        logger.warning("no KV can be sent from gang %s to gang %s: %s", prefill, decode, link.error)
        return
    slow = " (slow: prompts may be recomputed rather than transferred)" if link.bytes_per_s < SLOW_BYTES_PER_S else ""
    notes = (f" over {link.transport}" if link.transport else "") + slow
    notes += f" ({link.shortfall})" if link.shortfall else ""
    level = logging.WARNING if slow or link.shortfall else logging.INFO
    megabytes_per_s, latency_ms = link.bytes_per_s / 1e6, link.latency_s * 1e3
    logger.log(
        level, "KV from gang %s to gang %s: %.0f MB/s, %.2f ms%s", prefill, decode, megabytes_per_s, latency_ms, notes
    )
