"""A pool keeps its gangs alive: replacement, back-off, giving up, draining; with gangs that are told when to break."""

from __future__ import annotations

import asyncio

from tensorweave.cluster.errors import InsufficientResources, TensorweaveError, WorkerLost
from tests.cluster.pool_bench import FakeGang, PoolBench, run_pools


def test_a_gang_that_ends_is_killed_and_replaced_with_the_next_epoch() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
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

    run_pools(body)


def test_a_broken_gang_is_unpublished_before_it_is_killed() -> None:
    async def body() -> None:
        bench = PoolBench()
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

    run_pools(body)


def test_pauses_grow_with_successive_faults_until_a_gang_starts() -> None:
    async def body() -> None:
        bench = PoolBench(max_faults=3)
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

    run_pools(body)


def test_faults_far_apart_do_not_add_up() -> None:
    async def body() -> None:
        bench = PoolBench(max_faults=2, fault_window_s=100.0)
        for epoch in range(1, 5):
            await bench.until(lambda epoch=epoch: bench.ids() == [f"p-0.{epoch}"])
            bench.now_s += 101.0
            bench.gangs[-1].end("died")
        await bench.until(lambda: bench.ids() == ["p-0.5"])
        assert bench.pool.state.failure is None
        await bench.pool.stop()

    run_pools(body)


def test_insufficient_resources_are_no_fault_but_fail_a_pool_that_never_served() -> None:
    async def body() -> None:
        bench = PoolBench(max_faults=1, replicas=2)
        bench.errors = [InsufficientResources("no GPU"), InsufficientResources("no GPU here either")]
        await bench.until(lambda: bench.pool.state.states == ("failed", "failed"))
        assert bench.pool.state.failure == "no GPU here either"
        await bench.until(lambda: len(bench.ids()) == 2)
        assert bench.pool.state.failure is None
        await bench.pool.stop()
        # Later, hosts that went may come back: nobody who waits is told that it is in vain.
        later = PoolBench(max_faults=2)
        await later.until(lambda: later.ids() == ["p-0.1"])
        later.errors = [InsufficientResources("a host is gone")]
        later.gangs[0].end("its host died")
        await later.until(lambda: later.pool.state.trouble == "a host is gone")
        assert later.pool.state.failure is None
        await later.until(lambda: later.ids() == ["p-0.3"])
        await later.pool.stop()

    run_pools(body)


def test_a_host_that_refuses_a_gang_does_not_fail_the_pool() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
        bench.errors = [ValueError("no such model on h1")]
        await bench.until(lambda: bench.pool.state.states == ("failed", "ready"))
        assert bench.pool.state.failure is None
        assert bench.pool.describe()["gangs"][0]["reason"] == "gang p-0.1 cannot start: no such model on h1"
        await bench.until(lambda: bench.ids() == ["p-0.2", "p-1.1"])  # the model is there now
        assert [gang["reason"] for gang in bench.pool.describe()["gangs"]] == [None, None]
        await bench.pool.stop()

    run_pools(body)


def test_refused_arguments_fail_a_pool_at_once_unless_it_has_served() -> None:
    async def body() -> None:
        refused = PoolBench()
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

    run_pools(body)


def test_an_unexpected_error_is_a_fault() -> None:
    async def body() -> None:
        bench = PoolBench()
        bench.errors = [ZeroDivisionError("oops")]
        await bench.until(lambda: bench.ids() == ["p-0.2"])
        assert bench.pool.state.trouble == "gang p-0.1 failed: ZeroDivisionError: oops"
        await bench.pool.stop()

    run_pools(body)


def test_draining_withdraws_gangs_first_and_starts_none() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
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

    run_pools(body)


def test_stopping_does_not_wait_for_a_pause() -> None:
    async def body() -> None:
        bench = PoolBench(max_faults=100)
        error: TensorweaveError = WorkerLost("crash")
        bench.errors = [error] * 50
        await bench.until(lambda: len(bench.gangs) == 3)
        await bench.until(lambda: bench.pool.state.states == ("restarting",))
        before_s = asyncio.get_running_loop().time()
        await bench.pool.stop()
        assert asyncio.get_running_loop().time() == before_s

    run_pools(body)


def test_repeated_faults_of_a_slot_do_not_affect_the_others() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2, max_faults=2)
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

    run_pools(body)


def test_scaling_down_drains_and_scaling_up_starts() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=3)
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

    run_pools(body)


def test_a_pool_resumes_running_gangs_and_replaces_them() -> None:
    async def body() -> None:
        running = FakeGang("p-1.4", 4, None)
        bench = PoolBench(replicas=2, running={1: running})
        assert bench.ids() == ["p-1.4"], "nobody who asks now learns that it is away"
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-1.4"])
        running.end("its host died")
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-1.5"])
        assert running.num_kills == 1
        await bench.pool.stop()

    run_pools(body)
