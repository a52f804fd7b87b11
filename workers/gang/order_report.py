"""`OrderReport`: what a rank answers when it has carried out an order of rank 0's, sent through a report channel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Self

from tensorweave.cluster.errors import WireError


@dataclass(frozen=True, slots=True)
class OrderReport:
    """A rank has carried out the order with this number, which was about what has this digest; with a `problem`, it
    could not."""

    digest: bytes
    number: int
    rank: int
    problem: str = ""

    def to_wire(self) -> list[Any]:
        return [self.digest, self.number, self.rank, self.problem]

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        match fields:
            case [bytes(digest), int(number), int(rank), str(problem)]:
                return cls(digest, number, rank, problem)
        raise WireError("malformed report of an order")
