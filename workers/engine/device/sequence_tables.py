"""`SequenceTables`: which slot of the device's arrays each request has, and what its block table there lacks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from tensorweave.workers.step.request import LlmRequest, RequestState
from tensorweave.workers.step.resources import BaseResourceManager

Ints = npt.NDArray[np.int32]

_NO_BLOCKS: Final[Sequence[int]] = ()


@dataclass(slots=True, eq=False)
class HeldSlot:
    """`num_sent` of `blocks` are on the device, or on their way to it."""

    request: LlmRequest
    slot: int
    blocks: Sequence[int] = _NO_BLOCKS
    num_sent: int = 0


class SequenceTables(BaseResourceManager):
    """A request gets the smallest free slot when it is first computed, the same on every rank.

    All that a device does for a request comes in the order of its launches. So a slot may go to another request as soon
    as nothing more is launched for the one before.

    `tables_SW` is a copy of the device's block tables, for what is computed from them on the host. Slot `num_slots`
    belongs to nobody: padded rows have it.
    """

    def __init__(self, num_slots: int, max_blocks: int) -> None:
        self.padding_slot = num_slots
        self.tables_SW: Ints = np.zeros((num_slots + 1, max_blocks), dtype=np.int32)
        self.by_order: dict[int, HeldSlot] = {}
        self._free = list(range(num_slots - 1, -1, -1))
        self._places: list[Ints] = []
        self._blocks: list[Sequence[int]] = []

    def slot_of(self, request: LlmRequest, blocks: Sequence[int]) -> int:
        """The request's slot. What its table on the device lacks of `blocks` is noted.

        `blocks` grows at its end, and is another object where a block in it was exchanged (`KVCache.block_ids`).
        """
        held = self.by_order.get(request.order)
        if held is None:
            held = self._hold(request)
        if blocks is not held.blocks or len(blocks) != held.num_sent:
            self._note(held, blocks)
        return held.slot

    def take_changes(self) -> tuple[Ints, Ints]:
        """(places, blocks) of the entries noted since the last call; a place is slot * W + index."""
        if not self._places:
            return _EMPTY, _EMPTY
        places, blocks = (
            np.concatenate(self._places),
            np.fromiter((block for part in self._blocks for block in part), dtype=np.int32),
        )
        self._places, self._blocks = [], []
        return places, blocks

    def free_resources(self, request: LlmRequest) -> None:
        held = self.by_order.pop(request.order, None)
        if held is not None:
            self._give(held.slot)

    def _hold(self, request: LlmRequest) -> HeldSlot:
        if not self._free:
            self._reclaim()
        held = self.by_order[request.order] = HeldSlot(request, self._free.pop())
        return held

    def _reclaim(self) -> None:
        """Requests that end keep their blocks for a while, but no slot where others need it."""
        done = (RequestState.CLOSING, RequestState.DONE)
        for order, held in list(self.by_order.items()):
            if held.request.state in done:
                del self.by_order[order]
                self._free.append(held.slot)
        self._free.sort(reverse=True)
        if not self._free:
            raise ValueError(f"more than {self.padding_slot} requests run at once")

    def _give(self, slot: int) -> None:
        self._free.append(slot)
        self._free.sort(reverse=True)

    def _note(self, held: HeldSlot, blocks: Sequence[int]) -> None:
        start = held.num_sent if blocks is held.blocks and held.num_sent < len(blocks) else 0
        stop = len(blocks)
        width = self.tables_SW.shape[1]
        self.tables_SW[held.slot, start:stop] = blocks[start:]
        self._places.append(np.arange(held.slot * width + start, held.slot * width + stop, dtype=np.int32))
        self._blocks.append(blocks[start:])
        held.blocks, held.num_sent = blocks, stop


_EMPTY: Final[Ints] = np.zeros(0, dtype=np.int32)
