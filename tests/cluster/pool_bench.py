"""A pool with gangs that are told when to break."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool import GangPool
from tensorweave.cluster.pool_spec import PoolPlan, PoolSpec
from tensorweave.cluster.protocol import GangAddress, KvSource, LinkMeasurement, ModelInfo
from tensorweave.workers.fakes.stepped_loop import run_stepped

_INFO = ModelInfo("fake", 10, 10, "float32", 2, 5)


class FakeGang:
    """`start_error` is raised by its start; `end` makes its watch return."""

    def __init__(self, gang_id: str, epoch: int, start_error: Exception | None, spec: GangSpec = GangSpec()) -> None:  # noqa: B008
        self.gang_id = gang_id
        self.spec = spec
        self.epoch = epoch
        self.address = GangAddress(gang_id, epoch, "both", "127.0.0.1", 1, "s", _INFO)
        self.num_kills = 0
        self.drained_s: float | None = None
        self.becomes_idle = True
        self._start_error = start_error
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> GangAddress:
        if self._start_error is not None:
            raise self._start_error
        return self.address

    async def watch(self) -> str:
        return await asyncio.shield(self._end)

    def end(self, reason: str) -> None:
        self._end.set_result(reason)

    async def measure_link(self, source: KvSource) -> LinkMeasurement:
        raise AssertionError("no KV is exchanged here")

    async def drain(self, timeout_s: float) -> None:
        self.drained_s = timeout_s

    async def quiesce(self, timeout_s: float) -> bool:
        self.drained_s = timeout_s
        return self.becomes_idle

    async def reopen(self) -> None:
        self.drained_s = None

    async def reassign(self, pool: str, slot: int, spec: GangSpec) -> GangAddress:
        self.spec = spec
        self.address = replace(self.address, role=spec.role)
        return self.address

    async def keep_plan(self, plan: PoolPlan) -> None:
        raise AssertionError("pools keep no plan")

    async def kill(self) -> None:
        self.num_kills += 1

    def describe(self) -> dict[str, Any]:
        return {"gang_id": self.gang_id}


class PoolBench:
    """A pool of fake gangs; `errors` are what the next starts raise, in order."""

    def __init__(self, replicas: int = 1, running: Mapping[int, FakeGang] | None = None, **spec: Any) -> None:
        self.gangs: list[FakeGang] = []
        self.errors: list[Exception] = []
        self.now_s = 0.0
        self.failures: list[str] = []
        self._changed = asyncio.Event()
        self.pool = GangPool(
            PoolSpec("p", GangSpec(), replicas, **spec), self._launch, self._note_change, lambda: self.now_s
        )
        self.pool.start(running and {slot: (gang, gang.address) for slot, gang in running.items()})

    def _note_change(self) -> None:
        """`failures` are the pool's, each once."""
        failure = self.pool.failure
        if failure is not None and failure not in self.failures:
            self.failures.append(failure)
        self._changed.set()

    def _launch(self, spec: GangSpec, slot: int, epoch: int) -> FakeGang:
        error = self.errors.pop(0) if self.errors else None
        self.gangs.append(FakeGang(f"p-{slot}.{epoch}", epoch, error, spec))
        return self.gangs[-1]

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    def ids(self) -> list[str]:
        return [address.gang_id for address in self.pool.state.addresses]


def run_pools(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3000.0):
            await body()

    run_stepped(bounded())
