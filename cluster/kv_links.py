"""`KvLinkTable`: what every way from a prefill gang to a decode gang carries, measured once when the pair is up.

The supervisor tells it which gangs are ready; it measures the new pairs one after another, so that they do not disturb
each other, and warns of a slow link. Routers estimate a transfer's time with the figures.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from tensorweave.cluster.pool_gang import PoolGang
from tensorweave.cluster.protocol import GangAddress, LinkMeasurement

logger = logging.getLogger(__name__)

SLOW_BYTES_PER_S: Final = 100e6

ReadyGang = tuple[PoolGang, GangAddress]
Pair = tuple[str, str]
"""Ids of the decode gang and of the prefill gang."""


class KvLinkTable:
    """`on_change` is called on the event loop after each measurement."""

    def __init__(self, on_change: Callable[[], None]) -> None:
        self._on_change = on_change
        self._links: dict[Pair, LinkMeasurement] = {}
        self._waiting: dict[Pair, tuple[PoolGang, GangAddress]] = {}
        self._task: asyncio.Task[None] | None = None

    def update(self, gangs: Sequence[ReadyGang]) -> None:
        """These are ready now: measure what is new, forget what is gone."""
        pairs = dict(_pairs(gangs))
        self._links = {pair: link for pair, link in self._links.items() if pair in pairs}
        self._waiting = {pair: gangs for pair, gangs in pairs.items() if pair not in self._links}
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._measure(), name="kv-links")

    @property
    def all(self) -> dict[Pair, LinkMeasurement]:
        return dict(self._links)

    def describe(self, gang_id: str) -> dict[str, dict[str, Any]]:
        """The links to one decode gang, for health pages."""
        return {prefill: describe_link(link) for (decode, prefill), link in self._links.items() if decode == gang_id}

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _measure(self) -> None:
        while self._waiting:
            pair, (taker, source) = next(iter(self._waiting.items()))
            assert source.kv_source is not None
            link = await taker.measure_link(source.kv_source)
            if self._waiting.pop(pair, None) is not None:
                self._links[pair] = link
                _tell(pair, link)
                self._on_change()


def describe_link(link: LinkMeasurement) -> dict[str, Any]:
    return {
        "megabytes_per_s": round(link.bytes_per_s / 1e6, 1),
        "latency_ms": round(link.latency_s * 1e3, 3),
        "error": link.error,
    }


def _pairs(gangs: Sequence[ReadyGang]) -> Iterator[tuple[Pair, tuple[PoolGang, GangAddress]]]:
    for taker, decode in gangs:
        if decode.role == "decode":
            for _, prefill in gangs:
                if prefill.role == "prefill" and prefill.kv_source is not None:
                    yield (decode.gang_id, prefill.gang_id), (taker, prefill)


def _tell(pair: Pair, link: LinkMeasurement) -> None:
    decode, prefill = pair
    if link.error is not None:
        logger.warning("no KV comes from gang %s to gang %s: %s", prefill, decode, link.error)
        return
    level = logging.WARNING if link.bytes_per_s < SLOW_BYTES_PER_S else logging.INFO
    slow = " (slow: prompts may be computed anew rather than moved)" if level == logging.WARNING else ""
    megabytes_per_s, latency_ms = link.bytes_per_s / 1e6, link.latency_s * 1e3
    logger.log(
        level, "KV from gang %s to gang %s: %.0f MB/s, %.2f ms%s", prefill, decode, megabytes_per_s, latency_ms, slow
    )
