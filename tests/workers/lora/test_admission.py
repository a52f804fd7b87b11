"""Rank 0's admission of requests with adapters: held until all ranks have them, in bounded memory, and never stuck."""

from __future__ import annotations

from collections.abc import Collection

import pytest

from tensorweave.cluster.adapter import Adapter
from tensorweave.cluster.errors import NotReady, RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.executor.inbox import Inbox
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.lora.admission import AdapterAdmission
from tensorweave.workers.lora.orders import AdapterOrder
from tensorweave.workers.step.hold import Put
from tests.workers.waiting import WAIT_S

A, B, C = (Adapter(name, name.encode() * 16, f"/{name}") for name in "abc")


class Bench:
    """Satisfies `Entrance`. Two ranks, room for two adapters."""

    def __init__(self, timeout_s: float = WAIT_S) -> None:
        self.inbox = Inbox(64)
        self.refused: dict[str, TensorweaveError] = {}
        self.extra_holds: Collection[bytes] = ()
        self.wrong: set[str] = set()
        self.admission = AdapterAdmission(2, 2, self.inbox, self, timeout_s)
        self.orders: list[AdapterOrder] = []
        self.arrived: list[str] = []
        self._adapters: dict[str, Adapter] = {}

    def enter(self, request: GenerateRequest, put: Put) -> None:
        if request.request_id in self.wrong:
            raise RequestRejected("its grammar is wrong")
        put(request, self.extra_holds)

    def refuse(self, hold: bytes, error: TensorweaveError) -> None:
        self.refused |= {request.request_id: error for request in self.inbox.drop(hold)}

    def refuse_one(self, request: GenerateRequest, error: TensorweaveError) -> None:
        if self.inbox.drop_one(request):
            self.refused[request.request_id] = error

    def ask(self, name: str, adapter: Adapter) -> None:
        self._adapters[name] = adapter
        self.admission.admit(GenerateRequest(name, (1,), SamplingSpec(4), adapter=adapter))

    def gather(self) -> list[str]:
        """What the ranks are told now: 'load a' or 'forget a'."""
        step = self.inbox.gather(0, 0.0)
        self.orders += step.adapter_orders
        self.arrived += [request.request_id for request in step.arrivals]
        return [
            f"load {order.adapter.name}" if order.adapter is not None else f"forget {order.digest[:1].decode()}"
            for order in step.adapter_orders
        ]

    def report(self, adapter: Adapter, problem: str = "", ranks: Collection[int] = (0, 1)) -> None:
        numbers = [order.number for order in self.orders if order.adapter == adapter]
        for rank in ranks:
            self.admission.take_report(OrderReport(adapter.digest, numbers[-1], rank, problem))

    def make_ready(self, *adapters: Adapter) -> None:
        for adapter in adapters:
            self.ask(f"first of {adapter.name}", adapter)
        self.gather()
        for adapter in adapters:
            self.report(adapter)
            self.end(f"first of {adapter.name}")
        self.gather()
        self.arrived.clear()

    def end(self, name: str) -> None:
        self.admission.let_go(name, self._adapters[name].digest)


def test_a_request_arrives_once_all_ranks_have_its_adapter() -> None:
    bench = Bench()
    bench.ask("one", A)
    bench.ask("two", A)
    assert bench.gather() == ["load a"]
    bench.report(A, ranks=[1])
    assert bench.gather() == []
    bench.report(A, ranks=[0])
    bench.ask("three", A)
    assert bench.gather() == []
    assert bench.arrived == ["one", "two", "three"]


def test_the_one_that_was_asked_for_longest_ago_gives_way() -> None:
    bench = Bench()
    bench.make_ready(A, B)
    bench.ask("again", A)
    bench.end("again")
    bench.ask("new", C)
    assert bench.gather() == ["forget b", "load c"]


def test_with_all_in_use_a_request_waits_until_one_has_ended() -> None:
    bench = Bench()
    bench.make_ready(A, B)
    bench.ask("a", A)
    bench.ask("b", B)
    bench.ask("c", C)
    assert bench.gather() == []
    assert bench.admission.num_waiting == 1
    bench.end("b")
    assert bench.gather() == ["forget b", "load c"]
    bench.report(C)
    bench.gather()
    assert bench.arrived == ["a", "b", "c"]


def test_what_a_rank_refuses_ends_its_requests_and_makes_room() -> None:
    bench = Bench()
    bench.make_ready(A)
    bench.ask("a", A)
    bench.ask("b", B)
    bench.ask("c", C)
    assert bench.gather() == ["load b"]
    bench.report(B, "it has rank 1000", ranks=[1])
    assert "adapter 'b' was refused: it has rank 1000" in bench.refused["b"].message
    assert bench.gather() == ["forget b", "load c"]
    bench.report(B, ranks=[0])  # a late report changes nothing
    bench.ask("again", B)
    bench.report(C)
    bench.gather()
    assert bench.arrived == ["a", "c"]


def test_a_request_that_waits_for_its_grammar_too_does_not_arrive_before_that_is_there() -> None:
    bench = Bench()
    bench.extra_holds = (b"grammar",)
    bench.ask("one", A)
    bench.ask("wrong", A)
    bench.wrong = {"wrong"}
    bench.gather()
    bench.report(A)
    assert list(bench.refused) == ["wrong"]
    bench.gather()
    assert bench.arrived == []
    bench.inbox.release(b"grammar")
    bench.gather()
    assert bench.arrived == ["one"]


def test_a_held_request_ends_with_its_cancel() -> None:
    bench = Bench()
    bench.ask("one", A)
    bench.inbox.cancel("one")
    bench.gather()
    assert bench.arrived == ["one"], "it arrives to be ended"
    bench.end("one")
    bench.report(A)
    assert bench.gather() == []


def test_one_whose_requests_were_cancelled_while_it_was_loaded_gives_way() -> None:
    bench = Bench()
    for name, adapter in (("a", A), ("b", B), ("c", C)):
        bench.ask(name, adapter)
    assert bench.gather() == ["load a", "load b"]
    bench.inbox.cancel("a")
    bench.gather()
    bench.end("a")
    bench.report(A)
    assert bench.gather() == ["forget a", "load c"]


def test_a_load_that_is_late_or_cut_off_is_refused() -> None:
    late = Bench(timeout_s=0.05)
    with pytest.raises(NotReady, match=r"waits for room|ranks 0, 1 have not loaded it"):
        late.admission.load(A)
    closing = Bench()
    closing.ask("one", A)
    closing.admission.close()
    assert isinstance(closing.refused["one"], NotReady)


def test_ids_that_are_in_use_leave_nothing_behind() -> None:
    bench = Bench()
    bench.make_ready(A, B)
    bench.ask("one", A)
    with pytest.raises(ValueError, match="in use"):
        bench.ask("one", C)
    bench.end("one")
    assert bench.admission.num_waiting == 0
