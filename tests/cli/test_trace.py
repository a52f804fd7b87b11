"""`bench trace`: figures from made-up traces whose answer is known, and the command on a CPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tensorweave import RequestOutput
from tensorweave.cli import bench_trace
from tensorweave.cli.bench_trace import host_figures, steps_table, take_steps
from tensorweave.cli.main import main
from tensorweave.cli.trace_events import Event, Trace, events_of, last_part
from tensorweave.cli.trace_figures import device_span, device_steps, operator_shares, short_name
from tensorweave.cli.trace_row import chrome_path, told_row
from tensorweave.llmapi.completion_output import Update


def kernel(name: str, start_us: float, length_us: float, launch: int) -> Event:
    return Event("kernel", name, start_us, start_us + length_us, launch, "7")


def graph_steps(num_steps: int, *, period_us: float = 100.0) -> list[Event]:
    """Each step is one launch: embed 0–10, layers 10–40 and 38–70 (they overlap, by dependent launch), argmax 75–90."""
    events = []
    for step in range(num_steps):
        began_us = step * period_us
        events += [
            kernel("embed", began_us, 10, step + 1),
            kernel("layer", began_us + 10, 30, step + 1),
            kernel("layer", began_us + 38, 32, step + 1),
            kernel("argmax", began_us + 75, 15, step + 1),
        ]
    return events


def test_a_replayed_graph_is_busy_idle_inside_and_idle_between() -> None:
    steps, shares = device_steps(graph_steps(30), num_expected=30)
    assert (steps.step_us, steps.busy_us, steps.inside_us, steps.between_us) == pytest.approx((100, 85, 5, 10))
    assert steps.num_steps == 26
    assert [(share.name, share.per_step, share.us_each) for share in shares] == [
        ("layer", 2, pytest.approx(31)),
        ("argmax", 1, 15),
        ("embed", 1, 10),
    ]
    assert shares[0].share == pytest.approx(62 / 87)


def test_kernels_that_are_launched_one_by_one_leave_all_gaps_between_launches() -> None:
    one_by_one = [Event(e.kind, e.name, e.start_us, e.end_us, n, e.thread) for n, e in enumerate(graph_steps(30))]
    steps, _ = device_steps(one_by_one, num_expected=30)
    assert (steps.busy_us, steps.inside_us, steps.between_us) == pytest.approx((85, 0, 15))


def test_copies_are_told_apart_from_work() -> None:
    copies = [Event("gpu_memcpy", "Memcpy HtoD", step * 100 + 91, step * 100 + 95, 0, "9") for step in range(30)]
    events = sorted([*graph_steps(30), *copies], key=lambda event: event.start_us)
    steps, _ = device_steps(events, num_expected=30)
    assert (steps.between_us, steps.copies_us) == pytest.approx((10, 4))


def test_the_steps_are_found_although_a_trace_starts_and_ends_within_one() -> None:
    steps, _ = device_steps(graph_steps(30)[2:-1], num_expected=31)
    assert steps.step_us == pytest.approx(100)


def test_one_slow_step_shows_in_the_tail() -> None:
    late = [Event(e.kind, e.name, e.start_us + 500, e.end_us + 500, e.correlation, "7") for e in graph_steps(30)[80:]]
    steps, _ = device_steps([*graph_steps(30)[:80], *late], num_expected=30)
    assert steps.step_p99_us > 400
    assert steps.between_us == pytest.approx(10 + 500 / 26)


def test_a_trace_without_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="no kernel of the trace ran about 64 times"):
        device_steps(graph_steps(8), num_expected=64)
    with pytest.raises(ValueError, match="only 2 steps"):
        device_steps(graph_steps(3), num_expected=3)


def test_operators_count_without_those_inside_them() -> None:
    def operator(name: str, start_us: float, end_us: float, thread: str = "1") -> Event:
        return Event("cpu_op", name, start_us, end_us, 0, thread)

    events = [operator("linear", 0, 10), operator("mm", 1, 8), operator("empty", 2, 3), operator("mul", 10, 14)]
    events += [operator("mm", 0, 5, thread="2")]
    shares = operator_shares(sorted(events, key=lambda event: (event.start_us, -event.end_us)), num_steps=2)
    assert {share.name: share.us_per_step * 2 for share in shares} == {"linear": 3, "mm": 11, "empty": 1, "mul": 4}
    assert shares[0].name == "mm"
    assert sum(share.share for share in shares) == pytest.approx(1)


def test_events_of_a_chrome_trace() -> None:
    entries = [
        {"ph": "X", "cat": "kernel", "name": "k", "ts": 5.5, "dur": 2, "tid": 7, "args": {"correlation": 9}},
        {"ph": "X", "cat": "python_function", "name": "f", "ts": 1, "dur": 1, "tid": 1},
        {"ph": "i", "cat": "kernel", "name": "marker", "ts": 1},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaGraphLaunch", "ts": 1, "dur": 3, "tid": 4},
    ]
    launch, k = events_of(entries)
    assert (launch.kind, launch.correlation) == ("cuda_runtime", 0)
    assert (k.start_us, k.end_us, k.correlation, k.thread) == (5.5, 7.5, 9, "7")


def test_the_last_part_of_a_trace() -> None:
    events = graph_steps(10)
    assert last_part(events, 150e-6) == events[-5:]  # it ends at 990: all that starts from 840 on
    assert last_part([], 1.0) == []


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("void at::native::(anonymous namespace)::pick<float, 2>(Tensor<float>, int)", "at::native::pick"),
        ("nvjet_tst_128x8_64x12_2x1_v_bz_splitK_TNT", "nvjet_tst_128x8_64x12_2x1_v_bz_splitK_TNT"),
        ("a" * 80, "a" * 63 + "…"),
    ],
)  # fmt: skip
def test_kernel_names_are_shortened(name: str, short: str) -> None:
    assert short_name(name) == short


def stats_row(iter_ms: float, wait_ms: float, num_generating: int = 8, num_context: int = 0) -> dict[str, Any]:
    running = {"numGenRequests": num_generating, "numContextRequests": num_context}
    times = {"iterLatencyMS": iter_ms, "waitLatencyMS": wait_ms, "forwardLatencyMS": wait_ms + 1}
    return {**times, "inflightBatchingStats": running}


def test_the_host_s_time_is_that_without_a_wait() -> None:
    steps = [stats_row(5.0, 4.0), stats_row(5.0, 3.5), stats_row(5.0, 4.2)]
    on_gpu = host_figures(steps, is_gpu=True)
    assert on_gpu["host_ms_median"] == pytest.approx(1.0)
    assert on_gpu["host_ms_p99"] == pytest.approx(1.5, abs=0.02)
    assert host_figures(steps, is_gpu=False)["host_ms_median"] == pytest.approx(0.0)


class Running:
    """Stands for an LLM and its two requests: each call of `get_stats` takes the next rows."""

    def __init__(self, *rows: list[dict[str, Any]], ends: bool = False) -> None:
        self._rows, self._ends = list(rows), ends

    def result(self, timeout: float) -> None:
        if self._rows or not self._ends:
            raise TimeoutError

    def get_stats(self) -> list[dict[str, Any]]:
        return self._rows.pop(0) if self._rows else []


def test_steps_count_in_which_all_requests_decode() -> None:
    old, mixed, alone, good = stats_row(1, 0, 2), stats_row(1, 0, 1, 1), stats_row(1, 0, 1), stats_row(3, 1, 2)
    running: Any = Running([old, old, old], [mixed, good], [alone, good, good])
    assert take_steps(running, [running, running], 3) == [good, good, good]
    over: Any = Running([], [good], ends=True)
    with pytest.raises(ValueError, match="raise --output-len"):
        take_steps(over, [over, over], 2)


def test_the_end_of_a_request_is_seen_although_nobody_reads_its_tokens() -> None:
    running: Any = Running([], [stats_row(3, 1, 2)])
    outputs = [RequestOutput(number, None, [1, 2]) for number in range(2)]
    outputs[1]._push(Update(index=0, token_ids=[7], finish_reason="length"))
    assert not outputs[1].finished
    with pytest.raises(ValueError, match="raise --output-len"):
        take_steps(running, outputs, 2)


def test_requests_that_never_run_together_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count(step=50)
    monkeypatch.setattr(bench_trace, "time", SimpleNamespace(monotonic=lambda: float(next(ticks))))
    running: Any = Running([], [stats_row(1, 0, 1)])
    with pytest.raises(ValueError, match="0 steps had all 2 requests in them: lower --batch-sizes"):
        take_steps(running, [running, running], 2)


def test_the_table_of_steps() -> None:
    row = {"batch_size": 8, "step_ms": 5.0, "host_ms_median": 1.0, "host_ms_p99": 1.5, "traced_step_ms": 6.0}
    gpu = {"step_us": 6000.0, "busy_us": 5700.0, "inside_us": 180.0, "between_us": 120.0, "untraced_idle": 0.015}
    head, on_cpu, on_gpu = steps_table([row, {**row, **gpu}]).splitlines()
    assert on_gpu.split() == ["8", "5.000", "1.000", "1.500", "6.000", "95.0%", "3.0%", "2.0%", "1.5%"]
    assert on_cpu.split()[-5:] == ["6.000", "–", "–", "–", "–"]
    assert "idle between" in head


def test_a_chrome_trace_has_a_name_of_its_own(tmp_path: Path) -> None:
    assert chrome_path(tmp_path / "a" / "trace.json", "b64") == tmp_path / "a" / "trace-b64.json"
    assert (tmp_path / "a").is_dir()


def test_what_the_gpu_did_between_two_times() -> None:
    events = [kernel("a", 20, 10, 1), kernel("b", 25, 10, 2), kernel("a", 45, 5, 3), kernel("c", 52, 8, 4)]
    span, shares = device_span([*events, kernel("late", 200, 9, 5)], began_us=10, ended_us=100)
    assert (span.before_ms, span.busy_ms, span.idle_ms, span.after_ms) == pytest.approx((0.01, 0.028, 0.012, 0.04))
    assert span.gaps_ms == [pytest.approx((0.025, 0.01)), pytest.approx((0.04, 0.002))]
    assert [(share.name, share.per_step) for share in shares] == [("a", 2), ("b", 1), ("c", 1)]
    with pytest.raises(ValueError, match="no kernel ran"):
        device_span(events, began_us=61, ended_us=100)


def test_the_line_of_a_row() -> None:
    row = {"row": "b8", "seconds": 1.0, "traced_s": 1.1}
    span = {"before_ms": 5.0, "busy_ms": 900.0, "idle_ms": 90.0, "after_ms": 5.0, "gaps_ms": [(700.0, 60.0)]}
    assert told_row(row) == "b8: 1.000 s, 1.100 s traced"
    assert told_row(row | span).endswith(
        "GPU busy 900.0 ms, idle 90.0 ms, 5.0 ms after the last kernel; longest gaps, ms: 60.0 at 700"
    )


def test_times_of_the_clock_on_a_trace_s_axis(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(json.dumps({"baseTimeNanoseconds": 5_000_000, "traceEvents": []}))
    trace = Trace()
    trace.read(tmp_path / "t.json")
    assert trace.at_us(5_002_500) == 2.5


def test_rows_of_a_suite_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chrome = ["--chrome", str(tmp_path / "t.json")]
    assert main(["bench", "trace", "--suite", "tiny", "--rows", "b4_16_8", *chrome, "--set", "device=cpu"]) == 0
    assert "b4_16_8, by time" in capsys.readouterr().out
    assert json.loads((tmp_path / "t-b4_16_8.json").read_text())["traceEvents"]
    assert main(["bench", "trace", "--model", "smollm2", "--rows", "b4_16_8"]) == 2
    assert "--rows are those of a suite" in capsys.readouterr().err


def test_a_trace_on_a_cpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The requests could last for ten seconds, so that a busy machine does not see their end; they are cancelled."""
    sizes = ["--batch-sizes", "1", "3", "--input-len", "8", "--output-len", "30000", "--num-steps", "12"]
    out = ["--json", str(tmp_path / "o.json"), "--chrome", str(tmp_path / "t.json")]
    assert main(["bench", "trace", "--suite", "tiny", *sizes, *out, "--set", "device=cpu"]) == 0
    rows = json.loads((tmp_path / "o.json").read_text())["runs"]["steps"]
    assert [row["batch_size"] for row in rows] == [1, 3]
    for row in rows:
        assert 0 < row["host_ms_median"] <= row["host_ms_p99"]
        assert sum(share["share"] for share in row["shares"]) == pytest.approx(1)
        assert any(share["name"].startswith("aten::") and share["per_step"] > 1 for share in row["shares"])
    assert json.loads((tmp_path / "t-b3.json").read_text())["traceEvents"]
    assert "a step of 3, by time" in capsys.readouterr().out
