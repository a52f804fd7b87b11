"""`tensorweave bench goodput`: its load is an open loop, its figures are right, its ways use as many ranks."""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from tensorweave.cli.bench_goodput import add_goodput, num_ranks, run_goodput, way_config
from tensorweave.cli.goodput_load import Due, LatencyLimits, Mix, Outcome, arrivals, best_row, figures, run_load
from tensorweave.cli.goodput_plot import curves_svg
from tensorweave.cli.goodput_report import best_table, learnt_ratios, rates_table
from tensorweave.cli.http_stream import RequestFailed, Timeline

MIX = Mix(chat_input=20, chat_output=10, long_input=500, long_output=5, long_share=0.2, burst=4)
LIMITS = LatencyLimits(1.0, 0.03)


def parsed(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_goodput(parser.add_subparsers())
    return parser.parse_args(["goodput", *arguments])


def test_arrivals_have_the_rate_and_the_mix() -> None:
    due = arrivals(MIX, 50.0, 200.0, seed=1)
    assert due == arrivals(MIX, 50.0, 200.0, seed=1)
    assert due == sorted(due, key=lambda request: request.at_s)
    assert len(due) == pytest.approx(50 * 200, rel=0.05)
    long = [request for request in due if request.is_long]
    assert len(long) == pytest.approx(0.2 * len(due), rel=0.15)
    assert len({request.at_s for request in long}) == len(long) / 4, "four at a time"
    assert {(r.num_input, r.num_output) for r in due} == {(20, 10), (500, 5)}
    no_long = Mix(20, 10, 500, 5, 0.0, 4)
    assert not any(request.is_long for request in arrivals(no_long, 5.0, 50.0, seed=1))


@pytest.mark.parametrize("rate", [2.0, 4.0, 8.0])
def test_each_part_of_the_time_has_its_burst(rate: float) -> None:
    long = sorted({request.at_s for request in arrivals(MIX, rate, 10.0, seed=3) if request.is_long})
    assert [int(at_s * rate / 20) for at_s in long] == list(range(int(rate / 2)))


def test_a_slow_answer_does_not_delay_the_requests_after_it() -> None:
    due, open_at_once, most = [Due(0.0, 1, 1, False)] * 5, 0, 0
    everybody_is_here = asyncio.Event()

    async def send() -> Timeline:
        nonlocal open_at_once, most
        open_at_once += 1
        most = max(most, open_at_once)
        if most == 5:
            everybody_is_here.set()
        await asyncio.wait_for(everybody_is_here.wait(), 60.0)
        open_at_once -= 1
        now_s = time.perf_counter()
        if most == 5 and open_at_once == 0:
            raise RequestFailed("timeout")
        return Timeline(now_s - 100.0, [now_s, now_s + 0.01, now_s + 0.5])

    outcomes = asyncio.run(run_load([(request, send) for request in due]))
    assert most == 5
    assert [outcome.failure for outcome in outcomes].count("timeout") == 1
    answered = [outcome for outcome in outcomes if outcome.failure is None]
    assert all(0 <= outcome.first_s < 60 for outcome in answered), "from when it was due"
    assert answered[0].gaps_s == pytest.approx((0.01, 0.49))


def test_what_is_within_the_limits() -> None:
    due = Due(0.0, 1, 1, False)
    assert Outcome(due, 0.9, (0.02,) * 200).is_good(LIMITS)
    assert Outcome(due, 0.9).is_good(LIMITS)
    assert Outcome(due, 0.9, (0.02,) * 200 + (5.0,)).is_good(LIMITS), "99 % count"
    assert not Outcome(due, 0.9, (0.02,) * 50 + (5.0,)).is_good(LIMITS)
    assert not Outcome(due, 1.1).is_good(LIMITS)
    assert not Outcome(due, 0.1, failure="timeout").is_good(LIMITS)


def test_figures() -> None:
    due = Due(0.0, 1, 1, False)
    outcomes = [Outcome(due, 0.5, (0.02, 0.02)), Outcome(due, 2.0, (0.02, 0.04)), Outcome(due, failure="HTTP 503")]
    row = figures(outcomes, rate=3.0, duration_s=1.0, num_ranks=2, limits=LIMITS)
    assert (row["requests"], row["failed"]) == (3, 1)
    assert row["good share"] == pytest.approx(1 / 3)
    assert row["good per s and rank"] == 0.5
    assert row["ttft ms p50"] == pytest.approx(1250)
    assert figures([], 1.0, 1.0, 2, LIMITS)["good share"] == 0
    rows = [{"rate": 1.0, "good share": 1.0}, {"rate": 2.0, "good share": 0.95}, {"rate": 4.0, "good share": 0.5}]
    assert best_row(rows, 0.9) == rows[1]
    assert best_row(rows[2:], 0.9) is None


def test_each_way_uses_as_many_ranks() -> None:
    args = parsed("--gangs", "3", "--prefill-gangs", "1", "--model", "tiny", "--set", "engine.tensor_parallel_size=2")
    configs = {way: way_config(args, way) for way in args.ways}
    assert [num_ranks(config) for config in configs.values()] == [6, 6, 6]
    staged = parsed("--gangs", "3", "--model", "tiny", "--set", "engine.pipeline_parallel_size=2")
    assert num_ranks(way_config(staged, "aggregated")) == 6
    roles = {way: sorted(pool.role for pool in config.pools.values()) for way, config in configs.items()}
    assert roles == {"aggregated": ["both"], "disaggregated": ["decode", "prefill"], "learnt": ["both"]}
    exchange = configs["learnt"].pools["main"].cache_transceiver_config
    assert exchange is not None
    assert exchange.backend == "DEFAULT"
    assert configs["disaggregated"].pools["decode"].replicas == 2
    router = configs["learnt"].router
    assert (router.policy, router.ttft_limit_ms, router.itl_limit_ms) == ("joint", 1000.0, 30.0)
    assert configs["aggregated"].router.itl_limit_ms is None


def test_the_learnt_way_exchanges_kv_as_the_configuration_says() -> None:
    args = parsed("--model", "tiny", "--set", "engine.cache_transceiver_config.backend=IPC_DIRECT")
    for way in args.ways:
        for pool in way_config(args, way).pools.values():
            assert pool.cache_transceiver_config is not None
            assert pool.cache_transceiver_config.backend == "IPC_DIRECT"


def test_limits_and_rates_need_not_be_whole_numbers() -> None:
    args = parsed("--rates", "0.5", "1.5", "--share", "0.95", "--itl-ms", "12.5", "--duration", "2.5")
    assert (args.rates, args.share, args.itl_ms, args.duration) == ([0.5, 1.5], 0.95, 12.5, 2.5)
    for wrong in (["--gangs", "0"], ["--share", "0"], ["--burst", "0"]):
        with pytest.raises(SystemExit):
            parsed(*wrong)


def rows_of(*good: float) -> list[dict[str, float]]:
    """At 1, 2, 4 … requests a second."""
    return [
        {"rate": 2.0**i, "good per s and rank": each, "good share": each / 2**i, "ttft ms p99": 9.0, "itl ms p99": 9.0}
        for i, each in enumerate(good)
    ]


def test_the_learnt_way_is_compared_with_the_better_one_at_each_rate() -> None:
    curves = {"aggregated": rows_of(1, 1.5, 0), "disaggregated": rows_of(0.5, 2), "learnt": rows_of(1, 1.9, 0.3, 0)}
    assert learnt_ratios(curves) == {1.0: 1.0, 2.0: 0.95}, "no other was good at 4, and none was measured at 8"
    lines = rates_table(curves).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["1", "2", "4", "8"]
    assert lines[2].split() == ["2", "1.5", "(75%)", "2", "(100%)", "1.9", "(95%)", "0.950"]
    assert lines[4].split() == ["8", "–", "–", "0", "(0%)", "–"]
    del curves["learnt"]
    assert learnt_ratios(curves) == {}
    assert "better" not in rates_table(curves)
    assert [line.split()[:2] for line in best_table(curves, 0.9).splitlines()[1:]] == [
        ["aggregated", "1"],
        ["disaggregated", "2"],
    ]


@pytest.mark.parametrize(
    ("arguments", "words"), [(["--gangs", "1"], "prefill-gangs"), (["--long-share", "1"], "long-share")]
)
def test_wrong_arguments_are_named(arguments: list[str], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run_goodput(parsed(*arguments))


def test_the_plot_has_each_curve(tmp_path: Path) -> None:
    rows = [{"rate": rate, "good per s and rank": rate / 2} for rate in (1.0, 2.0, 4.0)]
    svg = curves_svg("Title & limits", {"aggregated": rows, "learnt": rows[:1], "disaggregated": []})
    root = ElementTree.fromstring(svg)
    assert len(root.findall("{http://www.w3.org/2000/svg}polyline")) == 3
    assert len(root.findall("{http://www.w3.org/2000/svg}circle")) == 4
    assert "Title & limits" in "".join(root.itertext())
