"""`GuideOrder`: what rank 0 tells all ranks of grammars, in a step's agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.guide import Guide, guide_or_none


@dataclass(frozen=True, slots=True)
class GuideOrder:
    """`load`: read the vocabulary, the first guide is on its way. `compile`: compile this guide and report, with the
    order's `number`, which tells it from earlier orders to compile the same guide. `forget`:
    let go of the grammar with this digest, which no request that comes later has. `stop`: requests with this grammar
    end, because it takes too long to follow."""

    verb: Literal["load", "compile", "forget", "stop"]
    guide: Guide | None = None
    digest: bytes = b""
    number: int = 0

    def to_wire(self) -> list[Any]:
        return [self.verb, None if self.guide is None else self.guide.to_wire(), self.digest, self.number]

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        match fields:
            case ["load" | "compile" | "forget" | "stop" as verb, guide, bytes(digest), int(number)]:
                return cls(verb, guide_or_none(guide, "guide"), digest, number)
        raise WireError("malformed order for guides")
