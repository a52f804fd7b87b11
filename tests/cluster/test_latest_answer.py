"""Whoever asks for the latest answer gets it within a short time, whatever the other process does."""

from __future__ import annotations

import asyncio

import pytest

from tensorweave.cluster.errors import NotReady
from tensorweave.cluster.latest_answer import LatestAnswer
from tensorweave.workers.fakes.stepped_loop import run_stepped

PATIENCE_S = 0.02
MAX_AGE_S = 10.0


class Gated:
    """Counts the questions; each is answered once the gate is open."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_asked = 0
        self.error: NotReady | None = None

    async def ask(self) -> int:
        self.num_asked += 1
        number = self.num_asked
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        return number


def answer_of(asked: Gated) -> LatestAnswer[int]:
    return LatestAnswer(asked.ask, PATIENCE_S, MAX_AGE_S, lambda: asyncio.get_running_loop().time())


def test_a_new_answer_is_given_if_it_comes_at_once() -> None:
    async def call() -> None:
        latest = answer_of(Gated())
        assert [await latest.get() for _ in range(3)] == [1, 2, 3]

    run_stepped(call())


def test_the_last_answer_stands_in_while_a_new_one_does_not_come() -> None:
    async def call() -> None:
        asked = Gated()
        latest, now_s = answer_of(asked), asyncio.get_running_loop().time
        await latest.get()
        asked.gate.clear()
        began_s = now_s()
        assert await asyncio.gather(*(latest.get() for _ in range(5))) == [1] * 5
        assert now_s() - began_s == pytest.approx(PATIENCE_S)
        assert asked.num_asked == 2  # one question for all of them
        asked.gate.set()
        await asyncio.sleep(0)
        assert await latest.get() >= 2

    run_stepped(call())


def test_without_an_answer_or_with_an_old_one_it_waits() -> None:
    async def call() -> None:
        asked = Gated()
        latest, loop = answer_of(asked), asyncio.get_running_loop()
        asked.gate.clear()
        loop.call_later(3.0, asked.gate.set)
        assert await latest.get() == 1
        assert loop.time() >= 3.0
        asked.gate.clear()
        await asyncio.sleep(MAX_AGE_S + 1)
        loop.call_later(3.0, asked.gate.set)
        assert await latest.get() == 2

    run_stepped(call())


def test_that_nobody_answers_is_an_answer() -> None:
    async def call() -> None:
        asked = Gated()
        latest = answer_of(asked)
        await latest.get()
        asked.error = NotReady("away")
        for _ in range(2):
            with pytest.raises(NotReady, match="away"):
                await latest.get()
        asked.error = None
        assert await latest.get() == 4

    run_stepped(call())


def test_an_open_question_ends_when_it_is_closed() -> None:
    async def call() -> None:
        asked = Gated()
        latest = answer_of(asked)
        await latest.get()
        asked.gate.clear()
        await latest.get()
        latest.close()
        await asyncio.sleep(0)
        assert [task for task in asyncio.all_tasks() if task.get_name() == "latest-answer"] == []

    run_stepped(call())
