"""The types that cross processes, and their msgpack forms.

Routers and the LLM API create `GenerateRequest`s, leaders answer with `TokenChunk`s, pools publish `GangAddress`es. On
the wire everything is lists, numbers and strings; nothing is ever unpickled. A malformed message raises `WireError`.
"""

from __future__ import annotations

import array
import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from tensorweave.cluster.adapter import Adapter, adapter_or_none
from tensorweave.cluster.errors import TensorweaveError, WireError, error_from_wire
from tensorweave.cluster.fields import as_bytes, checked
from tensorweave.cluster.guide import BackendChoice
from tensorweave.cluster.kv_source import KvEndpoint, KvSource, LinkMeasurement, Ticket
from tensorweave.cluster.logprobs import Logprob, TokenLogprobs, logprobs_from_wire, logprobs_to_wire
from tensorweave.cluster.packed_logprobs import PackedLogprobs
from tensorweave.cluster.retention import DEFAULT_RETENTION_PRIORITY, Retention, RetentionRange
from tensorweave.cluster.sampling_defaults import SamplingDefaults
from tensorweave.cluster.sampling_spec import SamplingSpec
from tensorweave.cluster.tls import TlsFiles

__all__ = [
    "DEFAULT_RETENTION_PRIORITY",
    "PROTOCOL_VERSION",
    "Adapter",
    "FinishReason",
    "GangAddress",
    "GenerateRequest",
    "KvEndpoint",
    "KvSource",
    "LinkMeasurement",
    "Logprob",
    "ModelInfo",
    "Retention",
    "RetentionRange",
    "Role",
    "SamplingDefaults",
    "SamplingSpec",
    "Ticket",
    "TokenChunk",
    "TokenLogprobs",
    "logprobs_from_wire",
    "logprobs_to_wire",
    "pack_tokens",
    "unpack_tokens",
]

PROTOCOL_VERSION: Final = 8

FinishReason = Literal["stop", "length", "timeout", "cancelled", "not_finished"]
Role = Literal["prefill", "decode", "both", "embed"]
"""What a gang does. 'both' computes prompts and decodes; 'embed' computes prompts and answers with embeddings."""
_FINISH_REASONS: Final = get_args(FinishReason)
_LOGPROB_BYTES: Final = 20


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


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One sequence to generate. `deadline_s` counts from receipt, in seconds, because clocks differ between hosts.

    The two phases of a disaggregated request: with `offer` (a ticket id) the gang computes the prompt and the first
    token, ends with finish_reason "not_finished", and keeps the KV for the holder of the ticket; with `fetch` it reads
    the prompt's KV with that ticket instead of computing it, and computes what does not arrive.

    The last `num_replayed` of the prompt's token ids are output that another gang has generated: they count as output
    for sampling and limits, and the answer continues after them.

    With `grace_s` the gang continues for that long after the request's connection broke, and keeps the answer, which
    another router may ask for. Without it, the request ends with its connection.

    For an answer that nobody reads token by token, the gang may send up to `answer_every` tokens in one chunk, the
    first ones in smaller chunks: each chunk costs the gang's host more time than a token.

    An `adapter` is loaded by the gang where it is not yet.
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
    num_replayed: int = 0
    answer_every: int = 1
    adapter: Adapter | None = None

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
            self.num_replayed,
            self.answer_every,
            None if self.adapter is None else self.adapter.to_wire(),
        ]

    @classmethod
    def from_wire(cls, fields: Any) -> GenerateRequest:
        try:
            request_id, prompt, sampling, deadline_s, priority, salt, retention, offer, fetch, *rest = fields
            grace_s, replayed, answer_every, adapter = rest
        except (TypeError, ValueError) as error:
            raise WireError(f"malformed request: {error}") from None
        return cls(
            checked(request_id, "request_id", str),
            unpack_tokens(prompt),
            SamplingSpec.from_wire(sampling),
            checked(deadline_s, "deadline_s", float, int, type(None)),
            checked(priority, "priority", int),
            checked(salt, "cache_salt", str, type(None)),
            None if retention is None else Retention.from_wire(retention),
            checked(offer, "offer", str, type(None)),
            None if fetch is None else Ticket.from_wire(fetch),
            checked(grace_s, "grace_s", float, int),
            checked(replayed, "num_replayed", int),
            checked(answer_every, "answer_every", int),
            adapter_or_none(adapter),
        )


@dataclass(slots=True)
class TokenChunk:
    """What is new of one request: the token ids of one or more steps, or its end. Once told, chunks are never changed;
    the class is not frozen because there may be one per token, and frozen dataclasses take ten times as long to create.

    `finish_reason` is set on the last chunk; `stop_reason` is the token id that ended it, if one did. The stop token
    itself is among `token_ids`. `error` ends the request too. `num_cached_tokens` (prompt tokens found in the prefix
    tree) is valid from the first chunk on. `start` is the position of the first token in the output.

    If they were requested: `logprobs` has one entry per token id; `prompt_logprobs` one per prompt token but the first,
    all with the first token; `logits` is float32 [tokens, V], and `context_logits` float32 [n, V] of the next n prompt
    tokens, which may come before the first token, in several chunks. Where the prompt's embedding was requested,
    `context_logits` is that: float32 [D], in one chunk.
    """

    request_id: str
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    num_cached_tokens: int = 0
    error: TensorweaveError | None = None
    start: int = 0
    logprobs: Sequence[TokenLogprobs] = ()
    prompt_logprobs: Sequence[TokenLogprobs] | None = None
    logits: bytes = field(default=b"", repr=False)
    context_logits: bytes = field(default=b"", repr=False)

    @property
    def is_last(self) -> bool:
        return self.finish_reason is not None or self.error is not None

    @property
    def num_extra_bytes(self) -> int:
        """The approximate size on the wire of log-probabilities and logits."""
        if not (self.logprobs or self.prompt_logprobs or self.logits or self.context_logits):
            return 0
        return _LOGPROB_BYTES * self.num_logprobs + len(self.logits) + len(self.context_logits)

    @property
    def num_logprobs(self) -> int:
        prompt = self.prompt_logprobs
        num_prompt = prompt.num_logprobs if isinstance(prompt, PackedLogprobs) else sum(map(len, prompt or ()))
        return sum(map(len, self.logprobs)) + num_prompt

    def to_wire(self) -> list[Any]:
        error = None if self.error is None else self.error.to_wire()
        ends = [self.finish_reason, self.stop_reason]
        wire: list[Any] = [self.request_id, list(self.token_ids), *ends, self.num_cached_tokens, error, self.start]
        if self.logprobs or self.prompt_logprobs is not None or self.logits or self.context_logits:
            prompt = None if self.prompt_logprobs is None else PackedLogprobs.pack(self.prompt_logprobs).to_wire()
            wire += [logprobs_to_wire(self.logprobs), prompt, self.logits, self.context_logits]
        return wire

    @classmethod
    def from_wire(cls, fields: Any) -> TokenChunk:
        try:
            request_id, token_ids, finish, stop, cached, error, start, *more = fields
        except (TypeError, ValueError) as problem:
            raise WireError(f"malformed chunk: {problem}") from None
        if checked(finish, "finish_reason", str, type(None)) not in (None, *_FINISH_REASONS):
            raise WireError(f"unknown finish reason {finish!r}")
        return cls(
            checked(request_id, "request_id", str),
            checked(token_ids, "token_ids", list),
            finish,
            checked(stop, "stop_reason", int, type(None)),
            checked(cached, "num_cached_tokens", int),
            None if error is None else error_from_wire(checked(error, "error", dict)),
            checked(start, "start", int),
            *(_extras_from_wire(more) if more else ()),
        )


def _extras_from_wire(fields: Sequence[Any]) -> tuple[Any, ...]:
    try:
        logprobs, prompt_logprobs, logits, context_logits = fields
    except ValueError as problem:
        raise WireError(f"malformed chunk: {problem}") from None
    return (
        logprobs_from_wire(logprobs),
        None if prompt_logprobs is None else PackedLogprobs.from_wire(prompt_logprobs),
        as_bytes(logits, "logits"),
        as_bytes(context_logits, "context_logits"),
    )


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """What a front end must know of the model behind a gang. `max_seq_len` counts prompt and generated tokens;
    `kv_bytes_per_token` is over all layers and ranks, 0 where it is not known. `end_ids` are those that the model's
    files name; whoever has the tokenizer adds its own. `sampling_defaults` hold for the fields that a request leaves
    out. `guided_decoding_backend` says which library guides may name; None: none. `embedding_size` is how many numbers
    an embedding has; 0: the engine gives none.
    """

    model: str
    vocab_size: int
    max_seq_len: int
    dtype: str
    tokens_per_block: int
    num_blocks: int
    end_ids: tuple[int, ...] = ()
    kv_bytes_per_token: int = 0
    sampling_defaults: SamplingDefaults = field(default_factory=SamplingDefaults)
    guided_decoding_backend: BackendChoice | None = None
    embedding_size: int = 0

    def to_wire(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "sampling_defaults": self.sampling_defaults.to_wire()}

    @classmethod
    def from_wire(cls, fields: Any) -> ModelInfo:
        try:
            defaults = SamplingDefaults.from_wire(fields["sampling_defaults"])
            return cls(**{**fields, "end_ids": tuple(fields["end_ids"]), "sampling_defaults": defaults})
        except (TypeError, KeyError) as error:
            raise WireError(f"malformed model info: {error}") from None

    def with_end_id(self, end_id: int | None) -> ModelInfo:
        """Return it with the tokenizer's end of sequence among `end_ids`; one outside the vocabulary never comes."""
        if end_id is None or end_id in self.end_ids or not 0 <= end_id < self.vocab_size:
            return self
        return dataclasses.replace(self, end_ids=(*self.end_ids, end_id))


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
    tls: TlsFiles | None = None
