"""Finds the gangs that were running when a supervisor restarted, and what it wanted of them, and resumes them."""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.gang import Gang
from tensorweave.cluster.gang_record import GangRecord
from tensorweave.cluster.placement import NamedGroup, find_groups
from tensorweave.cluster.pool_spec import PoolPlan
from tensorweave.cluster.rank_actors import rank_name
from tensorweave.cluster.rank_watch import result_within

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S: Final = 10.0


async def find_running(
    prefix: str, plan: PoolPlan, worker_class: type[Any], namespace: str
) -> tuple[PoolPlan, list[tuple[GangRecord, Gang]]]:
    """Resume the gangs whose placement groups' names start with `prefix`, and which belong to a pool of the plan: the
    latest that one of them has kept, else `plan`. Remove the groups of all others, which ends their ranks."""
    groups = await asyncio.to_thread(find_groups, prefix)
    kept = await asyncio.gather(*(_read_record(group, namespace) for group in groups))
    plan = max([plan, *(own for _, own in kept)], key=lambda each: each.version)
    roles = {spec.name: spec.gang.role for spec in plan.specs}
    taken: set[tuple[str, int]] = set()
    running = []
    for group, (record, _) in zip(groups, kept, strict=True):
        gang = None
        if record is not None and roles.get(record.pool) == record.spec.role and _place(record) not in taken:
            gang = await asyncio.to_thread(_resume, record, worker_class, group, namespace)
        if record is not None and gang is not None and await _is_open(gang):
            taken.add(_place(record))
            running.append((record, gang))
            logger.warning("resuming gang %s", gang.gang_id)
        else:
            logger.warning("removing %s of an earlier supervisor", group.name)
            await asyncio.to_thread(remove_placement_group, group.group)
    return plan, running


def _place(record: GangRecord) -> tuple[str, int]:
    return record.pool, record.slot


async def _is_open(gang: Gang) -> bool:
    """It may have been draining."""
    try:
        await gang.reopen()
    except WorkerLost as error:
        logger.warning("%s", error.message)
        return False
    return True


def _resume(record: GangRecord, worker_class: type[Any], group: NamedGroup, namespace: str) -> Gang | None:
    try:
        return Gang.resume(record, worker_class, group, namespace)
    except ValueError as error:
        logger.warning("gang %s has lost a rank: %s", record.address.gang_id, error)
        return None


async def _read_record(group: NamedGroup, namespace: str) -> tuple[GangRecord | None, PoolPlan]:
    """No record if its rank 0 has ended, does not answer, or was not ready."""
    if not group.is_placed:
        return None, PoolPlan()
    try:
        leader = await asyncio.to_thread(ray.get_actor, rank_name(group.name, 0), namespace)
        record: GangRecord | None = await result_within(leader.record.remote(), _ANSWER_TIMEOUT_S)
        plan: PoolPlan = await result_within(leader.kept_plan.remote(), _ANSWER_TIMEOUT_S)
    except (ValueError, RayError, TimeoutError):
        return None, PoolPlan()
    return record, plan
