"""What `tensorweave chaos` does without a service: which faults there are, how answers are judged, what is told."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from tensorweave.cli.chaos import format_table, write_table
from tensorweave.cli.chaos_faults import Fault, choose_faults, possible_faults, wait_until_midway
from tensorweave.cli.chaos_rounds import FaultResult
from tensorweave.cli.main import main
from tensorweave.cli.process_tree import ProcessTree
from tensorweave.cli.serve import config_path
from tensorweave.cli.trial_load import FrontEnds, Load, OracleFailed, Outcome, record_oracle
from tensorweave.cli.trial_requests import RecordedAnswer, TrialRequest, make_requests
from tensorweave.cli.trial_service import ServiceBroken, TrialService, prepared_trial
from tensorweave.deploy.api_keys import digest_of
from tensorweave.deploy.config import load_config
from tensorweave.deploy.tiny_model import write_tiny_model
from tensorweave.router.text.tokens import Tokenizer
from tests.cli.conftest import PATIENCE_S, FakeEndpoint

CHAOS_YAML = config_path(None).parent / "chaos.yaml"
JOB = TrialRequest("/v1/completions", {"model": "fake-model", "prompt": "x", "temperature": 0, "stream": True})
RIGHT = RecordedAnswer("The capital of France is Paris.", "stop", 7, 3)


def ask(urls: list[str], job: TrialRequest = JOB, *, count: int = 1, resends: bool = False) -> list[Outcome]:
    load = Load(FrontEnds(urls, PATIENCE_S), "round", resends=resends)
    return asyncio.run(load.run_once([job] * count, 1))


def test_faults_follow_the_configuration() -> None:
    one_rank = [fault.name for fault in possible_faults(load_config(CHAOS_YAML))]
    assert one_rank == [
        "kill-prefill-0",
        "kill-decode-0",
        "hang-prefill-0",
        "hang-decode-0",
        "kill-router",
        "kill-supervisor",
        "drain",
    ]
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
def test_a_mistake_is_reported_before_the_service_starts(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["chaos", "--config", str(CHAOS_YAML), *line]) == 2
    error = capsys.readouterr().err
    assert error.startswith("tensorweave: ")
    assert "chaos: starting" not in error


@pytest.mark.parametrize("command", ["chaos", "soak"])
@pytest.mark.parametrize("key", [[], ["--api-key", "another-key-2"], ["--api-key", "short"]])
def test_a_service_that_asks_for_a_key_is_not_started_without(
    command: str, key: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, "--config", str(CHAOS_YAML), "--set", "security.api_keys=[secret-key-1]", *key]) == 2
    error = capsys.readouterr().err
    assert "API key" in error or "--api-key" in error
    assert not set(key[1:]) & set(error.split())


def test_what_serve_is_called_with() -> None:
    changes = [f"security.api_keys=['{digest_of('secret-key-1')}']"]
    with prepared_trial(CHAOS_YAML, changes, "secret-key-1") as trial:
        assert trial.arguments[:4] == ["--config", str(CHAOS_YAML.resolve()), "--set", changes[0]]
        assert load_config(trial.arguments[1], trial.arguments[3::2]) == trial.config
        model = Path(trial.config.model)
        assert trial.config.model_name == "tiny-random"
        assert (model / "config.json").exists()
        front_ends = TrialService(trial, ProcessTree()).front_ends(5.0)
        assert (len(front_ends.urls), front_ends.api_key) == (2, "secret-key-1")
        assert "secret-key-1" not in repr((trial, front_ends))
    assert not model.exists()


def test_load_brings_its_key(endpoint: FakeEndpoint) -> None:
    endpoint.api_key = "secret-key-1"
    load = Load(FrontEnds([endpoint.url], PATIENCE_S, "secret-key-1"), "round")
    (outcome,) = asyncio.run(load.run_once([JOB], 1))
    assert outcome.answer == RIGHT
    (outcome,) = ask([endpoint.url])
    assert outcome.failure == "HTTP 401: no key"


def test_a_right_answer(endpoint: FakeEndpoint) -> None:
    (outcome,) = ask([endpoint.url], replace(JOB, answer=RIGHT))
    assert (outcome.answer, outcome.failure, outcome.is_changed, outcome.num_sends) == (RIGHT, None, False, 1)
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
def test_a_changed_answer(endpoint: FakeEndpoint, due: RecordedAnswer) -> None:
    (outcome,) = ask([endpoint.url], replace(JOB, answer=due))
    assert outcome.is_changed
    row = FaultResult(Fault("kill", "decode"))
    row.add([outcome], outcome.sent_s)
    assert (row.num_failed, row.num_changed, row.is_clean) == (0, 1, False)


@pytest.mark.parametrize("trouble", ["refuse", "error_event", "cut", "gibberish"])
def test_a_failed_answer(endpoint: FakeEndpoint, trouble: str) -> None:
    endpoint.trouble = trouble
    (outcome,) = ask([endpoint.url], replace(JOB, answer=RIGHT))
    assert outcome.failure is not None
    assert outcome.num_sends == 1
    assert not outcome.is_changed
    row = FaultResult(Fault("kill", "decode"))
    row.add([outcome], outcome.sent_s)
    assert (row.num_failed, row.is_clean) == (1, False)


def test_a_request_is_sent_again_to_the_other_front_end(endpoint: FakeEndpoint) -> None:
    (outcome,) = ask(["http://127.0.0.1:9", endpoint.url], replace(JOB, answer=RIGHT), resends=True)
    assert (outcome.answer, outcome.num_sends) == (RIGHT, 2)
    endpoint.trouble = "cut"
    (outcome,) = ask([endpoint.url, endpoint.url], resends=True)
    assert outcome.failure is not None
    assert outcome.num_sends == 6
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


def test_a_fault_strikes_a_service_at_work(endpoint: FakeEndpoint) -> None:
    async def strike() -> None:
        load = Load(FrontEnds([endpoint.url], PATIENCE_S), "round")
        running = asyncio.create_task(load.run([JOB], 3))
        await wait_until_midway(Fault("kill", "both"), load, 3, PATIENCE_S)
        assert load.num_midway == 3
        load.stop()
        endpoint.may_go_on.set()
        await running
        assert load.num_midway == 0
        assert all(outcome.failure is None for outcome in load.outcomes)

    endpoint.may_go_on.clear()
    asyncio.run(strike())


def test_no_request_is_on_its_way_to_a_service_that_drains(endpoint: FakeEndpoint) -> None:
    async def strike() -> None:
        load = Load(FrontEnds([endpoint.url], PATIENCE_S), "round")
        load.hold()
        running = asyncio.create_task(load.run([JOB], 3))
        await load.until_answered()
        assert load.outcomes == []
        load.resume()
        await wait_until_midway(Fault("drain"), load, 3, PATIENCE_S)
        assert [outcome.is_midway for outcome in load.outcomes] == [True] * 3
        endpoint.may_go_on.set()
        await running
        assert len(load.outcomes) == 3

    endpoint.may_go_on.clear()
    asyncio.run(strike())


def test_a_fault_has_a_deadline(endpoint: FakeEndpoint) -> None:
    async def strike() -> None:
        load = Load(FrontEnds([endpoint.url], PATIENCE_S), "round")
        running = asyncio.create_task(load.run([JOB], 3))
        with pytest.raises(
            ServiceBroken, match=r"kill-both-0: within 0\.2 s there were never 3 partly answered requests at once"
        ):
            await wait_until_midway(Fault("kill", "both"), load, 3, 0.2)
        load.stop()
        await running

    endpoint.trouble = "refuse"
    asyncio.run(strike())


def test_an_oracle_has_no_failures(endpoint: FakeEndpoint) -> None:
    (known,) = asyncio.run(record_oracle(FrontEnds([endpoint.url], PATIENCE_S), [JOB], 1))
    assert known.answer == RIGHT
    assert known.body["stop"] == ["Fra"], "the first of four is to end at a piece of its own answer"
    endpoint.trouble = "refuse"
    with pytest.raises(OracleFailed, match="1 requests failed in the undisturbed run, the first: HTTP 429"):
        asyncio.run(record_oracle(FrontEnds([endpoint.url], PATIENCE_S), [JOB], 1))


def test_jobs_are_of_all_kinds_and_the_same_for_a_seed() -> None:
    jobs = make_requests("m", 40, seed=3)
    assert jobs == make_requests("m", 40, seed=3)
    assert jobs != make_requests("m", 40, seed=4)
    assert {job.path for job in jobs} == {"/v1/completions", "/v1/chat/completions"}
    assert {job.is_fresh for job in jobs} == {True, False}
    assert all("seed" in job.body for job in jobs if job.body["temperature"])
    assert {job.body["temperature"] for job in jobs} == {0, 0.9}


def test_the_table_and_its_file(tmp_path: Path) -> None:
    rows = [FaultResult(Fault("kill", "decode", 1), 2, 40, 0, 1, [0.5, 2.0]), FaultResult(Fault("drain"), 2, 9)]
    write_table(rows, tmp_path / "deep" / "out.json")
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out.json"]
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
            time.sleep(0.01)
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
    assert tokenizer.chat_template
    assert tokenizer.eos_id == 2
    config = json.loads((tmp_path / "tiny" / "config.json").read_text())
    assert config["vocab_size"] == tokenizer.vocab_size == 259
