"""A share of a core that trials may take at the usual priority."""

from __future__ import annotations

from tensorweave.workers.guided.allowance import Allowance


def test_what_is_saved_up_can_be_taken_at_once_and_then_the_share() -> None:
    now_s = 100.0
    allowance = Allowance(0.125, 0.25, lambda: now_s)
    assert [allowance.take(0.125) for _ in range(3)] == [True, True, False]
    now_s += 0.5
    assert not allowance.take(0.125)
    now_s += 0.5
    assert [allowance.take(0.125) for _ in range(2)] == [True, False]
    now_s += 1000.0
    assert [allowance.take(0.125) for _ in range(3)] == [True, True, False]
