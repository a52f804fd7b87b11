"""A request as the executor sees it: its tokens, how far its KV is computed, and where it stands.

Built by the executor from a `GenerateRequest`, read by schedulers, changed only by the executor and the KV manager.

    WAITING ──admitted──▶ CONTEXT ──last chunk──▶ GENERATION ──stop, length──▶ DONE
      ▲ │                  ▲  │                      ▲ │
      │ └─has a ticket─▶ FETCHING ──all landed───────┘ │       cancel, deadline: any ──▶ DONE
      └────────paused (KV freed, recomputed later)─────┘
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from tensorweave.cluster.protocol import FinishReason, GenerateRequest, Retention, SamplingSpec, Ticket


class RequestState(enum.IntEnum):
    WAITING = 0
    CONTEXT = 1
    GENERATION = 2
    DONE = 3
    FETCHING = 4


@dataclass(slots=True, eq=False)
class LlmRequest:
    """`tokens` is prompt plus output. KV of `tokens[:num_computed]` is in the cache; a forward computes from there.

    `context_len` is how many tokens must be computed before the next one can be sampled: the prompt at first, and what
    was generated so far too after a preemption. `order` is the arrival order, unique in a gang and equal on all ranks.
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

    def __post_init__(self) -> None:
        self.context_len = self.context_len or len(self.tokens)

    @classmethod
    def of(cls, arrival: GenerateRequest, order: int, now_s: float, *, can_fetch: bool) -> LlmRequest:
        """A new request, waiting. Where `can_fetch` is False its ticket is of no use: the prompt is computed here."""
        tokens = list(arrival.prompt_token_ids)
        return cls(
            request_id=arrival.request_id,
            order=order,
            tokens=tokens,
            prompt_len=len(tokens),
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

    def land(self, num_tokens: int, first_token: int | None) -> None:
        """KV of `tokens[:num_tokens]` has arrived. With all of it and the token after it, generation goes on; else the
        rest of the context, at least its last token, is computed here."""
        if num_tokens >= self.context_len and first_token is not None:
            self.num_computed = self.context_len
            self.state = RequestState.GENERATION
            self.append(first_token)
        else:
            self.num_computed = min(num_tokens, self.context_len - 1)
            self.state = RequestState.CONTEXT

    def pause(self) -> None:
        """Back to waiting: its KV is gone, and what it has generated becomes part of its context."""
        self.state = RequestState.WAITING
        self.num_computed = 0
        self.context_len = len(self.tokens)
        self.num_preemptions += 1
        self.fetch = None
