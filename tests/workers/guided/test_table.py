"""A rank's table of grammars follows rank 0's orders one after the other and reports each compilation once."""

from __future__ import annotations

import queue

import pytest

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import Guide
from tensorweave.workers.gang.order_report import OrderReport
from tensorweave.workers.guided.compilers import Compilers
from tensorweave.workers.guided.orders import GuideOrder
from tensorweave.workers.guided.table import GrammarTable
from tests.workers.guided.vocabularies import vocabulary
from tests.workers.waiting import WAIT_S, wait_until

GOOD, BAD = Guide("regex", "a"), Guide("regex", "(a")


def open_compilers() -> Compilers:
    return Compilers(vocabulary())


def test_orders_are_carried_out_and_reported() -> None:
    reports: queue.Queue[OrderReport] = queue.Queue()
    table = GrammarTable(3, open_compilers, reports.put)
    table.follow([GuideOrder("load"), GuideOrder("compile", GOOD, number=7), GuideOrder("compile", BAD)])
    assert reports.get(timeout=WAIT_S) == OrderReport(GOOD.digest, 7, 3)
    failed = reports.get(timeout=WAIT_S)
    assert failed.digest == BAD.digest
    assert "parenthesis" in failed.problem
    assert table.get(GOOD) is not None
    assert table.get(BAD) is None
    table.follow([GuideOrder("forget", digest=GOOD.digest), GuideOrder("forget", digest=b"unknown")])
    wait_until(lambda: table.get(GOOD) is None)
    table.close()


def test_a_grammar_is_stopped_at_once_even_if_it_was_forgotten() -> None:
    reports: queue.Queue[OrderReport] = queue.Queue()
    slow: list[bytes] = []
    table = GrammarTable(0, open_compilers, reports.put, slow.append)
    table.follow([GuideOrder("compile", GOOD)])
    reports.get(timeout=WAIT_S)
    grammar = table.get(GOOD)
    assert grammar is not None
    grammar.report_slow()
    grammar.report_slow()
    assert slow == [GOOD.digest]
    table.follow([GuideOrder("forget", digest=GOOD.digest)])
    wait_until(lambda: table.get(GOOD) is None)
    table.follow([GuideOrder("stop", digest=GOOD.digest)])
    assert "too long" in grammar.problem
    table.close()


def test_a_vocabulary_that_cannot_be_read_is_reported_and_tried_again() -> None:
    reports: queue.Queue[OrderReport] = queue.Queue()
    is_there = [False]

    def read() -> Compilers:
        if not is_there[0]:
            raise RequestRejected("no tokenizer here")
        return open_compilers()

    table = GrammarTable(0, read, reports.put)
    table.follow([GuideOrder("load"), GuideOrder("compile", GOOD)])
    assert "no tokenizer" in reports.get(timeout=WAIT_S).problem
    is_there[0] = True
    table.follow([GuideOrder("compile", GOOD)])
    assert reports.get(timeout=WAIT_S).problem == ""
    table.close()


@pytest.mark.parametrize(
    "order", [GuideOrder("load"), GuideOrder("compile", GOOD, number=2), GuideOrder("stop", digest=b"x")]
)
def test_orders_and_reports_cross_the_wire(order: GuideOrder) -> None:
    assert GuideOrder.from_wire(order.to_wire()) == order
    report = OrderReport(b"d", 2, 1, "why")
    assert OrderReport.from_wire(report.to_wire()) == report
