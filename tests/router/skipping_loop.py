"""An event loop on the machine's clock that a test sets forward: limits may then be long, so that no pause of the
process is taken for a client's silence, and what happens after them is seen at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class SkippingLoop(asyncio.SelectorEventLoop):
    skipped_s = 0.0

    def time(self) -> float:
        return super().time() + self.skipped_s


def run_skipping(main: Coroutine[Any, Any, T]) -> T:
    with asyncio.Runner(loop_factory=SkippingLoop) as runner:
        return runner.run(main)


async def skip(seconds: float) -> None:
    """Set the clock forward, and let what is due then run."""
    loop = asyncio.get_running_loop()
    assert isinstance(loop, SkippingLoop)
    loop.skipped_s += seconds
    for _ in range(3):
        await asyncio.sleep(0)
