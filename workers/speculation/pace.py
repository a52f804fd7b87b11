"""`DraftPace`: how many tokens of a draft are worth a step's time, given how often drafts have been right.

A step of B decodes takes a + b B; each token is worth (a + b B) / B of it, and each drafted row costs b. So a draft
token pays if it is accepted with a probability above b B / (a + b B). All of it follows from the tokens, so every rank
decides alike; nothing is measured while it runs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Final

CPU_FREE_ROWS: Final = 16
"""a / b: rows that take as long as what a step takes without any. Of SmolLM2-135M on one thread of an EPYC with bf16, a
step of one row takes 7.1 ms, of 8 rows of one request 8.6 ms, of 16 requests 12.3 ms, of 48 27.9 ms."""
GPU_FREE_ROWS: Final = 100
"""Of an 8B model on an H100, a step of one row takes 5.1 ms, of 256 17 ms."""
TOKENS_PER_PROBE: Final = 64
"""Of a request for whose drafts it does not pay, one token is drafted about this often, to see whether it does now."""

_FIRST_GUESS: Final = 0.75
_GANG_SHARE: Final = 1 / 32
_REQUEST_SHARE: Final = 1 / 5


@dataclass(slots=True)
class _Acceptance:
    """An estimate of the probability that a draft token is right if all before it are; `share` is the weight of the
    newest observation, and larger at first."""

    estimate: float
    share: float
    num_seen: int = 0

    def note(self, is_right: bool) -> None:
        self.num_seen += 1
        self.estimate += max(self.share, 1 / (1 + self.num_seen)) * (is_right - self.estimate)


@dataclass(slots=True)
class RequestPace:
    """`probes_at` is the number of tokens from which on a draft that does not pay may be tried, one token long."""

    probes_at: int
    by_kind: dict[int, _Acceptance] = field(default_factory=dict)


class DraftPace:
    """A request's estimates begin with those of the gang, kind by kind."""

    def __init__(self, free_rows: float = CPU_FREE_ROWS) -> None:
        self._free_rows = free_rows
        self._of_gang: dict[int, _Acceptance] = {}

    def begin(self, order: int, num_tokens: int) -> RequestPace:
        """For a request that has its first draft. Requests of one time probe at different times."""
        return RequestPace(num_tokens + order % TOKENS_PER_PROBE)

    def worth(self, request: RequestPace, kind: int, num_drafted: int, num_decodes: int, num_tokens: int) -> int:
        """How many of `num_drafted` tokens to verify in a step of `num_decodes` decodes, when the request has
        `num_tokens`."""
        num_worth = self._num_worth(self._estimate(request, kind).estimate, num_decodes)
        return min(num_worth, num_drafted) if num_worth else int(num_tokens >= request.probes_at)

    def note(self, request: RequestPace, kind: int, num_verified: int, num_accepted: int, num_tokens: int) -> None:
        """What became of a draft that the request had at `num_tokens`."""
        has_ended = num_accepted < num_verified
        if has_ended and num_tokens >= request.probes_at:
            request.probes_at = num_tokens + TOKENS_PER_PROBE
        gang, own = self._gang(kind), self._estimate(request, kind)
        for is_right in [True] * num_accepted + [False] * has_ended:
            gang.note(is_right)
            own.note(is_right)

    def _num_worth(self, estimate: float, num_decodes: int) -> int:
        threshold = num_decodes / (num_decodes + self._free_rows)
        if estimate <= threshold:
            return 0
        return int(math.log(threshold) / math.log(estimate)) if estimate < 1.0 else 1 << 30

    def _gang(self, kind: int) -> _Acceptance:
        return self._of_gang.setdefault(kind, _Acceptance(_FIRST_GUESS, _GANG_SHARE))

    def _estimate(self, request: RequestPace, kind: int) -> _Acceptance:
        found = request.by_kind.get(kind)
        if found is None:
            found = request.by_kind[kind] = _Acceptance(self._gang(kind).estimate, _REQUEST_SHARE)
        return found
