"""How much is drafted follows from what was right: nothing is lost for long, and nothing that pays is left out."""

from __future__ import annotations

import random

import pytest

from tensorweave.workers.speculation.pace import CPU_FREE_ROWS, TOKENS_PER_PROBE, DraftPace


class Request:
    """Drafts of up to `most` tokens, of which as many as `num_right` says are right."""

    def __init__(self, pace: DraftPace, order: int, most: int = 8) -> None:
        self.num_tokens = self.drafted = self.accepted = 0
        self._pace = pace
        self._own = pace.begin(order, 0)
        self._most = most

    def worth(self, num_decodes: int, kind: int = 0) -> int:
        return self._pace.worth(self._own, kind, self._most, num_decodes, self.num_tokens)

    def step(self, num_decodes: int, num_right: int, kind: int = 0) -> None:
        num = self.worth(num_decodes, kind)
        accepted = min(num, num_right)
        if num:
            self._pace.note(self._own, kind, num, accepted, self.num_tokens)
        self.num_tokens += 1 + accepted
        self.drafted, self.accepted = self.drafted + num, self.accepted + accepted


def run(pace: DraftPace, order: int, num_tokens: int, num_decodes: int, right: float) -> tuple[int, int]:
    """Draft tokens, and those accepted, of a request of so many tokens whose drafts are right so often."""
    rng, request = random.Random(order), Request(pace, order)
    while request.num_tokens < num_tokens:
        request.step(num_decodes, next(n for n in range(1000) if n == 8 or rng.random() >= right))
    return request.drafted, request.accepted


@pytest.mark.parametrize("num_decodes", [1, 16, 64])
def test_where_nothing_is_right_little_is_lost(num_decodes: int) -> None:
    """Rows cost a CPU_FREE_ROWS-th of a step each; in the long run less than 2 % of the time goes to drafts."""
    pace, wasted = DraftPace(), 0
    for order in range(200):
        wasted += run(pace, order, 100, num_decodes, right=0.0)[0]
    time_per_token = CPU_FREE_ROWS / num_decodes + 1
    assert wasted / (200 * 100 * time_per_token) < 0.02


@pytest.mark.parametrize("num_decodes", [1, 16])
def test_where_all_is_right_all_is_drafted_from_the_first_step_or_soon(num_decodes: int) -> None:
    pace = DraftPace()
    drafted, accepted = run(pace, 1, 400, num_decodes, right=1.0)
    assert drafted == accepted
    assert accepted > 400 * 8 / 9 * (1.0 if num_decodes == 1 else 0.95) - 8


def test_a_large_batch_drafts_only_what_is_nearly_certain() -> None:
    assert run(DraftPace(), 63, 300, 256, right=0.5)[0] < 20
    pace = DraftPace()
    for order in range(4):
        run(pace, order, 300, 1, right=1.0)
    assert run(pace, 5, 300, 256, right=1.0)[1] > 200


def test_a_request_whose_drafts_become_right_is_found_out() -> None:
    request = Request(DraftPace(), 0)
    for _ in range(300):
        request.step(1, num_right=0)
    for _ in range(2 * TOKENS_PER_PROBE):
        request.step(1, num_right=8)
    assert request.worth(1) == 8


def test_kinds_are_judged_apart() -> None:
    request = Request(DraftPace(), 0)
    for _ in range(40):
        request.step(4, num_right=0, kind=1)
        request.step(4, num_right=8, kind=3)
    assert request.worth(4, kind=3) == 8
    assert request.worth(4, kind=1) <= 1


def test_equal_histories_give_equal_paces() -> None:
    assert run(DraftPace(), 3, 500, 7, right=0.6) == run(DraftPace(), 3, 500, 7, right=0.6)
