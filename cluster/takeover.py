"""Finds the gangs that were running when a supervisor restarted, and resumes those that match its specs."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Final

import ray
from ray.exceptions import RayError
from ray.util.placement_group import remove_placement_group

from tensorweave.cluster.gang import Gang
from tensorweave.cluster.gang_record import GangRecord
from tensorweave.cluster.placement import NamedGroup, find_groups
from tensorweave.cluster.pool import PoolSpec
from tensorweave.cluster.rank_actors import rank_name

logger = logging.getLogger(__name__)

_ANSWER_TIMEOUT_S: Final = 10.0


async def find_running(
    prefix: str, specs: Sequence[PoolSpec], worker_class: type[Any], namespace: str
) -> list[tuple[GangRecord, Gang]]:
    """Resume the gangs whose placement groups' names start with `prefix` and that match `specs`. Remove the groups of
    all others, which ends their ranks."""
    groups = await asyncio.to_thread(find_groups, prefix)
    records = await asyncio.gather(*(_read_record(group, namespace) for group in groups))
    wanted = {(spec.name, slot): spec for spec in specs for slot in range(spec.replicas)}
    running = []
    for group, record in zip(groups, records, strict=True):
        gang = None
        if record is not None and (spec := wanted.get((record.pool, record.slot))) and spec.gang == record.spec:
            gang = await asyncio.to_thread(_resume, record, worker_class, group, namespace)
        if record is not None and gang is not None:
            del wanted[record.pool, record.slot]
            running.append((record, gang))
            logger.warning("resuming gang %s", gang.gang_id)
        else:
            logger.warning("removing %s of an earlier supervisor", group.name)
            await asyncio.to_thread(remove_placement_group, group.group)
    return running


def _resume(record: GangRecord, worker_class: type[Any], group: NamedGroup, namespace: str) -> Gang | None:
    try:
        return Gang.resume(record, worker_class, group, namespace)
    except ValueError as error:
        logger.warning("gang %s has lost a rank: %s", record.address.gang_id, error)
        return None


async def _read_record(group: NamedGroup, namespace: str) -> GangRecord | None:
    """None if its rank 0 has ended, does not answer, or was not ready."""
    if not group.is_placed:
        return None
    try:
        leader = await asyncio.to_thread(ray.get_actor, rank_name(group.name, 0), namespace)
        async with asyncio.timeout(_ANSWER_TIMEOUT_S):
            record: GangRecord | None = await leader.record.remote()
    except (ValueError, RayError, TimeoutError):
        return None
    return record
