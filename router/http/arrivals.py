"""`Arrivals`: the new requests of one server, a few of them in each pass of the event loop.

Requests that arrive together would otherwise be read, planned and sent to gangs in the same few passes, and all else
that the loop does would wait: streams, cancellations, /health, other clients' requests.
"""

from __future__ import annotations

import asyncio
import collections
from collections.abc import Callable
from typing import Final

MOST_PER_PASS: Final = 8
"""256 completions of 150 tokens at once beside eight streams: with 4, 8, 16, 32 and any number a pass, /metrics took up
to 52, 49, 64, 82 and 348 ms, and the last of the first tokens came after 1.1, 0.7, 0.6, 0.7 and 0.6 s."""


class Arrivals:
    """First come, first served. Used on one event loop."""

    def __init__(self, most_per_pass: int = MOST_PER_PASS) -> None:
        self._most = most_per_pass
        self._num_begun = 0
        """In this pass."""
        self._waiting: collections.deque[Callable[[], None]] = collections.deque()

    def begin(self, request: Callable[[], None]) -> None:
        """Call `request`, now or in a later pass."""
        if self._waiting or self._num_begun == self._most:
            self._waiting.append(request)
            return
        self._call(request)

    def _call(self, request: Callable[[], None]) -> None:
        if not self._num_begun:
            asyncio.get_running_loop().call_soon(self._next_pass)
        self._num_begun += 1
        request()

    def _next_pass(self) -> None:
        self._num_begun = 0
        while self._waiting and self._num_begun < self._most:
            self._call(self._waiting.popleft())
