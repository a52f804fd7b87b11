"""`RequestOutput`: a future of a generation that can be waited for, awaited, iterated and aborted.

The LLM's event loop pushes `Update`s from its thread; the consumer, in any thread or event loop, applies them when it
looks. So the diffs always tell what changed since the consumer's last look, however fast tokens arrive.
"""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import contextlib
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from typing import Any

from tensorweave.llmapi.completion_output import CompletionOutput, Logprob, Update, Wishes, as_dicts
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.status import set_api_status
from tensorweave.workers.logits import Tensor, read_logits

__all__ = ["CompletionOutput", "Logprob", "RequestOutput", "Update", "Wishes"]


class RequestOutput:
    """The result of `LLM.generate` (finished) and `LLM.generate_async` (a future).

    Wait with `result(timeout)` or `await`; with streaming, iterate (`for` or `async for`): each turn gives this same
    object with its next tokens. An error of the request is raised by whichever of these the consumer uses.

    Attributes:
        request_id: Its number in this LLM.
        prompt: The prompt's text, if it was given as text.
        prompt_token_ids: The prompt's ids.
        outputs: One CompletionOutput for each of `n` sequences. With a larger `best_of` the best first, once all have
            ended; the first that were started until then.
        context_logits: Where asked for, once the prompt is computed, the logits at every prompt token, float32
            [tokens, V].
        finished: All sequences have ended, as far as the consumer has looked.
        cached_tokens: Prompt tokens whose KV was found in the prefix tree.
        decoding_iter: Steps that the longest sequence has taken.
        avg_decoded_tokens_per_iter: Its tokens a step; None before the first.
        disaggregated_params: After a context phase, what its generation phase needs.
    """

    request_id: int
    prompt: str | None
    prompt_token_ids: list[int]

    def __init__(
        self,
        request_id: int,
        prompt: str | None,
        prompt_token_ids: list[int],
        *,
        num_sequences: int = 1,
        num_returned: int | None = None,
        wishes: Wishes | None = None,
        is_streaming: bool = True,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self._wishes = wishes or Wishes()
        self._sequences = [CompletionOutput(index, _wishes=self._wishes) for index in range(num_sequences)]
        self._outputs = self._sequences[:num_returned]
        self._context_logits: list[bytes] = []
        self._num_cached_tokens = 0
        self._is_streaming = is_streaming
        self._cancel: Callable[[], object] = lambda: None
        self._is_aborted = False
        self._changed = threading.Condition()
        self._updates: collections.deque[Update] = collections.deque()
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []
        self._error: Exception | None = None

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self._outputs

    @property
    def context_logits(self) -> Tensor | None:
        return read_logits(b"".join(self._context_logits), self._wishes.vocab_size) if self._context_logits else None

    @property
    def finished(self) -> bool:
        return self._error is not None or all(output.finish_reason is not None for output in self._sequences)

    @property
    @set_api_status("beta")
    def cached_tokens(self) -> int:
        return self._num_cached_tokens

    @property
    @set_api_status("prototype")
    def decoding_iter(self) -> int:
        return max(0, max(output.length for output in self._sequences) - self._wishes.num_echoed)

    @property
    @set_api_status("prototype")
    def avg_decoded_tokens_per_iter(self) -> float | None:
        return 1.0 if self.decoding_iter else None

    @property
    @set_api_status("prototype")
    def disaggregated_params(self) -> DisaggregatedParams | None:
        return self._outputs[0].disaggregated_params

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end.

        Args:
            timeout: Longest wait, in seconds; the request goes on after it.

        Returns:
            This object, finished.

        Raises:
            TimeoutError: It is not finished yet.
            TensorweaveError: What ended the request.
        """
        give_up_s = None if timeout is None else time.monotonic() + timeout
        self._settle()
        while not self.finished:
            left_s = None if give_up_s is None else give_up_s - time.monotonic()
            if not self._wait(left_s):
                raise TimeoutError(f"request {self.request_id} is not finished after {timeout} s")
            self._take_all()
        return self._checked()

    async def aresult(self) -> RequestOutput:
        """Wait for the end in an event loop, as `result` does elsewhere.

        Returns:
            This object, finished.
        """
        self._settle()
        while not self.finished:
            await self._await_update()
            self._take_all()
        return self._checked()

    @set_api_status("beta")
    def abort(self) -> None:
        """Cancel the request; its sequences end with finish_reason 'cancelled'. No effect once finished."""
        self._is_aborted = True
        self._cancel()

    @set_api_status("beta")
    def aborted(self) -> bool:
        """Tell whether `abort` was called.

        Returns:
            True from the first call of `abort` on.
        """
        return self._is_aborted

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> Iterator[RequestOutput]:
        if not self._is_streaming:
            yield self.result()
            return
        while not self.finished:
            self._wait(None)
            if self._take_turn():
                yield self._checked()
        self._checked()

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        if not self._is_streaming:
            yield await self.aresult()
            return
        while not self.finished:
            await self._await_update()
            if self._take_turn():
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
            with contextlib.suppress(RuntimeError):  # that loop has been closed
                loop.call_soon_threadsafe(_wake, waiter)

    def _note_cancel(self, future: concurrent.futures.Future[None]) -> None:
        """The request's task was cancelled, perhaps before it began to run; what it may still push comes too late."""
        if future.cancelled():
            for index in range(len(self._sequences)):
                self._push(Update(index=index, finish_reason="cancelled"))

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

    def _settle(self) -> None:
        """The diffs begin anew, unless there is nothing more to come."""
        with self._changed:
            if not self.finished:
                for sequence in self._sequences:
                    sequence._settle()

    def _take_turn(self) -> bool:
        """Apply the oldest update alone; False where another consumer took it."""
        with self._changed:
            if not self._updates:
                return False
            self._settle()
            self._apply(self._updates.popleft())
            return True

    def _take_all(self) -> None:
        with self._changed:
            while self._updates:
                self._apply(self._updates.popleft())

    def _apply(self, update: Update) -> None:
        if self.finished:
            return
        if update.error is not None:
            self._error = update.error
            return
        self._num_cached_tokens = max(self._num_cached_tokens, update.num_cached_tokens)
        if update.context_logits:
            self._context_logits.append(update.context_logits)
        if update.prompt_logprobs is not None:
            told = as_dicts(update.prompt_logprobs)
            for sequence in self._sequences:
                sequence.prompt_logprobs = told
        if self._sequences[update.index].finish_reason is not None:
            return
        self._sequences[update.index]._apply(update)
        if self.finished and len(self._outputs) < len(self._sequences):
            self._outputs = _best(self._sequences, len(self._outputs))

    def _checked(self) -> RequestOutput:
        if self._error is not None:
            raise self._error
        return self


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


def _best(sequences: list[CompletionOutput], num_returned: int) -> list[CompletionOutput]:
    """By cumulative log-probability; one that has none, for it was cancelled before its first token, comes last."""
    ordered = sorted(
        sequences,
        key=lambda s: (s.cumulative_logprob is None, -(s.cumulative_logprob or 0.0)),
    )
    return [dataclasses.replace(sequence, index=index) for index, sequence in enumerate(ordered[:num_returned])]
