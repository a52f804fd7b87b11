"""A request as the executor sees it: its tokens, how far its KV is computed, and where it stands.

Built by the executor from a `GenerateRequest`, read by schedulers, changed only by the executor and the KV manager.

    WAITING ──admitted──▶ CONTEXT ──last chunk──▶ GENERATION ──stop, length──▶ DONE
      ▲ │                  ▲  │                      ▲ │
      │ └─has a ticket─▶ FETCHING ──all arrived───────┘ │       cancel, deadline: any ──▶ DONE
      └────────paused (KV freed, recomputed later)─────┘
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.errors import TensorweaveError, WireError
from tensorweave.cluster.protocol import (
    FinishReason,
    GenerateRequest,
    Retention,
    SamplingSpec,
    Ticket,
    TokenChunk,
    TokenLogprobs,
    logprobs_from_wire,
    logprobs_to_wire,
)


class RequestState(enum.IntEnum):
    WAITING = 0
    CONTEXT = 1
    GENERATION = 2
    DONE = 3
    FETCHING = 4


@dataclass(frozen=True, slots=True)
class TokenExtras:
    """What is told with a token beside its id, where it was asked for."""

    logprobs: TokenLogprobs | None = None
    logits: bytes = field(default=b"", repr=False)

    def to_wire(self) -> list[Any]:
        return [None if self.logprobs is None else logprobs_to_wire([self.logprobs])[0], self.logits]

    @classmethod
    def from_wire(cls, fields: Any) -> TokenExtras:
        match fields:
            case [list() | None as logprobs, bytes(logits)]:
                return cls(None if logprobs is None else logprobs_from_wire([logprobs])[0], logits)
        raise WireError("malformed extras of a token")


@dataclass(slots=True, eq=False)
class LlmRequest:
    """`tokens` is prompt plus output. KV of `tokens[:num_computed]` is in the cache; a forward computes from there.
    Output that another gang has generated before is output here too.

    `context_len` is how many tokens must be computed before the next one can be sampled: all there are at first, and
    what was generated since too after a preemption. `order` is the arrival order, unique in a gang and equal on all
    ranks.

    `extras` is what is told with the newest token beside its id. Logits at the first `num_prompt_rows` tokens are told;
    those of `num_rows_read` have been read. With a `failure` the newest token is none, and the request ends. What the
    sampling remembers of the tokens is the decoder's.
    """

    request_id: str
    order: int
    tokens: list[int]
    prompt_len: int
    sampling: SamplingSpec
    priority: int = 0
    cache_salt: str | None = None
    retention: Retention | None = None
    offer: str | None = None
    fetch: Ticket | None = None
    state: RequestState = RequestState.WAITING
    context_len: int = 0
    num_computed: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    arrival_s: float = field(default=0.0)
    extras: TokenExtras | None = None
    failure: TensorweaveError | None = None
    num_prompt_rows: int = field(init=False)
    num_rows_read: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None

    def __post_init__(self) -> None:
        self.context_len = self.context_len or len(self.tokens)
        sampling = self.sampling
        self.num_prompt_rows = 0
        if sampling.num_prompt_logprobs is not None:
            self.num_prompt_rows, self.prompt_logprobs = self.prompt_len - 1, []
        if sampling.wants_context_logits:
            self.num_prompt_rows = self.prompt_len

    @classmethod
    def of(cls, arrival: GenerateRequest, order: int, now_s: float, *, can_fetch: bool) -> LlmRequest:
        """A new request, waiting. Where `can_fetch` is False its ticket is of no use: the prompt is computed here."""
        tokens = list(arrival.prompt_token_ids)
        return cls(
            request_id=arrival.request_id,
            order=order,
            tokens=tokens,
            prompt_len=len(tokens) - arrival.num_replayed,
            sampling=arrival.sampling,
            priority=arrival.priority,
            cache_salt=arrival.cache_salt,
            retention=arrival.retention,
            offer=arrival.offer,
            fetch=arrival.fetch if can_fetch else None,
            arrival_s=now_s,
        )

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def max_len(self) -> int:
        """Most tokens this request can ever hold, prompt included. The last sampled one needs no KV."""
        return self.prompt_len + self.sampling.max_tokens

    @property
    def is_started(self) -> bool:
        """Holds KV blocks."""
        return self.state not in (RequestState.WAITING, RequestState.DONE)

    def append(self, token: int) -> None:
        """Take a sampled token, and note whether it ends the request."""
        self.tokens.append(token)
        sampling = self.sampling
        if token in sampling.stop_token_ids and self.num_output >= sampling.min_tokens:
            self.finish_reason, self.stop_reason = "stop", token
        elif self.num_output >= sampling.max_tokens:
            self.finish_reason = "length"
        elif self.offer is not None:
            self.finish_reason = "not_finished"

    def news(self) -> TokenChunk:
        """What to tell once a token was appended."""
        start = len(self.tokens) - self.prompt_len - 1
        if self.failure is not None:
            self.finish_reason, self.stop_reason = "cancelled", None
            return TokenChunk(
                self.request_id, num_cached_tokens=self.num_cached_tokens, error=self.failure, start=start
            )
        token_ids = (self.tokens[-1],)
        ends = (self.finish_reason, self.stop_reason, self.num_cached_tokens, None, start)
        if self.extras is None and self.prompt_logprobs is None:
            return TokenChunk(self.request_id, token_ids, *ends)
        extras = self.extras or TokenExtras()
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        logprobs = () if extras.logprobs is None else (extras.logprobs,)
        return TokenChunk(self.request_id, token_ids, *ends, logprobs, prompt_logprobs, extras.logits)

    def land(self, num_tokens: int, first_token: int | None, extras: TokenExtras | None = None) -> bool:
        """KV of `tokens[:num_tokens]` has arrived. With all of it and the token after it, and what must be told with
        that, generation goes on (True); else the rest of the context, at least its last token, is computed here."""
        is_told = extras is not None or not self.sampling.wants_extras
        if num_tokens < self.context_len or first_token is None or not is_told:
            self.num_computed = min(num_tokens, self.context_len - 1)
            self.state = RequestState.CONTEXT
            return False
        self.num_computed = self.context_len
        self.state = RequestState.GENERATION
        self.extras = extras if self.sampling.wants_extras else None
        self.append(first_token)
        return True

    def pause(self) -> None:
        """Back to waiting: its KV is gone, and what it has generated becomes part of its context."""
        self.state = RequestState.WAITING
        self.num_computed = 0
        self.context_len = len(self.tokens)
        self.num_preemptions += 1
        self.fetch = None
