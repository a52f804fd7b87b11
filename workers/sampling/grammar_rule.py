"""`GrammarRule`: the output follows a grammar."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Final

from tensorweave.cluster.errors import RequestRejected
from tensorweave.cluster.guide import GUIDE_PARAM
from tensorweave.workers.sampling.logit_edits import LogitEdits
from tensorweave.workers.sampling.state import SamplingRule
from tensorweave.workers.step.grammar import Grammar

_SLOW_S: Final = 0.05
"""For one token, which takes 2 µs as a rule. With some grammars each token takes longer than the one before."""
_NUM_SLOW: Final = 1 + 3
"""So many tokens of one output over the limit are no accident: one by the clock, and three by processor time."""


class GrammarRule(SamplingRule):
    """Made before the first token of the output.

    Args:
        clock: Read around every token. Once one was slow by it, `processor_clock` is read instead, which costs a system
            call: on a busy machine the thread may only have waited for a core, and that refuses no request.
    """

    only_bans = True

    def __init__(
        self,
        grammar: Grammar,
        stop_token_ids: Sequence[int],
        clock: Callable[[], float] = time.perf_counter,
        processor_clock: Callable[[], float] = time.thread_time,
    ) -> None:
        self._grammar = grammar
        self._matcher = grammar.matcher(stop_token_ids)
        self._clock = clock
        self._processor_clock = processor_clock
        self._num_slow = 0
        self._failure: RequestRejected | None = None

    def advance(self, tokens: Sequence[int]) -> None:
        if self._failure is not None or self._grammar.problem:
            return
        clock = self._processor_clock if self._num_slow else self._clock
        started_s = clock()
        if not self._matcher.accept(tokens):
            self._failure = RequestRejected("the output does not follow its grammar", param=GUIDE_PARAM)
        if clock() - started_s > _SLOW_S * len(tokens):
            self._num_slow += 1
            if self._num_slow == _NUM_SLOW:
                self._grammar.report_slow()

    def roll_back(self, num_tokens: int) -> None:
        if self._failure is None and not self._grammar.problem:
            self._matcher.roll_back(num_tokens)

    def edit(self, row: int, edits: LogitEdits) -> None:
        if self._grammar.problem:
            edits.failures[row] = RequestRejected(self._grammar.problem, param=GUIDE_PARAM)
        elif self._failure is not None:
            edits.failures[row] = self._failure
        else:
            edits.follow_grammar(row, self._matcher)
