"""A pool keeps its gangs alive: replacement, back-off, giving up, draining; with gangs that are told when to break."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from tensorweave.cluster.errors import NotReady, TensorweaveError, WorkerLost
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool import GangPool, PoolSpec
from tensorweave.cluster.protocol import GangAddress, KvRoad, KvSource, ModelInfo
from tests.router.stepped_loop import run_stepped

_INFO = ModelInfo("fake", 10, 10, "float32", 2, 5)


class _FakeGang:
    """`start_error` is raised by its start; `end` makes its watch return."""

    def __init__(self, gang_id: str, epoch: int, start_error: Exception | None) -> None:
        self.gang_id = gang_id
        self.epoch = epoch
        self.num_kills = 0
        self.drained_s: float | None = None
        self._start_error = start_error
        self._end: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def start(self) -> GangAddress:
        if self._start_error is not None:
            raise self._start_error
        return GangAddress(self.gang_id, self.epoch, "both", "127.0.0.1", 1, "s", _INFO)

    async def watch(self) -> str:
        return await self._end

    def end(self, reason: str) -> None:
        self._end.set_result(reason)

    async def measure_road(self, source: KvSource) -> KvRoad:
        raise AssertionError("no KV is exchanged here")

    async def drain(self, timeout_s: float) -> None:
        self.drained_s = timeout_s

    async def kill(self) -> None:
        self.num_kills += 1

    def describe(self) -> dict[str, Any]:
        return {"gang_id": self.gang_id}


class _Bench:
    """A pool of fake gangs; `errors` are what the next starts raise, in order."""

    def __init__(self, replicas: int = 1, **spec: Any) -> None:
        self.gangs: list[_FakeGang] = []
        self.errors: list[Exception] = []
        self.now_s = 0.0
        self._changed = asyncio.Event()
        self.pool = GangPool(
            PoolSpec("p", GangSpec(), replicas, **spec), self._launch, self._changed.set, lambda: self.now_s
        )
        self.pool.start()

    def _launch(self, slot: int, epoch: int) -> _FakeGang:
        error = self.errors.pop(0) if self.errors else None
        self.gangs.append(_FakeGang(f"p-{slot}.{epoch}", epoch, error))
        return self.gangs[-1]

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    def ids(self) -> list[str]:
        return [address.gang_id for address in self.pool.state.addresses]


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(300.0):
            await body()

    run_stepped(bounded())


def test_a_gang_that_ends_is_killed_and_replaced_with_the_next_epoch() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2)
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-1.1"])
        bench.gangs[0].end("rank 1 died")
        await bench.until(lambda: bench.ids() == ["p-0.2", "p-1.1"])
        assert bench.gangs[0].num_kills == 1
        assert bench.gangs[1].num_kills == 0
        assert bench.pool.state.trouble == "gang p-0.1 ended: rank 1 died"
        await bench.pool.stop()
        assert [gang.num_kills for gang in bench.gangs] == [1, 1, 1]
        assert bench.pool.state.states == ("stopped", "stopped")
        assert bench.ids() == []

    _run(body)


def test_a_broken_gang_is_unpublished_before_it_is_killed() -> None:
    async def body() -> None:
        bench = _Bench()
        await bench.until(lambda: bench.ids() == ["p-0.1"])
        published_at_kill: list[list[str]] = []
        gang = bench.gangs[0]

        async def kill() -> None:
            published_at_kill.append(bench.ids())

        gang.kill = kill  # type: ignore[method-assign]
        gang.end("stalled")
        await bench.until(lambda: bench.ids() == ["p-0.2"])
        assert published_at_kill == [[]]
        await bench.pool.stop()

    _run(body)


def test_faults_in_a_row_wait_longer_and_longer_and_then_the_pool_gives_up() -> None:
    async def body() -> None:
        bench = _Bench(max_faults=3)
        bench.errors = [WorkerLost("crash 1"), WorkerLost("crash 2"), WorkerLost("crash 3")]
        before_s = asyncio.get_running_loop().time()
        await bench.until(lambda: bench.pool.state.states == ("failed",))
        assert asyncio.get_running_loop().time() - before_s == 1.0  # none after the first, 1 s after the second
        assert bench.pool.state.failure == "3 faults within 300 s, the last: crash 3"
        assert [gang.num_kills for gang in bench.gangs] == [1, 1, 1]
        await bench.pool.stop()

    _run(body)


def test_faults_far_apart_do_not_add_up() -> None:
    async def body() -> None:
        bench = _Bench(max_faults=2, fault_window_s=100.0)
        for epoch in range(1, 5):
            await bench.until(lambda epoch=epoch: bench.ids() == [f"p-0.{epoch}"])
            bench.now_s += 101.0
            bench.gangs[-1].end("died")
        await bench.until(lambda: bench.ids() == ["p-0.5"])
        assert bench.pool.state.failure is None
        await bench.pool.stop()

    _run(body)


def test_want_of_room_is_no_fault_and_wrong_arguments_are_final() -> None:
    async def body() -> None:
        bench = _Bench(max_faults=1)
        bench.errors = [NotReady("no GPU")]
        await bench.until(lambda: bench.ids() == ["p-0.2"])
        assert bench.pool.state.trouble == "no GPU"
        assert bench.pool.state.failure is None
        await bench.pool.stop()
        refused = _Bench()
        refused.errors = [ValueError("no such model")]
        await refused.until(lambda: refused.pool.state.states == ("failed",))
        assert refused.pool.state.failure == "gang p-0.1 cannot start: no such model"
        assert len(refused.gangs) == 1

    _run(body)


def test_an_unforeseen_error_is_a_fault_like_any_other() -> None:
    async def body() -> None:
        bench = _Bench()
        bench.errors = [ZeroDivisionError("oops")]
        await bench.until(lambda: bench.ids() == ["p-0.2"])
        assert bench.pool.state.trouble == "gang p-0.1 failed: ZeroDivisionError: oops"
        await bench.pool.stop()

    _run(body)


def test_draining_takes_gangs_away_first_and_starts_no_more() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        published: list[list[str]] = []

        async def drain(timeout_s: float) -> None:
            published.append(bench.ids())
            bench.gangs[0].end("its step loop has ended")

        bench.gangs[0].drain = drain  # type: ignore[method-assign]
        await bench.pool.drain(7.0)
        assert published == [[]]
        assert bench.gangs[1].drained_s == 7.0
        assert len(bench.gangs) == 2
        assert bench.pool.state.states == ("stopped", "stopped")
        assert [gang.num_kills for gang in bench.gangs] == [1, 1]

    _run(body)


def test_stopping_does_not_wait_for_a_back_off() -> None:
    async def body() -> None:
        bench = _Bench(max_faults=100)
        error: TensorweaveError = WorkerLost("crash")
        bench.errors = [error] * 50
        await bench.until(lambda: len(bench.gangs) == 3)
        await bench.until(lambda: bench.pool.state.states == ("restarting",))
        before_s = asyncio.get_running_loop().time()
        await bench.pool.stop()
        assert asyncio.get_running_loop().time() == before_s

    _run(body)


def test_a_gang_that_fails_again_and_again_goes_and_the_others_stay() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2, max_faults=2)
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-1.1"])
        bench.gangs[0].end("out of memory")
        await bench.until(lambda: bench.ids() == ["p-0.2", "p-1.1"])
        bench.gangs[2].end("out of memory")
        await bench.until(lambda: bench.pool.state.states == ("failed", "ready"))
        assert bench.ids() == ["p-1.1"]
        assert bench.pool.state.failure is None
        gangs = bench.pool.describe()["gangs"]
        assert gangs[0]["reason"] == "2 faults within 300 s, the last: gang p-0.2 ended: out of memory"
        assert gangs[1]["reason"] is None
        # A pool that is told to have two again makes another one.
        await bench.pool.scale(3, 1.0)
        await bench.until(lambda: bench.ids() == ["p-1.1", "p-2.1"])
        await bench.pool.stop()

    _run(body)


def test_scaling_down_drains_and_scaling_up_starts() -> None:
    async def body() -> None:
        bench = _Bench(replicas=3)
        await bench.until(lambda: len(bench.ids()) == 3)
        await bench.pool.scale(1, 7.0)
        assert bench.ids() == ["p-0.1"]
        assert [gang.drained_s for gang in bench.gangs] == [None, 7.0, 7.0]
        assert [gang.num_kills for gang in bench.gangs] == [0, 1, 1]
        assert bench.pool.state.states == ("ready",)
        assert bench.pool.state.replicas == 1
        await bench.pool.scale(2, 7.0)
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-3.1"])
        await bench.pool.stop()

    _run(body)
