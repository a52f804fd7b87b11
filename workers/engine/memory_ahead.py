"""`MemoryAhead`: the memory of a KV pool on a host, which the kernel gives before a step writes there.

The kernel clears a page when it is first written. Blocks are taken in the order of their numbers, so all layers come to
new pages in the same step: SmolLM2 in float32 every 1,365 tokens, and that step took 0.15 to 0.3 s longer (60 MB in
huge pages, a virtual machine, 2026-11).
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from torch import Tensor

logger = logging.getLogger(__name__)

Populate = Callable[[int, int], None]
"""Gives memory to this many bytes from this address. Raises OSError."""

AHEAD_BYTES: Final = 4 << 20
"""Of each layer: two huge pages."""
_PIECE_BYTES: Final = 2 << 20
"""At once: 1 to 5 ms."""
_SHARE: Final = 0.2
"""Of the time, in which the kernel clears pages beside steps, whose threads want the same cores."""
_POPULATE_WRITE: Final = 23
"""MADV_POPULATE_WRITE of Linux 5.14: as if each page had been written, without a change."""


class NotAhead:
    """For memory that is there from the beginning."""

    def reach(self, block: int) -> None:
        return None


class MemoryAhead:
    """`cache` is [layers, blocks, …] and contiguous. Its first blocks have their memory when this is made. The step
    loop calls `reach`."""

    def __init__(self, cache: Tensor, populate: Populate | None = None) -> None:
        self._cache = cache
        self._populate = populate or _populate_by_kernel
        num_layers, self._num_blocks = cache.shape[:2]
        self._block_bytes = max(1, cache.nbytes // max(1, num_layers * self._num_blocks))
        self._blocks_ahead = -(-AHEAD_BYTES // self._block_bytes)
        self._num_ready = 0
        self._thread: threading.Thread | None = None
        self._give(0, min(self._blocks_ahead, self._num_blocks), share=1.0)

    def reach(self, block: int) -> None:
        """Blocks up to this one are used. Once half of those ahead are, a thread begins with as many more."""
        if block + self._blocks_ahead // 2 < self._num_ready or self._num_ready == self._num_blocks:
            return
        if self._thread is not None and self._thread.is_alive():
            return
        start, stop = max(self._num_ready, block + 1), min(block + 1 + self._blocks_ahead, self._num_blocks)
        self._thread = threading.Thread(target=self._give, args=(start, stop, _SHARE), name="kv-memory", daemon=True)
        self._thread.start()

    def _give(self, start: int, stop: int, share: float) -> None:
        layer_bytes = max(1, self._num_blocks * self._block_bytes)
        try:
            for first in range(0, self._cache.nbytes, layer_bytes):
                for offset in range(start * self._block_bytes, stop * self._block_bytes, _PIECE_BYTES):
                    size = min(_PIECE_BYTES, stop * self._block_bytes - offset)
                    began_s = time.monotonic()
                    self._populate(self._cache.data_ptr() + first + offset, size)
                    time.sleep((time.monotonic() - began_s) * (1 / share - 1))
        except OSError as error:
            logger.info("steps wait for the memory of their KV blocks: %s", error)
            stop = self._num_blocks
        self._num_ready = stop


def _populate_by_kernel(address: int, num_bytes: int) -> None:
    """Without the interpreter's lock."""
    if sys.platform != "linux":
        raise OSError("only Linux gives memory ahead")
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    if libc.madvise(start, address + num_bytes - start, _POPULATE_WRITE):
        raise OSError(ctypes.get_errno(), "the kernel does not give memory ahead (Linux 5.14 does)")
