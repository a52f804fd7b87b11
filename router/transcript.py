"""`Transcript`: what a request's client has been told so far, and what an attempt must go on from.

Attempts overlap: a prefill and a decode gang both say the first token, and a replay starts behind what was sent. Tokens
are matched by position, so that each goes out once; one that differs from what was sent ends the attempt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from tensorweave.cluster.errors import DeadlineExceeded, WorkerLost
from tensorweave.cluster.protocol import FinishReason, GenerateRequest, TokenChunk


class Diverged(WorkerLost):
    """An attempt said another token than the one already sent at that place, or left one out."""

    code = "diverged"


class Transcript:
    def __init__(self, request: GenerateRequest) -> None:
        self.sent: list[int] = []
        self.num_cached = 0
        self.is_over = False
        self._request = request
        self._offset = 0
        self._num_attempts = 0

    def begin(self, left_s: float | None) -> GenerateRequest:
        """The next attempt's request. The first asks for all; later ones take what was sent as part of the prompt."""
        self._num_attempts += 1
        if self._num_attempts == 1:
            return dataclasses.replace(self._request, deadline_s=left_s)
        request, sampling = self._request, self._request.sampling
        self._offset = len(self.sent)
        return dataclasses.replace(
            request,
            prompt_token_ids=[*request.prompt_token_ids, *self.sent],
            sampling=dataclasses.replace(
                sampling,
                max_tokens=sampling.max_tokens - self._offset,
                min_tokens=max(0, sampling.min_tokens - self._offset),
            ),
            deadline_s=left_s,
            fetch=None,
        )

    def tell(self, token_ids: Sequence[int]) -> TokenChunk:
        """Tokens that are known before any attempt."""
        return self._news(token_ids)

    def take(self, chunk: TokenChunk) -> TokenChunk | None:
        """What of it is new to the client; None where nothing is. Raises Diverged."""
        if chunk.finish_reason == "cancelled":
            raise WorkerLost("the gang ended the request early")
        if self._num_attempts == 1:
            self.num_cached = max(self.num_cached, chunk.num_cached_tokens)
        at = self._offset + chunk.start
        end = at + len(chunk.token_ids)
        known = self.sent[at:end]
        is_end = chunk.finish_reason in ("stop", "length", "not_finished")
        if at > len(self.sent) or known != list(chunk.token_ids[: len(known)]) or (is_end and end < len(self.sent)):
            raise Diverged(f"position {at}: an attempt does not go on from what was sent")
        self.is_over = chunk.finish_reason is not None
        new = chunk.token_ids[len(known) :] if known else chunk.token_ids
        if not new and not self.is_over:
            return None
        return self._news(new, chunk.finish_reason, chunk.stop_reason)

    def ended(self) -> TokenChunk | None:
        """The last chunk, where the tokens sent are all there can be and only their end was lost."""
        sampling, count = self._request.sampling, len(self.sent)
        is_stopped = count > 0 and self.sent[-1] in sampling.stop_token_ids and count >= sampling.min_tokens
        self.is_over = is_stopped or count >= sampling.max_tokens
        if is_stopped:
            return self._news((), "stop", self.sent[-1])
        return self._news((), "length") if self.is_over else None

    def timed_out(self) -> TokenChunk:
        """The last chunk of a request whose deadline has passed. Raises DeadlineExceeded before the first token."""
        if not self.sent:
            raise DeadlineExceeded("the request's deadline passed before its first token")
        return self._news((), "timeout")

    def _news(
        self, token_ids: Sequence[int] = (), finish_reason: FinishReason | None = None, stop_reason: int | None = None
    ) -> TokenChunk:
        start = len(self.sent)
        self.sent += token_ids
        return TokenChunk(self._request.request_id, token_ids, finish_reason, stop_reason, self.num_cached, start=start)
