"""Replays: traces, simulated gangs against the real executor's rules, figures, the fit of a cost model."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import pytest

from tensorweave.cli.goodput_load import LatencyLimits
from tensorweave.cli.main import main
from tensorweave.cli.replay_calibration import Row, fit, read_cost_model, typical, write_cost_model
from tensorweave.cli.replay_figures import Outcome, replay_figures
from tensorweave.cli.replay_simulation import SimulatedLink, Simulation
from tensorweave.cli.replay_trace import Trace, TraceRequest
from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec, TokenChunk
from tensorweave.cluster.step_settings import StepSettings
from tensorweave.router.dispatch.admission import Limits
from tensorweave.workers.fakes.simulated_gang import CostModel, GangShape
from tensorweave.workers.fakes.stepped_loop import run_stepped

STEPS = StepSettings(
    max_batch_size=8, max_num_tokens=64, max_prompt_tokens_beside_decodes=64, balances_prompts=False, overlaps=False
)
SHAPE = GangShape(num_blocks=40, tokens_per_block=8, steps=STEPS)
COST = CostModel(0.01, 1e-3, 0.0, 1e-3, 0.0)
LIMITS = Limits(max_inflight=1000)


def trace_of(*requests: TraceRequest) -> Trace:
    return Trace(requests, block_tokens=8)


def simulate(trace: Trace, num_gangs: int = 1, shape: GangShape = SHAPE, limits: Limits = LIMITS) -> list[Outcome]:
    simulation = Simulation(trace, num_gangs, shape, COST, "joint", limits)
    return run_stepped(simulation.run())[0]


def test_one_request_takes_the_time_of_its_steps() -> None:
    [outcome] = simulate(trace_of(TraceRequest(3.0, 24, 5, (1, 2, 3))))
    assert outcome.ttft_s == pytest.approx(0.01 + 24 * 1e-3)
    assert outcome.total_s == pytest.approx(outcome.ttft_s + 4 * 0.011)
    assert (outcome.num_output, outcome.num_cached, outcome.error) == (5, 0, None)


def test_an_arrival_waits_for_the_step_that_is_under_way_and_joins_the_next() -> None:
    first, second = simulate(trace_of(TraceRequest(0.0, 8, 100, (1,)), TraceRequest(0.0605, 16, 2, (2, 3))))
    start_s = math.ceil((0.0605 - first.ttft_s) / 0.011) * 0.011 + first.ttft_s
    mixed_s = 0.01 + 16 * 1e-3 + 1e-3
    assert second.ttft_s == pytest.approx(start_s + mixed_s - 0.0605)
    assert first.total_s == pytest.approx(first.ttft_s + 97 * 0.011 + mixed_s + 0.012)


def test_the_router_takes_one_request_after_another() -> None:
    trace = trace_of(TraceRequest(0.0, 8, 1, (1,)), TraceRequest(0.0, 8, 1, (2,)), TraceRequest(0.0, 8, 1, (3,)))
    simulation = Simulation(trace, 1, SHAPE, COST, "joint", LIMITS, router_s=0.012)
    ttft_s = [outcome.ttft_s for outcome in run_stepped(simulation.run())[0]]
    assert ttft_s == pytest.approx([0.012 + 0.018, 0.03 + 0.018, 0.048 + 0.018])


def test_equal_blocks_are_found_as_the_kv_cache_manager_finds_them() -> None:
    trace = trace_of(TraceRequest(0.0, 24, 2, (1, 2, 3)), TraceRequest(1.0, 32, 2, (1, 2, 4, 5)))
    outcomes = simulate(trace)
    assert [outcome.num_cached for outcome in outcomes] == [0, 16]
    assert trace.ideal_hit_rate() == pytest.approx(16 / 56)


def test_many_requests_on_little_memory_all_end_and_leave_nothing() -> None:
    requests = [TraceRequest(0.01 * i, 5 + 13 * i % 90, 1 + 7 * i % 40, tuple(range(i, i + 12))) for i in range(150)]
    simulation = Simulation(trace_of(*requests), 3, SHAPE, COST, "joint", LIMITS)
    outcomes, _ = run_stepped(simulation.run())
    assert [outcome.num_output for outcome in outcomes] == [request.num_output for request in requests]
    for link in simulation.links:
        assert link.gang.is_idle
        assert link.gang.audit() == []
        assert link.num_inflight == 0


def test_a_request_that_is_left_frees_its_blocks() -> None:
    async def run() -> None:
        link = SimulatedLink("gang", SHAPE, COST)
        told: list[TokenChunk] = []
        link.gang.add(GenerateRequest("a", list(range(20)), SamplingSpec(100)), told.append)
        link.gang.add(GenerateRequest("b", list(range(50, 70)), SamplingSpec(100)), told.append)
        await asyncio.sleep(0.5)
        link.cancel("a")
        link.cancel("a")
        await asyncio.sleep(0.0)
        link.cancel("b")
        await asyncio.sleep(1.0)
        assert link.gang.is_idle
        assert link.gang.audit() == []
        with pytest.raises(RequestRejected):
            link.gang.add(GenerateRequest("c", [1] * 400, SamplingSpec(100)), told.append)

    run_stepped(run())


def test_the_routers_limits_hold_in_a_simulation() -> None:
    """A gang can answer 6 requests a second; there come 30."""
    requests = [TraceRequest(i / 30, 60, 20, tuple(range(100 * i, 100 * i + 8))) for i in range(900)]
    shape = GangShape(num_blocks=400, tokens_per_block=8, steps=STEPS)
    free = simulate(trace_of(*requests), shape=shape)
    bounded = simulate(trace_of(*requests), shape=shape, limits=Limits(max_inflight=100, max_ttft_s=3.0))
    assert max(outcome.ttft_s for outcome in free) > 60
    assert {outcome.error for outcome in bounded} == {None, "overloaded"}
    answered = sorted(outcome.ttft_s for outcome in bounded if outcome.error is None)
    assert answered[int(0.99 * len(answered))] <= 3.0
    last_s = max(request.arrival_s + outcome.total_s for request, outcome in zip(requests, free, strict=True))
    assert len(answered) / 30 >= 0.9 * len(requests) / last_s, "goodput is near the peak"


def test_figures() -> None:
    trace = trace_of(TraceRequest(0.0, 8, 3, (1,)), TraceRequest(0.0, 8, 3, (1,)), TraceRequest(0.0, 8, 3, (2,)))
    outcomes = [Outcome(8, 4, 3, 0.5, 0.6), Outcome(8, 0, 3, 5.0, 5.1), Outcome(8, error="overloaded")]
    figures = replay_figures(trace, outcomes, 2.0, LatencyLimits(1.0, 0.1))
    assert (figures["num_answered"], figures["errors"]) == (2, {"overloaded": 1})
    assert (figures["goodput_per_s"], figures["good_share"]) == (0.5, 0.3333)
    assert (figures["hit_rate"], figures["ideal_hit_rate"]) == (0.25, 0.3333)


def test_a_cost_model_is_fitted_and_read_back(tmp_path: Path) -> None:
    true = CostModel(0.004, 2e-5, 1e-9, 3e-5, 0.0)
    rows: list[Row] = []
    for i in range(1, 40):
        prompt = (1.0, 50.0 * i, 1250.0 * i * i, 0.0, 0.0)
        decode = (1.0, 0.0, 0.0, float(i), 700.0 * (40 - i))
        rows += [(features, true.seconds(features)) for features in (prompt, decode)]
    delayed = [(features, 9 * took_s) for features, took_s in rows]
    cost, error = fit(typical([*rows, *delayed, *rows]))
    assert cost.fixed_s == pytest.approx(true.fixed_s, rel=0.01)
    assert cost.per_prompt_token_s == pytest.approx(true.per_prompt_token_s, rel=0.02)
    assert cost.per_kv_token_s == pytest.approx(0.0, abs=1e-10)
    assert error["mean_error"] < 0.01
    write_cost_model(path := tmp_path / "cost.json", cost, {"model": "m"})
    assert read_cost_model(path) == cost
    with pytest.raises(ValueError, match="too few"):
        fit(rows[:5])
    path.write_text('{"cost": {}}')
    with pytest.raises(ValueError, match="no cost model"):
        read_cost_model(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "trace.jsonl:1"),
        ('{"timestamp": 0}', "trace.jsonl:1"),
        ("", "no request"),
        ('{"timestamp": 0, "input_length": 600, "output_length": 1, "hash_ids": [1]}', "make no sense"),
    ],
)
def test_a_wrong_trace_is_told_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(line)
    with pytest.raises(ValueError, match=message):
        Trace.read(path)


def test_the_command_reports_every_policy(tmp_path: Path, capsys: Any) -> None:
    trace, cost, out = tmp_path / "trace.jsonl", tmp_path / "cost.json", tmp_path / "out.json"
    lines = [
        {"timestamp": 100 * i, "input_length": 1500, "output_length": 20, "hash_ids": [0, i // 2, 1000 + i]}
        for i in range(30)
    ]
    trace.write_text("\n".join(map(json.dumps, lines)))
    write_cost_model(cost, COST, {})
    args = ["replay", "--trace", str(trace), "--simulate", "--cost-model", str(cost), "--policy", "all"]
    assert main([*args, "--gangs", "2", "--shrink", "8", "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert {"joint", "round_robin"} <= {run["policy"] for run in runs}
    assert all(run["num_answered"] == 30 for run in runs)
    assert "TTFT median" in capsys.readouterr().out
    assert main(args[:4]) == 2, "a simulation without a cost model"
