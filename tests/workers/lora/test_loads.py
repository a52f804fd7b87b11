"""Adapters that come and go under traffic: no answer of the wrong one, none of the base model's, and flat memory."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import PreTrainedModel

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.step.adapter import RankAdapter
from tests.workers.lora.adapter_gang import AdapterGang, adapter_at
from tests.workers.lora.markers import make_marked_model, write_marker
from tests.workers.tiny_models import their_greedy
from tests.workers.waiting import collect_until, wait_until

PROMPT = list(range(5, 45))
MARKERS = (40, 77, 101, 133, 150, 199)
NUM_LOADS = 1000
CAPACITY = 4


class Setup:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.model: PreTrainedModel = make_marked_model(path / "model")
        [self.base] = their_greedy(self.model, [PROMPT], 6)
        for marker in MARKERS:
            write_marker(self.model, path / str(marker), marker)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    return Setup(tmp_path_factory.mktemp("markers"))


@pytest.fixture(scope="module")
def gang(setup: Setup) -> Iterator[AdapterGang]:
    with AdapterGang(setup.path / "model", lora_config={"max_loras": 3, "max_cpu_loras": CAPACITY}) as gang:
        yield gang


def _alive() -> set[int]:
    """The ids of all adapters in this process, garbage among them."""
    return {id(each) for each in gc.get_objects() if type(each) is RankAdapter}


@pytest.mark.no_cover
def test_a_thousand_loads_under_traffic(setup: Setup, gang: AdapterGang) -> None:
    """Six adapters in room for four, in turn and together, with the base model between them."""
    adapters = {marker: adapter_at(setup.path / str(marker)) for marker in MARKERS}
    gc.collect()
    num_threads, of_others = threading.active_count(), _alive()
    before = gang.gauges()["adapter_loads_total"]
    turn = 0
    while gang.gauges()["adapter_loads_total"] - before < NUM_LOADS:
        asked: dict[str, int | None] = {}
        for place in range(8):
            marker = MARKERS[(turn + place) % len(MARKERS)] if place else None
            asked[gang.ask(PROMPT, adapters.get(marker or 0), 6)] = marker
        for marker, tokens in zip(asked.values(), gang.wait(list(asked)), strict=True):
            assert tokens == (setup.base if marker is None else [marker] * 6)
        turn += 1
        gang.tokens.clear()
    assert gang.gauges()["adapters_in_memory"] <= CAPACITY
    collect_until(lambda: len(_alive() - of_others) <= CAPACITY)  # the last step lets go of its rows
    wait_until(lambda: threading.active_count() <= num_threads + CAPACITY + 1)  # each load has a timer while it runs


def test_a_reload_takes_effect_with_the_next_request_and_meets_no_old_block(setup: Setup, gang: AdapterGang) -> None:
    path = setup.path / "reloaded"
    for marker in (50, 60, 50):
        write_marker(setup.model, path, marker)
        loaded = gang.leader.load_adapter("reloaded", str(path))
        assert gang.answer(PROMPT, loaded, 6) == [marker] * 6
        name = gang.ask(PROMPT, loaded, 6)
        assert gang.wait([name]) == [[marker] * 6]
        assert gang.cached[name] > 0, "its own blocks are found again"
    name = gang.ask(PROMPT, None, 6)
    assert gang.wait([name]) == [setup.base]


def test_an_answer_goes_on_with_the_adapter_that_it_began_with(setup: Setup, gang: AdapterGang) -> None:
    path = setup.path / "replaced"
    write_marker(setup.model, path, 50)
    streaming = gang.ask(PROMPT, gang.leader.load_adapter("replaced", str(path)), 400)
    write_marker(setup.model, path, 60)
    assert gang.answer(PROMPT, adapter_at(path), 6) == [60] * 6
    assert gang.wait([streaming]) == [[50] * 400]


def test_files_that_have_changed_are_not_taken_for_those_that_were_loaded(setup: Setup, gang: AdapterGang) -> None:
    path = setup.path / "changed"
    write_marker(setup.model, path, 51)  # which no other test has loaded
    before = adapter_at(path, "changed")
    write_marker(setup.model, path, 60)
    with pytest.raises(RequestRejected, match="the files of adapter 'changed' have changed since it was loaded"):
        gang.answer(PROMPT, before)
    assert gang.answer(PROMPT, adapter_at(path), 6) == [60] * 6


def test_what_is_not_there_is_refused(setup: Setup, gang: AdapterGang) -> None:
    with pytest.raises(RequestRejected, match="no PEFT adapter can be read from"):
        gang.leader.load_adapter("missing", str(setup.path / "missing"))


def test_a_cancelled_request_lets_go_of_its_adapter(setup: Setup, gang: AdapterGang) -> None:
    adapters = [adapter_at(setup.path / str(marker)) for marker in MARKERS]
    names = [gang.ask(PROMPT, adapter, 2000) for adapter in adapters]
    for name in names:
        gang.leader.cancel_request(name)
    gang.wait(names)
    assert gang.answer(PROMPT, adapters[0], 6) == [MARKERS[0]] * 6


def test_a_gang_without_adapters_refuses_them(setup: Setup) -> None:
    from tensorweave.workers.build import build_executor
    from tensorweave.workers.gang.comm import SoloComm
    from tests.workers.engine_drive import engine_args

    executor = build_executor(engine_args(setup.path / "model", guided_decoding_backend=None), SoloComm())
    adapter = adapter_at(setup.path / str(MARKERS[0]))
    with pytest.raises(RequestRejected, match="switched off"):
        executor.enqueue_request(GenerateRequest("r", PROMPT, SamplingSpec(2), adapter=adapter))
    with pytest.raises(RequestRejected, match="switched off"):
        executor.load_adapter("name", adapter.path)
