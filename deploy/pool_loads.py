"""`PoolLoads`: what routers and gangs report, as the pressure on each pool."""

from __future__ import annotations

import collections
from collections.abc import Mapping, Sequence
from typing import Any, Final

from tensorweave.cluster.router_report import RouterReport
from tensorweave.deploy.config import ServeConfig
from tensorweave.deploy.scaling import PoolLoad
from tensorweave.router.admin.figures import RouterFigures
from tensorweave.router.admin.status import Traffic
from tensorweave.router.admin.traffic import traffic_between

_FULL_SHARE: Final = 0.95
"""Of a gang's KV blocks: with more in use, sequences are paused."""

Routers = Mapping[str, RouterFigures]
Measured = tuple[float, str]
"""A ratio to the target, and what it is of."""


class PoolLoads:
    """Keeps the routers' figures of the latest `window_s`."""

    def __init__(self) -> None:
        self._looks: collections.deque[tuple[float, Routers]] = collections.deque()

    def measure(
        self,
        config: ServeConfig,
        pools: Sequence[dict[str, Any]],
        reports: Mapping[str, tuple[float, RouterReport]],
        now_s: float,
    ) -> list[PoolLoad]:
        """`pools` are described by the supervisor, `reports` are by router."""
        now = {name: RouterFigures.of(report) for name, (_, report) in reports.items()}
        self._looks.append((now_s, now))
        while len(self._looks) > 2 and self._looks[1][0] <= now_s - config.scaling.window_s:
            self._looks.popleft()
        traffic = traffic_between(self._looks[0][1], now)
        return [_load(pool, config, traffic) for pool in pools]


def _load(pool: dict[str, Any], config: ServeConfig, traffic: Traffic) -> PoolLoad:
    ready = [gang for gang in pool["gangs"] if gang["state"] == "ready"]
    gauges = [gang["ranks"][0]["gauges"] for gang in ready if gang.get("ranks")]
    measured = _of_prompts(pool["role"], gauges, config, traffic) + _of_decoding(pool["role"], gauges, config, traffic)
    pressure, reason = max(measured, default=(0.0, ""))
    own = config.pools.get(pool["pool"])
    return PoolLoad(
        name=pool["pool"],
        role=pool["role"],
        num_gangs=len(ready),
        pressure=pressure,
        reason=reason,
        is_settled=len(ready) == len(pool["gangs"]) == pool["replicas"],
        min_gangs=None if own is None else own.min_replicas,
        max_gangs=None if own is None else own.max_replicas,
    )


def _of_prompts(
    role: str, gauges: Sequence[Mapping[str, float]], config: ServeConfig, traffic: Traffic
) -> list[Measured]:
    if role not in ("prefill", "both"):
        return []
    target_s, target_waiting = config.scaling.target_ttft_s, config.scaling.target_waiting
    ttft_s = traffic.time_to_first_token.p90_s or 0.0
    waiting = sum(each.get("num_requests_waiting", 0.0) for each in gauges) / max(1, len(gauges))
    return [
        (ttft_s / target_s, f"TTFT p90 {ttft_s:.3g} s of {target_s:g} s"),
        (waiting / target_waiting, f"{waiting:.1f} sequences wait per gang, of {target_waiting:g}"),
    ]


def _of_decoding(
    role: str, gauges: Sequence[Mapping[str, float]], config: ServeConfig, traffic: Traffic
) -> list[Measured]:
    """At a decode gang, sequences also wait for the prefill gang: that is not its own load."""
    if role not in ("decode", "both"):
        return []
    target_s = config.scaling.target_itl_s
    itl_s = traffic.inter_token_latency.p90_s or 0.0
    used = sum(each.get("kv_blocks_used", 0.0) for each in gauges)
    share = used / max(1.0, sum(each.get("kv_blocks", 0.0) for each in gauges))
    return [
        (itl_s / target_s, f"ITL p90 {itl_s * 1e3:.3g} ms of {target_s * 1e3:g} ms"),
        (share / _FULL_SHARE, f"{share:.0%} of the KV blocks in use"),
    ]
