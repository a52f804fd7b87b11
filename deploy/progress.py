"""What a driver reports while it starts and keeps a service: lines on standard error about its pools and links."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Final

from tensorweave.cluster.kv_links import SLOW_BYTES_PER_S

PROGRESS_LOGGER: Final = "tensorweave.progress"


def report(line: str) -> None:
    """`deploy.driver_log` writes it to standard error."""
    logging.getLogger(PROGRESS_LOGGER).info("%s", line)


class PoolReporter:
    """Prints the pools' state whenever it has changed."""

    def __init__(self) -> None:
        self.last_line = ""

    def __call__(self, pools: Sequence[dict[str, Any]]) -> None:
        line = "; ".join(_pool_line(pool) for pool in pools)
        if line and line != self.last_line:
            report(line)
            self.last_line = line


def report_links(pools: Sequence[dict[str, Any]]) -> None:
    """Report what the self-test measured on the links from prefill to decode gangs."""
    for gang in (gang for pool in pools for gang in pool["gangs"]):
        for source, link in gang.get("kv_links", {}).items():
            if link["error"]:
                report(f"no KV from {source} to {gang['gang_id']}, which computes prompts itself: {link['error']}")
            else:
                rate = f"{link['megabytes_per_s']:.0f} MB/s, {link['latency_ms']:.2f} ms, from {link['address']}"
                is_slow = link["megabytes_per_s"] * 1e6 < SLOW_BYTES_PER_S
                report(f"KV from {source} to {gang['gang_id']}: {rate}" + (", a slow link" if is_slow else ""))


def _pool_line(pool: dict[str, Any]) -> str:
    gangs = ", ".join(map(_gang_line, pool["gangs"]))
    is_whole = all(gang["state"] == "ready" for gang in pool["gangs"])
    return f"pool {pool['pool']}: {gangs}" + (f" ({pool['trouble']})" if pool["trouble"] and not is_whole else "")


def _gang_line(gang: dict[str, Any]) -> str:
    line = f"{gang.get('gang_id', 'gang')} {gang['state']}"
    return f"{line} [{gang['starting']}]" if gang.get("starting") else line
