"""`OutputIterator`: one consumer's iteration over a `RequestOutput`, with `for` or `async for`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from tensorweave.llmapi.outputs import RequestOutput


class OutputIterator:
    """Each turn gives the same output with its next tokens; without streaming there is one, with all of them.

    Whoever leaves early (by `break`, an error, a cancelled task) lets go of it, and `__del__` closes it there and then:
    an async generator would wait for its event loop's next turn, if that still comes.
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
        try:
            if not self._output._is_streaming:
                self._output.result()
            elif not self._output._take_next():
                self.close()
        except BaseException:
            self.close()
            raise
        if self._is_over:
            raise StopIteration
        return self._output

    async def __anext__(self) -> RequestOutput:
        if not self._begin():
            raise StopAsyncIteration
        try:
            if not self._output._is_streaming:
                await self._output.aresult()
            elif not await self._output._take_next_async():
                self.close()
        except BaseException:
            self.close()
            raise
        if self._is_over:
            raise StopAsyncIteration
        return self._output

    def close(self) -> None:
        """Leave: where the output has no other consumer, its request is cancelled. No effect after the last turn."""
        self._is_over = True
        if self._is_open:
            self._is_open = False
            self._output._leave()

    async def aclose(self) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _begin(self) -> bool:
        """Whether there may be a turn. It is a consumer from its first one on."""
        if self._is_open and not self._output._is_streaming:
            self.close()
        if self._is_over:
            return False
        if not self._is_open:
            self._output._enter()
            self._is_open = True
        return True
