"""`RequestOutput`: a future of a generation that can be waited for, awaited, iterated and aborted.

The LLM's event loop pushes `Update`s from its thread; the consumer, in any thread or event loop, applies them when it
looks. So the diffs always tell what changed since the consumer's last look, however fast tokens arrive.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from tensorweave.cluster.protocol import FinishReason
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams


@dataclass(slots=True)
class CompletionOutput:
    """One generated sequence.

    Attributes:
        index: Its place among the request's sequences.
        text: The text so far; empty without a tokenizer.
        token_ids: The ids so far, the stop token included.
        cumulative_logprob: Sum of the tokens' log-probabilities, where they were asked for.
        logprobs: Log-probabilities, where they were asked for.
        finish_reason: 'stop', 'length', 'timeout' or 'cancelled' once it has ended; 'not_finished' after a context
            phase.
        stop_reason: The stop string or stop token id that ended it; None for end-of-sequence.
        disaggregated_params: After a context phase, what its generation phase needs.
    """

    index: int = 0
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    disaggregated_params: DisaggregatedParams | None = None
    _last_text_len: int = field(default=0, repr=False)
    _last_token_len: int = field(default=0, repr=False)

    @property
    def length(self) -> int:
        """Number of generated tokens."""
        return len(self.token_ids)

    @property
    def text_diff(self) -> str:
        """Text that came with the last update."""
        return self.text[self._last_text_len :]

    @property
    def token_ids_diff(self) -> list[int]:
        """Ids that came with the last update."""
        return self.token_ids[self._last_token_len :]

    def _apply(self, update: Update) -> None:
        self._last_text_len, self._last_token_len = len(self.text), len(self.token_ids)
        self.text += update.text
        self.token_ids.extend(update.token_ids)
        self.finish_reason = update.finish_reason
        self.stop_reason = update.stop_reason
        self.disaggregated_params = update.disaggregated_params or self.disaggregated_params


@dataclass(frozen=True, slots=True)
class Update:
    """What the LLM's event loop tells a consumer: news of one sequence, or the error that ended the request."""

    index: int = 0
    text: str = ""
    token_ids: Sequence[int] = ()
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None
    num_cached_tokens: int = 0
    disaggregated_params: DisaggregatedParams | None = None
    error: Exception | None = None


class RequestOutput:
    """The result of `LLM.generate` (finished) and `LLM.generate_async` (a future).

    Wait with `result(timeout)` or `await`; with streaming, iterate (`for` or `async for`): each turn gives this same
    object with its next tokens. An error of the request is raised by whichever of these the consumer uses.

    Attributes:
        request_id: Identifies the request in logs and metrics.
        prompt: The prompt's text, if it was given as text.
        prompt_token_ids: The prompt's ids.
        outputs: One CompletionOutput a sequence.
        cached_tokens: Prompt tokens whose KV was found in the prefix tree.
    """

    def __init__(
        self,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        *,
        num_sequences: int = 1,
        is_streaming: bool = True,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.outputs = [CompletionOutput(index) for index in range(num_sequences)]
        self.cached_tokens = 0
        self._is_streaming = is_streaming
        self._cancel: Callable[[], object] = lambda: None
        self._is_aborted = False
        self._changed = threading.Condition()
        self._updates: collections.deque[Update] = collections.deque()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._error: Exception | None = None

    @property
    def finished(self) -> bool:
        """All sequences have ended, as far as the consumer has looked."""
        return self._error is not None or all(output.finish_reason is not None for output in self.outputs)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end. Raises TimeoutError after `timeout` seconds (the request goes on), or the request's
        error."""
        give_up_s = None if timeout is None else time.monotonic() + timeout
        while not self.finished:
            left_s = None if give_up_s is None else give_up_s - time.monotonic()
            if not self._wait(left_s):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            self._take_all()
        return self._checked()

    async def aresult(self) -> RequestOutput:
        """`result` for event loops."""
        while not self.finished:
            await self._await_update()
            self._take_all()
        return self._checked()

    def abort(self) -> None:
        """Cancel the request; its sequences end with finish_reason 'cancelled'. No effect once finished."""
        self._is_aborted = True
        self._cancel()

    def aborted(self) -> bool:
        """Whether `abort` was called."""
        return self._is_aborted

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        if not self._is_streaming:
            yield self.result()
            return
        while not self.finished:
            self._wait(None)
            if self._take_one():
                yield self._checked()
        self._checked()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        if not self._is_streaming:
            yield await self.aresult()
            return
        while not self.finished:
            await self._await_update()
            if self._take_one():
                yield self._checked()
        self._checked()

    def __repr__(self) -> str:
        return f"RequestOutput(request_id={self.request_id!r}, finished={self.finished}, outputs={self.outputs!r})"

    # ---- the producer's side

    def _push(self, update: Update) -> None:
        with self._changed:
            self._updates.append(update)
            self._changed.notify_all()
            waiters, self._waiters = self._waiters, []
        for loop, waiter in waiters:
            if not loop.is_closed():
                loop.call_soon_threadsafe(_wake, waiter)

    def _note_cancel(self, future: concurrent.futures.Future[None]) -> None:
        """The request's task was cancelled, perhaps before it began to run; what it may still push comes too late."""
        if future.cancelled():
            for output in self.outputs:
                self._push(Update(output.index, finish_reason="cancelled"))

    # ---- the consumer's side

    def _wait(self, timeout_s: float | None) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: bool(self._updates), timeout_s)

    async def _await_update(self) -> None:
        loop = asyncio.get_running_loop()
        with self._changed:
            if self._updates:
                return
            waiter: asyncio.Future[None] = loop.create_future()
            self._waiters.append((loop, waiter))
        await waiter

    def _take_one(self) -> bool:
        """Apply the oldest update; False where another consumer took it."""
        with self._changed:
            if not self._updates:
                return False
            self._apply(self._updates.popleft())
            return True

    def _take_all(self) -> None:
        while self._take_one():
            pass

    def _apply(self, update: Update) -> None:
        output = self.outputs[update.index]
        if output.finish_reason is not None:
            return
        if update.error is not None:
            self._error = update.error
        else:
            self.cached_tokens = max(self.cached_tokens, update.num_cached_tokens)
            output._apply(update)

    def _checked(self) -> RequestOutput:
        if self._error is not None:
            raise self._error
        return self


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)
