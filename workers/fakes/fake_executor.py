"""An executor without an engine, for tests of leaders, links and routers: each next token is a hash of the context.

It answers on a thread of its own like `PyExecutor`, one chunk a running request and step, and can be told to fail or to
stand still.
"""

from __future__ import annotations

import math
import threading
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tensorweave.cluster.errors import Overloaded, RequestRejected, TensorweaveError
from tensorweave.cluster.protocol import (
    FinishReason,
    GenerateRequest,
    Logprob,
    ModelInfo,
    TokenChunk,
    TokenLogprobs,
    pack_tokens,
)

FAKE_INFO = ModelInfo("fake", vocab_size=1000, max_seq_len=4096, dtype="float32", tokens_per_block=32, num_blocks=64)


def fake_output(prompt: Sequence[int], num_tokens: int, vocab_size: int = FAKE_INFO.vocab_size) -> list[int]:
    """What the fake answers to a prompt: the oracle of the tests that use it."""
    checksum = zlib.crc32(pack_tokens(list(prompt)))
    output: list[int] = []
    for _ in range(num_tokens):
        output.append(checksum % vocab_size)
        checksum = zlib.crc32(pack_tokens(output[-1:]), checksum)
    return output


@dataclass(slots=True)
class _Running:
    request: GenerateRequest
    checksum: int
    num_output: int = 0
    is_cancelled: bool = False


class FakeExecutor:
    """`step_s` is the time a step takes; `max_requests` bounds what is inside."""

    def __init__(self, info: ModelInfo = FAKE_INFO, *, step_s: float = 0.0002, max_requests: int = 64) -> None:
        self.info = info
        self.failure: TensorweaveError | None = None
        self.num_steps = 0
        self.given_up: list[str] = []
        self._step_s = step_s
        self._max_requests = max_requests
        self._changed = threading.Condition()
        self._running: dict[str, _Running] = {}
        self._chunks: list[TokenChunk] = []
        self._events: list[dict[str, Any]] = []
        self._num_events = 0
        self._is_held = False
        self._num_allowed = 0
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="fake-executor", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        return not self._is_over

    @property
    def num_requests(self) -> int:
        return len(self._running)

    def enqueue_request(self, request: GenerateRequest) -> str:
        if not request.prompt_token_ids:
            raise RequestRejected("the prompt is empty", param="prompt")
        with self._changed:
            if self.failure is not None:
                raise self.failure
            prompt = pack_tokens(list(request.prompt_token_ids))
            if len(self._running) >= self._max_requests:
                raise Overloaded(f"{self._max_requests} requests are inside", retry_after_s=1.0)
            self._running[request.request_id] = _Running(request, zlib.crc32(prompt), request.num_replayed)
            self._changed.notify_all()
        return request.request_id

    def cancel_request(self, request_id: str) -> bool:
        with self._changed:
            if running := self._running.get(request_id):
                running.is_cancelled = True
                self._changed.notify_all()
            else:
                self.given_up.append(request_id)
            return running is not None

    def await_responses(self, request_ids: None = None, timeout_s: float | None = None) -> list[TokenChunk]:
        with self._changed:
            self._changed.wait_for(lambda: self._chunks or self._is_over, timeout_s)
            chunks, self._chunks = self._chunks, []
            return chunks

    def get_latest_kv_cache_events(self) -> list[dict[str, Any]]:
        with self._changed:
            events, self._events = self._events, []
            return events

    def put_events(self, *data: dict[str, Any], num_lost: int = 0) -> None:
        """KV events of the KV manager's form; `num_lost` before them never arrive."""
        with self._changed:
            self._num_events += num_lost
            for item in data:
                self._events.append({"event_id": self._num_events, "data": item})
                self._num_events += 1

    def get_latest_iteration_stats(self) -> list[dict[str, Any]]:
        return [{"iter": self.num_steps}]

    def say(self, *chunks: TokenChunk) -> None:
        """All at once, whatever runs."""
        with self._changed:
            self._chunks += chunks
            self._changed.notify_all()

    def hold(self, is_held: bool = True) -> None:
        """Stand still (cancels are still honoured), or go on."""
        with self._changed:
            self._is_held, self._num_allowed = is_held, 0
            self._changed.notify_all()

    def allow(self, num_steps: int) -> None:
        """While it stands still: take so many steps."""
        with self._changed:
            self._num_allowed += num_steps
            self._changed.notify_all()

    def fail(self, error: TensorweaveError) -> None:
        with self._changed:
            self.failure = error
            self._end()

    def shutdown(self) -> None:
        with self._changed:
            self._chunks += [TokenChunk(request_id, finish_reason="cancelled") for request_id in self._running]
            self._running.clear()
            self._end()
        self._thread.join(5.0)

    def _end(self) -> None:
        self._is_over = True
        self._changed.notify_all()

    def _run(self) -> None:
        with self._changed:
            while not self._is_over:
                self._changed.wait_for(self._has_work)
                self._changed.wait_for(lambda: self._is_over, self._step_s)
                self._step()

    def _has_work(self) -> bool:
        is_cancelling = any(running.is_cancelled for running in self._running.values())
        return self._is_over or is_cancelling or (bool(self._running) and self._may_move)

    @property
    def _may_move(self) -> bool:
        return not self._is_held or self._num_allowed > 0

    def _step(self) -> None:
        self.num_steps += 1
        may_move = self._may_move and not self._is_over
        if may_move and self._running:
            self._num_allowed = max(0, self._num_allowed - 1)
        for request_id, running in list(self._running.items()):
            if running.is_cancelled:
                chunk = TokenChunk(request_id, finish_reason="cancelled")
            elif may_move:
                chunk = self._next_chunk(running)
            else:
                continue
            self._chunks.append(chunk)
            if chunk.is_last:
                del self._running[request_id]
        self._changed.notify_all()

    def _next_chunk(self, running: _Running) -> TokenChunk:
        token = running.checksum % self.info.vocab_size
        running.checksum = zlib.crc32(pack_tokens([token]), running.checksum)
        running.num_output += 1
        is_full = running.num_output >= running.request.sampling.max_tokens
        reason: FinishReason | None = "length" if is_full else None
        if running.request.offer is not None:
            reason = reason or "not_finished"
        logprobs = self._logprobs(token, running.request.sampling.num_logprobs)
        return TokenChunk(running.request.request_id, (token,), reason, start=running.num_output - 1, logprobs=logprobs)

    def _logprobs(self, token: int, num_top: int | None) -> Sequence[TokenLogprobs]:
        """The token itself is the likeliest, the ids above it follow, each half as likely."""
        if num_top is None:
            return ()
        top = [Logprob((token + i) % self.info.vocab_size, -math.log(2) * (i + 1), i + 1) for i in range(num_top or 1)]
        return ((top[0], *top[:num_top]),)
