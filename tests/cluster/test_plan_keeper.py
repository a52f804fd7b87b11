"""Every ready gang keeps the latest plan, and a successor goes on from the latest."""

from __future__ import annotations

import asyncio

from tensorweave.cluster.errors import WorkerLost
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.plan_keeper import PlanKeeper
from tensorweave.cluster.pool_spec import PoolPlan, PoolSpec
from tensorweave.cluster.resource_requests import Bundles, ResourceRequests, Selectors

_SPECS = (PoolSpec("main", GangSpec()),)


class _Gang:
    def __init__(self, gang_id: str) -> None:
        self.gang_id = gang_id
        self.plans: list[PoolPlan] = []
        self.is_lost = False

    async def keep_plan(self, plan: PoolPlan) -> None:
        if self.is_lost:
            raise WorkerLost("rank 0 does not answer")
        self.plans.append(plan)


def test_gangs_hear_of_each_change_once() -> None:
    async def run() -> None:
        keeper, first, second = PlanKeeper(PoolPlan(specs=_SPECS)), _Gang("a"), _Gang("b")
        for gangs in ([first], [first], [first, second]):
            keeper.update({"main": 1}, gangs)
            await asyncio.sleep(0)
        assert first.plans == second.plans == [keeper.plan]
        keeper.deploy(_SPECS, 7, {"model": "m"})
        keeper.update({"main": 2}, [first, second])
        await asyncio.sleep(0)
        plan = first.plans[-1]
        assert (plan.generation, plan.sizes, plan.config) == (7, {"main": 2}, {"model": "m"})
        assert plan.version > first.plans[0].version > 0
        first.is_lost = True
        keeper.update({"main": 3}, [first, second])
        await asyncio.sleep(0)
        first.is_lost = False
        keeper.update({"main": 3}, [first, second])
        await asyncio.sleep(0)
        assert first.plans[-1] == second.plans[-1] == keeper.plan, "it is told again"

    asyncio.run(run())


def test_the_autoscaler_is_asked_for_all_gangs_and_for_none_at_the_end() -> None:
    asked: list[tuple[Bundles, Selectors]] = []

    def ask(bundles: Bundles, selectors: Selectors) -> bool:
        asked.append((bundles, selectors))
        return True

    async def run() -> None:
        requests = ResourceRequests(ask)
        requests.update([(GangSpec(), 2), (GangSpec(cpus_per_rank=3.0), 1)])
        requests.update([(GangSpec(), 2), (GangSpec(cpus_per_rank=3.0), 1)])
        await requests.withdraw()

    asyncio.run(run())
    assert asked[-1] == ([], [])
    assert all(bundles in ([{"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 3.0}], []) for bundles, _ in asked)
    assert len(asked) <= 2
