"""`make_status`: from what the observer has seen to a `Status`."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Final

from tensorweave.router.admin import figures
from tensorweave.router.admin.figures import RouterFigures
from tensorweave.router.admin.observer import Look, Pools, Seen
from tensorweave.router.admin.status import (
    Blocks,
    Faults,
    Gang,
    KvLink,
    Pool,
    PoolEvent,
    Rank,
    RankLink,
    Router,
    Status,
    Transfers,
)
from tensorweave.router.admin.traffic import traffic_between
from tensorweave.router.http.health import judge_health

_NUM_EVENTS: Final = 50
_NO_ROUTERS: Final[Mapping[str, RouterFigures]] = {}
Gauges = Mapping[str, Mapping[str, float]]


def make_status(seen: Seen, *, model: str, version: str, heartbeat_limit_s: float) -> Status:
    now, before = seen.now, seen.before
    health = judge_health(seen.pools, heartbeat_limit_s, has_link=seen.has_ready_gang)
    return Status(
        time_s=now.time_s,
        model=model,
        version=version,
        health="ok" if health.is_healthy else "unavailable",
        reason=seen.trouble or health.reason,
        window_s=None if before is None else now.clock_s - before.clock_s,
        traffic=traffic_between(_NO_ROUTERS if before is None else before.routers, now.routers),
        routers=_routers(seen),
        pools=[_pool(pool, before, now) for pool in seen.pools],
        transfers=_transfers(seen.pools, before, now),
        faults=_faults(seen.pools, now.routers),
        history=list(seen.points),
    )


def _routers(seen: Seen) -> list[Router]:
    return [
        Router(
            name=name,
            report_age_s=age_s,
            num_running=int(seen.now.routers[name].totals.get("num_requests_running", 0)),
            num_waiting=int(seen.now.routers[name].totals.get("num_requests_waiting", 0)),
        )
        for name, (age_s, _) in seen.reports.items()
    ]


# ---- pools


def _pool(pool: dict[str, Any], before: Look | None, now: Look) -> Pool:
    return Pool(
        name=pool["pool"],
        role=pool["role"],
        num_wanted=pool["replicas"],
        num_ready=sum(gang["state"] == "ready" for gang in pool["gangs"]),
        failure=pool["failure"],
        trouble=pool["trouble"],
        notice=pool.get("notice"),
        is_updating=pool.get("is_updating", False),
        update=pool.get("update"),
        pressure=pool.get("pressure"),
        pressure_reason=pool.get("pressure_reason"),
        gangs=[_gang(gang, before, now) for gang in pool["gangs"]],
    )


def _gang(gang: dict[str, Any], before: Look | None, now: Look) -> Gang:
    gang_id = gang.get("gang_id", "")
    gauges = now.gauges.get(gang_id, {})
    link = gang.get("link")
    return Gang(
        gang_id=gang_id,
        state=gang["state"],
        epoch=gang["epoch"],
        reason=gang["reason"],
        starting=gang.get("starting") or None,
        num_running=int(gauges.get("num_requests_running", 0)),
        num_waiting=int(gauges.get("num_requests_waiting", 0)),
        prompt_tokens_per_s=_gang_rate(gang_id, before, now, "computed_prompt_tokens_total"),
        output_tokens_per_s=_gang_rate(gang_id, before, now, "generation_tokens_total"),
        blocks=_blocks(gauges) if "kv_blocks" in gauges else None,
        ranks=[_rank(rank) for rank in gang.get("ranks", ())],
        rank_link=None if link is None else RankLink(**{name: link.get(name) for name in RankLink.model_fields}),
        stage_busy_shares=_stage_shares(gang_id, before, now),
    )


def _blocks(gauges: Mapping[str, float]) -> Blocks:
    return Blocks(
        num_total=int(gauges["kv_blocks"]),
        num_used=int(gauges["kv_blocks_used"]),
        num_cached=int(gauges["kv_blocks_cached"]),
    )


def _rank(rank: dict[str, Any]) -> Rank:
    return Rank(
        rank=rank["rank"],
        host=rank["node_ip"],
        pid=rank["pid"],
        progress_age_s=rank["progress_age_s"],
        num_requests=rank["num_requests"],
        num_open_files=rank["num_open_files"],
        stage=rank.get("stage", 0),
    )


def _stage_shares(gang_id: str, before: Look | None, now: Look) -> list[float | None]:
    names = (f"stage_{stage}_busy_seconds_total" for stage in itertools.count())
    gauges = now.gauges.get(gang_id, {})
    return [_gang_rate(gang_id, before, now, name) for name in itertools.takewhile(gauges.__contains__, names)]


def _gang_rate(gang_id: str, before: Look | None, now: Look, name: str) -> float | None:
    """The rate of a gang's counter; None for a gang that was not there before, or has no such counter."""
    if before is None or gang_id not in before.gauges or name not in now.gauges.get(gang_id, {}):
        return None
    difference = now.gauges[gang_id][name] - before.gauges[gang_id].get(name, 0.0)
    return max(0.0, difference) / (now.clock_s - before.clock_s)


# ---- transfers and faults


def _transfers(pools: Pools, before: Look | None, now: Look) -> Transfers:
    rates = [_gang_rate(gang_id, before, now, "kv_transfer_bytes_total") for gang_id in now.gauges]
    known = [rate for rate in rates if rate is not None]
    return Transfers(
        bytes_per_s=sum(known) if known else None,
        num_bytes=_sum(now.gauges, "kv_transfer_bytes_total"),
        num_blocks=_sum(now.gauges, "kv_transfer_blocks_total"),
        num_failures=_sum(now.gauges, "kv_transfer_failures_"),
        num_open=_sum(now.gauges, "kv_transfer_open_fetches"),
        links=[
            KvLink(source=source, target=gang["gang_id"], **link)
            for pool in pools
            for gang in pool["gangs"]
            for source, link in gang.get("kv_links", {}).items()
        ],
    )


def _sum(gauges: Gauges, prefix: str) -> int:
    return int(sum(value for own in gauges.values() for name, value in own.items() if name.startswith(prefix)))


def _faults(pools: Pools, routers: Mapping[str, RouterFigures]) -> Faults:
    events = [PoolEvent(pool=pool["pool"], **event) for pool in pools for event in pool.get("events", ())]
    events.sort(key=lambda event: -event.time_s)
    return Faults(
        num_gang_faults=sum(pool.get("num_faults", 0) for pool in pools),
        num_retries=int(figures.total(routers, "request_retries_total")),
        num_recovered=int(figures.total(routers, "requests_recovered_total")),
        num_rejected=int(figures.total(routers, "requests_rejected_total")),
        events=events[:_NUM_EVENTS],
    )
