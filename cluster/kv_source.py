"""Where a gang gives its KV away, and the ticket that claims one prompt's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import checked


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """Where one rank gives its KV away: it holds KV heads [first_head, first_head + num_heads) of every layer."""

    host: str
    port: int
    first_head: int
    num_heads: int

    @classmethod
    def from_wire(cls, fields: Any) -> KvEndpoint:
        try:
            host, port, first_head, num_heads = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed KV endpoint: {error}") from None
        return cls(
            checked(host, "host", str),
            checked(port, "port", int),
            checked(first_head, "first_head", int),
            checked(num_heads, "num_heads", int),
        )


@dataclass(frozen=True, slots=True)
class KvSource:
    """A gang that gives KV away: its ranks' endpoints, and what both sides must have alike for a block to fit.

    `fingerprint` names model digest, dtype, block size, layout and version; the first that differs is the refusal's
    reason. `secret` opens the endpoints.
    """

    gang_id: str
    endpoints: tuple[KvEndpoint, ...]
    fingerprint: dict[str, str]
    secret: str = field(repr=False)

    def to_wire(self) -> list[Any]:
        endpoints = [[e.host, e.port, e.first_head, e.num_heads] for e in self.endpoints]
        return [self.gang_id, endpoints, self.fingerprint, self.secret]

    @classmethod
    def from_wire(cls, fields: Any) -> KvSource:
        try:
            gang_id, endpoints, fingerprint, secret = fields
            ends = tuple(KvEndpoint.from_wire(e) for e in endpoints)
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed KV source: {error}") from None
        for name, value in checked(fingerprint, "fingerprint", dict).items():
            checked(name, "a fingerprint's name", str)
            checked(value, "a fingerprint's value", str)
        return cls(checked(gang_id, "gang_id", str), ends, fingerprint, checked(secret, "secret", str))


@dataclass(frozen=True, slots=True)
class Ticket:
    """A claim on one prompt's KV at a prefill gang. Every attempt has a ticket of its own, never used again."""

    ticket_id: str
    source: KvSource

    def to_wire(self) -> list[Any]:
        return [self.ticket_id, self.source.to_wire()]

    @classmethod
    def from_wire(cls, fields: Any) -> Ticket:
        try:
            ticket_id, source = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed ticket: {error}") from None
        return cls(checked(ticket_id, "ticket_id", str), KvSource.from_wire(source))


@dataclass(frozen=True, slots=True)
class LinkMeasurement:
    """What the way from a prefill gang to a decode gang carries, as measured when the later of them came up; `error`
    says why it carries nothing."""

    bytes_per_s: float
    latency_s: float
    error: str | None = None
