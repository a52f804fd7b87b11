"""`LayerFollower`: offers a chunk's blocks layer by layer while the device computes it, on a thread of its own.

Where the engine tells of layers, this also takes the digests off the step loop: they are computed here, on a stream of
their own.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from tensorweave.workers.step.layer_marks import LayersDone
from tensorweave.workers.transfer.block_part import Digests
from tensorweave.workers.transfer.sending.offered_blocks import OfferedBlocks
from tensorweave.workers.transfer.window import PoolWindow

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class FollowedChunk:
    """Blocks that a launched step fills, which were begun in this epoch. The first of them is the prompt's block
    `first`."""

    ticket_id: str
    offered: OfferedBlocks
    epoch: int
    first: int
    block_ids: Sequence[int]
    num_tokens: Sequence[int]

    @property
    def blocks(self) -> range:
        return range(self.first, self.first + len(self.block_ids))


class LayerFollower:
    """`offer` is told of each offer that has grown, on the follower's thread. `failure`: why the thread has ended."""

    def __init__(self, window: PoolWindow, offer: Callable[[str, OfferedBlocks], None]) -> None:
        self.failure: Exception | None = None
        self._window = window
        self._offer = offer
        self._queue: queue.SimpleQueue[tuple[Sequence[FollowedChunk], Sequence[LayersDone]] | None] = (
            queue.SimpleQueue()
        )
        self._thread: threading.Thread | None = None

    def follow(self, chunks: Sequence[FollowedChunk], done: Sequence[LayersDone]) -> None:
        """Begin to offer these chunks of a step; `done` has all layers, in order."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="kv-layers", daemon=True)
            self._thread.start()
        self._queue.put((chunks, done))

    def close(self) -> None:
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(_JOIN_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._window.use_own_stream()
            while (job := self._queue.get()) is not None:
                _FollowedStep(self._window, *job).offer_layers(self._offer)
        except Exception as error:  # the thread's boundary: the step loop raises it at its next step with prompts
            logger.exception("the thread that offers layers has failed")
            self.failure = error


class _FollowedStep:
    def __init__(self, window: PoolWindow, chunks: Sequence[FollowedChunk], done: Sequence[LayersDone]) -> None:
        self._window = window
        self._chunks = chunks
        self._done = done
        block_ids = [block_id for chunk in chunks for block_id in chunk.block_ids]
        num_tokens = [count for chunk in chunks for count in chunk.num_tokens]
        self._placed = window.place_ids(block_ids, num_tokens)

    def offer_layers(self, offer: Callable[[str, OfferedBlocks], None]) -> None:
        """Layers that the device has passed already are offered together: it may have passed most of a short prompt's
        before the launch has returned."""
        done = self._done
        while done:
            num_passed = next((at for at in range(1, len(done)) if not done[at].mark.query()), len(done))
            layers = range(done[0].layers.start, done[num_passed - 1].layers.stop)
            done[num_passed - 1].mark.wait()
            done = done[num_passed:]
            self._offer_digested(layers, offer)

    def _offer_digested(self, layers: range, offer: Callable[[str, OfferedBlocks], None]) -> None:
        digests_NLK: Digests = self._window.digests(*self._placed, layers).numpy()
        for chunk in self._chunks:
            ours_NLK, digests_NLK = digests_NLK[: len(chunk.block_ids)], digests_NLK[len(chunk.block_ids) :]
            if chunk.offered.add_layers(chunk.epoch, chunk.blocks, layers, ours_NLK):
                offer(chunk.ticket_id, chunk.offered)
