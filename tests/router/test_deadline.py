"""A deadline for many waits: it ends the wait that it falls into, and nothing else."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Any

import pytest

from tensorweave.router.deadline import Deadline
from tensorweave.workers.fakes.stepped_loop import run_stepped
from tests.router.serving import PATIENCE_S


async def forever() -> None:
    await asyncio.get_running_loop().create_future()


async def soon() -> int:
    await asyncio.sleep(0)
    return 5


def now_s() -> float:
    return asyncio.get_running_loop().time()


def run(body: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(PATIENCE_S):
            await body

    run_stepped(bounded())  # else a pause of this process would end a wait that is to succeed


def test_it_ends_the_wait_that_it_falls_into() -> None:
    async def body() -> None:
        with Deadline(now_s() + 0.05) as deadline:
            assert await deadline.wait(soon) == 5
            with pytest.raises(TimeoutError):
                await deadline.wait(forever)
            with pytest.raises(TimeoutError):
                await deadline.wait(soon)
        task = asyncio.current_task()
        assert task is not None
        assert task.cancelling() == 0
        await asyncio.sleep(0)  # no cancel is left over

    run(body())


def test_it_does_nothing_between_waits_even_over_a_yield() -> None:
    async def numbers() -> AsyncGenerator[int, None]:
        with Deadline(now_s() + 0.05) as deadline:
            yield await deadline.wait(soon)
            yield await deadline.wait(soon)

    async def body() -> None:
        got = numbers()
        assert await anext(got) == 5
        await asyncio.sleep(0.1)
        with pytest.raises(TimeoutError):
            await anext(got)

    run(body())


@pytest.mark.parametrize("idle_s", [0.0, 0.1])
def test_a_deadline_that_is_moved_ends_a_later_wait(idle_s: float) -> None:
    async def body() -> None:
        with Deadline(now_s() + 0.05) as deadline:
            assert await deadline.wait(soon) == 5
            await asyncio.sleep(idle_s)
            late_s = now_s() + 0.1
            deadline.move(late_s)
            assert await deadline.wait(soon) == 5
            with pytest.raises(TimeoutError):
                await deadline.wait(forever)
            assert now_s() >= late_s

    run(body())


def test_a_cancel_from_outside_stays_one() -> None:
    async def waiting() -> None:
        with Deadline(now_s() + PATIENCE_S) as deadline:
            await deadline.wait(forever)

    async def body() -> None:
        task = asyncio.create_task(waiting())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(body())


def test_a_cancel_from_outside_while_the_deadline_ends_the_wait_stays_one() -> None:
    async def slow_to_end() -> None:
        try:
            await forever()
        finally:
            is_ending.set()
            await asyncio.wait([asyncio.create_task(asyncio.sleep(0.05))])

    async def waiting() -> None:
        with Deadline(now_s() + 0.01) as deadline:
            await deadline.wait(slow_to_end)

    async def body() -> None:
        task = asyncio.create_task(waiting())
        await is_ending.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    is_ending = asyncio.Event()
    run(body())
