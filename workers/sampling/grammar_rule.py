"""`GrammarRule`: the output follows a grammar."""

from __future__ import annotations

from collections.abc import Sequence

from tensorweave.cluster.errors import RequestRejected
from tensorweave.workers.sampling.logit_edits import LogitEdits
from tensorweave.workers.sampling.state import SamplingRule
from tensorweave.workers.step.grammar import Matcher


class GrammarRule(SamplingRule):
    """`matcher` is before the first token of the output."""

    only_bans = True

    def __init__(self, matcher: Matcher) -> None:
        self._matcher = matcher
        self._failure: RequestRejected | None = None

    def advance(self, tokens: Sequence[int]) -> None:
        if self._failure is None and not self._matcher.accept(tokens):
            self._failure = RequestRejected("the output does not follow its grammar", param="guided_decoding")

    def roll_back(self, num_tokens: int) -> None:
        if self._failure is None:
            self._matcher.roll_back(num_tokens)

    def edit(self, row: int, edits: LogitEdits) -> None:
        if self._failure is None:
            edits.follow_grammar(row, self._matcher)
        else:
            edits.failures[row] = self._failure
