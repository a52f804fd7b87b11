"""`DeviceLoader`: reads one rank's share of a checkpoint into a GPU, in parallel and ahead of the model that asks.

What a model asks for, and in which order, is known before it is built (`count_weights`). Threads read pieces of the
files into pinned buffers, each of which copies to the device on a stream of its own; tensors are written into their
final place.
"""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Final, Self

import torch
from torch import Tensor

from tensorweave.workers.models.checkpoint import TensorPlace
from tensorweave.workers.models.rank_weights import TensorRows, WeightRequest
from tensorweave.workers.models.staging import OpenFile, Piece, PinnedStaging, WeightStaging

_PIECE_BYTES: Final = 16 << 20
_SPARE_STAGINGS: Final = 2
"""Beside one per reader. The device copies a piece in a tenth of the time that it takes to read one."""
_AHEAD_BYTES: Final = 1 << 30
"""What may be read before it is asked for: the memory that a model which converts its weights needs beside them."""


@dataclass(frozen=True, slots=True)
class _Reading:
    target: Tensor
    pieces: tuple[Future[None], ...]


class DeviceLoader:
    """A `RankWeights`. When it is left, its threads have ended and its files are closed.

    Args:
        places: where each tensor of the checkpoint lies.
        requests: what will be asked for, in this order. Other requests, and another order, only take longer.
        dtype: of all tensors that it returns.
        num_readers: threads.
        on_progress: called, on the thread that asks, with the share of `requests`' bytes that has been handed out.
        make_staging: called with the device and the size of a buffer in bytes.
    """

    def __init__(
        self,
        places: Mapping[str, TensorPlace],
        requests: Sequence[WeightRequest],
        dtype: torch.dtype,
        device: torch.device,
        num_readers: int,
        *,
        on_progress: Callable[[float], object] = lambda share: None,
        make_staging: Callable[[torch.device, int], WeightStaging] = PinnedStaging,
        piece_bytes: int = _PIECE_BYTES,
        ahead_bytes: int = _AHEAD_BYTES,
    ) -> None:
        self._places = places
        self._dtype = dtype
        self._device = device
        self._on_progress = on_progress
        self._ahead_bytes = ahead_bytes
        self._piece_bytes = max(piece_bytes, *(_row_bytes(place) for place in places.values()), 0)
        self._stagings = [make_staging(device, self._piece_bytes) for _ in range(num_readers + _SPARE_STAGINGS)]
        self._free: SimpleQueue[WeightStaging] = SimpleQueue()
        for staging in self._stagings:
            self._free.put(staging)
        self._pool = ThreadPoolExecutor(num_readers, "weights")
        self._files: dict[Path, OpenFile] = {}
        self._later = deque(requests)
        self._begun: dict[WeightRequest, _Reading] = {}
        self._was_begun: set[WeightRequest] = set()
        self._num_ahead = self._num_returned = 0
        self._num_expected = max(1, sum(self._bytes_of(request) for request in requests))

    # ---- RankWeights

    def vector(self, name: str, size: int) -> Tensor:
        return self._take(WeightRequest.of_vector(name, size))

    def rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self._take(WeightRequest(tuple(parts)))

    def matrix_rows(self, parts: Sequence[TensorRows]) -> Tensor:
        return self._take(WeightRequest(tuple(parts)))

    def matrix_columns(self, name: str, shape: tuple[int, int], columns: range) -> Tensor:
        return self._take(WeightRequest.of_columns(name, shape, columns))

    def tied_head(self, embedding_VD: Tensor) -> Tensor:
        return embedding_VD

    # ---- reading

    def _take(self, request: WeightRequest) -> Tensor:
        if request not in self._begun:
            self._begin(request)
        self._read_ahead()
        reading = self._begun.pop(request)
        for piece in reading.pieces:
            piece.result()
        for staging in self._stagings:
            staging.await_copies()
        self._num_ahead -= self._bytes_of(request)
        self._num_returned += self._bytes_of(request)
        self._on_progress(min(1.0, self._num_returned / self._num_expected))
        return reading.target

    def _read_ahead(self) -> None:
        while self._later and self._num_ahead < self._ahead_bytes:
            request = self._later.popleft()
            if request not in self._was_begun:
                self._begin(request)

    def _begin(self, request: WeightRequest) -> None:
        target = torch.empty(request.shape, dtype=self._dtype, device=self._device)
        ready = torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None
        self._was_begun.add(request)
        self._num_ahead += self._bytes_of(request)
        pieces = self._pieces(request, target)
        self._begun[request] = _Reading(target, tuple(self._pool.submit(self._load, p, ready) for p in pieces))

    def _pieces(self, request: WeightRequest, target: Tensor) -> Iterator[Piece]:
        columns = None if request.columns is None else slice(request.columns.start, request.columns.stop)
        first = 0
        for part in request.parts:
            place = self._places[part.name]
            row_bytes = _row_bytes(place)
            num_rows = self._piece_bytes // row_bytes
            for row in part.rows[::num_rows]:
                count = min(num_rows, part.rows.stop - row)
                yield Piece(
                    file=self._open(place.path),
                    offset=place.offset + row * row_bytes,
                    dtype=place.dtype,
                    shape=(count, *place.shape[1:]),
                    columns=columns,
                    target=target[first : first + count],
                )
                first += count

    def _load(self, piece: Piece, ready: Any) -> None:
        staging = self._free.get()
        try:
            staging.load(piece, ready)
        finally:
            self._free.put(staging)

    def _bytes_of(self, request: WeightRequest) -> int:
        return math.prod(request.shape) * self._dtype.itemsize

    def _open(self, path: Path) -> OpenFile:
        if path not in self._files:
            self._files[path] = OpenFile(path, os.open(path, os.O_RDONLY))
        return self._files[path]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.shutdown(cancel_futures=True)
        for file in self._files.values():
            os.close(file.fileno)


def _row_bytes(place: TensorPlace) -> int:
    return max(1, math.prod(place.shape[1:]) * place.dtype.itemsize)
