"""`Drafter`: guesses the tokens that follow those of a request."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from tensorweave.workers.step.request import LlmRequest


class Draft(NamedTuple):
    """`kind` tells drafts apart that are right more or less often; each kind has an acceptance of its own."""

    tokens: Sequence[int] = ()
    kind: int = 0


NOTHING = Draft()


class Drafter(Protocol):
    """Every rank makes the same calls. What a drafter returns follows from the requests' tokens alone, or the ranks
    agree on it."""

    def draft(self, wanted: Sequence[tuple[LlmRequest, int]]) -> Sequence[Draft]:
        """For each request up to so many tokens that may follow its newest one."""

    def forget(self, request: LlmRequest) -> None:
        """The request has ended, or is paused."""

    def close(self) -> None:
        """After the last call."""
