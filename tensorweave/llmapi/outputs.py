"""`RequestOutput`: a future of a generation that can be waited for, awaited, iterated and aborted.

The LLM's event loop pushes `Update`s from its thread. The consumer, in any thread or event loop, applies them when it
waits or iterates, so that the diffs are what is new to the consumer, however fast tokens arrive.
"""

from __future__ import annotations

import concurrent.futures
import copy
import time
import uuid
from collections.abc import Callable, Generator
from typing import Any, Final

from tensorweave.llmapi.completion_output import CompletionOutput, Logprob, OutputOptions, Update
from tensorweave.llmapi.disaggregated_params import DisaggregatedParams
from tensorweave.llmapi.output_iterator import OutputIterator
from tensorweave.llmapi.progress import Progress
from tensorweave.llmapi.status import set_api_status
from tensorweave.llmapi.update_queue import UpdateQueue
from tensorweave.workers.sampling.logits import Tensor, read_logits

__all__ = ["CompletionOutput", "Logprob", "OutputOptions", "RequestOutput", "Update"]

_OF_THE_ORIGINAL: Final = ("_cancel", "_num_consumers", "_updates")


class RequestOutput:
    """The result of `LLM.generate` (finished) and `LLM.generate_async` (a future).

    Wait with `result(timeout)` or `await`; with streaming, iterate (`for` or `async for`): each iteration yields this
    same object with its next tokens. An error of the request is raised by whichever of these the consumer uses.

    A consumer that leaves an iteration before its end, or whose `await` is cancelled, cancels the request, unless
    another one iterates, awaits or is in `result` at that time. To stop and go on later, keep the iterator
    (`iterator = iter(output)`). A `result(timeout)` that times out cancels nothing.

    An output can be pickled and copied. The copy has what had arrived until then; if the original was not finished,
    neither is the copy, and waiting for more raises RuntimeError. Two outputs are equal if they belong to the same
    request and have the same content. In a forked child of the LLM's process only finished outputs can be used.

    Attributes:
        request_id: Its number in this LLM.
        prompt: The prompt's text, if it was given as text.
        prompt_token_ids: The prompt's ids.
        outputs: One CompletionOutput for each of `n` sequences. With a larger `best_of`, the best ones first once all
            have ended; until then, those that were started first.
        context_logits: If asked for, and once the prompt is computed, the logits at every prompt token, float32
            [tokens, V].
        finished: All sequences have ended, and the consumer has seen it.
        cached_tokens: Prompt tokens whose KV was found in the prefix tree.
        decoding_iter: Steps that the longest sequence has taken.
        avg_decoded_tokens_per_iter: Its tokens per step; None before the first.
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
        options: OutputOptions | None = None,
        is_streaming: bool = True,
        unique_id: str | None = None,
    ) -> None:
        self.request_id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self._options = options or OutputOptions()
        self._progress = Progress.begin(num_sequences, num_returned, self._options)
        self._is_streaming = is_streaming
        self._unique_id = unique_id or uuid.uuid4().hex
        self._cancel: Callable[[], object] = _cancel_nothing
        self._is_aborted = False
        self._updates = UpdateQueue(self._name)
        self._num_consumers = 0

    @property
    def outputs(self) -> list[CompletionOutput]:
        return self._progress.outputs

    @property
    def context_logits(self) -> Tensor | None:
        rows = self._progress.context_logits
        return read_logits(b"".join(rows), self._options.vocab_size) if rows else None

    @property
    def finished(self) -> bool:
        return self._progress.is_finished

    @property
    @set_api_status("beta")
    def cached_tokens(self) -> int:
        return self._progress.num_cached_tokens

    @property
    @set_api_status("prototype")
    def decoding_iter(self) -> int:
        return max(0, max(output.length for output in self._progress.sequences) - self._options.num_echoed)

    @property
    @set_api_status("prototype")
    def avg_decoded_tokens_per_iter(self) -> float | None:
        return 1.0 if self.decoding_iter else None

    @property
    @set_api_status("prototype")
    def disaggregated_params(self) -> DisaggregatedParams | None:
        return self.outputs[0].disaggregated_params

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Wait for the end.

        Args:
            timeout: Longest wait, in seconds; the request goes on after it.

        Returns:
            This object, finished.

        Raises:
            TimeoutError: It is not finished yet.
            RuntimeError: It cannot become finished here: a copy, or in a forked child.
            TensorweaveError: What ended the request.
        """
        if self.finished:
            return self._checked()
        give_up_s = None if timeout is None else time.monotonic() + timeout
        self._enter()
        try:
            self._reset_diffs()
            while not self.finished:
                left_s = None if give_up_s is None else give_up_s - time.monotonic()
                if not self._updates.wait(left_s):
                    raise TimeoutError(f"{self._name} is not finished after {timeout} s")
                self._take_all()
        finally:
            self._leave(cancels=False)
        return self._checked()

    async def aresult(self) -> RequestOutput:
        """Wait for the end in an event loop, as `result` does elsewhere.

        Returns:
            This object, finished.
        """
        if self.finished:
            return self._checked()
        self._enter()
        try:
            self._reset_diffs()
            while not self.finished:
                await self._updates.wait_async()
                self._take_all()
        finally:
            self._leave()
        return self._checked()

    @set_api_status("beta")
    def abort(self) -> None:
        """Cancel the request; its sequences end with finish_reason 'cancelled'. No effect once finished."""
        self._updates.process.check()
        self._is_aborted = True
        self._cancel()

    @set_api_status("beta")
    def aborted(self) -> bool:
        """Return whether `abort` was called, by the consumer or because it left early.

        Returns:
            True from the first call of `abort` on.
        """
        return self._is_aborted

    def __await__(self) -> Generator[Any, None, RequestOutput]:
        return self.aresult().__await__()

    def __iter__(self) -> OutputIterator:
        return OutputIterator(self)

    def __aiter__(self) -> OutputIterator:
        return OutputIterator(self)

    def __repr__(self) -> str:
        return f"RequestOutput(request_id={self.request_id!r}, finished={self.finished}, outputs={self.outputs!r})"

    # ---- copies

    def __getstate__(self) -> dict[str, Any]:
        """The state now, with the updates that the consumer has not applied yet."""
        with self._updates.lock:
            state = {name: value for name, value in vars(self).items() if name not in _OF_THE_ORIGINAL}
            return state | {"_progress": copy.deepcopy(self._progress), "_updates": self._updates.all()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._updates = UpdateQueue(self._name, state["_updates"], is_live=False)
        self._cancel = _cancel_nothing
        self._num_consumers = 0

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, RequestOutput):
            return NotImplemented
        return self is other or self._values == other._values

    def __hash__(self) -> int:
        return hash(self._unique_id)

    @property
    def _values(self) -> tuple[object, ...]:
        asked = (self._unique_id, self.request_id, self.prompt, self.prompt_token_ids)
        return (*asked, *self._progress.values, self._is_aborted)

    # ---- the producer's side

    def _push(self, update: Update) -> None:
        self._updates.put(update)

    def _note_cancel(self, future: concurrent.futures.Future[None]) -> None:
        """Called when the request's task has ended. If it was cancelled, perhaps before it began to run, nothing more
        comes from it."""
        if future.cancelled():
            for index in range(len(self._progress.sequences)):
                self._push(Update(index=index, finish_reason="cancelled"))

    # ---- the consumer's side

    @property
    def _name(self) -> str:
        return f"request {self.request_id}"

    def _enter(self) -> None:
        """Count a consumer that waits or iterates."""
        self._updates.process.check()
        with self._updates.lock:
            self._num_consumers += 1

    def _leave(self, *, cancels: bool = True) -> None:
        """Count one less. If it was the last one, nobody wants the rest, and the request is cancelled."""
        if not self._updates.process.is_this:
            return
        with self._updates.lock:
            self._num_consumers -= 1
            is_left_alone = self._num_consumers == 0 and self._updates.is_live and not self.finished
        if cancels and is_left_alone:
            self.abort()

    def _take_next(self) -> bool:
        """Wait for a stream's next update and apply it. Return False if there is none left."""
        while not self.finished:
            self._updates.wait(None)
            if self._take_oldest():
                self._checked()
                return True
        self._checked()
        return False

    async def _take_next_async(self) -> bool:
        while not self.finished:
            await self._updates.wait_async()
            if self._take_oldest():
                self._checked()
                return True
        self._checked()
        return False

    def _reset_diffs(self) -> None:
        with self._updates.lock:
            self._progress.reset_diffs()

    def _take_oldest(self) -> bool:
        """Apply the oldest update alone. Return False if another consumer took it."""
        with self._updates.lock:
            if (update := self._updates.take()) is None:
                return False
            self._progress.reset_diffs()
            self._progress.apply(update)
            return True

    def _take_all(self) -> None:
        with self._updates.lock:
            while (update := self._updates.take()) is not None:
                self._progress.apply(update)

    def _checked(self) -> RequestOutput:
        if self._progress.error is not None:
            raise self._progress.error
        return self


def _cancel_nothing() -> None:
    """For an output without a running request."""
