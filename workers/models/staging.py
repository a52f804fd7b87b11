"""`PinnedStaging`: one buffer between weight files and a GPU. Its reader fills it while the GPU copies from others."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class OpenFile:
    path: Path
    fileno: int

    def read_into(self, target: memoryview, offset: int) -> None:
        """Raises ValueError if the file ends before `target` is full."""
        num_read = 0
        while num_read < len(target):
            count = os.preadv(self.fileno, [target[num_read:]], offset + num_read)
            if not count:
                raise ValueError(f"{self.path} ends at byte {offset + num_read}, within a tensor")
            num_read += count


@dataclass(frozen=True, slots=True)
class Piece:
    """Some whole rows of a tensor in a file, and where they go on the device. `columns` are those to keep of each row;
    None: all. `target` may be of another dtype than the file."""

    file: OpenFile
    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    columns: slice | None
    target: Tensor

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def put(self, stored: Tensor) -> None:
        """Fill `target` from the bytes of the rows, in pinned memory if the target is on a GPU. Types are converted,
        and columns picked, on the target's device."""
        rows = stored.view(self.dtype).view(self.shape)
        if self.columns is None and self.dtype == self.target.dtype:
            self.target.copy_(rows, non_blocking=True)
            return
        there = rows.to(self.target.device, non_blocking=True)
        self.target.copy_(there if self.columns is None else there[:, self.columns], non_blocking=True)


class WeightStaging(Protocol):
    def load(self, piece: Piece, ready: Any) -> None:
        """Read a piece and begin to copy it, once what was begun on the device before the event `ready` is done."""
        ...

    def await_copies(self) -> None:
        """Let the current stream wait for all copies begun so far."""
        ...


class PinnedStaging:
    """Staging with a stream of its own, and memory from its first piece on. One thread at a time may use it."""

    def __init__(self, device: torch.device, num_bytes: int) -> None:
        self._device = device
        self._num_bytes = num_bytes
        self._bytes: Tensor | None = None
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]

    def load(self, piece: Piece, ready: torch.cuda.Event) -> None:
        if self._bytes is None:
            self._bytes = torch.empty(self._num_bytes, dtype=torch.uint8, pin_memory=True)
        self._copied.synchronize()  # the buffer is free again
        rows = self._bytes[: piece.num_bytes]
        piece.file.read_into(rows.numpy().data, piece.offset)
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            piece.put(rows)
            self._copied.record(self._stream)

    def await_copies(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._copied)
