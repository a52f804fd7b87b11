"""A request as the executor sees it: its tokens, how far its KV is computed, and where it stands.

Built by the executor from a `GenerateRequest`, read by schedulers, changed only by the executor and the KV manager.

    WAITING ──admitted──▶ CONTEXT ──last chunk──▶ GENERATION ──last token──▶ CLOSING ──settled──▶ DONE
      ▲ │                  ▲  │                      ▲ │
      │ └─has a ticket─▶ FETCHING ──all arrived───────┘ │       stop token, cancel, deadline: any ──▶ DONE
      └────────paused (KV freed, recomputed later)─────┘

The states move on when a step is launched, except for DONE, which is known when a step settles. A request is CLOSING
once the step is launched that certainly gives its last token.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.block_hash import cache_key
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
from tensorweave.workers.step.adapter import RankAdapter
from tensorweave.workers.step.grammar import Grammar


class RequestState(enum.IntEnum):
    WAITING = 0
    CONTEXT = 1
    GENERATION = 2
    DONE = 3
    FETCHING = 4
    CLOSING = 5


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
    """`tokens` is prompt plus output, as far as steps have settled. Output that another gang has generated before is
    output here too.

    KV of `tokens[:num_computed]` is in the cache and right. `num_launched` counts the tokens whose KV is there or is
    being computed by a step that has not settled; the next step computes from there. Both are equal while no launched
    step holds the request.

    `context_len` is how many tokens must be computed before the next one can be sampled: all there are at first, and
    what was generated since too after a preemption. `order` is the arrival order, unique in a gang and equal on all
    ranks. A row that samples behind `closes_at` tokens or more gives the last token.

    Tokens are told in chunks of up to `answer_every`, the first ones in smaller chunks; `num_held` are there and have
    not been told. No token is held back that more than its id is told of.

    `extras` is what is told with the newest token beside its id. Logits at the first `num_prompt_rows` tokens are told;
    those of `num_rows_read` have been read. Where the embedding is wanted, only the prompt's last one is read, and its
    hidden state is told. With a `failure` the request ends at its next token, without it. What the sampling remembers
    of the tokens is the decoder's.

    `grammar` is the sampling's guide, compiled: it is there on every rank when the request arrives. So is the
    `adapter` of this digest, which is part of `cache_salt`, the key under which the request's KV is kept.
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
    num_launched: int = 0
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    finish_reason: FinishReason | None = None
    stop_reason: int | None = None
    arrival_s: float = field(default=0.0)
    answer_every: int = 1
    num_held: int = 0
    grammar: Grammar | None = None
    adapter_digest: bytes | None = None
    adapter: RankAdapter | None = None
    closes_at: int = field(init=False)
    extras: TokenExtras | None = None
    failure: TensorweaveError | None = None
    num_prompt_rows: int = field(init=False)
    num_rows_read: int = 0
    prompt_logprobs: list[TokenLogprobs] | None = None
    _tell_at: int = field(init=False, repr=False, default=0)
    _tell_gap: int = field(init=False, repr=False, default=1)

    def __post_init__(self) -> None:
        self.context_len = self.context_len or len(self.tokens)
        sampling = self.sampling
        if sampling.wants_extras or sampling.needs_prompt_rows:
            self.answer_every = 1
        self.closes_at = self.max_len - 1 if self.offer is None else 0
        self.num_prompt_rows = 0
        if sampling.num_prompt_logprobs is not None:
            self.num_prompt_rows, self.prompt_logprobs = self.prompt_len - 1, []
        if sampling.wants_context_logits:
            self.num_prompt_rows = self.prompt_len
        if sampling.wants_embedding:
            self.num_prompt_rows, self.num_rows_read = self.prompt_len, self.prompt_len - 1

    @classmethod
    def of(
        cls,
        arrival: GenerateRequest,
        order: int,
        now_s: float,
        *,
        can_fetch: bool,
        grammar: Grammar | None = None,
        adapter: RankAdapter | None = None,
    ) -> LlmRequest:
        """A new request, waiting. Where `can_fetch` is False its ticket is of no use: the prompt is computed here."""
        tokens = list(arrival.prompt_token_ids)
        digest = None if arrival.adapter is None else arrival.adapter.digest
        return cls(
            request_id=arrival.request_id,
            order=order,
            tokens=tokens,
            prompt_len=len(tokens) - arrival.num_replayed,
            sampling=arrival.sampling,
            priority=arrival.priority,
            cache_salt=cache_key(arrival.cache_salt, digest),
            retention=arrival.retention,
            offer=arrival.offer,
            fetch=arrival.fetch if can_fetch else None,
            arrival_s=now_s,
            answer_every=arrival.answer_every,
            grammar=grammar,
            adapter_digest=digest,
            adapter=adapter,
        )

    @property
    def is_salted(self) -> bool:
        """Shares nothing with requests of other salts."""
        return self.cache_salt != cache_key(None, self.adapter_digest)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def num_tokens(self) -> int:
        """Tokens once every launched step has settled."""
        return max(len(self.tokens), self.num_launched + 1)

    @property
    def num_pending(self) -> int:
        """Tokens that launched steps sample and that have not settled."""
        return self.num_tokens - len(self.tokens)

    @property
    def max_len(self) -> int:
        """Most tokens this request can ever hold, prompt included. The last sampled one needs no KV."""
        return self.prompt_len + self.sampling.max_tokens

    @property
    def is_started(self) -> bool:
        """Holds KV blocks."""
        return self.state not in (RequestState.WAITING, RequestState.DONE)

    def take_tokens(self, tokens: Sequence[int], extras: Sequence[TokenExtras] = ()) -> TokenChunk | None:
        """Append sampled tokens up to the one that ends the request. Return what to tell now, if anything. `extras` has
        one entry a token, or none."""
        taken, stops = self.tokens, self.sampling.stop_token_ids
        num_before = len(taken)
        for token in tokens:
            taken.append(token)
            if (len(taken) > self.closes_at or token in stops) and self._ends_with(token):
                num_taken = len(taken) - num_before
                tokens, extras = tokens[:num_taken], extras[:num_taken]
                break
        reason = self.finish_reason
        if self.answer_every > 1:
            self.num_held += len(tokens)
            return None if reason is None and len(taken) < self._tell_at else self.tell()
        cached, start = self.num_cached_tokens, num_before - self.prompt_len
        if not extras and self.prompt_logprobs is None:
            return TokenChunk(self.request_id, tokens, reason, self.stop_reason, cached, None, start)
        self.extras = extras[-1] if extras else None
        prompt_logprobs, self.prompt_logprobs = self.prompt_logprobs, None
        logprobs = tuple(each.logprobs for each in extras if each.logprobs is not None)
        logits = b"".join(each.logits for each in extras)
        told = (logprobs, prompt_logprobs, logits)
        return TokenChunk(self.request_id, tokens, reason, self.stop_reason, cached, None, start, *told)

    def tell(self) -> TokenChunk:
        """The tokens that are held back, and how the request has ended, if it has."""
        taken, every = self.tokens, self.answer_every
        start = len(taken) - self.num_held
        tokens = taken[start:]
        self.num_held = 0
        # After gaps of 2, 4, 8 … tokens up to `every`, requests of different orders tell in different steps.
        gap = self._tell_gap = min(2 * self._tell_gap, every)
        self._tell_at = len(taken) + (gap if gap < every else every - (len(taken) + self.order) % every)
        reason, cached = self.finish_reason, self.num_cached_tokens
        return TokenChunk(self.request_id, tokens, reason, self.stop_reason, cached, None, start - self.prompt_len)

    def _ends_with(self, token: int) -> bool:
        """Note why the newest token ends the request, if it does."""
        num_output, sampling = self.num_output, self.sampling
        if token in sampling.stop_token_ids and num_output >= sampling.min_tokens:
            self.finish_reason, self.stop_reason = "stop", token
        elif num_output >= sampling.max_tokens:
            self.finish_reason = "length"
        elif self.offer is not None:
            self.finish_reason = "not_finished"
        return self.finish_reason is not None

    def fail(self, failure: TensorweaveError) -> TokenChunk:
        """End with an error in place of a token; return what to tell."""
        self.failure, self.finish_reason, self.stop_reason = failure, "cancelled", None
        cached, start = self.num_cached_tokens, self.num_output - self.num_held
        return TokenChunk(self.request_id, num_cached_tokens=cached, error=failure, start=start)

    def resume(self, num_tokens: int, first_token: int | None, extras: TokenExtras | None = None) -> TokenChunk | None:
        """Go on after KV of `tokens[:num_tokens]` has arrived from another gang. With all of it, the token after it and
        what is told with that, decode; return what to tell. Else compute the rest of the context here, at least its
        last token."""
        is_told = extras is not None or not self.sampling.wants_extras
        if num_tokens < self.context_len or first_token is None or not is_told:
            self.num_computed = self.num_launched = min(num_tokens, self.context_len - 1)
            self.state = RequestState.CONTEXT
            return None
        self.num_computed = self.num_launched = self.context_len
        self.state = RequestState.GENERATION
        return self.take_tokens([first_token], (extras,) if extras and self.sampling.wants_extras else ())

    def pause(self) -> None:
        """Go back to waiting: the KV is gone, and what was generated becomes part of the context."""
        assert self.num_launched == self.num_computed, "paused while a launched step computes it"
        self.state = RequestState.WAITING
        self.num_computed = self.num_launched = 0
        self.context_len = len(self.tokens)
        self.num_preemptions += 1
        self.fetch = None
