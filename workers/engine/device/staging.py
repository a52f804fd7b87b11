"""`StepStaging`: brings a step's numbers from the host to a buffer of fixed address on the device, without waiting."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

_RING: Final = 4
"""Steps whose numbers may be on their way at once; the step loop launches at most one ahead."""

Ints = npt.NDArray[np.int32]


class StepStaging:
    """int32 numbers, `length` at most. A ring of pinned buffers, so that a copy that still runs is not overwritten."""

    def __init__(self, length: int, device: torch.device) -> None:
        self.device_E = torch.zeros(length, dtype=torch.int32, device=device)
        self._is_cuda = device.type == "cuda"
        buffers = [torch.zeros(length, dtype=torch.int32, pin_memory=self._is_cuda) for _ in range(_RING)]
        self._hosts = tuple((buffer, buffer.numpy()) for buffer in buffers)
        self._events: list[torch.cuda.Event | None] = [None] * _RING
        self._turn = 0

    def next(self) -> Ints:
        """The host's buffer for this step, with the numbers of some step before. Waits if its last copy still runs."""
        self._turn = (self._turn + 1) % _RING
        event = self._events[self._turn]
        if event is not None:
            event.synchronize()
        array: Ints = self._hosts[self._turn][1]
        return array

    def send(self, length: int) -> Tensor:
        """Copy the first numbers of the buffer; return them on the device."""
        target_E = self.device_E[:length]
        target_E.copy_(self._hosts[self._turn][0][:length], non_blocking=True)
        if self._is_cuda:
            event = self._events[self._turn]
            if event is None:
                event = self._events[self._turn] = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return target_E
