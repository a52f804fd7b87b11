"""A user's object that drafts: what it sees, what it may return, and what becomes of its mistakes."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest

from tensorweave.cluster.protocol import SamplingSpec
from tensorweave.workers.gang.comm import Comm, SoloComm
from tensorweave.workers.speculation.user_drafter import DraftBatch, UserDrafter
from tensorweave.workers.step.request import LlmRequest
from tests.workers.engine_drive import run_ranks
from tests.workers.waiting import WAIT_S, wait_until


def request(order: int = 1) -> LlmRequest:
    return LlmRequest(f"r{order}", order, [1, 2, 3, 4], 3, SamplingSpec(64))


class Returning:
    def __init__(self, *drafts: Any) -> None:
        self.drafts = list(drafts)
        self.seen: list[DraftBatch] = []

    def prepare_draft_tokens(self, scheduled_requests: DraftBatch) -> None:
        self.seen.append(scheduled_requests)
        for each in scheduled_requests.generation_requests:
            draft = self.drafts.pop(0)
            if isinstance(draft, Exception):
                raise draft
            if draft is not None:
                each.py_draft_tokens = draft


def test_it_sees_the_requests_and_their_tokens() -> None:
    user = Returning([7, 8], None)
    drafts = UserDrafter(user, SoloComm()).draft([(request(5), 4), (request(6), 2)])
    assert [list(draft.tokens) for draft in drafts] == [[7, 8], []]
    [batch] = user.seen
    seen = batch.generation_requests[0]
    assert (seen.request_id, seen.tokens, seen.prompt_len, seen.max_draft_len) == (5, (1, 2, 3, 4), 3, 4)
    assert seen.get_tokens() == seen.get_tokens(0) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("draft", "want"),
    [
        ((5, 6), [5, 6]),
        (np.array([5, 6]), [5, 6]),
        ([np.int64(5)], [5]),
        (range(9), [0, 1, 2]),
        ([5, -9, 1 << 70], [5, -1, -1]),
        ([], []),
    ],
)
def test_any_sequence_of_integers_is_a_draft(draft: Any, want: list[int]) -> None:
    """Longer ones are cut; what is no token of any vocabulary becomes -1."""
    [got] = UserDrafter(Returning(draft), SoloComm()).draft([(request(), 3)])
    assert list(got.tokens) == want


@pytest.mark.parametrize("mistake", [RuntimeError("out of ideas"), ["a"], [0.5], 3, [None]])
def test_after_a_mistake_nothing_is_drafted_any_more(mistake: Any, caplog: pytest.LogCaptureFixture) -> None:
    user = Returning([1], mistake, [1])
    drafter = UserDrafter(user, SoloComm())
    assert list(drafter.draft([(request(), 3)])[0].tokens) == [1]
    for _ in range(3):
        assert list(drafter.draft([(request(), 3)])[0].tokens) == []
    assert len(user.seen) == 2
    assert caplog.text.count("the drafter of speculative_config failed") == 1


def test_a_call_that_takes_too_long_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    goes_on, calls = threading.Event(), list[DraftBatch]()

    class Stuck:
        def prepare_draft_tokens(self, scheduled_requests: DraftBatch) -> None:
            calls.append(scheduled_requests)
            goes_on.wait(WAIT_S)

    drafter = UserDrafter(Stuck(), SoloComm(), timeout_s=0.01)
    for _ in range(2):
        assert list(drafter.draft([(request(), 3)])[0].tokens) == []
    goes_on.set()
    wait_until(lambda: bool(calls))
    assert len(calls) == 1
    assert "no drafts within 0.01 s" in caplog.text


def test_all_ranks_have_the_drafts_of_rank_0() -> None:
    """Whatever the others' objects would say: they are not asked."""
    users = [Returning([1, 2], [3]), Returning([9, 9, 9], [9])]

    def draft(comm: Comm) -> list[list[int]]:
        drafts = UserDrafter(users[comm.rank], comm).draft([(request(1), 3), (request(2), 3)])
        return [list(each.tokens) for each in drafts]

    assert run_ranks(2, draft) == [[[1, 2], [3]]] * 2
    assert users[1].seen == []
