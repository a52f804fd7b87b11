"""Rank 0 holds requests until every rank has compiled their grammar; whatever goes wrong ends those requests alone."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from tensorweave.cluster.errors import NotReady, Overloaded, RequestRejected, TensorweaveError
from tensorweave.cluster.guide import Guide
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.executor.inbox import Inbox
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.guided import admission as admission_module
from tensorweave.workers.guided.admission import GuideAdmission
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.guided.trial import TrialResult
from tests.workers.waiting import WAIT_S, wait_until

GUIDE = Guide("regex", "a")


class Trier:
    """Answers once `is_open`."""

    def __init__(self) -> None:
        self.result: TrialResult | Exception = TrialResult("", 1000)
        self.tried: list[Guide] = []
        self.is_open = threading.Event()
        self.is_open.set()

    def run(self, guide: Guide) -> TrialResult:
        self.tried.append(guide)
        assert self.is_open.wait(WAIT_S)
        if isinstance(self.result, Exception):
            raise self.result
        return self.result


class Bench:
    def __init__(self, size: int = 2) -> None:
        self.now_s = 0.0
        self.inbox = Inbox(64)
        self.trier = Trier()
        self.refused: dict[str, TensorweaveError] = {}
        self.admission = GuideAdmission(size, self.trier, self.inbox, self._refuse, clock=lambda: self.now_s)
        self.orders: list[GuideOrder] = []
        self.arrived: list[str] = []

    def _refuse(self, guide: Guide, error: TensorweaveError) -> None:
        self.refused |= {request.request_id: error for request in self.inbox.drop(guide.digest)}

    def ask(self, name: str, guide: Guide = GUIDE) -> None:
        self.admission.admit(GenerateRequest(name, (1,), SamplingSpec(4, guide=guide)), self.inbox.put)

    def gather(self) -> None:
        step = self.inbox.gather(0, 0.0)
        self.orders += step.guide_orders
        self.arrived += [request.request_id for request in step.arrivals]

    def verbs(self) -> list[str]:
        self.gather()
        return [order.verb for order in self.orders]

    def report(self, rank: int, guide: Guide = GUIDE, problem: str = "") -> None:
        numbers = [order.number for order in self.orders if order.guide == guide]
        self.admission.take_report(OrderReport(guide.digest, numbers[-1], rank, problem))

    def make_ready(self, guide: Guide) -> None:
        wait_until(lambda: guide in [order.guide for order in self.orders] or self.verbs() is None)
        for rank in range(2):
            self.report(rank, guide)


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    bench.admission.close()


def test_requests_arrive_together_when_the_last_rank_has_compiled(bench: Bench) -> None:
    bench.ask("r1")
    bench.ask("r2")
    wait_until(lambda: bench.verbs() == ["load", "compile"])
    bench.report(1)
    bench.gather()
    assert bench.arrived == []
    bench.report(0)
    bench.ask("r3")
    bench.gather()
    assert bench.arrived == ["r1", "r2", "r3"]
    assert bench.trier.tried == [GUIDE], "one trial for all"


@pytest.mark.parametrize("late", [False, True])
def test_a_refused_guide_ends_its_requests_and_is_remembered(bench: Bench, late: bool) -> None:
    bench.trier.result = TrialResult("no such keyword", is_late=late)
    bench.ask("r1")
    wait_until(lambda: "r1" in bench.refused)
    assert "no such keyword" in bench.refused["r1"].message
    assert isinstance(bench.refused["r1"], NotReady if late else RequestRejected)
    assert bench.verbs()[-1] == "forget"
    if not late:
        with pytest.raises(RequestRejected, match="no such keyword"):
            bench.ask("r2")
        assert len(bench.trier.tried) == 1
    else:
        bench.ask("r2")
        wait_until(lambda: "r2" in bench.refused)


def test_one_rank_that_cannot_compile_ends_the_requests(bench: Bench) -> None:
    bench.ask("r1")
    wait_until(lambda: "compile" in bench.verbs())
    bench.report(0)
    bench.report(1, problem="no memory")
    assert "no memory" in bench.refused["r1"].message
    bench.report(1)
    bench.gather()
    assert bench.arrived == []


def test_a_rank_that_is_late_ends_the_requests(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(admission_module, "READY_TIMEOUT_S", 0.05)
    bench.ask("r1")
    wait_until(lambda: "r1" in bench.refused)
    assert "ranks 0, 1" in bench.refused["r1"].message
    assert isinstance(bench.refused["r1"], NotReady)


def test_guides_that_wait_too_long_are_refused_with_a_later_time(bench: Bench) -> None:
    bench.trier.is_open.clear()
    guides = [Guide("regex", letter) for letter in "abc"]
    for name, guide in zip(("r1", "r2", "r3"), guides, strict=True):
        bench.ask(name, guide)
    wait_until(lambda: len(bench.trier.tried) == 2)
    bench.now_s += 1000.0
    bench.trier.is_open.set()
    for guide in guides[:2]:
        bench.make_ready(guide)
    wait_until(lambda: "r3" in bench.refused)
    assert isinstance(bench.refused["r3"], Overloaded)
    bench.gather()
    assert sorted(bench.arrived) == ["r1", "r2"]


def test_a_held_request_that_is_cancelled_arrives_with_its_cancel_and_no_more(bench: Bench) -> None:
    bench.ask("r1")
    bench.ask("r2")
    wait_until(lambda: "compile" in bench.verbs())
    assert bench.inbox.cancel("r1")
    step = bench.inbox.gather(0, 0.0)
    assert [request.request_id for request in step.arrivals] == step.cancelled == ["r1"]
    for rank in range(2):
        bench.report(rank)
    bench.gather()
    assert bench.arrived == ["r2"]


def test_a_cancelled_requests_id_may_come_again_with_another_grammar(bench: Bench) -> None:
    other = Guide("regex", "b")
    bench.ask("r1")
    wait_until(lambda: "compile" in bench.verbs())
    bench.inbox.cancel("r1")
    bench.inbox.gather(0, 0.0)
    bench.inbox.forget("r1")
    bench.ask("r1", other)
    bench.make_ready(GUIDE)
    bench.gather()
    assert bench.arrived == [], "its grammar is not ready"
    bench.make_ready(other)
    bench.gather()
    assert bench.arrived == ["r1"]


def test_reports_of_an_earlier_order_do_not_count(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(admission_module, "READY_TIMEOUT_S", 0.05)
        bench.ask("r1")
        wait_until(lambda: "r1" in bench.refused)
    bench.ask("r2")
    wait_until(lambda: bench.verbs().count("compile") == 2)
    first, second = (order.number for order in bench.orders if order.verb == "compile")
    for number in (first, second):
        bench.gather()
        assert bench.arrived == [], "the ranks forget what they have compiled by the first order"
        for rank in range(2):
            bench.admission.take_report(OrderReport(GUIDE.digest, number, rank))
    bench.gather()
    assert bench.arrived == ["r2"]


def test_refusals_keep_no_requests_alive(bench: Bench) -> None:
    bench.admission.stop(GUIDE.digest)
    lengths = set()
    for number in range(3):
        with pytest.raises(RequestRejected) as refusal:
            bench.ask(f"r{number}")
        lengths.add(len(refusal.traceback))
    assert len(lengths) == 1


def test_a_process_that_cannot_be_started_is_the_requests_error(bench: Bench) -> None:
    bench.trier.result = OSError("no memory for a process")
    bench.ask("r1")
    wait_until(lambda: "r1" in bench.refused)
    assert isinstance(bench.refused["r1"], NotReady)
    assert "no memory" in bench.refused["r1"].message


def test_a_process_that_has_died_is_the_requests_error(bench: Bench) -> None:
    bench.trier.result = NotReady("the process has ended")
    bench.ask("r1")
    wait_until(lambda: "r1" in bench.refused)
    bench.trier.result = TrialResult("", 10)
    bench.ask("r2")
    bench.make_ready(GUIDE)
    bench.gather()
    assert bench.arrived == ["r2"], "and not for ever"


def test_the_cache_is_bounded_and_what_it_forgets_is_compiled_again(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(admission_module, "CACHE_BYTES", 2500)
    guides = [Guide("regex", letter) for letter in "abc"]
    for guide in guides:
        if guide is guides[2]:
            bench.ask("again", guides[0])  # so that the second one is the oldest
        bench.ask(guide.text, guide)
        bench.make_ready(guide)
    assert bench.verbs().count("forget") == 1
    assert bench.orders[-1].digest == guides[1].digest
    assert bench.admission.num_ready == 2
    bench.orders.clear()
    bench.ask("b again", guides[1])
    bench.make_ready(guides[1])
    bench.gather()
    assert bench.arrived[-1] == "b again"


def test_a_text_that_is_too_long_is_refused_before_it_is_tried(bench: Bench) -> None:
    with pytest.raises(RequestRejected, match="over the limit"):
        bench.ask("r1", Guide("regex", "a" * (1 << 20)))
    assert bench.trier.tried == []


@pytest.mark.parametrize("is_ready", [True, False])
def test_a_grammar_that_is_stopped_is_refused_from_then_on(bench: Bench, is_ready: bool) -> None:
    bench.ask("r1")
    if is_ready:
        bench.make_ready(GUIDE)
    bench.admission.stop(GUIDE.digest)
    assert bench.verbs()[-1] == "stop"
    assert bench.arrived == (["r1"] if is_ready else [])
    assert ("r1" in bench.refused) != is_ready
    with pytest.raises(RequestRejected, match="too long"):
        bench.ask("r2")


def test_closing_ends_what_is_held(bench: Bench) -> None:
    bench.trier.is_open.clear()
    bench.ask("r1")
    with ThreadPoolExecutor(1) as pool:
        pool.submit(bench.admission.close).result(WAIT_S)
    assert isinstance(bench.refused["r1"], NotReady)
    bench.trier.is_open.set()
