"""A pool keeps its gangs alive: replacement, back-off, giving up, draining; with gangs that are told when to break."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from tensorweave.cluster.errors import InsufficientResources, NotReady, TensorweaveError, WorkerLost
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool import GangPool
from tensorweave.cluster.pool_spec import PoolPlan, PoolSpec
from tensorweave.cluster.protocol import GangAddress, KvSource, LinkMeasurement, ModelInfo
from tensorweave.workers.fakes.stepped_loop import run_stepped

_INFO = ModelInfo("fake", 10, 10, "float32", 2, 5)


class _FakeGang:
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


class _Bench:
    """A pool of fake gangs; `errors` are what the next starts raise, in order."""

    def __init__(self, replicas: int = 1, running: Mapping[int, _FakeGang] | None = None, **spec: Any) -> None:
        self.gangs: list[_FakeGang] = []
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

    def _launch(self, spec: GangSpec, slot: int, epoch: int) -> _FakeGang:
        error = self.errors.pop(0) if self.errors else None
        self.gangs.append(_FakeGang(f"p-{slot}.{epoch}", epoch, error, spec))
        return self.gangs[-1]

    async def until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            self._changed.clear()
            await self._changed.wait()

    def ids(self) -> list[str]:
        return [address.gang_id for address in self.pool.state.addresses]


def _run(body: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(3000.0):
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


def test_pauses_grow_with_successive_faults_until_a_gang_starts() -> None:
    async def body() -> None:
        bench = _Bench(max_faults=3)
        bench.errors = [WorkerLost(f"crash {number}") for number in range(1, 6)]
        clock, starts_s = asyncio.get_running_loop().time, []
        for number in range(1, 6):
            await bench.until(lambda number=number: len(bench.gangs) > number)
            starts_s.append(clock())
        assert bench.failures == [f"{number} faults within 300 s, the last: crash {number}" for number in (3, 4, 5)]
        assert starts_s == [0.0, 1.0, 31.0, 91.0, 211.0]  # none, 1 s, then 30, 60 and 120 s
        await bench.until(lambda: bench.ids() == ["p-0.6"])
        assert bench.pool.state.failure is None
        assert [gang.num_kills for gang in bench.gangs] == [1, 1, 1, 1, 1, 0]
        # It has not served for long yet: the next fault waits on from where the last one left off.
        bench.gangs[-1].end("died")
        await bench.until(lambda: bench.pool.state.states == ("failed",))
        await bench.until(lambda: bench.ids() == ["p-0.7"])
        assert clock() == 211.0 + 240.0
        bench.now_s += 301.0
        bench.gangs[-1].end("died")
        await bench.until(lambda: bench.ids() == ["p-0.8"])
        assert clock() == 211.0 + 240.0
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


def test_insufficient_resources_are_no_fault_but_fail_a_pool_that_never_served() -> None:
    async def body() -> None:
        bench = _Bench(max_faults=1, replicas=2)
        bench.errors = [InsufficientResources("no GPU"), InsufficientResources("no GPU here either")]
        await bench.until(lambda: bench.pool.state.states == ("failed", "failed"))
        assert bench.pool.state.failure == "no GPU here either"
        await bench.until(lambda: len(bench.ids()) == 2)
        assert bench.pool.state.failure is None
        await bench.pool.stop()
        # Later, hosts that went may come back: nobody who waits is told that it is in vain.
        later = _Bench(max_faults=2)
        await later.until(lambda: later.ids() == ["p-0.1"])
        later.errors = [InsufficientResources("a host is gone")]
        later.gangs[0].end("its host died")
        await later.until(lambda: later.pool.state.trouble == "a host is gone")
        assert later.pool.state.failure is None
        await later.until(lambda: later.ids() == ["p-0.3"])
        await later.pool.stop()

    _run(body)


def test_a_host_that_refuses_a_gang_does_not_fail_the_pool() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2)
        bench.errors = [ValueError("no such model on h1")]
        await bench.until(lambda: bench.pool.state.states == ("failed", "ready"))
        assert bench.pool.state.failure is None
        assert bench.pool.describe()["gangs"][0]["reason"] == "gang p-0.1 cannot start: no such model on h1"
        await bench.until(lambda: bench.ids() == ["p-0.2", "p-1.1"])  # the model is there now
        assert [gang["reason"] for gang in bench.pool.describe()["gangs"]] == [None, None]
        await bench.pool.stop()

    _run(body)


def test_refused_arguments_fail_a_pool_at_once_unless_it_has_served() -> None:
    async def body() -> None:
        refused = _Bench()
        refused.errors = [ValueError("no such model")]
        await refused.until(lambda: refused.pool.state.states == ("failed",))
        assert refused.pool.state.failure == "gang p-0.1 cannot start: no such model"
        assert len(refused.gangs) == 1
        assert asyncio.get_running_loop().time() == 0.0
        await refused.until(lambda: refused.ids() == ["p-0.2"])
        refused.errors = [ValueError("the disk is away")]
        refused.gangs[-1].end("died")
        await refused.until(lambda: refused.pool.state.trouble == "gang p-0.3 cannot start: the disk is away")
        assert refused.pool.state.failure is None
        await refused.until(lambda: refused.ids() == ["p-0.4"])
        await refused.pool.stop()

    _run(body)


def test_an_unexpected_error_is_a_fault() -> None:
    async def body() -> None:
        bench = _Bench()
        bench.errors = [ZeroDivisionError("oops")]
        await bench.until(lambda: bench.ids() == ["p-0.2"])
        assert bench.pool.state.trouble == "gang p-0.1 failed: ZeroDivisionError: oops"
        await bench.pool.stop()

    _run(body)


def test_draining_withdraws_gangs_first_and_starts_none() -> None:
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


def test_stopping_does_not_wait_for_a_pause() -> None:
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


def test_repeated_faults_of_a_slot_do_not_affect_the_others() -> None:
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
        await bench.pool.scale(3, 1.0)
        await bench.until(lambda: bench.ids() == ["p-1.1", "p-2.1"])
        await bench.until(lambda: bench.ids() == ["p-0.3", "p-1.1", "p-2.1"])
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


def test_a_pool_resumes_running_gangs_and_replaces_them() -> None:
    async def body() -> None:
        running = _FakeGang("p-1.4", 4, None)
        bench = _Bench(replicas=2, running={1: running})
        assert bench.ids() == ["p-1.4"], "nobody who asks now learns that it is away"
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-1.4"])
        running.end("its host died")
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-1.5"])
        assert running.num_kills == 1
        await bench.pool.stop()

    _run(body)


_NEW = GangSpec(args={"max_batch_size": 4})


def test_new_gangs_are_ready_before_old_ones_drain() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        published: list[list[str]] = []
        for gang in bench.gangs:
            drain = gang.drain

            async def note(timeout_s: float, drain: Callable[[float], Awaitable[None]] = drain) -> None:
                published.append(bench.ids())
                await drain(timeout_s)

            gang.drain = note  # type: ignore[method-assign]
        await bench.pool.roll(PoolSpec("p", _NEW, 2), 7.0, asyncio.Lock())
        assert published == [["p-0.1", "p-2.1"], ["p-2.1", "p-3.1"]]
        assert [gang.drained_s for gang in bench.gangs] == [7.0, 7.0, None, None]
        assert [gang.spec for gang in bench.gangs[2:]] == [_NEW, _NEW]
        assert bench.pool.describe()["update"] == {"state": "done", "text": "2 gangs were replaced"}
        assert bench.pool.describe()["num_changes"] == {"scaled": 0, "moved": 0, "update": 2}
        await bench.pool.stop()

    _run(body)


def test_an_update_that_a_gang_refuses_leaves_the_old_gangs() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        bench.errors = [ValueError("max_batch_size is odd")]
        await bench.pool.roll(PoolSpec("p", _NEW, 2), 7.0, asyncio.Lock())
        assert bench.ids() == ["p-0.1", "p-1.1"]
        assert bench.pool.replicas == 2
        update = bench.pool.describe()["update"]
        assert update["state"] == "stopped"
        assert update["text"].startswith("0 of 2 gangs are new: gang p-2.1 cannot start: max_batch_size is odd")
        bench.gangs[0].end("died")
        await bench.until(lambda: bench.ids() == ["p-0.2", "p-1.1"])
        assert bench.gangs[-1].spec == GangSpec(), "the spec that could start"
        await bench.pool.stop()

    _run(body)


def test_without_room_for_one_more_an_old_gang_drains_first() -> None:
    async def body() -> None:
        bench = _Bench(replicas=1)
        await bench.until(lambda: bench.ids() == ["p-0.1"])
        bench.errors = [InsufficientResources("no GPU")]
        await bench.pool.roll(PoolSpec("p", _NEW, 1), 7.0, asyncio.Lock())
        assert bench.ids() == ["p-1.2"]
        assert [gang.drained_s for gang in bench.gangs] == [7.0, None, None]
        await bench.pool.stop()

    _run(body)


def test_an_update_ends_with_its_pool() -> None:
    async def body() -> None:
        bench = _Bench(replicas=1)
        await bench.until(lambda: bench.ids() == ["p-0.1"])
        bench.errors = [WorkerLost("crash")] * 4
        rolling = asyncio.create_task(bench.pool.roll(PoolSpec("p", _NEW, 1, max_faults=100), 7.0, asyncio.Lock()))
        await bench.until(lambda: len(bench.gangs) == 3)
        await bench.pool.drain(1.0)
        await rolling
        assert bench.ids() == []

    _run(body)


def test_a_gang_changes_its_pool_once_its_work_has_ended() -> None:
    async def body() -> None:
        giving, taking = _Bench(replicas=2), _Bench(replicas=1)
        taking.pool.spec = PoolSpec("q", GangSpec(role="decode"))
        await giving.until(lambda: len(giving.ids()) == 2)
        await taking.until(lambda: len(taking.ids()) == 1)
        gang = giving.gangs[1]
        gang.becomes_idle = False
        with pytest.raises(NotReady, match=r"p-1\.1 still has requests after 3 s"):
            await giving.pool.release(None, 3.0)
        assert giving.ids() == ["p-0.1", "p-1.1"]
        assert (gang.drained_s, giving.pool.replicas) == (None, 2)
        gang.becomes_idle = True
        assert await giving.pool.release("p-1.1", 3.0) is gang
        assert giving.ids() == ["p-0.1"]
        await taking.pool.adopt(gang)
        assert taking.ids() == ["p-0.1", "p-1.1"]
        assert [address.role for address in taking.pool.state.addresses] == ["both", "decode"]
        assert (giving.pool.replicas, taking.pool.replicas, gang.num_kills) == (1, 2, 0)
        gang.end("died")
        await taking.until(lambda: taking.ids() == ["p-0.1", "p-1.2"])
        assert gang.num_kills == 1, "its new pool replaces it"
        with pytest.raises(ValueError, match=r"no ready gang p-7\.1; ready are: p-0\.1"):
            await giving.pool.release("p-7.1", 3.0)
        await giving.pool.stop()
        await taking.pool.stop()

    _run(body)


def test_a_gang_that_is_lost_while_it_is_given_away_is_replaced() -> None:
    async def body() -> None:
        bench = _Bench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        gang = bench.gangs[1]

        async def quiesce(timeout_s: float) -> bool:
            gang.end("its host died")
            await bench.until(lambda: bench.pool.state.states == ("ready", "stopped"))
            return True

        gang.quiesce = quiesce  # type: ignore[method-assign]
        with pytest.raises(WorkerLost):
            await bench.pool.release(None, 3.0)
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-2.1"])
        assert bench.pool.replicas == 2
        await bench.pool.stop()

    _run(body)
