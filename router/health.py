"""Whether the service can answer: a gang's link is open, and its step loop has gone round lately."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.fleet import Fleet


@dataclass(frozen=True, slots=True)
class HealthReport:
    """`pools` is the fleet's description (roles, gangs, ranks, troubles); `reason` says why it is unhealthy, what it
    must do without, or what could not be looked at."""

    is_healthy: bool
    reason: str
    pools: Sequence[dict[str, Any]]

    def body(self) -> dict[str, Any]:
        return {"status": "ok" if self.is_healthy else "unavailable", "reason": self.reason, "pools": self.pools}


async def check_health(fleet: Fleet, heartbeat_limit_s: float) -> HealthReport:
    """An unreachable supervisor alone harms nothing: open links keep working, and a dead leader closes its own."""
    has_link = bool(fleet.links("decode")) or bool(fleet.links("prefill"))
    try:
        pools = await fleet.describe()
    except NotReady as error:
        return HealthReport(has_link, error.message, [])
    if not has_link:
        return HealthReport(False, _why_no_link(pools), pools)
    ages_s = [_progress_age_s(gang) for gang in _gangs(pools)]
    if ages_s and min(ages_s) > heartbeat_limit_s:
        return HealthReport(False, f"no step loop has gone round for {min(ages_s):.1f} s", pools)
    return HealthReport(True, "; ".join(_troubles(pools)), pools)


def first_rank_gauges(pools: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """What each gang's leader shows of its executor, by gang."""
    return {gang["gang_id"]: gang["ranks"][0]["gauges"] for gang in _gangs(pools) if gang.get("ranks")}


def _gangs(pools: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pool in pools:
        yield from pool["gangs"]


def _progress_age_s(gang: dict[str, Any]) -> float:
    """Of the gang's slowest rank; 0 where nothing is known."""
    return max((rank["progress_age_s"] or 0.0 for rank in gang.get("ranks", ())), default=0.0)


def _why_no_link(pools: Sequence[dict[str, Any]]) -> str:
    troubles = [
        f"pool {pool['pool']}: {pool.get('failure') or pool.get('trouble') or 'no gang is connected'}" for pool in pools
    ]
    return "; ".join(troubles) or "no gang is connected"


def _troubles(pools: Sequence[dict[str, Any]]) -> list[str]:
    """Pools that have no gang ready, while others carry on: what ails them."""
    return [
        f"pool {pool['pool']}: {pool.get('failure') or pool.get('trouble') or 'no gang is ready'}"
        for pool in pools
        if not any(gang.get("state", "ready") == "ready" for gang in pool["gangs"])
    ]
