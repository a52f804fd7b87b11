"""Log-probabilities of tokens, as they cross processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import as_int, as_number, checked


class Logprob(NamedTuple):
    """A token's natural log-probability, and its rank among all tokens; the likeliest token has rank 1."""

    token_id: int
    logprob: float
    rank: int

    @classmethod
    def from_wire(cls, fields: Any) -> Logprob:
        try:
            token_id, logprob, rank = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed log-probability: {error}") from None
        return cls(as_int(token_id, "token_id"), as_number(logprob, "logprob"), as_int(rank, "rank"))


TokenLogprobs = Sequence[Logprob]
"""Of one position: the token that stands there, then the likeliest tokens (that token again, if it is among them)."""


def logprobs_to_wire(logprobs: Sequence[TokenLogprobs]) -> list[Any]:
    return [[*token] for token in logprobs]


def logprobs_from_wire(fields: Any) -> list[TokenLogprobs]:
    tokens = checked(fields, "logprobs", list)
    return [tuple(Logprob.from_wire(p) for p in checked(token, "logprobs", list)) for token in tokens]
