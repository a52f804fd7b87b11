"""`GrammarRule`: what it does with tokens, and with grammars that are slow or wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from tensorweave.workers.sampling.grammar_rule import GrammarRule
from tensorweave.workers.sampling.logit_edits import LogitEdits


class FakeGrammar:
    """Accepts tokens below 100; each takes `takes_s` of the thread's processor time, and `waits_s` for a core."""

    problem = ""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.used_s = 0.0
        self.takes_s = 0.0
        self.waits_s = 0.0
        self.num_slow = 0
        self.accepted: list[int] = []
        self.filler = self

    def matcher(self, stop_token_ids: Sequence[int]) -> Any:
        return self

    def accept(self, tokens: Sequence[int]) -> bool:
        self.used_s += self.takes_s * len(tokens)
        self.now_s += (self.takes_s + self.waits_s) * len(tokens)
        self.accepted += tokens
        return max(tokens) < 100

    def roll_back(self, num_tokens: int) -> None:
        del self.accepted[len(self.accepted) - num_tokens :]

    def report_slow(self) -> None:
        self.num_slow += 1


@pytest.fixture
def grammar() -> FakeGrammar:
    return FakeGrammar()


@pytest.fixture
def rule(grammar: FakeGrammar) -> GrammarRule:
    clocks = {"clock": lambda: grammar.now_s, "processor_clock": lambda: grammar.used_s}
    return GrammarRule(grammar, (2,), **clocks)  # type: ignore[arg-type]


def failure(rule: GrammarRule) -> str | None:
    edits = LogitEdits()
    rule.edit(3, edits)
    return str(edits.failures[3]) if edits.failures else None


def test_tokens_are_accepted_and_rolled_back(rule: GrammarRule, grammar: FakeGrammar) -> None:
    rule.advance([5, 6, 7])
    rule.roll_back(2)
    assert grammar.accepted == [5]
    assert failure(rule) is None


def test_tokens_that_the_grammar_does_not_allow_are_that_rows_failure(rule: GrammarRule, grammar: FakeGrammar) -> None:
    rule.advance([5, 100])
    assert "does not follow" in (failure(rule) or "")
    rule.advance([6])
    rule.roll_back(1)
    assert grammar.accepted == [5, 100], "the matcher is left alone"


def test_a_pause_of_the_machine_is_not_slow_but_token_after_token_is(rule: GrammarRule, grammar: FakeGrammar) -> None:
    grammar.takes_s = 0.04
    rule.advance(list(range(50)))  # a replay
    grammar.takes_s = 1.0
    for _ in range(3):
        rule.advance([5])
    assert grammar.num_slow == 0
    rule.advance([5])
    rule.advance([5])
    assert grammar.num_slow == 1
    assert failure(rule) is None, "rank 0 decides"


def test_waiting_for_a_core_is_not_slow(rule: GrammarRule, grammar: FakeGrammar) -> None:
    grammar.waits_s = 1.0
    for _ in range(20):
        rule.advance([5])
    assert grammar.num_slow == 0


def test_a_stopped_grammar_is_followed_no_further(rule: GrammarRule, grammar: FakeGrammar) -> None:
    rule.advance([5])
    grammar.problem = "too slow"
    rule.advance([6])
    assert grammar.accepted == [5]
    assert failure(rule) == "too slow"
