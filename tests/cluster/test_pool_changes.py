"""A pool's gangs are replaced by others of another spec, and change their pool."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tensorweave.cluster.errors import InsufficientResources, NotReady, WorkerLost
from tensorweave.cluster.gang_spec import GangSpec
from tensorweave.cluster.pool_spec import PoolSpec
from tests.cluster.pool_bench import PoolBench, run_pools

_NEW = GangSpec(args={"max_batch_size": 4})


def test_new_gangs_are_ready_before_old_ones_drain() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
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

    run_pools(body)


def test_an_update_that_a_gang_refuses_leaves_the_old_gangs() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
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

    run_pools(body)


def test_without_room_for_one_more_an_old_gang_drains_first() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=1)
        await bench.until(lambda: bench.ids() == ["p-0.1"])
        bench.errors = [InsufficientResources("no GPU")]
        await bench.pool.roll(PoolSpec("p", _NEW, 1), 7.0, asyncio.Lock())
        assert bench.ids() == ["p-1.2"]
        assert [gang.drained_s for gang in bench.gangs] == [7.0, None, None]
        await bench.pool.stop()

    run_pools(body)


def test_an_update_ends_with_its_pool() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=1)
        await bench.until(lambda: bench.ids() == ["p-0.1"])
        bench.errors = [WorkerLost("crash")] * 4
        rolling = asyncio.create_task(bench.pool.roll(PoolSpec("p", _NEW, 1, max_faults=100), 7.0, asyncio.Lock()))
        await bench.until(lambda: len(bench.gangs) == 3)
        await bench.pool.drain(1.0)
        await rolling
        assert bench.ids() == []

    run_pools(body)


def test_a_gang_changes_its_pool_once_its_work_has_ended() -> None:
    async def body() -> None:
        giving, taking = PoolBench(replicas=2), PoolBench(replicas=1)
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

    run_pools(body)


def test_a_gang_that_is_lost_while_it_is_given_away_is_replaced() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
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

    run_pools(body)


def test_a_pool_that_shrinks_during_an_update_goes_on_with_it() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=3)
        await bench.until(lambda: len(bench.ids()) == 3)
        bench.errors = [WorkerLost("crash")] * 3
        rolling = asyncio.create_task(bench.pool.roll(PoolSpec("p", _NEW, 3), 7.0, asyncio.Lock()))
        await bench.until(lambda: len(bench.gangs) == 4)
        await bench.pool.scale(2, 7.0)
        await rolling
        assert len(bench.ids()) == 2
        assert all(gang.spec == _NEW for gang, _ in bench.pool.ready)
        assert bench.pool.describe()["update"]["state"] == "done"
        await bench.pool.stop()

    run_pools(body)


def test_a_gang_that_cannot_be_taken_back_is_replaced() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        gang = bench.gangs[1]
        sizes: list[int] = []

        async def quiesce(timeout_s: float) -> bool:
            sizes.extend([bench.pool.replicas, bench.pool.size])
            raise WorkerLost("no answer")

        async def reopen() -> None:
            raise WorkerLost("no answer")

        gang.quiesce, gang.reopen = quiesce, reopen  # type: ignore[method-assign]
        with pytest.raises(WorkerLost):
            await bench.pool.release(None, 3.0)
        await bench.until(lambda: bench.ids() == ["p-0.1", "p-2.1"])
        assert gang.num_kills == 1
        assert sizes == [1, 2], "a supervisor that takes over goes on with both"
        await bench.pool.stop()

    run_pools(body)


def test_gangs_of_another_spec_do_not_change_their_pool() -> None:
    """They would count as gangs of the new one, and answer with the old model."""

    async def body() -> None:
        bench = PoolBench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        bench.pool.spec = PoolSpec("p", _NEW, 2)
        with pytest.raises(ValueError, match="no ready gang"):
            await bench.pool.release(None, 3.0)
        await bench.pool.stop()

    run_pools(body)


def test_a_gang_that_is_stopped_once_it_has_drained_is_no_fault() -> None:
    async def body() -> None:
        bench = PoolBench(replicas=2)
        await bench.until(lambda: len(bench.ids()) == 2)
        gang = bench.gangs[1]

        async def drain(timeout_s: float) -> None:
            gang.end("its step loop has ended")
            await bench.until(lambda: bench.pool.state.states == ("ready", "stopped"))

        gang.drain = drain  # type: ignore[method-assign]
        await bench.pool.scale(1, 5.0)
        assert bench.pool.describe()["num_faults"] == 0
        await bench.pool.stop()

    run_pools(body)
