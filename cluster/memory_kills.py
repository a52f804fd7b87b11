"""Whether ranks died because their host ran out of memory: by the kernel's count of such kills, or by Ray's own word.

A rank that the kernel kills leaves no message, and Ray says only that its connection ended. Each host counts the kills;
a count that has grown since the rank came up is the explanation.
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

_ASK_TIMEOUT_S: Final = 10.0
_RAYS_WORDS: Final = ("low on memory", "OutOfMemory")


def is_memory_kill(error: RayError) -> bool:
    """Whether Ray's memory monitor has killed it, and says so."""
    return any(words in str(error) for words in _RAYS_WORDS)


def describe_local_kills(places: Sequence[RankPlace]) -> str:
    """A remark on those of the ranks that are on our own host: nothing waits for it."""
    here = ray.get_runtime_context().get_node_id()
    return _remark([place for place in places if place.node_id == here and oom_kills() > place.oom_kills])


async def describe_kills(places: Sequence[RankPlace]) -> str:
    """The same of all hosts, which are asked; one that does not answer in time is left out."""
    first = {place.node_id: place for place in reversed(places)}.values()
    counts = await asyncio.gather(*(_ask(place.node_id) for place in first))
    return _remark([place for place, count in zip(first, counts, strict=True) if count > place.oom_kills])


async def _ask(node_id: str) -> int:
    if node_id == ray.get_runtime_context().get_node_id():
        return oom_kills()
    there = NodeAffinitySchedulingStrategy(node_id, soft=False)
    counting = ray.remote(oom_kills).options(num_cpus=0, max_retries=0, scheduling_strategy=there)
    try:
        async with asyncio.timeout(_ASK_TIMEOUT_S):
            return int(await counting.remote())
    except (RayError, TimeoutError):
        return 0


def _remark(places: Sequence[RankPlace]) -> str:
    if not places:
        return ""
    return "; the kernel has killed for want of memory on its host meanwhile: the model or its KV cache is too large"
