"""`Loader`: turns blocks into the payload that a transport sends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

from torch import Tensor

from tensorweave.workers.transfer.window import PoolWindow

HOST_MESSAGE_BYTES: Final = 2 << 20
"""Large enough that the cost per message is small, small enough to stay in the receiver's cache."""


class Loader(Protocol):
    def block_bytes(self, num_heads: int) -> int:
        """The size of a block in a payload."""

    def message_blocks(self, num_heads: int) -> int:
        """How many blocks fit in one payload, at least one."""

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        """Fill `out`. Nothing is read after it has returned."""


class PoolLoader:
    """Payloads are the blocks' bytes."""

    def __init__(self, window: PoolWindow, message_bytes: int) -> None:
        self._window = window
        self._message_bytes = message_bytes

    def block_bytes(self, num_heads: int) -> int:
        return self._window.block_bytes(num_heads)

    def message_blocks(self, num_heads: int) -> int:
        return max(1, self._message_bytes // max(1, self.block_bytes(num_heads)))

    def pack(self, block_ids: Sequence[int], heads: range, out: Tensor) -> None:
        self._window.pack(block_ids, heads, out)
