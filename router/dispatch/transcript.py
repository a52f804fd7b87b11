"""`Transcript`: the tokens that a request's client has received, from which the next attempt continues.

Attempts overlap: a prefill and a decode gang both return the first token, and a replay starts after what was sent.
Tokens are matched by position, so that each is sent once, with its log-probabilities and logits. A token that differs
from the one sent at its position ends the attempt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tensorweave.cluster.errors import DeadlineExceeded, WorkerLost
from tensorweave.cluster.protocol import GenerateRequest, TokenChunk


class Diverged(WorkerLost):
    """An attempt returned another token than the one already sent at that position, or left one out."""

    code = "diverged"


class Transcript:
    def __init__(self, request: GenerateRequest) -> None:
        self.sent: list[int] = []
        self.num_cached = 0
        self.is_over = False
        self._request = request
        self._seed = request.sampling.seed
        """Of the current attempt."""
        self._num_attempts = 0
        self._has_prompt_logprobs = False
        self._num_context_bytes = 0
        self._num_context_seen = 0

    def begin(self, left_s: float | None) -> GenerateRequest:
        """Start the next attempt and return its request. The first asks for everything; later ones continue after the
        tokens already sent, with the seed that these were sampled with."""
        self._num_attempts += 1
        self._num_context_seen = 0
        if self._num_attempts == 1:
            return dataclasses.replace(self._request, deadline_s=left_s)
        request = self._request
        if not self.sent:
            self._seed = request.sampling.seed
        return dataclasses.replace(
            request,
            prompt_token_ids=[*request.prompt_token_ids, *self.sent],
            num_replayed=request.num_replayed + len(self.sent),
            deadline_s=left_s,
            fetch=None,
            sampling=dataclasses.replace(request.sampling, seed=self._seed),
        )

    def begin_found(self, seed: int) -> None:
        """Start with an attempt that a lost router began; that router may have drawn its seed."""
        self._num_attempts += 1
        self._seed = seed

    def add_known(self, token_ids: Sequence[int]) -> TokenChunk:
        """Add tokens that are known before any attempt, and return them as a chunk."""
        return self._chunk(TokenChunk(self._request.request_id, token_ids))

    def take(self, chunk: TokenChunk) -> TokenChunk | None:
        """Add a chunk and return the part that is new to the client, or None. Raises Diverged."""
        if chunk.finish_reason == "cancelled":
            raise WorkerLost("the gang ended the request early")
        if self._num_attempts == 1:
            self.num_cached = max(self.num_cached, chunk.num_cached_tokens)
        at = chunk.start - self._request.num_replayed
        end = at + len(chunk.token_ids)
        known = self.sent[at:end] if at >= 0 else []
        is_end = chunk.finish_reason in ("stop", "length", "not_finished")
        is_beside = not 0 <= at <= len(self.sent) and (chunk.token_ids or is_end)
        if is_beside or known != list(chunk.token_ids[: len(known)]) or (is_end and end < len(self.sent)):
            raise Diverged(f"position {at}: an attempt does not continue the tokens already sent")
        self.is_over = chunk.finish_reason is not None
        context_logits = self._new_context(chunk.context_logits)
        if len(known) == len(chunk.token_ids) and not (self.is_over or context_logits):
            return None
        return self._chunk(_without_first(chunk, len(known)), context_logits)

    def ended(self) -> TokenChunk | None:
        """The last chunk, if every token was sent already and only the finish reason was lost."""
        sampling, count = self._request.sampling, len(self.sent)
        is_stopped = count > 0 and self.sent[-1] in sampling.stop_token_ids and count >= sampling.min_tokens
        self.is_over = is_stopped or count >= sampling.max_tokens
        if is_stopped:
            return self._chunk(TokenChunk(self._request.request_id, (), "stop", self.sent[-1]))
        return self._chunk(TokenChunk(self._request.request_id, (), "length")) if self.is_over else None

    def timed_out(self) -> TokenChunk:
        """The last chunk of a request after its deadline. Raises DeadlineExceeded if no token was sent."""
        if not self.sent:
            raise DeadlineExceeded("the request's deadline passed before its first token")
        return self._chunk(TokenChunk(self._request.request_id, (), "timeout"))

    def _chunk(self, chunk: TokenChunk, context_logits: bytes = b"") -> TokenChunk:
        start = len(self.sent)
        self.sent += chunk.token_ids
        prompt_logprobs = None if self._has_prompt_logprobs else chunk.prompt_logprobs
        self._has_prompt_logprobs |= prompt_logprobs is not None
        return TokenChunk(
            self._request.request_id,
            chunk.token_ids,
            chunk.finish_reason,
            chunk.stop_reason,
            self.num_cached,
            None,
            start,
            chunk.logprobs,
            prompt_logprobs,
            chunk.logits,
            context_logits,
        )

    def _new_context(self, rows: bytes) -> bytes:
        """The rows that were not sent yet: each attempt returns the prompt's logits from the first token on."""
        if not rows:
            return rows
        num_sent_before = min(len(rows), max(0, self._num_context_bytes - self._num_context_seen))
        self._num_context_seen += len(rows)
        self._num_context_bytes = max(self._num_context_bytes, self._num_context_seen)
        return rows[num_sent_before:]


def _without_first(chunk: TokenChunk, num_known: int) -> TokenChunk:
    """The chunk without its first tokens, their log-probabilities and their logits."""
    if not num_known:
        return chunk
    row_bytes = len(chunk.logits) // len(chunk.token_ids)
    return dataclasses.replace(
        chunk,
        token_ids=chunk.token_ids[num_known:],
        logprobs=chunk.logprobs[num_known:],
        logits=chunk.logits[num_known * row_bytes :],
    )
