"""Rank 0's inbox: what belongs to one request must not befall another that has its id later."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from tensorweave.cluster.errors import Overloaded
from tensorweave.cluster.protocol import GenerateRequest, SamplingSpec
from tensorweave.workers.executor import inbox as inbox_module
from tensorweave.workers.executor.inbox import Inbox
from tests.workers.waiting import WAIT_S


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def request(deadline_s: float | None) -> GenerateRequest:
    return GenerateRequest("job-7/d1", (1, 2, 3), SamplingSpec(max_tokens=4), deadline_s=deadline_s)


def asks(number: int) -> GenerateRequest:
    return GenerateRequest(f"r{number}", (1, 2, 3), SamplingSpec(max_tokens=4))


def test_an_idle_loop_waits_for_the_requests_that_it_is_to_expect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "EXPECT_WAIT_S", WAIT_S)
    inbox = Inbox(8)
    inbox.expect(3)
    inbox.put(asks(0))
    with ThreadPoolExecutor(1) as pool:
        gathered = pool.submit(inbox.gather, 0, WAIT_S)
        for number in (1, 2):
            assert not gathered.done()
            inbox.put(asks(number))
        assert [each.request_id for each in gathered.result(WAIT_S).arrivals] == ["r0", "r1", "r2"]
    inbox.put(asks(3))
    assert len(inbox.gather(0, WAIT_S).arrivals) == 1, "nothing is expected any more"


def test_prompts_that_fill_a_step_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inbox_module, "EXPECT_WAIT_S", WAIT_S)
    monkeypatch.setattr(inbox_module, "EXPECTED_TOKENS", 6)
    inbox = Inbox(8)
    inbox.expect(3)
    for number in range(2):
        inbox.put(asks(number))
    assert len(inbox.gather(0, WAIT_S).arrivals) == 2


def test_a_loop_that_runs_waits_for_nobody_and_an_idle_one_not_for_ever() -> None:
    inbox = Inbox(8)
    inbox.expect(3)
    inbox.put(asks(0))
    assert len(inbox.gather(0, 0.0).arrivals) == 1
    inbox.put(asks(1))
    assert len(inbox.gather(0, WAIT_S).arrivals) == 1


def expired(inbox: Inbox) -> list[str]:
    return list(inbox.gather(0, 0.0).expired)


def test_a_deadline_comes_once() -> None:
    clock = Clock()
    inbox = Inbox(4, clock)
    inbox.put(request(10.0))
    clock.now_s = 9.9
    assert expired(inbox) == []
    clock.now_s = 10.0
    assert expired(inbox) == ["job-7/d1"]
    assert expired(inbox) == []


@pytest.mark.parametrize("second_s", [600.0, None])
def test_the_deadline_of_a_request_that_has_ended_is_not_its_successors(second_s: float | None) -> None:
    """A client that names its requests asks again: the first answer's deadline passes under the second."""
    clock = Clock()
    inbox = Inbox(4, clock)
    inbox.put(request(60.0))
    inbox.gather(0, 0.0)
    inbox.forget("job-7/d1")
    clock.now_s = 59.0
    inbox.put(request(second_s))
    clock.now_s = 61.0
    assert expired(inbox) == []
    clock.now_s = 59.0 + 600.0
    assert expired(inbox) == (["job-7/d1"] if second_s else [])


def test_the_deadline_of_one_that_was_refused_is_nobodys() -> None:
    clock = Clock()
    inbox = Inbox(1, clock)
    inbox.put(request(None))
    with pytest.raises(Overloaded):
        inbox.put(GenerateRequest("other", (1,), SamplingSpec(max_tokens=1), deadline_s=5.0))
    with pytest.raises(ValueError, match="in use"):
        inbox.put(request(5.0))
    clock.now_s = 6.0
    assert expired(inbox) == []
