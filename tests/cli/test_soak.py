"""What soak makes of its samples and counts."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tensorweave.cli import soak_load
from tensorweave.cli.main import main
from tensorweave.cli.soak import Memory, SoakReport, _judge, _short, format_report
from tensorweave.cli.soak_load import COMPLETIONS, BadRequest, SoakTraffic, TrafficCounts
from tensorweave.cli.trial_load import FrontEnds
from tensorweave.cli.trial_requests import TrialRequest
from tests.cli.conftest import FakeEndpoint


def judged(request_counts: TrafficCounts, *memory: Memory, after: float = 0.0) -> SoakReport:
    report = SoakReport(1.0, gauges_before={"gauge": 0.0}, gauges_after={"gauge": after})
    _judge(report, request_counts, dict(enumerate(memory)), growth_mb=16.0)
    return report


def test_memory_that_settles_is_flat_and_memory_that_goes_on_growing_is_not() -> None:
    warming = Memory("rank", [100.0, 180.0] + [200.0] * 6)
    assert not warming.has_grown(16.0)
    leaking = Memory("rank", [200.0 + 10 * step for step in range(8)])
    assert leaking.has_grown(16.0)
    huge = Memory("rank", [10_000.0] * 4 + [10_020.0] * 4)
    assert not huge.has_grown(16.0)


def test_a_clean_run_has_no_problems() -> None:
    report = judged(TrafficCounts(num_answered=5, num_left=2, num_refused=1), Memory("rank", [1.0] * 8))
    assert report.problems == []
    assert report.counts == {"requests": 8, "answered": 5, "left": 2, "refused": 1, "failed": 0, "changed": 0}
    assert "nothing leaked" in format_report(report)


def test_every_problem_is_reported() -> None:
    request_counts = TrafficCounts(num_answered=5)
    request_counts.fail("HTTP 500")
    short_lived = Memory("helper", [1.0, 500.0])
    report = judged(request_counts, Memory("rank", [100.0 * step for step in range(1, 9)]), short_lived, after=2.0)
    assert [problem.split(" (")[0] for problem in report.problems] == [
        "1 x HTTP 500",
        "gauge was 0 and is 2",
        "rank",
    ]
    assert "PROBLEM" in format_report(report)


def test_processes_have_names_that_say_something() -> None:
    assert _short(["ray::RankWorker.run"]) == "ray::RankWorker"
    assert _short(["/usr/bin/python3", "-m", "tensorweave.cli.main", "serve"]) == "python3 tensorweave.cli.main"
    assert _short([]) == ""


def test_all_traffic_brings_the_key(endpoint: FakeEndpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    async def until(holds: Callable[[TrafficCounts], bool], front_ends: FrontEnds) -> TrafficCounts:
        traffic = SoakTraffic(front_ends, [TrialRequest(COMPLETIONS, {"prompt": "x"})], "fake-model", seed=0)
        async with asyncio.timeout(60.0), asyncio.TaskGroup() as tasks:
            tasks.create_task(traffic.run(2))
            while not holds(traffic.request_counts):
                await asyncio.sleep(0.005)
            traffic.stop()
        return traffic.request_counts

    # The endpoint takes this one for a good one, so it is answered, only not as it should be.
    monkeypatch.setattr(soak_load, "bad_requests", lambda model: [BadRequest(COMPLETIONS, {}, 400)])
    endpoint.api_key = "secret-key-1"
    front_ends = FrontEnds([endpoint.url], 30.0, "secret-key-1")
    with_key = asyncio.run(
        until(lambda request_counts: bool(request_counts.num_answered and request_counts.problems), front_ends)
    )
    assert {problem.split(":")[0] for problem in with_key.problems} == {"a bad request was not refused properly"}
    without = asyncio.run(
        until(lambda request_counts: len(request_counts.problems) > 1, FrontEnds([endpoint.url], 30.0))
    )
    assert set(without.problems) == {"HTTP 401: no key", "401 in place of 400 for {}"}


def test_mistakes_in_the_command_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["soak", "--config", "deploy/examples/chaos.yaml", "--minutes", "0"]) == 2
    assert "--minutes" in capsys.readouterr().err
