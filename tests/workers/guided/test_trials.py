"""The process that tries guides: bad and costly ones are refused within its limits, and it lives on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.cluster.guide import GUIDE_BACKENDS, Guide
from tensorweave.workers.guided.limits import TRIAL_WALL_S
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.guided.vocabulary import TokenizerSource
from tests.router.small_tokenizers import byte_level
from tests.workers.guided.vocabularies import SIZE, vocabulary
from tests.workers.waiting import WAIT_S, wait_until


@pytest.fixture(scope="module")
def trials() -> Iterator[Trials]:
    rust = byte_level().backend.backend_tokenizer
    trials = Trials(TokenizerSource("", json=rust.to_str()), SIZE)
    yield trials
    trials.close()


def test_it_reads_the_vocabulary(trials: Trials) -> None:
    read = trials.vocabulary()
    assert read.size == SIZE
    assert json.loads(read.tokenizer_json)["model"] == json.loads(vocabulary().tokenizer_json)["model"]
    assert len(read.special) == 3


def test_its_priority_is_beside_that_of_its_rank(trials: Trials) -> None:
    """Where Linux schedules sessions in turns, a low priority in another session is none."""
    trials.vocabulary()
    assert trials._process is not None
    process = trials._process._process.pid
    assert os.getsid(process) == os.getsid(0)
    assert os.getpgid(process) == process  # a Ctrl-C is not for it


@pytest.mark.parametrize("backend", GUIDE_BACKENDS)
def test_a_guide_in_order_passes_and_a_wrong_one_does_not(backend: str, trials: Trials) -> None:
    for text, has_problem in (("[a-z]{3}", False), ("(a", True)):
        assert bool(trials.run(Guide("regex", text, backend)).problem) == has_problem  # type: ignore[arg-type]


BOMBS = {
    "takes minutes to compile": Guide("json_schema", json.dumps({"enum": [f"value_{i}" for i in range(400_000)]})),
    "nested deep": Guide("json_schema", '{"type": "array", "items": ' * 20_000 + "{}" + "}" * 20_000),
    "more readings with each token": Guide("regex", "".join(f"(.*)*{letter}" for letter in "opqrstuvwxyz")),
    "no end": Guide("ebnf", 'root ::= "b" root'),
    "nothing at all": Guide("regex", "[^\\x00-\\U0010ffff]"),
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_within_its_limits(name: str, trials: Trials) -> None:
    started_s = time.monotonic()
    result = trials.run(BOMBS[name])
    took_s = time.monotonic() - started_s
    if name != "no end":  # it goes on for as long as it is asked, like any string
        assert result.problem
    assert took_s < TRIAL_WALL_S + 5.0
    assert not trials.run(Guide("regex", "ab")).problem


def test_trials_at_the_same_time_are_told_apart(trials: Trials) -> None:
    guides = [Guide("regex", text) for text in ("a{3}", "(a", "[a-z]+", "b|c", "(b")]
    with ThreadPoolExecutor(len(guides)) as threads:
        results = list(threads.map(trials.run, guides, timeout=WAIT_S))
    assert [bool(result.problem) for result in results] == [False, True, False, False, True]


LOWERED = """
import os
os.setpriority(os.PRIO_PROCESS, 0, 9)
from tensorweave.workers.guided.trial_process import _run_on_thread

def niceness():
    return {{os.getpriority(os.PRIO_PROCESS, int(thread)) for thread in os.listdir("/proc/self/task")}}

def work():
    print(niceness(), flush=True)
    while niceness() != {{19}}:
        pass

_run_on_thread(work, {seconds})
os._exit(0)  # in order, at a priority that leaves it little of a busy machine, this would take long
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads have a priority of their own on Linux alone")
@pytest.mark.parametrize(("seconds", "at_first"), [(0.0, "{19}"), (0.2, "{9}")])
def test_a_trial_that_takes_long_has_a_low_priority(seconds: float, at_first: str) -> None:
    """All of its threads, after so much processor time."""
    if os.getpriority(os.PRIO_PROCESS, 0) > 9:
        pytest.skip("these tests run at a lower priority themselves")
    code = LOWERED.format(seconds=seconds)
    command = [sys.executable, "-c", code]
    child = subprocess.run(command, capture_output=True, text=True, timeout=10 * WAIT_S, check=True)
    assert child.stdout.split() == [at_first]


def test_a_process_that_was_killed_is_started_again(trials: Trials) -> None:
    trials.run(Guide("regex", "a"))
    process = trials._process
    assert process is not None
    process._process.kill()
    wait_until(lambda: not process.is_alive)
    assert not trials.run(Guide("regex", "ab")).problem
    assert trials._process is not process


def test_a_process_that_dies_answers_what_it_was_asked(trials: Trials) -> None:
    trials.vocabulary()
    process = trials._process
    assert process is not None
    process._process.kill()
    with pytest.raises(NotReady):
        process.run(Guide("regex", "a"))


def test_a_tokenizer_that_cannot_be_loaded_is_the_requests_error() -> None:
    trials = Trials(TokenizerSource("/nowhere/at/all"), SIZE)
    with pytest.raises(RequestRejected, match="tokenizer"):
        trials.run(Guide("regex", "a"))
    trials.close()


def test_none_is_started_once_it_is_closed() -> None:
    trials = Trials(TokenizerSource("/nowhere/at/all"), SIZE)
    trials.close()
    with pytest.raises(NotReady):
        trials.run(Guide("regex", "a"))
    assert trials._process is None
