"""`OutputIterator`: one consumer's iteration over a `RequestOutput`, with `for` or `async for`."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tensorweave.llmapi.outputs import RequestOutput


class OutputIterator:
    """Yields the same output each time, with its next tokens; without streaming once, with all of them.

    A consumer that leaves early (by `break`, an error, a cancelled task) drops the iterator, and `__del__` closes it at
    once. An async generator would be closed later, by its event loop, if that still runs.
    """

    def __init__(self, output: RequestOutput) -> None:
        self._output = output
        self._is_open = False
        self._is_over = False

    def __iter__(self) -> Self:
        return self

    def __aiter__(self) -> Self:
        return self

    def __next__(self) -> RequestOutput:
        if not self._begin():
            raise StopIteration
        with ExitStack() as on_error:
            on_error.callback(self.close)
            if not self._output._is_streaming:
                self._output.result()
            elif not self._output._take_next():
                self.close()
            on_error.pop_all()
        if self._is_over:
            raise StopIteration
        return self._output

    async def __anext__(self) -> RequestOutput:
        if not self._begin():
            raise StopAsyncIteration
        with ExitStack() as on_error:
            on_error.callback(self.close)
            if not self._output._is_streaming:
                await self._output.aresult()
            elif not await self._output._take_next_async():
                self.close()
            on_error.pop_all()
        if self._is_over:
            raise StopAsyncIteration
        return self._output

    def close(self) -> None:
        """End the iteration. If the output has no other consumer, its request is cancelled. No effect after the end."""
        self._is_over = True
        if self._is_open:
            self._is_open = False
            self._output._leave()

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _begin(self) -> bool:
        """Return whether there may be more. The iterator counts as a consumer from the first call on."""
        if self._is_open and not self._output._is_streaming:
            self.close()
        if self._is_over:
            return False
        if not self._is_open:
            self._output._enter()
            self._is_open = True
        return True
