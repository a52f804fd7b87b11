"""`Loader`: makes payloads of blocks, for what a payload is on some transport."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from torch import Tensor

from tensorweave.workers.transfer.window import PoolWindow

HOST_MESSAGE_BYTES: Final = 2 << 20
"""Large enough that what is done for each message costs little, small enough to stay in the taker's cache."""


class Loader(Protocol):
    def block_bytes(self, num_heads: int) -> int:
        """What a block takes in a payload."""

    def message_blocks(self, num_heads: int) -> int:
        """How many blocks go into one payload, at least one."""

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        """Fill `out`. When it returns, it has read all that it will."""


class PoolLoader:
    """The blocks' bytes."""

    def __init__(self, window: PoolWindow, message_bytes: int) -> None:
        self._window = window
        self._message_bytes = message_bytes

    def block_bytes(self, num_heads: int) -> int:
        return self._window.block_bytes(num_heads)

    def message_blocks(self, num_heads: int) -> int:
        return max(1, self._message_bytes // max(1, self.block_bytes(num_heads)))

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        self._window.pack(block_ids, heads, out)
