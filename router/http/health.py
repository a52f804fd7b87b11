"""Whether the service can answer: some gang that answers is connected, and its step loop has run recently."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.fleet import Fleet

_STAGES_OWN: Final = "stage_"
# Each rank fetches its own heads, so each counts its own transfers.
_RANKS_OWN: Final = ("kv_transfer_bytes_", "kv_transfer_blocks_", "kv_transfer_refetched_", "kv_transfer_failures_")


@dataclass(frozen=True, slots=True)
class HealthReport:
    """`pools` is the fleet's description (roles, gangs, ranks, troubles). `reason`: why the service is unhealthy, what
    it lacks while it is healthy, or what could not be checked."""

    is_healthy: bool
    reason: str
    pools: Sequence[dict[str, Any]]

    def body(self) -> dict[str, Any]:
        """For the admin port."""
        return {**self.public_body(), "reason": self.reason, "pools": self.pools}

    def public_body(self) -> dict[str, Any]:
        """For clients: without hosts, processes and paths."""
        return {"status": "ok" if self.is_healthy else "unavailable"}


async def check_health(fleet: Fleet, heartbeat_limit_s: float) -> HealthReport:
    """An unreachable supervisor alone does no harm: open links keep working, and a dead leader's link closes."""
    has_link = bool(fleet.links("decode") or fleet.links("prefill") or fleet.links("embed"))
    try:
        pools = await fleet.last_description()
    except NotReady as error:
        return HealthReport(has_link, error.message, [])
    return judge_health(pools, heartbeat_limit_s, has_link=has_link)


def judge_health(pools: Sequence[dict[str, Any]], heartbeat_limit_s: float, *, has_link: bool) -> HealthReport:
    """`has_link`: whether a gang can be reached."""
    if not has_link:
        return HealthReport(False, _why_no_link(pools), pools)
    ages_s = [_progress_age_s(gang) for gang in _answering(pools)]
    if ages_s and min(ages_s) > heartbeat_limit_s:
        return HealthReport(False, f"no step loop has made progress for {min(ages_s):.1f} s", pools)
    notices = dict.fromkeys(pool["notice"] for pool in pools if pool.get("notice"))
    remarks = [*_troubles(pools), *_stuck(pools, heartbeat_limit_s), *_slow(pools), *notices]
    return HealthReport(True, "; ".join(remarks), pools)


def gang_gauges(pools: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The gauges of each gang's leader, by gang; KV transfer counts are summed over all ranks, and those of a pipeline
    stage, which have its number in their names, are added."""
    return {gang["gang_id"]: _of_all_ranks(gang["ranks"]) for gang in _gangs(pools) if gang.get("ranks")}


def _of_all_ranks(ranks: Sequence[dict[str, Any]]) -> dict[str, float]:
    leader: dict[str, float] = ranks[0]["gauges"]
    stages = {name: value for rank in ranks for name, value in rank["gauges"].items() if name.startswith(_STAGES_OWN)}
    return stages | {
        name: sum(rank["gauges"].get(name, 0.0) for rank in ranks) if name.startswith(_RANKS_OWN) else value
        for name, value in leader.items()
    }


def _gangs(pools: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for pool in pools:
        yield from pool["gangs"]


def _answering(pools: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The ready gangs that decode; if there are none, the prefill gangs."""
    ready = [
        (pool.get("role", "both"), gang)
        for pool in pools
        for gang in pool["gangs"]
        if gang.get("state", "ready") == "ready"
    ]
    return [gang for role, gang in ready if role != "prefill"] or [gang for _, gang in ready]


def _stuck(pools: Sequence[dict[str, Any]], limit_s: float) -> list[str]:
    """Gangs whose step loop stands still while others run."""
    ages_s = {gang.get("gang_id", "?"): _progress_age_s(gang) for gang in _gangs(pools)}
    return [
        f"gang {gang_id}: its step loop has made no progress for {age_s:.1f} s"
        for gang_id, age_s in ages_s.items()
        if age_s > limit_s
    ]


def _slow(pools: Sequence[dict[str, Any]]) -> list[str]:
    """Gangs with a slow link between their ranks."""
    links = {gang.get("gang_id", "?"): gang.get("link", {}) for gang in _gangs(pools)}
    return [f"gang {gang_id}: {link['slow']}" for gang_id, link in links.items() if link.get("slow")]


def _progress_age_s(gang: dict[str, Any]) -> float:
    """The age of the progress of the gang's slowest rank; 0 if nothing is known."""
    return max((rank["progress_age_s"] or 0.0 for rank in gang.get("ranks", ())), default=0.0)


def _why_no_link(pools: Sequence[dict[str, Any]]) -> str:
    troubles = [
        f"pool {pool['pool']}: {pool.get('failure') or pool.get('trouble') or 'no gang is connected'}" for pool in pools
    ]
    return "; ".join(troubles) or "no gang is connected"


def _troubles(pools: Sequence[dict[str, Any]]) -> list[str]:
    """Why pools lack gangs."""
    return [trouble for pool in pools if (trouble := _trouble(pool))]


def _trouble(pool: dict[str, Any]) -> str | None:
    num_ready = sum(gang.get("state", "ready") == "ready" for gang in pool["gangs"])
    if not num_ready:
        return f"pool {pool['pool']}: {pool.get('failure') or pool.get('trouble') or 'no gang is ready'}"
    reasons = dict.fromkeys(gang["reason"] for gang in pool["gangs"] if gang.get("reason"))
    return f"pool {pool['pool']}: {num_ready} of {len(pool['gangs'])} gangs: {'; '.join(reasons)}" if reasons else None
