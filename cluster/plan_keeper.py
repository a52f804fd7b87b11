"""`PlanKeeper`: has every gang keep the supervisor's plan, so that a successor goes on from it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from tensorweave.cluster.errors import TensorweaveError
from tensorweave.cluster.pool_spec import PoolPlan, PoolSpec

logger = logging.getLogger(__name__)


class PlanGang(Protocol):
    gang_id: str

    async def keep_plan(self, plan: PoolPlan) -> None: ...


class PlanKeeper:
    """Plain asyncio. A gang that is lost meanwhile needs no plan."""

    def __init__(self, plan: PoolPlan) -> None:
        self.plan = plan
        self._held: dict[str, int] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    def deploy(self, specs: Sequence[PoolSpec], generation: int, config: Mapping[str, Any]) -> None:
        self._change(replace(self.plan, specs=tuple(specs), generation=generation, config=config))

    def update(self, sizes: Mapping[str, int], gangs: Sequence[PlanGang]) -> None:
        """The sizes of the pools, and the gangs that are ready."""
        self._change(replace(self.plan, sizes=dict(sizes)))
        self._held = {gang.gang_id: self._held.get(gang.gang_id, 0) for gang in gangs}
        for gang in gangs:
            if self._held[gang.gang_id] != self.plan.version:
                self._held[gang.gang_id] = self.plan.version
                task = asyncio.create_task(self._tell(gang, self.plan))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    def _change(self, plan: PoolPlan) -> None:
        if plan != self.plan:
            self.plan = replace(plan, version=max(time.time_ns(), self.plan.version + 1))

    async def _tell(self, gang: PlanGang, plan: PoolPlan) -> None:
        try:
            await gang.keep_plan(plan)
        except TensorweaveError as error:
            logger.warning("the plan is not kept: %s", error.message)
            self._held.pop(gang.gang_id, None)
