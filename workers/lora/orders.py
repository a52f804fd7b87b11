"""`AdapterOrder`: what rank 0 tells all ranks of adapters, in a step's agreement."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

from tensorweave.cluster.adapter import Adapter, adapter_or_none
from tensorweave.cluster.errors import WireError


@dataclass(frozen=True, slots=True)
class AdapterOrder:
    """`load`: read this adapter and report, with the order's `number`, which tells it from earlier orders to load the
    same one. `forget`: let go of the adapter with this digest, which no request that comes later has."""

    verb: Literal["load", "forget"]
    adapter: Adapter | None = None
    digest: bytes = b""
    number: int = 0

    def to_wire(self) -> list[Any]:
        return [self.verb, None if self.adapter is None else self.adapter.to_wire(), self.digest, self.number]

    @classmethod
    def from_wire(cls, fields: Any) -> Self:
        match fields:
            case ["load" | "forget" as verb, adapter, bytes(digest), int(number)]:
                return cls(verb, adapter_or_none(adapter), digest, number)
        raise WireError("malformed order for adapters")
