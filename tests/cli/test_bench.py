"""Benchmarks: the arithmetic of their figures, the load generator against a fake endpoint, the step overhead."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from tensorweave.cli.bench_steps import measure
from tensorweave.cli.figures import aligned, distribution, percentile
from tensorweave.cli.main import main
from tensorweave.cli.prompts import random_prompts, vocab_size_of
from tests.workers.tiny_models import make_model


def test_distributions() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0], 50) == 2.5
    assert percentile([5.0], 99) == 5.0
    figures = distribution([0.003, 0.001, 0.002], 1e3)
    assert (figures["median"], figures["mean"], figures["min"], figures["max"]) == (2.0, 2.0, 1.0, 3.0)
    assert distribution([]) == {}


def test_a_table_is_as_wide_as_its_widest_cells() -> None:
    assert aligned([["name", "n"], ["a", "10"]], num_left=1) == "name   n\na     10"
    assert aligned([["name", "n"], ["a", "10"]]) == "name   n\n   a  10"


def test_random_prompts_have_exact_lengths_and_follow_the_seed() -> None:
    prompts = random_prompts(4, 33, 1000, seed=5)
    assert [len(prompt) for prompt in prompts] == [33] * 4
    assert all(100 <= token < 900 for prompt in prompts for token in prompt)
    assert prompts == random_prompts(4, 33, 1000, seed=5)
    assert prompts != random_prompts(4, 33, 1000, seed=6)


def test_a_model_without_vocabulary_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="gives no vocab_size"):
        vocab_size_of(tmp_path)


def bench_serve(url: str, out: Path, *more: str) -> tuple[int, dict[str, Any]]:
    sizes = ["--num-prompts", "6", "--concurrency", "2", "--input-len", "5", "--output-len", "3", "--num-warmups", "0"]
    code = main(["bench", "serve", "--url", url, *sizes, "--json", str(out), *more])
    return code, json.loads(out.read_text())


@pytest.mark.parametrize("kind", ["completions", "chat"])
def test_load_on_an_endpoint(endpoint: Any, tmp_path: Path, kind: str) -> None:
    code, report = bench_serve(endpoint.url, tmp_path / "out" / "report.json", "--endpoint", kind)
    assert code == 0
    assert (report["num_answered"], report["num_failed"]) == (6, 0)
    assert (report["num_output_tokens"], report["num_prompt_tokens"]) == (18, 42)
    assert report["output_tok_s"] == pytest.approx(18 / report["elapsed_s"])
    assert set(report["ttft_ms"]) == set(report["tpot_ms"]) == set(report["e2e_ms"]) >= {"mean", "median", "p99"}
    assert report["settings"]["model"] == "fake-model"
    assert report["machine"]["versions"]["python"]
    assert endpoint.num_connections <= 3  # one asks for the model's name; two are kept alive
    if kind == "completions":
        assert all(len(body["prompt"]) == 5 and body["ignore_eos"] for body in endpoint.bodies)


def test_load_on_an_endpoint_that_asks_for_a_key(endpoint: Any, tmp_path: Path) -> None:
    endpoint.api_key = "secret-key-1"
    out = tmp_path / "report.json"
    code, report = bench_serve(endpoint.url, out, "--api-key", "secret-key-1")
    assert (code, report["num_answered"], report["num_failed"]) == (0, 6, 0)
    assert "secret-key-1" not in json.dumps(report["settings"])


def test_load_at_a_rate(endpoint: Any, tmp_path: Path) -> None:
    _, report = bench_serve(endpoint.url, tmp_path / "report.json", "--request-rate", "40")
    assert report["num_answered"] == 6
    assert report["elapsed_s"] > 0.05  # six Poisson arrivals at 40 a second, the first at once


@pytest.mark.parametrize(
    ("trouble", "kind"),
    [("refuse", "HTTP 429"), ("error_event", "error event"), ("cut", "connection"), ("gibberish", "protocol")],
)
def test_failures_are_counted_by_kind(endpoint: Any, tmp_path: Path, trouble: str, kind: str) -> None:
    endpoint.trouble = trouble
    code, report = bench_serve(endpoint.url, tmp_path / "report.json", "--model", "m")
    assert code == 1
    assert report["failures"] == {kind: 6}
    assert report["num_answered"] == 0


def test_an_absent_endpoint_is_a_failure_of_every_request(tmp_path: Path) -> None:
    code, report = bench_serve("http://127.0.0.1:9", tmp_path / "report.json", "--model", "m")
    assert code == 1
    assert report["failures"] == {"connection": 6}


def test_a_url_without_a_scheme_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "serve", "--url", "localhost:8000", "--model", "m"]) == 2
    assert "not an http:// or https:// address" in capsys.readouterr().err


def test_step_overhead_is_measured_over_full_batches() -> None:
    began_s = time.perf_counter()
    row = measure(batch_size=4, input_len=8, num_steps=16, seed=0)
    took_ms = (time.perf_counter() - began_s) * 1e3
    assert (row["batch_size"], row["num_steps"]) == (4, 15)  # the first of the 16 tokens comes from the prefill step
    assert 0 < row["outside_forward_ms_median"] <= row["outside_forward_ms_p99"]
    assert row["outside_forward_ms_median"] * row["num_steps"] / 2 < took_ms, "milliseconds, of every step"


def test_time_to_first_token_alone_and_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_model("llama", tmp_path)
    out = tmp_path / "report.json"
    sizes = ["--input-lens", "5", "90", "5000", "--num-prompts", "2", "--set", "kv_cache_config.max_tokens=8192"]
    assert main(["bench", "ttft", "--model", str(tmp_path), *sizes, "--dtype", "float32", "--json", str(out)]) == 0
    runs = json.loads(out.read_text())["runs"]
    assert [row["prompt tokens"] for row in runs["ttft"]] == [5, 90]  # 5000 are more than the model takes
    assert all(row["first, one gang"] > 0 and row["second, two gangs"] > 0 for row in runs["ttft"])
    assert runs["switch"][0]["0 decoding"].startswith("one")  # too short to be handed over
    assert "second, cost" in capsys.readouterr().out
