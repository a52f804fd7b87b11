"""Whether ranks died because their host ran out of memory, by the kernel's count of such kills or by Ray's message.

A rank that the kernel kills leaves no message, and Ray reports only that its connection ended. Each host counts these
kills; if the count has increased since the rank started, that explains its death.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from tensorweave.cluster.host_memory import oom_kills
from tensorweave.cluster.ranks import RankPlace

_CALL_TIMEOUT_S: Final = 10.0
_RAY_PHRASES: Final = ("low on memory", "OutOfMemory")


def is_memory_kill(error: RayError) -> bool:
    """Whether the error says that Ray's memory monitor has killed the actor."""
    return any(phrase in str(error) for phrase in _RAY_PHRASES)


def describe_local_kills(places: Sequence[RankPlace]) -> str:
    """A remark if a rank on our own host may have been killed; other hosts are not asked."""
    here = ray.get_runtime_context().get_node_id()
    return _remark([place for place in places if place.node_id == here and oom_kills() > place.oom_kills])


async def describe_kills(places: Sequence[RankPlace]) -> str:
    """The same for the ranks of all hosts. A host that does not answer in time is ignored."""
    first = {place.node_id: place for place in reversed(places)}.values()
    counts = await asyncio.gather(*(_count_kills(place.node_id) for place in first))
    return _remark([place for place, count in zip(first, counts, strict=True) if count > place.oom_kills])


async def _count_kills(node_id: str) -> int:
    if node_id == ray.get_runtime_context().get_node_id():
        return oom_kills()
    on_node = NodeAffinitySchedulingStrategy(node_id, soft=False)
    counting = ray.remote(oom_kills).options(num_cpus=0, max_retries=0, scheduling_strategy=on_node)
    try:
        async with asyncio.timeout(_CALL_TIMEOUT_S):
            return int(await counting.remote())
    except (RayError, TimeoutError):
        return 0


def _remark(places: Sequence[RankPlace]) -> str:
    if not places:
        return ""
    killed = "the kernel has killed processes on its host for lack of memory since it started"
    return f"; {killed}: the model or its KV cache is too large"
