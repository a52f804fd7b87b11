"""Where a gang sends its KV from, and the ticket for the KV of one prompt."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.errors import WireError
from tensorweave.cluster.fields import checked


@dataclass(frozen=True, slots=True)
class KvEndpoint:
    """Where one rank sends its KV from. It holds KV heads [first_head, first_head + num_heads) of every layer."""

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
    """A gang that sends KV: its ranks' endpoints, and what both gangs must have in common for a block to be valid.

    `fingerprint` has model digest, dtype, block size, layout and version; a refusal names the first that differs.
    Readers show `secret` to the endpoints.
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
    """The right to read one prompt's KV at a prefill gang. Every attempt has its own ticket, which is used once."""

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
    """The link from a prefill gang to a decode gang, measured once both were ready. `error` is why nothing can be sent
    over it, `transport` what carries the bytes, and `shortfall` why it is far below what it should give, if it is."""

    bytes_per_s: float
    latency_s: float
    error: str | None = None
    transport: str = ""
    shortfall: str | None = None
