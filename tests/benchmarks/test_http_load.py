"""Load over HTTP from several processes: what its figures mean, and the tables of two servers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.http_load import Answer, Client, EventTimeline, load_figures, mixed_figures, run_clients
from benchmarks.http_rivals import closed_loop, mixed_load, parser, tables
from benchmarks.http_servers import our_service, vllm_server, write_model
from benchmarks.vllm_clients import VllmLoad, from_vllm, run_vllm_clients
from tensorweave.cli.suite_shapes import SMOLLM2_135M
from tensorweave.deploy.config import load_config
from tests.cli.conftest import FakeEndpoint
from tests.http_server import PATIENCE_S, serving


@pytest.fixture
def endpoint() -> Iterator[FakeEndpoint]:
    """Answers three pieces."""
    with serving(FakeEndpoint()) as server:
        yield server


def answer(group: str, sent_s: float, *arrivals_s: float, num_prompt: int = 10, error: str = "") -> Answer:
    return Answer(group, sent_s, arrivals_s, len(arrivals_s), num_prompt, error)


def test_clients_in_two_processes(endpoint: FakeEndpoint) -> None:
    clients = [Client([[n, 1], [n, 2]], 3) for n in range(33)]
    answers = run_clients(endpoint.url, "m", clients, PATIENCE_S)
    assert len(answers) == 66
    assert not any(each.error for each in answers)
    assert sorted(body["prompt"] for body in endpoint.bodies) == sorted([n, k] for n in range(33) for k in (1, 2))
    assert all(body["ignore_eos"] and body["temperature"] == 0 for body in endpoint.bodies)
    assert load_figures(answers)["num_answered"] == 66


@pytest.mark.parametrize(("trouble", "output_len", "error"), [("refuse", 3, "HTTP 429"), (None, 4, "3 tokens instead")])
def test_a_client_stops_after_a_failure(
    endpoint: FakeEndpoint, trouble: str | None, output_len: int, error: str
) -> None:
    endpoint.trouble = trouble
    [failed] = run_clients(endpoint.url, "m", [Client([[1], [2]], output_len)], PATIENCE_S)
    assert error in failed.error
    assert load_figures([failed])["num_failed"] == 1


def test_a_token_without_text_is_an_arrival() -> None:
    timeline = EventTimeline(0.0)
    timeline.add({"choices": [{"index": 0, "text": ""}]}, 1.0)
    timeline.add({"choices": [{"index": 0, "text": "a", "finish_reason": "length"}]}, 2.0)
    timeline.add({"choices": [], "usage": {"completion_tokens": 2}}, 3.0)
    assert timeline.piece_s == [1.0, 2.0]


def test_rates_and_latencies_of_a_load() -> None:
    figures = load_figures([answer("", 0.0, 1.0, 1.5, 2.0), answer("", 1.0, 3.0, 3.1, 5.0), answer("", 0, error="no")])
    assert (figures["num_answered"], figures["num_failed"], figures["first_error"]) == (2, 1, "no")
    assert figures["output_tok_s"] == 6 / 5.0
    assert figures["ttft_ms"]["mean"] == 1500
    assert figures["tpot_ms"]["mean"] == pytest.approx(750)
    assert figures["itl_ms"]["max"] == pytest.approx(1900)
    assert figures["e2e_ms"]["mean"] == 3000


def test_gaps_of_decodes_count_while_prompts_arrive() -> None:
    """Prompts are there from 2 to 4.5 s; the decode pauses for a second when the first one comes."""
    decode = answer("decode", 0.0, 0.5, 1.5, 1.9, 2.9, 3.0, 4.4, 4.6, 9.9)
    figures = mixed_figures([decode, answer("prompt", 2.0, 3.0, num_prompt=100), answer("prompt", 3.0, 4.4, 4.5)])
    assert figures["window_s"] == 2.5
    assert figures["decode_tok_s"] == pytest.approx(3 / 2.5)
    assert figures["total_tok_s"] == pytest.approx((3 + 100 + 10 + 3) / 2.5)
    assert figures["gap_ms"]["max"] == pytest.approx(1400)
    assert figures["prompt_ttft_ms"]["median"] == pytest.approx(1200)
    assert figures["all_decoded_throughout"]
    early = mixed_figures([answer("decode", 0.0, 0.5, 2.5), answer("prompt", 2.0, 3.0)])
    assert not early["all_decoded_throughout"]
    assert mixed_figures([decode, answer("prompt", 0, error="refused")])["first_error"] == "refused"


def arguments(*words: str) -> Any:
    return parser().parse_args(["--tokenizer", "t", *words])


def test_every_prompt_of_a_load_is_sent_once() -> None:
    clients = closed_loop(3, 8, SMOLLM2_135M, arguments("--input-len", "5"), seed=1)
    prompts = [tuple(prompt) for client in clients for prompt in client.prompts]
    assert [len(client.prompts) for client in clients] == [3, 3, 2]
    assert len(set(prompts)) == 8
    assert {len(prompt) for prompt in prompts} == {5}


def test_long_prompts_arrive_at_fixed_times() -> None:
    clients = mixed_load(SMOLLM2_135M, arguments("--long-prompts", "3", "--long-len", "40"))
    long = [client for client in clients if client.group == "prompt"]
    assert [client.start_s for client in long] == pytest.approx([3.0, 3.6, 4.2])
    assert len(clients) - len(long) == 64


def vllm_result(num_answered: int, start_s: float) -> dict[str, Any]:
    """Three tokens in two events after the first token, and a request that failed."""
    return {
        "start_times": [start_s + number for number in range(num_answered)] + [start_s],
        "ttfts": [0.01] * num_answered + [0.0],
        "itls": [[0.01, 0.02]] * num_answered + [[]],
        "output_lens": [4] * num_answered + [0],
        "errors": [""] * num_answered + ["gone"],
        "completed": num_answered,
    }


FAKE_VLLM = {
    "__init__": "",
    "benchmarks/__init__": "",
    "benchmarks/lib/__init__": "",
    "benchmarks/lib/endpoint_request_func": """
class RequestFuncOutput:
    def __init__(self, success):
        self.success = success
""",
    "benchmarks/serve": "wait_for_endpoint = fetch_diffusion_metrics = None\n",
    "entrypoints/__init__": "",
    "entrypoints/cli/__init__": "",
    "entrypoints/cli/main": """
import asyncio, json, os, sys, time
import vllm.benchmarks.serve as serving
def main():
    words = dict(zip(sys.argv, sys.argv[1:]))
    if words["--seed"] == "9":
        sys.exit("no such tokenizer")
    time.sleep(0.3 * (int(words["--seed"]) > 1000))
    is_ready = time.perf_counter()
    assert asyncio.run(serving.wait_for_endpoint()).success
    asyncio.run(serving.fetch_diffusion_metrics())
    start = time.perf_counter()
    with open(os.environ["FAKE_LOG"], "a") as log:
        log.write(f"{is_ready} {start}\\n")
    result = {"start_times": [start] * 3, "ttfts": [0.5] * 3, "itls": [[0.5]] * 3, "output_lens": [2] * 3}
    result |= {"errors": [""] * 3, "completed": 3}
    json.dump(result, open(words["--result-dir"] + "/" + words["--result-filename"], "w"))
""",
}


@pytest.fixture
def fake_vllm(tmp_path: Path) -> Path:
    for name, text in FAKE_VLLM.items():
        file = tmp_path / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")
    return tmp_path


def test_processes_of_the_rivals_client_begin_together(fake_vllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_LOG", str(fake_vllm / "log"))
    figures = run_vllm_clients(VllmLoad(4, 6, 10, 2, seed=5), "http://", fake_vllm, str(fake_vllm), 2, PATIENCE_S)
    assert (figures["num_answered"], figures["num_client_processes"]) == (6, 2)
    times = [[float(word) for word in line.split()] for line in (fake_vllm / "log").read_text("utf-8").splitlines()]
    assert max(ready_s for ready_s, _ in times) <= min(start_s for _, start_s in times)
    assert figures["begun_within_s"] == pytest.approx(abs(times[0][1] - times[1][1]))
    assert figures["output_tok_s"] == pytest.approx(12 / figures["elapsed_s"])


def test_a_client_that_ends_early_is_told(fake_vllm: Path) -> None:
    with pytest.raises(RuntimeError, match="no such tokenizer"):
        run_vllm_clients(VllmLoad(4, 6, 10, 2, seed=9), "http://", fake_vllm, str(fake_vllm), 2, PATIENCE_S)


def test_each_process_has_its_share_of_the_clients() -> None:
    parts = VllmLoad(10, 42, 1000, 200, seed=5).split(4)
    assert [part.num_clients for part in parts] == [3, 3, 2, 2]
    assert [part.num_prompts for part in parts] == [11, 11, 10, 10]
    assert len({part.seed for part in parts}) == 4


def test_both_sides_in_one_table() -> None:
    row = {"clients": 8, "output_tok_s": 1100.0, "ttft_ms": {"median": 90.0}, "tpot_ms": {"median": 6.0, "p99": 7.0}}
    rival = from_vllm([vllm_result(2, 7.5), vllm_result(5, 7.0)], num_prompts=8)
    assert (rival["num_failed"], rival["num_client_processes"], rival["begun_within_s"]) == (1, 2, 0.5)
    assert rival["elapsed_s"] == pytest.approx(4.04)
    rival["output_tok_s"] *= rival["elapsed_s"] * 1000 / 28
    text = tables({"tensorweave": {"rows": [row]}, "vllm": {"rows": [{"clients": 8, **rival}]}})
    assert (
        "| 8 | 1,100.0 / 1,000.0 (1.100) | 90.0 / 10.0 (9.000) | 6.0 / 10.0 (0.600) | 7.0 / 10.0 (0.700) | – / 40.0 |"
        in text
    )
    alone = tables({"tensorweave": {"rows": [row], "mixed": {"decode_tok_s": 5.0, "gap_ms": {"median": 1.0}}}})
    assert "| 8 | 1,100.0 | 90.0 | 6.0 | 7.0 | – |" in alone
    assert "|  | 5.0 | – | 1.0 | – | – | – |" in alone


def test_the_service_s_configuration_is_valid(tmp_path: Any) -> None:
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    model_dir = write_model(tmp_path / "model", SMOLLM2_135M, "float32", tmp_path / "tokenizer")
    server = our_service(model_dir, "float32", {"max_seq_len": 512}, ["engine.max_batch_size=4"], "")
    place = list(server.arguments).index("--config")
    config = load_config(server.arguments[place + 1], [server.arguments[place + 3]])
    pool = config.pools["main"]
    assert (pool.load_format, pool.max_seq_len, pool.max_batch_size, config.router.port) == (
        "dummy",
        512,
        4,
        server.port,
    )
    assert (model_dir / "tokenizer.json").exists()
    assert vllm_server(model_dir, "bfloat16", 8192, "").port != server.port
