"""`Arrivals`: rank 0 combines the ranks' results of a fetch into one `KvArrived`."""

from __future__ import annotations

from tensorweave.workers.step.kv_exchange import KvArrived
from tensorweave.workers.transfer.receiving.arrivals import GRACE_S, Arrivals, FetchResult
from tensorweave.workers.transfer.transfer_stats import TransferStats


class RecordingInbox:
    def __init__(self) -> None:
        self.arrived: list[KvArrived] = []

    def put_arrived(self, arrived: KvArrived) -> None:
        self.arrived.append(arrived)

    def put_released(self, request_id: str) -> None:
        raise AssertionError("no lease here")


def make_arrivals(num_ranks: int) -> tuple[Arrivals, RecordingInbox, list[float]]:
    inbox, now = RecordingInbox(), [100.0]
    arrivals = Arrivals(num_ranks, TransferStats(), lambda: now[0])
    arrivals.start(inbox)
    return arrivals, inbox, now


def test_a_fetch_has_arrived_when_it_has_on_all_ranks() -> None:
    arrivals, inbox, _ = make_arrivals(3)
    arrivals.add(FetchResult("r", 2, 100, True))  # a rank may be ahead of this one's step loop
    arrivals.expect("r", 32, 100, 60.0)
    arrivals.add(FetchResult("r", 0, 100, True, first_token=7))
    assert inbox.arrived == []
    arrivals.add(FetchResult("r", 1, 64, False))
    assert inbox.arrived == [KvArrived("r", 64, 7)]


def test_a_rank_that_received_nothing_ends_the_fetch_at_once() -> None:
    arrivals, inbox, _ = make_arrivals(3)
    arrivals.expect("r", 32, 100, 60.0)
    arrivals.add(FetchResult("r", 1, 32, False))
    assert inbox.arrived == [KvArrived("r", 32, None)]
    arrivals.add(FetchResult("r", 0, 100, True, first_token=7))
    assert len(inbox.arrived) == 1


def test_silent_ranks_are_awaited_until_the_deadline() -> None:
    arrivals, inbox, now = make_arrivals(2)
    arrivals.expect("r", 0, 100, 60.0)
    arrivals.add(FetchResult("r", 0, 100, True, first_token=7))
    arrivals.expire(now[0] + 60.0)
    assert inbox.arrived == []
    arrivals.expire(now[0] + 60.0 + GRACE_S)
    assert inbox.arrived == [KvArrived("r", 0, 7)]


def test_after_a_failure_the_other_ranks_have_a_grace_period() -> None:
    arrivals, inbox, now = make_arrivals(2)
    arrivals.expect("r", 0, 100, 60.0)
    arrivals.add(FetchResult("r", 0, 64, False))
    arrivals.expire(now[0] + GRACE_S / 2)
    assert inbox.arrived == []
    arrivals.expire(now[0] + GRACE_S)
    assert inbox.arrived == [KvArrived("r", 0, None)]
