"""The vocabulary that crosses processes: frozen types and their msgpack-ready forms.

Routers and the LLM API build `GenerateRequest`s, leaders answer with `TokenChunk`s, pools publish `GangAddress`es.
Everything is plain lists, numbers and strings on the wire; nothing is ever unpickled. A message that does not fit its
type is refused with `WireError`.
"""

from __future__ import annotations

import array
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from tensorweave.cluster.errors import TensorweaveError, WireError, error_from_wire

PROTOCOL_VERSION: Final = 1

FinishReason = Literal["stop", "length", "timeout", "cancelled", "not_finished"]
Role = Literal["prefill", "decode", "both"]
_FINISH_REASONS: Final = get_args(FinishReason)
DEFAULT_RETENTION_PRIORITY: Final = 35


def pack_tokens(tokens: Sequence[int]) -> bytes:
    """Token ids as little-endian int32."""
    packed = array.array("i", tokens)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


def unpack_tokens(data: bytes) -> list[int]:
    if not isinstance(data, bytes) or len(data) % 4:
        raise WireError("token ids are not packed int32")
    packed = array.array("i", data)
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tolist()


def _checked(value: Any, name: str, *kinds: type) -> Any:
    """The value, if it is of one of these types; bool is no int here."""
    if type(value) not in kinds:
        raise WireError(f"{name} is a {type(value).__name__}")
    return value


@dataclass(frozen=True, slots=True)
class SamplingSpec:
    """How one sequence is sampled, fully resolved: no None means "default", text is already token ids.

    `temperature == 0` is greedy. `top_k == 0` and `top_p == 1` and `min_p == 0` are off. Order: temperature, min_p,
    top_k, top_p. `seed` and the position alone decide the random number of each token, so a replay continues with the
    same tokens. `stop_token_ids` end the sequence once `min_tokens` are out; end-of-sequence ids are among them unless
    `ignore_eos` was asked. Stop strings are not here: whoever holds the detokenizer watches for them.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop_token_ids: tuple[int, ...] = ()

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0

    def to_wire(self) -> list[Any]:
        return [getattr(self, f.name) for f in dataclasses.fields(self)]

    @classmethod
    def from_wire(cls, fields: Any) -> SamplingSpec:
        try:
            max_tokens, min_tokens, temperature, top_k, top_p, min_p, seed, stop = fields
            return cls(
                _checked(max_tokens, "max_tokens", int),
                _checked(min_tokens, "min_tokens", int),
                _checked(temperature, "temperature", float, int),
                _checked(top_k, "top_k", int),
                _checked(top_p, "top_p", float, int),
                _checked(min_p, "min_p", float, int),
                _checked(seed, "seed", int),
                tuple(_checked(token, "a stop token id", int) for token in stop),
            )
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed sampling fields: {error}") from None


@dataclass(frozen=True, slots=True)
class RetentionRange:
    """Prompt tokens [start, end) keep `priority` (0 to 100) for `duration_s`; None: for ever."""

    start: int
    end: int | None
    priority: int
    duration_s: float | None = None

    @classmethod
    def from_wire(cls, fields: Any) -> RetentionRange:
        start, end, priority, duration_s = fields
        return cls(
            _checked(start, "start", int),
            _checked(end, "end", int, type(None)),
            _checked(priority, "priority", int),
            _checked(duration_s, "duration_s", float, int, type(None)),
        )


@dataclass(frozen=True, slots=True)
class Retention:
    """How long a request's KV blocks are worth keeping (`KvCacheRetentionConfig` on the wire)."""

    ranges: tuple[RetentionRange, ...] = ()
    decode_priority: int = DEFAULT_RETENTION_PRIORITY
    decode_duration_s: float | None = None

    def to_wire(self) -> list[Any]:
        ranges = [[r.start, r.end, r.priority, r.duration_s] for r in self.ranges]
        return [ranges, self.decode_priority, self.decode_duration_s]

    @classmethod
    def from_wire(cls, fields: Any) -> Retention:
        try:
            ranges, priority, duration_s = fields
            return cls(
                tuple(RetentionRange.from_wire(r) for r in ranges),
                _checked(priority, "priority", int),
                _checked(duration_s, "duration_s", float, int, type(None)),
            )
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed retention fields: {error}") from None


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
            _checked(host, "host", str),
            _checked(port, "port", int),
            _checked(first_head, "first_head", int),
            _checked(num_heads, "num_heads", int),
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
        for name, value in _checked(fingerprint, "fingerprint", dict).items():
            _checked(name, "a fingerprint's name", str)
            _checked(value, "a fingerprint's value", str)
        return cls(_checked(gang_id, "gang_id", str), ends, fingerprint, _checked(secret, "secret", str))


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
        return cls(_checked(ticket_id, "ticket_id", str), KvSource.from_wire(source))


@dataclass(frozen=True, slots=True)
class KvRoad:
    """What the way from a prefill gang to a decode gang carries, as measured when the later of them came up; `error`
    says why it carries nothing."""

    bytes_per_s: float
    latency_s: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `deadline_s` is the time left, in seconds, counted from receipt: no clocks are compared
    across hosts.

    The two phases of a disaggregated request: with `offer` (a ticket id) the gang computes the prompt and the first
    token, ends with finish_reason "not_finished", and keeps the KV for whoever holds the ticket; with `fetch` it pulls
    the prompt's KV with that ticket in place of computing it, and computes itself whatever does not arrive.

    With `grace_s` the gang goes on for that long after the connection that brought the request broke, and keeps what it
    says: another router may ask for it. Without, the request ends with its connection.
    """

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingSpec
    deadline_s: float | None = None
    priority: int = 0
    cache_salt: str | None = None
    retention: Retention | None = None
    offer: str | None = None
    fetch: Ticket | None = None
    grace_s: float = 0.0

    def to_wire(self) -> list[Any]:
        return [
            self.request_id,
            pack_tokens(self.prompt_token_ids),
            self.sampling.to_wire(),
            self.deadline_s,
            self.priority,
            self.cache_salt,
            None if self.retention is None else self.retention.to_wire(),
            self.offer,
            None if self.fetch is None else self.fetch.to_wire(),
            self.grace_s,
        ]

    @classmethod
    def from_wire(cls, fields: Any) -> GenerateRequest:
        try:
            request_id, prompt, sampling, deadline_s, priority, salt, retention, offer, fetch, grace_s = fields
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed request: {error}") from None
        return cls(
            _checked(request_id, "request_id", str),
            unpack_tokens(prompt),
            SamplingSpec.from_wire(sampling),
            _checked(deadline_s, "deadline_s", float, int, type(None)),
            _checked(priority, "priority", int),
            _checked(salt, "cache_salt", str, type(None)),
            None if retention is None else Retention.from_wire(retention),
            _checked(offer, "offer", str, type(None)),
            None if fetch is None else Ticket.from_wire(fetch),
            _checked(grace_s, "grace_s", float, int),
        )


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What one step gave one request: new token ids, or its end.

    `finish_reason` is set on the last chunk; `stop_reason` is the token id that ended it, if one did. The stop token
    itself is among `token_ids`. `error` ends the request too. `num_cached_tokens` (prompt tokens found in the prefix
    tree) is true from the first chunk on.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: TensorweaveError | None = None
    start: int = 0

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    def to_wire(self) -> list[Any]:
        error = None if self.error is None else self.error.to_wire()
        ends = [self.finish_reason, self.stop_reason]
        return [self.request_id, list(self.token_ids), *ends, self.num_cached_tokens, error, self.start]

    @classmethod
    def from_wire(cls, fields: Any) -> TokenChunk:
        try:
            request_id, token_ids, finish, stop, cached, error, start = fields
        except (TypeError, ValueError) as problem:
            raise WireError(f"malformed chunk: {problem}") from None
        if _checked(finish, "finish_reason", str, type(None)) not in (None, *_FINISH_REASONS):
            raise WireError(f"unknown finish reason {finish!r}")
        return cls(
            _checked(request_id, "request_id", str),
            _checked(token_ids, "token_ids", list),
            finish,
            _checked(stop, "stop_reason", int, type(None)),
            _checked(cached, "num_cached_tokens", int),
            None if error is None else error_from_wire(_checked(error, "error", dict)),
            _checked(start, "start", int),
        )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a front end must know of the model behind a gang. `max_seq_len` counts prompt and generated tokens;
    `kv_bytes_per_token` is over all layers and ranks, 0 where it is not known."""

    model: str
    vocab_size: int
    max_seq_len: int
    dtype: str
    tokens_per_block: int
    num_blocks: int
    end_ids: tuple[int, ...] = ()
    kv_bytes_per_token: int = 0

    def to_wire(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_wire(cls, fields: Any) -> ModelInfo:
        try:
            return cls(**{**fields, "end_ids": tuple(fields["end_ids"])})
        except (TypeError, KeyError) as error:
            raise WireError(f"malformed model info: {error}") from None


@dataclass(frozen=True, slots=True)
class GangAddress:
    """Where a gang's leader listens, and which incarnation it is. `secret` opens its socket; it never appears in
    logs."""

    gang_id: str
    epoch: int
    role: Role
    host: str
    port: int
    secret: str = field(repr=False)
    info: ModelInfo
    kv_source: KvSource | None = None
