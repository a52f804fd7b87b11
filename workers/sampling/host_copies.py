"""`HostCopies`: numbers between the host and the device of the logits, in the order of its stream. Nothing here waits,
except for `Mark.wait`."""

from __future__ import annotations

from typing import Any, Protocol

import numpy.typing as npt
import torch
from torch import Tensor


class Mark(Protocol):
    def wait(self) -> None:
        """Wait until the device has done all that was launched before the mark."""


class NoMark:
    """The mark of a device that computes at once what is launched."""

    def wait(self) -> None:
        pass


class EventMark:
    def __init__(self) -> None:
        self._event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._event.record()

    def wait(self) -> None:
        self._event.synchronize()


class HostCopies:
    """On a CPU, `to_device` and `to_host` return the same memory that they are given."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"

    def to_device(self, numbers: npt.NDArray[Any] | Tensor) -> Tensor:
        """Through pinned memory, which torch reuses once the copy is done."""
        tensor = numbers if isinstance(numbers, Tensor) else torch.from_numpy(numbers)
        return tensor.pin_memory().to(self.device, non_blocking=True) if self._is_cuda else tensor

    def to_host(self, tensor: Tensor) -> Tensor:
        """Copy to pinned memory. The numbers are there once a mark that is set after this has been waited for."""
        return tensor.to("cpu", non_blocking=True)

    def mark(self) -> Mark:
        return EventMark() if self._is_cuda else NoMark()
