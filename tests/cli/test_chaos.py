"""What `tensorweave chaos` does without a service: which faults there are, how answers are judged, what is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tensorweave.cli.chaos import format_table, write_table
from tensorweave.cli.chaos_faults import Fault, choose_faults, possible_faults
from tensorweave.cli.chaos_load import Answer, Job, Load, OracleFailed, Outcome, make_jobs, record_oracle
from tensorweave.cli.chaos_rounds import Row
from tensorweave.cli.chaos_service import ProcessTree
from tensorweave.cli.main import main
from tensorweave.cli.serve import config_path
from tensorweave.deploy.config import load_config
from tensorweave.deploy.tiny_model import write_tiny_model
from tensorweave.router.tokens import Tokenizer
from tests.cli.conftest import FakeEndpoint

CHAOS_YAML = config_path(None).parent / "chaos.yaml"
JOB = Job("/v1/completions", {"model": "fake-model", "prompt": "x", "temperature": 0, "stream": True})
RIGHT = Answer("The capital of France is Paris.", "stop", 7, 3)


def ask(urls: list[str], job: Job = JOB, *, count: int = 1, asks_again: bool = False) -> list[Outcome]:
    load = Load(urls, 5.0, "round", asks_again=asks_again)
    return asyncio.run(load.run_once([job] * count, 1))


def test_faults_follow_the_configuration() -> None:
    one_rank = [fault.name for fault in possible_faults(load_config(CHAOS_YAML))]
    assert one_rank == ["kill-prefill-0", "kill-decode-0", "hang-prefill-0", "hang-decode-0", "kill-router", "drain"]
    changes = ["pools.prefill.tensor_parallel_size=2", "router.replicas=1"]
    more = [fault.name for fault in possible_faults(load_config(CHAOS_YAML, changes))]
    assert more[:3] == ["kill-prefill-0", "kill-prefill-1", "kill-decode-0"]
    assert "kill-router" not in more


def test_faults_are_chosen_by_name_or_kind() -> None:
    config = load_config(CHAOS_YAML)
    assert [fault.name for fault in choose_faults(config, "drain, hang,drain")] == [
        "drain",
        "hang-prefill-0",
        "hang-decode-0",
    ]
    assert [fault.name for fault in choose_faults(config, "none")] == ["none"]
    with pytest.raises(ValueError, match=r"'kill-decode-1'; did you mean 'kill-decode-0'\? It has: kill-prefill-0"):
        choose_faults(config, "kill-decode-1")
    with pytest.raises(ValueError, match="names no fault"):
        choose_faults(config, " ,")


@pytest.mark.parametrize("line", [["--faults", "quake"], ["--set", "ray.address=auto"], ["--set", "router.prot=1"]])
def test_a_mistake_is_told_before_anything_starts(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--config", str(CHAOS_YAML), *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tensorweave: ")
    assert "chaos: starting" not in error


def test_a_right_answer(endpoint: FakeEndpoint) -> None:
    (outcome,) = ask([endpoint.url], replace(JOB, answer=RIGHT))
    assert (outcome.answer, outcome.failure, outcome.is_changed, outcome.num_asks) == (RIGHT, None, False, 1)
    assert len(outcome.progress_s) == 3
    assert outcome.was_open(outcome.progress_s[0])
    assert not outcome.was_open(outcome.sent_s - 1.0)


@pytest.mark.parametrize(
    "due",
    [
        replace(RIGHT, text=RIGHT.text + "!"),
        replace(RIGHT, finish_reason="length"),
        replace(RIGHT, num_output=4),
        replace(RIGHT, num_prompt=8),
    ],
)
def test_a_changed_answer(endpoint: FakeEndpoint, due: Answer) -> None:
    (outcome,) = ask([endpoint.url], replace(JOB, answer=due))
    assert outcome.is_changed
    row = Row(Fault("kill", "decode"))
    row.add([outcome], outcome.sent_s)
    assert (row.num_failed, row.num_changed, row.is_clean) == (0, 1, False)


@pytest.mark.parametrize("trouble", ["refuse", "error_event", "cut", "gibberish"])
def test_a_failed_answer(endpoint: FakeEndpoint, trouble: str) -> None:
    endpoint.trouble = trouble
    (outcome,) = ask([endpoint.url], replace(JOB, answer=RIGHT))
    assert outcome.failure is not None
    assert outcome.num_asks == 1
    assert not outcome.is_changed
    row = Row(Fault("kill", "decode"))
    row.add([outcome], outcome.sent_s)
    assert (row.num_failed, row.is_clean) == (1, False)


def test_a_broken_connection_is_asked_again_at_the_other_door(endpoint: FakeEndpoint) -> None:
    (outcome,) = ask(["http://127.0.0.1:9", endpoint.url], replace(JOB, answer=RIGHT), asks_again=True)
    assert (outcome.answer, outcome.num_asks) == (RIGHT, 2)
    endpoint.trouble = "cut"
    (outcome,) = ask([endpoint.url, endpoint.url], asks_again=True)
    assert outcome.failure is not None
    assert outcome.num_asks == 6
    assert len(outcome.progress_s) == 1, "what comes again is no progress"


def test_a_fresh_prompt_has_a_salt_of_its_own(endpoint: FakeEndpoint) -> None:
    ask([endpoint.url], replace(JOB, is_fresh=True), count=2)
    assert [body["cache_salt"] for body in endpoint.bodies] == ["round-0", "round-1"]
    ask([endpoint.url])
    assert "cache_salt" not in endpoint.bodies[-1]


def test_the_longest_silence_counts_from_the_fault() -> None:
    outcome = Outcome(JOB, sent_s=1.0, progress_s=[2.0, 3.0, 7.0, 8.0], ended_s=8.5)
    assert outcome.longest_silence_s(0.0) == 4.0
    assert outcome.longest_silence_s(4.5) == 2.5
    assert outcome.longest_silence_s(7.5) == 0.5
    assert Outcome(JOB, sent_s=1.0, ended_s=6.0, failure="lost").longest_silence_s(2.0) == 4.0


def test_an_oracle_has_no_failures(endpoint: FakeEndpoint) -> None:
    (known,) = asyncio.run(record_oracle([endpoint.url], [JOB], 1, 5.0))
    assert known.answer == RIGHT
    assert known.body["stop"] == ["Fra"], "the first of four is to end at a piece of its own answer"
    endpoint.trouble = "refuse"
    with pytest.raises(OracleFailed, match="1 requests failed in the undisturbed run, the first: HTTP 429"):
        asyncio.run(record_oracle([endpoint.url], [JOB], 1, 5.0))


def test_jobs_are_of_all_kinds_and_the_same_for_a_seed() -> None:
    jobs = make_jobs("m", 40, seed=3)
    assert jobs == make_jobs("m", 40, seed=3)
    assert jobs != make_jobs("m", 40, seed=4)
    assert {job.path for job in jobs} == {"/v1/completions", "/v1/chat/completions"}
    assert {job.is_fresh for job in jobs} == {True, False}
    assert all("seed" in job.body for job in jobs if job.body["temperature"])
    assert {job.body["temperature"] for job in jobs} == {0, 0.9}


def test_the_table_and_its_file(tmp_path: Path) -> None:
    rows = [Row(Fault("kill", "decode", 1), 2, 40, 0, 1, [0.5, 2.0]), Row(Fault("drain"), 2, 9)]
    write_table(rows, tmp_path / "deep" / "out.json")
    assert json.loads((tmp_path / "deep" / "out.json").read_text()) == [
        {
            "fault": "kill-decode-1",
            "injected": 2,
            "requests": 40,
            "failed": 0,
            "changed": 1,
            "recover_s_median": 1.25,
            "recover_s_max": 2.0,
        },
        {
            "fault": "drain",
            "injected": 2,
            "requests": 9,
            "failed": 0,
            "changed": 0,
            "recover_s_median": None,
            "recover_s_max": None,
        },
    ]
    header, first, second = format_table(rows).splitlines()
    assert header.split() == list(rows[0].to_plain())
    assert first.split() == ["kill-decode-1", "2", "40", "0", "1", "1.25", "2.00"]
    assert second.split() == ["drain", "2", "9", "0", "0", "-", "-"]


def test_only_a_tree_of_our_own_is_killed() -> None:
    script = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'input()'])"
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE) as ours:
        while not (children := psutil.Process(ours.pid).children()):
            assert ours.poll() is None
        with ProcessTree() as tree:
            tree.note(ours.pid)
            found = tree.find(children[0].pid)
            assert found == children[0]
            tree.note(psutil.Process().ppid())
            assert {process.pid for process in tree.living()} == {ours.pid, children[0].pid}
        assert not tree.living()


def test_the_tiny_model_has_a_tokenizer_and_a_chat_template(tmp_path: Path) -> None:
    tokenizer = Tokenizer.load(write_tiny_model(tmp_path / "tiny"))
    text = "naïve 東京 😀\n"
    assert tokenizer.backend.decode(tokenizer.encode(text)) == text
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.has_chat_template
    assert tokenizer.eos_id == 2
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size == 259
