"""`KvLinkTable`: the rate of the link from each prefill gang to each decode gang, measured once both are ready.

The supervisor updates it with the gangs that are ready. It measures new pairs one after another, so that they do not
affect each other, and warns of slow links. Routers estimate the time of a transfer from the measurements.
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
        self._addresses: dict[str, str] = {}
        self._waiting: dict[Pair, tuple[PoolGang, GangAddress]] = {}
        self._task: asyncio.Task[None] | None = None

    def update(self, gangs: Sequence[ReadyGang]) -> None:
        """Set the gangs that are ready: measure new pairs, and forget pairs of other gangs."""
        pairs = dict(_pairs(gangs))
        self._links = {pair: link for pair, link in self._links.items() if pair in pairs}
        self._addresses = {address.gang_id: _address_of(address) for _, address in gangs}
        self._waiting = {pair: gangs for pair, gangs in pairs.items() if pair not in self._links}
        if self._waiting and (self._task is None or self._task.done()):
            self._task = asyncio.create_task(self._measure(), name="kv-links")

    @property
    def all(self) -> dict[Pair, LinkMeasurement]:
        return dict(self._links)

    def describe(self, gang_id: str) -> dict[str, dict[str, Any]]:
        """The links to one decode gang, for health pages."""
        return {
            prefill: {**describe_link(link), "address": self._addresses.get(prefill, "")}
            for (decode, prefill), link in self._links.items()
            if decode == gang_id
        }

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _measure(self) -> None:
        while self._waiting:
            pair, (receiver, sender) = next(iter(self._waiting.items()))
            assert sender.kv_source is not None
            link = await receiver.measure_link(sender.kv_source)
            if self._waiting.pop(pair, None) is not None:
                self._links[pair] = link
                _log_measurement(pair, link)
                self._on_change()


def describe_link(link: LinkMeasurement) -> dict[str, Any]:
    return {
        "megabytes_per_s": round(link.bytes_per_s / 1e6, 1),
        "latency_ms": round(link.latency_s * 1e3, 3),
        "error": link.error,
        "transport": link.transport,
        "shortfall": link.shortfall,
    }


def _address_of(gang: GangAddress) -> str:
    """Where other gangs read the KV of its first rank; empty if it sends none."""
    return "" if gang.kv_source is None else gang.kv_source.endpoints[0].host


def _pairs(gangs: Sequence[ReadyGang]) -> Iterator[tuple[Pair, tuple[PoolGang, GangAddress]]]:
    for receiver, decode in gangs:
        if decode.role == "decode":
            for _, prefill in gangs:
                if prefill.role == "prefill" and prefill.kv_source is not None:
                    yield (decode.gang_id, prefill.gang_id), (receiver, prefill)


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
