"""How long a gang waits for a rank's heartbeat."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import pytest
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayTaskError

from tensorweave.cluster import rank_watch
from tensorweave.cluster.rank_watch import RankWatch, death_reason, result_within
from tensorweave.cluster.ranks import RankReport


def test_a_silent_rank_is_reported() -> None:
    async def wait() -> None:
        never = asyncio.get_running_loop().create_future()
        with pytest.raises(TimeoutError):
            await result_within(never, 0.5)
        assert never.cancelled()

    asyncio.run(wait())


def test_a_pause_of_this_process_is_no_fault_of_a_rank() -> None:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        heartbeat = loop.create_future()
        waiting = asyncio.create_task(result_within(heartbeat, 1.5))
        await asyncio.sleep(0)
        time.sleep(2.0)
        loop.call_later(0.1, heartbeat.set_result, "alive")
        assert await waiting == "alive"

    asyncio.run(wait())


@pytest.mark.parametrize(("num_open", "limit", "is_full"), [(900, 1000, False), (901, 1000, True), (901, 0, False)])
def test_a_rank_that_is_running_out_of_descriptors_is_replaced(num_open: int, limit: int, is_full: bool) -> None:
    report = RankReport(0.1, is_alive=True, num_open_files=num_open, max_open_files=limit)
    assert report.fault == ("it has 901 files and sockets open; 1000 are its limit" if is_full else None)


class ReportingActor:
    """Its `heartbeat.remote()` gives one report after the other, the last for ever."""

    def __init__(self, *ages_s: float, waits_for_stage: bool = False) -> None:
        self.heartbeat = self
        self.num_asked = 0
        self._ages_s = ages_s
        self._waits_for_stage = waits_for_stage

    async def remote(self) -> RankReport:
        self.num_asked += 1
        age_s = self._ages_s[min(self.num_asked, len(self._ages_s)) - 1]
        return RankReport(age_s, waits_for_stage=self._waits_for_stage, is_alive=True)


def failing_after(actor: ReportingActor, number: int) -> Callable[[], Awaitable[RankReport]]:
    answer = actor.remote

    async def remote() -> RankReport:
        if actor.num_asked == number:
            raise RayActorError(error_msg="no more")
        return await answer()

    return remote


def watched(
    actor: ReportingActor, monkeypatch: pytest.MonkeyPatch, heartbeat_s: float = 10.0, others: Sequence[Any] = ()
) -> RankWatch:
    """By its clock, a heartbeat takes `heartbeat_s`."""
    monkeypatch.setattr("tensorweave.cluster.rank_watch.HEARTBEAT_INTERVAL_S", 0.01)
    monkeypatch.setattr("tensorweave.cluster.rank_watch._CHECK_INTERVAL_S", 0.01)
    actors = [cast(ActorHandle[Any], each) for each in (actor, *others)]
    return RankWatch(actors, lambda rank: f"rank {rank}", 8.0, clock=lambda: heartbeat_s * actor.num_asked)


def test_no_progress_in_two_reports_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = ReportingActor(0.1, 8.5, 9.0)
    told = asyncio.run(asyncio.wait_for(watched(actor, monkeypatch).until_fault(), 30.0))
    assert told == "rank 0: its step loop has made no progress for 9.0 s (hang_timeout_s is 8)"
    assert actor.num_asked == 3


def test_a_step_loop_that_waited_for_the_start_of_others_gets_the_whole_time(monkeypatch: pytest.MonkeyPatch) -> None:
    actor = ReportingActor(60.0)
    told = asyncio.run(asyncio.wait_for(watched(actor, monkeypatch, heartbeat_s=1.0).until_fault(), 30.0))
    assert "no progress for 60.0 s" in told
    assert actor.num_asked == 10


def test_a_start_is_not_judged_by_the_hang_timeout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that is ready waits for the others, whose step loops do not run yet."""
    actor = ReportingActor(0.1, *[20.0] * 8)
    watch = watched(actor, monkeypatch)
    monkeypatch.setattr(actor, "remote", failing_after(actor, 8))
    told = asyncio.run(asyncio.wait_for(watch.until_fault_while_starting(), 30.0))
    assert told == "rank 0 died: no more"


@pytest.mark.parametrize("others_wait", [False, True])
def test_a_stage_that_waits_hangs_only_where_no_rank_has_progress(
    others_wait: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight reports of the other rank show progress; then that one stands still, or waits too."""
    waiting = ReportingActor(0.1, 20.0, waits_for_stage=True)
    other = ReportingActor(*[0.1] * 8, 30.0, waits_for_stage=others_wait)
    watch = watched(waiting, monkeypatch, others=[other])
    told = asyncio.run(asyncio.wait_for(watch.until_fault(), 30.0))
    assert "its step loop has made no progress for" in told
    assert other.num_asked > 8
    assert watch.report(0).progress_age_s == 20.0


def test_a_paused_host_does_not_end_a_gang(monkeypatch: pytest.MonkeyPatch) -> None:
    """After it the first report is old, and the next one is not."""
    actor = ReportingActor(0.1, 20.0, 0.1, 20.0, 0.1)

    async def watch() -> None:
        watching = asyncio.create_task(watched(actor, monkeypatch).until_fault())
        async with asyncio.timeout(30.0):
            while actor.num_asked < 8:
                await asyncio.sleep(0.01)
        assert not watching.done()
        watching.cancel()

    asyncio.run(watch())


def test_an_actors_error_is_described_by_its_own_message() -> None:
    cause = RuntimeError("no space for the cache\nmore")
    raised = RayTaskError(
        "start", 'Traceback (most recent call last):\n  File "rank.py", line 1', cause, pid=7, ip="::1"
    )
    assert "pid=7" in str(raised).splitlines()[0], "as Ray tells it"
    assert death_reason(raised.as_instanceof_cause()) == "no space for the cache"


def test_an_error_in_an_actors_creation_is_described_by_its_last_line_and_host() -> None:
    told = (
        "The actor died because of an error raised in its creation task, \x1b[36mray::m:RankWorker.__init__()\x1b[39m"
        " (pid=612, ip=10.79.0.13, actor_id=87, repr=<rank>)\nRuntimeError: The actor failed to import.\n\n"
        "Traceback (most recent call last):\nModuleNotFoundError: No module named 'tensorweave'\n"
    )
    reason = death_reason(RayActorError(error_msg=told))  # type: ignore[no-untyped-call]
    assert reason == "ModuleNotFoundError: No module named 'tensorweave' (on host 10.79.0.13)"
    alone = told.splitlines()[0]
    assert death_reason(RayActorError(error_msg=alone)) == alone[:300].rstrip(".")  # type: ignore[no-untyped-call]


class SilentActor:
    """It reports once what it does, and never answers again."""

    def __init__(self, phase: str) -> None:
        self.heartbeat = self
        self._reports = [RankReport(phase=phase)]

    async def remote(self) -> RankReport:
        if not self._reports:
            await asyncio.get_running_loop().create_future()
        return self._reports.pop()


def test_the_fault_of_a_rank_that_falls_silent_while_it_starts_says_what_it_did(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rank_watch, "STARTING_HEARTBEAT_TIMEOUT_S", 0.5)
    monkeypatch.setattr(rank_watch, "HEARTBEAT_INTERVAL_S", 0.01)
    watch = RankWatch([cast(ActorHandle[Any], SilentActor("connecting the ranks"))], "rank {}".format, 8.0)
    fault = asyncio.run(watch.until_fault_while_starting())
    assert fault == "rank 0 has not answered for 0.5 s (it was connecting the ranks)"
    assert watch.unresponsive == {0}
