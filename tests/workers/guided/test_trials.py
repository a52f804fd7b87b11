"""The process that tries guides: bad and costly ones are refused within its limits, and it lives on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator

import pytest

from tensorweave.cluster.errors import NotReady, RequestRejected
from tensorweave.cluster.guide import GUIDE_BACKENDS, Guide
from tensorweave.workers.guided.limits import TRIAL_WALL_S
from tensorweave.workers.guided.trials import Trials
from tensorweave.workers.guided.vocabulary import TokenizerSource
from tests.router.small_tokenizers import byte_level
from tests.workers.guided.vocabularies import SIZE, vocabulary
from tests.workers.waiting import wait_until


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
